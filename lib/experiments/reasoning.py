"""Train a small decoder on arithmetic, and ask whether harder expressions use more of its layers.

The model reads a chain such as "5 + 7 * 3 =" (`lib.tasks.arithmetic.ModularArithmetic`) and answers with
one token. It is trained on 1 … trained_to operations and asked 1 … asked_to: longer ones extrapolate. Two
choices are compared: the loss counts the question or the answer alone; every layer has weights of its own or
all share one set. Depth is measured where the answer is given, at "=": how far skipping a layer moves it.

Source of the questions: Csordás, Manning and Potts 2025 (they compare with MoEUT; shared layers without
experts, a universal Transformer, are our control: Dehghani et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lib.choices import check_choice
from lib.experiments.recipe import EVALUATION_STEP, TrainedSettings, read_settings, train
from lib.metrics.depth import contributions_and_cosines, depth_score, depth_score_interval, skip_effects
from lib.metrics.depth.scores import over_prompts
from lib.models.transformer import Transformer, TransformerConfig
from lib.tasks.arithmetic import MAX_STEPS, ModularArithmetic
from lib.tasks.questions import Sequences, counted
from lib.training import seeds_by_role

SHARINGS = ("none", "layers")
LISTS = ("output_effects", "depth_scores", "depth_lo", "depth_hi", "peak_depth_scores",
         "right_depth_scores", "lens_accuracies", "settled")  # fmt: skip
MEASURED_STEP = EVALUATION_STEP + 1  # the prompts that depth is measured on: fresh as well


@dataclass(frozen=True, kw_only=True)
class ReasonerSettings(TrainedSettings):
    """A decoder and its arithmetic. All `steps` are taken unless stop_at is set to a reachable accuracy."""

    optimizer: str = "adamw"
    adamw_lr: float = 2e-3
    stop_at: float = 1.01  # above any accuracy
    evaluate_every: int = 100
    evaluation_prompts: int = 256  # for each number of operations
    depth_prompts: int = 64  # for each number of operations
    modulus: int = 5
    operators: str = "+-*"
    expressions: str = "chain"  # or "nested"
    trained_to: int = 4  # operations
    asked_to: int = 6  # operations
    loss_on_question: bool = False  # every token after the first counts; otherwise the answer alone
    sharing: str = "none"  # "layers": all layers are one, its weights counted once

    def __post_init__(self):
        super().__post_init__()
        check_choice("sharing", self.sharing, SHARINGS)
        if not isinstance(self.loss_on_question, bool):
            raise ValueError(f"loss_on_question is true or false, got {self.loss_on_question!r}")
        if not 1 <= self.trained_to <= self.asked_to <= MAX_STEPS:
            raise ValueError(
                f"1 <= trained_to <= asked_to <= {MAX_STEPS}, got trained_to={self.trained_to}, "
                f"asked_to={self.asked_to}"
            )
        if self.depth_prompts < 3:
            raise ValueError(f"intervals need 3 prompts at least, got depth_prompts={self.depth_prompts}")
        self.task(self.asked_to)

    def task(self, operations: int) -> ModularArithmetic:
        """Expressions of up to so many operations."""
        return ModularArithmetic(
            steps=operations, operators=self.operators, shape=self.expressions, modulus=self.modulus
        )

    def decoder(self, *, seed: int) -> Transformer:
        """Untrained. With shared layers, layer 0 stands in every place; the other weights are those of the
        stacked model of that seed."""
        config = TransformerConfig(
            vocab=self.task(1).vocab, d_model=self.d_model, n_heads=self.n_heads, n_layers=self.L,
            d_mlp=self.d_mlp, norm="rms", norm_scale=False, activation="gelu", positions="rope",
            mlp_bias=False,
        )  # fmt: skip
        model = Transformer(config, seed=seeds_by_role(seed)["init"])
        if self.sharing == "layers":
            model.layers = nn.ModuleList([model.layers[0]] * self.L)
        return model


def train_reasoner(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One decoder. Settings: the fields of `ReasonerSettings`. One row, its lists by number of operations:

    operations: 1 … asked_to; accuracies, chances (always the commonest answer); lens_accuracies: for each, of
    the readout at taps 0 … L. accuracy: mean over the trained numbers; longer_accuracy over the longer ones,
    None if there are none.
    output_effects: for each, by layer, mean over prompts of ‖y − ȳ‖₂ at "=" when the layer is skipped (at all
    tokens but the first); depth_scores: of these effects, layers from 1; depth_lo, depth_hi: 95 % bootstrap
    intervals over prompts; peak_depth_scores: of the largest effect over prompts, as published;
    right_depth_scores: over prompts answered rightly, None where fewer than 3 are.
    settled: mean over prompts of the tap from which the lens says what the model says in the end, right or
    wrong. depth_slope, settled_slope: layers per operation, least squares over 1 … trained_to operations,
    each with _lo and _hi over prompts; None if trained_to is 1.
    contribution_attention, _mlp, _layer: by layer, on prompts of trained_to operations.
    Each with untrained_ before it: the same weights before training. The rest: `recipe.train`.
    """
    chosen = read_settings(ReasonerSettings, settings)
    task, seeds = chosen.task(chosen.trained_to), seeds_by_role(seed)
    model = chosen.decoder(seed=seed)

    def batch(step: int) -> Sequences:
        return task.batch(step, seed=seeds["data"], size=chosen.batch)

    def loss(model: Transformer, batch: Sequences) -> Tensor:
        where = counted(batch, question=chosen.loss_on_question)  # (B, T - 1)
        if chosen.loss_on_question:
            return cross_entropy(model(batch.tokens[:, :-1])[where], batch.tokens[:, 1:][where])
        return cross_entropy(_at_end(model, batch), batch.answer)

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        shares = [_accuracy(model, asked(chosen, k, step, seed)) for k in _operations(chosen)]
        named = {f"accuracy/{k}": share for k, share in zip(_operations(chosen), shares, strict=True)}
        return {"accuracy": float(np.mean(shares[: chosen.trained_to])), **named}

    row = train(chosen, model, loss, batch, evaluate, seed=seed, scratch=scratch)
    untrained = chosen.decoder(seed=seed).to(next(model.parameters()).device).eval()
    row["operations"] = _operations(chosen)
    row["chances"] = [chosen.task(k).chance(k) for k in _operations(chosen)]
    for prefix, one in (("", model), ("untrained_", untrained)):
        shares = [row.pop(f"{prefix}accuracy/{k}") for k in _operations(chosen)]
        longer = shares[chosen.trained_to :]
        found = {
            "accuracies": shares,
            "longer_accuracy": float(np.mean(longer)) if longer else None,
            **depth_use(one, chosen, seed=seed),
        }
        row |= {f"{prefix}{name}": value for name, value in found.items()}
    return row


def asked(chosen: ReasonerSettings, k: int, step: int, seed: int, *, size: int | None = None) -> Sequences:
    """Fresh questions of k operations, without padding: the answer is the last token."""
    size = chosen.evaluation_prompts if size is None else size
    return chosen.task(k).batch(step, seed=seeds_by_role(seed)["evaluation"], size=size, mix=[k])


@torch.no_grad()
def depth_use(model: Transformer, chosen: ReasonerSettings, *, seed: int) -> dict:
    """What `train_reasoner` reports of skips, lens and contributions, for one model."""
    found: dict = {name: [] for name in LISTS}
    every, settling = [], []
    for k in _operations(chosen):
        batch = asked(chosen, k, MEASURED_STEP, seed, size=chosen.depth_prompts)
        said = lens_answers(model, batch)  # (P, L + 1)
        right = said == batch.answer[:, None]
        effects = skip_effects(
            model, batch.tokens[:, :-1], output_rows=slice(-1, None), batch_size=chosen.depth_prompts
        ).output.mean.numpy()  # (P, L)
        score, interval = depth_score_interval(effects, seed=seed, reduce="mean")
        of_right = effects[right[:, -1].numpy()]
        found["output_effects"].append(effects.mean(axis=0).tolist())
        found["depth_scores"].append(score)
        found["depth_lo"].append(interval.lo)
        found["depth_hi"].append(interval.hi)
        found["peak_depth_scores"].append(depth_score(effects.max(axis=0)))
        found["right_depth_scores"].append(depth_score(of_right.mean(axis=0)) if len(of_right) >= 3 else None)
        found["lens_accuracies"].append(right.double().mean(dim=0).tolist())
        every.append(effects)
        settling.append(settled(said).double().numpy())
        found["settled"].append(float(settling[-1].mean()))
    trained = slice(chosen.trained_to)
    found |= slope("depth_slope", every[trained], _scores, seed=seed)
    found |= slope("settled_slope", settling[trained], lambda mean: mean, seed=seed)
    hardest = asked(chosen, chosen.trained_to, MEASURED_STEP, seed, size=chosen.depth_prompts)
    ratios, _ = contributions_and_cosines(model, hardest.tokens[:, :-1], batch_size=chosen.depth_prompts)
    return found | {
        f"contribution_{name}": getattr(ratios, name).average().tolist()
        for name in ("attention", "mlp", "layer")
    }


def slope(
    name: str, values: Sequence[np.ndarray], score: Callable[[np.ndarray], np.ndarray], *, seed: int
) -> dict[str, float | None]:
    """Least-squares slope of a score over 1, 2, … operations, and its 95 % interval over prompts.

    values: for each number of operations (P, …). score: (…) of means over prompts, (R, K, …) -> (R, K).
    Unit: of the score, per operation. None for a single number of operations.
    """
    names = (name, f"{name}_lo", f"{name}_hi")
    if len(values) < 2:
        return dict.fromkeys(names)
    every = np.stack(values, axis=1)  # (P, K, …); prompts of different numbers are independent draws
    x = np.arange(len(values)) - (len(values) - 1) / 2

    def line(sample: np.ndarray) -> np.ndarray:  # (R, P, K, …) -> (R,)
        return score(sample.mean(axis=1)) @ x / (x @ x)

    lo, hi = over_prompts(every, line, seed=seed)
    return dict(zip(names, (float(line(every[None])[0]), lo, hi), strict=True))


@torch.no_grad()
def lens_answers(model: Transformer, batch: Sequences) -> Tensor:
    """The token that the readout of tap l at "=" gives: (B, L + 1); the last is the model's own answer."""
    device = model.embedding.weight.device
    end = model.trace(batch.tokens[:, :-1].to(device), read=("residual",)).residual[:, :, -1]
    return model.readout(end).argmax(dim=-1).cpu().T


def settled(said: Tensor) -> Tensor:
    """The tap from which the lens says what the model says in the end, and keeps to it. (B, L + 1) -> (B,).

    >>> settled(torch.tensor([[7, 2, 5, 2, 2], [2, 2, 2, 2, 2], [0, 0, 0, 0, 1]]))
    tensor([3, 0, 4])
    """
    other = said != said[:, -1:]
    return (other * torch.arange(1, said.shape[1] + 1)).amax(dim=1)


def _scores(effects: np.ndarray) -> np.ndarray:
    """Depth scores (…) of effects (…, L), from 1."""
    return effects @ np.arange(1, effects.shape[-1] + 1) / effects.sum(axis=-1)


def _accuracy(model: Transformer, batch: Sequences) -> float:
    device = model.embedding.weight.device
    logits = model(batch.tokens[:, :-1].to(device), rows=slice(-1, None))[:, 0]
    return (logits.argmax(dim=-1).cpu() == batch.answer).double().mean().item()


def _at_end(model: Transformer, batch: Sequences) -> Tensor:
    """Logits (B, V) at "=", wherever it stands."""
    logits = model(batch.tokens[:, :-1])
    return logits[torch.arange(len(logits), device=logits.device), batch.answer_at]


def _operations(chosen: ReasonerSettings) -> list[int]:
    return list(range(1, chosen.asked_to + 1))
