"""The cost of composing heads: counts are exact and repeat; times are there, and not judged."""

import json
import math
import statistics
from dataclasses import fields

import pytest
import torch

from lib.experiments import attention_cost
from lib.experiments.attention_cost import (
    ARMS,
    COMPOSED,
    AttentionCostSettings,
    measure_cost,
)
from lib.models.dcmha import DCMHA

SMALL = {"T": 12, "d_model": 16, "n_heads": 4, "least_s": 0.0, "depth": 2, "vocab": 32, "decoded": 2}
COUNTS = ("flops", "parameters", "cache", "saved", "peak", "difference")


@pytest.fixture(scope="module")
def row():
    return measure_cost(SMALL, seed=0)


def counts(row):
    return {name: value for name, value in row.items() if name.startswith(COUNTS)}


# ---- the row ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_row_is_plain_json_and_shares_no_name_with_its_settings(row):
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    taken = {field.name for field in fields(AttentionCostSettings)} | {"seed", "wall_s", "core_s"}
    assert not taken & row.keys()


def test_every_arm_has_times_and_ratios_and_the_median_lies_in_its_interval(row):
    both = ("mha", "dcmha")
    measured = [(what, arm) for what in ("forward", "training") for arm in ARMS]
    measured += [(what, arm) for what in ("block", "model", "decode", "decode_block") for arm in both]
    assert len(measured) == 2 * 7 + 4 * 2
    for what, arm in measured:
        assert row[f"{what}_{arm}_ms"] > 0
        ratio = f"{what}_{arm}_ratio"
        assert (ratio in row) == (arm != "mha")
        if arm != "mha":
            assert 0 < row[f"{ratio}_lo"] <= row[ratio] <= row[f"{ratio}_hi"]


def test_medians_and_ratios_are_those_of_the_turns(row):
    for what in ("forward", "training"):
        turns = row[f"turns_{what}"]
        assert turns.keys() == set(ARMS) and {len(times) for times in turns.values()} == {7}
        for arm in ARMS:
            assert row[f"{what}_{arm}_ms"] == pytest.approx(statistics.median(turns[arm]), rel=1e-3)
        ratios = [a / b for a, b in zip(turns["static"], turns["mha"], strict=True)]
        assert row[f"{what}_static_ratio"] == pytest.approx(statistics.median(ratios), rel=2e-3)


def test_a_token_takes_the_inverse_of_the_tokens_per_second(row):
    assert row["tokens_per_s_dcmha"] * row["decode_dcmha_ms"] == pytest.approx(1e3, rel=2e-3)


@pytest.mark.slow
def test_counts_are_the_same_in_every_run(row):
    again = measure_cost(SMALL | {"turns": 8}, seed=0)
    assert len(counts(row)) > 50 and counts(again) == counts(row)
    other = counts(measure_cost(SMALL, seed=1))
    assert other.keys() == counts(row).keys()
    assert {name for name in other if other[name] != row[name]} <= {"difference"}


def test_a_real_cache_holds_what_the_formula_says(row):
    assert [row["cache_mha"], row["cache_dcmha"]] == [2 * 16, 2 * 16 + (4 * 2 + 2) * 4]
    assert [row["cache_formula_mha"], row["cache_formula_dcmha"]] == [row["cache_mha"], row["cache_dcmha"]]


def test_the_batch_multiplies_flops_and_leaves_what_is_counted_for_each_pair(row):
    pair = measure_cost(SMALL | {"batch": 2, "arms": ["mha_explicit"]}, seed=0)
    assert pair["flops_block_dcmha"] == 2 * row["flops_block_dcmha"]
    assert pair["cache_dcmha"] == row["cache_dcmha"]
    assert pair["saved_pairs_mha_explicit"] == pytest.approx(row["saved_pairs_mha_explicit"], abs=0.1)
    assert "training_static_ms" not in pair and "training_dcmha_ms" in pair


def test_explicit_attention_saves_one_matrix_and_a_mask_for_each_pair_and_the_fused_one_nothing(row):
    assert row["saved_pairs_mha_explicit"] == pytest.approx(1 + 1 / 4 / 4)  # a byte of mask for four heads
    assert row["saved_pairs_mha"] == pytest.approx(0, abs=1e-9)


def test_the_reference_saves_what_the_formula_needs_and_a_masked_copy(row):
    assert row["saved_formula_dcmha_reference"] == 3 + 4 * 2 / 4
    surplus = row["saved_pairs_dcmha_reference"] - row["saved_formula_dcmha_reference"]
    assert 1 <= surplus <= 1 + 2 / 4 / 4  # and a mask or two, of a byte for four heads


def test_the_fast_composition_saves_nothing_for_a_pair(row):
    fast = [arm for arm in ARMS if row[f"saved_formula_{arm}"] == 0]
    assert fast == ["mha", "dcmha", "dcmha_query", "dcmha_post", "static"]
    assert all(abs(row[f"saved_pairs_{arm}"]) < 0.25 for arm in fast)  # chunks: not a + b T^2 to the float


def test_torch_observes_three_forward_passes_of_what_is_written_out(row):
    assert row["flops_observed_mha_explicit"] == 3 * row["flops_mha_explicit"]
    gating = 2 * 4 * 4 * 12 * 12  # multiply and add, four sets, four heads, all pairs: elementwise
    assert row["flops_observed_dcmha_reference"] == 3 * (row["flops_dcmha_reference"] - gating)
    assert "flops_observed_mha" not in row and row["flops_observed_dcmha"] > row["flops_mha"]


def test_what_is_saved_is_alive_at_the_peak(row):
    for arm in ARMS:
        assert row[f"peak_{arm}"] > row[f"saved_{arm}"] - 12 * 16 / (4 * 12 * 12)  # the input is not counted


def test_the_arms_differ_as_they_say():
    chosen = AttentionCostSettings(**SMALL)
    for arm in COMPOSED:
        layer = attention_cost.Parts(chosen, seed=0, device="cpu").layers[arm]
        made = layer.pre is not None, layer.post.query is not None, layer.post.key is not None
        shape = chosen.shape(arm)
        assert made == (shape.pre, shape.query_side, shape.key_side)
        assert layer.computation == ("reference" if arm == "dcmha_reference" else "fast")
        counted = sum(p.numel() for p in layer.parameters())
        assert counted == attention_cost.formulas.parameters(shape)["total"]


# ---- what guards the times -------------------------------------------------------------------------------


def test_wrong_answers_are_not_timed(monkeypatch):
    forward = DCMHA.forward
    monkeypatch.setattr(DCMHA, "forward", lambda self, x, **options: 1.001 * forward(self, x, **options))
    with pytest.raises(RuntimeError, match="dcmha and its reference differ by 1.0e-03 .* nothing was timed"):
        measure_cost(SMALL, seed=0)


def test_a_wrong_cache_is_not_timed(monkeypatch):
    forward = DCMHA.forward

    def one_late(self, x, *, cache=None, **options):
        return forward(self, x if cache is None or x.shape[1] > 1 else x.flip(-1), cache=cache, **options)

    monkeypatch.setattr(DCMHA, "forward", one_late)
    with pytest.raises(RuntimeError, match="dcmha decoded and whole differ"):
        measure_cost(SMALL, seed=0)


@pytest.mark.slow
def test_one_thread_is_used_and_the_caller_gets_its_own_back(monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(
        attention_cost, "_formulas", lambda chosen: seen.append(torch.get_num_threads()) or {}
    )
    torch.set_num_threads(2)
    try:
        measure_cost(SMALL, seed=0)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"turns": 6}, "turns is a whole number of at least 7, got 6"),
        ({"T": 1}, "T is a whole number of at least 2, got 1"),
        ({"batch": True}, "batch is a whole number of at least 1, got True"),
        ({"least_s": math.nan}, "least_s is a number of seconds of at least 0, got nan"),
        ({"arms": ["dcmah"]}, "unknown arm 'dcmah'; did you mean 'dcmha'"),
        ({"arms": "mha"}, "arms is a list of names, got 'mha'"),
        ({"n_heads": 3}, "n_heads must divide d_model"),
        ({"n_heads": 16}, "the head width must be even, got 1"),
        ({"heads": 3}, "unknown setting of AttentionCostSettings 'heads'; did you mean 'n_heads'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_before_anything_is_timed(change, message, monkeypatch):
    monkeypatch.setattr(attention_cost, "Parts", None)
    with pytest.raises(ValueError, match=message):
        measure_cost(SMALL | change, seed=0)
