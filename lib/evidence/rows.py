"""Rows of evidence: an append-only file, one line a finished run, each line sealed by a digest.

A line is JSON with sorted keys, of one of three kinds: a row (`settings`, `seed`, `result`, `code`,
`provenance`, `wall_s`, `core_s`, `recorded`), a `provenance` that the rows below it refer to by `id`, or the
`plan`, the grid and seeds that the file is to hold. A line is written whole, under a lock, and synced to
disk. What a killed process or a full disk left of a last line has no newline, so it is never a row, and the
next append removes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lib.choices import check_choice
from lib.evidence.files import EvidenceError, named
from lib.paths import ROOT

try:
    import fcntl
except ImportError:  # Windows: appends are whole, but only one process may record into a file at a time
    fcntl = None


@dataclass(frozen=True)
class Damage:
    """A line that is not what was written."""

    file: str
    line: int
    why: str


@dataclass
class Recorded:
    """What a file of rows holds, in the order it was written."""

    rows: list[dict] = field(default_factory=list)
    provenance: dict[str, dict] = field(default_factory=dict)
    plan: dict | None = None
    torn: bool = False
    damaged: list[Damage] = field(default_factory=list)


def plain(value: object, place: str = "value") -> object:
    """`value` as JSON can hold it without loss; arrays, tensors and tuples become lists.

    Raises TypeError on anything else (also on keys that are not strings), ValueError on a number that is not
    finite.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{place} is {float(value)}; evidence holds finite numbers, or None where there is none"
            )
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}; keys must be strings")
        return {key: plain(part, f"{place}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, f"{place}[{i}]") for i, part in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), place)
    raise TypeError(
        f"{place} is a {type(value).__name__}, which JSON cannot hold; return numbers, strings, lists"
    )


def run_key(settings: Mapping, seed: int) -> str:
    """The name of one run: its settings and seed, as canonical JSON."""
    return _json({"seed": plain(seed, "seed"), "settings": plain(settings, "settings")})


def content(row: Mapping) -> str:
    """What a row says about its run: the same to the byte whenever and wherever that run is repeated."""
    kept = ("code", "failed", "result", "seed", "settings")
    return _json({key: row[key] for key in kept if key in row})


def read(path: Path, damaged: str = "raise") -> Recorded:
    """All whole lines of `path`; an absent file holds none.

    damaged: "raise" an EvidenceError naming file, line and remedy at the first line that does not match its
    digest, or "collect" such lines and read the others.
    """
    check_choice("damaged", damaged, ["raise", "collect"])
    path, found = Path(path), Recorded()
    if not path.exists():
        return found
    *lines, rest = path.read_bytes().split(b"\n")
    found.torn = bool(rest)
    for number, text in enumerate(lines, start=1):
        line, why = _open(text)
        if why:
            damage = Damage(named(path, ROOT), number, why)
            if damaged == "raise":
                raise EvidenceError(f"{damage.file}, line {number}: {why}. {remedy(path)}")
            found.damaged.append(damage)
        elif "plan" in line:
            found.plan = line["plan"]
        elif "id" in line:
            found.provenance[line["id"]] = line["provenance"]
        else:
            found.rows.append(line)
    return found


def remedy(path: Path) -> str:
    """What to do about a damaged file: recorded evidence comes back from git, the rest is made again."""
    file = named(path, ROOT)
    if path.name.endswith(".quick.jsonl"):
        return f"Rows are never edited: delete {file}, the next run of the chapter makes it again."
    return (
        f"Rows are never edited: `git checkout -- {file}` brings them back as committed; "
        "`python -m lib.evidence check` lists every damaged line."
    )


class RowStore:
    """The rows of one experiment at one profile, in one file, as `lib.sweeps.run_sweep` wants them.

    A run counts as done if a row agrees in settings, seed and `code`. `provenance` is written before the
    first row that needs it, and again only when it changes (its `date` apart).
    """

    def __init__(self, path: Path, *, code: str, provenance: Mapping | None = None):
        self.path, self.code = Path(path), code
        self.provenance = plain(provenance or {}, "provenance")
        self.id = _digest({key: part for key, part in self.provenance.items() if key != "date"})
        self._done = {
            self.key(row["settings"], row["seed"]) for row in self._current() if not row.get("failed")
        }

    def key(self, settings: Mapping, seed: int) -> str:
        return run_key(settings, seed)

    def has(self, key: str) -> bool:
        """Whether that run has finished, by the current code, without failing."""
        return key in self._done

    def rows(self) -> list[dict]:
        """The newest row of every run by the current code, failed ones included, in the file's order."""
        return list({self.key(row["settings"], row["seed"]): row for row in self._current()}.values())

    def _current(self) -> list[dict]:
        return [row for row in read(self.path).rows if row["code"] == self.code]

    def declare(self, grid: list[dict], seeds: list[int]) -> None:
        """Write down which runs the file is to hold, unless its last plan says so already."""
        plan = plain({"grid": grid, "seeds": seeds}, "plan")
        if read(self.path).plan != plan:
            _append(self.path, lambda before: _seal({"plan": plan}))

    def append(
        self,
        *,
        settings: Mapping,
        seed: int,
        result: Mapping | None,
        wall_s: float,
        core_s: float,
        failed: str | None = None,
    ) -> dict:
        """Record one finished run; -> its row. A result that JSON cannot hold is recorded as a failure."""
        row = {"settings": plain(settings, "settings"), "seed": plain(seed, "seed"), "code": self.code}
        try:
            if not failed and not isinstance(result, Mapping):
                raise TypeError(
                    f"the run returned a {type(result).__name__}; return a dict of numbers with names"
                )
            row["result"] = plain(result, "result")
        except (TypeError, ValueError) as error:
            row["result"], failed = None, f"{type(error).__name__}: {error}"
        if failed:
            row["failed"] = _without_paths(failed)
        row |= {
            "provenance": self.id,
            "wall_s": round(float(wall_s), 3),
            "core_s": round(float(core_s), 3),
            "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

        def lines(before: bytes) -> bytes:
            known = f'"id":"{self.id}"'.encode() in before
            head = b"" if known else _seal({"id": self.id, "provenance": self.provenance})
            return head + _seal(row)

        _append(self.path, lines)
        if not failed:
            self._done.add(self.key(row["settings"], row["seed"]))
        return row


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(value: object) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()[
        :16
    ]  # 64 bits: against accidents, not adversaries


def _seal(line: dict) -> bytes:
    return (_json(line | {"digest": _digest(line)}) + "\n").encode()


_ROW = {"settings", "seed", "result", "code", "provenance", "wall_s", "core_s", "recorded"}


def _open(text: bytes) -> tuple[dict, str]:
    """The line without its digest and "", or {} and why it is damaged."""
    try:
        line = json.loads(text)
        digest = line.pop("digest")
        if _digest(line) != digest:
            return {}, "its content does not match its digest"
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}, "it is not a line of evidence"
    if "plan" in line or {"id", "provenance"} == set(line) or _ROW <= set(line):
        return line, ""
    return {}, "it is neither a row nor a provenance nor a plan"


def _without_paths(trace: str) -> str:
    """A traceback that names files within the repository, others by their last part."""
    short = re.sub(r'File "([^"]+)"', lambda found: f'File "{_short(found[1])}"', trace)
    return short.replace(f"{ROOT}{os.sep}", "").replace(str(Path.home()), "~")


def _short(file: str) -> str:
    path = Path(file)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


@contextmanager
def _locked(path: Path):
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


def _append(path: Path, lines: Callable[[bytes], bytes]) -> None:
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


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)
