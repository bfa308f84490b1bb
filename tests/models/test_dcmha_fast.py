"""The fast computation of `lib.models.dcmha`: equal to the explicit one in float64, in O(T) saved memory."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.metrics.resources import saved_floats
from lib.models import dcmha
from lib.models.dcmha import DCMHA

torch.set_num_threads(1)
SWITCHES = ("pre", "post", "query_side", "key_side", "gates", "static")
ALLOWED = [
    dict(zip(SWITCHES, on, strict=True))
    for on in itertools.product((True, False), repeat=6)
    if not (on[0] or on[1]) or on[2] or on[3] or on[5]
]


def layer_far_from_identity(D, H, *, seed=0, **changes):
    """Weights N(0, 1/fan_in), so that every term of the composition counts."""
    layer, generator = DCMHA(D, H, **changes), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in layer.named_parameters():
            drawn = torch.randn(w.shape, generator=generator) * w.shape[-1] ** -0.5
            w.copy_(1 + drawn if "norm" in name else drawn)
    return layer


def out_and_gradients(layer, x, dtype, computation, **arguments):
    layer, x = layer.to(dtype), x.to(dtype).requires_grad_()
    out = layer.attend(x, computation=computation, **arguments)[0]
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], d_out)]


def largest_error(layer, x, dtype, **arguments):
    """Of the output and of every gradient, relative to its largest entry (or 1e-3 of the largest of all)."""
    found = out_and_gradients(layer, x, dtype, "fast", **arguments)
    expected = out_and_gradients(layer, x, torch.float64, "explicit", **arguments)
    found, expected = ([each.detach() for each in side] for side in (found, expected))
    assert all(each.isfinite().all() for each in found)
    least = max(1e-300, *(1e-3 * float(each.abs().max()) for each in expected if each.numel()))
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=least))
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in both directions at sizes that an oracle can afford."""
    monkeypatch.setattr(dcmha, "BLOCK", 2**10)


def test_every_allowed_setting_of_the_switches_is_tried():
    assert len(ALLOWED) == 3 * 14 + 1 * 16  # 3 settings of pre and post compose: query, key or static


@pytest.mark.parametrize("changes", ALLOWED, ids=lambda a: "-".join(k for k, on in a.items() if on) or "none")
def test_every_combination_of_switches_equals_the_explicit_computation(changes, small_blocks):
    x = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(1))
    layer = layer_far_from_identity(8, 4, **changes)
    assert largest_error(layer, x, torch.float64) < 1e-10


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_equals_the_explicit_computation_on_any_shape(data):
    draw = data.draw
    H, d = draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from([1, 2, 4]))
    B, T = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 24), st.integers(60, 70)))
    changes = draw(st.sampled_from(ALLOWED)) | dict(
        rank=draw(st.integers(1, 3)), window=draw(st.sampled_from([None, 1, 3, 17, 200])),
        causal=draw(st.booleans()), qk_norm=draw(st.booleans()), bias=draw(st.booleans()),
        n_kv_heads=draw(st.sampled_from([n for n in (1, 2, 3, H) if H % n == 0])), d_head=d,
        rope=draw(st.sampled_from([None, 100.0])) if d % 2 == 0 else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = draw(st.sampled_from([None, (T, T), (B, T, T)]))
    mask = None if mask is None else torch.rand(mask, generator=generator) > draw(st.sampled_from([0.1, 0.9]))
    rows = draw(st.sampled_from([None, slice(-1, None), slice(T // 2, T), torch.arange(T).flip(0)[::2]]))
    x = torch.randn(B, T, 8, generator=generator)
    before, dcmha.BLOCK = dcmha.BLOCK, draw(st.sampled_from([1, 2**9, 2**18]))
    try:
        error = largest_error(
            layer_far_from_identity(8, H, **changes), x, torch.float64, mask=mask, rows=rows
        )
    finally:
        dcmha.BLOCK = before
    assert error < 1e-10


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("changes", [dict(), dict(window=20, static=True), dict(causal=False, rank=1)])
def test_float32_is_as_exact_as_the_explicit_computation_in_float32(T, changes):
    torch.manual_seed(T)
    layer, x = DCMHA(32, 4, **changes), torch.randn(2, T, 32)
    with torch.no_grad():
        for name, w in layer.named_parameters():  # compositions that move the weights by tenths
            w.mul_(20 if "W_2" in name else 5 if "W_g" in name else 1)
    expected = out_and_gradients(layer, x, torch.float64, "explicit")
    found = out_and_gradients(layer, x, torch.float32, "fast")
    plain = out_and_gradients(layer, x, torch.float32, "explicit")
    assert (found[0].double() - expected[0]).abs().max() < 1e-6 * expected[0].abs().max()
    for fast, explicit, exact in zip(found, plain, expected, strict=True):
        scale = exact.abs().max()
        rounding = (explicit.double() - exact).abs().max() / scale if scale else 0.0
        assert (fast.double() - exact).abs().max() <= (1e-6 + 3 * rounding) * scale


def test_padding_rows_that_read_nothing_give_zero_and_finite_gradients(small_blocks):
    length = torch.tensor([40, 7])
    real = torch.arange(40) < length[:, None]  # (B, T)
    mask = torch.ones(40, 40, dtype=torch.bool).tril() & real[:, None, :] & real[:, :, None]
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(2))
    layer = layer_far_from_identity(8, 4)
    out, *gradients = out_and_gradients(layer, x, torch.float64, "fast", mask=mask)
    assert out[1, 7:].eq(0).all() and out[1, :7].ne(0).any()
    assert all(g.isfinite().all() for g in gradients) and gradients[0][1, 7:].eq(0).all()
    alone = layer(x[1:, :7].double())
    assert (out[1, :7] - alone[0]).abs().max() < 1e-12


def test_nothing_to_the_right_of_a_block_is_computed(small_blocks):
    """Not even multiplied by zero: NaN in the keys and values of later blocks would show."""
    layer = layer_far_from_identity(8, 4).double()
    x = torch.randn(1, 48, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    clean = layer(x)
    assert dcmha.BLOCK // (4 * 48) < 16  # so that blocks have 16 rows
    spoilt = x.clone()
    spoilt[:, 32:] = torch.nan
    out = layer(spoilt)
    assert (out[:, :32] - clean[:, :32]).abs().max() < 1e-12 and out[:, 32:].isnan().all()


def test_a_window_leaves_the_keys_before_it_unread(small_blocks):
    layer = layer_far_from_identity(8, 4, window=4).double()
    x = torch.randn(1, 48, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    spoilt = x.clone()
    spoilt[:, :12] = torch.nan
    assert (layer(spoilt)[:, 16:] - layer(x)[:, 16:]).abs().max() < 1e-12


def test_saved_memory_is_at_most_one_and_a_quarter_maps_of_attention_and_grows_like_t():
    def kept(layer, x):
        return saved_floats(lambda: layer(x), layer.parameters())

    D, H, T = 512, 8, 512
    layer, x = DCMHA(D, H), torch.randn(1, T, D)
    assert kept(layer, x) <= 1.25 * H * T * T  # projections, factors and all
    reference = DCMHA(D, H, computation="reference")
    assert kept(reference, x) > 4 * H * T * T  # the count would see a whole map
    assert kept(layer, x[:, : T // 2]) > 0.45 * kept(layer, x)  # linear, not quadratic


def test_a_second_derivative_is_refused():
    layer, x = DCMHA(8, 2), torch.randn(1, 5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_composes_in_float32_and_returns_its_own_type(dtype, most):
    torch.manual_seed(0)
    layer, x = DCMHA(16, 4), torch.randn(2, 33, 16)
    exact = layer.double()(x.double())
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and (found.double() - exact).abs().max() < most * exact.abs().max()


def test_under_autocast_the_attention_itself_stays_in_float32():
    torch.manual_seed(0)
    layer, x = DCMHA(16, 4), torch.randn(2, 33, 16, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        (gradient,) = torch.autograd.grad(found.float().sum(), x)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 2e-2 * exact.abs().max()
    assert (gradient - expected).abs().max() < 5e-2 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch 2.13's own
def test_compiled_it_equals_itself(tmp_path, monkeypatch):
    """Under torch.compile "fast" is the low-rank formula, which the compiler fuses."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    layer, x = DCMHA(8, 2, pre=False), torch.randn(2, 9, 8, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    for run in (layer, compiled):
        x.grad = None
        out = run(x)
        out.sum().backward()
        if run is layer:
            expected, gradient = out.detach(), x.grad
    assert (out - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (x.grad - gradient).abs().max() < 1e-5 * gradient.abs().max()
