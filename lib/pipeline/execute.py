"""Execute one chapter with papermill. The working directory is the book's, whoever calls from where."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from dataclasses import dataclass

import nbformat

from lib.pipeline.layout import Layout
from lib.pipeline.progress import Clock
from lib.pipeline.request import Job

LINES = 40  # of an error's message: more than any of ours has


@dataclass(frozen=True)
class Failure:
    """Why a chapter stopped. `cell` counts from 0 in the source notebook; None: not in a cell of it."""

    chapter: str
    cell: int | None
    source: str
    error: str
    partial: str  # the notebook as far as it came

    def __str__(self) -> str:
        place = "before its first cell" if self.cell is None else f"cell {self.cell}"
        code = "".join(f"\n    | {line}" for line in self.source.splitlines()[:6])
        return f"{self.chapter}, {place}:{code}\n    {self.error}\n    as far as it came: {self.partial}"


def source_notebook(job: Job) -> nbformat.NotebookNode:
    """The chapter as written, without outputs that a hand-run may have left in it."""
    notebook = nbformat.reads(json.dumps(job.chapter.source), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def run(layout: Layout, job: Job, clock: Clock) -> tuple[nbformat.NotebookNode | None, Failure | None]:
    """The executed notebook, or why there is none. Saves to build/papermill/<chapter>.ipynb cell by cell."""
    import papermill

    notebook = source_notebook(job)
    partial = layout.papermill / f"{job.chapter.name}.ipynb"
    partial.parent.mkdir(parents=True, exist_ok=True)
    code_cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    total = len(notebook.cells) + bool(job.parameters)  # papermill inserts a cell for them
    running: list = []

    def on_cell_start(cell, cell_index):
        running[:] = [cell]
        clock.note = f"cell {cell_index + 1} of {total}"

    # One thread each: chapters spread runs over processes themselves, and threads on top only slow them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The kernel of this environment, not one of the same name in the user's home.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        executed = papermill.execute_notebook(
            copy.deepcopy(notebook),
            str(partial),
            parameters=job.parameters,
            kernel_name="python3",
            cwd=str(layout.book),
            progress_bar=False,
            on_cell_start=on_cell_start,
            extra_arguments=["--log-level=CRITICAL"],  # a kernel's log would tear the clock's line
        )
        return executed, None
    except KeyboardInterrupt:
        # The kernel's end then reaches a task that nobody awaits: asyncio would print it, screens of it.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    except Exception as error:  # whatever stops one chapter is reported and does not stop the others
        cell = running[0] if running else None
        place = _place(notebook, code_cells, cell)
        kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        source = cell.source if cell else ""
        return None, Failure(job.chapter.name, place, source, _plain(f"{kind}: {text}"), str(partial))


def _place(notebook: nbformat.NotebookNode, code_cells: list[int], cell) -> int | None:
    """Index in the source notebook of the cell that ran last; papermill may have inserted one before it."""
    if cell is None:
        return None
    return next((i for i in code_cells if notebook.cells[i].get("id") == cell.get("id")), None)


def _plain(text: str) -> str:
    """A message without the colours of a terminal: whole, since the remedy often stands last."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    if len(lines) > LINES:
        lines[LINES:] = [f"(and {len(lines) - LINES} more lines)"]
    return "\n    ".join(lines)
