"""One thread for every test and every process it starts.

Runs are compared bit for bit, and sums over several threads round differently from one process to the next. This has
to stand in the environment before torch is imported.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
