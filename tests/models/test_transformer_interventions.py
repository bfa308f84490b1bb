"""Skip, Replace, Erase and Swap against the same formulas, edited by hand."""

import pytest
import torch

from lib.models.transformer import Erase, Replace, Skip, Swap

B, T, D, L = 2, 5, 6, 2
TAPS = ("residual", "attention_out", "mlp_out", "attention_weight")


def prompts(*shape, seed=3, vocab=7) -> torch.Tensor:
    return torch.randint(vocab, shape or (B, T), generator=torch.Generator().manual_seed(seed))


WHERE = {"all": None, "late": torch.tensor([False, True, False, True, True]), "each": prompts(seed=6) > 2}
MAP = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2
ERASER = torch.linspace(-1, 1, D, dtype=torch.float64)


def times_map(h):
    return h @ MAP


def mapped(x):
    return [sum(x[i] * MAP[i, j].item() for i in range(D)) for j in range(D)]


def zero(x):
    return [0.0] * D


def kept(x):
    return x


EDITS = {  # an intervention, and what it makes of its layer's results: place -> function of the stream before
    "skip the layer": (lambda l, w: Skip(l, tokens=w), {"attention": zero, "mlp": zero, "layer": kept}),
    "skip the attention": (lambda l, w: Skip(l, "attention", w), {"attention": zero}),
    "skip the MLP": (lambda l, w: Skip(l, "mlp", w), {"mlp": zero}),
    "map the layer": (
        lambda l, w: Replace(l, times_map, tokens=w),
        {"attention": zero, "mlp": zero, "layer": mapped},
    ),
    "map the attention": (lambda l, w: Replace(l, times_map, "attention", w), {"attention": mapped}),
    "map the MLP": (lambda l, w: Replace(l, times_map, "mlp", w), {"mlp": mapped}),
    "erase": (lambda l, w: Erase(l, ERASER, w), {"layer": lambda x: ERASER.tolist()}),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("where", WHERE)
def test_an_intervention_is_the_edited_formulas(name, layer, where, make, oracle, assert_taps):
    build, functions = EDITS[name]
    model, tokens = make(activation="gelu"), WHERE[where]
    chosen = torch.ones(B, T, dtype=torch.bool) if tokens is None else tokens.expand(B, T)

    def edit(l, place, b, t, before, out):
        return functions[place](before) if l == layer and place in functions and chosen[b, t] else out

    expected = oracle(model, prompts(), edit=edit)
    edited = model.trace(prompts(), read=TAPS, interventions=[build(layer, tokens)])
    assert_taps(edited, expected)
    plain = model.trace(prompts(), read=TAPS).residual
    assert torch.equal(plain[: layer + 1], edited.residual[: layer + 1])
    moved = (plain[layer + 1] - expected["residual"][layer + 1]).abs().amax(dim=-1)
    assert torch.equal(moved > 1e-6, chosen)  # there and nowhere else


@pytest.mark.parametrize("where", WHERE)
def test_erasing_layer_minus_one_overwrites_the_embeddings(where, make, oracle, assert_taps):
    model, tokens = make(), WHERE[where]
    chosen = torch.ones(B, T, dtype=torch.bool) if tokens is None else tokens.expand(B, T)

    def edit(l, place, b, t, before, out):
        return ERASER.tolist() if l == -1 and chosen[b, t] else out

    erased = [Erase(-1, ERASER, tokens)]
    assert_taps(model.trace(prompts(), read=TAPS, interventions=erased), oracle(model, prompts(), edit=edit))


def test_swapped_layers_run_in_each_others_place(make, oracle, assert_taps):
    model = make(n_layers=3)
    for swaps, order in (
        ([Swap(0, 2)], [2, 1, 0]), ([Swap(0, 1), Swap(1, 2)], [1, 2, 0]), ([Swap(1, 1)], [0, 1, 2]),
    ):  # fmt: skip
        swapped = model.trace(prompts(), read=TAPS, interventions=swaps)
        assert_taps(swapped, oracle(model, prompts(), order=order))
    plain = model(prompts())
    assert torch.equal(model.trace(prompts(), interventions=[Swap(1, 1)]).logits, plain)
    assert not torch.allclose(model.trace(prompts(), interventions=[Swap(0, 2)]).logits, plain)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("layer", range(L))
def test_replacing_a_layer_by_the_identity_is_skipping_it(layer, where, make):
    model, tokens = make(), WHERE[where]
    skip = model.trace(prompts(), interventions=[Skip(layer, tokens=tokens)])
    identity = model.trace(prompts(), interventions=[Replace(layer, lambda h: h, tokens=tokens)])
    for tap in TAPS[:3]:
        assert torch.equal(getattr(skip, tap), getattr(identity, tap))


def test_skipping_a_layer_is_not_skipping_its_mlp_unless_its_attention_is_zero(make):
    model = make()

    def after(*edits):
        return model.trace(prompts(), interventions=edits).residual[1]

    assert not torch.allclose(after(Skip(0)), after(Skip(0, "mlp")))
    assert torch.equal(after(Skip(0)), after(Skip(0, "mlp"), Skip(0, "attention")))
    with torch.no_grad():
        model.layers[0].attention.W_O.weight.zero_()
        model.layers[0].attention.W_O.bias.zero_()
    assert torch.equal(after(Skip(0)), after(Skip(0, "mlp")))


def test_interventions_on_one_layer_act_in_the_order_of_the_list(make):
    model, double = make(), Replace(1, lambda h: 2 * h)
    stream = model.trace(prompts()).residual[1]
    doubled = model.trace(prompts(), interventions=[Erase(1, ERASER), double]).residual[2]
    erased = model.trace(prompts(), interventions=[double, Erase(1, ERASER)]).residual[2]
    assert torch.equal(doubled, 2 * stream) and torch.equal(erased, ERASER.expand(B, T, D))


def test_one_batch_can_skip_a_different_layer_in_every_row(make):
    model, prompt = make(n_layers=3), prompts(1, T)
    copy = torch.eye(3, dtype=torch.bool)[:, :, None].expand(3, 3, T)  # copy[s]: copy s of the prompt alone
    skips = [Skip(s, tokens=copy[s]) for s in range(3)]
    together = model.trace(prompt.expand(3, T), interventions=skips).logits
    alone = torch.cat([model.trace(prompt, interventions=[Skip(s)]).logits for s in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)  # float64, other batch sizes


def test_gradients_flow_through_a_replaced_layer(make):
    model = make()
    x = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    trace = model.trace(prompts(), interventions=[Replace(0, lambda h: x)])
    assert torch.equal(trace.residual[1], x)
    trace.logits.sum().backward()
    assert x.grad.abs().amax(dim=-1).min() > 0
    assert model.layers[0].mlp.W_1.weight.grad is None and model.layers[1].mlp.W_1.weight.grad is not None
