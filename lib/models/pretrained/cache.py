"""Where converted models are kept, outside git, and how a folder gets there: whole or not at all.

The cache is $PROOF_AND_PROBE_CACHE, else $XDG_CACHE_HOME/proof-and-probe, else ~/.cache/proof-and-probe.
A folder is filled under a temporary name, flushed to the disk and renamed. A lock keeps two processes from
converting the same model twice; where a file system has no locks they both convert, and one of them wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.models.pretrained.errors import NoRoom

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VARIABLE = "PROOF_AND_PROBE_CACHE"
PARTIAL = ".partial-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def cache_folder() -> Path:
    """The cache; nothing is created."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "proof-and-probe"


def store_folder(name: str, fill: Callable[[Path], None], *, n_bytes: int) -> Path:
    """The folder `name` of the cache; where it is missing, `fill(folder)` writes it, needing n_bytes at most.

    NoRoom where the disk is too full, before or meanwhile. Whatever happens, no half-filled folder is left
    under `name`.
    """
    cache = cache_folder()
    final = cache / name
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache) as alone:
            if final.is_dir():  # another process was faster
                return final
            if alone:  # what a killed process left
                for rest in cache.glob(f"{PARTIAL}*"):
                    shutil.rmtree(rest, ignore_errors=True)
            if (free := shutil.disk_usage(cache).free) < n_bytes:
                raise _no_room(cache, f"{free / 1e6:,.0f} MB are free, {n_bytes / 1e6:,.0f} MB are needed")
            _fill_and_rename(fill, final)
    except OSError as error:
        if error.errno in FULL and not isinstance(error, NoRoom):
            raise _no_room(cache, error.strerror) from error
        if error.errno in CLOSED and str(error.filename).startswith(str(cache)):
            raise type(error)(
                error.errno, f"the model cache {cache} cannot be written ({error.strerror}); set {VARIABLE} "
                "to a folder that can be",
            ) from error  # fmt: skip
        raise
    return final


def _fill_and_rename(fill: Callable[[Path], None], final: Path) -> None:
    partial = final.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        fill(partial)
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        try:
            os.rename(partial, final)
        except OSError:
            if not final.is_dir():
                raise
        _flush(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[bool]:
    """Holds the lock of the cache; False where there are no locks."""
    with (cache / ".lock").open("a") as file:
        if fcntl is None:
            yield False
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process is filling {cache}; waiting for it.", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True


def _no_room(cache: Path, why: str | None) -> NoRoom:
    return NoRoom(
        errno.ENOSPC,
        f"no room for the model in {cache}: {why}; nothing half-written was kept. Make room, or set "
        f"{VARIABLE} to a folder on another disk",
    )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
