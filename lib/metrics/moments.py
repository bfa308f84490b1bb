"""Second moments of what enters a layer, x, and of what the layer adds, f: gathered in batches, then solved.

Everything that least squares can say of y = x + f follows from x and f: S_xy = S_xx + S_xf, and the best map
of y is the identity plus that of f. Nothing here subtracts a Gram matrix of y from one of x: a few huge
activations that both share ("massive activations") would cancel there and leave rounding. Derived.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1024  # tokens in one matrix product
FLUSH = 8192  # tokens that are summed in the products' own precision before float64 takes over
LEAF = 160  # columns below which a symmetric product is computed whole


class Moments:
    """Sums over n tokens of x and f (D each), and of their products, about a fixed reference point.

    Products are taken in `dtype` after the reference, near the mean, is subtracted; they are summed in
    float64. Of the symmetric xx and ff (D, D) only the upper triangle is kept. keep_ff: the matrix S_ff too,
    which removing directions needs; its trace is always kept.
    """

    def __init__(self, D: int, *, dtype: torch.dtype, device: str, keep_ff: bool):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n, self.dtype = 0, dtype
        self.reference = zeros(2 * D)  # of x, then of f
        self.sums = zeros(2 * D)
        self.xx, self.xf = zeros(D, D), zeros(D, D)
        self.ff = zeros(D, D) if keep_ff else None
        self.energy = zeros(2)  # ||F||², ||Y||²

    def add(self, x: Tensor, f: Tensor) -> None:
        """Add N tokens, (N, D) each. ValueError, and nothing added, if a value is not finite or too large."""
        new: dict[str, Tensor] = {}
        for i in range(0, len(x), FLUSH):
            part = self._products(x[i : i + FLUSH], f[i : i + FLUSH])
            new = {name: new[name].double() + value for name, value in part.items()} if new else part
        checked = (new["sums"], new["energy"], new["xx"].diagonal())
        if not all(torch.isfinite(each).all() for each in checked):
            wrong = [name for name, values in (("x", x), ("f", f)) if not torch.isfinite(values).all()]
            what = f"values of {wrong[0]} are not finite" if wrong else f"squares overflow {self.dtype}"
            raise ValueError(what)
        self.n += len(x)
        for name, value in new.items():
            getattr(self, name).add_(value)

    def _products(self, x: Tensor, f: Tensor) -> dict[str, Tensor]:
        D, there, like = x.shape[1], self.sums.device, {"dtype": self.dtype, "device": x.device}
        names = ("xx", "xf") if self.ff is None else ("xx", "xf", "ff")
        found = {name: torch.zeros(D, D, **like) for name in names}
        found |= {"sums": torch.zeros_like(self.sums), "energy": torch.zeros_like(self.energy)}
        # 16 columns more than needed: rows a power of two apart would share their places in the cache
        both = torch.empty(min(ROWS, len(x)), 2 * D + 16, **like)
        shift = self.reference.to(**like)
        for i in range(0, len(x), ROWS):
            part = both[: len(x) - i]
            x_, f_ = part[:, :D], part[:, D : 2 * D]
            torch.sub(x[i : i + ROWS], shift[:D], out=x_)
            torch.sub(f[i : i + ROWS], shift[D:], out=f_)
            found["sums"] += part[:, : 2 * D].sum(0).to(there)
            norms = torch.stack([torch.linalg.vector_norm(v, dim=1) for v in (f_, x_ + f_)])
            found["energy"] += norms.to(there).double().square().sum(1)
            found["xf"].addmm_(x_.T, f_)
            _add_square(found["xx"], x_)
            if "ff" in found:
                _add_square(found["ff"], f_)
        return {name: value.to(there) for name, value in found.items()}

    def moved(self, reference: Tensor) -> Moments:
        """The same tokens about another reference."""
        D = len(self.xx)
        new = Moments(D, dtype=self.dtype, device=self.sums.device, keep_ff=self.ff is not None)
        d = self.reference - reference
        new.n, new.reference, new.sums = self.n, reference.clone(), self.sums + self.n * d
        x, f = slice(D), slice(D, None)
        for name, a, b in (("xx", x, x), ("xf", x, f), ("ff", f, f)):
            if (old := getattr(self, name)) is not None:
                step = torch.outer(d[a], self.sums[b]) + torch.outer(self.sums[a] + self.n * d[a], d[b])
                setattr(new, name, old + step)
        steps = [(self.sums[f], d[f]), (self.sums[x] + self.sums[f], d[x] + d[f])]
        new.energy = self.energy + torch.stack([2 * s @ e + self.n * e @ e for s, e in steps])
        return new

    def absorb(self, other: Moments) -> None:
        """Add the tokens of another one."""
        if not torch.equal(self.reference, other.reference):
            other = other.moved(self.reference)
        self.n += other.n
        for name in ("sums", "xx", "xf", "ff", "energy"):
            if getattr(self, name) is not None:
                getattr(self, name).add_(getattr(other, name))


def _add_square(out: Tensor, z: Tensor) -> None:
    """out += z' z on and above the diagonal: the upper right quarter, then both quarters on the diagonal."""
    D = len(out)
    if D <= LEAF:
        out.addmm_(z.T, z)
        return
    h = D // 2
    out[:h, h:].addmm_(z[:, :h].T, z[:, h:])
    _add_square(out[:h, :h], z[:, :h])
    _add_square(out[h:, h:], z[:, h:])


@dataclass(frozen=True)
class Centred:
    """Moments of n tokens about their own means. f2, y2: ||F||², ||Y||² (Frobenius).

    xx, xf, ff: (D, D), of xx and ff the upper triangle: what is below it means nothing.
    """

    n: int
    mean_x: Tensor
    mean_f: Tensor
    xx: Tensor
    xf: Tensor
    ff: Tensor | None
    f2: float
    y2: float
    eps: float  # spacing of the numbers that were multiplied

    @property
    def x2(self) -> float:
        return float(self.xx.trace())

    def total(self, *, residual: bool) -> float:
        """||Y||² or ||F||², or 0 if that is constant up to the rounding of its mean."""
        of, mean = (self.y2, self.mean_x.abs() + self.mean_f.abs()) if residual else (self.f2, self.mean_f)
        return of if of > self.n * float((8 * self.eps * mean).square().sum()) else 0.0


def centred(groups: Sequence[Moments]) -> Centred:
    """All tokens of some groups that share a reference, about their common mean."""
    first, n = groups[0], sum(g.n for g in groups)
    D = len(first.xx)
    mean = sum(g.sums for g in groups) / n
    found = {"xx": None, "xf": None, "ff": None}
    for name, a, b in (("xx", mean[:D], mean[:D]), ("xf", mean[:D], mean[D:]), ("ff", mean[D:], mean[D:])):
        parts = [getattr(g, name) for g in groups]
        if parts[0] is not None:
            found[name] = parts[0].addr(a, b, alpha=-n)
            for part in parts[1:]:
                found[name] += part
    squares = torch.stack([mean[D:].square().sum(), (mean[:D] + mean[D:]).square().sum()])
    f2, y2 = (sum(g.energy for g in groups) - n * squares).clamp_min(0).tolist()
    means = first.reference + mean
    return Centred(n, means[:D], means[D:], **found, f2=f2, y2=y2, eps=torch.finfo(first.dtype).eps)


def without(moments: Sequence[Centred], kept: Tensor) -> list[Centred]:
    """The moments with x and f (so y too) projected on what is kept, in its coordinates.

    kept: (D, D - k), orthonormal.
    """
    found = []
    for m in moments:
        xx, xf, ff = (kept.T @ S @ kept for S in (symmetric(m.xx), m.xf, symmetric(m.ff)))
        f2 = float(ff.trace())
        y2 = f2 + float(xx.trace() + 2 * xf.trace())
        found.append(Centred(m.n, m.mean_x @ kept, m.mean_f @ kept, xx, xf, ff, f2, y2, m.eps))
    return found


class Solver:
    """Least squares on one S_xx: Cholesky, or eigenvectors where that is rank-deficient.

    S_xx is first scaled to a unit diagonal, so that units of columns, and a few huge activations, do not
    decide what counts as zero. Columns that are constant up to rounding are left out. A squared pivot, or an
    eigenvalue, counts as zero below 4 sqrt(D) eps, the rounding of products. columns: how many vary.
    """

    def __init__(self, m: Centred, *, ridge: float = 0.0):
        diagonal = m.xx.diagonal()
        live = diagonal > m.n * (8 * m.eps * m.mean_x).square()
        self.live = None if bool(live.all()) else live.nonzero().squeeze(1)
        S = m.xx if self.live is None else m.xx[self.live][:, self.live]
        self.scale = S.diagonal().rsqrt()
        C = (S * self.scale).mul_(self.scale[:, None])
        C.diagonal().add_(ridge)
        self.vectors, self.columns, self.rank = None, len(C), len(C)
        if not self.columns:
            return
        least = 4 * m.eps * math.sqrt(self.columns)
        self.R, failed = torch.linalg.cholesky_ex(C, upper=True)  # C = R' R
        if failed or self.R.diagonal().square().min() < least:
            values, vectors = torch.linalg.eigh(C, UPLO="U")
            kept = values > max(least, 4 * math.sqrt(self.columns) * torch.finfo(C.dtype).eps * values[-1])
            self.vectors, self.rank = vectors[:, kept] * values[kept].rsqrt(), int(kept.sum())

    def half(self, S_xf: Tensor) -> Tensor:
        """Z with Z' Z = S_fx S_xx^+ S_xf: (rank, D)."""
        S = (S_xf if self.live is None else S_xf[self.live]) * self.scale[:, None]
        if self.vectors is not None:
            return self.vectors.T @ S
        if not self.columns:
            return S
        return torch.linalg.solve_triangular(self.R, S.T, upper=True, left=False).T  # Z' R = S'

    def solve(self, S_xf: Tensor) -> Tensor:
        """W = S_xx^+ S_xf: (D, D), rows of left-out columns 0."""
        W = self.half(S_xf)
        if self.vectors is not None:
            W = self.vectors @ W
        elif self.columns:
            W = torch.linalg.solve_triangular(self.R.T, W.T, upper=False, left=False).T  # W' R' = Z'
        W = W * self.scale[:, None]
        return W if self.live is None else torch.zeros_like(S_xf).index_copy_(0, self.live, W)


def symmetric(upper: Tensor) -> Tensor:
    """The whole matrix from its upper triangle."""
    return upper.triu() + upper.triu(1).T
