"""Depth against width, and layers of a shallow model against layers of a deep one; both on the novels.

`train_shapes` trains one shape of several with the same number of weights: does a narrower, deeper model
use its layers, and is it better? `stitch_models` trains a shallow and a deep model of one width on the same
data in the same order and maps every layer of the one to every layer of the other: do layers at the same
*relative* depth correspond, or at the same absolute depth? Untrained models of these shapes are the control.

Models and text are those of `lib.experiments.language`, with a tied readout. Muon moves the matrices of the
layers where muon_lr is given: in a few hundred steps it gets much further. Source of the questions: Csordás,
Manning and Potts 2025.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.choices import resolve_device
from lib.experiments.language import LanguageSettings, evaluation_windows, loss_on, skip_costs
from lib.experiments.probes import spread
from lib.experiments.recipe import read_settings
from lib.metrics.depth import contributions_and_cosines, depth_score, stitching
from lib.models.transformer import Transformer
from lib.optimizers import Optimizer
from lib.tasks import text
from lib.training import History, fit, seeds_by_role


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """A decoder of L layers of width d_model, and its training on windows of T tokens."""

    L: int
    d_model: int
    n_heads: int
    d_mlp: int
    T: int
    batch: int  # windows a step
    steps: int
    adamw_lr: float = 4e-3
    muon_lr: float | None = 0.02  # None: AdamW moves everything
    warmup: int = 20  # steps; the rates fall linearly over the second half
    evaluation_chunks: int = 32  # validation windows that layers are measured on
    device: str = "cpu"

    def __post_init__(self):
        self.language()
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("_chunks") and (not isinstance(value, int) or value < 3):
                raise ValueError(f"{f.name} is a whole number of at least 3, got {value!r}")

    def language(self) -> LanguageSettings:
        """The same model for `lib.experiments.language`, which checks its sizes."""
        names = ("L", "d_model", "n_heads", "d_mlp", "T", "batch", "steps", "warmup", "device")
        return LanguageSettings(**{name: getattr(self, name) for name in names}, tied=True)

    def plan(self) -> Optimizer:
        return Optimizer(adamw_lr=self.adamw_lr, muon_lr=self.muon_lr, warmup=self.warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeSettings(TextSettings):
    """One shape. The loss is taken on validation_chunks windows, the rest on evaluation_chunks of them."""

    validation_chunks: int = 256


def train_shapes(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One language model. Settings: the fields of `ShapeSettings`. One row:

    parameters, layer_parameters; loss_nats on validation windows (the same for every shape), training_loss
    (mean of the last 50 steps), tokens_trained.
    contribution_attention, _mlp, _layer: by layer, mean over tokens of the norm over that of the stream it is
    added to; cosine_layer: of a layer's output and the stream; skip_cost: by layer, nats that leaving it out
    adds; contribution_score, skip_score: mean depth weighted by these (negative costs count 0), as a share of
    L, from 1/L to 1; late_contribution: mean contribution of the later half of the layers over that of the
    earlier half, the middle layer left out (None for one layer); late_cost: share of the skip costs in the
    later half. Each with untrained_ before it: the weights before training. weights_hash, step0_hash, seeds.
    """
    chosen = read_settings(ShapeSettings, settings)
    windows = evaluation_windows(chosen.T, chosen.evaluation_chunks)
    validation = evaluation_windows(chosen.T, chosen.validation_chunks)
    untrained = _untrained(chosen, seeds_by_role(seed)["init"])
    model, history = train_text(chosen, seed=seed, scratch=scratch)
    row = {
        "parameters": model.n_parameters(),
        "layer_parameters": sum(p.numel() for p in model.layers.parameters()),
        "training_loss": sum(history.loss[-50:]) / len(history.loss[-50:]),
        "tokens_trained": chosen.steps * chosen.batch * chosen.T,
        "n_tokens": validation.numel(),
        "step0_hash": history.step0,
        "weights_hash": model.weights_hash(),
        "seeds": seeds_by_role(seed),
    }
    for prefix, one in (("", model), ("untrained_", untrained)):
        found = {"loss_nats": loss_on(one, validation), **layer_use(one, windows)}
        row |= {f"{prefix}{name}": value for name, value in found.items()}
    return row


def layer_use(model: Transformer, windows: Tensor) -> dict:
    """Contributions, skip costs and their summaries, as `train_shapes` reports them, on windows (n, T)."""
    ratios, cosines = contributions_and_cosines(model, windows, batch_size=32)
    parts = {name: getattr(ratios, name).average() for name in ("attention", "mlp", "layer")}
    costs = np.maximum(skip := skip_costs(model, windows), 0)
    L = model.config.n_layers
    half = L // 2
    late = None if not half else float(parts["layer"][-half:].mean() / parts["layer"][:half].mean())
    return {
        **{f"contribution_{name}": part.tolist() for name, part in parts.items()},
        "cosine_layer": cosines.layer.average().tolist(),
        "skip_cost": skip,
        "contribution_score": depth_score(parts["layer"]) / L,
        "skip_score": depth_score(costs) / L if costs.any() else None,
        "late_contribution": late,
        "late_cost": float(costs[L - half :].sum() / costs.sum()) if half and costs.any() else None,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class StitchSettings(TextSettings):
    """Two models that differ in depth alone: L layers and deep_layers. Maps are fitted on fit_chunks windows
    of the training text and judged on evaluation_chunks windows of the validation text."""

    deep_layers: int
    evaluation_chunks: int = 64
    fit_chunks: int = 160
    ridge: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if self.L < 2 or not isinstance(self.deep_layers, int) or self.deep_layers <= self.L:
            raise ValueError(
                f"a shallow model of L >= 2 layers and a deeper one are needed, got L={self.L}, "
                f"deep_layers={self.deep_layers!r}"
            )


def stitch_models(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """A shallow and a deep model, and maps between all their taps. Settings: `StitchSettings`. One row:

    shallow_loss, deep_loss: nats on the evaluation windows.
    relative_error: (L + 1, deep_layers + 1) held-out mean of ‖y − f(x)‖ / ‖y‖; unexplained: of the same
    shape, 1 − R². best_taps: for each tap of the deep model the best of the shallow one, by unexplained.
    By unexplained, and with paper_ before the name by relative_error: best_correlation of best tap and target
    over taps 1 … deep_layers (0 if the best never changes); slope of the best tap's relative depth on the
    target's; distance, their mean difference; advantage: error at the same absolute depth minus error at the
    same relative depth, mean over taps; slope and advantage with _lo and _hi, 95 % over windows.
    interior_advantage: of unexplained, over taps that both lines reach inside both models.
    A late tap of the shallow model may read every tap of the deep one best: it holds more. interaction,
    interaction_share: what the matrix says beyond rich sources and hard targets (see that function).
    Everything again with untrained_ before it: the same two models before training, the control.
    """
    chosen = read_settings(StitchSettings, settings)
    windows = evaluation_windows(chosen.T, chosen.evaluation_chunks)
    fitted = fit_windows(chosen.T, chosen.fit_chunks)
    row: dict = {"n_tokens": windows.numel(), "fit_tokens": fitted.numel(), "seeds": seeds_by_role(seed)}
    shapes = {"shallow": _one(chosen, chosen.L), "deep": _one(chosen, chosen.deep_layers)}
    trained, untrained = {}, {}
    for name, shape in shapes.items():
        start = start_seed(name, seed)
        untrained[name] = _untrained(shape, start)
        folder = None if scratch is None else Path(scratch) / name
        trained[name], history = train_text(shape, seed=seed, start=start, scratch=folder)
        row |= {f"{name}_step0_hash": history.step0, f"{name}_parameters": trained[name].n_parameters()}
    for prefix, pair in (("", trained), ("untrained_", untrained)):
        found = {f"{name}_loss": loss_on(model, windows) for name, model in pair.items()}
        found |= correspondence(pair["shallow"], pair["deep"], fitted, windows, ridge=chosen.ridge, seed=seed)
        row |= {f"{prefix}{name}": value for name, value in found.items()}
    return row


def correspondence(
    shallow: Transformer, deep: Transformer, fitted: Tensor, judged: Tensor, *, ridge: float, seed: int
) -> dict:
    """Maps between all taps, fitted on one set of windows (n, T) and judged on another, and their summary."""
    maps = stitching(shallow, deep, fitted, held_out=judged, ridge=ridge, batch_size=32)
    found: dict = {
        "relative_error": maps.error("relative").tolist(),
        "unexplained": maps.error("unexplained").tolist(),
        "best_taps": maps.best("unexplained").tolist(),
    }
    for prefix, kind in (("", "unexplained"), ("paper_", "relative")):
        diagonal = maps.diagonal(seed=seed, kind=kind)
        found |= {
            f"{prefix}slope": diagonal.slope,
            f"{prefix}slope_lo": diagonal.slope_interval.lo,
            f"{prefix}slope_hi": diagonal.slope_interval.hi,
            f"{prefix}distance": diagonal.distance,
            f"{prefix}advantage": diagonal.advantage,
            f"{prefix}advantage_lo": diagonal.advantage_interval.lo,
            f"{prefix}advantage_hi": diagonal.advantage_interval.hi,
            f"{prefix}best_correlation": best_correlation(maps.best(kind)),
        }
    error = maps.error("unexplained")
    found["interaction"], found["interaction_share"] = interaction(error)
    return found | {"interior_advantage": interior_advantage(error)}


def best_correlation(best: Tensor) -> float:
    """Pearson correlation of the best tap with the target tap, over taps 1 and later; 0 if it never changes.

    Tap 0 is left out: embeddings are best read from embeddings, in any two models.
    """
    y = best[1:].double().numpy()
    return 0.0 if np.ptp(y) == 0 else float(np.corrcoef(np.arange(len(y)), y)[0, 1])


def interaction(error: Tensor) -> tuple[float, float]:
    """Do early taps go with early ones and late with late, rich sources and hard targets set aside?

    Of the errors (S, T) without tap 0 the means of rows and columns are taken away. -> Pearson correlation of
    the rest with the product of the two relative depths, each about its mean: -1 where corresponding depths
    fit best, 0 for no order; and the share of the errors' variance that the rest is. Derived.
    """
    inner = error[1:, 1:].double().numpy()
    about = inner - inner.mean()
    rest = about - about.mean(axis=0) - about.mean(axis=1, keepdims=True)
    depths = [np.linspace(-0.5, 0.5, n) for n in inner.shape]
    both = np.outer(*depths)
    size, total = np.square(rest).sum(), np.square(about).sum()
    if size <= 1e-20 * max(total, 1.0):
        return 0.0, 0.0
    return float((rest * both).sum() / np.sqrt(size * np.square(both).sum())), float(size / total)


def interior_advantage(error: Tensor) -> float | None:
    """Mean over taps l of the deep model, 1 <= l <= the shallow model's last but one, of the error at the
    same absolute depth minus the error at the same relative depth (interpolated). error: (S, T), all taps.

    Where l is beyond the shallow model, the absolute line stays at its end; those taps are not counted here.
    None if the shallow model has no inner tap.
    """
    S, T = error.shape
    taps = np.arange(1, S - 1)
    if not len(taps):
        return None
    columns = error.double().numpy().T  # (T, S)
    relative = [np.interp(l * (S - 1) / (T - 1), np.arange(S), columns[l]) for l in taps]
    return float(np.mean([columns[l, l] for l in taps]) - np.mean(relative))


def fit_windows(T: int, n_chunks: int) -> Tensor:
    """Windows of the training text at even distances: (n_chunks, T)."""
    windows = text.chunks(text.austen_tokens("train"), T)
    return windows[spread(len(windows), n_chunks)]


def train_text(
    chosen: TextSettings, *, seed: int, start: int | None = None, scratch: Path | None = None
) -> tuple[Transformer, History]:
    """The trained model. The order of the data depends on the seed alone; so do the weights before training,
    unless `start` is their seed."""
    tokens, data = text.austen_tokens("train"), seeds_by_role(seed)["data"]
    model = _untrained(chosen, seeds_by_role(seed)["init"] if start is None else start)

    def batch(step: int) -> Tensor:
        return text.batch(tokens, step, seed=data, size=chosen.batch, T=chosen.T)

    def loss(model: Transformer, windows: Tensor) -> Tensor:
        return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    history = fit(
        model,
        loss,
        batch,
        steps=chosen.steps,
        optimizer=chosen.plan(),
        checkpoint=None if scratch is None else Path(scratch) / "checkpoint",
        checkpoint_every=10,
        identity={"settings": dataclasses.asdict(chosen), "seed": seed, "start": start},
        device=resolve_device(chosen.device),
        progress=False,
    )
    return model.eval(), history


def start_seed(name: str, seed: int) -> int:
    """The seed of the weights of the "shallow" or the "deep" model. Two seeds: drawn from one, the deep model
    would begin with the embeddings and layers of the shallow one, and stay near them."""
    first = seeds_by_role(seed)["init"]
    return first if name == "shallow" else seeds_by_role(first)["init"]


def _one(chosen: TextSettings, L: int) -> TextSettings:
    """The settings that shape and train a model of L layers."""
    names = [f.name for f in dataclasses.fields(TextSettings)]
    return TextSettings(**{name: getattr(chosen, name) for name in names} | {"L": L})


def _untrained(chosen: TextSettings, start: int) -> Transformer:
    model = chosen.language().model(vocab=text.VOCAB, seed=start)
    return model.to(resolve_device(chosen.device)).eval()
