import subprocess
import sys
import time

import pytest

from lib.pipeline.request import RequestError, parse, plan


def problems(toy, *, chapter=None, profile="quick", params=""):
    with pytest.raises(RequestError) as error:
        plan(toy.layout, chapter=chapter, profile=profile, params=params)
    return error.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("1e-3", 0.001),
        ("1_000", 1000),
        ("two", "two"),
        ("'2'", "2"),
        ("[1, 2]", [1, 2]),
        ("true", True),
        ("None", None),
        ("a/b.gguf", "a/b.gguf"),
        ("cuda:1", "cuda:1"),
        ("2026-11-22", "2026-11-22"),
        ("1+2j", "1+2j"),
        ("a=b", "a=b"),
    ],
)
def test_a_value_is_read_as_a_python_literal_or_else_as_text(text, value):
    quoted = f'x="{text}"'
    parsed, mistakes = parse(quoted)
    assert (parsed, mistakes) == ({"x": value}, [])
    assert type(parsed["x"]) is type(value)


@pytest.mark.parametrize("text", ["oops", "=3", "2a=3", "a=1 a=2", "profile=gpu", "a='1"])
def test_what_is_no_pair_of_name_and_value_is_a_mistake(text):
    assert len(parse(text)[1]) == 1


def test_every_mistake_is_told_at_once_with_the_nearest_match(toy):
    found = "\n".join(problems(toy, chapter="onee", profile="quik", params="device=cdua oops"))
    for part in ("'onee'; did you mean 'one'? Allowed: one, two, summary", "did you mean 'quick'?",
                 "did you mean 'cuda'?", "'oops'"):  # fmt: skip
        assert part in found


def test_an_unknown_parameter_is_refused_naming_those_there_are(toy):
    toy.chapter("one", ["1"], parameters="width = 3\ndepth = 2")
    (found,) = problems(toy, chapter="one", params="widht=4")
    assert "'widht'; did you mean 'width'? Allowed: depth, width" in found


def test_a_chapter_without_parameters_cell_takes_no_parameters(toy):
    toy.chapter("one", ["1"], parameters=None)
    assert "no cell tagged 'parameters'" in problems(toy, chapter="one", params="n=4")[0]
    assert "no parameter 'profile'" in problems(toy, chapter="one", profile="gpu")[0]


def test_with_all_chapters_a_parameter_goes_to_those_that_have_it(toy):
    toy.chapter("two", ["1"], parameters="width = 3")
    jobs = {
        job.chapter.name: job.parameters
        for job in plan(toy.layout, chapter=None, profile="quick", params="width=5")
    }
    assert jobs == {"one": {}, "two": {"width": 5}, "summary": {}}
    assert "'wide'" in problems(toy, params="wide=5")[0]


def test_only_what_differs_from_the_chapter_is_injected(toy):
    (job,) = plan(toy.layout, chapter="one", profile="quick", params="n=3")
    assert job.parameters == {}
    (job,) = plan(toy.layout, chapter="one", profile="standard", params="n=3.0")
    assert job.parameters == {"profile": "standard", "n": 3.0}


def test_a_page_of_the_contents_that_is_no_file_is_a_mistake(toy):
    (toy.root / "book/two.ipynb").unlink()
    assert "'book/two'" in problems(toy)[0]


def test_an_empty_chapter_is_a_mistake_of_the_chapter_command_only(toy, capsys):
    assert toy.run("chapter", "") == 2
    assert "Which chapter? As in CHAPTER=one; allowed: one, two, summary" in capsys.readouterr().err


def test_a_damaged_notebook_is_named_with_its_remedy_before_anything_runs(toy):
    (toy.root / "book/two.ipynb").write_text("{")
    assert "book/two.ipynb is not a notebook" in problems(toy)[0] and "git checkout" in problems(toy)[0]


def test_a_file_in_the_place_of_the_build_folder_is_named(toy, capsys):
    (toy.root / "build").write_text("in the way")
    assert toy.run("book") == 1
    assert "build" in (said := capsys.readouterr().err) and "needs a writable build/" in said


def test_mistakes_are_told_within_five_seconds_and_before_torch_or_sphinx_is_loaded(toy):
    code = f"""
import sys
from pathlib import Path
from lib.pipeline.__main__ import main
from lib.pipeline.layout import Layout
code = main(["chapter", "onee", "--profile", "quik"], layout=Layout(Path({str(toy.root)!r})))
assert not {{"torch", "sphinx", "papermill", "pandas"}} & set(sys.modules)
sys.exit(code)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "'onee'" in done.stderr and "'quik'" in done.stderr
    assert time.monotonic() - start < 5
    assert not (toy.root / "build").exists()
