"""Train a Transformer to follow K permutations with a scratchpad, and without one.

With it, every intermediate value is a token: training is teacher-forced, and the accuracy reported is that of
free-running chains, in which the model reads what it wrote itself. Without it the same model is asked for the
last value at once. The two get different labels: K of them a chain against one; "steps" gives the model
without a scratchpad as many, by asking for 1 ... K hops.
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
from lib.tasks.chains import Chains, ScratchpadHops
from lib.tasks.hops import Prompts
from lib.training import seeds_by_role

WRITES = ("values", "answer", "steps")


@dataclass(frozen=True, kw_only=True)
class ScratchpadSettings(TrainedSettings):
    """n: size of the permutations; K: hops; the rest as in `TrainedSettings`.

    writes: "values", a scratchpad: i_1 ... i_K are emitted one by one. "answer": i_K at once, the only label.
    "steps": i_k at once, for every k in 1 .. K in equal parts; the accuracy is still that of k = K.
    """

    n: int
    K: int
    writes: str = "values"
    L: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_choice("writes", self.writes, WRITES)


def train_scratchpad(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One decoder trained with or without a scratchpad. Settings: the fields of `ScratchpadSettings`. A row:

    accuracy: share of right final values i_K on `evaluation_prompts` fresh prompts with n questions each,
    free-running where there is a scratchpad; then also teacher_forced (share of single look-ups that are
    right, reading true chains) and value_1 ... value_{K-1} (free-running); with "steps" hop_1 ... hop_{K-1};
    untrained_...: the same before training; chance: 1/n; emitted: tokens written for an answer; the rest as
    in `train_composition`.
    """
    chosen = read_settings(ScratchpadSettings, settings)
    task = ScratchpadHops(chosen.n, chosen.K)
    run = _with if chosen.writes == "values" else _without
    row = run(chosen, task, seeds_by_role(seed), seed=seed, scratch=scratch)
    return {**row, "chance": task.hops.chance, "emitted": chosen.K if chosen.writes == "values" else 1}


def _with(chosen: ScratchpadSettings, task: ScratchpadHops, seeds: dict, *, seed: int, scratch) -> dict:
    device = resolve_device(chosen.device)
    mask = task.mask().to(device)
    model = chosen.model(vocab=task.hops.vocab, n_logits=task.n, max_tokens=task.length, seed=seeds["init"])

    def loss(model: Transformer, chains: Chains) -> Tensor:
        logits = model(chains.tokens, mask=mask, rows=task.chain_tokens)  # (B, n K, n)
        return _cross_entropy(logits, chains.values[..., 1:].flatten(1))

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        chains = task.batch(step, seed=seeds["evaluation"], size=chosen.evaluation_prompts)

        def answer(tokens: Tensor, mask: Tensor) -> Tensor:
            rows = slice(task.K * task.n, None)
            return model(tokens.to(device), mask=mask.to(device), rows=rows).argmax(dim=-1).cpu()

        right = (task.write(answer, chains.tables) == chains.values).double().mean(dim=(0, 1)).tolist()
        forced = (answer(chains.tokens, mask) == chains.values[..., 1:].flatten(1)).double().mean().item()
        values = {f"value_{k}": right[k] for k in range(1, task.K)}
        return {"accuracy": right[-1], "teacher_forced": forced, **values}

    def batch(step: int) -> Chains:
        return task.batch(step, seed=seeds["data"], size=chosen.batch)

    return train(chosen, model, loss, batch, evaluate, seed=seed, scratch=scratch)


def _without(chosen: ScratchpadSettings, task: ScratchpadHops, seeds: dict, *, seed: int, scratch) -> dict:
    device = resolve_device(chosen.device)
    hops = task.hops
    mask = hops.mask().to(device)
    model = chosen.model(vocab=hops.vocab, n_logits=hops.n, max_tokens=hops.length, seed=seeds["init"])
    asked = range(1, hops.K + 1) if chosen.writes == "steps" else (hops.K,)

    def loss(model: Transformer, prompts: Prompts) -> Tensor:
        logits = model(prompts.tokens, mask=mask, rows=hops.queries)
        return _cross_entropy(logits, hops.answer(prompts.tables, prompts.x, prompts.hops))

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        right = {}
        for k in asked[::-1]:
            prompts = hops.batch(step, seed=seeds["evaluation"], size=chosen.evaluation_prompts, mix=(k,))
            said = model(prompts.tokens.to(device), mask=mask, rows=hops.queries).argmax(dim=-1).cpu()
            answer = hops.answer(prompts.tables, prompts.x, prompts.hops)
            right[f"hop_{k}"] = (said == answer).double().mean().item()
        return {"accuracy": right.pop(f"hop_{hops.K}"), **right}

    def batch(step: int) -> Prompts:  # n may be smaller than K: the hop counts take turns from step to step
        mix = [asked[(step + i) % len(asked)] for i in range(hops.n)]
        return hops.batch(step, seed=seeds["data"], size=chosen.batch, mix=mix)

    return train(chosen, model, loss, batch, evaluate, seed=seed, scratch=scratch)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the tokens, in nats. logits: (B, R, n), target: (B, R)."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())
