"""Makes Ctrl-C end the command line without a traceback while torch is imported; in any other program it does nothing.

``regimewrap`` imports this before torch. ``__main__`` gives Ctrl-C back to Python once it can say what was interrupted.
"""

import signal
import sys
from pathlib import Path

if (
    Path(sys.argv[0]).name == "regimewrap" or (sys.argv[0] == "-m" and "regimewrap" in sys.orig_argv)
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
