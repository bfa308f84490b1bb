"""`python -m lib.pipeline book|chapter|evidence`: see each with --help. `make` calls it.

Exit codes: 0 done, 1 a chapter or a page failed, 2 the request was wrong and nothing ran, 130 stopped by
Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from lib.choices import PROFILES
from lib.pipeline.layout import Layout
from lib.pipeline.request import BACKENDS, RequestError, plan


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; all that a KeyboardInterrupt cleans up is cleaned up for both."""

    def __init__(self, signum: int):
        super().__init__()
        self.exit_code = 128 + signum


def main(argv: list[str] | None = None, *, layout: Layout | None = None, ledger=None) -> int:
    """Carry out one command. `ledger` (default `lib.evidence.ledger`) has `build()`, `at_a_glance()`."""
    asked = _parser().parse_args(argv)
    layout = layout or Layout()
    profile = "standard" if asked.command == "evidence" else asked.profile or PROFILES[0]
    try:
        jobs = plan(
            layout,
            chapter=_chapter(asked),
            profile=profile,
            params=asked.params,
            backend=asked.backend,
            scheduler=asked.scheduler,
            jobs=asked.jobs,
        )
        if address := asked.scheduler.strip():
            os.environ["DASK_SCHEDULER_ADDRESS"] = address  # Dask reads it, in the kernel, which inherits it
        from lib.pipeline import build  # now, not above: a misspelling is told before seconds of imports

        if ledger is None:
            from lib.evidence import ledger
        command = {"book": build.book, "chapter": build.chapter, "evidence": build.evidence}[asked.command]
        with _stops():
            return command(layout, jobs, ledger)
    except RequestError as error:
        print("Nothing was run:\n  " + "\n  ".join(error.problems), file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{error.filename or layout.build}: {error.strerror}. The book needs a writable build/ with some "
            "100 MB free; finished chapters and recorded rows are kept.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as stop:
        print("\nStopped. Finished chapters and runs are kept; the same command goes on.", file=sys.stderr)
        return getattr(stop, "exit_code", 130)


@contextlib.contextmanager
def _stops() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, through every `finally`: the kernel and its workers end, too."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(signum, frame):
        # Once: a second one must not cut short the seconds in which the kernel writes down what is ready.
        for each in signals:
            signal.signal(each, lambda *_: None)
        raise Stopped(signum)

    before = [signal.signal(each, stop) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def _chapter(asked: argparse.Namespace) -> str | None:
    """The chapter asked for; None: all. `chapter` without a name is a mistake, which `plan` reports."""
    if asked.command == "book" or (asked.command == "evidence" and not asked.chapter):
        return None
    return asked.chapter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib.pipeline", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, says in [
        ("book", "execute every chapter whose inputs changed, and render the book"),
        ("chapter", "execute one chapter, and render it"),
        ("evidence", "record the standard evidence of one chapter, or of all"),
    ]:
        command = commands.add_parser(name, help=says, description=says)
        if name != "book":
            command.add_argument("chapter", nargs="?", default="", help="file name without .ipynb")
        if name != "evidence":
            command.add_argument("--profile", default="", help=f"{', '.join(PROFILES)} (default: quick)")
        command.add_argument("--params", default="", help='parameters of the chapter: "a=1 b=two"')
        command.add_argument("--jobs", default="", help="runs at a time: a number, or auto (default)")
        command.add_argument("--backend", default="", help=f"where runs happen: {', '.join(BACKENDS)}")
        command.add_argument("--scheduler", default="", help="of Dask, as in tcp://192.168.0.7:8786")
    return parser


if __name__ == "__main__":
    sys.exit(main())
