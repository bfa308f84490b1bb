"""Workers that are killed, hang or are refused, as real processes: the run is retried, the others go on."""

import ctypes
import errno
import os
import signal
import sys
import threading
import time
import types
from concurrent.futures import Future

import pytest

from lib.evidence.rows import RowStore
from lib.sweeps import run_sweep
from lib.sweeps.one_run import DIED, Call, attempt
from lib.sweeps.spread import _outcome

ENGINES = ["local", "dask", "ray"]
GRID = [{"a": a} for a in range(4)]


def values(rows):
    return [row["result"]["value"] if row["result"] else None for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_run_that_kills_its_worker_twice_has_failed_and_costs_no_other_run(tmp_path, engine):
    log = tmp_path / "calls.log"

    def run(settings, *, seed):
        import os
        import signal

        with open(log, "a") as file:
            file.write(f"{settings['a']}\n")
        if settings["a"] == 1 or (settings["a"] == 2 and log.read_text().split().count("2") == 1):
            os.kill(os.getpid(), signal.SIGKILL)  # run 1 each time, run 2 the first time
        return {"value": settings["a"]}

    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    rows = run_sweep(run, GRID, seeds=[0], store=store, n_jobs=2, backend=engine, progress=False)
    assert values(rows) == [0, None, 2, 3]
    assert [row.get("failed") for row in rows] == [None, DIED, None, None]
    assert log.read_text().split().count("1") == 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_worker_killed_from_outside_costs_only_steps_that_were_not_saved(tmp_path, engine, drive):
    driver = drive(engine, 2).after(12)
    victim = driver.steps()[-1][0]
    os.kill(victim, signal.SIGKILL)
    status, out = driver.end()
    assert (status, "runs: 6 done, 0 skipped, 0 failed" in out) == (0, True), out
    rows = RowStore(tmp_path / "rows.jsonl", code="c0ffee").rows()
    assert sorted(values(rows)) == [0, 1, 10, 11, 20, 21]
    taken = [step[1:] for step in driver.steps()]
    assert len(set(taken)) == 48 and len(taken) <= 50, "runs went on from their checkpoints"
    assert victim != driver.process.pid


def attempted(run, settings, time_limit):
    """One run in this process, where it can be watched."""
    return attempt(
        Call(
            sweep="test", name="run", run=run, settings=settings, seed=0, scratch=None, about=None,
            time_limit=time_limit, device="cpu", per_gpu=1,
        )
    )  # fmt: skip


def spin(settings, *, seed):
    if settings["a"] == 1:
        while True:
            sum(range(1000))
    return {"value": settings["a"]}


OVER = "it ran longer than its time limit of 0.5 s, and was stopped"


def check_over(rows, tries):
    assert values(rows) == [0, None, 2, 3]
    assert [row["failed"] for row in rows] == [None, OVER, None, None]
    assert len(tries) == 1, "a run over its limit is not tried again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine, n_jobs", [("local", 1), ("local", 2), ("dask", 2), ("ray", 2)], indirect=["engine"]
)
def test_a_run_over_its_time_limit_has_failed(tmp_path, engine, n_jobs):
    log = tmp_path / "calls.log"

    def run(settings, *, seed):
        if settings["a"] == 1:
            with open(log, "a") as file:
                file.write("try\n")
            while True:
                try:
                    sum(range(1000))
                except Exception:  # a run's own care must not swallow the limit
                    continue
        return {"value": settings["a"]}

    rows = run_sweep(
        run, GRID, seeds=[0], n_jobs=n_jobs, backend=engine, time_limit=0.5, progress=False
    )
    check_over(rows, log.read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_run_that_hangs_outside_python_is_ended_with_its_worker(tmp_path, n_jobs):
    log = tmp_path / "calls.log"

    def run(settings, *, seed):
        import ctypes

        if settings["a"] == 1:
            with open(log, "a") as file:
                file.write("try\n")
            ctypes.PyDLL(None).sleep(600)  # PyDLL keeps Python's lock, so that no other thread can do a thing
        return {"value": settings["a"]}

    rows = run_sweep(run, GRID, seeds=[0], n_jobs=n_jobs, time_limit=0.5, progress=False)
    check_over(rows, log.read_text().split())
    assert ctypes.PyDLL(None).sleep, "else the run failed for want of it"


def test_a_time_limit_does_not_cut_an_import_in_half(tmp_path, monkeypatch):
    (tmp_path / "slow_to_load.py").write_text(
        "import time\nend = time.monotonic() + 0.6\nwhile time.monotonic() < end:\n    pass\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reached = []

    def run(settings, *, seed):
        import slow_to_load

        reached.append(slow_to_load.whole)
        while True:
            sum(range(1000))

    row = attempted(run, GRID[0], time_limit=0.2)
    assert row["failed"] == OVER.replace("0.5", "0.2")
    assert sys.modules.pop("slow_to_load").whole, "it was loaded to its end"
    assert reached in ([], [True])


def test_a_time_limit_that_is_not_reached_changes_nothing():
    threads = threading.active_count()
    rows = [attempted(spin, settings, time_limit=60) for settings in GRID[2:]]
    assert values(rows) == [2, 3] and [row["failed"] for row in rows] == [None, None]
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads, "timers end with their runs"


def test_each_try_has_the_whole_time_limit():
    tries = []

    def run(settings, *, seed):
        tries.append(time.monotonic())
        while time.monotonic() < tries[-1] + 0.6:
            pass
        if len(tries) == 1:
            raise RuntimeError("once more")
        return {"value": 7}

    row = attempted(run, GRID[0], time_limit=1.0)
    assert len(tries) == 2 and row["result"] == {"value": 7} and row["wall_s"] > 1.0


def test_a_run_that_outlasted_its_limit_is_not_said_to_be_stopped():
    def run(settings, *, seed):
        ctypes.PyDLL(None).usleep(600_000)  # nothing can interrupt it
        return {"value": 7}

    def care(settings, *, seed):
        try:
            while True:
                sum(range(1000))
        except BaseException:
            return {"value": 7}

    over = "it ran longer than its time limit of 0.2 s, and ended only then, by itself"
    assert attempted(care, GRID[0], time_limit=0.2)["failed"] == over
    assert "time limit of 0.2 s" in attempted(run, GRID[0], time_limit=0.2)["failed"]


@pytest.mark.slow
def test_a_keyboard_interrupt_of_a_run_in_a_worker_is_a_failed_run():
    def run(settings, *, seed):
        if settings["a"] == 1:
            raise KeyboardInterrupt
        return {"value": settings["a"]}

    rows = run_sweep(run, GRID, seeds=[0], n_jobs=2, progress=False)
    assert values(rows) == [0, None, 2, 3] and "KeyboardInterrupt" in rows[1]["failed"]


def test_a_worker_without_disk_is_not_told_to_install_anything():
    future = Future()
    future.set_exception(OSError(errno.ENOSPC, "No space left on device", "/tmp/x"))
    with pytest.raises(RuntimeError, match="No space left on device: '/tmp/x'. Look at the disk"):
        _outcome(future)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "dask"], indirect=True)
def test_about_is_asked_once_in_each_worker_process(tmp_path, engine):
    log = tmp_path / "asked.log"

    def about():
        import os

        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return {"machine": f"process {os.getpid()}"}

    def run(settings, *, seed):
        import os

        return {"value": os.getpid()}

    class Store(RowStore):
        told = []

        def append(self, *, about, **row):
            self.told.append((row["result"]["value"], about["machine"]))
            return super().append(about=about, **row)

    store = Store(tmp_path / "rows.jsonl", code="c0ffee")
    run_sweep(
        run, GRID, seeds=[0, 1], store=store, n_jobs=2, backend=engine, about=about, progress=False
    )
    asked = log.read_text().split()
    assert len(asked) == len({*asked}) <= 2 and str(os.getpid()) not in asked
    assert len(store.told) == 8 and all(machine == f"process {pid}" for pid, machine in store.told)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_worker_with_other_code_stops_the_sweep_and_is_no_failed_run(tmp_path, engine):
    def about():
        raise ValueError("this worker has other code")

    def run(settings, *, seed):
        return {"value": 1}

    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    with pytest.raises(ValueError, match="^this worker has other code$"):
        run_sweep(
            run, GRID, seeds=[0], store=store, n_jobs=2, backend=engine, about=about, progress=False
        )
    assert store.rows() == []


@pytest.mark.slow
def test_a_run_that_workers_cannot_import_stops_the_sweep_and_says_why(tmp_path, monkeypatch):
    module = types.ModuleType("only_here")
    exec("def run(settings, *, seed):\n    return {}", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(RuntimeError, match="a worker could not take a run.*same checkout"):
        run_sweep(module.run, GRID, seeds=[0], n_jobs=2, progress=False)


@pytest.mark.slow
def test_a_process_that_grew_too_big_is_replaced_in_silence():
    """Joblib's pool ends a worker whose memory grew by 300 MB; a warning in its thread would end the pool."""

    def run(settings, *, seed):
        import os
        import sys
        import time

        sys.hoard = [*getattr(sys, "hoard", []), b"x" * 250_000_000]
        time.sleep(1.1)  # the pool looks once a second
        return {"value": os.getpid()}

    rows = run_sweep(run, GRID, seeds=[0, 1], n_jobs=2, progress=False)
    assert [row["failed"] for row in rows] == [None] * 8
    assert len({*values(rows)}) > 2


@pytest.mark.slow
def test_workers_that_die_before_any_run_are_not_replaced_for_ever():
    class Deadly:
        """Kills the worker that unpacks it."""

        def __call__(self, settings, *, seed):
            raise AssertionError("it was unpacked")

        def __reduce__(self):
            return exec, ("import os; os.kill(os.getpid(), 9)",)

    with pytest.raises(RuntimeError, match="died 3 times before they began a run"):
        run_sweep(Deadly(), GRID, seeds=[0], n_jobs=2, progress=False)


@pytest.mark.slow
def test_a_run_waits_for_an_orphan_in_its_scratch_folder(tmp_path, until):
    """A Dask worker outlives its driver; here another process holds the lock of the same run."""
    fcntl = pytest.importorskip("fcntl")
    seen = []

    def run(settings, *, seed, scratch):
        seen.append((scratch, released.is_set()))
        return {"value": 1}

    released = threading.Event()
    released.set()
    run_sweep(run, GRID[:1], seeds=[0], scratch=tmp_path, progress=False)
    released.clear()
    scratch, _ = seen[0]
    with open(scratch.with_name(f"{scratch.name}.lock"), "ab") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)

        def release():
            released.set()
            fcntl.flock(orphan, fcntl.LOCK_UN)

        threading.Timer(0.7, release).start()
        run_sweep(run, GRID[:1], seeds=[0], scratch=tmp_path, progress=False)
    assert seen == [(scratch, True)] * 2
