"""One number for the depth a model uses: the depth score of layer effects, and effective depths of curves.

    depth score = Σ_s s e_s / Σ_s e_s,   e_s = (Σ_{l > s} E[s, l]) / max(1, layers after s),

E the effect matrix of skips (row: layer skipped, column: later layer), or e_s the effect on the output.

An effective depth is the place where a curve over depth changes sides. With a margin c_l, positive on the
late side (cosine: c = cos; KL: c = 1/2 − KL / max KL; overlap: c = overlap − 0.3), the published rules take
one crossing: for the cosine the *last* l where it turns from c < 0 to c >= 0, else the *first* l with c > 0.
They fail: one early dip of the KL or one early overlap decides alone (layer 1 of 28 for a distilled model,
facts C.3 #6), and so does one huge KL at the embeddings, which sets the bar for all others; one late dip of
the cosine decides alone; a curve that never crosses has no answer. The robust rule asks all layers at once
for the place that best separates the sides,

    l* = argmax_l (Σ_{i >= l} c_i − Σ_{i < l} c_i) = argmin_l Σ_{i < l} c_i   (the first such l),

and measures KL in units of its upper quartile over the taps, not of its maximum: up to a quarter of the taps
may be outliers, but a model that settles within its first quarter is placed too late. With the same units the
rules agree where the margin changes sign once, upwards (derived; tested).

Sources: Csordás, Manning and Potts 2025 (facts C.1 #8); the three effective depths from the follow-up "What
Affects Effective Depth", read in its code (facts C.2). The robust rule and the intervals: derived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lib.choices import check_choice
from lib.metrics.intervals import Interval

KINDS = {"cosine": 0.0, "kl": 0.5, "overlap": 0.3}  # the threshold of each; for KL a part of its unit
RULES = ("published", "robust")
REDUCTIONS = ("max", "mean", "median")


def depth_score(effects: object, *, from_one: bool = True) -> float:
    """Mean depth of the layers, weighted by effect. Unit: layers, from 1 (paper) or 0 (its code).

    effects: (L, L), E[s, l] the effect of skipping s on layer l; or (L,), the effects on the output.
    Only l > s counts: the diagonal of an all-token skip (1 everywhere) says nothing about later ones. So the
    last row is 0. Range: 1 to L − 1 for a matrix, 1 to L for output effects.
    ValueError on negative or non-finite effects, on effects all 0, and on a value below the diagonal.
    """
    return float(_depth_scores(_array(effects)[None], from_one)[0])


def depth_score_interval(
    effects: object,
    *,
    seed: int,
    reduce: str = "max",
    from_one: bool = True,
    level: float = 0.95,
    resamples: int = 2_000,
) -> tuple[float, Interval]:
    """The score of the effects reduced over prompts, with its bootstrap interval over prompts.

    effects: (P, L, L) or (P, L), P >= 3 prompts. reduce over prompts: "max" (the paper's), "mean", "median".
    A resample never exceeds the sample's maximum, so the interval of "max" is that of a biased statistic:
    read it beside that of the mean.
    """
    check_choice("reduction", reduce, REDUCTIONS)
    values = _array(effects, prompts=True)
    over = {"max": np.max, "mean": np.mean, "median": np.median}[reduce]

    def score(sample: np.ndarray) -> np.ndarray:  # (R, P, …) -> (R,)
        return _depth_scores(over(sample, axis=1), from_one)

    return float(score(values[None])[0]), over_prompts(
        values, score, seed=seed, level=level, resamples=resamples
    )


@dataclass(frozen=True)
class EffectiveDepth:
    """Where a curve changes sides."""

    layer: int  # a tap or layer; the length of the curve if it never does
    fraction: float  # of the depth of the model, at most 1
    reached: bool  # whether it does


def effective_depth(
    curve: object, kind: str, *, rule: str = "robust", threshold: float | None = None
) -> EffectiveDepth:
    """The effective depth of one curve over depth; rules and their failures stand in the module's docstring.

    curve: "cosine": (L,), for each layer the mean of its attention, MLP and layer cosines;
           "kl", "overlap": (L + 1,), lens against output, taps 0 to L (tap l: l layers have run).
    rule: "robust" or "published". threshold: 0 for cosine, 0.5 (units of KL, by rule), 0.3 for overlap.
    The fraction is layer / L. ValueError on curves that are not flat, too short or not finite, and on a KL
    curve without a positive value: a lens that never differs from the output leaves no depth to measure.
    """
    values = _curves(np.asarray(_numpy(curve))[None], kind)
    check_choice("rule", rule, RULES)
    layer, L = int(_change(values, kind, rule, threshold)[0]), _depth(values.shape[1], kind)
    return EffectiveDepth(layer, min(1.0, layer / L), layer < values.shape[1])


def effective_depth_interval(
    curves: object,
    kind: str,
    *,
    seed: int,
    rule: str = "robust",
    threshold: float | None = None,
    level: float = 0.95,
    resamples: int = 2_000,
) -> tuple[EffectiveDepth, Interval]:
    """The effective depth of the mean curve over prompts, and the bootstrap interval of its layer.

    curves: (P, L) or (P, L + 1), one curve for each of P >= 3 prompts (`Lens.per_prompt(…).T`).
    """
    values = _curves(np.asarray(_numpy(curves)), kind)
    check_choice("rule", rule, RULES)

    def layer(sample: np.ndarray) -> np.ndarray:  # (R, P, n) -> (R,)
        return _change(sample.mean(axis=1), kind, rule, threshold).astype(float)

    interval = over_prompts(values, layer, seed=seed, level=level, resamples=resamples)
    return effective_depth(values.mean(axis=0), kind, rule=rule, threshold=threshold), interval


def effective_depths(*, cosine: object, kl: object, overlap: object) -> dict[str, dict[str, EffectiveDepth]]:
    """All three by both rules: {"cosine": {"published": …, "robust": …}, "kl": …, "overlap": …}."""
    curves = {"cosine": cosine, "kl": kl, "overlap": overlap}
    return {
        kind: {rule: effective_depth(curve, kind, rule=rule) for rule in RULES}
        for kind, curve in curves.items()
    }


def over_prompts(
    sample: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2_000,
) -> Interval:
    """Percentile bootstrap interval of a statistic of whole prompts. sample: (P, …), P >= 3.

    statistic: takes resamples (R, P, …), returns (R,). For means and medians of numbers there is
    `lib.metrics.intervals.bootstrap`. Source: Efron 1979.
    """
    P = len(sample)
    if P < 3:
        raise ValueError(f"an interval over prompts needs at least 3, got {P}")
    if not 0 < level < 1:
        raise ValueError(f"level is a probability strictly between 0 and 1, got {level}")
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // sample.size)  # at most 32 MB of resampled values at a time
    found = [
        statistic(sample[generator.integers(P, size=(min(chunk, resamples - done), P))])
        for done in range(0, resamples, chunk)
    ]
    lo, hi = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(lo), float(hi))


def _depth_scores(effects: np.ndarray, from_one: bool) -> np.ndarray:
    """(R, L, L) or (R, L) -> (R,)."""
    L = effects.shape[-1]
    if effects.ndim == 3:
        later = np.maximum(1, L - 1 - np.arange(L))
        effects = np.triu(effects, 1).sum(axis=-1) / later  # (R, L)
    total = effects.sum(axis=-1)
    if (total == 0).any():
        raise ValueError("every effect is 0: no layer has a weight, so there is no depth score")
    return effects @ (np.arange(L) + float(from_one)) / total


def _array(effects: object, *, prompts: bool = False) -> np.ndarray:
    """Effects as float64, (L,) or (L, L), with prompts (P, L) or (P, L, L); refused if they are none."""
    values = _numpy(effects)
    own, lead = values.shape[prompts:], "P, " if prompts else ""
    if len(own) not in (1, 2) or not all(own) or (len(own) == 2 and own[0] != own[1]):
        raise ValueError(f"effects are ({lead}L, L) or ({lead}L,), got shape {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("effects are norms, so at least 0 and finite; some of these are not")
    if len(own) == 2:
        if own[0] < 2:
            raise ValueError("an effect matrix needs two layers at least: one layer has no later ones")
        below = np.tril(values, -1)
        if below.any():
            place = tuple(int(i) for i in np.argwhere(below)[0][-2:])
            raise ValueError(
                f"effect {place} (layer skipped, layer measured) is below the diagonal: skipping a "
                "layer cannot change an earlier one. Rows are the skipped layers; was the matrix transposed?"
            )
    return values


def _curves(values: np.ndarray, kind: str) -> np.ndarray:
    check_choice("kind", kind, KINDS)
    if values.ndim != 2 or values.shape[1] < (1 if kind == "cosine" else 2):
        raise ValueError(f"a {kind} curve is flat, a value for each depth; got shape {values.shape[1:]}")
    if not np.isfinite(values).all():
        raise ValueError(f"the {kind} curve holds values that are not finite")
    return values


def _change(curves: np.ndarray, kind: str, rule: str, threshold: float | None) -> np.ndarray:
    """The place of change (R,) of curves (R, n); n where there is none."""
    bar, n = KINDS[kind] if threshold is None else threshold, curves.shape[1]
    if kind == "kl":
        unit = curves.max(axis=1, keepdims=True)
        if (unit <= 0).any():
            raise ValueError("the KL curve has no positive value: the lens never differs from the output")
        if rule == "robust":  # a quartile of 0: the lens is settled at most taps, and the maximum is the unit
            quartile = np.quantile(curves, 0.75, axis=1, keepdims=True)
            unit = np.where(quartile > 0, quartile, unit)
        margin = bar - curves / unit
    else:
        margin = curves - bar
    if rule == "robust":
        sums = np.concatenate([np.zeros((len(margin), 1)), margin.cumsum(axis=1)], axis=1)  # (R, n + 1)
        return sums.argmin(axis=1)
    if kind == "cosine":
        turns = (margin[:, 1:] >= 0) & (margin[:, :-1] < 0)  # at layers 1 … n − 1
        last = n - 1 - turns[:, ::-1].argmax(axis=1)
        never = np.where((margin[:, 0] >= 0), 0, n)  # on the late side from the start, or never there
        return np.where(turns.any(axis=1), last, never)
    late = margin > 0
    return np.where(late.any(axis=1), late.argmax(axis=1), n)


def _depth(n: int, kind: str) -> int:
    return n if kind == "cosine" else n - 1


def _numpy(values: object) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=float)
