import json

import pytest

from lib.evidence import progress
from lib.evidence.progress import Progress, Watch
from lib.sweeps import Status


def status(done, **more):
    return Status(**dict(done=done, skipped=0, failed=0, total=9, elapsed_s=1.0, left_s=60.0) | more)


@pytest.fixture
def watch(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE_S", 0)
    return Watch(Progress(tmp_path / "progress/toy.json", "toy"), "acc")


def read(tmp_path):
    return json.loads((tmp_path / "progress/toy.json").read_text())


def test_the_file_tells_what_runs_and_what_is_finished(tmp_path, watch):
    assert read(tmp_path) == {
        "chapter": "toy", "experiment": "", "line": "", "left_s": None, "done": 0, "total": 0, "finished": []
    }  # fmt: skip
    watch(status(3))
    found = read(tmp_path)
    assert (found["experiment"], found["left_s"]) == ("acc", 60.0)
    assert found["line"] == "3 of 9 runs, about 1 min left"
    assert (found["done"], found["total"], found["finished"]) == (3, 9, [])
    watch(status(6, skipped=2, failed=1, core_s=3.5, finished=True))
    found = read(tmp_path)
    assert found["line"] == "" and found["done"] == 9
    assert found["finished"] == ["acc, runs: 6 done, 2 skipped, 1 failed; 1.0 s wall, 3.5 core-s"]
    assert [path.name for path in (tmp_path / "progress").iterdir()] == ["toy.json"]


def test_fast_runs_are_not_noted_one_by_one(tmp_path, watch, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE_S", 60)
    for done in range(5):
        watch(status(done))
    assert read(tmp_path)["done"] == 0
    watch(status(9, finished=True))
    assert read(tmp_path)["done"] == 9, "the last one always counts"


def test_a_full_disk_does_not_stop_the_sweep(tmp_path, watch, monkeypatch):
    def refuse(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(progress, "write_atomically", refuse)
    watch(status(1))
    assert read(tmp_path)["done"] == 0


def test_a_notebook_shows_one_line_only_if_it_takes_a_while_and_empties_it(watch, monkeypatch):
    shown = []

    class Handle:
        def update(self, data, *, raw):
            shown.append(data)

    def display(data, *, raw, display_id):
        shown.append(data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    watch(status(1))
    watch.clear()
    assert shown == []
    for done in (2, 3):
        watch(status(done, elapsed_s=2.5, left_s=None))
    watch(status(9, elapsed_s=2.5, finished=True))
    watch.clear()
    assert shown == [{"text/plain": text} for text in ("acc: 2 of 9 runs", "acc: 3 of 9 runs", "")]


def test_outside_a_kernel_there_is_no_notebook():
    assert progress.in_notebook() is False
