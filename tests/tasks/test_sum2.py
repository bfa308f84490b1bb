"""SUM2: the definition on every small input, and planted inputs that are exactly what they promise."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tasks.sum2 import Sum2


def cancelling_pairs(x: list[int], M: int) -> int:
    """Pairs j < k with x_j + x_k = 0 mod M, counted in plain Python."""
    return sum((a + b) % M == 0 for a, b in itertools.combinations(x, 2))


@pytest.mark.parametrize("n, M", [(2, 2), (2, 5), (3, 5), (3, 6), (3, 7), (4, 5), (4, 6)])
def test_the_answer_agrees_with_the_definition_on_every_input(n, M):
    task = Sum2(n, M)
    inputs = task.all_inputs()
    assert len({tuple(x) for x in inputs.tolist()}) == len(inputs) == task.count == M**n
    assert task.answer(inputs).tolist() == [cancelling_pairs(x, M) > 0 for x in inputs.tolist()]


def test_a_number_does_not_cancel_itself():
    assert not Sum2(n=3, M=6).answer(torch.tensor([[0, 1, 1], [3, 1, 1]])).any()
    assert Sum2(n=3, M=6).answer(torch.tensor([[0, 1, 0], [3, 1, 3]])).all()


@settings(deadline=None)
@given(data=st.data(), n=st.integers(2, 12), size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_planted_inputs_hold_exactly_the_pairs_their_label_says(data, n, size, seed):
    M = 2 * data.draw(st.integers(n, 3 * n)) + 1
    task = Sum2(n, M)
    tokens, x, label = task.batch(5, seed=seed, size=size)
    assert tokens.shape == (size, n + 1)
    assert tokens[:, :-1].equal(x) and (tokens[:, -1] == M).all()
    assert int(label.sum()) == size // 2, "labels are balanced"
    assert task.answer(x).long().equal(label)
    for values, one in zip(x.tolist(), label.tolist(), strict=True):
        assert all(1 <= value < M for value in values)
        assert cancelling_pairs(values, M) == one
        assert len({min(value, M - value) for value in values}) == n - one


def test_no_single_token_gives_the_answer_away():
    task = Sum2(n=8, M=33)
    _, x, label = task.batch(0, seed=0, size=40_000)
    for value in range(1, 33):
        rate = label[(x == value).any(dim=1)].double().mean().item()
        # about 40,000 * 8 / 32 inputs hold a value: standard error 0.005, and seven of them
        assert abs(rate - 0.5) < 0.035
    for place in range(8):
        low = label[x[:, place] <= 16].double().mean().item()
        assert abs(low - 0.5) < 0.025


def test_a_batch_is_a_function_of_seed_and_step_alone():
    task = Sum2(n=8, M=33)
    first = task.batch(7, seed=3, size=16)
    assert all(a.equal(b) for a, b in zip(first, task.batch(7, seed=3, size=16), strict=True))
    assert not first.x.equal(task.batch(8, seed=3, size=16).x)
    assert not first.x.equal(task.batch(7, seed=4, size=16).x)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sum2(n=1, M=5), "n >= 2, got n=1"),
        (lambda: Sum2(n=2, M=1), "at least 2 is needed, got M=1"),
        (lambda: Sum2(n=3, M=8).batch(0, seed=0, size=4), "odd M, got M=8.*try M=9"),
        (lambda: Sum2(n=4, M=7).batch(0, seed=0, size=4), "1 .. \\(M-1\\)/2 = 3, got n=4; try M >= 9"),
        (lambda: Sum2(n=3, M=7).batch(0, seed=0, size=0), "at least one input"),
        (lambda: Sum2(n=8, M=33).all_inputs(), "take a smaller n or M, or draw with `sample`"),
    ],
)
def test_nonsense_is_refused_with_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
