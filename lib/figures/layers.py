"""Pictures of many models and experiments: curves over layers, over training steps, paired differences.

The finding is the caller's: these functions draw, say in the alt text what is drawn, and add no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lib.figures import COLOURS, LINES, MARKERS, Figure, curve_with_band, style
from lib.metrics.intervals import bootstrap


def look(i: int) -> dict:
    """Colour, marker and line style number i: each repeats what the others say."""
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i]}


def plain_ticks(ax) -> None:
    """1, 2, 5, 10, ... on a logarithmic vertical axis, in plain numbers."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


@style()
def per_layer(
    lines: Mapping[str, pd.DataFrame],
    finding: str,
    *,
    ylabel: str,
    ylim: tuple[float, float] | None = None,
    log: bool = False,
) -> Figure:
    """Curves over layers. lines: label -> columns layer, value and, where there is noise, lo, hi."""
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    said = []
    for i, (label, rows) in enumerate(lines.items()):
        every = max(1, len(rows) // 10)
        if "lo" in rows:
            curve_with_band(ax, rows["layer"], rows["value"], rows["lo"], rows["hi"], label=label,
                            markevery=every, **look(i))  # fmt: skip
        else:
            ax.plot(rows["layer"], rows["value"], label=label, markevery=every, **look(i))
        low, high = rows["value"].min(), rows["value"].max()
        said.append(f"{label} {low:.2g} to {high:.2g}, median {rows['value'].median():.2g}")
    ax.set(xlabel="layer", ylabel=ylabel, yscale="log" if log else "linear")
    if ylim:
        ax.set(ylim=ylim)
    if log:
        plain_ticks(ax)
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Lines over layers of the {ylabel}: {'; '.join(said)}.")


@style()
def over_steps(curves: Mapping[str, pd.DataFrame], finding: str, *, ylabel: str) -> Figure:
    """Means over seeds against training steps. curves: label -> columns step, seed, value."""
    fig, ax = plt.subplots(figsize=(5.6, 3.9))
    said = []
    for i, (label, rows) in enumerate(curves.items()):
        table = rows.pivot_table(index="step", columns="seed", values="value")
        mean = table.mean(axis=1)
        bands = [bootstrap(line, seed=0) if len(line) >= 3 else (m, m)
                 for m, line in zip(mean, table.to_numpy(), strict=True)]  # fmt: skip
        lo, hi = (np.array(edge) for edge in zip(*bands, strict=True))
        curve_with_band(ax, table.index + 1, mean, np.minimum(lo, mean), np.maximum(hi, mean), label=label,
                        **look(i))  # fmt: skip
        said.append(f"{label} from {mean.iloc[0]:.2f} to {mean.iloc[-1]:.2f}")
    ax.set(xscale="log", xlabel="training steps done, plus 1", ylabel=ylabel)
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Curves against training steps on a logarithmic axis: {'; '.join(said)}.")


@style()
def differences(cells: Mapping[str, Sequence[float]], finding: str, *, xlabel: str) -> Figure:
    """Paired differences, a row of dots a cell, with the bootstrap interval of the mean. 0 is marked."""
    fig, ax = plt.subplots(figsize=(5.6, 0.52 * len(cells) + 1.2))
    said = []
    for i, (label, values) in enumerate(cells.items()):
        values = np.asarray(values, dtype=float)
        mean, dot = values.mean(), {"color": COLOURS[i % 6], "marker": MARKERS[i % 6]}
        ax.plot(values, [-i] * len(values), linestyle="none", alpha=0.45, **dot | {"marker": "."})
        lo, hi = bootstrap(values, seed=0) if len(values) >= 3 else (mean, mean)
        ax.errorbar([mean], [-i], xerr=[[max(0, mean - lo)], [max(0, hi - mean)]], **dot)
        said.append(f"{label}: {mean:+.3f}")
    ax.axvline(0, color="black", linestyle=":", linewidth=1.4)
    ax.set(xlabel=xlabel, ylabel=" ", ylim=(-len(cells) + 0.4, 0.6))
    ax.set_yticks([-i for i in range(len(cells))], list(cells))
    return Figure(fig, finding, f"Dots left and right of zero, one row a cell. {'; '.join(said)}.")
