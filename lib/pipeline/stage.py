"""The folder that is rendered: pages as written, chapters with the outputs of their execution, figures."""

from __future__ import annotations

import copy
import shutil

import nbformat

from lib.pipeline import cache
from lib.pipeline.cache import Entry
from lib.pipeline.layout import Chapter, Layout

GLANCE = "at-a-glance.md"  # included by the front page; made from the claims of this build


def merge(source: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Prose and cell metadata of `source`, outputs of `executed`, and the cell of injected parameters.

    Both have the same code cells. Papermill's times are left out: equal results give equal pages. So is what
    a display of progress left behind, emptied.
    """
    page = copy.deepcopy(source)
    done = [cell for cell in executed.cells if cell.cell_type == "code"]
    injected = [cell for cell in done if "injected-parameters" in cell.metadata.get("tags", [])]
    done = [cell for cell in done if cell not in injected]
    ours = [cell for cell in page.cells if cell.cell_type == "code"]
    if [cell.source for cell in ours] != [cell.source for cell in done]:
        raise ValueError("the executed notebook has other code cells than its source: not the same chapter")
    for cell, result in zip(ours, done, strict=True):
        cell.outputs = [output for output in result.outputs if not _is_empty(output)]
        cell.execution_count = result.execution_count
    for name in ("language_info", "widgets"):
        if name in executed.metadata:
            page.metadata[name] = executed.metadata[name]
    for cell in injected:
        cell.metadata = {"tags": cell.metadata["tags"]}
        page.cells.insert(_after_parameters(page), cell)
    return page


def note(page: nbformat.NotebookNode, title: str, text: str) -> nbformat.NotebookNode:
    """`page` with a visible remark below its title."""
    text = f":::{{admonition}} {title}\n:class: warning not-executed\n{text}\n:::"
    remark = nbformat.v4.new_markdown_cell(text)
    remark.id = "pipeline-note"
    page = copy.deepcopy(page)
    page.cells.insert(1, remark)
    return page


def write(layout: Layout, pages: dict[str, nbformat.NotebookNode], parts: dict[str, str]) -> None:
    """A fresh stage: everything of the book except source notebooks, and `pages`, by chapter.

    parts: Markdown that pages of the book include, by file name.
    """
    shutil.rmtree(layout.stage, ignore_errors=True)
    shutil.copytree(
        layout.book, layout.stage / "book", ignore=shutil.ignore_patterns("*.ipynb", ".*", "__pycache__")
    )
    shutil.copy2(layout.config, layout.stage)
    shutil.copy2(layout.toc, layout.stage)
    for name, text in parts.items():
        (layout.stage / "book" / name).write_text(text, encoding="utf-8")
    for name, page in pages.items():
        nbformat.write(page, layout.stage / f"{layout.chapters[name].page}.ipynb")
        if layout.figures(name).is_dir():
            shutil.copytree(layout.figures(name), layout.stage / "book" / "figures" / name)


def earlier_page(layout: Layout, chapter: Chapter, entry: Entry) -> nbformat.NotebookNode:
    """The chapter as its last execution left it, saying so: its code or data may have changed since."""
    cache.restore(layout, chapter, entry)
    return note(
        entry.notebook,
        "From an earlier run",
        "This chapter, its code or its data changed since it last ran. `make book` brings it up to date.",
    )


def unexecuted_page(layout: Layout, chapter: Chapter, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The chapter without results, saying so."""
    cache.forget(layout, chapter)
    return note(source, "Not executed yet", "This page has no results yet: `make book` runs it.")


def _is_empty(output: nbformat.NotebookNode) -> bool:
    """Whether an output shows nothing: each of its forms is an empty text."""
    forms = output.get("data", {"": output.get("text", "-")}).values()
    return all(isinstance(form, str) and not form.strip() for form in forms)


def _after_parameters(page: nbformat.NotebookNode) -> int:
    tagged = (i for i, cell in enumerate(page.cells) if "parameters" in cell.metadata.get("tags", []))
    return next(tagged, -1) + 1
