"""Values for each prompt, pooled over its tokens: what a maximum hides is kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.metrics.intervals import bootstrap

POOLS = ("peak", "mean", "median")


@dataclass(frozen=True, eq=False)
class PerPrompt:
    """N prompts, and one value for each cell (…): a layer, a pair of layers. Float, on the CPU.

    peak, mean, median: (N, …), over the tokens (and positions) that were measured in a prompt.
    count: (N,), how many these were.
    """

    peak: Tensor
    mean: Tensor
    median: Tensor
    count: Tensor

    def max(self, of: str = "peak") -> Tensor:
        """(…): the largest over prompts; of="peak" is the paper's maximum over tokens and prompts."""
        return self.read(of).amax(dim=0)

    def quantile(self, q: float, of: str = "peak") -> Tensor:
        """(…): the q-quantile over prompts, 0 <= q <= 1."""
        return self.read(of).quantile(q, dim=0)

    def average(self, of: str = "mean") -> Tensor:
        """(…): the mean over all tokens of all prompts for of="mean"; of the other two, over prompts."""
        values = self.read(of)
        weight = self.count.to(values) if of == "mean" else torch.ones_like(self.count).to(values)
        return torch.tensordot(weight / weight.sum(), values, dims=1)

    def interval(
        self,
        *,
        seed: int,
        of: str = "peak",
        statistic: str = "median",
        level: float = 0.95,
        resamples: int = 2_000,
    ) -> Tensor:
        """(2, …): lo and hi of the mean or median over prompts by bootstrap. Needs 3 prompts.

        There is none for the maximum: resampling never sees a value larger than the largest drawn.
        """
        values = self.read(of)
        cells = values.flatten(1).T.tolist()
        found = [bootstrap(x, statistic, seed=seed, level=level, resamples=resamples) for x in cells]
        return torch.tensor(found, dtype=values.dtype).T.reshape(2, *values.shape[1:])

    def read(self, of: str) -> Tensor:
        """(N, …): one of the three."""
        check_choice("pooling", of, POOLS)
        return getattr(self, of)


class Pool:
    """Collects the values of every prompt, cell by cell, and gives a PerPrompt."""

    def __init__(self, N: int, *cells: int):
        self._values = {name: torch.zeros(N, *cells, dtype=torch.float64) for name in POOLS}
        self._count = torch.zeros(N, dtype=torch.long)

    def put(self, place: tuple, values: Tensor) -> None:
        """values (…, n): n tokens of prompt place[0], for the cells (…) at `place`."""
        values = values.detach().cpu().double().sort(dim=-1).values
        n = values.shape[-1]
        self._values["peak"][place] = values[..., -1]
        self._values["mean"][place] = values.mean(dim=-1)
        self._values["median"][place] = (values[..., (n - 1) // 2] + values[..., n // 2]) / 2
        self._count[place[0]] = n

    def result(self, what: str) -> PerPrompt:
        """ValueError if a value is not finite: `what` says which values these are."""
        if not self._values["mean"].isfinite().all():
            prompt = int((~self._values["mean"].isfinite()).nonzero()[0, 0])
            raise ValueError(f"{what} of prompt {prompt} is not finite: the edited model overflows there")
        return PerPrompt(**self._values, count=self._count)


def norms(x: Tensor) -> Tensor:
    """‖x‖₂ over the last axis, in float32 at least."""
    return torch.linalg.vector_norm(full(x), dim=-1)


def full(x: Tensor) -> Tensor:
    """`x`; from half precision in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def relative(change: Tensor, whole: Tensor, clamp: float) -> Tensor:
    """‖change‖ / max(‖whole‖, clamp) over the last axis: (…, D) and (…, D) -> (…)."""
    return norms(change) / norms(whole).clamp(min=clamp)


def check_clamp(clamp: float) -> None:
    if not 0 < clamp < float("inf"):
        raise ValueError(f"clamp keeps a ratio finite where the norm is 0: a number above 0, got {clamp}")


def row_numbers(rows: slice, lengths: Sequence[int], *, least: Sequence[int] | None = None) -> list[Tensor]:
    """Tokens that the slice selects in each prompt; ValueError where there is none at or after least[i]."""
    if not isinstance(rows, slice):
        raise ValueError(f"output_rows is a slice of each prompt, or None, got {type(rows).__name__}")
    found = [torch.arange(T)[rows] for T in lengths]
    for i, (T, chosen) in enumerate(zip(lengths, found, strict=True)):
        low = least[i] if least else 0
        if not (chosen >= low).any():
            raise ValueError(f"output_rows={rows} has no token from {low} on in prompt {i} of {T} tokens")
    return found
