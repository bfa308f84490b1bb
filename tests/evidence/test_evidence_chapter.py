import json
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from lib.evidence import EvidenceError
from lib.evidence.experiment import Source
from lib.evidence.rows import RowStore, read
from lib.figures import Figure, read_provenance, style

calls = []


def run(settings, *, seed):
    """A run that counts its calls, and fails where it is told to."""
    calls.append((settings["n"], seed))
    if settings.get("fails"):
        raise RuntimeError("told to")
    return {"accuracy": 1 - settings["n"] / 100 + seed / 1000}


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def written(tmp_path):
    return json.loads((tmp_path / "build/claims/toy.json").read_text())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "tay"}, "unknown chapter 'tay'; did you mean 'toy'"),
        ({"profile": "quik"}, "did you mean 'quick'"),
        ({"device": "cpo"}, "did you mean 'cpu'"),
        ({"parameters": {"model": math.nan}}, r"parameters\['model'\] is nan"),
        ({"backend": "dusk"}, "unknown backend 'dusk'; did you mean 'dask'"),
        ({"jobs": 0}, "jobs is 0; it is 'auto' or a number of runs at a time, 1 or more"),
        ({"jobs": "2"}, "jobs is '2'"),
        ({"jobs": True}, "jobs is True"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_before_anything_is_written(chapter, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter(**wrong)
    assert not (tmp_path / "build").exists()


def test_settings_come_from_a_table_that_is_shown_whole(chapter):
    table = {"quick": {"seeds": 2, "n": [1, 2]}, "standard": {"seeds": 5, "n": [1, 2, 3]}}
    settings = chapter("quick").choose(table)
    assert settings == {"seeds": 2, "n": [1, 2]}
    shown = settings._repr_mimebundle_()["text/markdown"]
    assert "**quick** (chosen)" in shown and "1, 2, 3" in shown
    with pytest.raises(ValueError, match="unknown profile of this chapter 'gpu'"):
        chapter("gpu").choose(table)
    with pytest.raises(ValueError, match="unknown profile 'qick'; did you mean 'quick'"):
        chapter("quick").choose({"qick": {}})
    with pytest.raises(ValueError, match="'standard' lacks the settings n"):
        chapter("quick").choose({"quick": {"n": 1}, "standard": {}})


def test_an_experiment_runs_what_is_missing_and_nothing_twice(chapter, tmp_path):
    grid = [{"n": 1}, {"n": 2}]
    first = chapter().experiment("acc", run, grid, seeds=range(2)).live
    assert calls == [(1, 0), (1, 1), (2, 0), (2, 1)]
    again = chapter().experiment("acc", run, [*grid, {"n": 3}], seeds=[0, 1]).live
    assert calls[4:] == [(3, 0), (3, 1)]
    pd.testing.assert_frame_equal(again.frame[:4], first.frame)
    assert first.frame["accuracy"].tolist() == [0.99, 0.991, 0.98, 0.981]
    assert list(first.frame.columns) == ["n", "seed", "wall_s", "core_s", "accuracy"]
    assert not (tmp_path / "evidence").exists(), "quick rows are no evidence to keep"


def test_rows_outside_the_current_grid_stay_in_the_file_and_off_the_page(chapter, tmp_path):
    chapter().experiment("acc", run, [{"n": 1}, {"n": 2}])
    live = chapter().experiment("acc", run, [{"n": 2}]).live
    assert live.frame["n"].tolist() == [2] and live.wanted == 1
    assert len(read(tmp_path / "build/evidence/toy/acc.quick.jsonl").rows) == 2


def test_a_quick_page_shows_the_recorded_standard_runs_beside_its_own(chapter, tmp_path):
    recording = chapter("standard").experiment("acc", run, [{"n": n} for n in (1, 2, 3)], seeds=range(5))
    assert [source.profile for source in recording.sources] == ["standard"]
    assert (tmp_path / "evidence/toy/acc.standard.jsonl").exists()
    experiment = chapter("quick").experiment("acc", run, [{"n": 1}], seeds=[7])
    live, recorded = experiment.sources
    assert (live.profile, len(live.frame), live.live) == ("quick", 1, True)
    assert (recorded.profile, len(recorded.frame), recorded.live) == ("standard", 15, False)
    assert experiment.best is recorded is experiment.recorded and experiment.live is live
    assert recorded.line().startswith(
        "Recorded at profile standard, 15 of 15 runs, 5 seeds, 0 core-seconds, "
    )
    assert live.line().startswith("Run at profile quick, 1 of 1 runs, 1 seed, ") and "torch 2" in live.line()


def test_an_unfinished_recording_says_how_much_is_there_and_is_not_the_best_source(chapter, tmp_path):
    chapter("standard").experiment("acc", run, [{"n": 1}, {"n": 2}])
    store = RowStore(tmp_path / "evidence/toy/acc.standard.jsonl", code="any")
    store.declare([{"n": n} for n in (1, 2, 3)], [0, 1], run="test_evidence_chapter.run")
    experiment = chapter("quick").experiment("acc", run, [{"n": 1}])
    assert "2 of 6 runs" in experiment.recorded.line()
    assert "4 runs were not executed yet." in experiment.recorded.line()
    assert experiment.best is experiment.live


def test_rows_of_older_code_are_shown_with_a_word_and_run_again_when_recording(chapter, tmp_path):
    path = tmp_path / "evidence/toy/acc.standard.jsonl"
    old = RowStore(path, code="0lder", provenance=chapter("standard").provenance)
    old.declare([{"n": 1}], [0], run="test_evidence_chapter.run")
    old.append(settings={"n": 1}, seed=0, result={"accuracy": 0.5}, wall_s=0, core_s=0)
    recorded = chapter("quick").experiment("acc", run, [{"n": 1}]).recorded
    assert (
        recorded.frame["accuracy"].tolist() == [0.5]
        and "1 run was recorded by older code." in recorded.line()
    )
    recorded = chapter("standard").experiment("acc", run, [{"n": 1}]).live
    assert recorded.frame["accuracy"].tolist() == [0.99] and "older" not in recorded.line()
    assert [row["result"]["accuracy"] for row in read(path).rows] == [0.5, 0.99], (
        "superseded, never rewritten"
    )


def test_failed_runs_are_counted_openly(chapter):
    toy = chapter()
    live = toy.experiment("acc", run, [{"n": 1}, {"n": 2, "fails": True}], seeds=range(3)).live
    assert (len(live.frame), live.failed, live.missing) == (3, 3, 0)
    assert "3 runs were recorded as failed." in live.line()
    verdict = toy.settle("toy/measured", live, 0.99, interval=(0.98, 1), n=3, control=0.1, note="Ours.")
    assert verdict.note == "Ours. 3 of 6 runs recorded as failed."


def test_a_damaged_recording_stops_the_page_that_would_show_it(chapter, tmp_path):
    chapter("standard").experiment("acc", run, [{"n": 1}])
    path = tmp_path / "evidence/toy/acc.standard.jsonl"
    path.write_text(path.read_text().replace("0.99", "1.0"))
    with pytest.raises(EvidenceError, match=r"acc.standard.jsonl, line 3: .*digest"):
        chapter("quick").experiment("acc", run, [{"n": 1}])


def test_inputs_are_recorded_by_digest(chapter, tmp_path):
    (tmp_path / "corpus.txt").write_text("abc")
    live = chapter(parameters={"model": "m"}).experiment(
        "acc", run, [{"n": 1}], inputs={"corpus": tmp_path / "corpus.txt"}
    ).live  # fmt: skip
    (made,) = live.provenance
    assert made["inputs"] == {"corpus": "ba7816bf8f01cfea"}  # SHA-256 of "abc", FIPS 180-2, first 16 digits
    assert made["parameters"] == {"model": "m"} and made["seeds"] == [0] and made["chapter"] == "toy"
    assert str(tmp_path) not in json.dumps(made)


@pytest.mark.parametrize(
    "grid, seeds", [([], [0]), ([{"n": 1}], []), ([{"n": 1}, {"n": 1}], [0]), ([{"n": 1}], [0, 0])]
)
def test_a_grid_that_is_empty_or_repeats_itself_is_refused(chapter, grid, seeds):
    with pytest.raises(ValueError, match="neither empty nor lists a run twice"):
        chapter().experiment("acc", run, grid, seeds=seeds)
    assert calls == []


def test_names_become_files_so_they_are_checked_and_taken_once(chapter):
    toy = chapter()
    toy.experiment("acc", run, [{"n": 1}])
    with pytest.raises(ValueError, match="has 'experiment acc' already"):
        toy.experiment("acc", run, [{"n": 1}])
    with pytest.raises(ValueError, match="lower case"):
        toy.experiment("../acc", run, [{"n": 1}])


def test_verdicts_are_written_as_they_come_and_start_afresh(chapter, tmp_path):
    toy = chapter()
    assert written(tmp_path)["verdicts"] == []
    toy.settle("toy/built", toy.live, 0, n=27, control=3)
    (entry,) = written(tmp_path)["verdicts"]
    assert (entry["claim"], entry["verdict"], entry["n"], entry["profile"]) == (
        "toy/built",
        "supported",
        27,
        "quick",
    )
    toy.settle("toy/measured", toy.live, 0.95, interval=(0.85, 0.99), n=30, control=0.1)
    assert [entry["verdict"] for entry in written(tmp_path)["verdicts"]] == ["supported", "inconclusive"]
    toy.close()
    chapter()
    assert written(tmp_path)["verdicts"] == []
    assert [path.name for path in (tmp_path / "build/claims").iterdir()] == ["toy.json"], (
        "no temporary file stays"
    )


def test_live_and_recorded_evidence_each_settle_a_claim_once(chapter):
    chapter("standard").experiment("acc", run, [{"n": 1}], seeds=range(3))
    toy = chapter("quick")
    for source in toy.experiment("acc", run, [{"n": 1}]).sources:
        verdict = toy.settle("toy/measured", source, 0.99, interval=(0.98, 1), n=3, control=0.1)
        assert verdict.profile == source.profile
        with pytest.raises(ValueError, match=f"settled already at profile '{source.profile}'"):
            toy.settle("toy/measured", source, 0.99, interval=(0.98, 1), n=3, control=0.1)
    assert [profile[:5] for profile in toy.verdicts().frame["from"]] == ["quick", "stand"]


def test_a_claim_must_be_declared_and_of_this_chapter(chapter):
    toy = chapter()
    with pytest.raises(ValueError, match="did you mean 'toy/built'"):
        toy.settle("toy/bild", toy.live, 0, n=1, control=1)
    with pytest.raises(ValueError, match="belongs to another chapter"):
        toy.settle("other/claim", toy.live, 0)


def test_a_verdict_says_on_how_many_inputs_it_stands(chapter):
    toy = chapter()
    for n in (None, 0):
        with pytest.raises(ValueError, match="say on how many inputs"):
            toy.settle("toy/built", toy.live, 0, n=n, control=1)
    assert chapter(name="other").settle("other/claim", toy.live, 0).verdict == "supported"


def test_closing_names_the_claims_that_were_left_open(chapter):
    toy = chapter()
    with pytest.raises(EvidenceError, match="toy/measured, toy/built"):
        toy.close()
    toy.not_attempted("toy/measured", "too large for this profile")
    with pytest.raises(EvidenceError, match="attempted: toy/built$"):
        toy.close()
    with pytest.raises(ValueError, match="say why"):
        toy.not_attempted("toy/built", " ")
    toy.settle("toy/built", toy.live, 0, n=1, control=1)
    toy.close()


@style()
def picture():
    fig, ax = plt.subplots()
    ax.plot([1, 2], [3, 4])
    ax.set(xlabel="points $n$", ylabel="accuracy")
    return Figure(fig, "It *rises* with $n$.", 'A line that rises from "3" to 4: steadily.')


def test_a_figure_carries_its_provenance_and_its_label(chapter, tmp_path):
    toy = chapter()
    live = toy.experiment("acc", run, [{"n": 1}], seeds=range(3)).live
    shown = toy.figure("rise", picture(), live)
    for kind in ("svg", "png"):
        facts = read_provenance(tmp_path / f"build/figures/toy/rise.{kind}")
        assert facts["chapter"] == "toy" and facts["figure"] == "rise" and facts["runs"] == 3
        assert facts["provenance"] == [dict(live.provenance[0])]
    lines = shown.markdown.splitlines()
    assert lines[:2] == ["```{figure} figures/toy/rise.svg", ":name: fig-toy-rise"]
    assert "It *rises* with $n$." in lines and live.line() in lines
    assert 'src="data:image/svg+xml;base64,' in shown.html and "&quot;3&quot;" in shown.html
    with pytest.raises(ValueError, match="has 'figure rise' already"):
        toy.figure("rise", picture(), live)


def test_the_figure_directive_is_read_by_myst_as_it_was_meant(chapter):
    from docutils import nodes
    from docutils.core import publish_doctree
    from myst_parser.docutils_ import Parser

    toy = chapter()
    text = toy.figure("rise", picture(), toy.live).markdown
    tree = publish_doctree(
        text, parser=Parser(), settings_overrides={"myst_enable_extensions": ["dollarmath"]}
    )
    (image,) = tree.findall(nodes.image)
    assert image["alt"] == 'A line that rises from "3" to 4: steadily.'
    assert image["classes"] == ["dark-light", "book-figure"]
    assert image["names"] == ["fig-toy-rise"]  # Sphinx moves the name from the image to its figure
    (caption,), (legend,) = tree.findall(nodes.caption), tree.findall(nodes.legend)
    assert caption.astext() == "It rises with n." and legend.astext() == toy.live.line()


def test_badges_and_tables_show_each_claim_with_a_word_not_only_a_colour(chapter):
    toy = chapter()
    toy.settle("toy/built", toy.live, 2, n=27, control=3)
    toy.not_attempted("toy/measured", "too large")
    for shown in (toy.badges(), toy.verdicts()):
        for text in (shown.markdown, shown.html):
            assert 'class="verdict verdict-not-supported"' in text and "not supported</span>" in text
            assert "not attempted</span>" in text
    assert "{cite}`someone2024`, Table 2" in toy.claims.markdown


def test_a_verdict_shows_the_numbers_that_made_it(chapter):
    toy = chapter()
    verdict = toy.settle("toy/measured", toy.live, 0.953, interval=(0.91, 0.99), n=30_000, control=0.125)
    said = verdict._repr_mimebundle_()["text/plain"]
    numbers = "0.953 [0.91, 0.99], n = 30,000; control 0.125."
    assert said == f"`measured` (profile `quick`): accuracy, claimed >= 0.9: {numbers}"


def test_a_sentence_for_a_meeting_stands_beside_the_verdict_on_its_claim(chapter):
    book = chapter()
    with pytest.raises(ValueError, match="unknown claim with a verdict 'toy/built'"):
        book.sentences({"toy/built": "It can be built."})
    book.settle("toy/built", book.live, 3, n=27, control=1)
    [row] = book.sentences({"toy/built": "It can be built."}).frame.to_dict("records")
    assert row["sentence"] == "It can be built." and "not supported" in row["verdict"]


def test_a_source_finds_runs_by_their_settings_and_an_absent_setting_is_none():
    runs = [{"arm": "a", "seed": 1}, {"arm": "a", "seed": 0, "width": 8}, {"arm": "b", "seed": 0}]
    source = Source(pd.DataFrame(runs), "quick", ())
    assert source.where(arm="a")["seed"].tolist() == [0, 1]
    assert source.where(arm="a", width=None)["seed"].tolist() == [1]
    assert source.where(arm="a", width=8)["seed"].tolist() == [0]
    assert source.where(depth=None, arm="b")["seed"].tolist() == [0]
    assert source.where(depth=2).empty and Source(pd.DataFrame(), "quick", ()).where(arm="a").empty
