"""What a report says about where it was made: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pdserve

# Instructions that decide which kernels run.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_PACKAGES = ("torch", "ucxx-cu12", "ucxx-cu13", "uvicorn", "matplotlib")


def environment() -> Mapping[str, str]:
    """Of this machine; a target elsewhere is not described by it."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpu, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "pdserve": pdserve.__version__,
        "Python": platform.python_version(),
        "packages": ", ".join(_versions()),
        "system": f"{platform.system()} {platform.release()}",
        "CPU": model[1] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "CPU instructions": ", ".join(flag for flag in _FLAGS if flag in known) or "unknown",
        "memory": f"{memory_bytes / 2**30:.0f} GiB",
        "GPU": _gpus(),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
    }


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 and done.stdout.strip() else "none"
