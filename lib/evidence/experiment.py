"""Experiments as a chapter sees them: what ran, where it came from, in tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from lib.evidence.agreement import Agreement, compare
from lib.evidence.files import EvidenceError
from lib.evidence.rows import Recorded, run_key, tries_of


@dataclass(frozen=True)
class Source:
    """Runs of one profile, and where they came from.

    frame: one row a finished run, in the order of the grid, with the settings, `seed`, the result, `wall_s`
    and `core_s` as columns. provenance: what the runs were made by, oldest first. live: at the profile of
    this execution. wanted, failed, stale: runs that the grid asks for; that failed; recorded by older code.
    agreement: how runs that the present code repeated compare with the stale ones.
    """

    frame: pd.DataFrame
    profile: str
    provenance: tuple[dict, ...]
    live: bool = True
    wanted: int = 0
    failed: int = 0
    stale: int = 0
    recorded: str = ""
    agreement: Agreement = Agreement()

    @property
    def missing(self) -> int:
        """Runs that the grid asks for and nobody has executed yet."""
        return self.wanted - len(self.frame) - self.failed

    @property
    def lacking(self) -> int:
        """Runs missing for a verdict: not executed, failed, or stale with nothing to vouch for them."""
        return self.missing + self.failed + (0 if self.agreement.vouches else self.stale)

    def where(self, **settings) -> pd.DataFrame:
        """The runs with these settings, by seed. A setting that a run does not have counts as None."""
        found = self.frame
        for name, value in settings.items():
            if name in found:
                found = found[found[name].isna() if value is None else found[name] == value]
            elif value is not None:
                found = found.iloc[:0]
        return found.sort_values("seed") if len(found) else found

    def line(self) -> str:
        """Profile, runs, device, machine, version, dates; then what is missing, failed, stale."""
        made = "Recorded" if not self.live else "Run" if self.wanted else "Computed for this page"
        parts = [f"{made} at profile {self.profile}"]
        if self.wanted:
            seeds = self.frame["seed"].nunique() if len(self.frame) else 0
            parts.append(f"{len(self.frame)} of {self.wanted} runs, {seeds} seed{'' if seeds == 1 else 's'}")
            parts.append(f"{self.frame['core_s'].sum() if seeds else 0:,.0f} core-seconds")
        parts += list(dict.fromkeys(_made_by(one) for one in self.provenance))
        if self.recorded:
            parts.append(self.recorded)
        caveats = [
            f"{count} run{' was' if count == 1 else 's were'} {what}"
            for count, what in self._caveats()
            if count
        ]
        return ", ".join(parts) + "." + "".join(f" {caveat}." for caveat in caveats)

    def caveat(self) -> str:
        """What a verdict drawn from these runs must say about them; empty if nothing."""
        return " ".join(f"{count} of {self.wanted} runs {what}." for count, what in self._caveats() if count)

    def _caveats(self) -> list[tuple[int, str]]:
        return [
            (self.missing, "not executed yet"),
            (self.failed, "recorded as failed"),
            (self.stale, "; ".join(filter(None, ["recorded by older code", self.agreement.words()]))),
        ]

    def as_dict(self) -> dict:
        """For a figure's metadata."""
        return {
            "profile": self.profile, "live": self.live, "runs": len(self.frame), "wanted": self.wanted,
            "failed": self.failed, "stale": self.stale, "repeated": self.agreement.repeated,
            "differing": self.agreement.differ, "recorded": self.recorded,
            "provenance": list(self.provenance),
        }  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """Runs of one function over a grid. `sources`: this profile's, then the recorded standard ones."""

    name: str
    sources: list[Source] = field(default_factory=list)

    @property
    def live(self) -> Source:
        """The runs at this chapter's profile."""
        return self.sources[0]

    @property
    def recorded(self) -> Source | None:
        """The recorded standard runs; None if there are none."""
        return next((source for source in self.sources if source.profile == "standard"), None)

    @property
    def judged(self) -> list[Source]:
        """The sources to draw verdicts from: the live one, and the recorded one if no run is missing."""
        return [source for source in self.sources if source.live or not source.missing]

    @property
    def best(self) -> Source:
        """The recorded standard runs if none is missing, else the live ones; `Source.line` tells flaws."""
        return self.recorded if self.recorded and not self.recorded.missing else self.live


def source(
    found: Recorded, *, grid: Sequence[dict], seeds: Sequence[int], profile: str, code: str, live: bool
) -> Source:
    """What `found` holds on the runs of grid x seeds: of each the newest row. Other rows are ignored."""
    wanted = [run_key(settings, seed) for settings in grid for seed in seeds]
    tries = tries_of(found, wanted)
    rows = [tries[key][-1] for key in wanted if key in tries]
    done = [row for row in rows if not row.get("failed")]
    dates = sorted({row["recorded"][:10] for row in done})
    used = dict.fromkeys(row["provenance"] for row in done)
    return Source(
        frame=pd.DataFrame([_flat(row) for row in done]),
        profile=profile,
        provenance=tuple(part for name, part in found.provenance.items() if name in used),
        live=live,
        wanted=len(wanted),
        failed=len(rows) - len(done),
        stale=sum(row["code"] != code for row in done),
        recorded=" to ".join(dict.fromkeys(dates[:1] + dates[-1:])),
        agreement=compare(tries, code, found.provenance),
    )


def _flat(row: dict) -> dict:
    flat = row["settings"] | {"seed": row["seed"], "wall_s": row["wall_s"], "core_s": row["core_s"]}
    for name, value in row["result"].items():
        if name in flat and flat[name] != value:
            raise EvidenceError(
                f"a run with settings {row['settings']} returned {name}={value!r}, but that column holds "
                f"{flat[name]!r} already; give the result another name"
            )
        flat[name] = value
    return flat


def _made_by(provenance: dict) -> str:
    machine = provenance["machine"]
    device = "" if provenance["device"] == "CPU" else f"{provenance['device']}, "
    return (
        f"{device}{machine['cpu']} ({machine['cores']} cores), torch {provenance['torch'].partition('+')[0]}"
    )
