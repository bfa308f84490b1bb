"""Hops with a scratchpad: chains can be read back, masks keep chains apart, what is written is read again."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tasks.chains import ScratchpadHops

tasks = st.builds(ScratchpadHops, n=st.integers(2, 7), K=st.integers(1, 5))


def follow(tables: list[list[int]], x: int) -> list[int]:
    """The definition in plain Python: i_0 ... i_K."""
    values = [x]
    for z in tables:
        values.append(z[values[-1]])
    return values


@settings(deadline=None)
@given(task=tasks, step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1))
def test_chains_can_be_read_back_from_the_names_of_their_rows(task, step, seed):
    chains = task.batch(step, seed=seed, size=2)
    assert chains.tokens.shape == (2, task.length, 3)
    for b in range(2):
        tables = chains.tables[b].tolist()
        assert all(sorted(z) == list(range(task.n)) for z in tables), "every table is a permutation"
        words = [[task.hops.row(i).split() for i in token] for token in chains.tokens[b].tolist()]
        listed, asked = words[: task.K * task.n], words[task.chain_tokens]
        assert len(listed) == len(asked) == task.K * task.n
        for key, value, table in listed:
            assert (key[0], value[0], table[0]) == ("key", "value", "table")
            assert tables[int(table[1]) - 1][int(key[1])] == int(value[1])
        for x in range(task.n):
            path = follow(tables, x)
            assert chains.values[b, x].tolist() == path
            chain = asked[x * task.K : (x + 1) * task.K]
            assert [(int(value[1]), int(hop[1])) for _, value, hop in chain] == [
                (path[s], s + 1) for s in range(task.K)
            ]


@pytest.mark.parametrize("n, K, S", [(2, 1, 1), (3, 2, 2), (3, 3, 3), (4, 3, 2), (2, 4, 1)])
def test_a_chain_token_reads_the_tables_and_its_own_chain_so_far(n, K, S):
    mask, seen = ScratchpadHops(n, K).mask(S), 0
    for row, column in itertools.product(range(K * n + n * S), repeat=2):
        if row < K * n:
            expected = column <= row
        elif column < K * n:
            expected = True
        else:
            (chain, s), (other, r) = divmod(row - K * n, S), divmod(column - K * n, S)
            expected = chain == other and r <= s
        assert bool(mask[row, column]) == expected
        seen += expected
    assert seen == K * n * (K * n + 1) // 2 + n * S * K * n + n * S * (S + 1) // 2


def oracle(task, wrong_at=None):
    """An answerer that reads nothing but the tokens it is given, and adds 1 at one step if told to."""

    def answer(tokens, mask):
        assert mask.shape == (tokens.shape[1],) * 2
        said = []
        for prompt in tokens.tolist():
            z = {}
            for token in prompt:
                (first, *_), (_, value), (kind, number) = (task.hops.row(j).split() for j in token)
                if first == "key":
                    z[kind, int(number), int(task.hops.row(token[0]).split()[1])] = int(value)
                else:
                    found = z["table", int(number), int(value)]
                    said.append((found + (int(number) == wrong_at)) % task.n)
        return torch.tensor(said).reshape(len(tokens), -1)

    return answer


def test_free_running_reads_what_was_written_even_where_it_is_wrong():
    task = ScratchpadHops(n=5, K=4)
    chains = task.batch(0, seed=0, size=3)
    assert task.write(oracle(task), chains.tables).equal(chains.values)
    written = task.write(oracle(task, wrong_at=2), chains.tables)
    for b, x in itertools.product(range(3), range(5)):
        z = chains.tables[b].tolist()
        second = (z[1][z[0][x]] + 1) % 5
        assert written[b, x].tolist() == [x, z[0][x], second, z[2][second], z[3][z[2][second]]]
    assert not (written[..., 2:] == chains.values[..., 2:]).any(), "permutations never forget a mistake"


def test_a_batch_is_a_function_of_seed_and_step_alone():
    task = ScratchpadHops(n=6, K=3)
    first = task.batch(7, seed=3, size=4)
    torch.manual_seed(1)
    assert all(a.equal(b) for a, b in zip(first, task.batch(7, seed=3, size=4), strict=True))
    assert not first.tables.equal(task.batch(8, seed=3, size=4).tables)


@pytest.mark.parametrize("sizes, message", [((1, 2), "n >= 2"), ((4, 0), "K >= 1")])
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ScratchpadHops(*sizes)
