"""Claims, evidence, verdicts: what was declared, what came out, by what it was made, and what follows.

A chapter uses `Chapter` (`chapter.py`) and `lib.metrics.intervals`. Underneath: `claims` (declared),
`rows` and `plans` (append-only files, and what they are to hold), `locks` (one recorder at a time), `code`
and `provenance` (what made a row), `progress` and `forecast` (how far, how long), `repeat` and `agreement`
(do rows of older code still hold), `experiment` (rows as tables), `verdict` (decided), `tables` (shown),
`ledger` (all chapters together). `python -m lib.evidence --help` for the commands.
"""

from lib.evidence.chapter import Chapter
from lib.evidence.claims import Claim, Predicate, load_claims
from lib.evidence.experiment import Experiment, Source
from lib.evidence.files import EvidenceError
from lib.evidence.tables import show
from lib.evidence.verdict import Verdict, decide

__all__ = [
    "Chapter", "Claim", "EvidenceError", "Experiment", "Predicate", "Source", "Verdict", "decide",
    "load_claims", "show",
]  # fmt: skip
