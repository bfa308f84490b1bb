import os
import socket
import subprocess
import sys
import time

import pytest

from lib.pipeline import build, request
from lib.pipeline.request import RequestError, parse, plan


def problems(toy, *, chapter=None, profile="quick", params="", **spread):
    with pytest.raises(RequestError) as error:
        plan(toy.layout, chapter=chapter, profile=profile, params=params, **spread)
    return error.value.problems


@pytest.fixture
def spread(toy):
    """Chapter "one" may spread its runs, the others may not."""
    toy.chapter("one", ["1"], parameters='jobs = "auto"\nbackend = "local"')
    return toy


@pytest.fixture
def installed(monkeypatch):
    """All packages for clusters, or the lack of them: installed(*names)."""

    def say(*names):
        monkeypatch.setattr(request.importlib.util, "find_spec", lambda name: name in names or None)

    say("joblib", "distributed", "ray")
    return say


@pytest.fixture
def answering():
    """The address of a port where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["tcp://here:port", "tcp://here", "tcp://:8786", "tcp://a:99999"])
def test_what_is_no_address_of_a_scheduler_is_refused(spread, installed, address):
    (found,) = problems(spread, backend="dask", scheduler=address)
    assert f"SCHEDULER={address} is no address" in found


def test_a_scheduler_that_does_not_answer_is_named_within_seconds(spread, installed, answering):
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    start = time.monotonic()
    (found,) = problems(spread, backend="dask", scheduler=gone)
    assert f"no scheduler answers at SCHEDULER={gone}" in found and time.monotonic() - start < 5
    assert plan(spread.layout, chapter="one", profile="quick", params="", backend="dask", scheduler=answering)


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


def test_jobs_and_backend_go_to_the_chapters_that_have_them(spread, installed, answering):
    asked = dict(chapter=None, profile="quick", params="", backend="dask", scheduler=answering, jobs="4")
    jobs = {job.chapter.name: job.parameters for job in plan(spread.layout, **asked)}
    assert jobs == {"one": {"jobs": 4, "backend": "dask"}, "two": {}, "summary": {}}


def test_jobs_may_stand_among_the_parameters_and_what_the_chapter_says_is_not_injected(spread, installed):
    (job,) = plan(spread.layout, chapter="one", profile="quick", params="jobs=4", backend="local")
    assert job.parameters == {"jobs": 4}
    (job,) = plan(spread.layout, chapter="one", profile="quick", params="", jobs="auto", scheduler=" ")
    assert job.parameters == {}


def test_a_chapter_that_spreads_nothing_takes_neither_jobs_nor_backend(spread, installed):
    found = problems(spread, chapter="two", jobs="2", backend="ray")
    assert len(found) == 2 and all("chapter 'two' does not have the parameter" in line for line in found)
    spread.chapter("one", ["1"])
    assert "no chapter has the parameter 'jobs'" in problems(spread, jobs="2")[0]


@pytest.mark.parametrize("jobs", ["0", "-1", "2.5", "many", "true"])
def test_jobs_is_a_number_of_runs_or_auto(spread, jobs):
    (found,) = problems(spread, jobs=jobs)
    assert "a whole number from 1, or auto" in found


def test_every_mistake_about_a_cluster_is_told_at_once(spread, installed):
    found = problems(spread, params="jobs=2", jobs="0", backend="daks", scheduler="localhost")
    assert "did you mean 'dask'?" in "\n".join(found)
    for part in ("'jobs' is given twice", "add BACKEND=dask", "tcp://", "from 1, or auto"):
        assert sum(part in line for line in found) >= 1, part


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_backend_that_is_not_installed_is_named_with_the_line_that_installs_it(
    spread, installed, backend, package
):
    installed("joblib")
    (found,) = problems(spread, backend=backend)
    assert f"backend {backend!r}" in found and "pip install -r requirements-cluster.txt" in found
    installed("joblib", package)
    assert plan(spread.layout, chapter="one", profile="quick", params="", backend=backend)


def test_a_scheduler_reaches_the_kernel_in_the_variable_that_dask_reads(
    spread, installed, answering, monkeypatch
):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://of-before:1")
    monkeypatch.setattr(build, "book", lambda *args: print(os.environ["DASK_SCHEDULER_ADDRESS"]) or 0)
    assert spread.run("book", "--backend", "dask", "--scheduler", answering) == 0
    assert os.environ["DASK_SCHEDULER_ADDRESS"] == answering


def test_only_what_differs_from_the_chapter_is_injected(toy):
    (job,) = plan(toy.layout, chapter="one", profile="quick", params="n=3")
    assert job.parameters == {}
    (job,) = plan(toy.layout, chapter="one", profile="standard", params="n=3.0")
    assert job.parameters == {"profile": "standard", "n": 3.0}


def test_the_path_of_a_model_is_made_absolute_and_must_lead_somewhere(toy, monkeypatch):
    toy.chapter("one", ["1"], parameters='model = "auto"')
    monkeypatch.chdir(toy.root)
    toy.write("mine.gguf", "weights")
    (job,) = plan(toy.layout, chapter="one", profile="quick", params="model=mine.gguf")
    assert job.parameters["model"] == str(toy.root / "mine.gguf")
    (job,) = plan(toy.layout, chapter="one", profile="quick", params="model=org/name")
    assert job.parameters["model"] == "org/name"
    (found,) = problems(toy, chapter="one", params="model=other.gguf")
    assert found == f"model=other.gguf: no such file or folder, looked for from {toy.root}"


def test_so_is_that_of_a_corpus_and_of_its_tokenizer(toy, monkeypatch):
    toy.chapter("one", ["1"], parameters='corpus = "none"\ntokenizer = "austen"')
    monkeypatch.chdir(toy.root)
    toy.write("book.txt", "words")
    (job,) = plan(toy.layout, chapter="one", profile="quick", params="corpus=book.txt tokenizer=a/b")
    assert job.parameters == {"corpus": str(toy.root / "book.txt"), "tokenizer": "a/b"}
    found = problems(toy, chapter="one", params="corpus=nope.txt tokenizer=./nothing")
    assert [line.partition(":")[0] for line in found] == ["corpus=nope.txt", "tokenizer=./nothing"]


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
