"""Retrieval that asks twice: by *which* attribute to find an item, and *which* attribute of it to return.

A prompt lists N items, each *one* token: the sum of the embeddings of all its attributes. Then come Q query
tokens ("dense queries": more labels at little cost), each the sum of two embeddings. There are no positions.

    RelationalRetrieval   query (c, v, w): the w-th value of the item whose c-th key is v
    Recombination         query (i, v, j), j != i: attribute j of the item whose attribute i is v

In a head of plain attention *where* to look and *what* to read there come as a fixed pair. Here the query
asks for one of C W (or A (A - 1)) pairs. The two tasks differ in what that takes:

    RelationalRetrieval   all values share their answers, so the query must *choose* what is read: logits that
                          add a part of the item found and a part of the question cannot tell its values apart
    Recombination         an answer names its attribute, so such a sum does: report all attributes of the
                          item, and add a constant to the answers of the one that is asked for

so Recombination tests only whether the item is found, RelationalRetrieval the choice too.

Row 0 of the embedding table stands for nothing: it fills the tokens up to one number of rows, and belongs to
a vector of zeros. Source: both tasks are ours, designed after the motivation of Xiao et al. 2024 (DCMHA),
section 1; they are not that paper's benchmarks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Retrievals(NamedTuple):
    """A batch of B prompts with N items and Q queries each; T = N + Q tokens."""

    tokens: Tensor  # (B, T, S) rows of the embedding table, to be summed; row 0 is nothing
    items: Tensor  # (B, N, A) attributes of the items; RelationalRetrieval: C keys, then W values
    asked: Tensor  # (B, Q, 3) the queries: by which attribute, its value, which attribute to return
    answer: Tensor  # (B, Q)


class _Prompt:
    """What both tasks share: a prompt is N items, then Q queries."""

    N: int
    Q: int
    sink: bool

    @property
    def length(self) -> int:
        """Tokens of a prompt, T = N + Q."""
        return self.N + self.Q

    @property
    def queries(self) -> slice:
        """Where the queries stand in a prompt."""
        return slice(self.N, self.N + self.Q)

    def mask(self) -> Tensor:
        """(T, T), True where the row's token may read the column's: all items, and a query itself if `sink`.

        A query that may read itself can switch a head off, by leaving it there: an attention sink.
        """
        mask = torch.zeros(self.length, self.length, dtype=torch.bool)
        mask[:, : self.N] = True
        return mask | torch.eye(self.length, dtype=torch.bool) if self.sink else mask

    def batch(self, step: int, *, seed: int, size: int) -> Retrievals:
        """`size` fresh prompts, a function of (seed, step) alone, so a resumed run draws the same."""
        state = np.random.SeedSequence([seed, step]).generate_state(1)[0]
        return self.sample(size, generator=torch.Generator().manual_seed(int(state)))

    def tokens(self, items: Tensor, asked: Tensor) -> Tensor:
        """Prompts (B, N + Q, S) of items (B, N, A) and queries (B, Q, 3)."""
        queries = self.query_tokens(asked)
        return torch.cat([self._item_tokens(items), queries], dim=1)

    def query_tokens(self, asked: Tensor) -> Tensor:
        """Queries (…, 3) as tokens (…, S): two rows each, the rest is nothing."""
        rows = torch.stack([self._key_row(asked[..., 0], asked[..., 1]), self._return_row(asked[..., 2])], -1)
        return torch.nn.functional.pad(rows, (0, self.S - 2))

    def _found(self, items: Tensor, asked: Tensor) -> Tensor:
        """The asked attribute of the item that is found. items (B, N, A), asked (B, Q, 3) -> (B, Q)."""
        by, value, give = asked.unbind(-1)  # (B, Q) each
        column = items.mT.gather(1, by[..., None].expand(*by.shape, self.N))  # (B, Q, N)
        here = column == value[..., None]
        if not (here.sum(dim=-1) == 1).all():
            raise ValueError("a query asks for the one item with its value; some find no item, or several")
        item = here.long().argmax(dim=-1)  # (B, Q)
        wanted = items.gather(1, item[..., None].expand(*item.shape, items.shape[-1]))  # (B, Q, A)
        return wanted.gather(2, (give + self._offset)[..., None]).squeeze(-1)

    _offset = 0  # where the attributes that can be returned begin


@dataclass(frozen=True)
class RelationalRetrieval(_Prompt):
    """The w-th value of the item whose c-th key is v.

    N items; C key attributes, each with values in 0 … K-1 that differ from item to item (so a key names one
    item); W value attributes, each uniform over 0 … V-1 and independent. Q queries a prompt, each drawn
    uniformly among the C N W of its prompt. Items: (k_1 … k_C, v_1 … v_W), counted from 0.

    >>> task = RelationalRetrieval(N=2, C=2, W=2, V=4, K=3, Q=2)
    >>> items = torch.tensor([[[0, 2, 3, 1], [1, 0, 0, 2]]])     # keys 0, 2, values 3, 1; 1, 0 and 0, 2
    >>> asked = torch.tensor([[[0, 1, 1], [1, 2, 0]]])           # key 0 is 1: value 1; key 1 is 2: value 0
    >>> task.answer(items, asked)                                # of the second item 2, of the first item 3
    tensor([[2, 3]])
    >>> for token in task.tokens(items, asked)[0].tolist():
    ...     print(" + ".join(task.row(index) for index in token if index))
    key 0 is 0 + key 1 is 2 + value 0 is 3 + value 1 is 1
    key 0 is 1 + key 1 is 0 + value 0 is 0 + value 1 is 2
    key 0 is 1 + asks value 1
    key 1 is 2 + asks value 0
    """

    N: int = 8
    C: int = 4
    W: int = 4
    V: int = 8
    K: int | None = None  # None: N
    Q: int = 16
    sink: bool = True  # a query may read itself too

    def __post_init__(self):
        object.__setattr__(self, "K", self.N if self.K is None else self.K)
        _check_counts(self, N=2, C=1, W=1, V=2, K=2, Q=1)
        if self.K < self.N:
            raise ValueError(
                f"key values differ from item to item, so K >= N: got K={self.K} values for N={self.N} items"
            )

    @property
    def S(self) -> int:  # noqa: N802
        """Rows of the embedding table in a token: one for each attribute."""
        return max(2, self.C + self.W)

    @property
    def vocab(self) -> int:
        """Rows of the embedding table: nothing, C K keys, W V values, W words for what is asked."""
        return 1 + self.C * self.K + self.W * self.V + self.W

    @property
    def n_answers(self) -> int:
        """V: values share their answers, whatever attribute they belong to."""
        return self.V

    @property
    def chance(self) -> float:
        """Accuracy of a guess that reads nothing: 1/V."""
        return 1 / self.V

    def levels(self) -> dict[str, float]:
        """Best accuracy of three models that miss a part of the question: what half a solution scores.

        nothing: 1/V.  the asked attribute, of no item: E[largest count among N values]/N, the commonest.
        the item, not what is asked of it: E[largest count among W values]/W. Values are uniform over V.
        """
        return {
            "nothing": self.chance,
            "attribute": float(commonest(self.N, self.V)),
            "item": float(commonest(self.W, self.V)),
        }

    def row(self, index: int) -> str:
        """The name of one row of the embedding table."""
        names = ["nothing", *(f"key {c} is {v}" for c in range(self.C) for v in range(self.K))]
        names += [f"value {w} is {v}" for w in range(self.W) for v in range(self.V)]
        return (names + [f"asks value {w}" for w in range(self.W)])[index]

    def all_asked(self) -> Tensor:
        """Every query there is, (C, K, W, 3), at [c, v, w] the query (c, v, w)."""
        return torch.cartesian_prod(*(torch.arange(n) for n in (self.C, self.K, self.W))).reshape(
            self.C, self.K, self.W, 3
        )

    def answer(self, items: Tensor, asked: Tensor) -> Tensor:
        """The definition. items (B, N, C + W), asked (B, Q, 3) -> (B, Q). ValueError for an absent key."""
        return self._found(items, asked)

    def sample(self, size: int, *, generator: torch.Generator) -> Retrievals:
        """`size` prompts, independent, uniform over all items and queries that the task allows."""
        _check_size(size)
        keys = _distinct((size, self.C), self.K, self.N, generator).mT  # (B, N, C)
        values = torch.randint(self.V, (size, self.N, self.W), generator=generator)
        items = torch.cat([keys, values], dim=-1)
        c, item, w = (torch.randint(n, (size, self.Q), generator=generator) for n in (self.C, self.N, self.W))
        value = keys.flatten(1).gather(1, item * self.C + c)  # (B, Q)
        asked = torch.stack([c, value, w], dim=-1)
        return Retrievals(self.tokens(items, asked), items, asked, self.answer(items, asked))

    @property
    def _offset(self) -> int:
        return self.C

    def _item_tokens(self, items: Tensor) -> Tensor:
        first = [1 + c * self.K for c in range(self.C)]
        first += [1 + self.C * self.K + w * self.V for w in range(self.W)]
        return items + torch.tensor(first, device=items.device)  # (B, N, C + W)

    def _key_row(self, c: Tensor, value: Tensor) -> Tensor:
        return 1 + c * self.K + value  # the row that an item with this key holds too

    def _return_row(self, w: Tensor) -> Tensor:
        return 1 + self.C * self.K + self.W * self.V + w


@dataclass(frozen=True)
class Recombination(_Prompt):
    """Attribute j of the item whose attribute i is v, j != i.

    N items with A attributes, each with values in 0 … V-1 that differ from item to item. Q queries a prompt,
    each drawn uniformly among the A N (A - 1) of its prompt. The answer is j V + the value: one of A V.

    >>> task = Recombination(N=2, A=3, V=4, Q=2)
    >>> items = torch.tensor([[[0, 2, 3], [1, 0, 2]]])
    >>> asked = torch.tensor([[[0, 1, 2], [2, 3, 1]]])           # 0 is 1: attribute 2; 2 is 3: attribute 1
    >>> task.answer(items, asked)                                # 2 V + 2 = 10 and 1 V + 2 = 6
    tensor([[10,  6]])
    >>> for token in task.tokens(items, asked)[0].tolist():
    ...     print(" + ".join(task.row(index) for index in token if index))
    attribute 0 is 0 + attribute 1 is 2 + attribute 2 is 3
    attribute 0 is 1 + attribute 1 is 0 + attribute 2 is 2
    attribute 0 is 1 + asks attribute 2
    attribute 2 is 3 + asks attribute 1
    """

    N: int = 8
    A: int = 4
    V: int = 16
    Q: int = 16
    sink: bool = True  # a query may read itself too

    def __post_init__(self):
        _check_counts(self, N=2, A=2, V=2, Q=1)
        if self.V < self.N:
            raise ValueError(
                f"values differ from item to item, so V >= N: got V={self.V} values for N={self.N} items"
            )

    @property
    def S(self) -> int:  # noqa: N802
        """Rows of the embedding table in a token: one for each attribute."""
        return self.A

    @property
    def vocab(self) -> int:
        """Rows of the embedding table: nothing, A V values, A words for what is asked."""
        return 1 + self.A * self.V + self.A

    @property
    def n_answers(self) -> int:
        """A V: a value of one attribute is another answer than the same value of another."""
        return self.A * self.V

    @property
    def chance(self) -> float:
        """Accuracy of a guess that reads nothing: 1/(A V)."""
        return 1 / (self.A * self.V)

    def levels(self) -> dict[str, float]:
        """Best accuracy of models that miss a part of the question: what half a solution scores.

        nothing: 1/(A V).  query: 1/V, some value of the attribute that is asked for.  attribute: 1/N, the
        asked attribute of some item.  item: 1/(A - 1), some attribute of the right item, not the one named.
        """
        return {
            "nothing": self.chance,
            "query": 1 / self.V,
            "attribute": 1 / self.N,
            "item": 1 / (self.A - 1),
        }

    def row(self, index: int) -> str:
        """The name of one row of the embedding table."""
        names = ["nothing", *(f"attribute {a} is {v}" for a in range(self.A) for v in range(self.V))]
        return (names + [f"asks attribute {a}" for a in range(self.A)])[index]

    def all_asked(self) -> Tensor:
        """Every query, (A, V, A, 3), at [i, v, j] the query (i, v, j); i = j is never drawn."""
        return torch.cartesian_prod(*(torch.arange(n) for n in (self.A, self.V, self.A))).reshape(
            self.A, self.V, self.A, 3
        )

    def answer(self, items: Tensor, asked: Tensor) -> Tensor:
        """The definition. items (B, N, A), asked (B, Q, 3) -> (B, Q). ValueError where a value is absent."""
        return asked[..., 2] * self.V + self._found(items, asked)

    def sample(self, size: int, *, generator: torch.Generator) -> Retrievals:
        """`size` prompts, independent, uniform over all items and queries that the task allows."""
        _check_size(size)
        items = _distinct((size, self.A), self.V, self.N, generator).mT  # (B, N, A)
        i, item = (torch.randint(n, (size, self.Q), generator=generator) for n in (self.A, self.N))
        j = (i + torch.randint(1, self.A, (size, self.Q), generator=generator)) % self.A  # never i
        value = items.flatten(1).gather(1, item * self.A + i)  # (B, Q)
        asked = torch.stack([i, value, j], dim=-1)
        return Retrievals(self.tokens(items, asked), items, asked, self.answer(items, asked))

    def _item_tokens(self, items: Tensor) -> Tensor:
        return items + 1 + self.V * torch.arange(self.A, device=items.device)  # (B, N, A)

    def _key_row(self, i: Tensor, value: Tensor) -> Tensor:
        return 1 + i * self.V + value

    def _return_row(self, j: Tensor) -> Tensor:
        return 1 + self.A * self.V + j


def commonest(n: int, V: int) -> Fraction:
    """E[largest count]/n of n independent values, uniform over V: how often the commonest one is right.

    P(no value occurs more than m times) = n!/V^n times the coefficient of x^n in (1 + x + … + x^m/m!)^V.
    Exact. Unit: share of 1.

    >>> commonest(2, 2)          # equal half of the time: (2 + 1)/2 out of 2
    Fraction(3, 4)
    >>> round(float(commonest(8, 8)), 3)
    0.325
    """
    if n < 1 or V < 1:
        raise ValueError(f"counts need values to count: n >= 1 and V >= 1, got n={n}, V={V}")
    expected, below = Fraction(0), Fraction(0)
    for m in range(1, n + 1):
        ways = [Fraction(1), *[Fraction(0)] * n]  # coefficients of x^0 … x^n, value after value
        for _ in range(V):
            ways = [sum(ways[k - i] / math.factorial(i) for i in range(min(k, m) + 1)) for k in range(n + 1)]
        at_most = ways[n] * math.factorial(n) / Fraction(V) ** n
        expected, below = expected + m * (at_most - below), at_most
    return expected / n


def _distinct(shape: tuple[int, ...], values: int, n: int, generator: torch.Generator) -> Tensor:
    """n different numbers of 0 … values - 1 in random order, for each place of `shape`: (*shape, n)."""
    draw = torch.rand(*shape, values, generator=generator, dtype=torch.float64)
    return draw.argsort(dim=-1)[..., :n]  # uniform: float64 ties have chance ~ values² / 2^53


def _check_counts(task: object, **least: int) -> None:
    for name, low in least.items():
        value = getattr(task, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} is a whole number of at least {low}, got {value!r}")


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"a batch holds at least one prompt, got size={size}")
