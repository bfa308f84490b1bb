"""Two-layer certificates against both conditions in fractions, the facts' table, and an exact search."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.metrics.bounds import check_two_layer, two_layer_certificate, two_layer_estimate
from lib.metrics.two_layer import _at, _largest_s, np

FACTS = {2: (21, 5, 6, 10, 2, 128, 214, 234.999), 4: (115, 6, 44, 56, 2, 807, 2512, 2546.22),
         8: (717, 11, 280, 234, 3, 8606, 39760, 40013.80),
         16: (4854, 29, 1764, 1103, 4, 145622, 840560, 875413.95),
         21: (10838, 37, 4250, 2125, 5, 411846, 2834517, 2927624.50)}
WHOLE = st.integers(1, 12)


def conditions(beta, m, n_1, s, x_0, x_1):
    """(i) and (ii) as they are displayed, in fractions."""
    if not (0 <= s <= m and 1 <= x_0 <= m):
        return False
    ways = Fraction(math.factorial(m), math.factorial(s) * math.factorial(m - s))
    first = ways * Fraction(s, m) ** (x_0 * x_1) * Fraction(2) ** (x_1 * beta * n_1) < 1
    left = beta * n_1 + beta * (x_1 * m + n_1 * x_0 + x_0)
    return first and Fraction(2) ** left < Fraction(m * n_1) ** (n_1 * (s + 1))


@given(st.integers(1, 4), WHOLE, WHOLE, st.integers(0, 14), WHOLE, st.integers(1, 4))
def test_the_check_is_the_two_conditions(beta, m, n_1, s, x_0, x_1):
    assert check_two_layer(beta, m, n_1, s, x_0, x_1) == conditions(beta, m, n_1, s, x_0, x_1)


@pytest.mark.parametrize("beta", FACTS)
def test_the_certificates_of_the_facts_hold(beta):
    m, n_1, s, x_0, x_1, tokens, left, right = FACTS[beta]
    assert check_two_layer(beta, m, n_1, s, x_0, x_1) and tokens == 2 + m + m * n_1
    assert beta * n_1 + beta * (x_1 * m + n_1 * x_0 + x_0) == left
    assert abs(n_1 * (s + 1) * math.log2(m * n_1) - right) < 0.01


def test_the_first_condition_is_as_far_from_equality_as_the_facts_say():
    for beta, log2 in {2: -0.419, 4: -0.565, 8: -1.33}.items():
        m, n_1, s, x_0, x_1, *_ = FACTS[beta]
        left = math.log2(math.comb(m, s)) + x_0 * x_1 * math.log2(s / m) + x_1 * beta * n_1
        assert abs(left - log2) < 0.005


@pytest.mark.parametrize("beta", [1, 2, 3, 4, 8, 16, 21])
def test_the_search_finds_shorter_prompts_than_the_facts_and_stops_at_the_least_m(beta):
    found = two_layer_certificate(beta)
    m, n_1, tokens = found
    assert tokens == 2 + m + m * n_1 and found.beta == beta and found.x_0 <= m and 1 <= found.s < m
    if beta <= 8:
        assert conditions(beta, m, n_1, found.s, found.x_0, found.x_1)
    assert check_two_layer(beta, m, n_1, found.s, found.x_0, found.x_1)
    assert found.frozen_bits < found.table_bits
    assert _at(beta, m - 1, n_1) is None, "the next smaller m that the search tries fails"
    if beta in FACTS:
        assert tokens <= FACTS[beta][5]


@pytest.mark.parametrize("beta", [1, 2, 3])
def test_no_integers_at_all_prove_a_smaller_m(beta):
    """Every x_0, x_1 and s >= 1 at (m - 1, n_1), decided exactly: the search missed nothing there."""
    m, n_1, _ = two_layer_certificate(beta)
    m, tried = m - 1, 0
    for x_1 in range(1, int(n_1 * math.log2(m * n_1) / beta) + 1):
        for x_0 in range(1, m + 1):
            for s in range(1, m + 1):
                tried += 1
                assert not check_two_layer(beta, m, n_1, s, x_0, x_1), (s, x_0, x_1)
    assert tried >= m * m


@pytest.mark.parametrize("beta, m, n_1, balls, x_1", [
    (2, 21, 5, 20, 2), (4, 115, 6, 112, 2), (8, 300, 9, 500, 3)])
def test_the_largest_s_is_the_largest(beta, m, n_1, balls, x_1):
    def first(s):
        return math.comb(m, s) * s**balls * 2 ** (x_1 * beta * n_1) < m**balls

    s = int(_largest_s(beta, m, n_1, np.array([balls]), x_1)[0])
    assert [first(k) for k in range(m + 1)] == [True] * (s + 1) + [False] * (m - s)


def test_integers_outside_the_theorem_prove_nothing():
    assert not check_two_layer(2, 21, 5, 10**3, 10, 2), "s > m: binom(m, s) = 0 would satisfy (i)"
    assert not check_two_layer(2, 21, 5, 6, 22, 2), "x_0 > m"
    assert not check_two_layer(2, 21, 5, -1, 10, 2) and not check_two_layer(0, 21, 5, 6, 10, 2)


def test_more_bits_break_a_certificate():
    found = two_layer_certificate(8)
    (m, n_1, _), (s, x_0, x_1, beta) = found, (found.s, found.x_0, found.x_1, found.beta)
    assert check_two_layer(beta, m, n_1, s, x_0, x_1)
    assert not check_two_layer(beta + 1, m, n_1, s, x_0, x_1)


def test_one_reachable_place_is_cheap_and_composes_nothing():
    """Why the search asks for s >= 1: with m = 1 the task is one look-up, of w in z_2."""
    assert check_two_layer(2, 1, 21, 0, 1, 1) and 2 + 1 + 21 < two_layer_certificate(2).tokens


@pytest.mark.slow
@pytest.mark.parametrize("beta, log2", [
    (2, 8.8), (8, 14.9), (32, 23.2), (128, 32.6), (512, 42.6), (2048, 53.1)])
def test_the_estimate_for_large_budgets_is_that_of_the_facts(beta, log2):
    found = two_layer_estimate(beta)
    assert log2 - 0.3 < math.log2(found.tokens) < log2 + 0.05
    (m, n_1, _), x_0, x_1 = found, found.x_0, found.x_1
    assert x_0 / 2 * math.log2(2 * m / (math.e * x_0 * x_1)) >= (2 * beta * n_1 + 1 / x_1) * (1 - 1e-9)
    left = 2 * x_1 * beta * n_1 + 1 + beta * (x_1 * m + n_1 * x_0 + x_0)
    assert left < n_1 * x_0 * x_1 / 2 * math.log2(m * n_1)


@pytest.mark.parametrize("beta", [0, 33, 2.0, True])
def test_budgets_that_are_not_searched_are_refused(beta):
    with pytest.raises(ValueError, match="1 … 32"):
        two_layer_certificate(beta)
    if beta != 33:
        with pytest.raises(ValueError, match=">= 1"):
            two_layer_estimate(beta)
