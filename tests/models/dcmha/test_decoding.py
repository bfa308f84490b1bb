"""Decoding with a cache is the full pass, for every switch; the cache holds what the formula says."""

import copy
import itertools

import pytest
import torch

B, T, D, H = 2, 7, 8, 4
COMPUTATIONS = ("fast", "reference", "explicit")
SWITCHES = ("pre", "post", "query_side", "key_side", "gates", "static")
SETTINGS = [
    dict(zip(SWITCHES, values, strict=True))
    for values in itertools.product((True, False), repeat=len(SWITCHES))
    if (values[0] or values[1]) and (values[2] or values[3] or values[5])
] + [dict(pre=False, post=False)]
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}


def identify(settings):
    return "-".join(name for name, value in settings.items() if value) or "plain"


def decode(layer, x, steps, cache=None):
    """The output (B, T, D) when x arrives in pieces of `steps` tokens."""
    cache = layer.new_cache() if cache is None else cache
    with torch.no_grad():
        return torch.cat([layer(piece, cache=cache) for piece in x.split(steps, dim=1)], dim=1)


def numbers(cache) -> int:
    """How many numbers the cache holds in memory, whether a view shows them or not."""
    found, storages = [cache.k, cache.v, *(cache.pre or ()), *(cache.post or ())], {}
    for tensor in found:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr(), storage.nbytes()] = storage.nbytes() // tensor.element_size()
    return sum(storages.values())


@pytest.mark.parametrize("settings", SETTINGS, ids=identify)
def test_one_token_at_a_time_is_the_full_pass_for_every_combination(settings, make, inputs, error):
    for dtype, prefill in itertools.product(CLOSE, (1, 4)):
        layer, x = make(D, H, dtype=dtype, **settings), inputs(B, T, D, dtype=dtype)
        assert error(decode(layer, x, [prefill] + [1] * (T - prefill)), layer(x)) < CLOSE[dtype]


SHAPES = [
    dict(rank=1), dict(rank=3), dict(n_kv_heads=2), dict(n_kv_heads=1, rope=1e4), dict(rope=3.0),
    dict(bias=True), dict(qk_norm=True, rope=1e4), dict(d_head=6), dict(n_heads=1), dict(window=1),
    dict(window=2, rope=3.0), dict(window=3, static=True, n_kv_heads=2), dict(window=T), dict(window=100),
    dict(window=3, key_side=False), dict(window=3, query_side=False, rope=5.0), dict(window=4, pre=False),
    dict(window=2, post=False, gates=False),
]  # fmt: skip
STEPS = [[1] * T, [T], [3, 1, 1, 1, 1], [2, 3, 2], [6, 1], [1, 5, 1]]


@pytest.mark.parametrize("changes", SHAPES, ids=lambda c: "-".join(c))
def test_any_prefill_and_any_pieces_are_the_full_pass(changes, make, inputs, error):
    layer, x = make(D, **dict(n_heads=H) | changes), inputs(B, T, D)
    full = layer(x)
    for steps in STEPS:
        assert error(decode(layer, x, steps), full) < 1e-10


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("window", [None, 3])
def test_every_computation_decodes(computation, window, make, inputs, error):
    layer, x = make(D, H, computation=computation, window=window, rope=1e4, static=True), inputs(B, T, D)
    for steps in STEPS:
        assert error(decode(layer, x, steps), layer(x)) < 1e-10


@pytest.mark.parametrize("window", [None, 50])
def test_a_long_text_decodes_as_it_was_read(window, make, inputs, error):
    layer, x = make(D, 2, window=window, rope=1e4), inputs(1, 150, D)
    full = layer(x)
    assert error(decode(layer, x, [129] + [1] * 21), full) < 1e-10
    assert error(decode(layer, x, [40, 70, 1, 39]), full) < 1e-10


def test_a_forgotten_token_would_be_seen(make, inputs, error):
    layer, x = make(D, H, rope=1e4), inputs(B, T, D)
    assert error(decode(layer, x[:, 1:], [1] * (T - 1))[:, -1], layer(x)[:, -1]) > 1e-3


@pytest.mark.parametrize("reads", ["pre", "post"])
def test_a_cache_without_the_key_side_would_be_wrong(reads, make, inputs, error):
    layer, x = make(D, H, **{"pre": False, "post": False} | {reads: True}), inputs(B, T, D)
    cache = layer.new_cache()
    decode(layer, x[:, :-1], [T - 1], cache)
    for factor in getattr(cache, reads):
        factor.zero_()
    assert error(layer(x[:, -1:], cache=cache), layer(x)[:, -1:]) > 1e-3


# The size of the cache


@pytest.mark.parametrize("R", [1, 2, 3])
def test_the_key_sides_cost_4r_plus_2_times_h_numbers_a_token(R, make, inputs):
    layer, x = make(D, H, rank=R), inputs(1, T, D)
    cache = layer.new_cache()
    decode(layer, x, [T], cache)
    keys_and_values = cache.k.numel() + cache.v.numel()
    factors = sum(part.numel() for part in (*cache.pre, *cache.post))
    assert keys_and_values == 2 * D * T and factors == (4 * R + 2) * H * T
    assert numbers(cache) == keys_and_values + factors  # and no more in memory, behind a view


@pytest.mark.parametrize("changes, a_token", [
    (dict(), 2 * D + 10 * H), (dict(gates=False), 2 * D + 8 * H), (dict(pre=False), 2 * D + 5 * H),
    (dict(post=False, gates=False), 2 * D + 4 * H), (dict(key_side=False), 2 * D),
    (dict(key_side=False, query_side=False, static=True), 2 * D), (dict(pre=False, post=False), 2 * D),
    (dict(n_kv_heads=1), 2 * D // H + 10 * H), (dict(d_head=5), 2 * 5 * H + 10 * H),
])  # fmt: skip
def test_the_cache_holds_nothing_else(changes, a_token, make, inputs):
    layer, x = make(D, H, dtype=torch.float32, **changes), inputs(B, T, D).float()
    cache = layer.new_cache()
    for n in range(1, T + 1):
        decode(layer, x[:, n - 1 : n], 1, cache)
        held = [cache.k, cache.v, *(cache.pre or ()), *(cache.post or ())]
        assert sum(part.numel() for part in held if part is not None) == B * n * a_token
        assert all(part.dtype == torch.float32 for part in held if part is not None)
        assert cache.n_tokens == n


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("steps", [[1] * 40, [40], [33, 7], [10] * 4], ids=str)
def test_with_a_window_the_cache_and_its_memory_stay_bounded(window, steps, make, inputs):
    layer, x = make(D, H, window=window, rope=1e4), inputs(B, 40, D)
    cache, held = layer.new_cache(), []
    for piece in x.split(steps, dim=1):
        decode(layer, piece, [piece.shape[1]], cache)
        held.append(numbers(cache) / (B * (2 * D + 10 * H)))
        assert cache.k.shape[2] == min(cache.n_tokens, window - 1)
    assert cache.n_tokens == 40 and max(held) <= 2 * window + 1  # in tokens


# Using a cache


def test_copies_of_a_cache_are_branches_that_do_not_disturb_each_other(make, inputs, error):
    for window in (None, 3):
        layer, x, z = make(D, H, window=window, rope=1e4), inputs(B, T, D), inputs(B, 3, D, seed=8)
        cache = layer.new_cache()
        decode(layer, x[:, :4], [4], cache)
        branch = copy.deepcopy(cache)
        other = decode(layer, z, 1, branch)
        rest = decode(layer, x[:, 4:], 1, cache)
        assert error(rest, layer(x)[:, 4:]) < 1e-10
        assert error(other, layer(torch.cat([x[:, :4], z], dim=1))[:, 4:]) < 1e-10


def test_two_texts_decode_side_by_side(make, inputs, error):
    layer, x, z = make(D, H), inputs(1, T, D), inputs(1, T, D, seed=8)
    first, second = layer.new_cache(), layer.new_cache()
    for t in range(T):
        a, b = layer(x[:, t : t + 1], cache=first), layer(z[:, t : t + 1], cache=second)
        assert error(a, layer(x)[:, t : t + 1]) < 1e-10 and error(b, layer(z)[:, t : t + 1]) < 1e-10


def test_a_prefill_can_be_trained_through(make, inputs):
    layer, x, dy = make(D, H, rope=1e4), inputs(B, T, D), inputs(B, T, D, seed=5)
    expected = torch.autograd.grad(layer(x), layer.parameters(), dy)
    cache = layer.new_cache()
    out = torch.cat([layer(piece, cache=cache) for piece in x.split([4, 1, 2], dim=1)], dim=1)
    for found, gradient in zip(torch.autograd.grad(out, layer.parameters(), dy), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)


def test_the_composed_weights_of_a_decoded_token_are_its_row(make, inputs, error):
    layer, x = make(D, H, computation="reference"), inputs(B, T, D)
    cache, (_, full) = layer.new_cache(), layer.attend(x)
    decode(layer, x[:, :-1], [T - 1], cache)
    _, row = layer.attend(x[:, -1:], cache=cache)
    assert error(row, full[:, :, -1:]) < 1e-10


@pytest.mark.parametrize("refused, message", [
    (dict(mask=torch.ones(T, T, dtype=torch.bool)), "neither mask nor rows"),
    (dict(rows=slice(-1, None)), "neither mask nor rows"),
])  # fmt: skip
def test_a_cache_takes_no_mask_and_no_rows(refused, message, make, inputs):
    layer = make(D, H)
    with pytest.raises(ValueError, match=message):
        layer.attend(inputs(B, T, D), cache=layer.new_cache(), **refused)


def test_a_bidirectional_layer_does_not_decode(make, inputs):
    layer = make(D, H, causal=False)
    with pytest.raises(ValueError, match="causal"):
        layer(inputs(B, T, D), cache=layer.new_cache())


def test_a_cache_of_another_batch_is_refused(make, inputs):
    layer = make(D, H)
    cache = layer.new_cache()
    decode(layer, inputs(B, 3, D), [3], cache)
    with pytest.raises(ValueError, match=r"(?s)cache.*batch|batch.*cache"):
        layer(inputs(B + 1, 1, D), cache=cache)
