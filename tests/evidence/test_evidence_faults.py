"""Faults with real processes: killed, racing, out of space."""

import subprocess
import sys
import time

import pytest

from lib.evidence.rows import RowStore, read

posix = pytest.mark.skipif(sys.platform == "win32", reason="file locks and file size limits are POSIX")

LOOP = """
import sys
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
    RowStore(path, code="c0de", provenance={"process": "a"}).declare([{}], [0])
    process = start(FULL, path, 10_000)
    process.communicate()
    assert process.returncode == 0 and [row["seed"] for row in read(path).rows] == [99]
