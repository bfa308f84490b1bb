"""The processes of one training: what torchrun told this one, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from lib.choices import check_choice

DEVICES = ("auto", "cpu", "cuda")
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process


def own_device(name: str) -> str:
    """The torch device of this rank. ValueError for half of torchrun's environment, or a GPU too few."""
    check_choice("device", name, DEVICES)
    missing = [key for key in LAUNCH if key not in os.environ]  # torchrun has no other way to tell
    if missing and len(missing) < len(LAUNCH) and not dist.is_initialized():
        given = ", ".join(key for key in LAUNCH if key not in missing)
        raise ValueError(
            f"half of a launch: {given} set in the environment, {', '.join(missing)} missing. Start with "
            "`torchrun --nproc-per-node=N script.py`, or unset them to run in one process"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    rank, gpus = dist.get_node_local_rank(fallback_rank=0), torch.cuda.device_count()
    if rank >= gpus:
        raise ValueError(
            f"process {rank} of this machine has no GPU of its own, there are {gpus}; "
            f"start with --nproc-per-node={gpus or 'N'}" + ("" if gpus else " and device='cpu'")
        )
    return f"cuda:{rank}"


def join(device: str) -> None:
    """Join the ranks that torchrun started; without it, be the only one. The group stays for the model."""
    if device != "cpu":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"  # gloo also for what is not a tensor
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After --max-restarts the store still holds the addresses of the dead (pytorch issue 135712).
            # The number of restarts tells them apart, on one machine; several machines count differently
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def same_everywhere(step0: str) -> str:
    """ValueError unless every rank begins with the same weights."""
    hashes = gather(step0)
    other = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
    if other:
        raise ValueError(
            f"rank(s) {', '.join(map(str, other))} began with other weights than rank 0; "
            "build the model from the same seed and configuration on every rank"
        )
    return step0


def gather(value: object) -> list:
    """The values of all ranks, on every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def on_rank_0(work: Callable[[], object]) -> object:
    """What `work()` returned on rank 0, or the error it raised there, on every rank."""
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
