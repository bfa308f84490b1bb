"""What layers contribute, what skipping them does, where predictions settle: pictures of measured depth."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.figures import COLOURS, Figure, curve_with_band, dots_with_intervals, style
from lib.figures.layers import look


@style()
def skip_matrices(now: np.ndarray, later: np.ndarray, finding: str) -> Figure:
    """Effects E[s, l] of skipping layer s on layer l > s, (L, L): at all tokens; at future tokens only."""
    fig, axes = plt.subplots(2, 1, figsize=(4.6, 8.2), sharex=True)
    L = len(now)
    names = ("all tokens", "future tokens only")
    for ax, matrix, name in zip(axes, (now, later), names, strict=True):
        shown = np.where(np.triu(np.ones_like(matrix), 1) > 0, matrix, np.nan)
        image = ax.imshow(shown, cmap="cividis_r", vmin=0, vmax=1, interpolation="nearest")
        ax.grid(False)
        ax.set(ylabel="layer skipped", title=name)
    axes[-1].set(xlabel="layer looked at")
    bar = fig.colorbar(image, ax=list(axes), location="bottom", shrink=0.9, aspect=30, extend="max")
    bar.set_label("relative change of its contribution")
    halves = _halves(now), _halves(later)
    alt = (
        f"Two triangles of {L} by {L} squares, darker where skipping changes a later layer more. Means, "
        f"first half skipped and second half skipped: all tokens {halves[0][0]:.2f} and {halves[0][1]:.2f}; "
        f"future tokens {halves[1][0]:.2f} and {halves[1][1]:.2f}."
    )
    return Figure(fig, finding, alt)


def _halves(matrix: np.ndarray) -> tuple[float, float]:
    """Mean effect of early layers on later ones, and among the layers of the second half."""
    L = len(matrix)
    rows, columns = np.triu_indices(L, 1)
    early = rows < L // 2
    return float(matrix[rows, columns][early].mean()), float(matrix[rows, columns][~early].mean())


@style()
def lens(rows: pd.DataFrame, finding: str) -> Figure:
    """The logit lens by layer. Columns layer, kl, kl_lo, kl_hi (nats, lens to final), overlap, overlap_lo,
    overlap_hi (share of the top five)."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(5.6, 5.2), sharex=True)
    every = max(1, len(rows) // 10)
    curve_with_band(top, rows["layer"], rows["kl"], rows["kl_lo"], rows["kl_hi"], markevery=every, **look(0))
    curve_with_band(bottom, rows["layer"], rows["overlap"], rows["overlap_lo"], rows["overlap_hi"],
                    markevery=every, **look(1))  # fmt: skip
    top.set(ylabel="KL to the output (nats)")
    bottom.set(ylabel="top-5 overlap", ylim=(-0.03, 1.03), xlabel="layer before which the lens reads")
    alt = (
        f"Two panels over layers. KL falls from {rows['kl'].max():.1f} to {rows['kl'].iloc[-1]:.2f} nats; "
        f"the overlap of the top five goes from {rows['overlap'].iloc[0]:.2f} to "
        f"{rows['overlap'].iloc[-1]:.2f}."
    )
    return Figure(fig, finding, alt)


@style()
def against_difficulty(
    lines: Mapping[str, pd.DataFrame], finding: str, *, ylabel: str, xlabel: str
) -> Figure:
    """A quantity against difficulty. lines: label -> columns difficulty, value, lo, hi."""
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    said = []
    for i, (label, rows) in enumerate(lines.items()):
        shift = 0.05 * (i - (len(lines) - 1) / 2)
        dots_with_intervals(ax, rows["difficulty"] + shift, rows["value"], rows["lo"], rows["hi"], line=True,
                            label=label, **look(i))  # fmt: skip
        said.append(f"{label} from {rows['value'].iloc[0]:.2f} to {rows['value'].iloc[-1]:.2f}")
    ticks = sorted({int(x) for rows in lines.values() for x in rows["difficulty"]})
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=ticks)
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Lines of the {ylabel} against {xlabel}: {'; '.join(said)}.")


@style()
def stitched(errors: np.ndarray, finding: str, *, source: str, target: str) -> Figure:
    """What the best linear map from each point of one model to each of another leaves unexplained, held-out.

    errors: (M + 1, L + 1), rows the source's residual streams. The best row of each column is marked.
    """
    fig, ax = plt.subplots(figsize=(5.6, 0.42 * len(errors) + 2.2))
    image = ax.imshow(errors, cmap="cividis", interpolation="nearest", aspect="auto")
    ax.grid(False)
    best = errors.argmin(axis=0)
    ax.plot(range(errors.shape[1]), best, linestyle="none", marker="o", markerfacecolor="white",
            markeredgecolor="black", markersize=6)  # fmt: skip
    relative = np.arange(errors.shape[1]) * (len(errors) - 1) / (errors.shape[1] - 1)
    ax.plot(range(errors.shape[1]), relative, color=COLOURS[1], linestyle="--", marker="")
    ax.set(xlabel=f"residual stream of {target}", ylabel=f"of {source}", yticks=range(len(errors)))
    bar = fig.colorbar(image, ax=ax, location="bottom", shrink=0.9, aspect=30)
    bar.set_label("share left unexplained, 1 - R²")
    alt = (
        f"Matrix of {errors.shape[0]} by {errors.shape[1]} errors from {errors.min():.2f} to "
        f"{errors.max():.2f}. White dots mark the best row of each column: {', '.join(map(str, best))}; the "
        "dashed line is equal relative depth."
    )
    return Figure(fig, finding, alt)


@style()
def trade_off(lines: Mapping[str, pd.DataFrame], finding: str, *, xlabel: str, ylabel: str) -> Figure:
    """One quantity bought with another. lines: label -> columns x, y and, where there is noise, lo, hi."""
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    said = []
    for i, (label, rows) in enumerate(lines.items()):
        if "lo" in rows:
            curve_with_band(ax, rows["x"], rows["y"], rows["lo"], rows["hi"], label=label, **look(i))
        else:
            ax.plot(rows["x"], rows["y"], label=label, **look(i))
        said.append(f"{label} from ({rows['x'].iloc[0]:.3g}, {rows['y'].iloc[0]:.3g}) to "
                    f"({rows['x'].iloc[-1]:.3g}, {rows['y'].iloc[-1]:.3g})")  # fmt: skip
    ax.set(xlabel=xlabel, ylabel=ylabel)
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"{ylabel} against {xlabel}: {'; '.join(said)}.")
