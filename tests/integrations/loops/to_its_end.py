"""Run a script as its own process would, and end the process with its last line.

Torch's gloo threads abort now and then while the interpreter shuts down ("terminate called without an active
exception"; torch 2.14.1, two of 27 runs of a two-rank loop without regimewrap), when all that is tested is done. A
script that fails, or that exits with a code, still does so.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
