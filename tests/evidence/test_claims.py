import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evidence import EvidenceError, Predicate, load_claims

GOOD = {
    "theorem": """
[[claim]]
id = "toy-chapter/bound"
says = "It is bounded."
kind = "theorem"
source = "someone2024"
locator = "Theorem 1"
paper_value = "n^2"
quantity = "counterexamples"
unit = "inputs"
holds = "== 0"
tests = ["tests/metrics/test_bounds.py::test_it"]
""",
    "construction": """
[[claim]]
id = "toy-chapter/built"
says = "It is built."
kind = "construction"
source = "ours"
locator = "Proposition T"
quantity = "wrong answers"
unit = "inputs"
holds = "== 0"
control = "one weight perturbed"
control_holds = "> 0"
unrefereed = true
""",
    "measurement": """
[[claim]]
id = "toy-chapter/measured"
says = "It is high."
kind = "measurement"
source = "someone2024"
locator = "Table 2"
paper_value = 0.99
quantity = "accuracy"
unit = "1"
holds = ">= 0.9"
control = "untrained"
""",
}


def load(tmp_path, text):
    path = tmp_path / "claims.toml"
    path.write_text(text, encoding="utf-8")
    return load_claims(path)


def test_one_claim_of_each_kind_is_read_in_the_order_of_the_file(tmp_path):
    claims = load(tmp_path, "".join(GOOD.values()))
    assert list(claims) == ["toy-chapter/bound", "toy-chapter/built", "toy-chapter/measured"]
    assert [claim.kind for claim in claims.values()] == list(GOOD)
    bound, built, measured = claims.values()
    assert bound.chapter == "toy-chapter" and bound.tests == ("tests/metrics/test_bounds.py::test_it",)
    assert built.unrefereed and str(built.control_holds) == "> 0"
    assert measured.paper_value == 0.99 and measured.holds(0.9) and not measured.holds(0.8)


# What is broken, how, and what the message must say.
BROKEN = [
    ("theorem", "locator", "locater", "unknown key 'locater'; did you mean 'locator'"),
    ("theorem", "tests = [", "# [", "names the tests"),
    ("theorem", "tests/metrics/test_bounds.py::test_it", "test_bounds", "'test_bounds' is not of the form"),
    ("theorem", "[[claim]]", "[[claims]]", "unknown table 'claims'; did you mean 'claim'"),
    ("theorem", '"toy-chapter/bound"', '"Toy Chapter"', "not of the form 'chapter/slug'"),
    ("theorem", 'holds = "== 0"', 'holds = "= 0"', "'= 0' is no predicate"),
    ("theorem", 'holds = "== 0"', "holds = 0", "holds must be a string"),
    ("theorem", 'holds = "== 0"', "", "missing holds"),
    ("theorem", 'says = "It is bounded."', 'says = " "', "says must be a string that is not empty"),
    ("theorem", 'paper_value = "n^2"', "paper_value = true", "paper_value must be a string or a number"),
    ("theorem", 'kind = "theorem"', 'kind = "theorm"', "did you mean 'theorem'"),
    ("construction", "control_holds", "# ", "control_holds = '…'"),
    ("construction", 'control = "one weight perturbed"', "", "control = '…'"),
    ("construction", "unrefereed = true", 'unrefereed = "yes"', "unrefereed must be true or false"),
    ("measurement", 'control = "untrained"', "", "a measurement says what it is compared with"),
    ("measurement", "[[claim]]", "[[claim]", "not TOML"),
]


@pytest.mark.parametrize("kind, old, new, message", BROKEN)
def test_a_broken_declaration_is_refused_by_file_and_reason(tmp_path, kind, old, new, message):
    assert GOOD[kind].count(old) >= 1
    with pytest.raises(EvidenceError) as error:
        load(tmp_path, GOOD[kind].replace(old, new))
    assert "claims.toml" in str(error.value) and message in str(error.value)


def test_a_claim_declared_twice_is_refused_by_id(tmp_path):
    with pytest.raises(EvidenceError, match="toy-chapter/bound.*declared twice"):
        load(tmp_path, GOOD["theorem"] * 2)


def test_every_field_that_has_no_default_is_required(tmp_path):
    names = ["id", "says", "kind", "source", "locator", "quantity", "unit", "holds"]
    for name in names:
        lines = [line for line in GOOD["theorem"].splitlines() if not line.startswith(f"{name} =")]
        with pytest.raises(EvidenceError, match=f"missing {name}"):
            load(tmp_path, "\n".join(lines))
    assert set(names) < set(tomllib.loads(GOOD["theorem"])["claim"][0])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EvidenceError, match="absent.toml: no such file"):
        load_claims(tmp_path / "absent.toml")


def test_the_declaration_changes_with_what_decides_and_not_with_the_wording(tmp_path):
    (claim,) = load(tmp_path, GOOD["measurement"]).values()
    (reworded,) = load(tmp_path, GOOD["measurement"].replace("It is high.", "It is very high.")).values()
    (moved,) = load(tmp_path, GOOD["measurement"].replace(">= 0.9", ">= 0.8")).values()
    assert claim.declaration == reworded.declaration != moved.declaration


ORACLE = {
    ">=": lambda value, t: not value < t,
    "<=": lambda value, t: not value > t,
    "==": lambda value, t: not (value < t or value > t),
    ">": lambda value, t: t < value,
    "<": lambda value, t: t > value,
}
small = st.integers(-4, 4).map(float)  # few values, so that ends and thresholds often coincide


@given(sign=st.sampled_from(sorted(ORACLE)), threshold=small, value=small)
def test_a_predicate_means_what_its_sign_says(sign, threshold, value):
    assert Predicate.parse(f" {sign}  {threshold}")(value) is ORACLE[sign](value, threshold)


@given(sign=st.sampled_from(sorted(ORACLE)), threshold=small, ends=st.tuples(small, small))
def test_an_interval_lies_inside_outside_or_across_and_never_two_of_these(sign, threshold, ends):
    lo, hi = sorted(ends)
    points = [
        lo + k / 2 for k in range(int(2 * (hi - lo)) + 1)
    ]  # all thresholds between the ends, and halves
    held = {ORACLE[sign](point, threshold) for point in points}
    place = {frozenset({True}): "inside", frozenset({False}): "outside"}.get(frozenset(held), "crossing")
    assert Predicate.parse(f"{sign} {threshold}").place(lo, hi) == place


@given(sign=st.sampled_from(sorted(ORACLE)), threshold=st.floats(-1e6, 1e6))
def test_a_predicate_is_parsed_with_its_exact_threshold(sign, threshold):
    assert Predicate.parse(f"{sign}{threshold!r}") == Predicate(sign, threshold)


@pytest.mark.parametrize(
    "text", ["", "0.3", ">=", "=> 1", "!= 1", ">= x", ">= nan", "< inf", ">= 1 2", "1 <= 2"]
)
def test_what_is_no_predicate_is_refused(text):
    with pytest.raises(ValueError, match="is no predicate"):
        Predicate.parse(text)
