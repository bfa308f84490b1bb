"""Comp_n and Ind_n against definitions in plain Python, on every input of the small sizes."""

import doctest
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lib.tasks.function_composition as module
from lib.tasks.function_composition import FunctionComposition, Indexing


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_answer_is_h_of_g_of_x_on_every_input(n):
    checked = 0
    words = itertools.product(range(n), repeat=2 * n + 1)
    for chunk in FunctionComposition(n).all_inputs(chunk=500):
        answer = FunctionComposition(n).answer(*chunk).tolist()
        for g, h, x, y in zip(chunk.g.tolist(), chunk.h.tolist(), chunk.x.tolist(), answer, strict=True):
            assert (*g, *h, x) == next(words), "inputs come in counting order, none left out"
            assert y == h[g[x]]
            checked += 1
    assert checked == n ** (2 * n + 1)


@pytest.mark.parametrize("n, count", [(2, 32), (3, 2187), (4, 262144), (5, 48828125)])
def test_the_number_of_inputs_is_the_one_of_the_page(n, count):
    assert FunctionComposition(n).count == count
    if n < 5:
        assert sum(len(chunk.x) for chunk in FunctionComposition(n).all_inputs()) == count


def words_of(n):
    return st.lists(st.integers(0, n - 1), min_size=2 * n + 1, max_size=2 * n + 1)


@given(st.integers(1, 12).flatmap(words_of))
def test_tokens_list_g_then_h_then_x_with_their_positions(word):
    n = (len(word) - 1) // 2
    g, h, x = torch.tensor([word[:n]]), torch.tensor([word[n:-1]]), torch.tensor(word[-1:])
    tokens = FunctionComposition(n).tokens(g, h, x)
    assert tokens.tolist() == [[[position, symbol] for position, symbol in enumerate(word)]]
    assert FunctionComposition(n).answer(g, h, x).tolist() == [word[n + word[word[-1]]]]


def test_a_sample_is_a_function_of_its_seed_and_covers_the_symbols():
    task = FunctionComposition(5)
    first, again, other = task.sample(400, seed=1), task.sample(400, seed=1), task.sample(400, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.g, other.g)
    assert all(part.unique().tolist() == [0, 1, 2, 3, 4] for part in first)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_indexing_is_composition_with_x_fixed_and_h_boolean(n):
    index, h = Indexing(n).all_inputs()
    words = {(i, *bits) for i, bits in zip(index.tolist(), h.tolist(), strict=True)}
    assert len(words) == len(index) == Indexing(n).count == n * 2**n
    composed = FunctionComposition(n).answer(*Indexing(n).as_composition(index, h))
    assert Indexing(n).answer(index, h).tolist() == (composed == 0).tolist()
    in_python = [row[i] == 0 for i, row in zip(index.tolist(), h.tolist(), strict=True)]
    assert Indexing(n).answer(index, h).tolist() == in_python


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_domain_that_is_no_positive_integer_is_refused(n):
    with pytest.raises(ValueError, match="n is an integer >= 1"):
        FunctionComposition(n)


def test_tables_of_the_wrong_shape_or_counted_from_one_are_refused():
    task, g = FunctionComposition(3), torch.tensor([[2, 0, 1]])
    with pytest.raises(ValueError, match=r"g, h: \(B, 3\)"):
        task.answer(g, torch.tensor([[0, 1]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="counts from 0"):
        task.answer(g, g + 1, torch.tensor([0]))
    with pytest.raises(ValueError, match="n is an integer >= 2"):
        Indexing(1)
    with pytest.raises(ValueError, match="at least one"):
        task.sample(0, seed=0)


def test_the_worked_examples_hold():
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
