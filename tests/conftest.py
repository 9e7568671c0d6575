"""One thread for every test and every process it starts, and how many examples a property is tried on.

Runs are compared bit for bit, and sums over several threads round differently from one process to the next. This has
to stand in the environment before torch is imported.

The default run tries each property on few examples; ``--hypothesis-profile=thorough`` on many more.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("quick", max_examples=30, deadline=None)
settings.register_profile("thorough", max_examples=200, deadline=None)
settings.load_profile("quick")
