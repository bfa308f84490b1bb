"""Linearity and cost of the layers of a small stand-in, against slow oracles; and what is refused."""

import json
import math

import pytest
import torch

from lib.experiments import reading
from lib.experiments.layer_costs import (
    CostSettings,
    affine_maps,
    layer_costs,
    layer_seconds,
    recommendations,
    write_table,
)
from lib.experiments.linearity import LinearitySettings, check_enough, measure_linearity
from lib.experiments.reading import layer_sizes, layer_streams, losses, losses_under, windows
from lib.metrics.linearity import linearity_score
from lib.models.transformer import Replace, Skip, Transformer, TransformerConfig
from lib.tasks.text import austen_tokenizer

D, L, T = 24, 3, 16
CONFIG = TransformerConfig(
    vocab=1024, d_model=D, n_heads=3, n_kv_heads=1, n_layers=L, d_mlp=40, activation="swiglu", tied=True
)
MEASURE = {"model": "stand-in", "text": "austen", "tokens": 1600, "context": T}
COSTS = {"model": "stand-in", "text": "austen", "tokens": 160, "fit_tokens": 1600, "context": T}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """A random model in the place of a pretrained one, and one thread, as in a sweep."""
    monkeypatch.setattr(reading.pretrained, "load", lambda name, **_: Transformer(CONFIG, seed=3))
    monkeypatch.setattr(reading.pretrained, "load_tokenizer", lambda name: austen_tokenizer())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    return Transformer(CONFIG, seed=3).eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(1024, (6, T), generator=torch.Generator().manual_seed(0))


def test_streams_layer_by_layer_are_those_of_a_trace(model, tokens):
    trace = model.trace(tokens)
    seen = list(layer_streams(model, tokens, batch=4))
    assert [l for l, *_ in seen] == [0, 1, 2]
    for l, x, a, m in seen:
        torch.testing.assert_close(x, trace.residual[l], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, trace.attention_out[l], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(m, trace.mlp_out[l], rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_window_is_the_mean_of_minus_log_p_of_its_next_tokens(model, tokens):
    trace = model.trace(tokens)
    p = trace.logits.double().softmax(-1)
    for window, found in enumerate(losses(model, trace.residual[-1], tokens).tolist()):
        said = [p[window, t, tokens[window, t + 1]].log().item() for t in range(T - 1)]
        assert found == pytest.approx(-sum(said) / (T - 1), rel=1e-5)


def test_changes_from_the_shared_prefix_equal_full_passes_with_interventions(model, tokens):
    maps, _ = affine_maps(model, tokens)
    plans = [{}, {0: None}, {2: None}, {1: maps[1]}, {0: maps[0], 2: None}, {0: None, 1: None, 2: None}]
    found = losses_under(model, tokens, plans, batch=4)
    for plan, ours in zip(plans, found, strict=True):
        edits = [Skip(l) if new is None else Replace(l, new) for l, new in plan.items()]
        trace = model.trace(tokens, interventions=edits)
        torch.testing.assert_close(ours, losses(model, trace.residual[-1], tokens), rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3, "a change that changes nothing would pass above"


def test_an_affine_map_is_the_least_squares_solution(model, tokens):
    maps, scores = affine_maps(model, tokens, only=[1], batch=4)
    assert maps.keys() == scores.keys() == {1}
    residual = model.trace(tokens).residual.double()
    x, y = residual[1].flatten(0, 1), residual[2].flatten(0, 1)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    best = ones @ torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(maps[1](x.float()).double(), best, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_row_is_a_function_of_settings_and_seed():
    for run, settings in ((measure_linearity, MEASURE), (layer_costs, COSTS)):
        row = run(settings, seed=1)
        assert row == run(settings, seed=1) == json.loads(json.dumps(row))
        assert row != run(settings, seed=2), "the seed draws the windows"
        assert not row.keys() & {*settings, "seed", "wall_s", "core_s"}
        assert "nan" not in json.dumps(row).lower().replace('"', " ").split()
        json.dumps(row, allow_nan=False)


def test_a_row_does_not_depend_on_the_batch():
    one, two = (measure_linearity({**MEASURE, "batch": n}, seed=0) for n in (1, 7))
    assert one["with_held_out"] == pytest.approx(two["with_held_out"], abs=1e-5)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)


def test_scores_of_a_row_are_those_of_the_direct_formula():
    row = measure_linearity(MEASURE, seed=0)
    model = Transformer(CONFIG, seed=3)
    ids = windows("austen", austen_tokenizer(), part="evaluation", context=T, tokens=1600, seed=0, vocab=1024)
    assert row["n_tokens"] == ids.numel() == 1600 and row["n_windows"] == 100
    with torch.no_grad():
        residual = model.trace(ids).residual.double()
    for l in range(L):
        x, y = residual[l], residual[l + 1]
        for suffix, s in (("", slice(None)), ("_no_first", slice(1, None))):
            for estimator in ("raw", "adjusted"):
                found = row[f"with_{estimator}{suffix}"][l], row[f"without_{estimator}{suffix}"][l]
                direct = [linearity_score(x[:, s], z[:, s], estimator=estimator) for z in (y, y - x)]
                assert found == pytest.approx(direct, abs=1e-5)
            lo, score, hi = (row[f"with_{end}{suffix}"][l] for end in ("lo", "held_out", "hi"))
            assert lo <= score <= hi
        a = (y - x).norm(dim=-1) / x.norm(dim=-1)
        assert row["layer_norm"][l] == pytest.approx(a.median().item(), rel=1e-5)
        assert row["norm_ratio"][l] > 0 and -1 <= row["cosine"][l] <= 1


def test_token_errors_are_held_out_and_ordered():
    row = measure_linearity(MEASURE, seed=0)
    for quantiles, tail, worst in zip(row["error_quantiles"], row["error_tail"], row["worst"], strict=True):
        assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2] <= quantiles[3]
        assert 1 <= tail[0] <= tail[1] <= tail[2]
        sizes = [size for _, _, size, _, _ in worst]
        assert len(worst) == 5 and sizes == sorted(sizes, reverse=True) and sizes[0] <= tail[2] + 1e-3
        for window, place, _, before, token in worst:
            assert 0 <= window < 100 and 1 <= place < T and isinstance(before, str) and token


def test_the_passage_has_an_error_for_each_token():
    row = measure_linearity(MEASURE, seed=0)
    assert len(row["passage"]) == T and [len(errors) for errors in row["passage_errors"]] == [T] * L
    for errors, worst in zip(row["passage_errors"], row["worst"], strict=True):
        here = [size for window, _, size, _, _ in worst if window == 50]
        assert all(e <= worst[0][2] for e in errors[1:]) and (not here or max(errors[1:]) == here[0])


def test_only_some_layers_give_the_values_of_all():
    whole, part = measure_linearity(MEASURE, seed=0), measure_linearity({**MEASURE, "only": [0, 2]}, seed=0)
    assert part["layers"] == [0, 2] and part["loss"] == whole["loss"]
    assert part["with_held_out"] == whole["with_held_out"][::2] and part["worst"] == whole["worst"][::2]


def test_the_untrained_control_has_the_same_shape_and_other_weights():
    trained = measure_linearity(MEASURE, seed=0)
    for seed in (0, 1):
        control = measure_linearity({**MEASURE, "weights": "untrained"}, seed=seed)
        assert control["parameters"] == trained["parameters"]
        assert control["weights_hash"] != trained["weights_hash"]


def test_costs_are_paired_differences_with_intervals_around_them():
    row = layer_costs({**COSTS, "only": [0, 2]}, seed=0)
    assert row["layers"] == [0, 2] and row["loss_lo"] <= row["loss"] <= row["loss_hi"]
    for name in ("skip_cost", "replace_cost"):
        for value, lo, hi in zip(row[name], row[f"{name}_lo"], row[f"{name}_hi"], strict=True):
            assert lo <= value <= hi
    assert all(0 <= s <= 1 for s in row["score_with"] + row["score_without"])
    assert row["n_evaluated"] == 160 and row["n_fit"] == 1600


def test_fit_and_evaluation_share_no_window():
    tokenizer = austen_tokenizer()
    for text in ("prose", "austen"):
        parts = [
            windows(text, tokenizer, part=part, context=32, tokens=3200, seed=0, vocab=1024).tolist()
            for part in ("fit", "evaluation")
        ]
        fit, judged = ({tuple(window) for window in part} for part in parts)
        assert len(fit) > 50 and len(judged) > 50 and not fit & judged


def test_sizes_are_those_of_the_weights_and_of_the_products(model):
    found = layer_sizes(model, T)
    assert found["layer_parameters"] == sum(p.numel() for p in model.layers[0].parameters())
    assert found["map_parameters"] == D * D + D and found["map_flops"] == 2 * T * D * D
    matrices = sum(p.numel() for p in model.layers[0].parameters() if p.dim() == 2)
    assert found["layer_flops"] == 2 * T * matrices + 4 * T * T * D
    assert found["model_flops"] == L * found["layer_flops"] + 2 * T * D * 1024


def table(**changed):
    row = {"layers": [0, 1, 2, 3], "score_with": [0.9] * 4, "score_without": [0.5] * 4}
    row |= {f"skip_cost{end}": [2.0, 0.01, 0.3, 0.04] for end in ("", "_lo", "_hi")}
    row |= {f"replace_cost{end}": [1.0, 0.005, 0.02, 0.2] for end in ("", "_lo", "_hi")}
    row["skip_cost_hi"] = [2.1, 0.02, 0.4, 0.08]
    row |= {"layer_parameters": 100, "map_parameters": 30, "model_parameters": 1000}
    row |= {"layer_flops": 200, "map_flops": 20, "model_flops": 1000}
    return recommendations(row, **changed)


def test_recommendations_follow_the_stated_rule(tmp_path):
    frame = table(tolerance=0.05)
    assert frame["recommendation"].tolist() == ["keep", "drop", "linearise", "keep"]
    assert frame["saves_parameters"].tolist() == [100, 100, 70, 100]
    assert frame["saves_flops"].tolist() == [200, 200, 180, 200]
    assert frame["share_parameters"].tolist() == [0.1, 0.1, 0.07, 0.1]
    assert set(table(tolerance=3.0)["recommendation"]) == {"drop"}
    timed = table(layer_s=0.004, map_s=0.001)
    assert timed["saves_ms"].tolist() == [4.0, 4.0, 3.0, 4.0]
    path = write_table(timed, tmp_path / "deep" / "layers.csv")
    lines = path.read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("layer,score_with,score_without,skip,skip_lo,")
    with pytest.raises(ValueError, match="above 0"):
        table(tolerance=0)


def test_layers_and_maps_are_timed(model, tokens):
    layer_s, map_s = layer_seconds(model, tokens, repeats=3)
    assert 0 < map_s < layer_s < 1


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (LinearitySettings, {"text": "proze"}, "did you mean 'prose'"),
        (LinearitySettings, {"tokens": 40, "context": 16}, "3 windows"),
        (LinearitySettings, {"context": 1}, "at least 2"),
        (LinearitySettings, {"batch": 0}, "at least 1"),
        (LinearitySettings, {"weights": "fresh"}, "trained, untrained"),
        (LinearitySettings, {"groups": 5}, "even"),
        (LinearitySettings, {"groups": 2}, "at least 4"),
        (LinearitySettings, {"loss_windows": 2}, "at least 3"),
        (LinearitySettings, {"device": "gpu"}, "unknown device"),
        (CostSettings, {"fit_text": "novel"}, "unknown fit_text"),
        (CostSettings, {"fit_tokens": 100}, "at least 768"),
        (CostSettings, {"ridge": -1.0}, "at least 0"),
        (CostSettings, {"ridge": math.nan}, "at least 0"),
        (CostSettings, {"only": []}, "list of layers"),
        (LinearitySettings, {"only": [1, 1]}, "none twice"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(model="stand-in", **settings)


def test_what_only_the_model_shows_is_refused_with_the_way_out(model):
    with pytest.raises(ValueError, match="did you mean 'tokens'"):
        measure_linearity({"model": "stand-in", "token": 3}, seed=0)
    with pytest.raises(ValueError, match="too few for width 24 in 8 groups: 128 tokens"):
        measure_linearity({**MEASURE, "tokens": 112}, seed=0)
    with pytest.raises(ValueError, match="no layer 3; allowed: 0 to 2"):
        layer_costs({**COSTS, "only": [3]}, seed=0)
    with pytest.raises(ValueError, match="too few to fit maps of width 24: 68 are needed"):
        layer_costs({**COSTS, "fit_tokens": 48}, seed=0)
    with pytest.raises(ValueError, match="are no pair"):
        windows("prose", austen_tokenizer(), part="fit", context=16, tokens=99, seed=0, vocab=9)
    with pytest.raises(ValueError, match="gives 1 windows of 5000"):
        windows("prose", austen_tokenizer(), part="fit", context=5000, tokens=9999, seed=0, vocab=1024)
    fits = LinearitySettings(**{**MEASURE, "tokens": 128})
    check_enough(8, fits, D=D)
    with pytest.raises(ValueError, match="needed"):
        check_enough(8, fits, D=3 * T)
