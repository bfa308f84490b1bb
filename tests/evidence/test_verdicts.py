import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evidence import Claim, Predicate, Verdict, decide
from lib.evidence.verdict import strongest


def claim(kind="measurement", holds=">= 0.5", control_holds=None):
    return Claim(
        id="toy/claim", says="It holds.", kind=kind, source="ours", locator="here", quantity="q", unit="1",
        holds=Predicate.parse(holds), control="chance",
        control_holds=Predicate.parse(control_holds) if control_holds else None,
        tests=("tests/a.py::test_a",),
    )  # fmt: skip


CASES = [
    (">= 0.5", (0.5, 0.9), "supported"),
    (">= 0.5", (0.4, 0.9), "inconclusive"),
    (">= 0.5", (0.1, 0.49), "not supported"),
    ("> 0.5", (0.5, 0.9), "inconclusive"),
    ("> 0.5", (0.1, 0.5), "not supported"),
    ("<= 0.5", (0.1, 0.5), "supported"),
    ("< 0.5", (0.1, 0.5), "inconclusive"),
    ("== 0", (0, 0), "supported"),
    ("== 0", (-1, 1), "inconclusive"),
    ("== 0", (0, 1), "inconclusive"),
    ("== 0", (1, 2), "not supported"),
]


@pytest.mark.parametrize("holds, interval, wanted", CASES)
def test_the_interval_decides(holds, interval, wanted):
    found = decide(claim(holds=holds), sum(interval) / 2, interval=interval)
    assert found.verdict == wanted
    assert bool(found.reason) == (wanted == "inconclusive")


@given(lo=st.floats(-2, 2), width=st.floats(0, 2), threshold=st.floats(-2, 2))
def test_a_narrower_interval_never_turns_a_decision_into_its_opposite(lo, width, threshold):
    one = claim(holds=f">= {threshold!r}")
    wide = decide(one, lo, interval=(lo, lo + width)).verdict
    narrow = decide(one, lo, interval=(lo + width / 4, lo + width / 2)).verdict
    assert wide in (narrow, "inconclusive")


@pytest.mark.parametrize("kind, control", [("theorem", None), ("construction", 3)])
def test_exact_kinds_are_decided_by_the_value_alone(kind, control):
    one = claim(kind, "== 0", "> 0" if control else None)
    assert decide(one, 0, control=control).verdict == "supported"
    assert decide(one, 1, control=control).verdict == "not supported"


def test_a_measurement_without_interval_decides_nothing():
    with pytest.raises(ValueError, match="number without an interval decides nothing"):
        decide(claim(), 0.9)


def test_a_control_that_misbehaves_makes_any_outcome_inconclusive():
    for value in (0, 1):
        found = decide(claim("construction", "== 0", "> 0"), value, control=0)
        assert found.verdict == "inconclusive" and "control (chance) gave 0; it must be > 0" in found.reason


def test_a_promised_control_must_be_given():
    with pytest.raises(ValueError, match="promises a control"):
        decide(claim("construction", "== 0", "> 0"), 0)


@pytest.mark.parametrize(
    "value, interval, control",
    [
        (math.nan, (0, 1), None),
        (0.5, (math.nan, 1), None),
        (0.5, (0, math.nan), None),
        (0.5, (0, 1), math.nan),
        (True, (0, 1), None),
    ],
)
def test_what_is_no_number_is_refused(value, interval, control):
    with pytest.raises(ValueError, match="a verdict needs a number"):
        decide(claim(), value, interval=interval, control=control)


def test_a_reversed_interval_is_refused():
    with pytest.raises(ValueError, match="reversed"):
        decide(claim(), 0.5, interval=(1, 0))


def verdict(profile, word):
    return Verdict(
        claim="toy/claim", profile=profile, verdict=word, reason="", quantity="q", unit="1", holds=">= 0"
    )


def test_recorded_standard_evidence_leads_and_an_attempt_beats_none():
    quick, gpu, standard = (verdict(profile, "supported") for profile in ("quick", "gpu", "standard"))
    assert strongest([quick, standard, gpu]) is standard
    assert strongest([quick, gpu]) is gpu
    assert strongest([verdict("standard", "not attempted"), quick]) is quick
