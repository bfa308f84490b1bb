"""L-step sequential composition against its definition in plain Python, on every input of small worlds."""

import doctest
import itertools
import math

import pytest
import torch

import lib.tasks.composition as module
from lib.tasks.composition import ENUMERABLE, ORDERS, Instances, SequentialComposition

SMALL = [(3, ()), (1, (2,)), (2, (2,)), (3, (1,)), (1, (2, 2)), (2, (1, 2)), (2, (1, 1, 1))]
SIZES = [*SMALL, (2, (3,)), (3, (2, 2)), (2, (2, 1, 3)), (4, (1, 5)), (2, (2,) * 6)]


def steps(m, ns, z0, tables, w):
    """i_0 … i_L from the definition: tables as dictionaries from (w, i) to values."""
    i, found = z0, [z0]
    for l, z in enumerate(tables, 1):
        if l == 1:
            i = dict(enumerate(z))[i]
        else:
            inner = m * math.prod(ns[: l - 2])
            pairs = itertools.product(range(ns[l - 2]), range(inner))
            i = dict(zip(pairs, z, strict=True))[w[l - 2], i]
        found.append(i)
    return found


def plain(instances):
    """The instances of a batch as plain Python numbers."""
    return zip(instances.z0.tolist(), zip(*(z.tolist() for z in instances.tables), strict=True),
               instances.w.tolist(), strict=True)


@pytest.mark.parametrize("m, ns", SMALL)
def test_every_step_is_the_definition_on_every_input(m, ns):
    task, seen = SequentialComposition(m, ns), []
    for batch in task.all_inputs(chunk=1000):
        for (z0, tables, w), found in zip(plain(batch), task.steps(batch).tolist(), strict=True):
            assert found == steps(m, ns, z0, tables, w)
            seen.append((*itertools.chain(*reversed(tables)), z0, *w))
    assert len(set(seen)) == len(seen) == task.n_inputs and seen == sorted(seen), "each once, counting"


@pytest.mark.parametrize("m, ns, count", [
    (3, (), 81), (2, (2,), 4096), (3, (1,), 2187), (2, (3,), 1_119_744), (3, (2,), 7_558_272),
    (2, (1, 2), 16_384), (4, (1,), 262_144), (3, (1, 1, 1), 1_594_323), (2, (1,) * 7, 131_072),
    (2, (2, 1), 1_048_576), (2, (2, 2), 2**37),
])
def test_the_number_of_inputs_is_the_one_of_the_page(m, ns, count):
    assert SequentialComposition(m, ns).n_inputs == count


@pytest.mark.parametrize("m, ns", SIZES)
def test_a_sample_is_answered_by_the_definition(m, ns):
    task = SequentialComposition(m, ns)
    batch = task.sample(50, seed=1)
    expected = [steps(m, ns, *one) for one in plain(batch)]
    assert task.steps(batch).tolist() == expected
    assert task.answer(batch).tolist() == [found[-1] for found in expected]


def test_one_step_fewer_switches_is_composition_of_two_functions():
    """With n_1 = 1 two steps are z_2(z_1(z_0)) on [m]."""
    task = SequentialComposition(4, (1,))
    batch = task.sample(200, seed=0)
    assert task.answer(batch).tolist() == [z2[z1[x]] for x, (z1, z2), _ in plain(batch)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m, ns", SIZES)
def test_a_prompt_says_the_whole_instance_and_nothing_about_its_answer(m, ns, order):
    task = SequentialComposition(m, ns)
    batch = task.sample(5, seed=2)
    tokens = task.tokens(batch, order=order)
    assert tokens.shape == (5, task.prompt_length, max(4, task.L))
    assert 0 <= tokens.min() and tokens.max() < task.vocab == len(task.symbols) == len(set(task.symbols))
    for row, (z0, tables, w) in zip(tokens.tolist(), plain(batch), strict=True):
        said = [{task.row(symbol) for symbol in token} - {"none"} for token in row]
        parts = {"z_0": [{"z_0", f"value {z0}"}], "w": [{"w"} | {f"w_{l}={v}" for l, v in enumerate(w, 1)}]}
        parts["z_1"] = [{"z_1", f"at i={i}", f"value {v}"} for i, v in enumerate(tables[0])]
        for l in range(2, task.L + 1):
            pairs = itertools.product(range(ns[l - 2]), range(m * math.prod(ns[: l - 2])))
            parts[f"z_{l}"] = [{f"z_{l}", f"at w_{l - 1}={a}", f"at i={i}", f"value {v}"}
                               for (a, i), v in zip(pairs, tables[l - 1], strict=True)]
        up = [f"z_{l}" for l in range(1, task.L + 1)]
        listed = {"paper": [*up[::-1], "z_0", "w"], "z_1-first": [*up, "z_0", "w"],
                  "w-first": ["w", *up[::-1], "z_0"]}[order]
        assert said == [token for part in listed for token in parts[part]]
        assert list(task.places(order)) == listed


def test_all_inputs_can_be_shared_out():
    task = SequentialComposition(2, (2,))
    whole = next(task.all_inputs())
    parts = [*task.all_inputs(stop=1000), *task.all_inputs(first=1000, chunk=700)]
    assert [len(part.z0) for part in parts] == [1000, 700, 700, 700, 700, 296]
    assert torch.equal(torch.cat([part.tables[1] for part in parts]), whole.tables[1])


def test_a_sample_is_a_function_of_its_seed_and_covers_the_values():
    task = SequentialComposition(3, (2,))
    first, again, other = task.sample(300, seed=1), task.sample(300, seed=1), task.sample(300, seed=2)
    drawn = task.sample(300, generator=torch.Generator().manual_seed(1))
    for batch in (again, drawn):
        assert all(torch.equal(a, b) for a, b in zip(first.tables, batch.tables, strict=True))
        assert torch.equal(first.z0, batch.z0) and torch.equal(first.w, batch.w)
    assert not torch.equal(first.tables[1], other.tables[1])
    assert first.tables[1].unique().tolist() == [0, 1, 2, 3, 4, 5] and first.w.unique().tolist() == [0, 1]


@pytest.mark.parametrize("m, ns", [(0, (2,)), (2, (0,)), (2.0, ()), (2, 3), (True, ()), (2, (2, -1))])
def test_sizes_that_are_not_positive_integers_are_refused(m, ns):
    with pytest.raises(ValueError, match="sizes are integers >= 1"):
        SequentialComposition(m, ns)


def test_a_world_too_large_to_list_names_the_limit():
    with pytest.raises(ValueError, match=f"137,438,953,472 inputs, more than the {ENUMERABLE:,}"):
        next(SequentialComposition(2, (2, 2)).all_inputs())
    with pytest.raises(ValueError, match=r"about 10\^"):
        next(SequentialComposition(4, (4, 4)).all_inputs())


def test_batches_of_the_wrong_shape_or_counted_from_one_are_refused():
    task = SequentialComposition(2, (2,))
    z0, tables, w = task.sample(3, seed=0)
    with pytest.raises(ValueError, match=r"tables \(B, N\) with N = \(2, 4\)"):
        task.answer(Instances(z0, tables[::-1], w))
    with pytest.raises(ValueError, match="z_2 lies in 0 … 3, but holds"):
        task.tokens(Instances(z0, (tables[0], tables[1] + 1), w))
    with pytest.raises(ValueError, match=r"w \(B, 1\)"):
        task.answer(Instances(z0, tables, w[:, :0]))
    with pytest.raises(ValueError, match="did you mean 'w-first'"):
        task.tokens(Instances(z0, tables, w), order="w first")
    for options in ({"size": 0, "seed": 0}, {"size": 3}):
        with pytest.raises(ValueError, match="takes a seed or a generator"):
            task.sample(**options)
    with pytest.raises(ValueError, match="0 <= first <= stop <= 4096"):
        next(task.all_inputs(stop=5000))


def test_the_worked_example_holds():
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
