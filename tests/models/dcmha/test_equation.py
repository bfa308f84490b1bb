"""DCMHA against its equation (conftest.py): forward, composed attention and every gradient."""

import itertools

import pytest
import torch

B, T, D, H = 2, 5, 8, 4
COMPUTATIONS = ("fast", "reference", "explicit")
SWITCHES = ("pre", "post", "query_side", "key_side", "gates", "static")
SETTINGS = [
    dict(zip(SWITCHES, values, strict=True))
    for values in itertools.product((True, False), repeat=len(SWITCHES))
    if (values[0] or values[1]) and (values[2] or values[3] or values[5])
] + [dict(pre=False, post=False)]
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-6}  # 17 and 1e6 roundings, relative to the size


def identify(settings):
    return "-".join(name for name, value in settings.items() if value) or "plain"


def some_mask(*shape, seed=4) -> torch.Tensor:
    """A random bool mask in which every row may read itself."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return mask | torch.eye(shape[-1], dtype=torch.bool)


@pytest.fixture
def check(make, inputs, oracle, error, distance):
    """Every computation in both dtypes is the oracle: out, composed weights, gradients of x and weights."""

    def check(*, n=T, d_model=D, n_heads=H, mask=None, seed=0, dtypes=CLOSE, **changes):
        x, dy = inputs(B, n, d_model), inputs(B, n, d_model, seed=5)
        layer = make(d_model, n_heads, seed=seed, **changes)
        expected = oracle(layer, x, mask=mask, out_gradient=dy, n_heads=n_heads, **changes)
        assert all(gradient is not None for gradient in expected.gradients.values())
        for dtype, computation in itertools.product(dtypes, COMPUTATIONS):
            layer = make(d_model, n_heads, seed=seed, dtype=dtype, computation=computation, **changes)
            inside = x.to(dtype, copy=True).requires_grad_()
            out, weight = layer.attend(inside, mask=mask)
            assert out.dtype == dtype and (weight is None) == (computation == "fast")
            names, sources = zip(("x", inside), *layer.named_parameters(), strict=True)
            found = torch.autograd.grad(out, sources, dy.to(dtype))
            assert error(out, expected.out) < CLOSE[dtype]
            found = dict(zip(names, found, strict=True))
            assert distance(found, expected.gradients) < 2 * CLOSE[dtype]  # there and back
            if dtype == torch.float64:  # in float32 small gradients cancel to fewer digits than the whole
                assert error(found, expected.gradients) < CLOSE[dtype]
            if weight is not None:
                assert error(weight, expected.weight) < CLOSE[dtype]
            if computation == "fast":
                assert torch.equal(layer(inside, mask=mask), out)

    return check


def test_the_settings_span_the_product():
    assert len(SETTINGS) == 3 * (2**4 - 2) + 1


@pytest.mark.parametrize("settings", SETTINGS, ids=identify)
def test_every_combination_of_switches_is_the_equation(settings, check):
    check(**settings)


SHAPES = [
    dict(rank=1), dict(rank=3), dict(rank=3, static=True, rope=7.0, qk_norm=True, n_kv_heads=2, bias=True),
    dict(n_heads=1), dict(n_heads=2), dict(n_heads=8), dict(d_head=3), dict(d_head=6, n_kv_heads=1),
    dict(n_kv_heads=1), dict(n_kv_heads=2), dict(rope=1e4), dict(qk_norm=True), dict(bias=True),
    dict(causal=False), dict(causal=False, window=2), dict(causal=False, static=True, rope=1e4),
    dict(n=1), dict(n=1, static=True, window=1), dict(n=1, causal=False), dict(n=2), dict(n=17),
    dict(window=1), dict(window=2), dict(window=3, rope=1e4), dict(window=T), dict(window=100),
    dict(window=3, query_side=False), dict(window=3, key_side=False), dict(n=7, window=4, static=True),
    dict(mask=some_mask(T, T)), dict(mask=some_mask(B, T, T)), dict(mask=some_mask(B, T, T), causal=False),
    dict(mask=some_mask(B, T, T), window=2), dict(mask=some_mask(B, T, T), pre=False, gates=False),
    dict(mask=torch.ones(T, T, dtype=torch.bool)), dict(mask=some_mask(B, T, T), static=True, rope=3.0),
]  # fmt: skip


@pytest.mark.parametrize("changes", SHAPES, ids=lambda c: "-".join(c))
def test_every_shape_mask_and_window_is_the_equation(changes, check):
    check(**changes)


@pytest.mark.parametrize("seed", range(12))
def test_random_layers_of_random_shapes_are_the_equation(seed, check):
    generator = torch.Generator().manual_seed(seed)

    def draw(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    H = draw(1, 2, 4, 6)
    check(
        seed=seed, n=draw(3, 6, 8), d_model=draw(4, 7, 11), n_heads=H, d_head=draw(2, 4, 6),
        n_kv_heads=draw(1, H), rank=draw(1, 2, 3), rope=draw(None, 10.0), qk_norm=draw(True, False),
        window=draw(None, 2, 5), static=draw(True, False), gates=draw(True, False), bias=draw(True, False),
        causal=draw(True, False), pre=draw(True, False), dtypes=[torch.float64],
    )  # fmt: skip


# The oracle is not blind: each mistake of this list moves it far beyond the tolerance.


@pytest.mark.parametrize("mistake", [
    dict(pre=False), dict(post=False), dict(query_side=False), dict(key_side=False), dict(gates=False),
    dict(static=False), dict(window=2), dict(causal=False), dict(qk_norm=False), dict(rope=None),
    dict(rope=99.0),
], ids=lambda c: "-".join(c))  # fmt: skip
def test_an_ignored_flag_would_be_seen(mistake, make, inputs, oracle, error):
    settings = dict(static=True, window=3, qk_norm=True, rope=10.0)
    layer, x = make(D, 2, **settings), inputs(B, T, D)
    wrong = oracle(layer, x, n_heads=2, **settings | mistake).out
    assert error(layer(x), wrong) > 1e-3


@pytest.mark.parametrize("name", ["W_1", "W_2", "W_g", "W_b"])
def test_each_single_composition_weight_moves_the_output(name, make, inputs):
    layer, x, moved = make(D, H, static=True), inputs(B, T, D), 0
    before = layer(x)
    for path, weight in layer.named_parameters():
        if name in path:
            with torch.no_grad():
                weight.view(-1)[1] += 0.5
                assert (layer(x) - before).abs().max() > 1e-6
                weight.view(-1)[1] -= 0.5
            moved += 1
    assert moved == (2 if name == "W_b" else 4)


def test_a_transposed_static_matrix_would_be_seen(make, inputs, oracle, error):
    settings = dict(query_side=False, key_side=False, static=True)
    layer, x = make(D, H, **settings), inputs(B, T, D)
    right = oracle(layer, x, n_heads=H, **settings).out
    with torch.no_grad():
        for stage in (layer.pre, layer.post):
            stage.W_b.copy_(stage.W_b.T.clone())
    assert error(layer(x), right) > 1e-2


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("changes", [dict(static=True), dict(window=2, causal=False, n_kv_heads=2, rope=9.0)])
def test_the_gradient_is_the_slope_of_the_output(computation, changes, make, inputs):
    layer, x = make(D, H, computation=computation, **changes), inputs(B, T, D)
    dy, step = inputs(B, T, D, seed=5), 1e-5
    for weight in layer.parameters():
        (gradient,) = torch.autograd.grad(layer(x), weight, dy)
        direction = inputs(*weight.shape, seed=6)
        with torch.no_grad():
            weight += step * direction
            ahead = (layer(x) * dy).sum()
            weight -= 2 * step * direction
            behind = (layer(x) * dy).sum()
            weight += step * direction
        slope = (ahead - behind) / (2 * step)  # error step², and rounding 1e-16 / step
        assert abs(slope - (gradient * direction).sum()) < 1e-7 * (1 + abs(slope))


# What the layer gives away


@pytest.mark.parametrize("rows", [slice(2, None), slice(-1, None), torch.tensor([4, 0, 4])])
@pytest.mark.parametrize("mask", [None, some_mask(B, T, T)])
@pytest.mark.parametrize("changes", [dict(), dict(window=2, rope=1e4, n_kv_heads=2, static=True)])
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_chosen_rows_are_those_of_the_full_pass(rows, mask, changes, computation, make, inputs, error):
    layer, x, dy = make(D, H, computation=computation, **changes), inputs(B, T, D), inputs(B, T, D, seed=5)
    x.requires_grad_()
    full, weight = layer.attend(x, mask=mask)
    part, part_weight = layer.attend(x, mask=mask, rows=rows)
    assert error(part, full[:, rows]) < 1e-12
    if weight is not None:
        assert error(part_weight, weight[:, :, rows]) < 1e-12
    sources = [x, *layer.parameters()]
    for found, expected in zip(
        torch.autograd.grad(part, sources, dy[:, rows]),
        torch.autograd.grad(full[:, rows], sources, dy[:, rows]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_attend_takes_a_computation_for_one_call(computation, make, inputs, error):
    layer, x = make(D, H), inputs(B, T, D)
    out, weight = layer.attend(x, computation=computation)
    assert error(out, layer(x)) < 1e-12 and layer.computation == "fast"
    assert (weight is None) == (computation == "fast")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("gates", [True, False])
def test_compositions_are_the_factors_of_the_equation(rank, gates, make, inputs):
    layer, x = make(D, H, rank=rank, gates=gates, post=False, static=True), inputs(B, T, D)
    found = layer.compositions(x)
    assert set(found) == {"pre_query", "pre_key"}
    w1, w2, g = found["pre_query"]
    assert w1.shape == w2.shape == (B, T, rank, H) and (g is None) == (not gates)
    assert gates is False or (g.shape == (B, T, H) and g.abs().max() < 1)
    query = layer.pre.query  # one token by hand
    u = torch.nn.functional.gelu(query.W_1.weight @ x[1, 2])
    raw = (query.W_2.weight @ u).view(2 * rank, H)  # the first R rows are w1, the last R are w2
    torch.testing.assert_close(w2[1, 2], raw[rank:], rtol=1e-12, atol=1e-12)
    unit = raw[:rank] / (raw[:rank].square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(w1[1, 2], unit, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides, names", [
    (dict(), {"pre_query", "pre_key", "post_query", "post_key"}),
    (dict(key_side=False), {"pre_query", "post_query"}),
    (dict(query_side=False, pre=False), {"post_key"}),
    (dict(query_side=False, key_side=False, static=True), set()),
])  # fmt: skip
def test_absent_sides_are_absent_from_compositions(sides, names, make, inputs):
    assert set(make(D, H, **sides).compositions(inputs(B, T, D))) == names


# Ways in which the layer is used


@pytest.mark.parametrize("changes", [dict(), dict(static=True, window=3, n_kv_heads=2), dict(pre=False)])
def test_inference_is_training_without_the_gradient(changes, make, inputs, error):
    layer, x = make(D, H, **changes), inputs(B, 9, D)
    trained = layer.train()(x)
    with torch.no_grad():
        assert error(layer(x), trained) < 1e-12
        assert error(layer.eval()(x), trained) < 1e-12
    with torch.inference_mode():
        assert error(layer(x), trained) < 1e-12


@pytest.mark.parametrize("changes", [dict(static=True), dict(window=2, causal=False, qk_norm=True)])
def test_freezing_some_weights_leaves_the_other_gradients_alone(changes, make, inputs):
    layer, x, dy = make(D, H, **changes), inputs(B, T, D), inputs(B, T, D, seed=5)
    names = [name for name, _ in layer.named_parameters()]
    full = dict(zip(names, torch.autograd.grad(layer(x), layer.parameters(), dy), strict=True))
    for alone in names:
        for name, weight in layer.named_parameters():
            weight.requires_grad_(name == alone)
        (found,) = torch.autograd.grad(layer(x), layer.get_parameter(alone), dy)
        torch.testing.assert_close(found, full[alone], rtol=1e-12, atol=1e-12)
    layer.requires_grad_(False)
    x.requires_grad_()
    assert torch.autograd.grad(layer(x), x, dy)[0].abs().max() > 1e-3


def test_two_passes_add_their_gradients(make, inputs):
    layer, x, z = make(D, H), inputs(B, T, D), inputs(1, 9, D, seed=8)
    single = [torch.autograd.grad(layer(each).square().sum(), layer.parameters()) for each in (x, z)]
    first, second = layer(x), layer(z)  # both graphs alive at once
    (first.square().sum() + second.square().sum()).backward()
    for weight, *parts in zip(layer.parameters(), *single, strict=True):
        torch.testing.assert_close(weight.grad, sum(parts), rtol=1e-11, atol=1e-11)


def test_the_result_does_not_depend_on_strides_or_on_the_batch(make, inputs, error):
    layer, x = make(D, H, static=True), inputs(3, 7, D)
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous() and error(layer(strided), layer(x)) < 1e-12
    assert error(torch.cat([layer(row[None]) for row in x]), layer(x)) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_half_precision_is_near_and_finite(dtype, tolerance, computation, make, inputs, oracle, error):
    x, dy = inputs(B, 9, D), inputs(B, 9, D, seed=5)
    layer = make(D, H)
    expected = oracle(layer, x, out_gradient=dy, n_heads=H)
    half = make(D, H, computation=computation).to(dtype)
    out = half(x.to(dtype))
    assert out.dtype == dtype and error(out, expected.out) < tolerance  # 2^-8 or 2^-11, a dozen roundings
    for gradient in torch.autograd.grad(out, half.parameters(), dy.to(dtype)):
        assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_autocast_trains(computation, make, inputs, error):
    layer, x = make(D, H, dtype=torch.float32, computation=computation), inputs(B, 9, D).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert error(out, layer(x)) < 0.06  # bfloat16 keeps 8 bits
    out.float().square().sum().backward()
    assert all(w.grad.dtype == torch.float32 and w.grad.isfinite().all() for w in layer.parameters())


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_large_scores_stay_finite(computation, make, inputs):
    layer, x = make(D, H, dtype=torch.float32, computation=computation), inputs(B, T, D).float()
    with torch.no_grad():
        layer.W_Q.weight *= 1e4  # scores near 1e4: exp of them is beyond float64
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all() and all(w.grad.isfinite().all() for w in layer.parameters())
