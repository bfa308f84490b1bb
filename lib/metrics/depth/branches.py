"""Many edited streams through one layer at once, without computing again what they share.

In a causal model a stream that was edited from token t on agrees before t with the one it was edited from. So
only its tokens from t on are computed; they read the keys and values of the shared prefix. All streams go
through the matrices of the layer together. Equal to full passes up to rounding (tested). Derived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lib.metrics.depth.contributions import walk
from lib.metrics.depth.pooled import full, norms
from lib.models.dcmha import rotate, rotation
from lib.models.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Branch:
    """n streams that leave their parents at one token. h: (n, T - start, D), tokens from `start` on."""

    start: int
    h: Tensor
    parent: Tensor  # (n,) long, rows of the parent streams


@dataclass(frozen=True, eq=False)
class Clean:
    """The unedited pass of prompts of one length: h has L + 1 streams, a and m have L, each (B, T, D)."""

    h: list[Tensor]
    a: list[Tensor]
    m: list[Tensor]

    def added(self, l: int) -> Tensor:
        """c_l = a_l + m_l."""
        return self.a[l] + self.m[l]


def clean_pass(model: Transformer, batch: Tensor) -> Clean:
    """ValueError if the model is not finite on these tokens (B, T)."""
    steps = list(walk(model, batch.to(model.embedding.weight.device)))
    return Clean(*([x for x in kept if x is not None] for kept in list(zip(*steps, strict=True))[1:]))


def run_layer(
    model: Transformer,
    l: int,
    parents: Tensor,
    branches: Sequence[Branch] = (),
    *,
    parents_too: bool = True,
    share: bool = True,
) -> tuple[Tensor | None, list[Tensor]]:
    """What layer l adds, a_l + m_l, to the parents (p, P, D) and to each branch (n, T - start, D).

    Parents may be shorter than the branches: P >= every start. parents_too=False: only their keys and values
    are computed. share=False, and attention other than softmax: every branch runs whole, prefix included.
    """
    if not branches:
        return _sum(model.run_layer(l, parents)), []
    if not share or not model.config.plain:
        whole = [torch.cat([parents[b.parent, : b.start], b.h], dim=1) for b in branches]
        out = [_sum(model.run_layer(l, x))[:, b.start :] for x, b in zip(whole, branches, strict=True)]
        return _sum(model.run_layer(l, parents)) if parents_too else None, out

    layer, c = model.layers[l], model.config
    pieces = [parents, *(b.h for b in branches)]
    flat = torch.cat([x.flatten(0, 1) for x in pieces])  # (tokens of all streams, D)
    first = 0 if parents_too else parents.shape[0] * parents.shape[1]  # queries and outputs from here on
    x, attention = layer.attention_norm(flat), layer.attention
    T = max(b.start + b.h.shape[1] for b in branches)
    at = torch.arange(T, device=x.device)
    cos_sin = rotation(at, c.head_width, base=c.rope_base, like=x) if c.positions == "rope" else None
    starts, active = [0, *(b.start for b in branches)], pieces if parents_too else pieces[1:]
    q = _heads(attention.W_Q(x[first:]), active, starts[-len(active) :], c.head_width, cos_sin)
    k = _heads(attention.W_K(x), pieces, starts, c.head_width, cos_sin)
    v = _heads(attention.W_V(x), pieces, starts, c.head_width, None)

    group = c.n_heads // c.kv_heads
    mixes = [_mix(q[0], k[0], v[0], None, group)] if parents_too else []
    own = q[1:] if parents_too else q
    for b, q_b, k_b, v_b in zip(branches, own, k[1:], v[1:], strict=True):
        k_b = torch.cat([k[0][b.parent, :, : b.start], k_b], dim=2)  # (n, H_kv, T, d)
        v_b = torch.cat([v[0][b.parent, :, : b.start], v_b], dim=2)
        mask = torch.ones(q_b.shape[2], k_b.shape[2], dtype=torch.bool, device=x.device).tril(b.start)
        mixes.append(_mix(q_b, k_b, v_b, mask, group))
    a = attention.W_O(torch.cat([mix.transpose(1, 2).flatten(0, 1).flatten(1) for mix in mixes]))
    out = a + layer.mlp(layer.mlp_norm(flat[first:] + a))
    parts = out.split([x.shape[0] * x.shape[1] for x in active])
    parts = [part.view(x.shape) for part, x in zip(parts, active, strict=True)]
    return (parts[0], parts[1:]) if parents_too else (None, parts)


def _heads(flat: Tensor, pieces: Sequence[Tensor], starts: Sequence[int], d: int, cos_sin) -> list[Tensor]:
    """flat (tokens, H d) -> for each piece (n, H, T, d), turned to its places if cos_sin is given."""
    found = []
    parts = flat.split([x.shape[0] * x.shape[1] for x in pieces])
    for part, x, start in zip(parts, pieces, starts, strict=True):
        n, T = x.shape[:2]
        part = part.view(n, T, -1, d).transpose(1, 2)
        if cos_sin is not None:
            cos, sin = (z[start : start + T] for z in cos_sin)
            part = rotate(part, cos, sin)
        found.append(part)
    return found


def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int) -> Tensor:
    if group > 1:  # query head i reads key/value head i // group
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _sum(both: tuple[Tensor, Tensor]) -> Tensor:
    return both[0] + both[1]


def output_change(
    model: Transformer, clean: Tensor, edited: Tensor, *, target: Tensor | None = None, logits_at_once: int
) -> tuple[Tensor, Tensor | None]:
    """‖y − ȳ‖₂ (n, R) in [0, √2], and log y(target) − log ȳ(target) in nats (n, R) if targets (R,) are given.

    clean: (R, D) and edited: (n, R, D), streams before the final norm; y = softmax(readout). At most about
    `logits_at_once` logits of each of the two are held at a time.
    """
    n, R = edited.shape[:2]
    step = max(1, logits_at_once // model.config.n_out)
    effect = full(edited).new_zeros(n, R)
    nats = None if target is None else torch.zeros_like(effect)
    for start in range(0, R, step):
        part = slice(start, start + step)
        logits = full(model.readout(clean[part]))  # (r, V)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: nothing can be measured on this model")
        goal = None if target is None else target[part].to(logits.device)
        said = None if goal is None else _log_probability(logits, goal)
        y, r = logits.softmax(dim=-1), len(logits)
        many = max(1, step // r)
        for i in range(0, n, many):
            changed = full(model.readout(edited[i : i + many, part]))  # (many, r, V)
            for j, z in enumerate(changed, i):
                effect[j, part] = _distance(y, z)
                if nats is not None:
                    nats[j, part] = said - _log_probability(z, goal)
    return effect, nats


def _distance(y: Tensor, logits: Tensor) -> Tensor:
    """‖y − softmax(logits)‖₂ (r,), a few rows at a time: they stay in the cache of a CPU (twice as fast)."""
    rows = max(1, 400_000 // y.shape[-1])
    pairs = zip(y.split(rows), logits.split(rows), strict=True)
    return torch.cat([norms(z.softmax(dim=-1).sub_(p)) for p, z in pairs])


def _log_probability(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=-1)
