"""What a pass may be given: tokens, mask and rows that do not fit are refused before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def check_count(name: str, value: object, least: int = 1) -> None:
    """ValueError unless value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_tokens(tokens: Tensor, *, vocab: int, max_tokens: int | None) -> None:
    """ValueError unless tokens is long, (B, T) or (B, T, S), not empty, within vocab, and T <= max_tokens."""
    if _dtype(tokens) != torch.long or tokens.dim() not in (2, 3) or not tokens.numel():
        raise ValueError(
            f"tokens must be torch.long of shape (B, T) or (B, T, S), not empty; got {found(tokens)}"
        )
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"tokens run from {low} to {high}; the vocabulary allows 0 to {vocab - 1}")
    T = tokens.shape[1]
    if max_tokens is not None and T > max_tokens:
        raise ValueError(f"{T} tokens are too many; the model takes at most max_tokens={max_tokens}")


def check_mask(mask: Tensor | None, *, B: int, T: int, windows: Iterable[int | None] = (None,)) -> None:
    """ValueError unless mask is None or bool (T, T) or (B, T, T) with something to read in every row.

    windows: of the layers; within each of them every row must find something to read.
    """
    if mask is None:
        return
    if _dtype(mask) != torch.bool or tuple(mask.shape) not in ((T, T), (B, T, T)):
        raise ValueError(f"mask must be torch.bool ({T}, {T}) or ({B}, {T}, {T}); got {found(mask)}")
    for window in set(windows):
        empty = ~(mask if window is None else mask & band(T, window, mask.device)).any(dim=-1)
        if empty.any():
            within = "" if window is None else f" within the window of {window}"
            row = empty.nonzero()[0].tolist()
            raise ValueError(f"mask row {row} may read nothing{within}; let it read itself at least")


def band(T: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: the `window` keys up to a query, itself included, and as many from it on."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril(window - 1).triu(1 - window)


def check_rows(rows: slice | Tensor | None, *, T: int) -> None:
    """ValueError unless rows is None, a slice or long indices (R,) that select some of T tokens."""
    if rows is None:
        return
    if not isinstance(rows, slice) and (_dtype(rows) != torch.long or rows.dim() != 1):
        raise ValueError(f"rows must be a slice or token indices, torch.long (R,); got {found(rows)}")
    chosen = torch.arange(T)[rows] if isinstance(rows, slice) else rows
    if not chosen.numel() or not 0 <= int(chosen.min()) <= int(chosen.max()) < T:
        raise ValueError(f"rows must select some of the tokens 0 to {T - 1}, got {rows}")


def found(x: object) -> str:
    """What `x` turned out to be, for an error message."""
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _dtype(x: object) -> torch.dtype | None:
    return x.dtype if isinstance(x, Tensor) else None
