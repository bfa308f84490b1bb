"""A run on disk, cheap enough to be written after every step, and never a half of it.

A folder holds
    state.json            which run this is, its evaluations, the best weights' file; replaced in one move
    last-0, last-1        .safetensors, two slots written in turn: weights, optimizer, losses after a step
    best-0, best-1        .safetensors, weights of the best evaluation; `state.json` names the valid one
A slot keeps its layout for the whole run, so it is mapped into memory and a save is a copy and a hash: about
1 ms for 70,000 weights with their optimizer, where writing and renaming files took 6 ms. Its tensor `seal` is
the SHA-256 of all bytes before it, then a flag, 0 while the slot is being written. A process killed at any
moment leaves the other slot whole, and mapped pages belong to the operating system, not to the process.
Nothing is flushed to the disk itself: a power cut may lose more, and the seals tell.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

FORMAT = 1
SEALED = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that belongs to another run."""


class Checkpoint:
    """The checkpoint in `folder`, of the run that `identity` describes (JSON values only)."""

    def __init__(self, folder: Path, identity: Mapping):
        self.folder = Path(folder)
        self.index = self.folder / "state.json"
        self.identity = json.loads(_canonical(identity))  # as it will be read back: tuples become lists
        self._best: dict | None = None  # {"file", "digest"} of the best weights
        self._maps: dict[int, tuple[mmap.mmap, dict[str, Tensor]]] = {}
        self._turn = 0  # the slot to write next

    def __str__(self) -> str:
        return str(self.folder)

    def load(self, *, any_run: bool = False) -> tuple[list, dict[str, Tensor] | None]:
        """(evaluations, tensors of the last saved step, or None where no step was saved).

        Raises CheckpointError for damage, and for another identity unless `any_run`.
        """
        slots = [self.folder / f"last-{i}.safetensors" for i in (0, 1)]
        if not self.index.exists():
            if any(slot.exists() for slot in slots):
                raise CheckpointError(f"{self.index} is missing beside its tensors; {self._remedy()}")
            return [], None
        state = self._read_index()
        if not any_run and state["identity"] != self.identity:
            raise CheckpointError(
                f"{self.index} belongs to another run: {_differences(state['identity'], self.identity)}; "
                "give this run a folder of its own, or delete that one"
            )
        self.identity, self._best = state["identity"], state["best"]  # the same, in the order of the file
        whole = [(self._read_slot(slot), i) for i, slot in enumerate(slots) if slot.exists()]
        whole = [(tensors, i) for tensors, i in whole if tensors is not None]
        if not whole:
            return [], None
        tensors, newest = max(whole, key=lambda found: int(found[0]["steps_done"]))
        self._turn = 1 - newest
        return state["evaluations"], tensors

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the older slot. The names and shapes are the same each time; `steps_done` is among them."""
        if self._turn not in self._maps:
            self._maps[self._turn] = self._map_slot(self._turn, tensors)
        memory, views = self._maps[self._turn]
        seal = views["seal"]
        seal[-1] = 0
        for name, tensor in tensors.items():
            views[name].copy_(tensor)
        with memoryview(memory) as content:
            digest = hashlib.sha256(content[: -len(seal)]).digest()
        seal[:-1] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        seal[-1] = SEALED
        self._turn = 1 - self._turn

    def record(self, evaluations: list, best: Mapping[str, Tensor] | None = None) -> None:
        """Replace `state.json`, and the best weights where new ones are given."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if best is not None:
            file = (
                "best-1.safetensors"
                if self._best and self._best["file"].startswith("best-0")
                else ("best-0.safetensors")
            )
            content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in best.items()})
            _replace(self.folder / file, content)
            self._best = {"file": file, "digest": _digest(content)}
        state = {"format": FORMAT, "identity": self.identity, "evaluations": evaluations, "best": self._best}
        _replace(self.index, _canonical({**state, "digest": _digest(_canonical(state))}))

    def best(self) -> dict[str, Tensor]:
        """The best weights; call `load` first. FileNotFoundError where no evaluation was recorded."""
        if self._best is None:
            raise FileNotFoundError(f"{self.index} names no best weights; give `fit` an evaluate")
        path = self.folder / self._best["file"]
        content = path.read_bytes() if path.exists() else b""
        if _digest(content) != self._best["digest"]:
            raise CheckpointError(f"{path} is {'damaged' if content else 'missing'}; {self._remedy()}")
        return safetensors.torch.load(content)

    def _read_index(self) -> dict:
        try:
            state = json.loads(self.index.read_bytes())
            claimed = state.pop("digest")
            if claimed == _digest(_canonical(state)) and state["format"] == FORMAT:
                return state
        except (ValueError, KeyError, AttributeError, TypeError):
            pass
        raise CheckpointError(f"{self.index} is damaged or was edited; {self._remedy()}")

    def _read_slot(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors of a slot, None if it was being written when its process ended."""
        content = path.read_bytes()
        if content and content[-1] == 0:
            return None
        seal, body = content[-33:-1], content[:-33]
        if len(content) < 33 or hashlib.sha256(body).digest() != seal:
            raise CheckpointError(f"{path} is damaged; {self._remedy()}")
        if _header(content)[0]["__metadata__"]["identity"] != self._identity_digest():
            raise CheckpointError(f"{path} belongs to another run than {self.index.name}; {self._remedy()}")
        return safetensors.torch.load(content)

    def _map_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> tuple[mmap.mmap, dict[str, Tensor]]:
        """Lay out an unsealed slot in a file, and map it. -> the memory, and views of its tensors by name."""
        path = self.folder / f"last-{slot}.safetensors"
        blank = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        blank["seal"] = torch.zeros(33, dtype=torch.uint8)  # wider types come first, so it is the last entry
        content = safetensors.torch.save(blank, {"identity": self._identity_digest()})
        _replace(path, content)
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        header, start = _header(content)
        views = {}
        for name, tensor in blank.items():
            first = start + header[name]["data_offsets"][0]
            flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
            views[name] = flat.view(tensor.shape)
        return memory, views

    def _identity_digest(self) -> str:
        return _digest(_canonical(self.identity))

    def _remedy(self) -> str:
        return f"delete {self.folder} to start this run again"


def _header(content: bytes) -> tuple[dict, int]:
    """The JSON header of a safetensors file, and where its data begin."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _canonical(value: object) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _differences(there: Mapping, here: Mapping) -> str:
    names = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
    return ", ".join(f"{k} is {there.get(k)!r} there and {here.get(k)!r} here" for k in names)
