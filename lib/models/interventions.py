"""What can be done to a layer while a Transformer runs: skip it, replace it, erase its result, swap it.

Layers count from 0 in the order of the computation; layer l turns residual[l] into residual[l + 1]:

    a = Attention(Norm(h)),   m = MLP(Norm(h + a)),   next h = h + a + m.

`tokens` says where: a bool tensor (T,) or (B, T), True where the intervention acts, None for every token.
Interventions on the same layer act one after the other, in the order of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.models.inputs import found

SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True, eq=False)
class Skip:
    """The layer (or one sublayer) adds nothing at `tokens`: its output there is 0.

    Other tokens still read the keys and values of a skipped token. Skipping layer l at every token makes
    residual[l + 1] = residual[l]; skipping only the MLP keeps the attention's output.
    """

    layer: int
    sublayer: str | None = None
    tokens: Tensor | None = None

    def __post_init__(self):
        _check_where(self)

    def on_sublayer(self, sublayer: str, h: Tensor, out: Tensor, rows) -> Tensor:
        return _put(torch.zeros_like(out), out, self, rows) if self.sublayer in (None, sublayer) else out

    def on_layer(self, before: Tensor, after: Tensor, rows) -> Tensor:
        return after


@dataclass(frozen=True, eq=False)
class Replace:
    """A function takes the place of the layer (or of one sublayer) at `tokens`.

    `map` takes the residual stream (B, T, D) that the layer or sublayer reads, *before* its norm, and returns
    the same shape: for a layer the next stream, for a sublayer what it adds to it. So the identity map on a
    layer is Skip(layer). A replaced layer's own sublayers add nothing: their taps are 0 there.
    A map that ignores its input puts a constant (with its gradient) in place of a layer's result.
    """

    layer: int
    map: Callable[[Tensor], Tensor]
    sublayer: str | None = None
    tokens: Tensor | None = None

    def __post_init__(self):
        _check_where(self)
        if not callable(self.map):
            raise TypeError(
                f"Replace takes a function of the stream, got {type(self.map).__name__}; "
                "for a matrix A write lambda h: h @ A"
            )

    def on_sublayer(self, sublayer: str, h: Tensor, out: Tensor, rows) -> Tensor:
        if self.sublayer is None:
            return _put(torch.zeros_like(out), out, self, rows)
        return _put(self._mapped(h), out, self, rows) if self.sublayer == sublayer else out

    def on_layer(self, before: Tensor, after: Tensor, rows) -> Tensor:
        return _put(self._mapped(before), after, self, rows) if self.sublayer is None else after

    def _mapped(self, h: Tensor) -> Tensor:
        image = self.map(h)
        if image.shape != h.shape:
            raise ValueError(
                f"the map of Replace(layer={self.layer}) must keep the stream's shape: "
                f"it took {tuple(h.shape)} and returned {tuple(image.shape)}"
            )
        return image


@dataclass(frozen=True, eq=False)
class Erase:
    """The stream after `layer` is overwritten by `value` (D) at `tokens`; layer=-1: the embeddings are."""

    layer: int
    value: Tensor
    tokens: Tensor | None = None

    def __post_init__(self):
        _check_where(self)
        if not isinstance(self.value, Tensor) or self.value.dim() != 1:
            raise ValueError(f"Erase takes one vector of shape (D,), got {found(self.value)}")

    def on_sublayer(self, sublayer: str, h: Tensor, out: Tensor, rows) -> Tensor:
        return out

    def on_layer(self, before: Tensor, after: Tensor, rows) -> Tensor:
        return _put(self.value, after, self, rows)


@dataclass(frozen=True)
class Swap:
    """Two layers change places, for all tokens. Taps and other interventions keep counting by place."""

    layer: int
    other: int


Intervention = Skip | Replace | Erase | Swap


def check_interventions(
    interventions: Iterable[Intervention], *, B: int, T: int, D: int, L: int
) -> list[Intervention]:
    """The interventions as a list, or an error naming the first that does not fit L layers on (B, T, D)."""
    if isinstance(interventions, Intervention):
        raise TypeError(f"interventions is a list: write [{type(interventions).__name__}(...)]")
    interventions = list(interventions)
    for item in interventions:
        if not isinstance(item, Intervention):
            raise TypeError(f"an intervention is Skip, Replace, Erase or Swap, got {type(item).__name__}")
        kind, lowest = type(item).__name__, -1 if isinstance(item, Erase) else 0
        for layer in (item.layer, item.other) if isinstance(item, Swap) else (item.layer,):
            if not lowest <= layer < L:
                raise ValueError(f"{kind} names layer {layer}; allowed: {lowest} to {L - 1}")
        if isinstance(item, Erase) and len(item.value) != D:
            raise ValueError(f"Erase got a value of width {len(item.value)}, but the stream has width {D}")
        tokens = getattr(item, "tokens", None)
        if tokens is not None and tuple(tokens.shape) not in ((T,), (B, T)):
            raise ValueError(
                f"{kind}(layer={item.layer}): tokens has shape {tuple(tokens.shape)}; "
                f"allowed: ({T},) or ({B}, {T})"
            )
    return interventions


def swapped_order(interventions: list[Intervention], L: int) -> list[int]:
    """Which layer's weights run at each place, after every Swap in turn."""
    order = list(range(L))
    for item in interventions:
        if isinstance(item, Swap):
            order[item.layer], order[item.other] = order[item.other], order[item.layer]
    return order


def _put(new: Tensor, old: Tensor, item: Skip | Replace | Erase, rows) -> Tensor:
    """`new` at the intervention's tokens, `old` elsewhere. rows: the tokens at hand, None for all."""
    new = new.to(old).expand_as(old)
    if item.tokens is None:
        return new
    tokens = item.tokens.to(old.device)
    chosen = tokens if rows is None else tokens[..., rows]
    return torch.where(chosen.unsqueeze(-1), new, old)


def _check_where(item: Skip | Replace | Erase) -> None:
    kind = type(item).__name__
    if getattr(item, "sublayer", None) is not None:
        check_choice("sublayer", item.sublayer, SUBLAYERS)
    if item.tokens is not None and (not isinstance(item.tokens, Tensor) or item.tokens.dtype != torch.bool):
        raise TypeError(
            f"{kind}: tokens is a bool tensor (T,) or (B, T), True where it acts, got {found(item.tokens)}"
        )
