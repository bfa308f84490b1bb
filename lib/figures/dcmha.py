"""Composed heads: ranks of scores, who reads through whom, three clocks, scaling, and the bill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.figures import Figure, curve_with_band, dots_with_intervals, style
from lib.figures.layers import look, plain_ticks
from lib.metrics.intervals import bootstrap

CLOCKS = {"steps": "training steps", "flops": "training arithmetic (FLOPs)", "seconds": "core seconds"}


@style()
def spectra(values: Mapping[str, Sequence[float]], limits: Mapping[str, int], finding: str) -> Figure:
    """Singular values of score matrices, largest first, relative to the largest; limits: proved ranks."""
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    for i, (label, s) in enumerate(values.items()):
        s = np.asarray(s, dtype=float)
        shown = np.maximum(s / s[0], 1e-17)
        ax.plot(range(1, len(s) + 1), shown, label=label, markevery=(3 * i, 16), **look(i))
    for limit in sorted(set(limits.values())):
        ax.axvline(limit + 0.5, color="black", linestyle=":", linewidth=1.4)
        ax.annotate(f"{limit}", (limit + 0.5, 3), xytext=(4, 0), textcoords="offset points", va="center")
    ax.set(yscale="log", ylim=(1e-18, 20), xlabel="singular value, by size", ylabel="relative to the largest")
    fig.legend(loc="outside upper center", ncols=2)
    said = "; ".join(f"{label} falls to rounding error after {limits[label]}" for label in values)
    return Figure(fig, finding, f"Singular values on a logarithmic axis: {said}.")


@style()
def who_reads_through_whom(
    maps: np.ndarray, finding: str, *, rows: Sequence[str], columns: Sequence[str]
) -> Figure:
    """Composition by question. maps (C, W, H, H): from the pattern of head g (down) to value h (across).

    rows, columns: what a query asks, the names of the C and W values.
    """
    C, W, H, _ = maps.shape
    fig, axes = plt.subplots(C, W, figsize=(5.6, 4.1 * C / W + 0.8), squeeze=False, sharex=True, sharey=True)
    most = np.abs(maps).max()
    for c in range(C):
        for w in range(W):
            ax = axes[c, w]
            image = ax.imshow(maps[c, w], cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
            ax.grid(False)
            ax.set(xticks=range(H), yticks=range(H))
            ax.tick_params(length=0, labelsize=9)
            if c == 0:
                ax.set_xlabel(columns[w], fontsize=11 if W < 5 else 8.5)
                ax.xaxis.set_label_position("top")
            if w == 0:
                ax.set_ylabel(rows[c], fontsize=11)
    fig.supxlabel("read through the value of head", fontsize=12)
    fig.supylabel("pattern of head", fontsize=12)
    bar = fig.colorbar(image, ax=axes.ravel().tolist(), location="right", shrink=0.7, aspect=30)
    bar.set_label("weight of the pair")
    strongest = [
        f"{rows[c]}, {columns[w]}: head {g} through {h}"
        for c in range(C)
        for w in range(W)
        for g, h in [np.unravel_index(np.abs(maps[c, w]).argmax(), (H, H))]
    ]
    alt = (
        f"{C} by {W} squares of {H} by {H} weights, red positive, blue negative, one for each kind of "
        f"question. Strongest pair: {'; '.join(strongest)}."
    )
    return Figure(fig, finding, alt)


@style()
def three_clocks(curves: Mapping[str, pd.DataFrame], finding: str, *, ylabel: str = "accuracy") -> Figure:
    """The same training against steps, arithmetic and time. curves: label -> columns steps, flops, seconds,
    seed, value; the seeds of a label are evaluated after the same steps."""
    fig, axes = plt.subplots(3, 1, figsize=(5.6, 8.4), sharey=True)
    said = []
    for i, (label, rows) in enumerate(curves.items()):
        table = rows.pivot_table(index="steps", columns="seed", values="value")
        mean = table.mean(axis=1)
        lo, hi = _bands(table)
        for ax, (clock, xlabel) in zip(axes, CLOCKS.items(), strict=True):
            x = rows.groupby("steps")[clock].mean() if clock != "steps" else table.index
            curve_with_band(ax, np.asarray(x), mean, lo, hi, label=label if ax is axes[0] else None,
                            markevery=max(1, len(mean) // 8), **look(i))  # fmt: skip
            ax.set(xlabel=xlabel, ylabel=ylabel)
        said.append(f"{label} reaches {mean.iloc[-1]:.2f}")
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Three panels, one a clock: steps, arithmetic, time. {'; '.join(said)}.")


def _bands(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean of each row; the mean itself below 3 seeds."""
    mean = table.mean(axis=1).to_numpy()
    bands = [bootstrap(line, seed=0) if len(line) >= 3 else (m, m)
             for m, line in zip(mean, table.to_numpy(), strict=True)]  # fmt: skip
    lo, hi = (np.array(edge) for edge in zip(*bands, strict=True))
    return np.minimum(lo, mean), np.maximum(hi, mean)


@style()
def against_width(lines: Mapping[str, pd.DataFrame], finding: str, *, xlabel: str, ylabel: str) -> Figure:
    """A quantity against a size that doubles. lines: label -> columns x, value, lo, hi."""
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    said = []
    for i, (label, rows) in enumerate(lines.items()):
        dots_with_intervals(ax, rows["x"], rows["value"], rows["lo"], rows["hi"], line=True, label=label,
                            **look(i))  # fmt: skip
        ends = rows.iloc[[0, -1]]
        said.append(f"{label}: " + " to ".join(f"{v:.2f} at {x:g}" for x, v in zip(ends["x"], ends["value"],
                                                                                 strict=True)))  # fmt: skip
    ticks = sorted({float(x) for rows in lines.values() for x in rows["x"]})
    ax.set_xscale("log", base=2)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Lines of the {ylabel} against {xlabel}: {'; '.join(said)}.")


@style()
def scaling(points: Mapping[str, pd.DataFrame], fits: Mapping[str, pd.DataFrame], finding: str) -> Figure:
    """Loss against compute. points: label -> columns flops, value, lo, hi; fits: label -> flops, value."""
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    said = []
    for i, (label, rows) in enumerate(points.items()):
        dots_with_intervals(ax, rows["flops"], rows["value"], rows["lo"], rows["hi"], label=label,
                            **{k: v for k, v in look(i).items() if k != "linestyle"})  # fmt: skip
        if label in fits:
            line = {k: v for k, v in look(i).items() if k != "marker"}
            ax.plot(fits[label]["flops"], fits[label]["value"], marker="", **line)
        said.append(f"{label} from {rows['value'].iloc[0]:.3f} to {rows['value'].iloc[-1]:.3f}")
    ax.set(xscale="log", yscale="log", xlabel="training arithmetic (FLOPs)", ylabel="loss (nats a token)")
    plain_ticks(ax)
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Loss against training arithmetic, both logarithmic: {'; '.join(said)}.")


@style()
def bill(lines: Mapping[str, pd.DataFrame], finding: str, *, ylabel: str) -> Figure:
    """Ratios of times against the length of the text. lines: label -> columns T, value, lo, hi."""
    fig, ax = plt.subplots(figsize=(5.6, 4.2))
    said = []
    for i, (label, rows) in enumerate(lines.items()):
        dots_with_intervals(ax, rows["T"], rows["value"], rows["lo"], rows["hi"], line=True, label=label,
                            **look(i))  # fmt: skip
        said.append(f"{label} from {rows['value'].iloc[0]:.2f} to {rows['value'].iloc[-1]:.2f}")
    ax.axhline(1, color="black", linestyle=":", linewidth=1.4)
    ticks = sorted({int(T) for rows in lines.values() for T in rows["T"]})
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="tokens T", ylabel=ylabel)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    plain_ticks(ax)
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Ratios against the number of tokens, 1 is marked: {'; '.join(said)}.")
