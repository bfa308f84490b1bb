"""What ran where and for how long: tables that pages include, made anew from records at each build.

Sources: the executions kept in build/cache, the rows in data/evidence, and this machine. No number is typed.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.choices import PROFILES
from lib.evidence import plans, provenance, rows
from lib.evidence.tables import show
from lib.pipeline.layout import Layout

_PACKAGES = ("torch", "numpy", "joblib", "distributed", "ray", "papermill", "jupyter-book")
_STATES = {"executed": "up to date", "reused": "up to date"}


@dataclass(frozen=True)
class Recorded:
    """One file of rows. runs: finished, of `planned`; machines, versions: all that had a part in them."""

    chapter: str
    experiment: str
    profile: str
    runs: int
    planned: int
    failed: int
    core_s: float
    machines: tuple[str, ...]
    versions: tuple[str, ...]
    dates: tuple[str, ...]


def fragments(layout: Layout, runs: Mapping[str, dict]) -> dict[str, str]:
    """Markdown by file name, for pages to include.

    runs: by chapter, the facts of the execution that its page shows (see `cache.Entry`) and its `state`.
    """
    evidence = recorded(layout.evidence)
    return {
        "execution-chapters.md": chapters(runs),
        "execution-evidence.md": experiments(evidence),
        "execution-machine.md": machine(),
        "execution-profiles.md": profiles(runs, evidence),
    }


def chapters(runs: Mapping[str, dict]) -> str:
    """Each page's execution: profile, time, end, and whether its inputs are still the same."""
    table = [
        [
            f"[{name}]({name}.ipynb)",
            run.get("profile", "–"),
            duration(run["seconds"]) if "seconds" in run else "–",
            _day(run.get("finished", "")),
            _STATES.get(run["state"], run["state"]),
        ]
        for name, run in runs.items()
    ]
    return _table(["chapter", "profile", "took", "executed", "page"], table, "No chapter is written yet.")


def experiments(evidence: list[Recorded]) -> str:
    """The recorded evidence: each file of rows, what it cost and what made it."""
    table = [
        [
            f"{one.chapter}: {one.experiment}",
            one.profile,
            f"{one.runs} of {one.planned}" + (f", {one.failed} failed" if one.failed else ""),
            f"{one.core_s / 60:,.1f}",
            "; ".join(one.machines) or "–",
            "; ".join(one.versions) or "–",
            " to ".join(dict.fromkeys(one.dates[:1] + one.dates[-1:])) or "–",
        ]
        for one in evidence
    ]
    columns = ["experiment", "profile", "runs", "core-minutes", "machine", "versions", "recorded"]
    return _table(columns, table, "No evidence is recorded yet: `make evidence` records it.")


def machine() -> str:
    """The machine that built this book, and the packages that had a part in it."""
    found = provenance.machine()
    versions = {name: provenance.version(name).partition("+")[0] for name in _PACKAGES}
    present = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    table = [
        ["processor", found["cpu"]],
        ["cores this build may use", str(found["cores"])],
        ["memory", _memory()],
        ["system", found["system"]],
        ["Python", platform.python_version()],
        ["packages", present],
    ]
    return _table(["this machine", "is"], table, "")


def profiles(runs: Mapping[str, dict], evidence: list[Recorded]) -> str:
    """What each profile took: the execution of a page, or the recorded runs of its experiments."""
    table = []
    for profile in PROFILES:
        live = {name: run for name, run in runs.items() if run.get("profile") == profile}
        table += [
            [profile, name, duration(run["seconds"]), f"the page executed, {_day(run['finished'])}"]
            for name, run in live.items()
        ]
        own = [one for one in evidence if one.profile == profile]
        for name in dict.fromkeys(one.chapter for one in own):
            its = [one for one in own if one.chapter == name]
            took = f"{sum(one.core_s for one in its) / 60:,.0f} core-minutes"
            where = "; ".join(dict.fromkeys(machine for one in its for machine in one.machines))
            table.append([profile, name, took, f"{sum(one.runs for one in its)} recorded runs, {where}"])
        if not live and not own:
            table.append([profile, "–", "not measured yet", "–"])
    return _table(["profile", "chapter", "took", "measured on"], table, "")


def recorded(folder: Path) -> list[Recorded]:
    """Every file of rows below `folder`, by chapter, profile and experiment."""
    found = [_recorded(path) for path in folder.glob("*/*.jsonl")]
    return sorted(found, key=lambda one: (one.chapter, PROFILES.index(one.profile), one.experiment))


def duration(seconds: float) -> str:
    """
    >>> duration(4.2), duration(125), duration(9000)
    ('4.2 s', '2.1 min', '2.5 h')
    """
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 3600:.1f} h"


def _recorded(path: Path) -> Recorded:
    experiment, profile = path.name.removesuffix(".jsonl").rsplit(".", 1)
    found = rows.read(path, damaged="collect")  # `python -m lib.evidence check` is there to complain
    newest = {rows.run_key(row["settings"], row["seed"]): row for row in found.rows}
    planned = plans.keys(found.plan) if found.plan else newest
    its = [newest[key] for key in planned if key in newest]
    done = [row for row in its if not row.get("failed")]
    makers = [found.provenance[row["provenance"]] for row in done if row["provenance"] in found.provenance]
    return Recorded(
        chapter=path.parent.name,
        experiment=experiment,
        profile=profile,
        runs=len(done),
        planned=len(planned),
        failed=len(its) - len(done),
        core_s=sum(row["core_s"] for row in done),
        machines=tuple(dict.fromkeys(_machine(maker) for maker in makers)),
        versions=tuple(dict.fromkeys(_versions(maker) for maker in makers)),
        dates=tuple(sorted(row["recorded"][:10] for row in done)),
    )


def _machine(maker: Mapping) -> str:
    device = "" if maker["device"] == "CPU" else f"{maker['device']}, "
    return f"{device}{maker['machine']['cpu']} ({maker['machine']['cores']} cores)"


def _versions(maker: Mapping) -> str:
    return f"Python {maker['python']}, torch {maker['torch'].partition('+')[0]}, numpy {maker['numpy']}"


def _memory() -> str:
    import psutil  # a dependency of ipykernel

    return f"{psutil.virtual_memory().total / 2**30:.0f} GiB"


def _day(moment: str) -> str:
    return moment[:10] or "–"


def _table(columns: list[str], table: list[list[str]], empty: str) -> str:
    return show(pd.DataFrame(table, columns=columns, dtype=object)).markdown + "\n" if table else f"{empty}\n"
