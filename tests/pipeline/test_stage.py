import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.pipeline import stage


def source():
    return new_notebook(
        cells=[
            new_markdown_cell("# New title"),
            new_code_cell("n = 3", metadata={"tags": ["parameters"]}),
            new_markdown_cell("New words"),
            new_code_cell("n + 1", metadata={"tags": ["hide-input"]}),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )


def executed(code="n + 1"):
    result = new_output("execute_result", data={"text/plain": "5"}, execution_count=3)
    return new_notebook(
        cells=[
            new_markdown_cell("# Old title"),
            new_code_cell("n = 3", execution_count=1, metadata={"tags": ["parameters"], "papermill": {}}),
            new_code_cell(
                "n = 4", execution_count=2, metadata={"tags": ["injected-parameters"], "papermill": {}}
            ),
            new_code_cell(
                code, execution_count=3, outputs=[result], metadata={"papermill": {"duration": 1.0}}
            ),
        ],
        metadata={"language_info": {"name": "python"}, "widgets": {"w": 1}, "papermill": {"duration": 2.0}},
    )


def test_a_page_has_the_prose_of_today_and_the_results_of_the_run():
    page = stage.merge(source(), executed())
    assert [cell.source for cell in page.cells] == ["# New title", "n = 3", "n = 4", "New words", "n + 1"]
    assert [cell.get("execution_count") for cell in page.cells] == [None, 1, 2, None, 3]
    assert page.cells[-1].outputs[0].data["text/plain"] == "5"
    assert page.cells[-1].metadata == {"tags": ["hide-input"]}
    assert page.metadata["widgets"] == {"w": 1} and page.metadata["language_info"] == {"name": "python"}


def test_times_of_the_run_do_not_reach_the_page():
    assert "papermill" not in nbformat.writes(stage.merge(source(), executed()))


def test_what_a_display_of_progress_left_empty_is_dropped_and_nothing_else():
    emptied = new_output("display_data", data={"text/plain": "", "text/html": " "})
    shown = [
        new_output("stream", name="stdout", text="a"),
        new_output("display_data", data={"text/plain": "<Figure>", "image/png": "x"}),
        new_output("display_data", data={"application/json": {}}),
        new_output("error", ename="E", evalue="", traceback=[]),
    ]
    run = executed()
    run.cells[-1].outputs[:0] = [emptied, *shown]
    page = stage.merge(source(), run)
    assert page.cells[-1].outputs[:-1] == shown and page.cells[-1].outputs[-1].data["text/plain"] == "5"


def test_results_of_other_code_are_refused():
    with pytest.raises(ValueError, match="other code cells"):
        stage.merge(source(), executed(code="n + 2"))


def test_the_stage_holds_pages_figures_and_generated_parts_but_no_source_notebook(toy):
    toy.write("build/figures/one/a.svg", "<svg/>")
    toy.write("build/executed/book/old.md", "left by an earlier build")
    stage.write(toy.layout, {"one": source()}, {"at-a-glance.md": "Three claims."})
    book = toy.root / "build/executed/book"
    names = {path.relative_to(book).as_posix() for path in book.rglob("*") if path.is_file()}
    assert names == {"intro.md", "bibliography.md", "references.bib", "claims.toml", "at-a-glance.md",
                     "one.ipynb", "figures/one/a.svg"}  # fmt: skip
    assert (book / "at-a-glance.md").read_text() == "Three claims."


def test_a_page_without_results_says_so_below_its_title(toy):
    page = stage.unexecuted_page(toy.layout, toy.layout.chapters["one"], source())
    assert page.cells[0].source == "# New title"
    assert "Not executed yet" in page.cells[1].source and "make book" in page.cells[1].source
