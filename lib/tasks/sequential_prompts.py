"""Prompts to train on L-FuncComp (`lib.tasks.composition`): m questions on the same tables.

A prompt lists the tables and one w, and asks for the answer from *every* start z_0 in 0 .. m-1. The questions
do not read each other, so each is exactly one prompt of the task in the order chosen; sharing the tables
multiplies the labels at little cost.

order "paper":    z_L ... z_1, then z_0 and w of each question; read at w. A token of w reads its own z_0.
      "z_1-first": z_1 ... z_L, then the same.
      "w-first":  w, z_L ... z_1, then the z_0 of each question; read at z_0.
      "joint":    z_L ... z_1, then one token for each question that carries z_0 and w; read there. A control:
                  w is as late as in the paper's order, but no layer is spent on fetching z_0.
maps "random": every table entry is drawn by itself, the uniform inputs of the task. "permutations": every
table is a permutation, so that the commonest value of a table is no guess.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.tasks.composition import Instances, SequentialComposition

ORDERS = ("paper", "z_1-first", "w-first", "joint")
MAPS = ("random", "permutations")


class SequentialBatch(NamedTuple):
    """B prompts with m questions each."""

    tokens: Tensor  # (B, T, S) rows of the embedding table, to be summed
    tables: tuple[Tensor, ...]  # tables[l - 1] (B, N_{l-1}) is z_l
    w: Tensor  # (B, L - 1), the same for all questions of a prompt
    values: Tensor  # (B, m, L + 1) i_0 ... i_L from each start


@dataclass(frozen=True)
class SequentialPrompts:
    """L-FuncComp with sizes m, ns, all m starts asked at once.

    >>> prompts = SequentialPrompts(SequentialComposition(m=2, ns=(2,)))
    >>> tables = (torch.tensor([[1, 0]]), torch.tensor([[3, 0, 2, 1]]))
    >>> batch = prompts.ask(tables, w=torch.tensor([[1]]))
    >>> batch.values[0].tolist()               # 0 -> z_1(0) = 1 -> z_2(1, 1) = 1;  1 -> 0 -> z_2(1, 0) = 2
    [[0, 1, 1], [1, 0, 2]]
    >>> row = prompts.task.row
    >>> [" + ".join(row(symbol) for symbol in token if symbol) for token in batch.tokens[0, 6:].tolist()]
    ['z_0 + value 0', 'z_0 + value 1', 'w + w_1=1', 'w + w_1=1']
    """

    task: SequentialComposition
    order: str = "paper"
    maps: str = "random"

    def __post_init__(self):
        check_choice("order", self.order, ORDERS)
        check_choice("maps", self.maps, MAPS)
        if self.task.m < 2:
            raise ValueError(f"a start worth asking about has an alternative: m >= 2, got m={self.task.m}")

    @property
    def length(self) -> int:
        """Tokens of a prompt: N_0 + ... + N_{L-1} of the tables, then those of the m questions."""
        m = self.task.m
        return sum(self.task.N) + {"w-first": 1 + m, "joint": m}.get(self.order, 2 * m)

    @property
    def listed(self) -> slice:
        """The tokens of the tables, in the order of `listed_tables`."""
        first = 1 if self.order == "w-first" else 0
        return slice(first, first + sum(self.task.N))

    @property
    def listed_tables(self) -> list[str]:
        """Names of the tables as the prompt lists them: ["z_2", "z_1"] for two in the paper's order."""
        return [part for part in self.task.places(self._base_order) if part not in ("z_0", "w")]

    @property
    def _base_order(self) -> str:
        return "paper" if self.order == "joint" else self.order

    @property
    def read(self) -> slice:
        """The tokens at which the m answers are read, in the order of the starts."""
        return slice(self.length - self.task.m, self.length)

    @property
    def late(self) -> int:
        """Layers until the token that is read can know i_0: 1 where z_0 is another token."""
        return 1 if self.order in ("paper", "z_1-first") else 0

    def mask(self) -> Tensor:
        """(T, T), True where the row's token may read the column's."""
        T, m = self.length, self.task.m
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        start = T - m * (1 + self.late)  # the first token of a question
        same = torch.eye(m, dtype=torch.bool).repeat(1 + self.late, 1 + self.late)
        mask[start:, start:] &= same
        return mask

    def ask(self, tables: tuple[Tensor, ...], w: Tensor) -> SequentialBatch:
        """The prompts on these tables, tables[l - 1] (B, N_{l-1}), and w (B, L - 1)."""
        shape, every = (len(w), self.task.m), self._every_start(tables, w)
        values = self.task.steps(every).unflatten(0, shape)
        tokens = self.task.tokens(every, order=self._base_order).unflatten(0, shape)
        place = self.task.places(self._base_order)
        starts, switches = tokens[:, :, place["z_0"]], tokens[:, :, place["w"]]  # (B, m, S) each
        listed = tokens[:, 0, self.listed]  # (B, N_0 + ... + N_{L-1}, S)
        if self.order == "w-first":
            parts = [switches[:, :1], listed, starts]
        elif self.order == "joint":  # a token of w has room for one more symbol: the value of z_0
            pad = listed.new_zeros(*listed.shape[:2], 1)
            parts = [torch.cat([listed, pad], dim=-1), torch.cat([switches, starts[..., 3:4]], dim=-1)]
        else:
            parts = [listed, starts, switches]
        return SequentialBatch(torch.cat(parts, dim=1), tables, w, values)

    def batch(self, step: int, *, seed: int, size: int) -> SequentialBatch:
        """`size` fresh prompts, a function of (seed, step) alone."""
        if size < 1:
            raise ValueError(f"a batch holds at least one prompt, got size={size}")
        state = np.random.SeedSequence([seed, step]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(state))
        tables, w = self.task.sample(size, generator=generator)[1:]
        if self.maps == "permutations":
            draws = [torch.rand(size, N, generator=generator, dtype=torch.float64) for N in self.task.N]
            tables = tuple(draw.argsort(dim=-1) for draw in draws)
        return self.ask(tables, w)

    def best_guesses(self, batch: SequentialBatch) -> dict[str, float]:
        """Accuracy of the best guess on these prompts, for one who knows a part of each.

        "tables": the tables alone; "w": also w, but not z_0; "start": also z_0, but not w. Exact: for each
        prompt all (w, z_0) are listed, and the commonest answer among those still possible is given. For
        permutations they are 1 / N_{L-1}, 1 / m and 1 / (n_1 ... n_{L-1}).
        """
        shape, answers = (len(batch.w), self.task.m), []
        for w in itertools.product(*(range(n) for n in self.task.ns)):
            every = self._every_start(batch.tables, torch.tensor(w, dtype=torch.long).expand(shape[0], -1))
            answers.append(self.task.answer(every).unflatten(0, shape))
        answer = torch.stack(answers, dim=1)  # (B, W, m)
        return {
            "tables": _commonest(answer.flatten(1), self.task.n_answers),
            "w": _commonest(batch.values[..., -1], self.task.n_answers),
            "start": _commonest(answer.mT, self.task.n_answers),
        }

    def _every_start(self, tables: tuple[Tensor, ...], w: Tensor) -> Instances:
        """B m inputs, prompt by prompt the starts 0 .. m-1."""
        m = self.task.m
        repeated = tuple(table.repeat_interleave(m, dim=0) for table in tables)
        return Instances(torch.arange(m).repeat(len(w)), repeated, w.repeat_interleave(m, dim=0))


def _commonest(answer: Tensor, values: int) -> float:
    """Mean share of the commonest value along the last axis. answer: (..., n) in 0 .. values - 1."""
    count = torch.nn.functional.one_hot(answer, values).sum(dim=-2)  # (..., values)
    return (count.amax(dim=-1).double() / answer.shape[-1]).mean().item()
