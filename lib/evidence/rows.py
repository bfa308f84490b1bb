"""Rows of evidence: an append-only file, one line a finished run, each line sealed by a digest.

A line is JSON with sorted keys, of one of three kinds: a row (`settings`, `seed`, `result`, `code`,
`provenance`, `wall_s`, `core_s`, `recorded`), a `provenance` that the rows below it refer to by `id`, or the
`plan`, the runs that the file is to hold (null: withdrawn). Provenance and plan name their `schema`. A line
is written whole, under a lock, and synced to disk. What a killed process or a full disk left of a last line
has no newline, so it is never a row, and the next append removes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lib.choices import check_choice
from lib.evidence import plans
from lib.evidence.files import EvidenceError, append, named
from lib.evidence.locks import held
from lib.evidence.plans import canonical
from lib.paths import ROOT

# Every schema seals its lines in the same way, so a sound line of another one can be told from a damaged one.
SCHEMA = 1


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
    return canonical({"seed": plain(seed, "seed"), "settings": plain(settings, "settings")})


def tries_of(found: Recorded, wanted: Iterable[str]) -> dict[str, list[dict]]:
    """The rows of each wanted run that has any, by its key, oldest first."""
    asked, tries = set(wanted), {}
    for row in found.rows:
        if (key := run_key(row["settings"], row["seed"])) in asked:
            tries.setdefault(key, []).append(row)
    return tries


def content(row: Mapping) -> str:
    """What a row says about its run: the same to the byte whenever and wherever that run is repeated."""
    kept = ("code", "failed", "result", "seed", "settings")
    return canonical({key: row[key] for key in kept if key in row})


def read(path: Path, damaged: str = "raise") -> Recorded:
    """All whole lines of `path`; an absent file holds none.

    damaged: "raise" an EvidenceError naming file, line and remedy at the first line that does not match its
    digest, or "collect" such lines and read the others. A line of another schema is always an EvidenceError:
    nothing is wrong with the file then.
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
        elif (schema := line.get("schema", 1)) != SCHEMA:
            raise EvidenceError(
                f"{named(path, ROOT)}, line {number}: it is of schema {schema}, this checkout reads schema "
                f"{SCHEMA}. The file is sound: update the checkout (`git pull`), and leave the file as it is"
            )
        elif "plan" in line:
            found.plan = line["plan"]
        elif "id" in line:
            found.provenance[line["id"]] = line["provenance"]
        else:
            found.rows.append(line)
    return found


def alone_in(path: Path) -> AbstractContextManager:
    """The lock of a file of rows: `lib.evidence.locks.held`."""
    return held(path.with_name(f".{path.name}.lock"), f"recording into {named(path, ROOT)}")


def remedy(path: Path) -> str:
    """What to do about a damaged file: its sound rows stay, those of profile quick are made again."""
    file = named(path, ROOT)
    if path.name.endswith(".quick.jsonl"):
        return f"Rows are never edited: delete {file}, the next run of the chapter makes it again."
    return (
        f"Rows are never edited: `python -m lib.evidence mend {file}` moves the damaged lines to "
        f"{file}.damaged and keeps all others; the next run of the chapter makes again what they held."
    )


class RowStore:
    """The rows of one experiment at one profile, in one file, as `lib.sweeps.run_sweep` wants them.

    A run counts as done if a row agrees in settings, seed and `code`. `provenance` is written before the
    first row that needs it, and again only when it changes (its `date` apart).
    """

    def __init__(self, path: Path, *, code: str, provenance: Mapping | None = None):
        self.path, self.code = Path(path), code
        self.provenance = plain(provenance or {}, "provenance")
        self._holding = False
        self._look()

    def key(self, settings: Mapping, seed: int) -> str:
        return run_key(settings, seed)

    def has(self, key: str) -> bool:
        """Whether that run has finished, by the current code, without failing."""
        return key in self._done

    def expected(self, settings: Mapping, seed: int) -> float | None:
        """Core seconds that this run took when it last finished, by whatever code; None if it never did."""
        return self._core_s.get(self.key(settings, seed))

    def rows(self) -> list[dict]:
        """The newest row of every run by the current code, failed ones included, in the file's order."""
        current = [row for row in read(self.path).rows if row["code"] == self.code]
        return list({self.key(row["settings"], row["seed"]): row for row in current}.values())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Record alone: while the block runs, others that want to record here get an EvidenceError.

        An EvidenceError too if the file cannot be written and runs are to do. Within the block this store may
        be held again.
        """
        if self._holding:
            yield
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(alone_in(self.path))
            except OSError as error:
                if not self._complete():
                    raise _unwritable(self.path, error) from error
            self._look()  # what another process recorded since this store was opened
            self._holding = True
            try:
                yield
            finally:
                self._holding = False

    def declare(self, grid: list[dict], seeds: list[int], *, run: str, replace: bool = False) -> None:
        """Write down which runs the file is to hold and what makes them, unless its plan says so already.

        run: the function, as "lib.experiments.module.function". Rows that `rescue` kept are taken in first.
        Raises EvidenceError if the file's plan holds runs that this one lacks, except with `replace`; and as
        `held`, under which all of this happens.
        """
        with self.held():
            self._declare(grid, seeds, run, replace)

    def _declare(self, grid: list[dict], seeds: list[int], run: str, replace: bool) -> None:
        plan, file = plain({"grid": grid, "seeds": seeds, "run": run}, "plan"), named(self.path, ROOT)
        before = read(self.path).plan
        if before and not replace and (changed := plans.difference(before, plan)):
            raise EvidenceError(
                f"{file} was started with other settings: {changed}. Undo that change and the runs go on "
                f"where they stopped; or, if it is meant, `python -m lib.evidence replan {file}` withdraws "
                "the file's plan, and the recorded rows stay"
            )
        try:
            self._take_in_rescued()
            if before != plan:
                append(self.path, lambda _: _seal({"plan": plan, "schema": SCHEMA}))
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def append(
        self,
        *,
        settings: Mapping,
        seed: int,
        result: Mapping | None,
        wall_s: float,
        core_s: float,
        failed: str | None = None,
        about: Mapping | None = None,
    ) -> dict:
        """Record one finished run; -> its row. A result that JSON cannot hold is recorded as a failure.

        about: the parts of the provenance in which the process that made this run differs from the driver.
        """
        row, made = self._row(settings, seed, result, wall_s, core_s, failed, about)
        self._write(row, made)
        return row

    def rescue(self, row: Mapping) -> Path | None:
        """Keep a run that could not be appended in the system's temporary folder; -> the file, None if that
        fails too. row: the arguments of `append`. The next `declare` takes it in.
        """
        kept = self._rescued()
        arguments = {"failed": None, "about": None} | dict(row)
        sealed, made = self._row(**arguments)
        try:
            append(kept, _lines(sealed, made))
        except OSError:
            return None
        return kept

    def _row(self, settings, seed, result, wall_s, core_s, failed, about) -> tuple[dict, dict]:
        """The row of one finished run, and its provenance."""
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
        made = self.provenance | plain(about or {}, "about")
        row |= {
            "provenance": _digest({key: part for key, part in made.items() if key != "date"}),
            "wall_s": round(float(wall_s), 3),
            "core_s": round(float(core_s), 3),
            "recorded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return row, made

    def _write(self, row: dict, made: dict) -> None:
        append(self.path, _lines(row, made))
        if not row.get("failed"):
            key = self.key(row["settings"], row["seed"])
            self._core_s[key] = row["core_s"]
            if row["code"] == self.code:
                self._done.add(key)

    def _look(self) -> None:
        finished = [row for row in read(self.path).rows if not row.get("failed")]
        self._core_s = {self.key(row["settings"], row["seed"]): row["core_s"] for row in finished}
        self._done = {self.key(row["settings"], row["seed"]) for row in finished if row["code"] == self.code}

    def _complete(self) -> bool:
        plan = read(self.path).plan
        return plan is not None and set(plans.keys(plan)) <= self._done

    def _rescued(self) -> Path:
        place = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"proof-and-probe-{place}.jsonl"

    def _take_in_rescued(self) -> None:
        kept = self._rescued()
        if not kept.exists() or (hasattr(os, "getuid") and kept.stat().st_uid != os.getuid()):
            return  # the folder is everybody's: a file of somebody else is not ours to believe
        found = read(kept, damaged="collect")
        whole = [row for row in found.rows if row["provenance"] in found.provenance]
        for row in whole:
            self._write(row, found.provenance[row["provenance"]])
        kept.unlink()
        print(f"{named(self.path, ROOT)}: took in what waited in {kept}, runs: {len(whole)}.")


def withdraw(path: Path) -> int:
    """Withdraw the plan of a file of rows, so that the next one may be any; -> how many rows stay.

    Raises EvidenceError if there is no plan, or while somebody records into the file.
    """
    store = RowStore(path, code="")
    if read(store.path).plan is None:
        raise EvidenceError(f"{named(store.path, ROOT)} has no plan that could be withdrawn")
    with store.held():
        append(store.path, lambda _: _seal({"plan": None, "schema": SCHEMA}))
    return len(read(store.path).rows)


def _unwritable(path: Path, error: OSError) -> EvidenceError:
    return EvidenceError(
        f"{named(path, ROOT)} cannot be written ({error.strerror or error}); no run was started. Make room "
        "on the disk, or make the folder writable, and give the same command again"
    )


def _lines(row: dict, made: dict) -> Callable[[bytes], bytes]:
    """What to append for `row`, given what the file holds: its provenance if that is new, then the row."""

    def lines(before: bytes) -> bytes:
        if (sealed := _seal(row)) in before:
            return b""  # a rescued row that had been written after all
        known = f'"id":"{row["provenance"]}"'.encode() in before
        head = {"id": row["provenance"], "provenance": made, "schema": SCHEMA}
        return (b"" if known else _seal(head)) + sealed

    return lines


def _digest(value: object) -> str:
    # 64 bits: against accidents, not adversaries
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def _seal(line: dict) -> bytes:
    return (canonical(line | {"digest": _digest(line)}) + "\n").encode()


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
    if line.get("schema", SCHEMA) != SCHEMA:
        return line, ""
    if "plan" in line or {"id", "provenance"} <= set(line) or _ROW <= set(line):
        return line, ""
    return {}, "it is neither a row nor a provenance nor a plan"


def _without_paths(trace: str) -> str:
    """A traceback that names files within the repository, others by their last part."""
    short = re.sub(r'File "([^"]+)"', lambda found: f'File "{_short(found[1])}"', trace)
    return short.replace(f"{ROOT}{os.sep}", "").replace(str(Path.home()), "~")


def _short(file: str) -> str:
    path = Path(file)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
