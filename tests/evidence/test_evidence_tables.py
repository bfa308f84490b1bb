import numpy as np
import pandas as pd
import pytest

from lib.evidence import show
from lib.evidence.tables import badge, inline_html, number

NUMBERS = [
    (3, "3"),
    (12_345, "12,345"),
    (0.123456, "0.1235"),
    (4.0, "4"),
    (1.5e-7, "1.5e-07"),
    (1e9, "1e+09"),
    (np.float32(0.5), "0.5"),
    (np.int64(7), "7"),
    (True, "yes"),
    (np.bool_(False), "no"),
    (None, "–"),
    (float("nan"), "–"),
    (float("inf"), "inf"),
    ((0.12345, 2), "[0.1235, 2]"),
    ("$n^2$", "$n^2$"),
]


@pytest.mark.parametrize("value, shown", NUMBERS)
def test_a_value_is_shown_to_four_digits(value, shown):
    assert number(value) == shown


def test_a_table_has_no_index_column_and_aligns_numbers_right():
    shown = show(
        pd.DataFrame({"n": [8, 16], "what": ["a|b", "c"], "loss": [0.5, 0.25]}), formats={"loss": ".3f"}
    )
    assert shown.markdown == (
        "~~~~{div} table-scroll\n| n | what | loss |\n|---:|---|---:|\n"
        "| 8 | a\\|b | 0.500 |\n| 16 | c | 0.250 |\n~~~~"
    )
    assert shown.html.startswith('<div class="table-scroll"') and shown.html.count("<th scope") == 3
    assert shown.html.count("<tr>") == 3 and "a|b" in shown.html
    assert shown.frame["n"].tolist() == [8, 16]


def test_a_caption_may_hold_a_citation_and_gives_the_table_a_label():
    shown = show(pd.DataFrame({"n": [1]}), caption="All runs,\n{cite}`a`", name="tab-runs").markdown
    assert '\n~~~{table} All runs, {cite}`a`\n:name: "tab-runs"\n\n| n |' in shown


@pytest.mark.parametrize(
    "frame, more, message",
    [
        ({"n": [1]}, {"formats": {"m": ".1f"}}, r"formats names \['m'\]"),
        ({"": [1]}, {}, "every column needs a name"),
        ({"n": [1]}, {"name": "tab-n"}, "only a table with a caption"),
    ],
)
def test_a_table_that_could_not_be_read_is_refused(frame, more, message):
    with pytest.raises(ValueError, match=message):
        show(pd.DataFrame(frame), **more)


def test_html_is_escaped_except_for_our_own_badges():
    text = f"{badge('supported')} <script>x</script> `a<b` **bold** [page](one.ipynb) {{cite}}`key`"
    shown = inline_html(text)
    assert (
        '<span class="verdict verdict-supported"><span aria-hidden="true">✓</span> supported</span>' in shown
    )
    assert "<script>" not in shown and "<code>a&lt;b</code>" in shown and "<strong>bold</strong>" in shown
    assert '<a href="one.ipynb">page</a>' in shown and shown.endswith(" key")
