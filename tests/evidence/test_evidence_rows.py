import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evidence import EvidenceError
from lib.evidence.rows import RowStore, content, plain, read, run_key

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
DICTS = st.dictionaries(st.text(), JSON, max_size=4)


def append(store, settings, seed=0, result=None, **more):
    return store.append(
        settings=settings,
        seed=seed,
        result={"y": 1.0} if result is None else result,
        wall_s=1,
        core_s=1,
        **more,
    )


@pytest.mark.slow
def test_any_settings_and_results_come_back_as_they_were(tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("rows"), 0

    @given(settings=DICTS, seed=st.integers(0, 2**32), result=DICTS)
    def round_trip(settings, seed, result):
        nonlocal seen
        seen += 1
        path = folder / f"{seen}.quick.jsonl"
        store = RowStore(path, code="c0de")
        append(store, settings, seed, result)
        (row,) = read(path).rows
        assert (row["settings"], row["seed"], row["result"], row["code"]) == (settings, seed, result, "c0de")
        assert len(path.read_bytes().split(b"\n")) == 3  # provenance, row, and nothing after the last newline
        assert RowStore(path, code="c0de").has(store.key(settings, seed))

    round_trip()
    assert seen >= 100


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(x):
    back = json.loads(content({"result": plain({"x": x})}))["result"]["x"]
    assert np.float64(back).tobytes() == np.float64(x).tobytes()


def test_arrays_scalars_and_tuples_become_plain_json():
    given_ = {"a": np.float32(0.5), "b": np.arange(3), "c": (1, np.int64(2)), "d": np.bool_(True), "e": None}
    assert plain(given_) == {"a": 0.5, "b": [0, 1, 2], "c": [1, 2], "d": True, "e": None}
    assert run_key({"a": (1, 2), "b": 0}, np.int64(3)) == run_key({"b": 0, "a": [1, 2]}, 3)


@pytest.mark.parametrize(
    "value, error, message",
    [
        ({"loss": {"last": math.nan}}, ValueError, r"result\['loss'\]\['last'\] is nan"),
        ({"loss": [0.0, np.inf]}, ValueError, r"result\['loss'\]\[1\] is inf"),
        ({1: 2}, TypeError, "keys must be strings"),
        ({"f": len}, TypeError, "which JSON cannot hold"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_place(value, error, message):
    with pytest.raises(error, match=message):
        plain(value, "result")


@pytest.mark.parametrize(
    "result, why", [({"loss": math.nan}, "'loss'"), ([1, 2], "returned a list"), (None, "NoneType")]
)
def test_a_result_that_is_no_evidence_is_recorded_as_a_failure(tmp_path, result, why):
    store = RowStore(tmp_path / "x.quick.jsonl", code="c0de")
    row = store.append(settings={}, seed=0, result=result, wall_s=1, core_s=1)
    assert row["result"] is None and why in row["failed"]
    assert not store.has(store.key({}, 0)), "a failed run counts as done"


def test_a_failure_keeps_its_traceback_without_paths_of_this_machine(tmp_path):
    store = RowStore(tmp_path / "x.quick.jsonl", code="c0de")
    trace = (
        f'Traceback:\n  File "{__file__}", line 3, in run\n  File "/opt/secret/x.py", line 1\nValueError: bad'
    )
    row = store.append(settings={}, seed=0, result=None, wall_s=1, core_s=1, failed=trace)
    assert (
        'File "tests/evidence/test_evidence_rows.py", line 3' in row["failed"]
        and "ValueError: bad" in row["failed"]
    )
    assert "secret" not in (tmp_path / "x.quick.jsonl").read_text()


def test_the_scientific_content_of_two_equal_runs_is_byte_identical(tmp_path):
    rows = []
    for name, date in (("a", "2026-01-01"), ("b", "2027-01-01")):
        store = RowStore(
            tmp_path / f"{name}.quick.jsonl", code="c0de", provenance={"machine": name, "date": date}
        )
        rows.append(append(store, {"b": 1, "a": 0.1}, 7, {"y": 1 / 3}))
    rows[1]["wall_s"], rows[1]["recorded"] = 99.0, "2027-01-01T00:00:00Z"
    assert content(rows[0]) == content(rows[1])
    assert content(rows[0]) != content(rows[0] | {"result": {"y": 1 / 3 + 2**-54}})


def test_a_run_counts_as_done_only_for_the_same_settings_seed_and_code(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    append(RowStore(path, code="old"), {"n": 1}, 0)
    for code, settings, seed, done in [("old", {"n": 1}, 0, True), ("new", {"n": 1}, 0, False),
                                       ("old", {"n": 2}, 0, False), ("old", {"n": 1}, 1, False)]:  # fmt: skip
        store = RowStore(path, code=code)
        assert store.has(store.key(settings, seed)) is done
    assert RowStore(path, code="new").rows() == []


def test_provenance_is_written_when_it_changes_and_not_when_only_the_date_does(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    for seed, (machine, date) in enumerate([("one", 1), ("one", 2), ("two", 2), ("one", 3)]):
        append(RowStore(path, code="c", provenance={"machine": machine, "date": date}), {}, seed)
    found = read(path)
    assert [part["machine"] for part in found.provenance.values()] == ["one", "two"]
    used = [found.provenance[row["provenance"]]["machine"] for row in found.rows]
    assert used == ["one", "one", "two", "one"]


def test_the_plan_is_written_once_and_again_only_when_it_changes(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    for grid in ([{"n": 1}], [{"n": 1}], [{"n": 2}]):
        RowStore(path, code="c").declare(grid, [0], run="lib.toy.run", replace=True)
    plan = {"grid": [{"n": 2}], "seeds": [0], "run": "lib.toy.run"}
    assert path.read_bytes().count(b"\n") == 2 and read(path).plan == plan


def filled(path, count=4):
    store = RowStore(path, code="c0de", provenance={"machine": "one"})
    for seed in range(count):
        append(store, {"n": 5}, seed, {"y": 0.25 * seed})
    return store


EDITS = [
    (b'"y":0.25', b'"y":0.75', "does not match its digest"),
    (b'"seed":1', b'"seed":9', "does not match its digest"),
    (b'"y":0.25', b'"y":0.250', None),  # the same number, otherwise written, is the same evidence
    (b'"n":5},"wall_s":1.0', b'"n":5.0},"wall_s":1.0', "does not match its digest"),
    (b"}\n", b"\n", "not a line of evidence"),
    (b"{", b"<<<<<<< HEAD\n{", "not a line of evidence"),
    (b'"digest"', b'"digets"', "not a line of evidence"),
]


@pytest.mark.parametrize("old, new, why", EDITS)
def test_an_edited_line_is_reported_by_file_and_number_and_the_others_stay_readable(tmp_path, old, new, why):
    path = tmp_path / "x.standard.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new, 1)
    path.write_bytes(b"".join(lines))
    if why is None:
        assert len(read(path).rows) == 4
        return
    with pytest.raises(EvidenceError) as error:
        read(path)
    assert "x.standard.jsonl, line 3" in str(error.value) and why in str(error.value)
    assert "lib.evidence mend" in str(error.value)
    found = read(path, damaged="collect")
    assert [(damage.line, why in damage.why) for damage in found.damaged] == [(3, True)]
    kept = [row["seed"] for row in found.rows]
    assert set(kept) >= {0, 2, 3} and len(kept) == len(set(kept))


@pytest.mark.slow
def test_any_single_flipped_bit_of_a_row_is_noticed(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    filled(path, 1)
    text, checked = path.read_bytes(), 0
    start = text.index(b"\n") + 1
    whole = read(path).rows
    for place in range(start, len(text) - 1):  # the last newline is the torn line's matter
        for bit in range(8):
            path.write_bytes(text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :])
            found = read(path, damaged="collect")
            assert found.damaged or found.rows == whole, f"byte {place}, bit {bit}"
            checked += 1
    assert checked == 8 * (len(text) - 1 - start) > 1000


def test_a_damaged_quick_file_may_be_deleted_and_its_message_says_so(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    path.write_text("{}\n")
    with pytest.raises(EvidenceError, match="delete .*x.quick.jsonl"):
        RowStore(path, code="c")


@pytest.mark.slow
def test_a_file_cut_at_any_byte_loses_only_the_line_cut_and_takes_the_next_append(tmp_path):
    path, checked = tmp_path / "x.quick.jsonl", 0
    filled(path, 3)
    text = path.read_bytes()
    whole = text.splitlines(keepends=True)
    rows_in = [0, 0, 1, 2, 3]  # rows among the first 0, 1, ... whole lines: the first line is the provenance
    for size in range(len(text) + 1):
        path.write_bytes(text[:size])
        lines = text[:size].count(b"\n")
        found = read(path)
        assert len(found.rows) == rows_in[lines]
        assert found.torn == (sum(map(len, whole[:lines])) < size)
        checked += 1
        if size % 41 == 0:  # each append is synced to disk, which takes a millisecond
            append(RowStore(path, code="c0de", provenance={"machine": "one"}), {"n": 6}, 0)
            after = read(path)
            assert len(after.rows) == rows_in[lines] + 1 and not after.torn
            assert path.read_bytes().startswith(b"".join(whole[:lines]))
    assert checked == len(text) + 1


def test_an_absent_file_holds_nothing_and_a_misspelt_mode_is_refused(tmp_path):
    assert read(tmp_path / "absent.jsonl").rows == []
    with pytest.raises(ValueError, match="did you mean 'collect'"):
        read(tmp_path / "absent.jsonl", damaged="colect")


def sealed(line):
    """A line of the file, with its digest: the first 16 digits of the SHA-256 of its canonical JSON."""
    text = json.dumps(line, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return json.dumps(line | {"digest": digest}, sort_keys=True, separators=(",", ":")) + "\n"


def test_plan_and_provenance_name_their_schema_and_lines_without_one_are_of_the_first(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    store = RowStore(path, code="c0de", provenance={"machine": "one"})
    store.declare([{"n": 5}], [0], run="lib.toy.run")
    append(store, {"n": 5})
    plan, made, row = [json.loads(line) for line in path.read_text().splitlines()]
    assert plan["schema"] == made["schema"] == 1 and "schema" not in row
    for line in (plan, made):
        del line["schema"], line["digest"]
    path.write_text(sealed(plan) + sealed(made) + path.read_text().splitlines()[2] + "\n")
    assert len(read(path).rows) == 1 and read(path).plan["run"] == "lib.toy.run"


@pytest.mark.parametrize("line", [{"plan": None}, {"id": "a", "provenance": {}}, {"something": "new"}])
@pytest.mark.parametrize("mode", ["raise", "collect"])
def test_a_line_of_another_schema_is_no_damage_and_asks_for_a_newer_checkout(tmp_path, line, mode):
    path = tmp_path / "x.quick.jsonl"
    filled(path, 1)
    text = path.read_text() + sealed(line | {"schema": 2})
    path.write_text(text)
    with pytest.raises(EvidenceError) as error:
        read(path, damaged=mode)
    said = str(error.value)
    assert "x.quick.jsonl, line 3: it is of schema 2, this checkout reads schema 1" in said
    assert "update the checkout" in said and "delete" not in said and "mend" not in said
    with pytest.raises(EvidenceError):
        append(RowStore(path, code="c"), {"n": 1})
    assert path.read_text() == text
    path.write_text(text.replace('"schema":2', '"schema":3'))
    assert [damage.line for damage in read(path, damaged="collect").damaged] == [3], "an edit is an edit"


def test_a_worker_that_differs_from_the_driver_has_its_own_provenance(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    store = RowStore(path, code="c", provenance={"machine": "driver", "torch": "2", "date": 1})
    for seed, about in enumerate([None, {"machine": "driver"}, {"machine": "worker"}, {"machine": "worker"}]):
        append(store, {}, seed, about=about)
    found = read(path)
    assert [found.provenance[row["provenance"]]["machine"] for row in found.rows] == [
        "driver", "driver", "worker", "worker"
    ]  # fmt: skip
    assert list(found.provenance.values())[1] == {"machine": "worker", "torch": "2", "date": 1}
    assert path.read_bytes().count(b"\n") == 6


def test_a_run_is_expected_to_take_what_it_took_last_whatever_the_code(tmp_path):
    path = tmp_path / "x.quick.jsonl"
    for code, core_s, failed in [("old", 3, None), ("older", 5, None), ("new", 7, "ValueError")]:
        RowStore(path, code=code).append(
            settings={"n": 1}, seed=0, result={}, wall_s=9, core_s=core_s, failed=failed
        )
    store = RowStore(path, code="new")
    assert store.expected({"n": 1}, 0) == 5.0
    assert store.expected({"n": 1}, 1) is None
    append(store, {"n": 1}, 1)
    assert store.expected({"n": 1}, 1) == 1.0
