import importlib.util
import inspect

import pytest

from lib.evidence.code import code_digest, normal_source

RUN = '''
"""What it does."""
from lib.middle import double


def run(settings, *, seed):
    """One run."""
    return {"y": double(settings["x"])}  # twice


def other(settings, *, seed):
    return {"y": 0}
'''
FILES = {
    "lib/__init__.py": "",
    "lib/middle.py": "from .deep import factor\n\ndef double(x):\n    return factor.TWO * x\n",
    "lib/deep/__init__.py": "from lib.deep import factor\n",
    "lib/deep/factor.py": "TWO = 2\n",
    "lib/apart.py": "UNUSED = 1\n",
}


@pytest.fixture
def tree(tmp_path):
    """A little package and a function to run; -> digest(changed files) -> str."""

    def digest(changes=None, name="run"):
        for path, text in {"run_it.py": RUN, **FILES, **(changes or {})}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("run_it", tmp_path / "run_it.py")
        code = compile(inspect.cleandoc("def run(): pass\ndef other(): pass"), tmp_path / "run_it.py", "exec")
        names = {"__name__": spec.name}
        exec(code, names)  # functions that say where they come from; their imports are only read
        return code_digest(names[name], root=tmp_path)

    return digest


@pytest.mark.parametrize(
    "path, text",
    [
        ("run_it.py", RUN.replace("What it does.", "What it does, at length.\n\nWith a blank line.")),
        ("run_it.py", RUN.replace('    """One run."""\n', "")),
        ("run_it.py", RUN.replace("# twice", "# two times")),
        ("run_it.py", RUN.replace("def run", "# a comment\n\n\ndef run")),
        ("lib/deep/factor.py", "# why two\n\nTWO = 2   \n"),
        ("lib/apart.py", "UNUSED = 2\n"),
    ],
)
def test_prose_and_modules_that_are_not_imported_keep_rows_valid(tree, path, text):
    assert tree() == tree({path: text})


@pytest.mark.parametrize(
    "path, text",
    [
        ("run_it.py", RUN.replace('"y": double', '"z": double')),
        ("lib/middle.py", FILES["lib/middle.py"].replace("* x", "+ x")),
        ("lib/deep/factor.py", "TWO = 3\n"),
        ("lib/deep/__init__.py", "from lib.deep import factor\nfactor.TWO = 3\n"),
        ("lib/__init__.py", "import lib.apart\n"),
    ],
)
def test_a_changed_formula_makes_rows_stale_wherever_it_stands(tree, path, text):
    assert tree() != tree({path: text})


def test_two_functions_of_one_module_are_told_apart(tree):
    assert tree(name="run") != tree(name="other")


def test_a_circle_of_imports_ends(tree):
    assert tree({"lib/deep/factor.py": "import lib.middle\nTWO = 2\n"})


def test_a_function_without_a_file_is_refused():
    names = {}
    exec("def run(settings, *, seed): return {}", names)
    for run in (names["run"], len):
        with pytest.raises(ValueError, match="put it in lib/experiments/"):
            code_digest(run)


def test_strings_over_several_lines_keep_what_looks_like_prose(tmp_path):
    path = tmp_path / "text.py"
    path.write_text('"""Doc."""\nA = """ \n# not a comment\n\n  end  \n"""  # a comment\n\nB = "# kept"\n')
    assert normal_source(path) == 'A = """ \n# not a comment\n\n  end  \n"""\nB = "# kept"'


def test_columns_of_docstrings_count_bytes_and_those_of_comments_characters(tmp_path):
    path = tmp_path / "greek.py"
    path.write_text('def f(): "ρ"; λ = "µ"; return λ  # ρ\nclass C:\n    """λ"""; x = 1\n', encoding="utf-8")
    assert normal_source(path) == 'def f(): ; λ = "µ"; return λ\nclass C:\n    ; x = 1'
