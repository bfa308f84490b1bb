"""What one layer is worth: the loss when it is skipped or replaced by an affine map, and what that saves.

    row = layer_costs({"model": "austen", "text": "austen"}, seed=0)
    write_table(recommendations(row), "build/layers.csv")

Skipping layer l makes residual[l + 1] = residual[l]; replacing it, residual[l] A + b, the least-squares map
of the unchanged model on *other* text (Razzhigaev et al. 2024, section 3.4, use such maps for pruning).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.experiments.linearity import DIGITS, accumulate, fitted
from lib.experiments.reading import (
    Affine,
    ReadingSettings,
    check_layers,
    check_only,
    check_whole,
    layer_sizes,
    layer_streams,
    load,
    losses_under,
    step,
    windows,
)
from lib.experiments.recipe import read_settings
from lib.metrics.intervals import bootstrap, paired_bootstrap
from lib.models import pretrained
from lib.models.transformer import Transformer
from lib.tasks.text import FILES

HALVES = 2  # groups of the fit text: the held-out score needs two
TOLERANCE = 0.1  # nats a token: 10 % of the perplexity


@dataclass(frozen=True, kw_only=True)
class CostSettings(ReadingSettings):
    """tokens: of the evaluation part of `text`. fit_tokens: of the fit part of `fit_text` (None: of `text`).

    ridge: share of its diagonal added to the covariance of x when a map is fitted; a large one ends at x + b.
    """

    tokens: int = 2048
    fit_tokens: int = 16_384
    fit_text: str | None = None
    ridge: float = 0.0
    only: list[int] | None = None  # layers to change, one at a time; None: each

    def __post_init__(self):
        super().__post_init__()
        check_fit(self)
        check_only(self.only)


def layer_costs(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Each layer of a model changed, one at a time. Settings: the fields of `CostSettings`. One row:

    loss, loss_lo, loss_hi: nats a token of the unchanged model on the evaluation text, bootstrap over
    windows; layers: which were changed; for each of them skip_cost, replace_cost: increase of the loss, nats
    a token, with ..._lo, ..._hi (paired bootstrap over windows, 95 %); score_with, score_without: held-out
    linearity on the fit text; n_fit, n_evaluated: tokens; layer_parameters, map_parameters, model_parameters,
    layer_flops, map_flops, model_flops: exact, on a prompt of `context` tokens; weights_hash.
    """
    chosen = read_settings(CostSettings, settings)
    model = load(chosen)
    which = list(range(model.config.n_layers)) if chosen.only is None else chosen.only
    check_layers(model, which)
    fit, evaluation = fit_and_evaluation(chosen, model, seed=seed)
    maps, scores = affine_maps(model, fit, only=which, ridge=chosen.ridge, batch=chosen.batch)
    plans = [{}] + [{l: None} for l in which] + [{l: maps[l]} for l in which]
    found = losses_under(model, evaluation, plans, batch=chosen.batch)  # (plans, windows)
    base, skipped, replaced = found[0], found[1 : 1 + len(which)], found[1 + len(which) :]
    return {
        **interval("loss", base, seed=seed),
        "layers": which,
        **increases("skip_cost", skipped, base, seed=seed),
        **increases("replace_cost", replaced, base, seed=seed),
        "score_with": [round(scores[l][0], DIGITS) for l in which],
        "score_without": [round(scores[l][1], DIGITS) for l in which],
        "n_fit": fit.numel(),
        "n_evaluated": evaluation.numel(),
        **layer_sizes(model, chosen.context),
        "weights_hash": model.weights_hash(),
    }


def check_fit(chosen) -> None:
    """ValueError unless fit_text, fit_tokens and ridge are possible."""
    if chosen.fit_text is not None:
        check_choice("fit_text", chosen.fit_text, FILES)
    check_whole("fit_tokens", chosen.fit_tokens, 3 * chosen.context)
    if not 0 <= chosen.ridge < float("inf"):
        raise ValueError(f"ridge is a number of at least 0, got {chosen.ridge!r}")


def fit_and_evaluation(chosen, model: Transformer, *, seed: int) -> tuple[Tensor, Tensor]:
    """Windows to fit on and windows to judge on, (n, context) each; they share no document."""
    tokenizer = pretrained.load_tokenizer(chosen.model)
    shared = {"context": chosen.context, "seed": seed, "vocab": model.config.vocab}
    fit_text = chosen.fit_text or chosen.text
    fit = windows(fit_text, tokenizer, part="fit", tokens=chosen.fit_tokens, **shared)
    D = model.config.d_model
    if fit.numel() < 2 * (D + 2) + chosen.context:
        raise ValueError(
            f"{fit.numel()} tokens of {fit_text} are too few to fit maps of width {D}: "
            f"{2 * (D + 2) + chosen.context} are needed, 10 * {D} and more are sensible"
        )
    return fit, windows(chosen.text, tokenizer, part="evaluation", tokens=chosen.tokens, **shared)


def affine_maps(
    model: Transformer, tokens: Tensor, *, only=None, ridge: float = 0.0, batch: int = 4
) -> tuple[dict[int, Affine], dict[int, tuple[float, float]]]:
    """For each layer the least-squares map on the unchanged model's streams, and its held-out scores.

    tokens: (n, T). Scores: (with the residual, without), R^2.
    """
    maps, scores = {}, {}
    parts = torch.arange(len(tokens)).tensor_split(HALVES)
    for l, x, a, m in layer_streams(model, tokens, batch=batch):
        if only is None or l in only:
            sums = accumulate(x, a + m, parts)
            maps[l] = fitted(sums, ridge=ridge, like=x)
            scores[l] = tuple(sums.scores(residual=residual).item() for residual in (True, False))
    return maps, scores


def interval(name: str, values: Tensor, *, seed: int) -> dict[str, float]:
    """Mean over windows with its bootstrap interval. values: (n,)."""
    lo, hi = bootstrap(values.tolist(), seed=seed)
    return {name: values.mean().item(), f"{name}_lo": lo, f"{name}_hi": hi}


def increases(name: str, changed: Tensor, base: Tensor, *, seed: int) -> dict[str, list[float]]:
    """Mean increase over windows for each change, paired. changed: (changes, n), base: (n,)."""
    pairs = [paired_bootstrap(losses.tolist(), base.tolist(), seed=seed) for losses in changed]
    return {
        name: [round(value, DIGITS) for value in (changed - base).mean(dim=1).tolist()],
        f"{name}_lo": [round(pair.lo, DIGITS) for pair in pairs],
        f"{name}_hi": [round(pair.hi, DIGITS) for pair in pairs],
    }


def recommendations(
    row: Mapping, *, tolerance: float = TOLERANCE, layer_s: float | None = None, map_s: float | None = None
) -> pd.DataFrame:
    """One line a layer of a row of `layer_costs`: linearity, costs, what is saved, and what one could do.

    The rule: "drop" if the upper end of the skip cost's interval (skip, skip_lo, skip_hi) is below
    `tolerance`, nats a token; else "linearise" if that of the replacement is (replace, ...); else "keep".
    Each layer was changed alone: several together cost more, see `lib.experiments.simplify`.
    saves_...: of what is recommended; of dropping, where that is "keep"; share_...: of the whole model.
    layer_s, map_s: measured seconds of one layer and of one map (`layer_seconds`), for the column saves_ms.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is a number of nats above 0, got {tolerance}")
    frame = pd.DataFrame({"layer": row["layers"]})
    for name in ("score_with", "score_without"):
        frame[name] = row[name]
    for name in ("skip", "replace"):
        for end in ("", "_lo", "_hi"):
            frame[name + end] = row[f"{name}_cost{end}"]
    frame["recommendation"] = "keep"
    frame.loc[frame["replace_hi"] < tolerance, "recommendation"] = "linearise"
    frame.loc[frame["skip_hi"] < tolerance, "recommendation"] = "drop"
    mapped = frame["recommendation"] == "linearise"
    for what in ("parameters", "flops"):
        frame[f"saves_{what}"] = row[f"layer_{what}"] - mapped * row[f"map_{what}"]
        frame[f"share_{what}"] = frame[f"saves_{what}"] / row[f"model_{what}"]
    if layer_s is not None:
        frame["saves_ms"] = 1e3 * (layer_s - mapped * (map_s or 0.0))
    return frame


def write_table(frame: pd.DataFrame, path: Path | str) -> Path:
    """The table as CSV, folders made as needed. Returns where it is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    return path


@torch.no_grad()
def layer_seconds(model: Transformer, tokens: Tensor, *, repeats: int = 7) -> tuple[float, float]:
    """Median wall seconds of one layer and of one map on windows (B, T). A timing: it differs between runs.

    Layers have one shape, so the middle one stands for all; the map is the identity, of the same cost as any.
    """
    D, l = model.config.d_model, model.config.n_layers // 2
    x = model.embed(tokens)
    identity = Affine(torch.zeros(D, D).to(x), torch.zeros(D).to(x))
    times: dict[str, list[float]] = {"layer": [], "map": []}
    for _ in range(repeats + 1):  # the first warms up
        for name, run in (("layer", lambda: step(model, l, x, {})), ("map", lambda: identity(x))):
            start = time.perf_counter()
            run()
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times[name].append(time.perf_counter() - start)
    return statistics.median(times["layer"][1:]), statistics.median(times["map"][1:])
