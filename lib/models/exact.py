"""A softmax layer and a ReLU MLP in exact rational arithmetic, on Python integers.

An activation is numerator / (bottom · softmax sums). `bottom` is short and common to a layer; the softmax
sums are long (6 kB each at n = 36) and each head has its own. A form that is a multiple of its softmax sums,
such as the difference of two staircase ReLUs, is divided by them at once: all later numbers are short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from operator import mul

from lib.models.named_weights import Head, Layer, Number, table

Activation = tuple[int, int]  # (numerator, bit mask of the heads whose softmax sums still divide it)


@lru_cache(maxsize=8192)  # n = 36 has 2,600 powers of up to 6 kB each; computing one costs as much as a word
def _power(base: int, exponent: int) -> int:
    return base**exponent


class SoftmaxSums:
    """The softmax sums of one word, and products of them; a set of heads is a bit mask."""

    def __init__(self):
        self.products = {0: 1}

    def product(self, heads: int) -> int:
        if heads not in self.products:
            lowest = heads & -heads
            self.products[heads] = self.products[lowest] * self.product(heads - lowest)
        return self.products[heads]


class ExactHead:
    """One head with integer entries: keys and queries as they are, values times `scale`."""

    def __init__(self, head: Head, rows: list[Mapping[str, Number]]):
        self.base = head.base
        asked = range(len(head.query))
        self.query = [[entries.get(i, 0) for i in asked] for entries in table(head.query, rows)]
        self.key = [[entries.get(i, 0) for i in asked] for entries in table(head.key, rows)]
        value = table(head.value, rows)
        self.scale = math.lcm(*{Fraction(v).denominator for entries in value for v in entries.values()})
        self.value = [[(c, int(v * self.scale)) for c, v in entries.items() if v] for entries in value]
        self.width = len(head.value)

    def read(self, row: list[int]) -> tuple[list[int], int]:
        """Σ weight · value for each coordinate, and Σ weight."""
        query = self.query[row[-1]]
        score = [sum(map(mul, query, self.key[r])) for r in row]
        least = min(score)
        weight = [_power(self.base, s - least) for s in score]  # exp(logit), up to a common factor: integers
        total = [0] * self.width
        for w, r in zip(weight, row, strict=True):
            for c, v in self.value[r]:
                total[c] += w * v
        return total, sum(weight)


class ExactLayer:
    """An affine layer with integer weights: what it gives is `scale` times too large."""

    def __init__(self, layer: Layer, names: list[str]):
        at = {name: i for i, name in enumerate(names)}
        numbers = [w for form in layer.values() for w in (form.bias, *form.weight.values())]
        self.scale = math.lcm(*(Fraction(w).denominator for w in numbers))
        shared: dict[tuple, int] = {}           # neurons that differ only in their bias share one dot product
        self.neurons = []
        for form in layer.values():
            dot = tuple((at[name], int(w * self.scale)) for name, w in form.weight.items())
            self.neurons.append((shared.setdefault(dot, len(shared)), int(form.bias * self.scale)))
        self.dots = list(shared)

    def apply(self, below: list[Activation], bottom: int, sums: SoftmaxSums, relu: bool) -> list[Activation]:
        read = [_dot(dot, below, sums) for dot in self.dots]
        above = []
        for i, bias in self.neurons:
            numerator, owed = read[i]
            numerator += bias * bottom * sums.product(owed) if bias else 0
            above.append((0, 0) if relu and numerator <= 0 else (numerator, owed))
        return above


def _dot(dot: tuple[tuple[int, int], ...], below: list[Activation], sums: SoftmaxSums) -> Activation:
    """Σ w · activation. What divides by its softmax sums is divided at once, so that it stays short."""
    parts: dict[int, int] = {}
    for i, w in dot:
        numerator, owed = below[i]
        if numerator:
            parts[owed] = parts.get(owed, 0) + w * numerator
    settled: dict[int, int] = {}
    for owed, part in parts.items():
        whole, rest = divmod(part, sums.product(owed)) if owed else (part, 0)
        key, part = (owed, part) if rest else (0, whole)
        settled[key] = settled.get(key, 0) + part
    union = 0
    for owed in settled:
        union |= owed
    return sum(part * sums.product(union & ~owed) for owed, part in settled.items()), union
