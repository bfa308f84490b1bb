"""Rows of the speed table for the linearity scores: against their matrix products, and against SVD.

    python tests/bench_linearity.py

Ours takes batches of 2,000 tokens, in turn into two groups, and computes the raw scores with and without
residual from them ("raw"), or raw and held-out ("all"). Rates are per second of CPU time of this process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lib.metrics.linearity import LinearityAccumulator, linearity_score

N, BATCH = 10_000, 2_000


def rows(
    tell: Callable[[str], None] = lambda what: None, *, widths=(576, 1024), turns: int = 3
) -> list[tuple]:
    """(what, unit, ours, baseline, against, asked): the fields of `bench.Row`."""
    found = []
    for D in widths:
        x, f = layer(D)
        arms = {"raw": raw, "all": everything, "products": products, "svd": svd}
        right(D, x, f)
        took = {name: [] for name in arms}
        for turn in range(turns):
            for name, arm in arms.items():
                start = time.process_time()
                arm(x, f)
                took[name].append(time.process_time() - start)
            tell(
                f"linearity, D={D}, turn {turn + 1}: "
                + ", ".join(f"{n} {t[-1]:.2f} s" for n, t in took.items())
            )
        rate = {name: [1 / t for t in times] for name, times in took.items()}
        what, size = "scores of a layer with and without residual", f"N = {N:,}, D = {D}"
        bare, slow = "3 N D² products in float32 alone", "SVD for each score, as published"
        found.append(
            (f"{what}, raw and held-out, {size}", "layers/s", rate["all"], rate["products"], bare, ">= 0.67")
        )
        found.append((f"{what}, raw, {size}", "layers/s", rate["raw"], rate["svd"], slow, ">= 8"))
    return found


def layer(D: int) -> tuple[Tensor, Tensor]:
    """A stream whose columns differ in size and depend on each other, and a layer partly linear in it."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(D) + torch.randn(D, D, generator=generator) / D**0.5
    x = torch.randn(N, D, generator=generator) @ mix * torch.logspace(0, 2, D)
    f = torch.tanh(x / 10) @ (torch.randn(D, D, generator=generator) / D**0.5)
    return x, f


def raw(x: Tensor, f: Tensor) -> list[float]:
    """Raw with, raw without."""
    return _scores(x, f, ("raw",))


def everything(x: Tensor, f: Tensor) -> list[float]:
    """Raw with, raw without, held-out with, held-out without."""
    return _scores(x, f, ("raw", "held-out"))


def _scores(x: Tensor, f: Tensor, estimators: tuple[str, ...]) -> list[float]:
    gathered = LinearityAccumulator(1, x.shape[1])
    for i in range(0, len(x), BATCH):
        gathered.add_layer(0, x[i : i + BATCH], f[i : i + BATCH], group=i // BATCH % 2)
    return [float(gathered.scores(e, residual=residual)) for e in estimators for residual in (True, False)]


def products(x: Tensor, f: Tensor) -> list[Tensor]:
    """What no method on Gram matrices avoids, in float32: 3 N D² multiply-adds."""
    return [x.T @ x, x.T @ f, f.T @ f]


def svd(x: Tensor, f: Tensor) -> list[float]:
    """Raw with, raw without: one SVD for each, as published."""
    return [svd_score(x, x + f), svd_score(x, f)]


def svd_score(x: Tensor, y: Tensor) -> float:
    """The published route, from its formula: centre, divide by the norms, A = V S^-1 U' Y from left to right
    with no cut-off, 1 - ||X A - Y||²."""
    x, y = x - x.mean(0), y - y.mean(0)
    x, y = x / x.norm(), y / y.norm()
    U, S, Vt = torch.linalg.svd(x, full_matrices=False)
    A = (Vt.T / S) @ U.T @ y
    return 1 - float((x @ A - y).square().sum())


def right(D: int, x: Tensor, f: Tensor) -> None:
    """All arms once, and their answers compared: float32 products and float32 SVD agree to 1e-3."""
    products(x, f)
    mine, theirs = everything(x, f), svd(x, f)
    exact = [linearity_score(x, y, estimator="raw") for y in (x.double() + f.double(), f)]
    for name, scores, least in (("ours", mine[:2], 1e-5), ("svd", theirs, 1e-3)):
        if any(abs(a - b) > least for a, b in zip(scores, exact, strict=True)):
            raise AssertionError(f"D={D}, {name}: {scores}, in float64 {exact}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, unit, mine, theirs, against, asked in rows(lambda what: print(what, flush=True)):
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        print(f"{what}: {statistics.median(mine):.3g} {unit}, {ratio:.3g} x {against} ({asked})")
