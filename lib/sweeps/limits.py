"""A limit on the wall time of one attempt, soft and hard.

Soft: `TimeUp` is raised in the thread that works, wherever that thread is; it needs Python to come round, so
it interrupts a training loop, in a main thread as in a Dask worker's, but no call that hangs outside Python.
Hard: GRACE_S later the whole process ends. Only for a process that does nothing else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import sys
import threading
import time
from pathlib import Path

GRACE_S = 5.0  # for the soft limit to get through: a step of a big model takes seconds


class TimeUp(BaseException):
    """Not an Exception: a run that catches its own errors must not catch this."""


class TimeLimit:
    """start(), stop(). fired: whether the limit was reached; no `TimeUp` comes after stop().

    seconds: None for no limit. last_resort: a file; if given, the process ends GRACE_S after the limit, and
    leaves there where it hung.
    """

    def __init__(self, seconds: float | None, last_resort: Path | None = None):
        self.seconds, self.last_resort = seconds, last_resort
        self.fired = False
        self._stopped = False
        self._lock = threading.Lock()
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._file = None

    def start(self) -> None:
        if self.seconds is None:
            return
        if self.last_resort:  # a timer within C: it needs no turn of Python's
            self._file = open(self.last_resort, "wb")
            faulthandler.dump_traceback_later(self.seconds + GRACE_S, exit=True, file=self._file)
        timer = threading.Timer(self.seconds, self._fire)
        timer.daemon = True
        timer.start()
        self._timer = timer

    def stop(self) -> None:
        """Safe to call twice: `TimeUp` may arrive in the middle of the first call."""
        if self.seconds is None:
            return
        with self._lock:
            self._stopped = True
        _raise_in(self._thread, None)
        self._timer.cancel()
        if self._file:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self.last_resort.unlink(missing_ok=True)

    def _fire(self) -> None:
        while True:
            with self._lock:
                if self._stopped:
                    return
                self.fired = True
                if not _importing(self._thread.value):
                    _raise_in(self._thread, TimeUp)
                    return
            time.sleep(0.05)


def _importing(thread: int) -> bool:
    """Whether it imports a module: cut short, it would leave half of one to the next run of the process."""
    frame = sys._current_frames().get(thread)
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _raise_in(thread: ctypes.c_ulong, exception: type[BaseException] | None) -> None:
    """Raise `exception` in `thread` at its next turn; None takes back what has not arrived yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, exception and ctypes.py_object(exception))
