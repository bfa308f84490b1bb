"""Jupyter Book itself, on toy books with the real configuration and theme. A build takes about 6 seconds."""

import json

import nbformat
import pytest

from lib.pipeline import render

GOOD = '<html><article><img src="a.svg" alt="Loss falls with width"></article></html>'


def write_site(folder, **pages):
    folder.mkdir(parents=True)
    for name in ("index", "one"):
        (folder / f"{name}.html").write_text(pages.get(name, GOOD))
    return folder


def test_a_good_site_has_no_problems(tmp_path):
    assert render.inspect_site(write_site(tmp_path / "site"), ["one"]) == []


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<article><img src="a.svg"></article>', "no alt text"),
        ('<article><img src="a.svg" alt="  "></article>', "no alt text"),
        ('<article><img src="_images/a.svg" alt="_images/a.svg"></article>', "file name for alt text"),
        ('<article><img src="x/a.svg" alt="../figures/a.svg"></article>', "file name for alt text"),
        ('<script src="https://cdn.example/x.js"></script>', "would fetch https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "would fetch //fonts.example"),
        ('<article><img src="http://a.example/x.png" alt="A picture"></article>', "must read offline"),
    ],
)
def test_a_page_with_a_flaw_is_named(tmp_path, page, problem):
    (found,) = render.inspect_site(write_site(tmp_path / "site", one=page), ["one"])
    assert found.startswith("one: ") and problem in found


def test_a_missing_page_is_named_even_if_the_tool_was_content(tmp_path):
    assert render.inspect_site(write_site(tmp_path / "site"), ["one", "two"]) == ["two.html was not written"]


def test_a_picture_outside_the_article_and_a_canonical_link_are_nobodys_business(tmp_path):
    page = '<link rel="canonical" href="https://a.example"><img src="logo.svg"><article></article>'
    assert render.inspect_site(write_site(tmp_path / "site", one=page), ["one"]) == []


def test_publishing_replaces_a_site_whole(tmp_path):
    old, new = write_site(tmp_path / "html"), write_site(tmp_path / "new", one="new")
    (old / "stale.html").touch()
    render.publish(new, old)
    assert sorted(path.name for path in old.iterdir()) == ["index.html", "one.html"]
    assert (old / "one.html").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["html"]


def test_a_publication_killed_between_its_renames_is_undone(tmp_path):
    write_site(tmp_path / "html.old")
    render.recover(tmp_path / "html")
    assert (tmp_path / "html/index.html").read_text() == GOOD
    assert not (tmp_path / "html.old").exists()


def test_another_major_version_of_jupyter_book_is_refused(toy, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.1.0")
    assert render.render(toy.layout) == [
        "jupyter-book is 2.1.0, which ignores _config.yml; `make book` installs ours"
    ]


@pytest.mark.slow
def test_a_book_is_rendered_whole_and_a_bad_page_leaves_it_in_place(toy, capsys):
    toy.add_theme()
    toy.edit_prose(
        "one", "## Theorem\n\n```{prf:theorem} Bound\n:label: thm\n$x^2 \\ge 0$\n```\n\nBy {prf:ref}`thm`."
    )
    assert toy.run("book") == 0, capsys.readouterr().out
    html = toy.root / "build/html"
    for page in ("intro", "one", "two", "summary", "bibliography"):
        assert (html / f"book/{page}.html").exists()
    assert "All is <strong>well</strong>" in (html / "book/intro.html").read_text()
    one = (html / "book/one.html").read_text()
    assert "number 41 3" in one  # a computed value: a green build of an empty book must not pass
    assert ">Theorem 2.1</a>" in one  # numbered within the second chapter, and referred to so
    download = nbformat.read(html / "_sources/book/one.ipynb", as_version=4)
    assert download.cells[2].outputs[0].text == "number 41 3\n"
    facts = json.loads((toy.root / "build/run.json").read_text())
    assert facts["site"] == "build/html/index.html" and facts["render_seconds"] > 0
    assert f"The book: {html / 'index.html'}" in capsys.readouterr().out

    toy.write("book/intro.md", "# Intro\n\nSee {numref}`nowhere`.\n")
    assert toy.run("book") == 1
    out = capsys.readouterr().out
    assert "book/intro.md:3: WARNING" in out and "nowhere" in out
    assert "All is <strong>well</strong>" in (html / "book/intro.html").read_text()


@pytest.mark.slow
def test_warnings_of_pages_without_results_do_not_fail_the_page_that_was_asked_for(toy, capsys):
    toy.add_theme()
    toy.edit_prose("two", "{glue:text}`never:.2f`")  # has its number only once it ran
    toy.edit_prose("one", "See {numref}`fig-of-two`.")
    assert toy.run("chapter", "one") == 0, capsys.readouterr().out
    assert "Not executed yet" in (toy.root / "build/html/book/two.html").read_text()

    toy.edit_prose("one", "\n\n```{nonsense}\n```\n")
    assert toy.run("chapter", "one") == 1
    assert "nonsense" in capsys.readouterr().out
