"""What need not run again. An executed chapter is kept under a hash of all that it depends on.

build/cache/<chapter>/<key>/ holds the executed notebook, its figures, its claims, and entry.json, which
names the hash of each input: so the pipeline can say *why* a chapter runs again. Time stamps play no part.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import nbformat

from lib.pipeline.layout import Chapter, Layout
from lib.pipeline.request import SPREAD

KEEP = 4  # entries a chapter: enough for two profiles before and after an edit


@dataclass(frozen=True)
class Entry:
    """A finished execution. `facts` is entry.json: fingerprint, profile, parameters, seconds, finished."""

    folder: Path
    facts: dict

    @property
    def notebook(self) -> nbformat.NotebookNode:
        return nbformat.read(self.folder / "notebook.ipynb", as_version=4)


def fingerprint(layout: Layout, chapter: Chapter, parameters: dict) -> dict[str, str]:
    """Hash of each input on which the chapter's outputs depend, by name.

    Not among them: prose, and the parameters that only say where runs happen.
    """
    parameters = {name: value for name, value in parameters.items() if name not in SPREAD}
    cells = [
        [cell["metadata"].get("tags", []), "".join(cell["source"])]
        for cell in chapter.source["cells"]
        if cell["cell_type"] == "code"
    ]
    found = {
        "code cells": _hash(json.dumps(cells).encode()),
        "parameters": _hash(json.dumps(parameters, sort_keys=True).encode()),
        "lib": _tree(layout.lib),
        "Python": platform.python_version(),
    }
    own = layout.claims(chapter.name)
    files = {layout.root / "requirements.txt"}
    files.update(path for pattern in chapter.reads for path in layout.root.glob(pattern))
    for path in sorted(files - {own}):
        if path.is_file() and not path.name.startswith("."):  # a lock beside the rows is no input
            found[path.relative_to(layout.root).as_posix()] = _hash(path.read_bytes())
    return found | _models(chapter, parameters)


def _models(chapter: Chapter, parameters: dict) -> dict[str, str]:
    """Whether each model that the chapter measures is here; the content of a file named as a parameter."""
    found = {}
    if chapter.models:
        from lib.models.pretrained import available  # here: it brings torch

        found = {f"model {name}": "present" if available(name) else "absent" for name in chapter.models}
    for name, value in parameters.items():
        if isinstance(value, str) and Path(value).is_file():
            with open(value, "rb") as file:
                found[f"parameter {name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def key(prints: dict[str, str]) -> str:
    return _hash(json.dumps(prints, sort_keys=True).encode())[:20]


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names of the inputs that differ."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def settled(chapter: Chapter, before: dict[str, str], after: dict[str, str]) -> bool:
    """Whether a run that began with the inputs `before` and ended with `after` may be kept, under `after`.

    A run may add to its own evidence: a later run finds those rows and draws the same page from them.
    Any other change (somebody edited `lib` meanwhile) leaves open which inputs the outputs belong to.
    """
    own = f"data/evidence/{chapter.name}/"
    return all(name.startswith(own) for name in changed(before, after))


def find(layout: Layout, chapter: Chapter, prints: dict[str, str]) -> Entry | None:
    """The entry made from exactly these inputs."""
    entry = _read(layout.cache / chapter.name / key(prints))
    if entry:
        os.utime(entry.folder)  # used now: `_prune` drops the entries that were not used for longest
    return entry


def newest(layout: Layout, chapter: Chapter) -> Entry | None:
    """The entry used last, whatever its inputs."""
    entries = [entry for folder in _folders(layout, chapter) if (entry := _read(folder))]
    return entries[0] if entries else None


def keep(
    layout: Layout, chapter: Chapter, prints: dict[str, str], notebook: nbformat.NotebookNode, facts: dict
) -> Entry:
    """Store a finished execution with the figures and claims that it left in `build`; whole or not at all."""
    folder = layout.cache / chapter.name / key(prints)
    part = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    nbformat.write(notebook, part / "notebook.ipynb")
    if layout.figures(chapter.name).is_dir():
        shutil.copytree(layout.figures(chapter.name), part / "figures")
    if layout.claims(chapter.name).exists():
        shutil.copy2(layout.claims(chapter.name), part / "claims.json")
    facts = {**facts, "fingerprint": prints}
    (part / "entry.json").write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    _prune(layout, chapter)
    return Entry(folder, facts)


def restore(layout: Layout, chapter: Chapter, entry: Entry) -> None:
    """Put the entry's figures and claims where its execution had put them."""
    forget(layout, chapter)
    if (entry.folder / "figures").is_dir():
        shutil.copytree(entry.folder / "figures", layout.figures(chapter.name))
    if (entry.folder / "claims.json").exists():
        layout.claims(chapter.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(entry.folder / "claims.json", layout.claims(chapter.name))


def forget(layout: Layout, chapter: Chapter) -> None:
    """Remove the figures and claims of an earlier execution, lest a new one inherit them."""
    shutil.rmtree(layout.figures(chapter.name), ignore_errors=True)
    layout.claims(chapter.name).unlink(missing_ok=True)


def _prune(layout: Layout, chapter: Chapter) -> None:
    for folder in _folders(layout, chapter)[KEEP:]:
        shutil.rmtree(folder)


def _folders(layout: Layout, chapter: Chapter) -> list[Path]:
    """Finished entries, the one used last first."""
    folders = (layout.cache / chapter.name).glob("[!.]*")
    return sorted(folders, key=lambda folder: folder.stat().st_mtime_ns, reverse=True)


def _read(folder: Path) -> Entry | None:
    facts = folder / "entry.json"
    return Entry(folder, json.loads(facts.read_text(encoding="utf-8"))) if facts.exists() else None


def _tree(folder: Path) -> str:
    """One hash of every file under `folder`, by relative name and bytes; caches of Python do not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{_hash(path.read_bytes())}\n".encode())
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
