"""Erasures and other orders of the layers against one full forward pass for each intervention."""

import itertools

import pytest
import torch

from lib.metrics.depth import (
    layer_swaps,
    mean_residual,
    order_effects,
    residual_erasure,
    skip_effects,
)
from lib.models.transformer import Erase, Swap, Transformer, TransformerConfig

L, V = 4, 13
EXACT = dict(rtol=1e-10, atol=1e-10)  # float64: sums in another order


def small(*, seed=0, dtype=torch.float64, **changes):
    shape = dict(vocab=V, d_model=8, n_heads=2, n_kv_heads=1, n_layers=L, d_mlp=12, activation="swiglu")
    model = Transformer(TransformerConfig(**shape | changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.to(dtype)


def prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (T,), generator=generator) for T in lengths]


@pytest.mark.parametrize("measure", [
    skip_effects, layer_swaps,
    lambda model, tokens: residual_erasure(model, tokens, mean=torch.zeros(L + 1, 8), answer=1),
    mean_residual,
])  # fmt: skip
def test_empty_prompts_and_models_that_give_nan_are_refused(measure):
    for tokens in ([], torch.zeros(0, 5, dtype=torch.long), [torch.zeros(0, dtype=torch.long)]):
        with pytest.raises(ValueError, match="prompt"):
            measure(small(), tokens)
    model = small()
    with torch.no_grad():
        model.layers[2].mlp.W_2.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="after layer 2 is not finite"):
        measure(model, prompts(9))
    if measure is not mean_residual:
        model = small()
        with torch.no_grad():
            model.norm.weight.fill_(torch.inf)
        with pytest.raises(ValueError, match="logits are not finite"):
            measure(model, prompts(9))


# Erasure


def test_erasures_are_those_of_full_passes():
    model, tokens, checked = small(), prompts(7, 6), 0
    mean = mean_residual(model, prompts(5, 9, seed=4))
    found = residual_erasure(model, tokens, mean=mean, answer=[2, 3], batch_size=4)
    with torch.no_grad():
        for i, (prompt, n) in enumerate(zip(tokens, (2, 3), strict=True)):
            T, y = len(prompt), model(prompt[None])[0].softmax(-1)
            assert found.peak[i].shape == found.mean[i].shape == (L + 1, T)
            for l, t in itertools.product(range(L + 1), range(T)):
                edit = Erase(l - 1, mean[l], torch.arange(T) == t)
                edited = model.trace(prompt[None], interventions=[edit]).logits[0].softmax(-1)
                effect = (y - edited).norm(dim=-1)[-(n + 1) : -1]
                torch.testing.assert_close(found.peak[i][l, t], effect.max(), **EXACT)
                torch.testing.assert_close(found.mean[i][l, t], effect.mean(), **EXACT)
                checked += 1
    assert checked == (L + 1) * 13 and found.answers == (2, 3)
    assert found.last(3).shape == (2, L + 1, 3) and torch.equal(found.last(3)[0], found.peak[0][:, -3:])
    assert torch.equal(found.over_tokens()[1], found.peak[1].amax(dim=1))


def test_after_the_last_layer_only_the_answers_own_rows_matter():
    model, (prompt,) = small(), prompts(9)
    found = residual_erasure(model, [prompt], mean=torch.zeros(L + 1, 8), answer=2).peak[0]
    assert (found[L] > 1e-12).nonzero().flatten().tolist() == [6, 7]  # a readout of other rows rounds
    assert found[:, 8].eq(0).all()
    assert found[0, :8].min() > 0


@pytest.mark.parametrize("how", [dict(batch_size=1), dict(batch_size=999), dict(share=False)])
def test_erasure_is_the_same_in_every_batch(how):
    model, tokens = small(), prompts(8, 8)
    mean = mean_residual(model, tokens)
    one = residual_erasure(model, tokens, mean=mean, answer=3)
    other = residual_erasure(model, tokens, mean=mean, answer=3, **how)
    for a, b in zip(one.peak, other.peak, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_mean_stream_is_over_all_tokens_of_all_prompts():
    model, tokens = small(), prompts(3, 8, 3)
    with torch.no_grad():
        taps = [model.trace(prompt[None]).residual[:, 0] for prompt in tokens]
    torch.testing.assert_close(mean_residual(model, tokens), torch.cat(taps, dim=1).mean(dim=1), **EXACT)


@pytest.mark.parametrize("how, message", [
    (dict(mean=torch.zeros(L, 8), answer=1), r"mean must be finite, \(5, 8\)"),
    (dict(mean=torch.full((L + 1, 8), torch.nan), answer=1), "mean must be finite"),
    (dict(mean=torch.zeros(L + 1, 8), answer=0), "1 to 4 tokens, got 0"),
    (dict(mean=torch.zeros(L + 1, 8), answer=5), "1 to 4 tokens, got 5"),
    (dict(mean=torch.zeros(L + 1, 8), answer=[1, 1]), "2 answers for 1 prompts"),
])  # fmt: skip
def test_erasures_that_do_not_fit_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        residual_erasure(small(), prompts(5), **how)
    with pytest.raises(ValueError, match="causal"):
        residual_erasure(small(causal=False), prompts(5), mean=torch.zeros(L + 1, 8), answer=1)


# Order


@pytest.mark.parametrize("pairs, count", [("adjacent", L - 1), ("all", L * (L - 1) // 2), ([(3, 1)], 1)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_swaps_are_those_of_full_passes(pairs, count, batch_size):
    model, tokens = small(), prompts(7, 5)
    found = layer_swaps(model, tokens, pairs=pairs, batch_size=batch_size)
    assert len(found.pairs) == count
    for i, prompt in enumerate(tokens):
        with torch.no_grad():
            log_y = model(prompt[None])[0, :-1].log_softmax(-1)
            for k, pair in enumerate(found.pairs):
                swapped = (
                    model.trace(prompt[None], interventions=[Swap(*pair)]).logits[0, :-1].log_softmax(-1)
                )
                effect = (log_y.exp() - swapped.exp()).norm(dim=-1)
                lost = (log_y - swapped).gather(1, prompt[1:, None])[:, 0]
                torch.testing.assert_close(found.output.peak[i, k], effect.max(), **EXACT)
                torch.testing.assert_close(found.added_nats.mean[i, k], lost.mean(), **EXACT)
    grid = found.matrix(found.output.max())
    assert grid.diagonal().eq(0).all() and int(grid.isnan().sum()) == L * L - L - 2 * count
    i, j = found.pairs[0]
    assert grid[i, j] == grid[j, i] == found.output.max()[0]


def test_any_order_is_its_layers_in_turn_and_the_own_order_changes_nothing():
    model, tokens = small(), prompts(6)
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 2, 3), (0, 1, 2, 1)]
    found = order_effects(model, tokens, orders)
    with torch.no_grad():
        y = model(tokens[0][None])[0, :-1].softmax(-1)
        for k, order in enumerate(orders):
            h = model.embed(tokens[0][None])
            for l in order:
                h = h + sum(model.run_layer(l, h))
            effect = (y - model.readout(h)[0, :-1].softmax(-1)).norm(dim=-1).max()
            torch.testing.assert_close(found.output.peak[0, k], effect, **EXACT)
    assert max(found.output.peak[0, 0], found.added_nats.peak[0, 0].abs()) < 1e-14  # a readout of other rows
    assert found.output.peak[0, 1:].min() > 1e-3
    with pytest.raises(ValueError, match="not swaps"):
        found.matrix(found.output.max())


@pytest.mark.parametrize("pairs, message", [
    ([(0, L)], "cannot swap layers 0 and 4"), ([(1, 1)], "cannot swap layers 1 and 1"),
    ("near", "unknown pairs"), ([(-1, 2)], "cannot swap"),
])  # fmt: skip
def test_layers_that_do_not_exist_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        layer_swaps(small(), prompts(5), pairs=pairs)


@pytest.mark.parametrize("orders", [[], [(0, 1, 2)], [(0, 1, 2, 4)]])
def test_orders_that_do_not_fit_are_refused(orders):
    with pytest.raises(ValueError, match="for each of 4 places"):
        order_effects(small(), prompts(5), orders)
