"""Between what Theorem B** excludes and what Proposition T builds, for one softmax layer and Comp_n.

Sizes are compared by the product H (d + 1) (depth + 1) of heads, value dimension and MLP depth, at the MLP
width that Proposition T uses. Source: proved in `one-layer-limits`, ours, unrefereed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lib.metrics.bounds import largest_allowed_n, required_product


def built_product(n: int, s: int) -> int:
    """H (d+1) (depth+1) of Proposition T with block size s: 2 (ceil(n/s) + 1) (s + 4).

    >>> built_product(36, 6)
    140
    """
    if not 1 <= s <= n:
        raise ValueError(f"the block size s is between 1 and n={n}, got {s}")
    return 2 * (-(-n // s) + 1) * (s + 4)


def best_block(n: int) -> int:
    """The block size for which Proposition T is smallest; the smallest such s. It is about 2 sqrt(n).

    2 (n/s + 1) (s + 4) <= product < 2 (n/s + 2) (s + 4), so beyond s = 8 sqrt(n) + 8 the product exceeds the
    one at s = isqrt(n): only smaller s are tried.
    """
    return min(range(1, min(n, 8 * math.isqrt(n) + 8) + 1), key=lambda s: (built_product(n, s), s))


def built_width(n: int, s: int) -> int:
    """Largest MLP width of Proposition T, max(2n + 5, 2(n-1) + ceil(n/s)), or a little more for n <= 2."""
    return max(2 * n + 5, 2 * (n - 1) + -(-n // s))


def frontier(sizes: Sequence[int]) -> pd.DataFrame:
    """For each n: what Theorem B** demands (closed form, so a little less) and what Proposition T takes.

    Columns n, s (best block), built, demanded (at the width of the construction), ratio = built / demanded.
    """
    rows = []
    for n in sizes:
        s = best_block(n)
        demanded = required_product(n, built_width(n, s))
        rows.append({"n": n, "s": s, "built": built_product(n, s), "demanded": demanded,
                     "ratio": built_product(n, s) / demanded})
    return pd.DataFrame(rows)


def least_largest_size(n: int, *, width: int | None = None, theorem: str = "B**") -> int:
    """Least M >= 2 with which `theorem` leaves Comp_n possible: H, d + 1, depth + 1 <= M, widths <= `width`.

    More of each allows more, so it suffices to try H = d + 1 = depth + 1 = M. By B** it grows as n^(1/3).
    width: n if not given.

    >>> least_largest_size(1024), least_largest_size(1024, theorem="generic-VC")
    (9, 2)
    """
    width, low, high = width or n, 1, 2                  # M = 1 would be a head without values
    while not _allows(high, n, width, theorem):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _allows(middle, n, width, theorem) else (middle, high)
    return high


def growth_exponent(first: int, last: int) -> float:
    """Slope of log least_largest_size against log n between two n: the exponent that the theorem forces."""
    return math.log(least_largest_size(last) / least_largest_size(first)) / math.log(last / first)


def cube_frontier(sides: Sequence[int]) -> pd.DataFrame:
    """The least max(H, d+1, depth+1) at n = m^3, m in `sides`: what is demanded, what Proposition T' takes.

    Columns n; demanded (B**) and generic (generic-VC), both at the MLP width 2n + 5 of the construction;
    built = m + 4, from m + 1 heads, value dimension m and m + 3 hidden layers.
    """
    rows = []
    for m in sides:
        if m < 2:
            raise ValueError(f"a cube has sides m >= 2, got {m}")
        n = m**3
        width = 2 * n + 5
        rows.append({
            "n": n, "demanded": least_largest_size(n, width=width),
            "generic": least_largest_size(n, width=width, theorem="generic-VC"), "built": m + 4,
        })  # fmt: skip
    return pd.DataFrame(rows)


def reach(
    value_dims: Sequence[int], *, heads: int, mlp_widths: Sequence[int], theorems: Sequence[str]
) -> pd.DataFrame:
    """Largest n that each theorem allows, as d grows: columns product, and one a theorem."""
    return pd.DataFrame([
        {"product": heads * (d + 1) * (len(mlp_widths) + 1)}
        | {name: largest_allowed_n(heads, d, mlp_widths, theorem=name) for name in theorems}
        for d in value_dims])


def _allows(M: int, n: int, width: int, theorem: str) -> bool:
    return largest_allowed_n(M, M - 1, [width] * (M - 1), theorem=theorem) >= n
