"""SUM2: do two of the numbers cancel? A disjointness problem in disguise.

Our convention: the input is x_1 ... x_n in Z/M, followed by one auxiliary last token with a symbol of its
own. The answer, read at the auxiliary token, is 1 iff there are j < k with x_j + x_k = 0 mod M (two different
places; a single 0, or a single M/2, does not cancel itself). The theorem on one layer in `one-layer-limits`
holds for this convention and for j <= k alike.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ENUMERABLE = 2_000_000  # inputs; n int64 numbers each, so the tensor stays within some 100 MB for n <= 8


class Sums(NamedTuple):
    """A batch of B inputs and their answers."""

    tokens: Tensor  # (B, n + 1), the last column is the auxiliary symbol M
    x: Tensor  # (B, n) residues 0 .. M-1
    label: Tensor  # (B,) long, 0 or 1


@dataclass(frozen=True)
class Sum2:
    """SUM2[n, M]: n residues modulo M, answer 1 iff two of them, at different places, sum to 0 modulo M.

    >>> task = Sum2(n=3, M=7)
    >>> x = torch.tensor([[2, 4, 5], [2, 4, 4]])      # 2 + 5 = 7; nothing cancels in the second
    >>> task.answer(x)
    tensor([ True, False])
    >>> task.tokens(x)                                # the auxiliary token is the symbol M = 7
    tensor([[2, 4, 5, 7],
            [2, 4, 4, 7]])
    >>> task.count, int(task.answer(task.all_inputs()).sum())
    (343, 127)
    """

    n: int
    M: int

    def __post_init__(self):
        if self.n < 2:
            raise ValueError(f"two numbers are needed to cancel: n >= 2, got n={self.n}")
        if self.M < 2:
            raise ValueError(f"a modulus of at least 2 is needed, got M={self.M}")

    @property
    def vocab(self) -> int:
        """Input symbols: M residues and the auxiliary one."""
        return self.M + 1

    @property
    def length(self) -> int:
        """Tokens of an input, n residues and the auxiliary one."""
        return self.n + 1

    @property
    def count(self) -> int:
        """Number of inputs, M ** n."""
        return self.M**self.n

    def answer(self, x: Tensor) -> Tensor:
        """The definition. x: (B, n) residues -> (B,) bool."""
        cancels = (x[:, :, None] + x[:, None, :]) % self.M == 0  # (B, n, n)
        return cancels.triu(1).any(dim=(1, 2))

    def tokens(self, x: Tensor) -> Tensor:
        """x: (B, n) -> (B, n + 1), the auxiliary symbol M last."""
        return torch.cat([x, x.new_full((len(x), 1), self.M)], dim=1)

    def all_inputs(self) -> Tensor:
        """Every input, in counting order, last place fastest. -> (M ** n, n)."""
        if self.count > ENUMERABLE:
            raise ValueError(
                f"SUM2[{self.n}, {self.M}] has {self.count} inputs, more than the {ENUMERABLE} that are "
                "listed at once; take a smaller n or M, or draw with `sample`"
            )
        return torch.tensor(list(itertools.product(range(self.M), repeat=self.n)))

    def sample(self, size: int, *, generator: torch.Generator) -> Sums:
        """`size` planted inputs, labels balanced (one more 0 if `size` is odd), in random order.

        Label 0: n distinct magnitudes out of 1 .. (M-1)/2, each with a random sign (a or M - a). Label 1: the
        same, then one place is overwritten by the negative of another, so exactly one pair cancels. Uniform
        inputs would leave shortcuts: how often a value occurs, and how often the answer is 1.

        Raises ValueError for even M (M/2 cancels itself) and for n > (M-1)/2 (too few magnitudes).
        """
        magnitudes = (self.M - 1) // 2
        if self.M % 2 == 0:
            raise ValueError(
                f"planted inputs need an odd M, got M={self.M}: M/2 is its own negative; try M={self.M + 1}"
            )
        if self.n > magnitudes:
            raise ValueError(
                f"planted inputs need n distinct magnitudes among 1 .. (M-1)/2 = {magnitudes}, "
                f"got n={self.n}; try M >= {2 * self.n + 1}"
            )
        if size < 1:
            raise ValueError(f"a batch holds at least one input, got size={size}")
        draw = torch.rand(size, magnitudes, generator=generator, dtype=torch.float64)
        magnitude = 1 + draw.argsort(dim=1)[:, : self.n]  # (B, n), distinct
        negative = torch.rand(size, self.n, generator=generator) < 0.5
        x = torch.where(negative, self.M - magnitude, magnitude)
        label = (torch.arange(size) < size // 2)[torch.randperm(size, generator=generator)]
        places = torch.rand(size, self.n, generator=generator, dtype=torch.float64).argsort(dim=1)
        kept, overwritten = places[:, :1], places[:, 1:2]  # two different places
        planted = x.scatter(1, overwritten, self.M - x.gather(1, kept))
        x = torch.where(label[:, None], planted, x)
        return Sums(self.tokens(x), x, label.long())

    def batch(self, step: int, *, seed: int, size: int) -> Sums:
        """Planted inputs for one step, a function of (seed, step) alone, so a resumed run draws the same."""
        state = np.random.SeedSequence([seed, step]).generate_state(1)[0]
        return self.sample(size, generator=torch.Generator().manual_seed(int(state)))
