"""``python -m regimewrap`` and the ``regimewrap`` script: the command line, or a line that says what it needs."""

from __future__ import annotations

import io
import signal
import sys


def main() -> int:
    """Run the command line with this process's arguments; return the exit status."""
    try:
        from regimewrap.cli import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("rich", "typer"):  # some versions of typer need rich
            raise
        from regimewrap.errors import to_install

        sys.stderr.write(f"Error: the command line needs {package}; {to_install('cli')}.\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see regimewrap._command
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(
        raw, io.RawIOBase
    ):  # under PYTHONUNBUFFERED Python drops what a full disk did not take, and says nothing
        buffer, told = io.BufferedWriter(raw), sys.stdout
        sys.stdout = io.TextIOWrapper(buffer, told.encoding, told.errors, line_buffering=True)
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
