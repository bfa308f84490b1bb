"""Faults with real processes: killed, racing, out of space."""

import errno
import os
import subprocess
import sys
import tempfile
import time

import pytest

from lib.evidence import EvidenceError
from lib.evidence.rows import RowStore, read

posix = pytest.mark.skipif(sys.platform == "win32", reason="file locks and file size limits are POSIX")

LOOP = """
import sys
import tempfile
from pathlib import Path
from lib.evidence.rows import RowStore
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = RowStore(path, code="c0de", provenance={"process": name})
print("ready", flush=True)
sys.stdin.readline()
for seed in range(count):
    settings = {"process": name, "pad": "x" * 500}
    store.append(settings=settings, seed=seed, result={"y": seed}, wall_s=0, core_s=0)
"""

FULL = """
import os, resource, sys
from pathlib import Path
from lib.evidence.rows import RowStore
path = Path(sys.argv[1])
store = RowStore(path, code="c0de", provenance={"process": "a"})
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    store.append(settings={"process": "a"}, seed=99, result={"y": 99}, wall_s=0, core_s=0)
except OSError as error:
    print(error)
    sys.exit(3)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def release(*processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.mark.parametrize("after", [1, 7, 40])
def test_a_killed_process_loses_at_most_the_row_in_flight(tmp_path, after):
    path = tmp_path / "x.quick.jsonl"
    process = start(LOOP, path, "killed", 100_000)
    release(process)
    deadline = time.monotonic() + 30
    while not path.exists() or path.read_bytes().count(b"\n") <= after:
        assert time.monotonic() < deadline and process.poll() is None
    process.kill()
    process.communicate()
    seeds = [row["seed"] for row in read(path).rows]
    assert len(seeds) >= after and seeds == list(range(len(seeds)))
    store = RowStore(path, code="c0de", provenance={"process": "next"})
    store.append(settings={}, seed=0, result={"y": 0}, wall_s=0, core_s=0)
    found = read(path)
    assert [row["seed"] for row in found.rows] == [*seeds, 0] and not found.torn


@posix
@pytest.mark.slow
def test_two_processes_that_append_at_once_lose_nothing(tmp_path):
    path, count = tmp_path / "x.quick.jsonl", 150
    processes = [start(LOOP, path, name, count) for name in ("a", "b")]
    release(*processes)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    found = read(path)
    assert len(found.rows) == 2 * count and not found.torn
    for name in ("a", "b"):
        mine = [row for row in found.rows if row["settings"]["process"] == name]
        assert [row["seed"] for row in mine] == list(range(count))
        assert {found.provenance[row["provenance"]]["process"] for row in mine} == {name}
    assert path.read_bytes().count(b"\n") == 2 * count + 2  # two provenance lines, each once


@posix
@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path, room):
    path = tmp_path / "x.quick.jsonl"
    store = RowStore(path, code="c0de", provenance={"process": "a"})
    store.append(settings={"process": "a"}, seed=0, result={"y": 0}, wall_s=0, core_s=0)
    before = path.read_bytes()
    process = start(FULL, path, room)
    said, _ = process.communicate()
    assert process.returncode == 3 and said.strip()
    assert path.read_bytes() == before


@posix
def test_with_room_enough_the_same_append_succeeds(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    RowStore(path, code="c0de", provenance={"process": "a"}).declare([{}], [0], run="lib.toy.run")
    process = start(FULL, path, 10_000)
    process.communicate()
    assert process.returncode == 0 and [row["seed"] for row in read(path).rows] == [99]


RESCUE = """
import resource, sys
from pathlib import Path
from lib.evidence.rows import RowStore
path = Path(sys.argv[1])
store = RowStore(path, code="c0de", provenance={"process": "a"})
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, resource.RLIM_INFINITY))
run = dict(settings={"process": "a"}, seed=1, result={"y": 1}, wall_s=0, core_s=2, about={"process": "b"})
try:
    store.append(**run)
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    print(store.rescue(run))
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The system's temporary folder of this test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "tmp"


@posix
def test_a_run_that_could_not_be_appended_is_kept_and_taken_in_when_there_is_room(
    tmp_path, elsewhere, capsys
):
    path = tmp_path / "x.quick.jsonl"
    store = RowStore(path, code="c0de", provenance={"process": "a"})
    store.append(settings={"process": "a"}, seed=0, result={"y": 0}, wall_s=0, core_s=0)
    before = path.read_bytes()
    said, _ = start(RESCUE, path, 1 << 20).communicate()
    (kept,) = elsewhere.iterdir()
    assert said.strip() == str(kept) and path.read_bytes() == before
    store.declare([{"process": "a"}], [0, 1], run="lib.toy.run")
    assert f"x.quick.jsonl: took in what waited in {kept}, runs: 1." in capsys.readouterr().out
    found = read(path)
    assert [row["seed"] for row in found.rows] == [0, 1] and not kept.exists()
    assert found.provenance[found.rows[1]["provenance"]] == {"process": "b"}
    assert store.has(store.key({"process": "a"}, 1))
    store.declare([{"process": "a"}], [0, 1], run="lib.toy.run")
    assert len(read(path).rows) == 2


@posix
def test_where_nothing_fits_anywhere_nothing_is_kept_and_that_is_said(tmp_path, elsewhere):
    path = tmp_path / "x.quick.jsonl"
    RowStore(path, code="c0de", provenance={"process": "a"}).declare([{}], [0], run="lib.toy.run")
    assert start(RESCUE, path, 10).communicate()[0] == "None\n"
    RowStore(path, code="c0de").declare([{}], [0], run="lib.toy.run")
    assert read(path).rows == []


def test_a_row_written_after_all_is_not_taken_in_twice(tmp_path, elsewhere):
    store = RowStore(tmp_path / "x.quick.jsonl", code="c0de")
    run = dict(settings={}, seed=0, result={"y": 0}, wall_s=0, core_s=0)
    store.append(**run)
    kept = store.rescue(run)
    kept.write_bytes(store.path.read_bytes())  # to the second the same row
    store.declare([{}], [0], run="lib.toy.run")
    assert len(read(store.path).rows) == 1 and not kept.exists()


def refuse(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_file_that_cannot_be_written_is_told_before_any_run_starts(tmp_path, monkeypatch):
    store = RowStore(tmp_path / "x.standard.jsonl", code="c0de")
    store.declare([{}], [0], run="lib.toy.run")
    told = r"x.standard.jsonl cannot be written \(Read-only file system\); no run was started. Make room"
    monkeypatch.setattr("lib.evidence.rows.held", refuse)
    with pytest.raises(EvidenceError, match=told), store.held():
        pass
    store.append(settings={}, seed=0, result={"y": 0}, wall_s=0, core_s=0)
    with store.held():  # nothing is left to do: a finished recording can be read from a read-only disk
        pass
    monkeypatch.setattr("lib.evidence.rows.append", refuse)
    store.declare([{}], [0], run="lib.toy.run")
    with pytest.raises(EvidenceError, match=told):
        store.declare([{}], [0, 1], run="lib.toy.run")
