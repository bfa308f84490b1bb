"""Ctrl-C and SIGTERM: the sweep finishes what it is writing, then stops and says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal came while a run was computed in this process."""


class Stop:
    """Whether to stop, and the signal if one came. It cuts into nothing by itself, so no append is halved."""

    def __init__(self):
        self.signal: int | None = None
        self.asked = False
        self._interruptible = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While the block runs, a signal raises Interrupted at once: in here a run computes for minutes."""
        self._interruptible = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def raise_as_usual(self) -> None:
        """What the signal would have raised without us; 143 is 128 + SIGTERM, as shells count."""
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)

    def _came(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C of someone to whom stopping takes too long
        self.signal, self.asked = number, True
        if self._interruptible:
            raise Interrupted


@contextmanager
def signals() -> Iterator[Stop]:
    """Catch Ctrl-C and SIGTERM while the block runs, if this is the main thread: no other may."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._came) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
