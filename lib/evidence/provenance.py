"""Where a number comes from: versions, machine, device, parameters. No names of hosts, users or folders."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from lib.evidence.code import lib_digest
from lib.evidence.rows import plain


def collect(*, chapter: str, profile: str, device: str, parameters: Mapping | None = None) -> dict:
    """What is known before an experiment starts, ready for JSON.

    device: as `lib.choices.resolve_device` gave it. Raises TypeError or ValueError if a parameter does not
    fit JSON.
    """
    return {
        "chapter": chapter,
        "profile": profile,
        "parameters": plain(parameters or {}, "parameters"),
        "device": device_name(device),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "lib": lib_digest(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def file_digest(path: Path) -> str:
    """SHA-256 of a data or model file, as hex, first 16 digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def version(package: str) -> str:
    """The installed version, local label included, without importing the package; "none" if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch  # only here: a chapter on a CPU has no need of it for its name

        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device == "mps" else "CPU"


@cache
def machine() -> dict:
    """CPU model, cores this process may use, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine() or "unknown"
