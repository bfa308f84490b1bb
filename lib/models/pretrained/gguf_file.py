"""GGUF files: what a header says, and the tensors expanded to float32.

The header is read here, with every length checked against the file, so that a damaged file ends in one
sentence; the `gguf` package expands the quantised blocks. Source: GGUF specification (ggml-org), versions
2 and 3, little-endian. Layout: magic, version, counts, (key, type, value)…, (name, shape, type, offset)…,
padding, tensor data.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.models.pretrained.errors import DamagedModel, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {  # type code in the file: format of `struct`, which is also numpy's
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
OTHER_FORMATS = {  # first bytes: what the file is instead
    b"PK\x03\x04": "a zip archive (a wheel, or a PyTorch checkpoint: pickles are never read)",
    b"\x80\x02": "a pickle, which is never read",
    b"vers": "perhaps a Git LFS pointer: fetch the file itself",
    b"<!DO": "a web page", b"<htm": "a web page",
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. shape: as in torch, (out, in); start: bytes from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str  # F32, Q4_1, …
    start: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """The header of a GGUF file; numbers, strings and lists under their keys, tensors by name."""

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]

    def expand(self, name: str) -> np.ndarray:
        """Tensor `name` in float32, (out, in) for a matrix."""
        import gguf

        entry = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            raw = bytearray(entry.n_bytes)  # a bytearray: what torch wraps has to be writable
            complete = file.readinto(raw) == entry.n_bytes
        if not complete:
            raise DamagedModel(f"{self.path} was cut short while it was read, in tensor {name}")
        kind = gguf.GGMLQuantizationType[entry.kind]
        if entry.kind in ("F32", "F16", "F64"):
            flat = np.frombuffer(raw, dtype={"F32": "<f4", "F16": "<f2", "F64": "<f8"}[entry.kind])
        else:
            rows = np.frombuffer(raw, dtype=np.uint8).reshape(*entry.shape[:-1], -1)
            try:
                flat = gguf.quants.dequantize(rows, kind)
            except NotImplementedError as error:
                raise UnsupportedModel(
                    f"{self.path}: tensor {name} is stored as {entry.kind}, which the gguf package does not "
                    "expand; take a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K or Q6_K"
                ) from error
        return np.ascontiguousarray(flat, dtype=np.float32).reshape(entry.shape)


def read_gguf(path: Path) -> GGUFFile:
    """The header of the file at `path`. DamagedModel, UnsupportedModel: one sentence naming the file."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(4)
        if first != MAGIC:
            kind = next((kind for start, kind in OTHER_FORMATS.items() if first.startswith(start)), None)
            raise UnsupportedModel(
                f"{path} is no GGUF file: it begins with {first!r}, not {MAGIC!r}"
                + (f"; it looks like {kind}" if kind else "")
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _Reader(path, memory, size).read()


class _Reader:
    """A cursor in the mapped file that never reads past its end."""

    def __init__(self, path: Path, memory: mmap.mmap, size: int):
        self.path, self.memory, self.size, self.at = path, memory, size, 4

    def read(self) -> GGUFFile:
        version = self.number("<I")
        if version not in VERSIONS:
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise UnsupportedModel(f"{self.path} is GGUF, {kind}; little-endian versions 2 and 3 are read")
        n_tensors, n_keys = self.number("<Q"), self.number("<Q")
        metadata: dict[str, object] = {}
        for _ in range(n_keys):  # a wild count ends at the end of the file
            key = self.string()
            metadata[key] = self.value(self.number("<I"), key)
        found = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise DamagedModel(f"{self.path}: general.alignment is {alignment!r}, not a positive number")
        data = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, code, offset in found:
            if name in tensors:
                raise DamagedModel(f"{self.path} holds tensor {name} twice")
            tensors[name] = self.entry(name, shape, code, data + offset)
        return GGUFFile(self.path, metadata, tensors)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise DamagedModel(
                f"{self.path} is cut short or damaged: its header runs past the end of the file "
                f"({self.size:,} bytes); fetch it again"
            )
        self.at += count
        return self.memory[self.at - count : self.at]

    def number(self, form: str) -> int | float | bool:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        raw = self.take(self.number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise DamagedModel(f"{self.path}: text in its header is no UTF-8: {error}") from error

    def value(self, code: int, key: str) -> object:
        if code in SCALARS:
            return self.number(SCALARS[code])
        if code == STRING:
            return self.string()
        if code != ARRAY:
            raise DamagedModel(f"{self.path}: the value of {key} has type {code}, which GGUF does not know")
        code, count = self.number("<I"), self.number("<Q")
        if code in SCALARS:
            form = np.dtype(SCALARS[code])
            return np.frombuffer(self.take(count * form.itemsize), dtype=form).tolist()
        return [self.value(code, key) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.number("<I")
        if not 1 <= n_dims <= 4:
            raise DamagedModel(f"{self.path}: tensor {name} has {n_dims} dimensions; GGUF allows 1 to 4")
        shape = tuple(self.number("<Q") for _ in range(n_dims))[::-1]  # GGUF counts from the fastest
        return name, shape, self.number("<I"), self.number("<Q")

    def entry(self, name: str, shape: tuple[int, ...], code: int, start: int) -> TensorEntry:
        import gguf

        try:
            kind = gguf.GGMLQuantizationType(code)
        except ValueError as error:
            raise UnsupportedModel(
                f"{self.path}: tensor {name} has quantisation type {code}, unknown to gguf"
            ) from error
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape, dtype=object))
        if count < 1 or shape[-1] % block:
            raise DamagedModel(f"{self.path}: tensor {name} of shape {shape} cannot be stored as {kind.name}")
        n_bytes = count // block * n_bytes
        if start + n_bytes > self.size:
            raise DamagedModel(
                f"{self.path} is cut short: tensor {name} needs {start + n_bytes:,} bytes, "
                f"the file has {self.size:,}; fetch it again"
            )
        return TensorEntry(name, shape, kind.name, start, n_bytes)


def is_gguf(path: Path) -> bool:
    """Whether the file at `path` begins as a GGUF file does."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC
