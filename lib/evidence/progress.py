"""How far the experiments of a chapter are: in a file for the pipeline, on one line for a live notebook."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from lib.evidence.files import write_atomically

PAUSE_S = 0.5  # between two notes: a run may take a millisecond
PATIENCE_S = 2.0  # what is over sooner needs no line in a notebook


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, live or executed by the pipeline."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class Progress:
    """The file build/progress/<chapter>.json, replaced in one step:

    {"chapter", "experiment", "line", "left_s", "done", "total", "finished": [a last line an experiment]}

    `line` is empty between experiments. A file that cannot be written is no reason to stop: the rows are what
    counts, and their file tells of a full disk itself.
    """

    def __init__(self, path: Path, chapter: str):
        self.path, self.chapter = Path(path), chapter
        self.finished: list[str] = []
        self.write(experiment="", line="", left_s=None, done=0, total=0)

    def write(self, *, experiment: str, line: str, left_s: float | None, done: int, total: int) -> None:
        facts = {
            "chapter": self.chapter, "experiment": experiment, "line": line, "left_s": left_s, "done": done,
            "total": total, "finished": self.finished,
        }  # fmt: skip
        try:
            write_atomically(self.path, json.dumps(facts, sort_keys=True) + "\n")
        except OSError:
            pass


class Watch:
    """One experiment's progress: what `lib.sweeps.run_sweep` calls with its Status."""

    def __init__(self, progress: Progress, experiment: str):
        self._progress, self._experiment = progress, experiment
        self._due = 0.0
        self._display = None  # the line in a notebook, once there is one

    def __call__(self, status) -> None:
        now = time.monotonic()
        if now < self._due and not status.finished:
            return
        self._due = now + PAUSE_S
        if status.finished:
            self._progress.finished.append(f"{self._experiment}, {status.line()}")
        self._progress.write(
            experiment=self._experiment,
            line="" if status.finished else status.line(),
            left_s=status.left_s,
            done=status.done + status.skipped + status.failed,
            total=status.total,
        )
        if not status.finished and (self._display or status.elapsed_s > PATIENCE_S):
            self._show(f"{self._experiment}: {status.line()}")

    def clear(self) -> None:
        """Leave nothing in the notebook, whatever became of the sweep."""
        if self._display:
            self._show("")

    def _show(self, text: str) -> None:
        from IPython.display import display

        if self._display:
            self._display.update({"text/plain": text}, raw=True)
        else:
            self._display = display({"text/plain": text}, raw=True, display_id=True)
