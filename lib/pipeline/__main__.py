"""`python -m lib.pipeline book|chapter|evidence`: see each with --help. `make` calls it.

Exit codes: 0 done, 1 a chapter or a page failed, 2 the request was wrong and nothing ran, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys

from lib.choices import PROFILES
from lib.pipeline.layout import Layout
from lib.pipeline.request import RequestError, plan


def main(argv: list[str] | None = None, *, layout: Layout | None = None, ledger=None) -> int:
    """Carry out one command. `ledger` (default `lib.evidence.ledger`) has `build()`, `at_a_glance()`."""
    asked = _parser().parse_args(argv)
    layout = layout or Layout()
    profile = "standard" if asked.command == "evidence" else asked.profile or PROFILES[0]
    try:
        jobs = plan(layout, chapter=_chapter(asked), profile=profile, params=asked.params)
        from lib.pipeline import build  # now, not above: a misspelling is told before seconds of imports

        if ledger is None:
            from lib.evidence import ledger
        return {"book": build.book, "chapter": build.chapter, "evidence": build.evidence}[asked.command](
            layout, jobs, ledger
        )
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
    except KeyboardInterrupt:
        print("\nStopped. Finished chapters are kept; call it again to go on.", file=sys.stderr)
        return 130


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
    return parser


if __name__ == "__main__":
    sys.exit(main())
