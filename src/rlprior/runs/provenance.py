"""Where a run is made: versions, commit of the code, hardware."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Where a run is made: versions, commit of the code, hardware."""
    import numpy
    import torch
    import transformers

    import rlprior

    return {
        "versions": {
            "rlprior": rlprior.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
        "commit": _commit(),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and accelerators of this machine."""
    import torch

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_bytes": memory, "gpus": devices}


def _commit() -> str | None:
    """Commit of the code, with `+` where files have been changed since; None outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).parent
    head = subprocess.run([git, "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    dirty = subprocess.run(
        [git, "-C", here, "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
