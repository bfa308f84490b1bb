import json
import os

import nbformat
import pytest

from lib.pipeline import cache


def prints(toy, name="one", parameters=None):
    layout = toy.layout
    return cache.fingerprint(layout, layout.chapters[name], parameters or {})


def edit_notebook(toy, change):
    path = toy.root / "book/one.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def test_prose_is_not_part_of_the_key(toy):
    before = prints(toy)
    toy.edit_prose("one", "\n\nMore words.")
    toy.write("book/intro.md", "# Another introduction\n")
    assert cache.key(prints(toy)) == cache.key(before)


def test_outputs_left_by_hand_are_not_part_of_the_key(toy):
    before = prints(toy)
    edit_notebook(toy, lambda nb: nb.cells[1].update(execution_count=7))
    assert cache.key(prints(toy)) == cache.key(before)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("code cells", lambda toy: edit_notebook(toy, lambda nb: nb.cells[2].update(source="1"))),
        ("code cells", lambda toy: edit_notebook(toy, lambda nb: nb.cells[2].metadata.update(tags=["x"]))),
        ("lib", lambda toy: toy.write("lib/number.py", "NUMBER = 42\n")),
        ("lib", lambda toy: (toy.root / "lib/number.py").rename(toy.root / "lib/numeral.py")),
        ("lib", lambda toy: toy.write("lib/table.json", "[]")),
        ("requirements.txt", lambda toy: toy.write("requirements.txt", "scipy\n")),
        ("book/claims.toml", lambda toy: toy.write("book/claims.toml", "x = 1")),
        ("data/evidence/one/a.jsonl", lambda toy: toy.write("data/evidence/one/a.jsonl", "{}")),
        ("data/evidence/one/deep/a.jsonl", lambda toy: toy.write("data/evidence/one/deep/a.jsonl", "{}")),
    ],
)
def test_everything_that_outputs_depend_on_is_part_of_the_key(toy, what, change):
    before = prints(toy)
    change(toy)
    assert cache.changed(before, prints(toy)) == [what]
    assert cache.key(before) != cache.key(prints(toy))


def test_parameters_are_part_of_the_key(toy):
    assert cache.changed(prints(toy), prints(toy, parameters={"n": 4})) == ["parameters"]


def test_a_file_named_as_a_parameter_counts_by_its_content_and_a_model_by_its_presence(toy, monkeypatch):
    weights = toy.root / "mine.gguf"
    weights.write_bytes(b"one")
    before = prints(toy, parameters={"model": str(weights)})
    weights.write_bytes(b"two")
    assert cache.changed(before, prints(toy, parameters={"model": str(weights)})) == ["parameter model"]
    edit_notebook(toy, lambda nb: nb.metadata.update(book={"models": ["smollm2-135m"]}))
    monkeypatch.setattr("lib.models.pretrained.available", lambda name: False)
    absent = prints(toy)
    monkeypatch.setattr("lib.models.pretrained.available", lambda name: True)
    assert cache.changed(absent, prints(toy)) == ["model smollm2-135m"]


def test_where_runs_happen_is_not_part_of_the_key(toy):
    assert prints(toy, parameters={"n": 4, "jobs": 8, "backend": "dask"}) == prints(toy, parameters={"n": 4})


@pytest.mark.parametrize(
    "name",
    [
        "lib/__pycache__/number.pyc",
        "data/evidence/two/a.jsonl",
        "data/other.txt",
        "data/evidence/one/.a.standard.jsonl.lock",
    ],
)
def test_what_a_chapter_does_not_read_is_not_part_of_its_key(toy, name):
    before = prints(toy)
    toy.write(name, "anything")
    assert prints(toy) == before


def test_declared_reads_are_part_of_the_key_and_a_chapters_own_claims_are_not(toy):
    before = prints(toy, "summary")
    toy.write("build/claims/summary.json", "[]")
    assert prints(toy, "summary") == before
    toy.write("build/claims/one.json", "[]")
    assert cache.changed(before, prints(toy, "summary")) == ["build/claims/one.json"]


def test_a_run_may_add_to_its_own_evidence_and_to_nothing_else(toy):
    chapter, before = toy.layout.chapters["one"], prints(toy)
    toy.write("data/evidence/one/a.standard.jsonl", "{}")
    assert cache.settled(chapter, before, prints(toy))
    toy.write("lib/number.py", "NUMBER = 42\n")
    assert not cache.settled(chapter, before, prints(toy))


def stored(toy, parameters=None, seconds=1.0):
    layout = toy.layout
    chapter = layout.chapters["one"]
    found = cache.fingerprint(layout, chapter, parameters or {})
    notebook = nbformat.read(chapter.path, as_version=4)
    return layout, chapter, found, cache.keep(layout, chapter, found, notebook, {"seconds": seconds})


def test_an_entry_gives_back_notebook_figures_and_claims_and_nothing_of_another_run(toy):
    toy.write("build/figures/one/a.svg", "<svg/>")
    toy.write("build/claims/one.json", "[1]")
    layout, chapter, found, entry = stored(toy)
    toy.write("build/figures/one/stale.svg", "<svg/>")
    toy.write("build/claims/one.json", "[2]")
    again = cache.find(layout, chapter, found)
    cache.restore(layout, chapter, again)
    assert again.facts["seconds"] == 1.0 and again.notebook == entry.notebook
    assert [path.name for path in layout.figures("one").iterdir()] == ["a.svg"]
    assert layout.claims("one").read_text() == "[1]"


def test_an_entry_that_was_not_finished_is_not_found(toy):
    layout, chapter, found, entry = stored(toy)
    entry.folder.rename(entry.folder.with_name(f".part-{entry.folder.name}"))
    assert cache.find(layout, chapter, found) is None
    assert cache.newest(layout, chapter) is None


def test_only_the_entries_used_last_are_kept(toy):
    for i in range(cache.KEEP + 3):
        layout, chapter, _, entry = stored(toy, {"n": i}, seconds=i)
        os.utime(entry.folder, (i, i))
    folders = list((layout.cache / "one").iterdir())
    assert len(folders) == cache.KEEP
    kept = sorted(json.loads((folder / "entry.json").read_text())["seconds"] for folder in folders)
    assert kept == list(range(3, cache.KEEP + 3))
    assert cache.newest(layout, chapter).facts["seconds"] == cache.KEEP + 2
