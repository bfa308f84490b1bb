"""Many runs: every setting of a grid with every seed, skipping what the store already holds.

    rows = run_sweep(train_composition, grid, seeds=[0, 1, 2], store=store, n_jobs="auto", scratch=folder)

A run is a pure function of its settings and seed, on one thread, so rows depend neither on their order nor on
where they are computed: in this process (`n_jobs=1`), in joblib's, on a Dask or on a Ray cluster. A run that
fails is tried once more, then recorded with its traceback; the others go on. Whatever is killed, the same
call goes on from the rows that the store has.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from lib.paths import ROOT
from lib.sweeps.checks import check_scratch, check_work, width_of
from lib.sweeps.engines import BACKENDS, Dask, Engine, Local, Ray
from lib.sweeps.gpus import free_gpus
from lib.sweeps.one_run import Call, lock_of
from lib.sweeps.progress import Reporter, Status, listener
from lib.sweeps.spread import one_by_one, spread
from lib.sweeps.stopping import Interrupted, Stop, signals

__all__ = ["BACKENDS", "Status", "run_sweep"]


def run_sweep(
    run: Callable[..., dict],
    grid: Sequence[Mapping],
    *,
    seeds: Sequence[int],
    store=None,
    n_jobs: int | str = 1,
    backend: str = "local",
    device: str = "cpu",
    per_gpu: int = 1,
    time_limit: float | None = None,
    scratch: Path | None = None,
    progress: bool | Callable[[Status], None] = True,
    about: Callable[[], Mapping] | None = None,
) -> list[dict]:
    """Rows of all settings in `grid` with all `seeds`, in that order (settings outside, seeds inside).

    run(settings, *, seed) -> dict, with a keyword `scratch` if it keeps checkpoints: it then gets a folder of
    its own under `scratch`, removed once its row is recorded, so that a killed sweep continues within a run.
    store: as `lib.evidence.rows.RowStore`. It must have `.key(settings, seed)`, `.has(key)`, `.rows()`,
    `.append(settings=, seed=, result=, wall_s=, core_s=, failed=)`, and may have `.held()`, `.expected(…)`
    and `.rescue(row)`. Rows are appended as they finish, and runs that it has are not repeated. Without one,
    a row is the dict of what `append` would have been given.
    n_jobs: processes, one thread each; "auto": as many as this process has cores. A cluster that exists
    already decides itself; without one, "dask" and "ray" start one of that size on this machine.
    device: "cuda" gives each process a GPU, `per_gpu` processes to one; "cuda:1" gives all of them that one.
    time_limit: wall seconds of one attempt; a run above it has failed. With one, runs get a worker process
    even if n_jobs=1, as only that can be ended when a call hangs outside Python; on a cluster it is not.
    Without one, n_jobs=1 computes in this process: a run that crashes it ends the sweep, each time again.
    progress: True for a bar or lines, or a function that is called with a `Status` (from another thread too).
    about: called once in each worker process, for `append(about=…)`; if it raises, so does the sweep.

    Ctrl-C and SIGTERM finish the append under way, say how to go on, and raise KeyboardInterrupt or
    SystemExit(143). Raises ValueError for an empty grid, repeated settings or seeds, an unknown backend;
    ImportError and ConnectionError for a cluster that cannot be used; OSError if a row cannot be written, or
    nothing more in `scratch`.
    """
    check_work(run, grid, seeds, progress)
    names = _names(grid, seeds, store)
    width = width_of(n_jobs, backend, device, per_gpu, time_limit)
    keeps = scratch is not None and "scratch" in inspect.signature(run).parameters
    folder = Path(scratch).resolve() if keeps else None
    sweep = uuid.uuid4().hex[:12]
    with ExitStack() as stack:
        if hasattr(store, "held"):
            stack.enter_context(store.held())
        calls = [
            Call(
                sweep=sweep, name=name, run=run, settings=settings, seed=seed, about=about, device=device,
                per_gpu=per_gpu, time_limit=time_limit, scratch=folder and folder / name,
            )
            for name, (settings, seed) in names.items()
            if store is None or not store.has(store.key(settings, seed))
        ]  # fmt: skip
        if folder and calls:
            check_scratch(folder)
        stack.callback(free_gpus, sweep)
        stop = stack.enter_context(signals())
        # A sweep of one run has nothing to spread. The last of many stays with a worker: it may kill one.
        # Only a process that does nothing else can be ended when its run hangs beyond a time limit.
        alone = width == 1 or len(names) == 1
        here = not calls or (backend == "local" and alone and time_limit is None)
        report = Reporter(
            listener(progress), {call.name: _expected(store, call) for call in calls},
            skipped=len(names) - len(calls), width=lambda: engine.width,
        )  # fmt: skip
        try:
            with stop.interrupting():  # to connect to a cluster may take long
                engine = Engine() if here else _engine(backend, min(width, len(calls)), device, per_gpu)
            with engine, report:
                rows = one_by_one(calls, stop) if here else spread(calls, engine, stop, report)
                fresh = _record(rows, store, stop, report)
                if stop.asked:
                    raise Interrupted
        except Interrupted:
            recorded, total = report.recorded()
            print(f"Stopped: {recorded} of {total} runs are {_kept(store)}.", flush=True)
            stop.raise_as_usual()
    if store is None:
        return [fresh[name] for name in names]
    stored = {_name(store.key(row["settings"], row["seed"]), store): row for row in store.rows()}
    return [stored[name] for name in names]


def _names(grid: Sequence[Mapping], seeds: Sequence[int], store) -> dict[str, tuple[dict, int]]:
    """Every run under a name that can be a file's."""
    key = _key if store is None else store.key
    names = {_name(key(part, seed), store): (dict(part), seed) for part in grid for seed in seeds}
    if len(names) < len(grid) * len(seeds):
        raise ValueError(
            f"grid or seeds repeat themselves: {len(grid) * len(seeds)} runs, only {len(names)} different"
        )
    return names


def _name(key: str, store) -> str:
    """Of the key and the code that the store speaks for: other code starts its runs afresh."""
    return hashlib.sha256(f"{key} {getattr(store, 'code', '')}".encode()).hexdigest()[:16]


def _key(settings: Mapping, seed: int) -> str:
    """What a store's `key` gives, for want of a store: the same whatever the order of the settings."""
    return json.dumps({"settings": dict(settings), "seed": seed}, sort_keys=True)


def _engine(backend: str, n_jobs: int, device: str, per_gpu: int) -> Engine:
    gpu = device.startswith("cuda")
    if backend == "dask":
        return Dask(n_jobs)
    if backend == "ray":
        return Ray(n_jobs, gpu_share=1 / per_gpu if gpu else 0)
    return Local(n_jobs, keep=not gpu)  # an idle process would keep its memory on the GPU


def _record(rows: Iterator[tuple[Call, dict]], store, stop: Stop, report: Reporter) -> dict[str, dict]:
    """Append each row as it comes; -> the rows by name. OSError if that fails: says what became of them."""
    fresh, lost, trouble, no_scratch = {}, [], None, None
    for call, row in rows:
        if "no_scratch" in row:
            no_scratch, stop.asked = (call.scratch.parent, *row["no_scratch"]), True
            continue
        try:
            if trouble is None:
                fresh[call.name] = kept = _append(store, row)
        except OSError as error:
            trouble, stop.asked = error, True  # rows that are ready still come
        if trouble is not None:
            lost.append(store.rescue(row) if hasattr(store, "rescue") else None)
            continue
        failed = bool(kept.get("failed"))
        report.count(call.name, wall_s=row["wall_s"], core_s=row["core_s"], failed=failed)
        if call.scratch is not None and not failed:
            shutil.rmtree(call.scratch, ignore_errors=True)
            lock_of(call.scratch).unlink(missing_ok=True)
    if trouble is not None:
        raise _unwritten(store, trouble, lost, report)
    if no_scratch is not None:
        raise _unkept(store, *no_scratch, report)
    return fresh


def _append(store, row: dict) -> dict:
    about = row.pop("about")
    if store is None:
        return row
    if about is not None:
        row["about"] = about
    return store.append(**row)


def _unwritten(store, error: OSError, lost: list[Path | None], report: Reporter) -> OSError:
    """What happened, what was kept and where, and how to go on."""
    kept = sorted({str(path) for path in lost if path})
    count = "The run that had" if len(lost) == 1 else f"The {len(lost)} runs that had"
    verb, them = ("was", "it") if len(lost) == 1 else ("were", "them")
    fate = f"{verb} kept in {kept[0]}, and the next start takes {them} in" if kept else "will be repeated"
    recorded, total = report.recorded()
    found = OSError(
        f"cannot write {_file(store)}: {error.strerror or error}. {count} finished {fate}. Make room, or "
        f"make the file writable; then the same command goes on ({recorded} of {total} runs are recorded)"
    )
    found.errno = error.errno
    found.__cause__ = error
    return found


def _unkept(store, folder: Path, number: int | None, reason: str, report: Reporter) -> OSError:
    """The disk under the scratch folder fails: every run to come would, through no fault of its own."""
    recorded, total = report.recorded()
    found = OSError(
        f"cannot write in the scratch folder {folder}: {reason}. Make room there, or name another folder; "
        f"{recorded} of {total} runs are {_kept(store)}"
    )
    found.errno = number
    return found


def _kept(store) -> str:
    if store is None:
        return "done, and lost without a store"
    return f"recorded in {_file(store)}; the same command goes on from there"


def _file(store) -> str:
    path = Path(getattr(store, "path", "the store"))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def _expected(store, call: Call) -> float | None:
    return store.expected(call.settings, call.seed) if hasattr(store, "expected") else None
