"""Arithmetic of 1 to 6 operations: as text for pretrained models, in own tokens for those trained here.

    Arithmetic(steps=2, operators="+").questions(0, seed=0, size=4)     "5 + 7 + 5 = " and "17"
    ModularArithmetic(steps=6).batch(0, seed=0, size=64)                ids of "5 + 7 * 3 =" and the answer

Two shapes: a "chain" ((a + b) * c) ... is worked out from the left, each operation after the one before it;
"nested" is a binary tree, uniform over all Catalan(steps) trees. Operations in a row are the tree's height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from lib.choices import check_choice
from lib.tasks.questions import Question, Sequences, check_batch

OPERATORS = "+-*"
SHAPES = ("chain", "nested")
MAX_STEPS = 6
_ROUNDS = 1000  # rejection sampling gives up after this many rounds: the range is all but impossible


@dataclass(frozen=True)
class Arithmetic:
    """Integer expressions with `steps` operations, exact answers, as text.

    operands: smallest and largest.  results: smallest and largest value of every operation, so also of the
    answer; expressions outside are drawn again, so within them the draw is uniform.
    Brackets are written only where the usual precedence would otherwise read another expression.

    >>> task = Arithmetic(steps=2, operators="+-", operands=(1, 9), results=(0, 99))
    >>> task.question([5, 7, 5], "++")
    Question(prompt='5 + 7 + 5 = ', answer='17', steps=2, choices=())
    >>> Arithmetic(steps=2).question([5, 7, 5], "+*").prompt
    '(5 + 7) * 5 = '
    """

    steps: int
    operators: str = "+-*"
    shape: str = "chain"
    operands: tuple[int, int] = (1, 9)
    results: tuple[int, int] = (0, 99)

    def __post_init__(self):
        _check(self.steps, self.operators, self.shape)
        for name in ("operands", "results"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} lie from the smallest to the largest, got ({low}, {high})")
        if self.operands[0] < 0:
            raise ValueError(f"operands are written without a sign: at least 0, got {self.operands}")

    def question(self, operands: Sequence[int], operators: str, tree: int = 0) -> Question:
        """One question from its parts. tree: index into the trees of the shape; a chain has one."""
        value = evaluate(self.shape, np.array([tree]), np.array([operands]), _codes(operators))[0, -1]
        return Question(self._text(tree, operands, operators) + " = ", str(value), self.steps)

    def questions(self, step: int, *, seed: int, size: int) -> list[Question]:
        """`size` random questions, a function of (seed, step) alone.

        ValueError if almost no expression has all its results in range.
        """
        check_batch(size, [self.steps], MAX_STEPS)
        rng, k = np.random.default_rng([seed, step]), self.steps
        codes = np.array([OPERATORS.index(o) for o in self.operators])
        found: list[Question] = []
        for _ in range(_ROUNDS):
            tree = rng.integers(len(programs(self.shape, k)), size=size)
            operands = rng.integers(self.operands[0], self.operands[1] + 1, size=(size, k + 1))
            operators = rng.choice(codes, size=(size, k))
            results = evaluate(self.shape, tree, operands, operators)
            fits = ((results >= self.results[0]) & (results <= self.results[1])).all(axis=1)
            for i in np.flatnonzero(fits):
                chosen = "".join(OPERATORS[o] for o in operators[i])
                found.append(self.question(operands[i].tolist(), chosen, int(tree[i])))
            if len(found) >= size:
                return found[:size]
        raise ValueError(f"hardly any expression of {self} has all its results within {self.results}")

    def _text(self, tree: int, operands: Sequence[int], operators: str) -> str:
        if len(operands) != self.steps + 1 or len(operators) != self.steps:
            raise ValueError(f"{self.steps} operations take {self.steps + 1} operands, got {len(operands)}")
        written = [(str(a), 2) for a in operands]  # text and how tightly it binds
        for position, left, right in programs(self.shape, self.steps)[tree].operations:
            operator = operators[position]
            binds = 1 if operator == "*" else 0
            first, second = written[left], written[right]
            a = f"({first[0]})" if first[1] < binds else first[0]
            b = f"({second[0]})" if second[1] <= binds else second[0]
            written.append((f"{a} {operator} {b}", binds))
        return written[-1][0]


def few_shot(questions: Sequence[Question]) -> str:
    """Solved questions to stand before another one, a line each.

    >>> few_shot([Question("5 + 7 = ", "12", 1)]) + "1 + 1 = "
    '5 + 7 = 12\\n1 + 1 = '
    """
    return "".join(f"{q.prompt}{q.answer}\n" for q in questions)


@dataclass(frozen=True)
class ModularArithmetic:
    """Expressions of up to `steps` operations modulo m, in own tokens: question, "=", one token of answer.

    A chain is written without brackets and read from the left, without precedence; "nested" has brackets
    around every operation but the last. In a chain a factor after "*" has no divisor in common with m, so
    every operation is a permutation of the value before it: no operand can be ignored, the answer is uniform.

    >>> task = ModularArithmetic(steps=2)
    >>> task.read(task.encode("5 + 7 * 3 =").tolist())    # (5 + 7) * 3 = 36
    '5 + 7 * 3 ='
    >>> batch = task.batch(0, seed=0, size=2)
    >>> batch.tokens.shape, batch.steps.tolist()          # a, op, b, op, c, "=", answer; steps 1, 2, 1, ...
    (torch.Size([2, 7]), [1, 2])
    """

    steps: int = 6
    operators: str = "+-*"
    shape: str = "chain"
    modulus: int = 10

    def __post_init__(self):
        _check(self.steps, self.operators, self.shape)
        if self.modulus < 2:
            raise ValueError(f"a modulus of at least 2 leaves something to ask, got {self.modulus}")

    @property
    def names(self) -> list[str]:
        """What each token stands for: the m residues, the operators, brackets, "=", padding."""
        return [*map(str, range(self.modulus)), *OPERATORS, "(", ")", "=", "pad"]

    @property
    def vocab(self) -> int:
        """Number of tokens, the same for any number of steps."""
        return self.modulus + len(OPERATORS) + 4

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, answer included."""
        return self.question_length(self.steps) + 2

    def question_length(self, k: int) -> int:
        """Tokens of a question of k operations, "=" left out: 2k + 1, and brackets around k - 1 of them."""
        return 2 * k + 1 + (2 * (k - 1) if self.shape == "nested" else 0)

    def chance(self, k: int) -> float:
        """Accuracy of always giving the commonest answer to k operations, exactly. A chain has 1/m."""
        return float(self.distribution(k).max())

    def distribution(self, k: int) -> np.ndarray:
        """Probability of each answer to k operations. -> (m,), exact up to rounding."""
        check_batch(1, [k], self.steps)
        m = self.modulus
        if self.shape == "chain":  # each operation permutes a uniform value
            return np.full(m, 1 / m)
        value = np.arange(m)
        tables = [_apply(OPERATORS.index(o), value[:, None], value) % m for o in self.operators]
        after = [np.full(m, 1 / m)]
        for n in range(1, k + 1):  # the root splits n - 1 operations; sides are uniform over their own trees
            total = np.zeros(m)
            for i in range(n):
                weight = _catalan(i) * _catalan(n - 1 - i) / _catalan(n) / len(tables)
                for table in tables:
                    np.add.at(total, table, weight * np.outer(after[i], after[n - 1 - i]))
            after.append(total)
        return after[k]

    def encode(self, text: str) -> torch.Tensor:
        """Ids of names with spaces between them. -> (n,) long."""
        names = self.names
        return torch.tensor([names.index(check_choice("token", word, names)) for word in text.split()])

    def read(self, ids: Sequence[int]) -> str:
        """The names of token ids, with spaces between them."""
        names = self.names
        return " ".join(names[i] for i in ids)

    def batch(self, step: int, *, seed: int, size: int, mix: Sequence[int] | None = None) -> Sequences:
        """`size` random questions, a function of (seed, step) alone.

        mix: numbers of operations, given to the rows in turn; by default 1, 2, ... steps.
        """
        mix = list(range(1, self.steps + 1)) if mix is None else list(mix)
        check_batch(size, mix, self.steps)
        rng, m = np.random.default_rng([seed, step]), self.modulus
        equals, pad = self.vocab - 2, self.vocab - 1
        steps = np.array([mix[i % len(mix)] for i in range(size)])
        tokens, answers = np.full((size, self.length), pad), np.zeros(size, dtype=np.int64)
        for k in sorted(set(mix)):
            rows, n = np.flatnonzero(steps == k), self.question_length(k)
            tree, operands, operators = self._draw(rng, len(rows), k)
            answers[rows] = evaluate(self.shape, tree, operands, operators, m)[:, -1]
            templates = np.array(
                [p.brackets if self.shape == "nested" else p.plain for p in programs(self.shape, k)]
            )
            marks = np.broadcast_to([m + 3, m + 4], (len(rows), 2))
            parts = np.concatenate([operands, m + operators, marks], axis=1)
            tokens[rows, :n] = np.take_along_axis(parts, templates[tree], axis=1)
            tokens[rows, n], tokens[rows, n + 1] = equals, answers[rows]
        at = np.array([self.question_length(k) for k in steps])
        return Sequences(*(torch.from_numpy(part) for part in (tokens, at, answers, steps)))

    def _draw(self, rng: np.random.Generator, size: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Trees (size,), operands (size, k + 1), codes of operators (size, k)."""
        m = self.modulus
        tree = rng.integers(len(programs(self.shape, k)), size=size)
        operands = rng.integers(m, size=(size, k + 1))
        operators = rng.choice([OPERATORS.index(o) for o in self.operators], size=(size, k))
        if self.shape == "chain":
            units = np.array([u for u in range(1, m) if math.gcd(u, m) == 1])
            factors = rng.choice(units, size=(size, k))
            operands[:, 1:] = np.where(operators == OPERATORS.index("*"), factors, operands[:, 1:])
        return tree, operands, operators


class Program(NamedTuple):
    """How an expression of k operations is worked out and written.

    Nodes: operands 0 .. k as written, then results k + 1 .. 2k in the order they are worked out.
    """

    operations: tuple[tuple[int, int, int], ...]  # (operator as written, left node, right node), k of them
    height: int  # the most operations on a way from an operand to the answer
    plain: tuple[int, ...]  # written form: operand i is i, operator j is k + 1 + j
    brackets: tuple[
        int, ...
    ]  # the same with "(" as 2k + 1 and ")" as 2k + 2 around all but the last operation


@cache
def programs(shape: str, k: int) -> tuple[Program, ...]:
    """All expressions of k operations of a shape: one chain, Catalan(k) trees."""
    return tuple(_program(tree, k) for tree in (_trees(k) if shape == "nested" else [_comb(k)]))


def evaluate(
    shape: str, tree: np.ndarray, operands: np.ndarray, operators: np.ndarray, modulus: int | None = None
) -> np.ndarray:
    """The results of all operations, the answer last. tree (B,), (B, k + 1), codes (B, k) -> (B, k)."""
    k = operands.shape[1] - 1
    steps = np.array([p.operations for p in programs(shape, k)])[tree]  # (B, k, 3)
    rows = np.arange(len(operands))
    values = np.concatenate([operands, np.zeros_like(operands[:, :k])], axis=1).astype(np.int64)
    for j in range(k):
        position, left, right = steps[:, j].T
        result = _apply(operators[rows, position], values[rows, left], values[rows, right])
        values[:, k + 1 + j] = result if modulus is None else result % modulus
    return values[:, k + 1 :]


def _apply(code: np.ndarray | int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.select([np.equal(code, 0), np.equal(code, 1)], [a + b, a - b], a * b)


def _codes(operators: str) -> np.ndarray:
    return np.array([[OPERATORS.index(check_choice("operator", o, OPERATORS)) for o in operators]])


def _check(steps: int, operators: str, shape: str) -> None:
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is a whole number in 1 .. {MAX_STEPS}, got {steps!r}")
    if not operators or len(set(operators)) < len(operators):
        raise ValueError(f"operators are one or more of {OPERATORS}, each once, got {operators!r}")
    for operator in operators:
        check_choice("operator", operator, OPERATORS)
    check_choice("shape", shape, SHAPES)


def _catalan(n: int) -> int:
    return math.comb(2 * n, n) // (n + 1)


def _comb(k: int):
    return (_comb(k - 1), None) if k else None


def _trees(k: int) -> list:
    """All binary trees with k inner nodes; None is a leaf."""
    if k == 0:
        return [None]
    return [(a, b) for i in range(k) for a in _trees(i) for b in _trees(k - 1 - i)]


def _program(tree, k: int) -> Program:
    operations: list[tuple[int, int, int]] = []
    leaves = iter(range(k + 1))

    def visit(node) -> tuple[int, int, list[int], list[int]]:
        """(node number, height, written plain, written with brackets), and operations in order."""
        if node is None:
            leaf = next(leaves)
            return leaf, 0, [leaf], [leaf]
        left, h1, plain1, full1 = visit(node[0])
        position = max(i for i in plain1 if i <= k)  # the operator behind the left side's last operand
        right, h2, plain2, full2 = visit(node[1])
        operations.append((position, left, right))
        plain, full = [*plain1, k + 1 + position, *plain2], [*full1, k + 1 + position, *full2]
        if len(operations) < k:
            full = [2 * k + 1, *full, 2 * k + 2]
        return k + len(operations), 1 + max(h1, h2), plain, full

    _, height, plain, full = visit(tree)
    return Program(tuple(operations), height, tuple(plain), tuple(full))
