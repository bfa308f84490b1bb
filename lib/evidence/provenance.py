"""Where a number comes from: versions, machine, device, parameters. No names of hosts, users or folders."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from lib.evidence.code import lib_digest, loaded_digest
from lib.evidence.files import EvidenceError
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
        "lib": lib_digest(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    } | of_process(device)


def of_process(device: str) -> dict:
    """What the process that computes adds: machine, device, versions."""
    return {
        "device": device_name(device),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }


def of_worker(run: Callable, code: str, device: str) -> dict:
    """`of_process`, asked where `run` is to run, perhaps on another machine.

    Raises EvidenceError if that has loaded other code than the driver, whose digest is `code`, or code that
    was edited since, as in a worker that stands through a `git pull`.
    """
    if loaded_digest(run) != code:
        raise EvidenceError(
            f"the worker (process {os.getpid()} on {platform.node()}) has other code for {run.__module__}."
            f"{run.__qualname__} than the driver: install the same checkout there, or, if the code was "
            "edited meanwhile, run the chapter again"
        )
    return of_process(device)


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

        # A driver without a GPU may send its runs to workers that have one, and they name it.
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "CUDA"
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
