"""Toy books: three pages, no torch, in a folder of their own. The pipeline takes them through `Layout`."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib.paths import ROOT
from lib.pipeline import render
from lib.pipeline.__main__ import main
from lib.pipeline.layout import Layout

TOC = """\
format: jb-book
root: book/intro
parts:
  - caption: Toys
    numbered: true
    chapters:
      - file: book/summary
      - file: book/one
      - file: book/two
  - caption: Reference
    chapters:
      - file: book/bibliography
"""

# Runs the pipeline on a toy book in a process of its own, so that it can be killed and called from elsewhere.
DRIVER = """\
import sys
from pathlib import Path
from lib.pipeline import render
from lib.pipeline.__main__ import main
from lib.pipeline.layout import Layout

class Ledger:
    build = staticmethod(lambda: [])
    at_a_glance = staticmethod(lambda: "All is well.")

def quick_render(layout, *, unfinished=frozenset()):
    return []

render.render = quick_render
sys.exit(main(sys.argv[2:], layout=Layout(Path(sys.argv[1])), ledger=Ledger))
"""


@dataclass
class Ledger:
    """Stands in for lib.evidence.ledger: no claims, but it counts how often it was asked to gather them."""

    entries: list = field(default_factory=list)
    builds: int = 0

    def build(self):
        self.builds += 1
        return self.entries

    def at_a_glance(self):
        return "All is **well**.\n"


class Toy:
    """A toy book and ways to change it, run it and look at what came out."""

    def __init__(self, root: Path):
        self.root = root
        self.ledger = Ledger()
        for folder in ("book", "lib", "data"):
            (root / folder).mkdir(parents=True)
        self.write("_toc.yml", TOC)
        self.write("_config.yml", "")
        self.write("requirements.txt", "numpy\n")
        self.write("lib/number.py", "NUMBER = 41\n")
        self.write("book/claims.toml", "")
        self.write("book/intro.md", "# Intro\n\n```{include} at-a-glance.md\n```\n\nSee {numref}`one`.\n")
        self.write("book/bibliography.md", "# Bibliography\n\n```{bibliography}\n```\n")
        self.write("book/references.bib", "@book{b, author={B, A}, title={T}, publisher={P}, year={2024}}\n")
        # Reads what the others claim, so it stands first on the page list and last in execution.
        self.chapter("summary", ["print('summary')"], metadata={"reads": ["build/claims/*.json"]})
        self.chapter(
            "one", [f"exec(open({str(root / 'lib/number.py')!r}).read())\nprint('number', NUMBER, n)"]
        )
        self.chapter("two", ["6 * 7"])

    @property
    def layout(self) -> Layout:
        return Layout(self.root)  # a new one each time: it remembers what it read

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def chapter(
        self, name: str, code: list[str], *, prose: str = "", metadata=None, parameters="n = 3"
    ) -> None:
        """A chapter with title, parameters cell and one code cell for each string."""
        cells = [new_markdown_cell(f"({name})=\n# Chapter {name}\n\n{prose}")]
        if parameters is not None:
            source = f'profile = "quick"  # size\n{parameters}'
            cells.append(new_code_cell(source, metadata={"tags": ["parameters"]}))
        cells += [new_code_cell(source) for source in code]
        for i, cell in enumerate(cells):
            cell.id = f"{name}-{i}"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel, "book": metadata or {}})
        nbformat.write(notebook, self.root / "book" / f"{name}.ipynb")

    def edit_prose(self, name: str, prose: str) -> None:
        path = self.root / "book" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[0].source += prose
        nbformat.write(notebook, path)

    def run(self, *arguments: str) -> int:
        return main(list(arguments), layout=self.layout, ledger=self.ledger)

    def process(self, *arguments: str, cwd: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(self.root), *arguments]
        return subprocess.Popen(
            command,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def states(self) -> dict[str, str]:
        facts = json.loads((self.root / "build/run.json").read_text())
        return {entry["chapter"]: entry["state"] for entry in facts["chapters"]}

    def staged(self, name: str) -> nbformat.NotebookNode:
        return nbformat.read(self.root / f"build/executed/book/{name}.ipynb", as_version=4)

    def add_theme(self) -> None:
        """What the real book's _config.yml needs: the theme, MathJax, the configuration itself."""
        shutil.copy(ROOT / "_config.yml", self.root)
        for folder in ("theme", "vendor"):
            shutil.copytree(ROOT / "book" / folder, self.root / "book" / folder)


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(tmp_path / "toy")


@pytest.fixture
def no_sphinx(monkeypatch):
    """Rendering in no time: publishes a site of one line that holds the staged notebooks' names."""

    def render_quickly(layout, *, unfinished=frozenset()):
        site = layout.build / "render" / "site"
        shutil.rmtree(site, ignore_errors=True)
        site.mkdir(parents=True)
        (site / "index.html").write_text(" ".join(sorted(p.stem for p in layout.stage.rglob("*.ipynb"))))
        render.publish(site, layout.html)
        return []

    monkeypatch.setattr(render, "render", render_quickly)
