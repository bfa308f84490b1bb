"""G small models of one configuration, trained in one process along a model axis.

    histories = fit_together(models, loss, batch, steps=200, optimizer=Optimizer(muon_lr=0.03))

Each model is trained as `lib.training.fit` would train it alone, on data, gradient clipping and an early stop
of its own; only the arithmetic is shared. The weights are stacked, `torch.func.vmap` runs the loss forward
for all models at once, and autograd leads back to each of them.

Equal to `fit` within rounding. In float32 the losses agree to about 1e-6 for as long as nothing magnifies it.
Muon does, tenfold every ten or twenty steps once it learns (d = 16): after about 100 steps a model goes
another way than alone, as it would on another machine. In float64 it stays within 1e-6 for 200 steps.

It pays where a step is mostly overhead. On one CPU core, with two layers, 24 tokens, 32 prompts and Muon, a
model's step costs 1.5 to 1.7 times less with G = 4 and 1.8 to 2.4 with G = 16 at d = 16, 1.2 to 1.3 and 1.3
to 1.6 at d = 32, 1.1 to 1.2 at d = 64; with G = 1 up to 1.7 times more. Tracing takes half a second. On a
GPU, where small kernels wait for their launch, it should pay more: not measured.

Two other forms were measured and not taken. `vmap(grad(...))` costs 1.1 to 1.2 times more at G = 4, as its
backward pass runs in Python too. Layers written for batched weights cost 1.1 to 1.5 times less at G = 4 and
16, but they are a second Transformer, and a loss that knows of the axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map  # the trees that vmap takes apart; torch has no public name for it
from tqdm import tqdm

from lib.checkpoints import Checkpoint
from lib.optimizers import Optimizer
from lib.training import History, _evaluate, _everything, _kept, _reached, _resume  # one loop, one format


def fit_together(
    models: Sequence[nn.Module],
    loss: Callable[[nn.Module, object], Tensor],
    batch: Callable[[int], object],
    *,
    steps: int,
    optimizer: Optimizer,
    evaluate: Callable[[int, nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 40,
    stop: float | None = None,
    checkpoint: Path | None = None,
    identity: Mapping | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> list[History]:
    """Train `models` in place. -> one History each, within rounding that of `fit` on the model alone.

    loss(model, batch) -> scalar, as in `fit`, for one model and its own part of the batch. It is traced once
    (`torch.export`), so it must be tensor operations throughout, without branches on values.
    batch(step): the G batches as one: a (G, ...) tensor, or (named) tuple or dict of them, of the same shapes
    at every step.
    evaluate(g, model, steps_done): scores of model g, the first compared with `stop`, as in `fit`. A model
    that reaches it stops there: its weights freeze, and it costs no more time.
    checkpoint: a folder, saved after each step; a killed run continues. The best weights are not kept.
    identity: as in `fit`.

    Raises ValueError for models that differ in more than their weights, CheckpointError and
    FloatingPointError as `fit`; one model whose loss is no longer finite stops them all.
    """
    _check(models, steps=steps, evaluate=evaluate, evaluate_every=evaluate_every, stop=stop)
    everyone = nn.ModuleList(models).to(device).train()
    muon_on = tuple(f"{g}.{name}" for g in range(len(models)) for name in optimizer.muon_on)
    parts = replace(optimizer, muon_on=muon_on).build(everyone)  # one optimizer moves the weights of all
    histories = [History(step0=model.weights_hash()) for model in models]
    saved = None
    if checkpoint is not None:
        plan = {
            "step0": [history.step0 for history in histories],
            "optimizer": asdict(optimizer),
            "steps": steps,
            "stop": stop,
            "evaluate_every": evaluate_every,
            **(identity or {}),
        }
        saved = Checkpoint(checkpoint, plan)
        _continue(histories, _resume(saved, everyone, parts, History(step0=""), None), stop)

    traced, done = None, max(history.steps for history in histories)
    with tqdm(total=steps, initial=done, unit="step", disable=not progress, leave=False) as bar:
        while running := [g for g, h in enumerate(histories) if h.steps < steps and not h.stopped]:
            done = histories[running[0]].steps
            trained = [models[g] for g in running]
            here = tree_map(partial(_rows, running, len(models), device), batch(done))  # (R, ...), R running
            if traced is None:
                traced = _trace(loss, trained, here)
            for part in parts:
                for group in part.param_groups:
                    group["lr"] = group["peak_lr"] * optimizer.factor(done, steps)
            everyone.zero_grad()  # the optimizers pass over a weight without a gradient: a stopped model's
            values, norms = _gradients(traced, trained, here, clip=optimizer.clip)
            for g, value, norm in zip(running, values, norms, strict=True):
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"model {g} of {len(models)}: loss {value}, gradient norm {norm} at step {done}; no "
                        f"weights were updated. {_kept(saved, done, 1)}"
                    )
            for part in parts:
                part.step()
            for g, value in zip(running, values, strict=True):
                histories[g].loss.append(value)
            done += 1
            if evaluate is not None and (done % evaluate_every == 0 or done == steps):
                for g in running:
                    _evaluate(models[g], partial(evaluate, g), histories[g], stop)
                if saved:  # before the step itself: a resumed run drops what lies ahead
                    saved.record(_evaluations(histories))
            if saved:
                tensors = _everything(everyone, parts, histories[running[0]], steps)
                saved.save({**tensors, "loss": _losses(histories, steps)})
            bar.set_postfix_str(f"{len(running)} models, mean loss {sum(values) / len(values):.3f}", False)
            bar.update()
    return histories


def _check(models: Sequence[nn.Module], *, steps, evaluate, evaluate_every, stop) -> None:
    if steps < 1 or evaluate_every < 1:
        raise ValueError(f"steps and evaluate_every are at least 1, got {steps}, {evaluate_every}")
    if stop is not None and evaluate is None:
        raise ValueError(f"stop={stop} needs `evaluate`: nothing else tells when the target is reached")
    if not models:
        raise ValueError("a model axis needs models, got none")
    weights = [weight for model in models for weight in model.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise ValueError("two of the models share weights; give each one its own")
    for g, model in enumerate(models):
        if _shape(model) != _shape(models[0]):
            raise ValueError(
                f"model {g} has another configuration than model 0; they may differ in their weights only"
            )
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.requires_grad:
                raise ValueError(f"{name} of model {g} is not trained; a model axis trains every weight")


def _shape(model: nn.Module) -> tuple:
    """What must agree. Two heads or four have weights of the same shapes, so the configuration counts."""
    weights = [(name, p.shape, p.dtype) for name, p in model.named_parameters()]
    return type(model), getattr(model, "config", None), weights


def _rows(running: list[int], G: int, device: str, x: Tensor) -> Tensor:
    """The part (R, ...) of one tensor (G, ...) of a batch that belongs to the running models."""
    if x.dim() == 0 or len(x) != G:
        raise ValueError(
            f"batch(step) has one entry for each of {G} models first, got shape {tuple(x.shape)}"
        )
    return (x if len(running) == G else x[running]).to(device)


class _Loss(nn.Module):
    """loss(model, ·) as a module, which is what `torch.export` and `functional_call` take."""

    def __init__(self, loss: Callable, model: nn.Module):
        super().__init__()
        self.loss, self.model = loss, model

    def forward(self, batch: object) -> Tensor:
        return self.loss(self.model, batch)


def _trace(loss: Callable, models: Sequence[nn.Module], batch: object) -> nn.Module:
    """The loss as a graph of tensor operations, to be run with the weights of any of the models.

    A model checks its tokens by value, which vmap forbids and a graph leaves out. So every model runs its
    first batch as it is, and a wrong token is refused here, by its name.
    """
    rows = [tree_map(lambda x, i=i: x[i], batch) for i in range(len(models))]
    with torch.no_grad():
        for model, row in zip(models, rows, strict=True):
            loss(model, row)
    return torch.export.export(_Loss(loss, models[0]), (rows[0],)).module()


def _gradients(
    traced: nn.Module, models: Sequence[nn.Module], batch: object, *, clip: float
) -> tuple[list[float], list[float]]:
    """Put each model's clipped gradient into its weights. -> losses and gradient norms before clipping."""
    each = [dict(model.named_parameters()) for model in models]
    stacked = {
        name: torch.stack([weights[name].detach() for weights in each]).requires_grad_() for name in each[0]
    }

    def one(weights: Mapping[str, Tensor], batch: object) -> Tensor:
        return functional_call(traced, {f"model.{name}": w for name, w in weights.items()}, (batch,))

    losses = vmap(one)(stacked, batch)  # (R,)
    losses.sum().backward()  # no loss depends on another model, so each row is that model's own gradient
    found = {name: w.grad for name, w in stacked.items() if w.grad is not None}  # the loss may not use all
    norm = torch.stack([grad.flatten(1).norm(dim=1) for grad in found.values()]).norm(dim=0)  # (R,)
    share = (clip / (norm + 1e-6)).clamp(max=1.0)  # as nn.utils.clip_grad_norm_
    for name, grad in found.items():
        clipped = grad * share.view(-1, *[1] * (grad.dim() - 1))
        for weights, own in zip(each, clipped, strict=True):
            weights[name].grad = own
    return losses.tolist(), norm.tolist()


def _losses(histories: Sequence[History], steps: int) -> Tensor:
    """(steps, G) for a checkpoint, NaN where a model did no step."""
    loss = torch.full((steps, len(histories)), math.nan, dtype=torch.float64)
    for g, history in enumerate(histories):
        loss[: history.steps, g] = torch.tensor(history.loss, dtype=torch.float64)
    return loss


def _evaluations(histories: Sequence[History]) -> list:
    """[(steps done, [scores of each model, None if it had stopped before])] for a checkpoint."""
    scores = [dict(history.evaluations) for history in histories]
    return [(step, [of.get(step) for of in scores]) for step in sorted(set().union(*scores))]


def _continue(histories: Sequence[History], saved: History, stop: float | None) -> None:
    """Fill the histories from the joint one of a checkpoint: a row of losses a step, a list of scores."""
    for g, history in enumerate(histories):
        history.loss = [row[g] for row in saved.loss if not math.isnan(row[g])]
        history.evaluations = [(step, scores[g]) for step, scores in saved.evaluations if scores[g]]
        history.resumed_at = history.steps
        history.stopped = _reached(history, stop)
