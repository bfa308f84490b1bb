"""Train a Transformer on plain composition: how many hops does L layers find, and what does the order cost?

The task is `lib.tasks.hops.PermutationHops`, not the L-FuncComp of the lower bound: no argument waits for the
last token. Here the harmful order is z_1 *first*: a token of z_1 then cannot read z_2, so pointers cannot be
doubled, and a decoder of small width goes one hop a layer. With z_K first, or in an encoder, they can:
2^L - 1 hops in L layers (theory of `encoders-and-scratchpads`). Neither is a law at these sizes: given width,
a query can carry more than a pointer, and training may find that.

Supervision of the layers is an aid to optimisation, and what it asks for is stated with every result. A
training failure is evidence about training, never about impossibility.
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

ORDERS = {"first": "first-first", "last": "last-first"}  # which table is listed first: z_1 or z_K
MASKS = {"decoder": "earlier", "encoder": "all"}
SUPERVISION = ("none", "sequential", "doubling")
ASKED = ("last", "mixed")
TABLE_WEIGHT = 0.5  # of the loss at table tokens, under doubling


@dataclass(frozen=True, kw_only=True)
class DepthSettings(TrainedSettings):
    """n: size of the permutations; K: how many are composed; the rest as in `TrainedSettings`.

    supervision: what each layer before the last is asked for, besides the answer behind the last.
    "none": nothing. "sequential": behind layer l, the value after min(l, k) hops, at each query.
    "doubling": behind layer l, the value after min(2^l - 1, k) hops at each query and, with weight 0.5, the
    value after min(2^l, K - s + 1) hops at each table token of z_s; of a decoder that lists z_1 first it asks
    what its tables have not read.
    asked: "last", every query goes through all K tables; "mixed", one in 2K goes through each k < K.
    """

    n: int
    K: int
    order: str = "first"  # "first": z_1 ... z_K, the harmful order; "last": z_K ... z_1
    mask: str = "decoder"  # or "encoder": every table token reads all tables
    supervision: str = "sequential"
    asked: str = "last"

    def __post_init__(self):
        super().__post_init__()
        check_choice("order", self.order, ORDERS)
        check_choice("mask", self.mask, MASKS)
        check_choice("supervision", self.supervision, SUPERVISION)
        check_choice("asked", self.asked, ASKED)
        if self.asked == "mixed" and self.n < self.K:
            raise ValueError(f"{self.n} queries cannot ask for {self.K} hop counts: n >= K, or asked='last'")


def train_depth(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One model trained on plain composition. Settings: the fields of `DepthSettings`. One row:

    accuracy: of K-hop queries, on `evaluation_prompts` fresh prompts of n queries each; hop_1 ... hop_{K-1}:
    of shorter queries, where asked = "mixed"; behind_1 ... behind_{L-1}: accuracy of the shared readout
    behind layer l against what that layer was asked for, on K-hop queries, where layers are supervised;
    untrained_...: the same model before training; chance: 1/n, a model that ignores x; the rest (steps_done,
    stopped_early, final_loss in nats, parameters, curve, seeds ...) as in `train_composition`.
    """
    chosen = read_settings(DepthSettings, settings)
    task = PermutationHops(chosen.n, chosen.K, ORDERS[chosen.order], MASKS[chosen.mask])
    seeds = seeds_by_role(seed)
    device = resolve_device(chosen.device)
    mask = task.mask().to(device)
    model = chosen.model(vocab=task.vocab, n_logits=task.n, max_tokens=task.length, seed=seeds["init"])
    inner = range(1, chosen.L) if chosen.supervision != "none" else range(0)
    doubling = chosen.supervision == "doubling"
    mix = (chosen.K,) if chosen.asked == "last" else None  # None: the mix of the recipe
    rows = None if doubling else task.queries  # table tokens have labels under doubling only
    queries = task.queries if doubling else slice(None)

    def loss(model: Transformer, prompts: Prompts) -> Tensor:
        trace = model.trace(prompts.tokens, mask=mask, read=("residual",), rows=rows)
        total = _cross_entropy(trace.logits[:, queries], _answer(task, prompts))
        for l in inner:
            logits = model.readout(trace.residual[l])
            target = query_target(task, prompts, l, doubling=doubling)
            total = total + _cross_entropy(logits[:, queries], target)
            if doubling:
                target = table_target(task, prompts.tables, l)
                total = total + TABLE_WEIGHT * _cross_entropy(logits[:, : task.queries.start], target)
        return total

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        right = {}
        for k in range(chosen.K, 0, -1) if chosen.asked == "mixed" else (chosen.K,):
            prompts = task.batch(step, seed=seeds["evaluation"], size=chosen.evaluation_prompts, mix=(k,))
            read = ("residual",) if k == chosen.K else ()
            trace = model.trace(prompts.tokens.to(device), mask=mask, rows=task.queries, read=read)
            right[f"hop_{k}"] = _share(trace.logits, _answer(task, prompts))
            if k == chosen.K:
                for l in inner:
                    target = query_target(task, prompts, l, doubling=doubling)
                    right[f"behind_{l}"] = _share(model.readout(trace.residual[l]), target)
        return {"accuracy": right.pop(f"hop_{chosen.K}"), **right}

    def batch(step: int) -> Prompts:
        return task.batch(step, seed=seeds["data"], size=chosen.batch, mix=mix)

    row = train(chosen, model, loss, batch, evaluate, seed=seed, scratch=scratch)
    return {**row, "chance": task.chance}


def query_target(task: PermutationHops, prompts: Prompts, l: int, *, doubling: bool) -> Tensor:
    """What queries are asked for behind layer l (1-based): (B, n), values after min(l or 2^l - 1, k) hops."""
    return task.after_layer(prompts, 2**l - 1 if doubling else l)


def table_target(task: PermutationHops, tables: Tensor, l: int) -> Tensor:
    """What table tokens are asked for behind layer l under doubling, in prompt order. (B, K, n) -> (B, K n).

    Token y of z_s: the value after min(2^l, K - s + 1) hops from y, beginning with z_s itself.
    """
    K = task.K
    listed = range(K - 1, -1, -1) if task.order == "last-first" else range(K)
    parts = []
    for s in listed:  # 0-based here
        value = tables[:, s]
        for r in range(s + 1, min(s + 2**l, K)):
            value = tables[:, r].gather(1, value)
        parts.append(value)
    return torch.cat(parts, dim=1)


def _answer(task: PermutationHops, prompts: Prompts) -> Tensor:
    return task.answer(prompts.tables, prompts.x, prompts.hops)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the tokens, in nats. logits: (B, R, n), target: (B, R)."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def _share(logits: Tensor, target: Tensor) -> float:
    """Share of the tokens answered rightly."""
    return (logits.argmax(dim=-1).cpu() == target).double().mean().item()
