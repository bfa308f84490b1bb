import subprocess
import sys

import matplotlib.pyplot as plt
import pytest

from lib.evidence.__main__ import main
from lib.evidence.rows import RowStore, withdraw
from lib.figures import Figure, style

CLAIM = """
[[claim]]
id = "toy/bound"
says = "It is bounded."
kind = "theorem"
source = "someone2024"
locator = "Theorem 1"
quantity = "counterexamples"
unit = "inputs"
holds = "== 0"
tests = ["tests/test_toy.py::test_it"]
"""


@pytest.fixture
def root(tmp_path):
    for folder in ("book", "tests", "data/evidence/toy"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "book/claims.toml").write_text(CLAIM)
    (tmp_path / "book/references.bib").write_text("@article{someone2024,\n}\n")
    (tmp_path / "tests/test_toy.py").write_text("def test_it():\n    pass\n")
    for name in ("first", "second"):
        store = RowStore(tmp_path / f"data/evidence/toy/{name}.standard.jsonl", code="c")
        store.append(settings={"n": 1}, seed=0, result={"y": 0.5}, wall_s=0, core_s=0)
    return tmp_path


def test_check_is_content_with_whole_files(root, capsys):
    assert main(["check"], root=root) == 0
    said = capsys.readouterr().out
    assert (
        "data/evidence/toy/first.standard.jsonl: 1 rows, 0 of them failed" in said and "No problems." in said
    )


def test_check_names_the_damaged_file_and_line_and_still_reads_the_others(root, capsys):
    path = root / "data/evidence/toy/first.standard.jsonl"
    path.write_text(path.read_text().replace("0.5", "0.6") + '{"torn')
    assert main(["check"], root=root) == 1
    said = capsys.readouterr()
    assert "PROBLEM data/evidence/toy/first.standard.jsonl, line 2: its content does not match" in said.err
    assert "lib.evidence mend" in said.err
    assert "first.standard.jsonl: 0 rows, 0 of them failed; an unfinished last line" in said.out
    assert "second.standard.jsonl: 1 rows" in said.out


def test_check_counts_the_planned_runs_that_are_missing_or_failed(root, capsys):
    path = root / "data/evidence/toy/first.standard.jsonl"
    store = RowStore(path, code="c")
    store.declare([{"n": 1}, {"n": 2}, {"n": 3}], [0], run="lib.toy.run")
    store.append(settings={"n": 2}, seed=0, result=None, wall_s=0, core_s=0, failed="ValueError")
    assert main(["check"], root=root) == 0
    said = capsys.readouterr().out
    assert (
        "first.standard.jsonl: 2 rows, 1 of them failed; 1 of 3 planned runs recorded, 1 failed, 1 missing"
        in said
    )
    assert "second.standard.jsonl: 1 rows, 0 of them failed; no plan" in said
    withdraw(path)
    main(["check"], root=root)
    assert "first.standard.jsonl: 2 rows, 1 of them failed; no plan" in capsys.readouterr().out


def test_check_asks_for_a_newer_checkout_where_a_file_is_of_another_schema(root, capsys, monkeypatch):
    path = root / "data/evidence/toy/first.standard.jsonl"
    monkeypatch.setattr("lib.evidence.rows.SCHEMA", 2)
    RowStore(root / "new.jsonl", code="c").declare([{"n": 1}], [0], run="lib.toy.run")
    monkeypatch.undo()
    path.write_bytes((root / "new.jsonl").read_bytes())
    assert main(["check"], root=root) == 1
    said = capsys.readouterr()
    assert "first.standard.jsonl, line 1: it is of schema 2" in said.err and "mend" not in said.err
    assert "second.standard.jsonl: 1 rows" in said.out


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("tests/test_toy.py", "test_it", "test_other", "there is no tests/test_toy.py::test_it"),
        ("book/references.bib", "someone2024", "other", "references.bib has no 'someone2024'"),
        ("book/claims.toml", "holds", "hold", "did you mean 'holds'"),
    ],
)
def test_check_finds_claims_that_name_what_does_not_exist(root, capsys, file, old, new, message):
    (root / file).write_text((root / file).read_text().replace(old, new))
    assert main(["check"], root=root) == 1
    assert message in capsys.readouterr().err


def test_figure_prints_the_provenance_inside_a_file(tmp_path, capsys):
    with style():
        fig, ax = plt.subplots()
        ax.set(xlabel="x", ylabel="y")
        paths = Figure(fig, "A caption.", "An empty plot.").save(tmp_path, "toy", {"profile": "quick"})
    for path in paths.values():
        assert main(["figure", str(path)]) == 0
        assert '"profile": "quick"' in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, text", [("a.svg", "<svg/>"), ("b.svg", "no xml"), ("c.png", "no png"), ("d.txt", "x")]
)
def test_figure_refuses_a_file_without_provenance(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    assert main(["figure", str(tmp_path / name)]) == 1
    assert name in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["chek"])
    assert stop.value.code == 2 and "check" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_start_without_torch_and_without_matplotlib():
    code = "import sys, lib.evidence.__main__; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mend_moves_damaged_lines_aside_and_keeps_all_others_to_the_byte(root, capsys):
    path = root / "data/evidence/toy/first.standard.jsonl"
    for seed in (1, 2):
        RowStore(path, code="c").append(settings={"n": 1}, seed=seed, result={"y": 2}, wall_s=0, core_s=0)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [lines[2].replace(b'"seed":1', b'"seed":7'), b"\xff<<<<<<< HEAD\n"]
    damaged = b"".join([*lines[:2], *bad, lines[3], b'{"torn'])
    path.write_bytes(damaged)
    with RowStore(root / "data/evidence/toy/second.standard.jsonl", code="c").held():
        assert main(["mend", str(path)], root=root) == 0
    assert "first.standard.jsonl: 2 damaged lines moved, 3 sound lines" in capsys.readouterr().out
    assert path.read_bytes() == b"".join([*lines[:2], lines[3], b'{"torn'])
    assert path.with_name(path.name + ".damaged").read_bytes() == b"".join(bad)
    before = path.read_bytes()
    with RowStore(path, code="c").held():
        assert main(["mend", str(path)], root=root) == 1
    assert "wait for it or stop it" in capsys.readouterr().err
    assert main(["mend", str(path)], root=root) == 0 and path.read_bytes() == before
    assert main(["mend", str(root / "absent.jsonl")], root=root) == 1


def test_mend_leaves_a_file_of_another_schema_as_it_is(root, capsys, monkeypatch):
    path = root / "data/evidence/toy/first.standard.jsonl"
    monkeypatch.setattr("lib.evidence.rows.SCHEMA", 2)
    path.unlink()
    RowStore(path, code="c").declare([{"n": 1}], [0], run="lib.toy.run")
    monkeypatch.undo()
    before = path.read_bytes()
    assert main(["mend", str(path)], root=root) == 1
    assert "update the checkout" in capsys.readouterr().err and path.read_bytes() == before
