"""The ledger: every declared claim with its strongest verdict, from build/claims/*.json to build/claims.json.

Strongest means attempted rather than not, then `standard` (its rows are committed and anybody can repeat
them), `cluster`, `gpu`, `quick`. Verdicts that do not fit the declaration any more do not count. A claim
without a verdict is "not attempted", with the command that would attempt it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd

from lib.evidence.claims import Claim, load_claims
from lib.evidence.files import write_atomically
from lib.evidence.tables import VERDICTS, Table, badge, number, show
from lib.evidence.verdict import Verdict, strongest
from lib.paths import BOOK, BUILD

_FROM_RUN = (
    "verdict",
    "value",
    "interval",
    "n",
    "control",
    "profile",
    "recorded",
    "reason",
    "note",
    "provenance",
    "differing",
)


def build(*, claims: Path | None = None, folder: Path = BUILD) -> list[dict]:
    """One flat entry a claim, in the order declared; also written to build/claims.json.

    Keys: id, chapter, statement, kind, source, locator, paper_value, quantity, unit, holds, control_text,
    control_holds, tests, unrefereed; of the strongest verdict: verdict, value, interval, n, control, profile,
    recorded, reason, note, provenance, differing (profile is None if there is no verdict at all); live: the
    same keys of the verdict at the profile that the chapter ran last, or None; remedy: the command that makes
    what is missing, or "".
    """
    entries = []
    runs: dict[str, tuple[dict, str]] = {}
    for claim in load_claims(claims).values():
        if claim.chapter not in runs:
            runs[claim.chapter] = _run(Path(folder) / "claims" / f"{claim.chapter}.json")
        entries.append(_entry(claim, *runs[claim.chapter]))
    write_atomically(Path(folder) / "claims.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    return entries


def counts(chapter: str, **where) -> dict[str, int]:
    """How many of a chapter's claims have each verdict; all four words are keys."""
    found = Counter(entry["verdict"] for entry in build(**where) if entry["chapter"] == chapter)
    return {verdict: found[verdict] for verdict in VERDICTS}


def table(entries: list[dict] | None = None, *, book: Path = BOOK) -> Table:
    """The ledger as a table: claim, statement, kind, the paper's value, ours, verdict, profile and date."""
    entries = build() if entries is None else entries
    rows = [
        [
            f"{_link(e, book)}, {e['kind']}: {e['statement']}",
            _paper(e),
            _ours(e),
            f"{badge(e['verdict'])} {_origin(e)}",
        ]
        for e in entries
    ]
    columns = ["claim", "the paper says", "we found", "verdict"]
    return show(pd.DataFrame(rows, columns=columns, dtype=object))


def at_a_glance(entries: list[dict] | None = None, *, book: Path = BOOK) -> str:
    """MyST for the front page: how the claims came out, a line each, and how to make what is missing."""
    entries = build() if entries is None else entries
    if not entries:
        return "No claim is declared yet. Claims are declared in `book/claims.toml`."
    found = Counter(entry["verdict"] for entry in entries)
    total = ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict])
    rows = [[badge(e["verdict"]), e["statement"], _link(e, book)] for e in entries]
    lines = show(pd.DataFrame(rows, columns=["verdict", "claim", "where"])).markdown
    return "\n\n".join(filter(None, [f"**{len(entries)} claims: {total}.**", lines, missing(entries)]))


def missing(entries: list[dict]) -> str:
    """What the ledger lacks and which commands make it, as MyST; empty if nothing."""
    parts = []
    recorded = [e for e in entries if e["profile"] not in (None, "quick") and e["remedy"]]
    for what, lacking in (
        ("have no verdict", [e for e in entries if e["profile"] is None]),
        ("rest on a quick run only", [e for e in entries if e["profile"] == "quick" and e["remedy"]]),
        (
            "rest on incomplete recorded evidence",
            [e for e in recorded if not e["differing"]],
        ),
        (
            "rest on recorded runs whose results the present code does not give again",
            [e for e in recorded if e["differing"]],
        ),
    ):
        if lacking:
            commands = ", ".join(f"`{command}`" for command in dict.fromkeys(e["remedy"] for e in lacking))
            parts.append(f"{len(lacking)} of {len(entries)} claims {what}: {commands}.")
    return "\n".join(parts)


def _run(path: Path) -> tuple[dict, str]:
    """What a chapter's last execution decided, and why there is nothing if there is nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        return {"verdicts": []}, "The chapter has not been executed."
    except ValueError:
        return {"verdicts": []}, f"build/claims/{path.name} is damaged."


def _entry(claim: Claim, run: dict, why: str) -> dict:
    found = [v for v in run["verdicts"] if v["claim"] == claim.id]
    valid = [v for v in found if v["declaration"] == claim.declaration]
    if not valid:
        why = why or (
            "The declaration changed after the verdict."
            if found
            else "The last execution ended before deciding it."
        )
    entry = {
        "id": claim.id, "chapter": claim.chapter, "statement": claim.says, "kind": claim.kind,
        "source": claim.source, "locator": claim.locator, "paper_value": claim.paper_value,
        "quantity": claim.quantity, "unit": claim.unit, "holds": str(claim.holds),
        "control_text": claim.control,
        "control_holds": str(claim.control_holds) if claim.control_holds else None,
        "tests": list(claim.tests), "unrefereed": claim.unrefereed,
    }  # fmt: skip
    if not valid:
        empty = dict.fromkeys(_FROM_RUN) | {
            "verdict": "not attempted",
            "reason": why,
            "note": "",
            "provenance": "",
        }
        return entry | empty | {"live": None, "remedy": f"make chapter CHAPTER={claim.chapter}"}
    verdicts = [Verdict(**v) for v in valid]  # what an older checkout wrote down gets today's defaults
    best = strongest(verdicts).as_dict()
    live = next((v.as_dict() for v in verdicts if v.profile == run["profile"]), None)
    incomplete = best["lacking"] > 0 or (
        best["profile"] == "quick" and (best["runs"] > 0 or claim.kind == "measurement")
    )
    return (
        entry
        | {key: best[key] for key in _FROM_RUN}
        | {"live": live and {key: live[key] for key in _FROM_RUN}}
        | {"remedy": f"make evidence CHAPTER={claim.chapter}" if incomplete else ""}
    )


def _link(entry: dict, book: Path) -> str:
    """The claim's id, as a link to its chapter if that is written."""
    page = f"{entry['chapter']}.ipynb"
    return f"[{entry['id']}]({page})" if (Path(book) / page).exists() else f"`{entry['id']}`"


def _paper(entry: dict) -> str:
    mark = ", unrefereed" if entry["unrefereed"] else ""
    where = f"ours{mark}" if entry["source"] == "ours" else f"{{cite}}`{entry['source']}`"
    value = "" if entry["paper_value"] is None else f"{number(entry['paper_value'])} – "
    return f"{value}{where}, {entry['locator']}"


def _ours(entry: dict) -> str:
    """Value, interval, n; or why there is none. The quick verdict beside a recorded one, where it differs."""
    if entry["verdict"] == "not attempted":
        return f"{entry['reason']} `{entry['remedy']}`" if entry["remedy"] else entry["reason"]
    unit = "" if entry["unit"] == "1" else f" {entry['unit']}"
    interval = f" {number(entry['interval'])}" if entry["interval"] else ""
    counted = f", n = {number(entry['n'])}" if entry["n"] else ""
    live = entry["live"]
    differs = live and live["verdict"] not in (entry["verdict"], "not attempted")
    other = f" (live, {live['profile']}: {live['verdict']}, {number(live['value'])})" if differs else ""
    found = f"{entry['quantity']}: {number(entry['value'])}{interval}{unit}{counted}"
    found += f" (holds if {entry['holds']}){other}"
    return " ".join(filter(None, [found, entry["reason"], entry["note"]]))


def _origin(entry: dict) -> str:
    return "–" if entry["profile"] is None else f"{entry['profile']}, {entry['recorded']}"
