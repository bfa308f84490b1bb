"""Train a small language model on the novels, and watch its layers while it learns.

The model is `lib.models.transformer` with RMSNorm, RoPE and a GELU MLP without biases; its tokens are the
1,024 entries of `lib.tasks.text`. A regulariser may pull neighbouring layers together: with e_l the stream
before layer l (e_L after the last, before the final norm),

    loss = cross-entropy + strength · Σ_l penalty(e_l, e_{l+1}), averaged over tokens,
    cosine: 1 - cos(e_l, e_{l+1}),   mse: ||e_{l+1} - e_l||², a sum over coordinates.

Step 0 is the untrained control of every curve. Regularisers: Razzhigaev et al. 2024, section 4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.probes import commonest, probe_layers, probe_text, spread
from lib.experiments.recipe import read_settings
from lib.metrics.linearity import LinearityAccumulator
from lib.models.transformer import Skip, Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.paths import BUILD
from lib.tasks import text
from lib.training import History, fit, seeds_by_role

REGULARISERS = ("none", "cosine", "mse")
OVER_LAYERS = ("sum", "mean")
GROUPS = 8  # of the validation text: halves of the held-out score, and parts of the jackknife
EXPORTED = BUILD / "austen-trained.safetensors"
CURVES = ("with", "without", "norm_ratio", "token_norm_ratio", "cosine")


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """L layers of width d_model on windows of T tokens. steps x batch x T tokens are read in training."""

    L: int
    d_model: int
    n_heads: int
    d_mlp: int
    T: int  # tokens a window
    batch: int  # windows a step
    steps: int
    tied: bool = False  # the readout is the transposed embedding
    adamw_lr: float = 3e-3
    warmup: int = 50  # steps; the rate falls linearly over the second half
    regulariser: str = "none"  # none | cosine | mse
    strength: float = 0.0
    over_layers: str = "sum"  # of the penalties: sum, as published, or mean
    evaluation_chunks: int = 64  # windows of validation text that the curves are measured on
    probe_chunks: int = 0  # windows that probes are fitted on, and a quarter to judge them; 0: no probes
    export: bool = False  # keep the final weights in build/, for `lib.experiments.embed`
    device: str = "cpu"

    def __post_init__(self):
        counts = ("L", "d_model", "n_heads", "d_mlp", "T", "batch", "steps", "evaluation_chunks")
        for name in (*counts, "warmup", "probe_chunks"):
            value, least = getattr(self, name), 1 if name in counts else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")
        check_choice("regulariser", self.regulariser, REGULARISERS)
        check_choice("over_layers", self.over_layers, OVER_LAYERS)
        if not 0 <= self.strength < math.inf or (self.strength > 0) != (self.regulariser != "none"):
            raise ValueError(
                "a regulariser has a strength above 0, and 'none' has 0; "
                f"got regulariser={self.regulariser!r}, strength={self.strength}"
            )
        if self.evaluation_chunks < GROUPS or 0 < self.probe_chunks < 4:
            raise ValueError(
                f"evaluation_chunks is at least {GROUPS} and probe_chunks 0 or at least 4, "
                f"got {self.evaluation_chunks} and {self.probe_chunks}"
            )

    def model(self, *, vocab: int, seed: int) -> Transformer:
        """Untrained. A tied readout starts with a final scale of 1/sqrt(d_model): unscaled, its first logits
        would be dozens of nats for the token itself."""
        config = TransformerConfig(
            vocab=vocab, d_model=self.d_model, n_heads=self.n_heads, n_layers=self.L, d_mlp=self.d_mlp,
            norm="rms", activation="gelu", positions="rope", tied=self.tied, mlp_bias=False,
        )  # fmt: skip
        model = Transformer(config, seed=seed)
        if self.tied:
            with torch.no_grad():
                model.norm.weight.fill_(self.d_model**-0.5)
        return model


def train_language_model(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One language model. Settings: the fields of `LanguageSettings`. One row:

    loss_nats, loss_nats_per_character: cross-entropy on the whole validation split; loss_unigram: of the best
    guess that ignores the context; untrained_loss_nats.
    measured_at: steps (0, 10, 30, 100, …, all) of the curves, lists of that length: loss_curve, and for each
    layer (steps x L) with_curve, without_curve (held-out linearity with and without residual),
    norm_ratio_curve (||F|| / ||Y||, centred), token_norm_ratio_curve (median over tokens of ||f|| / ||x||),
    cosine_curve (mean over tokens of cos(e_l, e_{l+1})); all on `evaluation_chunks` validation windows.
    with_, without_ raw, adjusted, lo, hi: at the end, the other estimators and the 95 % jackknife interval of
    the held-out score over 8 parts of the text. skip_cost: nats that leaving out a layer adds, by layer.
    probe_, untrained_probe_, majority_: accuracies of `lib.experiments.probes`, with probe_chunks > 0.
    The rest: tokens_trained, n_tokens (measured), training_loss (of the last 50 steps, with the penalty),
    parameters, hashes of weights and text, seeds.
    """
    chosen = read_settings(LanguageSettings, settings)
    windows = evaluation_windows(chosen.T, chosen.evaluation_chunks)
    model, history = train_model(chosen, windows, seed=seed, scratch=scratch)
    first = measure(_untrained(chosen, seed), windows)
    measured = [(0, first)] + [(step, scores) for step, scores in history.evaluations if "loss" in scores]
    row = {
        "measured_at": [step for step, _ in measured],
        "loss_curve": [scores["loss"] for _, scores in measured],
        **{f"{name}_curve": [_layers(s, name, chosen.L) for _, s in measured] for name in CURVES},
        **final_scores(model, windows),
        "skip_cost": skip_costs(model, windows),
        **_losses(model, chosen, seed),
        "training_loss": sum(history.loss[-50:]) / len(history.loss[-50:]),
        "tokens_trained": chosen.steps * chosen.batch * chosen.T,
        "n_tokens": windows.numel(),
        "step0_hash": history.step0,
        "weights_hash": model.weights_hash(),
        "text_hash": hashlib.sha256(text.austen_tokens("train").numpy().tobytes()).hexdigest(),
        "parameters": model.n_parameters(),
        "seeds": seeds_by_role(seed),
    }
    if chosen.probe_chunks:
        row |= _probes(model, chosen, seed)
    if chosen.export:
        _export(model, settings, seed, row)
    return row


def train_model(
    chosen: LanguageSettings, windows: Tensor, *, seed: int, scratch: Path | None = None
) -> tuple[Transformer, History]:
    """The trained model, and its history with `measure(model, windows)` at each of `measured_steps`.

    Data order and initial weights depend on the seed alone, so models of one seed are paired.
    """
    tokens, seeds = text.austen_tokens("train"), seeds_by_role(seed)
    model = _untrained(chosen, seed)
    due = measured_steps(chosen.steps)

    def batch(step: int) -> Tensor:
        return text.batch(tokens, step, seed=seeds["data"], size=chosen.batch, T=chosen.T)

    def loss(model: Transformer, windows: Tensor) -> Tensor:
        read = () if chosen.regulariser == "none" else ("residual",)
        trace = model.trace(windows[:, :-1], read=read)
        total = cross_entropy(trace.logits.flatten(0, 1), windows[:, 1:].flatten())
        if chosen.regulariser != "none":
            total = total + chosen.strength * penalty(
                trace.residual, chosen.regulariser, over_layers=chosen.over_layers
            )
        return total

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        """`fit` ranks by the first score: the latest weights count as the best."""
        return {"step": step, **(measure(model, windows) if step in due else {})}

    history = fit(
        model,
        loss,
        batch,
        steps=chosen.steps,
        optimizer=Optimizer(adamw_lr=chosen.adamw_lr, warmup=chosen.warmup),
        evaluate=evaluate,
        evaluate_every=10 if chosen.steps >= 10 else chosen.steps,
        checkpoint=None if scratch is None else Path(scratch) / "checkpoint",
        checkpoint_every=10,
        identity={"settings": dataclasses.asdict(chosen), "seed": seed},
        device=resolve_device(chosen.device),
        progress=False,
    )
    return model.eval(), history


def penalty(residual: Tensor, regulariser: str, *, over_layers: str = "sum") -> Tensor:
    """Σ (or mean) over neighbours of the token mean of 1 - cos(e_l, e_{l+1}), or of ||e_{l+1} - e_l||².

    residual: (L + 1, B, T, D). Source: Razzhigaev et al. 2024, section 4.
    """
    x, y = residual[:-1], residual[1:]
    check_choice("regulariser", regulariser, REGULARISERS[1:])
    if regulariser == "cosine":
        each = 1 - cosine_similarity(x, y, dim=-1)  # (L, B, T)
    else:
        each = (y - x).square().sum(dim=-1)
    each = each.mean(dim=(1, 2))
    return each.sum() if over_layers == "sum" else each.mean()


def measured_steps(steps: int) -> list[int]:
    """10, 30, 100, 300, … below `steps`, and `steps` itself.

    >>> measured_steps(500)
    [10, 30, 100, 300, 500]
    """
    found = [a * 10**b for b in range(1, 12) for a in (1, 3)]
    return [step for step in found if step < steps] + [steps]


def evaluation_windows(T: int, n_chunks: int) -> Tensor:
    """Validation windows at even distances: (n_chunks, T)."""
    windows = text.chunks(text.austen_tokens("validation"), T)
    return windows[spread(len(windows), n_chunks)]


@torch.no_grad()
def measure(model: Transformer, windows: Tensor) -> dict[str, float]:
    """Loss on windows (n, T), and for each layer l the scores named "with/l" and so on: flat, for `fit`."""
    loss, gathered, by_token = _gather(model, windows)
    found = {
        "with": gathered.scores("held-out", residual=True),
        "without": gathered.scores("held-out", residual=False),
        "norm_ratio": gathered.norm_ratio(),
        **by_token,
    }
    return {"loss": loss, **{f"{name}/{l}": float(v) for name in CURVES for l, v in enumerate(found[name])}}


@torch.no_grad()
def final_scores(model: Transformer, windows: Tensor) -> dict[str, list[float]]:
    """For each layer, with_raw, with_adjusted, with_lo, with_hi and the same without_: estimators other than
    held-out, and the ends of its 95 % jackknife interval."""
    _, gathered, _ = _gather(model, windows)
    found = {}
    for form, residual in (("with", True), ("without", False)):
        for estimator in ("raw", "adjusted"):
            found[f"{form}_{estimator}"] = gathered.scores(estimator, residual=residual).tolist()
        _, lo, hi = gathered.jackknife("held-out", residual=residual)
        found |= {f"{form}_lo": lo.tolist(), f"{form}_hi": hi.tolist()}
    return found


@torch.no_grad()
def skip_costs(model: Transformer, windows: Tensor) -> list[float]:
    """Nats that skipping layer l at every token adds to the loss on windows (n, T), for each l."""
    whole = loss_on(model, windows)
    return [loss_on(model, windows, [Skip(l)]) - whole for l in range(model.config.n_layers)]


@torch.no_grad()
def loss_on(model: Transformer, windows: Tensor, interventions=(), *, at_once: int = 64) -> float:
    """Mean cross-entropy in nats of the tokens 1 … T - 1 of windows (n, T)."""
    total, device = 0.0, next(model.parameters()).device
    for part in windows.split(at_once):
        part = part.to(device)
        logits = model.trace(part, read=(), interventions=interventions, rows=slice(0, -1)).logits
        total += cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


@torch.no_grad()
def _gather(model: Transformer, windows: Tensor) -> tuple[float, LinearityAccumulator, dict[str, Tensor]]:
    """Loss, moments of all layers with the windows in 8 consecutive groups, and the scores by token."""
    c, device = model.config, next(model.parameters()).device
    gathered = LinearityAccumulator(c.n_layers, c.d_model, groups=GROUPS, directions=False)
    total, cosine, ratio = 0.0, [], []
    for group, part in enumerate(windows.tensor_split(GROUPS)):
        part = part.to(device)
        h = model.embed(part)
        cosines, ratios = [], []
        for l in range(c.n_layers):
            attention, mlp = model.run_layer(l, h)
            f = attention + mlp
            gathered.add_layer(l, h, f, group)
            cosines.append(cosine_similarity(h, h + f, dim=-1).flatten())
            ratios.append((f.norm(dim=-1) / h.norm(dim=-1)).flatten())
            h = h + f
        logits = model.readout(h[:, :-1])
        total += cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        cosine.append(torch.stack(cosines))
        ratio.append(torch.stack(ratios))
    by_token = {
        "cosine": torch.cat(cosine, dim=1).double().mean(dim=1),
        "token_norm_ratio": torch.cat(ratio, dim=1).median(dim=1).values,
    }
    return total / windows[:, 1:].numel(), gathered, by_token


def _untrained(chosen: LanguageSettings, seed: int) -> Transformer:
    model = chosen.model(vocab=text.VOCAB, seed=seeds_by_role(seed)["init"])
    return model.to(resolve_device(chosen.device))


def _layers(scores: Mapping[str, float], name: str, L: int) -> list[float]:
    return [scores[f"{name}/{l}"] for l in range(L)]


def _losses(model: Transformer, chosen: LanguageSettings, seed: int) -> dict[str, float]:
    tokens = text.austen_tokens("validation")
    everything = text.chunks(tokens, chosen.T)
    characters = sum(len(block) for _, block in text.austen_blocks("validation"))
    loss = loss_on(model, everything)
    counts = torch.bincount(text.austen_tokens("train"), minlength=text.VOCAB).double() + 1
    return {
        "loss_nats": loss,
        "loss_nats_per_character": loss * len(tokens) / characters,
        "loss_unigram": -(counts / counts.sum()).log()[tokens].mean().item(),
        "untrained_loss_nats": loss_on(_untrained(chosen, seed), everything),
    }


def _probes(model: Transformer, chosen: LanguageSettings, seed: int) -> dict[str, list[float] | float]:
    fitted = probe_text("train", chosen.T, chosen.probe_chunks)
    judged = probe_text("validation", chosen.T, chosen.probe_chunks // 4)
    classes = {"two_back": text.VOCAB, "next": text.VOCAB, "novel": len(text.novels())}
    trained = probe_layers(model, fitted, judged, classes=classes)
    before = probe_layers(_untrained(chosen, seed), fitted, judged, classes=classes)
    return {
        **{f"probe_{name}": shares for name, shares in trained.items()},
        **{f"untrained_probe_{name}": shares for name, shares in before.items()},
        **{f"majority_{name}": share for name, share in commonest(judged, fitted).items()},
    }


def _export(model: Transformer, settings: Mapping, seed: int, row: Mapping) -> None:
    """The final weights in build/, with config and origin, replaced in one move."""
    EXPORTED.parent.mkdir(parents=True, exist_ok=True)
    about = {"settings": dict(settings), "seed": seed, "loss_nats": row["loss_nats"]}
    metadata = {"config": json.dumps(dataclasses.asdict(model.config)), "about": json.dumps(about)}
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    partial = EXPORTED.with_name(f".{EXPORTED.name}.{os.getpid()}")
    try:
        safetensors.torch.save_file(weights, partial, metadata=metadata)
        os.replace(partial, EXPORTED)
    finally:
        partial.unlink(missing_ok=True)
