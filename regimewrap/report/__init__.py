"""Records of a run -> a sentence, a table, plots and one self-contained page.

Reads ``regimewrap.report.results`` and writes files. It trains nothing, loads no torch, and imports matplotlib only
when a plot is asked for.
"""

from __future__ import annotations

from regimewrap.report.folder import write_report
from regimewrap.report.tables import console_table
from regimewrap.report.words import conclusion

__all__ = ["conclusion", "console_table", "write_report"]
