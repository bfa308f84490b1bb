"""Function composition Comp_n and its Boolean restriction Ind_n: what one attention layer cannot do cheaply.

Two functions g, h from {0 .. n-1} to itself are written out in the prompt as tables, then comes one point x;
asked is h(g(x)), read at the token of x. The page counts from 1, the code from 0: subtract 1 from everything
on the page.

Source: the layout of Kozachinskiy et al., arXiv 2501.19215, section 3.2.1; the task goes back to Peng,
Narayanan and Papadimitriou, arXiv 2402.08164.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 65_536  # inputs handed out at once: 2n + 1 int64 numbers each, 10 MB at n = 9


class Compositions(NamedTuple):
    """A batch of B inputs."""

    g: Tensor  # (B, n) inner function, applied first
    h: Tensor  # (B, n) outer function
    x: Tensor  # (B,) where the composition starts


@dataclass(frozen=True)
class FunctionComposition:
    """Comp_n: from the tables of g and h and a point x, all in 0 .. n-1, say h(g(x)).

    An input is 2n + 1 tokens: token i carries g(i), token n + i carries h(i), the last one carries x. A token
    is a pair (position, symbol); what a model makes of the pair is its own affair.

    >>> task = FunctionComposition(n=3)
    >>> g, h, x = torch.tensor([[2, 0, 1]]), torch.tensor([[1, 1, 0]]), torch.tensor([0])
    >>> task.answer(g, h, x)                          # g(0) = 2, h(2) = 0
    tensor([0])
    >>> task.tokens(g, h, x)[0].T                     # positions, then symbols: g, h, x
    tensor([[0, 1, 2, 3, 4, 5, 6],
            [2, 0, 1, 1, 1, 0, 0]])
    >>> task.count, sum(len(chunk.x) for chunk in task.all_inputs())
    (2187, 2187)
    """

    n: int

    def __post_init__(self):
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"a function needs a non-empty domain: n is an integer >= 1, got n={self.n!r}")

    @property
    def length(self) -> int:
        """Tokens of an input: n for g, n for h, one for x."""
        return 2 * self.n + 1

    @property
    def count(self) -> int:
        """Number of inputs, n ** (2n + 1)."""
        return self.n**self.length

    def answer(self, g: Tensor, h: Tensor, x: Tensor) -> Tensor:
        """The definition, h(g(x)). g, h: (B, n), x: (B,) -> (B,)."""
        self._check(g, h, x)
        middle = g.gather(1, x[:, None])              # (B, 1)
        return h.gather(1, middle).squeeze(1)         # (B,)

    def tokens(self, g: Tensor, h: Tensor, x: Tensor) -> Tensor:
        """Inputs as tokens (position, symbol). g, h: (B, n), x: (B,) -> (B, 2n + 1, 2)."""
        self._check(g, h, x)
        symbol = torch.cat([g, h, x[:, None]], dim=1)                     # (B, 2n + 1)
        position = torch.arange(self.length, device=symbol.device).expand_as(symbol)
        return torch.stack([position, symbol], dim=-1)

    def all_inputs(self, *, chunk: int = CHUNK) -> Iterator[Compositions]:
        """Every input once, in counting order (the last token fastest), at most `chunk` at a time.

        There are n ** (2n + 1) of them: 32, 2187, 262144, 48828125 for n = 2, 3, 4, 5.
        """
        if chunk < 1:
            raise ValueError(f"a chunk holds at least one input, got chunk={chunk}")
        for first in range(0, self.count, chunk):
            symbol = _digits(torch.arange(first, min(first + chunk, self.count)), self.n, self.length)
            yield self._split(symbol)

    def sample(self, size: int, *, seed: int) -> Compositions:
        """`size` inputs, uniform over all of them and independent. A function of (n, size, seed) alone."""
        if size < 1:
            raise ValueError(f"a sample holds at least one input, got size={size}")
        generator = torch.Generator().manual_seed(seed)
        return self._split(torch.randint(self.n, (size, self.length), generator=generator))

    def _split(self, symbol: Tensor) -> Compositions:
        return Compositions(symbol[:, : self.n], symbol[:, self.n : 2 * self.n], symbol[:, -1])

    def _check(self, g: Tensor, h: Tensor, x: Tensor) -> None:
        B = x.shape[0] if x.dim() == 1 else None
        if g.shape != (B, self.n) or h.shape != (B, self.n):
            raise ValueError(
                f"Comp_{self.n} takes g, h: (B, {self.n}) and x: (B,); got g: {tuple(g.shape)}, "
                f"h: {tuple(h.shape)}, x: {tuple(x.shape)}")
        for name, symbol in (("g", g), ("h", h), ("x", x)):
            if symbol.numel() and not 0 <= int(symbol.min()) <= int(symbol.max()) < self.n:
                raise ValueError(
                    f"symbols of Comp_{self.n} lie in 0 .. {self.n - 1}, but {name} holds "
                    f"{int(symbol.min())} .. {int(symbol.max())}; the code counts from 0")


@dataclass(frozen=True)
class Indexing:
    """Ind_n: Comp_n with x = 0 and h: {0 .. n-1} -> {0, 1}; is h(g(0)) = 0? Only g(0) matters: it indexes h.

    On the page, counted from 1: x = 1, h in {1, 2}^n, is h(g(1)) = 1?

    >>> task = Indexing(n=3)
    >>> index, h = torch.tensor([2, 0]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    >>> task.answer(index, h)                         # h(2) = 0: yes;  h(0) = 1: no
    tensor([ True, False])
    >>> task.count                                    # 3 indices, 2 ** 3 tables
    24
    """

    n: int

    def __post_init__(self):
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 2:
            raise ValueError(f"h takes two values inside 0 .. n-1: n is an integer >= 2, got n={self.n!r}")

    @property
    def count(self) -> int:
        """Number of inputs that differ where it matters, n * 2 ** n."""
        return self.n * 2**self.n

    def answer(self, index: Tensor, h: Tensor) -> Tensor:
        """The definition, h(g(0)) = 0, with index = g(0). index: (B,), h: (B, n) -> (B,) bool."""
        return h.gather(1, index[:, None]).squeeze(1) == 0

    def as_composition(self, index: Tensor, h: Tensor) -> Compositions:
        """The same inputs in Comp_n: g(0) = index, the other values of g frozen at 0, x = 0."""
        g = torch.zeros_like(h)
        g[:, 0] = index
        return Compositions(g, h, torch.zeros_like(index))

    def all_inputs(self) -> tuple[Tensor, Tensor]:
        """Every input once: index (n * 2 ** n,), h (n * 2 ** n, n)."""
        number = torch.arange(self.count)
        return number // 2**self.n, _digits(number % 2**self.n, 2, self.n)


def _digits(number: Tensor, base: int, places: int) -> Tensor:
    """Digits of each number, most significant first. (B,) -> (B, places)."""
    if base == 1:
        return number.new_zeros(len(number), places)
    digits = []
    for _ in range(places):
        digits.append(number % base)
        number = number // base
    return torch.stack(digits[::-1], dim=1)
