"""Depth against width in pictures: a solver at work, where the bound bites, what training finds."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from lib.figures import COLOURS, LINES, MARKERS, Figure, dots_with_intervals, style
from lib.metrics.intervals import bootstrap
from lib.metrics.protocol import Transcript
from lib.models.constructions import layout
from lib.models.transformer import Transformer
from lib.tasks.composition import Instances, SequentialComposition


@style()
def look_ups(model: Transformer, task: SequentialComposition, one: Instances) -> Figure:
    """The decoder of `sequential_composition_decoder` on one input: what the token w reads, layer by layer.

    one: a batch of one. Attention weights and bits are read off the forward pass.
    """
    trace = model.trace(task.tokens(one), read=("residual", "attention_weight"))
    columns = list(layout(task)["current"])
    current = trace.residual[:, 0, -1, columns]  # (L + 2, b), the bits of i at w before each layer and after
    weight = trace.attention_weight[:, 0, 0, -1]  # (L + 1, T)
    fetched = weight.argmax(dim=1).tolist()
    steps = [_number(bits) for bits in current[1:]]
    T, layers = task.prompt_length, len(weight)
    fig, ax = plt.subplots(figsize=(5.6, 0.82 * layers + 1.5))
    ax.set_axis_off()
    for l in range(1, layers + 1):
        for t, share in enumerate(weight[l - 1].tolist()):
            ax.add_patch(
                plt.Rectangle((t, l), 0.9, 0.42, facecolor=COLOURS[5], alpha=0.1 + 0.9 * share, lw=0)
            )
        t = fetched[l - 1]
        ax.annotate("", xy=(t + 0.45, l + 0.46), xytext=(T - 0.55, l + 0.46), arrowprops={
            "arrowstyle": "->", "color": COLOURS[1], "lw": 1.8, "connectionstyle": "arc3,rad=0.16",
        })  # fmt: skip
        ax.text(t + 0.45, l + 0.2, f"{steps[l - 1]}", ha="center", va="center", fontsize=11.5, weight="bold")
        bits = "".join("1" if bit > 0 else "0" for bit in current[l].tolist())
        ax.text(T + 0.25, l + 0.2, f"$i_{l - 1}$ = {steps[l - 1]}", va="center", fontsize=11.5)
        ax.text(T + 0.25, l - 0.14, f"bits {bits}", va="center", fontsize=9.5, color="0.35")
        ax.text(-0.25, l + 0.2, f"layer {l}", va="center", ha="right", fontsize=11.5)
        ax.text(-0.25, l - 0.14, f"asks {_question(task, one, l - 1, steps)}", va="center", ha="right",
                fontsize=9.5, color="0.35")  # fmt: skip
    for t, (name, value) in enumerate(_entries(task, one)):
        ax.text(t + 0.45, 0.28, value, ha="center", va="center", fontsize=11.5)
        ax.text(t + 0.45, -0.12, name, ha="center", va="center", fontsize=8, color="0.35")
    for part, start in task.places().items():
        width = task.N[int(part[2:]) - 1] if part.startswith("z_") and part != "z_0" else 1
        ax.plot([start, start + width - 0.1], [-0.42, -0.42], color=COLOURS[2], lw=2, marker="", ls="-")
        ax.text(start + width / 2 - 0.05, -0.72, f"${part}$", ha="center", va="center", fontsize=11.5)
    ax.set(xlim=(-2.5, T + 2.0), ylim=(-0.95, layers + 1.3))
    answer = int(task.answer(one)[0])
    read = ", then ".join(f"$i_{l}={value}$" for l, value in enumerate(steps))
    caption = (
        f"One layer, one look-up. The token $w$ of the hand-built decoder reads {read}; the task's answer is "
        f"{answer}. Shading: attention weights of $w$ (the largest share of a layer is at least "
        f"{weight.amax(dim=1).min():.3f}). The row below shows what each token carries."
    )
    alt = (
        f"Diagram of {layers} layers over {T} prompt tokens grouped by table. In each layer an arrow goes "
        f"from the last token to one table entry: tokens number {', '.join(str(t + 1) for t in fetched)}."
    )
    return Figure(fig, caption, alt, unlabelled=True)


@style()
def exponents(table: pd.DataFrame) -> Figure:
    """The exponent e of Hdp > n^(1/e), ours and the paper's. table: columns L, ours, paper."""
    fig, ax = plt.subplots()
    for i, (column, label) in enumerate({"ours": "proved here", "paper": "paper (second-hand)"}.items()):
        look = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i]}
        ax.plot(table["L"], table[column], label=label, **look)
    ax.set(xlabel="layers L of the decoder", ylabel="exponent e in  Hdp > n^(1/e)", yscale="log",
           xticks=table["L"])  # fmt: skip
    ax.legend(loc="upper left")
    last = table.iloc[-1]
    caption = (
        f"How weak the lower bound is: at {last['L']:.0f} layers $Hdp$ must exceed a constant times the "
        f"prompt's length to the power one over {last['ours']:,.0f} (proved here) or one over "
        f"{last['paper']:,.0f} (the exponent reported for the paper). The constants are not shown."
    )
    alt = (
        "Two rising lines on a logarithmic axis against the number of layers: ours ends at "
        f"{last['ours']:,.0f}, the paper's at {last['paper']:,.0f}."
    )
    return Figure(fig, caption, alt)


@style()
def certified_prompts(exact: pd.DataFrame, coarse: pd.DataFrame) -> Figure:
    """Least prompt at which two layers are certified to fail. Both: columns beta, tokens."""
    fig, ax = plt.subplots()
    for i, (rows, label) in enumerate([(exact, "certificate in integers"), (coarse, "coarser, in floats")]):
        look = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i]}
        ax.plot(rows["beta"], rows["tokens"], label=label, **look)
    ax.set(xscale="log", yscale="log", xlabel="bits for each sender, receiving token and layer",
           ylabel="prompt length (tokens)")  # fmt: skip
    ax.legend(loc="upper left")
    first, last, far = exact.iloc[0], exact.iloc[-1], coarse.iloc[-1]
    caption = (
        f"Two layers provably fail at {first['tokens']:,.0f} tokens with {first['beta']:.0f} bits, at "
        f"{last['tokens']:,.0f} with {last['beta']:.0f}. With {far['beta']:,.0f} bits, a small real model's "
        f"budget, the argument closes at {far['tokens']:.1e} tokens only: vacuous there."
    )
    alt = (
        "Log-log plot of the least certified prompt against the bits of a message: from "
        f"{first['tokens']:,.0f} tokens at {first['beta']:.0f} bits to {far['tokens']:.1e} at "
        f"{far['beta']:,.0f}."
    )
    return Figure(fig, caption, alt)


@style()
def sharpness(rows: pd.DataFrame) -> Figure:
    """Errors against the sharpness of attention. rows: columns sharpness (of c*), arithmetic, errors, "
    "inputs."""
    fig, ax = plt.subplots()
    for i, (name, group) in enumerate(rows.groupby("arithmetic", sort=False)):
        group = group.sort_values("sharpness")
        ax.plot(group["sharpness"], 100 * group["errors"] / group["inputs_checked"], label=name,
                color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i])  # fmt: skip
    ax.axvline(1, color="black", linestyle=":", linewidth=1.4)
    ax.text(1.04, 0.5, "proved", transform=ax.get_xaxis_transform(), rotation=90, va="center")
    ax.set(xscale="log", xlabel="sharpness c, as a multiple of the proved c*", ylabel="wrong answers (%)")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(loc="upper right")
    wrong = rows[rows["errors"] > 0].groupby("arithmetic", sort=False)["sharpness"].max()
    said = ", ".join(f"{name} up to {c:.2g} c*" for name, c in wrong.items()) or "none"
    above = int(rows.loc[rows["sharpness"] >= 1, "errors"].sum())
    softest = rows.loc[rows["sharpness"] > max(wrong, default=0), "sharpness"].min()
    caption = (
        f"From the proved sharpness on, {above} answers are wrong; the softest attention tried that makes no "
        f"error, nor any sharper one, is {softest:.2g} c*. Errors were seen in {said}; all "
        f"{rows['inputs_checked'].max():,} inputs at each point."
    )
    alt = f"Share of wrong answers against sharpness for each number format; errors in {said}."
    return Figure(fig, caption, alt)


@style()
def found_by_training(cells: Mapping[str, pd.DataFrame], *, ylabel: str = "accuracy") -> Figure:
    """Accuracy of trained models, one row of dots a cell. cells: label -> rows with accuracy, chance."""
    fig, ax = plt.subplots(figsize=(5.6, 0.5 * len(cells) + 1.2))
    said = []
    for i, (label, rows) in enumerate(cells.items()):
        mean, look = rows["accuracy"].mean(), {"color": COLOURS[i % 6], "marker": MARKERS[i % 6]}
        ax.plot(rows["accuracy"], [-i] * len(rows), linestyle="none", alpha=0.45, **look | {"marker": "."})
        lo, hi = bootstrap(rows["accuracy"], seed=0) if len(rows) >= 3 else (mean, mean)
        ax.errorbar([mean], [-i], xerr=[[max(0, mean - lo)], [max(0, hi - mean)]], **look)
        ax.plot([rows["chance"].mean()], [-i], color="black", marker="|", markersize=13, linestyle="none")
        said.append(f"{label}: {mean:.2f}")
    ax.set(xlabel=ylabel, ylabel=" ", xlim=(-0.02, 1.04), ylim=(-len(cells) + 0.4, 0.6))
    ax.set_yticks([-i for i in range(len(cells))], list(cells))
    seeds = min(len(rows) for rows in cells.values())
    bars = "bars: 95 % bootstrap intervals of the mean" if seeds >= 3 else "too few seeds for an interval"
    caption = (
        f"Mean accuracies, {'; '.join(said)}. Small dots: {seeds} seeds each; {bars}; upright strokes: the "
        "best guess that ignores the question."
    )
    return Figure(fig, caption, f"Dots on a scale from 0 to 1, one row a cell. {'; '.join(said)}.")


@style()
def learning_curves(cells: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy against steps, one thin line a run, one colour a cell. cells: label -> rows with `curve`.

    curve: [[steps, accuracy], ...]; a run that reached its target early ends there.
    """
    fig, ax = plt.subplots(figsize=(5.6, 4.0))
    said = []
    for i, (label, rows) in enumerate(cells.items()):
        for k, curve in enumerate(rows["curve"]):
            steps, accuracy = zip(*curve, strict=True)
            look = {"color": COLOURS[i], "linestyle": LINES[i], "linewidth": 1.2, "alpha": 0.8}
            ax.plot(steps, accuracy, marker="", label=label if k == 0 else None, **look)
        ends = [curve[-1][1] for curve in rows["curve"]]
        high = sum(end >= 0.8 for end in ends)
        said.append(f"{label}: {high} of {len(ends)} runs end at 0.8 or above")
    ax.axhline(rows["chance"].mean(), color="black", linestyle=":", linewidth=1.2)
    ax.set(xscale="log", xlabel="training steps", ylabel="accuracy", ylim=(-0.03, 1.05))
    fig.legend(loc="outside upper center", ncols=2)
    caption = (
        f"Depth by steps. {'; '.join(said)}. One line a run; a run stops at its target. Dotted: chance. No "
        "theorem's line can be drawn here: it speaks of prompts far beyond these."
    )
    return Figure(fig, caption, f"Learning curves on a logarithmic axis of steps. {'; '.join(said)}.")


@style()
def accuracy_against_width(lines: Mapping[str, pd.DataFrame], guess: float) -> Figure:
    """Accuracy against the width of the model. lines: label -> rows with d_model, accuracy; guess: a "
    "level."""
    fig, ax = plt.subplots(figsize=(5.6, 4.2))
    widths = sorted({int(D) for rows in lines.values() for D in rows["d_model"]})
    said = []
    for i, (label, rows) in enumerate(lines.items()):
        look, shift = {"color": COLOURS[i], "marker": MARKERS[i]}, 0.07 * (i - (len(lines) - 1) / 2)
        at = rows["d_model"].map(widths.index) + shift
        ax.plot(at, rows["accuracy"], linestyle="none", alpha=0.35, **look | {"marker": "."})
        mean = rows.groupby("d_model")["accuracy"].agg(["mean", list])
        bands = [bootstrap(seeds, seed=0) if len(seeds) >= 3 else (m, m) for m, seeds in mean.values]
        lo, hi = ([f(edge, m) for edge, m in zip(edges, mean["mean"], strict=True)]
                  for f, edges in zip((min, max), zip(*bands, strict=True), strict=True))  # fmt: skip
        places = [widths.index(D) + shift for D in mean.index]
        dots_with_intervals(ax, places, mean["mean"], lo, hi, line=True,
                            linestyle=LINES[i], label=label, **look)  # fmt: skip
        said.append(f"{label}: " + ", ".join(f"{m:.2f} at {D}" for D, m in mean["mean"].items()))
    ax.axhline(guess, color="black", linestyle=":", linewidth=1.2, label="best guess without w")
    ax.set(xlabel="width D of the model", ylabel="accuracy", ylim=(-0.03, 1.05), xticks=range(len(widths)),
           xticklabels=[str(D) for D in widths])  # fmt: skip
    fig.legend(loc="outside upper center", ncols=2)
    seeds = min(rows.groupby("d_model").size().min() for rows in lines.values())
    first, second = (rows.groupby("d_model")["accuracy"].mean() for rows in list(lines.values())[:2])
    lead = (first - second).min()
    caption = (
        f"At every width tried, the first of these leads the second by at least {lead:.2f}. Mean accuracy by "
        f"width, {'; '.join(said)}. Dotted: {guess:.2f}, the best guess of one who knows the start and not "
        f"$w$. Small dots: {seeds} seeds each; bars: 95 % bootstrap intervals of the mean."
    )
    return Figure(fig, caption, f"Lines of accuracy against width. {'; '.join(said)}.")


@style()
def error_bars(shares: Mapping[str, tuple[int, int]]) -> Figure:
    """Wrong answers of one construction under several readings. shares: label -> (errors, inputs)."""
    fig, ax = plt.subplots(figsize=(5.6, 0.55 * len(shares) + 1.1))
    for i, (errors, inputs) in enumerate(shares.values()):
        ax.barh(-i, 100 * errors / inputs, color=COLOURS[1] if errors else COLOURS[2], height=0.55)
        ax.text(100 * errors / inputs + 1.2, -i, f"{errors:,} of {inputs:,}", va="center", fontsize=11)
    ax.set(xlabel="wrong answers (%)", ylabel=" ", xlim=(0, 75))
    ax.set_yticks([-i for i in range(len(shares))], list(shares))
    said = "; ".join(f"{label}: {errors:,} of {inputs:,}" for label, (errors, inputs) in shares.items())
    caption = (
        f"The same doubling weights under five readings and more. Wrong answers, {said}."
    )
    return Figure(fig, caption, f"Horizontal bars of wrong answers. {said}.")


@style()
def bills(table: pd.DataFrame) -> Figure:
    """Arithmetic against what must run in a row. table: columns way, L, MFLOPs, in a row."""
    fig, ax = plt.subplots(figsize=(5.6, 4.2))
    for i, (way, rows) in enumerate(table.groupby("way", sort=False)):
        look = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i]}
        ax.plot(rows["in a row"], rows["MFLOPs"], label=way, **look)
    ax.set(xlabel="layers that must run one after another", ylabel="arithmetic (MFLOPs)", xscale="log",
           yscale="log")  # fmt: skip
    ticks = sorted({int(x) for x in table["in a row"]})
    ax.set_xticks(ticks[::2], [str(x) for x in ticks[::2]])
    ax.minorticks_off()
    fig.legend(loc="outside upper center", ncols=2)
    last = table[table["L"] == table["L"].max()]
    least, dearest = (last.loc[last["MFLOPs"].agg(f)] for f in ("idxmin", "idxmax"))
    short, long = (last.loc[last["in a row"].agg(f)] for f in ("idxmin", "idxmax"))
    caption = (
        "Ways out, priced in two currencies. Along each line $L$ = "
        f"{', '.join(map(str, sorted(set(table['L']))))}. At the last, least arithmetic: {least['way']} "
        f"({least['MFLOPs']:.1f} MFLOPs), most: {dearest['way']} ({dearest['MFLOPs']:.1f}); shortest row: "
        f"{short['way']} ({short['in a row']} layers), longest: {long['way']} ({long['in a row']})."
    )
    alt = (
        "Log-log plot of arithmetic against layers that run in a row, a line for each construction; "
        f"{short['way']} ends leftmost, {long['way']} rightmost."
    )
    return Figure(fig, caption, alt)


@style()
def conversation(transcript: Transcript) -> Figure:
    """Who tells whom how much, in one run of a decoder as a protocol. One prompt's bits, per epoch."""
    first = [m for m in transcript.messages if m.epoch == 1]
    names = sorted({m.sender for m in first} | {m.receiver for m in first}, reverse=True)
    tokens = {m.receiver: len(m.tokens) for m in first}
    epochs = max(m.epoch for m in transcript.messages)
    fig, ax = plt.subplots(figsize=(5.6, 3.4))
    ax.set_axis_off()
    for m in first:
        i, j = names.index(m.sender), names.index(m.receiver)
        share, height = np.linspace(0.06, 0.94, 40), 0.3 + 0.36 * (j - i - 1)
        x, y = i + share * (j - i), 0.12 + 4 * height * share * (1 - share)
        look = {"color": COLOURS[m.receiver + 1], "linestyle": LINES[m.receiver + 1]}
        ax.plot(x, y, marker="", **look)
        ax.annotate("", xy=(x[-1], y[-1]), xytext=(x[-3], y[-3]), arrowprops={
            "arrowstyle": "-|>", "color": look["color"], "shrinkA": 0, "shrinkB": 0})  # fmt: skip
        ax.text((i + j) / 2, 0.17 + height, f"{m.bits}", ha="center", va="bottom", fontsize=11,
                color=look["color"])  # fmt: skip
    for i, name in enumerate(names):
        holds = "$w$" if name == -1 else f"$z_{name}$"
        circle = {"boxstyle": "circle,pad=0.35", "facecolor": "white", "edgecolor": "black"}
        ax.text(i, 0, holds, ha="center", va="center", bbox=circle)
        count = tokens.get(name)
        heard = f"{count} token{'s' if count > 1 else ''}" if count else "hears nothing"
        ax.text(i, -0.5, f"player {name}\n{heard}", ha="center", va="top", fontsize=9.5)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=(-0.95, 0.6 + 0.36 * len(names)))
    caption = (
        "A decoder as a conversation: earlier tokens speak to later ones. Numbers are bits that one epoch "
        f"sends, counted in a run of the hand-built solver; over {epochs} epochs {transcript.bits:,} bits in "
        "all."
    )
    said = "; ".join(f"player {m.sender} to player {m.receiver} {m.bits} bits" for m in first)
    alt = f"Diagram of players joined by arrows. In each epoch {said}."
    return Figure(fig, caption, alt, unlabelled=True)


def _entries(task: SequentialComposition, one: Instances) -> list[tuple[str, str]]:
    """What stands under each token: its index and its value, in the order of the prompt."""
    found = []
    for l in range(task.L, 0, -1):
        inner = task.N[max(l - 2, 0)]
        for a, value in enumerate(one.tables[l - 1][0].tolist()):
            found.append((f"{a // inner},{a % inner}" if l > 1 else f"{a}", f"{value}"))
    return [*found, ("", f"{int(one.z0[0])}"), ("", ",".join(str(w) for w in one.w[0].tolist()))]


def _question(task: SequentialComposition, one: Instances, l: int, steps: list[int]) -> str:
    """What the token w asks for when it fetches i_l, given what it fetched before."""
    if l == 0:
        return "$z_0$"
    switch = f"{int(one.w[0, l - 2])}," if l > 1 else ""
    return f"$z_{l}({switch}{steps[l - 1]})$"


def _number(bits: torch.Tensor) -> int:
    """Bits coded as signs, most significant first."""
    return sum(2**k for k, bit in enumerate(reversed(bits.tolist())) if bit > 0)
