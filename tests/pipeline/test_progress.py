import io
import json

import pytest

from lib.pipeline import progress
from lib.pipeline.progress import Clock, Runs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_at_the_start_a_beat_and_the_end(monkeypatch):
    monkeypatch.setattr(progress, "BEAT_S", 0.01)
    log = io.StringIO()
    with Clock("one-layer-limits", "first run", stream=log) as clock:
        clock.note = "cell 3 of 40"
        while "cell 3 of 40" not in log.getvalue():
            pass
        clock.done("executed")
    lines = log.getvalue().splitlines()
    assert lines[0] == "one-layer-limits               0:00  first run"
    assert lines[1].endswith("cell 3 of 40") and lines[-1].endswith("executed")


def test_a_terminal_sees_one_line_redrawn():
    terminal = Terminal()
    with Clock("one", stream=terminal) as clock:
        clock.done("executed")
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().count("\r\033[K") == 2


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_running_experiment_is_told_and_the_last_line_of_an_ended_one_stays(
    monkeypatch, tmp_path, stream
):
    monkeypatch.setattr(progress, "BEAT_S", 0.01)
    monkeypatch.setattr(progress, "LOOK_S", 0.01)
    told, log = tmp_path / "one.json", stream()

    def say(experiment, line, finished):
        told.write_text(json.dumps({"experiment": experiment, "line": line, "finished": finished}))

    with Clock("one", "cell 3 of 9", look=Runs(told).look, stream=log):
        say("composition", "12 of 60 runs, about 4 min left", [])
        while "cell 3 of 9 · composition: 12 of 60 runs, about 4 min left" not in log.getvalue():
            pass
        say("precision", "1 of 2 runs", ["composition: 60 done"])
        while "cell 3 of 9 · precision: 1 of 2 runs" not in log.getvalue():
            pass
        say("precision", "2 of 2 runs", ["composition: 60 done", "precision: 2 done"])
    lines = log.getvalue().replace("\r\033[K", "\n").splitlines()
    assert [line for line in lines if "done" in line][:2] == ["  composition: 60 done", "  precision: 2 done"]
    assert log.getvalue().count("composition: 60 done") == log.getvalue().count("precision: 2 done") == 1


def test_without_an_experiment_there_is_nothing_to_tell(tmp_path):
    told = tmp_path / "one.json"
    assert Runs(told).look() == ("", [])
    told.write_text('{"half')
    assert Runs(told).look() == ("", [])


def test_an_exception_ends_the_line_too():
    log = io.StringIO()
    try:
        with Clock("one", stream=log):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert log.getvalue().splitlines()[-1].endswith("stopped")
