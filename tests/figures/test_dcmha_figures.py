"""Pictures of composed heads: they draw what they are given, and their alt texts say it."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.figures import dcmha as draw
from lib.figures import read_provenance


def curve(xs, values, name="x"):
    values = np.asarray(values, dtype=float)
    return pd.DataFrame({name: xs, "value": values, "lo": values - 0.1, "hi": values + 0.1})


def pictures():
    maps = np.zeros((2, 3, 4, 4))
    maps[1, 2, 3, 0] = -5.0
    seen = pd.DataFrame([
        {"steps": s, "flops": 10.0 * s, "seconds": s / 7, "seed": seed, "value": s / 100 + seed / 50}
        for s in (10, 20, 40) for seed in range(3)
    ])  # fmt: skip
    points = {"plain": curve([1e9, 1e10], [3.0, 2.0], "flops")}
    return {
        "spectra": draw.spectra({"alone": np.array([4.0, 1.0, 1e-16])}, {"alone": 2}, "It falls."),
        "maps": draw.who_reads_through_whom(maps, "One pair.", rows=["a", "b"], columns=["x", "y", "z"]),
        "clocks": draw.three_clocks({"plain": seen}, "It learns."),
        "width": draw.against_width({"plain": curve([2, 8], [0.2, 0.9])}, "Wider.", xlabel="width",
                                    ylabel="accuracy"),
        "scaling": draw.scaling(points, {"plain": pd.DataFrame({"flops": [1e9, 1e10], "value": [3.0, 2.0]})},
                                "It falls."),
        "bill": draw.bill({"attention": curve([128, 512], [1.5, 2.5], "T")}, "Dear.", ylabel="times plain"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, said",
    [
        ("spectra", "alone falls to rounding error after 2"),
        ("maps", "b, z: head 3 through 0"),
        ("clocks", "plain reaches 0.42"),
        ("width", "plain: 0.20 at 2 to 0.90 at 8"),
        ("scaling", "plain from 3.000 to 2.000"),
        ("bill", "attention from 1.50 to 2.50"),
    ],
)
def test_the_alt_text_says_what_is_drawn(name, said, tmp_path):
    figure = pictures()[name]
    assert said in figure.alt
    files = figure.save(tmp_path, name, {"profile": "quick"})
    assert read_provenance(files["svg"]) == read_provenance(files["png"]) == {"profile": "quick"}


def test_three_clocks_show_the_same_heights():
    figure = pictures()["clocks"]
    heights = [ax.lines[0].get_ydata() for ax in figure.fig.axes]
    assert len(heights) == 3 and all(np.array_equal(h, heights[0]) for h in heights)
    assert [ax.get_xlabel() for ax in figure.fig.axes] == list(draw.CLOCKS.values())


def test_a_point_outside_its_interval_is_refused():
    wrong = curve([2, 8], [0.2, 0.9]).assign(hi=0.0)
    with pytest.raises(ValueError, match="outside its interval"):
        draw.against_width({"plain": wrong}, "Wider.", xlabel="width", ylabel="accuracy")
    plt.close("all")  # what was begun
