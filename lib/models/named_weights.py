"""Weights whose entries have names: affine forms, layers and heads, as hand-built models write them down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Number = int | Fraction


class Form:
    """An affine form in named coordinates: one row of a weight matrix, with its bias.

    >>> x, one = coordinates("x", "one")
    >>> print(2 * x - one + 3, "and", 4 * coordinates("g(x) >= 2")[0])
    2·x - one + 3 and 4·[g(x) >= 2]
    """

    __slots__ = ("weight", "bias")

    def __init__(self, weight: Mapping[str, Number] | None = None, bias: Number = 0):
        self.weight = {name: w for name, w in (weight or {}).items() if w}
        self.bias = bias

    def __add__(self, other: Form | Number) -> Form:
        if not isinstance(other, Form):
            return Form(self.weight, self.bias + other)
        weight = dict(self.weight)
        for name, w in other.weight.items():
            weight[name] = weight.get(name, 0) + w
        return Form(weight, self.bias + other.bias)

    def __mul__(self, factor: Number) -> Form:
        return Form({name: factor * w for name, w in self.weight.items()}, factor * self.bias)

    def __neg__(self) -> Form:
        return -1 * self

    def __sub__(self, other: Form | Number) -> Form:
        return self + -1 * other

    def __rsub__(self, other: Number) -> Form:
        return -1 * self + other

    __radd__, __rmul__ = __add__, __mul__

    def __str__(self) -> str:
        signed = [(w, "" if abs(w) == 1 else f"{abs(w)}·", name) for name, w in self.weight.items()]
        terms = [("- " if w < 0 else "+ ") + size + (f"[{name}]" if " " in name else name)
                 for w, size, name in signed]
        if self.bias or not terms:
            terms.append(f"{'-' if self.bias < 0 else '+'} {abs(self.bias)}")
        return " ".join(terms).removeprefix("+ ")


def coordinates(*names: str) -> list[Form]:
    """The forms that read one named coordinate each."""
    return [Form({name: 1}) for name in names]


def table(forms: Sequence[Form], rows: Iterable[Mapping[str, Number]]) -> list[dict[int, Number]]:
    """Each row of an embedding table times the matrix with rows `forms`: {coordinate: entry}, sparse."""
    reads: dict[str, list[tuple[int, Number]]] = {}
    for c, form in enumerate(forms):
        for name, w in form.weight.items():
            reads.setdefault(name, []).append((c, w))
    bias = {c: form.bias for c, form in enumerate(forms) if form.bias}
    table = []
    for row in rows:
        entries = dict(bias)
        for name, x in row.items():
            for c, w in reads.get(name, ()):
                entries[c] = entries.get(c, 0) + w * x
        table.append(entries)
    return table


@dataclass(frozen=True, kw_only=True)
class Head:
    """One softmax head: logit = ln(base) · (query · key), with named rows of W_Q, W_K and W_V.

    `query` reads the embedding of the last token, `key` and `value` that of each token. base = 1: uniform.
    Query and key must be integers, else base ** (query · key) would not be rational.
    """

    name: str
    base: int
    query: tuple[Form, ...]
    key: tuple[Form, ...]
    value: tuple[Form, ...]

    def __post_init__(self):
        if self.base < 1:
            raise ValueError(f"head {self.name!r}: the base of the weights must be >= 1, got {self.base}")
        if len(self.query) != len(self.key):
            raise ValueError(f"head {self.name!r}: query has {len(self.query)} entries, key {len(self.key)}")

    def output(self, coordinate: int) -> str:
        """The name under which W_O reads one coordinate of this head's output."""
        return f"{self.name}[{coordinate}]"


Layer = dict[str, Form]  # a neuron's name -> what it reads from the layer below
