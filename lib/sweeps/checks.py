"""What a sweep is asked for, looked at before anything runs: each mistake is named with what is allowed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import joblib
import torch

from lib.choices import check_choice
from lib.sweeps.engines import BACKENDS
from lib.sweeps.gpus import places

DEVICES = ("cpu", "cuda", "mps")


def check_work(run, grid, seeds, progress) -> None:
    """ValueError unless all four are of the kind that a sweep takes."""
    if not callable(run):
        raise ValueError(f"run is a function (settings, *, seed) -> dict, got {run!r}")
    if not _is_list(grid) or not all(isinstance(part, Mapping) for part in grid):
        raise ValueError(f"grid is a list of dicts, one for each setting, got {_shown(grid)}")
    if not _is_list(seeds) or not all(_is_whole(seed) for seed in seeds):
        raise ValueError(f"seeds is a list or range of whole numbers, got {_shown(seeds)}")
    if not grid or not seeds:
        raise ValueError(f"a sweep needs settings and seeds, got {len(grid)} settings, {len(seeds)} seeds")
    if not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"progress is True, False or a function that takes a Status, got {progress!r}")


def width_of(n_jobs, backend: str, device: str, per_gpu: int, time_limit) -> int:
    """Processes to use on this machine, after a look at all that says how runs are spread."""
    check_choice("backend", backend, BACKENDS)
    if n_jobs == "auto":
        n_jobs = joblib.cpu_count()  # of this process: affinity and container limits count
    for name, value in {"n_jobs": n_jobs, "per_gpu": per_gpu}.items():
        if not _is_whole(value) or value < 1:
            also = " or 'auto'" if name == "n_jobs" else ""
            raise ValueError(f"{name} is a whole number of at least 1{also}, got {name}={value!r}")
    known = isinstance(time_limit, Real) and not isinstance(time_limit, bool)
    if time_limit is not None and not (known and 0 < time_limit < float("inf")):
        raise ValueError(f"time_limit is a number of seconds above 0, or None, got {time_limit!r}")
    _check_device(device, backend)
    shares = places(device, per_gpu)
    return min(n_jobs, len(shares)) if shares else n_jobs


def check_scratch(folder: Path) -> None:
    """OSError if no file can be made there, before a run finds out after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        found = OSError(
            f"cannot write in the scratch folder {folder}: {error.strerror or error}. Make it writable, or "
            "name another; nothing has run yet"
        )
        found.errno = error.errno
        raise found from error


def _check_device(device: str, backend: str) -> None:
    """Of a cluster's workers only they know which GPUs they have."""
    family, _, index = str(device).partition(":")
    check_choice("device", family, DEVICES)
    if ":" in str(device) and not (family == "cuda" and index.isdecimal()):
        raise ValueError(f"unknown device {device!r}; only CUDA devices take an index, as in 'cuda:1'")
    if family == "cuda" and backend == "local":
        has = torch.cuda.device_count()
        if has <= int(index or 0):
            raise ValueError(f"no device {device!r}: this machine has {has} GPUs that torch can use")


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
