"""The collision adversary against plain dictionaries, on every table; its certificates hold for every MLP."""

import dataclasses
import itertools
import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.experiments.collisions import collide
from lib.metrics.bounds import least_bits
from lib.metrics.communication import (
    Collision,
    QuantisedLayer,
    all_tables,
    census,
    messages,
    quantise_layer,
    random_layer,
    verify,
)

SMALL = dict(heads=1, value_dim=1, bits=2, score_bits=1)       # collides always
MIDDLE = dict(heads=1, value_dim=2, bits=3, score_bits=2)
LARGE = dict(heads=4, value_dim=4, bits=4, score_bits=4)       # tells all tables of m = 4 apart


def perfect_layer(m):
    """Uniform attention, one coordinate that spells the table in base m: a message for every table."""
    value = np.zeros((1, m, m, 1), dtype=np.int64)
    for i, y in itertools.product(range(m), repeat=2):
        value[0, i, y, 0] = y * m**i
    ones = np.ones((1, m, m), dtype=np.int64)
    return QuantisedLayer(ones, value, ones[:, :, :2].copy(), np.zeros((1, m, 2, 1), dtype=np.int64))


def messages_in_python(layer, z):
    sums = []
    for head in range(layer.heads):
        for c in range(layer.value_dim):
            sums.append(sum(int(layer.table_weight[head, i, y]) * int(layer.table_value[head, i, y, c])
                            for i, y in enumerate(z)))
        sums.append(sum(int(layer.table_weight[head, i, y]) for i, y in enumerate(z)))
    return tuple(sums)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_every_table_is_enumerated_once(m):
    assert [tuple(z) for z in all_tables(m).tolist()] == list(itertools.product(range(m), repeat=m))
    shuffled = [tuple(z) for z in all_tables(m, permutations=True).tolist()]
    assert len(set(shuffled)) == math.factorial(m) and all(sorted(z) == list(range(m)) for z in shuffled)


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
@pytest.mark.parametrize("seed", range(3))
def test_the_census_agrees_with_plain_dictionaries(shape, seed):
    layer, m = random_layer(4, **shape, seed=seed), 4
    senders = defaultdict(list)
    for z in itertools.product(range(m), repeat=m):
        senders[messages_in_python(layer, z)].append(z)
    forced = sum(len(group) - max(sum(z[j] == y for z in group) for y in range(m))
                 for group in senders.values() for j in range(m))
    found = census(layer)
    assert (found.tables, found.inputs) == (256, 1024)
    assert (found.messages, found.forced_errors) == (len(senders), forced)
    assert (found.collision is None) == (len(senders) == 256)
    assert [tuple(row) for row in messages(layer, all_tables(4)).tolist()] == [
        messages_in_python(layer, z) for z in itertools.product(range(m), repeat=m)]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.sampled_from([SMALL, MIDDLE]), st.integers(0, 10**6))
def test_a_collision_is_two_inputs_with_equal_states_and_different_answers(m, shape, seed):
    layer = random_layer(m, **shape, seed=seed)
    collision = census(layer).collision
    if collision is None:
        assert census(layer).messages == m**m
        return
    z, z_prime, j = collision.z, collision.z_prime, collision.j
    assert messages_in_python(layer, z) == messages_in_python(layer, z_prime)
    assert z[j] != z_prime[j] and collision.answers == (z[j], z_prime[j])
    assert layer.state(z, j) == layer.state(z_prime, j) and verify(layer, collision)


def test_a_collision_spoils_every_mlp():
    layer = random_layer(4, **SMALL, seed=1)
    collision = census(layer).collision
    state, state_prime = (np.array(layer.state(z, collision.j), dtype=float)
                          for z in (collision.z, collision.z_prime))
    rng = np.random.default_rng(0)
    for _ in range(50):
        W, b, u = rng.standard_normal((32, len(state))), rng.standard_normal(32), rng.standard_normal(32)
        y, y_prime = (u @ np.maximum(W @ s + b, 0) for s in (state, state_prime))
        assert y == y_prime, "bit for bit"
        assert max(abs(y - collision.answers[0]), abs(y - collision.answers[1])) >= 0.5


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_a_layer_that_spells_the_table_has_no_collision(m):
    found = census(perfect_layer(m))
    assert found.messages == m**m and found.collision is None and found.forced_errors == 0


@pytest.mark.parametrize("m", [3, 4])
def test_erasing_one_digit_of_that_layer_makes_it_collide(m):
    layer = perfect_layer(m)
    value = layer.table_value.copy()
    value[0, 1] = 0
    erased = dataclasses.replace(layer, table_value=value)
    found = census(erased)
    assert found.messages == m ** (m - 1) and found.collision.j == 1 and verify(erased, found.collision)
    assert found.forced_errors == m**m - m ** (m - 1)
    assert not verify(layer, found.collision), "the whole layer tells these two tables apart"


def test_a_collision_that_is_none_is_not_verified():
    layer = random_layer(4, **SMALL, seed=2)
    collision = census(layer).collision
    agree = next(j for j in range(4) if collision.z[j] == collision.z_prime[j])
    assert not verify(layer, dataclasses.replace(collision, j=agree))
    spelled = Collision((0, 1, 2, 3), (1, 1, 2, 3), 0)
    assert not verify(perfect_layer(4), spelled)


@pytest.mark.parametrize("m", [3, 4, 5])
@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE])
def test_too_few_accumulator_bits_always_collide(m, shape):
    for seed in range(10):
        layer = random_layer(m, **shape, seed=seed)
        p = layer.accumulator_bits
        message = messages(layer, all_tables(m))
        assert message.min() >= -(2 ** (p - 1)) and message.max() < 2**p
        assert census(layer).messages <= 2 ** (layer.heads * (layer.value_dim + 1) * p)
        if p < least_bits(m, layer.heads, layer.value_dim):
            assert census(layer).collision is not None


def test_random_decoders_collide_about_as_often_as_the_page_says():
    def distinct(shape):
        return [census(random_layer(4, **shape, seed=seed)).messages for seed in range(10)]

    assert max(distinct(SMALL)) <= 30
    assert 80 <= min(distinct(MIDDLE)) and max(distinct(MIDDLE)) < 256
    assert max(distinct(MIDDLE | {"heads": 2})) == 256


def softmax_attention(table, rest, receiver, W_Q, W_K, W_V, z, j):
    """Ordinary float attention of the same prompt, every head: (H, d)."""
    states = np.concatenate([table[np.arange(len(z)), z], rest[j]])
    query, key = np.einsum("d,hdk->hk", receiver, W_Q), np.einsum("td,hdk->thk", states, W_K)
    score = np.einsum("hk,thk->ht", query, key)
    weight = np.exp(score / math.sqrt(W_K.shape[-1]))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("ht,thd->hd", weight, np.einsum("td,hde->the", states, W_V))


def float_layer(m, seed, D=5, H=2, d_k=3, d=4):
    rng = np.random.default_rng(seed)
    table, receiver = rng.standard_normal((m, m, D)), 0.3 * rng.standard_normal(D)   # scores stay close
    rest = np.concatenate([rng.standard_normal((m, 2, D)), np.broadcast_to(receiver, (m, 1, D))], axis=1)
    return table, rest, receiver, *(rng.standard_normal((H, D, w)) for w in (d_k, d_k, d))


@pytest.mark.parametrize("seed", range(3))
def test_a_finely_quantised_layer_is_the_float_layer(seed):
    parts = float_layer(3, seed)
    layer = quantise_layer(*parts, bits=20, weight_bits=30)
    table, rest, W_V = parts[0], parts[1], parts[-1]
    values = np.concatenate([table.reshape(-1, 5), rest.reshape(-1, 5)])
    unit = abs(np.einsum("te,hed->htd", values, W_V)).max(axis=(1, 2)) / (2**19 - 1)            # (H,)
    for z, j in itertools.product([(0, 1, 2), (2, 2, 0)], range(3)):
        ours = np.array(layer.state(z, j), dtype=float).reshape(2, 4) * unit[:, None]
        wanted = softmax_attention(*parts, z=list(z), j=j)
        assert ours == pytest.approx(wanted, abs=1e-4)     # values < 30, in 2^19 steps


def test_a_coarsely_quantised_layer_gets_a_certificate():
    layer = quantise_layer(*float_layer(5, seed=0, H=1, d=2), bits=3, weight_bits=2)
    assert layer.table_weight.max() <= 4 and abs(layer.table_value).max() <= 3
    found = census(layer)
    assert found.messages < 5**5 and verify(layer, found.collision) and found.forced_errors > 0
    only = census(layer, all_tables(5, permutations=True))
    assert only.tables == 120 and only.messages <= 120
    if only.collision is not None:
        assert sorted(only.collision.z) == sorted(only.collision.z_prime) == list(range(5))


def test_heads_outputs_are_exact_fractions_even_without_weight():
    zero = np.zeros((1, 2, 2), dtype=np.int64)
    layer = QuantisedLayer(zero, np.ones((1, 2, 2, 1), dtype=np.int64), zero[:, :, :1],
                           np.ones((1, 2, 1, 1), dtype=np.int64))
    assert layer.state((0, 1), 0) == (Fraction(0),)


def test_a_run_is_a_row_that_depends_on_settings_and_seed_alone():
    row, again = (collide(dict(m=4, **SMALL), seed=0) for _ in range(2))
    assert row == again
    assert row["verified"] is True and row["tables"] == 256 and row["least_bits"] == 4
    layer = random_layer(4, **SMALL, seed=0)
    told = row["collision"]
    collision = Collision(tuple(told["z"]), tuple(told["z_prime"]), told["j"])
    assert verify(layer, collision)
    rich = collide(dict(m=4, **LARGE), seed=0)
    assert rich["collision"] is None and rich["verified"] is None and rich["messages"] == 256


def test_nonsense_is_refused():
    layer = perfect_layer(3)
    with pytest.raises(ValueError, match="table_weight must be int64 of shape"):
        dataclasses.replace(layer, table_weight=layer.table_weight.astype(float))
    with pytest.raises(ValueError, match="cannot be negative"):
        dataclasses.replace(layer, table_weight=-layer.table_weight)
    with pytest.raises(ValueError, match="overflow 64-bit"):
        dataclasses.replace(layer, table_value=layer.table_value + 2**60)
    with pytest.raises(ValueError, match="value_dim must be at least 1, got value_dim=0"):
        random_layer(4, 1, 0, bits=2, score_bits=1, seed=0)
    with pytest.raises(ValueError, match="16777216 tables at m=8, more than .* take m <= 7"):
        all_tables(8)
    with pytest.raises(ValueError, match=r"lie in 0 .. 2, got 0 .. 3"):
        census(layer, np.array([[0, 1, 3]]))
    with pytest.raises(ValueError, match=r"tables must be \(N, 3\)"):
        census(layer, np.array([[0, 1]]))
    with pytest.raises(ValueError, match=r"receiver \(D,\)"):
        quantise_layer(*float_layer(3, 0)[:2], np.zeros(4), *float_layer(3, 0)[3:], bits=3, weight_bits=2)
    with pytest.raises(ValueError, match="bits >= 2"):
        quantise_layer(*float_layer(3, 0), bits=1, weight_bits=2)
    with pytest.raises(ValueError, match=r"missing \['bits'\], unknown \['bit'\]"):
        collide(dict(m=4, heads=1, value_dim=1, bit=2, score_bits=1), seed=0)
