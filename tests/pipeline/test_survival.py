"""Recording evidence is stopped and killed in every way, on real processes, and goes on where it was."""

import os
import random
import re
import signal
import time

import psutil
import pytest

from lib.evidence.rows import content, read

pytestmark = pytest.mark.slow

CLAIMS = """
[[claim]]
id = "one/measured"
says = "It is high."
kind = "measurement"
source = "ours"
locator = "here"
quantity = "accuracy"
unit = "1"
holds = ">= 0.1"
control = "the same model, untrained"
"""

# The real run function and the real engine, at a size that takes about a second a run.
CHAPTER = """\
from pathlib import Path
from lib.evidence import Chapter
from lib.experiments.composition import train_composition
root = Path({root!r})
chapter = Chapter("one", profile=profile, device="cpu", jobs=jobs, backend=backend,
                  claims=root / "book/claims.toml", evidence=root / "data/evidence", build=root / "build")
model = dict(n=4, d_model=16, n_heads=1, d_mlp=32, batch=16, evaluation_prompts=16, stop_at=2.0,
             steps={steps})
grid = [model | dict(L=L) for L in (1, 2)]
chapter.experiment("trained", train_composition, grid, seeds=range(4))
chapter.not_attempted("one/measured", "only the rows matter here")
chapter.close()
"""
PARAMETERS = 'jobs = 2\nbackend = "local"'
ROWS = "data/evidence/one/trained.standard.jsonl"


def sweeping(toy, *, steps):
    toy.write("_toc.yml", "format: jb-book\nroot: book/intro\nchapters: [{file: book/one}]\n")
    toy.write("book/claims.toml", CLAIMS)
    toy.chapter("one", [CHAPTER.format(root=str(toy.root), steps=steps)], parameters=PARAMETERS)
    return toy


def rows(toy):
    return read(toy.root / ROWS).rows


def until(is_so, process, *, seconds=90):
    """Wait until something holds while the process runs; -> whether it held before the process ended."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "nothing happened"
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def finish(process):
    """Its exit code and all that it said."""
    said, _ = process.communicate(timeout=90)
    return process.returncode, said


def record(toy):
    return toy.process("evidence", "one", cwd=toy.root)


def test_evidence_killed_three_times_at_random_is_the_same_to_the_byte(toy, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    unkilled = sweeping(type(toy)(tmp_path / "unkilled"), steps=150)
    code, said = finish(record(unkilled))
    assert code == 0, said
    assert "one: nothing is recorded yet" in said
    assert "\n  trained, runs: 8 done, 0 skipped, 0 failed; " in said
    killed = sweeping(toy, steps=150)
    for _ in range(3):
        before = len(rows(killed))
        process = record(killed)
        # Past the start-up, which would be hit most often otherwise; then at any moment of a run.
        assert until(lambda n=before: len(rows(killed)) > n, process), "it ended before it could be killed"
        time.sleep(moments.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    code, said = finish(record(killed))
    assert code == 0, said
    # Counted by itself, since the kernel of a killed pipeline records for up to a second more.
    ended = re.search(r"\n  trained, runs: (\d) done, (\d) skipped, 0 failed; ", said)
    done, skipped = map(int, ended.groups())
    assert done + skipped == 8 and skipped >= 3
    assert f"\n  trained: {skipped} of 8 planned runs recorded" in said
    same = [sorted(content(row) for row in rows(book)) for book in (unkilled, killed)]
    assert same[0] == same[1] and len(same[0]) == 8


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_recording_says_what_is_recorded_where_and_leaves_no_process(toy, signum, expected):
    process = record(sweeping(toy, steps=200))
    assert until(lambda: rows(toy), process)
    helpers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signum)
    code, said = finish(process)
    assert code == expected, said
    assert f"{ROWS}: {len(rows(toy))} of 8 planned runs recorded, {8 - len(rows(toy))} missing." in said
    assert "the same command goes on" in said and "Traceback" not in said
    assert len(helpers) >= 3  # the kernel and its two workers
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert alive == []
