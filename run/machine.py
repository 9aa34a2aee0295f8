"""The computer that a run used, in words, so that its times can be compared with others.

describe_machine()     # {"machine": "AMD EPYC 7763, 8 cores, 31 GiB; NVIDIA H100", "software": "Python 3.11.9, ..."}
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory and accelerators; and the versions of Python, PyTorch and the system."""
    parts = [f"{_processor()}, {os.cpu_count()} cores{_memory()}"]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    software = f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}"
    return {"machine": "; ".join(parts), "software": software}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory() -> str:
    return f", {psutil.virtual_memory().total / 2**30:.0f} GiB"
