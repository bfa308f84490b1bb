"""Softmax attention with grouped query heads and rotary positions: a sublayer of `lib.models.transformer`.

Also `lib.models.dcmha.DCMHA` in the same place.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib.models.dcmha import DCMHA, rotate, rotation
from lib.models.inputs import band, check_count

if TYPE_CHECKING:
    from lib.models.transformer import TransformerConfig


class Attention(nn.Module):
    """Softmax attention, scores scaled by 1/√d, with grouped query heads and rotary positions."""

    def __init__(self, c: TransformerConfig, *, window: int | None = None):
        super().__init__()
        self.config, self.window, bias = c, window, c.attention_bias
        self.W_Q = nn.Linear(c.d_model, c.n_heads * c.head_width, bias=bias)
        self.W_K = nn.Linear(c.d_model, c.kv_heads * c.head_width, bias=bias)
        self.W_V = nn.Linear(c.d_model, c.kv_heads * c.head_width, bias=bias)
        self.W_O = nn.Linear(c.n_heads * c.head_width, c.d_model, bias=bias)
        self.q_norm = nn.RMSNorm(c.head_width, eps=1e-6) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_width, eps=1e-6) if c.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, *, mask: Tensor | None, rows, explicit: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> out (B, R, D) and, if explicit, weights (B, H, R, T). R = T without `rows`."""
        c, T, d = self.config, x.shape[1], self.config.head_width
        q = self.W_Q(x if rows is None else x[:, rows]).unflatten(-1, (-1, d)).transpose(1, 2)  # (B, H, R, d)
        k = self.W_K(x).unflatten(-1, (-1, d)).transpose(1, 2)  # (B, H_kv, T, d)
        v = self.W_V(x).unflatten(-1, (-1, d)).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if c.positions == "rope":
            cos, sin = rotation(torch.arange(T, device=x.device), d, base=c.rope_base, like=x)  # (T, d/2)
            q = rotate(q, cos, sin) if rows is None else rotate(q, cos[rows], sin[rows])
            k = rotate(k, cos, sin)
        if c.kv_heads != c.n_heads:  # head i reads key/value head i // group
            k, v = (x.repeat_interleave(c.n_heads // c.kv_heads, dim=1) for x in (k, v))

        causal = c.causal and mask is None
        if causal and (explicit or rows is not None or self.window):
            mask, causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril(), False
        if self.window is not None:
            near = band(T, self.window, x.device)
            mask = near if mask is None else mask & near
        if mask is not None:
            mask = mask if rows is None else mask[..., rows, :]
            mask = mask.unsqueeze(-3)  # over heads
        if explicit:
            score = q @ k.mT / math.sqrt(d)  # (B, H, R, T)
            score = score if mask is None else score.masked_fill(~mask, -math.inf)
            weight = score.softmax(dim=-1)  # rows sum to 1
            mix = weight @ v  # (B, H, R, d)
        else:
            weight = None
            mix = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.W_O(mix.transpose(1, 2).flatten(2)), weight


class ComposedAttention(DCMHA):
    """DCMHA with the shape that a `TransformerConfig` gives it, called as `Attention` is."""

    def __init__(self, c: TransformerConfig, *, window: int | None = None):
        super().__init__(
            c.d_model, c.n_heads, rank=c.dc_rank, pre=c.dc_pre, post=c.dc_post, query_side=c.dc_query_side,
            key_side=c.dc_key_side, gates=c.dc_gates, static=c.dc_static, window=window, causal=c.causal,
            qk_norm=c.qk_norm, rope=c.rope_base if c.positions == "rope" else None, d_head=c.head_width,
            n_kv_heads=c.kv_heads, bias=c.attention_bias,
        )  # fmt: skip

    def forward(
        self, x: Tensor, *, mask: Tensor | None, rows, explicit: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> out (B, R, D) and, if explicit, the composed weights (B, H, R, T)."""
        return self.attend(x, mask=mask, rows=rows, computation="reference" if explicit else "fast")


def check_attention(c: TransformerConfig) -> None:
    """ValueError for windows that are none, and for switches of composition that would do nothing."""
    if not isinstance(c.windows, (tuple, list)):
        raise ValueError(
            f"windows is a tuple, one entry a layer, repeated: ({c.windows!r},); got {c.windows!r}"
        )
    if not c.windows:
        raise ValueError("windows must name at least one layer's: (None,) is no window anywhere")
    for window in c.windows:
        if window is not None:
            check_count("a window", window)
    dc = {f.name: f.default for f in fields(c) if f.name.startswith("dc_")}
    if c.attention == "mha" and (idle := [name for name in dc if getattr(c, name) != dc[name]]):
        raise ValueError(f"{', '.join(idle)} would have no effect: give attention='dcmha' with it")
    if c.attention == "dcmha" and not (c.dc_pre or c.dc_post):
        raise ValueError("attention='dcmha' composes before or after the softmax: dc_pre or dc_post")
    if c.attention == "dcmha" and not (c.dc_query_side or c.dc_key_side or c.dc_static):
        raise ValueError("attention='dcmha' composes nothing without dc_query_side, dc_key_side or dc_static")
