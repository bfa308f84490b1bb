"""What one layer can and cannot do, in pictures: sizes demanded and built, precision, trained models."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd

from lib.figures import COLOURS, LINES, MARKERS, Figure, dots_with_intervals, style
from lib.metrics.intervals import bootstrap


@style()
def demanded_sizes(sizes: pd.DataFrame) -> Figure:
    """Size against the largest allowed n.

    sizes: column product, H (d+1) (depth+1), and one column a theorem with the largest n that it allows.
    """
    fig, ax = plt.subplots()
    for theorem in sizes.columns.drop("product"):
        ax.plot(sizes[theorem], sizes["product"], label=theorem, markevery=2)
    ax.set(
        xscale="log", yscale="log", xlabel="points n that the layer composes on", ylabel="size  H (d+1) (Λ+1)"
    )
    ax.legend(loc="lower right")
    last = sizes.iloc[-1]
    caption = (
        "Right of a curve, a layer of that size is impossible at any precision (two heads, one hidden layer "
        f"of 64 neurons, $d$ from 1 to {last['product'] / 4 - 1:,.0f}). For the largest layer drawn, the "
        f"generic VC bound (our operation count) excludes $n$ > {last['generic-VC']:,.0f}; counting layer by "
        f"layer excludes $n$ > {last['B**']:,.0f}, sharper by a factor of "
        f"{last['generic-VC'] / last['B**']:,.0f}."
    )
    alt = (
        "Line plot on logarithmic axes: the size of a layer against the largest n each theorem allows it. "
        f"The curves end at n = {last['B**']:,.0f} for B**, {last['B*']:,.0f} for B* and "
        f"{last['generic-VC']:,.0f} for the generic VC bound."
    )
    return Figure(fig, caption, alt)


@style()
def least_sizes(sizes: pd.DataFrame) -> Figure:
    """The exponent: least max(H, d+1, depth+1) against n. sizes: columns n, demanded, generic, built."""
    fig, ax = plt.subplots()
    ax.fill_between(sizes["n"], 1, sizes["demanded"], color=COLOURS[1], alpha=0.22, linewidth=0)
    labels = {"built": "built (Proposition T')", "demanded": "demanded (B**)", "generic": "generic VC"}
    for i, (column, label) in enumerate(labels.items()):
        look = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i]}
        ax.plot(sizes["n"], sizes[column], label=label, **look)
    ax.set(
        xscale="log", yscale="log", xlabel="points n that the layer composes on", ylabel="max(H, d+1, Λ+1)",
        ylim=(1, None),
    )  # fmt: skip
    ax.legend(loc="upper left")
    first, last = sizes.iloc[0], sizes.iloc[-1]
    decades = math.log(last["n"] / first["n"])
    slope = {column: math.log(last[column] / first[column]) / decades for column in ("demanded", "built")}
    end = {column: f"{last[column]:,.0f}" for column in sizes.columns}
    caption = (
        "The paper's $n^{\\Omega(1)}$, with an exponent: the largest of heads, value dimension and MLP "
        f"depth. B\\*\\* demands {end['demanded']} at $n$ = {end['n']} (slope {slope['demanded']:.2f} over "
        f"the range), Proposition T' takes {end['built']} (slope {slope['built']:.2f}), the generic VC bound "
        f"(our operation count) demands {end['generic']}. MLP widths up to $2n+5$."
    )
    alt = (
        "Log-log plot of the largest of heads, value dimension and MLP depth against n. At the largest n the "
        f"line built ends at {end['built']}, demanded by B** at {end['demanded']}, the generic VC bound at "
        f"{end['generic']}."
    )
    return Figure(fig, caption, alt)


@style()
def built_and_excluded(line: pd.DataFrame, built: pd.DataFrame) -> Figure:
    """What is impossible, what is built.

    line: columns n, demanded (Theorem B**), built (formula of Proposition T). built: columns n, product of
    the constructions that were run without error.
    """
    fig, ax = plt.subplots(figsize=(5.6, 4.4))
    floor, n = 0.5 * line["demanded"].min(), line["n"]
    ax.fill_between(n, floor, line["demanded"], color=COLOURS[1], alpha=0.22, linewidth=0)
    ax.plot(n, line["demanded"], color=COLOURS[1], linestyle=LINES[1], marker="")
    ax.plot(n, line["built"], color=COLOURS[0], linestyle=LINES[0], marker="")
    blue = {"color": COLOURS[0], "linestyle": "none", "marker": MARKERS[0], "fillstyle": "none"}
    ax.plot(built["n"], built["product"], **blue)
    ax.set(
        xscale="log", yscale="log", xlabel="points n that the layer composes on",
        ylabel="size  H (d+1) (Λ+1)", ylim=(floor, None), xlim=(0.8 * built["n"].min(), n.max()),
    )  # fmt: skip
    label = {"transform": ax.transAxes, "ha": "center", "fontweight": "bold"}
    ax.text(0.72, 0.26, "impossible\nat any precision", color="#8c3d00", **label)
    ax.text(0.3, 0.78, "built (Proposition T);\ncircles: run exactly", color=COLOURS[0], **label)
    at = line.iloc[-4]
    ax.annotate("", (at["n"], at["demanded"]), (at["n"], at["built"]),
                arrowprops={"arrowstyle": "<->", "color": "black", "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    ax.text(at["n"] / 1.4, 1.3 * at["built"], f"× {at['ratio']:.1f}", ha="right")
    last = line.iloc[-1]
    caption = (
        "Precision does not buy composition; heads, value dimension and MLP depth do. In the shaded region "
        "(Theorem B\\*\\*, MLP widths up to those of Proposition T, about $2n$) no layer composes, with any "
        "number of digits. On the solid line (Proposition T) one does; the circles "
        f"are {len(built)} layers run in exact arithmetic up to $n$ = {built['n'].max():,}. At $n$ = "
        f"{last['n']:,.0f} the two lines are a factor of {last['ratio']:.1f} apart."
    )
    alt = (
        "Size of a layer against the number of points it composes on, both logarithmic. The region below a "
        "rising dashed line is shaded and labelled impossible at any precision. A solid line runs parallel "
        f"above it, {last['ratio']:.1f} times as high at its end, with circles for layers that were run."
    )
    return Figure(fig, caption, alt)


@style()
def precision_breaks(rows: pd.DataFrame) -> Figure:
    """Share of wrong answers by number format. rows: columns arithmetic, n, errors, inputs."""
    fig, ax = plt.subplots()
    first = []
    for i, (arithmetic, group) in enumerate(rows.groupby("arithmetic", sort=False)):
        group = group.sort_values("n")
        share = group["errors"] / group["inputs"]
        ax.plot(
            group["n"], 100 * share, label=arithmetic, marker=MARKERS[i], linestyle=LINES[i], color=COLOURS[i]
        )
        wrong = group.loc[share > 0, "n"]
        first.append(f"{arithmetic} from $n$ = {wrong.min()}" if len(wrong) else f"{arithmetic} nowhere")
    ax.set(
        xscale="log", xlabel="points n that the layer composes on", ylabel="wrong answers (%)", ylim=(-4, 104)
    )
    ticks = [n for n in (2, 4, 9, 16, 25, 49, 100) if n <= rows["n"].max()]
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.legend(loc="upper left")
    caption = (
        f"The same weights, rounded. First errors: {', '.join(first)} (up to $n$ = {rows['n'].max()}, "
        f"block size $s=\\lfloor\\sqrt n\\rfloor$, {rows['inputs'].max():,} random and adversarial "
        "inputs a point)."
    )
    alt = f"Line plot of the share of wrong answers against n for each number format: {', '.join(first)}."
    return Figure(fig, caption, alt.replace("$", ""))


@style()
def depth_and_composition(rows: pd.DataFrame, *, d_model: int) -> Figure:
    """Accuracy of trained models against n. rows: columns n, L, d_model, seed, accuracy, chance."""
    rows = rows[rows["d_model"] == d_model]
    fig, ax = plt.subplots()
    means = {L: _means(group) for L, group in sorted(rows.groupby("L"))}
    for L, mean in means.items():
        shift, look = 0.12 * (2 * L - 3), {"color": COLOURS[L - 1], "marker": MARKERS[L - 1]}
        group = rows[rows["L"] == L]
        ax.plot(group["n"] + shift, group["accuracy"], linestyle="none", alpha=0.35, **look | {"marker": "."})
        dots_with_intervals(
            ax, mean["n"] + shift, mean["mean"], mean["lo"], mean["hi"], line=True, linestyle=LINES[L - 1],
            label=f"{L} layer{'s' if L > 1 else ''}", **look,
        )  # fmt: skip
    chance = rows.groupby("n")["chance"].first()
    ax.plot(
        chance.index, chance, color="black", linestyle=":", marker="_", linewidth=1.2, label="chance, 1/n"
    )
    sizes = sorted(rows["n"].unique())
    ax.set(
        xlabel="points n of each permutation", ylabel="accuracy after two hops", xticks=sizes,
        xlim=(sizes[0] - 1, sizes[-1] + 1), ylim=(-0.03, 1.05),
    )  # fmt: skip
    fig.legend(loc="outside upper center", ncols=3)
    ends = {L: mean.iloc[-1] for L, mean in means.items()}
    seeds = rows.groupby(["n", "L"]).size().min()
    caption = (
        f"At equal layer parameters and at $n$ = {sizes[-1]}, two layers reach a mean accuracy of "
        f"{ends[2]['mean']:.2f}, one layer {ends[1]['mean']:.2f} (chance {chance.iloc[-1]:.2f}). Small dots: "
        f"{seeds} seeds each; bars: 95 % bootstrap intervals of the mean; $D$ = {d_model}."
    )
    said = [
        f"{L}-layer models {', '.join(f'{value:.2f}' for value in mean['mean'])}" for L, mean in means.items()
    ]
    alt = f"Mean accuracy against n = {', '.join(map(str, sizes))}: {'; '.join(said)}."
    return Figure(fig, caption, alt)


@style()
def hidden_pairs(rows: pd.DataFrame) -> Figure:
    """Accuracy on SUM2 by model. rows: columns n, L, d_model, seed, accuracy, majority."""
    sizes, models = sorted(rows["n"].unique()), sorted(rows.groupby(["L", "d_model"]).groups)
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    said = []
    for i, (L, D) in enumerate(models):
        group = rows[(rows["L"] == L) & (rows["d_model"] == D)]
        shift, look = 0.16 * (i - (len(models) - 1) / 2), {"color": COLOURS[i], "marker": MARKERS[i]}
        at = group["n"].map(sizes.index) + shift
        ax.plot(at, group["accuracy"], linestyle="none", alpha=0.35, **look | {"marker": "."})
        mean = _means(group)
        at, label = mean["n"].map(sizes.index) + shift, f"{L} layer{'s' if L > 1 else ''}, D = {D}"
        dots_with_intervals(ax, at, mean["mean"], mean["lo"], mean["hi"], label=label, **look)
        said.append(f"{label}: {', '.join(f'{value:.2f}' for value in mean['mean'])}")
    majority = rows.groupby("n")["majority"].mean().loc[sizes]
    ax.plot(
        range(len(sizes)), majority, color="black", linestyle=":", marker="_", linewidth=1.2, label="majority"
    )
    ax.set(
        xlabel="residues n in the prompt", ylabel="accuracy at the last token", ylim=(0.42, 1.03),
        xticks=range(len(sizes)), xticklabels=[str(n) for n in sizes], xlim=(-0.6, len(sizes) - 0.4),
    )  # fmt: skip
    fig.legend(loc="outside upper center", ncols=2)
    among = ", ".join(map(str, sizes))
    caption = (
        f"Mean accuracy at finding a hidden pair among {among} residues. {'; '.join(said)} (majority answer "
        f"{majority.iloc[0]:.2f}). Small dots: seeds; bars: 95 % bootstrap intervals of the mean."
    )
    return Figure(fig, caption, f"Dots with error bars for each model at n = {among}. {'; '.join(said)}.")


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy for each n, with its 95 % bootstrap interval: columns n, mean, lo, hi."""
    found = []
    for n, group in rows.groupby("n"):
        lo, hi = bootstrap(group["accuracy"], seed=0)
        mean = group["accuracy"].mean()
        found.append({"n": n, "mean": mean, "lo": min(lo, mean), "hi": max(hi, mean)})
    return pd.DataFrame(found)
