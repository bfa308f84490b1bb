"""Writing whole files so that a reader never sees half of one, and the one error of this package."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class EvidenceError(ValueError):
    """A file of claims, evidence or verdicts is not what it says it is. Names the file and the remedy."""


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def named(path: Path, root: Path) -> str:
    """`path` as a reader of the repository knows it: relative to `root` where it lies inside."""
    path = Path(path)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
