"""The linearity scores against least squares by SVD and by loops in float64, and what is known of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.metrics.intervals import student_t
from lib.metrics.linearity import (
    ESTIMATORS,
    LinearityAccumulator,
    expected_raw_score,
    linearity_score,
    norm_ratio_floor,
    prediction_score,
)


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


def halves(N):
    """In 16 alternating blocks, token by token."""
    return [[t for t in range(N) if t * min(16, N) // N % 2 == half] for half in (0, 1)]


def slow_map(x, y):
    """A, b of least squares from the augmented matrix [x, 1]."""
    found = np.linalg.lstsq(np.column_stack([x.numpy(), np.ones(len(x))]), y.numpy(), rcond=1e-10)[0]
    return torch.tensor(found[:-1]), torch.tensor(found[-1])


def slow_held_out(x, y, parts):
    """tr(W_A' S_xx W_B) / tr S_yy: covariance of the two fitted outputs, over all tokens."""
    fitted = [x @ slow_map(x[part], y[part])[0] for part in parts]
    a, b = (each - each.mean(0) for each in fitted)
    return float((a * b).sum() / (y - y.mean(0)).square().sum())


def gather(x, f, *, groups=8, batch=50, **options):
    """One layer, its batches going to the groups in turn."""
    gathered = LinearityAccumulator(1, x.shape[1], groups=groups, **options)
    for i in range(0, len(x), batch):
        gathered.add_layer(0, x[i : i + batch], f[i : i + batch], i // batch % groups)
    return gathered


# ---- against the definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("N, D, rank", [(60, 1, 1), (60, 5, 5), (300, 40, 40), (300, 40, 7), (500, 200, 150)])
def test_raw_and_adjusted_are_the_formula_by_svd_also_when_x_has_no_full_rank(N, D, rank):
    x = draw(N, rank) @ draw(rank, D, seed=1) + 5
    y = torch.tanh(x @ draw(D, 6, seed=2) / D)
    raw = svd_score(x, y)
    assert linearity_score(x, y, estimator="raw") == pytest.approx(raw, abs=1e-9)
    adjusted = 1 - (1 - raw) * (N - 1) / (N - 1 - rank)
    assert linearity_score(x, y, estimator="adjusted", clamp=False) == pytest.approx(adjusted, abs=1e-9)


@pytest.mark.parametrize("N, D", [(64, 3), (301, 20), (1000, 50)])
def test_held_out_and_prediction_are_their_definitions_half_by_half(N, D):
    x, y = block(N, D)
    A, B = halves(N)
    assert sorted(A + B) == list(range(N))
    assert linearity_score(x, y, clamp=False) == pytest.approx(slow_held_out(x, y, (A, B)), abs=1e-9)
    scores = []
    for fit, test in ((A, B), (B, A)):
        W, b = slow_map(x[fit], y[fit])
        missed = (x[test] @ W + b - y[test]).square().sum()
        scores.append(1 - missed / (y[test] - y[test].mean(0)).square().sum())
    assert prediction_score(x, y) == pytest.approx(float(sum(scores) / 2), abs=1e-9)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-9), (torch.float32, 2e-6)])
@pytest.mark.parametrize("batch", [7, 50, 400])
def test_streaming_in_any_batches_gives_what_all_tokens_at_once_give(batch, dtype, close):
    x, f = block()
    y = x + f
    gathered = gather(x.to(dtype), f.to(dtype), batch=batch, groups=2)
    assert gathered.n_tokens() == [400]
    for estimator in ("raw", "adjusted"):
        with_, without = (float(gathered.scores(estimator, residual=r)) for r in (True, False))
        assert with_ == pytest.approx(linearity_score(x, y, estimator=estimator), abs=close)
        assert without == pytest.approx(linearity_score(x, f, estimator=estimator), abs=close)
    if batch == 400:
        return
    parts = [[t for t in range(400) if t // batch % 2 == half] for half in (0, 1)]
    found = float(gathered.scores("held-out", residual=False, clamp=False))
    assert found == pytest.approx(slow_held_out(x, f, parts), abs=10 * close)


def test_a_stack_of_streams_gives_what_its_layers_give_one_by_one():
    L, D = 3, 8
    h = [draw(2, 60, D)]
    for l in range(L):
        h.append(h[-1] + torch.tanh(h[-1] @ draw(D, D, seed=l)))
    stack, single = (LinearityAccumulator(L, D) for _ in range(2))
    for group in (0, 1):
        stack.add(torch.stack(h)[:, group], group)
        for l in range(L):
            single.add_layer(l, h[l][group], h[l + 1][group] - h[l][group], group)
    for residual in (True, False):
        found = stack.scores(residual=residual)
        assert found.shape == (L,) and torch.equal(found, single.scores(residual=residual))
        for l in range(L):
            y = h[l + 1] if residual else h[l + 1] - h[l]
            raw = stack.scores("raw", residual=residual)[l]
            assert float(raw) == pytest.approx(svd_score(h[l].reshape(-1, D), y.reshape(-1, D)), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("directions", [False, True])
def test_merged_parts_are_the_whole_though_their_reference_points_differ(directions):
    x, f = block()
    options = {"directions": directions, "groups": 4}
    whole = gather(x, f, **options)
    parts = [gather(x[i : i + 200], f[i : i + 200], **options) for i in (0, 200)]
    for gathered in (parts[0], whole):
        gathered.add_layer(0, x[:3] + 100, f[:3], 3)
    merged = parts[0] + parts[1]
    assert merged.n_tokens() == whole.n_tokens() and parts[0].n_tokens() == [203]
    for residual in (True, False):
        for k in (0, 3) if directions else (0,):
            options = {"residual": residual, "remove_directions": k}
            torch.testing.assert_close(merged.scores(**options), whole.scores(**options), rtol=0, atol=1e-9)
    torch.testing.assert_close(merged.norm_ratio(centred=False), whole.norm_ratio(centred=False))
    for one, other in zip(merged.maps(dtype=torch.float64), whole.maps(dtype=torch.float64), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_removed_directions_are_the_first_singular_vectors_of_x():
    x, f = block()
    x[:, 2] *= 1000
    gathered = gather(x, f, directions=True)
    for k in (1, 4):
        V = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:k].T
        x_, f_ = (t - t @ V @ V.T for t in (x, f))
        for y, residual in ((x_ + f_, True), (f_, False)):
            found = gathered.scores("raw", residual=residual, remove_directions=k)
            assert float(found) == pytest.approx(svd_score(x_, y), abs=1e-8)
    with pytest.raises(ValueError, match="0 to 11, got 12"):
        gathered.scores(residual=True, remove_directions=12)
    with pytest.raises(ValueError, match="directions=True"):
        gather(x, f).scores(residual=True, remove_directions=1)


def test_a_huge_direction_that_x_and_y_share_hides_the_others_until_it_is_removed():
    x, f = draw(2000, 10), draw(2000, 10, seed=1)
    x[:, 0] *= 3000
    gathered = gather(x, f, directions=True)
    assert float(gathered.scores(residual=True)) > 0.999
    assert float(gathered.scores(residual=True, remove_directions=1)) == pytest.approx(0.5, abs=0.03)


def test_huge_shared_activations_do_not_cancel_in_float32():
    x, f = block(2000, 16)
    x[::100, 5] += 1e4  # few tokens, one coordinate
    x[:, 9] += 1e4
    exact = [svd_score(x.float(), f.float()), svd_score(x.float(), x.float().double() + f.float())]
    gathered = gather(x.float(), f.float(), batch=500)
    found = [float(gathered.scores("raw", residual=residual)) for residual in (False, True)]
    assert found == pytest.approx(exact, abs=1e-5)
    # the control: f from the Gram matrices of x and y, in the same precision
    x, y = x.float() - x.float().mean(0), (x + f).float() - (x + f).float().mean(0)
    xx, xy, yy = x.T @ x, x.T @ y, y.T @ y
    f2 = (yy - xy - xy.T + xx).trace()
    assert abs(float(f2) / float((f - f.mean(0)).square().sum()) - 1) > 0.01


# ---- what the scores must satisfy ------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 6), st.sampled_from(ESTIMATORS))
def test_scores_do_not_see_invertible_maps_of_x_nor_rotations_scalings_and_shifts_of_y(seed, D, K, estimator):
    x = draw(90, D, seed=seed)
    y = torch.sin(2 * x @ draw(D, K, seed=seed + 1)) + 0.3 * draw(90, K, seed=seed + 2)
    score = linearity_score(x, y, estimator=estimator, clamp=False)
    U, _, Vt = torch.linalg.svd(draw(D, D, seed=seed + 3))
    invertible = U @ torch.diag(torch.logspace(-2, 2, D).double()) @ Vt  # condition number 1e4
    rotation = torch.linalg.qr(draw(K, K, seed=seed + 4))[0]
    other = linearity_score(x @ invertible - 7, 50 * y @ rotation + 3, estimator=estimator, clamp=False)
    assert other == pytest.approx(score, abs=1e-7)
    assert 0 <= linearity_score(x, y, estimator=estimator) <= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10), st.integers(1, 10))
def test_affine_maps_score_one(seed, D, K):
    x = draw(100, D, seed=seed) * torch.logspace(-3, 3, D).double() + 10
    y = x @ draw(D, K, seed=seed + 1) - 4
    for estimator in ESTIMATORS:
        assert linearity_score(x, y, estimator=estimator) == pytest.approx(1, abs=1e-9)
    assert prediction_score(x, y) == pytest.approx(1, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-1, 2))
def test_with_and_without_residual_leave_the_same_remainder_so_the_norm_ratio_alone_is_a_floor(
    seed, log_size, a
):
    x = draw(120, 5, seed=seed) * torch.tensor([1, 1, 1, 5, 20.0]).double()
    f = 10**log_size * torch.cos(9 * x @ draw(5, 5, seed=seed + 1)) + a * x.roll(1, 1)
    gathered = gather(x, f)
    ratio = gathered.norm_ratio()
    for estimator in ESTIMATORS:
        with_, without = (gathered.scores(estimator, residual=r, clamp=False) for r in (True, False))
        torch.testing.assert_close(1 - with_, (1 - without) * ratio**2, rtol=1e-9, atol=1e-12)
    raw = float(gathered.scores("raw", residual=True))
    assert raw == pytest.approx(svd_score(x, x + f), abs=1e-9)
    assert raw >= norm_ratio_floor(float(ratio)) - 1e-12
    assert raw >= norm_ratio_floor(float(gathered.norm_ratio(over="input")), over="input") - 1e-12


def test_the_floor_is_reached_by_a_layer_that_is_not_linear_at_all():
    x = draw(4000, 3)
    x = torch.cat([x, -x])
    f = x.square() - x.square().mean(0)  # even: uncorrelated with x, exactly, on these tokens
    gathered = gather(x, 0.1 * f, batch=500)
    assert float(gathered.scores("raw", residual=False)) == pytest.approx(0, abs=1e-9)
    floor = norm_ratio_floor(float(gathered.norm_ratio()))
    assert float(gathered.scores("raw", residual=True)) == pytest.approx(floor, abs=1e-9)
    assert 0.97 < floor < 0.99
    assert [norm_ratio_floor(r, over="input") for r in (0, 0.25, 0.5, 7)] == [1, pytest.approx(8 / 9), 0, 0]


def test_norm_ratios_are_the_frobenius_norms_about_the_means_or_not():
    x, f = block()
    y, gathered = x + f, gather(x, f)
    for over, base in (("output", y), ("input", x)):
        for centred, shift in ((True, 1), (False, 0)):
            expected = (f - shift * f.mean(0)).norm() / (base - shift * base.mean(0)).norm()
            assert float(gathered.norm_ratio(centred=centred, over=over)) == pytest.approx(float(expected))


# ---- bias ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("N, D", [(200, 20), (64, 28), (1000, 20)])
def test_independent_data_score_zero_on_average_and_raw_scores_its_bias(N, D):
    runs = 100
    found = {e: torch.empty(runs, dtype=torch.float64) for e in ESTIMATORS}
    for run in range(runs):
        x, y = draw(N, D, seed=2 * run), draw(N, 3, seed=2 * run + 1)
        for estimator, scores in found.items():
            scores[run] = linearity_score(x, y, estimator=estimator, clamp=False)
    for estimator, expected in (("held-out", 0), ("adjusted", 0), ("raw", D / (N - 1))):
        mean, se = found[estimator].mean(), found[estimator].std() / math.sqrt(runs)
        assert abs(mean - expected) < 4 * se, estimator  # one false alarm in 16,000, and the seeds are fixed
    assert found["raw"].mean() > 10 * found["raw"].std() / math.sqrt(runs)  # the control
    assert expected_raw_score(0, N, D) == pytest.approx(D / (N - 1))


@pytest.mark.slow
@pytest.mark.parametrize("nonlinear", [False, True])
def test_held_out_has_the_mean_of_endless_data_where_raw_is_too_high_and_prediction_too_low(nonlinear):
    D, N, runs = 10, 120, 150
    W = draw(D, 4, seed=9)

    def sample(n, seed):
        x = draw(n, D, seed=seed)
        noise = 4 * torch.cos(3 * x.roll(1, 1)[:, :4]) if nonlinear else 3 * draw(n, 4, seed=seed + 1)
        return x, x @ W + noise

    truth = svd_score(*sample(200_000, 10**6))
    raw, held, adjusted, predicted = torch.tensor([
        [linearity_score(x, y, estimator=e, clamp=False) for e in ("raw", "held-out", "adjusted")]
        + [prediction_score(x, y)]
        for x, y in (sample(N, 2 * run) for run in range(runs))
    ]).double().T  # fmt: skip
    for scores, slack in ((held, 0.01), (adjusted, 0.01)):  # the ratio itself has a bias of order 1/N
        assert abs(scores.mean() - truth) < slack + 4 * scores.std() / math.sqrt(runs)
    assert abs(raw.mean() - expected_raw_score(truth, N, D)) < 0.01
    assert raw.mean() - truth > 0.02 and truth - predicted.mean() > 0.03


def test_the_bias_curve_gives_the_numbers_at_the_size_of_the_paper():
    assert expected_raw_score(0, 15_174, 4096) == pytest.approx(0.27, abs=0.005)
    assert expected_raw_score(0.4, 15_174, 4096) == pytest.approx(0.56, abs=0.005)
    assert expected_raw_score(1, 100, 50) == 1
    with pytest.raises(ValueError, match="1 <= D <= N - 2"):
        expected_raw_score(0, 50, 49)


def test_knowing_the_identity_spares_the_held_out_score_noise():
    spread = []
    for residual in (True, False):
        scores = []
        for seed in range(40):
            x = draw(200, 20, seed=2 * seed)
            y = x + 0.05 * draw(200, 20, seed=2 * seed + 1)
            scores.append(linearity_score(x, y, residual=residual, clamp=False))
        assert np.mean(scores) == pytest.approx(1 - 0.05**2 / (1 + 0.05**2), abs=1e-3)
        spread.append(np.std(scores))
    assert spread[0] < spread[1] / 2


# ---- intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("k", [0, 2])
def test_the_jackknife_leaves_out_group_after_group(estimator, k):
    x, f = block()
    G = 5
    scores, lo, hi = gather(x, f, groups=G, directions=True).jackknife(
        estimator, residual=False, remove_directions=k, clamp=False
    )
    less = []
    for gone in range(G):
        part = LinearityAccumulator(1, 12, groups=2, directions=True)
        for t in range(0, 400, 50):
            if (group := t // 50 % G) != gone:
                part.add_layer(0, x[t : t + 50], f[t : t + 50], group % 2)
        less.append(float(part.scores(estimator, residual=False, remove_directions=k, clamp=False)))
    se = math.sqrt((G - 1) / G * sum((s - np.mean(less)) ** 2 for s in less))
    assert float(hi - scores) == pytest.approx(2.776 * se, rel=1e-3)  # t of 4 degrees, from any table
    assert float(scores - lo) == pytest.approx(float(hi - scores))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_interval_of_pure_noise_contains_zero_as_often_as_it_says(share):
    D, runs, hits = 10, 60, 0
    for run in range(runs):
        x, f = draw(int(2 * D / share), D, seed=2 * run), draw(int(2 * D / share), D, seed=2 * run + 1)
        if share == 0.5:
            x, f = (torch.cat([t, draw(24, D, seed=run + s)]) for t, s in ((x, 5000), (f, 9000)))
        gathered = gather(x, f, batch=len(x) // 8)
        _, lo, hi = gathered.jackknife(residual=False, clamp=False)
        hits += bool(lo <= 0 <= hi)
    assert hits >= 51  # 95 % of 60 is 57; fewer than 51 has a chance of 1 in 600


def test_student_t_is_the_table():
    for level, degrees, value in ((0.95, 1, 12.706), (0.95, 7, 2.3646), (0.99, 3, 5.8409), (0.9, 30, 1.6973)):
        assert student_t(level, degrees) == pytest.approx(value, rel=1e-4)
