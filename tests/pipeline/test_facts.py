import pytest

from lib import sweeps
from lib.evidence.rows import RowStore
from lib.pipeline import ahead, facts, request
from lib.pipeline.request import Job

MADE = {
    "device": "CPU",
    "machine": {"cpu": "Toy CPU", "cores": 3, "system": "Linux"},
    "python": "3.12.0",
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
}


def record(toy, experiment="sums", profile="standard", runs=3, planned=4, fails=0, core_s=90.0, made=MADE):
    """A file of rows as a chapter leaves it: the first `fails` of `runs` failed."""
    path = toy.root / f"data/evidence/one/{experiment}.{profile}.jsonl"
    store = RowStore(path, code="c", provenance=made)
    store.declare([{"n": 2}], list(range(planned)), run="lib.experiments.gone.run")
    for seed in range(runs):
        failed = "RuntimeError: told to" if seed < fails else None
        result = None if failed else {"x": 1.0}
        store.append(settings={"n": 2}, seed=seed, result=result, wall_s=1, core_s=core_s, failed=failed)


def lines(table):
    """The cells of a Markdown table, without rules and fences."""
    found = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in found]


def test_recorded_evidence_is_counted_from_its_rows(toy):
    record(toy, runs=3, planned=4, fails=1)
    record(toy, "sums", "gpu", runs=1, planned=1, made=MADE | {"device": "Toy GPU"})
    head, standard, gpu = lines(facts.experiments(facts.recorded(toy.layout.evidence)))
    assert head[:4] == ["experiment", "profile", "runs", "core-minutes"]
    assert standard[:4] == ["one: sums", "standard", "2 of 4, 1 failed", "3.0"]
    assert standard[4:6] == ["Toy CPU (3 cores)", "Python 3.12.0, torch 2.13.0, numpy 2.4.6"]
    assert gpu[1] == "gpu" and gpu[4] == "Toy GPU, Toy CPU (3 cores)"
    assert len(standard[6]) == len("2026-11-22")


def test_of_a_run_recorded_twice_the_newer_row_counts(toy):
    record(toy, runs=2, planned=2, fails=2)
    record(toy, runs=2, planned=2, core_s=30.0)
    (one,) = facts.recorded(toy.layout.evidence)
    assert (one.runs, one.failed, one.core_s) == (2, 0, 60.0)


def test_damaged_lines_do_not_stop_a_page(toy):
    record(toy, runs=2, planned=2)
    path = toy.root / "data/evidence/one/sums.standard.jsonl"
    path.write_text(path.read_text().replace('"seed":1', '"seed":7'))
    assert facts.recorded(toy.layout.evidence)[0].runs == 1


def test_without_evidence_the_page_says_how_to_make_some(toy):
    assert "`make evidence` records it" in facts.experiments(facts.recorded(toy.layout.evidence))


def test_executions_are_told_with_their_profile_time_and_state():
    run = {"profile": "quick", "seconds": 63.4, "finished": "2026-11-22T04:00:00+00:00"}
    table = facts.chapters({"one": run | {"state": "reused"}, "two": {"state": "not executed"}})
    assert lines(table)[1:] == [
        ["[one](one.ipynb)", "quick", "63.4 s", "2026-11-22", "up to date"],
        ["[two](two.ipynb)", "–", "–", "–", "not executed"],
    ]


def test_every_profile_is_told_also_one_that_nobody_measured(toy):
    record(toy, runs=4, planned=4)
    run = {"profile": "quick", "seconds": 63.4, "finished": "2026-11-22T04:00:00+00:00", "state": "reused"}
    table = facts.profiles({"one": run}, facts.recorded(toy.layout.evidence))
    assert [row[:3] for row in lines(table)[1:]] == [
        ["quick", "one", "63.4 s"],
        ["standard", "one", "6 core-minutes"],
        ["gpu", "–", "not measured yet"],
        ["cluster", "–", "not measured yet"],
    ]


def test_this_machine_is_described_without_naming_it():
    table = dict(lines(facts.machine())[1:])
    assert int(table["cores this build may use"]) >= 1 and "GiB" in table["memory"]
    assert "torch 2." in table["packages"] and "distributed" in table["packages"]
    assert not {"host", "user"} & set(table)


@pytest.mark.slow
def test_a_build_puts_the_tables_where_pages_can_include_them(toy, no_sphinx):
    toy.write("_toc.yml", "root: book/intro\nchapters: [{file: book/one}, {file: book/two}]\n")
    assert toy.run("chapter", "one", "--profile", "standard") == 0
    book = toy.root / "build/executed/book"
    one, two = lines((book / "execution-chapters.md").read_text())[1:]
    assert one[1] == "standard" and float(one[2].removesuffix(" s")) > 0 and two[4] == "not executed"
    first = {path.name: path.read_text() for path in book.glob("execution-*.md")}
    assert len(first) == 4
    assert toy.run("chapter", "one", "--profile", "standard") == 0  # reused now: equal inputs, equal pages
    assert {path.name: path.read_text() for path in book.glob("execution-*.md")} == first


def job(toy, **parameters):
    return Job(toy.layout.chapters["one"], "standard", {"profile": "standard"} | parameters)


def test_before_a_recording_it_is_told_what_is_recorded_and_how_long_the_rest_takes(toy):
    record(toy, runs=3, planned=4, core_s=60.0)
    told = ahead.told(toy.layout, [job(toy, jobs=2), Job(toy.layout.chapters["two"], "standard", {})])
    assert "one, 2 runs at a time:\n  sums: 3 of 4 planned runs recorded, 1 missing; about 60 s" in told
    assert "two: nothing is recorded yet" in told
    assert "on dask as many as it has workers" in ahead.told(toy.layout, [job(toy, backend="dask")])


def test_a_recording_that_was_stopped_names_its_file_and_what_that_holds(toy):
    record(toy, runs=3, planned=4, fails=1)
    assert ahead.recorded(toy.layout, job(toy), "sums") == (
        "data/evidence/one/sums.standard.jsonl: 2 of 4 planned runs recorded, 1 failed, 1 missing."
    )


def test_damaged_evidence_is_told_before_anything_runs(toy, capsys):
    record(toy)
    path = toy.root / "data/evidence/one/sums.standard.jsonl"
    path.write_text(path.read_text().replace('"seed":1', '"seed":7'))
    assert toy.run("evidence", "one") == 2
    assert "sums.standard.jsonl, line" in capsys.readouterr().err


def test_the_backends_are_those_of_the_sweeps():
    assert set(request.BACKENDS) == set(sweeps.BACKENDS)
