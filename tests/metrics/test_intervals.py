import itertools
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.metrics.intervals import bootstrap, paired_bootstrap, proportion, student

STATISTICS = {"mean": lambda v: sum(v) / len(v), "median": lambda v: (sorted(v)[1] + sorted(v)[2]) / 2}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_bootstrap_interval_cuts_the_tails_of_all_256_resamples_of_four_values(statistic, level):
    sample = [0.0, 1.0, 3.0, 10.0]
    every = sorted(STATISTICS[statistic](part) for part in itertools.product(sample, repeat=4))
    assert len(every) == 4**4
    lo, hi = bootstrap(sample, statistic, seed=0, level=level)
    tail = (1 - level) / 2
    slack = 5 * math.sqrt(
        tail * (1 - tail) / 10_000
    )  # five standard errors of 10,000 draws; the seed is fixed
    for end, below in ((lo, tail), (hi, 1 - tail)):
        assert sum(v < end for v in every) / 256 <= below + slack
        assert sum(v <= end for v in every) / 256 >= below - slack


@pytest.mark.parametrize("n, covered", [(3, 0.75), (5, 0.83), (10, 0.90), (20, 0.92)])
def test_the_bootstrap_covers_what_its_docstring_admits(n, covered):
    generator, runs = np.random.default_rng(0), 1500
    found = [bootstrap(generator.standard_normal(n), seed=run, resamples=500) for run in range(runs)]
    share = sum(lo <= 0 <= hi for lo, hi in found) / runs
    assert abs(share - covered) < 0.03  # three standard errors of 1,500 runs; the seeds are fixed


def test_the_same_seed_gives_the_same_interval_and_another_seed_a_close_one():
    sample = np.random.default_rng(1).standard_normal(30)
    first, again, other = (bootstrap(sample, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert np.allclose(first, other, atol=0.05)
    assert first.lo < sample.mean() < first.hi


def test_a_large_sample_is_resampled_in_chunks_of_bounded_memory():
    sample = np.arange(50_000.0)
    lo, hi = bootstrap(sample, seed=0, resamples=200)
    half = 1.96 * sample.std() / math.sqrt(len(sample))  # the normal approximation
    assert np.allclose([lo, hi], [sample.mean() - half, sample.mean() + half], atol=half / 3)


def test_pairs_are_resampled_whole():
    baseline = np.random.default_rng(0).normal(size=20, scale=100)
    assert np.allclose(paired_bootstrap(baseline + 1, baseline, seed=0), (1, 1))
    assert paired_bootstrap(baseline + 1, baseline[::-1], seed=0).lo < -1  # the control: pairs torn apart


def test_series_are_paired_by_name_or_not_at_all():
    ours = pd.Series([1.0, 2.0, 3.0], index=[0, 1, 2])
    assert paired_bootstrap(ours, ours - 1, seed=0) == (1, 1)
    with pytest.raises(ValueError, match=r"\[0, 1, 2\] and \[2, 1, 0\]; align them"):
        paired_bootstrap(ours, ours[::-1], seed=0)


@pytest.mark.parametrize(
    "sample, message",
    [([1, 2], "at least 3"), ([], "at least 3"), ([[1, 2, 3]], "flat"), ([1, 2, math.nan], "not finite")],
)
def test_a_sample_that_carries_no_interval_is_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(sample, seed=0)


def test_unequal_pairs_and_misspelt_statistics_and_levels_are_refused():
    with pytest.raises(ValueError, match="equal lengths"):
        paired_bootstrap([1, 2, 3], [1, 2], seed=0)
    with pytest.raises(ValueError, match="did you mean 'median'"):
        bootstrap([1, 2, 3], "medain", seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap([1, 2, 3], seed=0, level=95)
    with pytest.raises(ValueError, match="level"):
        proportion(1, 2, level=1)


def tail(n, p, successes):
    """P[X in successes] for X binomial(n, p), in exact fractions."""
    p = Fraction(p)
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in successes)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_a_proportion_solve_the_equations_of_clopper_and_pearson(counts):
    k, n = counts
    lo, hi = proportion(k, n)
    if k == 0:
        assert lo == 0 and math.isclose(hi, 1 - 0.025 ** (1 / n))
    else:  # float64 ends: relative error of the tail about 40 * 2**-52
        assert math.isclose(tail(n, lo, range(k, n + 1)), 0.025, rel_tol=1e-9)
    if k == n:
        assert hi == 1 and math.isclose(lo, 0.025 ** (1 / n))
    else:
        assert math.isclose(tail(n, hi, range(k + 1)), 0.025, rel_tol=1e-9)


def test_a_proportion_is_covered_at_least_as_often_as_promised():
    n, worst, checked = 12, 1.0, 0
    ends = [proportion(k, n) for k in range(n + 1)]
    for p in (Fraction(i, 200) for i in range(1, 200)):
        worst = min(worst, tail(n, p, [k for k, (lo, hi) in enumerate(ends) if lo <= p <= hi]))
        checked += 1
    assert checked == 199 and 0.95 <= worst < 0.99


def test_a_proportion_agrees_with_the_published_table_and_with_large_counts():
    assert np.allclose(proportion(5, 10), (0.1871, 0.8129), atol=5e-5)  # any table of exact binomial limits
    lo, hi = proportion(300_000, 1_000_000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1e6)  # normal approximation, off by about 1 / trials
    assert np.allclose((lo, hi), (0.3 - half, 0.3 + half), atol=2e-6)


@pytest.mark.parametrize("successes, trials", [(-1, 3), (4, 3), (0, 0), (0.5, 3)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="0 <= successes <= trials"):
        proportion(successes, trials)


def test_students_interval_is_the_textbooks():
    half = 4.30265 * 2 / 3**0.5  # t(0.975, 2), s = 2
    lo, hi = student([4.0, 6.0, 8.0])
    assert [lo, hi] == pytest.approx([6 - half, 6 + half], rel=1e-4)


def test_students_interval_covers_five_normal_values_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(2_000, 5))
    covered = [lo <= 0 <= hi for lo, hi in map(student, draws)]
    assert 0.935 < np.mean(covered) < 0.965


@pytest.mark.parametrize("sample", [[1.0], [], [1.0, float("nan")], [[1.0, 2.0]]])
def test_students_interval_needs_two_finite_values(sample):
    with pytest.raises(ValueError, match="2 finite values or more"):
        student(sample)
