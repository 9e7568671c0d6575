"""Where and with what a run was made, for its record."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch

from regimewrap import __version__


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    return {"regimewrap": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_text(device: torch.device) -> str:
    """Return the device in words, such as ``"CPU, x86_64, 2 cores"``."""
    if device.type == "cuda":
        return f"GPU, {torch.cuda.get_device_name(device)}"
    return f"{device.type.upper()}, {platform.machine() or 'unknown kind'}, {os.cpu_count()} cores"


def processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
