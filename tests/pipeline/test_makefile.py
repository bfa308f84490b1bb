"""The front door, in a copy of the checkout's top: nothing is installed, the recipes meet stand-ins."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lib.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout, *arguments):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=checkout, capture_output=True, text=True, env=clean)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_make_alone_lists_every_target_and_creates_nothing(checkout):
    done = make(checkout)
    listed = {line.split()[0] for line in done.stdout.splitlines()[2:]}
    assert listed == {
        "help",
        "book",
        "chapter",
        "evidence",
        "test",
        "bench",
        "provenance",
        "serve",
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


def calls(checkout):
    return [line for line in (checkout / "calls").read_text().splitlines() if line != "-c||"]


def test_a_target_that_is_set_up_installs_nothing(ready):
    assert make(ready, "book").returncode == 0
    assert calls(ready) == ["-m|lib.pipeline|book|--profile|quick|--params||"]


def test_touching_the_requirements_installs_nothing_and_changing_them_does(ready):
    (ready / "requirements.txt").touch()
    make(ready, "lint")
    assert not any("pip" in call for call in calls(ready))
    (ready / "requirements.txt").write_text("numpy\n")
    make(ready, "lint")
    assert sum("pip|install" in call for call in calls(ready)) == 1
    make(ready, "lint")
    assert sum("pip|install" in call for call in calls(ready)) == 1


def test_what_a_reader_types_arrives_as_typed(ready):
    make(ready, "chapter", "CHAPTER=one", "PROFILE=gpu", "PARAMS=model='a b' n=$$HOME;x")
    assert calls(ready) == ["-m|lib.pipeline|chapter|one|--profile|gpu|--params|model='a b' n=$HOME;x|"]


def test_clean_keeps_the_environment_and_the_evidence(ready):
    (ready / "build/cache").mkdir(parents=True)
    (ready / "data/evidence").mkdir(parents=True)
    make(ready, "clean")
    assert not (ready / "build").exists()
    assert (ready / ".venv").exists() and (ready / "data/evidence").exists()


def test_tests_cover_library_doctests_chapters_and_their_own_folder(ready):
    make(ready, "test")
    (call,) = calls(ready)
    assert "--nbmake|" in call and "--doctest-modules|" in call and call.endswith("|tests|lib|book|")
