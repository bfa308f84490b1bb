"""The trained composition task: prompts can be read back, answers are compositions, masks hide queries."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib.tasks.hops import ORDERS, PermutationHops

tasks = st.builds(
    PermutationHops,
    n=st.integers(2, 9),
    K=st.integers(1, 4),
    order=st.sampled_from(ORDERS),
    tables_read=st.sampled_from(["earlier", "all"]),
)


def follow(tables: list[list[int]], x: int, k: int) -> int:
    """The definition in plain Python: z_k(... z_1(x))."""
    for z in tables[:k]:
        x = z[x]
    return x


def test_the_answer_is_the_composition_for_every_pair_of_permutations():
    task, checked = PermutationHops(n=3, K=2), 0
    permutations = [list(z) for z in itertools.permutations(range(3))]
    for pair in itertools.product(permutations, repeat=2):
        for k in (0, 1, 2):
            answer = task.answer(torch.tensor([pair]), torch.tensor([[0, 1, 2]]), torch.full((1, 3), k))
            assert answer[0].tolist() == [follow(pair, x, k) for x in range(3)]
            checked += 3
    assert checked == 6 * 6 * 3 * 3


@settings(deadline=None)
@given(task=tasks, step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1))
def test_a_prompt_can_be_read_back_from_the_names_of_its_rows(task, step, seed):
    prompts = task.batch(step, seed=seed, size=2)
    assert prompts.tokens.shape == (2, task.length, 3)
    for b in range(2):
        tables = [[None] * task.n for _ in range(task.K)]
        queries = []
        for token in prompts.tokens[b].tolist():
            words = [task.row(index).split() for index in token]
            if words[0] == ["query"]:
                assert [word[0] for word in words] == ["query", "value", "hops"]
                queries.append((int(words[1][1]), int(words[2][1])))
            else:
                assert [word[0] for word in words] == ["key", "value", "table"]
                tables[int(words[2][1]) - 1][int(words[0][1])] = int(words[1][1])
        assert all(sorted(z) == list(range(task.n)) for z in tables), "every table is a permutation"
        assert sorted(x for x, _ in queries) == list(range(task.n)), "every x is asked once"
        answer = task.answer(prompts.tables, prompts.x, prompts.hops)[b].tolist()
        assert answer == [follow(tables, x, k) for x, k in queries]


@settings(deadline=None)
@given(task=tasks, l=st.integers(1, 6), step=st.integers(0, 100))
def test_deep_supervision_asks_for_the_value_after_as_many_hops_as_layers(task, l, step):
    prompts = task.batch(step, seed=1, size=3)
    target = task.after_layer(prompts, l).tolist()
    for b, (tables, xs, hops) in enumerate(
        zip(prompts.tables.tolist(), prompts.x.tolist(), prompts.hops.tolist(), strict=True)
    ):
        assert target[b] == [follow(tables, x, min(l, k)) for x, k in zip(xs, hops, strict=True)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tables_read", ["earlier", "all"])
@pytest.mark.parametrize("n, K", [(2, 1), (3, 2), (4, 3)])
def test_queries_read_all_tables_and_never_each_other(n, K, order, tables_read):
    mask = PermutationHops(n, K, order, tables_read).mask()
    for row, column in itertools.product(range((K + 1) * n), repeat=2):
        column_is_table, row_is_table = column < K * n, row < K * n
        if row_is_table:
            expected = column_is_table and (tables_read == "all" or column <= row)
        else:
            expected = column_is_table or column == row
        assert bool(mask[row, column]) == expected


@pytest.mark.parametrize("order, first", [("last-first", "table 3"), ("first-first", "table 1")])
def test_the_order_says_which_table_is_listed_first(order, first):
    task = PermutationHops(n=4, K=3, order=order)
    tokens = task.batch(0, seed=0, size=1).tokens[0]
    assert [task.row(int(token[2])) for token in tokens[:4]] == [first] * 4


@settings(deadline=None)
@given(task=tasks)
def test_every_embedding_row_has_one_name_and_every_row_is_used(task):
    names = [task.row(i) for i in range(task.vocab)]
    assert len(set(names)) == task.vocab == 2 * task.n + 2 * task.K + 1
    assume(task.n >= task.K)  # otherwise one prompt has fewer queries than hop counts
    used = task.batch(0, seed=0, size=1, mix=range(1, task.K + 1)).tokens.flatten().tolist()
    assert set(used) == set(range(task.vocab))


def test_a_batch_is_a_function_of_seed_and_step_alone():
    task = PermutationHops(n=8)
    torch.manual_seed(0)
    first = task.batch(7, seed=3, size=4)
    torch.manual_seed(1)
    task.batch(8, seed=3, size=4)
    assert all(a.equal(b) for a, b in zip(first, task.batch(7, seed=3, size=4), strict=True))
    assert not first.tables.equal(task.batch(8, seed=3, size=4).tables)
    assert not first.tables.equal(task.batch(7, seed=4, size=4).tables)


def test_all_permutations_are_equally_likely():
    task = PermutationHops(n=3, K=1)
    tables = task.batch(0, seed=0, size=6000).tables[:, 0]
    counts = (tables @ torch.tensor([9, 3, 1])).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 6
    # chi-square with 5 degrees of freedom: above 20.5 in one of 1000 seeds
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 20.5


def test_the_recipe_mixes_one_short_query_with_three_long_ones():
    assert PermutationHops(n=8, K=2).batch(0, seed=0, size=1).hops.tolist() == [[1, 2, 2, 2, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PermutationHops(n=1), "n >= 2, got n=1"),
        (lambda: PermutationHops(n=4, K=0), "K >= 1, got K=0"),
        (lambda: PermutationHops(n=4, order="last-frist"), "did you mean 'last-first'"),
        (lambda: PermutationHops(n=4, tables_read="al"), "did you mean 'all'"),
        (lambda: PermutationHops(n=4).batch(0, seed=0, size=1, mix=(1, 3)), "hop counts lie in 1 .. 2"),
        (lambda: PermutationHops(n=4).batch(0, seed=0, size=0), "at least one prompt"),
        (
            lambda: PermutationHops(n=4).after_layer(PermutationHops(n=4).batch(0, seed=0, size=1), 0),
            "from 1",
        ),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
