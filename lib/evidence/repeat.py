"""Repeat a few recorded runs with the present code, to see whether rows of older code still hold.

Recording all runs again after a change that should change no number costs what they cost; two of them tell
whether it changed one. The repeated runs are ordinary rows: `lib.evidence.agreement` compares.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.choices import check_choice
from lib.evidence import agreement, plans, provenance, rows
from lib.evidence.code import loaded_digest
from lib.evidence.files import EvidenceError, named
from lib.evidence.forecast import SUFFIX
from lib.paths import ROOT

RUNS, SECONDS = 2, 60.0
_SHOWN = 70  # characters of the settings of a run


@dataclass(frozen=True)
class Choice:
    """keys: the runs to repeat. dear: runs too dear to be among them. short: how many more were wanted."""

    keys: list[str]
    dear: int = 0
    short: int = 0


def files(target: str, root: Path = ROOT) -> list[Path]:
    """The files of standard rows behind `target`: a file, a chapter with evidence, or "all".

    Raises EvidenceError or ValueError if it is none of these.
    """
    evidence = root / "data" / "evidence"
    if target.endswith(".jsonl"):
        if not (target.endswith(SUFFIX) and Path(target).is_file()):
            raise EvidenceError(
                f"{target} is no file of standard rows, as data/evidence/CHAPTER/NAME{SUFFIX}"
            )
        return [Path(target).resolve()]
    chapters = {path.parent.name: None for path in sorted(evidence.glob(f"*/*{SUFFIX}"))}
    if target != "all":
        chapters = {check_choice("chapter with evidence", target, chapters): None}
    return [path for name in chapters for path in sorted((evidence / name).glob(f"*{SUFFIX}"))]


def repeat(
    targets: list[Path],
    *,
    runs: int = RUNS,
    seconds: float = SECONDS,
    root: Path = ROOT,
    say: Callable[[str], None] = print,
) -> bool:
    """Repeat `runs` runs of each file whose rows are by older code; -> whether nothing stands against these.

    runs: of every older code in the file, the ones repeated before counted in; the cheapest, then from the
    middle of the grid on. seconds: core seconds that a run may have taken. Rows are appended, nothing else
    in a file changes. A file that cannot be repeated is named with the reason, and the others go on.
    """
    if runs < 1 or seconds <= 0:
        raise EvidenceError(f"runs is at least 1 and seconds above 0, got runs={runs}, seconds={seconds:g}")
    if os.environ.get("OMP_NUM_THREADS") != "1":
        say("OMP_NUM_THREADS is not 1: with more threads a sum may come out otherwise than recorded.")
    fine = True
    for path in targets:
        try:
            fine &= _repeat_file(path, runs, seconds, root, partial(_indented, say))
        except (EvidenceError, OSError) as error:
            say(f"{named(path, root)}: not repeated: {error}")
            fine = False
    return fine


def _repeat_file(path: Path, runs: int, seconds: float, root: Path, say) -> bool:
    found = rows.read(path)
    if not found.plan or not found.plan.get("run"):
        raise EvidenceError("it has no plan that names a function; the next `make evidence` writes one")
    run, experiment = _function(found.plan["run"]), path.name.removesuffix(SUFFIX)
    made = provenance.collect(chapter=path.parent.name, profile="standard", device="cpu")
    made |= {"experiment": experiment, "seeds": found.plan["seeds"], "inputs": {}}
    store = rows.RowStore(path, code=loaded_digest(run), provenance=made)
    planned = plans.keys(found.plan)
    stale = agreement.older_codes(rows.tries_of(found, planned), store.code).total()
    say(f"{named(path, root)}: {stale} of {len(planned)} runs by older code", 0)
    if not stale:
        return True
    scratch = root / "build" / "scratch" / path.parent.name / f"{experiment}.standard"
    again = partial(_again, run, store, scratch)
    with store.held():
        store.declare(**found.plan)  # the same, so nothing is written; rows that `rescue` kept come in
        return _repeat_held(store, planned, runs, seconds, again, say)


def _repeat_held(store: rows.RowStore, planned: dict, runs: int, seconds: float, again, say) -> bool:
    """planned: settings and seed of each run, by key. again(settings, seed, parameters) records one."""
    found = rows.read(store.path)
    tries = rows.tries_of(found, planned)
    older = agreement.older_codes(tries, store.code)
    before = {key: part for key, tried in tries.items() if (part := _finished(tried, older))}
    obstacles = {key: why for key, part in before.items() if (why := _obstacle(part[-1], found.provenance))}
    for why, count in Counter(obstacles.values()).items():
        say(f"left out: {_runs(count)} {why}")
    possible = {key: tried for key, tried in tries.items() if key not in obstacles}
    choice = choose(list(planned), possible, store.code, older, runs, seconds)
    if choice.dear:
        say(f"left out: {_runs(choice.dear)} that took more than {seconds:g} core-seconds")
    if choice.short:
        say(f"so {_runs(choice.short)} fewer than asked for")
    fine = True
    for key, now, earlier in agreement.pairs(tries, store.code, older):  # repeated by a call before this one
        fine &= _told(now, earlier, _name(key, planned), say, only_changes=True)
    for key in choice.keys:
        parameters = found.provenance.get(before[key][-1]["provenance"], {}).get("parameters", {})
        now = again(*planned[key], parameters)
        fine &= _told(now, before[key], _name(key, planned), say)
    if not choice.keys:
        said = agreement.compare(tries, store.code, found.provenance).words()
        say(f"nothing new to repeat{': ' if said else ''}{said}")
    return fine


def _told(now: dict, before: list[dict], name: str, say, *, only_changes: bool = False) -> bool:
    """Say how a repeated run came out; -> whether as before."""
    if now.get("failed"):
        say(f"{name}: FAILED: {now['failed'].strip().splitlines()[-1]}")
        return False
    changes = [line for row in before for line in agreement.differences(row["result"], now["result"])]
    if changes or not only_changes:
        word = "DIFFERS" if changes else "the same to the byte"
        say(f"{name}: {word} ({now['core_s']:,.1f} core-seconds, {before[-1]['core_s']:,.1f} then)")
    for line in dict.fromkeys(changes):
        say(line, 2)
    return not changes


def choose(
    planned: list[str],
    tries: Mapping[str, list[dict]],
    code: str,
    older: Mapping,
    runs: int,
    seconds: float,
) -> Choice:
    """Which runs to repeat with `code`, so that of each of the `older` codes `runs` are repeated in all.

    planned: the keys of all runs, in the order of the grid; tries: the rows of those that can be repeated.
    """
    keys: list[str] = []
    dear, short = set(), 0
    for other in older:
        made = {key: part[0] for key in planned if (part := _finished(tries.get(key, []), {other}))}
        cost = {key: row["core_s"] for key, row in made.items()}
        done = [key for key in cost if key in keys or _finished(tries[key], {code})]
        wanted = min(runs, len(cost)) - len(done)
        if wanted > 0:
            cheap = [key for key in cost if cost[key] <= seconds]
            waiting = [key for key in _in_turn(cheap, cost, planned) if key not in done]
            keys += waiting[:wanted]
            dear |= cost.keys() - set(cheap) - set(done)
            short += max(0, wanted - len(waiting))
    return Choice(keys, len(dear), short)


def _in_turn(cheap: list[str], cost: Mapping[str, float], planned: list[str]) -> list[str]:
    """The cheapest run, then those nearest to 1/2, 1/4, 3/4, 1/8, ... of the grid."""
    place = {key: i for i, key in enumerate(planned)}
    left, turn = list(cheap), []
    fractions = _fractions()
    while left:
        if not turn:
            best = min(left, key=cost.__getitem__)
        else:
            middle = next(fractions) * (len(planned) - 1)
            best = min(left, key=lambda key: abs(place[key] - middle))
        left.remove(best)
        turn.append(best)
    return turn


def _fractions() -> Iterator[float]:
    parts = 2
    while True:
        yield from (odd / parts for odd in range(1, parts, 2))
        parts *= 2


def _finished(tried: list[dict], codes: Container[str]) -> list[dict]:
    """The newest finished row of each of `codes`, in the order of the file."""
    newest = {row["code"]: row for row in tried if row["code"] in codes and not row.get("failed")}
    return sorted(newest.values(), key=tried.index)


def _obstacle(row: Mapping, made: Mapping[str, dict]) -> str:
    """Why a run cannot be repeated from its row alone; empty if it can."""
    of_row = made.get(row["provenance"], {})
    if inputs := of_row.get("inputs"):
        return f"that read the files {', '.join(inputs)}, which only the notebook can find"
    device = of_row.get("device", "CPU")
    return "" if device == "CPU" else f"made on a {device}; this command repeats those of a CPU"


def _again(run: Callable, store, scratch: Path, settings: dict, seed: int, parameters: dict) -> dict:
    """Record one run with the present code; -> its row."""
    from lib.sweeps import run_sweep  # here: it brings torch

    about = partial(_about, run, store.code, parameters)
    how = {"store": store, "scratch": scratch, "about": about, "progress": False}
    return run_sweep(run, [settings], seeds=[seed], **how)[0]


def _about(run: Callable, code: str, parameters: dict) -> dict:
    return provenance.of_worker(run, code, "cpu") | {"parameters": parameters}


def _function(name: str) -> Callable:
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise EvidenceError(f"its plan names {name}, which cannot be imported: {error}") from error


def _name(key: str, planned: Mapping[str, tuple[dict, int]]) -> str:
    settings, seed = planned[key]
    text = ", ".join(f"{name}={plans.canonical(value)}" for name, value in settings.items())
    text = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    return f"run {list(planned).index(key) + 1} of {len(planned)} ({text}; seed {seed})"


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _indented(say: Callable[[str], None], text: str, depth: int = 1) -> None:
    say("  " * depth + text)
