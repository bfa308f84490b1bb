"""What the reader asked for, checked before anything runs: every mistake at once, with the nearest match."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lib.choices import DEVICES, PROFILES, check_choice, resolve_device
from lib.pipeline.layout import Chapter, Layout

# Where the runs of a chapter's sweeps are spread, and the package that each needs: as `lib.sweeps` has them,
# which is not imported for it, since it brings torch.
BACKENDS = {"local": "joblib", "dask": "distributed", "ray": "ray"}
SPREAD = ("jobs", "backend")  # parameters that say where runs happen; no result depends on them
FILES = {"model": (".gguf",), "corpus": (".txt",), "tokenizer": (".json",)}  # may be paths
CONNECT_S = 3.0  # to reach the scheduler
INSTALL = ".venv/bin/python -m pip install -r requirements-cluster.txt"


class RequestError(ValueError):
    """The request cannot be carried out. `problems` lists every reason, one sentence each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Job:
    """One chapter to execute, with the parameters that differ from those written in it."""

    chapter: Chapter
    profile: str
    parameters: dict


def plan(
    layout: Layout,
    *,
    chapter: str | None,
    profile: str,
    params: str,
    backend: str = "",
    scheduler: str = "",
    jobs: str = "",
) -> list[Job]:
    """The chapters to execute and their parameters; `chapter` None stands for all of them.

    With all chapters, a parameter goes to those that have it; at least one must. backend, jobs: parameters
    with a name of their own on the command line; empty: as the chapter has them. scheduler: an address, for
    backend "dask" alone. Raises RequestError with every mistake found: chapter, profile, parameter names,
    device, backend, pages.
    """
    try:
        layout.chapters  # noqa: B018 - reads every notebook: a damaged one is told before anything runs
    except ValueError as error:
        raise RequestError([str(error)]) from error
    problems = [f"_toc.yml names {page!r}, but there is no {page}.md or {page}.ipynb"
                for page in layout.missing_pages()]  # fmt: skip
    given, malformed = parse(params)
    problems += malformed
    problems += _add_spread(given, backend=backend, jobs=jobs)
    problems += _choice("profile", profile, PROFILES)
    if chapter == "":
        problems.append(f"Which chapter? As in CHAPTER={next(iter(layout.chapters), '…')}; allowed: "
                        f"{', '.join(layout.chapters)}")  # fmt: skip
    elif chapter is not None:
        problems += _choice("chapter", chapter, layout.chapters)
    elif not layout.chapters:
        problems.append("_toc.yml names no notebook: there is no chapter to execute")
    chosen = [c for c in layout.chapters.values() if chapter in (None, c.name)]
    known = {c.name: parameters_of(c) for c in chosen}
    problems += _parameter_problems(chapter, known, given)
    problems += _spread(given, scheduler)
    problems += _paths(given)
    if "device" in given:
        problems += _device(str(given["device"]), check_machine=not problems)
    if chapter in known and "profile" not in known[chapter] and profile != PROFILES[0]:
        problems.append(f"chapter {chapter!r} has no parameter 'profile': it takes no PROFILE={profile}")
    if not problems and scheduler.strip():  # last, since it may take seconds
        problems += _unreachable(scheduler.strip())
    if problems:
        raise RequestError(problems)
    return [Job(c, profile, _differing({**given, "profile": profile}, known[c.name])) for c in chosen]


def _add_spread(given: dict, *, backend: str, jobs: str) -> list[str]:
    """Put BACKEND and JOBS, where the reader gave them, among the parameters; told: those given twice."""
    asked = {"backend": backend.strip(), "jobs": jobs.strip()}
    twice = [name for name, value in asked.items() if value and name in given]
    given.update({name: _typed(value) for name, value in asked.items() if value})
    return [f"{name!r} is given twice: as {name.upper()}=… and in PARAMS" for name in twice]


def _spread(given: dict, scheduler: str) -> list[str]:
    """What is wrong with backend, scheduler and jobs."""
    backend, jobs = given.get("backend", "local"), given.get("jobs", "auto")
    problems = _choice("backend", backend, BACKENDS)
    if not problems and importlib.util.find_spec(BACKENDS[backend]) is None:
        problems.append(f"backend {backend!r} needs a package that is not installed here: {INSTALL}")
    if scheduler.strip() and backend != "dask":
        problems.append(f"SCHEDULER={scheduler} is the address of a Dask scheduler: add BACKEND=dask")
    if scheduler.strip() and not _is_address(scheduler.strip()):
        problems.append(f"SCHEDULER={scheduler} is no address; they look like tcp://192.168.0.7:8786")
    if jobs != "auto" and (type(jobs) is not int or jobs < 1):
        problems.append(f"jobs={jobs!r}: runs at a time, a whole number from 1, or auto: the cores there are")
    return problems


def _paths(given: dict) -> list[str]:
    """Make what may be a path absolute, since kernels start elsewhere; told: a path that leads nowhere."""
    problems = []
    for key, endings in FILES.items():
        name = str(given.get(key, ""))
        path = Path(name).expanduser()
        if name and path.exists():
            given[key] = str(path.resolve())
        elif path.suffix in endings or path.is_absolute() or name.startswith((".", "~")):
            problems.append(f"{key}={name}: no such file or folder, looked for from {Path.cwd()}")
    return problems


def _is_address(scheduler: str) -> bool:
    if not re.fullmatch(r"[a-z]+://\S+", scheduler):
        return False
    try:
        parts = urlsplit(scheduler)
        return parts.scheme not in ("tcp", "tls") or bool(parts.hostname and parts.port)
    except ValueError:  # the port is no number, or none that there is
        return False


def _unreachable(scheduler: str) -> list[str]:
    """Whether anybody listens at the address; that it is a scheduler shows when the chapter asks it."""
    parts = urlsplit(scheduler)
    if parts.scheme not in ("tcp", "tls"):
        return []
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_S).close()
    except OSError as error:
        return [f"no scheduler answers at SCHEDULER={scheduler} ({error.strerror or error}): start it with "
                "`dask scheduler`, or correct the address"]  # fmt: skip
    return []


def parse(text: str) -> tuple[dict, list[str]]:
    """`a=1 b=two c='x y'` -> the values by name, and a sentence for each piece that is no such pair.

    Values are read as Python literals; what is none (two, path/to/model, cuda:1) is a string, and
    true, false, none and null mean what they say.

    >>> parse("n=8 rate=1e-3 model=a/b.gguf compile=false")
    ({'n': 8, 'rate': 0.001, 'model': 'a/b.gguf', 'compile': False}, [])
    >>> print(*parse("n=8 oops")[1])
    PARAMS: 'oops' is not a pair name=value, as in PARAMS="device=cpu"
    """
    try:
        pieces = shlex.split(text)
    except ValueError as error:
        return {}, [f"PARAMS: {error} in {text!r}"]
    values: dict = {}
    problems = []
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals or not name.isidentifier():
            problems.append(f"PARAMS: {piece!r} is not a pair name=value, as in PARAMS=\"device=cpu\"")
        elif name == "profile":
            problems.append("PARAMS: give the profile as PROFILE=…, not in PARAMS")
        elif name in values:
            problems.append(f"PARAMS: {name!r} is given twice")
        else:
            values[name] = _typed(value)
    return values, problems


def parameters_of(chapter: Chapter) -> dict[str, str]:
    """Names and default values (as source text) of the chapter's `parameters` cell; empty without one."""
    import papermill  # here, since it takes a second and a misspelt profile needs none of it

    return {p["name"]: p["default"] for p in papermill.inspect_notebook(str(chapter.path)).values()}


def _typed(text: str) -> object:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (bool, int, float, str, list, dict)) else text


def _choice(kind: str, value: str, allowed) -> list[str]:
    try:
        check_choice(kind, value, allowed)
    except ValueError as error:
        return [str(error)]
    return []


def _device(name: str, *, check_machine: bool) -> list[str]:
    """Spelling first; whether the machine has the device takes torch, so only if all else is well."""
    problems = _choice("device", name.partition(":")[0], DEVICES)
    if problems or not check_machine or name == "auto":
        return problems
    try:
        resolve_device(name)
    except ValueError as error:
        return [str(error)]
    return []


def _parameter_problems(chapter: str | None, known: dict[str, dict], given: dict) -> list[str]:
    if not known:  # an unknown chapter, reported already
        return []
    if chapter is not None and given and not known[chapter]:
        return [f"chapter {chapter!r} has no cell tagged 'parameters': it takes no PARAMS"]
    allowed = sorted({name for names in known.values() for name in names} - {"profile"})
    whose = "no chapter has" if chapter is None else f"chapter {chapter!r} does not have"
    idle = [name for name in SPREAD if name in given and name not in allowed]
    problems = [f"{whose} the parameter {n!r}: nothing in it is spread over jobs" for n in idle]
    return problems + [p for n in given if n not in idle for p in _choice("parameter", n, allowed)]


def _differing(given: dict, defaults: dict[str, str]) -> dict:
    """Parameters to inject: those the chapter has, unless the value is already the one written there."""
    return {
        name: value
        for name, value in given.items()
        if name in defaults and repr(_typed(defaults[name])) != repr(value)
    }
