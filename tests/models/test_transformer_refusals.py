"""What a Transformer refuses, and what it says then."""

import dataclasses

import pytest
import torch

from lib.models.transformer import Erase, Replace, Skip, Swap, Transformer, TransformerConfig

B, T, D, V = 2, 5, 6, 7


def prompts(*shape, seed=3, vocab=7) -> torch.Tensor:
    return torch.randint(vocab, shape or (B, T), generator=torch.Generator().manual_seed(seed))


IMPOSSIBLE = [
    (dict(d_model=10, n_heads=4), "n_heads must divide d_model.*allowed n_heads: 1, 2, 5, 10"),
    (dict(n_heads=4, n_kv_heads=3), "n_kv_heads must divide n_heads.*allowed n_kv_heads: 1, 2, 4"),
    (dict(d_head=3, positions="rope"), "head width must be even, got 3"),
    (dict(positions="learned"), "learned positions need max_tokens"),
    (dict(tied=True, n_logits=3), "one logit per vocabulary entry: vocab=7, n_logits=3"),
    (dict(norm="rsm"), "unknown norm 'rsm'; did you mean 'rms'"),
    (dict(activation="swigloo"), "did you mean 'swiglu'"),
    (dict(positions="rotary"), "unknown positions 'rotary'.*none, learned, rope"),
    (dict(attention="mhaa"), "did you mean 'mha'"),
    (dict(attention_kernel="explicite"), "did you mean 'explicit'"),
    (dict(vocab=0), "vocab must be a whole number of at least 1, got 0"),
    (dict(n_layers=1.5), "n_layers must be a whole number"),
    (dict(d_head=0), "d_head must be a whole number of at least 1, got 0"),
    (dict(n_heads=True), "n_heads must be a whole number"),
    (dict(norm_eps=0.0), "norm_eps must be positive"),
    (dict(rope_base=-1.0), "rope_base must be positive"),
]


@pytest.mark.parametrize("changes, message", IMPOSSIBLE)
def test_an_impossible_shape_is_refused_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**dict(vocab=V) | changes)


def test_a_config_cannot_be_changed_and_derives_its_widths_anew():
    config = TransformerConfig(vocab=V)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3
    wider = dataclasses.replace(config, d_model=128)
    assert (wider.head_width, wider.mlp_width, wider.kv_heads, wider.n_out) == (32, 512, 4, V)


blind = torch.ones(T, T, dtype=torch.bool)
blind[2] = False
BAD_CALLS = [
    (dict(tokens=prompts().float()), ValueError, "tokens must be torch.long.*got torch.float32"),
    (dict(tokens=prompts().int()), ValueError, "tokens must be torch.long.*got torch.int32"),
    (dict(tokens=prompts()[0]), ValueError, r"\(B, T\) or \(B, T, S\).*\(5,\)"),
    (dict(tokens=prompts()[:, :0]), ValueError, "not empty"),
    (dict(tokens=[[1, 2]]), ValueError, "got list"),
    (dict(tokens=prompts() + 5), ValueError, "tokens run from 5 to 11; the vocabulary allows 0 to 6"),
    (dict(tokens=prompts() - 1), ValueError, "tokens run from -1 to 5"),
    (dict(tokens=prompts() + 1), ValueError, "tokens run from 1 to 7"),
    (dict(tokens=prompts(B, 10)), ValueError, "10 tokens are too many.*max_tokens=9"),
    (
        dict(mask=torch.ones(T, T)),
        ValueError,
        r"mask must be torch.bool \(5, 5\) or \(2, 5, 5\); got torch.float32",
    ),
    (dict(mask=torch.ones(1, T, T, dtype=torch.bool)), ValueError, r"got torch.bool of shape \(1, 5, 5\)"),
    (dict(mask=blind), ValueError, r"mask row \[2\] may read nothing"),
    (dict(mask=blind.expand(B, T, T)), ValueError, r"mask row \[0, 2\] may read nothing"),
    (dict(read=("residuals",)), ValueError, "unknown tap 'residuals'; did you mean 'residual'"),
    (dict(rows=slice(7, 9)), ValueError, "rows must select some of the tokens 0 to 4"),
    (dict(rows=torch.tensor([5])), ValueError, "rows must select some of the tokens 0 to 4"),
    (dict(rows=3), ValueError, "rows must be a slice or token indices.*got int"),
    (dict(rows=torch.ones(T, dtype=torch.bool)), ValueError, "rows must be a slice.*got torch.bool"),
    (dict(interventions=Skip(0)), TypeError, r"interventions is a list: write \[Skip"),
    (dict(interventions=["skip"]), TypeError, "Skip, Replace, Erase or Swap, got str"),
    (dict(interventions=[Skip(2)]), ValueError, "Skip names layer 2; allowed: 0 to 1"),
    (dict(interventions=[Skip(-1)]), ValueError, "Skip names layer -1; allowed: 0 to 1"),
    (dict(interventions=[Replace(5, abs)]), ValueError, "Replace names layer 5"),
    (dict(interventions=[Erase(-2, torch.zeros(D))]), ValueError, "Erase names layer -2; allowed: -1 to 1"),
    (dict(interventions=[Swap(0, 2)]), ValueError, "Swap names layer 2"),
    (dict(interventions=[Erase(0, torch.zeros(3))]), ValueError, "value of width 3.*stream has width 6"),
    (
        dict(interventions=[Skip(0, tokens=torch.ones(3, dtype=torch.bool))]),
        ValueError,
        r"allowed: \(5,\) or \(2, 5\)",
    ),
    (dict(interventions=[Replace(0, lambda h: h[..., :2])]), ValueError, "must keep the stream's shape"),
]


@pytest.mark.parametrize("call, kind, message", BAD_CALLS)
def test_a_call_that_cannot_be_meant_is_refused(call, kind, message, make):
    arguments = dict(tokens=prompts()) | call
    with pytest.raises(kind, match=message):
        make().trace(**arguments)


def test_an_input_may_be_as_long_as_max_tokens(make):
    assert make(max_tokens=T, positions="learned")(prompts()).shape == (B, T, V)


@pytest.mark.parametrize("build, kind, message", [
    (lambda: Skip(0, "mpl"), ValueError, "unknown sublayer 'mpl'; did you mean 'mlp'"),
    (lambda: Skip(0, tokens=[True]), TypeError, "bool tensor.*got list"),
    (lambda: Skip(0, tokens=torch.ones(T)), TypeError, "bool tensor.*got torch.float32"),
    (lambda: Replace(0, torch.eye(D)), TypeError, "write lambda h: h @ A"),
    (lambda: Erase(0, torch.eye(D)), ValueError, r"one vector of shape \(D,\)"),
    (lambda: Transformer(TransformerConfig(vocab=V), seed=0, init="z"), ValueError, "default, zeros"),
])  # fmt: skip
def test_a_part_that_cannot_be_meant_is_refused(build, kind, message):
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.parametrize("l, shape, mask, message", [
    (2, (B, T, D), None, "no layer 2; allowed: 0 to 1"),
    (0, (B, T, 3), None, r"h must be \(B, T, 6\), got \(2, 5, 3\)"),
    (0, (B, T, D), blind, r"mask row \[2\] may read nothing"),
])  # fmt: skip
def test_a_layer_is_not_run_on_what_it_cannot_take(l, shape, mask, message, make):
    with pytest.raises(ValueError, match=message):
        make().run_layer(l, torch.zeros(shape, dtype=torch.float64), mask=mask)
