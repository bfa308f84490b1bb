"""What a recording of evidence is about to do and what it has done so far, in lines for a terminal."""

from __future__ import annotations

from pathlib import Path

from lib.evidence import provenance, rows
from lib.evidence.forecast import forecast, standing
from lib.pipeline.layout import Layout
from lib.pipeline.request import Job


def told(layout: Layout, jobs: list[Job]) -> str:
    """Chapter by chapter: recorded, to do, and about how long that takes. Raises EvidenceError on damage."""
    return "\n".join(line for job in jobs for line in [*_chapter(layout, job), ""])


def recorded(layout: Layout, job: Job, experiment: str) -> str:
    """The file into which the job records an experiment, and how much of what is planned it holds."""
    folder = layout.build / "evidence" if job.profile == "quick" else layout.evidence
    file = Path(folder, job.chapter.name, f"{experiment}.{job.profile}.jsonl")
    found = standing(
        rows.read(file, damaged="collect"), chapter=job.chapter.name, experiment=experiment, root=layout.root
    )
    return f"{file.relative_to(layout.root).as_posix()}: {found.counted()}."


def _chapter(layout: Layout, job: Job) -> list[str]:
    asked, backend = job.parameters.get("jobs", "auto"), job.parameters.get("backend", "local")
    at_once = provenance.machine()["cores"] if asked == "auto" else asked
    found = forecast(job.chapter.name, evidence=layout.evidence, jobs=at_once, root=layout.root)
    if not found:
        return [f"{job.chapter.name}: nothing is recorded yet, so nobody knows how long it takes"]
    where = "" if backend == "local" else f" on this machine; on {backend} as many as it has workers"
    head = f"{job.chapter.name}, {at_once} runs at a time{where}:"
    return [head] + [f"  {one.line()}" for one in found]
