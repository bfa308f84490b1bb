"""The bounds against an independent linear scan, the table of the page, and their own monotonicity.

Oracle: the inequalities are evaluated with 120-digit decimals straight from the page, one n after another.
"""

import doctest
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.metrics.bounds as bounds
from lib.metrics.bounds import (
    THEOREMS,
    largest_allowed_n,
    largest_allowed_n_binomial,
    least_bits,
    least_product,
    required_product,
)

# Smallest impossible n: (H, d, widths) -> B*, B**, and for H = 1 the one-head forms; the page's own table.
TABLE = {
    (1, 1, ()): (11, 6, 7, 5),
    (1, 1, (16,)): (37, 11, 30, 9),
    (1, 4, (64,)): (100, 23, 86, 20),
    (1, 16, (64,)): (333, 60, 291, 54),
    (1, 64, (256,)): (1418, 203, 1265, 185),
    (2, 16, (64,)): (743, 116),
    (4, 16, (256,)): (1793, 245),
    (8, 64, (256,)): (14852, 1602),
    (8, 64, (4096,)): (17148, 1794),
    (12, 64, (3072,)): (26365, 2644),
    (12, 768, (3072,)): (311891, 25984),
}
GENERIC = {
    (1, 1, (16,)): 849,
    (1, 4, (64,)): 16341,
    (1, 16, (64,)): 195093,
    (2, 16, (64,)): 464305,
    (4, 16, (256,)): 3105153,
    (8, 64, (256,)): 208890241,
    (8, 64, (4096,)): 1263200641,
}
BINOMIAL = {(1, ()): 3, (1, (16,)): 25, (4, (64,)): 80}
FOUR = ("B*", "B**", "B*-one-head", "B**-one-head")

layers = st.tuples(st.integers(1, 3), st.integers(1, 6), st.lists(st.integers(1, 40), max_size=3))


def left_minus_right(n, heads, d, widths, theorem):
    """The inequality of the page at n, in 120 digits."""
    with localcontext(prec=120):
        e, k = Decimal(1).exp(), heads * (d + 1)

        def log2(z):
            z = Decimal(z.numerator) / z.denominator * e
            return z.ln() / Decimal(2).ln()

        scale = 1 if theorem.endswith("one-head") else 2
        rows = [Fraction(scale * n * s, d + 1) for s in widths]
        output = Fraction(scale * n * (n - 1 if theorem.startswith("B**") else 1), d + 1)
        right = sum(k * log2(z) + (scale - 1) for z in [*rows, output])
        left = n * Decimal(n).ln() / Decimal(2).ln() if theorem.startswith("B**") else Decimal(n)
        return left - right


def smallest_impossible_by_scan(heads, d, widths, theorem):
    n = max(2, heads * (d + 1))
    while left_minus_right(n, heads, d, widths, theorem) <= 0:
        n += 1
    return n


@pytest.mark.parametrize("layer", TABLE)
def test_the_table_of_the_page_comes_out(layer):
    expected = TABLE[layer]
    found = tuple(largest_allowed_n(*layer, theorem=theorem) + 1 for theorem in FOUR[: len(expected)])
    assert found == expected


@pytest.mark.parametrize("layer", GENERIC)
def test_the_generic_bound_excludes_from_the_n_of_the_page(layer):
    assert largest_allowed_n(*layer, theorem="generic-VC") + 1 == GENERIC[layer]


@pytest.mark.parametrize("theorem", FOUR)
@pytest.mark.parametrize("d, widths", [(1, []), (1, [16]), (2, [3, 5]), (4, [1, 1, 1]), (7, [])])
def test_the_search_agrees_with_a_linear_scan(d, widths, theorem):
    for heads in [1] if theorem.endswith("one-head") else [1, 2, 3]:
        scanned = smallest_impossible_by_scan(heads, d, widths, theorem)
        assert largest_allowed_n(heads, d, widths, theorem=theorem) == scanned - 1


@settings(deadline=None, max_examples=60)
@given(layers, st.sampled_from(FOUR))
def test_the_returned_n_satisfies_the_inequality_and_everything_above_violates_it(layer, theorem):
    heads, d, widths = layer
    heads = 1 if theorem.endswith("one-head") else heads
    n = largest_allowed_n(heads, d, widths, theorem=theorem)
    assert n >= heads * (d + 1)
    assert left_minus_right(n, heads, d, widths, theorem) < 0
    assert all(left_minus_right(m, heads, d, widths, theorem) > 0 for m in (n + 1, n + 2, 2 * n, 100 * n))


@given(layers, st.sampled_from(["B*", "B**", "generic-VC"]), st.integers(1, 40))
def test_a_larger_layer_is_never_excluded_earlier(layer, theorem, extra):
    heads, d, widths = layer
    n = largest_allowed_n(heads, d, widths, theorem=theorem)
    assert largest_allowed_n(heads + extra, d, widths, theorem=theorem) >= n
    assert largest_allowed_n(heads, d + extra, widths, theorem=theorem) >= n
    assert largest_allowed_n(heads, d, [*widths[:-1], widths[-1] + extra] if widths else [extra],
                             theorem=theorem) >= n
    assert theorem == "generic-VC" or largest_allowed_n(heads, d, [*widths, extra], theorem=theorem) >= n


@given(layers)
def test_the_sharper_theorem_excludes_no_later(layer):
    heads, d, widths = layer
    assert largest_allowed_n(heads, d, widths) <= largest_allowed_n(heads, d, widths, theorem="B*")
    for theorem in ("B*", "B**"):
        one = largest_allowed_n(1, d, widths, theorem=f"{theorem}-one-head")
        assert one <= largest_allowed_n(1, d, widths, theorem=theorem)


@given(layers, st.sampled_from(["B*", "B**"]))
def test_mlp_widths_may_come_in_any_order(layer, theorem):
    heads, d, widths = layer
    assert largest_allowed_n(heads, d, widths, theorem=theorem) == largest_allowed_n(
        heads, d, widths[::-1], theorem=theorem)


@pytest.mark.parametrize("theorem", FOUR)
def test_decimals_alone_decide_as_floats_do(theorem, monkeypatch):
    grid = [(1, d, widths) for d in (1, 3, 64) for widths in ([], [16], [3072, 5])]
    found = [largest_allowed_n(*layer, theorem=theorem) for layer in grid]
    monkeypatch.setattr(bounds.math, "log2", lambda z: float("nan"))     # no float comparison can succeed
    assert [largest_allowed_n(*layer, theorem=theorem) for layer in grid] == found


def test_sizes_beyond_floats_are_decided_too():
    n = largest_allowed_n(10**20, 10**20, [10**30])
    assert left_minus_right(n, 10**20, 10**20, [10**30], "B**") < 0
    assert left_minus_right(n + 1, 10**20, 10**20, [10**30], "B**") > 0


@pytest.mark.parametrize("d, widths", [(1, []), (1, [16]), (4, [64]), (2, [3, 3]), (5, [1])])
def test_exact_binomials_agree_with_a_linear_scan_and_never_exceed_the_closed_form(d, widths):
    def possible(n):
        patterns = [sum(math.comb(n * s, j) for j in range(d + 2)) for s in [*widths, 1]]
        return 2**n <= math.prod(patterns)

    n = largest_allowed_n_binomial(d, widths)
    assert all(possible(m) for m in range(d + 1, n + 1))
    assert not any(possible(m) for m in range(n + 1, 4 * n))
    assert n <= largest_allowed_n(1, d, widths, theorem="B*-one-head")
    assert BINOMIAL.get((d, tuple(widths)), n + 1) == n + 1


@pytest.mark.parametrize("theorem", ["B*", "B**"])
@pytest.mark.parametrize("n, width", [(2, 1), (5, 3), (17, 39), (36, 77)])
def test_the_least_product_is_the_least_over_all_shapes(n, width, theorem):
    def allowed(heads, d, depth):
        layer = (heads, d, [width] * depth)
        return n < heads * (d + 1) or left_minus_right(n, *layer, theorem) < 0

    shapes = [(H, d, depth) for H in range(1, n + 1) for d in range(1, n + 1) for depth in range(n)
              if H * (d + 1) * (depth + 1) <= n + 1]
    least = min(H * (d + 1) * (depth + 1) for H, d, depth in shapes if allowed(H, d, depth))
    assert len(shapes) > n / 2 and least_product(n, width, theorem=theorem) == least
    assert required_product(n, width, theorem=theorem) <= least


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
def test_the_least_bits_carry_every_table_and_one_bit_less_does_not(n, heads, d):
    p, accumulators = least_bits(n, heads, d), heads * (d + 1)
    assert 2 ** (accumulators * p) >= n**n
    assert p == 0 or 2 ** (accumulators * (p - 1)) < n**n
    assert p == math.ceil(round(n * math.log2(n), 9) / accumulators)   # rounded: it is whole for n = 2^j


@pytest.mark.parametrize("layer, complaint", [
    ((0, 1, []), "heads is an integer >= 1, got 0"),
    ((True, 1, []), "heads is an integer >= 1, got True"),
    ((1, 0, []), "value_dim is an integer >= 1, got 0"),
    ((1, 2.0, []), "value_dim is an integer >= 1, got 2.0"),
    ((1, 1, [16, 0]), r"mlp_widths\[1\] is an integer >= 1, got 0"),
    ((1, 1, [16.0]), r"mlp_widths\[0\] is an integer >= 1, got 16.0"),
    ((1, 1, [False]), r"mlp_widths\[0\] is an integer >= 1, got False"),
    ((1, 1, 16), r"lists the hidden layers, as in \[3072\] or \[\]; got 16"),
    ((1, 1, "16"), "lists the hidden layers"),
])
@pytest.mark.parametrize("theorem", THEOREMS)
def test_sizes_that_are_no_sizes_are_refused(layer, complaint, theorem):
    with pytest.raises(ValueError, match=complaint):
        largest_allowed_n(*layer, theorem=theorem)


def test_theorems_that_do_not_apply_are_refused():
    with pytest.raises(ValueError, match=r"unknown theorem 'B\*\*one-head'; did you mean 'B\*\*-one-head'"):
        largest_allowed_n(1, 1, [], theorem="B**one-head")
    with pytest.raises(ValueError, match=r"B\*-one-head is proved for one head, got heads=2; use 'B\*'"):
        largest_allowed_n(2, 1, [], theorem="B*-one-head")
    with pytest.raises(ValueError, match="unknown theorem"):
        least_product(5, 3, theorem="generic-VC")
    with pytest.raises(ValueError, match="n is an integer >= 2"):
        required_product(1, 3)
    with pytest.raises(ValueError, match="n is an integer >= 1"):
        least_bits(0, 1, 1)


def test_the_worked_examples_hold():
    result = doctest.testmod(bounds)
    assert result.attempted > 0 and result.failed == 0
