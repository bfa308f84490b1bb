"""Which code made a row: a digest of the sources a function runs, blind to prose.

Comments, docstrings and blank lines do not count, so explaining a formula keeps its evidence valid, and
changing it does not. Positions come from the syntax tree and the tokenizer, so the digest is the same on
Python 3.11 to 3.13.

A process runs the code that it loaded, whatever became of the files since. So each process remembers the
sources as it first saw them, all of `lib` when this module is imported, and `loaded_digest` compares.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import os
import tokenize
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lib.evidence.files import EvidenceError
from lib.paths import ROOT

_first_seen: dict[Path, str] = {}  # sources as this process first saw them


def code_digest(run: Callable, *, root: Path = ROOT) -> str:
    """Digest of the module of `run` and of every `lib` module that it imports, directly or not.

    Imports are read from the source, so those inside functions count and computed ones do not. Raises
    ValueError for a function without a file, as one typed into a notebook: nothing could tell it changed.
    The files are read as they are now, which need not be what this process runs: see `loaded_digest`.
    """
    return _digest(*_place(run), root)


def loaded_digest(run: Callable, *, root: Path = ROOT) -> str:
    """The `code_digest` of what this process loaded, which makes the rows.

    Raises EvidenceError if the files say something else by now (explanations apart).
    """
    loaded = _digest(*_place(run), root, _seen)
    if code_digest(run, root=root) != loaded:
        raise EvidenceError(
            f"the code of {run.__module__}.{run.__qualname__} was edited after this process (number "
            f"{os.getpid()}) loaded it, so its rows would name code that did not make them: restart "
            "the kernel (or the workers), then run again"
        )
    return loaded


def _place(run: Callable) -> tuple[str, str, Path]:
    """Name, module and file of a function."""
    try:
        file = Path(inspect.getsourcefile(run) or "")
    except TypeError:
        file = Path()
    name = getattr(run, "__qualname__", repr(run))
    if not file.is_file():
        raise ValueError(
            f"{name} is in no file, so its rows could not be told from older ones; put it in lib/experiments/"
        )
    return name, run.__module__, file


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


def _now(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _seen(file: Path) -> str:
    """The source as this process first saw it."""
    file = file.resolve()
    if file not in _first_seen:
        _first_seen[file] = _now(file)
    return _first_seen[file]


def _digest(name: str, module: str, file: Path, root: Path, source: Callable[[Path], str] = _now) -> str:
    files = {module: file} | _imported(file, module, root, source)
    parts = [name] + [f"{module}\n{_normal(source(files[module]))}" for module in sorted(files)]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:16]


@cache
def lib_digest(root: Path = ROOT) -> str:
    """Digest of the whole package, as this process first saw it."""
    files = sorted((root / "lib").rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
    parts = [f"{file.relative_to(root).as_posix()}\n{_normal(_seen(file))}" for file in files]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:16]


def normal_source(file: Path) -> str:
    """The source without comments, docstrings and blank lines; other strings keep every character."""
    return _normal(_now(file))


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


def _imported(file: Path, module: str, root: Path, source: Callable[[Path], str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    waiting = [(file, module)]
    while waiting:
        importer, name = waiting.pop()
        for target in _targets(importer, name, source(importer)):
            path = _file_of(target, root, remembered=source is _seen)
            if path and target not in found:
                found[target] = path
                waiting.append((path, target))
    return found


def _targets(file: Path, module: str, text: str) -> frozenset[str]:
    """Dotted names that the source may import, with the packages above them, which run first."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return _imports(text, package)


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


def _file_of(module: str, root: Path, *, remembered: bool = False) -> Path | None:
    """The file of a module of `lib`; None where the name is not a module but something inside one.

    remembered: a file that this process saw counts although it is gone: its code is loaded.
    """
    base = root.joinpath(*module.split("."))
    files = (base / "__init__.py", base.with_suffix(".py"))
    seen = [file for file in files if remembered and file.resolve() in _first_seen]
    return next((file for file in (*seen, *files) if file in seen or file.is_file()), None)


for _file in (ROOT / "lib").rglob("*.py"):  # early: what is edited from now on is found out
    _seen(_file)
