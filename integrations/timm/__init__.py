"""regimewrap in timm: models for its registry, its task and scheduler seams. ``regimewrap train`` is a room of its own.

Importing this registers ``regimewrap_wrn28_4``, ``regimewrap_wrn28_10`` and ``regimewrap_auto`` with timm, so that
timm's own ``train.py`` can name them: ``--device-modules regimewrap.integrations.timm``. It touches nothing else.
"""

from ..requires import require

require("timm", at_least="1.0.27", extra="timm")  # the first with TrainingTask.get_task_state

from .models import regimewrap_auto, regimewrap_wrn28_4, regimewrap_wrn28_10  # noqa: E402 - after the check
from .open_loop import RegimeScheduler  # noqa: E402
from .task import RegimeTask  # noqa: E402

__all__ = [
    "RegimeScheduler",
    "RegimeTask",
    "regimewrap_auto",
    "regimewrap_wrn28_4",
    "regimewrap_wrn28_10",
]
