"""The memory of a training, by formula, against the tensors that autograd keeps and the optimizer makes."""

import pytest
import torch

from lib.metrics.training_memory import AT_WORK, activation_floats, training_memory
from lib.models.transformer import Transformer, TransformerConfig

SHAPE = {
    "vocab": 64, "d_model": 128, "n_heads": 4, "n_layers": 4, "d_mlp": 352, "activation": "swiglu",
    "mlp_bias": False, "qk_norm": True,
}  # fmt: skip
CHANGES = {
    "plain": {},
    "windows": {"windows": (64, None)},
    "no QK norm": {"qk_norm": False},
    "GELU": {"activation": "gelu"},
    "grouped heads": {"n_kv_heads": 2},
    "few wide heads": {"n_heads": 2, "d_head": 96},
}


def kept_by_autograd(config, B, T):
    """Numbers in the storages that the backward pass keeps, weights left out, each once."""
    model, found = Transformer(config, seed=0), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes() // 4, tensor)  # held, so that no address recurs
        return tensor

    tokens = torch.randint(config.vocab, (B, T), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = model(tokens)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("B", [1, 3])
def test_activations_are_what_autograd_keeps_within_six_percent(change, B):
    config = TransformerConfig(**SHAPE | CHANGES[change])
    kept = activation_floats(config, 256, device="cpu")
    assert B * sum(kept.values()) == pytest.approx(kept_by_autograd(config, B, 256), rel=0.06)


def test_states_are_what_weights_gradients_and_adamw_hold():
    config = TransformerConfig(**SHAPE)
    model = Transformer(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    held = [p for p in model.parameters()] + [p.grad for p in model.parameters()]
    held += [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    whole = sum(x.numel() * x.element_size() for x in held)
    assert training_memory(config, micro_batch=1, T=8)["states"] == whole
    assert training_memory(config, micro_batch=1, T=8, ranks=4)["states"] == whole // 4
    assert training_memory(config, micro_batch=1, T=8, ranks=4, sharded=False)["states"] == whole


def test_half_the_precision_halves_what_tokens_take_and_leaves_the_states():
    config = TransformerConfig(**SHAPE)
    full = training_memory(config, micro_batch=2, T=64)
    half = training_memory(config, micro_batch=2, T=64, precision="bfloat16")
    assert half["tokens"] == full["tokens"] // 2
    assert half["states"] == full["states"]
    assert half["total"] < full["total"]


@pytest.mark.parametrize(
    "change",
    [{}, {"dc_rank": 1}, {"n_heads": 8}, {"dc_pre": False}, {"dc_post": False}, {"dc_key_side": False}],
)
def test_composed_heads_keep_all_pairs_where_they_are_written_out(change):
    """As compiled. The reference does so; for several sequences, as one needs less."""
    config = TransformerConfig(**SHAPE | {"attention": "dcmha", "attention_kernel": "explicit"} | change)
    kept = activation_floats(config, 256, compiled=True)
    kept["pairs"] -= AT_WORK * config.n_heads * 256**2  # not kept: the backward pass makes them
    assert 2 * sum(kept.values()) == pytest.approx(kept_by_autograd(config, 2, 256), rel=0.06)


@pytest.mark.parametrize("change", [{}, {"dc_rank": 1}, {"n_heads": 8}, {"windows": (64, None)}])
def test_composed_heads_in_blocks_keep_no_pairs(change):
    config = TransformerConfig(**SHAPE | {"attention": "dcmha"} | change)
    kept = activation_floats(config, 256)
    assert kept["pairs"] == 0
    assert 0.98 < 2 * sum(kept.values()) / kept_by_autograd(config, 2, 256) < 1.1


def test_recomputed_attention_keeps_the_pairs_of_one_layer():
    composed = TransformerConfig(**SHAPE | {"attention": "dcmha"})
    T, H, L = 512, SHAPE["n_heads"], SHAPE["n_layers"]
    every, one = (activation_floats(composed, T, compiled=True, recompute=again) for again in (False, True))
    each = 8 * H + 4 * 2
    assert every["pairs"] == (L * each + AT_WORK * H) * T * T
    assert one["pairs"] == (each + AT_WORK * H) * T * T
    assert one["composed"] == every["composed"] // L
    plain = TransformerConfig(**SHAPE)
    assert activation_floats(plain, T, compiled=True)["pairs"] == 0
    again = activation_floats(plain, T, recompute=True)
    assert again["tokens"] < activation_floats(plain, T)["tokens"]


@pytest.mark.parametrize(
    "change", [{"T": 0}, {"micro_batch": 0}, {"ranks": True}, {"precision": "float16"}, {"device": "mps"}]
)
def test_what_cannot_be_is_refused(change):
    with pytest.raises(ValueError):
        training_memory(TransformerConfig(**SHAPE), **{"micro_batch": 1, "T": 8} | change)
