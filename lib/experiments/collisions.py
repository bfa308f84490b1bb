"""One run of the collision adversary: a random quantised layer, and an input on which it must fail."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lib.metrics.bounds import least_bits
from lib.metrics.communication import census, random_layer, verify


def collide(settings: dict, *, seed: int, scratch: Path | None = None) -> dict:
    """Draw one random integer decoder (seed) and run every table through it.

    settings: m, heads, value_dim, bits, score_bits as in `random_layer`. scratch is not used: a run takes
    well under a second.

    -> a JSON-able row: the fields of `Census` (tables, messages, collision as {z, z_prime, j} or None,
    inputs, forced_errors); verified: whether the collision holds token by token, None without one;
    accumulator_bits of this layer; least_bits, below which every layer collides.
    """
    known = {"m", "heads", "value_dim", "bits", "score_bits"}
    if settings.keys() != known:
        raise ValueError(
            f"settings of the collision adversary: missing {sorted(known - settings.keys())}, "
            f"unknown {sorted(settings.keys() - known)}; it takes {sorted(known)}")
    layer = random_layer(**settings, seed=seed)
    found = census(layer)
    verified = None if found.collision is None else verify(layer, found.collision)
    return {
        **asdict(found), "verified": verified, "accumulator_bits": layer.accumulator_bits,
        "least_bits": least_bits(layer.m, layer.heads, layer.value_dim)}
