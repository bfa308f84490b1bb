"""Train a Transformer on SUM2: does one layer, read at the last token, notice that two numbers cancel?

Inputs are planted (`lib.tasks.sum2`), labels balanced, and only the answer is supervised, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.choices import resolve_device
from lib.experiments.recipe import TrainedSettings, read_settings, train
from lib.models.transformer import Transformer
from lib.tasks.sum2 import Sum2, Sums
from lib.training import seeds_by_role


@dataclass(frozen=True, kw_only=True)
class PairSumSettings(TrainedSettings):
    """n numbers modulo M (odd, at least 2 n + 1); the rest as in `TrainedSettings`."""

    n: int
    M: int
    evaluation_prompts: int = 2048  # one answer each, where a composition prompt has n


def train_sum2(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One bidirectional model trained on SUM2[n, M]. Settings: the fields of `PairSumSettings`. One row:

    accuracy on `evaluation_prompts` fresh planted inputs; untrained_accuracy: the same model before training;
    majority: accuracy of always giving the commoner answer on those inputs; the rest as `train_composition`.
    """
    chosen = read_settings(PairSumSettings, settings)
    task = Sum2(chosen.n, chosen.M)
    seeds = seeds_by_role(seed)
    device = resolve_device(chosen.device)
    model = chosen.model(vocab=task.vocab, n_logits=2, max_tokens=task.length, seed=seeds["init"])
    last = slice(task.n, task.n + 1)  # the auxiliary token

    def loss(model: Transformer, sums: Sums) -> Tensor:
        return cross_entropy(model(sums.tokens, rows=last)[:, 0], sums.label)

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        sums = task.batch(step, seed=seeds["evaluation"], size=chosen.evaluation_prompts)
        guess = model(sums.tokens.to(device), rows=last)[:, 0].argmax(dim=-1).cpu()
        one = sums.label.double().mean().item()
        return {"accuracy": (guess == sums.label).double().mean().item(), "majority": max(one, 1 - one)}

    row = train(
        chosen,
        model,
        loss,
        lambda step: task.batch(step, seed=seeds["data"], size=chosen.batch),
        evaluate,
        seed=seed,
        scratch=scratch,
    )
    del row["untrained_majority"]  # of the same inputs: no second number
    return row
