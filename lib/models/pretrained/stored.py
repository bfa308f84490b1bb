"""A model in one safetensors file: weights in float32, its config, and what is known about where it is from.

`write_model` streams tensor after tensor, so that a conversion needs the memory of one of them, and its bytes
depend on nothing but its arguments. The header is padded, so that data begin at a multiple of 64 bytes: a
loaded model is the mapped file itself, private to the process on writing and shared until then.
Metadata: "config" (fields of TransformerConfig), "about" (JSON), "crc32" of the data, against accidents.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from lib.models.pretrained.errors import DamagedModel
from lib.models.transformer import Transformer, TransformerConfig

ALIGNMENT = 64
CHUNK = 1 << 24  # bytes read at once for the checksum


class _Shapes(Transformer):
    """A Transformer whose weights are on the meta device: shapes, no memory, until weights are assigned."""

    def to_empty(self, *, device, recurse=True):
        return self

    def _draw(self, generator, init):
        pass


def weight_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The weights of such a Transformer, name -> shape, in the order of `named_parameters()`."""
    return {name: tuple(w.shape) for name, w in _Shapes(config, seed=0).named_parameters()}


def assemble(config: TransformerConfig, weights: Mapping[str, Tensor]) -> Transformer:
    """The Transformer whose weights *are* `weights` (names and shapes of `weight_shapes`); no copy."""
    model = _Shapes(config, seed=0)
    model.load_state_dict(dict(weights), assign=True)
    model.__class__ = Transformer  # every weight is real now
    return model


def save_embedded(model: Transformer, path: Path, metadata: Mapping) -> None:
    """Write `model` in float32 for `load`, in one move. metadata: JSON values, for `source_facts`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().to("cpu", torch.float32) for name, w in model.named_parameters()}
    bad = [name for name, w in weights.items() if not w.isfinite().all()]
    if bad:
        raise ValueError(f"the model is not saved: {bad[0]} holds numbers that are not finite")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_model(partial, model.config, metadata, lambda name: weights[name])
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_model(
    path: Path, config: TransformerConfig, about: Mapping, weight: Callable[[str], Tensor]
) -> None:
    """Write a new file at `path`, to the disk itself. weight(name): float32, asked once a name, in order."""
    header, shapes, end = {}, weight_shapes(config), 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * _count(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    metadata = {
        "format": "pt",
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "about": json.dumps(dict(about), sort_keys=True, allow_nan=False),
        "crc32": "0" * 8,  # the same width as what replaces it
    }
    with path.open("xb") as file:
        file.write(_header(metadata, header))
        crc = 0
        for name, shape in shapes.items():
            tensor = weight(name)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(
                    f"weight {name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {shape}"
                )
            raw = memoryview(tensor.contiguous().numpy()).cast("B")
            crc = zlib.crc32(raw, crc)
            file.write(raw)
        file.seek(0)
        file.write(_header({**metadata, "crc32": f"{crc:08x}"}, header))
        file.flush()
        os.fsync(file.fileno())


def read_model(path: Path, *, remedy: str = "make it again") -> Transformer:
    """The model in the file at `path`, mapped, not copied. DamagedModel for any other content."""
    config, metadata, start = _read_header(path, remedy=remedy)
    crc = 0
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    if f"{crc:08x}" != metadata.get("crc32"):
        raise DamagedModel(
            f"{path} is damaged: its checksum is {crc:08x}, not {metadata.get('crc32')}; {remedy}"
        )
    with safetensors.safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    shapes = weight_shapes(config)
    if {name: tuple(w.shape) for name, w in weights.items()} != shapes:
        raise DamagedModel(f"{path}: its weights are not those of its config; {remedy}")
    return assemble(config, weights)


def read_about(path: Path) -> dict:
    """What `write_model` was told about the model, and its number of weights, from the header alone."""
    config, metadata, _ = _read_header(path)
    return json.loads(metadata["about"]) | {"parameters": sum(map(_count, weight_shapes(config).values()))}


def _read_header(
    path: Path, *, remedy: str = "make it again"
) -> tuple[TransformerConfig, dict[str, str], int]:
    try:
        with safetensors.safe_open(path, "pt") as file:  # compares the header with the length of the file
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        config = TransformerConfig(**json.loads(metadata["config"]))
        json.loads(metadata["about"])
        return config, metadata, start
    except safetensors.SafetensorError as error:
        raise DamagedModel(f"{path} is damaged: {error}; {remedy}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedModel(
            f"{path} was not written by this version of the book ({error!r}); {remedy}"
        ) from error


def _header(metadata: Mapping[str, str], entries: Mapping[str, dict]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # padding with spaces is part of the format
    return len(text).to_bytes(8, "little") + text


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
