import pytest

from lib.evidence import Chapter

CLAIMS = """
[[claim]]
id = "toy/measured"
says = "It is high."
kind = "measurement"
source = "someone2024"
locator = "Table 2"
paper_value = 0.99
quantity = "accuracy"
unit = "1"
holds = ">= 0.9"
control = "chance"
control_holds = "<= 0.5"

[[claim]]
id = "toy/built"
says = "It is built."
kind = "construction"
source = "ours"
locator = "Proposition T"
quantity = "wrong answers"
unit = "inputs"
holds = "== 0"
control = "one weight perturbed"
control_holds = "> 0"

[[claim]]
id = "other/claim"
says = "It is another chapter's."
kind = "theorem"
source = "ours"
locator = "here"
quantity = "counterexamples"
unit = "inputs"
holds = "== 0"
tests = ["tests/a.py::test_a"]
"""


@pytest.fixture
def chapter(tmp_path):
    """-> open(profile, **more): a chapter with its own folders."""
    (tmp_path / "claims.toml").write_text(CLAIMS)

    def open_(profile="quick", name="toy", **more):
        folders = {key: tmp_path / key for key in ("evidence", "build")}
        more = {"device": "cpu", "jobs": 1, "claims": tmp_path / "claims.toml"} | folders | more
        return Chapter(name, profile=profile, **more)

    return open_
