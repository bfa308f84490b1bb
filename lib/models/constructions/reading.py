"""Run the constructions for sequential composition: read or emit answers, measure how sure each fetch is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.models.constructions.named_layers import read_bits
from lib.models.constructions.sequential import (
    emitted_tokens,
    layout,
    sequential_composition_decoder,
    sequential_composition_encoder,
    sequential_composition_scratchpad,
)
from lib.models.transformer import Transformer
from lib.tasks.composition import Instances, SequentialComposition

KINDS = ("decoder", "encoder", "encoder-causal", "scratchpad", "scratchpad-two-layer")


def sequential_composition(
    task: SequentialComposition, kind: str, *, sharpness: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """One of the constructions by name. kind: one of KINDS."""
    check_choice("construction", kind, KINDS)
    options = {"sharpness": sharpness, "dtype": dtype}
    if kind == "decoder":
        return sequential_composition_decoder(task, **options)
    if kind.startswith("encoder"):
        return sequential_composition_encoder(task, causal=kind == "encoder-causal", **options)
    return sequential_composition_scratchpad(
        task, carry="pair" if kind == "scratchpad" else "value", **options)


def own_order(kind: str) -> str:
    """The order of the prompt in which a construction is right: "w-first" for the causal encoder."""
    check_choice("construction", kind, KINDS)
    return "w-first" if kind == "encoder-causal" else "paper"


@torch.inference_mode()
def read_answers(model: Transformer, task: SequentialComposition, instances: Instances, *,
                 order: str = "paper", at: str = "last", mask: Tensor | None = None) -> Tensor:
    """The value whose logit is largest at one token of the prompt: (B,). at: "last", or a part, as "z_0"."""
    place = task.prompt_length - 1 if at == "last" else task.places(order)[at]
    logits = model(task.tokens(instances, order=order), mask=mask, rows=torch.tensor([place]))
    return logits[:, 0].argmax(dim=-1)


@torch.inference_mode()
def emit(model: Transformer, task: SequentialComposition, instances: Instances, *,
         order: str = "paper") -> Tensor:
    """The L + 1 tokens that a scratchpad emits, one after the other: (B, L + 1) places in `emitted_tokens`.

    Each is the argmax of the logits at the last token so far, and is put behind the prompt before the next.
    """
    tokens, emitted = task.tokens(instances, order=order), []
    for _ in range(task.L + 1):
        logits = model(tokens, rows=torch.tensor([tokens.shape[1] - 1]))
        emitted.append(logits[:, 0].argmax(dim=-1))  # (B,)
        tokens = torch.cat([tokens, _as_tokens(task, emitted[-1][:, None], tokens.shape[2])], dim=1)
    return torch.stack(emitted, dim=1)


def decode(model: Transformer, task: SequentialComposition, instances: Instances, *,
           order: str = "paper") -> Tensor:
    """The answers of a scratchpad (B,): the value of its last token, or -1 if that is not a token C_L."""
    vocabulary = emitted_tokens(task, carry=_carry(model, task))
    value = torch.tensor([token.i if token.step == task.L else -1 for token in vocabulary])
    return value[emit(model, task, instances, order=order)[:, -1]]


def margin(model: Transformer, task: SequentialComposition, instances: Instances, kind: str) -> list[float]:
    """How far the wanted key leads the best other one, for each layer: the least over all fetches that count.

    Scores as they enter the softmax, in the model's own arithmetic; proved: at least 2c. A fetch counts if
    the answer rests on it: at the token w (decoder), at every token of z_l with l + s <= L (encoder), at w
    and the emitted C_l (scratchpad). In the order that the construction is made for (`own_order`).
    """
    check_choice("construction", kind, KINDS)
    tokens = task.tokens(instances, order=own_order(kind))
    if kind.startswith("scratchpad"):
        with torch.inference_mode():
            emitted = emit(model, task, instances)[:, :-1]
        tokens = torch.cat([tokens, _as_tokens(task, emitted, tokens.shape[2])], dim=1)
    with torch.inference_mode():
        residual = model.trace(tokens, read=("residual",)).residual
        wanted = wanted_keys(task, instances, kind)
        return [min(_gap(model, l, residual[l], head, target) for head, target in enumerate(heads))
                for l, heads in enumerate(wanted)]


def wanted_keys(task: SequentialComposition, instances: Instances, kind: str) -> list[list[Tensor]]:
    """Which token each fetch should find: for each layer and head (B, T) places, -1 where none counts.

    From the definition of the task, in integers; the model is not asked.
    """
    order = own_order(kind)
    place, B, T = task.places(order), len(instances.z0), task.prompt_length
    steps, w = task.steps(instances), instances.w
    if kind == "decoder":
        found = []
        for t in range(task.L + 1):
            target = torch.full((B, T), -1)
            target[:, place["w"]] = place[f"z_{t}"] + (_entry(task, w, t, steps[:, t - 1]) if t else 0)
            found.append([target])
        return found
    if kind.startswith("scratchpad"):
        target = torch.full((B, T + task.L), -1)
        target[:, T - 1] = place["z_0"]
        for t in range(1, task.L + 1):
            target[:, T - 1 + t] = place[f"z_{t}"] + _entry(task, w, t, steps[:, t - 1])
        switches = torch.full_like(target, -1)
        switches[:, T - 1 :] = place["w"]
        if kind == "scratchpad":
            return [[target, switches]] if task.ns else [[target]]
        return [[switches], [target]] if task.ns else [[target]]
    found = [[torch.full((B, T), place["w"])]] if task.ns else []
    value = [instances.z0[:, None], *instances.tables]  # value[l]: what the tokens of z_l hold
    for s in (2**k for k in range(task.L.bit_length())):
        target, after = torch.full((B, T), -1), list(value)
        for l in range(task.L - s + 1):
            entry = _entry(task, w, l + s, value[l])  # (B, entries of z_l)
            target[:, place[f"z_{l}"] :][:, : entry.shape[1]] = place[f"z_{l + s}"] + entry
            after[l] = value[l + s].gather(1, entry)
        found.append([target])
        value = after
    if kind == "encoder":
        target = torch.full((B, T), -1)
        target[:, place["w"]] = place["z_0"]
        found.append([target])
    return found


def read_stream(task: SequentialComposition, h: Tensor) -> dict[str, str | int | None]:
    """One token's residual stream h (D,) in words: {part of `layout`: number, or the name of a one-hot}.

    None where a part is not set: no bit counts as read unless |x| >= 1/2. "one" is left out.
    """
    found = {}
    for part, columns in layout(task).items():
        x = h[columns.start : columns.stop]
        if part in ("type", "emitted"):
            names = [*(f"z_{l}" for l in range(task.L + 1)), "w"] if part == "type" else None
            place = int(x.argmax())
            name = names[place] if names else f"C_{place}"
            found[part] = name if x[place] >= 0.5 else None
        elif part != "one":
            found[part] = int(read_bits(x, range(len(x)))) if (x.abs() >= 0.5).all() else None
    return found


def _entry(task: SequentialComposition, w: Tensor, l: int, i: Tensor) -> Tensor:
    """The place of (w_{l-1}, i) in the table z_l, l >= 1. i: (B,) or (B, n)."""
    if l == 1:
        return i
    switch = w[:, l - 2] * task.N[l - 2]
    return i + (switch if i.dim() == 1 else switch[:, None])


def _gap(model: Transformer, l: int, h: Tensor, head: int, target: Tensor) -> float:
    attention, c = model.layers[l].attention, model.config
    columns = slice(head * c.head_width, (head + 1) * c.head_width)
    q, k = attention.W_Q(h)[..., columns], attention.W_K(h)[..., columns]
    score = q @ k.mT / math.sqrt(c.head_width)  # (B, T, T)
    if c.causal:
        future = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
        score = score.masked_fill(future, -math.inf)
    counts, target = target >= 0, target.clamp(min=0)[..., None]
    best = score.gather(2, target).squeeze(2)
    other = score.scatter(2, target, -math.inf).amax(dim=2)
    return float((best - other)[counts].double().min())


def _carry(model: Transformer, task: SequentialComposition) -> str:
    return "value" if task.ns and model.config.n_heads == 1 else "pair"


def _as_tokens(task: SequentialComposition, emitted: Tensor, S: int) -> Tensor:
    """Emitted tokens (B, n) as symbols (B, n, S): one row of the embedding each, padded."""
    tokens = emitted.new_zeros(*emitted.shape, S)
    tokens[..., 0] = task.vocab + emitted
    return tokens
