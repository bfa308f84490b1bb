"""A chapter's one door to evidence: its claims, settings, experiments, figures, and the verdicts it computes.

    chapter = Chapter("one-layer-limits", profile=profile, device=device)
    settings = chapter.choose({"quick": dict(seeds=3), "standard": dict(seeds=10)})
    experiment = chapter.experiment("composition", run, grid, seeds=range(settings["seeds"]))
    chapter.settle("one-layer-limits/…", experiment.best, value, interval=…, n=…)
    chapter.close()

Verdicts are written as they come, so an execution that fails half-way leaves those before it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from lib.choices import PROFILES, check_choice, resolve_device
from lib.evidence import experiment as experiments
from lib.evidence import provenance, rows
from lib.evidence.claims import Claim, load_claims
from lib.evidence.code import loaded_digest
from lib.evidence.experiment import Experiment, Source
from lib.evidence.files import EvidenceError, write_atomically
from lib.evidence.progress import Progress, Watch, in_notebook
from lib.evidence.tables import VERDICTS, Display, Table, badge, inline_html, show
from lib.evidence.verdict import Verdict, decide, strongest
from lib.paths import BUILD, EVIDENCE

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Settings(dict):
    """The settings of the chosen profile. Shown in a cell: those of all profiles, the chosen one marked."""

    def __init__(self, chosen: str, profiles: Mapping[str, Mapping]):
        super().__init__(profiles[chosen])
        columns = {
            (f"**{name}** (chosen)" if name == chosen else name): part for name, part in profiles.items()
        }
        names = list(self)
        self.table = show(
            pd.DataFrame(
                {"setting": names} | {c: [_shown(part[n]) for n in names] for c, part in columns.items()}
            )
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return self.table._repr_mimebundle_()


class Chapter:
    """One execution of one chapter. Verdicts go to build/claims/<name>.json as they come, starting afresh.

    name: has claims in `claims` (a TOML file, default book/claims.toml). profile, device: as in
    `lib.choices`. jobs, backend: how many runs at a time ("auto": this machine's cores) and on what engine,
    as in `lib.sweeps.run_sweep`; results do not depend on them, so they are not recorded. parameters: the
    other values of the notebook's parameters cell, for the record. evidence, build: folders. Raises
    ValueError on any value that does not exist, before anything is computed or written.
    """

    def __init__(
        self,
        name: str,
        *,
        profile: str,
        device: str = "auto",
        jobs: int | str = "auto",
        backend: str = "local",
        parameters: Mapping | None = None,
        claims: Path | None = None,
        evidence: Path = EVIDENCE,
        build: Path = BUILD,
    ):
        declared = load_claims(claims)
        self.name = check_choice("chapter", name, dict.fromkeys(claim.chapter for claim in declared.values()))
        self.profile = check_choice("profile", profile, PROFILES)
        from lib.sweeps import BACKENDS  # here: it brings torch, which reading evidence does not need

        self.jobs, self.backend = _checked_jobs(jobs), check_choice("backend", backend, BACKENDS)
        self.device = _device(device, backend)
        self.provenance = provenance.collect(
            chapter=name, profile=profile, device=self.device, parameters=parameters
        )
        self._declared = declared
        self._claims = {key: claim for key, claim in declared.items() if claim.chapter == name}
        self._evidence, self._build = Path(evidence), Path(build)
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._names: set[str] = set()
        self._write()
        self._progress = Progress(self._build / "progress" / f"{name}.json", name)

    @property
    def claims(self) -> Table:
        """The chapter's claims, as declared."""
        table = [
            [f"`{c.slug}`, {c.kind}: {c.says}", f"{c.quantity} {c.holds}", _control(c), _cited(c)]
            for c in self._claims.values()
        ]
        return show(pd.DataFrame(table, columns=["claim", "holds if", "control", "source"]))

    @property
    def live(self) -> Source:
        """The source of what a cell computes itself, without an experiment: this profile, here and now."""
        return Source(pd.DataFrame(), self.profile, (self.provenance,), recorded=self.provenance["date"])

    def choose(self, profiles: Mapping[str, Mapping]) -> Settings:
        """The settings of this chapter's profile, out of a table of all: {"quick": {...}, "standard": {...}}.

        Raises ValueError if a profile is unknown, the chosen one is absent, or one lacks a setting of
        another.
        """
        for profile in profiles:
            check_choice("profile", profile, PROFILES)
        check_choice("profile of this chapter", self.profile, profiles)
        names = dict.fromkeys(name for part in profiles.values() for name in part)
        for profile, part in profiles.items():
            if lacking := [name for name in names if name not in part]:
                raise ValueError(f"profile {profile!r} lacks the settings {', '.join(lacking)}")
        return Settings(self.profile, profiles)

    def experiment(
        self,
        name: str,
        run: Callable[..., dict],
        grid: Sequence[Mapping],
        seeds: Sequence[int] = (0,),
        *,
        inputs: Mapping[str, Path] | None = None,
        time_limit: float | None = None,
        per_gpu: int = 1,
    ) -> Experiment:
        """Run what is missing of grid x seeds, recording each run as it finishes; then read all of it back.

        run(settings, *, seed, scratch=None) -> dict of named numbers, defined in a module; names in `_s` are
        times or speeds, which a repetition need not give again. inputs: data and model files that it reads,
        recorded by digest. time_limit: seconds for one attempt at a run. per_gpu: runs that share a GPU. Rows
        of `quick` stay in build/, those of other profiles are evidence. Raises EvidenceError if a file of
        rows was damaged, is of another schema, was planned with other settings, or is being recorded into by
        another process, or if the code was edited after this process loaded it; ValueError on an empty or
        repeated grid.
        """
        self._take(f"experiment {name}", name)
        grid = [rows.plain(dict(settings), "settings") for settings in grid]
        seeds = [int(seed) for seed in seeds]
        runs = [rows.run_key(settings, seed) for settings in grid for seed in seeds]
        if not runs or len(set(runs)) < len(runs):
            raise ValueError(
                f"experiment {name!r}: a grid is neither empty nor lists a run twice ({len(runs)} runs)"
            )
        digests = {key: provenance.file_digest(path) for key, path in (inputs or {}).items()}
        code, path = loaded_digest(run), self._rows(name, self.profile)
        store = rows.RowStore(
            path,
            code=code,
            provenance=self.provenance | {"experiment": name, "seeds": seeds, "inputs": digests},
        )
        function = f"{run.__module__}.{run.__qualname__}"
        scratch = self._build / "scratch" / self.name / f"{name}.{self.profile}"
        with store.held():  # from the plan on: a second driver must not write its own under the first
            store.declare(grid, seeds, run=function, replace=self.profile == "quick")
            self._sweep(
                name, run, grid,
                seeds=seeds, store=store, scratch=scratch, time_limit=time_limit, per_gpu=per_gpu,
            )  # fmt: skip
        found = rows.read(path)
        sources = [
            experiments.source(found, grid=grid, seeds=seeds, profile=self.profile, code=code, live=True)
        ]
        if self.profile != "standard":
            found = rows.read(self._rows(name, "standard"))
            if found.plan and found.rows:
                planned = {part: found.plan[part] for part in ("grid", "seeds")}
                sources.append(
                    experiments.source(found, **planned, profile="standard", code=code, live=False)
                )
        return Experiment(name, sources)

    def _sweep(self, name: str, run: Callable[..., dict], grid: list[dict], *, store, **how) -> None:
        """Run what is missing, on this chapter's engine, and tell how far it is."""
        from lib.sweeps import run_sweep

        watch = Watch(self._progress, name)
        try:
            run_sweep(
                run, grid, store=store, n_jobs=self.jobs, backend=self.backend, device=self.device,
                about=partial(provenance.of_worker, run, store.code, self.device),
                progress=watch if in_notebook() else True, **how,
            )  # fmt: skip
        finally:
            watch.clear()

    def figure(self, name: str, figure, source: Source) -> Display:
        """Save a `lib.figures.Figure` with its provenance; shown, it is {numref}`fig-<chapter>-<name>`."""
        self._take(f"figure {name}", name)
        facts = source.as_dict() | {"chapter": self.name, "figure": name}
        paths = figure.save(self._build / "figures" / self.name, name, facts)
        file = f"figures/{self.name}/{name}.svg"
        return Display(
            figure.markdown(file, f"fig-{self.name}-{name}", source.line()),
            figure.html(paths["svg"], source.line()),
        )

    def settle(
        self,
        claim_id: str,
        source: Source,
        value: float,
        *,
        interval: tuple[float, float] | None = None,
        n: int | None = None,
        control: float | None = None,
        note: str = "",
    ) -> Verdict:
        """Decide a claim from what came out, as `verdict.decide` does, and write the verdict down.

        n: how many inputs, seeds or prompts stand behind `value`; constructions and measurements must say.
        Runs of `source` that failed, are missing or stale are told in the note. Raises ValueError on a claim
        that is not declared, is another chapter's, or was settled at this profile already.
        """
        claim = self._claim(claim_id, source.profile)
        if claim.kind != "theorem" and not (n and n > 0):
            raise ValueError(f"{claim.id} is a {claim.kind}: say on how many inputs, seeds or prompts, n=…")
        value, control = rows.plain(value, "value"), rows.plain(control, "control")
        decision = decide(claim, value, interval=interval, control=control)
        return self._keep(
            claim, source, decision.verdict, decision.reason,
            value=value, n=rows.plain(n, "n"), control=control,
            interval=tuple(rows.plain(list(interval), "interval")) if interval is not None else None,
            note=" ".join(filter(None, [note, source.caveat()])),
        )  # fmt: skip

    def not_attempted(self, claim_id: str, reason: str) -> Verdict:
        """Say that this profile does not decide a claim, and why."""
        claim = self._claim(claim_id, self.profile)
        if not reason.strip():
            raise ValueError(f"{claim.id}: say why it was not attempted")
        return self._keep(claim, self.live, "not attempted", reason.strip())

    def summary(self) -> Display:
        """How all claims came out, in one line; for the top of the page, through glue."""
        found = Counter(verdict.verdict for verdict in self._best().values())
        text = " ".join(f"{badge(v)} × {found[v]}" for v in VERDICTS if found[v])
        return Display(text, inline_html(text))

    def badges(self) -> Display:
        """The claims with the strongest verdict on each, as a list; through glue."""
        best = self._best()
        lines = [
            f"{badge(best[key].verdict)} {claim.says}" for key, claim in self._claims.items() if key in best
        ]
        items = "".join(f"<li>{inline_html(line)}</li>" for line in lines)
        return Display("\n".join(f"- {line}" for line in lines), f"<ul>{items}</ul>")

    def sentences(self, said: Mapping[str, str]) -> Table:
        """What one may say in a meeting, each sentence beside the verdict on its claim.

        said: claim id -> sentence. Raises ValueError on a claim without a verdict, or of another chapter.
        """
        best = self._best()
        for claim_id in said:
            check_choice("claim with a verdict", claim_id, best)
        table = [[text, f"`{claim_id}`", badge(best[claim_id].verdict)] for claim_id, text in said.items()]
        return show(pd.DataFrame(table, columns=["sentence", "claim", "verdict"]))

    def verdicts(self) -> Table:
        """Every verdict so far, ours beside the paper's value, with the profile it came from."""
        table = [
            [f"`{c.slug}`", badge(v.verdict), c.paper_value, v.finding(), f"{v.profile}, {v.recorded}"]
            for c in self._claims.values()
            for (key, _), v in self._verdicts.items()
            if key == c.id
        ]
        columns = ["claim", "verdict", "the paper says", "we found", "from"]
        return show(pd.DataFrame(table, columns=columns, dtype=object))

    def tests(self) -> Table:
        """What exercises each claim, by name: `pytest <name>` runs it."""
        tested = [claim for claim in self._claims.values() if claim.tests]
        table = [[f"`{c.slug}`", " ".join(f"`{name}`" for name in c.tests)] for c in tested]
        return show(pd.DataFrame(table, columns=["claim", "tests"]))

    def close(self) -> None:
        """The last cell. Raises EvidenceError naming the claims that nothing was said about."""
        if left := [key for key in self._claims if key not in self._best()]:
            raise EvidenceError(f"declared but neither settled nor marked not attempted: {', '.join(left)}")

    def _claim(self, claim_id: str, profile: str) -> Claim:
        if claim_id in self._declared and claim_id not in self._claims:
            raise ValueError(f"{claim_id} belongs to another chapter than {self.name}")
        check_choice("claim", claim_id, self._claims)
        if (claim_id, profile) in self._verdicts:
            raise ValueError(
                f"{claim_id} was settled already at profile {profile!r}; settle it once, from all there is "
                "(to run a cell again, run the one with Chapter(…) first)"
            )
        return self._claims[claim_id]

    def _keep(self, claim: Claim, source: Source, verdict: str, reason: str, **numbers) -> Verdict:
        found = Verdict(
            claim=claim.id, profile=source.profile, verdict=verdict, reason=reason, quantity=claim.quantity,
            unit=claim.unit, holds=str(claim.holds), provenance=source.line(), recorded=source.recorded,
            declaration=claim.declaration, runs=source.wanted,
            lacking=source.lacking, differing=source.agreement.differ, **numbers,
        )  # fmt: skip
        self._verdicts[claim.id, source.profile] = found
        self._write()
        return found

    def _best(self) -> dict[str, Verdict]:
        by_claim: dict[str, list[Verdict]] = {}
        for (key, _), verdict in self._verdicts.items():
            by_claim.setdefault(key, []).append(verdict)
        return {key: strongest(found) for key, found in by_claim.items()}

    def _take(self, what: str, name: str) -> None:
        if not _SLUG.fullmatch(name):
            raise ValueError(
                f"{what!r}: names are lower case, digits and hyphens, since they become file names"
            )
        if what in self._names:
            raise ValueError(
                f"this chapter has {what!r} already, and a second one would overwrite it "
                "(to run a cell again, run the one with Chapter(…) first)"
            )
        self._names.add(what)

    def _rows(self, name: str, profile: str) -> Path:
        folder = self._build / "evidence" if profile == "quick" else self._evidence
        return folder / self.name / f"{name}.{profile}.jsonl"

    def _write(self) -> None:
        found = {
            "chapter": self.name, "profile": self.profile, "date": self.provenance["date"],
            "verdicts": [verdict.as_dict() for verdict in self._verdicts.values()],
        }  # fmt: skip
        write_atomically(
            self._build / "claims" / f"{self.name}.json", json.dumps(found, indent=1, sort_keys=True) + "\n"
        )


def _checked_jobs(jobs: int | str) -> int | str:
    if jobs == "auto" or (isinstance(jobs, int) and not isinstance(jobs, bool) and jobs >= 1):
        return jobs
    raise ValueError(f"jobs is {jobs!r}; it is 'auto' or a number of runs at a time, 1 or more")


def _device(device: str, backend: str) -> str:
    """The device behind `device`. Of a cluster's workers only they know whether they have a GPU."""
    return device if device == "cuda" and backend != "local" else resolve_device(device)


def _cited(claim: Claim) -> str:
    return (
        f"ours, {claim.locator}" if claim.source == "ours" else f"{{cite}}`{claim.source}`, {claim.locator}"
    )


def _control(claim: Claim) -> str:
    wanted = f" (must be {claim.control_holds})" if claim.control_holds else ""
    return f"{claim.control}{wanted}" or "–"


def _shown(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple, range)) else value
