"""Checkpoints that many processes write and any number of them can read.

torch's distributed checkpoints in their safetensors form: each rank writes its share, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lib.checkpoints import CheckpointError
from lib.distributed.ranks import gather, on_rank_0
from lib.training import History

FORMAT = 1


def load_trained(model: nn.Module, checkpoint: Path) -> int:
    """Put the newest weights of a folder into a plain `model`, in one process. -> the steps it had done.

    Raises FileNotFoundError where there are none, CheckpointError if they are damaged or do not fit.
    """
    saved = States(checkpoint, {})
    found = saved.newest()
    if found is None:
        raise FileNotFoundError(f"{saved.folder} holds no checkpoint of fit_distributed")
    step, state = found
    _verify(step, state["files"], alone=True)
    _load(_named("model", model.state_dict()), step, alone=True)
    return len(state["loss"])


class States:
    """Whole states of one run in `folder`: `step-N/` with a file of each rank and a `run.json`.

    A state is written under another name and renamed when it is whole, then its predecessor is deleted: a
    process killed at any moment leaves a whole one. `run.json` names every file with its SHA-256.
    """

    def __init__(self, folder: Path, identity: Mapping):
        self.folder = Path(folder)
        self.identity = json.loads(_canonical(identity))  # as it will be read back: tuples become lists

    def __str__(self) -> str:
        states = self._states()
        return f"{states[-1]}" if states else "no checkpoint yet"

    def resume(self, model: nn.Module, parts: list[torch.optim.Optimizer], history: History) -> None:
        """Continue the newest whole state, if there is one: weights, optimizers and history, in place."""
        found = on_rank_0(self._begin)
        if found is None:
            return
        step, state = found
        _verify(step, state["files"])
        moments = get_optimizer_state_dict(model, parts)  # also makes those of an optimizer that never moved
        _load(_state(model, moments), step)
        set_optimizer_state_dict(model, parts, moments)
        history.loss, history.resumed_at = state["loss"], len(state["loss"])
        history.evaluations = [(step, scores) for step, scores in state["evaluations"]]

    def save(self, model: nn.Module, parts: list[torch.optim.Optimizer], history: History) -> None:
        """Write this state, then drop older ones. OSError, on every rank, if any rank could not."""
        part = self.folder / f"step-{history.steps}.part"
        state = _state(model, get_optimizer_state_dict(model, parts))
        try:
            dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(part), save_distributed=True))
            own = {path.name: _digest(path) for path in part.glob(f"shard-{dist.get_rank() + 1:05d}-*")}
            files = {name: digest for found in gather(own) for name, digest in found.items()}
            on_rank_0(lambda: self._finish(part, files, history))
        except (dcp.CheckpointException, OSError) as error:
            raise OSError(
                f"{part} could not be written: {_reason(error)}. Kept: {self}; once that is mended, the same "
                "command goes on from there"
            ) from error

    def newest(self) -> tuple[Path, dict] | None:
        """(folder, run.json) of the newest whole state. CheckpointError if it is damaged."""
        states = self._states()
        if not states:
            return None
        index = states[-1] / "run.json"
        try:
            state = json.loads(index.read_bytes())
            if state.pop("digest") == hashlib.sha256(_canonical(state)).hexdigest():
                if state["format"] == FORMAT:
                    return states[-1], state
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            pass
        raise CheckpointError(
            f"{index} is missing, damaged, edited or of another version; {_remedy(states[-1])}"
        )

    def _begin(self) -> tuple[Path, dict] | None:
        """Rank 0: remove what was being written when a process ended; what is to be continued."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob("step-*.part"):
            shutil.rmtree(part)
        found = self.newest()
        if found is not None and found[1]["identity"] != self.identity:
            there, here = found[1]["identity"], self.identity
            names = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
            differences = (f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in names)
            raise CheckpointError(
                f"{found[0] / 'run.json'} belongs to another run: {', '.join(differences)}; "
                "give this run a folder of its own, or delete that one"
            )
        return found

    def _finish(self, part: Path, files: Mapping[str, str], history: History) -> None:
        """Rank 0: make a written state the newest."""
        missing = [name for name in files if not (part / name).exists()]
        if missing:
            raise OSError(
                f"{part} lacks {', '.join(missing)}, which other ranks wrote: "
                "the checkpoint folder must lie on a file system that all machines share"
            )
        state = {"format": FORMAT, "identity": self.identity, "files": dict(files)}
        state |= {"loss": history.loss, "evaluations": history.evaluations}
        digest = hashlib.sha256(_canonical(state)).hexdigest()
        (part / "run.json").write_bytes(_canonical({**state, "digest": digest}))
        older = self._states()
        part.rename(part.with_suffix(""))
        for step in older:
            shutil.rmtree(step)

    def _states(self) -> list[Path]:
        """Whole states, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.suffix != ".part"]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _state(model: nn.Module, moments: Mapping) -> dict[str, Tensor]:
    """Tensors of model and optimizers by name; every rank names all, and holds its shard of each."""
    state = _named("model", get_model_state_dict(model))
    for name, remembered in moments["state"].items():
        state |= _named(f"optimizer/{name}", remembered)
    return state


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor.detach() for name, tensor in tensors.items()}


def _load(state: dict[str, Tensor], step: Path, *, alone: bool = False) -> None:
    """Fill the tensors of `state` in place. CheckpointError if the files hold others."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said even where it is meant
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(step)), no_dist=alone)
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{step} does not fit this model: {_reason(error)}") from error


def _verify(step: Path, files: Mapping[str, str], *, alone: bool = False) -> None:
    """CheckpointError, on every rank, if a file is missing, damaged or too many. Each rank reads a share."""
    names = sorted({*files, *(path.name for path in step.glob("*.safetensors"))})
    mine = names if alone else names[dist.get_rank() :: dist.get_world_size()]
    wrong = [name for name in mine if not (step / name).exists() or _digest(step / name) != files.get(name)]
    for found in [wrong] if alone else gather(wrong):
        if found:
            raise CheckpointError(f"{step / found[0]} is missing, damaged or no part of it; {_remedy(step)}")


def _remedy(step: Path) -> str:
    return f"delete {step} to start this run again"


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: a CheckpointException would give the tracebacks of all ranks."""
    if not isinstance(error, dcp.CheckpointException):
        return str(error)
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _canonical(value: object) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
