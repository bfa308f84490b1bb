"""The chapter's pictures: captions and alt texts say what the numbers say, whatever they are."""

import pandas as pd
import pytest

from lib.figures import one_layer as draw
from lib.metrics.frontier import cube_frontier, frontier, reach


def trained(one, two, n=(8, 12), D=64):
    """Three seeds at each n, spread by ±0.01 around the given accuracies of one and two layers."""
    rows = []
    for L, accuracy in ((1, one), (2, two)):
        for size in n:
            for seed, off in enumerate((-0.01, 0.0, 0.01)):
                rows.append({"n": size, "L": L, "d_model": D, "seed": seed, "accuracy": accuracy + off,
                             "chance": 1 / size, "majority": 0.5})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("one", "two"), [(0.2, 0.98), (0.9, 0.3)])
def test_the_caption_of_a_training_figure_follows_the_numbers(one, two):
    figure = draw.depth_and_composition(trained(one, two), d_model=64)
    assert f"two layers reach a mean accuracy of {two:.2f}, one layer {one:.2f}" in figure.caption
    assert f"1-layer models {one:.2f}, {one:.2f}" in figure.alt
    pairs = draw.hidden_pairs(trained(one, two))
    assert f"1 layer, D = 64: {one:.2f}, {one:.2f}; 2 layers, D = 64: {two:.2f}" in pairs.caption


def test_the_picture_counts_the_layers_that_were_run_and_names_the_last_ratio():
    line = frontier([2**e for e in range(2, 13)])
    built = pd.DataFrame({"n": [4, 9, 36], "product": [36, 56, 140]})
    figure = draw.built_and_excluded(line, built)
    assert "3 layers run in exact arithmetic up to $n$ = 36" in figure.caption
    assert f"a factor of {line['ratio'].iloc[-1]:.1f} apart" in figure.caption


def test_the_precision_figure_says_where_each_format_first_errs_or_that_it_does_not():
    rows = pd.DataFrame(
        [("float64", 4, 0), ("float64", 16, 0), ("float16", 4, 0), ("float16", 16, 7)],
        columns=["arithmetic", "n", "errors"],
    ).assign(inputs=100)
    figure = draw.precision_breaks(rows)
    assert "float64 nowhere, float16 from $n$ = 16 (up to $n$ = 16" in figure.caption
    assert "float16 from n = 16" in figure.alt


def test_the_figure_of_demanded_sizes_ends_where_the_theorems_do():
    sizes = reach([1, 16], heads=2, mlp_widths=[64], theorems=["B**", "B*", "generic-VC"])
    figure = draw.demanded_sizes(sizes)
    last = sizes.iloc[-1]
    assert f"$n$ > {last['B**']:,.0f}" in figure.caption and f"{last['generic-VC']:,.0f}" in figure.alt


def test_the_figure_of_the_exponent_says_where_each_line_ends():
    sizes = cube_frontier([2, 4, 8])
    figure = draw.least_sizes(sizes)
    last = sizes.iloc[-1]
    assert f"B\\*\\* demands {last['demanded']} at $n$ = 512" in figure.caption
    assert f"Proposition T' takes {last['built']}" in figure.caption and "built ends at 12" in figure.alt
