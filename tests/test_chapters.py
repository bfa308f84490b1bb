"""The notebooks as sources: what nbmake runs, what papermill may be told, what a commit may hold."""

import ast
import re
import subprocess
import sys
import time

import nbformat
import papermill
import pytest

from lib.paths import BOOK, ROOT
from lib.pipeline.layout import Layout

LAYOUT = Layout()
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_every_page_is_in_the_table_of_contents_once_and_there_is_a_chapter():
    files = {path.relative_to(ROOT).with_suffix("").as_posix() for path in [*NOTEBOOKS, *BOOK.glob("*.md")]}
    assert sorted(LAYOUT.pages) == sorted(files)
    assert "one-layer-limits" in LAYOUT.chapters


@pytest.mark.slow
def test_nbmake_collects_every_chapter():
    command = [sys.executable, "-m", "pytest", "--nbmake", "--collect-only", "-q", str(BOOK)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    collected = re.findall(r"(\S+)\.ipynb::", done.stdout)
    assert len(collected) == len(LAYOUT.chapters) == len(NOTEBOOKS), done.stdout + done.stderr


@every_notebook
def test_a_notebook_is_committed_without_outputs(path):
    cells = code_cells(path)
    assert cells
    assert [i for i, cell in enumerate(cells) if cell.outputs or cell.execution_count] == []


@every_notebook
def test_a_notebook_is_valid_and_names_our_kernel(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@every_notebook
def test_papermill_sees_every_parameter_and_profile_is_the_first(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) <= 1
    assigned = []
    for statement in ast.parse(tagged[0].source).body if tagged else []:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        assert len(targets) == 1 and isinstance(targets[0], ast.Name), "one plain assignment a line"
        assigned.append(targets[0].id)
    assert list(papermill.inspect_notebook(str(path))) == assigned
    assert assigned[:1] in ([], ["profile"])


@every_notebook
def test_cells_are_short_and_plain_python(path):
    for cell in code_cells(path):
        ast.parse(cell.source)  # a magic or a shell command is no Python
        assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= 15, cell.source


@every_notebook
def test_no_cell_knows_a_place_on_a_disk(path):
    for cell in code_cells(path):
        assert not re.search(r"""["'](\.\./|/home/|/tmp/|~/|[A-Z]:\\)""", cell.source), cell.source


def test_misspelling_chapter_and_profile_is_told_at_once_and_quickly():
    start = time.monotonic()
    command = [sys.executable, "-m", "lib.pipeline", "chapter", "one-layer-limit", "--profile", "quik"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'one-layer-limits'?" in done.stderr and "did you mean 'quick'?" in done.stderr
    assert time.monotonic() - start < 5
