"""What a long training will take, said before it begins: by formula, then by a few timed steps."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lib.metrics.attention_cost import training_flops, transformer_flops, transformer_parameters
from lib.metrics.training_memory import training_memory
from lib.models.transformer import TransformerConfig

if TYPE_CHECKING:
    from lib.experiments.large_language import LargeSettings

RESERVE_GB, FRAGMENTS = 1.0, 0.05  # of CUDA itself, and what its allocator cannot reuse: assumed


def estimate_large(chosen: LargeSettings, config: TransformerConfig, *, ranks: int, device: str) -> dict:
    """By formula, nothing allocated. GB are 10^9 bytes, on each of `ranks` devices.

    memory_gb: the parts of `training_memory`, and on CUDA a reserve (assumed: 1 GB and 5 %); total_gb; of
    which available_gb (None: unknown). flops_per_token: of training, forward and backward, all T^2 pairs
    counted. gradient_parts: parts of a batch whose gradients each device adds up.
    """
    kind = device.partition(":")[0]
    parts = training_memory(
        config, micro_batch=chosen.micro_batch, T=chosen.T, precision=chosen.precision, device=kind,
        compiled=chosen.compile, recompute=chosen.recomputes, ranks=ranks,
        sharded=chosen.shard == "full",
    )  # fmt: skip
    memory = {name: round(n / 1e9, 3) for name, n in parts.items() if name != "total"}
    if kind == "cuda":
        memory["reserve"] = round(RESERVE_GB + FRAGMENTS * parts["total"] / 1e9, 3)
    return {
        "model_parameters": transformer_parameters(config)["total"],
        "memory_gb": memory,
        "total_gb": round(sum(memory.values()), 3),
        "available_gb": chosen.device_memory_gb or device_memory_gb(device, ranks),
        "flops_per_token": training_flops(transformer_flops(config, chosen.T)["total"]) // chosen.T,
        "tokens_per_step": chosen.batch * chosen.T,
        "training_tokens": chosen.steps * chosen.batch * chosen.T,
        "gradient_parts": chosen.micro_batches(ranks),
        "devices": ranks,
        "computed_on": kind,
    }


def device_memory_gb(device: str, ranks: int) -> float | None:
    """What the device has: all of a GPU's memory, this rank's part of the machine's; None if unknown."""
    if device.startswith("cuda"):
        return round(torch.cuda.mem_get_info(device)[1] / 1e9, 1) if torch.cuda.is_available() else None
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 / ranks, 1)


def check_fits(found: dict, chosen: LargeSettings) -> None:
    """ValueError if the estimate exceeds what the device has."""
    if found["available_gb"] is None or found["total_gb"] <= found["available_gb"]:
        return
    parts = ", ".join(f"{name} {gb:.1f}" for name, gb in found["memory_gb"].items())
    ways = {
        f"a micro_batch below {chosen.micro_batch}": chosen.micro_batch > 1,
        "recompute=True": not chosen.recomputes,
        "precision='bfloat16'": chosen.precision == "float32",
        "shard='full'": chosen.shard != "full",
        "more GPUs (torchrun --nproc-per-node=N)": True,
        "a smaller model": True,
    }
    raise ValueError(
        f"this training needs about {found['total_gb']:.1f} GB on each device ({parts}), which has "
        f"{found['available_gb']:.1f}. Try {', '.join(way for way, helps in ways.items() if helps)}; "
        "check_memory=False tries it all the same"
    )


def timed(
    chosen: LargeSettings,
    new_model: Callable[[], nn.Module],
    fit: Callable,
    batch: Callable[[int], Tensor],
    *,
    device: str,
) -> dict:
    """Train a copy that is thrown away for one step and `trial_steps` more: tokens_per_s of those, hours that
    all steps and evaluations take at that rate, and on CUDA the largest memory in use, trial_peak_gb."""
    began: list[float] = []

    def watched(step: int) -> Tensor:
        _wait(device)
        began.append(time.perf_counter())
        return batch(step)

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    model = new_model()
    fit(model, watched, steps=chosen.trial_steps + 1)
    _wait(device)
    rate = chosen.trial_steps * chosen.batch * chosen.T / (time.perf_counter() - began[1])
    peak = None if device == "cpu" else round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    del model
    gc.collect()  # a sharded model refers to itself
    if device != "cpu":
        torch.cuda.empty_cache()
    evaluations = -(-chosen.steps // chosen.evaluate_every)
    read = chosen.steps * chosen.batch + evaluations * chosen.evaluation_windows / 3  # forward alone: a third
    return {
        "trial_tokens_per_s": round(rate, 1),
        "trial_hours": round(read * chosen.T / rate / 3600, 4),
        "trial_peak_gb": peak,
    }


def report(found: dict, *, trial: bool = False) -> str:
    """The estimates in words. trial: only what the timed steps add."""
    if trial:
        flops = found["trial_tokens_per_s"] * found["flops_per_token"] / found["devices"]
        peak = found["trial_peak_gb"]
        return (
            f"Timed: {found['trial_tokens_per_s']:,.0f} tokens/s, {flops / 1e12:.3g} TFLOP/s on each device; "
            f"all of it would take {found['trial_hours']:.3g} hours."
            + ("" if peak is None else f" At most {peak:.1f} GB were in use.")
        )
    parts = ", ".join(f"{name} {gb:.3g}" for name, gb in found["memory_gb"].items())
    has = found["available_gb"]
    return (
        f"{found['model_parameters']:,} parameters; {found['training_tokens']:,} tokens, "
        f"{found['tokens_per_step']:,} a step, in {found['gradient_parts']} part(s) on each of "
        f"{found['devices']} device(s).\n"
        f"Estimated, not measured: {found['total_gb']:.3g} GB on each ({parts}), which has "
        f"{'an unknown size' if has is None else f'{has:.3g} GB'}; "
        f"{found['flops_per_token'] / 1e9:.3g} GFLOP a token."
    )


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
