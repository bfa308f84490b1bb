"""Retrieval by any key of any value: prompts read back from their tokens, solved in plain Python."""

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tasks.retrieval import Recombination, RelationalRetrieval, commonest

TASKS = [
    RelationalRetrieval(N=4, C=2, W=3, V=5, K=6, Q=7),
    RelationalRetrieval(N=2, C=1, W=1, V=2, Q=3),
    RelationalRetrieval(),
    Recombination(N=3, A=3, V=5, Q=6),
    Recombination(),
]


def said(task, token):
    """The rows of one token, as words: {"key 0": 1, ...} and what is asked for, None at an item."""
    names = [task.row(index) for index in token if index]
    facts = dict(name.split(" is ") for name in names if " is " in name)
    asked = [name.removeprefix("asks ") for name in names if name.startswith("asks ")]
    assert len(facts) + len(asked) == len(names) and len(asked) <= 1
    return {name: int(value) for name, value in facts.items()}, asked[0] if asked else None


def solve(task, tokens):
    """The answers, from the tokens alone: list the items, look each query up."""
    items, answers = [], []
    for token in tokens:
        facts, asked = said(task, token)
        if asked is None:
            items.append(facts)
            continue
        ((name, value),) = facts.items()
        (item,) = [item for item in items if item[name] == value]
        answer = item[asked]
        if isinstance(task, Recombination):
            answer += task.V * int(asked.split()[1])
        answers.append(answer)
    return answers


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_every_prompt_can_be_solved_from_its_tokens(task):
    prompts = task.batch(3, seed=1, size=25)
    assert prompts.tokens.shape == (25, task.length, task.S) and prompts.answer.shape == (25, task.Q)
    assert 0 <= int(prompts.tokens.min()) and int(prompts.tokens.max()) < task.vocab
    for tokens, answer in zip(prompts.tokens.tolist(), prompts.answer.tolist(), strict=True):
        assert solve(task, tokens) == answer
        assert all(0 <= one < task.n_answers for one in answer)


def test_the_answer_agrees_with_plain_python_on_every_input():
    N, C, W, V, K, checked = 2, 2, 2, 2, 3, 0
    task = RelationalRetrieval(N=N, C=C, W=W, V=V, K=K, Q=C * N * W)
    orders = list(itertools.permutations(range(K), N))
    for keys in itertools.product(orders, repeat=C):
        for values in itertools.product(range(V), repeat=N * W):
            items = [[*(keys[c][n] for c in range(C)), *values[n * W : n * W + W]] for n in range(N)]
            asked = [[c, keys[c][n], w] for c in range(C) for n in range(N) for w in range(W)]
            tokens = task.tokens(torch.tensor([items]), torch.tensor([asked]))[0].tolist()
            answer = task.answer(torch.tensor([items]), torch.tensor([asked]))[0].tolist()
            cases = itertools.product(range(C), range(N), range(W))
            assert answer == solve(task, tokens) == [items[n][C + w] for _, n, w in cases]
            checked += len(answer)
    assert checked == len(orders) ** C * V ** (N * W) * C * N * W == 4608


def test_recombination_agrees_with_plain_python_on_every_input():
    N, A, V, checked = 2, 3, 2, 0
    task = Recombination(N=N, A=A, V=V, Q=A * N * (A - 1))
    for columns in itertools.product(itertools.permutations(range(V), N), repeat=A):
        items = [[columns[a][n] for a in range(A)] for n in range(N)]
        cases = [(i, n, j) for i in range(A) for n in range(N) for j in range(A) if i != j]
        asked = torch.tensor([[[i, items[n][i], j] for i, n, j in cases]])
        answer = task.answer(torch.tensor([items]), asked)[0].tolist()
        assert answer == [j * V + items[n][j] for i, n, j in cases]
        assert answer == solve(task, task.tokens(torch.tensor([items]), asked)[0].tolist())
        checked += len(answer)
    assert checked == 8 * 12


@settings(deadline=None, max_examples=40)
@given(data=st.data(), N=st.integers(2, 6), seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**9))
def test_keys_name_one_item_and_a_batch_is_a_function_of_seed_and_step(data, N, seed, step):
    sizes = {name: data.draw(st.integers(1, 4)) for name in "CWQ"}
    relational = RelationalRetrieval(N=N, V=data.draw(st.integers(2, 5)), K=N + sizes["Q"], **sizes)
    recombination = Recombination(N=N, A=1 + sizes["C"], V=N + sizes["W"], Q=sizes["Q"])
    for task, keyed in ((relational, relational.C), (recombination, recombination.A)):
        first, again = (task.batch(step, seed=seed, size=3) for _ in range(2))
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))
        for column in first.items[..., :keyed].mT.flatten(0, 1).tolist():
            assert len(set(column)) == N
        by, _, give = first.asked.unbind(-1)
        assert task is relational or (by != give).all(), "recombination asks for another attribute"
    other = relational.batch(step + 1, seed=seed, size=30)
    assert not other.tokens.equal(relational.batch(step, seed=seed, size=30).tokens)


@pytest.mark.parametrize("task", TASKS[2:], ids=repr)
def test_queries_and_answers_are_uniform(task):
    prompts = task.batch(0, seed=0, size=4000)
    n = prompts.answer.numel()
    kinds = collections.Counter(zip(*(prompts.asked[..., k].flatten().tolist() for k in (0, 2)), strict=True))
    expected = task.C * task.W if isinstance(task, RelationalRetrieval) else task.A * (task.A - 1)
    assert len(kinds) == expected
    counts = {
        "kinds": torch.tensor([*kinds.values()]),
        "values asked by": prompts.asked[..., 1].flatten().bincount(),
        "answers": prompts.answer.flatten().bincount(minlength=task.n_answers),
    }
    for name, count in counts.items():  # of 64,000, standard error sqrt(n p): six of them
        p = n / len(count)
        assert (count - p).abs().max() < 6 * p**0.5, name


def test_neither_key_nor_value_word_can_be_left_out():
    task = RelationalRetrieval(N=6, C=3, W=3, V=6)
    prompts = task.batch(0, seed=0, size=500)
    for place, size in ((0, task.C), (2, task.W)):
        asked = prompts.asked.clone()
        asked[..., place] = (asked[..., place] + 1) % size
        same = (task.answer(prompts.items, asked) == prompts.answer).double().mean().item()
        assert same < 0.4, "another key, or another word, has another answer"


def test_levels_are_what_half_solutions_score():
    task = RelationalRetrieval(N=5, C=2, W=3, V=4)
    prompts = task.batch(0, seed=0, size=4000)
    items, asked, answer = prompts.items.tolist(), prompts.asked.tolist(), prompts.answer.tolist()
    right, total = collections.Counter(), 0
    for one, queries, answers in zip(items, asked, answer, strict=True):
        for (c, v, w), a in zip(queries, answers, strict=True):
            (item,) = [item for item in one if item[c] == v]
            guesses = {"nothing": [0], "attribute": [i[2 + w] for i in one], "item": item[2:]}
            for name, seen in guesses.items():
                right[name] += collections.Counter(seen).most_common(1)[0][0] == a
            total += 1
    for name, level in task.levels().items():
        # 64,000 answers, 16 of a prompt depend on each other: standard error below 0.008, and three of them
        assert abs(right[name] / total - level) < 0.024, name
    levels = Recombination(N=8, A=4, V=16).levels()
    assert levels == {"nothing": 1 / 64, "query": 1 / 16, "attribute": 1 / 8, "item": 1 / 3}


@pytest.mark.parametrize("n, V", [(1, 3), (2, 5), (3, 2), (4, 4), (5, 3), (7, 2)])
def test_the_commonest_value_is_counted_right_on_every_draw(n, V):
    largest = [max(collections.Counter(draw).values()) for draw in itertools.product(range(V), repeat=n)]
    assert len(largest) == V**n and commonest(n, V) * n * V**n == sum(largest)


def test_a_query_reads_the_items_and_itself_only_where_it_may_rest():
    for sink in (True, False):
        task = RelationalRetrieval(N=3, C=1, W=1, Q=2, sink=sink)
        expected = [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, int(sink), 0], [1, 1, 1, 0, int(sink)]]
        assert task.mask().int().tolist() == expected
        assert task.queries == slice(3, 5) and task.length == 5


def test_all_queries_are_listed_where_they_belong():
    task = RelationalRetrieval(N=3, C=2, W=4, K=5)
    asked = task.all_asked()
    assert asked.shape == (2, 5, 4, 3) and asked[1, 3, 2].tolist() == [1, 3, 2]
    rows = task.query_tokens(asked)[1, 3, 2].tolist()
    assert [task.row(index) for index in rows if index] == ["key 1 is 3", "asks value 2"]
    assert Recombination(A=3, V=8).all_asked().shape == (3, 8, 3, 3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RelationalRetrieval(N=1), "N is a whole number of at least 2, got 1"),
        (lambda: RelationalRetrieval(W=0), "W is a whole number of at least 1, got 0"),
        (lambda: RelationalRetrieval(Q=True), "Q is a whole number of at least 1, got True"),
        (lambda: RelationalRetrieval(N=8, K=7), "K >= N: got K=7 values for N=8 items"),
        (lambda: Recombination(A=1), "A is a whole number of at least 2, got 1"),
        (lambda: Recombination(N=9, V=8), "V >= N: got V=8 values for N=9 items"),
        (lambda: RelationalRetrieval().batch(0, seed=0, size=0), "at least one prompt, got size=0"),
        (lambda: commonest(0, 2), "n >= 1 and V >= 1, got n=0"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_query_without_its_item_is_refused():
    task = RelationalRetrieval(N=2, C=1, W=1, K=3)
    items = torch.tensor([[[0, 1], [2, 0]]])
    with pytest.raises(ValueError, match="some find no item, or several"):
        task.answer(items, torch.tensor([[[0, 1, 0]]]))
