"""Check hand-built retrieval layers on every prompt there is: heads composed, fixed, plain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lib.choices import check_choice, resolve_device
from lib.experiments.recipe import read_settings
from lib.models.constructions.retrieval import FORMS, relational_retrieval
from lib.tasks.retrieval import RelationalRetrieval

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
ENUMERABLE = 300_000  # prompts
PART = 4_096  # prompts at a time


@dataclass(frozen=True, kw_only=True)
class RetrievalVerificationSettings:
    """The sizes of the task, and the arithmetic: float64, float32 or float16."""

    N: int
    C: int
    W: int
    V: int
    arithmetic: str = "float64"
    device: str = "cpu"

    def __post_init__(self):
        task = RelationalRetrieval(N=self.N, C=self.C, W=self.W, V=self.V)  # refuses impossible sizes
        check_choice("arithmetic", self.arithmetic, DTYPES)
        if (count := n_prompts(task)) > ENUMERABLE:
            raise ValueError(f"{count} prompts are too many to try all; at most {ENUMERABLE}: smaller sizes")
        resolve_device(self.device)


def verify_retrieval(settings: Mapping, *, seed: int = 0, scratch: Path | None = None) -> dict:
    """Every prompt of N items with K = N, and in each every question about an item in it: one row.

    prompts, inputs (questions in all); for each form of the layer, composed_, fixed_ and plain_: errors,
    margin (the least logit of the right answer minus the next), heads; additive_limit: the most that a layer
    without composition whose scores do not see w can answer, a share: 1 - (1 - 1/V) / 4 for W >= 2, proved
    in the chapter. `seed` is not used.
    """
    chosen = read_settings(RetrievalVerificationSettings, settings)
    N, C, W, V = chosen.N, chosen.C, chosen.W, chosen.V
    task = RelationalRetrieval(N=N, C=C, W=W, V=V, Q=C * N * W)
    device, dtype = resolve_device(chosen.device), DTYPES[chosen.arithmetic]
    layers = {how: relational_retrieval(C, N, W, V, how=how, dtype=dtype).to(device) for how in FORMS}
    mask = task.mask().to(device)
    row = {"prompts": 0, "inputs": 0}
    for how in FORMS:
        row |= {f"{how}_errors": 0, f"{how}_margin": math.inf, f"{how}_heads": layers[how].config.n_heads}
    for items in _all_items(task):
        asked = questions(task, items)
        tokens, answer = task.tokens(items, asked).to(device), task.answer(items, asked).to(device)
        row["prompts"] += len(items)
        row["inputs"] += answer.numel()
        for how, layer in layers.items():
            logits = layer(tokens, mask=mask, rows=task.queries)  # (B, Q, V)
            right = logits.gather(2, answer[..., None]).squeeze(-1)
            above = right - logits.scatter(2, answer[..., None], -math.inf).amax(dim=-1)
            row[f"{how}_errors"] += int((~(above > 0)).sum())  # a tie is an error, and so is nan
            row[f"{how}_margin"] = min(row[f"{how}_margin"], above.min().item())
    limit = 1 - (1 - 1 / task.V) / 4 if task.W > 1 else 1.0
    return {**row, "additive_limit": limit}


def n_prompts(task: RelationalRetrieval) -> int:
    """Number of prompts with K = N: N!^C orders of the keys, V^(N W) values.

    >>> n_prompts(RelationalRetrieval(N=2, C=2, W=2, V=2))
    64
    """
    return math.factorial(task.N) ** task.C * task.V ** (task.N * task.W)


def questions(task: RelationalRetrieval, items: Tensor) -> Tensor:
    """All questions (c, v, w) about the items (B, N, C + W) of a prompt: (B, C N W, 3)."""
    c, item, w = (
        part.flatten()
        for part in torch.meshgrid(*(torch.arange(n) for n in (task.C, task.N, task.W)), indexing="ij")
    )
    v = items[:, item, c]  # (B, Q)
    return torch.stack([c.expand_as(v), v, w.expand_as(v)], dim=-1)


def _all_items(task: RelationalRetrieval) -> Iterator[Tensor]:
    """Every list of items, in parts: (B, N, C + W)."""
    orders = torch.tensor(list(itertools.permutations(range(task.K), task.N)))  # (n, N)
    keys = torch.cartesian_prod(*[torch.arange(len(orders))] * task.C).view(-1, task.C)
    keys = orders[keys].mT  # (n^C, N, C)
    values = torch.cartesian_prod(*[torch.arange(task.V)] * (task.N * task.W)).view(-1, task.N, task.W)
    for part in torch.arange(len(keys) * len(values)).split(PART):
        yield torch.cat([keys[part // len(values)], values[part % len(values)]], dim=-1)
