"""Whole builds of toy books with a real kernel; rendering is stood in for, see test_render.py."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lib.paths import ROOT
from lib.pipeline import execute

pytestmark = pytest.mark.slow

# Kernels write a line each time they run this cell, whatever becomes of their outputs.
COUNT = "with open({log!r}, 'a') as log:\n    log.write('{name}\\n')"


def count_runs(toy, name, *, code=(), metadata=None):
    log = str(toy.root / "log.txt")
    toy.chapter(name, [COUNT.format(log=log, name=name), *code], metadata=metadata)


def runs(toy):
    log = toy.root / "log.txt"
    return log.read_text().split() if log.exists() else []


def site(toy):
    return (toy.root / "build/html/index.html").read_text()


def test_a_chapter_runs_again_when_lib_changes_and_not_when_prose_changes(toy, no_sphinx):
    for name in ("two", "summary"):
        toy.chapter(name, ["1"])
    toy.write("_toc.yml", "format: jb-book\nroot: book/intro\nchapters: [{file: book/one}]\n")
    assert toy.run("book") == 0 and toy.states() == {"one": "executed"}
    toy.edit_prose("one", "\n\nOne more sentence.")
    assert toy.run("book") == 0 and toy.states() == {"one": "reused"}
    page = toy.staged("one")
    assert "One more sentence." in page.cells[0].source
    assert page.cells[2].outputs[0].text == "number 41 3\n"
    toy.write("lib/number.py", "NUMBER = 42\n")
    assert toy.run("book") == 0 and toy.states() == {"one": "executed"}
    assert toy.staged("one").cells[2].outputs[0].text == "number 42 3\n"


def test_a_failing_cell_is_named_the_others_run_and_the_old_site_stays(toy, no_sphinx, capsys):
    toy.write("build/html/index.html", "the site of before")
    toy.chapter("one", ["1 + 1", "fine = True\nraise ArithmeticError('the sum is off')"])
    count_runs(toy, "two")
    assert toy.run("book") == 1
    out = capsys.readouterr().out
    for part in (
        "one, cell 3:",
        "| fine = True",
        "ArithmeticError: the sum is off",
        "Not rendered",
        "untouched",
    ):
        assert part in out
    assert toy.states() == {"one": "failed", "two": "executed", "summary": "executed"}
    assert site(toy) == "the site of before"
    assert toy.run("book") == 1
    assert toy.states() == {"one": "failed", "two": "reused", "summary": "reused"}
    assert runs(toy) == ["two"]


def test_a_message_is_told_to_its_last_line_where_the_next_step_stands(toy, no_sphinx, capsys):
    lines = [f"line {i}" for i in range(30)]
    toy.chapter("one", [f"raise OSError(28, {chr(10).join(lines)!r}, 'rows.jsonl')"])
    assert toy.run("chapter", "one") == 1
    out = capsys.readouterr().out
    assert all(f"{line}\n" in out for line in lines[:-1]) and "line 29: 'rows.jsonl'" in out


def test_a_message_without_end_is_cut_and_says_so(toy, no_sphinx, capsys):
    toy.chapter("one", ["raise ValueError('\\n'.join(map(str, range(1000))))"])
    assert toy.run("chapter", "one") == 1
    assert f"    (and {1000 - execute.LINES} more lines)" in capsys.readouterr().out


def test_a_kernel_that_dies_is_a_failure_with_its_cell(toy, no_sphinx, capsys):
    toy.chapter("one", ["import os\nos._exit(3)"])
    assert toy.run("chapter", "one") == 1
    assert "one, cell 2:" in (out := capsys.readouterr().out)
    assert "DeadKernelError" in out


def test_a_killed_build_goes_on_where_it_was_and_the_site_of_before_is_intact(toy):
    toy.write("build/html/index.html", "the site of before")
    count_runs(toy, "one")
    wait = toy.write("wait", "")
    count_runs(
        toy, "two", code=[f"import os, time\nwhile os.path.exists({str(wait)!r}):\n    time.sleep(0.05)"]
    )
    process = toy.process("book", cwd=toy.root)
    deadline = time.monotonic() + 60
    while runs(toy) != ["one", "two"]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait.unlink()
    assert site(toy) == "the site of before"
    again = toy.process("book", cwd=toy.root)
    assert again.wait(60) == 0
    again.stdout.close()
    assert toy.states() == {"one": "reused", "two": "executed", "summary": "executed"}
    assert runs(toy) == ["one", "two", "two"]


def test_it_runs_from_any_working_directory(toy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    toy.chapter("one", ["import os\nprint(os.path.basename(os.getcwd()))"])
    process = toy.process("chapter", "one", cwd=elsewhere)
    assert process.wait(60) == 0, process.stdout.read()
    process.stdout.close()
    assert toy.staged("one").cells[2].outputs[0].text == "book\n"
    assert list(elsewhere.iterdir()) == []


def test_evidence_that_a_run_records_does_not_make_it_run_again(toy, no_sphinx, capsys):
    rows = toy.root / "data/evidence/one/a.standard.jsonl"
    record = f"from pathlib import Path\np = Path({str(rows)!r})\np.parent.mkdir(parents=True, exist_ok=True)"
    count_runs(toy, "one", code=[f"{record}\nif not p.exists():\n    p.write_text(profile)"])
    toy.write("build/html/index.html", "the site of before")
    assert toy.run("evidence", "one") == 0
    assert "Stop it with Ctrl-C" in capsys.readouterr().out
    assert rows.read_text() == "standard" and toy.states() == {"one": "executed"}
    assert toy.run("evidence", "one") == 0 and toy.states() == {"one": "reused"}
    assert runs(toy) == ["one"]
    assert site(toy) == "the site of before"


def test_a_run_whose_inputs_changed_meanwhile_is_shown_and_not_kept(toy, no_sphinx, capsys):
    toy.chapter("one", [f"open({str(toy.root / 'lib/number.py')!r}, 'a').write('X = 1\\n')"])
    assert toy.run("chapter", "one") == 0
    assert "not kept for reuse; this changed while it ran: lib" in capsys.readouterr().out
    assert toy.run("chapter", "one") == 0 and toy.states()["one"] == "executed"


def test_one_chapter_is_rendered_among_the_others_as_they_are(toy, no_sphinx):
    assert toy.run("chapter", "one", "--profile", "standard", "--params", "n=5") == 0
    assert toy.states() == {"one": "executed", "two": "not executed", "summary": "not executed"}
    assert toy.staged("one").cells[-1].outputs[0].text == "number 41 5\n"
    assert "Not executed yet" in toy.staged("two").cells[1].source
    assert toy.run("chapter", "two") == 0
    assert toy.states() == {"one": "earlier run", "two": "executed", "summary": "not executed"}
    assert "From an earlier run" in toy.staged("one").cells[1].source


def test_chapters_that_read_claims_run_last_and_after_the_claims_are_gathered(toy, no_sphinx):
    claims = toy.root / "build/claims/one.json"
    claims.parent.mkdir(parents=True)
    write = f"from pathlib import Path\nPath({str(claims)!r}).write_text('[]')"
    toy.chapter("one", [write])
    reads = {"reads": ["build/claims/*.json"]}
    toy.chapter("summary", [f"assert open({str(claims)!r}).read() == '[]'"], metadata=reads)
    toy.ledger.entries = [{"chapter": "one", "verdict": "supported"}]
    assert toy.run("book") == 0
    assert list(toy.states()) == ["one", "two", "summary"]
    assert toy.ledger.builds >= 3  # checked before, gathered for the summary, counted for the table


def test_a_second_build_in_the_same_checkout_is_refused(toy, no_sphinx, capsys):
    wait = toy.write("wait", "")
    loop = f"import os, time\nwhile os.path.exists({str(wait)!r}):\n    time.sleep(0.05)"
    count_runs(toy, "one", code=[loop])
    first = toy.process("chapter", "one", cwd=toy.root)
    deadline = time.monotonic() + 60
    while runs(toy) != ["one"]:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert toy.run("book") == 2
    said = capsys.readouterr().err
    assert "a build in this checkout is under way already" in said and f"process {first.pid}, since" in said
    wait.unlink()
    assert first.wait(60) == 0
    first.stdout.close()


def test_a_mistake_in_the_claims_is_told_before_any_chapter_runs(toy, capsys):
    count_runs(toy, "one")

    def build():
        raise ValueError("claims.toml: no key 'holds'")

    toy.ledger.build = build
    assert toy.run("book") == 2
    assert "no key 'holds'" in capsys.readouterr().err
    assert runs(toy) == []


def test_kernels_get_one_thread(toy, monkeypatch, no_sphinx):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    toy.chapter("one", ["import os\nprint(os.environ['OMP_NUM_THREADS'])"])
    assert toy.run("chapter", "one") == 0
    assert toy.staged("one").cells[-1].outputs[0].text == "1\n"


def test_bare_papermill_executes_a_chapter_from_two_directories(toy, tmp_path):
    toy.chapter("one", ["from lib.paths import ROOT\nprint(ROOT, profile)"])
    for i, place in enumerate([toy.root / "book", tmp_path]):
        out = tmp_path / f"out{i}.ipynb"
        command = [sys.executable, "-m", "papermill", str(toy.root / "book/one.ipynb"), str(out)]
        subprocess.run([*command, "-p", "profile", "standard"], cwd=place, check=True, capture_output=True)
        assert f"{ROOT} standard" in out.read_text()


def test_a_failure_before_the_first_cell_says_so():
    assert "before its first cell" in str(execute.Failure("one", None, "", "NoSuchKernel: x", "one.ipynb"))
