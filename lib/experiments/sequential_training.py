"""Train a Transformer on L-FuncComp itself: with w last, as in the theorem, and with w first.

The theorem's prompt order z_L, ..., z_1, z_0, w hides w until the last token. L + 1 layers then suffice, one
look-up a layer; of L layers the theorem says that they need much width, on some input, at sizes that no
training reaches. So these runs show what training finds, next to the best guesses of one who knows only a
part of the prompt; they neither confirm nor refute the theorem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lib.choices import check_choice, resolve_device
from lib.experiments.recipe import EVALUATION_STEP, TrainedSettings, read_settings, train
from lib.models.transformer import Transformer
from lib.tasks.composition import SequentialComposition
from lib.tasks.sequential_prompts import SequentialBatch, SequentialPrompts
from lib.training import seeds_by_role

SUPERVISION = ("none", "sequential", "early")
TABLE_WEIGHT = 0.5  # of the loss at table tokens, under "early"


@dataclass(frozen=True, kw_only=True)
class SequentialSettings(TrainedSettings):
    """m, ns: sizes of L-FuncComp with len(ns) + 1 steps; L: layers of the model, as in `TrainedSettings`.

    order, maps: as in `SequentialPrompts`.
    supervision: "sequential", behind each layer t but the last the shared readout at the answering token is
    asked for what one look-up a layer gives: i_t, or i_{t-1} where the first layer is spent on fetching z_0
    (orders "paper" and "z_1-first"), and never beyond the answer. "none": the answer only. "early": as
    "sequential", and behind layer t the table tokens of z_l are asked for what t look-ups more can make of
    their value: the even mixture, over all w, of z_{l+t}(w_{l+t-1}, ... z_{l+1}(w_l, value)). That is the way
    round the missing layer, paid for in width: a token must keep n_l n_{l+1} ... values.
    """

    m: int
    ns: tuple[int, ...]
    order: str = "paper"
    maps: str = "random"
    supervision: str = "sequential"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "ns", tuple(self.ns))
        check_choice("supervision", self.supervision, SUPERVISION)


def train_sequential(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One decoder trained on L-FuncComp. Settings: the fields of `SequentialSettings`. One row:

    accuracy on `evaluation_prompts` fresh prompts of m questions each; behind_1 ...: accuracy of the readout
    behind each earlier layer against what that layer was asked for, where it was; untrained_...: the same
    before training; chance, chance_knowing_w, chance_knowing_start: the best guess on the same prompts from
    the tables alone, with w but no z_0, with z_0 but no w (exact, by listing); tokens: of a prompt in the
    task's own form; composed: steps of the task; the rest as in `train_composition`.
    """
    chosen = read_settings(SequentialSettings, settings)
    prompts = SequentialPrompts(SequentialComposition(chosen.m, chosen.ns), chosen.order, chosen.maps)
    task = prompts.task
    seeds = seeds_by_role(seed)
    device = resolve_device(chosen.device)
    mask = prompts.mask().to(device)
    model = chosen.model(
        vocab=task.vocab, n_logits=task.n_answers, max_tokens=prompts.length, seed=seeds["init"]
    )
    inner = range(1, chosen.L) if chosen.supervision != "none" else range(0)
    ask_tables = chosen.supervision == "early"
    rows = None if ask_tables else prompts.read  # table tokens have labels under "early" only
    read = prompts.read if ask_tables else slice(None)

    def loss(model: Transformer, batch: SequentialBatch) -> Tensor:
        trace = model.trace(batch.tokens, mask=mask, read=("residual",), rows=rows)
        total = _cross_entropy(trace.logits[:, read], batch.values[..., -1])
        for t in inner:
            logits = model.readout(trace.residual[t])
            total = total + _cross_entropy(logits[:, read], layer_target(prompts, batch, t))
            if ask_tables:
                mixture = table_target(prompts, batch.tables, t)
                total = total + TABLE_WEIGHT * cross_entropy(logits[:, prompts.listed].mT, mixture.mT)
        return total

    def evaluation(step: int) -> SequentialBatch:
        return prompts.batch(step, seed=seeds["evaluation"], size=chosen.evaluation_prompts)

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        batch = evaluation(step)
        trace = model.trace(batch.tokens.to(device), mask=mask, read=("residual",), rows=prompts.read)
        right = {"accuracy": _share(trace.logits, batch.values[..., -1])}
        for t in inner:
            right[f"behind_{t}"] = _share(model.readout(trace.residual[t]), layer_target(prompts, batch, t))
        return right

    def batch(step: int) -> SequentialBatch:
        return prompts.batch(step, seed=seeds["data"], size=chosen.batch)

    row = train(chosen, model, loss, batch, evaluate, seed=seed, scratch=scratch)
    guess = prompts.best_guesses(evaluation(EVALUATION_STEP))
    return {
        **row,
        "chance": guess["tables"],
        "chance_knowing_w": guess["w"],
        "chance_knowing_start": guess["start"],
        "tokens": task.prompt_length,
        "composed": task.L,
    }


def layer_target(prompts: SequentialPrompts, batch: SequentialBatch, t: int) -> Tensor:
    """What the answering token is asked for behind layer t (1-based): i_{min(t - late, L)}. -> (B, m)."""
    return batch.values[..., min(t - prompts.late, prompts.task.L)]


def table_target(prompts: SequentialPrompts, tables: tuple[Tensor, ...], t: int) -> Tensor:
    """What table tokens are asked for behind layer t under "early": (B, N_0 + ... + N_{L-1}, n_answers).

    Token a of z_l: the share of each value among z_{l+t}(w_{l+t-1}, ... z_{l+1}(w_l, z_l(a))) over all w.
    Where the tables end, so do the look-ups.
    """
    task, parts = prompts.task, {}
    for l in range(task.L):  # 0-based here: tables[l] is z_{l+1}
        values = tables[l][..., None]  # (B, N_l, C): C values for each token
        for r in range(l + 1, min(l + t, task.L - 1) + 1):
            switch = torch.arange(task.ns[r - 1], device=values.device) * task.N[r - 1]
            places = (values[..., None] + switch).flatten(2)  # (B, N_l, C n)
            values = tables[r].gather(1, places.flatten(1)).unflatten(1, places.shape[1:])
        parts[f"z_{l + 1}"] = one_hot(values, task.n_answers).float().mean(dim=2)
    return torch.cat([parts[name] for name in prompts.listed_tables], dim=1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the questions, in nats. logits: (B, m, n), target: (B, m)."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def _share(logits: Tensor, target: Tensor) -> float:
    """Share of the questions answered rightly."""
    return (logits.argmax(dim=-1).cpu() == target).double().mean().item()
