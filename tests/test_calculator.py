"""The calculator of the page agrees with the Python bounds, and works where a reader meets it."""

import itertools
import json
import shutil
import subprocess

import pytest
from playwright.sync_api import sync_playwright

from lib.metrics.bounds import THEOREMS, largest_allowed_n
from lib.paths import ROOT

SCRIPT = ROOT / "book" / "theme" / "calculator.js"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")
needs_node = pytest.mark.skipif(NODE is None, reason="no node on the path")

GRID = [
    (heads, d, widths, theorem)
    for heads, d, widths, theorem in itertools.product(
        [1, 2, 3, 12], [1, 2, 7, 64], [[], [1], [16], [3072], [5, 40], [64] * 6], THEOREMS)
    if heads == 1 or not theorem.endswith("one-head")]
CALL = "grid => grid.map(p => [false, true].map(exact => ProofAndProbe.largestAllowedN(...p, {exact})))"

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>calculator</title>
<meta name="viewport" content="width=device-width"></head><body><div id="here"><p>static text</p></div>
<script src="{script}"></script><script>ProofAndProbe.mountCalculator("here")</script></body></html>"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def calculator(browser, tmp_path):
    """The calculator on a page opened from file://, with every console message and page error kept."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    (tmp_path / "page.html").write_text(PAGE.format(script=SCRIPT.as_uri()), encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    page.close()


def assert_agreement(found):
    """found: for each point of GRID, the result by doubles and the one by integers alone."""
    assert len(found) == len(GRID) >= 200
    for (*layer, theorem), results in zip(GRID, found, strict=True):
        assert results == [largest_allowed_n(*layer, theorem=theorem)] * 2, (*layer, theorem)


@pytest.mark.browser
@needs_chromium
def test_the_script_agrees_with_python_on_a_grid_in_chromium(browser):
    page = browser.new_page()
    page.add_script_tag(path=SCRIPT)
    assert_agreement(page.evaluate(CALL, GRID))
    page.close()


@needs_node
def test_the_script_agrees_with_python_on_a_grid_in_node():
    program = f"require({json.dumps(str(SCRIPT))}); const found = ({CALL})({json.dumps(GRID)}); " \
              "process.stdout.write(JSON.stringify(found))"
    assert_agreement(json.loads(subprocess.run(
        [NODE, "-e", program], check=True, capture_output=True, text=True).stdout))


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("call, complaint", [
    ("0, 1, []", "heads is an integer >= 1, got 0"),
    ("1, 1.5, []", "valueDim is an integer >= 1, got 1.5"),
    ("1, 1, [4, 0]", "widths[1] is an integer >= 1, got 0"),
    ("1, 1, 4", "widths lists the hidden layers"),
    ("1, 1, [], 'B'", "unknown theorem B; allowed: B*, B**"),
    ("2, 1, [], 'B*-one-head'", "B*-one-head is proved for one head, got 2"),
    ("1e9, 1e9, [], 'generic-VC'", "too large for the calculator"),
])
def test_the_script_refuses_nonsense(calculator, call, complaint):
    told = calculator.evaluate(f"""() => {{
        try {{ return ProofAndProbe.largestAllowedN({call}); }}
        catch (error) {{ return error.message; }} }}""")
    assert complaint in told


@pytest.mark.browser
@needs_chromium
def test_the_calculator_says_what_python_says(calculator):
    verdict, number = calculator.locator(".pp-verdict"), calculator.get_by_label
    assert "static text" not in calculator.locator("#here").inner_text()
    number("n, size of the functions", exact=True).fill("50")
    number("H, heads", exact=True).fill("2")
    number("d, value dimension per head", exact=True).fill("16")
    first = largest_allowed_n(2, 16, [64]) + 1
    assert verdict.get_attribute("data-verdict") == "not excluded"
    assert f"begins at n = {first}." in verdict.inner_text()
    number("n, size of the functions", exact=True).fill(str(first))
    assert verdict.get_attribute("data-verdict") == "impossible"
    assert f"at any precision, with any weights: B** excludes every n from {first}." in verdict.inner_text()
    rows = dict(calculator.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [row.cells[0].innerText, row.cells[1].innerText])"))
    assert rows == {
        "B**": f"{first}", "B*": f"{largest_allowed_n(2, 16, [64], theorem='B*') + 1}",
        "generic VC (our count)": f"{largest_allowed_n(2, 16, [64], theorem='generic-VC') + 1:,}"}
    label = calculator.get_by_role("img").get_attribute("aria-label")
    assert f"B** excludes every n from {first};" in label and f"Your n is {first}." in label
    assert calculator.heard == []


@pytest.mark.browser
@needs_chromium
def test_one_head_brings_its_own_theorems_and_proposition_0(calculator):
    calculator.get_by_role("button", name="one head, no MLP").click()
    names = calculator.locator("tbody th").all_inner_texts()
    bounds = ["B** (one head)", "B**", "B* (one head)", "B*", "generic VC (our count)"]
    assert names == ["one head, no MLP", *bounds]
    assert "one head, no MLP excludes every n from 2." in calculator.locator(".pp-verdict").inner_text()
    assert calculator.get_by_label("width of each hidden layer", exact=True).is_disabled()


@pytest.mark.browser
@needs_chromium
def test_the_calculator_is_worked_from_the_keyboard(calculator):
    slider = calculator.get_by_label("H, heads, slider")
    slider.focus()
    seen = []
    for _ in range(4):
        calculator.keyboard.press("ArrowRight")
        seen.append(int(calculator.get_by_label("H, heads", exact=True).input_value()))
    assert seen == sorted(set(seen)) and seen[0] > 1, "every key press moves to another number of heads"
    assert slider.get_attribute("aria-valuetext") == str(seen[-1])


@pytest.mark.browser
@needs_chromium
def test_a_number_out_of_range_is_named_and_nothing_is_computed_from_it(calculator):
    field = calculator.get_by_label("n, size of the functions", exact=True)
    for wrong in ("1", "2.5", "", "1000001"):
        field.fill(wrong)
        assert "whole number from 2 to 1,000,000 is needed" in calculator.locator(".pp-verdict").inner_text()
        assert field.get_attribute("aria-invalid") == "true" and field.input_value() == wrong
    field.fill("7")
    assert "n = 7" in calculator.locator(".pp-verdict").inner_text()
    assert field.get_attribute("aria-invalid") == "false"


@pytest.mark.browser
@needs_chromium
def test_nothing_spills_over_a_narrow_screen_or_when_it_is_widened(calculator):
    for name in ("one small head", "GPT-2-small"):
        calculator.get_by_role("button", name=name).click()
        assert calculator.evaluate("document.documentElement.scrollWidth") == 390
    calculator.set_viewport_size({"width": 1000, "height": 800})
    calculator.wait_for_function("document.querySelector('.pp-picture svg').clientWidth > 800")


@pytest.mark.browser
@needs_chromium
def test_a_page_without_the_element_is_left_alone(calculator):
    before = calculator.content()
    assert calculator.evaluate("ProofAndProbe.mountCalculator('absent')") is None
    assert calculator.content() == before and calculator.heard == []
