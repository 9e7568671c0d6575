"""Lets the tests in this folder import ``processes`` and what the loops share, which importmode=importlib would not."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "loops")]
