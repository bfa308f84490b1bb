"""`train_composition` for several models at once, along a model axis: one run of a sweep trains G models.

A sweep chooses it by naming this run function; whether it pays depends on size and device (`lib.model_axis`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib.choices import resolve_device
from lib.experiments.composition import CompositionSettings, _cross_entropy
from lib.experiments.recipe import EVALUATION_STEP, _report, read_settings, sizes
from lib.model_axis import fit_together
from lib.models.transformer import Transformer
from lib.tasks.hops import PermutationHops, Prompts
from lib.training import seeds_by_role


@dataclass(frozen=True, kw_only=True)
class CompositionsSettings(CompositionSettings):
    """models: how many are trained together; the rest as in `CompositionSettings`, the same for all."""

    models: int

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.models, int) or isinstance(self.models, bool) or self.models < 1:
            raise ValueError(f"models is a whole number of at least 1, got {self.models!r}")
        if self.precision != "float32":
            raise ValueError(f"a model axis trains in float32, got precision={self.precision!r}")


def train_compositions(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """G = `models` models, the ones `train_composition` trains from the seeds seed G ... seed G + G - 1.

    Settings: the fields of `CompositionsSettings`. The row has the entries of a `train_composition` row, each
    a list of G in the order of the seeds; what all models share stays one number: chance, parameters and its
    parts. model_seeds: the G seeds.
    """
    chosen = read_settings(CompositionsSettings, settings)
    task = PermutationHops(chosen.n, chosen.K, chosen.order, chosen.tables_read)
    model_seeds = [seed * chosen.models + g for g in range(chosen.models)]
    seeds = [seeds_by_role(each) for each in model_seeds]
    device = resolve_device(chosen.device)
    mask = task.mask().to(device)
    models = [
        chosen.model(vocab=task.vocab, n_logits=task.n, max_tokens=task.length, seed=each["init"]).to(device)
        for each in seeds
    ]

    def loss(model: Transformer, prompts: Prompts) -> Tensor:
        trace = model.trace(prompts.tokens, mask=mask, read=("residual",), rows=task.queries)
        total = _cross_entropy(trace.logits, task.after_layer(prompts, max(chosen.L, chosen.K)))
        for l in range(1, chosen.L) if chosen.supervise == "layers" else ():
            total = total + _cross_entropy(model.readout(trace.residual[l]), task.after_layer(prompts, l))
        return total

    def batch(step: int) -> Prompts:
        drawn = [task.batch(step, seed=each["data"], size=chosen.batch) for each in seeds]
        return Prompts(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    @torch.no_grad()
    def evaluate(g: int, model: Transformer, step: int) -> dict[str, float]:
        right = {}
        for k in range(chosen.K, 0, -1):
            size = chosen.evaluation_prompts
            prompts = task.batch(step, seed=seeds[g]["evaluation"], size=size, mix=(k,))
            logits = model(prompts.tokens.to(device), mask=mask, rows=task.queries)  # (B, n, n)
            answer = task.answer(prompts.tables, prompts.x, prompts.hops)
            right[f"hop_{k}"] = (logits.argmax(dim=-1).cpu() == answer).double().mean().item()
        return {"accuracy": right[f"hop_{chosen.K}"], **right}

    untrained = [evaluate(g, model, EVALUATION_STEP) for g, model in enumerate(models)]
    histories = fit_together(
        models,
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
        progress=False,
    )
    rows = []
    for g, model in enumerate(models):
        trained = evaluate(g, model.eval(), EVALUATION_STEP)
        rows.append({**_report(trained, untrained[g], histories[g]), "seeds": seeds[g]})
    return {
        **{name: [row[name] for row in rows] for name in rows[0]},
        **sizes(models[0]),
        "chance": task.chance,
        "model_seeds": model_seeds,
    }
