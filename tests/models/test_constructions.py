"""Propositions T and T' and the SUM2 counter: exactly right on every small input, and not by accident."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.models.constructions import (
    proposition_t,
    proposition_t_many_heads,
    proposition_t_many_heads_binary,
    sum2_counter,
)
from lib.tasks.function_composition import FunctionComposition

MANY_HEADS = [proposition_t_many_heads, proposition_t_many_heads_binary]
SMALLEST = [(S, nu, s) for S, nu, s in itertools.product(range(1, 4), repeat=3) if S * nu * s in (2, 3)]


def compositions(n: int):
    """Every word of Comp_n with its answer, by the definition in plain Python."""
    for word in itertools.product(range(n), repeat=2 * n + 1):
        g, h, x = word[:n], word[n : 2 * n], word[-1]
        yield word, h[g[x]]


def random_words(n: int, count: int, *, seed: int) -> tuple[torch.Tensor, list[int]]:
    task = FunctionComposition(n)
    g, h, x = task.sample(count, seed=seed)
    return task.tokens(g, h, x)[..., 1], task.answer(g, h, x).tolist()


@pytest.mark.parametrize("n, s", [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_two_heads_compose_on_every_input_up_to_n_3(n, s):
    words, answers = zip(*compositions(n), strict=True)
    assert len(words) == {2: 32, 3: 2187}[n]
    assert proposition_t(n, s).exact(words) == list(answers)


@pytest.mark.parametrize("n", [4, 7, 12, 20, 36])
def test_two_heads_compose_random_tables_up_to_n_36(n):
    for s in sorted({1, 2, math.isqrt(n), n - 1, n}):
        words, answers = random_words(n, 60, seed=n)
        assert proposition_t(n, s).exact(words) == answers
        assert len(answers) == 60


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_two_heads_compose_whatever_the_tables(data):
    n = data.draw(st.integers(2, 14), label="n")
    s = data.draw(st.integers(1, n), label="s")
    place = st.integers(0, n - 1)
    g, h = (data.draw(st.lists(place, min_size=n, max_size=n), label=name) for name in "gh")
    x = data.draw(place, label="x")
    assert proposition_t(n, s).exact([[*g, *h, x]]) == [h[g[x]]]


@pytest.mark.parametrize("build", MANY_HEADS)
@pytest.mark.parametrize("S, nu, s", SMALLEST)
def test_many_heads_compose_on_every_input_up_to_n_3(build, S, nu, s):
    words, answers = zip(*compositions(S * nu * s), strict=True)
    assert len(words) in (32, 2187)
    assert build(S, nu, s).exact(words) == list(answers)


def test_the_six_smallest_shapes_of_many_heads_are_all_tried():
    assert len(SMALLEST) == 6


@pytest.mark.parametrize("build", MANY_HEADS)
@pytest.mark.parametrize("S, nu, s, count", [(2, 2, 1, 100), (2, 2, 2, 300), (3, 2, 2, 100), (3, 3, 3, 15)])
def test_many_heads_compose_random_tables_up_to_n_27(build, S, nu, s, count):
    words, answers = random_words(S * nu * s, count, seed=5)
    assert build(S, nu, s).exact(words) == answers and len(answers) == count


@pytest.mark.parametrize("n, s, d, layers, width, product", [
    (36, 6, 6, 9, 77, 140), (36, 1, 36, 4, 106, 370), (36, 36, 1, 39, 77, 160), (16, 4, 4, 7, 37, 80),
])
def test_sizes_of_two_heads_are_those_of_the_proof(n, s, d, layers, width, product):
    size = proposition_t(n, s).size()
    assert size["heads"] == 2 and size["value_dim"] == d and size["hidden_layers"] == layers
    assert size["max_width"] == width and size["product"] == product


def test_the_smallest_two_head_models_have_the_proven_depth_and_width():
    assert proposition_t(2, 1).size()["hidden_layers"] == 4
    size = proposition_t(3, 3).size()
    assert (size["hidden_layers"], size["max_width"]) == (6, 11)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 10, 15, 16, 17, 25, 36])
def test_no_two_head_model_exceeds_the_size_that_the_proposition_states(n):
    for s in {1, 2, math.isqrt(n), n}:
        size, d = proposition_t(n, s).size(), math.ceil(n / s)
        assert size["hidden_layers"] == s + 3 and size["value_dim"] == d
        assert size["max_width"] <= max(2 * n + 5, 2 * (n - 1) + d)
        assert size["product"] == 2 * (d + 1) * (s + 4)


@pytest.mark.parametrize("build, shape, layers, width, relus", [
    (proposition_t_many_heads, (3, 3, 3), 6, 59, None), (proposition_t_many_heads, (2, 2, 2), 5, 21, None),
    (proposition_t_many_heads_binary, (3, 3, 3), 18, 11, 118),
    (proposition_t_many_heads_binary, (2, 2, 2), 9, 9, 54),
])
def test_sizes_of_many_heads_are_those_of_the_proof(build, shape, layers, width, relus):
    size = build(*shape).size()
    assert size["heads"] == shape[0] + 1 and size["value_dim"] == max(shape[1], 2)
    assert (size["hidden_layers"], size["max_width"]) == (layers, width)
    assert relus in (None, size["relus"])


@pytest.mark.parametrize("n, s", [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_float64_float32_and_float16_compose_on_every_input_up_to_n_3(n, s):
    words, answers = zip(*compositions(n), strict=True)
    words, answer, model = torch.tensor(words), torch.tensor(answers), proposition_t(n, s)
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert ((model.forward(words, dtype).double() - answer).abs() < 0.5).all(), dtype
    assert len(words) in (32, 2187)


def test_packing_more_digits_than_a_format_has_bits_breaks_it():
    """n = 36, s = 6 packs 43 bits: float64 (53 bits) holds them, float32 (24) and float16 (11) do not."""
    words, answers = random_words(36, 500, seed=0)
    model, answer = proposition_t(36, 6), torch.tensor(answers)
    assert model.size()["value_bits"] == 43
    right = {dtype: ((model.forward(words, dtype).double() - answer).abs() < 0.5).float().mean().item()
             for dtype in (torch.float64, torch.float32, torch.float16)}
    assert right[torch.float64] == 1
    assert right[torch.float32] < 0.9 and right[torch.float16] < 0.5


def test_one_entry_to_a_coordinate_survives_float32_at_n_36():
    words, answers = random_words(36, 500, seed=0)
    y = proposition_t(36, 1).forward(words, torch.float32)
    assert ((y - torch.tensor(answers)).abs() < 0.5).all()


@pytest.mark.parametrize("n, s", [(0, 1), (1, 1), (3, 0), (3, 4), (5, -1)])
def test_two_heads_refuse_impossible_sizes(n, s):
    with pytest.raises(ValueError, match=f"got n={n}, s={s}"):
        proposition_t(n, s)


@pytest.mark.parametrize("build", MANY_HEADS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 2, 2), (2, -1, 2)])
def test_many_heads_refuse_impossible_sizes(build, shape):
    with pytest.raises(ValueError, match="S, nu, s >= 1 and n = S·nu·s >= 2"):
        build(*shape)


def test_sizes_that_are_not_integers_are_refused():
    for build in (lambda: proposition_t(4, 2.0), lambda: sum2_counter(True, 3), lambda: sum2_counter(3, "7")):
        with pytest.raises(ValueError, match="must be an integer"):
            build()


# ---- SUM2 -----------------------------------------------------------------------------------------------


def cancels(x: tuple[int, ...], M: int) -> bool:
    """Two different places j < k sum to 0 modulo M: the definition."""
    return any((x[j] + x[k]) % M == 0 for k in range(len(x)) for j in range(k))


@pytest.mark.parametrize("n, M", [(2, 5), (3, 6), (3, 7), (4, 5), (4, 6), (2, 2), (2, 3), (3, 3)])
def test_one_uniform_head_finds_cancelling_pairs_on_every_input(n, M):
    inputs = list(itertools.product(range(M), repeat=n))
    expected = [cancels(x, M) for x in inputs]
    model, words = sum2_counter(n, M), [(*x, M) for x in inputs]
    assert [y > 0 for y in model.exact(words)] == expected
    # counts are integers, off by a few ulp of n in floats
    assert (model.forward(torch.tensor(words), torch.float64) > 0.5).tolist() == expected
    assert len(expected) == M**n and 0 < sum(expected) < M**n


@pytest.mark.parametrize("n, M", [(3, 7), (4, 6)])
def test_a_counter_without_one_pair_misses_it(n, M):
    model = sum2_counter(n, M)
    blind = model.with_neuron(1, f"c1 - c{M - 1}", model.hidden[0]["carried"])
    inputs = list(itertools.product(range(M), repeat=n))
    found = [y > 0 for y in blind.exact([(*x, M) for x in inputs])]
    assert sum(a != cancels(x, M) for a, x in zip(found, inputs, strict=True)) > 0


@pytest.mark.parametrize("n, M", [(4, 7), (4, 8), (10, 21)])
def test_the_counter_has_one_head_one_layer_and_about_half_as_many_neurons_as_residues(n, M):
    size = sum2_counter(n, M).size()
    assert (size["heads"], size["value_dim"], size["hidden_layers"]) == (1, M, 1)
    assert size["widths"] == [M // 2 + 2]


def test_the_counter_refuses_impossible_sizes():
    for n, M in ((1, 5), (3, 1)):
        with pytest.raises(ValueError, match=f"got n={n}, M={M}"):
            sum2_counter(n, M)
