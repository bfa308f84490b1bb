import pytest

from lib.metrics.bounds import largest_allowed_n, least_product
from lib.metrics.frontier import (
    best_block,
    built_product,
    built_width,
    cube_frontier,
    frontier,
    growth_exponent,
    least_largest_size,
    reach,
)
from lib.models.constructions import proposition_t, proposition_t_many_heads


@pytest.mark.parametrize(("n", "s"), [(2, 1), (3, 3), (9, 3), (16, 4), (20, 7), (36, 1), (36, 6), (36, 36)])
def test_the_formula_of_the_product_is_what_the_weights_take(n, s):
    size = proposition_t(n, s).size()
    assert size["product"] == built_product(n, s)
    assert size["max_width"] <= built_width(n, s)


@pytest.mark.parametrize("n", [*range(1, 200), 1_000, 4_095])
def test_no_block_size_beats_the_best_block(n):
    assert built_product(n, best_block(n)) == min(built_product(n, s) for s in range(1, n + 1))


@pytest.mark.parametrize("n", [16, 36, 100, 400, 1_000])
def test_no_construction_lies_below_what_the_theorem_demands(n):
    [row] = frontier([n]).to_dict("records")
    exact = least_product(n, built_width(n, row["s"]))
    assert row["demanded"] <= exact <= row["built"]
    widths = [built_width(n, row["s"])] * (row["s"] + 3)
    assert largest_allowed_n(2, -(-n // row["s"]), widths) >= n


def test_what_is_built_and_what_is_excluded_differ_by_less_than_five_from_4096_on():
    ratio = frontier([2**e for e in range(12, 21)])["ratio"]
    assert len(ratio) == 9 and ratio.max() < 5
    assert frontier([64])["ratio"].item() > 5              # and not by so little from the start


@pytest.mark.parametrize("n", [2, 10, 100, 1024])
def test_the_least_largest_size_is_the_first_that_the_theorem_allows(n):
    allowed = [largest_allowed_n(M, M - 1, [n] * (M - 1)) >= n for M in range(2, 12)]
    assert allowed.index(True) + 2 == least_largest_size(n)


def test_some_size_must_grow_as_the_cube_root_of_n():
    assert growth_exponent(2**10, 2**30) == pytest.approx(1 / 3, abs=0.01)


def test_the_reach_of_a_layer_is_what_each_theorem_allows():
    table = reach([1, 16], heads=2, mlp_widths=[64], theorems=["B**", "generic-VC"])
    assert table["product"].tolist() == [8, 68]
    assert table["B**"].tolist() == [largest_allowed_n(2, d, [64]) for d in (1, 16)]
    assert (table["generic-VC"] > table["B**"]).all()


@pytest.mark.parametrize(("n", "s"), [(4, 0), (4, 5)])
def test_a_block_size_outside_the_table_is_refused(n, s):
    with pytest.raises(ValueError, match="between 1 and n=4"):
        built_product(n, s)


@pytest.mark.parametrize("m", [2, 3])
def test_the_cube_takes_what_the_weights_of_many_heads_take(m):
    [row] = cube_frontier([m]).to_dict("records")
    size = proposition_t_many_heads(m, m, m).size()
    assert row["n"] == m**3 and size["max_width"] <= 2 * m**3 + 5
    assert row["built"] == max(size["heads"], size["value_dim"] + 1, size["hidden_layers"] + 1)


def test_the_cube_demands_the_same_power_of_n_that_it_takes_and_the_generic_bound_nothing():
    table = cube_frontier([2**e for e in range(2, 9)])
    ratio = table["built"] / table["demanded"]
    assert (table["demanded"] <= table["built"]).all() and ratio.iloc[-1] < 1.3 * ratio.iloc[-2]
    assert (table["generic"] == 2).all()                     # at width 2n + 5 it excludes no layer at all
    with pytest.raises(ValueError, match="sides m >= 2"):
        cube_frontier([1])
