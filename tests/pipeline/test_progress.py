import io

from lib.pipeline import progress
from lib.pipeline.progress import Clock


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


def test_an_exception_ends_the_line_too():
    log = io.StringIO()
    try:
        with Clock("one", stream=log):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert log.getvalue().splitlines()[-1].endswith("stopped")
