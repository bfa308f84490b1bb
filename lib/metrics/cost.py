"""What a decoder costs: parameters, arithmetic, cache, and time on this machine.

All but the time are formulas in the sizes of the model, exact for `lib.models.transformer.Transformer`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.models.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class Cost:
    """Cost of one model on prompts of one length."""

    layer_parameters: int  # weights and biases of the layers: embedding and readout are not counted
    prompt_flops: int  # of the layers, for the whole prompt
    token_flops: int  # of the layers, for one token more, with a cache of the prompt
    cache_numbers: int  # keys and values kept of the prompt


def cost(config: TransformerConfig, T: int) -> Cost:
    """Cost of the layers on a prompt of T tokens. A multiplication with its addition counts as 2 FLOPs.

    With r = H d and k = (kv heads) d, each layer multiplies by matrices of D (2 r + 2 k) + (2 or 3) D d_mlp
    entries for each token (3 with a gate), and for each pair of tokens by 2 r for score and mix. The prompt
    counts all T^2 pairs, as a kernel without causal skipping computes them; softmax, norms and activations
    are not counted. The cache holds 2 k numbers for each layer and token. Raises ValueError if T < 1.
    """
    if T < 1:
        raise ValueError(f"a prompt has at least one token, got T={T}")
    D, F = config.d_model, config.mlp_width
    r, k = config.n_heads * config.head_width, config.kv_heads * config.head_width
    hidden = 2 if config.activation == "swiglu" else 1
    matrices = D * (2 * r + 2 * k) + (hidden + 1) * D * F
    biases = (r + 2 * k + D) * config.attention_bias + hidden * F * config.mlp_bias
    biases += D * config.mlp_output_bias
    scales = {"none": 0, "rms": D, "layer": 2 * D}[config.norm] * config.norm_scale
    return Cost(
        layer_parameters=config.n_layers * (matrices + biases + 2 * scales),
        prompt_flops=config.n_layers * (2 * T * matrices + 4 * T * T * r),
        token_flops=config.n_layers * (2 * matrices + 4 * (T + 1) * r),
        cache_numbers=2 * config.n_layers * k * T,
    )


def latency(model: Transformer, tokens: Tensor, *, repeats: int = 7) -> float:
    """Median wall seconds of one forward pass, after one that warms up. A timing: it differs between runs."""
    with torch.no_grad():
        model(tokens)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(tokens)
            if tokens.is_cuda:
                torch.cuda.synchronize(tokens.device)
            times.append(time.perf_counter() - start)
    return statistics.median(times)
