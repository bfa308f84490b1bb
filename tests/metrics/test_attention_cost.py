"""Cost formulas of composed attention: weights counted on real modules, arithmetic as torch observes it."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.metrics.attention_cost import (
    AttentionShape,
    cache_floats,
    flop_ratio,
    forward_flops,
    n_pairs,
    parameter_ratio,
    parameters,
    saved_per_pair,
    token_flops,
    training_flops,
    transformer_flops,
    transformer_parameters,
)
from lib.metrics.cost import cost
from lib.models.attention import Attention
from lib.models.dcmha import DCMHA
from lib.models.transformer import Transformer, TransformerConfig

SWITCHES = ("pre", "post", "query_side", "key_side", "gates", "static")
CASES = [
    dict(zip(SWITCHES, on, strict=True))
    for on in itertools.product((True, False), repeat=len(SWITCHES))
    if on[2] or on[3] or on[5] or not (on[0] or on[1])
]
STATIC = dict(query_side=False, key_side=False, static=True)
D, H = 24, 4


def both(**changes):
    """The formulas' shape, and the module itself."""
    shape = dict(d_model=D, n_heads=H) | changes
    return AttentionShape(composed=True, **shape), DCMHA(**shape)


def observed(run):
    """FLOPs that torch counts: products of matrices and batches of them, nothing elementwise.

    An einsum over an axis of size 1 is elementwise to torch, so what is observed has R >= 2 and T >= 2.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matrix_products(flops):
    """What torch counts of ours: all but the gating of pairs, which is elementwise."""
    return flops["total"] - flops["gating"]


def model(**changes):
    shape = dict(vocab=11, d_model=D, n_heads=H, n_layers=2, d_mlp=40, attention_kernel="explicit")
    return Transformer(TransformerConfig(**shape | changes), seed=0)


# ---- weights ---------------------------------------------------------------------------------------------


def test_every_combination_of_switches_is_a_case():
    assert len(CASES) == 2 * (3 * 7 + 8)  # gates or not; somewhere, not all parts off; nowhere, anything


@pytest.mark.parametrize("switches", CASES, ids=lambda on: "-".join(k for k in on if on[k]) or "none")
@pytest.mark.parametrize("rank", [1, 3])
def test_the_parameters_are_those_of_the_module(switches, rank):
    shape, layer = both(rank=rank, **switches)
    assert parameters(shape)["total"] == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2}, {"d_head": 10}, {"qk_norm": True}, {"bias": True, "n_kv_heads": 1}]
)
def test_the_parts_are_those_of_the_module_by_name(changes):
    shape, layer = both(static=True, **changes)
    count = dict.fromkeys(("projections", "norms", "hidden", "factors", "gates", "static"), 0)
    parts = dict(W_1="hidden", W_2="factors", W_g="gates", W_b="static", q_norm="norms", k_norm="norms")
    for name, p in layer.named_parameters():
        count[next((parts[word] for word in name.split(".") if word in parts), "projections")] += p.numel()
    assert parameters(shape) == {**count, "total": sum(count.values())}


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"d_head": 10}, {"attention_bias": True}])
def test_without_composition_they_are_those_of_softmax_attention(changes):
    config = TransformerConfig(vocab=2, d_model=D, n_heads=H, **changes)
    counted = sum(p.numel() for p in Attention(config).parameters())
    assert parameters(AttentionShape.of(config))["total"] == counted


MODELS = [
    {},
    {"attention": "dcmha"},
    {"attention": "dcmha", "dc_rank": 3, "dc_gates": False, "dc_key_side": False, "qk_norm": True},
    {"attention": "dcmha", "dc_query_side": False, "dc_key_side": False, "dc_static": True, "tied": True},
    {"attention": "dcmha", "dc_pre": False, "windows": (3, None), "activation": "swiglu", "n_kv_heads": 2},
    {"positions": "learned", "max_tokens": 9, "norm": "layer", "readout_bias": True, "n_logits": 5},
    {"d_mlp": 0, "attention": "dcmha", "norm": "none", "mlp_output_bias": True},
    {"qk_norm": True, "attention_bias": True, "norm_scale": False},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_the_parameters_of_a_whole_transformer_are_counted_by_part(changes):
    built = model(**changes)
    count = dict.fromkeys(("embedding", "attention", "mlp", "norms", "readout"), 0)
    for name, p in built.named_parameters():
        inside = name.split(".")[2] if name.startswith("layers.") else name.split(".")[0]
        of = {"position": "embedding", "W_U": "readout", "b_U": "readout", "attention_norm": "norms"}
        of |= {"mlp_norm": "norms", "norm": "norms"}
        count[of.get(inside, inside)] += p.numel()
    assert transformer_parameters(built.config) == {**count, "total": built.n_parameters()}


# ---- arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", CASES, ids=lambda on: "-".join(k for k in on if on[k]) or "none")
@pytest.mark.parametrize("form", ["low_rank", "explicit"])
def test_the_flops_are_those_that_torch_observes(switches, form):
    shape, layer = both(rank=3, **switches)
    x = torch.randn(1, 7, D, generator=torch.Generator().manual_seed(0))
    computation = "reference" if form == "low_rank" else form
    seen = observed(lambda: layer.attend(x, computation=computation))
    identity = 2 * H * H * 7 * 7  # the explicit oracle multiplies by it where nothing is composed
    surplus = (2 - shape.places) * identity if form == "explicit" else 0
    assert seen == matrix_products(forward_flops(shape, 7, form=form)) + surplus


@pytest.mark.parametrize("changes", [{"n_kv_heads": 2}, {"d_head": 10}, {"window": 3}, {"causal": False}])
@pytest.mark.parametrize("T", [2, 7])
def test_torch_observes_all_pairs_whatever_the_mask(changes, T):
    shape, layer = both(**changes)
    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(0))
    seen = observed(lambda: layer.attend(x, computation="reference"))
    assert seen == matrix_products(forward_flops(shape, T))


def test_the_folded_form_costs_one_matrix_product_for_each_side():
    """Folded: M = w1 w2^T for each token, A (T, H) @ M for each row, and the same for each column."""
    shape, T = AttentionShape(d_model=D, n_heads=H, composed=True, rank=3), 7
    w1, w2 = torch.randn(T, 3, H), torch.randn(T, 3, H)
    A = torch.randn(T, T, H)

    def four_sides():
        for _ in range(4):
            torch.bmm(A, torch.bmm(w1.mT, w2))

    folded = forward_flops(shape, T, form="folded")
    assert observed(four_sides) == folded["fold"] + folded["compose"]
    assert folded["gating"] == folded["static"] == 0


def test_gating_is_a_multiplication_and_an_addition_for_each_pair_head_and_set():
    with_gates = forward_flops(AttentionShape(d_model=D, n_heads=H, composed=True), 5)
    assert with_gates["gating"] == 5 * 5 * H * 4 * 2
    without = forward_flops(AttentionShape(d_model=D, n_heads=H, composed=True, gates=False), 5)
    assert without["gating"] == without["gates"] == 0


@pytest.mark.parametrize("window", [None, 1, 3, 7, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_the_allowed_pairs_are_those_of_the_mask(window, causal):
    shape, T = AttentionShape(d_model=D, n_heads=H, window=window, causal=causal), 7
    w = T if window is None else window
    allowed = [(i, j) for i in range(T) for j in range(T) if abs(i - j) < w and (j <= i or not causal)]
    assert n_pairs(shape, T) == len(allowed) and n_pairs(shape, T, pairs="all") == T * T


@pytest.mark.parametrize("form", ["low_rank", "folded"])
@pytest.mark.parametrize("window", [None, 3])
def test_tokens_decoded_one_by_one_cost_the_allowed_pairs(form, window):
    shape, T = AttentionShape(d_model=D, n_heads=H, composed=True, window=window), 7
    one_by_one = [token_flops(shape, t + 1, form=form) for t in range(T)]
    whole = forward_flops(shape, T, form=form, pairs="allowed")
    assert {part: sum(flops[part] for flops in one_by_one) for part in whole} == whole


def test_a_decoded_token_costs_what_torch_observes():
    shape, layer = both()
    x = torch.randn(1, 8, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = layer.new_cache()
        layer.attend(x[:, :7], cache=cache, computation="reference")
        seen = observed(lambda: layer.attend(x[:, 7:], cache=cache, computation="reference"))
    assert seen == matrix_products(token_flops(shape, 8))


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_training_step_costs_three_forward_passes_of_the_whole_transformer(changes):
    built, T = model(**changes), 5
    tokens = torch.arange(T)[None] % 11
    flops = transformer_flops(built.config, T)
    gating = sum(forward_flops(AttentionShape.of(built.config, l), T)["gating"] for l in range(2))
    assert observed(lambda: built(tokens)) == flops["total"] - gating
    assert observed(lambda: built(tokens).sum().backward()) == training_flops(flops["total"] - gating)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"activation": "swiglu"}])
def test_without_composition_the_flops_are_those_of_the_earlier_formula(changes):
    config = model(**changes).config
    flops = transformer_flops(config, 9)
    assert flops["attention"] + flops["mlp"] == cost(config, 9).prompt_flops


# ---- cache and saved floats ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"key_side": False}, {"gates": False, "rank": 3}, {"pre": False}, STATIC]
)
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_the_cache_of_a_decoding_layer_holds_what_the_formula_says(changes, kv_heads):
    shape, layer = both(n_kv_heads=kv_heads, **changes)
    x = torch.randn(1, 5, D, generator=torch.Generator().manual_seed(0))
    cache = layer.new_cache()
    with torch.no_grad():
        for t in range(5):
            layer(x[:, t : t + 1], cache=cache)
    kept = [cache.k, cache.v, *(part for side in (cache.pre, cache.post) if side for part in side)]
    assert sum(part.numel() for part in kept if part is not None) == 5 * cache_floats(shape)["total"]


def test_the_cache_overhead_is_that_of_the_released_code_or_a_seventh_of_it():
    wide = AttentionShape(d_model=4096, n_heads=32, composed=True)
    floats, merged = cache_floats(wide), cache_floats(wide, merged=True)
    assert (merged["composition"], merged["kv"]) == (2048, 8192) and floats["composition"] == 320
    assert floats["composition"] / floats["kv"] == pytest.approx((2 * 2 + 1) / 128)  # 3.9 %
    assert merged["composition"] / merged["kv"] == 32 / 128


def test_the_estimate_of_saved_floats_is_the_published_one_and_falls_with_the_switches():
    def saved(kept="all", **changes):
        return saved_per_pair(AttentionShape(d_model=512, n_heads=8, **changes), kept=kept)

    assert saved(composed=True) == 4.0  # 4.1 were measured on the released code, with all that is not T^2
    assert saved() == saved("weights") == saved("weights", composed=True) == 1.0
    assert saved("inputs", composed=True) == 0.0
    assert saved(composed=True, key_side=False) == 3.5 and saved(composed=True, pre=False) == 2.5


# ---- the paper's relative formulas -----------------------------------------------------------------------


@pytest.mark.parametrize("d, rank", [(128, 2), (32, 2), (16, 3), (64, 1)])
@pytest.mark.parametrize("heads", [2, 16])
def test_the_relative_formulas_are_exact_at_order_2_and_drop_the_factors_at_order_1(d, rank, heads):
    width, T = heads * d, 96
    shape = AttentionShape(d_model=width, n_heads=heads, composed=True, rank=rank)
    plain = AttentionShape(d_model=width, n_heads=heads)
    layer = 12 * width**2
    extra = Fraction(parameters(shape)["total"] - parameters(plain)["total"], layer)
    factors = Fraction(parameters(shape)["factors"], layer)
    assert parameter_ratio(d, rank, order=2) == pytest.approx(float(extra), rel=1e-12)
    assert parameter_ratio(d, rank) == pytest.approx(float(extra - factors), rel=1e-12)
    mlp = 2 * T * 8 * width**2
    base = forward_flops(plain, T)["total"]
    more, missing = forward_flops(shape, T)["total"] - base, forward_flops(shape, T)["factors"]
    exact, first = more / (base + mlp), (more - missing) / (base + mlp)
    assert flop_ratio(d, rank, T=T, d_model=width, order=2) == pytest.approx(exact, rel=1e-12)
    assert flop_ratio(d, rank, T=T, d_model=width) == pytest.approx(first, rel=1e-12)


def test_the_error_of_order_1_falls_as_one_over_the_head_width_squared():
    def error(d):
        return parameter_ratio(d, 2, order=2) - parameter_ratio(d, 2)

    assert [error(d) * d * d for d in (16, 64, 256)] == pytest.approx([16 / 3] * 3)


@pytest.mark.parametrize(
    "width, heads, percent", [(256, 8, 17.2), (256, 16, 37.5), (512, 8, 8.2), (512, 16, 17.2)]
)
def test_the_extra_weights_relative_to_attention_are_those_of_the_fact_sheet(width, heads, percent):
    composed = parameters(AttentionShape(d_model=width, n_heads=heads, composed=True))
    plain = parameters(AttentionShape(d_model=width, n_heads=heads))["total"]
    assert 100 * (composed["total"] / plain - 1) == pytest.approx(percent, abs=0.06)


def test_the_extra_weights_and_flops_at_6_9_billion_are_those_of_the_fact_sheet():
    assert 100 * parameter_ratio(128, 2) == pytest.approx(1.3, abs=0.05)
    assert 100 * (parameter_ratio(32, 2, order=2) - parameter_ratio(32, 2)) == pytest.approx(0.5, abs=0.05)
    found = [100 * flop_ratio(128, 2, T=T, d_model=4096) for T in (2048, 4096, 8192)]
    assert found == pytest.approx([1.8, 2.2, 2.9], abs=0.05)


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_heads": 5}, "n_heads must divide d_model when d_head is not given: d_model=24, n_heads=5"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads: n_heads=4, n_kv_heads=3"),
        ({"rank": 0}, "rank is a whole number of at least 1, got 0"),
        ({"window": True}, "window is a whole number of at least 1, got True"),
        ({"composed": True, "query_side": False, "key_side": False}, "nothing would be composed"),
    ],
)
def test_an_impossible_shape_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionShape(**{"d_model": D, "n_heads": H} | change)


def test_misspelt_forms_and_empty_sequences_are_refused():
    shape = AttentionShape(d_model=D, n_heads=H, composed=True)
    with pytest.raises(ValueError, match="unknown form 'fold'; did you mean 'folded'"):
        forward_flops(shape, 3, form="fold")
    with pytest.raises(ValueError, match="unknown pairs 'half'; did you mean 'all'\\? Allowed: all, allowed"):
        n_pairs(shape, 3, pairs="half")
    with pytest.raises(ValueError, match="T is a whole number of at least 1, got 0"):
        forward_flops(shape, 0)
    with pytest.raises(ValueError, match="context is a whole number of at least 1, got 0"):
        token_flops(shape, 0)
    with pytest.raises(ValueError, match="no layer 2; allowed: 0 to 1"):
        AttentionShape.of(model().config, 2)
    with pytest.raises(ValueError, match="order is 1 .* or 2 .*, got 3"):
        parameter_ratio(64, 2, order=3)
