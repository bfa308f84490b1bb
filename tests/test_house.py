"""The house: imports of `lib` point one way, from later rooms to earlier ones, and nowhere in a circle."""

import ast

import pytest

from lib.paths import BOOK, ROOT

# Each floor may import from itself and from those above it in this list.
FLOORS = [
    {"paths", "choices"},
    {"tasks", "models"},
    {"metrics"},
    {"optimizers", "checkpoints", "training", "distributed", "model_axis", "sweeps"},
    {"experiments"},
    {"figures"},
    {"evidence"},
    {"pipeline"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "lib").rglob("*.py"))


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """The modules of lib that a file imports when it runs, at the top or inside a function."""
    tree, found = ast.parse(path.read_text()), set()
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    guards = [node for node in guards if "TYPE_CHECKING" in ast.dump(node.test)]
    for_types = {id(child) for node in guards for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lib":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lib"}
    return found & MODULES.keys()


MODULES = {module(path): path for path in FILES}
EDGES = {name: imported(path) for name, path in MODULES.items()}


def room(name):
    return name.split(".")[1] if "." in name else None


def test_every_file_lives_in_a_known_room():
    assert len(FILES) > 40
    assert {room(name) for name in MODULES} - {None} == FLOOR.keys()


@pytest.mark.parametrize("name", [name for name in MODULES if room(name)])
def test_a_room_imports_only_from_its_own_floor_and_those_before_it(name):
    upward = [other for other in EDGES[name] if room(other) and FLOOR[room(other)] > FLOOR[room(name)]]
    assert not upward, f"{name} imports {upward}"


def test_no_imports_run_in_a_circle():
    done = set()

    def visit(name, path):
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in EDGES[name] - {name}:
                visit(other, [*path, name])
            done.add(name)

    for name in EDGES:
        visit(name, [])
    assert done == MODULES.keys()


def test_nothing_in_lib_knows_a_chapter():
    """No code (docstrings may cite a page as their source) names a file of the book.

    A hyphenated name can mean nothing else; "linearity" alone is also a word, "linearity.ipynb" is not.
    """
    chapters = [path.stem for path in BOOK.glob("*.ipynb") if path.stem != "ledger"]
    assert chapters
    named = [name if "-" in name else f"{name}{end}" for name in chapters for end in (".ipynb", ".html", "/")]
    for path in FILES:
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                assert not any(name in node.value for name in named), f"{path.name}: {node.value!r}"
