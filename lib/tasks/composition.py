"""L-step sequential composition, L-FuncComp: the task of the theorem on depth against width.

Sizes m >= 1 and n_1 … n_{L-1} >= 1 give N_0 = m and N_l = m n_1 … n_l. An input is a start z_0 in [m], tables
z_l: [N_{l-1}] -> [N_{l-1}] for l = 1 … L, and switches w = (w_1 … w_{L-1}), w_l in [n_l]. From i_0 = z_0 go

    i_1 = z_1(i_0),   i_{l+1} = z_{l+1}(w_l, i_l),   and answer i_L, a number in [N_{L-1}].

[N] = {0 … N-1}: the page counts from 1, the code from 0. The pair (w_l, i_l) is place w_l N_{l-1} + i_l of
z_{l+1}. The prompt lists z_L, …, z_1, z_0 and, last, all of w in *one* token, where the answer is read: while
the tables are processed, nobody knows w.

Source: Chen, Peng and Wu 2024 (definition second-hand, through a public reading note), `depth-width`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib.choices import check_choice

ORDERS = ("paper", "z_1-first", "w-first")
CHUNK = 65_536  # inputs handed out at once: prompt_length int64 numbers each, 4 MB at 8 tokens
ENUMERABLE = 10**9  # inputs that are listed at all: some ten minutes at a million a second


class Instances(NamedTuple):
    """A batch of B inputs."""

    z0: Tensor  # (B,) where to start
    tables: tuple[Tensor, ...]  # L tables: tables[l - 1] (B, N_{l-1}) is z_l
    w: Tensor  # (B, L - 1) switches: w[:, l - 1] is w_l


@dataclass(frozen=True)
class SequentialComposition:
    """L-FuncComp with sizes m and ns = (n_1 … n_{L-1}): L = len(ns) + 1 steps.

    A token is a sum of up to S symbols (rows of an embedding table, named by `row`; row 0, "none", pads).

    >>> task = SequentialComposition(m=2, ns=(2,))           # L = 2, N = (2, 4)
    >>> z0, w = torch.tensor([1]), torch.tensor([[1]])
    >>> z1, z2 = torch.tensor([[1, 0]]), torch.tensor([[3, 0, 2, 1]])
    >>> one = Instances(z0, (z1, z2), w)
    >>> task.steps(one)          # i_0 = 1, i_1 = z_1(1) = 0, i_2 = z_2(w_1 = 1, i_1 = 0) = z_2[1·2 + 0] = 2
    tensor([[1, 0, 2]])
    >>> for token in task.tokens(one)[0].tolist():
    ...     print(" + ".join(task.row(symbol) for symbol in token if symbol))
    z_2 + at w_1=0 + at i=0 + value 3
    z_2 + at w_1=0 + at i=1 + value 0
    z_2 + at w_1=1 + at i=0 + value 2
    z_2 + at w_1=1 + at i=1 + value 1
    z_1 + at i=0 + value 1
    z_1 + at i=1 + value 0
    z_0 + value 1
    w + w_1=1
    >>> task.n_inputs, sum(len(batch.z0) for batch in task.all_inputs())
    (4096, 4096)
    """

    m: int
    ns: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.ns, (tuple, list)) or not all(_is_count(n) for n in (self.m, *self.ns)):
            raise ValueError(f"sizes are integers >= 1: m, and a tuple ns = (n_1 … n_{{L-1}}), () for L = 1; "
                             f"got m={self.m!r}, ns={self.ns!r}")
        object.__setattr__(self, "ns", tuple(self.ns))

    @property
    def L(self) -> int:  # noqa: N802
        """Steps, which is the number of tables."""
        return len(self.ns) + 1

    @property
    def N(self) -> tuple[int, ...]:  # noqa: N802
        """(N_0 … N_{L-1}): table z_l has N_{l-1} entries."""
        return tuple(self.m * math.prod(self.ns[:l]) for l in range(self.L))

    @property
    def n_answers(self) -> int:
        """N_{L-1}: the answer is one of 0 … n_answers - 1."""
        return self.N[-1]

    @property
    def prompt_length(self) -> int:
        """T = 2 + N_0 + … + N_{L-1}: the entries of the tables, one token for z_0, one for all of w."""
        return 2 + sum(self.N)

    @property
    def n_inputs(self) -> int:
        """Number of inputs, m · n_1 … n_{L-1} · Π_l N_l^{N_l}: 81 for m=3, ns=(); 4096 for m=2, ns=(2,)."""
        return self.m * math.prod(self.ns) * math.prod(N**N for N in self.N)

    def steps(self, instances: Instances) -> Tensor:
        """The definition, with every value on the way: (B, L + 1), columns i_0 … i_L."""
        self.check(instances)
        value = [instances.z0]
        for l, table in enumerate(instances.tables):  # table is z_{l+1}
            place = value[-1] + (instances.w[:, l - 1] * self.N[l - 1] if l else 0)  # (B,)
            value.append(table.gather(1, place[:, None]).squeeze(1))
        return torch.stack(value, dim=1)

    def answer(self, instances: Instances) -> Tensor:
        """i_L: (B,)."""
        return self.steps(instances)[:, -1]

    # ---- inputs -----------------------------------------------------------------------------------------

    def all_inputs(
        self, *, chunk: int = CHUNK, first: int = 0, stop: int | None = None
    ) -> Iterator[Instances]:
        """Every input once, in counting order (w_{L-1} fastest, z_L(0) slowest), at most `chunk` at a time.

        first, stop: only the inputs with these numbers, to share the work. ValueError beyond ENUMERABLE.
        """
        if self.n_inputs > ENUMERABLE:
            raise ValueError(f"m={self.m}, ns={self.ns} has {_about(self.n_inputs)} inputs, more than the "
                             f"{ENUMERABLE:,} that are listed; draw some with `sample`")
        stop = self.n_inputs if stop is None else stop
        if chunk < 1 or not 0 <= first <= stop <= self.n_inputs:
            raise ValueError(f"a chunk holds at least one input and 0 <= first <= stop <= {self.n_inputs}; "
                             f"got chunk={chunk}, first={first}, stop={stop}")
        bases = [N for N in reversed(self.N) for _ in range(N)] + [self.m, *self.ns]
        for start in range(first, stop, chunk):
            number, digits = torch.arange(start, min(start + chunk, stop)), []
            for base in reversed(bases):
                digits.append(number % base)
                number = number // base
            yield self._split(torch.stack(digits[::-1], dim=1))

    def sample(self, size: int, *, seed: int | None = None,
               generator: torch.Generator | None = None) -> Instances:
        """`size` inputs, uniform over all of them and independent, from a seed or a generator (not both)."""
        if size < 1 or (seed is None) == (generator is None):
            raise ValueError("a sample holds at least one input, and takes a seed or a generator; got "
                             f"size={size}, seed={seed}, generator={generator}")
        draw = torch.Generator().manual_seed(seed) if generator is None else generator
        tables = tuple(torch.randint(N, (size, N), generator=draw) for N in self.N)
        z0 = torch.randint(self.m, (size,), generator=draw)
        w = [torch.randint(n, (size,), generator=draw) for n in self.ns]
        return Instances(z0, tables, torch.stack(w, dim=1) if w else z0.new_empty(size, 0))

    def _split(self, digits: Tensor) -> Instances:
        *tables, z0, w = digits.split([*reversed(self.N), 1, self.L - 1], dim=1)
        return Instances(z0.squeeze(1), tuple(tables[::-1]), w)

    def check(self, instances: Instances) -> None:
        """ValueError unless the batch has the shapes and the values of this task."""
        z0, tables, w = instances
        B, shapes = len(z0), [tuple(table.shape) for table in tables]
        if z0.dim() != 1 or shapes != [(B, N) for N in self.N] or w.shape != (B, self.L - 1):
            raise ValueError(
                f"m={self.m}, ns={self.ns} takes z0 (B,), tables (B, N) with N = {self.N} and w "
                f"(B, {self.L - 1}); got {tuple(z0.shape)}, {shapes} and {tuple(w.shape)}")
        bounds = [("z_0", z0, self.m)]
        bounds += [(f"z_{l}", table, N) for l, (table, N) in enumerate(zip(tables, self.N, strict=True), 1)]
        bounds += [(f"w_{l}", w[:, l - 1], n) for l, n in enumerate(self.ns, 1)]
        for name, x, n in bounds:
            if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < n:
                raise ValueError(f"{name} lies in 0 … {n - 1}, but holds {int(x.min())} … {int(x.max())}; "
                                 "the code counts from 0")

    # ---- prompts ----------------------------------------------------------------------------------------

    def places(self, order: str = "paper") -> dict[str, int]:
        """Where each part begins in the prompt: {"z_2": 0, "z_1": 4, "z_0": 6, "w": 7} for m=2, ns=(2,)."""
        check_choice("order of the prompt", order, ORDERS)
        tables = [f"z_{l}" for l in range(1, self.L + 1)]
        parts = [*(tables if order == "z_1-first" else tables[::-1]), "z_0"]
        parts = ["w", *parts] if order == "w-first" else [*parts, "w"]
        start, place = 0, {}
        for part in parts:
            place[part] = start
            start += self.N[int(part[2:]) - 1] if part in tables else 1
        return place

    @property
    def symbols(self) -> list[str]:
        """Names of the rows of the embedding table, padding first."""
        names = ["none", *(f"z_{l}" for l in range(self.L + 1)), "w"]
        names += [f"at w_{l}={v}" for l, n in enumerate(self.ns, 1) for v in range(n)]
        names += [f"at i={i}" for i in range(self._n_indices)]
        names += [f"value {v}" for v in range(self.n_answers)]
        return names + [f"w_{l}={v}" for l, n in enumerate(self.ns, 1) for v in range(n)]

    @property
    def vocab(self) -> int:
        """Rows of the embedding table."""
        return self.L + 3 + 2 * sum(self.ns) + self._n_indices + self.n_answers

    @property
    def _n_indices(self) -> int:
        return self.N[max(self.L - 2, 0)]  # i_l, l < L, lies in [N_{l-1}]

    def row(self, symbol: int) -> str:
        """The name of one row of the embedding table."""
        return self.symbols[symbol]

    def tokens(self, instances: Instances, *, order: str = "paper") -> Tensor:
        """Prompts (B, T, S), S = max(4, L): each token the sum of S rows of an embedding table, 0 = "none".

        order: "paper" z_L, …, z_1, z_0, w;  "z_1-first" z_1, …, z_L, z_0, w;  "w-first" w, z_L, …, z_1, z_0.
        """
        place = self.places(order)
        self.check(instances)
        first = {name: symbol for symbol, name in enumerate(self.symbols)}
        blank = torch.zeros(self.prompt_length, max(4, self.L), dtype=torch.long)
        for part, t in place.items():
            entries = self.N[int(part[2:]) - 1] if part not in ("z_0", "w") else 1
            blank[t : t + entries, 0] = first[part]
        for l, N in enumerate(self.N, 1):  # z_l
            t, entry = place[f"z_{l}"], torch.arange(N)
            inner = self.N[l - 2] if l >= 2 else N  # entry = w_{l-1} · inner + i_{l-1}
            if l >= 2:
                blank[t : t + N, 1] = first[f"at w_{l - 1}=0"] + entry // inner
            blank[t : t + N, 2] = first["at i=0"] + entry % inner
        tokens = blank.to(instances.z0.device).repeat(len(instances.z0), 1, 1)
        for l, table in enumerate(instances.tables, 1):
            t = place[f"z_{l}"]
            tokens[:, t : t + self.N[l - 1], 3] = first["value 0"] + table
        tokens[:, place["z_0"], 3] = first["value 0"] + instances.z0
        for l in range(1, self.L):
            tokens[:, place["w"], l] = first[f"w_{l}=0"] + instances.w[:, l - 1]
        return tokens


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1


def _about(count: int) -> str:
    return f"{count:,}" if count < 10**15 else f"about 10^{len(str(count)) - 1}"
