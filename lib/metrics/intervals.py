"""Intervals for what varies: bootstrap for means and medians, Clopper and Pearson for proportions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lib.choices import check_choice


class Interval(NamedTuple):
    """A closed interval [lo, hi]."""

    lo: float
    hi: float

    def __str__(self) -> str:
        return f"[{self.lo:.4g}, {self.hi:.4g}]"


_STATISTICS = {"mean": np.mean, "median": np.median}


def bootstrap(
    sample: Sequence[float],
    statistic: str = "mean",
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Percentile bootstrap interval of the mean or median of one sample. Unit: the sample's.

    sample: (n,), independent draws (seeds, prompts), n >= 3. Exact over `resamples` draws with replacement,
    so it covers less than `level` for small n: of nominal 95 % about 83 % for the mean of 5 normal values and
    about 90 % for 10 (simulated in the tests). Raises ValueError on n < 3 or values that are not finite.
    Source: Efron, Bootstrap methods: another look at the jackknife (1979).
    """
    values = np.asarray(sample, dtype=float)
    if values.ndim != 1 or len(values) < 3:
        raise ValueError(f"an interval needs a flat sample of at least 3 values, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"the sample holds values that are not finite: {values[~np.isfinite(values)][:3]}")
    check_choice("statistic", statistic, _STATISTICS)
    _check_level(level)
    generator, n = np.random.default_rng(seed), len(values)
    chunk = max(1, 4_000_000 // n)  # at most 32 MB of resampled values at a time
    found = [
        _STATISTICS[statistic](values[generator.integers(n, size=(min(chunk, resamples - done), n))], axis=1)
        for done in range(0, resamples, chunk)
    ]
    lo, hi = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(lo), float(hi))


def paired_bootstrap(
    ours: Sequence[float],
    baseline: Sequence[float],
    statistic: str = "mean",
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Bootstrap interval of the mean or median of `ours - baseline`, pair by pair (same seed, same prompt).

    ours, baseline: (n,). Pairs are resampled whole. Raises ValueError on unequal lengths, on two Series whose
    index differs, and as `bootstrap`.
    """
    if (
        isinstance(ours, pd.Series)
        and isinstance(baseline, pd.Series)
        and not ours.index.equals(baseline.index)
    ):
        raise ValueError(
            f"the pairs have other names: {list(ours.index)} and {list(baseline.index)}; align them"
        )
    a, b = np.asarray(ours, dtype=float), np.asarray(baseline, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal lengths, got {a.shape} and {b.shape}")
    return bootstrap(a - b, statistic, seed=seed, level=level, resamples=resamples)


def student(sample: Sequence[float], *, level: float = 0.95) -> Interval:
    """Student's interval of the mean of one sample: mean ± t s / √n. Unit: the sample's.

    sample: (n,), independent draws, n >= 2. Exact for normal values, however few; wider than `bootstrap`,
    which covers too little for few seeds. Raises ValueError on n < 2 or values that are not finite.
    """
    values = np.asarray(sample, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"Student's interval needs a flat sample of 2 finite values or more, got {values}")
    _check_level(level)
    half = student_t(level, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean() - half), float(values.mean() + half))


@functools.cache
def student_t(level: float, degrees: int) -> float:
    """t with P[|T| <= t] = level for Student's T. With t = sqrt(n) tan a the density in a is cos(a)^(n-1)."""
    angle = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    density = angle.cos().pow(degrees - 1)
    below = torch.cat([torch.zeros(1), (density[1:] + density[:-1]).cumsum(0)])
    i = int(torch.searchsorted(below, level * below[-1]))
    share = float((level * below[-1] - below[i - 1]) / (below[i] - below[i - 1]))
    return math.sqrt(degrees) * math.tan(float(angle[i - 1] + share * (angle[i] - angle[i - 1])))


def proportion(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Clopper-Pearson interval of a success probability: covers it at least `level` of the time, for every n.

    Solves P[X >= k | lo] = P[X <= k | hi] = (1 - level) / 2 for X binomial; all failures give lo = 0.
    Raises ValueError unless 0 <= successes <= trials and trials >= 1. Source: Clopper and Pearson (1934).
    """
    k, n = int(successes), int(trials)
    if n < 1 or not 0 <= k <= n or (k, n) != (successes, trials):
        raise ValueError(
            f"need whole numbers 0 <= successes <= trials, trials >= 1; got {successes} of {trials}"
        )
    _check_level(level)
    tail = (1 - level) / 2
    return Interval(
        0.0
        if k == 0
        else 1.0 - _upper_limit(n - k, n, tail),  # lo for k successes is 1 - hi for the failures
        1.0 if k == n else _upper_limit(k, n, tail),
    )


def _upper_limit(k: int, n: int, tail: float) -> float:
    """The p at which P[X <= k] = tail, for X binomial(n, p) and k < n, by bisection."""
    i = np.arange(k + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n - i[:-1]) / (i[:-1] + 1)))])
    lo, hi = 0.0, 1.0
    for _ in range(60):  # 2**-60: below the spacing of float64 near 1
        p = (lo + hi) / 2
        log_terms = log_choose + i * np.log(p) + (n - i) * np.log1p(-p) if 0 < p < 1 else np.array([-np.inf])
        lo, hi = (p, hi) if np.exp(log_terms).sum() > tail else (lo, p)
    return (lo + hi) / 2


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is a probability strictly between 0 and 1, got {level}")
