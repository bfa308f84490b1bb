"""What the layers of a language model contribute, and what skipping one does to the others and the output.

    measure_layers: contributions, cosines, norms and logit lens by layer, effective depths, the two halves
    measure_skips:  effects of skipping each layer on later ones and on the output, at all tokens and at
                    future tokens only; neighbouring layers exchanged; depth scores

Source: Csordás, Manning and Potts 2025, who report means and maxima over few prompts. Here every number has a
bootstrap interval over windows of text; a maximum has none, so medians stand beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.experiments.reading import WEIGHTS, ReadingSettings, check_whole, load, windows
from lib.experiments.recipe import read_settings
from lib.metrics.depth import (
    Contributions,
    Cosines,
    PerPrompt,
    SkipEffects,
    contributions_and_cosines,
    current_and_future,
    depth_score_interval,
    effective_depth_interval,
    layer_swaps,
    logit_lens,
)
from lib.metrics.depth.contributions import COSINES, RATIOS
from lib.metrics.depth.scores import KINDS, RULES, over_prompts
from lib.models import pretrained
from lib.models.transformer import Transformer

DIGITS = 6  # of what a row holds
LENS = ("kl", "kl_reverse", "overlap", "entropy", "confidence")


@dataclass(frozen=True, kw_only=True)
class WindowSettings(ReadingSettings):
    """weights: "trained", or "untrained": the same shape with fresh weights, the control."""

    tokens: int = 3200
    context: int = 64
    weights: str = "trained"

    def __post_init__(self):
        super().__post_init__()
        check_choice("weights", self.weights, WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class LayerSettings(WindowSettings):
    """lens_tokens: tokens of each window that the lens reads, evenly spread. k: best entries compared."""

    lens_tokens: int = 8
    k: int = 5

    def __post_init__(self):
        super().__post_init__()
        check_whole("lens_tokens", self.lens_tokens, 1)
        check_whole("k", self.k, 1)
        if self.lens_tokens > self.context - 1:
            raise ValueError(
                f"lens_tokens={self.lens_tokens}, but a window of {self.context} tokens has "
                f"{self.context - 1} with a next token"
            )


def measure_layers(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Every layer of one model on one text. Settings: the fields of `LayerSettings`. One row:

    n_windows, n_tokens, n_layers, d_model, parameters, weights_hash, tokens_hash.
    For x in attention, mlp, layer: x_ratio, the mean over tokens of |what it adds| / |the stream it reads|,
    for each layer, with x_ratio_lo, x_ratio_hi (bootstrap over windows); x_ratio_median: mean over windows of
    the median over tokens; x_ratio_max; x_halves, .._lo, .._hi: mean over layers of the second half / of the
    first half; x_halves_median: medians over layers in place of means.
    attention_cosine, mlp_cosine, layer_cosine, neighbours_cosine, .._lo, .._hi: means over tokens.
    norm: of the stream at each tap, mean over windows of medians over tokens.
    layer_break, .._lo, .._hi: the layer where log layer_ratio is best cut into two constants.
    All of these once more as .._no_first (.._no_first_lo, ...): first tokens of windows are not counted.
    For tap 0 .. L of the lens: kl (lens to output, nats), kl_reverse, overlap (of the k best), entropy,
    confidence, loss (of the next token), each with .._lo, .._hi.
    cosine_depth, kl_depth, overlap_depth: effective depths in layers by the robust rule, .._lo, .._hi,
    .._reached (bool: the curve does change sides); .._published: by the published rule. Without kl_depth if
    the lens agrees with the output everywhere, as in an untrained model that repeats its input token.

    "austen" is read in its validation split, which our own model was not trained on; other texts whole.
    """
    chosen = read_settings(LayerSettings, settings)
    model, tokens, row = read_windows(chosen, seed=seed)
    for leave_out, suffix in ((1, "_no_first"), (0, "")):
        both = contributions_and_cosines(model, tokens, leave_out=leave_out, batch_size=chosen.batch)
        row |= _contributions(*both, suffix, seed=seed)
    rows = torch.linspace(0, tokens.shape[1] - 2, chosen.lens_tokens + 1)[1:].round().long()
    lens = logit_lens(model, tokens, rows=rows, k=chosen.k, batch_size=chosen.batch)
    for name in LENS:
        row |= numbers(name, lens.mean(name), lens.interval(name, seed=seed))
    nats, between = lens.mean("target_log_probability"), lens.interval("target_log_probability", seed=seed)
    row |= numbers("loss", -nats, -between.flip(0))
    curves = {
        "cosine": torch.stack([getattr(both[1], name).mean for name in RATIOS]).mean(dim=0),
        "kl": lens.per_prompt("kl").T,
        "overlap": lens.per_prompt("overlap").T,
    }
    for kind in KINDS:
        if kind == "kl" and not (curves["kl"].amax(dim=1) > 0).all():
            continue
        for rule in RULES:
            depth, (lo, hi) = effective_depth_interval(curves[kind], kind, rule=rule, seed=seed)
            name = f"{kind}_depth" + ("_published" if rule == "published" else "")
            row |= {name: depth.layer, f"{name}_lo": lo, f"{name}_hi": hi, f"{name}_reached": depth.reached}
    return row


def layer_table(row: Mapping) -> pd.DataFrame:
    """A row of `measure_layers`, one line a layer: what it adds, and the lens on the stream after it."""
    frame = pd.DataFrame({"layer": range(row["n_layers"])})
    for name in ("attention_ratio", "mlp_ratio", "layer_ratio"):
        frame[name] = row[f"{name}_no_first"]
    for name in ("layer_cosine", "neighbours_cosine"):
        frame[name] = row[f"{name}_no_first"]
    for name in ("kl", "overlap", "entropy", "loss"):
        frame[f"{name}_after"] = row[name][1:]
    return frame


def _contributions(ratios: Contributions, cosines: Cosines, suffix: str, *, seed: int) -> dict:
    found = {f"norm{suffix}": rounded(ratios.norm.average("median"))}
    for name in RATIOS:
        values: PerPrompt = getattr(ratios, name)
        found |= over_windows(f"{name}_ratio{suffix}", values, seed=seed)
        found[f"{name}_ratio_median{suffix}"] = rounded(values.average("median"))
        found[f"{name}_ratio_max{suffix}"] = rounded(values.max())
        for way in (np.mean, np.median):
            key = f"{name}_halves" + ("" if way is np.mean else "_median")
            found |= statistic(key + suffix, values.mean, _halves(way), seed=seed)
    for name in COSINES:
        found |= over_windows(f"{name}_cosine{suffix}", getattr(cosines, name), seed=seed)
    return found | statistic(f"layer_break{suffix}", ratios.layer.mean, _break, seed=seed)


def _halves(way: Callable) -> Callable[[np.ndarray], np.ndarray]:
    """(R, P, L) -> (R,): the mean over prompts, then `way` over the later layers / over the earlier ones."""

    def ratio(sample: np.ndarray) -> np.ndarray:
        curve = sample.mean(axis=1)
        half = curve.shape[1] // 2
        return way(curve[:, half:], axis=1) / way(curve[:, :half], axis=1)

    return ratio


def _break(sample: np.ndarray) -> np.ndarray:
    """(R, P, L) -> (R,): the layer l >= 1 from which a second constant fits log(mean over prompts) best."""
    curve = np.log(np.maximum(sample.mean(axis=1), 1e-12))  # (R, L)
    L = curve.shape[1]
    total, before = curve.sum(axis=1, keepdims=True), curve.cumsum(axis=1)[:, :-1]  # l = 1 ... L - 1
    n = np.arange(1, L)
    explained = before**2 / n + (total - before) ** 2 / (L - n)  # least squares: the largest
    return 1.0 + explained.argmax(axis=1)


@dataclass(frozen=True, kw_only=True)
class SkipSettings(WindowSettings):
    """positions: places t of each window before which layers are skipped, to see later tokens.

    sublayer: None, "attention" or "mlp". local: without propagation. output_tokens: the last tokens of a
    window, where the output is compared. swap_windows: windows in which neighbouring layers are exchanged.
    streams: edited streams in one pass: memory and speed, not results.
    """

    tokens: int = 2000
    context: int = 40
    positions: int = 4
    sublayer: str | None = None
    local: bool = False
    output_tokens: int = 4
    swap_windows: int = 12
    streams: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name, low in (("positions", 1), ("output_tokens", 2), ("swap_windows", 3), ("streams", 1)):
            check_whole(name, getattr(self, name), low)
        if self.output_tokens > self.context - 1:
            raise ValueError(f"output_tokens={self.output_tokens} of a window of {self.context} tokens")


def measure_skips(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Every layer of one model skipped in turn. Settings: the fields of `SkipSettings`. One row:

    n_windows ... tokens_hash as in `measure_layers`. E[s, l]: relative change of what layer l > s adds when s
    is skipped, for "now": at all tokens, "later": at tokens before t, E at those from t on.
    For x in now, later: x_max, x_median: E (L, L), largest over tokens and windows; median over windows of
    means over tokens. x_output, .._lo, .._hi: for each s |y - y'|, mean over tokens; x_output_max.
    x_early, x_late: mean E[s, l] over pairs with s in the first and in the second half of the layers;
    x_early_within: over pairs with both layers in the first half, as many pairs as x_late; .._lo, .._hi;
    these three also as .._peak: of the largest value of each window in place of the mean over tokens.
    early_kept, late_kept: later / now of the means above, the share that reaches later tokens;
    output_early_kept, output_late_kept: the same of the output's change; .._lo, .._hi.
    x_score: depth score of E, means over windows; x_score_max: of the largest; x_output_score: of the output.
    Without x_output_score and output_.._kept if no skip changes the output of some window: an untrained model
    with a tied readout repeats its input token with certainty.
    swap_output, swap_nats, .._lo, .._hi: layers l and l + 1 exchanged, l = 0 .. L - 2: change of the output,
    and of the loss in nats.
    """
    chosen = read_settings(SkipSettings, settings)
    model, tokens, row = read_windows(chosen, seed=seed)
    L = model.config.n_layers
    if L < 4:
        raise ValueError(f"the halves of a model of {L} layers hold no pairs of layers: 4 are needed")
    both = current_and_future(
        model,
        tokens,
        positions=chosen.positions,
        sublayer=chosen.sublayer,
        local=chosen.local,
        output_rows=slice(-chosen.output_tokens, None),
        batch_size=chosen.streams,
        seed=seed,
    )
    for name, effects in zip(("now", "later"), both, strict=True):
        row |= _effects(name, effects, seed=seed)
    row |= _kept(*both, seed=seed)
    swaps = layer_swaps(
        model,
        tokens[_spread(len(tokens), chosen.swap_windows)],
        output_rows=slice(-chosen.output_tokens, None),
        batch_size=chosen.streams,
    )
    return (
        row
        | over_windows("swap_output", swaps.output, seed=seed)
        | over_windows("swap_nats", swaps.added_nats, seed=seed)
    )


def _effects(name: str, effects: SkipEffects, *, seed: int) -> dict:
    found = {
        f"{name}_max": rounded(effects.max(), digits=4),
        f"{name}_median": rounded(effects.quantile(0.5, of="mean"), digits=4),
        f"{name}_output_max": rounded(effects.output.max()),
        **over_windows(f"{name}_output", effects.output, seed=seed),
    }
    regions = _regions(effects.layers.mean.shape[-1])
    for of, suffix in (("mean", ""), ("peak", "_peak")):
        for region, pairs in regions.items():
            per_window = effects.layers.read(of)[:, *pairs].mean(dim=1)
            found |= statistic(f"{name}_{region}{suffix}", per_window, _mean, seed=seed)
    scores = [("score", effects.layers.mean, "mean"), ("score_max", effects.layers.peak, "max")]
    if any_effect(effects.output.mean):
        scores.append(("output_score", effects.output.mean, "mean"))
    for key, values, reduce in scores:
        value, (lo, hi) = depth_score_interval(values, reduce=reduce, seed=seed)
        found |= {f"{name}_{key}": value, f"{name}_{key}_lo": lo, f"{name}_{key}_hi": hi}
    return found


def any_effect(effects: Tensor) -> bool:
    """(P, L): whether in every prompt some layer has an effect, so that the effects can be compared."""
    return bool((effects.sum(dim=1) > 0).all())


def _regions(L: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs s < l of layers: s early; s late; both early, with the middle layer where L is odd."""
    s, l = torch.triu_indices(L, L, 1)
    half = L // 2
    masks = {"early": s < half, "late": s >= half, "early_within": l < L - half}
    return {name: (s[mask], l[mask]) for name, mask in masks.items()}


def _kept(now: SkipEffects, later: SkipEffects, *, seed: int) -> dict:
    """later / now, of E and of the output, for early and late layers skipped."""
    L = now.layers.mean.shape[-1]
    regions, found = _regions(L), {}
    for name, half in (("early", slice(None, L // 2)), ("late", slice(L // 2, None))):
        pairs = [effects.layers.mean[:, *regions[name]].mean(dim=1) for effects in (later, now)]
        found |= statistic(f"{name}_kept", torch.stack(pairs, dim=1), _quotient, seed=seed)
        pairs = [effects.output.mean[:, half].mean(dim=1) for effects in (later, now)]
        if not any_effect(now.output.mean[:, half]):
            continue
        found |= statistic(f"output_{name}_kept", torch.stack(pairs, dim=1), _quotient, seed=seed)
    return found


# What the experiments of this chapter share


def read_windows(chosen: WindowSettings, *, seed: int) -> tuple[Transformer, Tensor, dict]:
    """The model, its windows (n, T), and what every row says of both."""
    model = load(chosen, weights=chosen.weights, seed=seed)
    tokens = windows(
        chosen.text,
        pretrained.load_tokenizer(chosen.model),
        part="evaluation" if chosen.text == "austen" else "all",
        context=chosen.context,
        tokens=chosen.tokens,
        seed=seed,
        vocab=model.config.vocab,
    )
    return model, tokens, {"n_windows": len(tokens), "n_tokens": tokens.numel(), **described(model, tokens)}


def described(model: Transformer, tokens: Tensor) -> dict:
    """What a row says of a model and its input."""
    return {
        "n_layers": model.config.n_layers,
        "d_model": model.config.d_model,
        "parameters": model.n_parameters(),
        "weights_hash": model.weights_hash(),
        "tokens_hash": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }


def over_windows(name: str, values: PerPrompt, *, seed: int) -> dict[str, list]:
    """Means over tokens, averaged over windows, with the bootstrap interval over windows."""
    return numbers(name, values.average(), values.interval(seed=seed, of="mean", statistic="mean"))


def numbers(name: str, mean: Tensor, between: Tensor) -> dict[str, list]:
    """between: (2, …), lo and hi."""
    lo, hi = between
    return {name: rounded(mean), f"{name}_lo": rounded(lo), f"{name}_hi": rounded(hi)}


def statistic(name: str, sample: Tensor, value: Callable, *, seed: int) -> dict[str, float]:
    """value: resamples (R, P, …) -> (R,), of whole prompts. sample: (P, …)."""
    sample = np.asarray(sample, dtype=float)
    lo, hi = over_prompts(sample, value, seed=seed)
    found = {name: float(value(sample[None])[0]), f"{name}_lo": lo, f"{name}_hi": hi}
    return {key: round(x, DIGITS) for key, x in found.items()}


def rounded(values: Tensor, *, digits: int = DIGITS) -> list:
    """Numbers of a row, nested as in the tensor."""
    return np.round(np.asarray(values.detach().cpu(), dtype=float), digits).tolist()


def _mean(sample: np.ndarray) -> np.ndarray:
    return sample.mean(axis=1)


def _quotient(sample: np.ndarray) -> np.ndarray:
    """(R, P, 2) -> (R,): the mean of the first over that of the second."""
    top, bottom = sample.mean(axis=1).T
    return top / bottom


def _spread(n: int, count: int) -> Tensor:
    """At most `count` of n windows, evenly spread."""
    return torch.arange(min(n, count)) * n // min(n, count)
