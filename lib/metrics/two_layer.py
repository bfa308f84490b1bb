r"""Two layers, few bits: exact certificates that no 2-layer decoder solves 2-FuncComp with sizes (m, n_1).

Theorem (ours, unrefereed). A block sends at most beta = H (d + 1) p bits to each receiver token and layer.
Let 1 <= x_0 <= m, x_1 >= 1 and 0 <= s <= m. If

    (i)   binom(m, s) s^(x_0 x_1) 2^(x_1 beta n_1) < m^(x_0 x_1)   and
    (ii)  2^(beta n_1 + beta (x_1 m + n_1 x_0 + x_0)) < (m n_1)^(n_1 (s + 1)),

then every 2-layer decoder with such messages, reading z_2, z_1, z_0, w and answering at w, errs on some
input. (i): some x_1 tables z_1 that all look alike to w take x_0 starts to more than s places. (ii): the bits
frozen after that are fewer than those z_2 has there. s <= m is needed: binom(m, s) = 0 would make (i) true.

A certificate is integers that anyone can check; how they were found (floats) does not matter. Source: proved
in theory of `depth-width`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

SEARCHED = 32  # beta up to which integers are searched; beyond, `two_layer_estimate`


class _Sizes(NamedTuple):
    m: int
    n_1: int
    tokens: int  # 2 + m + m n_1


class TwoLayerCertificate(_Sizes):
    """Sizes (m, n_1, tokens) at which two layers with messages of beta bits fail.

    The integers s, x_0, x_1 that prove it, and beta, are attributes.
    """

    def __new__(cls, m: int, n_1: int, s: int, x_0: int, x_1: int, beta: int) -> TwoLayerCertificate:
        found = super().__new__(cls, m, n_1, 2 + m + m * n_1)
        found.s, found.x_0, found.x_1, found.beta = s, x_0, x_1, beta
        return found

    @property
    def integers(self) -> dict[str, int]:
        """Everything by name; all but `tokens` are the arguments of `check_two_layer`."""
        return self._asdict() | {name: getattr(self, name) for name in ("s", "x_0", "x_1", "beta")}

    @property
    def frozen_bits(self) -> int:
        """Left side of (ii), in bits."""
        beta, m, n_1, x_0, x_1 = self.beta, self.m, self.n_1, self.x_0, self.x_1
        return beta * (n_1 + x_1 * m + n_1 * x_0 + x_0)

    @property
    def table_bits(self) -> float:
        """Right side of (ii): n_1 (s + 1) log2(m n_1) bits that z_2 has on the reachable places."""
        return self.n_1 * (self.s + 1) * math.log2(self.m * self.n_1)


def check_two_layer(beta: int, m: int, n_1: int, s: int, x_0: int, x_1: int) -> bool:
    """Whether the integers prove that 2 layers with messages of `beta` bits fail at (m, n_1). Exact.

    False for integers outside the theorem (s > m, x_0 > m, …), since they prove nothing.

    >>> check_two_layer(2, 21, 5, 6, 10, 2), check_two_layer(2, 20, 5, 6, 10, 2)
    (True, False)
    """
    if min(beta, m, n_1, x_0, x_1) < 1 or not 0 <= s <= m or x_0 > m:
        return False
    left = beta * (n_1 + x_1 * m + n_1 * x_0 + x_0)
    if (m * n_1) ** (n_1 * (s + 1)) <= 2**left:
        return False
    return (math.comb(m, s) * s ** (x_0 * x_1)) << (x_1 * beta * n_1) < m ** (x_0 * x_1)


def two_layer_certificate(beta: int) -> TwoLayerCertificate:
    """The shortest prompt found at which 2 layers with messages of `beta` bits provably fail.

    -> (m, n_1, tokens), with s, x_0, x_1 and beta as attributes: `m, n_1, tokens = two_layer_certificate(2)`.

    Search: for each n_1 the least m at which some x_1, x_0 and the largest s with (i) leave room in (ii), by
    bisection and in floats; `check_two_layer` then decides. At m - 1 the search finds nothing. Only m >= 2,
    s >= 1 are searched: with one reachable place nothing is composed, z_2 is only looked up (that certifies
    24 tokens at 2 bits). An upper bound on the least certified prompt, not a minimum.
    ValueError for beta beyond SEARCHED.

    >>> tuple(two_layer_certificate(2))
    (18, 4, 92)
    """
    if isinstance(beta, bool) or not isinstance(beta, int) or not 1 <= beta <= SEARCHED:
        raise ValueError(f"beta is an integer 1 … {SEARCHED}, got {beta!r}; beyond, see two_layer_estimate")
    best = None
    for n_1 in _promising(beta):
        longest = math.inf if best is None else best.tokens
        found = _least_m(beta, n_1, longest)
        if found is not None:
            best = found
    if best is None or not check_two_layer(beta, best.m, best.n_1, best.s, best.x_0, best.x_1):
        raise ArithmeticError(f"the floats of the search were wrong at beta={beta}: {best} proves nothing")
    return best


def two_layer_estimate(beta: int) -> TwoLayerCertificate:
    """A short prompt by the coarser accounting of the general proof, in floats: for budgets of any size.

        x_0/2 log2(2m / (e x_0 x_1)) >= 2 beta n_1 + 1/x_1   and
        2 x_1 beta n_1 + 1 + beta (x_1 m + n_1 x_0 + x_0) < n_1 x_0 x_1 / 2 log2(m n_1).

    s is x_0 x_1 / 2, about. Sizes are rounded; rounding is far below what a figure shows, but this is an
    estimate, not a certificate: use `check_two_layer`, or the general theorem, for a proof.
    """
    if isinstance(beta, bool) or not isinstance(beta, int) or beta < 1:
        raise ValueError(f"beta is an integer >= 1, got {beta!r}")
    n_1 = np.unique(np.geomspace(1, max(64, 400 * beta), 600).astype(np.int64)).astype(float)[:, None, None]
    x_1 = np.unique(np.geomspace(1, max(16, beta), 60).astype(np.int64)).astype(float)[:, None]
    rate = np.geomspace(1e-2, 64, 500)                         # log2(2m / (e x_0 x_1)), nearly
    x_0 = np.ceil(2 * (2 * beta * n_1 + 1 / x_1) / rate)
    with np.errstate(over="ignore", invalid="ignore"):
        m = np.ceil(np.e * x_0 * x_1 / 2 * 2 ** (2 * (2 * beta * n_1 + 1 / x_1) / x_0))
        left = 2 * x_1 * beta * n_1 + 1 + beta * (x_1 * m + n_1 * x_0 + x_0)
        closes = (left < n_1 * x_0 * x_1 / 2 * np.log2(m * n_1)) & (x_0 <= m)
        tokens = np.where(closes, 2 + m + m * n_1, np.inf)
    i, j, k = np.unravel_index(tokens.argmin(), tokens.shape)
    sizes = m[i, j, k], n_1[i, 0, 0], x_0[i, j, k], x_1[j, 0]
    m, n_1, x_0, x_1 = (int(size) for size in sizes)
    return TwoLayerCertificate(m, n_1, x_0 * x_1 // 2, x_0, x_1, beta)


def _promising(beta: int) -> list[int]:
    """The n_1 within a factor of 4 of where the best ones were seen, nearest first: the others win late."""
    guess = max(4, round(0.9 * beta * math.log2(beta + 2) ** 0.4))
    return sorted(range(1, 4 * guess), key=lambda n_1: abs(math.log(n_1 / guess)))


def _least_m(beta: int, n_1: int, longest: float) -> TwoLayerCertificate | None:
    """The certificate with the least m at n_1, if its prompt is shorter than `longest`; None otherwise."""
    if math.isinf(longest):
        high = 2
        while _at(beta, high, n_1) is None:
            high *= 2
    else:
        high = int(longest - 3) // (n_1 + 1)                   # 2 + m (n_1 + 1) < longest
    found = _at(beta, high, n_1) if high >= 2 else None
    if found is None:
        return None
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        at_middle = _at(beta, middle, n_1)
        if at_middle is None:
            low = middle
        else:
            high, found = middle, at_middle
    return found


def _at(beta: int, m: int, n_1: int) -> TwoLayerCertificate | None:
    """What the search finds at (m, n_1), m >= 2: sizes with room enough in (ii) for floats to be trusted."""
    falling, before = 0, -math.inf
    for x_1 in range(1, int(n_1 * math.log2(m * n_1) / beta) + 1):     # (ii) needs beta x_1 m < n_1 m log2(…)
        slack, s, x_0 = _slack(beta, m, n_1, x_1)
        i = slack.argmax()
        if slack[i] > 1e-9 * beta * x_1 * m:
            return TwoLayerCertificate(m, n_1, int(s[i]), int(x_0[i]), x_1, beta)
        falling = falling + 1 if slack[i] < before else 0
        before = slack[i]
        if falling == 3:                                                # more tables only cost more
            return None
    return None


def _slack(beta: int, m: int, n_1: int, x_1: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right minus left of (ii) at the largest s with (i), for x_0 on a grid, then around its best points."""
    x_0 = np.unique(np.linspace(1, m, min(m, 128)).astype(np.int64))
    while True:
        s = _largest_s(beta, m, n_1, x_0 * x_1, x_1)
        slack = n_1 * (s + 1) * math.log2(m * n_1) - beta * (n_1 + x_1 * m + (n_1 + 1) * x_0.astype(float))
        gap = int(np.diff(x_0).max(initial=1))
        slack[s < 1] = -np.inf                                          # one reachable place composes nothing
        if gap == 1 or np.isinf(slack).all():
            return slack, s, x_0
        best = int(x_0[slack.argmax()])
        x_0 = np.unique(np.linspace(max(1, best - 2 * gap), min(m, best + 2 * gap), 128).astype(np.int64))


def _largest_s(beta: int, m: int, n_1: int, balls: np.ndarray, x_1: int) -> np.ndarray:
    """Largest s < m with (i), in floats, by bisection: its logarithm is concave in s and positive at m."""
    log_factorial = _log_factorials(m.bit_length())
    low, high = np.zeros(len(balls), dtype=np.int64), np.full(len(balls), m)
    constant = log_factorial[m] + x_1 * beta * n_1 * math.log(2)
    for _ in range(m.bit_length() + 1):
        s = (low + high) // 2
        left = constant - log_factorial[s] - log_factorial[m - s] + balls * np.log(np.maximum(s, 1) / m)
        holds = (left < -1e-9 * constant) | (s == 0)             # with room for rounding
        low, high = np.where(holds, s, low), np.where(holds, high, s)
    return low


@lru_cache(maxsize=4)
def _log_factorials(bits: int) -> np.ndarray:
    """ln k! for k < 2^bits."""
    return np.concatenate([[0.0], np.log(np.arange(1, 2**bits)).cumsum()])
