"""Two that want the same: with real processes."""

import os
import subprocess
import sys

import pytest

from lib.evidence.locks import Held, held
from lib.evidence.rows import RowStore

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="file locks are POSIX")

HOLD = """
import sys
from lib.evidence.locks import held
with held(sys.argv[1], "a build"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder():
    """-> start(file): a process that holds it, until it reads a line."""
    started = []

    def start(file):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_to_ask_is_told_who_holds_the_lock_and_since_when(tmp_path, holder):
    process = holder(tmp_path / ".lock")
    with pytest.raises(Held) as error, held(tmp_path / ".lock", "a build"):
        pass
    said = str(error.value)
    assert said.startswith(f"a build is under way already (process {process.pid}, since 20")
    assert said.endswith("UTC); wait for it or stop it") and " on " not in said
    process.communicate("\n")
    with held(tmp_path / ".lock", "a build"):
        assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    process = holder(tmp_path / ".lock")
    process.kill()
    process.communicate()
    assert str(process.pid) in (tmp_path / ".lock").read_text(), "the name it left proves nothing"
    with held(tmp_path / ".lock", "a build"):
        pass


def test_a_lock_is_free_again_after_an_error_inside(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), held(tmp_path / ".lock", "a build"):
            raise RuntimeError


def test_a_holder_on_another_machine_is_named_by_its_host(tmp_path):
    with held(tmp_path / ".lock", "a build"):
        (tmp_path / ".lock").write_text('{"pid": 7, "since": "noon", "host": "elsewhere"}')
        with pytest.raises(Held, match=r"process 7 on elsewhere, since noon"), held(tmp_path / ".lock", "x"):
            pass
        (tmp_path / ".lock").write_text("")  # as before the holder has written its name
        with pytest.raises(Held, match=r"another process"), held(tmp_path / ".lock", "x"):
            pass


def test_two_drivers_cannot_record_into_one_file(tmp_path, holder):
    store = RowStore(tmp_path / "x.standard.jsonl", code="c")
    process = holder(tmp_path / ".x.standard.jsonl.lock")
    with (
        pytest.raises(Held, match=rf"recording into .*x.standard.jsonl is under .*process {process.pid}"),
        store.held(),
    ):
        pass
    process.communicate("\n")
    with store.held():
        RowStore(store.path, code="c").append(settings={}, seed=0, result={"y": 1}, wall_s=0, core_s=0)
    assert not store.has(store.key({}, 0))
    with store.held():
        assert store.has(store.key({}, 0)), "what was recorded before the lock was free is not seen"
