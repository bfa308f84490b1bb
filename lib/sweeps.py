"""Many runs: every setting of a grid with every seed, skipping what the store already holds.

    rows = run_sweep(train_composition, grid, seeds=[0, 1, 2], store=store, n_jobs=2, scratch=folder)

A run is a pure function of its settings and seed, on one thread, so rows depend neither on their order nor on
`n_jobs`. A run that fails is tried once more, then recorded with its traceback; the others go on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import joblib
import torch
from tqdm import tqdm

TRIES = 2


def run_key(settings: Mapping, seed: int) -> str:
    """A short name for one run, the same whatever the order of the settings.

    >>> run_key({"n": 8, "L": 2}, 0) == run_key({"L": 2, "n": 8}, 0) != run_key({"L": 2, "n": 8}, 1)
    True
    """
    text = json.dumps({"settings": dict(settings), "seed": seed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_sweep(
    run: Callable[..., dict],
    grid: Sequence[Mapping],
    *,
    seeds: Sequence[int],
    store=None,
    n_jobs: int = 1,
    scratch: Path | None = None,
    progress: bool = True,
) -> list[dict]:
    """Rows of all settings in `grid` with all `seeds`, in that order (settings outside, seeds inside).

    run(settings, *, seed) -> dict, with a keyword `scratch` if it keeps checkpoints: it then gets a folder of
    its own under `scratch`, removed once the run succeeded, so that a killed sweep continues within a run.
    store: `.key(settings, seed)`, `.has(key)`, `.rows()`, `.append(settings=, seed=, result=, wall_s=,
    core_s=, failed=)`, as `lib.evidence.rows.RowStore`. Rows are appended as they finish, and runs that the
    store has are not repeated. Without one, a row is the dict of what `append` would have been given.
    n_jobs: local processes, one thread each. Raises ValueError for an empty grid, repeated settings or seeds.
    """
    if not grid or not seeds or n_jobs < 1:
        raise ValueError(
            f"a sweep needs settings, seeds and n_jobs >= 1, got {len(grid)} settings, {len(seeds)} seeds, "
            f"n_jobs={n_jobs}"
        )
    key = run_key if store is None else store.key
    wanted = {key(settings, seed): (dict(settings), seed) for settings in grid for seed in seeds}
    if len(wanted) < len(grid) * len(seeds):
        raise ValueError(
            f"grid or seeds repeat themselves: {len(grid) * len(seeds)} runs, only {len(wanted)} different"
        )
    todo = {k: wanted[k] for k in wanted if store is None or not store.has(k)}
    own_folder = scratch is not None and "scratch" in inspect.signature(run).parameters
    calls = [
        joblib.delayed(_one)(run, *todo[k], Path(scratch) / _folder_name(k, store) if own_folder else None)
        for k in todo
    ]
    fresh, start = {}, time.monotonic()
    with tqdm(total=len(todo), unit="run", disable=not progress, leave=False) as bar:
        for row in _in_turn(calls, n_jobs):
            fresh[key(row["settings"], row["seed"])] = row
            if store is not None:
                store.append(**row)
            bar.update()
    if progress:
        failed = sum(row["failed"] is not None for row in fresh.values())
        core_s = sum(row["core_s"] for row in fresh.values())
        print(
            f"runs: {len(fresh) - failed} done, {len(wanted) - len(todo)} skipped, {failed} failed; "
            f"{time.monotonic() - start:.1f} s wall, {core_s:.1f} core-s"
        )
    if store is not None:
        stored = {key(row["settings"], row["seed"]): row for row in store.rows()}
        fresh = {k: stored[k] for k in wanted}
    return [fresh[k] for k in wanted]


def _in_turn(calls: list, n_jobs: int) -> Iterator[dict]:
    """Rows as they finish; a single job stays in this process, where a debugger can follow it."""
    if n_jobs == 1 or len(calls) < 2:
        yield from (function(*args, **kwargs) for function, args, kwargs in calls)
        return
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        yield from joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")(calls)


def _one(run: Callable[..., dict], settings: dict, seed: int, scratch: Path | None) -> dict:
    """One run on one thread, tried twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wall, core = time.perf_counter(), time.process_time()
    result, failed = None, None
    try:
        for _ in range(TRIES):
            try:
                result = run(settings, seed=seed, **({} if scratch is None else {"scratch": scratch}))
                failed = None
                break
            except Exception:
                failed = traceback.format_exc()
    finally:
        torch.set_num_threads(threads)
    if scratch is not None and failed is None:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "settings": settings,
        "seed": seed,
        "result": result,
        "failed": failed,
        "wall_s": time.perf_counter() - wall,
        "core_s": time.process_time() - core,
    }


def _folder_name(key: str, store) -> str:
    """Named after the key and the code that the store speaks for: other code starts its runs afresh."""
    return hashlib.sha256(f"{key} {getattr(store, 'code', '')}".encode()).hexdigest()[:16]
