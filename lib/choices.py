"""Choices a reader can make, and what happens when they misspell one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

PROFILES = ("quick", "standard", "gpu", "cluster")
DEVICES = ("auto", "cpu", "cuda", "mps")


def check_choice(kind: str, value: str, allowed: Iterable[str]) -> str:
    """`value` if it is one of `allowed`, else a ValueError that names them all and the nearest.

    >>> check_choice("profile", "quick", PROFILES)
    'quick'
    >>> check_choice("profile", "quik", PROFILES)
    Traceback (most recent call last):
    ValueError: unknown profile 'quik'; did you mean 'quick'? Allowed: quick, standard, gpu, cluster
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise ValueError(f"unknown {kind} {value!r}{hint} Allowed: {', '.join(allowed) or 'none'}")


def resolve_device(name: str) -> str:
    """The torch device behind `name`: "auto" takes CUDA, then MPS, then CPU; "cuda:1" names one GPU of many.

    Raises ValueError for an unknown name, and for a device this machine does not have.
    """
    family, _, index = str(name).partition(":")
    check_choice("device", family, DEVICES)
    if index and not (family == "cuda" and index.isdigit()):
        raise ValueError(f"unknown device {name!r}; only CUDA devices take an index, as in 'cuda:1'")
    import torch  # here, so that a misspelt profile is refused before torch is loaded

    if family == "cpu":
        return "cpu"
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if family == "auto":
        return next((device for device, found in has.items() if found), "cpu")
    if not has[family]:
        raise ValueError(f"device {name!r} is not available on this machine; use 'cpu' or 'auto'")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"no device {name!r}: this machine has {torch.cuda.device_count()} GPU(s)")
    return str(name)
