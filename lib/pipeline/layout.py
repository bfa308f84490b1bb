"""What a book consists of: its folders, its table of contents, its chapters.

Every function of the pipeline takes a `Layout`, so that the tests can build toy books elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from lib import paths


@dataclass(frozen=True)
class Layout:
    """The folders of one book. Everything generated lies under `build`."""

    root: Path = paths.ROOT

    @property
    def book(self) -> Path:
        return self.root / "book"

    @property
    def lib(self) -> Path:
        return self.root / "lib"

    @property
    def config(self) -> Path:
        return self.root / "_config.yml"

    @property
    def toc(self) -> Path:
        return self.root / "_toc.yml"

    @property
    def build(self) -> Path:
        return self.root / "build"

    @property
    def cache(self) -> Path:
        return self.build / "cache"

    @property
    def papermill(self) -> Path:
        """Notebooks while they run: papermill saves each after every cell."""
        return self.build / "papermill"

    @property
    def stage(self) -> Path:
        """The source folder that Jupyter Book renders: pages, executed chapters, figures."""
        return self.build / "executed"

    @property
    def html(self) -> Path:
        return self.build / "html"

    def figures(self, chapter: str) -> Path:
        return self.build / "figures" / chapter

    def claims(self, chapter: str) -> Path:
        return self.build / "claims" / f"{chapter}.json"

    def progress(self, chapter: str) -> Path:
        """What the chapter's experiments say while they run."""
        return self.build / "progress" / f"{chapter}.json"

    @property
    def evidence(self) -> Path:
        return self.root / "data" / "evidence"

    @cached_property
    def pages(self) -> list[str]:
        """Pages in reading order, as `_toc.yml` names them: paths from the root, without suffix."""
        return _files(yaml.safe_load(self.toc.read_text(encoding="utf-8")))

    @cached_property
    def chapters(self) -> dict[str, Chapter]:
        """The pages that are notebooks, by name, in the order in which they are executed.

        That is the order of reading, except that chapters which read the claims of others come last.
        """
        found = [Chapter(page, self.root / f"{page}.ipynb") for page in self.pages]
        found = [chapter for chapter in found if chapter.path.exists()]
        return {chapter.name: chapter for chapter in sorted(found, key=lambda c: c.reads_claims)}

    def missing_pages(self) -> list[str]:
        """Pages of `_toc.yml` that are no file."""
        files = {page: [self.root / f"{page}.md", self.root / f"{page}.ipynb"] for page in self.pages}
        return [page for page, places in files.items() if not any(place.exists() for place in places)]


@dataclass(frozen=True)
class Chapter:
    """A notebook of the book. `page` is its name in `_toc.yml`."""

    page: str
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def source(self) -> dict:
        """The notebook as it lies on disk, parsed. Raises ValueError, naming the file, if it is damaged."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            file = f"{self.page}.ipynb"
            how = f"git checkout -- {file} brings it back"
            raise ValueError(f"{file} is not a notebook: {error}; {how}") from error

    @property
    def reads(self) -> list[str]:
        """Globs, relative to the root, of the files on which this chapter's results depend.

        The notebook names them in its metadata: {"book": {"reads": ["data/corpus/*.txt"]}}.
        """
        return [
            f"data/evidence/{self.name}/**/*",
            "book/claims.toml",
            *self.source.get("metadata", {}).get("book", {}).get("reads", []),
        ]

    @property
    def models(self) -> list[str]:
        """Pretrained models of `lib.models.pretrained` that this chapter measures where they are present.

        The notebook names them in its metadata: {"book": {"models": ["smollm2-135m"]}}.
        """
        return self.source.get("metadata", {}).get("book", {}).get("models", [])

    @property
    def reads_claims(self) -> bool:
        return any(pattern.startswith("build/claims") for pattern in self.reads)


def _files(toc: object) -> list[str]:
    """Every `root:` and `file:` of a table of contents, in order of appearance."""
    if isinstance(toc, list):
        return [name for item in toc for name in _files(item)]
    if not isinstance(toc, dict):
        return []
    own = [toc[key] for key in ("root", "file") if key in toc]
    return own + [name for value in toc.values() for name in _files(value)]
