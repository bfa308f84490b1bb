"""Hops through permutation tables: the composition task that is trained.

K random permutations z_1 ... z_K of {0 .. n-1} are listed in the prompt as n table tokens each, then come n
query tokens: the query (x, k) asks for z_k(... z_1(x)). For K = 2 this is function composition with
permutations in place of arbitrary functions, so that a model that ignores x is at chance 1/n (with random
functions the commonest value alone scores E[max count]/n, 0.32 at n = 8).

Every x is asked once in each prompt ("dense queries"), which multiplies the labels at little cost. There are
no positions: a token is the *sum* of three embeddings, so key, value and table are told apart by their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.choices import check_choice

ORDERS = ("last-first", "first-first")
READS = ("earlier", "all")


class Prompts(NamedTuple):
    """A batch of B prompts with n queries each; T = K n + n tokens."""

    tokens: Tensor  # (B, T, 3) rows of the embedding table, to be summed
    tables: Tensor  # (B, K, n) tables[b, l, y] = z_{l+1}(y)
    x: Tensor  # (B, n) start of each query, every x once
    hops: Tensor  # (B, n) how many tables each query goes through, 1 .. K


@dataclass(frozen=True)
class PermutationHops:
    """Follow `hops` of K permutations of {0 .. n-1}, starting at x.

    n: size of each permutation, at least 2.  K: number of tables, at least 1.
    order: "last-first" lists z_K ... z_1, "first-first" lists z_1 ... z_K. It matters if tables read
    earlier ones only: just in "last-first" order can a token of z_1 read z_2 and compose the tables early.
    tables_read: "earlier", each table token reads those listed before it and itself (a decoder), or "all"
    (an encoder). A query always reads all tables and itself, never another query.

    >>> task = PermutationHops(n=3, K=2)
    >>> tables = torch.tensor([[[2, 0, 1], [1, 0, 2]]])   # z_1 = (2, 0, 1), z_2 = (1, 0, 2)
    >>> x, hops = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 2]])
    >>> task.answer(tables, x, hops)                      # z_1(0) = 2; z_2(z_1(1)) = z_2(0) = 1; z_2(1) = 0
    tensor([[2, 1, 0]])
    >>> tokens = task.tokens(tables, x, hops)             # three rows a token, rows named by `row`
    >>> tokens.shape
    torch.Size([1, 9, 3])
    >>> [task.row(int(i)) for i in tokens[0, 0]]          # z_2 is listed first, and z_2(0) = 1
    ['key 0', 'value 1', 'table 2']
    >>> [task.row(int(i)) for i in tokens[0, -1]]
    ['query', 'value 2', 'hops 2']
    """

    n: int
    K: int = 2
    order: str = "last-first"
    tables_read: str = "earlier"

    def __post_init__(self):
        if self.n < 2:
            raise ValueError(f"a permutation worth asking about moves something: n >= 2, got n={self.n}")
        if self.K < 1:
            raise ValueError(f"a hop needs a table: K >= 1, got K={self.K}")
        check_choice("order of the tables", self.order, ORDERS)
        check_choice("tables_read", self.tables_read, READS)

    @property
    def vocab(self) -> int:
        """Rows of the embedding table: n keys, n values (x shares them), K tables, query, K hops."""
        return 2 * self.n + 2 * self.K + 1

    @property
    def length(self) -> int:
        """Tokens of a prompt, K n of the tables and n queries."""
        return (self.K + 1) * self.n

    @property
    def queries(self) -> slice:
        """Where the queries stand in a prompt."""
        return slice(self.K * self.n, self.length)

    @property
    def chance(self) -> float:
        """Accuracy of a model that ignores x: 1/n, because the answer is uniform over {0 .. n-1}."""
        return 1 / self.n

    def row(self, index: int) -> str:
        """The name of one row of the embedding table."""
        n, K = self.n, self.K
        names = [f"key {y}" for y in range(n)] + [f"value {y}" for y in range(n)]
        names += [f"table {l}" for l in range(1, K + 1)] + ["query"] + [f"hops {k}" for k in range(1, K + 1)]
        return names[index]

    def answer(self, tables: Tensor, x: Tensor, hops: Tensor) -> Tensor:
        """z_k(... z_1(x)) exactly. tables: (B, K, n), x: (B, Q), hops: (B, Q) in 0 .. K -> (B, Q)."""
        value = x
        for l in range(self.K):
            value = torch.where(hops > l, tables[:, l].gather(1, value), value)
        return value

    def after_layer(self, prompts: Prompts, l: int) -> Tensor:
        """Target of deep supervision behind layer l (1-based): the value after min(l, k) hops. -> (B, n)."""
        if l < 1:
            raise ValueError(f"layers are counted from 1 here, got l={l}")
        return self.answer(prompts.tables, prompts.x, prompts.hops.clamp(max=l))

    def tokens(self, tables: Tensor, x: Tensor, hops: Tensor) -> Tensor:
        """Prompts as sums of three embeddings. tables: (B, K, n), x and hops: (B, Q) -> (B, K n + Q, 3)."""
        n, K = self.n, self.K
        B = tables.shape[0]
        listed = range(K - 1, -1, -1) if self.order == "last-first" else range(K)
        key = torch.arange(n).expand(B, n)
        parts = [torch.stack([key, n + tables[:, l], torch.full((B, n), 2 * n + l)], dim=-1) for l in listed]
        marker = torch.full_like(x, 2 * n + K)
        parts.append(torch.stack([marker, n + x, 2 * n + K + hops], dim=-1))  # hops 1 is row 2n + K + 1
        return torch.cat(parts, dim=1)

    def mask(self) -> Tensor:
        """(T, T), True where the row's token may read the column's."""
        T, tables = self.length, self.K * self.n
        mask = torch.eye(T, dtype=torch.bool)
        inside = torch.ones(tables, tables, dtype=torch.bool)
        mask[:tables, :tables] = inside if self.tables_read == "all" else inside.tril()
        mask[tables:, :tables] = True
        return mask

    def batch(self, step: int, *, seed: int, size: int, mix: Sequence[int] | None = None) -> Prompts:
        """`size` fresh prompts, a function of (seed, step) alone, so a resumed run draws the same.

        mix: hop counts given to the queries in turn; by default one query in 2K asks each k < K, and the rest
        ask k = K (K = 2: [1, 2, 2, 2]). x is in a fresh random order, so every x meets every hop count.
        """
        mix = self.default_mix() if mix is None else list(mix)
        if not mix or min(mix) < 1 or max(mix) > self.K:
            raise ValueError(f"hop counts lie in 1 .. {self.K} (the tables of a prompt), got mix={mix}")
        if size < 1:
            raise ValueError(f"a batch holds at least one prompt, got size={size}")
        state = np.random.SeedSequence([seed, step]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(state))
        order = torch.rand(size, self.K + 1, self.n, generator=generator, dtype=torch.float64)
        permutation = order.argsort(dim=-1)  # uniform: float64 ties have chance ~ n^2 / 2^53
        tables, x = permutation[:, : self.K], permutation[:, self.K]
        hops = torch.tensor([mix[i % len(mix)] for i in range(self.n)]).expand(size, self.n)
        return Prompts(self.tokens(tables, x, hops), tables, x, hops)

    def default_mix(self) -> list[int]:
        """Hop counts of the recipe: each k < K once, K as often as all 2K places leave."""
        return [*range(1, self.K), *[self.K] * (self.K + 1)]
