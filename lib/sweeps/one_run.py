"""What a worker does: one run, on one thread, tried twice, within its time limit.

Everything here gives the same row in this process, in a joblib worker, on Dask and on Ray.
"""

from __future__ import annotations

import copy
import errno
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.sweeps.gpus import gpu
from lib.sweeps.limits import TimeLimit, TimeUp

try:
    import fcntl
except ImportError:  # Windows: a run that outlived its driver may share its scratch folder with the next
    fcntl = None

TRIES = 2
NO_DISK = {errno.ENOSPC, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
DIED = (
    "its worker process died, and died again when the run was repeated with nothing beside it: killed from "
    "outside (often because memory ran out) or by a crash in native code"
)
_facts: dict[str, Mapping | None] = {}  # what `about` said in this process, by sweep; only the latest


@dataclass(frozen=True, kw_only=True)
class Call:
    """One run on its way to a worker. name: its file name; marks: a folder, for local workers only."""

    sweep: str
    name: str
    run: Callable[..., dict]
    settings: dict
    seed: int
    scratch: Path | None
    about: Callable[[], Mapping] | None
    time_limit: float | None
    device: str
    per_gpu: int
    marks: Path | None = None

    @property
    def started(self) -> Path:
        """Exists once a local worker has begun the run."""
        return self.marks / f"{self.name}.started"

    @property
    def overran(self) -> Path:
        """Is not empty if the process ended itself because the run hung beyond its time limit."""
        return self.marks / f"{self.name}.overran"


class NoScratchError(Exception):
    """The disk under the scratch folder fails, which is no fault of the run's. args: errno and reason."""


def attempt(call: Call, here: bool = False) -> dict:
    """The row of one run, with what `about` says of this process.

    {"refused": error} if `about` raises, {"no_scratch": (errno, reason)} if the disk of the scratch folder
    fails. here: in the process of the driver, where Ctrl-C is the sweep's and not an error of the run.
    """
    if call.marks:
        call.started.touch()
    try:
        about = _about(call)
    except Exception as error:
        return {"refused": error}
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(gpu(call.device, call.per_gpu, call.sweep))
        if call.scratch is not None:
            try:
                stack.enter_context(_alone_in(call.scratch))
            except OSError as error:
                return {"no_scratch": (error.errno, error.strerror or str(error))}
        wall, core = time.perf_counter(), time.process_time()
        try:
            result, failed = _tried(call, here)
        except NoScratchError as trouble:
            return {"no_scratch": trouble.args}
        return row(
            call, result, failed, about, time.perf_counter() - wall, time.process_time() - core
        )


def row(
    call: Call, result: object, failed: str | None, about: Mapping | None = None, wall_s=0.0, core_s=0.0
) -> dict:
    return {
        "settings": call.settings, "seed": call.seed, "result": result, "failed": failed, "about": about,
        "wall_s": wall_s, "core_s": core_s,
    }  # fmt: skip


def over_limit(call: Call, stopped: bool = True) -> str:
    """stopped: False for a run that could not be interrupted, and ended by itself after its limit."""
    end = "was stopped" if stopped else "ended only then, by itself"
    return f"it ran longer than its time limit of {call.time_limit:g} s, and {end}"


def _about(call: Call) -> Mapping | None:
    if call.sweep not in _facts:
        facts = None if call.about is None else call.about()
        _facts.clear()
        _facts[call.sweep] = facts
    return _facts[call.sweep]


def _tried(call: Call, here: bool) -> tuple[object, str | None]:
    """(result, None), or (None, how it failed). Over its time limit, a run is not tried again."""
    failed = None
    for _ in range(TRIES):
        limit, ended = TimeLimit(call.time_limit, call.marks and call.overran), False
        try:
            limit.start()
            try:
                # A copy: the row, and the key of it, tell what the grid has, whatever a run does to its own.
                settings = copy.deepcopy(call.settings)
                result = call.run(settings, seed=call.seed, **_folder(call))
                ended = True
            finally:
                limit.stop()
            failed = _unportable(result)
        except TimeUp:
            limit.stop()
        except BaseException as error:
            if here and not isinstance(error, (Exception, SystemExit)):
                raise
            if call.scratch is not None and (found := _disk_trouble(error)):
                raise NoScratchError(found.errno, found.strerror or str(found)) from error
            failed = _trace(error)
        if limit.fired:
            return None, over_limit(call, stopped=not ended)
        if failed is None:
            return result, None
    return None, failed


def _disk_trouble(error: BaseException | None) -> OSError | None:
    """The OSError of a full or failing disk behind `error`: torch's own may hide it."""
    while error is not None and not (isinstance(error, OSError) and error.errno in NO_DISK):
        error = error.__cause__ or error.__context__
    return error


def _folder(call: Call) -> dict[str, Path]:
    return {} if call.scratch is None else {"scratch": call.scratch}


def _trace(error: BaseException) -> str:
    """The traceback from the run on: what stands above it differs from one backend to the next."""
    below = error.__traceback__.tb_next
    return "".join(traceback.format_exception(type(error), error, below))


def _unportable(result: object) -> str | None:
    """Why `result` could not travel to the driver; asked in its own process too, so that all rows agree."""
    parts = result.items() if isinstance(result, Mapping) else [(None, result)]
    for name, part in parts:
        try:
            pickle.dumps(part)
        except Exception:
            place = "the run returned" if name is None else f"result[{name!r}] is"
            return (
                f"TypeError: {place} a {type(part).__name__}, which no process can hand to another; "
                "return numbers, strings, lists"
            )
    return None


@contextmanager
def _alone_in(scratch: Path):
    """Wait until no other process works in `scratch`: a worker of a cluster may outlive a killed driver."""
    scratch.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_of(scratch), "ab") as file:
        while fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        yield


def lock_of(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.lock")
