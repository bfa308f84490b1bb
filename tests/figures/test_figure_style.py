import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lib.figures import (
    COLOURS,
    LINES,
    MARKERS,
    STYLE,
    Figure,
    curve_with_band,
    dots_with_intervals,
    read_provenance,
    style,
)

CAPTION, ALT = "It rises with $n$.", "A line that rises."


@style()
def drawn(xlabel="points n", ylabel="accuracy", **more):
    fig, ax = plt.subplots()
    for step in range(3):
        ax.plot([1, 2], [step, step + 1], label=f"series {step}")
    ax.set(xlabel=xlabel, ylabel=ylabel, **more)
    ax.legend()
    return fig


def test_a_whole_figure_is_accepted_and_not_shown_twice():
    fig = drawn()
    Figure(fig, CAPTION, ALT)
    assert fig.number not in plt.get_fignums()


@pytest.mark.parametrize(
    "more, caption, alt, message",
    [
        ({}, " ", ALT, "needs a caption"),
        ({}, CAPTION, "", "needs alt text"),
        ({}, CAPTION, "figures/rise.svg", "is a file name"),
        ({}, CAPTION, "rise.PNG", "is a file name"),
        ({"xlabel": ""}, CAPTION, ALT, "axes 1 of 1 has no x label"),
        ({"ylabel": ""}, CAPTION, ALT, "has no y label"),
        ({"title": "Rise"}, CAPTION, ALT, "no title inside the picture"),
    ],
)
def test_a_figure_that_some_reader_could_not_read_is_refused(more, caption, alt, message):
    with pytest.raises(ValueError, match=message):
        Figure(drawn(**more), caption, alt)
    assert not plt.get_fignums(), "a refused figure stays open"


def test_alt_text_may_mention_a_ratio_or_a_file():
    Figure(drawn(), CAPTION, "Loss of train.py falls at a rate of 1/n. It ends at 0.5.")


def test_a_diagram_may_go_without_labels_if_told():
    Figure(drawn(xlabel="", ylabel=""), CAPTION, ALT, unlabelled=True)


@style()
def test_shared_axes_colour_bars_and_hidden_axes_need_no_labels_of_their_own():
    fig, axes = plt.subplots(2, 2, sharex=True, sharey=True)
    axes[1, 0].set(xlabel="layer", ylabel="loss (nats)")
    axes[0, 0].set_title("one head")  # a panel may say which it is
    Figure(fig, CAPTION, ALT)
    fig, axes = plt.subplots(1, 2)
    axes[0].set(xlabel="key", ylabel="query")
    axes[1].axis("off")
    fig.colorbar(axes[0].imshow(np.eye(3)), ax=axes[0], label="weight")
    Figure(fig, CAPTION, ALT)
    fig, axes = plt.subplots(1, 2)
    axes[0].set(xlabel="key", ylabel="query")
    with pytest.raises(ValueError, match="axes 2 of 2 has no x label"):
        Figure(fig, CAPTION, ALT)
    fig, axes = plt.subplots(1, 2)
    fig.supxlabel("key")
    fig.supylabel("query")
    Figure(fig, CAPTION, ALT)


def test_both_formats_give_their_provenance_back(tmp_path):
    facts = {"profile": "quick", "text": 'ρ < "1" & 2', "numbers": [0.1, 1e-300], "nested": {"none": None}}
    paths = Figure(drawn(), CAPTION, ALT).save(tmp_path / "new", "toy", facts)
    assert {kind: read_provenance(path) for kind, path in paths.items()} == {"svg": facts, "png": facts}


def test_the_same_figure_is_the_same_file_to_the_byte(tmp_path):
    first, second = (Figure(drawn(), CAPTION, ALT).save(tmp_path / name, "toy", {"a": 1}) for name in "ab")
    for kind in ("svg", "png"):
        assert first[kind].read_bytes() == second[kind].read_bytes()
    other = Figure(drawn(), CAPTION, ALT).save(tmp_path / "c", "toy", {"a": 2})
    assert other["svg"].read_bytes() != first["svg"].read_bytes()


def test_the_svg_needs_no_font_and_no_network_and_lets_the_page_shine_through(tmp_path):
    text = Figure(drawn(), CAPTION, ALT).save(tmp_path, "toy", {})["svg"].read_text()
    assert "<text" not in text and "@font-face" not in text and "<image" not in text
    background, axes = text.split('id="patch_1"')[1], text.split('id="patch_2"')[1]
    assert all('style="fill: none"' in part.partition("</g>")[0] for part in (background, axes))
    assert text.count("http") == text.count("http://www.w3.org") + text.count("http://purl.org") + text.count(
        "http://creativecommons.org"
    ) + text.count("https://matplotlib.org")  # names of vocabularies and of the maker: nothing is fetched


def test_text_stays_readable_when_the_figure_is_as_wide_as_a_phone():
    width_px, margins_px = 390, 32
    scale = (width_px - margins_px) / (72 * STYLE["figure.figsize"][0])  # px a point
    sizes = [STYLE[key] for key in STYLE if key.endswith(("labelsize", "fontsize", "font.size"))]
    assert len(sizes) == 5 and min(sizes) * scale > 9.5


def brightness(colour, deficiency):
    """Red, green, blue as a dichromat sees them: Viénot, Brettel and Mollon (1999), linear approximation."""
    r, g, b = (c**2.2 for c in to_rgb(colour))
    l, m, s = (
        17.8824 * r + 43.5161 * g + 4.11935 * b,
        3.45565 * r + 27.1554 * g + 3.86714 * b,
        0.02996 * r + 0.18431 * g + 1.46709 * b,
    )
    if deficiency == "protan":
        l = 2.02344 * m - 2.52581 * s
    elif deficiency == "deutan":
        m = 0.494207 * l + 1.24827 * s
    return np.array([l, m, s]) / [65.5, 34.5, 1.68]


@pytest.mark.parametrize("deficiency", ["none", "protan", "deutan"])
def test_any_two_of_the_first_five_colours_differ_for_every_eye(deficiency):
    seen, compared = [brightness(colour, deficiency) for colour in COLOURS[:5]], 0
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert np.abs(a - b).max() > 0.05
            compared += 1
    assert compared == 10


def test_marker_and_line_repeat_what_colour_says():
    with style():
        fig, ax = plt.subplots()
        lines = [ax.plot([0, 1], [0, k])[0] for k in range(len(COLOURS))]
        plt.close(fig)
    assert [line.get_color() for line in lines] == list(COLOURS)
    assert [line.get_marker() for line in lines] == list(MARKERS)
    assert len(set(map(str, COLOURS))) == len(set(MARKERS)) == len(set(map(str, LINES))) == len(COLOURS)


def test_the_style_ends_where_it_is_left():
    before = plt.rcParams["font.size"], plt.rcParams["svg.fonttype"]
    drawn()
    plt.close("all")
    assert (plt.rcParams["font.size"], plt.rcParams["svg.fonttype"]) == before


@pytest.mark.parametrize("draw", [dots_with_intervals, curve_with_band])
def test_an_interval_is_drawn_where_it_is_and_a_point_outside_is_refused(draw):
    fig, ax = plt.subplots()
    draw(ax, [1, 2], [0.5, 0.6], [0.4, 0.3], [0.55, 0.9], label="ours")
    lows, highs = zip(
        *[(box.y0, box.y1) for box in (c.get_datalim(ax.transData) for c in ax.collections)], strict=True
    )
    assert np.isclose(min(lows), 0.3) and np.isclose(max(highs), 0.9)
    assert ax.get_legend_handles_labels()[1] == ["ours"]
    with pytest.raises(ValueError, match="outside its interval"):
        draw(ax, [1], [0.5], [0.6], [0.4])
    plt.close(fig)
