"""The MLP: the other sublayer of `lib.models.transformer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lib.models.transformer import TransformerConfig


class MLP(nn.Module):
    """W_2 f(W_1 x + b_1), f = ReLU or GELU; SwiGLU: W_2 (silu(W_gate x) * W_1 x). Biases as configured."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.activation = c.activation
        if c.activation == "swiglu":
            self.W_gate = nn.Linear(c.d_model, c.mlp_width, bias=c.mlp_bias)
        self.W_1 = nn.Linear(c.d_model, c.mlp_width, bias=c.mlp_bias)
        self.W_2 = nn.Linear(c.mlp_width, c.d_model, bias=c.mlp_output_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return self.W_2(nn.functional.silu(self.W_gate(x)) * self.W_1(x))
        f = torch.relu if self.activation == "relu" else nn.functional.gelu
        return self.W_2(f(self.W_1(x)))


class NoMLP(nn.Module):
    """What stands in an attention-only layer: it adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
