"""The experiments of the lower bound: rows that say what was checked, and controls that fail."""

import itertools
import json

import pytest

from lib.experiments.freezing import fail_decoders, freeze
from lib.experiments.protocols import compare_protocol
from lib.metrics.freezing import unused

WORLD = dict(m=2, ns=[2])


def assert_plain(row, settings):
    assert json.loads(json.dumps(row)) == row and not row.keys() & settings.keys()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    dict(WORLD, decoders=10, prompts=20), dict(m=3, ns=[], decoders=5, prompts=20, heads=2, d_head=2),
    dict(m=2, ns=[2, 2], decoders=3, prompts=20, layers=2)])
def test_random_decoders_and_their_protocols_agree(settings):
    row = compare_protocol(settings, seed=0)
    assert row["compared"] == settings["decoders"] * 20 and row["mismatches"] == 0
    assert row["outputs"] > settings["decoders"], "decoders tell prompts apart: equality says something"
    assert row["bits_sent"] == row["bits_formula"] > 0 and row["errors"] is None
    assert row["message_bits"] <= 2 * row["Hdp"] and sum(row["parties"]) == row["prompt_length"]
    assert_plain(row, settings)
    assert compare_protocol(settings, seed=0) == row


def test_the_built_decoder_is_right_as_a_protocol():
    row = compare_protocol(dict(WORLD, decoder="built", prompts=500, weight_bits=0, value_bits=2), seed=0)
    assert (row["errors"], row["mismatches"], row["accumulator_bits"], row["Hdp"]) == (0, 0, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(protocols=4), dict(protocols=4, counts=[2, 2, 5, 60], x=[2, 2])])
def test_the_argument_holds_on_random_protocols_and_needs_its_families(settings):
    row = freeze(settings, seed=0)
    assert row["violated"] == 0 and row["several"] >= 2 and row["functions"] == row["counted"]
    assert_plain(row, settings)
    control = freeze(dict(settings, drop="stage 1: to 0 in epoch 1"), seed=0)
    assert control["violated"] >= 3 and control["functions"] < control["counted"]
    assert control["first_violation"].startswith("F_2")
    spare = freeze(dict(settings, drop=unused(row["L"])[0]), seed=0)
    assert spare["violated"] >= 1 and spare["end_violated"] == 0


@pytest.mark.slow
def test_decoders_of_few_bits_are_handed_two_inputs_one_of_which_they_get_wrong():
    settings = dict(WORLD, decoders=4)
    row = fail_decoders(settings, seed=0)
    assert row["inputs"] == 4096 and row["failing"] == row["confirmed"] >= 3 and row["violated"] == 0
    assert_plain(row, settings)
    pair = row["example"]
    w, z_0 = pair["w"][0], pair["z_0"]
    place = 2 * w + pair["z_1"][z_0]
    assert [pair["z_2"][place], pair["other z_2"][place]] == pair["answers"]
    assert pair["answers"][0] != pair["answers"][1]


@pytest.mark.slow
def test_one_more_layer_escapes_the_argument():
    row = fail_decoders(dict(WORLD, decoder="built", weight_bits=0), seed=0)
    assert (row["failing"], row["violated"]) == (0, 1) and row["left"] > 1


@pytest.mark.parametrize("run, settings, message", [
    (compare_protocol, dict(WORLD, decoder="bulit"), "did you mean 'built'"),
    (compare_protocol, dict(WORLD, decoder="built", decoders=2), "decoders=1 for the built one"),
    (compare_protocol, dict(WORLD, prompts=0), "at least 1"),
    (compare_protocol, dict(m=2), "needs ns"),
    (freeze, dict(drop="stage 9"), "unknown family to drop"),
    (freeze, dict(counts=[2, 2], x=[]), "are needed"),
    (freeze, dict(rate=2), "0 <= rate <= 1"),
    (freeze, dict(protocol=3), "did you mean 'protocols'"),
    (fail_decoders, dict(m=3, ns=[2]), "all inputs are run"),
    (fail_decoders, dict(WORLD, x=[1]), "x_0 … x_"),
])
def test_settings_that_cannot_be_are_refused(run, settings, message):
    with pytest.raises(ValueError, match=message):
        run(settings, seed=0)


def test_no_result_is_named_like_a_setting():
    rows = [compare_protocol(dict(WORLD, decoders=1, prompts=2), seed=0), freeze(dict(protocols=1), seed=0)]
    names = {"m", "ns", "heads", "d_head", "weight_bits", "value_bits", "sharpness", "decoders", "decoder",
             "layers", "prompts", "counts", "x", "rate", "protocols", "drop"}
    assert not set(itertools.chain(*rows)) & names
