"""What is recorded of the planned runs, what is still to do, and about how long that takes.

    for one in forecast("one-layer-limits", jobs=2):
        print(one.line())

Times come from recorded runs, so nothing is promised for an experiment of which none has finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lib.evidence import plans, rows
from lib.evidence.agreement import Agreement, compare
from lib.evidence.code import named_digest
from lib.paths import EVIDENCE, ROOT

SUFFIX = ".standard.jsonl"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One experiment. planned = current + stale + failed + missing; all but the current runs are to do.

    current: finished, by the code as it is now; stale: by other code only; failed: never finished; missing:
    not in the file. core_s, wall_s: seconds to come, None if no run tells; note: what to know about these.
    agreement: how runs that the code as it is now repeated compare with the stale ones.
    """

    chapter: str
    experiment: str
    planned: int
    current: int
    stale: int
    failed: int
    missing: int
    core_s: float | None
    wall_s: float | None
    note: str = ""
    agreement: Agreement = Agreement()

    @property
    def todo(self) -> int:
        return self.planned - self.current

    def counted(self) -> str:
        """How many planned runs are recorded, and what became of the others."""
        compared = f" ({said})" if (said := self.agreement.words()) else ""
        rest = [
            f"{count} {what}"
            for count, what in [
                (self.stale, f"by other code{compared}"), (self.failed, "failed"), (self.missing, "missing")
            ]
            if count
        ]  # fmt: skip
        return ", ".join([f"{self.current} of {self.planned} planned runs recorded", *rest])

    def line(self) -> str:
        """For a terminal: the counts, then about how long the rest takes."""
        line = f"{self.experiment}: {self.counted()}"
        if self.todo:
            line += (
                "; nobody knows how long they take"
                if self.wall_s is None
                else f"; about {_duration(self.wall_s)} to go ({_duration(self.core_s)} on one core)"
            )
        return f"{line} ({self.note})" if self.note else line


def forecast(chapter: str, *, evidence: Path = EVIDENCE, jobs: int, root: Path = ROOT) -> list[Forecast]:
    """One Forecast for every experiment that `chapter` recorded at profile standard; empty if none.

    jobs: runs at a time. Raises EvidenceError if a file is damaged.
    """
    files = sorted((Path(evidence) / chapter).glob(f"*{SUFFIX}"))
    return [
        standing(
            rows.read(file), chapter=chapter, experiment=file.name.removesuffix(SUFFIX), jobs=jobs, root=root
        )
        for file in files
    ]


def standing(
    found: rows.Recorded, *, chapter: str, experiment: str, jobs: int = 1, root: Path = ROOT
) -> Forecast:
    """The Forecast of one file of rows."""
    planned = plans.keys(found.plan) if found.plan else {}
    by_run = rows.tries_of(found, planned)
    code, note = _current_code(found, by_run, root)
    finished = {
        key: done
        for key, tries in by_run.items()
        if (done := [row for row in tries if not row.get("failed")])
    }
    current = {key for key, done in finished.items() if any(row["code"] == code for row in done)}
    times = _times(planned, finished)
    to_come = [times[key] for key in planned if key not in current]
    core_s = None if None in to_come else sum(to_come)
    return Forecast(
        chapter=chapter,
        experiment=experiment,
        planned=len(planned),
        current=len(current),
        stale=len(finished) - len(current),
        failed=len(by_run) - len(finished),
        missing=len(planned) - len(by_run),
        core_s=core_s,
        wall_s=None if core_s is None else max([core_s / jobs, *to_come]),  # no run is split
        note=note,
        agreement=compare(by_run, code, found.provenance),
    )


def _current_code(found: rows.Recorded, by_run: dict[str, list[dict]], root: Path) -> tuple[str, str]:
    """The digest that the code of the runs has now, and what to say if only the rows themselves tell it."""
    if found.plan is None:
        return "", "no plan: the next run of the chapter makes one"
    run = found.plan.get("run")
    if code := named_digest(run, root=root) if run else None:
        return code, ""
    what = f"there is no {run} any more" if run else "the plan names no function"
    codes = {tries[-1]["code"] for tries in by_run.values()}
    if len(codes) > 1:
        return "", f"{what}, and the rows are of {len(codes)} codes"
    return next(iter(codes), ""), f"{what}: by the rows' own code"


def _times(planned: dict, finished: dict[str, list[dict]]) -> dict[str, float | None]:
    """Core seconds to expect of each planned run: its own, else those of its settings, else of all."""
    alike: dict[str, list[float]] = {}
    for key, done in finished.items():
        alike.setdefault(plans.canonical(planned[key][0]), []).append(done[-1]["core_s"])
    everything = fmean(time for times in alike.values() for time in times) if alike else None
    times = {}
    for key, (settings, _) in planned.items():
        if key in finished:
            times[key] = finished[key][-1]["core_s"]
        else:
            near = alike.get(plans.canonical(settings))
            times[key] = fmean(near) if near else everything
    return times


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
