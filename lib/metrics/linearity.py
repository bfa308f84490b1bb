r"""How linear is a layer? R² of the best affine map between residual streams, without the published bias.

x (N, D) is the residual stream before a layer at N tokens, f what the layer adds, y = x + f. With the means
removed, S_xx = X'X, S_xy = X'Y and the Frobenius norm ||Y||² = tr Y'Y, the score is the R² of least squares
over all outputs together, with residual (x -> y) and without (x -> f):

    raw       s = tr(S_yx S_xx^+ S_xy) / ||Y||², in [0, 1]. The paper's; for independent data D / (N - 1).
    adjusted  1 - (1 - s)(N - 1)/(N - 1 - rank S_xx): right for independent tokens; those of a text are not.
    held-out  cross-fitted: tr(W_A' S_xx W_B) / ||Y||², maps W_A, W_B fitted on two halves of the tokens.

Why held-out has no bias: let E[y | x] = x W. Given X, each fit has mean W and their errors are independent,
so E[W_A' S_xx W_B] = W' S_xx W: no square of an error is left. If E[y | x] is not linear, least squares is
unbiased up to O(1/N), where N counts the tokens that matter: with a few huge ones held-out may even exceed
raw: look at its interval, and at the score without them. S_xx and ||Y|| are of all tokens. Since on half B
S_xx W_B = S_xy, no D x D product is needed: tr(W_A' S_xy^B) + tr(W_B' S_xy^A), and a term for the two means.

Both scores from one fit: x -> y and x -> f leave the same remainder, hence exactly (centred norms)

    1 - s_with = (1 - s_without) ||F||² / ||Y||², so s_with >= 1 - r², r = ||F|| / ||Y||.

A block with r = 0.1 scores 0.99 whatever it computes: see `norm_ratio_floor`.

Sources: Razzhigaev et al. 2024, section 3 (raw, with and without residual); the rest derived.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.metrics.linear_fits import ESTIMATORS, LinearityAccumulator, checked_total, inner, solved
from lib.metrics.moments import symmetric

__all__ = [
    "ESTIMATORS",
    "LinearityAccumulator",
    "expected_raw_score",
    "linearity_score",
    "neighbour_cosine",
    "norm_ratio_floor",
    "prediction_score",
    "quantiles",
    "token_errors",
    "token_norm_ratio",
]


def linearity_score(
    x: Tensor, y: Tensor, *, estimator: str = "held-out", residual: bool = False, clamp: bool = True
) -> float:
    """R² of the best affine map from x to y, (…, D) each: 1 for linear maps, about 0 for independent data.

    In float64, whatever comes in. Unchanged by invertible maps of x, by rotations and scalings of y, by
    shifts, and by columns of x that are constant or repeat others. held-out halves the tokens in their order,
    in 16 alternating blocks. clamp=False keeps an estimate below 0 or above 1, to be averaged. residual=True:
    y is known to contain x, so held-out fits y - x only, as `LinearityAccumulator` does; less noise.
    Raises ValueError on unequal shapes, values that are not finite, a constant y, and too few tokens: with D
    columns of x that vary, raw and adjusted need N >= D + 2, held-out that many in each half.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    gathered = _gathered(x, y - x if residual else y)
    return float(gathered.scores(estimator, residual=residual, clamp=clamp)[0])


def prediction_score(x: Tensor, y: Tensor) -> float:
    """R² on tokens that were not fitted: fit one half, score the other about its own mean; the mean of both.

    Pessimistic, where held-out is not: about (1 - R²) 2D / N too low, and it has no floor. Errors as above.
    """
    gathered = _gathered(x, y)
    halves = [gathered._centred(0, (g,)) for g in (0, 1)]
    scores = []
    for fit, test in (halves, halves[::-1]):
        _, W = solved(fit, 0)
        shift = (test.mean_f - test.mean_x @ W) - (fit.mean_f - fit.mean_x @ W)
        total = checked_total(test.total(residual=False), 0, residual=False)
        missed = (
            test.f2 - 2 * inner(W, test.xf) + inner(W, symmetric(test.xx) @ W) + test.n * float(shift @ shift)
        )
        scores.append(1 - missed / total)
    return sum(scores) / 2


def _gathered(x: Tensor, y: Tensor) -> LinearityAccumulator:
    """One "layer" that adds y, its tokens in 16 blocks, even ones group 0 and odd ones group 1."""
    if x.shape[:-1] != y.shape[:-1] or x.dim() < 2:
        raise ValueError(f"x and y are (…, D) for the same tokens, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = (t.detach().reshape(-1, t.shape[-1]).double() for t in (x, y))
    width = max(x.shape[1], y.shape[1])  # columns of zeros change no score
    x, y = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (x, y))
    if (N := len(x)) < 2:
        raise ValueError(f"a score needs at least 2 tokens, got {N}")
    gathered = LinearityAccumulator(1, width, dtype=torch.float64, device=x.device)
    for group in (0, 1):
        mine = torch.arange(N, device=x.device) * min(16, N) // N % 2 == group
        gathered.add_layer(0, x[mine], y[mine], group)
    return gathered


def expected_raw_score(r2: float, N: int, D: int) -> float:
    """E[raw] ≈ 1 - (1 - r2)(N - 1 - D)/(N - 1) at a true R² of r2, D the rank of x, N independent tokens.

    Exact for r2 = 0 and y Gaussian given x: D / (N - 1). Raises ValueError unless r2 <= 1 and N >= D + 2.
    Source: empirical bias of R², derived; the paper does not mention it.
    """
    if not r2 <= 1 or not 1 <= D <= N - 2:
        raise ValueError(f"need r2 <= 1 and 1 <= D <= N - 2, got r2={r2}, N={N}, D={D}")
    return 1 - (1 - r2) * (N - 1 - D) / (N - 1)


def norm_ratio_floor(ratio: float, *, over: str = "output") -> float:
    """Least raw score with residual that any block with this norm ratio has, whatever it computes. Derived.

    over="output", r = ||F|| / ||Y||: 1 - r². over="input", r' = ||F|| / ||X||: 1 - (r' / (1 - r'))², since
    ||Y|| >= ||X|| - ||F||; vacuous (0) from r' = 1/2. Centred Frobenius norms. ValueError if ratio < 0.
    """
    check_choice("over", over, ("output", "input"))
    if not ratio >= 0:
        raise ValueError(f"a ratio of norms is at least 0, got {ratio}")
    if over == "input":
        ratio = ratio / (1 - ratio) if ratio < 0.5 else 1.0
    return max(0.0, 1 - ratio**2)


def token_errors(A: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Relative error of an affine map at each token, ||x A + b - y|| / ||y - x||: (N,), 1 where no better
    than leaving the stream as it is. x, y (N, D). Raises ValueError where y = x."""
    f = (y - x).norm(dim=-1)
    if not (f > 0).all():
        raise ValueError(f"{int((f == 0).sum())} tokens have y = x: no change to measure the error against")
    return (x @ A.to(x) + b.to(x) - y).norm(dim=-1) / f


def quantiles(values: Tensor, q: Sequence[float] = (0.5, 0.9, 0.99, 1.0)) -> list[float]:
    """Quantiles over all values, linear between the two nearest: how long is the tail?"""
    ordered = values.detach().flatten().double().sort().values  # torch.quantile refuses more than 16 M values
    place = torch.tensor(q, dtype=torch.float64) * (len(ordered) - 1)
    below, above = ordered[place.floor().long()], ordered[place.ceil().long()]
    return (below + (place - place.floor()) * (above - below)).tolist()


def neighbour_cosine(x: Tensor, y: Tensor) -> Tensor:
    """cos(x, y) at each token: (…, D) -> (…,). 0 where one of them is 0."""
    return torch.nn.functional.cosine_similarity(x, y, dim=-1)


def token_norm_ratio(x: Tensor, f: Tensor) -> Tensor:
    """||f|| / ||x|| at each token: (…, D) -> (…,). Its median is not dominated by a few huge tokens."""
    return f.norm(dim=-1) / x.norm(dim=-1)
