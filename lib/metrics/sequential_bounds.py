r"""The lower bound for L-layer decoders on L-FuncComp, its every inequality checked in exact integers.

Theorem A* (ours, unrefereed; shape after Chen, Peng and Wu 2024, known to us second-hand). Let L, B >= 1,
kappa = 70 L 2^L B, x_l = kappa^F_{2(L-l)}, n_l = kappa^F_{2(L-l)+1} (F Fibonacci numbers) and m = 64 Π x_l.
Every L-layer decoder within assumption (P) and with H d p <= B, which reads z_L … z_1, z_0, w and answers at
w, errs on some input. The prompt has at most 65 kappa^{E_L} tokens, E_L = F_{2L+2} - 2.

The proof keeps sets Z_0 … Z_{l-1}, |Z_i| <= x_i, of inputs and a set R_l of (z_l … z_L), density >= 2^-e_l,
on which all messages to players < l are constant (l = 1: to player -1). Going from l to l + 1 fixes Z_l and
freezes `frozen_families(l)`:

    e_1 = beta L W,    e_{l+1} = x_l e_l + 1 + (L - l) beta Σ_families m_i Π |Z_k|,
    c_0 = x_0,         c_l = x_l n_{l-1} c_{l-1} / 2 reachable values of i_l,     S_l = n_l c_l,
    beta = 2 B,        W = Π n_l,    N_l = m n_1 … n_l,    m_i = N_{i-1} (1 for i = -1 and 0).

It closes if, for l < L, M_l = x_l S_{l-1} is even, N_{l-1} >= 64 M_l and e_l <= 2 S_{l-1} - 1, and if
e_L < S_{L-1} log2 N_{L-1}. Source: proved in theory of `depth-width`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple


class Family(NamedTuple):
    """Messages to `receiver` in `epoch` from every player j > stage, one for each (z_first … z_last)."""

    stage: int  # l: it helps to build R_{l+1}; 0 for the base, R_1
    receiver: int
    epoch: int
    first: int  # z_first … z_last run over Z_first × … × Z_last; z_{-1} = w takes all its values
    last: int

    @property
    def name(self) -> str:
        return f"to {self.receiver} in epoch {self.epoch}"

    @property
    def choices(self) -> range:
        """The players whose inputs are run through."""
        return range(self.first, self.last + 1)


def frozen_families(stage: int) -> list[Family]:
    """What the proof freezes at one stage, family by family; each comes from senders stage < j <= L.

    Stage 0: w in epoch 1. Stage l >= 1: player l in epochs 1 … l + 1, for each z_l; all below in epoch
    l + 1, for each (z_i … z_{l-1}). Stage 1 alone: player 0 was free so far: its epoch 1 (for each z_0) and
    its epoch 2 (for each (z_0, z_1), since it heard z_1) are frozen here.

    >>> [(f.receiver, f.epoch, list(f.choices)) for f in frozen_families(1)]
    [(1, 1, [1]), (1, 2, [1]), (-1, 2, [-1, 0]), (0, 1, [0]), (0, 2, [0, 1])]
    """
    if stage == 0:
        return [Family(0, -1, 1, -1, -1)]
    found = [Family(stage, stage, epoch, stage, stage) for epoch in range(1, stage + 2)]
    found.append(Family(stage, -1, stage + 1, -1, stage - 1))
    if stage == 1:
        return [*found, Family(1, 0, 1, 0, 0), Family(1, 0, 2, 0, 1)]
    return found + [Family(stage, i, stage + 1, i, stage - 1) for i in range(stage)]


class Condition(NamedTuple):
    """left <= right, or left < right if strict; exact integers."""

    name: str
    left: int
    right: int
    strict: bool

    @property
    def holds(self) -> bool:
        return self.left < self.right if self.strict else self.left <= self.right


@dataclass(frozen=True)
class Certificate:
    """The argument at given sizes. `holds` proves: no L-layer decoder with H d p <= B solves them."""

    L: int
    B: int
    kappa: int
    m: int
    n: tuple[int, ...]  # n_1 … n_{L-1}
    N: tuple[int, ...]  # N_0 … N_{L-1}
    x: tuple[int, ...]  # x_0 … x_{L-1}, sizes of Z_0 … Z_{L-1}
    c: tuple[int, ...]  # c_0 … c_{L-1}, reachable values of i_0 … i_{L-1}
    e: tuple[int, ...]  # e_1 … e_L: density(R_l) >= 2^-e_l
    S: tuple[int, ...]  # S_0 … S_{L-1}
    conditions: tuple[Condition, ...]

    @property
    def holds(self) -> bool:
        return all(condition.holds for condition in self.conditions)

    @property
    def largest_ratio(self) -> Fraction:
        """max e_l / S_{l-1}; the proof shows that it is below 1 at the theorem's kappa."""
        return max(Fraction(e, S) for e, S in zip(self.e, self.S, strict=True))

    @property
    def prompt_length(self) -> int:
        """2 + N_0 + … + N_{L-1} tokens."""
        return 2 + sum(self.N)


def sequential_composition_certificate(
    L: int, B: int, *, kappa: int | None = None, finer: bool = False
) -> Certificate:
    """Theorem A* at (L, B), or the same argument at another even kappa, which may or may not hold.

    finer: two conditions of a stage replaced by the one they stand for, M/2 floor(log2(N / 4M)) >= x e + 1.
    Everything is an exact integer (thousands of bits at L = 7). Raises ValueError for sizes below 1 or an odd
    kappa. Source: proved in theory of `depth-width`, ours, unrefereed.

    >>> found = sequential_composition_certificate(2, 1)
    >>> found.kappa, found.holds, found.prompt_length.bit_length(), round(float(found.largest_ratio), 5)
    (560, True, 61, 0.92144)
    """
    kappa = theorem_kappa(L, B) if kappa is None else kappa
    _check_positive(L=L, B=B, kappa=kappa)
    if kappa % 2:
        raise ValueError(f"half of x_l must be an integer: kappa is even, got kappa={kappa}")
    x = tuple(kappa ** fibonacci(2 * (L - l)) for l in range(L))
    n = tuple(kappa ** fibonacci(2 * (L - l) + 1) for l in range(1, L))
    return _certificate(L, B, kappa, x, n, 64 * math.prod(x), finer)


def _certificate(L, B, kappa, x, n, m, finer) -> Certificate:
    N = tuple(m * math.prod(n[:l]) for l in range(L))
    c = [x[0]]
    for l in range(1, L):
        c.append(x[l] * (1, *n)[l - 1] * c[-1] // 2)
    S = tuple(n_l * c_l for n_l, c_l in zip((1, *n), c, strict=True))
    e = tuple(_entropies(L, 2 * B, x, n, N))
    conditions = [Condition("x_0 <= m", x[0], m, False)]
    for l in range(1, L):
        M, loss = x[l] * S[l - 1], e[l - 1]
        if finer:
            bits = M // 2 * ((N[l - 1] // (4 * M)).bit_length() - 1)      # floor(log2), -1 where N < 4M
            conditions.append(Condition(f"x_{l} e_{l} + 1 <= M/2 log2(N/4M)", x[l] * loss + 1, bits, False))
        else:
            conditions.append(Condition(f"64 M_{l} <= N_{l - 1}", 64 * M, N[l - 1], False))
            conditions.append(Condition(f"e_{l} <= 2 S_{l - 1} - 1", loss, 2 * S[l - 1] - 1, False))
        conditions.append(Condition(f"M_{l} is even", M % 2, 0, False))
    end = S[-1] * (N[-1].bit_length() - 1)                                # floor of log2 N_{L-1}
    conditions.append(Condition(f"e_{L} < S_{L - 1} log2 N_{L - 1}", e[-1], end, True))
    return Certificate(L, B, kappa, m, n, N, x, tuple(c), e, S, tuple(conditions))


def _entropies(L: int, beta: int, x, n, N) -> Iterator[int]:
    """e_1 … e_L. A family costs m_i bits·beta a sender for each choice of the inputs it runs through."""
    size = {-1: math.prod(n)} | dict(enumerate(x))                        # |Z_{-1}|, |Z_0| …
    tokens = {-1: 1, 0: 1} | {i: N[i - 1] for i in range(1, L + 1)}       # m_i
    loss = 0
    for stage in range(L):
        if stage:
            loss = x[stage] * loss + 1
        for family in frozen_families(stage):
            count = math.prod(size[k] for k in family.choices)
            loss += (L - stage) * beta * tokens[family.receiver] * count
        yield loss


def least_kappa(L: int, B: int, *, finer: bool = False) -> int:
    """An even kappa at which the argument closes while it fails at kappa - 2, found by bisection.

    ValueError for sizes below 1. Prompts at this kappa are shorter than the theorem's by a constant factor.

    >>> least_kappa(2, 1), least_kappa(3, 1, finer=True)
    (18, 414)
    """
    def closes(half: int) -> bool:
        return sequential_composition_certificate(L, B, kappa=2 * half, finer=finer).holds

    low, high = 0, theorem_kappa(L, B) // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if closes(middle) else (middle, high)
    return 2 * high


def paper_certificate(L: int, B: int) -> Certificate:
    """The same conditions at the paper's parameters: x_l = K^(8^(L-l-1)), n_l = x_l^4, m = K Π x_l.

    K = (B L)^8 8^(2 L²). The parameters are known to us second-hand; this m is the reading for which our
    proof closes. kappa is K here.
    """
    _check_positive(L=L, B=B)
    K = (B * L) ** 8 * 8 ** (2 * L**2)
    x = tuple(K ** 8 ** (L - l - 1) for l in range(L))
    return _certificate(L, B, K, x, tuple(x_l**4 for x_l in x[1:]), K * math.prod(x), False)


def theorem_kappa(L: int, B: int) -> int:
    """70 L 2^L B."""
    _check_positive(L=L, B=B)
    return 70 * L * 2**L * B


def exponent(L: int) -> int:
    """E_L = F_{2L+2} - 2: a decoder of L layers needs H d p of the order n^(1 / E_L).

    >>> [exponent(L) for L in range(1, 6)]
    [1, 6, 19, 53, 142]
    """
    _check_positive(L=L)
    return fibonacci(2 * L + 2) - 2


def least_hdp(L: int, n: int) -> int:
    """Least H d p that Theorem A* leaves possible for L layers that solve all prompts of at most n tokens.

    The least B with 65 (70 L 2^L B)^{E_L} > n, in exact integers: 1 means that the theorem is vacuous at n.

    >>> least_hdp(2, 10**9), least_hdp(2, 2**84), least_hdp(2, 2**85)
    (1, 15, 17)
    """
    _check_positive(L=L, n=n)
    unit, E = theorem_kappa(L, 1), exponent(L)
    low, high = 0, 1
    while 65 * (unit * high) ** E <= n:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if 65 * (unit * middle) ** E <= n else (low, middle)
    return high


def paper_prompt_log2(L: int, hdp: int) -> float:
    """log2 of the prompt length from which the paper's bound H d p <= n^(2^-4L) bites: 16^L log2(H d p).

    Second-hand: the exponent is known to us from notes about the paper, with no constants.

    >>> paper_prompt_log2(2, 4096)
    3072.0
    """
    _check_positive(L=L, hdp=hdp)
    return 16**L * math.log2(hdp)


def accumulator_size(tokens: int, *, weight_bits: int, value_bits: int) -> int:
    """p, sign included, so that p bits hold every sum over `tokens` tokens of weight · value and of weights.

    weight: 0 … 2^weight_bits; |value| <= 2^(value_bits - 1) - 1. Exact; at most weight_bits + value_bits +
    ceil(log2 tokens) + 1.

    >>> accumulator_size(7, weight_bits=0, value_bits=2)
    4
    """
    _check_positive(tokens=tokens)
    if weight_bits < 0 or value_bits < 2:
        raise ValueError(f"weight_bits >= 0 and value_bits >= 2 (with sign); got {weight_bits}, {value_bits}")
    return (tokens * 2**weight_bits * (2 ** (value_bits - 1) - 1)).bit_length() + 1


def fibonacci(k: int) -> int:
    """F_1 = F_2 = 1."""
    a, b = 0, 1
    for _ in range(k):
        a, b = b, a + b
    return a


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is an integer >= 1, got {size!r}")
