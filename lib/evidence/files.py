"""Writing files so that a reader never sees half of what was meant, and the one error of this package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: appends are whole, but only one process may record into a file at a time
    fcntl = None


class EvidenceError(ValueError):
    """A file of claims, evidence or verdicts is not what it says it is. Names the file and the remedy."""


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step: a reader sees the old file or the new one."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """As `write_atomically`, for bytes that need not be text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def append(path: Path, lines: Callable[[bytes], bytes]) -> None:
    """Append what `lines` makes of the file's whole lines, all or nothing. Removes a torn last line first."""
    with _locked(path) as descriptor:
        before = _read_all(descriptor)
        whole = before[: before.rfind(b"\n") + 1]
        if len(whole) < len(before):
            os.ftruncate(descriptor, len(whole))
        text = lines(whole)
        written = os.write(descriptor, text)
        if written < len(text):  # a full disk: leave no half line behind, and say so
            os.ftruncate(descriptor, len(whole))
            raise OSError(f"{path.name}: only {written} of {len(text)} bytes fitted; is the disk full?")


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of `path` for appending, that no other process of ours holds at the same time."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)  # this also releases the lock
    if new and fcntl:  # the entry of a new file in its folder must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def named(path: Path, root: Path) -> str:
    """`path` as a reader of the repository knows it: relative to `root` where it lies inside."""
    path = Path(path)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
