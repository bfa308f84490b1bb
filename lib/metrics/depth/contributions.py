"""How much each layer adds to the residual stream, and in which direction.

    layer:     a_l + m_l beside h_l,    attention: a_l beside h_l,    mlp: m_l beside h_l + a_l,

for every token: the ratio of norms (clamped below) and the cosine. A cosine above 0 strengthens what the
stream holds, below 0 erases it, 0 writes something new. The mean is the mean *of ratios* over tokens, not a
ratio of means. a_l and m_l are read before they are added; nothing is a difference of two large streams.

Source: Csordás, Manning and Potts 2025 (facts C.1 #1, #2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lib.metrics.depth.pooled import PerPrompt, Pool, check_clamp, full, norms, relative
from lib.metrics.depth.prompts import batches, check_prompts
from lib.models.transformer import Transformer

RATIOS = ("attention", "mlp", "layer")
COSINES = ("attention", "mlp", "layer", "neighbours")


@dataclass(frozen=True, eq=False)
class Contributions:
    """Relative contributions, each (N, L), and the norms of the stream, (N, L + 1)."""

    attention: PerPrompt  # ‖a_l‖ / ‖h_l‖
    mlp: PerPrompt  # ‖m_l‖ / ‖h_l + a_l‖
    layer: PerPrompt  # ‖a_l + m_l‖ / ‖h_l‖
    norm: PerPrompt  # ‖h_l‖, l = 0 … L


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines, each (N, L)."""

    attention: PerPrompt  # cos(a_l, h_l)
    mlp: PerPrompt  # cos(m_l, h_l + a_l)
    layer: PerPrompt  # cos(a_l + m_l, h_l)
    neighbours: PerPrompt  # cos(h_l, h_{l+1})


def random_walk_ratio(l: int, *, embedding: float, contribution: float) -> float:
    """Relative contribution at layer l of a stream that takes random steps: contribution / root mean square
    of h_l, where h_0 has norm `embedding` and every step, uncorrelated with the others, norm `contribution`.

    sigma / sqrt(sigma_0^2 + l sigma^2): falls as 1 / sqrt(l) without training. Derived (the null model).

    >>> [round(random_walk_ratio(l, embedding=2, contribution=1), 3) for l in (0, 5, 12)]
    [0.5, 0.333, 0.25]
    """
    if l < 0 or not embedding >= 0 or not contribution > 0 or embedding == l == 0:
        raise ValueError(
            "need l >= 0, embedding >= 0 and contribution > 0 (and a stream that is not 0), "
            f"got {l}, {embedding}, {contribution}"
        )
    return contribution / math.sqrt(embedding**2 + l * contribution**2)


def relative_contributions(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    *,
    leave_out: int = 0,
    clamp: float = 1e-6,
    batch_size: int = 8,
) -> Contributions:
    """Norm ratios of every layer and sublayer, on prompts (B, T) or a list of prompts (T_i,), long.

    leave_out: tokens at the start of a prompt that are not counted. The paper counts all; a first token often
    has a norm that dwarfs the others. clamp: the least denominator. Norms are taken in float32 at least.
    Unit: 1; of `norm`: that of the stream. ValueError for prompts that do not fit, and for a model that is
    not finite on them.
    """
    both = contributions_and_cosines(model, tokens, leave_out=leave_out, clamp=clamp, batch_size=batch_size)
    return both[0]


def sublayer_cosines(
    model: Transformer, tokens: Tensor | Sequence[Tensor], *, leave_out: int = 0, batch_size: int = 8
) -> Cosines:
    """Cosines of every layer and sublayer; arguments and errors as in `relative_contributions`.

    In [-1, 1]; 0 where a vector is 0 (norms are clamped at 1e-8).
    """
    return contributions_and_cosines(model, tokens, leave_out=leave_out, batch_size=batch_size)[1]


@torch.no_grad()
def contributions_and_cosines(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    *,
    leave_out: int = 0,
    clamp: float = 1e-6,
    batch_size: int = 8,
) -> tuple[Contributions, Cosines]:
    """Both from one pass, which keeps no layer and computes no logits."""
    check_prompts(model, tokens)
    check_clamp(clamp)
    short = min(len(prompt) for prompt in tokens)
    if not 0 <= leave_out < short:
        raise ValueError(f"leave_out={leave_out} tokens of a prompt of {short}; allowed: 0 to {short - 1}")
    N, L = len(tokens), model.config.n_layers
    ratio = {name: Pool(N, L) for name in RATIOS}
    cosine = {name: Pool(N, L) for name in COSINES}
    size = Pool(N, L + 1)
    for which, batch in batches(tokens, batch_size):
        i = torch.tensor(which)
        for l, h, a, m in walk(model, batch.to(model.embedding.weight.device)):
            if a is None:
                size.put((i, l), norms(h[:, leave_out:]))
                continue
            h, a, m = (full(x[:, leave_out:]) for x in (h, a, m))
            middle, c = h + a, a + m
            size.put((i, l), norms(h))
            for name, x, stream in (("attention", a, h), ("mlp", m, middle), ("layer", c, h)):
                ratio[name].put((i, l), relative(x, stream, clamp))
                cosine[name].put((i, l), cosine_similarity(x, stream, dim=-1))
            cosine["neighbours"].put((i, l), cosine_similarity(h, h + c, dim=-1))
    ratios = {name: pool.result(f"the relative contribution ({name})") for name, pool in ratio.items()}
    cosines = {name: pool.result(f"the cosine ({name})") for name, pool in cosine.items()}
    return Contributions(**ratios, norm=size.result("the norm")), Cosines(**cosines)


def walk(model: Transformer, batch: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor | None]]:
    """(l, h_l, a_l, m_l) for each layer, then (L, h_L, None, None); each (B, T, D). ValueError as below."""
    h = model.embed(batch)
    check_stream(h, 0)
    for l in range(model.config.n_layers):
        a, m = model.run_layer(l, h)
        yield l, h, a, m
        h = h + a + m
        check_stream(h, l + 1)
    yield model.config.n_layers, h, None, None


def check_stream(h: Tensor, l: int) -> None:
    """ValueError, naming the tap, unless the stream is finite."""
    if not h.isfinite().all():
        where = "the embeddings are" if l == 0 else f"the stream after layer {l - 1} is"
        raise ValueError(f"{where} not finite: nothing can be measured on this model")
