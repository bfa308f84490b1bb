"""A chapter's experiment while it is recorded: what is refused, counted, and left out."""

import importlib
import subprocess
import sys

import pytest

from lib.evidence import EvidenceError, ledger, provenance
from lib.evidence.__main__ import main
from lib.evidence.code import code_digest
from lib.evidence.forecast import forecast
from lib.evidence.locks import Held
from lib.evidence.rows import RowStore, content, read

calls = []


def run(settings, *, seed):
    """A run that counts its calls, and fails where it is told to."""
    calls.append((settings["n"], seed))
    if settings.get("fails"):
        raise RuntimeError("told to")
    return {"accuracy": 1 - settings["n"] / 100 + seed / 1000}


def settled(settings, *, seed):
    """A run that needs nothing of this process."""
    return {"accuracy": settings["n"] + seed}


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def test_other_settings_for_a_recorded_experiment_are_refused_before_anything_runs(chapter, tmp_path):
    chapter("standard").experiment("acc", run, [{"n": 1}, {"n": 2}], seeds=range(2))
    del calls[:]
    with pytest.raises(
        EvidenceError, match="acc.standard.jsonl was started with other settings.* n: 1, 2 → 1, 3"
    ):
        chapter("standard").experiment("acc", run, [{"n": 1}, {"n": 3}], seeds=range(2))
    assert calls == []
    chapter("standard").experiment("acc", run, [{"n": n} for n in (1, 2, 3)], seeds=range(2))
    assert calls == [(3, 0), (3, 1)]
    assert main(["replan", str(tmp_path / "evidence/toy/acc.standard.jsonl")]) == 0
    assert chapter("quick").experiment("acc", run, [{"n": 1}]).recorded is None
    found = chapter("standard").experiment("acc", run, [{"n": 1}, {"n": 3}], seeds=range(2)).recorded
    assert (len(found.frame), found.missing) == (4, 0) and calls[2:] == [(1, 0)], "recorded rows count again"


def test_a_plan_names_the_function_that_makes_its_runs(chapter, tmp_path):
    chapter("standard").experiment("acc", run, [{"n": 1}])
    plan = read(tmp_path / "evidence/toy/acc.standard.jsonl").plan
    assert plan == {"grid": [{"n": 1}], "seeds": [0], "run": f"{run.__module__}.run"}


@pytest.mark.slow
def test_how_many_runs_at_a_time_leaves_no_trace_in_the_rows(chapter, tmp_path):
    def lines():
        return [content(row) for row in read(path).rows], list(read(path).provenance.values())

    path, seen = tmp_path / "build/evidence/toy/acc.quick.jsonl", []
    for jobs in (1, 2):
        chapter(jobs=jobs).experiment("acc", settled, [{"n": 1}, {"n": 2}], seeds=range(3))
        rows, made = lines()
        seen.append((sorted(rows), made))
        path.unlink()
    assert seen[0] == seen[1] and len(seen[0][0]) == 6 and len(seen[0][1]) == 1


def test_a_second_driver_is_told_who_records(chapter, tmp_path):
    path = tmp_path / "evidence/toy/acc.standard.jsonl"
    with RowStore(path, code="c").held():
        with pytest.raises(EvidenceError, match=r"recording into .*acc.standard.jsonl is under way already"):
            chapter("standard").experiment("acc", run, [{"n": 1}])
        assert calls == []
    chapter("standard").experiment("acc", run, [{"n": 1}])
    assert calls == [(1, 0)]


@pytest.mark.parametrize("profile, folder", [("quick", "build/evidence"), ("standard", "evidence")])
def test_a_refused_driver_leaves_the_plan_of_the_first_as_it_is(chapter, tmp_path, profile, folder):
    path = tmp_path / folder / f"toy/acc.{profile}.jsonl"
    first = RowStore(path, code="c")
    with first.held():
        first.declare([{"n": 1}], [0], run="lib.toy.run")
        before = path.read_bytes()
        with pytest.raises(Held):
            chapter(profile).experiment("acc", run, [{"n": 1}, {"n": 2}])
        with pytest.raises(Held):
            RowStore(path, code="c").declare([{"n": 3}], [0], run="lib.toy.run", replace=True)
        assert path.read_bytes() == before and calls == []


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toy_edited
from lib.evidence import EvidenceError, provenance
from lib.evidence.code import code_digest
file, first = Path(toy_edited.__file__), code_digest(toy_edited.run)
assert provenance.of_worker(toy_edited.run, first, "cpu")
file.write_text(file.read_text() + "# a remark\\n")
assert provenance.of_worker(toy_edited.run, first, "cpu")
file.write_text(file.read_text().replace("1", "2"))
for code in (first, code_digest(toy_edited.run)):
    try:
        provenance.of_worker(toy_edited.run, code, "cpu")
    except EvidenceError as error:
        print(error)
"""


def test_a_process_whose_code_was_edited_is_refused_until_it_starts_again(tmp_path):
    (tmp_path / "toy_edited.py").write_text("def run(settings, *, seed):\n    return {'y': 1}\n")
    for refused in (2, 0):
        text = WORKER if refused else WORKER.split("file.write_text")[0]
        done = subprocess.run([sys.executable, "-c", text, tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("was edited after this process") == refused
        assert done.stdout.count("restart the kernel (or the workers)") == refused


def test_an_experiment_whose_code_was_edited_in_a_running_kernel_is_refused(chapter, tmp_path, monkeypatch):
    (tmp_path / "toy_kernel.py").write_text("def run(settings, *, seed):\n    return {'y': 1}\n")
    monkeypatch.syspath_prepend(tmp_path)
    toy_run = importlib.import_module("toy_kernel").run
    toy = chapter()
    toy.experiment("first", toy_run, [{"n": 1}])
    (tmp_path / "toy_kernel.py").write_text("def run(settings, *, seed):\n    return {'y': 2}\n")
    with pytest.raises(EvidenceError, match="restart the kernel"):
        toy.experiment("second", toy_run, [{"n": 1}])
    assert not (tmp_path / "build/evidence/toy/second.quick.jsonl").exists()


def test_a_worker_with_other_code_is_refused_and_one_with_the_same_says_what_it_is():
    facts = provenance.of_worker(run, code_digest(run), "cpu")
    assert facts == provenance.of_process("cpu") and facts["machine"] == provenance.machine()
    with pytest.raises(EvidenceError, match=r"has other code for .*\.run .*install the same checkout there"):
        provenance.of_worker(run, "0lder", "cpu")


def test_on_a_cluster_only_the_workers_know_of_gpus(chapter, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' is not available"):
        chapter(device="cuda")
    toy = chapter(device="cuda", backend="dask")
    assert toy.device == "cuda" and toy.provenance["device"] == "CUDA"


def test_failed_runs_reach_the_verdict_and_the_ledger(chapter, tmp_path):
    toy = chapter("standard")
    grid = [{"n": 1}, {"n": 2, "fails": True}]
    recorded = toy.experiment("acc", run, grid, seeds=range(3)).best
    assert len(calls) == 3 + 2 * 3, "a failing run is tried once more"
    toy.settle("toy/measured", recorded, 0.99, interval=(0.98, 1), n=3, control=0.1)
    entry = ledger.build(claims=tmp_path / "claims.toml", folder=tmp_path / "build")[0]
    assert entry["note"] == "3 of 6 runs recorded as failed."
    assert entry["remedy"] == "make evidence CHAPTER=toy"
    assert "3 of 6 runs recorded as failed." in ledger.table([entry]).markdown
    (one,) = forecast("toy", evidence=tmp_path / "evidence", jobs=1)
    assert one.counted() == "3 of 6 planned runs recorded, 3 failed"
    failed = read(tmp_path / "evidence/toy/acc.standard.jsonl").rows[-1]["failed"]
    assert failed.endswith("RuntimeError: told to\n") and str(tmp_path) not in failed
