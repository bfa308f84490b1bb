"""Where weights come from, how they are told apart, stored and rounded."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.models.transformer import Transformer, TransformerConfig

B, T, V = 2, 5, 7
NORMS = ("none", "layer", "rms")
TAPS = ("residual", "attention_out", "mlp_out", "attention_weight")


def prompts(*shape, seed=3, vocab=7) -> torch.Tensor:
    return torch.randint(vocab, shape or (B, T), generator=torch.Generator().manual_seed(seed))


def test_weights_depend_on_the_seed_alone():
    config = TransformerConfig(vocab=V, positions="learned", max_tokens=T)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = Transformer(config, seed=0).weights_hash()
    assert torch.equal(torch.random.get_rng_state(), state)  # the global state is not used up
    torch.manual_seed(1)
    hashes = [Transformer(config, seed=seed).weights_hash() for seed in (0, 1, 2)]
    assert hashes[0] == first and len(set(hashes)) == 3 and len(first) == 64


def test_the_hash_sees_one_bit_of_one_weight_and_the_dtype(make):
    model = make()
    before = model.weights_hash()
    with torch.no_grad():
        model.b_U[0] = torch.nextafter(model.b_U[0], model.b_U[0] + 1)
    assert model.weights_hash() != before
    assert make().weights_hash() == before != make().float().weights_hash()


def test_weights_are_drawn_in_the_documented_order_and_scale():
    config = TransformerConfig(vocab=11, d_model=8, n_heads=2, n_layers=3, d_mlp=24, activation="swiglu")
    model = Transformer(dataclasses.replace(config, positions="learned", max_tokens=5), seed=7)
    generator, weights = torch.Generator().manual_seed(7), model.state_dict()

    def drawn(name, rows, columns, std):
        expected = torch.empty(rows, columns).normal_(0, std, generator=generator)
        torch.testing.assert_close(weights.pop(f"{name}.weight"), expected, rtol=1e-6, atol=0)

    drawn("embedding", 11, 8, 0.5)
    drawn("position", 5, 8, 0.5)
    for l in range(3):
        for letter in "QKV":
            drawn(f"layers.{l}.attention.W_{letter}", 8, 8, 8**-0.5)
        drawn(f"layers.{l}.attention.W_O", 8, 8, (8 * 2 * 3) ** -0.5)
        drawn(f"layers.{l}.mlp.W_gate", 24, 8, 8**-0.5)
        drawn(f"layers.{l}.mlp.W_1", 24, 8, 8**-0.5)
        drawn(f"layers.{l}.mlp.W_2", 8, 24, (24 * 2 * 3) ** -0.5)
    drawn("W_U", 11, 8, 8**-0.5)
    assert len(weights) == 3 * 4 + 1  # two scales and two hidden biases a layer, and the final scale
    assert all(w.eq(1 if "norm" in name else 0).all() for name, w in weights.items())


def test_weights_that_start_at_zero_say_nothing():
    model = Transformer(TransformerConfig(vocab=V, norm="layer"), seed=0, init="zeros")
    assert model(prompts()).eq(0).all() and model.norm.weight.eq(1).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_survive_a_safetensors_file(tied, dtype, tmp_path, make):
    model, other = (make(tied=tied, seed=seed).to(dtype) for seed in (0, 5))
    assert model.weights_hash() != other.weights_hash()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert model.weights_hash() == other.weights_hash()
    assert torch.equal(model(prompts()), other(prompts()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_precision_runs_and_is_near_float64(dtype, kernel, norm):
    config = TransformerConfig(vocab=V, d_model=16, norm=norm, attention_kernel=kernel)
    model = Transformer(config, seed=0)
    expected = model.double()(prompts())
    trace = model.to(dtype).trace(prompts(), read=TAPS)
    assert trace.logits.dtype == dtype and all(tap.dtype == dtype for tap in trace.taps.values())
    error = (trace.logits.double() - expected).abs().max()
    assert trace.logits.isfinite().all() and error < 100 * torch.finfo(dtype).eps  # logits of order 1


def test_parameters_are_counted_by_the_formula_and_a_tied_readout_once():
    smol = dict(vocab=49, d_model=576, n_heads=9, n_kv_heads=3, d_mlp=1536, norm="rms", activation="swiglu")
    config = TransformerConfig(**smol, n_layers=1, rope_base=1e5, mlp_bias=False, tied=True)
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    model = Transformer(config, seed=0)
    assert model.n_parameters() == 49 * 576 + layer + 576
    assert (
        49_152 * 576 + 30 * layer + 576 == 134_515_008
    )  # SmolLM2-135M with 30 layers and its whole vocabulary
    for words in (
        f"{model.n_parameters():,} parameters",
        "9 heads of width 64 on 3 key/value heads",
        "swiglu",
    ):
        assert words in model.describe() == repr(model)
