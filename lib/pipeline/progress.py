"""One line a chapter with a running clock: redrawn on a terminal, a line every half minute in a log."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

BEAT_S = 30  # in a log: seldom enough to read, often enough that no CI takes the job for dead
LOOK_S = 1


class Clock:
    """Shows what is running and for how long. Use as a context; `done` says how it ended.

    look: called about once a second, -> what is being done within `note`, and lines to print for good.
    """

    def __init__(
        self,
        label: str,
        note: str = "started",
        *,
        look: Callable[[], tuple[str, list[str]]] = lambda: ("", []),
        stream=None,
    ):
        self.label, self.note, self.stream = label, note, stream or sys.stdout
        self.ending = ""
        self._look = look
        self._terminal = self.stream.isatty()
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Clock:
        self._start = time.monotonic()
        self._draw(self.note)
        self._ticker.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._ticker.join()
        self._news()
        self._draw(self.ending or ("stopped" if error[0] else "done"))
        if self._terminal:
            print(file=self.stream, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def done(self, ending: str) -> None:
        self.ending = ending

    def _tick(self) -> None:
        beat = LOOK_S if self._terminal else BEAT_S
        due = time.monotonic() + beat
        while not self._stop.wait(min(LOOK_S, beat)):
            doing = self._news()
            if time.monotonic() >= due:
                self._draw(" · ".join(filter(None, [self.note, doing])))
                due = time.monotonic() + beat

    def _news(self) -> str:
        """Print what is to stay, above the running line; -> what is being done."""
        doing, lines = self._look()
        for line in lines:
            print(f"\r\033[K  {line}" if self._terminal else f"  {line}", file=self.stream, flush=True)
        return doing

    def _draw(self, state: str) -> None:
        minutes, seconds = divmod(int(self.seconds), 60)
        line = f"{self.label:<28} {minutes:3d}:{seconds:02d}  {state}"
        end = "" if self._terminal else "\n"
        print(f"\r\033[K{line}" if self._terminal else line, end=end, file=self.stream, flush=True)


class Runs:
    """What the experiments of a running chapter say of themselves, in a file that `lib.evidence` keeps."""

    def __init__(self, path: Path):
        self.path, self._told = path, 0

    def read(self) -> dict:
        """The file; empty as long as no experiment has begun."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def look(self) -> tuple[str, list[str]]:
        """The line of the experiment that runs now, and the last lines of those that ended since asked."""
        facts = self.read()
        finished = facts.get("finished", [])
        new, self._told = finished[self._told :], len(finished)
        doing = f"{facts['experiment']}: {facts['line']}" if facts.get("line") else ""
        return doing, new
