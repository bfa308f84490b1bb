"""Claims: what is declared before anything is measured. Read from `book/claims.toml`, checked on the way in.

A claim has a kind. *theorem*: proved in its chapter, exercised by named tests. *construction*: explicit
weights, checked on every input up to a stated size, with a control that must fail. *measurement*: seeds or
prompts, an interval, a control.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from lib.choices import check_choice
from lib.evidence.files import EvidenceError
from lib.paths import BOOK

KINDS = ("theorem", "construction", "measurement")
CLAIMS = BOOK / "claims.toml"

_SIGNS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*/[a-z0-9]+(-[a-z0-9]+)*")
_TEST = re.compile(r"tests/[\w/.-]+\.py::\w+")


@dataclass(frozen=True)
class Predicate:
    """A threshold that a number meets or misses, written as in `>= 0.3`.

    >>> Predicate.parse("<= 5")(4)
    True
    """

    sign: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> Predicate:
        """The predicate that `text` spells. Raises ValueError unless it is a sign and a finite number."""
        found = re.fullmatch(r"\s*(>=|<=|==|<|>)\s*(\S+)\s*", str(text))
        try:
            threshold = float(found[2]) if found else math.nan
        except ValueError:
            threshold = math.nan
        if not math.isfinite(threshold):
            raise ValueError(
                f"{text!r} is no predicate; write {', '.join(_SIGNS)} and a finite number, as in '>= 0.3'"
            )
        return cls(found[1], threshold)

    def __call__(self, value: float) -> bool:
        return bool(_SIGNS[self.sign](value, self.threshold))

    def __str__(self) -> str:
        return f"{self.sign} {self.threshold:g}"

    def place(self, lo: float, hi: float) -> str:
        """Where the closed interval [lo, hi] lies: wholly "inside", wholly "outside", or "crossing"."""
        if self(lo) and self(hi):
            return "inside"
        if self.sign == "==":
            return "crossing" if lo <= self.threshold <= hi else "outside"
        return "crossing" if self(lo) or self(hi) else "outside"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence that may turn out wrong, with the number and the threshold that decide it.

    `source` is a key of references.bib, or "ours"; `locator` says where in it. `holds` judges `quantity` (in
    `unit`; "1" if it has none), `control_holds` judges the control. Raises ValueError if the parts do not
    fit.
    """

    id: str
    says: str
    kind: str
    source: str
    locator: str
    quantity: str
    unit: str
    holds: Predicate
    paper_value: str | int | float | None = None
    control: str = ""
    control_holds: Predicate | None = None
    tests: tuple[str, ...] = ()
    unrefereed: bool = False

    def __post_init__(self):
        if not _ID.fullmatch(self.id):
            raise ValueError(f"id {self.id!r} is not of the form 'chapter/slug' in lower case and hyphens")
        check_choice("kind", self.kind, KINDS)
        if self.kind == "theorem" and not self.tests:
            raise ValueError("a theorem names the tests that exercise it: tests = ['tests/….py::test_…']")
        for test in self.tests:
            if not _TEST.fullmatch(test):
                raise ValueError(f"test {test!r} is not of the form 'tests/….py::test_name'")
        if self.kind != "theorem" and not self.control.strip():
            raise ValueError(f"a {self.kind} says what it is compared with: control = '…'")
        if self.kind == "construction" and self.control_holds is None:
            raise ValueError("a construction has a control that must fail: control_holds = '…'")

    @property
    def chapter(self) -> str:
        return self.id.partition("/")[0]

    @property
    def slug(self) -> str:
        """The id within the chapter."""
        return self.id.partition("/")[2]

    @property
    def declaration(self) -> str:
        """Digest of what decides the verdict: a verdict that carries another one is on another claim."""
        parts = [self.kind, self.quantity, self.unit, str(self.holds), str(self.control_holds)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_claims(path: Path | None = None) -> dict[str, Claim]:
    """The declared claims by id, in the file's order. Raises EvidenceError that names the file and the claim.

    path: a TOML file of `[[claim]]` tables, by default `book/claims.toml`.
    """
    path = Path(path or CLAIMS)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvidenceError(
            f"{path.name}: no such file; claims are declared there as [[claim]] tables"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise EvidenceError(f"{path.name}: not TOML: {error}") from error
    claims: dict[str, Claim] = {}
    try:
        for key in tables:
            check_choice("table", key, ["claim"])
        for place, table in enumerate(tables.get("claim", []), start=1):
            name = f"claim {table.get('id', f'number {place}')!r}"
            claim = _claim(table, name)
            if claim.id in claims:
                raise ValueError(f"{name}: declared twice")
            claims[claim.id] = claim
    except ValueError as error:
        raise EvidenceError(f"{path.name}: {error}") from error
    return claims


def _claim(table: dict, name: str) -> Claim:
    known = {field.name: field for field in fields(Claim)}
    try:
        for key in table:
            check_choice("key", key, known)
        missing = [key for key, field in known.items() if field.default is MISSING and key not in table]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        for key, value in table.items():
            _check_type(key, value)
        parsed = {key: Predicate.parse(table[key]) for key in ("holds", "control_holds") if key in table}
        return Claim(**{**table, **parsed, "tests": tuple(table.get("tests", ()))})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_type(key: str, value: object) -> None:
    if key == "paper_value":
        right, wanted = (
            isinstance(value, (str, int, float)) and not isinstance(value, bool),
            "a string or a number",
        )
    elif key == "unrefereed":
        right, wanted = isinstance(value, bool), "true or false"
    elif key == "tests":
        right = isinstance(value, list) and all(isinstance(test, str) for test in value)
        wanted = "a list of strings"
    else:
        right, wanted = isinstance(value, str) and bool(value.strip()), "a string that is not empty"
    if not right:
        raise ValueError(f"{key} must be {wanted}, got {value!r}")
