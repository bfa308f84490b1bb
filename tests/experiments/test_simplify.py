"""Layers removed, replaced and distilled on a small stand-in, against slow oracles; SmolLM2 where it is."""

import json

import pytest
import torch

from lib.experiments import reading
from lib.experiments.layer_costs import affine_maps
from lib.experiments.reading import Affine, layer_streams, losses, losses_under
from lib.experiments.simplify import (
    CHANGES,
    ORDERS,
    SimplifySettings,
    build,
    distil,
    greedy_order,
    set_aside,
    simplify_model,
)
from lib.models import pretrained
from lib.models.transformer import Replace, Skip, Transformer, TransformerConfig
from lib.tasks.text import austen_tokenizer

D, L, T = 24, 4, 16
CONFIG = TransformerConfig(
    vocab=1024, d_model=D, n_heads=3, n_kv_heads=1, n_layers=L, d_mlp=40, activation="swiglu", tied=True
)
SETTINGS = {
    "model": "stand-in", "text": "austen", "tokens": 160, "fit_tokens": 1600, "context": T, "counts": [1, 3]
}  # fmt: skip
load, load_tokenizer = pretrained.load, pretrained.load_tokenizer
smollm2 = pytest.mark.skipif(
    not pretrained.available("smollm2-135m"), reason="SmolLM2 is not here: `make models` fetches it"
)


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
    return torch.randint(1024, (40, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_row_is_a_function_of_settings_and_seed(order, change):
    settings = {**SETTINGS, "order": order, "change": change}
    row = simplify_model(settings, seed=1)
    assert row == simplify_model(settings, seed=1)
    json.dumps(row, allow_nan=False)
    assert not row.keys() & {*settings, "seed", "wall_s", "core_s"}
    assert len(row["changed_layers"]) == len(set(row["changed_layers"])) == 3
    for i, count in enumerate(settings["counts"]):
        assert row["increase_lo"][i] <= row["increase"][i] <= row["increase_hi"][i]
        assert row["losses"][i] == pytest.approx(row["loss"] + row["increase"][i], abs=1e-6)
        kept = row["map_parameters"] if change != "remove" else 0
        assert row["saved_parameters"][i] == count * (row["layer_parameters"] - kept)


@pytest.mark.slow
def test_only_the_random_order_follows_the_seed():
    settings = {**SETTINGS, "order": "random"}
    assert len({tuple(simplify_model(settings, seed=s)["changed_layers"]) for s in range(6)}) > 2


@pytest.mark.slow
def test_orders_rank_by_what_they_say():
    by = {order: simplify_model({**SETTINGS, "order": order}, seed=0) for order in ORDERS}
    for order, row in by.items():
        if order != "greedy-skip-cost":
            changed = [row["criterion"][l] for l in row["changed_layers"]]
            assert changed == sorted(row["criterion"])[:3]
    score = by["linearity"]["criterion"]
    assert all(-1 <= value <= 0 for value in score)
    assert by["greedy-skip-cost"]["changed_layers"][0] == by["skip-cost"]["changed_layers"][0]


def test_the_greedy_order_is_best_at_every_step(model, tokens):
    order = greedy_order(model, tokens[:4], 3, batch=3)
    for step in range(3):
        costs = {}
        for l in set(range(L)) - set(order[:step]):
            edits = [Skip(gone) for gone in [*order[:step], l]]
            stream = model.trace(tokens[:4], interventions=edits).residual[-1]
            costs[l] = losses(model, stream, tokens[:4]).mean().item()
        assert order[step] == min(costs, key=costs.get)


def test_a_distilled_map_minimises_the_error_on_the_changed_models_own_stream(model, tokens):
    (plan,) = distil(model, tokens, [[3, 1]], batch=7)
    teacher = model.trace(tokens).residual
    student = model.trace(tokens, interventions=[Replace(1, plan[1])]).residual
    x, y = (stream[i].double().flatten(0, 1) for stream, i in ((student, 3), (teacher, 4)))
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    best = ones @ torch.linalg.lstsq(ones, y).solution
    ours = plan[3](x.float()).double()
    torch.testing.assert_close(ours, best, rtol=1e-3, atol=1e-3)
    plain = affine_maps(model, tokens)[0]
    torch.testing.assert_close(plan[1].W, plain[1].W, rtol=1e-4, atol=1e-5)
    assert (y - plain[3](x.float()).double()).square().sum() > (y - ours).square().sum()


def test_sets_distilled_together_equal_sets_distilled_alone(model, tokens):
    sets = [[2], [2, 0], [0, 1, 2, 3]]
    for part, plan in zip(sets, distil(model, tokens, sets), strict=True):
        (alone,) = distil(model, tokens, [part])
        assert plan.keys() == alone.keys() == set(part)
        for l in part:
            torch.testing.assert_close(plan[l].W, alone[l].W)
            torch.testing.assert_close(plan[l].b, alone[l].b)


def test_a_built_model_computes_what_the_interventions_compute(model, tokens):
    maps, _ = affine_maps(model, tokens)
    for layers, new in (([1], None), ([0, 2, 3], None), ([1, 2], maps), (range(L), maps)):
        short = build(model, layers, new)
        edits = [Skip(l) if new is None else Replace(l, new[l]) for l in layers]
        expected = model.trace(tokens, interventions=edits).logits
        torch.testing.assert_close(short(tokens), expected, rtol=1e-4, atol=1e-4)
        last = short(tokens, rows=slice(-2, None))
        torch.testing.assert_close(last, expected[:, -2:], rtol=1e-4, atol=1e-4)
        *_, (_, x, a, m) = layer_streams(short, tokens, batch=8)
        torch.testing.assert_close(short.readout(x + a + m), expected, rtol=1e-4, atol=1e-4)
    assert model.config.n_layers == len(model.layers) == L, "the model itself is left as it was"


def test_a_built_model_saves_the_parameters_that_the_row_says(model, tokens):
    maps, _ = affine_maps(model, tokens)
    for change, new in (("remove", None), ("linear", maps)):
        row = simplify_model({**SETTINGS, "change": change, "order": "random"}, seed=0)
        for count, saved in zip(SETTINGS["counts"], row["saved_parameters"], strict=True):
            short = build(model, row["changed_layers"][:count], new)
            assert model.n_parameters() - short.n_parameters() == saved


def test_the_windows_set_aside_are_not_fitted_on(tokens):
    ranking, rest = set_aside(tokens, 4)
    assert len(ranking) == 4 and len(rest) == 36
    both = {tuple(w) for w in ranking.tolist()} & {tuple(w) for w in rest.tolist()}
    assert not both and torch.equal(ranking[1], tokens[10])
    with pytest.raises(ValueError, match="leaves none to fit on"):
        set_aside(tokens, 40)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"order": "linear"}, "did you mean 'linearity'"),
        ({"change": "prune"}, "remove, linear, linear\\+distilled"),
        ({"counts": []}, "list of numbers of layers"),
        ({"counts": [0]}, "at least 1"),
        ({"counts": [2, 1]}, "rise"),
        ({"order_windows": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        SimplifySettings(**{**SETTINGS, **settings})


def test_what_only_the_model_shows_is_refused_with_the_way_out(model):
    with pytest.raises(ValueError, match="has 4 layers: 4 cannot be changed by 'remove'"):
        simplify_model({**SETTINGS, "counts": [4]}, seed=0)
    assert len(simplify_model({**SETTINGS, "counts": [4], "change": "linear"}, seed=0)["losses"]) == 1
    with pytest.raises(ValueError, match="no layer would be left"):
        build(model, range(L))
    with pytest.raises(ValueError, match=r"no map for layers \[2\]"):
        build(model, [2], {1: Affine(torch.zeros(D, D), torch.zeros(D))})
    with pytest.raises(ValueError, match="no layer 9"):
        losses_under(model, torch.zeros(3, T, dtype=torch.long), [{9: None}], batch=1)


@smollm2
@pytest.mark.slow
def test_smollm2_loses_most_where_the_facts_say():
    """Layers 0 and 1 are the dearest to skip, those of the middle cheap; maps are cheaper than skipping 0."""
    model, tokenizer = load("smollm2-135m").eval().requires_grad_(False), load_tokenizer("smollm2-135m")
    ids = reading.windows(
        "prose", tokenizer, part="evaluation", context=32, tokens=96, seed=0, vocab=model.config.vocab
    )
    plans = [{}, {0: None}, {1: None}, {16: None}, {20: None}]
    base, *found = losses_under(model, ids, plans, batch=4).mean(dim=1).tolist()
    cost = [loss - base for loss in found]
    assert 2 < base < 6 and cost[0] > 3 and cost[1] > 1 and max(cost[2:]) < 1
    full = model.trace(ids, interventions=[Skip(16)]).residual[-1]
    assert losses(model, full, ids).mean().item() == pytest.approx(found[2], rel=1e-5)
