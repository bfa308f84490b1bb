"""How far a sweep is, and how long the rest will take."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqdm import tqdm

TOLD_EVERY_S = 10.0  # seconds between two calls of a listener, at most
LINE_EVERY_S = 30.0  # seconds between two lines, where no terminal can redraw one


@dataclass(frozen=True, kw_only=True)
class Status:
    """Runs done now, skipped (the store had them), failed, and in all; wall seconds so far and left.

    left_s: None as long as nothing is known. note: what the sweep waits for, if it waits. finished: nothing
    comes after this one. core_s: core seconds of the runs so far.
    """

    done: int
    skipped: int
    failed: int
    total: int
    elapsed_s: float
    left_s: float | None = None
    core_s: float = 0.0
    note: str = ""
    finished: bool = False

    def line(self) -> str:
        """One line: where the sweep stands, or what came of it.

        >>> Status(done=8, skipped=3, failed=1, total=40, elapsed_s=60.0, left_s=230.0).line()
        '12 of 40 runs, 3 skipped, 1 failed, about 4 min left'
        >>> Status(done=36, skipped=3, failed=1, total=40, elapsed_s=61.2, core_s=118.4, finished=True).line()
        'runs: 36 done, 3 skipped, 1 failed; 61.2 s wall, 118.4 core-s'
        """
        if self.finished:
            text = (
                f"runs: {self.done} done, {self.skipped} skipped, {self.failed} failed; "
                f"{self.elapsed_s:.1f} s wall, {self.core_s:.1f} core-s"
            )
            return f"{text}; {self.note}" if self.note else text
        parts = [f"{self.done + self.skipped + self.failed} of {self.total} runs"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"about {_duration(self.left_s)} left"] if self.left_s is not None else []
        return ", ".join(parts + ([self.note] if self.note else []))


class Reporter:
    """Tells a listener of every finished run, and at least every TOLD_EVERY_S seconds in between.

    weights: core seconds that each run to do is expected to take, None where unknown. width: how many run at
    a time. listener: called with a Status, from this thread or from a thread of the reporter's, never twice
    at once; what it raises in the latter is lost.
    """

    def __init__(
        self,
        listener: Callable[[Status], None],
        weights: Mapping[str, float | None],
        *,
        skipped: int,
        width: Callable[[], int],
    ):
        self._listener, self._left, self._width = listener, dict(weights), width
        self._skipped, self._total = skipped, skipped + len(weights)
        self._done = self._failed = 0
        self._wall_s: list[float] = []
        self._core_s = 0.0
        self._start = time.monotonic()
        self._note = ""
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Reporter:
        self._tell()
        self._ticker.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._over.set()
        self._ticker.join()
        if error is None:
            self._tell(finished=True)
        elif isinstance(self._listener, _Bar):
            self._listener.close()

    def count(self, key: str, *, wall_s: float, core_s: float, failed: bool) -> None:
        with self._lock:
            del self._left[key]
            self._wall_s.append(wall_s)
            self._core_s += core_s
            self._failed += failed
            self._done += not failed
            self._tell()

    def note(self, text: str) -> None:
        """Say what the sweep waits for, at once if that is news; "" once it goes on."""
        with self._lock:
            if text != self._note:
                self._note = text
                self._tell()

    def recorded(self) -> tuple[int, int]:
        """Runs that need not be repeated, and runs in all."""
        return self._done + self._skipped, self._total

    def _status(self, finished: bool) -> Status:
        return Status(
            done=self._done, skipped=self._skipped, failed=self._failed, total=self._total,
            elapsed_s=time.monotonic() - self._start, left_s=0.0 if finished else self._left_s(),
            core_s=self._core_s, note=self._note, finished=finished,
        )  # fmt: skip

    def _left_s(self) -> float | None:
        """Recorded times of the runs to come, the mean of those done where nothing is recorded."""
        mean = sum(self._wall_s) / len(self._wall_s) if self._wall_s else None
        to_come = [mean if weight is None else weight for weight in self._left.values()]
        if None in to_come:
            return None
        return sum(to_come) / max(1, min(self._width(), len(to_come)))

    def _tell(self, finished: bool = False) -> None:
        with self._lock:
            self._listener(self._status(finished))

    def _tick(self) -> None:
        while not self._over.wait(TOLD_EVERY_S):
            self._tell()


def listener(progress: bool | Callable[[Status], None]) -> Callable[[Status], None]:
    """What `progress` means: nothing, a bar or lines of text and a last line, or the caller's own."""
    if callable(progress):
        return progress
    if not progress:
        return lambda status: None
    return _Bar() if sys.stderr.isatty() else _Lines()


class _Lines:
    """For logs and pipes: a line now and then on stderr, the last one on stdout."""

    def __init__(self):
        self._due = time.monotonic() + LINE_EVERY_S
        self._note = ""

    def __call__(self, status: Status) -> None:
        if status.finished:
            print(status.line(), flush=True)
        elif time.monotonic() >= self._due or status.note != self._note:
            print(status.line(), file=sys.stderr, flush=True)
            self._due, self._note = time.monotonic() + LINE_EVERY_S, status.note


class _Bar:
    """For terminals."""

    def __init__(self):
        self._bar = None

    def __call__(self, status: Status) -> None:
        if self._bar is None:
            form = "{percentage:3.0f}% |{bar:20}| {desc}"
            self._bar = tqdm(total=status.total, leave=False, bar_format=form)
        if status.finished:
            self.close()
            print(status.line(), flush=True)
        else:
            self._bar.n = status.done + status.skipped + status.failed
            self._bar.set_description_str(status.line())

    def close(self) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    """
    >>> [_duration(s) for s in (0.4, 45, 90, 5400, 90000)]
    ['1 s', '45 s', '2 min', '1.5 h', '25 h']
    """
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.2g} h"
