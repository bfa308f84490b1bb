"""Verification of hand-built weights: right ones pass, damaged ones fail, nonsense is refused."""

import json

import pytest
import torch

from lib.experiments.verification import DAMAGES, damaged, hard_inputs, verify_composition
from lib.models.constructions import proposition_t, proposition_t_many_heads


@pytest.mark.parametrize("s", [1, 2, 3])
def test_every_input_of_size_3_is_right_and_counted(s):
    row = verify_composition({"n": 3, "s": s}, seed=0)
    assert (row["inputs"], row["errors"], row["exactly_right"], row["worst_error"]) == (2187, 0, 2187, 0.0)
    assert row["first_error"] is None and row["product"] == 2 * (-(-3 // s) + 1) * (s + 4)
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("shape", [
    {"n": 3, "s": 2}, {"n": 16, "s": 4, "inputs": 400},
    {"construction": "T'", "S": 2, "nu": 2, "s": 2, "inputs": 200},
    {"construction": "T' binary", "S": 2, "nu": 2, "s": 2, "inputs": 200},
], ids=["T exhaustive", "T", "T'", "T' binary"])
def test_one_wrong_weight_is_found(shape, damage):
    if damage == "switch" and "S" not in shape:
        with pytest.raises(ValueError, match="only T' switches banks"):
            verify_composition(shape | {"damage": damage}, seed=0)
        return
    assert verify_composition(shape, seed=0)["errors"] == 0
    row = verify_composition(shape | {"damage": damage}, seed=0)
    assert row["errors"] > 0 and row["worst_error"] >= 0.5
    wrong = row["first_error"]
    assert wrong["answer"] == wrong["h"][wrong["g"][wrong["x"]]] and abs(wrong["y"] - wrong["answer"]) >= 0.5
    json.dumps(row, allow_nan=False)


def test_damage_changes_exactly_one_entry_or_one_neuron():
    for damage in DAMAGES:
        model = proposition_t_many_heads(2, 2, 1) if damage == "switch" else proposition_t(4, 2)
        other = damaged(model, damage)
        rows = sum(a != b for a, b in zip(model.rows, other.rows, strict=True))
        neurons = sum(str(a[name]) != str(b[name])
                      for a, b in zip(model.hidden, other.hidden, strict=True) for name in a)
        assert rows + neurons == 1, damage


def test_the_same_seed_gives_the_same_row_and_another_seed_other_inputs():
    broken = {"n": 12, "s": 3, "inputs": 200, "damage": "value"}
    first, again, other = (verify_composition(broken, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["first_error"] != other["first_error"]


def test_hard_inputs_are_distinct_inputs_that_reach_the_corners():
    g, h, x = hard_inputs(9, 3)
    words = torch.cat([g, h, x[:, None]], dim=1)
    assert len(words) == len(words.unique(dim=0)) > 100
    assert words.min() == 0 and words.max() == 8
    read = g.gather(1, x[:, None]).squeeze(1)
    assert {0, 2, 3, 5, 6, 8} <= set(read.tolist()) and set(x.tolist()) == {0, 4, 8}
    lone_zero = (h == 8).sum(dim=1).eq(8) & h.gather(1, read[:, None]).squeeze(1).eq(0)
    assert lone_zero.any()


def test_half_of_the_asked_inputs_are_hard_when_there_are_enough():
    row = verify_composition({"n": 9, "s": 3, "inputs": 101}, seed=0)
    assert (row["inputs"], row["hard_inputs"], row["errors"]) == (101, 50, 0)


def test_nan_counts_as_an_error(monkeypatch):
    monkeypatch.setattr("lib.models.one_layer.OneLayerSoftmax.forward",
                        lambda self, words, dtype: torch.full((len(words),), torch.nan, dtype=dtype))
    row = verify_composition({"n": 2, "s": 1, "arithmetic": "float16"}, seed=0)
    assert (row["inputs"], row["errors"], row["not_finite"], row["exactly_right"]) == (32, 32, 32, 0)
    assert row["first_error"]["y"] == "nan"
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(("n", "s", "breaks"), [(4, 2, False), (9, 3, False), (25, 5, True), (25, 1, False)])
def test_a_format_breaks_where_its_bits_run_out_and_not_before(n, s, breaks):
    row = verify_composition({"n": n, "s": s, "arithmetic": "float32", "inputs": 300}, seed=0)
    assert (row["errors"] > 0) == breaks == (row["value_bits"] > 24)  # 24 bits in float32's significand
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("settings, message", [
    ({"n": 3, "s": 1, "arithmetic": "float46"}, "did you mean 'float64'"),
    ({"n": 3, "s": 1, "damage": "valeu"}, "did you mean 'value'"),
    ({"n": 3, "s": 1, "construction": "U"}, "unknown construction 'U'"),
    ({"n": 3}, "needs s"),
    ({"s": 1}, "needs n and s"),
    ({"s": 1, "construction": "T'"}, "needs S, nu and s"),
    ({"n": 9, "S": 2, "nu": 2, "s": 2, "construction": "T'"}, "n = S·nu·s"),
    ({"n": 3, "s": 1, "S": 2}, "T takes n and s"),
    ({"n": 5, "s": 1}, "48828125 inputs, too many to try all"),
    ({"n": 3, "s": 1, "inputs": 0}, "a number of at least 1"),
    ({"n": 3, "s": 1, "device": "gpu"}, "unknown device"),
    ({"n": 3, "block": 1}, "unknown setting"),
])
def test_settings_that_make_no_sense_are_refused_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        verify_composition(settings, seed=0)
