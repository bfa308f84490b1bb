import json

import pytest

from lib.evidence import Chapter, ledger

CLAIM = """
[[claim]]
id = "{chapter}/{slug}"
says = "It is {slug}."
kind = "measurement"
source = "someone2024"
locator = "Table 2"
paper_value = 0.99
quantity = "accuracy"
unit = "1"
holds = ">= 0.9"
control = "chance"
"""


@pytest.fixture
def book(tmp_path):
    """Two chapters, of which only the first is written. -> where(...) for `ledger.build`."""
    declared = [("one", "high"), ("one", "higher"), ("two", "highest")]
    text = "".join(CLAIM.format(chapter=chapter, slug=slug) for chapter, slug in declared)
    (tmp_path / "claims.toml").write_text(text)
    (tmp_path / "one.ipynb").write_text("{}")
    return {"claims": tmp_path / "claims.toml", "folder": tmp_path / "build"}


def settle(book, slugs=("high", "higher"), profile="quick", value=0.95, interval=(0.93, 0.97)):
    one = Chapter(
        "one", profile=profile, device="cpu", jobs=1, claims=book["claims"], build=book["folder"],
        evidence=book["folder"].parent / "evidence",
    )  # fmt: skip
    for slug in slugs:
        one.settle(f"one/{slug}", one.live, value, interval=interval, n=10)
    return one


def test_an_empty_ledger_says_what_is_missing_and_which_command_makes_it(book):
    entries = ledger.build(**book)
    assert [entry["verdict"] for entry in entries] == ["not attempted"] * 3
    glance = ledger.at_a_glance(entries, book=book["claims"].parent)
    assert "**3 claims: 3 not attempted.**" in glance
    assert "3 of 3 claims have no verdict: `make chapter CHAPTER=one`, `make chapter CHAPTER=two`." in glance
    assert (
        "[one/high](one.ipynb)" in glance and "`two/highest`" in glance
    )  # no link to a page that is not there
    shown = ledger.table(entries, book=book["claims"].parent)
    assert "The chapter has not been executed. `make chapter CHAPTER=two`" in shown.markdown


def test_a_book_without_claims_says_so(tmp_path):
    (tmp_path / "claims.toml").write_text("")
    assert ledger.build(claims=tmp_path / "claims.toml", folder=tmp_path) == []
    assert "No claim is declared yet" in ledger.at_a_glance([])


def test_a_partial_ledger_counts_what_is_there_and_asks_for_the_rest(book):
    settle(book, ["high"])
    entries = ledger.build(**book)
    high, higher, highest = entries
    assert (high["verdict"], high["value"], high["interval"], high["n"]) == (
        "supported",
        0.95,
        [0.93, 0.97],
        10,
    )
    assert "ended before deciding" in higher["reason"] and "not been executed" in highest["reason"]
    glance = ledger.at_a_glance(entries, book=book["claims"].parent)
    assert "**3 claims: 1 supported, 2 not attempted.**" in glance
    assert "1 of 3 claims rest on a quick run only: `make evidence CHAPTER=one`." in glance
    assert ledger.counts("one", **book) == {
        "supported": 1, "not supported": 0, "inconclusive": 0, "not attempted": 1,
    }  # fmt: skip


def run(settings, *, seed):
    """A run that fails where it is told to."""
    if settings["n"] == 3:
        raise RuntimeError("told to")
    return {"accuracy": 0.95}


@pytest.mark.parametrize(
    ("profile", "sizes", "said"),
    [
        ("quick", [1, 2], "1 of 3 claims rest on a quick run only"),
        ("standard", [1, 3], "1 of 3 claims rest on incomplete recorded evidence"),
        ("standard", [1, 2], None),
    ],
)
def test_a_claim_on_fewer_runs_than_planned_is_told_with_the_command_that_makes_the_rest(
    book, profile, sizes, said
):
    one = Chapter(
        "one", profile=profile, device="cpu", jobs=1, claims=book["claims"], build=book["folder"],
        evidence=book["folder"].parent / "evidence",
    )  # fmt: skip
    runs = one.experiment("toy", run, [{"n": n} for n in sizes], seeds=[0, 1, 2])
    one.settle("one/high", runs.live, 0.95, interval=(0.93, 0.97), n=3)
    glance = ledger.at_a_glance(ledger.build(**book), book=book["claims"].parent)
    if said is None:
        assert "evidence" not in glance
    else:
        assert f"{said}: `make evidence CHAPTER=one`." in glance


def test_the_file_of_claims_holds_one_flat_entry_a_claim(book):
    settle(book)
    entries = ledger.build(**book)
    assert json.loads((book["folder"] / "claims.json").read_text()) == entries
    assert len(entries) == 3
    wanted = {
        "id", "chapter", "statement", "kind", "source", "locator", "paper_value", "value", "interval", "n",
        "profile", "verdict", "live", "recorded", "remedy",
    }  # fmt: skip
    for entry in entries:
        assert wanted <= set(entry)
    assert entries[0]["paper_value"] == 0.99 and entries[0]["live"]["profile"] == "quick"


def test_the_standard_verdict_leads_and_a_live_one_that_differs_is_shown_beside_it(book):
    one = settle(book, ["high"], value=0.5, interval=(0.4, 0.6))
    recorded = settle(book, [], profile="standard").live
    one.settle("one/high", recorded, 0.95, interval=(0.93, 0.97), n=10)
    entry = ledger.build(**book)[0]
    assert (entry["profile"], entry["verdict"], entry["remedy"]) == ("standard", "supported", "")
    assert (entry["live"]["profile"], entry["live"]["verdict"]) == ("quick", "not supported")
    shown = ledger.table([entry]).markdown
    assert "(live, quick: not supported, 0.5)" in shown and "0.99 – {cite}`someone2024`, Table 2" in shown


def test_a_verdict_on_another_threshold_does_not_count_any_more(book):
    settle(book)
    text = book["claims"].read_text()
    book["claims"].write_text(text.replace(">= 0.9", ">= 0.99"))
    entries = ledger.build(**book)
    assert {entry["verdict"] for entry in entries} == {"not attempted"}
    assert "declaration changed" in entries[0]["reason"]
    book["claims"].write_text(text.replace("It is high.", "It is quite high."))
    assert ledger.build(**book)[0]["verdict"] == "supported"


def test_a_damaged_file_of_verdicts_is_named_and_costs_no_other_chapter(book):
    settle(book)
    (book["folder"] / "claims/two.json").write_text("{")
    entries = ledger.build(**book)
    assert [entry["verdict"] for entry in entries] == ["supported", "supported", "not attempted"]
    assert "build/claims/two.json is damaged" in entries[2]["reason"]


def test_a_misbehaving_verdict_keeps_its_reason_in_the_table(book):
    settle(book, value=0.9, interval=(0.8, 0.97))
    shown = ledger.table(ledger.build(**book), book=book["claims"].parent).markdown
    assert shown.count("The interval crosses the threshold.") == 2
