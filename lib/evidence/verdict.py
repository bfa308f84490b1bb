"""Verdicts: computed from a claim's predicate, a value, its interval and its control; never typed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from lib.evidence.claims import Claim
from lib.evidence.tables import badge, inline_html, number

# A claim settled at several profiles is listed with the first of these. `standard` leads because its rows are
# committed and can be re-run by anybody on two cores; a reader's own cluster comes next, a quick look last.
STRENGTH = ("standard", "cluster", "gpu", "quick")


class Decision(NamedTuple):
    """One of the four words of `tables.VERDICTS`, and why."""

    verdict: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a claim came out at one profile. Shown in a cell as a badge with the numbers behind it."""

    claim: str
    profile: str
    verdict: str
    reason: str
    quantity: str
    unit: str
    holds: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    control: float | None = None
    note: str = ""
    provenance: str = ""
    recorded: str = ""
    declaration: str = ""
    runs: int = 0  # that the experiment behind it asks for; 0: computed on the page itself
    lacking: int = 0  # of these, not executed, failed, or stale with nothing to vouch for it
    differing: int = 0  # of these, repeated by the present code with another result than the stale ones have

    def as_dict(self) -> dict:
        found = asdict(self)
        return found | {"interval": list(self.interval) if self.interval else None}

    def numbers(self) -> str:
        """Value, interval, n, control and what is to be said about them, as MyST; or only the reason."""
        if self.verdict == "not attempted":
            return self.reason
        unit = "" if self.unit == "1" else f" {self.unit}"
        interval = f" {number(self.interval)}" if self.interval else ""
        counted = f", n = {number(self.n)}" if self.n else ""
        control = "" if self.control is None else f"; control {number(self.control)}"
        found = f"{number(self.value)}{interval}{unit}{counted}{control}."
        return " ".join(filter(None, [found, self.reason, self.note]))

    def finding(self) -> str:
        """The quantity with its threshold, and the numbers, as MyST; or why there are none."""
        if self.verdict == "not attempted":
            return self.reason
        return f"{self.quantity}, claimed {self.holds}: {self.numbers()}"

    def sentence(self) -> str:
        """The claim, its profile, and what was found, as MyST."""
        return f"`{self.claim.partition('/')[2]}` (profile `{self.profile}`): {self.finding()}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        text = f"{badge(self.verdict)} {self.sentence()}"
        return {"text/markdown": text, "text/html": inline_html(text), "text/plain": self.sentence()}


def decide(
    claim: Claim,
    value: float,
    *,
    interval: tuple[float, float] | None = None,
    control: float | None = None,
) -> Decision:
    """The verdict on `claim`, given what came out.

    With an interval: wholly where the predicate holds is "supported", wholly where it fails "not supported",
    both "inconclusive". Without one, which only theorems and constructions may do, the value decides. A
    control that does not do what it should makes any outcome "inconclusive". Raises ValueError on NaN, on a
    reversed interval, and where an interval or a promised control is missing.
    """
    _check_number("value", value)
    if claim.kind == "measurement" and interval is None:
        raise ValueError(
            f"{claim.id} is a measurement, and a number without an interval decides nothing; "
            "give interval=, as from lib.metrics.intervals.bootstrap or proportion"
        )
    if interval is not None:
        lo, hi = interval
        _check_number("interval", lo)
        _check_number("interval", hi)
        if lo > hi:
            raise ValueError(f"{claim.id}: the interval [{lo}, {hi}] is reversed")
    if claim.control_holds is not None:
        if control is None:
            raise ValueError(
                f"{claim.id} promises a control ({claim.control}); give control=, the number it gave"
            )
        _check_number("control", control)
        if not claim.control_holds(control):
            return Decision(
                "inconclusive",
                f"The control ({claim.control}) gave {number(control)}; it must be {claim.control_holds}.",
            )
    elif control is not None:
        _check_number("control", control)
    if interval is None:
        holds = claim.holds(value)
        return Decision("supported", "") if holds else Decision("not supported", "")
    place = claim.holds.place(lo, hi)
    if place == "crossing":
        return Decision("inconclusive", "The interval crosses the threshold.")
    return Decision("supported" if place == "inside" else "not supported", "")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"{name} is {value}; a verdict needs a number")


def strongest(verdicts: list[Verdict]) -> Verdict:
    """The one to show of several verdicts on one claim: an attempted one, then by `STRENGTH`."""
    return min(verdicts, key=lambda v: (v.verdict == "not attempted", STRENGTH.index(v.profile)))
