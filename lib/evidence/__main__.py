"""`python -m lib.evidence check | figure FILE | ledger | mend FILE | repeat TARGET | replan FILE`."""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path

from lib.evidence import forecast, ledger, mend, repeat, rows
from lib.evidence.claims import load_claims
from lib.evidence.files import EvidenceError, named
from lib.paths import BOOK, BUILD, EVIDENCE, ROOT


def main(argv: list[str] | None = None, *, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.evidence", description="Look after claims and evidence."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "check", help="compare every line of evidence with its digest, and the claims with the tests"
    )
    commands.add_parser("figure", help="print where a figure comes from").add_argument("file", type=Path)
    commands.add_parser("ledger", help="write build/claims.json and say how the claims stand")
    replan_ = commands.add_parser(
        "replan", help="withdraw the plan of a file of rows, to record other settings; its rows stay"
    )
    replan_.add_argument("file", type=Path)
    mend_ = commands.add_parser(
        "mend", help="move the damaged lines of a file of rows to FILE.damaged; all others stay"
    )
    mend_.add_argument("file", type=Path)
    repeat_ = commands.add_parser(
        "repeat", help="repeat a few standard runs recorded by older code, and compare their results"
    )
    repeat_.add_argument("target", metavar="FILE|CHAPTER|all")
    repeat_.add_argument("--runs", type=int, default=repeat.RUNS, help="of each file (default: %(default)s)")
    repeat_.add_argument(
        "--seconds", type=float, default=repeat.SECONDS,
        help="leave out runs that took more core-seconds (default: %(default)g)",
    )  # fmt: skip
    asked = parser.parse_args(argv)
    if asked.command == "check":
        return check(root)
    if asked.command == "figure":
        return figure(asked.file)
    if asked.command == "replan":
        return replan(asked.file, root)
    if asked.command == "mend":
        return show_mended(asked.file, root)
    if asked.command == "repeat":
        return repeated(asked.target, asked.runs, asked.seconds, root)
    return show_ledger()


def check(root: Path = ROOT) -> int:
    """Print what every file of rows holds, and every problem with its remedy. 0 if there is none, else 1."""
    problems, remedies = _claim_problems(root), []
    folders = [root / path.relative_to(ROOT) for path in (EVIDENCE, BUILD / "evidence")]
    for path in sorted(path for folder in folders for path in folder.rglob("*.jsonl")):
        try:
            found = rows.read(path, damaged="collect")
        except EvidenceError as error:
            problems.append(str(error))
            continue
        failed = sum("failed" in row for row in found.rows)
        torn = "; an unfinished last line, which the next append removes" if found.torn else ""
        print(
            f"{named(path, root)}: {len(found.rows)} rows, {failed} of them failed{torn}; "
            f"{_standing(path, found, root)}"
        )
        problems += [f"{named(path, root)}, line {damage.line}: {damage.why}" for damage in found.damaged]
        remedies += [rows.remedy(path)] if found.damaged else []
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    for remedy in remedies:
        print(remedy, file=sys.stderr)
    print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}." if problems else "No problems.")
    return 1 if problems else 0


def _standing(path: Path, found: rows.Recorded, root: Path) -> str:
    """What is recorded of the file's plan."""
    now = forecast.standing(found, chapter=path.parent.name, experiment=path.name, root=root)
    return " – ".join(filter(None, [now.counted() if found.plan else "", now.note]))


def _claim_problems(root: Path) -> list[str]:
    try:
        claims = load_claims(root / "book/claims.toml")
    except EvidenceError as error:
        return [str(error)]
    print(f"book/claims.toml: {len(claims)} claims")
    problems = [
        f"book/claims.toml, {claim.id}: there is no {test}"
        for claim in claims.values()
        for test in claim.tests
        if not _exists(root, test)
    ]
    references = root / BOOK.relative_to(ROOT) / "references.bib"
    keys = (
        set(re.findall(r"@\w+\{([^,\s]+),", references.read_text(encoding="utf-8")))
        if references.exists()
        else set()
    )
    return problems + [
        f"book/claims.toml, {claim.id}: references.bib has no {claim.source!r}"
        for claim in claims.values()
        if claim.source not in keys | {"ours"}
    ]


def _exists(root: Path, test: str) -> bool:
    file, _, name = test.partition("::")
    if not (root / file).is_file():
        return False
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def figure(file: Path) -> int:
    """Print the provenance inside a figure file. 0, or 1 if there is none."""
    from lib.figures import read_provenance  # here: the other commands have no need of matplotlib

    try:
        print(json.dumps(read_provenance(file), indent=2, sort_keys=True))
    except (OSError, ValueError, SyntaxError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 1
    return 0


def replan(file: Path, root: Path = ROOT) -> int:
    """Withdraw the plan of a file of rows. 0, or 1 if that cannot be done."""
    try:
        if not file.is_file():
            raise EvidenceError(f"there is no file {file}")
        stay = rows.withdraw(file)
    except EvidenceError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{named(file.resolve(), root)}: the plan is withdrawn, its {stay} rows stay. "
        "The next run of the chapter writes a new plan."
    )
    return 0


def show_mended(file: Path, root: Path = ROOT) -> int:
    """Move the damaged lines of a file of rows aside. 0, or 1 if that cannot be done."""
    try:
        if not file.is_file():
            raise EvidenceError(f"there is no file {file}")
        done = mend.mend(file)
    except (EvidenceError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    name = named(file.resolve(), root)
    for damage in done.damaged:
        print(f"{name}, line {damage.line}: {damage.why}; moved to {named(done.aside, root)}")
    print(f"{name}: {len(done.damaged)} damaged lines moved, {done.kept} sound lines stay as they were.")
    if done.homeless:
        print(f"{done.homeless} rows stay, but what says which machine made them was damaged.")
    return 0


def repeated(target: str, runs: int, seconds: float, root: Path = ROOT) -> int:
    """Repeat a few runs of older code. 0 if they came out as recorded or none was to do, else 1."""
    try:
        fine = repeat.repeat(repeat.files(target, root), runs=runs, seconds=seconds, root=root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not fine:
        print(
            "Not everything was repeated with the same result. Where one differs, "
            "`make evidence CHAPTER=…` records every run anew.",
            file=sys.stderr,
        )
    return 0 if fine else 1


def show_ledger() -> int:
    """Print a line a claim and what is missing. 0 whatever the verdicts, 1 if the claims cannot be read."""
    try:
        entries = ledger.build()
    except EvidenceError as error:
        print(error, file=sys.stderr)
        return 1
    for entry in entries:
        print(f"{entry['verdict']:14} {entry['profile'] or '–':9} {entry['id']}")
    print(ledger.missing(entries).replace("`", "") or f"All {len(entries)} claims have a verdict.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
