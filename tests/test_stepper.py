"""The decoder in the page is the decoder of torch, on every input, and can be stepped through by anyone."""

import json
import re
import shutil
from pathlib import Path

import pydata_sphinx_theme
import pytest
import sphinx_book_theme
import torch
from playwright.sync_api import sync_playwright

from lib.figures.stepper import SCRIPT, stepper_data, stepper_html
from lib.models.constructions import least_sharpness, sequential_composition_decoder
from lib.paths import ROOT
from lib.tasks.composition import SequentialComposition

THEME = ROOT / "book" / "theme"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")

TASK = SequentialComposition(m=2, ns=(2,))
OTHERS = [SequentialComposition(m=m, ns=ns) for m, ns in [(3, ()), (2, (1,)), (2, (2, 2)), (3, (2,))]]
ROUNDING = 1e-9  # both sides compute in doubles; the scores reach 40, and sums are taken in another order

PYDATA = Path(pydata_sphinx_theme.__file__).parent / "theme/pydata_sphinx_theme/static/styles"
BOOK_THEME = Path(sphinx_book_theme.__file__).parent / "theme/sphinx_book_theme/static/styles"
STYLES = [PYDATA / "theme.css", PYDATA / "pydata-sphinx-theme.css", BOOK_THEME / "sphinx-book-theme.css",
          THEME / "book.css"]
PAGE = """<!doctype html><html lang="en" data-theme="{mode}"><head><meta charset="utf-8"><title>step</title>
<meta name="viewport" content="width=device-width, initial-scale=1">{styles}</head>
<body><main style="width: 100%; box-sizing: border-box; padding: 0 1rem"><article class="bd-article">
<div class="output text_html">{fragment}</div></article></main></body></html>"""

RUN = """([data, inputs]) => inputs.map(input => {
  const run = ProofAndProbe.runDecoder(data, input);
  return [run.attention, run.residual, run.logits, ProofAndProbe.definition(data.task, input)]; })"""
# Every text of the stepper with its colour and the colours behind it, from the element outwards.
LOOK = """() => [...document.querySelectorAll(".pp-stepper *")].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.offsetParent).map(e => {
  const behind = [];
  for (let at = e; at; at = at.parentElement) behind.push(getComputedStyle(at).backgroundColor);
  return [e.textContent, getComputedStyle(e).color, behind]; })"""

# What stands over the edge of the stepper.
SPILLS = """() => {
  const edge = document.querySelector(".pp-stepper").getBoundingClientRect();
  return [...document.querySelectorAll(".pp-stepper *:not(svg *)")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.left < edge.left || box.right > edge.right); }).map(e => e.outerHTML); }"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def bare(browser):
    """A blank page with the script alone."""
    page = browser.new_page()
    page.add_script_tag(path=THEME / "stepper.js")
    yield page
    page.close()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(task, mode, width) -> the stepper on a page opened from file://, with everything heard kept."""
    opened = []

    def once(task=TASK, *, mode="light", width=390, script=True, motion="reduce"):
        context = browser.new_context(
            viewport={"width": width, "height": 844}, reduced_motion=motion, java_script_enabled=script)
        context.set_default_timeout(5_000)
        # the theme imports this one, which only a build of Sphinx writes
        context.route("**/basic.css", lambda route: route.fulfill(body="", content_type="text/css"))
        page = context.new_page()
        opened.append(context)
        page.heard = []
        page.on("console", lambda message: page.heard.append(message.text))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("request", lambda r: r.url.startswith("file:") or page.heard.append(r.url))
        fragment = stepper_html("here", stepper_data(task)).replace(SCRIPT, (THEME / "stepper.js").as_uri())
        styles = "".join(f'<link rel="stylesheet" href="{path.as_uri()}">' for path in STYLES)
        file = tmp_path / f"{len(opened)}.html"
        file.write_text(PAGE.format(mode=mode, styles=styles, fragment=fragment), encoding="utf-8")
        page.goto(file.as_uri())
        return page

    yield once
    for context in opened:
        context.close()


def as_inputs(instances, **more):
    columns = [instances.z0.tolist(), *(table.tolist() for table in instances.tables), instances.w.tolist()]
    return [{"z0": z0, "tables": tables, "w": w} | more
            for z0, *tables, w in zip(*columns, strict=True)]


def torch_run(task, instances, multiple=2.0):
    """Attention and residual of the token w, and its logits: in doubles, at c = multiple · c*."""
    model = sequential_composition_decoder(task, dtype=torch.float64)
    for layer in model.layers:
        layer.attention.W_Q.weight.data *= multiple / 2.0
    with torch.inference_mode():
        trace = model.trace(task.tokens(instances), read=("residual", "attention_weight"))
    return (trace.attention_weight[:, :, 0, -1].transpose(0, 1), trace.residual[:, :, -1].transpose(0, 1),
            trace.logits[:, -1])


def assert_same(found, expected):
    for mine, torchs in zip(zip(*found, strict=True), expected, strict=False):
        assert torch.allclose(torch.tensor(mine, dtype=torch.float64), torchs, rtol=0, atol=ROUNDING)


# ---- the forward pass -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("multiple", [2.0, 1.0, 0.3, 0.05])
def test_the_page_computes_what_torch_computes_on_every_input(bare, multiple):
    (everything,) = TASK.all_inputs()
    more = {} if multiple == 2.0 else {"sharpness": multiple}
    found = bare.evaluate(RUN, [stepper_data(TASK), as_inputs(everything, **more)])
    assert len(found) == TASK.n_inputs == 4096
    attention, residual, logits = torch_run(TASK, everything, multiple)
    assert attention.shape == (4096, 3, 8) and residual.shape == (4096, 4, 19) and logits.shape == (4096, 4)
    assert_same(found, (attention, residual, logits))
    answers = torch.tensor([one[2] for one in found]).argmax(dim=1)
    assert answers.eq(logits.argmax(dim=1)).all()
    truth = TASK.steps(everything)
    assert [one[3] for one in found] == truth.tolist(), "the definition in the page is that of the task"
    wrong = int((answers != truth[:, -1]).sum())
    assert wrong == 0 if multiple >= 1 else wrong > 0


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("task", OTHERS, ids=str)
def test_it_does_so_for_other_sizes(bare, task):
    some = task.sample(200, seed=0)
    found = bare.evaluate(RUN, [stepper_data(task), as_inputs(some)])
    expected = torch_run(task, some)
    assert_same(found, expected)
    assert expected[2].argmax(dim=1).eq(task.answer(some)).all()
    assert [one[3] for one in found] == task.steps(some).tolist()


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_a_page_made_for_another_sharpness_takes_it_as_its_default(bare):
    (everything,) = TASK.all_inputs()
    c = 0.2 * least_sharpness(8)
    data = stepper_data(TASK, sharpness=c)
    assert data["sharpness"]["c"] == c and data["sharpness"]["multiple"] == pytest.approx(0.2)
    found = bare.evaluate(RUN, [data, as_inputs(everything)])
    assert_same(found, torch_run(TASK, everything, 0.2))


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_one_weight_changed_is_noticed(bare):
    (everything,) = TASK.all_inputs()
    data = stepper_data(TASK)
    data["layers"][1]["W_V"]["entries"][1][2] = -1  # the low bit of what layer 1 fetches
    found = bare.evaluate(RUN, [data, as_inputs(everything)])
    with pytest.raises(AssertionError):
        assert_same(found, torch_run(TASK, everything))
    assert any(torch.tensor(one[2]).argmax() != one[3][-1] for one in found)


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_inputs_are_numbered_as_the_task_numbers_them(bare):
    (everything,) = TASK.all_inputs()
    numbered = "([task, n]) => [...Array(n).keys()].map(i => ProofAndProbe.inputFromNumber(task, i))"
    assert bare.evaluate(numbered, [stepper_data(TASK)["task"], TASK.n_inputs]) == as_inputs(everything)


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("change, complaint", [
    ({"z0": 2}, "z0 is an integer from 0 to 1, got 2"),
    ({"tables": [[0, 1], [0, 1, 2, 4]]}, "z_2[3] is an integer from 0 to 3, got 4"),
    ({"tables": [[0, 1]]}, "tables of sizes 2,4"),
    ({"w": []}, "1 switches"),
    ({"sharpness": 0}, "a positive multiple of c*, got 0"),
])
def test_nonsense_is_refused(bare, change, complaint):
    data = stepper_data(TASK)
    told = bare.evaluate("""([data, input]) => {
        try { return ProofAndProbe.runDecoder(data, input); } catch (error) { return error.message; } }""",
        [data, data["input"] | change])
    assert complaint in told


# ---- what Python hands over -------------------------------------------------------------------------------


def test_the_exported_weights_are_those_of_the_model_to_the_last_bit():
    data = json.loads(json.dumps(stepper_data(TASK)))
    model = sequential_composition_decoder(TASK, dtype=torch.float64)
    state = dict(model.named_parameters())
    named = {"embedding.weight": data["embedding"], "W_U.weight": data["W_U"]}
    for t, layer in enumerate(data["layers"]):
        named |= {f"layers.{t}.attention.{name}.weight": layer[name] for name in ("W_Q", "W_K", "W_V", "W_O")}
        named |= {f"layers.{t}.mlp.{name}.weight": layer[name] for name in ("W_1", "W_2")}
        for name in ("1", "2"):
            assert layer[f"b_{name}"] == state.pop(f"layers.{t}.mlp.W_{name}.bias").tolist()
    assert named.keys() == state.keys(), "every weight is exported"
    for name, sparse in named.items():
        dense = torch.zeros(sparse["rows"], sparse["columns"], dtype=torch.float64)
        for row, column, weight in sparse["entries"]:
            assert weight != 0
            dense[row, column] = weight
        assert torch.equal(dense, state[name].detach())
    assert len(json.dumps(data)) < 10_000


def test_the_static_table_shows_one_run_from_beginning_to_end():
    page = stepper_html("here", stepper_data(TASK))
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>' + 4 * "<td>(.*?)</td>", page)
    assert [(asks, finds, after) for _, asks, finds, _, after in rows] == [
        ("z_0", "z_0", "i_0 = 0"), ("z_1 at i_0 = 0", "z_1(0)", "i_1 = 1"),
        ("z_2 at w_1 = 1, i_1 = 1", "z_2(1, 1)", "i_2 = 2")]
    assert all(float(weight) > 0.99 for _, _, _, weight, _ in rows)
    assert "The decoder answers 2; the definition says i_2 = 2." in page


@pytest.mark.parametrize("bad", ["", "1st", "a b", 'x"', "x<y", "ü"])
def test_an_id_that_would_need_escaping_is_refused(bad):
    with pytest.raises(ValueError, match="an id begins with a letter"):
        stepper_html(bad, stepper_data(TASK))


def test_no_string_of_the_data_can_end_the_script():
    data = stepper_data(TASK) | {"symbols": ["</script><script>"]}
    assert stepper_html("here", data).count("</script>") == 2


# ---- in the page ------------------------------------------------------------------------------------------


def press(page, name):
    """As a reader does, who may also press what is marked as disabled, and must hit what he sees."""
    button = page.get_by_role("button", name=name)
    button.click(force=button.get_attribute("aria-disabled") == "true")


def verdict(page):
    return page.locator(".pp-verdict").inner_text()


def counted(page):
    page.wait_for_function("document.querySelector('.pp-sharpness').dataset.wrong !== ''")
    return int(page.locator(".pp-sharpness").get_attribute("data-wrong"))


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_the_layers_are_walked_to_the_answer_and_back(visit):
    page = visit()
    assert page.locator("#here noscript, #here > table").count() == 0, "the static table has gone"
    after, steps = page.locator(".pp-after"), []
    press(page, "Previous layer")
    assert after.inner_text() == "before layer 1 of 3" and "–" in page.locator(".pp-token").first.inner_text()
    for _ in range(4):
        press(page, "Next layer")
        steps.append((after.inner_text(), verdict(page)))
    assert [text for text, _ in steps] == [
        "after layer 1 of 3", "after layer 2 of 3", "after layer 3 of 3", "after layer 3 of 3"]
    assert [said for _, said in steps[:2]] == [
        "Layer 1 reads z0 with weight >99.9\u202f%: current = i0 = 0 ✓",
        "Layer 2 reads z1(0) with weight 99.9\u202f%: current = i1 = 1 ✓"]
    assert steps[2][1].endswith("the decoder answers 2 ✓. The definition: i2 = z2(1, 1) = 2.")
    assert page.locator(".pp-chip").all_inner_texts() == ["type z2", "at w1 = 1", "at i = 1"]
    read = page.locator(".pp-token[data-read=true]").inner_text().split("\n")
    assert [line for line in read if line] == ["(1, 1)", "2", "99.7\u202f%", "11 c"]
    assert "current\n= i2 = 2" in page.locator(".pp-stream").inner_text().replace("\t", "\n")
    assert page.locator(".pp-logit-value").all_inner_texts() == ["0", "−2", "2", "0"]
    assert counted(page) == 0 and page.heard == []


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_it_is_worked_from_the_keyboard_alone(visit):
    page = visit()
    keys = page.keyboard
    value = page.get_by_label("z_2(1, 1) = 2")
    value.focus()
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert page.locator(".pp-after").inner_text() == "after layer 3 of 3" and "answers 2 ✓" in verdict(page)
    keys.press("ArrowUp")
    assert "answers 3 ✓" in verdict(page)
    keys.press("Enter")  # one more, round the end
    assert "answers 0 ✓" in verdict(page)
    keys.press("ArrowDown")
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    assert page.evaluate(focused).startswith("z_2(1, 1) = 3, of 0 to 3")
    keys.press("ArrowLeft")
    assert page.locator(".pp-after").inner_text() == "after layer 2 of 3"
    slider = page.get_by_role("slider", name="Sharpness")
    slider.focus()
    keys.press("ArrowLeft")
    assert page.locator(".pp-after").inner_text() == "after layer 2 of 3", "on the slider the arrows move it"
    assert float(slider.input_value()) == 1.95 and "1.95" in slider.get_attribute("aria-valuetext")
    page.get_by_role("button", name="Next layer").focus()
    keys.press("Space")
    keys.press("Space")  # at the end it does nothing and keeps the focus
    assert page.evaluate(focused) == "Next layer →"
    reached = set()
    page.locator(".pp-value").first.focus()
    for _ in range(13):
        reached.add(page.evaluate(focused))
        keys.press("Tab")
    assert len(reached) == 13, "8 values, 2 tools, back, forth, and the slider or what follows"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.locator(".pp-value").first.focus()
    keys.press("Tab")
    assert page.evaluate(outline) == "solid" and page.heard == []


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("multiple", [0.05, 0.2, 0.3, 0.35, 1.0])
def test_a_blunt_query_breaks_it_on_as_many_inputs_as_torch_says(visit, multiple):
    page = visit()
    page.get_by_role("slider").fill(str(multiple))
    page.wait_for_timeout(200)
    (everything,) = TASK.all_inputs()
    logits = torch_run(TASK, everything, multiple)[2]
    wrong = int((logits.argmax(dim=1) != TASK.answer(everything)).sum())
    assert counted(page) == wrong and (wrong > 0) == (multiple < 0.35)
    one = page.get_by_role("button", name="Show one")
    assert one.is_visible() == (wrong > 0)
    if wrong:
        one.click()
        assert f"✗, wrong at c = {multiple:.2f} c*." in verdict(page)
        assert page.locator(".pp-verdict").get_attribute("data-verdict") == "wrong"
        page.get_by_role("button", name="Reset").click()
        assert page.locator(".pp-after").inner_text() == "after layer 1 of 3" and "✓" in verdict(page)
        page.wait_for_timeout(200)
        assert counted(page) == 0
    assert page.heard == []


@pytest.mark.browser
@needs_chromium
def test_other_inputs_are_answered_rightly_and_the_result_is_announced(visit):
    page = visit()
    for _ in range(2):
        press(page, "Next layer")
    seen = set()
    for _ in range(12):
        page.get_by_role("button", name="Another input").click()
        assert page.locator(".pp-verdict").get_attribute("data-verdict") == "right" and "✓" in verdict(page)
        seen.add(" ".join(page.locator(".pp-value").all_inner_texts()))
    assert len(seen) > 6  # 12 draws among 4096: a chance below 1e-15 of so few
    assert page.locator(".pp-verdict").get_attribute("aria-live") == "polite"


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("task", [TASK, *OTHERS], ids=str)
@pytest.mark.parametrize("width", [320, 390, 800, 1200])
def test_nothing_spills_over_the_page_at_any_layer(visit, task, width):
    page = visit(task, width=width)
    for _ in range(task.L + 1):
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(SPILLS) == []
        press(page, "Next layer")
    assert page.heard == []


@pytest.mark.browser
@needs_chromium
def test_the_arcs_are_drawn_where_the_prompt_fits_one_line(visit):
    wide, narrow = visit(width=1000), visit(width=390)
    assert wide.locator(".pp-arcs path").count() == 8 and wide.locator(".pp-arcs").is_visible()
    assert not narrow.locator(".pp-arcs").is_visible()
    tops = {round(group.bounding_box()["y"]) for group in narrow.locator(".pp-group").all()}
    assert len(tops) == 2, "z_2 stands on one line of a phone, the rest on the next"
    narrow.set_viewport_size({"width": 1000, "height": 800})
    narrow.wait_for_selector(".pp-arcs path", state="visible")


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_the_arcs_end_above_their_tokens_also_when_only_the_tokens_move(visit):
    page = visit(width=1000)
    page.add_style_tag(content=".pp-group:first-of-type { flex-grow: 1 !important; }")
    page.wait_for_function("""() => {
        const middle = (one) => { const r = one.getBoundingClientRect(); return r.left + r.width / 2; };
        const spots = [...document.querySelectorAll(".pp-arcs circle")];
        return [...document.querySelectorAll(".pp-token")].every((token, i) =>
            Math.abs(middle(token) - middle(spots[i])) < 1);
    }""", timeout=5000)


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("sharpness", ["2", "0.2"])
def test_every_text_stands_out_from_what_is_behind_it(visit, mode, sharpness):
    page = visit(mode=mode)
    page.get_by_role("slider").fill(sharpness)
    page.wait_for_timeout(200)
    if counted(page):
        page.get_by_role("button", name="Show one").click()
    texts = []
    for name in ["Next layer"] * 2 + ["Previous layer"] * 3:
        press(page, name)
        texts += page.evaluate(LOOK)
    assert len(texts) > 400
    faint = {text for text, ink, behind in texts if contrast(rgba(ink), ground(behind)) < 4.5}
    assert not faint
    assert (luminance(ground(texts[0][2])) < 0.1) == (mode == "dark")


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("motion, seconds", [("reduce", "0s"), ("no-preference", "0.35s")])
def test_things_move_only_for_those_who_do_not_mind(visit, motion, seconds):
    page = visit(width=1000, motion=motion)
    found = page.locator(".pp-arcs path").first.evaluate("e => getComputedStyle(e).transitionDuration")
    assert found == seconds


@pytest.mark.browser
@needs_chromium
def test_without_script_the_worked_run_stands_there_and_fits_a_phone(visit):
    page = visit(script=False)
    assert page.locator("#here > table tbody tr").count() == 3
    assert "The decoder answers 2" in page.locator("#here").inner_text()
    assert page.locator("#here > table").bounding_box()["width"] <= 390


@pytest.mark.browser
@needs_chromium
def test_a_page_without_the_element_is_left_alone(visit):
    page = visit()
    before = page.content()
    assert page.evaluate("ProofAndProbe.mountStepper('absent', null)") is None
    assert page.content() == before and page.heard == []


def rgba(colour):
    """Red, green, blue (0 to 255) and opacity of a computed colour, which may be given as color(srgb …)."""
    numbers = [float(x) for x in re.findall(r"[0-9.]+(?:e-?\d+)?", colour)]
    if colour.startswith("color(srgb"):
        numbers = [255 * x for x in numbers[:3]] + numbers[3:]
    return (numbers + [1.0])[:4]


def ground(behind):
    """What is seen behind a text: colours from the element outwards, each over the next, white at last."""
    seen = [255.0] * 3
    for red, green, blue, opacity in map(rgba, reversed(behind)):
        seen = [opacity * x + (1 - opacity) * y for x, y in zip((red, green, blue), seen, strict=True)]
    return seen


def luminance(rgb):
    """Formula: WCAG 2.2, relative luminance of sRGB."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)
