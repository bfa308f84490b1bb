"""Theorem A*: the certificate against its formulas, and every inequality of the proof's last step."""

import itertools
import math
from fractions import Fraction

import pytest

from lib.metrics import bounds
from lib.metrics.bounds import (
    accumulator_size,
    exponent,
    frozen_families,
    least_hdp,
    least_kappa,
    paper_certificate,
    paper_prompt_log2,
    sequential_composition_certificate,
    theorem_kappa,
)

FIBONACCI = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987]
SIZES = list(itertools.product(range(1, 8), (1, 2, 3, 16, 4096)))


def written_out(L, B, kappa):
    """m, n, x, N, c, e, S by the displayed formulas, with their closed sums; no list of families."""
    x = {l: kappa ** FIBONACCI[2 * (L - l)] for l in range(L)}
    n = {l: kappa ** FIBONACCI[2 * (L - l) + 1] for l in range(1, L)} | {0: 1}
    m = 64
    for l in range(L):
        m *= x[l]
    N = {0: m}
    for l in range(1, L):
        N[l] = N[l - 1] * n[l]
    W = math.prod(n[l] for l in range(1, L))
    tokens = {-1: 1, 0: 1} | {i: N[i - 1] for i in range(1, L + 1)}
    beta, e, c = 2 * B, {1: 2 * B * L * W}, {0: Fraction(x[0])}
    for l in range(1, L):
        low = math.prod(x[k] for k in range(l))
        frozen = x[l] * (l + 1) * N[l - 1] + W * low + (x[0] * x[1] if l == 1 else 0)
        frozen += sum(tokens[i] * math.prod(x[k] for k in range(i, l)) for i in range(l))
        e[l + 1] = x[l] * e[l] + 1 + (L - l) * beta * frozen
        c[l] = Fraction(x[l] * n[l - 1]) * c[l - 1] / 2
    return m, n, x, N, c, e, {l: n[l] * c[l] for l in range(L)}


@pytest.mark.parametrize("L, B", SIZES)
def test_the_certificate_is_the_formulas_of_the_proof(L, B):
    found = sequential_composition_certificate(L, B)
    m, n, x, N, c, e, S = written_out(L, B, 70 * L * 2**L * B)
    assert found.kappa == theorem_kappa(L, B) == 70 * L * 2**L * B
    assert found.m == m and found.x == tuple(x.values()) and found.N == tuple(N.values())
    assert found.n == tuple(n[l] for l in range(1, L))
    assert all(a == b for a, b in zip(found.c, c.values(), strict=True)), "integers, as kappa is even"
    assert found.e == tuple(e.values()) and all(a == b for a, b in zip(found.S, S.values(), strict=True))


@pytest.mark.parametrize("L, B", SIZES)
def test_every_inequality_of_the_last_step_holds(L, B):
    found, kappa, beta = sequential_composition_certificate(L, B), theorem_kappa(L, B), 2 * B
    assert found.holds and found.largest_ratio < 1 and len(found.conditions) == 2 + 3 * (L - 1)
    m, n, x, N, c, e, S = written_out(L, B, kappa)

    def over(values, low, high=L):
        return math.prod(values[k] for k in range(low, high))

    for l in range(1, L):
        assert n[l] == kappa * over(x, l) and x[l - 1] == kappa * over(n, l)
        assert N[l - 1] == x[l] * S[l - 1] * 64 * 2 ** (l - 1) * over(x, l + 1) >= 64 * x[l] * S[l - 1]
        assert S[l] == Fraction(over(x, 0, l + 1) * over(n, 1, l + 1), 2**l)
        ratio = Fraction(1, S[l])
        assert x[l] * e[l] * ratio <= Fraction(2, n[l]) <= Fraction(2, kappa**2)
        assert x[l] * (l + 1) * N[l - 1] * ratio == Fraction(64 * (l + 1) * 2**l, kappa)
        assert over(n, 1) * over(x, 0, l) * ratio == Fraction(2**l, kappa)
        assert over(x, 0, l) * ratio <= Fraction(2**l, kappa)
        for i in range(1, l):
            assert N[i - 1] * over(x, i, l) * ratio <= Fraction(64 * 2**l, kappa**4)
        assert (L - l) * beta * 2**l <= Fraction(kappa, 70 * L)
        assert Fraction(e[l + 1], S[l]) <= (
            Fraction(64 * L + 2, 70 * L) + Fraction(2, kappa) + Fraction(2, kappa**2) + Fraction(1, kappa**3))
    assert Fraction(64 * max(L, 2) + 2, 70 * max(L, 2)) + Fraction(2, 560) + Fraction(3, 560**2) < 1
    assert Fraction(e[1], S[0]) == Fraction(2 * B * L, kappa)
    assert N[L - 1] == 64 * kappa ** exponent(L)
    assert found.prompt_length == 2 + sum(N.values()) <= 65 * kappa ** exponent(L)


def test_the_largest_ratios_are_those_of_the_facts():
    for (L, B), ratio in {(2, 1): 0.92144, (3, 1): 0.91905, (7, 1): 0.91633}.items():
        assert round(float(sequential_composition_certificate(L, B).largest_ratio), 5) == ratio


@pytest.mark.parametrize("L, B, theorem, least, finer", [
    (2, 1, (560, 60.8), (18, 31.0), (18, 31.0)), (2, 16, (8960, 84.8), (166, 50.3), (166, 50.3)),
    (2, 4096, (2293760, 132.8), (22974, 92.9), (22974, 92.9)),
    (3, 1, (1680, 209.6), (518, 177.3), (414, 171.2)), (3, 16, (26880, 285.6), (8258, 253.2), (6606, 247.1)),
    (3, 4096, (6881280, 437.6), (2113538, 405.2), (1690830, 399.1)),
    (4, 1, (4480, 648.9), (1546, 567.5), (1030, 536.4)),
    (4, 16, (71680, 860.9), (24706, 779.4), (16470, 748.4)),
    (5, 1, (11200, 1916.1), (4114, 1710.9), (2350, 1596.2))])
def test_kappa_and_prompt_lengths_are_those_of_the_facts(L, B, theorem, least, finer):
    kappas = theorem_kappa(L, B), least_kappa(L, B), least_kappa(L, B, finer=True)
    for kappa, how, expected in zip(kappas, (False, False, True), (theorem, least, finer), strict=True):
        found = sequential_composition_certificate(L, B, kappa=kappa, finer=how)
        assert found.holds and (kappa, round(math.log2(found.prompt_length), 1)) == expected
    for kappa, how in zip(kappas[1:], (False, True), strict=True):
        assert not sequential_composition_certificate(L, B, kappa=kappa - 2, finer=how).holds


def test_a_budget_twice_as_large_breaks_a_least_certificate():
    kappa = least_kappa(3, 4)
    assert sequential_composition_certificate(3, 4, kappa=kappa).holds
    broken = sequential_composition_certificate(3, 8, kappa=kappa)
    assert not broken.holds and [c.name for c in broken.conditions if not c.holds]


@pytest.mark.parametrize("L, B, log2", [(2, 1, 448), (2, 16, 896), (3, 1, 7334), (4, 16, 126432)])
def test_the_papers_parameters_satisfy_the_same_conditions(L, B, log2):
    found = paper_certificate(L, B)
    assert found.holds and found.prompt_length.bit_length() - 1 == log2
    assert sequential_composition_certificate(L, B).prompt_length < found.prompt_length


def test_the_families_are_counted_one_by_one():
    """Stage by stage, against the sentences of step 4: who, in which epochs, for which inputs."""
    for stage in range(1, 6):
        families = [family[1:] for family in frozen_families(stage)]
        expected = [(stage, t, stage, stage) for t in range(1, stage + 2)]
        expected += [(i, stage + 1, i, stage - 1) for i in range(-1, stage) if (stage, i) != (1, 0)]
        expected += [(0, 1, 0, 0), (0, 2, 0, 1)] if stage == 1 else []
        assert sorted(families) == sorted(expected) and len(set(families)) == len(families)
    assert [family[1:] for family in frozen_families(0)] == [(-1, 1, -1, -1)]


def test_the_exponents_are_fibonacci_numbers_less_two():
    assert [exponent(L) for L in range(1, 8)] == [F - 2 for F in FIBONACCI[4:17:2]]
    assert [exponent(L) for L in range(1, 6)] == [1, 6, 19, 53, 142]
    for L in range(1, 8):
        a = [FIBONACCI[2 * (L - l)] for l in range(L)]
        b = [FIBONACCI[2 * (L - l) + 1] for l in range(1, L)]
        assert exponent(L) == sum(a) + sum(b) and exponent(L) <= 1.18 * 2.618**L


@pytest.mark.parametrize("L", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 64, 65 * 140, 10**6, 10**12, 2**200])
def test_least_hdp_is_the_least_budget_that_is_not_excluded(L, n):
    B = least_hdp(L, n)
    assert 65 * theorem_kappa(L, B) ** exponent(L) > n
    assert B == 1 or 65 * theorem_kappa(L, B - 1) ** exponent(L) <= n
    closed = (n / 65) ** (1 / exponent(L)) / (70 * L * 2**L)
    assert B == max(1, math.ceil(closed)) or abs(closed - round(closed)) < 1e-6


def test_the_papers_bound_read_literally():
    assert paper_prompt_log2(2, 4096) == 3072 and paper_prompt_log2(1, 2) == 16
    assert paper_prompt_log2(3, 4) == 2 * 4096


@pytest.mark.parametrize("tokens, weight_bits, value_bits, p", [
    (7, 0, 2, 4), (7, 1, 2, 5), (7, 6, 2, 10), (15, 0, 2, 5), (15, 7, 2, 12), (63, 9, 2, 16), (10, 3, 4, 11)])
def test_an_accumulator_holds_the_largest_sum(tokens, weight_bits, value_bits, p):
    assert accumulator_size(tokens, weight_bits=weight_bits, value_bits=value_bits) == p
    largest = tokens * 2**weight_bits * (2 ** (value_bits - 1) - 1)
    assert -(2 ** (p - 1)) <= -largest and largest <= 2 ** (p - 1) - 1 < 2 * largest + 1


@pytest.mark.parametrize("call, message", [
    (lambda: sequential_composition_certificate(0, 1), "L is an integer >= 1"),
    (lambda: sequential_composition_certificate(2, 0), "B is an integer >= 1"),
    (lambda: sequential_composition_certificate(2, 1, kappa=561), "kappa is even"),
    (lambda: sequential_composition_certificate(2, 1, kappa=-2), "kappa is an integer >= 1"),
    (lambda: least_hdp(2, 0), "n is an integer >= 1"),
    (lambda: paper_prompt_log2(2, 0), "hdp is an integer >= 1"),
    (lambda: accumulator_size(4, weight_bits=-1, value_bits=2), "weight_bits >= 0")])
def test_impossible_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_bounds_have_one_door():
    assert bounds.two_layer_certificate and bounds.check_two_layer and bounds.largest_allowed_n
