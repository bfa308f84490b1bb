"""Multi-hop questions about facts told in the prompt: as text, and in own tokens for models trained here.

A story has m chains of K facts, "Anna's teacher is Ben. Ben's boss is Clara.", in a random order. All chains
go through the same K relations and share no name, so they are exchangeable: a question of k hops from the
head of one chain has m candidates, the k-th names of the chains, and nothing but following the hops tells
them apart. For k >= 2 chance is 1/m exactly: copying the last name of the story, the commonest name, or a
name that the asked relation leads to does no better (`SHORTCUTS`; measured in the tests).
The story is the same whatever k is asked; only the question grows, by one relation a hop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.tasks.questions import Question, Sequences, check_batch

NAMES = (
    "Adam Alice Anna Ben Bruce Carl Clara Daniel David Diana Edward Ella Emma Frank George Grace Henry Jack "
    "James Jane John Julia Kate Laura Lily Louis Lucy Mark Mary Michael Oliver Paul Peter Robert Rose Ruth "
    "Sam Sarah Simon Thomas"
).split()
RELATIONS = "boss coach doctor driver friend lawyer neighbour partner student teacher".split()
ORDERS = ("shuffled", "forward", "backward")


class Stories(NamedTuple):
    """B stories; names and relations by number."""

    people: Tensor  # (B, m, K + 1) the names along each chain, all different
    relations: Tensor  # (B, K) hop l goes through relations[b, l], all different
    order: Tensor  # (B, m K) the facts as told: c K + l is hop l of chain c
    asked: Tensor  # (B,) the chain a question starts at

    def facts(self, b: int) -> list[tuple[int, int, int]]:
        """(person, relation, person) of one story, in the order told."""
        K = self.relations.shape[1]
        people, relations = self.people[b].tolist(), self.relations[b].tolist()
        told = (divmod(i, K) for i in self.order[b].tolist())
        return [(people[c][l], relations[l], people[c][l + 1]) for c, l in told]


@dataclass(frozen=True)
class MultiHop:
    """Stories of `chains` chains with `hops` facts each; questions of 1 .. `hops` hops.

    order: "shuffled", or by hop: "forward" tells all facts of hop 1 first, "backward" those of the last hop
    (the chains shuffled within a hop). A causal model can follow a chain while reading only if the facts
    happen to come in the order of the hops.

    >>> task = MultiHop(hops=2, chains=2, order="forward")
    >>> question = task.questions(0, seed=0, size=1, hops=2)[0]
    >>> print(question.prompt + question.answer)
    Ella's doctor is Mark. Lily's doctor is Laura. Mark's neighbour is Bruce. Laura's neighbour is Anna.
    Question: Who is the neighbour of the doctor of Lily?
    Answer: Anna
    >>> question.choices
    (' Bruce', ' Anna')
    """

    hops: int = 4
    chains: int = 3
    order: str = "shuffled"

    def __post_init__(self):
        if not isinstance(self.hops, int) or not 1 <= self.hops <= len(RELATIONS):
            raise ValueError(f"hops is a whole number in 1 .. {len(RELATIONS)}, got {self.hops!r}")
        most = len(NAMES) // (self.hops + 1)
        if not isinstance(self.chains, int) or not 2 <= self.chains <= most:
            raise ValueError(
                f"with {self.hops} hops, chains lie in 2 .. {most}: {len(NAMES)} names, each "
                f"told of in one chain; got {self.chains!r}"
            )
        check_choice("order of the facts", self.order, ORDERS)

    @property
    def chance(self) -> float:
        """Accuracy of one who knows which names the last relation leads to, and guesses: 1/m."""
        return 1 / self.chains

    def stories(self, step: int, *, seed: int, size: int) -> Stories:
        """`size` random stories, a function of (seed, step) alone."""
        check_batch(size, [self.hops], self.hops)
        rng, m, K = np.random.default_rng([seed, step]), self.chains, self.hops
        people = rng.permuted(np.tile(np.arange(len(NAMES)), (size, 1)), axis=1)[:, : m * (K + 1)]
        relations = rng.permuted(np.tile(np.arange(len(RELATIONS)), (size, 1)), axis=1)[:, :K]
        order = rng.permuted(np.tile(np.arange(m * K), (size, 1)), axis=1)
        if self.order != "shuffled":
            hop = order % K if self.order == "forward" else -(order % K)
            order = np.take_along_axis(order, hop.argsort(axis=1, kind="stable"), axis=1)
        asked = rng.integers(m, size=size)
        parts = (people.reshape(size, m, K + 1), relations, order, asked)
        return Stories(*(torch.from_numpy(part.copy()) for part in parts))

    def answer(self, stories: Stories, k: int) -> Tensor:
        """The name k hops from the head of the asked chain, by number. -> (B,)."""
        return stories.people[torch.arange(len(stories.asked)), stories.asked, k]

    def questions(self, step: int, *, seed: int, size: int, hops: int) -> list[Question]:
        """`size` questions of `hops` hops as text; the same stories for any number of hops."""
        check_batch(size, [hops], self.hops)
        stories = self.stories(step, seed=seed, size=size)
        return [self._question(stories, b, hops) for b in range(size)]

    def _question(self, stories: Stories, b: int, k: int) -> Question:
        told = " ".join(f"{NAMES[x]}'s {RELATIONS[r]} is {NAMES[y]}." for x, r, y in stories.facts(b))
        people, c = stories.people[b].tolist(), int(stories.asked[b])
        asked = " of ".join(f"the {RELATIONS[r]}" for r in reversed(stories.relations[b, :k].tolist()))
        prompt = f"{told}\nQuestion: Who is {asked} of {NAMES[people[c][0]]}?\nAnswer:"
        return Question(
            prompt, f" {NAMES[people[c][k]]}", k, tuple(f" {NAMES[chain[k]]}" for chain in people)
        )

    # In own tokens: names, relations, then "?", "=", padding. A fact is three tokens: name, relation, name.

    @property
    def vocab(self) -> int:
        """Number of own tokens, the same for any number of hops and chains."""
        return len(NAMES) + len(RELATIONS) + 3

    @property
    def names(self) -> list[str]:
        """What each own token stands for."""
        return [*NAMES, *RELATIONS, "?", "=", "pad"]

    @property
    def length(self) -> int:
        """Own tokens of the longest sequence: 3 a fact, "?", head, K relations, "=", answer."""
        return 3 * self.chains * self.hops + self.hops + 4

    def read(self, ids: Sequence[int]) -> str:
        """The names of token ids, with spaces between them."""
        names = self.names
        return " ".join(names[i] for i in ids)

    def batch(self, step: int, *, seed: int, size: int, mix: Sequence[int] | None = None) -> Sequences:
        """`size` questions in own tokens, a function of (seed, step) alone: "... ? head relations = answer".

        mix: numbers of hops, given to the rows in turn; by default 1, 2, ... hops.
        """
        mix = list(range(1, self.hops + 1)) if mix is None else list(mix)
        check_batch(size, mix, self.hops)
        stories, K, n = self.stories(step, seed=seed, size=size), self.hops, len(NAMES)
        question, equals, pad = range(self.vocab - 3, self.vocab)
        k = torch.tensor([mix[i % len(mix)] for i in range(size)])
        row, (chain, hop) = torch.arange(size)[:, None], (stories.order // K, stories.order % K)
        relations = n + stories.relations
        told = (stories.people[row, chain, hop], relations[row, hop], stories.people[row, chain, hop + 1])
        head = stories.people[row[:, 0], stories.asked, 0]
        answer = stories.people[row[:, 0], stories.asked, k]
        told = torch.stack(told, dim=-1).flatten(1)  # (B, 3 m K)
        start = told.shape[1] + 2  # where the relations of the question begin
        tokens = torch.full((size, self.length), pad)
        tokens[:, : start - 2], tokens[:, start - 2], tokens[:, start - 1] = told, question, head
        tokens[:, start : start + K] = torch.where(torch.arange(K) < k[:, None], relations, pad)
        at = start + k
        tokens[row[:, 0], at], tokens[row[:, 0], at + 1] = equals, answer
        return Sequences(tokens, at, answer, k)


def _last_told(facts: list[tuple[int, int, int]], head: int, asked: list[int]) -> int:
    return facts[-1][2]


def _first_told(facts: list[tuple[int, int, int]], head: int, asked: list[int]) -> int:
    return facts[0][0]


def _commonest(facts: list[tuple[int, int, int]], head: int, asked: list[int]) -> int:
    told = [name for x, _, y in facts for name in (x, y)]
    return max(told, key=told.count)  # the first told of those told most often


def _last_with_the_relation(facts: list[tuple[int, int, int]], head: int, asked: list[int]) -> int:
    return next(y for _, r, y in reversed(facts) if r == asked[-1])


def _first_with_the_relation(facts: list[tuple[int, int, int]], head: int, asked: list[int]) -> int:
    return next(y for _, r, y in facts if r == asked[-1])


def _next_with_the_relation(facts: list[tuple[int, int, int]], head: int, asked: list[int]) -> int:
    """The first name behind the head's own fact that the last relation leads to, else the last before it."""
    at = next(i for i, (x, _, _) in enumerate(facts) if x == head)
    return next(y for _, r, y in [*facts[at:], *reversed(facts[:at])] if r == asked[-1])


def _one_hop(facts: list[tuple[int, int, int]], head: int, asked: list[int]) -> int:
    return next(y for x, _, y in facts if x == head)


# Ways to answer without following the hops: (facts as told, head, relations asked) -> name.
SHORTCUTS: dict[str, Callable[[list[tuple[int, int, int]], int, list[int]], int]] = {
    "the last name told": _last_told,
    "the first name told": _first_told,
    "the commonest name": _commonest,
    "the last fact with the last relation": _last_with_the_relation,
    "the first fact with the last relation": _first_with_the_relation,
    "the next fact with the last relation": _next_with_the_relation,
    "the first hop only": _one_hop,
}
