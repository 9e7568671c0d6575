"""A path so that tests can import what stands beside them, which importmode=importlib would not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
