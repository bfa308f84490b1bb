"""The training loop of the book. There is one.

    history = fit(model, loss, batch, steps=200, optimizer=Optimizer(muon_lr=0.03), checkpoint=folder)

Data depend on the step alone (`batch(step)`), the learning rate too, and each step can leave a checkpoint, so
a run that is killed continues where it was: on a CPU, with the same torch and number of threads, every later
weight and loss is the one of the unbroken run, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib.checkpoints import Checkpoint
from lib.choices import check_choice
from lib.optimizers import Optimizer

ROLES = ("init", "data", "order", "evaluation")
PRECISIONS = ("float32", "bfloat16")


def seeds_by_role(seed: int) -> dict[str, int]:
    """One seed, split into independent ones: init, data, order, evaluation.

    >>> seeds_by_role(0) == seeds_by_role(0), len(set(seeds_by_role(0).values()))
    (True, 4)
    """
    states = np.random.SeedSequence(seed).generate_state(len(ROLES))
    return {role: int(state) for role, state in zip(ROLES, states, strict=True)}


@dataclass
class History:
    """What happened. `loss[t]` is the loss before the update of step t; scores are those after it."""

    step0: str  # hash of the weights before the first step
    loss: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (steps done, scores)
    stopped: bool = False  # the target was reached before the budget
    resumed_at: int = 0  # steps that an earlier process had done

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.loss)

    @property
    def best(self) -> tuple[int, float] | None:
        """(steps done, score) of the best evaluation, the earliest of equals."""
        found = [(step, _first(scores)) for step, scores in self.evaluations]
        return max(found, key=lambda at: (at[1], -at[0])) if found else None

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(steps done, score) at each evaluation."""
        return [(step, scores[name]) for step, scores in self.evaluations]


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, object], Tensor],
    batch: Callable[[int], object],
    *,
    steps: int,
    optimizer: Optimizer,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 40,
    stop: float | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1,
    identity: Mapping | None = None,
    device: str = "cpu",
    precision: str = "float32",
    progress: bool = True,
) -> History:
    """Train `model` (a module with `weights_hash()`, as `Transformer`) in place for `steps` steps.

    loss(model, batch) -> scalar; batch(step) -> tensor, or (named) tuple or dict of tensors, a function of
    the step alone; neither may draw from torch's global generator, whose state is not saved.
    evaluate(model, steps_done) -> scores by name, every `evaluate_every` steps and after the last. The first
    score counts: higher is better, the best weights are kept, and training stops once it reaches `stop`.
    checkpoint: a folder. If it holds this run, training continues from there; with `checkpoint_every=1` a
    killed process loses at most the step in flight. identity: JSON values that tell this run from others
    (settings, seeds); the weights at step 0, the optimizer and the budget are added to it.
    precision "bfloat16" is autocast; refused on a CPU without such instructions.

    Raises CheckpointError for a checkpoint that is damaged or belongs to another run, FloatingPointError when
    loss, gradient or score stop being finite; the weights of the last good step are then in the checkpoint.
    """
    if steps < 1 or evaluate_every < 1 or checkpoint_every < 1:
        raise ValueError(
            "steps, evaluate_every and checkpoint_every are at least 1, "
            f"got {steps}, {evaluate_every}, {checkpoint_every}"
        )
    if stop is not None and evaluate is None:
        raise ValueError(f"stop={stop} needs `evaluate`: nothing else tells when the target is reached")
    check_precision(precision, device)
    model.to(device).train()
    parts = optimizer.build(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    history = History(step0=model.weights_hash())
    saved = None
    if checkpoint is not None:
        plan = {
            "step0": history.step0,
            "optimizer": asdict(optimizer),
            "steps": steps,
            "stop": stop,
            "evaluate_every": evaluate_every,
            "precision": precision,
            **(identity or {}),
        }
        saved = Checkpoint(checkpoint, plan)
        history = _resume(saved, model, parts, history, stop)
    with tqdm(total=steps, initial=history.steps, unit="step", disable=not progress, leave=False) as bar:
        while history.steps < steps and not history.stopped:
            for part in parts:
                for group in part.param_groups:
                    group["lr"] = group["peak_lr"] * optimizer.factor(history.steps, steps)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
                value = loss(model, _to(device, batch(history.steps)))
            for weight in weights:
                weight.grad = None
            value.backward()
            norm = nn.utils.clip_grad_norm_(weights, optimizer.clip)
            if not (math.isfinite(value.item()) and math.isfinite(norm.item())):
                raise FloatingPointError(
                    f"loss {value.item()}, gradient norm {norm.item()} at step {history.steps}; the weights "
                    f"were not updated. {_kept(saved, history.steps, checkpoint_every)}"
                )
            for part in parts:
                part.step()
            history.loss.append(value.item())
            done, improved = history.steps, None
            if evaluate is not None and (done % evaluate_every == 0 or done == steps):
                improved = _evaluate(model, evaluate, history, stop)
            if saved and improved is not None:  # before the step itself: a resumed run drops what lies ahead
                saved.record(history.evaluations, _weights(model) if improved else None)
            if saved and (done % checkpoint_every == 0 or done == steps or history.stopped):
                saved.save(_everything(model, parts, history, steps))
            bar.set_postfix_str(f"loss {history.loss[-1]:.3f}", refresh=False)
            bar.update()
    return history


def check_precision(precision: str, device: str) -> None:
    """Raises ValueError for bfloat16 on a CPU that would emulate it, measured at 9 to 22 times slower."""
    check_choice("precision", precision, PRECISIONS)
    if precision == "bfloat16" and torch.device(device).type == "cpu" and not cpu_has_bfloat16():
        raise ValueError(
            "precision 'bfloat16' on this CPU would be emulated, 9 to 22 times slower than float32: no "
            "bfloat16 instructions were found. Use precision='float32', or a GPU"
        )


def cpu_has_bfloat16() -> bool:
    """Whether torch sees bfloat16 instructions (False where this torch cannot tell)."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def load_best(model: nn.Module, checkpoint: Path) -> None:
    """Put the weights of the best evaluation into `model`. FileNotFoundError where there was none."""
    saved = Checkpoint(checkpoint, {})
    saved.load(any_run=True)
    _restore(model, saved.best())


def _kept(saved: Checkpoint | None, done: int, checkpoint_every: int) -> str:
    """Where the last good checkpoint is."""
    if saved is None or done < checkpoint_every:
        return "No checkpoint was kept."
    last = done - done % checkpoint_every - 1
    return f"The last good checkpoint, after step {last}, is kept in {saved}; try a smaller learning rate."


def _evaluate(model: nn.Module, evaluate: Callable, history: History, stop: float | None) -> bool:
    """Add one evaluation to the history; True if its first score is the best so far."""
    model.eval()
    with torch.no_grad():
        scores = {name: float(score) for name, score in evaluate(model, history.steps).items()}
    model.train()
    if not all(math.isfinite(score) for score in scores.values()):
        raise FloatingPointError(f"after {history.steps} steps the evaluation gave {scores}")
    before = history.best
    history.evaluations.append((history.steps, scores))
    history.stopped = _reached(history, stop)
    return history.best != before


def _reached(history: History, stop: float | None) -> bool:
    return stop is not None and bool(history.evaluations) and _first(history.evaluations[-1][1]) >= stop


def _first(scores: Mapping[str, float]) -> float:
    return next(iter(scores.values()))


def _to(device: str, batch: object) -> object:
    """Tensors of a batch on `device`: a tensor, a dict, or a (named) tuple of them."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to(device, part) for name, part in batch.items()}
    parts = [_to(device, part) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Each weight once (a tied readout has no name of its own) and the buffers that belong to the model."""
    persistent = model.state_dict()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {f"model/{name}": tensor for name, tensor in named.items() if name in persistent}


def _everything(
    model: nn.Module, parts: list[torch.optim.Optimizer], history: History, steps: int
) -> dict[str, Tensor]:
    """What a checkpoint keeps of a step; losses have room for all steps, so that the layout never changes."""
    tensors = _weights(model)
    for o, i, weight, part in _remembered(parts):
        tensors |= {f"optimizer/{o}/{i}/{name}": value for name, value in part.state[weight].items()}
    loss = torch.zeros(steps, dtype=torch.float64)
    loss[: history.steps] = torch.tensor(history.loss, dtype=torch.float64)
    return {**tensors, "loss": loss, "steps_done": torch.tensor(history.steps)}


def _remembered(parts: list[torch.optim.Optimizer]) -> Iterator[tuple]:
    for o, part in enumerate(parts):
        for i, weight in enumerate(part.param_groups[0]["params"]):
            yield o, i, weight, part


def _resume(
    saved: Checkpoint,
    model: nn.Module,
    parts: list[torch.optim.Optimizer],
    fresh: History,
    stop: float | None,
) -> History:
    """Continue the saved run, or begin the fresh one where no step was saved."""
    evaluations, tensors = saved.load()
    if tensors is None:
        saved.record([])
        return fresh
    _restore(model, tensors)
    for o, i, weight, part in _remembered(parts):
        start = f"optimizer/{o}/{i}/"
        part.state[weight] = {
            key.removeprefix(start): value.to(weight.device)
            for key, value in tensors.items()
            if key.startswith(start)
        }
    done = int(tensors["steps_done"])
    history = History(step0=fresh.step0, loss=tensors["loss"][:done].tolist(), resumed_at=done)
    history.evaluations = [(step, scores) for step, scores in evaluations if step <= done]
    history.stopped = _reached(history, stop)
    return history


@torch.no_grad()
def _restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in _weights(model).items():
        tensor.copy_(tensors[name])
