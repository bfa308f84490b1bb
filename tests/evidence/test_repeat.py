"""A few runs of older code, repeated by the present one: chosen, recorded, compared, told."""

import itertools

import pytest

from lib.evidence import ledger
from lib.evidence.__main__ import main
from lib.evidence.agreement import Agreement, differences, is_timed
from lib.evidence.code import code_digest, named_digest
from lib.evidence.forecast import standing
from lib.evidence.provenance import collect
from lib.evidence.repeat import choose, files, repeat
from lib.evidence.rows import RowStore, content, read, run_key

GRID, SEEDS = [{"n": n} for n in range(5)], [0, 1]
world = {}  # what the present code does otherwise than the older one
calls = []


def run(settings, *, seed):
    """A run as the older code made it, except for what `world` says."""
    calls.append((settings["n"], seed))
    if world.get("fails"):
        raise RuntimeError("told to")
    curve = [0.5, settings["n"] + world.get("shift", 0)]
    return {"accuracy": settings["n"] / 7 + seed, "curve": curve, "name": "x"} | world.get("more", {})


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    world.clear()
    calls.clear()


@pytest.fixture
def root(chapter, tmp_path):
    """A repository with the claims of `conftest`, and its evidence in data/evidence."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/evidence").symlink_to(tmp_path / "evidence")
    (tmp_path / "evidence").mkdir()
    return tmp_path


def cost(n, seed):
    """Core seconds that are on record: n=3 is cheap, and the middle of the grid is n=2, seed 0 or 1."""
    return {3: 4, 2: 50}.get(n, 30) + seed


def recorded(root, name="acc", code="0lder", runs=None, cost=cost, provenance=None, grid=GRID):
    """A file that older code wrote: the plan, and a row of each run."""
    path = root / f"data/evidence/toy/{name}.standard.jsonl"
    store = RowStore(path, code=code, provenance=provenance or made())
    store.declare(grid, SEEDS, run=f"{run.__module__}.run")
    for settings, seed in runs or itertools.product(grid, SEEDS):
        result = run(settings, seed=seed)
        store.append(settings=settings, seed=seed, result=result, wall_s=1, core_s=cost(settings["n"], seed))
    calls.clear()
    return path


def made():
    found = collect(chapter="toy", profile="standard", device="cpu", parameters={"model": "a"})
    return found | {"experiment": "acc", "seeds": SEEDS, "inputs": {}}


def repeated(root, *options):
    return main(["repeat", "toy", *options], root=root)


def shown(chapter):
    """The recorded runs as the page of the chapter at profile quick sees them."""
    return chapter("quick").experiment("acc", run, GRID[:1]).recorded


def test_two_runs_are_repeated_and_appended_as_ordinary_rows(root, capsys):
    path = recorded(root)
    before, old = path.read_bytes(), read(path)
    assert repeated(root) == 0
    assert calls == [(3, 0), (2, 0)], "the cheapest, and one from the middle of the grid"
    found = read(path)
    assert path.read_bytes().startswith(before) and found.plan == old.plan
    assert found.rows[:-2] == old.rows and {row["code"] for row in found.rows[-2:]} == {code_digest(run)}
    (older,) = old.provenance.values()
    (now,) = [found.provenance[row["provenance"]] for row in found.rows[-1:]]
    assert now == older, "as Chapter.experiment writes it, with the parameters of the older rows"
    said = capsys.readouterr().out
    assert "acc.standard.jsonl: 10 of 10 runs by older code" in said
    assert "run 7 of 10 (n=3; seed 0): the same to the byte" in said and "4.0 then" in said


def test_what_agrees_stays_older_code_but_no_longer_lacks_anything(root, chapter):
    path = recorded(root)
    assert (shown(chapter).stale, shown(chapter).lacking) == (10, 10)
    assert shown(chapter).caveat() == "10 of 10 runs recorded by older code."
    assert repeated(root) == 0
    source = shown(chapter)
    assert (source.stale, source.lacking, len(source.frame)) == (8, 0, 10)
    said = "recorded by older code; 2 were repeated by the present one, with the same results to the byte."
    assert source.line().endswith(f" 8 runs were {said}") and source.caveat() == f"8 of 10 runs {said}"
    assert (source.as_dict()["repeated"], source.as_dict()["differing"]) == (2, 0)
    one = standing(read(path), chapter="toy", experiment="acc", root=root)  # its function is in no lib
    assert one.agreement == Agreement()
    toy = chapter("quick")
    toy.settle("toy/measured", source, 0.99, interval=(0.98, 1), n=3, control=0.1)
    entry = ledger.build(claims=root / "claims.toml", folder=root / "build")[0]
    assert entry["remedy"] == "" and entry["note"] == f"8 of 10 runs {said}"


def test_what_differs_is_told_by_the_command_the_page_and_the_ledger(root, chapter, capsys):
    recorded(root)
    world["shift"] = 0.25
    assert repeated(root) == 1
    said = capsys.readouterr()
    assert (
        "run 7 of 10 (n=3; seed 0): DIFFERS" in said.out
        and "curve: 1 of 2 values, by 0.25 at most" in said.out
    )
    assert "accuracy" not in said.out and "make evidence CHAPTER=" in said.err
    source = shown(chapter)
    assert source.caveat().endswith("; of 2 that were repeated by the present one, 2 differ.")
    assert source.lacking == source.stale == 8
    chapter("quick").settle("toy/measured", source, 0.99, interval=(0.98, 1), n=3, control=0.1)
    entries = ledger.build(claims=root / "claims.toml", folder=root / "build")
    assert entries[0]["remedy"] == "make evidence CHAPTER=toy" and entries[0]["differing"] == 2
    assert (
        "1 of 3 claims rest on recorded runs whose results the present code does not give again: "
        "`make evidence CHAPTER=toy`." in ledger.missing(entries)
    )
    del calls[:]
    assert repeated(root) == 1 and calls == [], "a second look is as loud"
    assert "DIFFERS" in capsys.readouterr().out


def test_one_of_two_is_a_difference_too(root, chapter):
    recorded(root)
    assert repeated(root, "--runs", "1") == 0 and calls == [(3, 0)]
    world["shift"] = 1e-12
    assert repeated(root) == 1 and calls == [(3, 0), (2, 0)]
    assert shown(chapter).agreement == Agreement(same=1, differ=1)
    assert shown(chapter).lacking == 8, "one that agrees does not make up for it"
    assert "of 2 that were repeated by the present one, 1 differs." in shown(chapter).line()


def test_a_difference_on_another_machine_says_so(root, chapter):
    recorded(root, provenance=made() | {"torch": "1.0"})
    world["shift"] = 1
    repeated(root)
    assert "2 differ (2 of them on another machine or version)." in shown(chapter).line()


def test_a_run_that_fails_is_recorded_as_failed_and_tried_again_by_the_next_call(root, chapter, capsys):
    path = recorded(root)
    world["fails"] = True
    assert repeated(root) == 1
    assert "run 7 of 10 (n=3; seed 0): FAILED: RuntimeError: told to" in capsys.readouterr().out
    assert [bool(row.get("failed")) for row in read(path).rows[-3:]] == [False, True, True]
    source = shown_failing(chapter)
    assert (source.failed, source.stale, source.lacking) == (2, 8, 10)
    world.clear()
    assert repeated(root) == 0
    assert (shown(chapter).failed, shown(chapter).lacking) == (0, 0)


def shown_failing(chapter):
    world.clear()
    source = shown(chapter)
    world["fails"] = True
    return source


def test_a_file_of_one_run_that_failed_is_tried_again_too(root):
    path = recorded(root, grid=GRID[:1], runs=[(GRID[0], 0)])
    world["fails"] = True
    assert repeated(root) == 1 and repeated(root) == 1
    assert calls == [(0, 0)] * 4 and read(path).rows[-1]["failed"], "a sweep tries twice"


def test_runs_that_are_too_dear_are_left_out_and_counted(root, capsys):
    recorded(root)
    assert repeated(root, "--seconds", "40") == 0
    assert calls == [(3, 0), (1, 1)], "the middle costs 50: a neighbour"
    assert "left out: 2 runs that took more than 40 core-seconds" in capsys.readouterr().out


def test_where_all_are_too_dear_nothing_runs_and_nothing_is_vouched_for(root, chapter, capsys):
    path = recorded(root)
    before = path.read_bytes()
    assert repeated(root, "--seconds", "1") == 0
    said = capsys.readouterr().out
    assert "left out: 10 runs" in said and "so 2 runs fewer than asked for" in said
    assert "nothing new to repeat\n" in said
    assert calls == [] and path.read_bytes() == before and shown(chapter).lacking == 10


def test_a_second_call_repeats_nothing_and_a_larger_number_only_what_is_new(root, chapter, capsys):
    path = recorded(root)
    repeated(root)
    before = path.read_bytes()
    del calls[:]
    capsys.readouterr()
    assert repeated(root) == 0 and calls == [] and path.read_bytes() == before
    assert "nothing new to repeat: 2 were repeated by the present one, with" in capsys.readouterr().out
    assert repeated(root, "--runs", "4") == 0 and len(calls) == 2
    assert len({run_key(row["settings"], row["seed"]) for row in read(path).rows[-4:]}) == 4
    assert repeated(root, "--runs", "99") == 0
    assert (shown(chapter).stale, shown(chapter).agreement) == (0, Agreement()), "all are recorded anew"


def test_rows_of_the_present_code_are_left_as_they_are(root, capsys):
    path = recorded(root, code=code_digest(run))
    before = path.read_bytes()
    assert repeated(root) == 0
    assert "0 of 10 runs by older code" in capsys.readouterr().out
    assert calls == [] and path.read_bytes() == before


def test_runs_that_a_recording_repeated_already_count(root, chapter):
    recorded(root)
    recorded(root, code=code_digest(run), runs=[({"n": 0}, 0), ({"n": 0}, 1)])
    assert repeated(root) == 0 and calls == []
    assert shown(chapter).agreement == Agreement(same=2)


def test_each_older_code_is_checked_and_one_that_was_not_is_told(root, chapter):
    recorded(root)
    recorded(root, code="lesser", runs=[({"n": 0}, 0), ({"n": 0}, 1), ({"n": 1}, 0)])
    recorded(root, code=code_digest(run), runs=[({"n": 3}, 0)])
    source = shown(chapter)
    assert source.agreement == Agreement(same=1, unchecked=3) and source.lacking == 9
    assert "; 3 are by yet other code, of which none was repeated." in source.line()
    del calls[:]
    assert repeated(root) == 0
    assert calls == [(0, 0), (1, 0)], "of the three; and these serve for the other code too"
    assert shown(chapter).agreement == Agreement(same=3)


def test_superseded_rows_do_not_count(root, chapter):
    world["shift"] = 5
    recorded(root, code="0ldest")
    world.clear()
    recorded(root)
    assert repeated(root) == 0
    assert shown(chapter).agreement == Agreement(same=2), "what 0ldest gave is nobody's evidence any more"


def test_repeats_by_code_that_is_older_by_now_do_not_hide_what_they_were_compared_with(root, chapter):
    recorded(root)
    world["shift"] = 5
    recorded(root, code="between", runs=[({"n": 3}, 0), ({"n": 2}, 0)])
    assert repeated(root) == 1, "as `between`, but not as the other eight"
    assert shown(chapter).agreement.differ == 2


def test_times_are_named_but_not_compared(root, chapter, capsys):
    world["more"] = {"layer_s": 0.25}
    recorded(root)
    world["more"] = {"layer_s": 0.5}
    assert repeated(root) == 0
    assert shown(chapter).caveat().endswith("with the same results to the byte, times apart.")
    world["more"] = {}
    assert repeated(root, "--runs", "3") == 1
    assert "layer_s: gone" in capsys.readouterr().out


def test_a_file_that_another_process_records_into_is_named_and_the_others_go_on(root, capsys):
    first, second = recorded(root, "acc"), recorded(root, "bcc")
    before = first.read_bytes()
    with RowStore(first, code="c").held():
        assert repeated(root) == 1
    said = capsys.readouterr().out
    assert "acc.standard.jsonl: not repeated: recording into" in said and "is under way already" in said
    assert first.read_bytes() == before and len(read(second).rows) == 12


def test_what_cannot_be_repeated_says_why(root, capsys):
    gone = recorded(root, "gone")
    store = RowStore(gone, code="c")
    store.declare(GRID, SEEDS, run="lib.toy_that_is_gone.run")
    recorded(root, "read", provenance=made() | {"inputs": {"weights": "abc"}})
    recorded(root, "gpu", provenance=made() | {"device": "A100"})
    damaged = recorded(root, "damaged")
    damaged.write_text(damaged.read_text().replace("0.5", "0.6"))
    assert repeated(root) == 1
    said = capsys.readouterr().out
    assert "names lib.toy_that_is_gone.run, which cannot be imported" in said
    assert "left out: 10 runs that read the files weights, which only the notebook can find" in said
    assert "left out: 10 runs made on a A100" in said
    assert "damaged.standard.jsonl: not repeated: " in said and "its content does not match" in said
    assert calls == []


def test_a_target_is_a_file_a_chapter_or_all(root, capsys):
    path = recorded(root)
    assert files("all", root) == files("toy", root) and len(files("all", root)) == 1
    assert files(str(path), root) == [path.resolve()]
    assert main(["repeat", "tay"], root=root) == 1
    assert main(["repeat", str(root / "acc.quick.jsonl")], root=root) == 1
    assert main(["repeat", "toy", "--runs", "0"], root=root) == 1
    said = capsys.readouterr().err
    assert "did you mean 'toy'" in said and "is no file of standard rows" in said and "at least 1" in said
    assert calls == []


def test_more_threads_than_one_are_pointed_out(root, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    said = []
    assert repeat(files("toy", root) if recorded(root) else [], root=root, say=said.append)
    assert said[0].startswith("OMP_NUM_THREADS is not 1")


def test_a_page_and_a_check_repeat_nothing(root, chapter):
    path = recorded(root)
    repeated(root)
    before = path.read_bytes()
    del calls[:]
    shown(chapter)  # which runs one of profile quick
    assert calls == [(0, 0)] and path.read_bytes() == before
    (root / "book").mkdir()
    (root / "book/claims.toml").write_text("")
    assert main(["check"], root=root) == 0 and path.read_bytes() == before


def test_a_recording_after_a_repetition_runs_only_what_is_left(root, chapter):
    recorded(root)
    repeated(root)
    del calls[:]
    chapter("standard").experiment("acc", run, GRID, seeds=SEEDS)
    assert len(calls) == 8 and not {(3, 0), (2, 0)} & set(calls)


def test_the_forecast_tells_the_comparison(root):
    (root / "lib").mkdir()
    (root / "lib/toy.py").write_text("def run(settings, *, seed):\n    return {}\n")
    path = root / "data/evidence/toy/acc.standard.jsonl"
    for code, seeds in (("0lder", SEEDS), (named_digest("lib.toy.run", root=root), [0])):
        store = RowStore(path, code=code)
        store.declare([{"n": 1}], SEEDS, run="lib.toy.run")
        for seed in seeds:
            store.append(settings={"n": 1}, seed=seed, result={"y": 1}, wall_s=0, core_s=7)
    one = standing(read(path), chapter="toy", experiment="acc", root=root)
    assert (one.current, one.stale, one.todo) == (1, 1, 1)
    assert one.counted() == (
        "1 of 2 planned runs recorded, 1 by other code (1 was repeated by the present one, with the same "
        "results to the byte)"
    )


def test_runs_are_chosen_from_all_over_the_grid():
    planned = [str(i) for i in range(9)]
    tries = {key: [{"code": "a", "core_s": 1 if key == "7" else 2}] for key in planned}
    assert choose(planned, tries, "now", {"a": 9}, 5, 60).keys == ["7", "4", "2", "6", "1"]
    assert choose(planned, tries, "now", {"a": 9}, 99, 60).short == 0, "there are only nine"


def test_a_difference_names_the_part_and_its_size():
    old = {"a": 1.0, "b": [1, [2, None]], "c": "x", "d": 0, "e": [1], "t_s": 1.0, "f": {"g": 1}}
    new = {"a": 1.5, "b": [1, [4, None]], "c": "y", "n": 3, "e": [1, 2], "t_s": 2.0, "f": {"g": 1}}
    assert differences(old, new) == [
        "d: gone",
        "a: 1.0 → 1.5, by 0.5",
        "b: 1 of 3 values, by 2 at most",
        'c: "x" → "y"',
        "n: new, 3",
        "e: of another form, [1] → [1,2]",
    ]
    assert differences(old, old) == []


def test_integers_and_floats_of_the_same_value_are_not_the_same_byte(root):
    assert differences({"a": 1}, {"a": 1.0}) == ["a: 1 → 1.0, by 0"]
    assert content({"result": {"a": 1}}) != content({"result": {"a": 1.0}})


def test_ratios_are_timed_only_beside_times():
    timing = {"a_ms": 1.5, "a_ratio": 2.0, "turns_a": [1], "tokens_per_s_a": 3.0, "flops": 7}
    assert [name for name in timing if is_timed(name, timing)] == list(timing)[:4]
    assert not is_timed("norm_ratio", {"norm_ratio": 0.5, "loss": 1.0})
    assert differences(timing, timing | {"a_ratio": 9.0, "flops": 8}) == ["flops: 7 → 8, by 1"]
