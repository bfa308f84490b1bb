"""How linear the step from layer to layer is, in pictures: scores, bias, and what removing layers costs.

Layers are counted from 0 on every axis, as in the code. A table of layers has one row a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from lib.figures import COLOURS, LINES, MARKERS, Figure, curve_with_band, dots_with_intervals, style
from lib.figures.layers import look
from lib.metrics.intervals import bootstrap


@style()
def two_scores(trained: pd.DataFrame, untrained: pd.DataFrame, name: str) -> Figure:
    """What the published score leaves unexplained beside what it may, and the score without the residual.

    trained, untrained: columns layer, with_residual, ratio (r), without, lo, hi (of `without`).
    """
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(5.6, 6.0), sharex=True)
    x, least = trained["layer"], 1e-5  # below lies nothing but rounding
    most = (trained["ratio"] ** 2).clip(least, 1)
    top.fill_between(x, least, most, color=COLOURS[4], alpha=0.25, linewidth=0)
    top.plot(x, most, color=COLOURS[4], marker="", linestyle=LINES[1], label="at most, $r^2$")
    for i, (label, rows) in enumerate({"trained": trained, "untrained": untrained}.items()):
        left = (1 - rows["with_residual"]).clip(lower=least)
        top.plot(rows["layer"], left, label=label, markevery=3, **look(i))
        curve_with_band(bottom, rows["layer"], rows["without"], rows["lo"], rows["hi"], markevery=3,
                        **look(i))  # fmt: skip
    top.axhline(0.01, color="black", linestyle=":", linewidth=1.2)
    top.text(1.01, 0.01, "0.99", transform=top.get_yaxis_transform(), va="center", fontsize=10.5)
    top.set(ylabel="1 - score with residual", yscale="log", ylim=(least, 1.3))
    bottom.set(ylabel="score without residual", ylim=(-0.03, 1.03), xlabel="layer")
    fig.legend(loc="outside upper center", ncols=3)
    middle = {key: trained[key].median() for key in ("with_residual", "ratio", "without")}
    caption = (
        f"{name}, layer by layer. Above: what the published score leaves unexplained (median score "
        f"{middle['with_residual']:.3f}; untrained {untrained['with_residual'].median():.3f}). However "
        "non-linear, a layer with steps of this length cannot leave more than the dashed line, a score of "
        f"{1 - middle['ratio'] ** 2:.3f} at the median step. Below: what a linear map explains of what the "
        f"layer *adds*, held-out, median {middle['without']:.2f} (untrained "
        f"{untrained['without'].median():.2f}). Bands: 95 % jackknife over groups of text."
    )
    alt = (
        f"Two panels over {len(trained)} layers. Above, on a logarithmic axis, one minus the score with the "
        f"residual, from {1 - trained['with_residual'].max():.5f} to "
        f"{1 - trained['with_residual'].min():.2f}, under a dashed bound. Below, scores without the "
        f"residual, from {trained['without'].min():.2f} to {trained['without'].max():.2f}."
    )
    return Figure(fig, caption, alt)


@style()
def bias(drawn: pd.DataFrame) -> Figure:
    """Three estimators of a known R^2 against the sample's size. Columns truth, ratio (N/D), estimator,
    mean, lo, hi, expected (of the raw score)."""
    truths = sorted(set(drawn["truth"]))
    fig, axes = plt.subplots(1, len(truths), figsize=(5.6, 3.7), sharey=True)
    for ax, truth in zip(np.atleast_1d(axes), truths, strict=True):
        part = drawn[drawn["truth"] == truth]
        for i, (name, rows) in enumerate(part.groupby("estimator", sort=False)):
            curve_with_band(ax, rows["ratio"], rows["mean"], rows["lo"], rows["hi"],
                            label=name if truth == truths[0] else None, **look(i))  # fmt: skip
        raw = part[part["estimator"] == "raw"]
        ax.plot(raw["ratio"], raw["expected"], color="black", marker="", linestyle=":",
                label="formula for raw" if truth == truths[0] else None)  # fmt: skip
        ax.set(xscale="log", xlabel="tokens per width, N/D", title=f"true $R^2={truth:g}$")
        ticks = [2, 5, 10, 20]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
    np.atleast_1d(axes)[0].set(ylabel="score", ylim=(-0.05, 1.02))
    fig.legend(loc="outside upper center", ncols=2)
    first, last = (drawn[drawn["ratio"] == f(drawn["ratio"])] for f in (min, max))
    at = {
        name: first[(first["estimator"] == name) & (first["truth"] == truths[0])]["mean"].item()
        for name in ("raw", "held-out", "adjusted")
    }
    off = (last["mean"] - last["truth"]).abs().groupby(last["estimator"]).max()
    caption = (
        f"Where nothing is to be found, the raw score finds {at['raw']:.2f} at N = {first['ratio'].iloc[0]:g}"
        f" D (adjusted {at['adjusted']:.2f}, held-out {at['held-out']:.2f}). At N = {last['ratio'].iloc[0]:g}"
        f" D the largest error left is {off['raw']:.3f} for raw, {off['held-out']:.3f} for held-out. Bands: "
        "95 % bootstrap intervals of the mean."
    )
    alt = (
        "Panels of scores against tokens per width. The raw score starts near "
        f"{at['raw']:.1f} and falls; adjusted and held-out scores lie flat on the truth."
    )
    return Figure(fig, caption, alt)


@style()
def shortened(curves: Mapping[str, pd.DataFrame], whole: float, finding: str) -> Figure:
    """Loss against the number of layers changed. curves: label -> columns count, loss, lo, hi."""
    fig, ax = plt.subplots(figsize=(5.6, 4.6))
    said = []
    for i, (label, rows) in enumerate(curves.items()):
        curve_with_band(ax, rows["count"], rows["loss"], rows["lo"], rows["hi"], label=label, **look(i))
        last = rows.iloc[-1]
        said.append(f"{label}: {rows['loss'].iloc[0]:.2f} at {rows['count'].iloc[0]:.0f}, "
                    f"{last['loss']:.2f} at {last['count']:.0f}")  # fmt: skip
    ax.axhline(whole, color="black", linestyle=":", linewidth=1.4)
    ax.set(xlabel="layers changed", ylabel="loss (nats per token)")
    fig.legend(loc="outside upper center", ncols=2)
    alt = f"Loss rising with the number of changed layers, from {whole:.2f}. {'; '.join(said)}."
    return Figure(fig, finding, alt)


@style()
def which_layers(table: pd.DataFrame, finding: str) -> Figure:
    """What each layer costs to drop and to linearise. Columns layer, skip, skip_lo, skip_hi, replace,
    replace_lo, replace_hi (loss increase, nats a token), recommendation (keep | linearise | drop)."""
    fig, ax = plt.subplots(figsize=(5.6, 0.21 * len(table) + 1.6))
    floor = max(1e-3, table[["skip", "replace"]].clip(lower=0).replace(0, np.nan).min().min() / 2)
    shades = {"drop": (COLOURS[2], 0.22), "linearise": (COLOURS[4], 0.22), "keep": (COLOURS[6], 0.0)}
    for y, advice in zip(table["layer"], table["recommendation"], strict=True):
        colour, alpha = shades[advice]
        ax.axhspan(y - 0.5, y + 0.5, color=colour, alpha=alpha, linewidth=0)
    for i, (part, label) in enumerate({"skip": "dropped", "replace": "replaced by a matrix"}.items()):
        value, lo, hi = (table[part + end].clip(lower=floor) for end in ("", "_lo", "_hi"))
        shift = table["layer"] + (0.14 if i else -0.14)
        ax.errorbar(value, shift, xerr=[value - lo, hi - value], label=label, color=COLOURS[i],
                    marker=MARKERS[i], linestyle="none", markersize=4.5, capsize=0)  # fmt: skip
    ax.set(xscale="log", xlabel="loss increase (nats per token)", ylabel="layer",
           ylim=(table["layer"].max() + 0.6, table["layer"].min() - 0.6))  # fmt: skip
    handles, labels = ax.get_legend_handles_labels()
    for advice, (colour, alpha) in shades.items():
        if alpha and (table["recommendation"] == advice).any():
            handles.append(Rectangle((0, 0), 1, 1, color=colour, alpha=alpha))
            labels.append(f"advice: {advice}")
    fig.legend(handles, labels, loc="outside upper center", ncols=2)
    dear, cheap = table.loc[table["skip"].idxmax()], table.loc[table["skip"].idxmin()]
    alt = (
        f"For each of {len(table)} layers two dots on a logarithmic axis of loss: dropped, and replaced by a "
        f"matrix. Dropping costs most at layer {dear['layer']:.0f} ({dear['skip']:.2f}) and least at layer "
        f"{cheap['layer']:.0f} ({cheap['skip']:.3f})."
    )
    return Figure(fig, finding, alt)


@style()
def tokens_as_text(
    tokens: Sequence[str], errors: Sequence[float], finding: str, *, width: int = 58
) -> Figure:
    """A passage with the background of each token as dark as its error. errors: >= 0, one a token."""
    errors = np.asarray(errors, dtype=float)
    top = np.quantile(errors, 0.98)
    places, line, column = [], 0, 0
    for token in tokens:
        text = token.replace("\n", " ")
        if column + len(text) > width and column:
            line, column = line + 1, 0
            text = text.lstrip()
        places.append((line, column, text))
        column += len(text)
    lines = line + 1
    fig, ax = plt.subplots(figsize=(5.6, 0.235 * lines + 0.5))
    ax.set_axis_off()
    for (row, start, text), error in zip(places, errors, strict=True):
        shade = min(1.0, error / top) if top > 0 else 0.0
        box = Rectangle((start, -row - 0.42), len(text), 0.84, color=COLOURS[1], linewidth=0)
        box.set_alpha(0.75 * shade**1.5)
        ax.add_patch(box)
        for k, letter in enumerate(text):
            if letter.strip():
                ax.text(start + k + 0.5, -row, letter, ha="center", va="center", fontsize=8.2,
                        family="DejaVu Sans Mono", parse_math=False)  # fmt: skip
    ax.set(xlim=(0, width), ylim=(-lines + 0.4, 0.6))
    worst = [tokens[i].strip() for i in np.argsort(errors)[::-1][:5]]
    alt = (
        f"A passage of {len(tokens)} tokens, the worst mapped shaded darkest: "
        f"{', '.join(repr(word) for word in worst)}."
    )
    return Figure(fig, finding, alt, unlabelled=True)


@style()
def regularised(layers: Mapping[str, pd.DataFrame], finding: str) -> Figure:
    """Scores by layer, a panel each with and without the residual. layers: label -> columns layer,
    with_residual, without, one row a layer and seed."""
    fig, axes = plt.subplots(2, 1, figsize=(5.6, 5.8), sharex=True)
    names = {"with_residual": "with the residual", "without": "without the residual"}
    said = []
    for ax, (key, ylabel) in zip(axes, names.items(), strict=True):
        for i, (label, rows) in enumerate(layers.items()):
            groups = rows.groupby("layer")[key].agg(["mean", list])
            bands = [bootstrap(seeds, seed=0) if len(seeds) >= 3 else (m, m) for m, seeds in groups.values]
            lo, hi = (np.array(edge) for edge in zip(*bands, strict=True))
            mean = groups["mean"].to_numpy()
            dots_with_intervals(ax, groups.index + 0.05 * (i - len(layers) / 2), mean, np.minimum(lo, mean),
                                np.maximum(hi, mean), line=True,
                                label=label if ax is axes[0] else None, **look(i))  # fmt: skip
            said.append(f"{label} {ylabel}: mean {mean.mean():.3f}")
        ax.set(ylabel=ylabel)
    axes[-1].set(xlabel="layer")
    fig.legend(loc="outside upper center", ncols=2)
    return Figure(fig, finding, f"Two panels of scores over layers. {'; '.join(said)}.")
