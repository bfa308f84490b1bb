"""Prompts that a measurement runs on: checked before any work, and batched by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lib.models.inputs import check_tokens, found
from lib.models.transformer import Transformer


def batches(tokens: Tensor | Sequence[Tensor], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Prompts of one length, at most batch_size at a time: their numbers, and tokens (b, T)."""
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(tokens):
        by_length.setdefault(len(prompt), []).append(i)
    for which in by_length.values():
        for start in range(0, len(which), batch_size):
            part = which[start : start + batch_size]
            yield part, torch.stack([tokens[i] for i in part])


def check_prompts(model: Transformer, tokens: Tensor | Sequence[Tensor]) -> None:
    """ValueError unless tokens is (B, T) long, or a list of (T_i,) long, not empty and fit for the model."""
    if isinstance(tokens, Tensor) and tokens.dim() != 2:
        raise ValueError(f"tokens are prompts (B, T), or a list of prompts (T,), long; got {found(tokens)}")
    if not len(tokens):
        raise ValueError("no prompts: give at least one")
    for i, prompt in enumerate(tokens):
        if not isinstance(prompt, Tensor) or prompt.dim() != 1 or not len(prompt):
            raise ValueError(f"prompt {i} must be tokens (T,), torch.long, T >= 1; got {found(prompt)}")
        check_tokens(prompt[None], vocab=model.config.vocab, max_tokens=model.config.max_tokens)
