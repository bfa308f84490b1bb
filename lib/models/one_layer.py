"""One softmax layer with weights that can be read: model (M1) of chapter `one-layer-limits`.

One attention layer of H softmax heads read at the last token, an affine map W_O, a strictly layered ReLU MLP
and an affine output. Every weight is an integer or a fraction, and every coordinate has a name. The same
weights run in exact rational arithmetic (`exact`) and in the floating-point formats of torch (`forward`).

Exactness of the softmax: a logit is ln(base) times an integer, so exp(logit) = base ** integer is rational.

Source: model (M1), proved about in `one-layer-limits` (ours, unrefereed); the kind of model is that of
Kozachinskiy et al., arXiv 2501.19215.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.models.exact import ExactHead, ExactLayer, SoftmaxSums
from lib.models.named_weights import Form, Head, Layer, Number, table

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


@dataclass(frozen=True, kw_only=True)
class OneLayerSoftmax:
    """y(tokens) = output(MLP(W_O(heads))), read at the last token.

    alphabet[p] is the number of symbols at position p: a word has T = len(alphabet) tokens, token p is one of
    0 .. alphabet[p]-1. embed(p, symbol) gives the named entries of that token's embedding; the others are 0.
    The MLP is strictly layered: hidden[0] reads only W_O, hidden[i] only hidden[i-1], output only the last.
    Raises ValueError for a form that reads a name its input does not have, and for fractional scores.
    """

    name: str
    alphabet: tuple[int, ...]
    features: tuple[str, ...]
    embed: Callable[[int, int], Mapping[str, Number]]
    heads: tuple[Head, ...]
    W_O: Layer
    hidden: tuple[Layer, ...]
    output: Form

    def __post_init__(self):
        _check_names("embedding", [Form(row) for row in self.rows], self.features)
        for head in self.heads:
            _check_names(f"head {head.name!r}", head.query + head.key + head.value, self.features)
            _check_integers(head, self.rows)
        if len({head.name for head in self.heads}) < len(self.heads):
            raise ValueError(f"heads need names of their own, got {[head.name for head in self.heads]}")
        below = [head.output(c) for head in self.heads for c in range(len(head.value))]
        for what, layer in self.layers.items():
            _check_names(what, layer.values(), below)
            below = list(layer)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every affine map after attention, bottom up; the hidden ones end in a ReLU."""
        hidden = {f"hidden {i}": layer for i, layer in enumerate(self.hidden, start=1)}
        return {"W_O": self.W_O} | hidden | {"output": {"y": self.output}}

    @cached_property
    def start(self) -> tuple[int, ...]:
        """Where each position begins in `rows`."""
        return tuple(sum(self.alphabet[:p]) for p in range(len(self.alphabet)))

    @cached_property
    def rows(self) -> list[Mapping[str, Number]]:
        """The embedding table: token (p, symbol) is row start[p] + symbol."""
        return [self.embed(p, symbol) for p, size in enumerate(self.alphabet) for symbol in range(size)]

    # ---- exact rational arithmetic ----------------------------------------------------------------------

    def exact(self, words: Tensor | Iterable[Sequence[int]]) -> list[Fraction]:
        """y of each word in exact rational arithmetic: Python integers throughout, no float anywhere.

        words: B words of T symbols. Raises ValueError for a word of the wrong length or alphabet.
        """
        words = words.tolist() if isinstance(words, Tensor) else [list(word) for word in words]
        for word in words:
            if len(word) != len(self.alphabet) or any(
                    not 0 <= symbol < size for symbol, size in zip(word, self.alphabet, strict=True)):
                raise ValueError(f"{self.name} reads {len(self.alphabet)} tokens, token p in "
                                 f"0 .. alphabet[p]-1 with alphabet {self.alphabet}; got {word}")
        return [self._exact_word([p + symbol for p, symbol in zip(self.start, word, strict=True)])
                for word in words]

    def _exact_word(self, row: list[int]) -> Fraction:
        sums = SoftmaxSums()                            # activation = numerator / (bottom · some of the sums)
        activations, bottom = [], math.lcm(*(head.scale for head in self._exact_heads))
        for h, head in enumerate(self._exact_heads):
            numerators, sums.products[1 << h] = head.read(row)
            activations += [(a * (bottom // head.scale), 1 << h) for a in numerators]
        *below, output = self._exact_layers
        for i, layer in enumerate(below):
            activations, bottom = layer.apply(activations, bottom, sums, i > 0), bottom * layer.scale
        [(numerator, owed)] = output.apply(activations, bottom, sums, False)
        return Fraction(numerator, bottom * output.scale * sums.product(owed))

    @cached_property
    def _exact_heads(self) -> list[ExactHead]:
        return [ExactHead(head, self.rows) for head in self.heads]

    @cached_property
    def _exact_layers(self) -> list[ExactLayer]:
        names = [head.output(c) for head in self.heads for c in range(len(head.value))]
        built = []
        for layer in self.layers.values():
            built.append(ExactLayer(layer, names))
            names = list(layer)
        return built

    # ---- floating point ---------------------------------------------------------------------------------

    def forward(self, words: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """y in floating point. words: (B, T) long -> (B,) of `dtype`, on the device of `words`.

        Every weight and every result (score, logit, softmax, head output, layer) is rounded to `dtype`; the
        embedding times W_Q, W_K, W_V is one table, rounded once. float32 and float64 sum in their own format;
        float16 and bfloat16 products are summed in float32 and rounded once, as tensor cores do. Overflow and
        nan are left to happen.
        Raises ValueError for another dtype and for words of the wrong shape or alphabet.
        """
        check_choice("dtype", str(dtype).removeprefix("torch."), DTYPES)
        size = torch.tensor(self.alphabet, device=words.device)
        if words.dim() != 2 or words.shape[1] != len(size) or bool(((words < 0) | (words >= size)).any()):
            raise ValueError(f"{self.name} reads words (B, {len(size)}) with token p in 0 .. alphabet[p]-1, "
                             f"alphabet {self.alphabet}; got shape {tuple(words.shape)}")
        tables = self._float_tables(dtype, words.device)
        widest = max(len(self.alphabet) * max(len(head.value) for head in self.heads), 1)
        chunks = words.split(max(1, CHUNK_ENTRIES // widest))
        return torch.cat([self._forward_chunk(chunk, tables, dtype) for chunk in chunks])

    def _forward_chunk(self, words: Tensor, tables: _FloatTables, dtype: torch.dtype) -> Tensor:
        def rounded(a: Tensor) -> Tensor:               # values of `dtype`, held in the format that sums them
            return a.to(dtype).to(tables.summed_in)

        row = words + tables.start                      # (B, T): rows of the embedding table
        mixes = []
        for log_base, query, key, value in tables.heads:
            q = query[row[:, -1]]                       # (B, c): only the last token asks
            score = rounded((key[row] @ q[:, :, None]).squeeze(2))      # (B, T)
            weight = rounded(rounded(log_base * score).softmax(dim=1))  # (B, T)
            mixes.append(rounded((weight[:, None] @ value[row]).squeeze(1)))    # (B, d)
        a = torch.cat(mixes, dim=1)                     # (B, sum of d)
        for i, (W, b) in enumerate(tables.layers):
            a = rounded(torch.nn.functional.linear(a, W, b))
            a = a.relu() if 0 < i < len(tables.layers) - 1 else a
        return a.squeeze(1).to(dtype)

    def _float_tables(self, dtype: torch.dtype, device: torch.device) -> _FloatTables:
        cache = self.__dict__.setdefault("_tables", {})
        if (dtype, device) not in cache:
            cache[dtype, device] = _FloatTables(self, dtype, device)
        return cache[dtype, device]

    # ---- size, description, damage ----------------------------------------------------------------------

    def size(self) -> dict[str, int | list[int]]:
        """What the weights take, counted from the weights.

        product: H (d + 1) (hidden layers + 1), the quantity that Theorem B** bounds from below.
        mlp_weights: entries of the dense MLP and output, biases included; mlp_nonzero: those that are not 0.
        value_bits: bits that tell apart, in one coordinate of a value, the multiples of its smallest unit
        between its least and its largest entry.
        """
        H, d = len(self.heads), max(len(head.value) for head in self.heads)
        widths = [len(layer) for layer in self.hidden]
        forms = [form for layer in self.hidden for form in layer.values()] + [self.output]
        inputs = [len(self.W_O), *widths]
        outputs = [*widths, 1]
        return {
            "heads": H, "value_dim": d, "query_key_dim": max(len(head.key) for head in self.heads),
            "embedding_dim": len(self.features), "hidden_layers": len(widths), "widths": widths,
            "max_width": max(widths, default=0), "relus": sum(widths),
            "product": H * (d + 1) * (len(widths) + 1),
            "mlp_weights": sum((i + 1) * o for i, o in zip(inputs, outputs, strict=True)),
            "mlp_nonzero": sum(len(form.weight) + bool(form.bias) for form in forms),
            "value_bits": max(_value_bits(head.value, self.rows) for head in self.heads),
        }

    def describe(self) -> str:
        """The weights in words: one line a head; one a layer, with its first neuron. Long lines end in ..."""
        size, lines = self.size(), []
        for head in self.heads:
            asks, keys, values = (", ".join(map(str, forms)) for forms in (head.query, head.key, head.value))
            weight = f"{_short(head.base)}^(q·k), q = ({asks}), k = ({keys})" if asks else "uniform"
            lines.append(f"head {head.name}: weight {weight}, v = ({values})")
        for what, layer in self.layers.items():
            name, form = next(iter(layer.items()))
            lines.append(f"{what}: {len(layer)} wide; {name} = {form}")
        lines = [line if len(line) <= LINE else line[: LINE - 4] + " ..." for line in lines]
        return "\n".join([f"{self.name}: H(d+1)(layers+1) = {size['product']}", *lines])

    def with_entry(self, position: int, symbol: int, feature: str, value: Number) -> OneLayerSoftmax:
        """A copy in which one entry of one token's embedding is `value`."""
        check_choice("feature", feature, self.features)
        if not (0 <= position < len(self.alphabet) and 0 <= symbol < self.alphabet[position]):
            raise ValueError(f"{self.name} has no token ({position}, {symbol}); alphabet {self.alphabet}")

        def embed(p: int, s: int) -> Mapping[str, Number]:
            return {**self.embed(p, s), feature: value} if (p, s) == (position, symbol) else self.embed(p, s)

        return replace(self, name=f"{self.name}, damaged", embed=embed)

    def with_neuron(self, layer: int, neuron: str, form: Form) -> OneLayerSoftmax:
        """A copy in which one neuron of hidden layer 1 .. Λ reads `form` instead."""
        if not 1 <= layer <= len(self.hidden):
            raise ValueError(f"{self.name} has hidden layers 1 .. {len(self.hidden)}, got {layer}")
        check_choice(f"neuron of hidden layer {layer}", neuron, self.hidden[layer - 1])
        hidden = [row | {neuron: form} if i == layer else row for i, row in enumerate(self.hidden, start=1)]
        return replace(self, name=f"{self.name}, damaged", hidden=tuple(hidden))


LINE = 110  # characters of a line of `describe`
CHUNK_ENTRIES = 2**22  # entries of the gathered values (B, T, d) held at once: 32 MiB in float64


def _check_names(what: str, forms: Iterable[Form], names: Iterable[str]) -> None:
    names = set(names)
    for form in forms:
        for name in form.weight.keys() - names:
            check_choice(f"coordinate of {what}:", name, sorted(names))
        if not all(isinstance(w, Number) for w in (form.bias, *form.weight.values())):
            raise ValueError(f"{what}: exact weights are integers or fractions; got {form}")


def _check_integers(head: Head, rows: Iterable[Mapping[str, Number]]) -> None:
    forms = head.query + head.key
    read = {name for form in forms for name in form.weight}
    entries = [w for form in forms for w in (form.bias, *form.weight.values())]
    entries += [w for row in rows for name, w in row.items() if name in read]
    if not all(isinstance(w, int) for w in entries):
        raise ValueError(f"head {head.name!r}: queries and keys must be integers, so that "
                         "base ** (query · key) is rational; scale them up and take a smaller base")


def _value_bits(value: Sequence[Form], rows: Iterable[Mapping[str, Number]]) -> int:
    columns: list[set[Number]] = [{0} for _ in value]
    for entries in table(value, rows):
        for c, v in entries.items():
            columns[c].add(v)
    units = [math.lcm(*(Fraction(v).denominator for v in column)) for column in columns]
    return max(int(unit * (max(column) - min(column))).bit_length()
               for unit, column in zip(units, columns, strict=True))


def _short(number: int) -> str:
    return str(number) if number < 10**6 else f"2^{number.bit_length() - 1}.."


class _FloatTables:
    """The weights rounded to one floating-point format, on one device, as dense tables."""

    def __init__(self, model: OneLayerSoftmax, dtype: torch.dtype, device: torch.device):
        self.summed_in = torch.float64 if dtype == torch.float64 else torch.float32

        def stored(entries: list | Tensor) -> Tensor:   # Fraction -> float64 -> dtype
            a = torch.as_tensor(entries, dtype=torch.float64)
            return a.to(dtype).to(device=device, dtype=self.summed_in)

        def dense_table(forms: tuple[Form, ...]) -> Tensor:     # (rows, len(forms))
            dense = torch.zeros(len(model.rows), len(forms), dtype=torch.float64)
            for r, entries in enumerate(table(forms, model.rows)):
                for c, entry in entries.items():
                    dense[r, c] = float(entry)
            return stored(dense)

        self.start = torch.tensor(model.start, device=device)
        self.heads = [
            (stored([math.log(head.base)]), *map(dense_table, (head.query, head.key, head.value)))
            for head in model.heads]
        self.layers = []
        below = [head.output(c) for head in model.heads for c in range(len(head.value))]
        for layer in model.layers.values():
            W = [[float(form.weight.get(name, 0)) for name in below] for form in layer.values()]
            self.layers.append((stored(W), stored([float(form.bias) for form in layer.values()])))
            below = list(layer)
