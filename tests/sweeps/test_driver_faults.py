"""Drivers that are killed, stopped, doubled or short of disk: what is recorded stays, the rest goes on."""

import errno
import os
import re
import signal
import threading

import pytest

from lib.evidence.rows import RowStore, content, read
from lib.sweeps import run_sweep

GRID = [{"a": a, "steps": 8} for a in range(3)]


def recorded(folder):
    return sorted(map(content, read(folder / "rows.jsonl").rows))


def unkilled(folder):
    """The rows of the same sweep in one process that nothing disturbed."""
    store = RowStore(folder / "whole.jsonl", code="c0ffee")

    def run(settings, *, seed):
        return {"value": settings["a"] * 10 + seed}

    run_sweep(run, GRID, seeds=[0, 1], store=store, progress=False)
    return sorted(content(row) for row in store.rows())


def check_continued(folder, killed, monkeypatch):
    """Continued in this process, the rows are those of an unkilled sweep; no saved step is repeated."""
    store = RowStore(folder / "rows.jsonl", code="c0ffee")
    run = killed.run(monkeypatch)
    run_sweep(run, GRID, seeds=[0, 1], store=store, scratch=folder / "scratch", progress=False)
    assert recorded(folder) == unkilled(folder) and len(recorded(folder)) == 6
    taken = [step[1:] for step in killed.steps()]
    assert set(taken) == {(a, seed, step) for a in range(3) for seed in (0, 1) for step in range(8)}
    assert len(taken) <= 48 + 2, "a step in each of two workers was taken and not saved"
    assert not any((folder / "scratch").iterdir()), "folders of finished runs go"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", "dask"])
def test_a_killed_driver_leaves_no_worker_behind_and_the_next_one_goes_on(
    tmp_path, drive, until, alive, backend, monkeypatch
):
    killed = drive(backend, 2).after(12).send(signal.SIGKILL)
    assert killed.end()[0] == -signal.SIGKILL
    workers = {pid for pid, *_ in killed.steps()}
    assert workers and killed.process.pid not in workers
    until(lambda: not any(map(alive, workers)), "the workers of a killed driver end", seconds=15)
    check_continued(tmp_path, killed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, backend, n_jobs",
    [
        (signal.SIGINT, "local", 1),
        (signal.SIGINT, "local", 2),
        (signal.SIGTERM, "local", 2),
        (signal.SIGTERM, "dask", 2),
    ],
)
def test_a_stopped_driver_says_what_is_recorded_and_how_to_go_on(
    tmp_path, drive, until, alive, number, backend, n_jobs, monkeypatch
):
    driver = drive(backend, n_jobs).after(20)
    # Ctrl-C in a terminal goes to the driver and to its workers at once.
    os.killpg(driver.process.pid, number) if number == signal.SIGINT else driver.send(number)
    status, out = driver.end()
    assert status == {signal.SIGTERM: 143, signal.SIGINT: -signal.SIGINT}[number], out
    said = re.search(r"Stopped: (\d) of 6 runs are recorded in (\S+); the same command goes on from", out)
    assert said and said[2].endswith("rows.jsonl"), out
    assert int(said[1]) == len(recorded(tmp_path)) < 6
    until(lambda: not any(alive(pid) for pid, *_ in driver.steps()), "workers end", seconds=15)
    check_continued(tmp_path, driver, monkeypatch)


class Store(RowStore):
    """A store whose next `append` does something else first, in the middle of it."""

    middle = staticmethod(lambda: None)

    def append(self, **row):
        self.middle()
        return super().append(**row)


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_in_the_middle_of_an_append_waits_for_its_end(tmp_path, capsys, number, raised):
    store = Store(tmp_path / "rows.jsonl", code="c0ffee")
    store.middle = lambda: signal.raise_signal(number)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with pytest.raises(raised) as caught:
        run_sweep(lambda settings, *, seed: {"v": 1}, GRID, seeds=[0], store=store, progress=False)
    assert getattr(caught.value, "code", 143) == 143
    assert len(store.rows()) == 1, "the row under way was recorded, and no further run begun"
    assert "Stopped: 1 of 3 runs are recorded in" in capsys.readouterr().out
    assert handlers == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]


def test_a_signal_interrupts_a_run_in_this_process_at_once(tmp_path, capsys):
    def run(settings, *, seed):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the run went on")

    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(run, GRID, seeds=[0], store=store, progress=False)
    assert store.rows() == [] and "Stopped: 0 of 3" in capsys.readouterr().out


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was swallowed")

    store = Store(tmp_path / "rows.jsonl", code="c0ffee")
    store.middle = twice
    with pytest.raises(KeyboardInterrupt):
        run_sweep(lambda settings, *, seed: {"v": 1}, GRID, seeds=[0], store=store, progress=False)


def test_a_sweep_outside_the_main_thread_leaves_the_signals_alone():
    handler, found = signal.getsignal(signal.SIGTERM), []

    def run(settings, *, seed):
        return {"untouched": signal.getsignal(signal.SIGTERM) is handler}

    thread = threading.Thread(
        target=lambda: found.extend(run_sweep(run, GRID, seeds=[0], progress=False)),
    )
    thread.start()
    thread.join()
    assert [row["result"] for row in found] == [{"untouched": True}] * 3


@pytest.mark.slow
def test_a_second_driver_on_the_same_rows_is_told_who_records_and_disturbs_nothing(tmp_path, drive):
    (tmp_path / "pause").touch()
    first = drive("local", 2).after(2)
    status, out = drive("local", 1).end()
    assert status == 1 and len(first.steps()) == 2
    assert f"is under way already (process {first.process.pid}, since" in out and "rows.jsonl" in out
    (tmp_path / "pause").unlink()
    assert first.end()[0] == 0 and recorded(tmp_path) == unkilled(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_full_disk_stops_the_sweep_and_costs_no_finished_run(tmp_path, n_jobs, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    store = Store(tmp_path / "rows.jsonl", code="c0ffee")
    log = tmp_path / "calls.log"

    def run(settings, *, seed):
        with open(log, "a") as file:
            file.write(f"{settings['a']}\n")
        return {"value": settings["a"] * 10 + seed}

    def full():
        if len(store.rows()) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    store.middle = full
    with pytest.raises(OSError) as caught:
        run_sweep(run, GRID, seeds=[0, 1], store=store, n_jobs=n_jobs, progress=False)
    message = str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert "rows.jsonl: No space left on device" in message
    assert "the same command goes on (2 of 6 runs are recorded)" in message
    kept = re.search(r"(?:was|were) kept in (\S+),", message)[1]
    assert os.path.exists(kept) and len(store.rows()) == 2
    computed = len(log.read_text().split())
    rescued = int((re.search(r"The (\d+) runs", message) or [0, 1])[1])

    roomy = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    roomy.declare(GRID, [0, 1], run="run")
    assert len(roomy.rows()) == 2 + rescued and not os.path.exists(kept)
    run_sweep(run, GRID, seeds=[0, 1], store=roomy, progress=False)
    assert recorded(tmp_path) == unkilled(tmp_path)
    if n_jobs == 1:
        assert computed == 3 and len(log.read_text().split()) == 6, "no run was computed twice"


def test_a_checkpoint_stays_until_its_row_is_written(tmp_path):
    store = Store(tmp_path / "rows.jsonl", code="c0ffee")
    store.rescue = lambda row: None  # nor is there room elsewhere

    def refuse():
        raise OSError(errno.EROFS, "Read-only file system")

    def run(settings, *, seed, scratch):
        scratch.mkdir(parents=True)
        (scratch / "checkpoint").touch()
        return {}

    store.middle = refuse
    with pytest.raises(OSError, match="Read-only file system. The run that had finished will be repeated"):
        run_sweep(run, GRID, seeds=[0], store=store, scratch=tmp_path / "scratch", progress=False)
    assert len([*tmp_path.glob("scratch/*/checkpoint")]) == 1


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_under_scratch_stops_the_sweep_and_is_no_failed_run(tmp_path, n_jobs):
    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    full = tmp_path / "full"
    log = tmp_path / "calls.log"

    def run(settings, *, seed, scratch):
        import errno

        with open(log, "a") as file:
            file.write("try\n")
        if settings["a"] and full.exists():
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                raise RuntimeError("the file could not be saved")  # noqa: B904 (as torch.save says it)
        return {"value": settings["a"] * 10 + seed}

    def sweep(jobs, seeds):
        run_sweep(
            run, GRID, seeds=seeds, store=store, n_jobs=jobs, scratch=tmp_path / "scratch", progress=False
        )

    full.touch()
    with pytest.raises(OSError) as caught:
        sweep(n_jobs, [0, 1])
    assert caught.value.errno == errno.ENOSPC
    message = str(caught.value)
    assert f"scratch folder {tmp_path / 'scratch'}: No space left on device. Make room" in message
    assert f"{len(store.rows())} of 6 runs are recorded in" in message and "same command goes on" in message
    assert not any(row.get("failed") for row in store.rows())
    if n_jobs == 1:
        assert len(store.rows()) == 2 and len(log.read_text().split()) == 3
    full.unlink()
    sweep(1, [0, 1])
    assert recorded(tmp_path) == unkilled(tmp_path)


def test_a_scratch_folder_that_cannot_be_written_is_named_before_any_run(tmp_path):
    (tmp_path / "file").touch()

    def run(settings, *, seed, scratch):
        raise AssertionError("a run began")

    folder = tmp_path / "file" / "scratch"
    with pytest.raises(OSError, match=f"cannot write in the scratch folder {folder}: .*nothing has run"):
        run_sweep(run, GRID, seeds=[0], scratch=folder, progress=False)
