"""What the published implementations of DCMHA get wrong (read or measured), each a test that ours does not.

The comments say what went wrong there: the authors' PyTorch and JAX code, or x-transformers' talking heads.
"""

import math

import pytest
import torch
from torch import nn

from lib.models.dcmha import DCMHA

COMPUTATIONS = ("fast", "reference", "explicit")


def decode(layer, x, prefill):
    """The layer's output (B, T, D), the first `prefill` tokens in one pass, the others one by one."""
    cache, steps = layer.new_cache(), [1] * (x.shape[1] - prefill)
    pieces = x.split([prefill, *steps] if prefill else steps, dim=1)
    with torch.no_grad():
        return torch.cat([layer(piece, cache=cache) for piece in pieces], dim=1)


# 1. The released training path learns merged copies of W_1 and W_g; inference reads the originals, so what
#    they learned is lost.


@pytest.mark.parametrize("changes", [dict(), dict(static=True, n_kv_heads=2, rope=1e4), dict(window=5)])
def test_1_what_was_trained_is_what_evaluates_and_decodes(changes, inputs, error):
    torch.manual_seed(0)
    layer, x, y = DCMHA(16, 4, **changes), inputs(2, 12, 16).float(), inputs(2, 12, 16, seed=4).float()
    before = {name: w.detach().clone() for name, w in layer.named_parameters()}
    for _ in range(5):  # signSGD, so that every weight moves
        gradients = torch.autograd.grad((layer(x) - y).square().mean(), layer.parameters())
        with torch.no_grad():
            for weight, gradient in zip(layer.parameters(), gradients, strict=True):
                weight -= 0.03 * gradient.sign()
    for name, weight in layer.named_parameters():
        assert (weight - before[name]).abs().max() > 0.02, name
    trained = layer(x)
    assert error(trained, DCMHA(16, 4, **changes)(x)) > 0.1
    assert error(layer.eval()(x), trained) < 1e-5
    for prefill in (0, 7, 12):
        assert error(decode(layer, x, prefill), trained) < 1e-5
    again = DCMHA(16, 4, **changes)
    again.load_state_dict(layer.state_dict())
    assert error(decode(again, x, 4), trained) < 1e-5


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("changes", [dict(), dict(static=True, qk_norm=True, bias=True, rope=1e4)])
def test_1_every_parameter_gets_a_gradient_from_the_start(computation, changes, inputs):
    torch.manual_seed(0)
    layer = DCMHA(16, 4, computation=computation, **changes)
    layer(inputs(2, 6, 16).float()).square().sum().backward()
    names = [name for name, _ in layer.named_parameters()]
    assert names == [name for name, w in layer.named_parameters() if w.grad.norm() > 1e-5]
    assert len(names) == 4 + 12 + (2 + 2 + 4 if changes else 0)  # with W_b, scales and biases


# 2. In the released training code a global layer reads no further back than the model is wide.


@pytest.mark.parametrize("computation, T", [("fast", 150), *((name, 40) for name in COMPUTATIONS)])
def test_2_global_attention_reaches_token_0_with_more_tokens_than_width(computation, T, make, inputs):
    layer, x = make(8, 2, computation=computation), inputs(1, T, 8).requires_grad_()
    assert layer.W_Q.in_features < T
    out = layer(x)
    (gradient,) = torch.autograd.grad(out[0, -1].sum(), x)
    assert gradient[0].abs().amax(dim=-1).min() > 1e-7  # every token, token 0 too
    changed = x.detach().clone()
    changed[:, 0] += 5
    assert (layer(changed) - out)[0, -1].abs().max() > 1e-4
    assert (decode(layer, changed, T - 1) - out)[0, -1].abs().max() > 1e-4


# 3. In the released chunked path the rows of an incomplete last chunk stay zero, or are rounded to bfloat16.


@pytest.mark.parametrize("T", [1, 2, 31, 33, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("changes", [dict(), dict(static=True, window=40), dict(causal=False, pre=False)])
def test_3_any_number_of_tokens_gives_every_row_in_full_precision(T, changes, make, inputs, error, distance):
    x, dy = inputs(1, T, 8), inputs(1, T, 8, seed=5)
    outs, gradients = [], []
    double, single = torch.float64, torch.float32
    for dtype, computation in ((double, "reference"), (single, "reference"), (single, "fast")):
        layer = make(8, 2, dtype=dtype, computation=computation, **changes)
        inside = x.to(dtype, copy=True).requires_grad_()
        outs.append(layer(inside))
        found = torch.autograd.grad(outs[-1], [inside, *layer.parameters()], dy.to(dtype))
        gradients.append(dict(enumerate(found)))
    exact, plain, fast = outs
    assert fast[0].abs().amax(dim=-1).min() > 1e-3 and error(fast, exact) < 2e-6
    exact, plain, fast = gradients  # bfloat16 would be wrong by 4e-3
    assert distance(fast, exact) < 2e-6 + 2 * distance(plain, exact) < 1e-4


# 4. There, a training window holds 257 tokens and a decoding window 256.


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("window", [1, 2, 5])
def test_4_a_window_is_that_many_tokens_in_training_and_in_decoding(computation, window, make, inputs):
    T = 8
    layer, x = make(8, 2, window=window, rope=1e4, computation=computation), inputs(1, T, 8)
    for run in (layer, lambda x: decode(layer, x, 0), lambda x: decode(layer, x, 6)):
        before = run(x)[0, -1]
        reads = []
        for t in range(T):
            changed = x.clone()
            changed[0, t] += 3
            reads.append(bool((run(changed)[0, -1] - before).abs().max() > 1e-9))
        assert reads == [t >= T - window for t in range(T)]


def test_4_a_window_on_both_sides_reads_as_far_ahead_as_back(make, inputs):
    layer, x = make(8, 4, window=3, causal=False), inputs(1, 9, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, 4].sum(), x)
    assert gradient[0].abs().amax(dim=-1).gt(0).tolist() == [abs(t - 4) < 3 for t in range(9)]


# 5. The released DCPythia training branch forgets to divide the scores by √d.


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("d_head", [1, 4, 16])
def test_5_without_composition_it_is_torch_attention(computation, d_head, make, inputs, error):
    layer, x = make(8, 2, d_head=d_head, static=True, computation=computation), inputs(2, 7, 8)
    plain = make(8, 2, d_head=d_head, pre=False, post=False, computation=computation)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.endswith(("W_2.weight", "W_g.weight", "W_b")):
                weight.zero_()
    q, k, v = (W(x).unflatten(-1, (2, d_head)).transpose(1, 2) for W in (layer.W_Q, layer.W_K, layer.W_V))
    mix = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert error(layer(x), layer.W_O(mix.transpose(1, 2).flatten(2))) < 1e-12
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert error(plain(x), layer(x)) < 1e-12


# 6. Flags of the published configurations are read and never passed on.


@pytest.mark.parametrize("flag, value", [
    ("pre", False), ("post", False), ("query_side", False), ("key_side", False), ("gates", False),
    ("static", True), ("rank", 3), ("window", 2), ("causal", False), ("qk_norm", True), ("rope", 1e4),
    ("n_kv_heads", 1), ("d_head", 2), ("bias", True),
])  # fmt: skip
def test_6_every_flag_changes_the_output(flag, value, make, inputs):
    layer, x = make(16, 4), inputs(2, 6, 16)
    other = make(16, 4, **{flag: value})
    shapes = {name: w.shape for name, w in other.state_dict().items()}
    shared = {name: w for name, w in layer.state_dict().items() if w.shape == shapes.get(name)}
    other.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for name, w in other.named_parameters():
            if "norm" in name or name.endswith(("W_b", "bias")):
                w.fill_(0.5)
    assert (layer(x) - other(x)).abs().max() > 1e-3


REFUSED = [
    (dict(n_heads=3), "n_heads must divide d_model.*give d_head"),
    (dict(n_kv_heads=3), "n_kv_heads must divide n_heads"),
    (dict(rank=0), "rank must be a whole number of at least 1, got 0"),
    (dict(rank=True), "rank must be a whole number"),
    (dict(rank=1.5), "rank must be a whole number"),
    (dict(window=0), "window must be a whole number of at least 1, got 0"),
    (dict(window=-1), "window must be a whole number"),
    (dict(d_head=0), "d_head must be a whole number"),
    (dict(d_head=3, rope=1e4), "RoPE needs an even head width"),
    (dict(rope=0.0), "base.*rope=0.0"),
    (dict(rope=-1.0), "base.*rope=-1.0"),
    (dict(rope=True), "base.*rope=True"),
    (dict(query_side=False, key_side=False), "query_side, key_side or static must be True"),
    (dict(computation="explict"), "explict.*fast.*reference.*explicit"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_6_what_cannot_be_is_refused_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        DCMHA(**dict(d_model=8, n_heads=4) | changes)


def test_6_a_misspelt_switch_is_refused():
    with pytest.raises(TypeError, match="key_sid"):
        DCMHA(8, 4, key_sid=False)


BAD_CALLS = [
    (dict(x=torch.zeros(5, 8)), r"\(5, 8\)"),
    (dict(x=torch.zeros(2, 5, 4)), r"\(2, 5, 4\)"),
    (dict(mask=torch.ones(5, 5)), "torch.float32"),
    (dict(mask=torch.ones(2, 5, dtype=torch.bool)), r"got .*2, 5\)"),
    (dict(mask=torch.ones(3, 5, 5, dtype=torch.bool)), r"got .*3, 5, 5\)"),
    (dict(mask=torch.ones(2, 1, 5, 5, dtype=torch.bool)), r"got .*2, 1, 5, 5\)"),
    (dict(computation="explict"), "explict"),
]


@pytest.mark.parametrize("changes, message", BAD_CALLS)
def test_6_a_call_that_does_not_fit_is_refused_before_any_work(changes, message):
    call = dict(x=torch.zeros(2, 5, 8)) | changes
    with pytest.raises(ValueError, match=message):
        DCMHA(8, 4).attend(call.pop("x"), **call)


# 7. The JAX code's GELU is the tanh approximation, the PyTorch code's is exact: converted weights differ.


def test_7_the_gelu_is_the_exact_one(make):
    layer, value = make(8, 4, rank=1), 1.7
    query, u = layer.pre.query, torch.zeros(8, dtype=torch.float64)
    with torch.no_grad():
        query.W_1.weight.zero_()
        query.W_1.weight[0, 0] = value
        query.W_2.weight.zero_()
        query.W_2.weight[4, 0] = 1.0  # the first entry of w2
    u[0] = 1.0
    (_, w2, _) = layer.compositions(u[None, None])["pre_query"]
    exact = value * (1 + math.erf(value / math.sqrt(2))) / 2
    approximate = value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) / 2
    assert abs(w2[0, 0, 0, 0] - exact) < 1e-15 and abs(exact - approximate) > 1e-4


# 8. Query-only, grouped heads and other ranks crash there, or exist in one of three code paths.


@pytest.mark.parametrize("sides", [dict(), dict(key_side=False), dict(query_side=False)], ids=len)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_8_one_side_grouped_heads_and_every_rank_train_and_decode_alike(
    sides, rank, n_kv_heads, make, inputs, oracle, error, distance
):
    changes = dict(rank=rank, n_kv_heads=n_kv_heads, **sides)
    layer, x, dy = make(8, 4, **changes), inputs(1, 4, 8), inputs(1, 4, 8, seed=5)
    expected = oracle(layer, x, n_heads=4, out_gradient=dy, **changes)
    out = layer(x)
    assert error(out, expected.out) < 1e-10
    names, weights = zip(*layer.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(out, weights, dy), strict=True))
    expected.gradients.pop("x")
    assert distance(found, expected.gradients) < 1e-10
    for prefill in (0, 2, 4):  # one-token decoding alone, with a prefill, and a prefill alone
        assert error(decode(layer, x, prefill), expected.out) < 1e-10


# 9. x-transformers' static talking heads double the scores before the first step.


@pytest.mark.parametrize("d_model, n_heads, static", [(64, 8, True), (256, 16, False), (256, 4, False)])
def test_9_a_fresh_layer_is_softmax_attention_to_a_few_percent(d_model, n_heads, static, inputs):
    torch.manual_seed(0)
    layer, plain = DCMHA(d_model, n_heads, static=static), DCMHA(d_model, n_heads, pre=False, post=False)
    x = nn.functional.layer_norm(inputs(2, 32, d_model).float(), (d_model,))
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for w1, w2, g in layer.compositions(x).values():
            M = torch.einsum("btrg,btrh->btgh", w1, w2) + torch.diag_embed(g)
            assert 1e-3 < M.abs().max() < 0.05  # A' = A (I + M_i + M_j)
        out, weight = layer.attend(x, computation="reference")
        out_plain, weight_plain = plain.attend(x, computation="reference")
    change = (weight - weight_plain).abs().max() / weight_plain.abs().max()
    assert 1e-4 < change < 0.05
    assert ((out - out_plain).norm() / out_plain.norm()) < 0.03


# 10. Masked positions never influence unmasked ones. (Finite ones: 0 · NaN is NaN, in torch's own
#     scaled_dot_product_attention too.)


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("changes", [dict(), dict(static=True, rope=1e4), dict(window=3, n_kv_heads=2)])
def test_10_a_huge_masked_token_changes_nothing_elsewhere(computation, changes, make, inputs):
    layer = make(8, 4, dtype=torch.float32, computation=computation, **changes)
    x, hidden = inputs(2, 7, 8).float(), torch.tensor([[0, 0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0]]).bool()
    mask = torch.ones(7, 7, dtype=torch.bool).tril() & ~hidden[:, None]  # padding, on either side
    expected = layer(x, mask=mask)
    huge = torch.where(hidden[..., None], 1e12 * x, x).requires_grad_()
    out = layer(huge, mask=mask)
    assert torch.equal(out[~hidden], expected[~hidden]) and out.isfinite().all()
    out[~hidden].square().sum().backward()
    assert huge.grad[hidden].eq(0).all() and huge.grad.isfinite().all()
    assert all(w.grad.isfinite().all() for w in layer.parameters())


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("window", [None, 4])
def test_10_the_future_cannot_be_read_however_large_it_is(computation, window, make, inputs):
    layer = make(8, 4, dtype=torch.float32, window=window, computation=computation)
    x = inputs(1, 70, 8).float()
    expected, changed = layer(x), x.clone()
    changed[:, 66:] = 1e12
    assert torch.equal(layer(changed)[:, :66], expected[:, :66])


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_10_a_row_that_may_read_nothing_gives_zero_and_no_nan(computation, make, inputs):
    layer, x = make(8, 4, computation=computation, static=True), inputs(2, 5, 8).requires_grad_()
    mask = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    mask[0, 2] = False
    out, weight = layer.attend(x, mask=mask)
    assert out[0, 2].eq(0).all() and out[0, 1].ne(0).all()
    assert weight is None or (weight[0, :, 2].eq(0).all() and weight.isfinite().all())
    out.square().sum().backward()
    assert x.grad.isfinite().all() and all(w.grad.isfinite().all() for w in layer.parameters())


@pytest.mark.parametrize("changes", [
    dict(static=True), dict(pre=False, window=9), dict(causal=False, gates=False), dict(query_side=False),
], ids=lambda c: "-".join(c))  # fmt: skip
def test_10_the_three_computations_agree_on_many_texts_with_padding(changes, make, inputs, error):
    B, T = 24, 80  # more than one block of texts and of rows
    hidden = torch.arange(T) >= torch.arange(40, 40 + B)[:, None]  # (B, T): another length for each text
    mask = (torch.ones(T, T, dtype=torch.bool).tril() | (not changes.get("causal", True))) & ~hidden[:, None]
    x, dy, outs, gradients = inputs(B, T, 8), inputs(B, T, 8, seed=5), [], []
    for computation in COMPUTATIONS:
        layer = make(8, 4, computation=computation, **changes)
        outs.append(layer(x, mask=mask))
        found = torch.autograd.grad(outs[-1], layer.parameters(), dy)
        gradients.append(dict(enumerate(found)))
    for other in (1, 2):
        assert error(outs[0], outs[other]) < 1e-12
        assert error(gradients[0], gradients[other]) < 1e-10
