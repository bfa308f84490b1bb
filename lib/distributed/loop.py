"""The loop of `lib.training.fit` over several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from tqdm import tqdm

from lib.choices import check_choice
from lib.distributed.ranks import gather, join, own_device, same_everywhere
from lib.distributed.states import States
from lib.optimizers import Optimizer
from lib.training import History, check_precision

SHARDS = ("full", "none")


def fit_distributed(
    model: nn.Module,
    loss: Callable[[nn.Module, object], Tensor],
    batch: Callable[[int], object],
    *,
    steps: int,
    optimizer: Optimizer,
    micro_batches: int = 1,
    shard: str = "full",
    precision: str = "float32",
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 40,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    identity: Mapping | None = None,
    device: str = "auto",
    progress: bool = True,
) -> History:
    """Train `model` (a `Transformer` built from the same seed on every rank) for `steps` steps, on all ranks.

    batch(step) -> the whole batch, the same on every rank, as in `lib.training.fit`: tensor, or (named) tuple
    or dict of tensors, rows first. Each rank trains on its share of the rows, in `micro_batches` parts whose
    gradients are added up. loss(model, part) -> scalar, a mean over the rows: shares are averaged.
    loss and evaluate call the model itself or its `trace`, equally often on every rank: layers are gathered
    when they are called. evaluate(model, steps_done) -> scores by name; the mean over ranks is recorded.
    shard: "full", each rank keeps 1/N of weights, gradients and moments; "none", all of them (data parallel).
    precision "bfloat16": layers compute in it; weights, moments and sums over ranks stay float32.
    Muon works sharded, but communicates at each of its iterations; AdamW does not communicate at all.
    checkpoint: a folder that all ranks see; the newest whole checkpoint in it is continued. Ranks, shard and
    micro_batches may differ from those that wrote it; identity and the rest are as in `lib.training.fit`.
    device "auto": cuda where there is one. Afterwards `model` is still sharded; `load_trained` fills a plain
    one.

    Raises ValueError for settings that do not fit, CheckpointError for a damaged or another run's checkpoint,
    OSError if one cannot be written, FloatingPointError when loss, gradient or score stop being finite.
    """
    counts = {"steps": steps, "micro_batches": micro_batches}
    counts |= {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")
    check_choice("shard", shard, SHARDS)
    device = own_device(device)
    check_precision(precision, device)
    if isinstance(model, FSDPModule):
        raise ValueError("this model was sharded by an earlier fit_distributed; build it anew from its seed")
    join(device)
    step0 = same_everywhere(model.weights_hash())
    _spread(model.train(), shard, precision, device)
    parts = optimizer.build(model)
    history, saved = History(step0=step0), None
    if checkpoint is not None:
        plan = {
            "step0": step0,
            "optimizer": asdict(optimizer),
            "steps": steps,
            "evaluate_every": evaluate_every,
            "precision": precision,
            **(identity or {}),
        }
        saved = States(checkpoint, plan)
        saved.resume(model, parts, history)
    hidden = not progress or dist.get_rank() > 0
    with tqdm(total=steps, initial=history.steps, unit="step", disable=hidden, leave=False) as bar:
        while history.steps < steps:
            for part in parts:
                part.zero_grad()
                for group in part.param_groups:
                    group["lr"] = group["peak_lr"] * optimizer.factor(history.steps, steps)
            value = torch.zeros((), device=device)
            for i, rows in enumerate(_shares(batch(history.steps), micro_batches, device)):
                # With "full", each part's gradients are summed at once: waiting would keep them unsharded
                model.set_requires_gradient_sync(shard == "full" or i == micro_batches - 1)
                one = loss(model, rows) / micro_batches
                one.backward()
                value += one.detach()
            dist.all_reduce(value)
            mean = value.item() / dist.get_world_size()
            norm = nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip).full_tensor().item()
            if not (math.isfinite(mean) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"loss {mean}, gradient norm {norm} at step {history.steps}; the weights were not "
                    f"updated. Kept: {saved or 'no checkpoint'}; try a smaller learning rate"
                )
            for part in parts:
                part.step()
            history.loss.append(mean)
            done = history.steps
            if evaluate is not None and (done % evaluate_every == 0 or done == steps):
                history.evaluations.append((done, _scores(model, evaluate, done)))
            if saved and (done % checkpoint_every == 0 or done == steps):
                saved.save(model, parts, history)
            bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
            bar.update()
    return history


def _spread(model: nn.Module, shard: str, precision: str, device: str) -> None:
    """Hand the model's weights to FSDP, each sublayer for itself, the rest with the model.

    "none" is the mesh whose shards are whole: its ranks hold copies, and gradients are averaged over them.
    """
    kind, world = torch.device(device).type, dist.get_world_size()
    if shard == "full":
        mesh = init_device_mesh(kind, (world,))
    else:
        mesh = init_device_mesh(kind, (world, 1), mesh_dim_names=("copies", "shards"))
    inner = outer = MixedPrecisionPolicy()
    if precision == "bfloat16":
        inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        outer = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    for layer in model.layers:  # sublayers: a layer of `Transformer` is never called as a whole
        fully_shard(layer.attention, mesh=mesh, mp_policy=inner)
        fully_shard(layer.mlp, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=outer)
    register_fsdp_forward_method(model, "trace")


def _shares(batch: object, micro_batches: int, device: str) -> Iterator[object]:
    """This rank's rows of a whole batch, in `micro_batches` parts. ValueError if the rows do not divide."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = sorted({len(tensor) for tensor in _tensors(batch)})
    if len(sizes) > 1:
        raise ValueError(f"the tensors of a batch must have the same number of rows, got {sizes}")
    if sizes[0] % (world * micro_batches):
        raise ValueError(
            f"a batch of {sizes[0]} rows does not divide into {world} rank(s) x {micro_batches} parts; "
            f"give batches of a multiple of {world * micro_batches} rows"
        )
    size = sizes[0] // (world * micro_batches)
    for i in range(rank * micro_batches, (rank + 1) * micro_batches):
        yield _rows(batch, slice(i * size, (i + 1) * size), device)


def _tensors(batch: object) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return [tensor for part in parts for tensor in _tensors(part)]


def _rows(batch: object, which: slice, device: str) -> object:
    """These rows of every tensor of a batch, on `device`."""
    if isinstance(batch, Tensor):
        return batch[which].to(device)
    if isinstance(batch, Mapping):
        return {name: _rows(part, which, device) for name, part in batch.items()}
    parts = [_rows(part, which, device) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def _scores(model: nn.Module, evaluate: Callable, done: int) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        each = gather({name: float(score) for name, score in evaluate(model, done).items()})
    model.train()
    scores = {name: fmean(found[name] for found in each) for name in each[0]}
    if not all(math.isfinite(score) for score in scores.values()):
        raise FloatingPointError(f"after {done} steps the evaluation gave {scores}")
    return scores
