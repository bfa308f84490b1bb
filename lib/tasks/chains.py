"""Hops with a scratchpad: the question (x, K) of `lib.tasks.hops`, answered one written-down value at a time.

K random permutations are listed as tables. A chain begins with the question x; its token s = 0 .. K-1 carries
the value i_s and the number s + 1 of the hop that comes next, and is asked for i_{s+1} = z_{s+1}(i_s). What a
token answers is written as the next token of its chain; the K-th answer, i_K, is the answer. A chain token
reads all tables, and the tokens of its own chain up to itself.

So each emitted token asks for one table look-up, which is why one layer is enough; without a scratchpad the
same question takes K look-ups in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib.tasks.hops import PermutationHops


class Chains(NamedTuple):
    """A batch of B prompts, each with n chains of K tokens."""

    tokens: Tensor  # (B, T, 3) rows of the embedding table, to be summed
    tables: Tensor  # (B, K, n) tables[b, l, y] = z_{l+1}(y)
    values: Tensor  # (B, n, K + 1) i_0 ... i_K of each chain; every x begins one chain


@dataclass(frozen=True)
class ScratchpadHops:
    """K hops through permutations of {0 .. n-1}, one token a hop; sizes and tables as in `PermutationHops`.

    >>> task = ScratchpadHops(n=3, K=2)
    >>> tables = torch.tensor([[[2, 0, 1], [1, 0, 2]]])   # z_1 = (2, 0, 1), z_2 = (1, 0, 2)
    >>> task.follow(tables)[0, 0]                         # x = 0: z_1(0) = 2, z_2(2) = 2
    tensor([0, 2, 2])
    >>> tokens = task.tokens(tables, task.follow(tables)[..., :-1])
    >>> tokens.shape                                      # 2 * 3 of the tables, 3 chains of 2 tokens
    torch.Size([1, 12, 3])
    >>> [[task.hops.row(int(i)) for i in token] for token in tokens[0, 6:8]]
    [['query', 'value 0', 'hops 1'], ['query', 'value 2', 'hops 2']]
    """

    n: int
    K: int

    def __post_init__(self):
        PermutationHops(self.n, self.K)  # refuses impossible sizes

    @property
    def hops(self) -> PermutationHops:
        """The same task without a scratchpad; its embedding rows are used, "hops k" for "hop k is next"."""
        return PermutationHops(self.n, self.K)

    @property
    def length(self) -> int:
        """Tokens of a prompt with its chains written out: K n of the tables, K n of the chains."""
        return 2 * self.K * self.n

    @property
    def chain_tokens(self) -> slice:
        """Where the chains stand, one after another."""
        return slice(self.K * self.n, self.length)

    def follow(self, tables: Tensor) -> Tensor:
        """i_0 ... i_K from every x = i_0. tables: (B, K, n) -> (B, n, K + 1)."""
        values = [torch.arange(self.n).expand(len(tables), -1)]
        for l in range(self.K):
            values.append(tables[:, l].gather(1, values[-1]))
        return torch.stack(values, dim=-1)

    def tokens(self, tables: Tensor, values: Tensor) -> Tensor:
        """Prompts with the first S tokens of C chains. (B, K, n), values (B, C, S) -> (B, K n + C S, 3)."""
        _, C, S = values.shape
        step = torch.arange(1, S + 1).repeat(C).expand(len(tables), -1)
        return self.hops.tokens(tables, values.flatten(1), step)

    def mask(self, S: int | None = None) -> Tensor:
        """(T, T), True where the row's token may read the column's, for n chains of S tokens (default K)."""
        S, listed = self.K if S is None else S, self.K * self.n
        T = listed + self.n * S
        mask = torch.zeros(T, T, dtype=torch.bool)
        mask[:listed, :listed] = torch.ones(listed, listed, dtype=torch.bool).tril()
        mask[listed:, :listed] = True
        chain = torch.arange(self.n).repeat_interleave(S)
        mask[listed:, listed:] = (chain[:, None] == chain).tril()
        return mask

    def batch(self, step: int, *, seed: int, size: int) -> Chains:
        """`size` fresh prompts with all their chains, a function of (seed, step) alone."""
        tables = self.hops.batch(step, seed=seed, size=size).tables
        values = self.follow(tables)
        return Chains(self.tokens(tables, values[..., :-1]), tables, values)

    def write(self, answer: Callable[[Tensor, Tensor], Tensor], tables: Tensor) -> Tensor:
        """Free-running: every chain begins with its x and goes on with what it answered itself.

        answer(tokens, mask) -> (B, n S) values for all chain tokens; that of the last token is written next.
        -> (B, n, K + 1), x and the K values written.
        """
        values = torch.arange(self.n).expand(len(tables), -1)[..., None]
        for S in range(1, self.K + 1):
            said = answer(self.tokens(tables, values), self.mask(S)).unflatten(1, (self.n, S))
            values = torch.cat([values, said[..., -1:]], dim=-1)
        return values
