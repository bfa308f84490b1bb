"""Power laws and compute equivalence, against laws whose parameters are known."""

import math

import numpy as np
import pytest

from lib.metrics.scaling import CURVES, equivalence, fit_power_law

COMPUTE = np.array([1e9, 2e9, 4e9, 8e9, 3e10])


def law(C, a=60.0, b=0.12, c=0.0):
    return a * np.asarray(C, dtype=float) ** -b + c


def noisy(seeds, C, scale, *, seed, **law_of):
    """(seeds, len(C)) losses with one multiplicative error a seed and one a run."""
    generator = np.random.default_rng(seed)
    common = generator.normal(scale=scale, size=(seeds, 1))
    return law(C, **law_of) * np.exp(common + generator.normal(scale=scale / 3, size=(seeds, len(C))))


@pytest.mark.parametrize("a, b", [(60.0, 0.12), (3.0, 0.01), (1e4, 0.5)])
def test_a_power_law_is_recovered_exactly(a, b):
    found = fit_power_law(COMPUTE, law(COMPUTE, a, b))
    assert found.a == pytest.approx(a, rel=1e-9) and found.b == pytest.approx(b, rel=1e-9)
    assert found.constant == 0 and found.misfit < 1e-12
    assert found.loss(5e9) == pytest.approx(law(5e9, a, b), rel=1e-9)
    assert found.compute(law(5e9, a, b)) == pytest.approx(5e9, rel=1e-6)  # 1e-9 / b


@pytest.mark.parametrize("c", [0.0, 0.7, 1.8])
def test_a_constant_is_recovered_where_it_is_asked_for_and_missed_where_it_is_not(c):
    losses = law(COMPUTE, a=2e3, b=0.33, c=c)
    found = fit_power_law(COMPUTE, losses, constant=True)
    # golden section finds a minimum of a square to about the root of the machine's precision
    assert found.constant == pytest.approx(c, abs=1e-5) and found.b == pytest.approx(0.33, abs=1e-5)
    without = fit_power_law(COMPUTE, losses)
    assert (without.misfit > 1e-3) == (c > 0) and (without.b < 0.32) == (c > 0)


def test_the_fit_is_the_least_squares_line_in_logarithms():
    losses = noisy(1, COMPUTE, 0.05, seed=3)[0]
    x, y = [math.log(C) for C in COMPUTE], [math.log(L) for L in losses]
    mx, my = sum(x) / 5, sum(y) / 5
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    found = fit_power_law(COMPUTE, losses)
    assert found.b == pytest.approx(-slope) and math.log(found.a) == pytest.approx(my - slope * mx)
    rest = [b - my - slope * (a - mx) for a, b in zip(x, y, strict=True)]
    assert found.misfit == pytest.approx(math.sqrt(sum(r * r for r in rest) / 5))


def test_with_a_constant_no_neighbour_fits_better():
    losses = noisy(1, COMPUTE, 0.01, seed=1, a=2e3, b=0.33, c=1.5)[0]
    found = fit_power_law(COMPUTE, losses, constant=True)

    def rest(a, b, c):  # first order in the residual of log L
        return sum(((np.log(losses - c) - math.log(a) + b * np.log(COMPUTE)) * (losses - c) / losses) ** 2)

    best = rest(found.a, found.b, found.constant)
    assert best == pytest.approx(5 * found.misfit**2)
    for step in (0.999, 1.001):
        assert best < rest(found.a * step, found.b, found.constant)
        assert best < rest(found.a, found.b * step, found.constant)
        assert best < rest(found.a, found.b, found.constant * step)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.7])
def test_a_known_equivalence_is_found_exactly_with_an_interval_of_no_width(ratio, curve):
    base = np.tile(law(COMPUTE), (5, 1))
    ours_C = np.array([2e9, 7e9])
    found = equivalence(
        COMPUTE, base, ours_C, np.tile(law(ratio * ours_C), (5, 1)), seed=0, curve=curve, resamples=50
    )
    assert found.ratio == pytest.approx(ratio, rel=1e-9)
    assert found.interval == pytest.approx((ratio, ratio)) and found.student == pytest.approx((ratio, ratio))
    assert found.outside == 0


@pytest.mark.parametrize("curve", CURVES)
def test_the_baseline_is_worth_one_of_itself_and_a_curved_one_only_if_interpolated(curve):
    curved = np.tile(law(COMPUTE, a=2e3, b=0.33, c=1.8), (3, 1))  # no power law without a constant
    found = equivalence(COMPUTE, curved, COMPUTE[2], curved[:, 2], seed=0, curve=curve, resamples=20)
    assert (found.ratio == pytest.approx(1, abs=1e-9)) == (curve == "interpolated")


def test_pairs_are_resampled_together_so_what_a_seed_shifts_cancels():
    """Seeds move losses by 2 %, half of what doubling the compute gains; ours and the baseline alike."""
    shift = np.exp(np.random.default_rng(0).normal(scale=0.02, size=(8, 1)))
    base, ours = law(COMPUTE) * shift, law([1.5 * 3e9]) * shift
    paired = equivalence(COMPUTE, base, 3e9, ours[:, 0], seed=0)
    torn = equivalence(COMPUTE, base, 3e9, ours[::-1, 0], seed=0)  # the control: pairs torn apart
    assert paired.ratio == pytest.approx(torn.ratio) == pytest.approx(1.5, abs=1e-3)
    assert paired.interval.hi - paired.interval.lo < 0.01 < 0.3 < torn.interval.hi - torn.interval.lo


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth, runs, hits = 1.3, 200, {"interval": 0, "student": 0}
    for run in range(runs):
        base = noisy(5, COMPUTE, 0.006, seed=2 * run)
        ours = noisy(5, [truth * 4e9], 0.006, seed=2 * run + 1)[:, 0]
        found = equivalence(COMPUTE, base, 4e9, ours, seed=run, resamples=200)
        for name in hits:
            lo, hi = getattr(found, name)
            hits[name] += lo <= truth <= hi
    # three standard errors of 200 runs: 0.05 and 0.08; the bootstrap of 5 covers about 0.83
    assert abs(hits["student"] / runs - 0.95) < 0.05 and abs(hits["interval"] / runs - 0.83) < 0.08


def test_what_only_an_extrapolation_could_tell_is_refused():
    base = np.tile(law(COMPUTE), (3, 1))
    for C, fix in ((COMPUTE[-1] * 1.1, "longer"), (COMPUTE[0] * 0.9, "less")):
        with pytest.raises(ValueError, match=f"outside the baseline's.* train the baseline for {fix}"):
            equivalence(COMPUTE, base, 2e9, np.full(3, law(C)), seed=0)
    found = fit_power_law(COMPUTE, law(COMPUTE))
    for asked in (
        lambda: found.loss(9e8),
        lambda: found.loss(4e10),
        lambda: found.compute(law(9e8)),
        lambda: found.compute(law(4e10)),
    ):
        with pytest.raises(ValueError, match="was not measured"):
            asked()


def test_resamples_that_leave_the_measured_losses_are_counted():
    base = noisy(5, COMPUTE, 0.02, seed=0)
    edge = base[:, -1] * np.array([0.99, 0.99, 1.0, 1.02, 1.02])
    found = equivalence(COMPUTE, base, 3e10, edge, seed=0)
    assert 0.05 < found.outside < 0.6
    inside = equivalence(COMPUTE, base, 3e9, base[:, 2], seed=0)
    assert inside.outside == 0


def test_a_baseline_that_does_not_fall_is_refused():
    rising = np.tile(law(COMPUTE)[::-1], (3, 1))
    for curve, message in (("power", "fitted loss does not fall"), ("interpolated", "does not fall from")):
        with pytest.raises(ValueError, match=message):
            equivalence(COMPUTE, rising, 2e9, rising[:, 1], seed=0, curve=curve)
    with pytest.raises(ValueError, match="does not fall"):
        fit_power_law(COMPUTE, law(COMPUTE)[::-1]).compute(law(2e9))


def test_the_same_seed_gives_the_same_interval():
    base, ours = noisy(5, COMPUTE, 0.01, seed=0), noisy(5, [3e9], 0.01, seed=1)[:, 0]
    first, again, other = (equivalence(COMPUTE, base, 3e9, ours, seed=s) for s in (0, 0, 1))
    assert first == again != other and first.ratio == other.ratio


@pytest.mark.parametrize(
    "change, message",
    [
        ({"baseline_loss": np.ones((3, 4))}, r"got \(3, 4\) for \(5,\)"),
        ({"loss": np.ones(4)}, "seed by seed"),
        ({"baseline_loss": np.tile(law(COMPUTE), (2, 1)), "loss": np.ones(2)}, "at least 3 seeds"),
        ({"baseline_compute": [1, 1, 2, 3, 4]}, "each once"),
        ({"compute": 0.0}, "compute must be positive"),
        ({"loss": [3.0, float("nan"), 3.0]}, "loss must be positive and finite"),
        ({"curve": "powr"}, "did you mean 'power'"),
        ({"level": 1.0}, "0 < level < 1"),
    ],
)
def test_a_wrong_argument_is_refused(change, message):
    right = {
        "baseline_compute": COMPUTE, "baseline_loss": np.tile(law(COMPUTE), (3, 1)),
        "compute": 2e9, "loss": np.full(3, law(2e9)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        equivalence(**(right | change), seed=0)


def test_too_little_to_fit_is_refused():
    with pytest.raises(ValueError, match="2 different computes are needed to fit, got 1"):
        fit_power_law([1e9, 1e9], [3.0, 3.1])
    with pytest.raises(ValueError, match="4 different computes"):
        fit_power_law(COMPUTE[:3], law(COMPUTE[:3]), constant=True)
    with pytest.raises(ValueError, match="one loss for each compute"):
        fit_power_law(COMPUTE, law(COMPUTE[:3]))
    with pytest.raises(ValueError, match="positive and finite"):
        fit_power_law([0.0, 1.0], [3.0, 2.0])
