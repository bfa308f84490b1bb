"""Figures: one style, and a `Figure` that cannot exist without caption, alt text and labelled axes.

A function that draws is decorated with `@style()`, takes numbers, and returns a `Figure`. The colours are
those of Okabe and Ito that show on white; marker and line style repeat what colour says. Files carry their
provenance.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))

STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=LINES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.labelsize": 13,
    "errorbar.capsize": 3,
    "figure.constrained_layout.use": True,
    "figure.figsize": (5.6, 3.6),  # inches; 5.6 in of 12 pt text is still 10.6 px high on a phone of 390 px
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the picture is the same everywhere
    "font.size": 12,
    "grid.alpha": 0.35,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "savefig.transparent": True,
    "svg.fonttype": "path",  # text as outlines: no font has to be installed where the book is read
    "svg.hashsalt": "proof-and-probe",
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
}


def style() -> AbstractContextManager:
    """The book's style, as a context or as the decorator of a function that draws: `@style()`."""
    return mpl.rc_context(STYLE)


@dataclass(frozen=True)
class Figure:
    """A finished picture with the words that belong to it.

    fig: a matplotlib figure, taken over (and closed, so that Jupyter does not show it a second time).
    caption: MyST; states the finding. alt: plain text; says what is to be seen. unlabelled: allows axes
    without labels. Raises ValueError on an empty caption or alt, an alt that is a file name, an axis without
    label, a title inside.
    """

    fig: matplotlib.figure.Figure
    caption: str
    alt: str
    unlabelled: bool = False

    def __post_init__(self):
        plt.close(self.fig)
        if not self.caption.strip():
            raise ValueError("a figure needs a caption that states its finding")
        if not self.alt.strip():
            raise ValueError(
                "a figure needs alt text that says what is to be seen, for those who do not see it"
            )
        if re.search(r"[/\\]\S+\.\w+\s*$|^\S+\.(svg|png|jpe?g|pdf)\s*$", self.alt.strip(), re.IGNORECASE):
            raise ValueError(f"alt text {self.alt!r} is a file name; say what is to be seen")
        axes = [ax for ax in self.fig.axes if ax.axison and ax.get_label() != "<colorbar>"]
        titled = [self.fig.get_suptitle()] + [ax.get_title() for ax in axes if len(axes) == 1]
        if any(titled):
            raise ValueError(
                f"no title inside the picture ({next(filter(None, titled))!r}); put it into the caption"
            )
        if not self.unlabelled:
            _check_labels(self.fig, axes)

    def save(self, folder: Path, name: str, provenance: Mapping) -> dict[str, Path]:
        """Write `name`.svg and `name`.png, provenance inside. -> {"svg": path, "png": path}."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(provenance, sort_keys=True)
        paths = {kind: folder / f"{name}.{kind}" for kind in ("svg", "png")}
        with style():
            self.fig.savefig(paths["svg"], metadata={"Description": text, "Date": None})
            self.fig.savefig(paths["png"], metadata={"Description": text, "Software": None}, dpi=200)
        return paths

    def markdown(self, file: str, label: str, legend: str = "") -> str:
        """The MyST figure directive that shows `file`, a path relative to the page, under `label`."""
        alt = json.dumps(" ".join(self.alt.split()), ensure_ascii=False)
        width = round(100 * self.fig.get_figwidth())  # 100 px an inch: text of 12 pt is 17 px high on a desk
        return (
            f"```{{figure}} {file}\n:name: {label}\n:alt: {alt}\n"
            f":class: dark-light book-figure\n:width: {width}px\n\n"
            f"{' '.join(self.caption.split())}\n" + (f"\n{legend}\n" if legend else "") + "```"
        )

    def html(self, svg: Path, legend: str = "") -> str:
        """The picture inline, for JupyterLab. White behind it, since its text is black."""
        data = base64.b64encode(svg.read_bytes()).decode()
        return (
            f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{html.escape(self.alt)}" '
            f'style="max-width: 100%; background: white"><figcaption>{html.escape(self.caption, quote=False)}'
            f"{'<br>' + html.escape(legend, quote=False) if legend else ''}</figcaption></figure>"
        )


def read_provenance(path: Path) -> dict:
    """The provenance that `Figure.save` put into an SVG or PNG file. Raises ValueError if there is none."""
    path = Path(path)
    if path.suffix == ".svg":
        found = ElementTree.parse(path).getroot().find(".//{http://purl.org/dc/elements/1.1/}description")
        text = None if found is None else found.text
    elif path.suffix == ".png":
        from PIL import Image  # comes with matplotlib

        with Image.open(path) as image:
            text = image.info.get("Description")
    else:
        raise ValueError(f"{path.name}: figures of this book are .svg or .png")
    if not text:
        raise ValueError(f"{path.name}: holds no provenance; lib.figures did not save it")
    return json.loads(text)


def dots_with_intervals(
    ax,
    x: Sequence[float],
    y: Sequence[float],
    lo: Sequence[float],
    hi: Sequence[float],
    *,
    label=None,
    line=False,
    **kw,
):
    """Points with error bars. x, y, lo, hi: (n,), each point inside [lo, hi]. line: joins the points."""
    y, lo, hi = _interval(y, lo, hi)
    return ax.errorbar(
        x, y, yerr=[y - lo, hi - y], label=label, **({} if line else {"linestyle": "none"}), **kw
    )


def curve_with_band(
    ax, x: Sequence[float], y: Sequence[float], lo: Sequence[float], hi: Sequence[float], *, label=None, **kw
):
    """A curve in its band. x, y, lo, hi: (n,), the curve inside its band [lo, hi]."""
    y, lo, hi = _interval(y, lo, hi)
    (curve,) = ax.plot(x, y, label=label, **kw)
    ax.fill_between(x, lo, hi, color=curve.get_color(), alpha=0.2, linewidth=0)
    return curve


def _interval(*given: Sequence[float]) -> list[np.ndarray]:
    y, lo, hi = (np.asarray(part, dtype=float) for part in given)
    if not ((lo <= y) & (y <= hi)).all():
        raise ValueError(
            "a point lies outside its interval: need lo <= y <= hi everywhere; are lo and hi swapped?"
        )
    return [y, lo, hi]


def _check_labels(fig: matplotlib.figure.Figure, axes: list) -> None:
    for which in ("x", "y"):
        if getattr(fig, f"get_sup{which}label")():
            continue
        for ax in axes:
            shared = getattr(ax, f"get_shared_{which}_axes")().get_siblings(ax)
            if not any(getattr(other, f"get_{which}label")() for other in shared):
                raise ValueError(
                    f"axes {axes.index(ax) + 1} of {len(axes)} has no {which} label; name the quantity and "
                    "its unit, or pass unlabelled=True for a diagram"
                )
