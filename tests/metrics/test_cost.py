"""Cost formulas against the model itself: its weights are counted, its arithmetic is observed."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.metrics.cost import cost, latency
from lib.models.transformer import Transformer, TransformerConfig

SHAPES = [
    dict(zip(("activation", "norm", "n_kv_heads", "attention_bias"), values, strict=True))
    for values in itertools.product(("relu", "swiglu"), ("none", "rms", "layer"), (None, 2), (False, True))
]


def config(**changes):
    shape = dict(vocab=11, d_model=24, n_heads=4, n_layers=3, d_mlp=40, attention_kernel="explicit")
    return TransformerConfig(**shape | changes)


@pytest.mark.parametrize("changes", [*SHAPES, {"d_head": 10}, {"mlp_output_bias": True, "mlp_bias": False}])
def test_the_parameters_are_those_of_the_layers(changes):
    model = Transformer(config(**changes), seed=0)
    counted = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers."))
    assert cost(model.config, 1).layer_parameters == counted


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu"}, {"n_kv_heads": 2}, {"d_head": 10}])
@pytest.mark.parametrize("T", [1, 7])
def test_the_prompt_flops_are_those_that_torch_observes(changes, T):
    model = Transformer(config(positions="none", **changes), seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for l in range(model.config.n_layers):
            model.run_layer(l, torch.randn(1, T, 24, generator=torch.Generator().manual_seed(l)))
    assert cost(model.config, T).prompt_flops == counter.get_total_flops()


def test_tokens_one_by_one_cost_the_causal_half_of_the_pairs():
    shape, T = config(), 9
    one_by_one = sum(cost(shape, t).token_flops for t in range(1, T)) + cost(shape, 1).prompt_flops
    pairs = 3 * 4 * 4 * 6  # layers, 4 FLOPs a pair and unit, r = 4 heads of width 6
    assert one_by_one == cost(shape, T).prompt_flops - pairs * T * (T - 1) // 2


def test_the_cache_holds_a_key_and_a_value_for_each_layer_token_and_kv_head():
    assert cost(config(n_kv_heads=2), 5).cache_numbers == 3 * 5 * 2 * 2 * 6


def test_a_latency_is_positive_and_an_empty_prompt_has_no_cost():
    model = Transformer(config(), seed=0)
    assert latency(model, torch.zeros(1, 4, dtype=torch.long), repeats=2) > 0
    with pytest.raises(ValueError, match="at least one token, got T=0"):
        cost(model.config, 0)
