"""The front door, in a copy of the checkout's top: nothing is installed, the recipes meet stand-ins."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lib.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def make(checkout, *arguments):
    return subprocess.run(
        ["make", *arguments], cwd=checkout, capture_output=True, text=True, env=environment()
    )


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_make_alone_lists_every_target_and_creates_nothing(checkout):
    done = make(checkout)
    listed = {line.split()[0] for line in done.stdout.partition("\n\n")[2].splitlines()}
    assert listed == {
        "help",
        "book",
        "chapter",
        "evidence",
        "repeat",
        "test",
        "bench",
        "provenance",
        "serve",
        "models",
        "lint",
        "clean",
    }
    assert not (checkout / ".venv").exists()


def test_a_missing_python_is_named_with_what_to_do(checkout):
    done = make(checkout, "book", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "No 'no-such-python' on the path" in done.stderr and "make PYTHON=" in done.stderr


def test_an_old_python_is_refused_with_its_version(checkout):
    runs_but_is_old = '[ "$1" = -V ] && echo "Python 3.9.1" && exit 0\n[ -z "$2" ] && exit 0\nexit 1'
    old = script(checkout / "bin/python3", runs_but_is_old)
    done = make(checkout, "book", f"PYTHON={old}")
    assert done.returncode != 0
    assert "Python 3.9.1" in done.stderr and "3.11 or later" in done.stderr


def test_a_python_without_venv_is_refused(checkout):
    bare = script(checkout / "bin/python3", 'case "$2" in *ensurepip*) exit 1;; esac')
    done = make(checkout, "book", f"PYTHON={bare}")
    assert done.returncode != 0 and "no venv module" in done.stderr


@pytest.fixture
def ready(checkout):
    """A .venv whose python writes down what it is asked to do."""
    script(checkout / ".venv/bin/python", f'printf "%s|" "$@" >> {checkout}/calls; echo >> {checkout}/calls')
    assert make(checkout, "install").returncode == 0
    (checkout / "calls").unlink()
    return checkout


NOWHERE = "--jobs||--backend||--scheduler||"  # what a reader did not ask for arrives empty


def calls(checkout):
    return [line for line in (checkout / "calls").read_text().splitlines() if line != "-c||"]


def test_a_target_that_is_set_up_installs_nothing(ready):
    assert make(ready, "book").returncode == 0
    assert calls(ready) == [f"-m|lib.pipeline|book|--profile|quick|--params||{NOWHERE}"]


def test_touching_the_requirements_installs_nothing_and_changing_them_does(ready):
    (ready / "requirements.txt").touch()
    make(ready, "lint")
    assert not any("pip" in call for call in calls(ready))
    (ready / "requirements.txt").write_text("numpy\n")
    make(ready, "lint")
    assert sum("pip|install" in call for call in calls(ready)) == 1
    make(ready, "lint")
    assert sum("pip|install" in call for call in calls(ready)) == 1


def test_an_installation_tries_the_pretrained_model_once_and_goes_on_without_it(checkout):
    log = f'printf "%s|" "$@" >> {checkout}/calls; echo >> {checkout}/calls'
    script(checkout / ".venv/bin/python", f'{log}\n[ "$2" != lib.models.pretrained ]')
    for target in ("install", "setup", "lint"):
        done = make(checkout, target)
        assert done.returncode == 0
        assert ("Later: make models" in done.stderr) == (target == "install")
    assert calls(checkout).count("-m|lib.models.pretrained|") == 1
    assert make(checkout, "models").returncode != 0, "asked for by name, a failure is one"


def test_the_pretrained_model_can_be_left_out_or_another_one_fetched(ready):
    assert make(ready, "install", "PRETRAINED=no").returncode == 0
    assert not any("pretrained" in call for call in calls(ready))
    make(ready, "models", "MODELS=a/b c/d")
    assert calls(ready)[-1] == "-m|lib.models.pretrained|a/b|c/d|"


def test_what_a_reader_types_arrives_as_typed(ready):
    make(ready, "chapter", "CHAPTER=one", "PROFILE=gpu", "PARAMS=model='a b' n=$$HOME;x")
    (call,) = calls(ready)
    assert call == f"-m|lib.pipeline|chapter|one|--profile|gpu|--params|model='a b' n=$HOME;x|{NOWHERE}"


def test_where_runs_happen_arrives_too(ready):
    make(ready, "evidence", "CHAPTER=one", "BACKEND=dask", "SCHEDULER=tcp://a:1", "JOBS=4")
    assert calls(ready) == [
        "-m|lib.pipeline|evidence|one|--params||--jobs|4|--backend|dask|--scheduler|tcp://a:1|"
    ]


def test_runs_are_repeated_of_one_chapter_or_of_all(ready):
    make(ready, "repeat")
    make(ready, "repeat", "CHAPTER=one", "RUNS=3")
    assert calls(ready) == [f"-m|lib.evidence|repeat|{what}|" for what in ("all|--runs|2", "one|--runs|3")]


def test_clean_keeps_the_environment_and_the_evidence(ready):
    (ready / "build/cache").mkdir(parents=True)
    (ready / "data/evidence").mkdir(parents=True)
    make(ready, "clean")
    assert not (ready / "build").exists()
    assert (ready / ".venv").exists() and (ready / "data/evidence").exists()


def test_tests_cover_library_doctests_chapters_and_their_own_folder(ready):
    make(ready, "test")
    *_, call = calls(ready)
    assert "--nbmake|" in call and "--doctest-modules|" in call and call.endswith("|tests|lib|book|")


def test_tests_install_dask_where_it_is_missing_and_pin_it_in_one_place(checkout):
    log = f'printf "%s|" "$@" >> {checkout}/calls; echo >> {checkout}/calls'
    missing = '[ "$2" = "import distributed" ] && exit 1\nexit 0'
    script(checkout / ".venv/bin/python", f"{log}\n{missing}")
    assert make(checkout, "install").returncode == 0
    (checkout / "calls").unlink()
    assert make(checkout, "test").returncode == 0
    (install,) = [call for call in calls(checkout) if "pip|install" in call]
    assert install.endswith("|-c|requirements-cluster.txt|distributed|")


def test_sigterm_reaches_what_make_started(ready):
    """Without `exec` in the recipe the shell between them dies, and its child goes on alone."""
    stop = ready / "stopped"
    script(
        ready / ".venv/bin/python",
        f"[ \"$1\" = -m ] || exit 0\ntrap 'touch {stop}; exit 143' TERM\ntouch {ready}/started\n"
        "while true; do sleep 0.05; done",
    )
    process = subprocess.Popen(["make", "book"], cwd=ready, env=environment(), stderr=subprocess.DEVNULL)
    wait_for(ready / "started")
    process.send_signal(signal.SIGTERM)
    wait_for(stop)
    assert process.wait(10) != 0
