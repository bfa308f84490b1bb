"""What a sweep says while it runs and when it ends, and how it reckons the time left."""

import re
import sys
import threading
import time

import pytest

from lib.sweeps import Status, progress, run_sweep
from lib.sweeps.progress import Reporter

GRID = [{"a": a} for a in range(3)]


def quick_run(settings, *, seed):
    return {"value": settings["a"]}


def reporter(told, weights, width=1, skipped=0):
    return Reporter(told.append, weights, skipped=skipped, width=lambda: width)


def test_a_listener_is_told_at_the_start_after_each_run_and_at_the_end():
    told = []
    run_sweep(quick_run, GRID, seeds=[0], progress=told.append)
    assert [status.done for status in told] == [0, 1, 2, 3, 3]
    assert [status.finished for status in told] == [False] * 4 + [True]
    assert told[0].left_s is None and told[-1].left_s == 0.0
    assert all(status.total == 3 for status in told)
    assert re.fullmatch(r"runs: 3 done, 0 skipped, 0 failed; \S+ s wall, \S+ core-s", told[-1].line())


def test_recorded_times_weigh_the_runs_to_come_and_workers_share_them():
    told = []
    with reporter(told, {"long": 100.0, "short": 10.0, "middle": 40.0}, width=2) as report:
        assert told[-1].left_s == 75.0
        report.count("long", wall_s=1.0, core_s=1.0, failed=False)
        assert told[-1].left_s == 25.0
        report.count("short", wall_s=1.0, core_s=1.0, failed=True)
        assert told[-1].left_s == 40.0, "two workers cannot share one run"
    assert (told[-1].done, told[-1].failed, told[-1].core_s) == (1, 1, 2.0)


def test_runs_without_a_recorded_time_count_as_the_mean_of_those_done():
    told = []
    with reporter(told, {"a": None, "b": None, "c": 100.0, "d": None}, skipped=5) as report:
        assert told[-1].left_s is None and told[-1].line() == "5 of 9 runs, 5 skipped"
        report.count("a", wall_s=10.0, core_s=9.0, failed=False)
        assert told[-1].left_s == 120.0
        assert told[-1].line() == "6 of 9 runs, 5 skipped, about 2 min left"
        assert report.recorded() == (6, 9)


def test_a_note_is_told_at_once_and_only_when_it_changes():
    told = []
    with reporter(told, {"a": None}) as report:
        for _ in range(3):
            report.note("waiting for workers")
        report.note("")
    assert [status.note for status in told] == ["", "waiting for workers", "", ""]
    assert told[1].line() == "0 of 1 runs, waiting for workers"


def test_a_listener_hears_from_a_long_run_meanwhile(monkeypatch):
    monkeypatch.setattr(progress, "TOLD_EVERY_S", 0.02)
    told, waits = [], threading.Event()

    def listener(status):
        told.append(status)
        if len(told) == 4:
            waits.set()

    def run(settings, *, seed):
        assert waits.wait(30)
        return {}

    run_sweep(run, GRID[:1], seeds=[0], progress=listener)
    assert {status.done for status in told[:4]} == {0}


def test_without_a_terminal_lines_come_now_and_then_and_the_last_one_on_stdout(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    run_sweep(quick_run, GRID, seeds=[0])
    out, err = capsys.readouterr()
    assert re.fullmatch(r"runs: 3 done, 0 skipped, 0 failed; .* core-s\n", out)
    assert [line.split(",")[0] for line in err.splitlines()] == [f"{n} of 3 runs" for n in range(4)]
    monkeypatch.undo()
    run_sweep(quick_run, GRID, seeds=[0])
    assert capsys.readouterr().err == "", "what is over in no time needs no lines"
    run_sweep(quick_run, GRID, seeds=[0], progress=False)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_shows_the_line_and_goes_away(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    slow = threading.Event()

    def run(settings, *, seed):
        slow.wait(0.15)  # a bar is drawn ten times a second at most
        return {}

    run_sweep(run, GRID, seeds=[0])
    out, err = capsys.readouterr()
    assert "2 of 3 runs, about 1 s left" in err and err.endswith("\r") and out.startswith("runs: 3 done")


@pytest.mark.parametrize("backend", ["local"])
def test_runs_that_fail_are_counted_as_the_store_has_them(tmp_path, backend, capsys):
    from lib.evidence.rows import RowStore

    def run(settings, *, seed):
        return {"value": float("nan") if settings["a"] == 1 else 1.0}

    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    run_sweep(run, GRID, seeds=[0], store=store)
    assert "2 done, 0 skipped, 1 failed" in capsys.readouterr().out
    run_sweep(run, GRID, seeds=[0], store=store)
    assert "0 done, 2 skipped, 1 failed" in capsys.readouterr().out


def test_wall_time_covers_the_whole_sweep():
    told = []

    def run(settings, *, seed):
        time.sleep(0.05)
        return {}

    run_sweep(run, GRID, seeds=[0], progress=told.append)
    assert isinstance(told[-1], Status) and told[-1].elapsed_s >= 0.15
