"""One line a chapter with a running clock: redrawn on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import threading
import time

BEAT_S = 30  # in a log: seldom enough to read, often enough that no CI takes the job for dead


class Clock:
    """Shows what is running and for how long. Use as a context; `done` says how it ended."""

    def __init__(self, label: str, note: str = "started", *, stream=None):
        self.label, self.note, self.stream = label, note, stream or sys.stdout
        self.ending = ""
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
        self._draw(self.ending or ("stopped" if error[0] else "done"))
        if self._terminal:
            print(file=self.stream, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def done(self, ending: str) -> None:
        self.ending = ending

    def _tick(self) -> None:
        while not self._stop.wait(1 if self._terminal else BEAT_S):
            self._draw(self.note)

    def _draw(self, state: str) -> None:
        minutes, seconds = divmod(int(self.seconds), 60)
        line = f"{self.label:<28} {minutes:3d}:{seconds:02d}  {state}"
        end = "" if self._terminal else "\n"
        print(f"\r\033[K{line}" if self._terminal else line, end=end, file=self.stream, flush=True)
