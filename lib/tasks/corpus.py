"""A large corpus as one file of token ids: read and tokenised once, then mapped into memory.

    corpus = Corpus(source="pile.txt")                   # or a dataset of the Hugging Face hub, "org/name"
    tokens = token_file(corpus, tokenizer, n_tokens=10**9, folder=BUILD / "tokens")
    batch = window_batch(tokens.ids, step, seed=0, size=256, T=2048, n=n_windows(tokens.ids, 2048))

A text file is read as it is, 4 MiB and the rest of a line at a time; rows of a dataset are streamed, so that
no more of it is downloaded than is kept. Ids are uint16 where the vocabulary allows, else uint32. A killed
process goes on where it was, and the file is that of an unbroken run; its SHA-256 is checked at each opening.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from lib.choices import check_choice
from lib.tasks import text

try:
    import fcntl
except ImportError:  # Windows: two processes that begin at once tokenise twice
    fcntl = None

FORMAT = 1
EMBEDDED = "austen"  # the book's own novels, for trying things out
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
PIECE = 1 << 22  # bytes of a text file read at once
LONGEST = 1 << 26  # bytes of a line
ROWS = 256  # of a dataset, encoded at once
SAVE_EVERY = 1 << 22  # tokens between two states of a file that is being made


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """source: the path of a UTF-8 text file; the id "org/name" of a dataset; or "austen", the novels.

    subset, split and column name the part of a dataset. end_of_text: a token that is put after each of its
    rows (a text file has no rows).
    """

    source: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    end_of_text: str | None = None

    def __post_init__(self):
        if not self.source:
            raise ValueError(
                'no corpus is named: give the path of a UTF-8 text file, the id "org/name" of a dataset of '
                f"the Hugging Face hub, or {EMBEDDED!r}"
            )

    @property
    def kind(self) -> str:
        """One of "embedded", "file", "hub". FileNotFoundError for a path that does not exist."""
        path = Path(self.source).expanduser()
        if self.source == EMBEDDED:
            return "embedded"
        if path.exists():
            return "file"
        if HUB_ID.fullmatch(self.source) and path.suffix not in (".txt", ".text", ".md"):
            return "hub"
        raise FileNotFoundError(
            f'the corpus {path} does not exist; give the path of a UTF-8 text file, the id "org/name" of a '
            f"dataset of the Hugging Face hub, or {EMBEDDED!r}"
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """ids: (n,), mapped and read-only. sha256: of the file. whole: the corpus ended before n_tokens did."""

    path: Path
    ids: np.memmap
    sha256: str
    whole: bool


def check_corpus(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Whatever can be known before work: is it there, can it be read, has it text? Raises as `token_file`."""
    _end_id(corpus, tokenizer)
    if corpus.kind == "file":
        path = Path(corpus.source).expanduser()
        if path.is_dir():
            raise ValueError(f"the corpus {path} is a folder; give one text file")
        if not path.stat().st_size:
            raise ValueError(f"the corpus {path} is empty")
    first = next(_read(corpus, 0), None)
    if first is None or not any(part.strip() for part in first[0]):
        raise ValueError(f"the corpus {corpus.source} begins without text: {PIECE} bytes, or {ROWS} rows")


def token_file(
    corpus: Corpus, tokenizer: Tokenizer, *, n_tokens: int, folder: Path, progress: bool = True
) -> Tokens:
    """The first `n_tokens` tokens of the corpus, or all of it if it has fewer, in a file of `folder`.

    Processes that ask for the same file at once wait for the first of them. The file is made anew if source,
    tokenizer or n_tokens changed; of a text file size and time of change are looked at.
    FileNotFoundError: no such file or dataset. ImportError: no package `datasets`. ConnectionError: the hub
    cannot be reached. ValueError: no text, no UTF-8 (it names the byte), no such column or token, a damaged
    token file. OSError: no room on the disk.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens is at least 1, got {n_tokens}")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: as stored, it may cut long texts short
    tokenizer.no_truncation()
    tokenizer.no_padding()
    identity = {
        "format": FORMAT,
        **asdict(corpus),
        "file": _stamp(corpus),
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "n_tokens": n_tokens,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, index = folder / f"{name}.tokens", folder / f"{name}.json"
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")
    with _alone(folder / f"{name}.lock"):
        if not index.exists():
            check_corpus(corpus, tokenizer)
            _check_room(corpus, folder, n_tokens * dtype.itemsize, dtype.itemsize)
            whole = _make(corpus, tokenizer, path, dtype, n_tokens, progress)
            facts = {
                "identity": identity,
                "sha256": _digest(path),
                "bytes": path.stat().st_size,
                "whole": whole,
            }
            _write(index, facts)
    facts = json.loads(index.read_text())
    if not path.is_file() or path.stat().st_size != facts["bytes"] or _digest(path) != facts["sha256"]:
        raise ValueError(f"{path} is missing, cut short or changed; delete {index}, and it is made again")
    return Tokens(path, np.memmap(path, dtype=dtype, mode="r"), facts["sha256"], facts["whole"])


def n_windows(ids: np.ndarray, T: int) -> int:
    """Windows of T inputs side by side; each has one token more, the last target.

    >>> n_windows(np.arange(9), T=4), n_windows(np.arange(8), T=4)
    (2, 1)
    """
    return max(0, (len(ids) - 1) // T)


def windows(ids: np.ndarray, which, T: int) -> Tensor:
    """The windows of those numbers. -> (len(which), T + 1) long: T inputs and, one further, T targets.

    >>> windows(np.arange(9), [1, 0], T=4)
    tensor([[4, 5, 6, 7, 8],
            [0, 1, 2, 3, 4]])
    """
    rows = [ids[i * T : i * T + T + 1] for i in which]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def window_batch(ids: np.ndarray, step: int, *, seed: int, size: int, T: int, n: int) -> Tensor:
    """`size` of the first `n` windows for one training step, a function of (seed, step) alone.

    Each epoch reads every window once, in an order of its own; a batch may end one and begin the next.
    """
    drawn = range(step * size, (step + 1) * size)
    return windows(ids, [_order(seed, at // n, n)[at % n] for at in drawn], T)


@lru_cache(maxsize=2)  # two epochs: a batch may touch both
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _read(corpus: Corpus, position: int) -> Iterator[tuple[list[str], int]]:
    """(texts, position after them) from a position on: a byte of a file, a row of a dataset, a block."""
    return {"file": _read_file, "hub": _read_hub, "embedded": _read_embedded}[corpus.kind](corpus, position)


def _read_embedded(corpus: Corpus, position: int) -> Iterator[tuple[list[str], int]]:
    joined = "\n\n".join(body for _, body in text.documents(EMBEDDED))
    for i, block in enumerate(text.blocks(joined, text.STRETCH)):
        if i >= position:
            yield [block], i + 1


def _read_file(corpus: Corpus, position: int) -> Iterator[tuple[list[str], int]]:
    path = Path(corpus.source).expanduser()
    with path.open("rb") as file:
        file.seek(position)
        while block := file.read(PIECE):
            line = file.readline(LONGEST)  # to the end of a line: no character goes on behind it
            if len(line) == LONGEST and not line.endswith(b"\n"):
                raise ValueError(f"{path} has a line of more than {LONGEST} bytes; break it into lines")
            try:
                decoded = (block + line).decode("utf-8-sig" if position == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8: byte {position + error.start} is "
                    f"{error.object[error.start]:#04x}; convert it, for instance with "
                    "`iconv -f latin1 -t utf-8`"
                ) from error
            position = file.tell()
            yield text.blocks(decoded, text.STRETCH), position


def _read_hub(corpus: Corpus, position: int) -> Iterator[tuple[list[str], int]]:
    rows = _stream(corpus)
    if position:
        rows = rows.skip(position)
    found: list[str] = []
    for row in _asked(corpus, rows):
        if corpus.column not in row:
            check_choice(f"column of {corpus.source}", corpus.column, row)
        if not isinstance(row[corpus.column], str):
            kind = type(row[corpus.column]).__name__
            raise ValueError(f"column {corpus.column!r} of {corpus.source} holds {kind}, not text")
        found.append(row[corpus.column])
        position += 1
        if len(found) == ROWS:
            yield found, position
            found = []
    if found:
        yield found, position


def _stream(corpus: Corpus):
    """The dataset, nothing of whose rows has been downloaded yet."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"{corpus.source!r} is a dataset of the Hugging Face hub, which needs the package datasets: "
            "`.venv/bin/python -m pip install datasets`; or give the path of a text file"
        ) from error
    try:
        return datasets.load_dataset(corpus.source, name=corpus.subset, split=corpus.split, streaming=True)
    except Exception as error:  # the package raises its own, requests' and Python's
        raise _hub_error(corpus, error) from error


def _asked(corpus: Corpus, rows) -> Iterator[dict]:
    """The rows; what the network does to them is one kind of error."""
    rows = iter(rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _hub_error(corpus, error) from error
        yield row


def _hub_error(corpus: Corpus, error: Exception) -> Exception:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ValueError):  # an unknown split or subset: the package names those that exist
        return ValueError(f"dataset {corpus.source!r}: {said}")
    kind = FileNotFoundError if type(error).__name__ == "DatasetNotFoundError" else ConnectionError
    return kind(
        f"dataset {corpus.source!r} cannot be had from the Hugging Face hub: {said}. Where there is no "
        "network, give the path of a text file; what was tokenised so far is kept"
    )


def _make(
    corpus: Corpus, tokenizer: Tokenizer, path: Path, dtype: np.dtype, n_tokens: int, progress: bool
) -> bool:
    """Write the file, from where it was left. -> whether the corpus ended before it had `n_tokens`."""
    part, state = path.with_suffix(".part"), path.with_suffix(".state")
    done = json.loads(state.read_text()) if part.exists() and state.exists() else {"position": 0, "n": 0}
    end, saved, whole = _end_id(corpus, tokenizer), done["n"], True
    with (
        part.open("r+b" if done["n"] else "wb") as file,
        tqdm(total=n_tokens, initial=saved, unit="token", unit_scale=True, disable=not progress) as bar,
    ):
        file.truncate(done["n"] * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        for texts, position in _read(corpus, done["position"]):
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            tail = [] if end is None else [end]
            ids = np.fromiter((i for one in encoded for i in (*one.ids, *tail)), dtype=dtype)
            ids = ids[: n_tokens - done["n"]]
            file.write(ids.tobytes())
            done = {"position": position, "n": done["n"] + len(ids)}
            bar.update(len(ids))
            if done["n"] == n_tokens:
                whole = False
                break
            if done["n"] - saved >= SAVE_EVERY:
                _sync(file)
                _write(state, done)
                saved = done["n"]
        _sync(file)
    if not done["n"]:
        raise ValueError(f"the corpus {corpus.source} has no tokens")
    part.replace(path)
    state.unlink(missing_ok=True)
    return whole


def _end_id(corpus: Corpus, tokenizer: Tokenizer) -> int | None:
    if corpus.end_of_text is None:
        return None
    found = tokenizer.token_to_id(corpus.end_of_text)
    if found is None:
        raise ValueError(
            f"end_of_text {corpus.end_of_text!r} is no token of this tokenizer of "
            f"{tokenizer.get_vocab_size()}; give one that is, or None"
        )
    return found if corpus.kind == "hub" else None


def _check_room(corpus: Corpus, folder: Path, wanted: int, itemsize: int) -> None:
    """OSError if the disk could not hold the tokens; a text file has at most as many as it has bytes."""
    if corpus.kind == "file":
        wanted = min(wanted, Path(corpus.source).expanduser().stat().st_size * itemsize)
    free = shutil.disk_usage(folder).free
    if corpus.kind != "embedded" and wanted > free:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, the tokens may take {wanted / 1e9:.1f}; make room, or "
            "ask for fewer tokens"
        )


def _stamp(corpus: Corpus) -> list[int] | None:
    """Size and time of change of a text file."""
    if corpus.kind != "file":
        return None
    found = Path(corpus.source).expanduser().stat()
    return [found.st_size, found.st_mtime_ns]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("ab") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, value: dict) -> None:
    """Replaced in one move: never half a file."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=1))
    new.replace(path)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
