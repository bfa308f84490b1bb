import subprocess
import sys

import pytest

from lib.evidence.code import code_digest, named_digest
from lib.evidence.forecast import forecast
from lib.evidence.rows import RowStore
from lib.paths import ROOT

GRID = [{"n": 1}, {"n": 2}, {"n": 3}]
CODE = "def run(settings, *, seed):\n    return {}\n"


@pytest.fixture
def root(tmp_path):
    """A repository with one run function, `lib.toy.run`."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/__init__.py").touch()
    (tmp_path / "lib/toy.py").write_text(CODE)
    return tmp_path


def recorded(root, *finished, code=None, run="lib.toy.run", seeds=(0, 1)):
    """A file with a plan and rows of (n, seed, core_s, failed)."""
    store = RowStore(
        root / "evidence/toy/acc.standard.jsonl", code=code or named_digest("lib.toy.run", root=root)
    )
    store.declare(GRID, list(seeds), run=run)
    for n, seed, core_s, failed in finished:
        failed = "ValueError" if failed else None
        store.append(settings={"n": n}, seed=seed, result={}, wall_s=0, core_s=core_s, failed=failed)
    return store


def only(root, jobs=2):
    (found,) = forecast("toy", evidence=root / "evidence", jobs=jobs, root=root)
    return found


def test_where_nothing_is_recorded_nothing_is_forecast(tmp_path):
    assert forecast("toy", evidence=tmp_path, jobs=2) == []


def test_every_planned_run_is_current_stale_failed_or_missing(root):
    recorded(root, (1, 0, 10, False), (1, 1, 30, True), (9, 0, 5, False))
    recorded(root, (2, 0, 40, False), code="0lder")
    found = only(root)
    assert (found.planned, found.current, found.stale, found.failed, found.missing) == (6, 1, 1, 1, 3)
    assert found.todo == 5
    assert found.counted() == "1 of 6 planned runs recorded, 1 by other code, 1 failed, 3 missing"


def test_time_comes_from_the_run_itself_else_its_settings_else_all_runs(root):
    recorded(root, (1, 0, 10, False), (1, 1, 99, True))
    recorded(root, (2, 0, 40, False), code="0lder")
    found = only(root)
    # n=1 seed 1 as n=1 seed 0; n=2 seed 0 as itself, seed 1 as seed 0; n=3 twice the mean of 10 and 40
    assert found.core_s == 10 + 40 + 40 + 25 + 25
    assert found.wall_s == 70 and only(root, jobs=100).wall_s == 40, "a run is not split"
    assert found.line() == (
        "acc: 1 of 6 planned runs recorded, 1 by other code, 1 failed, 3 missing; about 70 s to go "
        "(2 min on one core)"
    )


def test_without_a_finished_run_no_time_is_promised(root):
    recorded(root, (1, 0, 10, True))
    found = only(root)
    assert (found.todo, found.core_s, found.wall_s) == (6, None, None)
    assert "nobody knows how long" in found.line()


def test_a_full_recording_has_nothing_to_come_until_its_code_changes(root):
    recorded(root, *[(n, seed, 10, False) for n in (1, 2, 3) for seed in (0, 1)])
    assert (only(root).todo, only(root).core_s, only(root).wall_s) == (0, 0, 0)
    assert only(root).line() == "acc: 6 of 6 planned runs recorded"
    (root / "lib/toy.py").write_text(CODE + "# a remark\n")
    assert only(root).todo == 0
    (root / "lib/toy.py").write_text(CODE.replace("{}", "{'y': 1}"))
    assert (only(root).current, only(root).stale, only(root).core_s) == (0, 6, 60)


@pytest.mark.parametrize("run, said", [(None, "names no function"), ("lib.toy.gone", "no lib.toy.gone")])
def test_an_unknown_function_is_said_and_its_rows_are_judged_by_their_own_code(root, run, said):
    recorded(root, (1, 0, 10, False), code="c", run=run)
    assert only(root).current == 1 and said in only(root).note and said in only(root).line()
    recorded(root, (2, 0, 10, False), code="d", run=run)
    assert (only(root).current, only(root).stale) == (0, 2) and "2 codes" in only(root).note


def test_a_function_has_the_same_digest_by_name_and_by_import():
    from lib.experiments.verification import verify_composition

    name = f"{verify_composition.__module__}.{verify_composition.__qualname__}"
    assert named_digest(name) == code_digest(verify_composition)
    for absent in ("lib.experiments.verification.gone", "lib.experiments.gone.run", "numpy.dot", "run"):
        assert named_digest(absent) is None


@pytest.mark.slow
def test_the_committed_evidence_is_forecast_without_torch():
    code = (
        "import sys\nfrom lib.evidence.forecast import forecast\n"
        "assert forecast('one-layer-limits', jobs=2)\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
