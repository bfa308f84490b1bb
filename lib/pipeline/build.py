"""The three commands: the whole book, one chapter, the standard evidence. Each returns an exit code."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import nbformat

from lib.choices import PROFILES
from lib.evidence.locks import Held, held
from lib.pipeline import ahead, cache, execute, facts, render, stage
from lib.pipeline.layout import Chapter, Layout
from lib.pipeline.progress import Clock, Runs
from lib.pipeline.request import Job, RequestError, plan

T = TypeVar("T")
VERDICTS = ("supported", "not supported", "inconclusive", "not attempted")


@dataclass
class Result:
    """What became of one chapter: executed, reused, failed, earlier run, or not executed.

    seconds: of this build. run: profile, parameters, seconds and end of the execution that the page shows.
    """

    chapter: Chapter
    state: str
    seconds: float = 0.0
    page: nbformat.NotebookNode | None = None
    run: dict = field(default_factory=dict)
    failure: execute.Failure | None = None


def book(layout: Layout, jobs: list[Job], ledger) -> int:
    """Execute every chapter whose inputs changed, then render. The old site stays if anything fails."""
    with _alone(layout):
        _check_claims(ledger)
        results = [_settle(layout, job, ledger) for job in jobs]
        return _finish(layout, results, ledger, command="book", profile=jobs[0].profile)


def chapter(layout: Layout, jobs: list[Job], ledger) -> int:
    """Execute one chapter and render it among the others as they are, executed or not."""
    (asked,) = jobs
    with _alone(layout):
        _check_claims(ledger)
        everything = plan(layout, chapter=None, profile=PROFILES[0], params="")
        results = [
            _settle(layout, asked, ledger) if job.chapter == asked.chapter else _as_it_is(layout, job)
            for job in everything
        ]
        return _finish(layout, results, ledger, command="chapter", profile=asked.profile)


def evidence(layout: Layout, jobs: list[Job], ledger) -> int:
    """Execute chapters with the standard profile, which records evidence as it comes. Renders nothing."""
    jobs = [job for job in jobs if "profile" in job.parameters]
    with _alone(layout):
        _check_claims(ledger)
        forecast = _checked(ahead.told, layout, jobs)
        print("Records the standard evidence in data/evidence/. Stop it with Ctrl-C and call it again")
        print(f"whenever you like: finished runs are kept.\n\n{forecast}", flush=True)
        results = [_settle(layout, job, ledger) for job in jobs]
        _report(layout, results, ledger, command="evidence", profile="standard", site=False)
        return int(any(result.failure for result in results))


def _check_claims(ledger) -> None:
    """A mistake in book/claims.toml is told before chapters run for minutes and then meet it."""
    _checked(ledger.build)


def _checked(look: Callable[..., T], *arguments: object) -> T:
    """What `look` returns; damage that it meets ends the command before anything runs."""
    try:
        return look(*arguments)
    except ValueError as error:
        raise RequestError([str(error)]) from error


def _settle(layout: Layout, job: Job, ledger) -> Result:
    """Reuse the chapter's execution, or execute it and keep that."""
    if job.chapter.reads_claims:
        ledger.build()
    source = execute.source_notebook(job)
    start = time.monotonic()
    prints = cache.fingerprint(layout, job.chapter, job.parameters)
    entry = cache.find(layout, job.chapter, prints)
    if entry:
        cache.restore(layout, job.chapter, entry)
        print(f"{job.chapter.name:<28}   0:00  reused", flush=True)
        return Result(job.chapter, "reused", page=stage.merge(source, entry.notebook), run=entry.facts)
    executed, failure = _execute(layout, job, _why(cache.newest(layout, job.chapter), prints))
    seconds = time.monotonic() - start
    if failure:
        print(f"\n{failure}\n", flush=True)
        return Result(job.chapter, "failed", seconds, failure=failure)
    after = cache.fingerprint(layout, job.chapter, job.parameters)
    run = {
        "profile": job.profile,
        "parameters": job.parameters,
        "seconds": round(seconds, 1),
        "finished": _now(),
    }
    if cache.settled(job.chapter, prints, after):
        cache.keep(layout, job.chapter, after, executed, run)
    else:
        edited = ", ".join(cache.changed(prints, after))
        print(f"{job.chapter.name}: not kept for reuse; this changed while it ran: {edited}", flush=True)
    return Result(job.chapter, "executed", seconds, page=stage.merge(source, executed), run=run)


def _execute(
    layout: Layout, job: Job, why: str
) -> tuple[nbformat.NotebookNode | None, execute.Failure | None]:
    """Run the chapter below a clock that tells its experiments' progress; stopped, say what is recorded."""
    runs = Runs(layout.progress(job.chapter.name))
    runs.path.unlink(missing_ok=True)
    try:
        with Clock(job.chapter.name, why, look=runs.look) as clock:
            cache.forget(layout, job.chapter)
            executed, failure = execute.run(layout, job, clock)
            clock.done("FAILED" if failure else "executed")
    except KeyboardInterrupt:
        if experiment := runs.read().get("experiment"):
            print(f"\n{ahead.recorded(layout, job, experiment)}", flush=True)
        raise
    return executed, failure


def _as_it_is(layout: Layout, job: Job) -> Result:
    """A chapter that nobody asked to execute: from the cache, and marked if it is not up to date."""
    source = execute.source_notebook(job)
    prints = cache.fingerprint(layout, job.chapter, job.parameters)
    if entry := cache.find(layout, job.chapter, prints):
        cache.restore(layout, job.chapter, entry)
        return Result(job.chapter, "reused", page=stage.merge(source, entry.notebook), run=entry.facts)
    if entry := cache.newest(layout, job.chapter):
        page = stage.earlier_page(layout, job.chapter, entry)
        return Result(job.chapter, "earlier run", page=page, run=entry.facts)
    return Result(job.chapter, "not executed", page=stage.unexecuted_page(layout, job.chapter, source))


def _finish(layout: Layout, results: list[Result], ledger, *, command: str, profile: str) -> int:
    """Render if every chapter is there, and say how it went."""
    failed = [result for result in results if result.failure]
    if failed:
        _report(layout, results, ledger, command=command, profile=profile, site=False)
        names = ", ".join(result.chapter.name for result in failed)
        print(f"\nNot rendered, since these chapters failed: {names}.{_old_site(layout)}")
        return 1
    with Clock("rendering") as clock:
        runs = {r.chapter.name: r.run | {"state": r.state} for r in results}
        parts = {stage.GLANCE: ledger.at_a_glance()} | facts.fragments(layout, runs)
        stage.write(layout, {r.chapter.name: r.page for r in results}, parts)
        unfinished = {r.chapter.page for r in results if r.state in ("earlier run", "not executed")}
        problems = render.render(layout, unfinished=unfinished)
        clock.done("FAILED" if problems else "done")
    _report(
        layout, results, ledger, command=command, profile=profile, site=not problems, render_s=clock.seconds
    )
    if problems:
        print("\nThe pages were not accepted:\n  " + "\n  ".join(problems))
        print(f"Full output: {layout.build / 'render.log'}.{_old_site(layout)}")
        return 1
    print(f"\nThe book: {layout.html / 'index.html'}")
    return 0


def _report(
    layout: Layout,
    results: list[Result],
    ledger,
    *,
    command: str,
    profile: str,
    site: bool,
    render_s: float = 0.0,
) -> None:
    """The table of chapters, printed, and the same facts in build/run.json."""
    found = Counter((entry["chapter"], entry["verdict"]) for entry in ledger.build())
    heads = ["chapter", "seconds", "", *VERDICTS]
    rows = [
        [r.chapter.name, f"{r.seconds:.1f}", r.state, *(str(found[r.chapter.name, v]) for v in VERDICTS)]
        for r in results
    ]
    if render_s:
        rows.append(["rendering", f"{render_s:.1f}", "done" if site else "failed", *[""] * len(VERDICTS)])
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    print()
    for row in [heads, *rows]:
        print("  ".join(c.rjust(w) if i in (1, 3, 4, 5, 6) else c.ljust(w)
                        for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip())  # fmt: skip
    record = {
        "command": command,
        "profile": profile,
        "finished": _now(),
        "chapters": [
            {
                "chapter": r.chapter.name,
                "seconds": round(r.seconds, 1),
                "state": r.state,
                "verdicts": {v: found[r.chapter.name, v] for v in VERDICTS},
                "failure": str(r.failure) if r.failure else None,
            }
            for r in results
        ],
        "render_seconds": round(render_s, 1),
        "site": "build/html/index.html" if site else None,
    }
    layout.build.mkdir(exist_ok=True)
    (layout.build / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _why(entry: cache.Entry | None, prints: dict[str, str]) -> str:
    """What changed since the execution used last."""
    if entry is None:
        return "first run"
    return f"changed: {', '.join(cache.changed(entry.facts['fingerprint'], prints))}"


def _old_site(layout: Layout) -> str:
    return " The site of before is untouched." if layout.html.exists() else ""


@contextlib.contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """One build at a time in one checkout; the lock ends with the process, however that ends."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(layout.build / ".lock", "a build in this checkout"))
        except Held as refusal:
            raise RequestError([str(refusal)]) from None
        render.recover(layout.html)
        yield
