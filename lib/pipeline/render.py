"""Render the stage with Jupyter Book, inspect every page, and only then replace the old site."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from lib.pipeline.layout import Layout

_JUPYTER_BOOK = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WARNING = re.compile(r"\b(WARNING|ERROR|CRITICAL|SEVERE):")
# What a page without results makes other pages say: the labels of its figures and its numbers are not there.
_UNDECIDED = re.compile(r"undefined label|reference target not found|Failed to create a cross reference|glue")


def render(layout: Layout, *, unfinished: set[str] = frozenset()) -> list[str]:
    """Render build/executed to build/html. Returns the problems; build/html changes only if there are none.

    Any warning is a problem, except what pages in `unfinished` (named as in `_toc.yml`, shown without
    their results) say or make others say. The full output is in build/render.log.
    """
    version = importlib.metadata.version("jupyter-book")
    if not version.startswith("1."):
        return [f"jupyter-book is {version}, which ignores _config.yml; `make book` installs ours"]
    work = layout.build / "render"
    # Fresh: in a second build over an old one, unchanged pages keep their warnings to themselves.
    shutil.rmtree(work, ignore_errors=True)
    strict = [] if unfinished else ["-W"]
    done = subprocess.run(
        [*_JUPYTER_BOOK, "build", str(layout.stage), "--path-output", str(work), *strict, "--keep-going"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        cwd=layout.root,
    )  # fmt: skip
    output = _COLOUR.sub("", done.stdout)
    (layout.build / "render.log").write_text(output, encoding="utf-8")
    warnings = [line for line in output.splitlines() if _WARNING.search(line)]
    if unfinished:
        theirs = tuple(str(layout.stage / page) for page in unfinished)
        warnings = [w for w in warnings if not w.startswith(theirs) and not _UNDECIDED.search(w)]
    problems = [warning.replace(f"{layout.stage}/", "") for warning in warnings]
    if done.returncode and not problems:
        problems = output.splitlines()[-25:]
    site = work / "_build" / "html"
    problems = problems or inspect_site(site, layout.pages)
    if not problems:
        publish(site, layout.html)
    return problems


def inspect_site(site: Path, pages: list[str]) -> list[str]:
    """What is wrong with a rendered site: a missing page, a figure without words, a fetch off the net."""
    problems = []
    for page in ["index", *pages]:
        path = site / f"{page}.html"
        if not path.exists():
            problems.append(f"{page}.html was not written")
            continue
        reader = _PageReader()
        reader.feed(path.read_text(encoding="utf-8"))
        problems += [f"{page}: {problem}" for problem in reader.problems]
    return problems


def publish(site: Path, place: Path) -> None:
    """Let `site` take the place of the old one. Between the two renames the old one waits beside it."""
    old = place.with_name(f"{place.name}.old")
    recover(place)
    if place.exists():
        place.rename(old)
    site.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def recover(place: Path) -> None:
    """Undo a publication that was killed between its two renames."""
    old = place.with_name(f"{place.name}.old")
    if old.exists() and not place.exists():
        old.rename(place)
    shutil.rmtree(old, ignore_errors=True)


class _PageReader(HTMLParser):
    """Looks at every tag of a page once."""

    _LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}

    def __init__(self):
        super().__init__()
        self.problems: list[str] = []
        self._in_article = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        if tag == "article":
            self._in_article += 1
        target = attributes.get(self._LOADS.get(tag, ""), "") or ""
        if re.match(r"(https?:)?//", target) and attributes.get("rel") != "canonical":
            self.problems.append(f"<{tag}> would fetch {target}: the book must read offline")
        if tag == "img" and self._in_article:
            self._check_alt(attributes.get("src") or "", (attributes.get("alt") or "").strip())

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._in_article -= 1

    def _check_alt(self, src: str, alt: str) -> None:
        name = src if len(src) < 80 else f"{src[:60]}…"
        if not alt:
            self.problems.append(f"figure {name} has no alt text; lib.figures asks for one")
        elif alt == src or re.search(r"\.(svg|png|jpe?g|gif)$", alt):
            self.problems.append(f"figure {name} has a file name for alt text: {alt!r}")
