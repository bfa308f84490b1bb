"""Train a Transformer to compose permutations: does it find z_2(z_1(x)) with one layer, with two?

Recipe: dense queries, tokens that are sums of three embeddings, Muon and AdamW, and deep supervision: behind
every layer l but the last the shared readout is asked for the value after min(l, k) hops. That is an aid to
optimisation which a one-layer model cannot receive, so the curves compare what depth can express, with help,
with what depth 1 finds. A training failure is evidence about training, never about impossibility.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.recipe import TrainedSettings, read_settings, train
from lib.models.transformer import Transformer
from lib.tasks.hops import PermutationHops, Prompts
from lib.training import seeds_by_role

SUPERVISION = ("last", "layers")


@dataclass(frozen=True, kw_only=True)
class CompositionSettings(TrainedSettings):
    """n: size of the permutations; K: how many are composed; the rest as in `TrainedSettings`."""

    n: int
    K: int = 2
    order: str = "last-first"  # the tables in the prompt; see PermutationHops
    tables_read: str = "earlier"  # "earlier": decoder, "all": encoder
    supervise: str = "layers"  # "layers": deep supervision with weight 1; "last": the answer only

    def __post_init__(self):
        super().__post_init__()
        check_choice("supervise", self.supervise, SUPERVISION)


def train_composition(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One model trained on PermutationHops. Settings: the fields of `CompositionSettings`. One row:

    accuracy: of the K-hop queries; hop_1 ... hop_K: of each hop count, on `evaluation_prompts` fresh prompts
    with n queries each; untrained_...: the same model before training; chance: 1/n; steps_done,
    stopped_early, final_loss (nats), parameters and its parts embedding_, readout_ and layer_parameters,
    step0_hash, curve [[steps, accuracy], ...], seeds.
    """
    chosen = read_settings(CompositionSettings, settings)
    task = PermutationHops(chosen.n, chosen.K, chosen.order, chosen.tables_read)
    seeds = seeds_by_role(seed)
    device = resolve_device(chosen.device)
    mask = task.mask().to(device)
    model = chosen.model(vocab=task.vocab, n_logits=task.n, max_tokens=task.length, seed=seeds["init"])

    def loss(model: Transformer, prompts: Prompts) -> Tensor:
        trace = model.trace(prompts.tokens, mask=mask, read=("residual",), rows=task.queries)
        total = _cross_entropy(trace.logits, task.after_layer(prompts, max(chosen.L, chosen.K)))
        for l in range(1, chosen.L) if chosen.supervise == "layers" else ():
            total = total + _cross_entropy(model.readout(trace.residual[l]), task.after_layer(prompts, l))
        return total

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        right = {}
        for k in range(chosen.K, 0, -1):
            prompts = task.batch(step, seed=seeds["evaluation"], size=chosen.evaluation_prompts, mix=(k,))
            logits = model(prompts.tokens.to(device), mask=mask, rows=task.queries)  # (B, n, n)
            answer = task.answer(prompts.tables, prompts.x, prompts.hops)
            right[f"hop_{k}"] = (logits.argmax(dim=-1).cpu() == answer).double().mean().item()
        return {"accuracy": right[f"hop_{chosen.K}"], **right}

    row = train(
        chosen,
        model,
        loss,
        lambda step: task.batch(step, seed=seeds["data"], size=chosen.batch),
        evaluate,
        seed=seed,
        scratch=scratch,
    )
    return {**row, "chance": task.chance}


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over all queries, in nats. logits: (B, Q, n), target: (B, Q)."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())
