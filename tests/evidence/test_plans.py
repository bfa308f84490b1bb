import json
import re

import pytest

from lib.evidence import EvidenceError
from lib.evidence.__main__ import main
from lib.evidence.plans import difference
from lib.evidence.rows import RowStore, _seal, read

RUN = "lib.toy.run"


def plan(grid, seeds=(0,)):
    return {"grid": grid, "seeds": list(seeds), "run": RUN}


@pytest.mark.parametrize(
    "grid, seeds", [([{"n": 1}], [0, 1]), ([{"n": 2}, {"n": 1}], [1, 0]), ([{"n": 1}, {"n": 3}], [0, 1, 2])]
)
def test_a_plan_may_be_repeated_reordered_and_extended(tmp_path, grid, seeds):
    store = RowStore(tmp_path / "x.standard.jsonl", code="c")
    store.declare([{"n": 1}], [0, 1], run=RUN)
    store.declare(grid, seeds, run=RUN)
    assert read(store.path).plan == plan(grid, seeds)


@pytest.mark.parametrize(
    "old, new, shown",
    [
        (plan([{"n": 1, "steps": 10}], [0, 1]), plan([{"n": 1, "steps": 20}], [0, 1]),
         "2 of 2 planned runs are not asked for any more, 2 are new; steps: 10 → 20"),
        (plan([{"n": 1}, {"n": 2}]), plan([{"n": 2}]),
         "1 of 2 planned runs are not asked for any more, 0 are new; n: 1, 2 → 2"),
        (plan([{"n": 1}], [0, 1]), plan([{"n": 1, "device": "cuda"}], [0]),
         '2 of 2 planned runs are not asked for any more, 1 are new; seeds: 0, 1 → 0; '
         'device: (absent) → "cuda"'),
        (plan([{"n": n} for n in range(9)]), plan([{"n": 0}]),
         "8 of 9 planned runs are not asked for any more, 0 are new; n: 0, 1, 2, 3, 4, 5, … → 0"),
        (plan([{"n": 1, "L": 1}, {"n": 2, "L": 2}]), plan([{"n": 2, "L": 1}, {"n": 1, "L": 2}]),
         "2 of 2 planned runs are not asked for any more, 2 are new; for one, "
         '{"seed":0,"settings":{"L":1,"n":1}} is no more'),
    ],
)  # fmt: skip
def test_a_difference_shows_what_changed_from_what_to_what(old, new, shown):
    assert difference(old, new) == shown
    assert difference(old, old) == "" == difference(new, new)


def test_changed_settings_are_refused_with_the_difference_and_two_ways_on(tmp_path):
    store = RowStore(tmp_path / "x.standard.jsonl", code="c")
    store.declare([{"n": 1, "steps": 10}], [0], run=RUN)
    before = store.path.read_bytes()
    with pytest.raises(EvidenceError) as error:
        store.declare([{"n": 1, "steps": 20}], [0], run=RUN)
    for part in (str(store.path), "steps: 10 → 20", "Undo that change", "python -m lib.evidence replan"):
        assert part in str(error.value)
    assert store.path.read_bytes() == before


def test_a_withdrawn_plan_leaves_the_rows_and_gives_way_to_any_other(tmp_path, capsys):
    store = RowStore(tmp_path / "x.standard.jsonl", code="c")
    store.declare([{"n": 1}], [0], run=RUN)
    store.append(settings={"n": 1}, seed=0, result={"y": 1}, wall_s=0, core_s=0)
    before = store.path.read_bytes()
    assert main(["replan", str(store.path)]) == 0
    assert re.search(r"x.standard.jsonl: the plan is withdrawn, its 1 rows stay", capsys.readouterr().out)
    assert store.path.read_bytes().startswith(before) and len(read(store.path).rows) == 1
    assert read(store.path).plan is None
    store.declare([{"n": 2}], [0], run=RUN)
    assert read(store.path).plan == plan([{"n": 2}])


def test_only_a_plan_that_is_there_and_not_being_carried_out_can_be_withdrawn(tmp_path, capsys):
    assert main(["replan", str(tmp_path / "absent.jsonl")]) == 1
    assert "there is no file" in capsys.readouterr().err
    store = RowStore(tmp_path / "x.standard.jsonl", code="c")
    store.append(settings={"n": 1}, seed=0, result={"y": 1}, wall_s=0, core_s=0)
    assert main(["replan", str(store.path)]) == 1
    assert "has no plan" in capsys.readouterr().err
    store.declare([{"n": 1}], [0], run=RUN)
    before = store.path.read_bytes()
    with store.held():
        assert main(["replan", str(store.path)]) == 1
    assert "wait for it or stop it" in capsys.readouterr().err and store.path.read_bytes() == before


def test_a_plan_of_before_functions_were_named_is_renewed_in_silence(tmp_path):
    store = RowStore(tmp_path / "x.standard.jsonl", code="c")
    store.declare([{"n": 1}], [0], run=RUN)
    text = store.path.read_text()
    store.path.write_bytes(_seal({"plan": {"grid": [{"n": 1}], "seeds": [0]}}))  # as it was written then
    assert read(store.path).plan == {"grid": [{"n": 1}], "seeds": [0]}
    store.declare([{"n": 1}], [0], run=RUN)
    assert store.path.read_text().endswith(text) and json.loads(text)["schema"] == 1
