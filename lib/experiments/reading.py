"""What experiments on a trained language model share: model and text, streams layer by layer, losses, edits.

Layers count from 0. residual[l] (n, T, D) is the stream before layer l, a_l and m_l what attention and MLP
add: f_l = a_l + m_l, residual[l + 1] = residual[l] + f_l. A text is n windows of T tokens, read separately.
Everything here runs layer after layer over all windows: memory is a few n T D numbers, whatever L.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lib.choices import check_choice, resolve_device
from lib.metrics.cost import cost
from lib.models import pretrained
from lib.models.transformer import Transformer
from lib.tasks.text import FILES, austen_blocks, chunks, document_tokens, encode
from lib.training import seeds_by_role

WEIGHTS = ("trained", "untrained")
READOUT_TOKENS = 512  # logits of so many tokens at a time: 512 * 49,152 float32 numbers are 100 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """A model and a text. tokens: at most so many are read, in windows of `context` chosen by the seed."""

    model: str  # "smollm2-135m", "austen", a GGUF file, a Hugging Face folder or id
    text: str = "prose"  # or "austen", "code"
    tokens: int = 16_384
    context: int = 256  # tokens of a window
    batch: int = 4  # windows in one pass: memory and speed, not results
    device: str = "cpu"

    def __post_init__(self):
        check_choice("text", self.text, FILES)
        for name in ("tokens", "context", "batch"):
            check_whole(name, getattr(self, name), 2 if name == "context" else 1)
        if self.tokens < 3 * self.context:
            raise ValueError(
                f"intervals need 3 windows at least: tokens >= 3 * context = {3 * self.context}, "
                f"got tokens={self.tokens}"
            )
        resolve_device(self.device)


class Affine(nn.Module):
    """x -> x + x W + b, in place of a layer. W (D, D), b (D): what it adds to the stream, like a layer."""

    def __init__(self, W: Tensor, b: Tensor):
        super().__init__()
        self.W, self.b = nn.Parameter(W, requires_grad=False), nn.Parameter(b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.adds(x)

    def adds(self, x: Tensor) -> Tensor:
        """x W + b. (…, D) -> (…, D)."""
        return x @ self.W + self.b


Plan = Mapping[int, Affine | None]  # layer -> what takes its place; None: nothing does, it is removed


def load(chosen: ReadingSettings, *, weights: str = "trained", seed: int = 0) -> Transformer:
    """The model, ready to read. "untrained": its shape, weights drawn anew by `Transformer`."""
    check_choice("weights", weights, WEIGHTS)
    device = resolve_device(chosen.device)
    model = pretrained.load(chosen.model, device="cpu" if weights == "untrained" else device)
    limit = model.config.max_tokens
    if limit is not None and chosen.context > limit:
        raise ValueError(f"context={chosen.context} is too long: {chosen.model} reads {limit} tokens at most")
    if weights == "untrained":
        model = Transformer(model.config, seed=seeds_by_role(seed)["init"]).to(device)
    return model.eval().requires_grad_(False)


def windows(
    text: str, tokenizer: Tokenizer, *, part: str, context: int, tokens: int, seed: int, vocab: int
) -> Tensor:
    """At most `tokens` tokens of a text in windows of `context`. -> (n, context) long, in the text's order.

    Of a longer text the seed draws which windows. part: "all", "fit" or "evaluation"; the last two share no
    document. ValueError if there are fewer than 3 windows, or tokens outside the vocabulary.
    """
    generator = torch.Generator().manual_seed(seeds_by_role(seed)["data"])
    every = _candidates(text, tokenizer, part, context, 4 * tokens, generator)
    n = min(tokens // context, len(every))
    if n < 3:
        raise ValueError(
            f"{text} ({part}) gives {n} windows of {context} tokens, 3 are needed: a shorter context, or "
            "another text"
        )
    if int(every.max()) >= vocab:
        raise ValueError(
            f"the tokenizer gives token {int(every.max())}, the model has {vocab}: they are no pair"
        )
    return every[torch.randperm(len(every), generator=generator)[:n].sort().values]


def _candidates(text: str, tokenizer: Tokenizer, part: str, T: int, enough: int, generator) -> Tensor:
    """All windows of a text; of the novels those of so many random blocks that they hold enough tokens."""
    if text != "austen" or part == "all":
        return chunks(document_tokens(text, tokenizer, part), T)
    blocks = austen_blocks("train" if part == "fit" else "validation")
    found, held = {}, 0
    for i in torch.randperm(len(blocks), generator=generator).tolist():
        if held >= enough:  # to encode all of them takes seconds
            break
        ids = encode(blocks[i][1], tokenizer)
        if len(ids) >= T:
            found[i] = chunks(ids, T)
            held += found[i].numel()
    if not found:
        raise ValueError(f"no block of the novels holds a window of {T} tokens: a shorter context")
    return torch.cat([found[i] for i in sorted(found)])


@torch.no_grad()
def layer_streams(
    model: Transformer, tokens: Tensor, *, batch: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each layer (l, x, a, m), each (n, T, D): the stream before it, and what its sublayers add.

    The next x is (x + a) + m, bit by bit what `trace` gives. What was yielded before is never changed.
    """
    x = _embedded(model, tokens)
    for l in range(model.config.n_layers):
        parts = [model.run_layer(l, part) for part in x.split(batch)]
        a, m = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        del parts
        yield l, x, a, m
        x = x + a + m


@torch.no_grad()
def losses(model: Transformer, stream: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss of each window, nats a token. stream: residual[L] (n, T, D), tokens (n, T) -> (n,) float64.

    Token t + 1 is predicted at token t, so a window has T - 1 predictions.
    """
    found = []
    for h, ids in zip(stream, tokens.to(stream.device), strict=True):
        parts = []
        for rows, target in zip(h[:-1].split(READOUT_TOKENS), ids[1:].split(READOUT_TOKENS), strict=True):
            parts.append(nn.functional.cross_entropy(model.readout(rows), target, reduction="none"))
        found.append(torch.cat(parts).double().mean())
    return torch.stack(found).cpu()


@torch.no_grad()
def losses_under(model: Transformer, tokens: Tensor, plans: Sequence[Plan], *, batch: int) -> Tensor:
    """`losses` under each plan, with `batch` windows at a time. tokens (n, T) -> (plans, n) float64, nats.

    Equal to a full pass with Skip or Replace on the plan's layers; computed from the unchanged prefix, which
    all plans share: a plan costs the layers from its first change on, and a readout.
    """
    for plan in plans:
        check_layers(model, plan)
    return torch.cat([_block_losses(model, block, plans) for block in tokens.split(batch)], dim=1)


def _block_losses(model: Transformer, tokens: Tensor, plans: Sequence[Plan]) -> Tensor:
    clean = _embedded(model, tokens)
    first = [min(plan, default=model.config.n_layers) for plan in plans]
    streams: list[Tensor | None] = [None] * len(plans)  # None: still the unchanged model's
    for l in range(model.config.n_layers):
        for i, plan in enumerate(plans):
            if l >= first[i]:
                x = clean if streams[i] is None else streams[i]
                streams[i] = step(model, l, x, plan)
        clean = step(model, l, clean, {}) if l < max(first) else clean
    return torch.stack([losses(model, clean if h is None else h, tokens) for h in streams])


def step(model: Transformer, l: int, x: Tensor, plan: Plan) -> Tensor:
    """residual[l + 1] of a stream x (n, T, D) under a plan."""
    if l in plan:
        return x if plan[l] is None else plan[l](x)
    a, m = model.run_layer(l, x)
    return x + a + m


def layer_sizes(model: Transformer, T: int) -> dict[str, int]:
    """Parameters and FLOPs on a prompt of T tokens: of one layer, of the affine map in its place, of all.

    A map has D^2 + D parameters and takes 2 T D^2 FLOPs; the layers as in `lib.metrics.cost`; the readout
    2 T D V. All layers of our Transformer have the same shape.
    """
    c = model.config
    whole, D = cost(c, T), c.d_model
    return {
        "layer_parameters": whole.layer_parameters // c.n_layers,
        "map_parameters": D * D + D,
        "model_parameters": model.n_parameters(),
        "layer_flops": whole.prompt_flops // c.n_layers,
        "map_flops": 2 * T * D * D,
        "model_flops": whole.prompt_flops + 2 * T * D * c.n_out,
    }


def check_layers(model: Transformer, chosen: Sequence[int] | Plan) -> None:
    """ValueError unless every layer is one of the model's."""
    L = model.config.n_layers
    for l in chosen:
        check_whole("a layer", l, 0)
        if l >= L:
            raise ValueError(f"no layer {l}; allowed: 0 to {L - 1}")


def check_only(only: object) -> None:
    """ValueError unless only is None or a list of layers, none twice."""
    if only is not None and (not isinstance(only, list) or not only or len(set(only)) < len(only)):
        raise ValueError(f"only is a list of layers, none twice, or None for each; got {only!r}")


def check_whole(name: str, value: object, low: int) -> None:
    """ValueError unless value is a whole number, `low` at least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is a whole number of at least {low}, got {value!r}")


def _embedded(model: Transformer, tokens: Tensor) -> Tensor:
    return model.embed(tokens.to(next(model.parameters()).device))
