"""One process at a time: a lock that ends with its holder, however that ends, and that says who holds it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.evidence.files import EvidenceError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None


class Held(EvidenceError):  # noqa: N818 - a state of affairs, as BrokenPipe
    """Another process holds the lock. Says what it does, its process id and since when."""


@contextmanager
def held(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; it is made if absent, and left empty behind.

    doing: what the holder does, in words that the second to ask is told, as "a build in this checkout".
    Raises Held if another process holds it, OSError if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:  # to append: opening must not empty what the holder wrote
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise Held(_refusal(doing, file.read())) from None
        file.truncate(0)  # a killed holder leaves its name there, though not the lock
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        file.write(json.dumps({"pid": os.getpid(), "since": since, "host": platform.node()}).encode())
        try:
            yield
        finally:
            file.truncate(0)


def _refusal(doing: str, written: bytes) -> str:
    try:
        holder = json.loads(written)
        who = f"process {holder['pid']}"
        if holder["host"] != platform.node():
            who += f" on {holder['host']}"
        who += f", since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # the holder is just about to write it
        who = "another process"
    return f"{doing} is under way already ({who}); wait for it or stop it"
