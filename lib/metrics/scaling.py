r"""Loss against compute: power laws, and how much more compute a baseline needs for the same loss.

    law = fit_power_law(compute, loss)                 # L(C) = a C^-b, least squares in logarithms
    equivalence(base_compute, base_losses, compute, losses, seed=0).ratio    # 1.2: 20 % more compute

Compute is whatever the caller counts, positive: FLOPs, steps, core-seconds. Nothing here is trusted beyond
the losses that were measured: a loss outside them is refused. Source of the form: Kaplan et al. 2020; of
"compute equivalence": Xiao et al. 2024 (abstract). The estimators and intervals are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lib.choices import check_choice
from lib.metrics.intervals import Interval, student

CURVES = ("interpolated", "power")


class PowerLaw(NamedTuple):
    """L(C) = a C^-b + constant, and where it was measured."""

    a: float
    b: float
    constant: float
    misfit: float  # root mean square of log(measured / fitted)
    compute_range: tuple[float, float]
    loss_range: tuple[float, float]  # measured losses, means over runs of equal compute

    def loss(self, compute: float) -> float:
        """L(compute). ValueError outside the compute that was measured."""
        _inside("compute", compute, self.compute_range)
        return self.a * compute**-self.b + self.constant

    def compute(self, loss: float) -> float:
        """The compute at which L is `loss`. ValueError outside the measured losses, or if L does not fall."""
        _inside("loss", loss, self.loss_range)
        if not self.b > 0:
            raise ValueError(f"the fitted loss does not fall with compute: b = {self.b:.3g}")
        if loss <= self.constant:
            raise ValueError(f"no compute reaches {loss:.4g}: the fitted constant is {self.constant:.4g}")
        return (self.a / (loss - self.constant)) ** (1 / self.b)


class Equivalence(NamedTuple):
    """Compute of the baseline at our loss / our compute. Above 1: ours is worth it, per unit of compute."""

    ratio: float  # geometric mean over our points, at losses averaged over seeds
    interval: Interval  # percentile bootstrap over seeds, baseline and ours drawn together
    student: Interval  # exp of Student's interval of the mean log ratio over seeds, each on its own curve
    outside: float  # share of resampled points beyond the resampled baseline's losses: its curve prolonged


def fit_power_law(compute: Sequence[float], loss: Sequence[float], *, constant: bool = False) -> PowerLaw:
    r"""L(C) = a C^-b, or with constant=True a C^-b + c with 0 <= c < min L, by least squares.

    Without: linear regression of log L on log C. With: for each c the regression of log(L - c) on log C with
    weights (L - c)/L, to first order the residuals of log L; then the best c, by search. Runs of equal
    compute count each. ValueError for fewer than 2 (with a constant 4) different computes.
    """
    C, L = _positive("compute", compute), _positive("loss", loss)
    if C.ndim != 1 or C.shape != L.shape:
        raise ValueError(f"one loss for each compute, got shapes {C.shape} and {L.shape}")
    least = 4 if constant else 2
    if len(values := np.unique(C)) < least:
        raise ValueError(f"{least} different computes are needed to fit, got {len(values)}")
    c = _best_constant(C, L) if constant else 0.0
    a, b, rest = _weighted(C, L, c)
    means = [L[C == value].mean() for value in values]
    return PowerLaw(
        a, b, c, math.sqrt(rest / len(C)),
        (float(values[0]), float(values[-1])), (float(min(means)), float(max(means))),
    )  # fmt: skip


def equivalence(
    baseline_compute: Sequence[float],
    baseline_loss,
    compute: float | Sequence[float],
    loss,
    *,
    seed: int,
    curve: str = "interpolated",
    level: float = 0.95,
    resamples: int = 2000,
) -> Equivalence:
    r"""How much more compute the baseline needs to reach our loss: C_base(our loss) / our compute.

    baseline_compute: (n,), n >= 2 different; baseline_loss: (seeds, n). compute: a number or (m,); loss:
    (seeds,) or (seeds, m). Row s of both is the same seed: seeds, at least 3, are resampled whole.
    curve: C_base is "interpolated" between neighbours on log-log axes, so that the baseline is worth 1 of
    itself, or the "power" law fitted to all its points, which may miss each of them.
    ValueError where a mean loss of ours lies outside the baseline's (that would be extrapolation: train the
    baseline for less or for longer), or where the baseline's mean loss does not fall from each compute to the
    next, in the sample or in a resample. The bootstrap covers too little for few seeds
    (`lib.metrics.intervals.bootstrap`): for five, Student's interval stands beside it.
    """
    check_choice("curve", curve, CURVES)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"need 0 < level < 1 and resamples >= 1, got {level} and {resamples}")
    base_C, base, ours_C, ours = _check_pairs(baseline_compute, baseline_loss, compute, loss)
    lo, hi = base.mean(0).min(), base.mean(0).max()
    for C, mean in zip(ours_C, ours.mean(0), strict=True):
        if not lo <= mean <= hi:
            raise ValueError(
                f"our mean loss {mean:.4f} at compute {C:.4g} lies outside the baseline's, {lo:.4f} to "
                f"{hi:.4f}: the ratio would be an extrapolation; train the baseline for "
                f"{'longer' if mean < lo else 'less'}"
            )

    def log_ratio(base: np.ndarray, ours: np.ndarray) -> float:
        return float(np.mean(_log_compute(base_C, base, ours, curve) - np.log(ours_C)))

    whole, n = log_ratio(base.mean(0), ours.mean(0)), len(base)
    generator, found, outside = np.random.default_rng(seed), [], 0
    for _ in range(resamples):
        drawn = generator.integers(n, size=n)
        b, o = base[drawn].mean(0), ours[drawn].mean(0)
        found.append(log_ratio(b, o))
        outside += int(((o < b.min()) | (o > b.max())).sum())
    ends = np.exp(np.quantile(found, [(1 - level) / 2, (1 + level) / 2]))
    each = np.array([log_ratio(b, o) for b, o in zip(base, ours, strict=True)])
    return Equivalence(
        math.exp(whole),
        Interval(*map(float, ends)),
        Interval(*map(math.exp, student(each, level=level))),
        outside / (resamples * len(ours_C)),
    )


def _log_compute(C: np.ndarray, base: np.ndarray, ours: np.ndarray, curve: str) -> np.ndarray:
    """log C_base at losses `ours` (m,), on the curve through (C, base); its ends are prolonged."""
    x, y, at = np.log(C), np.log(base), np.log(ours)
    if curve == "power":
        b, log_a = np.polyfit(x, y, 1)
        if not b < 0:
            raise ValueError("the baseline's fitted loss does not fall with compute: add seeds or compute")
        return (at - log_a) / b
    if not (np.diff(y) < 0).all():
        raise ValueError(
            f"the baseline's loss does not fall from each compute to the next: {np.round(base, 4).tolist()} "
            "(perhaps in a resample); add seeds, or spread the compute wider"
        )
    i = np.clip((y[:, None] > at).sum(0) - 1, 0, len(x) - 2)  # the segment: y[i] > at >= y[i + 1]
    return x[i] + (at - y[i]) / (y[i + 1] - y[i]) * (x[i + 1] - x[i])


def _weighted(C: np.ndarray, L: np.ndarray, c: float) -> tuple[float, float, float]:
    """(a, b, sum of squares) of the weighted regression of log(L - c) on log C."""
    x, y, weight = np.log(C), np.log(L - c), (L - c) / L
    design = np.column_stack([np.ones_like(x), -x]) * weight[:, None]
    (log_a, b), *_ = np.linalg.lstsq(design, y * weight, rcond=None)
    rest = (y - log_a + b * x) * weight
    return math.exp(log_a), float(b), float(rest @ rest)


def _best_constant(C: np.ndarray, L: np.ndarray) -> float:
    """The c in [0, min L) of least squares: the best of a grid, then golden section about it."""
    grid = L.min() * np.linspace(0, 1, 400, endpoint=False)
    i = int(np.argmin([_weighted(C, L, c)[2] for c in grid]))
    lo, hi = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = hi - golden * (hi - lo), lo + golden * (hi - lo)
        lo, hi = (lo, right) if _weighted(C, L, left)[2] <= _weighted(C, L, right)[2] else (left, hi)
    return float(min([0.0, (lo + hi) / 2], key=lambda c: _weighted(C, L, c)[2]))


def _check_pairs(baseline_compute, baseline_loss, compute, loss) -> tuple[np.ndarray, ...]:
    base_C, base = _positive("baseline_compute", baseline_compute), _positive("baseline_loss", baseline_loss)
    ours_C, ours = np.atleast_1d(_positive("compute", compute)), _positive("loss", loss)
    ours = ours[:, None] if ours.ndim == 1 else ours
    if base.ndim != 2 or base.shape[1:] != base_C.shape or ours.shape != (len(base), *ours_C.shape):
        raise ValueError(
            "baseline_loss is (seeds, computes) and loss (seeds,) or (seeds, computes), seed by seed; got "
            f"{base.shape} for {base_C.shape} computes and {ours.shape} for {ours_C.shape}"
        )
    if len(base) < 3 or len(np.unique(base_C)) != len(base_C) or len(base_C) < 2:
        raise ValueError(
            "an equivalence needs at least 3 seeds and 2 baseline computes, each once; "
            f"got {len(base)} seeds and computes {base_C.tolist()}"
        )
    order = np.argsort(base_C)
    return base_C[order], base[:, order], ours_C, ours


def _inside(what: str, value: float, measured: tuple[float, float]) -> None:
    lo, hi = measured
    if not lo <= value <= hi:
        raise ValueError(f"{what} {value:.6g} was not measured: the range is {lo:.6g} to {hi:.6g}")


def _positive(name: str, values) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if not (np.isfinite(found) & (found > 0)).all() or not found.size:
        raise ValueError(f"{name} must be positive and finite, got {values}")
    return found
