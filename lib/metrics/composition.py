r"""Looking into composed attention: how far it is from plain heads, from fixed mixtures, from distributions.

A composition takes the H patterns that a query i and a key j have, A_{1,ij} … A_{H,ij}, to as many new ones:
A'_{ij} = A_{ij} M, M (H, H) from head g to head h, M = I for plain heads. What tells the cases apart:

    one head          S_h = Q_h K_h' has rank at most d, the head width
    fixed M           every A'_h lies in span(A_1 … A_H), at most H dimensions, for whatever M; rank <= H d
    M_i of the query  A'_h = Σ_g D_gh A_g with D_gh diagonal: any matrix whose row i lies in the span of the H
                      rows A_g[i], up to T H dimensions; rank <= H d (with a key side too: <= 2 H d)

so a rank cannot show that M depends on the query, and `share_outside_span` does: 0 exactly for a fixed M.

All values in float64, whatever comes in. B batch, T tokens (keys), R query rows, H heads.
Sources: effective rank, Roy and Vetterli 2007; the formula of M, Xiao et al. 2024; the rest derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.metrics.intervals import bootstrap

QUANTILES = (0.05, 0.5, 0.95)


def composition_matrices(
    w1: Tensor, w2: Tensor, gates: Tensor | None = None, W_b: Tensor | None = None
) -> Tensor:
    """M = I + W_b + Σ_r w1_r w2_r' + diag(gates), one side of one stage. -> (B, T, H, H), M[g, h]: g to h.

    w1, w2: (B, T, R, H), R the rank of the dynamic part, gates: (B, T, H), W_b: (H, H), as `compositions` of
    a DCMHA and its stages hold them. Of two sides, M_ij = M_i + M_j - I, with W_b given to one of them.
    """
    H = w1.shape[-1]
    shapes = [w1.dim() == 4, w1.shape == w2.shape]
    shapes.append(gates is None or gates.shape == (*w1.shape[:2], H))
    shapes.append(W_b is None or W_b.shape == (H, H))
    if not all(shapes):
        given = [None if part is None else tuple(part.shape) for part in (w1, w2, gates, W_b)]
        raise ValueError(
            "w1 and w2 are (B, T, R, H), gates (B, T, H) or None, W_b (H, H) or None; "
            f"got {', '.join(map(str, given))}"
        )
    w1, w2 = w1.double(), w2.double()
    M = torch.eye(H, dtype=torch.float64, device=w1.device) + w1.mT @ w2  # (B, T, H, H)
    M = M if W_b is None else M + W_b.double()
    return M if gates is None else M + torch.diag_embed(gates.double())


def compose(A: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
    """A'_{h,ij} = Σ_g A_{g,ij} (M_i + M_j - I)[g, h], for A (B, H, R, T). -> (B, H, R, T).

    query: (B, R, H, H), key: (B, T, H, H). A side that is not there is None, and its M the identity.
    """
    A = A.double()
    out = A if query is None and key is None else 0
    if query is not None:
        out = torch.einsum("bgij,bigh->bhij", A, query.double())
    if key is not None:
        out = out + torch.einsum("bgij,bjgh->bhij", A, key.double())
    return out - A if query is not None and key is not None else out


def effective_rank(X: Tensor) -> Tensor:
    """exp of the entropy of the singular values of X (…, m, n), scaled to sum to 1. -> (…), 1 to min(m, n).

    k equal singular values give k, a matrix of rank 1 gives 1. A matrix of zeros is a ValueError: it has
    none. Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    s = torch.linalg.svdvals(X.double())
    total = s.sum(dim=-1, keepdim=True)
    if not (total > 0).all():
        raise ValueError("a matrix of zeros has no effective rank")
    return torch.special.entr(s / total).sum(dim=-1).exp()


def numerical_rank(X: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """How many singular values of X (…, m, n) exceed `tolerance` times the largest. -> (…) long.

    The default suits matrices computed in float32, whose rounding leaves about 1e-7.
    """
    s = torch.linalg.svdvals(X.double())
    return ((s > tolerance * s[..., :1]) & (s > 0)).sum(dim=-1)


def over_heads(A: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Patterns as one matrix with a row a head: A (…, H, R, T) -> (…, H, N), N the allowed pairs, or R T.

    allowed: (R, T) bool. What lies outside of it is left out, so that a causal mask adds no common zeros.
    """
    _check_patterns(A)
    return A.flatten(-2).double() if allowed is None else A[..., allowed].double()


def effective_rank_over_heads(A: Tensor, allowed: Tensor | None = None) -> Tensor:
    """`effective_rank` of the (H, N) matrix of all patterns, A (…, H, R, T) -> (…).

    H: the heads are orthogonal and equally strong. 1: they are multiples of one pattern. No invertible fixed
    M changes the rank itself; it may change the effective one.
    """
    return effective_rank(over_heads(A, allowed))


def share_outside_span(before: Tensor, after: Tensor, allowed: Tensor | None = None) -> Tensor:
    """||after - P after||² / ||after||², P the projection on span(before_1 … before_H). -> (…) in [0, 1].

    before, after: (…, H, R, T); given `after - before`, it is the share of what the composition adds that no
    fixed mixing of heads could have added. 0 if nothing is added.
    """
    X, Y = over_heads(before, allowed), over_heads(after, allowed)
    if X.shape != Y.shape:
        raise ValueError(f"the patterns have two shapes: {tuple(before.shape)} and {tuple(after.shape)}")
    _, s, V = torch.linalg.svd(X, full_matrices=False)  # V: (…, H, N), orthonormal rows
    V = V * (s > 1e-10 * s[..., :1]).unsqueeze(-1)  # of directions that are there
    total = Y.square().sum(dim=(-2, -1))
    outside = (Y - Y @ V.mT @ V).square().sum(dim=(-2, -1))
    return torch.where(total > 0, outside / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def row_sums(weight: Tensor, allowed: Tensor | None = None) -> dict[str, float]:
    """How far the rows of composed attention (…, H, R, T) are from distributions, over all heads and rows.

    mean, std, low, median, high (5, 50, 95 %) of the sums over keys; distance: mean |sum - 1|;
    negative_share: of the allowed entries that are below 0; negative_mass: their part of Σ |entries|.
    Softmax gives 1, 0, 1, 1, 1, 0, 0, 0.
    """
    entries = over_heads(weight, allowed)
    kept = weight.double() if allowed is None else weight.double().masked_fill(~allowed, 0.0)
    sums = kept.sum(dim=-1).flatten()
    if not sums.isfinite().all():
        raise ValueError("the attention holds values that are not finite")
    at = torch.tensor(QUANTILES, dtype=torch.float64, device=sums.device)
    low, median, high = torch.quantile(sums[:: max(1, len(sums) // 10**7)], at).tolist()
    return {
        "mean": sums.mean().item(),
        "std": sums.std(correction=0).item(),
        "low": low,
        "median": median,
        "high": high,
        "distance": (sums - 1).abs().mean().item(),
        "negative_share": (entries < 0).double().mean().item(),
        "negative_mass": (entries.clamp(max=0).abs().sum() / entries.abs().sum()).item(),
    }


def distance_from_identity(M: Tensor) -> Tensor:
    """||M - I|| / √H in the Frobenius norm, M (…, H, H) -> (…): 1 where the change is as large as I."""
    H = M.shape[-1]
    return (M.double() - torch.eye(H, dtype=torch.float64, device=M.device)).norm(dim=(-2, -1)) / H**0.5


def off_diagonal_strength(M: Tensor) -> Tensor:
    """√(Σ_{g≠h} M_gh² / H), M (…, H, H) -> (…): what reaches a head from the others, where I is 1."""
    M = M.double()
    off = M - torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))
    return off.norm(dim=(-2, -1)) / M.shape[-1] ** 0.5


def dynamic_share(M: Tensor) -> float:
    """Σ_n ||M_n - mean||² / Σ_n ||M_n - I||², M (N, H, H) over N tokens. In [0, 1]; 0 if every M is I.

    What of the change depends on the token; the rest one fixed matrix (talking heads) could do.
    """
    M = _per_token(M)
    H = M.shape[-1]
    whole = (M - torch.eye(H, dtype=torch.float64, device=M.device)).square().sum()
    return ((M - M.mean(dim=0)).square().sum() / whole).item() if whole > 0 else 0.0


def share_between(M: Tensor, label: Tensor) -> float:
    """Share of the variance of M (N, H, H) over tokens that lies between classes label (N,): η² in [0, 1].

    Classes without relation to M give about (classes - 1)/(N - 1): compare with shuffled labels.
    """
    M = _per_token(M)
    if label.shape != M.shape[:1]:
        raise ValueError(f"one label a token: M {tuple(M.shape)}, labels {tuple(label.shape)}")
    centred = (M - M.mean(dim=0)).flatten(1)
    between = sum((label == c).sum() * centred[label == c].mean(dim=0).square().sum() for c in label.unique())
    whole = centred.square().sum()
    return (between / whole).item() if whole > 0 else 0.0


def with_interval(values: Sequence[float], *, seed: int) -> list[float]:
    """[mean, lo, hi]: the mean over windows, and its 95 % bootstrap interval."""
    lo, hi = bootstrap(values, seed=seed, resamples=2000)
    return [sum(map(float, values)) / len(values), lo, hi]


def _per_token(M: Tensor) -> Tensor:
    if M.dim() != 3 or M.shape[1] != M.shape[2] or not len(M):
        raise ValueError(f"M is (N, H, H) with a matrix for each of N tokens, got {tuple(M.shape)}")
    return M.double()


def _check_patterns(A: Tensor) -> None:
    if A.dim() < 3:
        raise ValueError(f"patterns are (…, H, R, T), got {tuple(A.shape)}")
