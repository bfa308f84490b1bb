"""L-FuncComp asked from every start: values, prompts, masks and guesses against plain Python."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tasks.composition import Instances, SequentialComposition
from lib.tasks.sequential_prompts import MAPS, ORDERS, SequentialPrompts

SIZES = [(2, ()), (3, (1,)), (2, (2,)), (3, (2, 2)), (2, (1, 3)), (2, (2, 1, 2, 1))]
prompts = st.builds(
    lambda sizes, order, maps: SequentialPrompts(SequentialComposition(*sizes), order, maps),
    st.sampled_from(SIZES), st.sampled_from(ORDERS), st.sampled_from(MAPS),
)  # fmt: skip


def steps(tables: list[list[int]], w: list[int], start: int, sizes: list[int]) -> list[int]:
    """The definition in plain Python: i_0 ... i_L; sizes[l] = N_l."""
    values = [start, tables[0][start]]
    for l in range(1, len(tables)):
        values.append(tables[l][w[l - 1] * sizes[l - 1] + values[-1]])
    return values


def split(batch, b):
    return [table[b].tolist() for table in batch.tables], batch.w[b].tolist()


@settings(deadline=None)
@given(prompts=prompts, step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1))
def test_values_follow_the_definition_from_every_start(prompts, step, seed):
    batch = prompts.batch(step, seed=seed, size=3)
    for b in range(3):
        tables, w = split(batch, b)
        if prompts.maps == "permutations":
            assert all(sorted(z) == list(range(len(z))) for z in tables)
        assert all(0 <= w_l < n for w_l, n in zip(w, prompts.task.ns, strict=True))
        for start in range(prompts.task.m):
            assert batch.values[b, start].tolist() == steps(tables, w, start, prompts.task.N)


@settings(deadline=None)
@given(prompts=prompts, step=st.integers(0, 100))
def test_each_question_with_the_tables_is_one_prompt_of_the_task(prompts, step):
    task = prompts.task
    batch = prompts.batch(step, seed=0, size=2)
    assert batch.tokens.shape[:2] == (2, prompts.length)
    mask = prompts.mask()
    for b, start in itertools.product(range(2), range(task.m)):
        row = range(prompts.length)[prompts.read][start]
        read = [t for t in range(prompts.length) if mask[row, t]]
        seen = batch.tokens[b, read]
        one = Instances(torch.tensor([start]), tuple(z[b : b + 1] for z in batch.tables), batch.w[b : b + 1])
        if prompts.order == "joint":
            paper = task.tokens(one)[0]
            assert seen[:-1, :-1].equal(paper[:-2]) and not seen[:-1, -1].any()
            assert sorted(x for x in seen[-1].tolist() if x) == sorted(
                x for x in paper[-1].tolist() + [int(paper[-2, 3])] if x
            )
        else:
            assert seen.equal(task.tokens(one, order=prompts.order)[0])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_token_reads_the_earlier_tokens_of_its_own_prompt_alone(sizes, order):
    prompts = SequentialPrompts(SequentialComposition(*sizes), order)
    m, N, T = prompts.task.m, sum(prompts.task.N), prompts.length
    kinds = {"w-first": ["w"] + ["table"] * N + ["z_0"] * m, "joint": ["table"] * N + ["both"] * m}
    kind = kinds.get(order, ["table"] * N + ["z_0"] * m + ["w"] * m)
    assert len(kind) == T and {kind[t] for t in range(T)[prompts.read]} == {kind[-1]}
    assert kind.index("table") == prompts.listed.start and N == prompts.listed.stop - prompts.listed.start
    shared = {"table"} | ({"w"} if order == "w-first" else set())
    asks = [None if k in shared else kind[:t].count(k) for t, k in enumerate(kind)]  # which question
    for row, column in itertools.product(range(T), repeat=2):
        expected = column <= row and asks[column] in (None, asks[row])
        assert bool(prompts.mask()[row, column]) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_one_question_cannot_change_what_another_is_told(order):
    """By brute force: through as many layers as there are tokens, nothing of a question reaches another."""
    prompts = SequentialPrompts(SequentialComposition(3, (2,)), order)
    reach = torch.linalg.matrix_power(prompts.mask().double(), prompts.length) > 0
    rows = range(prompts.length)[prompts.read]
    for a, b in itertools.permutations(rows, 2):
        assert not reach[a, b]
    tables = range(prompts.listed.start, prompts.listed.stop)
    assert not any(reach[t, rows[0] - prompts.late * 3] for t in tables), "no table token knows a start"
    w = 0 if order == "w-first" else rows[0]
    assert {bool(reach[t, w]) for t in tables} == {order == "w-first"}, "tables know w where it comes first"


@settings(deadline=None, max_examples=30)
@given(prompts=prompts, step=st.integers(0, 100))
def test_the_best_guess_is_the_commonest_answer_still_possible(prompts, step):
    task, size = prompts.task, 4
    batch = prompts.batch(step, seed=1, size=size)
    every_w = list(itertools.product(*(range(n) for n in task.ns)))
    share = {"tables": 0.0, "w": 0.0, "start": 0.0}
    for b in range(size):
        tables, w = split(batch, b)
        answer = {(v, s): steps(tables, v, s, task.N)[-1] for v in every_w for s in range(task.m)}
        groups = {
            "tables": [list(answer.values())],
            "w": [[answer[tuple(w), s] for s in range(task.m)]],
            "start": [[answer[v, s] for v in every_w] for s in range(task.m)],
        }
        for known, lists in groups.items():
            share[known] += sum(max(map(g.count, g)) / len(g) for g in lists) / len(lists) / size
    assert prompts.best_guesses(batch) == pytest.approx(share, abs=1e-12)
    if prompts.maps == "permutations":
        W = len(every_w)
        expected = {"tables": 1 / (task.m * W), "w": 1 / task.m, "start": 1 / W}
        assert share == pytest.approx(expected, abs=1e-12)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    prompts = SequentialPrompts(SequentialComposition(3, (2,)))
    first = prompts.batch(7, seed=3, size=4)
    torch.manual_seed(1)
    assert first.tokens.equal(prompts.batch(7, seed=3, size=4).tokens)
    assert not first.tokens.equal(prompts.batch(8, seed=3, size=4).tokens)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda task: SequentialPrompts(task, "papr"), "did you mean 'paper'"),
        (lambda task: SequentialPrompts(task, maps="permutation"), "did you mean 'permutations'"),
        (lambda task: SequentialPrompts(SequentialComposition(1, (2,))), "m >= 2, got m=1"),
        (lambda task: SequentialPrompts(task).batch(0, seed=0, size=0), "at least one prompt"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make(SequentialComposition(2, (2,)))
