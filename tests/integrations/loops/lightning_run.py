# ruff: noqa: T201 - scripts print
"""Lightning's loop with gradient accumulation, on one rank or several; usage and output as ``plain_run.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_tiny import fit
from tiny import UPDATES, digest, policy_named, trace

folder, policy = Path(sys.argv[1]), policy_named(sys.argv[2])
# With two of them, the last update of an epoch has one only: there are 25.
callback, module = fit(UPDATES, policy, folder, micro_batches=2, say=True)
print(json.dumps({"trace": trace(callback.cycler) if callback else [], "digest": digest(module)}))
