"""The linearity scores on inputs that are not clean, their cost, and the maps and measures beside them."""

import importlib.util
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import lib.metrics.linear_fits as linear_fits
from lib.metrics.linearity import (
    ESTIMATORS,
    LinearityAccumulator,
    linearity_score,
    neighbour_cosine,
    norm_ratio_floor,
    prediction_score,
    quantiles,
    token_errors,
    token_norm_ratio,
)

SPEC = importlib.util.spec_from_file_location(
    "bench_linearity", Path(__file__).parents[1] / "bench_linearity.py"
)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def block(N=400, D=12, *, seed=0, size=0.5):
    """A stream with columns of unlike scale and means, and a layer that is partly linear in it."""
    x = draw(N, D, seed=seed) @ draw(D, D, seed=seed + 1) * torch.logspace(-1, 1, D).double() + 3
    f = size * torch.tanh(x @ draw(D, D, seed=seed + 2) / 10) + 0.02 * x.roll(1, 1)
    return x, f


def svd_score(x, y):
    """The paper's formula: ||P_X Y||² / ||Y||², centred, P_X from the singular vectors that are not 0."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    return float((U[:, S > 1e-10 * S[0]].T @ y).square().sum() / y.square().sum())


def slow_map(x, y):
    """A, b of least squares from the augmented matrix [x, 1]."""
    found = np.linalg.lstsq(np.column_stack([x.numpy(), np.ones(len(x))]), y.numpy(), rcond=1e-10)[0]
    return torch.tensor(found[:-1]), torch.tensor(found[-1])


def gather(x, f, *, groups=8, batch=50, **options):
    """One layer, its batches going to the groups in turn."""
    gathered = LinearityAccumulator(1, x.shape[1], groups=groups, **options)
    for i in range(0, len(x), batch):
        gathered.add_layer(0, x[i : i + batch], f[i : i + batch], i // batch % groups)
    return gathered


# ---- defects of the published package, and inputs that are not clean -------------------------------------


def test_duplicated_and_dead_columns_change_no_score():
    x, f = block(N=600)
    dirty = torch.cat(
        [x, x[:, :4], 3 * x[:, 2:3] - 1, torch.full((600, 2), 7.3).double(), torch.zeros(600, 1)], 1
    )
    for estimator in ESTIMATORS:
        clean = linearity_score(x, f, estimator=estimator)
        assert linearity_score(dirty, f, estimator=estimator) == pytest.approx(clean, abs=1e-9)
    f_ = torch.cat([f, torch.zeros(600, 8)], 1)
    clean, found = (
        float(gather(t.float(), g.float()).scores(residual=False)) for t, g in ((x, f), (dirty, f_))
    )
    assert found == pytest.approx(clean, abs=1e-5)
    A, b = gather(dirty, f_).maps(dtype=torch.float64)
    assert (dirty @ A[0] + b[0] - dirty - f_).norm() < 1.0001 * (f - f.mean(0)).norm()


def test_nothing_to_explain_is_an_error_and_a_constant_x_explains_nothing():
    x = draw(100, 4)
    for y in (x - x, torch.full((100, 4), 0.1).double()):
        for estimator in ESTIMATORS:
            with pytest.raises(ValueError, match="constant over the tokens"):
                linearity_score(x, y, estimator=estimator)
        with pytest.raises(ValueError, match="constant over the tokens"):
            prediction_score(x, y)
    gathered = gather(x, torch.zeros(100, 4))
    with pytest.raises(ValueError, match="layer 0: what is to be explained"):
        gathered.scores(residual=False)
    assert float(gathered.scores(residual=True)) == 1  # y = x is linear
    with pytest.raises(ValueError, match="layer 0: the output y"):
        gather(x, -x).scores(residual=True)
    for estimator in ESTIMATORS:
        assert linearity_score(torch.full((100, 4), 0.1), x, estimator=estimator) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [2, 50, 200, 201])
def test_too_few_tokens_are_never_a_silent_one(N, dtype):
    x, y = draw(N, 200), draw(N, 200, seed=1)
    for estimator in ("raw", "adjusted"):
        with pytest.raises(ValueError, match=f"N={N} tokens are too few for the D=200 .* N >= 202"):
            linearity_score(x, y, estimator=estimator)
        with pytest.raises(ValueError, match=f"N={N} tokens are too few"):
            gather(x.to(dtype), y.to(dtype)).scores(estimator, residual=False)
    with pytest.raises(ValueError, match="in each half"):
        linearity_score(x, y)
    with pytest.raises(ValueError, match="in each half"):
        prediction_score(x, y)
    with pytest.raises(ValueError, match="too few"):
        gather(x, y).maps()


def test_one_outlier_is_finite_and_in_range():
    x, f = block()
    x[17] = 1e6
    for estimator in ESTIMATORS:
        assert 0 <= linearity_score(x, f, estimator=estimator) <= 1
    assert linearity_score(x, f, estimator="raw") == pytest.approx(svd_score(x, f), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("which", ["x", "f"])
def test_values_that_are_not_finite_are_refused_and_leave_the_sums_alone(bad, which):
    x, f = (t.float() for t in block())
    gathered = gather(x, f)
    before = gathered.scores(residual=False)
    broken = {"x": x.clone(), "f": f.clone()}
    broken[which][399, 3] = bad
    with pytest.raises(ValueError, match=f"layer 0: (values of {which} are not|squares overflow)"):
        gathered.add_layer(0, broken["x"], broken["f"], 1)
    assert torch.equal(gathered.scores(residual=False), before) and gathered.n_tokens() == [400]
    fresh = LinearityAccumulator(1, 12)
    with pytest.raises(ValueError, match="not finite|overflow torch.float32"):
        fresh.add_layer(0, broken["x"], broken["f"], 0)
    fresh.add_layer(0, x, f, 0)
    assert fresh.scores("raw", residual=False) == pytest.approx(svd_score(x, f), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_any_product(dtype):
    x, f = (t.to(dtype) for t in block())
    expected = linearity_score(x.double(), f.double())
    assert linearity_score(x, f) == expected
    parts = [[t for t in range(400) if t // 50 % 2 == half] for half in (0, 1)]
    found = float(gather(x, f, groups=2).scores(residual=False))
    fitted = [x.double() @ slow_map(x[part].double(), f[part].double())[0] for part in parts]
    a, b = (each - each.mean(0) for each in fitted)
    total = (f.double() - f.double().mean(0)).square().sum()
    assert found == pytest.approx(float((a * b).sum() / total), abs=1e-5)


def test_many_tokens_at_once_are_summed_in_float64():
    x, f = block(N=20_000, D=3)
    x[:, 0] += 1e4  # float32 sums of 20,000 such values would lose three digits
    at_once, batches = (gather(x.float(), f.float(), groups=2, batch=n) for n in (10_000, 100))
    exact = gather(x.float().double(), f.float().double(), groups=2, batch=10_000)
    for gathered in (at_once, batches):
        torch.testing.assert_close(
            gathered.scores("raw", residual=False), exact.scores("raw", residual=False), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(gathered.norm_ratio(), exact.norm_ratio(), rtol=1e-6, atol=0)


def test_gradients_are_left_behind():
    x, f = block()
    gathered = gather(x.requires_grad_(), f * x.mean())
    assert not gathered.scores(residual=True).requires_grad and linearity_score(x, f * x) >= 0


def test_mistakes_are_refused_by_name():
    x, f = block()
    gathered = gather(x, f, groups=3)
    wrong = [
        (lambda: linearity_score(x, f, estimator="heldout"), "did you mean 'held-out'"),
        (lambda: gathered.scores("row", residual=True), "did you mean 'raw'"),
        (lambda: gathered.norm_ratio(over="outputs"), "did you mean 'output'"),
        (lambda: linearity_score(x, f[:-1]), "for the same tokens"),
        (lambda: prediction_score(x[:1], f[:1]), "at least 2 tokens"),
        (lambda: gathered.add_layer(1, x, f, 0), "no layer 1; allowed: 0 to 0"),
        (lambda: gathered.add_layer(0, x, f, 3), "no group 3; allowed: 0 to 2"),
        (lambda: gathered.add_layer(0, x[:, :3], f[:, :3], 0), r"\(…, 12\)"),
        (lambda: gathered.add_layer(0, x[:0], f[:0], 0), "at least one"),
        (lambda: gathered.add_layer(0, x.long(), f, 0), "real numbers, got torch.int64"),
        (lambda: gathered.add(torch.stack([x, x, x]), 0), r"the stack is \(2, tokens, 12\)"),
        (lambda: gathered.scores(residual=True, groups=[0, 5]), "no group 5"),
        (lambda: gathered.scores(residual=True, groups=[1]), "two groups with tokens; layer 0 has"),
        (lambda: LinearityAccumulator(2, 12).scores(residual=True), "layer 0 has no tokens"),
        (lambda: gathered.jackknife(residual=True), "at least 4 groups; layer 0 has 3"),
        (lambda: gathered.jackknife(residual=True, level=95), "level"),
        (lambda: gathered.maps(ridge=-1), "ridge must be at least 0"),
        (lambda: gathered.merge(LinearityAccumulator(1, 12)), "only equal shapes merge"),
        (lambda: LinearityAccumulator(0, 12), "n_layers must be at least 1"),
        (lambda: LinearityAccumulator(1, 12, dtype=torch.float16), "float32 or torch.float64"),
        (lambda: norm_ratio_floor(-0.1), "at least 0"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


# ---- cost ------------------------------------------------------------------------------------------------


def test_one_factorisation_serves_both_scores_and_both_estimators(monkeypatch):
    made, solver = [], linear_fits.Solver
    monkeypatch.setattr(linear_fits, "Solver", lambda *args, **more: made.append(1) or solver(*args, **more))
    x, f = block()
    gathered = gather(x, f)
    for estimator, expected in (("raw", 1), ("adjusted", 1), ("held-out", 3)):
        for residual in (True, False):
            gathered.scores(estimator, residual=residual)
        assert len(made) == expected
    made.clear()
    gathered.jackknife(residual=True)
    assert len(made) == 2 + 8  # the halves, and for each deletion the half it changes
    gathered.add_layer(0, x, f, 0)
    gathered.scores("raw", residual=True)
    assert len(made) == 11  # new tokens, new fit


def test_memory_does_not_grow_with_the_tokens():
    L, D, N = 4, 64, 1000

    def stream(batches):
        for i in range(batches):
            h = draw(N, D, seed=i, dtype=torch.float32)
            for l in range(L):
                gathered.add_layer(l, h, h.roll(1, 1), i % 4)

    gathered = LinearityAccumulator(L, D, groups=4)
    stream(8)  # each group and layer has tokens
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream(100)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert gathered.n_tokens() == [108 * N] * L
    assert grown_mb < 20, (
        f"grew by {grown_mb:.0f} MB: the tokens themselves are {100 * N * D * 4 * L * 2 / 2**20:.0f} MB"
    )


def test_the_speed_rows_compare_like_with_like_and_a_wrong_score_is_not_timed(monkeypatch):
    told = []
    found = bench.rows(told.append, widths=(24,), turns=2)
    assert len(found) == len(told) == 2
    for what, unit, ours, baseline, against, asked in found:
        assert "D = 24" in what and unit == "layers/s" and against and asked.startswith(">=")
        assert len(ours) == len(baseline) == 2 and min(ours + baseline) > 0
    monkeypatch.setattr(bench, "svd_score", lambda x, y: 0.5)
    with pytest.raises(AssertionError, match="D=24, svd"):
        bench.rows(widths=(24,), turns=1)


# ---- maps and tokens -------------------------------------------------------------------------------------


def test_maps_are_least_squares_on_the_chosen_groups():
    x, f = block()
    gathered = gather(x, f, groups=2)
    for groups in (None, [0], [1]):
        mine = torch.tensor([groups is None or t // 50 % 2 in groups for t in range(400)])
        A, b = gathered.maps(groups=groups, dtype=torch.float64)
        slow_A, slow_b = slow_map(x[mine], (x + f)[mine])
        assert A.shape == (1, 12, 12) and b.shape == (1, 12)
        torch.testing.assert_close(A[0], slow_A, rtol=0, atol=1e-8)
        torch.testing.assert_close(b[0], slow_b, rtol=0, atol=1e-7)
    assert gathered.maps()[0].dtype == torch.float32


def test_a_large_ridge_ends_at_the_identity_and_keeps_the_mean():
    x, f = block()
    gathered = gather(x, f)
    for ridge in (0.1, 1e9):
        A, b = gathered.maps(ridge=ridge, dtype=torch.float64)
        S = (x - x.mean(0)).T @ (x - x.mean(0))
        W = torch.linalg.solve(S + ridge * S.diagonal().diag(), (x - x.mean(0)).T @ f)
        torch.testing.assert_close(A[0], torch.eye(12) + W, rtol=0, atol=1e-9)
        torch.testing.assert_close(x.mean(0) @ A[0] + b[0], (x + f).mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(A[0], torch.eye(12).double(), rtol=0, atol=1e-6)


def test_token_measures_are_their_loops():
    x, f = block(N=50)
    A, b = (t[0] for t in gather(x, f, batch=10).maps(dtype=torch.float64))
    errors, cosines, ratios = token_errors(A, b, x, x + f), neighbour_cosine(x, x + f), token_norm_ratio(x, f)
    for t in range(50):
        y = x[t] + f[t]
        assert float(errors[t]) == pytest.approx(math.dist(x[t] @ A + b, y) / math.hypot(*f[t]), rel=1e-6)
        assert float(cosines[t]) == pytest.approx(float(x[t] @ y) / math.hypot(*x[t]) / math.hypot(*y))
        assert float(ratios[t]) == pytest.approx(math.hypot(*f[t]) / math.hypot(*x[t]))
    assert quantiles(errors, (0, 0.5, 0.9, 1)) == pytest.approx(
        np.quantile(errors, (0, 0.5, 0.9, 1)).tolist()
    )
    torch.testing.assert_close(
        token_errors(torch.eye(12), torch.zeros(12), x, x + f), torch.ones(50).double()
    )
    with pytest.raises(ValueError, match="50 tokens have y = x"):
        token_errors(A, b, x, x)
