"""Which code made a row: a digest of the sources a function runs, blind to prose.

Comments, docstrings and blank lines do not count, so explaining a formula keeps its evidence valid, and
changing it does not. Positions come from the syntax tree and the tokenizer, so the digest is the same on
Python 3.11 to 3.13.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lib.paths import ROOT


def code_digest(run: Callable, *, root: Path = ROOT) -> str:
    """Digest of the module of `run` and of every `lib` module that it imports, directly or not.

    Imports are read from the source, so those inside functions count and computed ones do not. Raises
    ValueError for a function without a file, as one typed into a notebook: nothing could tell it changed.
    """
    try:
        file = Path(inspect.getsourcefile(run) or "")
    except TypeError:
        file = Path()
    name = getattr(run, "__qualname__", repr(run))
    if not file.is_file():
        raise ValueError(
            f"{name} is in no file, so its rows could not be told from older ones; put it in lib/experiments/"
        )
    return _digest(name, run.__module__, file, root)


def named_digest(run: str, *, root: Path = ROOT) -> str | None:
    """The `code_digest` of a function given as "lib.experiments.module.function", read without importing it.

    None if there is no such function.
    """
    module, _, name = run.rpartition(".")
    file = _file_of(module, root)
    if file is None:
        return None
    defined = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(node, "name")]
    return _digest(name, module, file, root) if any(node.name == name for node in defined) else None


def _digest(name: str, module: str, file: Path, root: Path) -> str:
    sources = {module: file} | _imported(file, module, root)
    parts = [name] + [f"{module}\n{normal_source(sources[module])}" for module in sorted(sources)]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:16]


@cache
def lib_digest(root: Path = ROOT) -> str:
    """Digest of the whole package, as it was when this process first asked."""
    files = sorted((root / "lib").rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
    parts = [f"{file.relative_to(root).as_posix()}\n{normal_source(file)}" for file in files]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:16]


def normal_source(file: Path) -> str:
    """The source without comments, docstrings and blank lines; other strings keep every character."""
    return _normal(file.read_text(encoding="utf-8"))


@cache  # by the text itself: an experiment asks again for every file, and an edited file is another text
def _normal(text: str) -> str:
    tree, lines = ast.parse(text), text.split("\n")
    verbatim = set()  # lines that end inside a string
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno > node.lineno:
            verbatim.update(range(node.lineno, node.end_lineno))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for docstring in _docstrings(tree):
        _blank(lines, docstring)
        verbatim.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    kept = [line if row in verbatim else line.rstrip() for row, line in enumerate(lines, start=1)]
    return "\n".join(line for row, line in enumerate(kept, start=1) if row in verbatim or line)


def _docstrings(tree: ast.Module) -> list[ast.Expr]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, owners) and ast.get_docstring(node) is not None
    ]


def _blank(lines: list[str], node: ast.AST) -> None:
    """Cut the text of `node` out of `lines`. Columns of the syntax tree count UTF-8 bytes."""
    first, last = node.lineno - 1, node.end_lineno - 1
    head = lines[first].encode()[: node.col_offset].decode()
    tail = lines[last].encode()[node.end_col_offset :].decode()
    lines[first : last + 1] = [head + tail] + [""] * (last - first)


def _imported(file: Path, module: str, root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    waiting = [(file, module)]
    while waiting:
        source, name = waiting.pop()
        for target in _targets(source, name):
            path = _file_of(target, root)
            if path and target not in found:
                found[target] = path
                waiting.append((path, target))
    return found


def _targets(file: Path, module: str) -> frozenset[str]:
    """Dotted names that the source may import, with the packages above them, which run first."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return _imports(file.read_text(encoding="utf-8"), package)


@cache
def _imports(text: str, package: str) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    parts = [name.split(".") for name in names]
    return frozenset(
        ".".join(name[:n]) for name in parts if name[0] == "lib" for n in range(1, len(name) + 1)
    )


def _file_of(module: str, root: Path) -> Path | None:
    """The file of a module of `lib`; None where the name is not a module but something inside one."""
    base = root.joinpath(*module.split("."))
    return next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)
