r"""Which layers the theorems exclude: the largest n for which one softmax layer may still compute Comp_n.

All theorems speak of one attention layer with H softmax heads of value dimension d *per head*, in real
arithmetic, then a ReLU network with hidden layers of widths s_1 .. s_L (no normalisation in between) and
one affine output. Precision, embeddings, query and key dimensions are free. Put k = H(d+1) and s_{Λ+1} = 1.
If the layer computes Comp_n and n >= k, then

    B*            n        <= sum_{i<=Λ+1} [1 + k log2(2e n s_i / (d+1))]
    B**           n log2 n <= sum_{i<=Λ} [1 + k log2(2e n s_i / (d+1))] + 1 + k log2(2e n (n-1) / (d+1))
    B*-one-head   n        <= k sum_{i<=Λ+1} log2(e n s_i / k)                            if H = 1
    B**-one-head  n log2 n <= k (sum_{i<=Λ} log2(e n s_i / k) + log2(e n (n-1) / k))      if H = 1
    generic-VC    n        <= 4k(t+2), the textbook bound for k parameters and t operations, t by our count

The first four are proved in `one-layer-limits`, ours, unrefereed; the one-head forms cite nothing. The last
is Theorem 8.4 of Anthony and Bartlett, numbering from memory.

*Deciding an inequality exactly.* Equality would make a power of e rational, and e is transcendental: it
never happens. So floats decide whenever the difference exceeds their rounding error, and otherwise decimals
of growing precision decide after finitely many rounds.

The bounds for L layers live in `lib.metrics.sequential_bounds` and `lib.metrics.two_layer`; their names are
importable from here.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import pairwise

from lib.choices import check_choice
from lib.metrics.sequential_bounds import Certificate as Certificate
from lib.metrics.sequential_bounds import Family as Family
from lib.metrics.sequential_bounds import accumulator_size as accumulator_size
from lib.metrics.sequential_bounds import exponent as exponent
from lib.metrics.sequential_bounds import frozen_families as frozen_families
from lib.metrics.sequential_bounds import least_hdp as least_hdp
from lib.metrics.sequential_bounds import least_kappa as least_kappa
from lib.metrics.sequential_bounds import paper_certificate as paper_certificate
from lib.metrics.sequential_bounds import paper_prompt_log2 as paper_prompt_log2
from lib.metrics.sequential_bounds import (
    sequential_composition_certificate as sequential_composition_certificate,
)
from lib.metrics.sequential_bounds import theorem_kappa as theorem_kappa
from lib.metrics.two_layer import TwoLayerCertificate as TwoLayerCertificate
from lib.metrics.two_layer import check_two_layer as check_two_layer
from lib.metrics.two_layer import two_layer_certificate as two_layer_certificate
from lib.metrics.two_layer import two_layer_estimate as two_layer_estimate

THEOREMS = ("B*", "B**", "B*-one-head", "B**-one-head", "generic-VC")


def largest_allowed_n(
    heads: int, value_dim: int, mlp_widths: Sequence[int], *, theorem: str = "B**"
) -> int:
    """Largest n for which `theorem` leaves Comp_n possible: n + 1 and everything above is impossible.

    heads: H >= 1.  value_dim: d >= 1 per head (not the model width; our d is the paper's head size).
    mlp_widths: the hidden layers of the MLP in order, [] for an affine readout.  theorem: one of THEOREMS.
    Impossible at any precision; *allowed* says nothing about whether such a layer exists.

    Search: "left minus right" is convex in n and negative at n = k, so the first n >= k where it is positive
    begins a ray; doubling and bisection find it. Raises ValueError for sizes that are not positive integers,
    an unknown theorem, and a one-head theorem with several heads. Source: proved in `one-layer-limits`, ours,
    unrefereed; generic-VC after Anthony and Bartlett.

    >>> largest_allowed_n(12, 64, [3072]), largest_allowed_n(12, 64, [3072], theorem="B*")
    (2643, 26364)
    """
    check_choice("theorem", theorem, THEOREMS)
    _check_layer(heads, value_dim, mlp_widths)
    if theorem == "generic-VC":
        return _generic_vc(heads, value_dim, mlp_widths)
    if theorem.endswith("one-head") and heads != 1:
        raise ValueError(
            f"{theorem} is proved for one head, got heads={heads}; use {theorem.removesuffix('-one-head')!r}")
    inequality = _Inequality.of(heads, value_dim, mlp_widths, theorem)
    return _last_before(inequality.violated, start=inequality.k)


def largest_allowed_n_binomial(value_dim: int, mlp_widths: Sequence[int]) -> int:
    """B* for one head, sharpest form: n <= sum_i log2 sum_{j<=k} binom(n s_i, j) with k = d + 1, for n >= k.

    2^n is compared with the product of the binomial sums as integers, so nothing is estimated; slow beyond
    some thousand n. Never above "B*-one-head", its closed form. The ray: log sum_{j<=k} binom(N, j) is
    concave in N. Source: Lemma 2 and the elementary case of `one-layer-limits`, ours, unrefereed.

    >>> largest_allowed_n_binomial(1, []), largest_allowed_n_binomial(1, [16])
    (2, 24)
    """
    _check_layer(1, value_dim, mlp_widths)
    k = value_dim + 1

    def violated(n: int) -> bool:
        patterns = math.prod(_cells(n * s, k) for s in [*mlp_widths, 1])
        return 2**n > patterns

    return _last_before(violated, start=k)


def least_product(n: int, width: int, *, theorem: str = "B**") -> int:
    """Least H (d+1) (depth+1) that `theorem` ("B*" or "B**") leaves possible for Comp_n, widths <= `width`.

    depth counts the hidden layers of the MLP. The minimum runs over all H, d and depth: every layer that
    computes Comp_n with such widths has at least this product. At most n + 1, since k > n is never
    excluded. Exact, as `largest_allowed_n` is; 15 ms at n = 1000.

    >>> least_product(36, 77), least_product(1000, 2005)
    (16, 436)
    """
    check_choice("theorem", theorem, ("B*", "B**"))
    _check_size("n", n, least=2)
    _check_size("width", width)
    best = n + 1                                                # H = 1, d = n, no hidden layer: k > n
    for layers in range(1, best):                               # depth + 1
        for d in range(1, best // layers):
            unit = layers * (d + 1)
            most = (best - 1) // unit                           # more heads would not improve on `best`
            shape = (d, [width] * (layers - 1), theorem)

            def allowed(H: int, shape=shape) -> bool:
                return not _Inequality.of(H, *shape).excludes(n)

            if most >= 1 and allowed(most):
                best = unit * (1 + bisect_left(range(1, most), True, key=allowed))   # monotone in H
    return best


def required_product(n: int, width: int, *, theorem: str = "B**") -> float:
    """Closed form of `least_product`, a little below it: the corollaries of B* and B**.

    B*: n / log2(2e n s).  B**: n log2 n / log2(2e n max(s, n-1)), about n/2 for s <= n. Unit: the number
    H (d+1) (depth+1). Source: proved in `one-layer-limits`, ours, unrefereed.
    """
    check_choice("theorem", theorem, ("B*", "B**"))
    _check_size("n", n, least=2)
    _check_size("width", width)
    if theorem == "B*":
        return n / math.log2(2 * math.e * n * width)
    return n * math.log2(n) / math.log2(2 * math.e * n * max(width, n - 1))


def least_bits(n: int, heads: int, value_dim: int) -> int:
    """Least p with H (d+1) p >= n log2 n: with fewer bits no MLP whatever lets the layer compute Comp_n.

    p counts the bits of each *accumulated* coordinate (numerator or denominator of a head), not of the
    stored activations. Exact: 2^(H(d+1)p) >= n^n in integers. Source: the communication bound after Peng,
    Narayanan and Papadimitriou (arXiv 2402.08164); this form is proved in `one-layer-limits`.

    >>> least_bits(8, 1, 1), least_bits(1024, 12, 64)
    (12, 14)
    """
    _check_size("n", n)
    _check_layer(heads, value_dim, [])
    table_bits = (n**n - 1).bit_length()                        # ceil(log2 n^n)
    return -(-table_bits // (heads * (value_dim + 1)))


@dataclass(frozen=True)
class _Inequality:
    """left(n) <= ones + k log2(a rational times a power of e), for n >= k: the shape of all four theorems."""

    k: int                    # H (d+1): below it nothing is excluded
    ones: int                 # the "1 +" of each layer
    scale: int                # 2 where 2e stands, 1 where e stands
    divisor: int              # d + 1
    widths: tuple[int, ...]
    full: bool                # B**: n log2 n on the left, n - 1 output polynomials a row

    @classmethod
    def of(cls, heads: int, value_dim: int, mlp_widths: Sequence[int], theorem: str) -> _Inequality:
        one_head = theorem.endswith("one-head")
        return cls(
            k=heads * (value_dim + 1), ones=0 if one_head else len(mlp_widths) + 1,
            scale=1 if one_head else 2, divisor=value_dim + 1, widths=tuple(mlp_widths),
            full=theorem.startswith("B**"))

    def excludes(self, n: int) -> bool:
        """Whether the theorem rules Comp_n out."""
        return n >= self.k and self.violated(n)

    def violated(self, n: int) -> bool:
        """Whether left(n) > right(n), for n >= 2: floats where they can tell, decimals where they cannot."""
        if n < 2**53:
            gap, size = self._gap(n, math.log2, math.log2(math.e))
            # Fewer than 20 + 2 len(widths) roundings, each at most 2^-53 of `size`; 8 times that, to be safe.
            if abs(gap) > (20 + 2 * len(self.widths)) * 2.0**-50 * size:
                return gap > 0
        digits, roundings = 50, 3 + len(str(len(self.widths)))          # 10^roundings: a generous count
        while True:
            with localcontext(prec=digits):
                gap, size = self._gap(n, _decimal_log2, 1 / Decimal(2).ln())
                if abs(gap) > size.scaleb(roundings - digits):
                    return gap > 0
            digits *= 2

    def _gap(self, n: int, log2, log2_e):
        """(left - right, sum of the sizes of all terms), in the arithmetic of `log2`."""
        layers = len(self.widths) + 1
        grows = layers * (log2_e + log2(self.scale) + log2(n)) + sum(map(log2, self.widths))
        if self.full:
            grows += log2(n - 1)
        shrinks = layers * log2(self.divisor)
        left = n * log2(n) if self.full else n
        return left - self.ones - self.k * (grows - shrinks), left + self.ones + self.k * (grows + shrinks)


def _decimal_log2(z: int) -> Decimal:
    return Decimal(z).ln() / Decimal(2).ln()


def _generic_vc(heads: int, value_dim: int, mlp_widths: Sequence[int]) -> int:
    """4k(t+2) with k = H(d+1) parameters and t operations of the partial sums, W_O and the MLP."""
    H, d = heads, value_dim
    sizes = [d, *mlp_widths, 1]
    operations = 2 * H * d + H + 2 * H * d**2 + d
    operations += sum(2 * a * b + 2 * b for a, b in pairwise(sizes))
    return 4 * H * (d + 1) * (operations + 2)


def _last_before(violated, *, start: int) -> int:
    """Largest n >= start with `violated` false, given that it is false at `start` and true on a ray."""
    low, high = start, 2 * start
    while not violated(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if violated(middle) else (middle, high)
    return low


def _cells(hyperplanes: int, k: int) -> int:
    """sum_{j<=k} binom(hyperplanes, j): most cells that so many hyperplanes cut R^k into."""
    term = total = 1
    for j in range(1, min(k, hyperplanes) + 1):
        term = term * (hyperplanes - j + 1) // j
        total += term
    return total


def _check_layer(heads: int, value_dim: int, mlp_widths: Sequence[int]) -> None:
    _check_size("heads", heads)
    _check_size("value_dim", value_dim)
    if isinstance(mlp_widths, str) or not isinstance(mlp_widths, Sequence):
        raise ValueError(f"mlp_widths lists the hidden layers, as in [3072] or []; got {mlp_widths!r}")
    for i, width in enumerate(mlp_widths):
        _check_size(f"mlp_widths[{i}]", width)


def _check_size(name: str, value: int, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is an integer >= {least}, got {value!r}")
