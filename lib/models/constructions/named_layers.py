"""A Transformer assembled from named coordinates: heads that fetch by key, neurons that read and write.

A coordinate of the residual stream has a name; a head and a neuron say in names what they read and where they
write. Bits are coded ±1, most significant first, in coordinates name[0], name[1], …
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.models.named_weights import Form, coordinates
from lib.models.transformer import Transformer, TransformerConfig

Neuron = tuple[Form, Mapping[str, int]]  # what its ReLU reads, and {coordinate: factor} that it writes


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """A head whose query meets its keys entrywise: score = c (query · key); value k goes to writes[k]."""

    query: Sequence[Form]
    key: Sequence[Form]
    value: Sequence[Form]
    writes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class NamedLayer:
    """One layer: its heads, its neurons, and what its MLP adds everywhere."""

    heads: Sequence[Fetch]
    neurons: Sequence[Neuron]
    shift: Mapping[str, int]


def assemble(
    names: Sequence[str],
    symbols: Sequence[Form],
    layers: Sequence[NamedLayer],
    readout: Sequence[Form],
    *,
    d_head: int,
    c: float,
    causal: bool,
    dtype: torch.dtype,
) -> Transformer:
    """The Transformer whose weights are these forms: no norm, no positions, ReLU, biases in the MLP only.

    names: the coordinates of the stream.  symbols: one row of the embedding each.  readout: one logit each.
    c multiplies every query, and √d_head undoes the scaling of the scores. MLPs are padded to one width.
    """
    at = {name: i for i, name in enumerate(names)}
    model = Transformer(
        TransformerConfig(
            vocab=len(symbols), d_model=len(names), n_layers=len(layers), n_heads=len(layers[0].heads),
            d_head=d_head, d_mlp=max(len(layer.neurons) for layer in layers), n_logits=len(readout),
            norm="none", positions="none", activation="relu", causal=causal, mlp_output_bias=True,
        ),
        seed=0, init="zeros",
    ).to(dtype)  # before the weights come, so that they are rounded once  # fmt: skip
    with torch.no_grad():
        model.embedding.weight.copy_(_rows(symbols, at))
        model.W_U.weight.copy_(_rows(readout, at))
        for layer, named in zip(model.layers, layers, strict=True):
            for h, head in enumerate(named.heads):
                row = h * d_head
                attention = layer.attention
                _fill(attention.W_Q, row, c * math.sqrt(d_head) * _rows(head.query, at))
                _fill(attention.W_K, row, _rows(head.key, at))
                _fill(attention.W_V, row, _rows(head.value, at))
                for k, name in enumerate(head.writes):
                    attention.W_O.weight[at[name], row + k] = 1.0
            for i, (reads, writes) in enumerate(named.neurons):
                layer.mlp.W_1.weight[i] = _rows([reads], at)[0]
                layer.mlp.W_1.bias[i] = reads.bias
                for name, factor in writes.items():
                    layer.mlp.W_2.weight[at[name], i] = factor
            for name, amount in named.shift.items():
                layer.mlp.W_2.bias[at[name]] = amount
    return model


def _rows(forms: Sequence[Form], at: Mapping[str, int]) -> Tensor:
    matrix = torch.zeros(len(forms), len(at), dtype=torch.float64)
    for i, form in enumerate(forms):
        for name, w in form.weight.items():
            matrix[i, at[name]] = w
    return matrix


def _fill(linear: nn.Linear, row: int, matrix: Tensor) -> None:
    linear.weight[row : row + len(matrix)] = matrix


# ---- numbers as bits ------------------------------------------------------------------------------------


def width(n: int) -> int:
    """Bits that name n things: max(1, ceil(log2 n))."""
    return max(1, (n - 1).bit_length())


def bit_names(name: str, n: int) -> list[str]:
    """The coordinates name[0], name[1], … that hold one of n things."""
    return [f"{name}[{k}]" for k in range(width(n))]


def bits(name: str, value: int, n: int) -> Form:
    """The number `value`, one of n, as ±1 in the coordinates of `name`."""
    places = bit_names(name, n)
    return Form({place: 2 * (value >> len(places) - 1 - k & 1) - 1 for k, place in enumerate(places)})


def read_bits(h: Tensor, columns: range) -> Tensor:
    """The numbers that stand in `columns` of a stream h (…, D), by the signs of its entries -> (…,) long."""
    weight = 2 ** torch.arange(len(columns) - 1, -1, -1, device=h.device)
    return ((h[..., columns.start : columns.stop] > 0).long() * weight).sum(dim=-1)


# ---- gadgets: neurons that add to the stream; x and g are coordinates, g holds 0 or 1 -------------------


def erase(names: Sequence[str]) -> list[Neuron]:
    """x -> 0, as -ReLU(x) + ReLU(-x)."""
    return [neuron for name in names for x in coordinates(name)
            for neuron in ((x, {name: -1}), (-x, {name: 1}))]


def erase_if(g: Form, names: Sequence[str]) -> list[Neuron]:
    """x -> (1 - g) x for |x| <= 1: with g = 0 both ReLUs read at most 1 - 8 and are closed."""
    shut = 8 * (1 - g)
    return [neuron for name in names for x in coordinates(name)
            for neuron in ((x - shut, {name: -1}), (-x - shut, {name: 1}))]


def clamp(sources: Sequence[str], targets: Sequence[str]) -> tuple[list[Neuron], dict[str, int]]:
    """Adds ReLU(2x + 1) - ReLU(2x - 1) - 1 to each target: exactly ±1 where |x| >= 1/2. Neurons and shift."""
    neurons = [neuron for source, target in zip(sources, targets, strict=True) for x in coordinates(source)
               for neuron in ((2 * x + 1, {target: 1}), (2 * x - 1, {target: -1}))]
    return neurons, dict.fromkeys(targets, -1)


def clamp_if(g: Form, sources: Sequence[str], targets: Sequence[str]) -> list[Neuron]:
    """Adds g · clamp(x) to each target, for |x| <= 1."""
    shut = 8 * (1 - g)
    neurons = []
    for source, target in zip(sources, targets, strict=True):
        x, = coordinates(source)
        neurons += [(2 * x + 1 - shut, {target: 1}), (2 * x - 1 - shut, {target: -1}), (g, {target: -1})]
    return neurons
