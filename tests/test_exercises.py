"""Exercises: the hidden solution passes the check that follows it; the stub it replaces fails that check.

In a chapter, an exercise is a Markdown stub (```python) between `exercise-start` and `exercise-end`, code
cells between `solution-start` and `solution-end`, and the first code cell after that, which checks.
"""

import ast
import re
from dataclasses import dataclass

import nbformat
import pytest

from lib.pipeline.layout import Layout


@dataclass(frozen=True)
class Exercise:
    label: str
    imports: str
    stub: str
    solution: str
    check: str

    def holds(self, attempt: str) -> bool:
        """Whether `attempt` passes the check, in a namespace that has the chapter's imports and no more."""
        namespace = {"__name__": self.label}
        exec(self.imports, namespace)
        exec(attempt, namespace)
        try:
            exec(self.check, namespace)
        except AssertionError:
            return False
        return True


def exercises(path) -> list[Exercise]:
    """The exercises of a chapter, in order. Raises ValueError if a part of one is missing."""
    cells = nbformat.read(path, as_version=4).cells
    imports = "\n".join(
        cell.source for cell in cells if cell.cell_type == "code" and _only_imports(cell.source)
    )
    found = []
    label, inside, stub, solution = None, "", [], []
    for cell in cells:
        if cell.cell_type == "markdown":
            for line in re.split(r"(?=^`{3,}\{)", cell.source, flags=re.M):
                if mark := re.match(r"`{3,}\{(exercise|solution)-(start|end)\}\s*(\S*)", line):
                    inside = mark[1] if mark[2] == "start" else f"after {mark[1]}"
                    if mark[1] == "exercise" and mark[2] == "start":
                        label, stub, solution = _label(line), [], []
                if inside == "exercise":
                    stub += re.findall(r"^```python\n(.*?)^```", line, flags=re.M | re.S)
        elif inside == "solution":
            solution.append(cell.source)
        elif inside == "after solution" and solution:
            found.append(Exercise(label, imports, "\n".join(stub), "\n".join(solution), cell.source))
            inside = ""
    return found


def _label(directive: str) -> str:
    return re.search(r"^:label:\s*(\S+)", directive, flags=re.M)[1]


def _only_imports(source: str) -> bool:
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in body)


CHAPTERS = Layout().chapters
EXERCISES = [pytest.param(e, id=e.label) for chapter in CHAPTERS.values() for e in exercises(chapter.path)]


def test_every_exercise_of_the_first_chapter_has_stub_solution_and_check():
    source = CHAPTERS["one-layer-limits"].path.read_text()
    found = exercises(CHAPTERS["one-layer-limits"].path)
    assert len(found) == source.count("{exercise-start}") >= 4
    assert all(e.stub and e.solution and "assert" in e.check for e in found)


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_solution_passes_the_check(exercise):
    assert exercise.holds(exercise.solution)


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_stub_fails_the_same_check(exercise):
    assert not exercise.holds(exercise.stub)
