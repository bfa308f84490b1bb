"""The built book in a real browser, opened from file:// with every other request refused and recorded.

Builds the book first (profile quick), which takes seconds where the chapters have been executed before.
"""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from playwright.sync_api import sync_playwright

from lib.evidence import load_claims
from lib.paths import BUILD, EVIDENCE, ROOT
from lib.pipeline.layout import Layout

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
# The sandbox needs rights that containers lack; the rest keeps the browser itself off the network.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
VIEWS = {
    "desktop": {"viewport": {"width": 1440, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
}
KNOWN_MESSAGE = "Got invalid theme mode"  # sphinx-book-theme 1.3.0, once a page, harmless

LAYOUT = Layout()
PAGES = LAYOUT.pages
CHAPTERS = [chapter.page for chapter in LAYOUT.chapters.values()]

LOOK = """
async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  await new Promise(done => setTimeout(done, 50));
  const article = document.querySelector("article") || document.querySelector("main");
  const prose = article.cloneNode(true);
  prose.querySelectorAll("pre, code, script, style, textarea, mjx-container").forEach(e => e.remove());
  const colour = name => getComputedStyle(document.body)[name].match(/[0-9.]+/g).map(Number);
  const wide = [...article.querySelectorAll("*")].filter(e =>
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 &&
    !e.closest(".table-scroll, .pst-scrollable-table-container, div.math, mjx-container, pre, .output, svg"));
  return {
    text: prose.textContent,
    formulas: article.querySelectorAll("mjx-container").length,
    sources: article.querySelectorAll(".math").length,
    broken: [...article.querySelectorAll("mjx-merror, [data-mjx-error], [data-mml-node=merror]")]
      .map(e => e.textContent || e.getAttribute("data-mjx-error")),
    images: [...article.querySelectorAll("img")].map(e => ({
      src: e.getAttribute("src"), alt: e.getAttribute("alt"), width: e.naturalWidth,
      figure: e.classList.contains("book-figure"), filter: getComputedStyle(e).filter})),
    controls: [...article.querySelectorAll("input, select, textarea")]
      .filter(e => e.type !== "hidden" && !(e.labels && e.labels.length) && !e.getAttribute("aria-label"))
      .map(e => e.outerHTML),
    scrollWidth: document.documentElement.scrollWidth,
    clientWidth: document.documentElement.clientWidth,
    wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    background: colour("backgroundColor"),
    ink: colour("color"),
  };
}
"""


@dataclass
class Visit:
    """What a browser saw of one page in one view. `look` is what LOOK returns."""

    look: dict
    outside: list[str]
    messages: list[str]


@pytest.fixture(scope="module")
def html():
    """The folder of the site, built by the same command as a reader's."""
    done = subprocess.run(
        [sys.executable, "-m", "lib.pipeline", "book"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return LAYOUT.html


# Not for the session: a second sync_playwright() in the same thread, as in test_calculator.py, is an error.
@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def visit(html, browser):
    """visit(page, view) -> Visit; each pair is opened once."""
    seen: dict[tuple[str, str], Visit] = {}

    def once(page: str, view: str) -> Visit:
        if (page, view) not in seen:
            seen[page, view] = _open(browser, html / f"{page}.html", view)
        return seen[page, view]

    return once


def _open(browser, path, view, *, query="", ready=None) -> Visit:
    context = browser.new_context(**VIEWS[view])
    outside, messages = [], []

    def route(handler):
        if handler.request.url.startswith(("file:", "data:", "blob:")):
            handler.continue_()
        else:
            outside.append(handler.request.url)
            handler.abort()

    context.route("**/*", route)
    tab = context.new_page()
    tab.on("console", lambda m: messages.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto(f"{path.as_uri()}{query}")
    if ready:
        tab.wait_for_selector(ready, timeout=10_000)
    look = tab.evaluate(LOOK)
    context.close()
    return Visit(look, outside, [m for m in messages if KNOWN_MESSAGE not in m])


browser_test = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: none of {', '.join(BROWSERS)} on the path"
)
pytestmark = [pytest.mark.slow, pytest.mark.browser]
every_page = pytest.mark.parametrize("page", PAGES)
every_view = pytest.mark.parametrize("view", VIEWS)


@browser_test
@every_page
@every_view
def test_nothing_is_fetched_from_the_network_and_nothing_goes_wrong(visit, page, view):
    seen = visit(page, view)
    assert (seen.outside, seen.messages) == ([], [])


@browser_test
@every_page
def test_every_formula_is_set(visit, page):
    look = visit(page, "desktop").look
    assert look["broken"] == []
    assert look["formulas"] >= look["sources"]
    assert not re.search(r"\\\(|\\\[|\$\$|\\begin\{", look["text"])


@browser_test
def test_a_formula_offers_no_menu_that_would_fetch_and_keeps_its_mathml(html, browser):
    tab = browser.new_page()
    tab.goto((html / "book/notation.html").as_uri())
    tab.wait_for_selector("mjx-container mjx-assistive-mml", state="attached")
    tab.locator("article mjx-container").first.click(button="right")
    assert tab.locator(".CtxtMenu_Menu").count() == 0
    tab.close()


@browser_test
def test_the_chapter_has_formulas_at_all(visit):
    assert visit("book/one-layer-limits", "desktop").look["formulas"] > 50


@browser_test
@every_page
def test_nothing_is_wider_than_a_phone(visit, page):
    look = visit(page, "phone").look
    assert look["clientWidth"] == 390
    assert look["scrollWidth"] <= look["clientWidth"], look["wide"]


@browser_test
@every_page
def test_dark_mode_is_dark_and_readable(visit, page):
    look = visit(page, "dark").look
    assert _luminance(look["background"]) < 0.05
    assert _contrast(look["background"], look["ink"]) >= 7
    assert all("invert" in image["filter"] for image in look["images"] if image["figure"])


@browser_test
@every_page
def test_every_picture_loads_and_is_described(visit, page):
    for image in visit(page, "desktop").look["images"]:
        assert image["width"] > 0, image["src"]
        assert len((image["alt"] or "").split()) >= 3, (
            f"{image['src']}: alt text {image['alt']!r} describes nothing"
        )


@browser_test
def test_the_verdicts_of_a_chapter_unfold_into_a_list_of_its_claims(html, browser):
    claims = [claim for claim in load_claims().values() if claim.chapter == "one-layer-limits"]
    tab = browser.new_page()
    tab.goto((html / "book/one-layer-limits.html").as_uri())
    assert tab.locator("details .sd-summary-content li").count() == len(claims) >= 10
    tab.close()


@browser_test
@every_page
def test_every_control_has_a_label(visit, page):
    assert visit(page, "desktop").look["controls"] == []


@browser_test
@every_page
def test_every_reference_is_resolved(visit, page):
    text = visit(page, "desktop").look["text"]
    assert "??" not in text
    assert not re.search(r"\{(numref|ref|eq|cite(:\w+)?|prf:ref|glue:\w+|doc|term|figure)\}", text)


@browser_test
def test_search_finds_a_word_without_network(html, browser):
    seen = _open(
        browser, html / "search.html", "desktop", query="?q=shattering", ready="#search-results li a"
    )
    assert (seen.outside, seen.messages) == ([], [])
    assert "one layer cannot compose functions" in seen.look["text"].lower()


@browser_test
def test_a_page_with_every_flaw_is_caught(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("""<html><script src="https://cdn.example/x.js"></script>
        <script>throw Error("oops")</script><body style="background: white; color: #999"><article>
        <p>See ?? and \\(x\\).</p><img src="none.svg" alt="none.svg"><div style="width: 900px">wide</div>
        <input><mjx-container><mjx-merror>bad</mjx-merror></mjx-container></article></body></html>""")
    seen = _open(browser, page, "phone")
    assert seen.outside == ["https://cdn.example/x.js"]
    assert any("oops" in message for message in seen.messages)
    assert seen.look["broken"] == ["bad"] and "??" in seen.look["text"] and "\\(" in seen.look["text"]
    assert seen.look["scrollWidth"] > 390 and "900px" in seen.look["wide"][0]
    assert seen.look["images"][0]["width"] == 0 and seen.look["controls"] == ["<input>"]
    assert _contrast(seen.look["background"], seen.look["ink"]) < 3


@pytest.mark.parametrize("page", CHAPTERS)
def test_the_notebook_of_a_chapter_can_be_downloaded_with_its_outputs(html, page):
    source = (html / f"{page}.html").read_text(encoding="utf-8")
    link = f"{page.removeprefix('book/')}.ipynb"
    assert re.search(rf'href="[^"]*_sources/[^"]*{re.escape(link)}"', source), "no download link"
    notebook = json.loads((html / "_sources" / f"{page}.ipynb").read_text(encoding="utf-8"))
    assert any(cell.get("outputs") for cell in notebook["cells"])


def test_the_site_is_the_whole_book_and_not_an_empty_one(html):
    assert importlib.metadata.version("jupyter-book").startswith("1.")
    assert (html / "index.html").exists()
    assert [page for page in PAGES if not (html / f"{page}.html").exists()] == []
    claims = json.loads((BUILD / "claims.json").read_text(encoding="utf-8"))
    ledger = (html / "book/ledger.html").read_text(encoding="utf-8")
    assert claims and [claim["id"] for claim in claims if claim["id"] not in ledger] == []


def test_every_recorded_experiment_stands_among_the_execution_times(html):
    page = (html / "book/execution.html").read_text(encoding="utf-8")
    files = [path for path in EVIDENCE.glob("*/*.jsonl")]
    assert files
    for path in files:
        assert f"{path.parent.name}: {path.name.split('.')[0]}" in page
    assert all(chapter.name in page for chapter in LAYOUT.chapters.values())


def test_no_page_names_a_folder_of_the_machine_that_built_it(html):
    named = [
        str(p)
        for p in html.rglob("*")
        if p.suffix in (".html", ".ipynb", ".txt") and str(ROOT) in p.read_text()
    ]
    assert named == []


def _luminance(rgb: list[float]) -> float:
    """Relative luminance of an sRGB colour, 0 (black) to 1 (white). Formula: WCAG 2.2."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: list[float], other: list[float]) -> float:
    high, low = sorted([_luminance(one), _luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)
