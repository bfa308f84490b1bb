"""How linear are the layers of a language model? Scores with their controls, streamed layer by layer.

The score is the R^2 of the best affine map from residual[l] to residual[l + 1] ("with" the residual) or to
what the layer adds ("without"): Razzhigaev et al. 2024, section 3, there in the form called raw here. One row
also holds what the score must be read beside: its corrected forms, norm ratios, the score without the first
token of each window and without the leading principal directions, and the errors token by token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lib.choices import check_choice
from lib.experiments.reading import (
    WEIGHTS,
    Affine,
    ReadingSettings,
    check_layers,
    check_only,
    check_whole,
    layer_streams,
    load,
    losses,
    windows,
)
from lib.experiments.recipe import read_settings
from lib.metrics.intervals import bootstrap
from lib.metrics.linearity import ESTIMATORS, LinearityAccumulator
from lib.models import pretrained
from lib.models.transformer import Transformer

QUANTILES = (0.5, 0.9, 0.99, 1.0)
SHOWN = 5  # tokens with the largest errors, for each layer
BEFORE = 12  # tokens shown before such a token
PASSAGE = 128  # tokens of the window in the middle whose errors are kept one by one
DIGITS = 8  # of what a row holds


@dataclass(frozen=True, kw_only=True)
class LinearitySettings(ReadingSettings):
    """weights: "trained", or "untrained": the same shape with fresh weights, the control.

    groups: parts of the text, neighbouring windows together; intervals leave one out at a time, and held-out
    maps are fitted on every other one. loss_windows: the loss is measured on so many; None: on all.
    only: layers to measure; None: each.
    """

    weights: str = "trained"
    groups: int = 8
    loss_windows: int | None = None
    only: list[int] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choice("weights", self.weights, WEIGHTS)
        check_whole("groups", self.groups, 4)
        if self.groups % 2:
            raise ValueError(f"groups are split into two halves: an even number, got {self.groups}")
        if self.loss_windows is not None:
            check_whole("loss_windows", self.loss_windows, 3)
        check_only(self.only)


def measure_linearity(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Scores of every layer of one model on one text. Settings: the fields of `LinearitySettings`. One row:

    n_tokens, n_windows, n_layers, d_model, parameters, weights_hash, tokens_hash; loss, loss_lo, loss_hi:
    nats a token, bootstrap over windows. layers: those measured. Lists, one value for each of them:
    with_raw, with_adjusted, with_held_out, with_lo, with_hi: R^2 of residual[l + 1] given residual[l], by
    estimator, and a delete-one-group jackknife interval (95 %) of held-out; without_...: of what the layer
    adds; ..._no_first: the same, the first token of every window left out; without_top1, without_top10:
    held-out, both sides projected off the leading principal directions of residual[l];
    norm_ratio, norm_ratio_no_first: centred Frobenius norms, what the layer adds / the stream after it;
    layer_norm, attention_norm, mlp_norm: medians over tokens of |a + m| / |x|, |a| / |x|, |m| / |x + a|;
    cosine: median over tokens, residual[l] and residual[l + 1];
    error_quantiles: 50, 90, 99, 100 % over tokens of |x A + b - y| / |y - x|, maps fitted on the other half
    of the groups; error_tail: 90, 99, 100 % quantiles of |x A + b - y|, divided by its median;
    worst: for the 5 largest errors behind first tokens [window, place, error / median, text before, token];
    passage_errors: error / median of each token of a passage, whose tokens stand in `passage`.

    "austen" is read in its validation split, which our own model was not trained on; other texts whole.
    """
    chosen = read_settings(LinearitySettings, settings)
    model = load(chosen, weights=chosen.weights, seed=seed)
    which = list(range(model.config.n_layers)) if chosen.only is None else chosen.only
    check_layers(model, which)
    tokenizer = pretrained.load_tokenizer(chosen.model)
    tokens = windows(
        chosen.text,
        tokenizer,
        part="evaluation" if chosen.text == "austen" else "all",
        context=chosen.context,
        tokens=chosen.tokens,
        seed=seed,
        vocab=model.config.vocab,
    )
    check_enough(len(tokens), chosen, D=model.config.d_model)
    row = {
        "n_tokens": tokens.numel(),
        "n_windows": len(tokens),
        "n_layers": model.config.n_layers,
        "d_model": model.config.d_model,
        "parameters": model.n_parameters(),
        "weights_hash": model.weights_hash(),
        "tokens_hash": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    measured, last = scores_by_layer(
        model, tokens, tokenizer, only=which, groups=chosen.groups, batch=chosen.batch
    )
    loss = losses(model, last[: chosen.loss_windows], tokens[: chosen.loss_windows])
    interval = bootstrap(loss.tolist(), seed=seed)
    row |= {"loss": loss.mean().item(), "loss_lo": interval.lo, "loss_hi": interval.hi}
    passage = tokens[len(tokens) // 2, :PASSAGE].tolist()
    row["passage"] = [tokenizer.decode([i], skip_special_tokens=False) for i in passage]
    return {**row, **measured}


def scores_by_layer(
    model: Transformer, tokens: Tensor, tokenizer: Tokenizer, *, only, groups: int, batch: int
) -> tuple[dict[str, list], Tensor]:
    """The lists of a row of `measure_linearity`, and residual[L]. tokens: (n, T), groups <= n."""
    parts = torch.arange(len(tokens)).tensor_split(groups)
    row: dict[str, list] = {"layers": sorted(only)}
    for l, x, a, m in layer_streams(model, tokens, batch=batch):
        last = x + a + m
        if l not in only:
            continue
        f = a + m
        rest = accumulate(x[:, 1:], f[:, 1:], parts, directions=True)
        whole = rest + accumulate(x[:, :1], f[:, :1], parts, directions=True)
        found = _scores(whole, rest) | _norms(x, a, m) | _errors(whole, x, f, parts, tokens, tokenizer)
        for name, value in found.items():
            row.setdefault(name, []).append(value)
    return row, last


def check_enough(n: int, chosen: LinearitySettings, *, D: int) -> None:
    """ValueError unless half of the groups, less one, still holds more tokens than a map of width D needs."""
    G, T = chosen.groups, chosen.context
    fewest = (G // 2 - 1) * (n // G) * T
    if n < G or fewest < D + 2:
        need = -(-(D + 2) // ((G // 2 - 1) * T)) * G * T
        raise ValueError(
            f"{n} windows of {T} tokens are too few for width {D} in {G} groups: {max(need, G * T)} "
            f"tokens are needed, 10 * {D} and more are sensible; more tokens, or a longer text"
        )


def accumulate(
    x: Tensor, f: Tensor, parts: tuple[Tensor, ...], *, directions: bool = False
) -> LinearityAccumulator:
    """One layer's sums, each part of the windows a group. x, f: (n, T, D)."""
    sums = LinearityAccumulator(1, x.shape[-1], groups=len(parts), directions=directions, device=x.device)
    for group, part in enumerate(parts):
        sums.add_layer(0, x[part].flatten(0, 1), f[part].flatten(0, 1), group)
    return sums


def fitted(sums: LinearityAccumulator, *, like: Tensor, ridge: float = 0.0, groups=None) -> Affine:
    """The least-squares map of one layer's sums, in the dtype and on the device of `like`."""
    A, b = (part[0] for part in sums.maps(ridge=ridge, groups=groups, dtype=torch.float64))
    return Affine((A - torch.eye(len(A)).to(A)).to(like), b.to(like))


def _scores(whole: LinearityAccumulator, rest: LinearityAccumulator) -> dict[str, float]:
    """whole: of all tokens. rest: without the first of each window."""
    found = {}
    for sums, suffix in ((whole, ""), (rest, "_no_first")):
        for residual, name in ((True, "with"), (False, "without")):
            for estimator in ESTIMATORS:
                key = f"{name}_{estimator.replace('-', '_')}{suffix}"
                found[key] = _rounded(sums.scores(estimator=estimator, residual=residual))
            _, lo, hi = sums.jackknife(residual=residual)
            found |= {f"{name}_lo{suffix}": _rounded(lo), f"{name}_hi{suffix}": _rounded(hi)}
        found[f"norm_ratio{suffix}"] = _rounded(sums.norm_ratio())
    for k in (1, 10):
        if k < whole.d_model:
            found[f"without_top{k}"] = _rounded(whole.scores(residual=False, remove_directions=k))
    return found


def _norms(x: Tensor, a: Tensor, m: Tensor) -> dict[str, float]:
    """Medians over tokens. Norms below 1e-6 count as 1e-6 where they divide."""
    before, middle = x.norm(dim=-1).clamp_min(1e-6), (x + a).norm(dim=-1).clamp_min(1e-6)
    ratios = {
        "layer_norm": (a + m).norm(dim=-1) / before,
        "attention_norm": a.norm(dim=-1) / before,
        "mlp_norm": m.norm(dim=-1) / middle,
        "cosine": cosine_similarity(x, x + a + m, dim=-1),
    }
    return {name: _rounded(ratio.median()) for name, ratio in ratios.items()}


def _errors(
    sums: LinearityAccumulator, x: Tensor, f: Tensor, parts, tokens: Tensor, tokenizer: Tokenizer
) -> dict[str, list]:
    """Errors of each token under the map fitted on the half of the groups that it does not belong to."""
    error = torch.empty(x.shape[:2], dtype=torch.float64)
    for half in (0, 1):
        fit = fitted(sums, like=x, groups=range(half, len(parts), 2))
        here = torch.cat(parts[1 - half :: 2])
        error[here] = (fit.adds(x[here]) - f[here]).norm(dim=-1).double().cpu()
    relative = error / f.norm(dim=-1).double().cpu().clamp_min(1e-6)
    median = error.median()
    q = torch.tensor(QUANTILES, dtype=torch.float64)
    return {
        "error_quantiles": _rounded(torch.quantile(relative.flatten(), q)),
        "error_tail": _rounded(torch.quantile(error.flatten(), q[1:]) / median),
        "worst": _worst(error / median, tokens, tokenizer),
        "passage_errors": [round(e, 3) for e in (error[len(error) // 2, :PASSAGE] / median).tolist()],
    }


def _worst(error: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> list[list]:
    """The tokens of the largest errors, first tokens of windows left aside. error, tokens: (n, T)."""
    T, found = tokens.shape[1], []
    for i in error[:, 1:].flatten().topk(min(SHOWN, error[:, 1:].numel())).indices.tolist():
        window, place = i // (T - 1), i % (T - 1) + 1
        ids = tokens[window].tolist()
        before = tokenizer.decode(ids[max(0, place - BEFORE) : place], skip_special_tokens=False)
        token = tokenizer.decode([ids[place]], skip_special_tokens=False)
        found.append([window, place, round(error[window, place].item(), 3), before, token])
    return found


def _rounded(values: Tensor):
    """Numbers of a row. One value alone stands for itself."""
    values = values.detach().double().flatten().tolist()
    found = [round(value, DIGITS) for value in values]
    return found[0] if len(found) == 1 else found
