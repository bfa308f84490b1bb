"""Which GPU a worker process takes, and how many it shares it with."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: every process takes the first GPU
    fcntl = None

_last: list[tuple[int, int]] = []  # the place this process had before: a context on a second GPU costs memory


def places(device: str, per_gpu: int) -> list[tuple[int, int]]:
    """(GPU, share) for each process that fits on this machine; [] if the device is no CUDA device.

    device: "cuda" for all GPUs that this process sees, "cuda:1" for one. Ordered so that processes spread
    over the GPUs before two share one.
    """
    family, _, index = device.partition(":")
    if family != "cuda":
        return []
    gpus = [int(index)] if index else range(torch.cuda.device_count())
    return [(gpu, share) for share in range(per_gpu) for gpu in gpus]


@contextmanager
def gpu(device: str, per_gpu: int, sweep: str) -> Iterator[None]:
    """A place on a GPU while the block runs, in a worker of the sweep of that name; waits for a free one.

    A place is a lock on a file of this machine's temporary folder, so a killed process leaves none behind.
    With one GPU and nothing to choose (as under dask-cuda, or Ray, which show each worker its own), no lock.
    """
    found = places(device, per_gpu)
    if not found:
        yield
    elif len({gpu for gpu, _ in found}) == 1 or not fcntl:
        torch.cuda.set_device(found[0][0])
        yield
    else:
        folder = _folder(sweep)
        folder.mkdir(exist_ok=True)
        file, place = _take(sorted(found, key=lambda place: place not in _last), folder)
        with file:
            _last[:] = [place]
            torch.cuda.set_device(place[0])
            yield


def free_gpus(sweep: str) -> None:
    """After the sweep, on the machine of its driver: remove the files that marked the places."""
    shutil.rmtree(_folder(sweep), ignore_errors=True)


def _folder(sweep: str) -> Path:
    return Path(tempfile.gettempdir()) / f"sweep-gpus-{sweep}"


def _take(found: list[tuple[int, int]], folder: Path):
    """The first free place, as an open file that holds its lock."""
    while True:
        for gpu, share in found:
            file = open(folder / f"{gpu}.{share}", "ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file, (gpu, share)
            except BlockingIOError:
                file.close()
        time.sleep(0.2)
