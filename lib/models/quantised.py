r"""A decoder whose attention adds integers: the model of computation of the lower bound for L layers.

Assumption (P) of that bound: what a contiguous block of earlier tokens contributes to a receiver, per layer
and head the sums of weight · value (d numbers) and of weights (one), takes at most 2^((d + 1) p) values.
Nothing bounds a softmax in this way. Here a causal Transformer with any weights runs with

    weight = floor(2^q e^(min(score - top, 0))),  an integer 0 … 2^q, top a constant of the head
    value  = round(v / step), clipped to |value| <= 2^(b-1) - 1,       step a constant of the head
    head output = step · Σ weight · value / max(1, Σ weight),          exact integer sums

and p = accumulator_bits, sign included, holds every block sum. All else is the Transformer's own layers. d
counts the value coordinates that some head writes: a row of W_V that is 0 is never sent.

*Same means equal.* Weights of the linear maps, states, queries and keys are multiples of 2^-f, so every sum
is exact in float64 and its order, hence the grouping of the tokens, cannot matter; sizes where that would
fail are refused. floor(2^q e^x) is found by comparing x with ln(k / 2^q), so no exponential is computed at
run time. With norm "none" every step is exact or one correctly rounded operation; other norms are rounded to
the grid, and a run compared bit for bit shows whether that sufficed.

Source: assumption (P) and this decoder are ours, unrefereed; theory of `depth-width`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib.models.dcmha import rotate, rotation
from lib.models.transformer import Transformer, TransformerConfig

EXACT = 2**53  # float64 holds every integer up to here


class Block(NamedTuple):
    """Contiguous tokens start … start + n - 1 and their states, multiples of 2^-f."""

    h: Tensor  # (B, n, D) float64
    start: int

    @property
    def places(self) -> slice:
        return slice(self.start, self.start + self.h.shape[1])


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bits of a `QuantisedDecoder`. ValueError for what 64-bit sums cannot carry."""

    weight_bits: int = 6  # q: a weight is an integer 0 … 2^q; q = 0 leaves weights 0 and 1
    value_bits: int = 4  # b, sign included: a value is an integer |value| <= 2^(b-1) - 1; b = 2: -1, 0, 1
    grid_bits: int = 10  # f: states, maps, queries and keys are multiples of 2^-f. Not counted by (P)

    def __post_init__(self):
        for name, low, high in (("weight_bits", 0, 16), ("value_bits", 2, 24), ("grid_bits", 0, 14)):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
                raise ValueError(f"{name} is an integer {low} … {high}, got {bits!r}")

    @property
    def largest_value(self) -> int:
        return 2 ** (self.value_bits - 1) - 1


class QuantisedDecoder:
    """A causal Transformer with integer accumulators in place of the softmax; it is read at the last token.

    top, step: (L, H) constants of the heads, as in the module's formula; `quantise` finds them on examples.
    longest: the most tokens of a prompt; it fixes p. Refused: encoders, MLPs other than ReLU, attention
    that is not plain.
    """

    def __init__(self, model: Transformer, precision: Precision, *, longest: int, top: Tensor, step: Tensor):
        c = model.config
        if not c.causal or c.activation != "relu" or not c.plain:
            raise ValueError(
                "the protocol needs a decoder, exact sums ReLU: causal=True, activation='relu', plain "
                f"attention; got causal={c.causal}, activation={c.activation!r}, attention={c.attention!r}, "
                f"qk_norm={c.qk_norm}, windows={c.windows}")
        shape = (c.n_layers, c.n_heads)
        if top.shape != shape or step.shape != shape or not (step > 0).all():
            raise ValueError(
                f"top and step are one number a head, {shape}, step > 0; got {tuple(top.shape)}, {step}")
        if longest < 2 or longest * 2**precision.weight_bits * precision.largest_value >= EXACT:
            raise ValueError(f"sums over {longest} tokens at {precision} do not fit (2 tokens at least)")
        self.config, self.precision, self.longest = c, precision, longest
        self.top, self.step = top.double(), step.double()
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        for weight in self.model.parameters():
            weight.copy_(self._grid(weight))
        self._sent = self._written()  # (L, H, d): which coordinates of a head are values
        levels = 2**precision.weight_bits
        self._thresholds = torch.tensor([math.log(k / levels) for k in range(1, levels + 1)]).double()

    # ---- sizes ------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        return self.config.n_layers

    @property
    def accumulator_bits(self) -> int:
        """p: bits of one accumulated number, two's complement, for blocks of at most longest - 1 tokens."""
        largest = (self.longest - 1) * 2**self.precision.weight_bits * self.precision.largest_value
        return largest.bit_length() + 1

    @property
    def message_bits(self) -> int:
        """beta = H (d + 1) p: bits that one block sends to one receiver token in one layer."""
        return self.config.n_heads * (self.value_dim + 1) * self.accumulator_bits

    @property
    def Hdp(self) -> int:  # noqa: N802
        """H d p, the number that the theorem bounds; beta <= 2 H d p."""
        return self.config.n_heads * self.value_dim * self.accumulator_bits

    @property
    def value_dim(self) -> int:
        """d: the most value coordinates that a head writes, at most the head width."""
        return self._sent.shape[-1]

    # ---- the pieces that a player of the protocol may use -------------------------------------------------

    def embed(self, tokens: Tensor, *, start: int = 0) -> Block:
        """States of the tokens before layer 0. tokens: (B, n) or (B, n, S), the first at place `start`."""
        h = self.model.embedding(tokens)
        h = h.sum(dim=2) if tokens.dim() == 3 else h
        if self.config.positions == "learned":
            h = h + self.model.position.weight[start : start + h.shape[1]]
        return Block(self._grid(h), start)

    def sums(self, l: int, receivers: Block, senders: Block) -> Tensor:
        """What the senders contribute to each receiver in layer l: (B, n, H, d + 1) int64, denominator last.

        Senders stand before the receivers, or are the receivers themselves, each reading its past and itself.
        """
        weight, value = self._attend(l, receivers, senders)  # (B, H, n, n'), (B, H, n', d)
        part = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        return (weight @ part).long().transpose(1, 2)  # integers < 2^53: exact in any order

    def advance(self, l: int, block: Block, sums: Tensor) -> Block:
        """States after layer l, from the sums over everything the tokens read (B, n, H, d + 1)."""
        layer, sums = self.model.layers[l], sums.double()
        mix = self._grid(self.step[l][:, None] * sums[..., :-1] / sums[..., -1:].clamp(min=1))
        head = mix.new_zeros(*mix.shape[:-1], self.config.head_width)  # (B, n, H, head width)
        mix = head.scatter(-1, self._sent[l].expand_as(mix), mix)
        middle = block.h + self._grid(self._linear(layer.attention.W_O, mix.flatten(2)))
        x = self._grid(layer.mlp_norm(middle))
        hidden = self._linear(layer.mlp.W_1, x).relu()  # multiples of 2^-2f
        after = middle + self._grid(self._linear(layer.mlp.W_2, hidden, digits=3 * self.precision.grid_bits))
        return Block(after, block.start)

    def answer(self, block: Block) -> Tensor:
        """Logits (B, V) at the block's last token."""
        return self.model.readout(block.h[:, -1:]).squeeze(1)

    # ---- the decoder ------------------------------------------------------------------------------------

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) at the last token of prompts (B, T) or (B, T, S)."""
        return self.answer(self.run(tokens))

    def run(self, tokens: Tensor) -> Block:
        """The states after the last layer, all tokens computed together."""
        self.check(tokens)
        block = self.embed(tokens)
        for l in range(self.config.n_layers):
            block = self.advance(l, block, self.sums(l, block, block))
        return block

    def check(self, tokens: Tensor) -> None:
        """ValueError for a prompt longer than `longest`, for which p was counted."""
        if tokens.dim() not in (2, 3) or not 1 <= tokens.shape[1] <= self.longest:
            raise ValueError(f"prompts are (B, T) or (B, T, S) with T <= {self.longest}; got {tokens.shape}")

    # ---- private ----------------------------------------------------------------------------------------

    def _attend(self, l: int, receivers: Block, senders: Block) -> tuple[Tensor, Tensor]:
        """Integer weights (B, H, n, n') and values (B, H, n', d), as float64."""
        score = self._scores(l, receivers, senders)
        weight = torch.bucketize(score - self.top[l][:, None, None], self._thresholds, right=True).double()
        if receivers.start == senders.start:
            weight = weight.tril()
        elif senders.places.stop > receivers.start:
            raise ValueError(f"tokens {receivers.places} cannot read tokens {senders.places}: not their past")
        value = torch.round(self._values(l, senders) / self.step[l][:, None, None])
        return weight, value.clamp(-self.precision.largest_value, self.precision.largest_value)

    def _scores(self, l: int, receivers: Block, senders: Block) -> Tensor:
        """q · k / sqrt(d): (B, H, n, n'). Products are multiples of 2^-2f, added exactly."""
        layer = self.model.layers[l]
        q, k = (
            self._grid(self._turned(self._heads(W, layer.attention_norm(block.h)), block))
            for W, block in ((layer.attention.W_Q, receivers), (layer.attention.W_K, senders)))
        self._check_exact(float(q.abs().sum(-1).max() * k.abs().max()), digits=2 * self.precision.grid_bits)
        return q @ k.mT / math.sqrt(self.config.head_width)

    def _values(self, l: int, senders: Block) -> Tensor:
        layer = self.model.layers[l]
        v = self._heads(layer.attention.W_V, layer.attention_norm(senders.h))  # (B, H, n', head width)
        sent = self._sent[l][:, None].expand(*v.shape[:3], self.value_dim)
        return v.gather(-1, sent)

    def _written(self) -> Tensor:
        """(L, H, d): the coordinates of each head that W_V can make other than 0, filled up to the most."""
        written = []
        for layer in self.model.layers:
            W = layer.attention.W_V
            rows = W.weight.abs().sum(dim=1) if W.bias is None else W.weight.abs().sum(dim=1) + W.bias.abs()
            rows = rows.unflatten(0, (-1, self.config.head_width)) > 0  # (H_kv, head width)
            written.append(rows.repeat_interleave(self.config.n_heads // len(rows), dim=0))
        written = torch.stack(written)
        most = max(1, int(written.sum(-1).max()))
        return written.long().argsort(dim=-1, descending=True, stable=True)[..., :most]

    def _heads(self, W: torch.nn.Linear, x: Tensor) -> Tensor:
        """One vector a query head, (B, H, n, head width); grouped keys and values are repeated."""
        x = self._linear(W, self._grid(x)).unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
        return x.repeat_interleave(self.config.n_heads // x.shape[1], dim=1)

    def _turned(self, x: Tensor, block: Block) -> Tensor:
        if self.config.positions != "rope":
            return x
        at = torch.arange(self.longest, device=x.device)
        cos, sin = rotation(at, self.config.head_width, base=self.config.rope_base, like=x)
        return rotate(x, cos[block.places], sin[block.places])

    def _linear(self, W: torch.nn.Linear, x: Tensor, *, digits: int | None = None) -> Tensor:
        """W x + bias, exact: x is a multiple of 2^(f - digits), the result of 2^-digits (2f by default)."""
        size = float(x.abs().max() * W.weight.abs().sum(dim=1).max())
        size += 0.0 if W.bias is None else float(W.bias.abs().max())
        self._check_exact(size, digits=2 * self.precision.grid_bits if digits is None else digits)
        return W(x)

    def _check_exact(self, size: float, *, digits: int) -> None:
        if not size * 2**digits < EXACT:
            raise ValueError(
                f"sums of size {size:.3g} in steps of 2^-{digits} exceed the 53 bits of float64 and would be "
                f"rounded; take fewer grid_bits than {self.precision.grid_bits}")

    def _grid(self, x: Tensor) -> Tensor:
        return torch.round(x.double() * 2**self.precision.grid_bits) / 2**self.precision.grid_bits


def quantise(model: Transformer, prompts: Tensor, precision: Precision) -> QuantisedDecoder:
    """`model` with integer accumulators; `prompts` (B, T) or (B, T, S) fix top and step, layer after layer.

    top: the largest score that any token gives in these prompts (greater ones count as this one).
    step: the largest |v| over 2^(b-1) - 1, so that values fill their bits.
    """
    shape = (model.config.n_layers, model.config.n_heads)
    decoder = QuantisedDecoder(
        model, precision, longest=max(2, prompts.shape[1]), top=torch.zeros(shape), step=torch.ones(shape))
    decoder.check(prompts)
    past = torch.ones(prompts.shape[1], prompts.shape[1], dtype=torch.bool).tril()
    block = decoder.embed(prompts)
    for l in range(shape[0]):
        score = decoder._scores(l, block, block).masked_fill(~past, -math.inf)
        decoder.top[l] = score.amax(dim=(0, 2, 3))
        largest = decoder._values(l, block).abs().amax(dim=(0, 2, 3))
        decoder.step[l] = torch.where(largest > 0, largest, 1) / precision.largest_value
        block = decoder.advance(l, block, decoder.sums(l, block, block))
    return decoder


def random_decoder(*, vocab: int, tokens: int, layers: int, heads: int, d_head: int, seed: int,
                   d_model: int = 8, sharpness: float = 0.5) -> Transformer:
    """A small random Transformer without norms, with learned positions: material for `quantise`.

    sharpness scales the scores: far apart, weights of few bits are mostly 0, and little is said.
    """
    model = Transformer(TransformerConfig(
        vocab=vocab, d_model=d_model, n_heads=heads, d_head=d_head, n_layers=layers, d_mlp=2 * d_model,
        norm="none", positions="learned", max_tokens=tokens), seed=seed)
    with torch.no_grad():
        for layer in model.layers:
            for W in (layer.attention.W_Q, layer.attention.W_K):
                W.weight.mul_(math.sqrt(sharpness))
    return model
