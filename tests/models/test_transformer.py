"""The Transformer against its formulas, written out in plain Python (conftest.py), and its taps."""

import itertools

import pytest
import torch

from lib.models.dcmha import rotate, rotation
from lib.models.transformer import Replace, Skip, Swap

B, T, D, H, L, V = 2, 5, 6, 4, 2, 7
NORMS = ("none", "layer", "rms")
ACTIVATIONS = ("relu", "gelu", "swiglu")
POSITIONS = ("none", "learned", "rope")
SHAPES = list(itertools.product(NORMS, ACTIVATIONS, POSITIONS, (True, False), (4, 2)))
TAPS = ("residual", "attention_out", "mlp_out", "attention_weight")
CLOSE = dict(rtol=1e-11, atol=1e-11)  # float64, about 1e3 roundings in sums of order 10


def prompts(*shape, seed=3, vocab=7) -> torch.Tensor:
    return torch.randint(vocab, shape or (B, T), generator=torch.Generator().manual_seed(seed))


def some_mask(*shape, seed=4) -> torch.Tensor:
    """A random bool mask in which every row may read itself."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return mask | torch.eye(shape[-1], dtype=torch.bool)


# The forward pass


def test_the_shapes_span_the_product():
    assert len(SHAPES) == 3 * 3 * 3 * 2 * 2


@pytest.mark.parametrize("norm, activation, positions, causal, n_kv_heads", SHAPES)
def test_logits_and_taps_are_the_formulas(
    norm, activation, positions, causal, n_kv_heads, make, oracle, assert_taps
):
    model = make(norm=norm, activation=activation, positions=positions, causal=causal, n_kv_heads=n_kv_heads)
    tokens = prompts()
    expected = oracle(model, tokens)
    assert_taps(model.trace(tokens, read=TAPS), expected)  # reading the weights: explicit attention
    torch.testing.assert_close(model(tokens), expected["logits"], **CLOSE)  # sdpa


@pytest.mark.parametrize("changes", [
    dict(tied=True), dict(n_logits=3), dict(norm_scale=False), dict(norm="layer", norm_scale=False),
    dict(d_head=None, n_heads=3, n_kv_heads=None), dict(n_kv_heads=1), dict(rope_base=7.0), dict(d_head=8),
    dict(n_layers=1), dict(attention_bias=False, mlp_bias=False, mlp_output_bias=False, readout_bias=False),
])  # fmt: skip
def test_every_option_is_the_formulas_too(changes, make, oracle, assert_taps):
    model = make(**changes)
    assert_taps(model.trace(prompts(), read=TAPS), oracle(model, prompts()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(T, T), (B, T, T)])
def test_a_mask_given_replaces_the_causal_mask(shape, causal, make, oracle, assert_taps):
    model, mask = make(causal=causal), some_mask(*shape)
    assert mask.triu(1).any() and (~mask).tril().any()
    expected = oracle(model, prompts(), mask=mask)
    assert_taps(model.trace(prompts(), read=TAPS, mask=mask), expected)
    torch.testing.assert_close(model(prompts(), mask=mask), expected["logits"], **CLOSE)


def test_every_single_weight_tensor_moves_the_logits(make):
    model = make(positions="rope", activation="swiglu", norm="layer")  # without RoPE a key bias cancels
    before, checked = model(prompts()), 0
    assert 0 in prompts()  # so that row 0 of the embedding is used
    for weight in model.parameters():
        with torch.no_grad():
            weight.view(-1)[0] += 0.1
            assert not torch.allclose(model(prompts()), before, **CLOSE)
            weight.view(-1)[0] -= 0.1
        checked += 1
    assert checked == 3 + 2 + L * (4 + 8 + 6)  # embedding, W_U, b_U; final norm; norms, attention, SwiGLU


@pytest.mark.parametrize("mask", [None, some_mask(T, T), some_mask(B, T, T)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [None, slice(2, 4)])
def test_the_two_attention_kernels_agree(mask, causal, rows, make):
    sdpa, explicit = (make(causal=causal, attention_kernel=kernel) for kernel in ("sdpa", "explicit"))
    assert sdpa.weights_hash() == explicit.weights_hash()
    answers = [model(prompts(), mask=mask, rows=rows) for model in (sdpa, explicit)]
    torch.testing.assert_close(*answers, **CLOSE)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_explicit_attention_is_torch_scaled_dot_product_attention(n, causal, make):
    attention = make(positions="none", causal=causal, n_kv_heads=4).layers[0].attention
    x = torch.randn(B, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out, weight = attention(x, mask=None, rows=None, explicit=True)
    q, k, v = (W(x).view(B, n, H, 2).transpose(1, 2) for W in (attention.W_Q, attention.W_K, attention.W_V))
    mix = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, attention.W_O(mix.transpose(1, 2).reshape(B, n, H * 2)), **CLOSE)
    torch.testing.assert_close(weight.sum(dim=-1), torch.ones(B, H, n, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", ["sdpa", "explicit"])
def test_a_later_token_changes_earlier_logits_only_without_the_causal_mask(positions, kernel, make):
    tokens, changed = prompts(), prompts()
    changed[:, 3:] = (changed[:, 3:] + 1) % V
    moved = {}
    for causal in (True, False):
        model = make(positions=positions, causal=causal, attention_kernel=kernel)
        moved[causal] = (model(tokens) - model(changed)).abs()
    assert moved[True][:, :3].max() < 1e-12 and moved[True][:, 3:].amax(dim=-1).min() > 1e-3
    assert moved[False][:, :3].amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize("positions, relative", [("rope", True), ("none", True), ("learned", False)])
def test_rope_knows_relative_positions_only(positions, relative, make):
    model, tokens, shift = make(positions=positions), prompts(B, 4), 3
    shifted = torch.cat([prompts(B, shift, seed=9), tokens], dim=1)  # the same tokens, `shift` places later
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[shift:, :shift] = False  # and blind to what stands before
    same = torch.allclose(model(shifted, mask=mask)[:, shift:], model(tokens), **CLOSE)
    assert same == relative


def test_rope_pairs_coordinate_j_with_j_plus_half():
    cos, sin = rotation(torch.arange(3), 4, base=100.0, like=torch.zeros(1, dtype=torch.float64))
    x = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 3, 4)  # each coordinate alone, at 3 positions
    angle = torch.tensor([2.0, 2.0 * 100 ** (-1 / 2)], dtype=torch.float64)
    at_2 = rotate(x, cos, sin)[:, 2]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for j in range(2):
        expected[j, j], expected[j, j + 2] = angle[j].cos(), angle[j].sin()
        expected[j + 2, j], expected[j + 2, j + 2] = -angle[j].sin(), angle[j].cos()
    torch.testing.assert_close(at_2, expected, **CLOSE)


def test_without_positions_or_mask_the_order_of_tokens_does_not_matter(make):
    order = torch.tensor([3, 0, 4, 1, 2])
    for positions, equivariant in (("none", True), ("learned", False), ("rope", False)):
        model = make(positions=positions, causal=False)
        same = torch.allclose(model(prompts()[:, order]), model(prompts())[:, order], **CLOSE)
        assert same == equivariant


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_token_of_several_symbols_is_the_sum_of_their_embeddings(positions, make):
    model, tokens = make(positions=positions), prompts(B, T, 3)
    expected = torch.zeros(B, T, D, dtype=torch.float64)
    for b, t, s in itertools.product(range(B), range(T), range(3)):
        expected[b, t] += model.embedding.weight[tokens[b, t, s]]
    if positions == "learned":
        expected += model.position.weight[:T]
    torch.testing.assert_close(model.trace(tokens).residual[0], expected, **CLOSE)
    assert torch.equal(model(tokens[:, :, :1]), model(tokens[:, :, 0]))


# Taps


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_last_residual_read_out_is_the_logits_bit_for_bit(norm, tied, dtype, make):
    model = make(norm=norm, tied=tied).to(dtype)
    trace = model.trace(prompts())
    assert torch.equal(model.readout(trace.residual[-1]), trace.logits)
    assert torch.equal(model(prompts()), trace.logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "interventions", [[], [Skip(0, "mlp"), Skip(1, tokens=torch.arange(T) > 2)], [Swap(0, 1)]]
)
def test_the_stream_is_the_sum_of_what_was_written(dtype, interventions, make):
    trace = make(norm="rms").to(dtype).trace(prompts(), interventions=interventions)
    for l in range(L):
        h, a, m = trace.residual[l], trace.attention_out[l], trace.mlp_out[l]
        assert torch.equal(trace.residual[l + 1], (h + a) + m)


def test_a_lens_normalises_with_its_own_statistics(make):
    model = make(norm="rms")
    h = model.trace(prompts()).residual[:-1]  # (L, B, T, D)
    unit = h / (h.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight
    torch.testing.assert_close(model.readout(h), unit @ model.W_U.weight.T + model.b_U, **CLOSE)


def test_a_layer_can_be_run_on_any_stream(make):
    model, mask = make(), some_mask(B, T, T)
    trace = model.trace(prompts(), mask=mask)
    for l in range(L):
        a, m = model.run_layer(l, trace.residual[l], mask=mask)
        assert torch.equal(a, trace.attention_out[l]) and torch.equal(m, trace.mlp_out[l])


@pytest.mark.parametrize("read", [(), ("residual",), ("mlp_out", "attention_weight"), "attention_out"])
def test_only_what_was_asked_for_is_kept(read, make):
    trace, names = make().trace(prompts(), read=read), [read] if isinstance(read, str) else read
    shapes = dict(zip(TAPS, [(L + 1, B, T, D), (L, B, T, D), (L, B, T, D), (L, B, H, T, T)], strict=True))
    for name, shape in shapes.items():
        if name in names:
            assert getattr(trace, name).shape == shape
        else:
            with pytest.raises(AttributeError, match=f"did not read {name}; ask for it"):
                getattr(trace, name)


@pytest.mark.parametrize(
    "rows", [slice(3, None), slice(-1, None), torch.tensor([4, 0, 4]), torch.tensor([2])]
)
@pytest.mark.parametrize("mask", [None, some_mask(T, T), some_mask(B, T, T)])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_chosen_rows_are_those_of_the_full_pass(rows, mask, n_layers, make):
    model = make(n_layers=n_layers)
    edits = [
        Skip(n_layers - 1, "mlp", tokens=prompts(seed=8) > 3),
        Replace(0, lambda h: 2 * h, tokens=torch.arange(T) > 3),
    ]
    for interventions in ([], edits):
        full = model.trace(prompts(), mask=mask, read=TAPS, interventions=interventions)
        part = model.trace(prompts(), mask=mask, read=TAPS, interventions=interventions, rows=rows)
        torch.testing.assert_close(part.logits, full.logits[:, rows], **CLOSE)
        for name in TAPS:
            torch.testing.assert_close(getattr(part, name), getattr(full, name)[..., rows, :], **CLOSE)
        torch.testing.assert_close(model.readout(part.residual[-1]), part.logits, **CLOSE)


def test_deep_supervision_reaches_every_weight_from_one_pass(make):
    model = make(positions="rope", activation="swiglu")  # without RoPE a key bias has no gradient
    trace = model.trace(prompts(), read="residual", rows=slice(2, None))
    losses = model.readout(trace.residual[1:]).logsumexp(dim=-1).mean(dim=(1, 2))  # (L,): one for each depth
    losses.sum().backward()
    gradient = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(g.isfinite().all() and g.abs().max() > 1e-6 for g in gradient.values())
    assert len(gradient) == len(list(model.parameters()))
    W = model.layers[0].attention.W_V.weight  # against a central difference along one random direction
    direction = torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(0))

    def loss(step):
        with torch.no_grad():
            W.add_(step * direction)
            lens = model.readout(model.trace(prompts(), rows=slice(2, None)).residual[1:])
            W.sub_(step * direction)
        return lens.logsumexp(dim=-1).mean(dim=(1, 2)).sum()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5  # error about 1e-10, rounding 1e-16 / 1e-5
    assert abs(slope - (gradient["layers.0.attention.W_V.weight"] * direction).sum()) < 1e-8
