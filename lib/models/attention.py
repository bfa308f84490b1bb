"""Softmax attention with grouped query heads and rotary positions: a sublayer of `lib.models.transformer`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lib.models.transformer import TransformerConfig


class Attention(nn.Module):
    """Softmax attention, scores scaled by 1/√d, with grouped query heads and rotary positions."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.config, bias = c, c.attention_bias
        self.W_Q = nn.Linear(c.d_model, c.n_heads * c.head_width, bias=bias)
        self.W_K = nn.Linear(c.d_model, c.kv_heads * c.head_width, bias=bias)
        self.W_V = nn.Linear(c.d_model, c.kv_heads * c.head_width, bias=bias)
        self.W_O = nn.Linear(c.n_heads * c.head_width, c.d_model, bias=bias)

    def forward(
        self, x: Tensor, *, mask: Tensor | None, rows, explicit: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> out (B, R, D) and, if explicit, weights (B, H, R, T). R = T without `rows`."""
        c, T, d = self.config, x.shape[1], self.config.head_width
        q = self.W_Q(x if rows is None else x[:, rows]).unflatten(-1, (-1, d)).transpose(1, 2)  # (B, H, R, d)
        k = self.W_K(x).unflatten(-1, (-1, d)).transpose(1, 2)  # (B, H_kv, T, d)
        v = self.W_V(x).unflatten(-1, (-1, d)).transpose(1, 2)
        if c.positions == "rope":
            cos, sin = rotation(T, d, base=c.rope_base, like=x)  # (T, d/2)
            q = rotate(q, cos, sin) if rows is None else rotate(q, cos[rows], sin[rows])
            k = rotate(k, cos, sin)
        if c.kv_heads != c.n_heads:  # head i reads key/value head i // group
            k, v = (x.repeat_interleave(c.n_heads // c.kv_heads, dim=1) for x in (k, v))

        causal = c.causal and mask is None
        if causal and (explicit or rows is not None):
            mask, causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril(), False
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


def rotation(T: int, d: int, *, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, d/2) of the angles t · base^(−2j/d), position t, pair j; dtype and device of `like`."""
    speed = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * speed  # float64: exact enough at any position
    return angle.cos().to(like), angle.sin().to(like)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (…, T, d), in the half-split order of Llama: coordinate j turns with coordinate j + d/2."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
