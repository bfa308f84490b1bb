"""What the trained experiments share: how settings are read, how a run is seeded, trained and reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TypeVar

from torch import nn

from lib.choices import check_choice, resolve_device
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.training import History, check_precision, fit, seeds_by_role

S = TypeVar("S")
EVALUATION_STEP = 10**9  # the final prompts: a step that no training reaches, so they are fresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSettings:
    """Settings of any trained model of the book. Sizes are given by each experiment, never derived."""

    L: int  # layers
    d_model: int  # width of the residual stream
    n_heads: int  # heads, each of width d_model / n_heads
    d_mlp: int  # hidden units of each MLP
    steps: int  # budget; the learning rate falls over its second half
    batch: int  # prompts a step
    optimizer: str = "muon+adamw"  # or "adamw"
    adamw_lr: float = 4e-3
    muon_lr: float = 0.03
    evaluate_every: int = 40  # steps
    stop_at: float = 0.985  # accuracy at which training ends early
    evaluation_prompts: int = 256
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self):
        for name in (
            "L",
            "d_model",
            "n_heads",
            "d_mlp",
            "steps",
            "batch",
            "evaluate_every",
            "evaluation_prompts",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
        check_choice("optimizer", self.optimizer, ("adamw", "muon+adamw"))
        check_precision(self.precision, resolve_device(self.device))

    def plan(self) -> Optimizer:
        """AdamW (0.9, 0.98) without decay, gradients clipped at 1; Muon on the matrices of the layers."""
        return Optimizer(
            adamw_lr=self.adamw_lr, muon_lr=self.muon_lr if self.optimizer == "muon+adamw" else None
        )

    def model(self, *, vocab: int, n_logits: int, max_tokens: int, seed: int) -> Transformer:
        """Pre-norm, RMSNorm without scale, ReLU, no positions, affine readout; a task brings its mask."""
        return Transformer(
            TransformerConfig(
                vocab=vocab,
                n_logits=n_logits,
                d_model=self.d_model,
                n_heads=self.n_heads,
                n_layers=self.L,
                d_mlp=self.d_mlp,
                norm="rms",
                norm_scale=False,
                activation="relu",
                positions="none",
                max_tokens=max_tokens,
                causal=False,
                readout_bias=True,
            ),
            seed=seed,
        )


def read_settings(kind: type[S], settings: Mapping) -> S:
    """A settings dict as `kind`. ValueError names an unknown key and the nearest, or what is missing.

    >>> read_settings(TrainedSettings, {"L": 1, "d_model": 8, "n_head": 2})
    Traceback (most recent call last):
    ValueError: unknown setting of TrainedSettings 'n_head'; did you mean 'n_heads'? Allowed: L, d_model, \
n_heads, d_mlp, steps, batch, optimizer, adamw_lr, muon_lr, evaluate_every, stop_at, evaluation_prompts, \
device, precision
    """
    allowed = [f.name for f in fields(kind)]
    for name in settings:
        check_choice(f"setting of {kind.__name__}", name, allowed)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.name not in settings]
    if needed:
        raise ValueError(f"{kind.__name__} needs {', '.join(needed)}")
    return kind(**settings)


def train(
    chosen: TrainedSettings,
    model: Transformer,
    loss: Callable,
    batch: Callable,
    evaluate: Callable[[nn.Module, int], dict[str, float]],
    *,
    seed: int,
    scratch: Path | None,
) -> dict:
    """Train, and report what every trained row holds. `evaluate(model, step)` draws fresh prompts."""
    device = resolve_device(chosen.device)
    model.to(device)
    untrained = evaluate(model, EVALUATION_STEP)
    history = fit(
        model,
        loss,
        batch,
        steps=chosen.steps,
        optimizer=chosen.plan(),
        evaluate=evaluate,
        evaluate_every=chosen.evaluate_every,
        stop=chosen.stop_at,
        checkpoint=None if scratch is None else Path(scratch) / "checkpoint",
        identity={"settings": asdict(chosen), "seed": seed},
        device=device,
        precision=chosen.precision,
        progress=False,
    )
    model.eval()
    return {
        **_report(evaluate(model, EVALUATION_STEP), untrained, history),
        **sizes(model),
        "seeds": seeds_by_role(seed),
    }


def _report(trained: dict[str, float], untrained: dict[str, float], history: History) -> dict:
    first = next(iter(trained))
    return {
        **trained,
        **{f"untrained_{name}": score for name, score in untrained.items()},
        "steps_done": history.steps,
        "stopped_early": history.stopped,
        "final_loss": history.loss[-1],  # nats, summed over the supervised layers
        "step0_hash": history.step0,
        "curve": [[step, round(score, 4)] for step, score in history.curve(first)],
    }


def sizes(model: Transformer) -> dict[str, int]:
    """Number of weights: all, in the embedding, in the readout, and in the layers."""
    count = {"embedding": 0, "W_U": 0, "layers": 0}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        count["W_U" if part == "b_U" else part] += p.numel()
    return {
        "parameters": sum(count.values()),
        "embedding_parameters": count["embedding"],
        "readout_parameters": count["W_U"],
        "layer_parameters": count["layers"],
    }
