"""One pass over batches, then the linearity scores, jackknife intervals and affine maps of all layers.

The scores are defined in `lib.metrics.linearity`, which exports what is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.metrics.intervals import student_t
from lib.metrics.moments import Centred, Moments, Solver, centred, without

ESTIMATORS = ("held-out", "adjusted", "raw")


class LinearityAccumulator:
    """Scores of all layers from one pass over batches, with memory that does not grow with the tokens.

    Tokens come in groups (chunks of text, say), the unit of the halves and of the jackknife. For each group
    and layer it keeps sums, S_xx and S_xf, 16 D² bytes, and half as much again for S_ff, which only
    remove_directions needs (directions=True). That is 1.3 GB for 30 layers, 8 groups and D = 576: run a large
    model layer by layer over all tokens instead, with one accumulator of n_layers=1 after the other.
    Large batches are cheaper: more than D tokens, best 2048 or more.

        gathered = LinearityAccumulator(L, D, groups=8)
        for i, tokens in enumerate(batches):
            h = model.embed(tokens)
            for l in range(L):
                f = sum(model.run_layer(l, h))
                gathered.add_layer(l, h, f, group=i % 8)
                h = h + f
        gathered.scores("held-out", residual=False)

    dtype: of the products (sums are float64); None: float32, or float64 for float64 input. Halves of the
    held-out score are every other one of the groups that hold tokens.
    """

    def __init__(
        self, n_layers: int, d_model: int, *, groups: int = 2, dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu", directions: bool = False,
    ):  # fmt: skip
        for name, value in (("n_layers", n_layers), ("d_model", d_model), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"products are taken in torch.float32 or torch.float64, got {dtype}")
        self.n_layers, self.d_model, self.groups = n_layers, d_model, groups
        self.dtype, self.device, self.directions = dtype, device, directions
        self.moments: list[dict[int, Moments]] = [{} for _ in range(n_layers)]  # of the groups with tokens
        self._known: dict[tuple, _Fit] = {}  # fits that other scores share, until tokens are added

    def add(self, residual: Tensor, group: int) -> None:
        """Add a full stack (L + 1, …, D), layers' own outputs being the differences. Huge streams lose digits
        of f there that `add_layer` keeps."""
        if residual.dim() < 3 or residual.shape[0] != self.n_layers + 1:
            raise ValueError(
                f"the stack is ({self.n_layers + 1}, tokens, {self.d_model}), with the stream before layer 0 "
                f"and the one after the last layer, before the final norm; got {tuple(residual.shape)}"
            )
        for l in range(self.n_layers):
            self.add_layer(l, residual[l], residual[l + 1] - residual[l], group)

    def add_layer(self, l: int, x: Tensor, f: Tensor, group: int) -> None:
        """Add the stream x before layer l and what the layer adds to it, (…, D) each."""
        self._check(l, x, f, group)
        x, f = (t.detach().reshape(-1, self.d_model) for t in (x, f))
        dtype = self.dtype or (torch.float64 if torch.float64 in (x.dtype, f.dtype) else torch.float32)
        mine = self.moments[l]
        new = Moments(self.d_model, dtype=dtype, device=self.device, keep_ff=self.directions)
        kept = mine.get(group, new)
        if kept is new:
            there = next(iter(mine.values()), None)
            mean = torch.cat([x.mean(0, dtype=dtype), f.mean(0, dtype=dtype)]).to(new.reference)
            new.reference = mean if there is None else there.reference
        try:
            kept.add(x, f)
        except ValueError as error:
            raise ValueError(f"layer {l}: {error} (f is what the layer adds, y - x)") from None
        mine[group] = kept
        self._known.clear()

    def merge(self, other: LinearityAccumulator) -> LinearityAccumulator:
        """Add the tokens of another accumulator of the same shape, group by group. -> self"""
        shape, theirs = ((a.n_layers, a.d_model, a.groups, a.directions) for a in (self, other))
        if shape != theirs:
            raise ValueError(f"only equal shapes merge: (L, D, groups, directions) {shape} and {theirs}")
        for mine, new in zip(self.moments, other.moments, strict=True):
            for group, moments in new.items():
                first = next(iter(mine.values()), moments)
                if group not in mine:
                    mine[group] = moments.moved(first.reference)
                else:
                    mine[group].absorb(moments)
        self._known.clear()
        return self

    def __add__(self, other: LinearityAccumulator) -> LinearityAccumulator:
        new = LinearityAccumulator(
            self.n_layers, self.d_model, groups=self.groups, dtype=self.dtype, device=self.device,
            directions=self.directions,
        )  # fmt: skip
        return new.merge(self).merge(other)

    def scores(
        self, estimator: str = "held-out", *, residual: bool, remove_directions: int = 0,
        groups: Iterable[int] | None = None, clamp: bool = True,
    ) -> Tensor:  # fmt: skip
        """The score of each layer, (L,) float64, with residual (x -> x + f) or without (x -> f).

        remove_directions=k: x and f, so y too, are first projected off the top k principal directions of x.
        groups: only these. Raises ValueError as `linearity_score`, naming the layer.
        """
        check_choice("estimator", estimator, ESTIMATORS)
        found = []
        for l in range(self.n_layers):
            chosen = self._chosen(l, groups)
            key = (l, estimator == "held-out", remove_directions, *chosen)
            if key not in self._known:
                self._known[key] = self._fit(l, chosen, chosen[::2], *key[1:3])
            found.append(self._known[key].score(l, estimator, residual))
        found = torch.tensor(found, dtype=torch.float64)
        return found.clamp(0, 1) if clamp else found

    def jackknife(
        self, estimator: str = "held-out", *, residual: bool, remove_directions: int = 0,
        groups: Iterable[int] | None = None, level: float = 0.95, clamp: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(scores, lo, hi), (L,) each: score ± t se, se² = (G - 1)/G sum (s without group - their mean)².

        t is Student's for G - 1 degrees. Groups should be alike in size; at least 4 that hold tokens. Each
        group keeps its half. Source: Tukey's jackknife over the G groups.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is a probability strictly between 0 and 1, got {level}")
        scores = self.scores(
            estimator, residual=residual, remove_directions=remove_directions, groups=groups, clamp=False
        )
        half_width = []
        for l in range(self.n_layers):
            chosen = self._chosen(l, groups)
            if (G := len(chosen)) < 4:
                raise ValueError(f"the jackknife needs tokens in at least 4 groups; layer {l} has {G}")
            held, known, less = estimator == "held-out", {}, []
            if held and not remove_directions:  # a deletion changes one half: the other is fitted once
                known = {half: solved(self._centred(l, half), l) for half in (chosen[::2], chosen[1::2])}
            for gone in chosen:
                kept, half = (tuple(g for g in part if g != gone) for part in (chosen, chosen[::2]))
                fit = self._fit(l, kept, half, held, remove_directions, known)
                less.append(fit.score(l, estimator, residual))
            less = torch.tensor(less, dtype=torch.float64)
            se = ((G - 1) / G * (less - less.mean()).square().sum()).sqrt()
            half_width.append(student_t(level, G - 1) * float(se))
        half_width = torch.tensor(half_width, dtype=torch.float64)
        ends = scores, scores - half_width, scores + half_width
        return tuple(end.clamp(0, 1) for end in ends) if clamp else ends

    def norm_ratio(
        self, *, centred: bool = True, over: str = "output", groups: Iterable[int] | None = None
    ) -> Tensor:
        """(L,) ||F|| / ||Y|| (over="output") or ||F|| / ||X|| ("input"), Frobenius, about the means or 0."""
        check_choice("over", over, ("output", "input"))
        found = []
        for l in range(self.n_layers):
            m = self._centred(l, self._chosen(l, groups))
            mean = m.mean_x + m.mean_f if over == "output" else m.mean_x
            below, above = (m.y2 if over == "output" else m.x2), m.f2
            if not centred:
                below, above = below + m.n * float(mean @ mean), above + m.n * float(m.mean_f @ m.mean_f)
            if not below > 0:
                raise ValueError(f"layer {l}: the stream does not vary: no norm to divide by")
            found.append(math.sqrt(above / below))
        return torch.tensor(found, dtype=torch.float64)

    def maps(
        self, *, ridge: float = 0.0, groups: Iterable[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Affine maps y ≈ x A + b fitted on some groups: A (L, D, D), b (L, D). To replace layers by.

        A = I + W with W = (S_xx + ridge diag S_xx)^-1 S_xf, b so that the mean is mapped to the mean. A large
        ridge ends at the identity plus the mean of f. Raises ValueError if ridge < 0, or if N < D + 2
        at ridge 0.
        """
        if not ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {ridge}")
        A, b = [], []
        for l in range(self.n_layers):
            m = self._centred(l, self._chosen(l, groups))
            W = Solver(m, ridge=ridge).solve(m.xf) if ridge else solved(m, l)[1]
            A.append((W + torch.eye(self.d_model).to(W)).to(dtype))
            b.append((m.mean_f - m.mean_x @ W).to(dtype))
        return torch.stack(A), torch.stack(b)

    def n_tokens(self, groups: Iterable[int] | None = None) -> list[int]:
        """Tokens of each layer."""
        return [sum(self.moments[l][g].n for g in self._chosen(l, groups)) for l in range(self.n_layers)]

    def _check(self, l: int, x: Tensor, f: Tensor, group: int) -> None:
        if not 0 <= l < self.n_layers:
            raise ValueError(f"no layer {l}; allowed: 0 to {self.n_layers - 1}")
        if not 0 <= group < self.groups:
            raise ValueError(f"no group {group}; allowed: 0 to {self.groups - 1}")
        if x.shape != f.shape or x.dim() < 2 or x.shape[-1] != self.d_model or not x.numel():
            raise ValueError(
                f"layer {l}: x and f are (…, {self.d_model}) for the same tokens, at least one; "
                f"got {tuple(x.shape)} and {tuple(f.shape)}"
            )
        if not (x.is_floating_point() and f.is_floating_point()):
            raise ValueError(f"layer {l}: x and f are real numbers, got {x.dtype} and {f.dtype}")

    def _chosen(self, l: int, groups: Iterable[int] | None) -> tuple[int, ...]:
        wanted = range(self.groups) if groups is None else sorted(set(groups))
        if wrong := [g for g in wanted if not 0 <= g < self.groups]:
            raise ValueError(f"no group {wrong[0]}; allowed: 0 to {self.groups - 1}")
        chosen = tuple(g for g in wanted if g in self.moments[l])
        if not chosen:
            raise ValueError(f"layer {l} has no tokens in the groups {list(wanted)}")
        return chosen

    def _centred(self, l: int, groups: Sequence[int]) -> Centred:
        return centred([self.moments[l][g] for g in groups])

    def _fit(
        self, l: int, groups: tuple, half: tuple, held_out: bool, remove: int, known: dict | None = None
    ) -> _Fit:
        """What the best maps leave of f. half: the groups of half A. known: halves already solved."""
        other = tuple(g for g in groups if g not in half)
        if held_out and not (half and other):
            raise ValueError(f"held-out needs two groups with tokens; layer {l} has {list(groups)}")
        parts = [groups, half, other] if held_out else [groups]
        pooled, *halves = [None if known and p in known else self._centred(l, p) for p in parts]
        if remove:
            pooled, *halves = self._without(remove, [pooled, *halves])
        totals = [pooled.total(residual=residual) for residual in (False, True)]
        if not held_out:
            solver = _solver(pooled, l)
            explained, rank = float(solver.half(pooled.xf).square().sum()), solver.rank
        else:
            (A, W_A), (B, W_B) = (
                known[p] if m is None else solved(m, l) for p, m in zip(parts[1:], halves, strict=True)
            )
            d, rank = A.mean_x - B.mean_x, None
            between = A.n * B.n / pooled.n * float((d @ W_A) @ (d @ W_B))
            explained = inner(W_A, B.xf) + inner(W_B, A.xf) + between
        return _Fit(pooled.n, rank, pooled.f2 - explained, *totals)

    def _without(self, k: int, parts: list[Centred]) -> list[Centred]:
        if not self.directions:
            raise ValueError("remove_directions needs S_ff: make the accumulator with directions=True")
        if not 0 < k < self.d_model:
            raise ValueError(f"remove_directions must be 0 to {self.d_model - 1}, got {k}")
        return without(parts, torch.linalg.eigh(parts[0].xx, UPLO="U")[1][:, :-k])  # eigenvalues ascend


class _Fit(NamedTuple):
    """What is left of ||F||² by the best maps, and ||F||² and ||Y||²: floats, no matrices."""

    n: int
    rank: int | None
    left: float
    f2: float
    y2: float

    def score(self, l: int, estimator: str, residual: bool) -> float:
        correction = (self.n - 1) / (self.n - 1 - self.rank) if estimator == "adjusted" else 1.0
        total = checked_total(self.y2 if residual else self.f2, l, residual=residual)
        return 1 - correction * self.left / total


def checked_total(value: float, l: int, *, residual: bool) -> float:
    """What a share of it is taken of: ValueError if that is 0."""
    if not value:
        what = "the output y of the layer" if residual else "what is to be explained (y, or f = y - x)"
        raise ValueError(f"layer {l}: {what} is constant over the tokens: it has no R²")
    return value


def _solver(m: Centred, l: int) -> Solver:
    solver = Solver(m)
    if m.n < solver.columns + 2:
        raise ValueError(
            f"layer {l}: N={m.n} tokens are too few for the D={solver.columns} columns of x that vary: "
            f"any y would fit. raw and adjusted need N >= {solver.columns + 2}, held-out that many in each "
            f"half; N >= {10 * solver.columns} is advised"
        )
    return solver


def solved(m: Centred, l: int) -> tuple[Centred, Tensor]:
    """The moments with the map W (D, D) from x to f that fits them best."""
    return m, _solver(m, l).solve(m.xf)


def inner(A: Tensor, B: Tensor) -> float:
    """tr(A' B)."""
    return float((A * B).sum())
