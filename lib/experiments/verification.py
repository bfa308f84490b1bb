"""Check hand-built weights against the definition: every input, or random ones and the corner cases.

One run, one row. The answer comes from `FunctionComposition`, the output from the weights, in exact rational
arithmetic or in a floating-point format. `damage` is the negative control: one weight is wrong, and the same
check must find errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from lib.choices import check_choice, resolve_device
from lib.experiments.recipe import read_settings
from lib.models.constructions import (
    proposition_t,
    proposition_t_many_heads,
    proposition_t_many_heads_binary,
)
from lib.models.one_layer import DTYPES, OneLayerSoftmax
from lib.tasks.function_composition import Compositions, FunctionComposition

CONSTRUCTIONS = ("T", "T'", "T' binary")
ARITHMETIC = ("exact", *DTYPES)
DAMAGES = {
    "query": "the last token asks for place 1 where x = 0",
    "value": "h(0) = n-1 is stored as 0",
    "staircase": "the first ReLU that reads a digit has its bias lowered by 1",
    "readout": "the last gate, which lets the digit at the right offset through, is closed",
    "switch": "g(0) = n-1 no longer mutes bank 0 (constructions T' only)",
}
ENUMERABLE = 300_000  # inputs: n <= 4, where there are 262,144


@dataclass(frozen=True, kw_only=True)
class VerificationSettings:
    """Which weights, in which arithmetic, on which inputs. T takes n and s; T' takes S, nu and s."""

    s: int                          # table entries packed into one value coordinate
    construction: str = "T"
    n: int | None = None
    S: int | None = None            # banks: heads besides the pointer (T')
    nu: int | None = None           # blocks, the value dimension (T')
    arithmetic: str = "exact"
    inputs: int | str = "all"       # or their number, up to half of them `hard_inputs`, the others random
    damage: str | None = None       # a key of DAMAGES
    device: str = "cpu"

    def __post_init__(self):
        check_choice("construction", self.construction, CONSTRUCTIONS)
        check_choice("arithmetic", self.arithmetic, ARITHMETIC)
        if self.damage is not None:
            check_choice("damage", self.damage, DAMAGES)
        many = self.construction != "T"
        if self.damage == "switch" and not many:
            raise ValueError("only T' switches banks: damage 'switch' needs construction T' or T' binary")
        if many and (self.S is None or self.nu is None) or not many and self.n is None:
            raise ValueError(f"construction {self.construction!r} needs {'S, nu' if many else 'n'} and s")
        if many and self.n not in (None, self.S * self.nu * self.s) or not many and (self.S or self.nu):
            raise ValueError("T takes n and s; T' takes S, nu and s, and n = S·nu·s if it is given at all")
        if self.inputs != "all" and (not isinstance(self.inputs, int) or self.inputs < 1):
            raise ValueError(f"inputs is 'all' or a number of at least 1, got {self.inputs!r}")
        count = FunctionComposition(self.size).count
        if self.inputs == "all" and count > ENUMERABLE:
            raise ValueError(f"Comp_{self.size} has {count} inputs, too many to try all; give their number")
        resolve_device(self.device)

    @property
    def size(self) -> int:
        """n of Comp_n."""
        return self.n if self.construction == "T" else self.S * self.nu * self.s

    def weights(self) -> OneLayerSoftmax:
        """The construction, damaged if asked."""
        if self.construction == "T":
            model = proposition_t(self.n, self.s)
        else:
            build = proposition_t_many_heads if self.construction == "T'" else proposition_t_many_heads_binary
            model = build(self.S, self.nu, self.s)
        return model if self.damage is None else damaged(model, self.damage)


def verify_composition(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Count the inputs on which a construction is not within 1/2 of h(g(x)): the settings give one row.

    Settings: the fields of `VerificationSettings`. Row: inputs tried, hard_inputs among them; errors, where
    |y - answer| >= 1/2 or y is nan; not_finite; exactly_right, where y = answer with no rounding at all;
    worst_error = max |y - answer| over finite y; first_error, an input with its answer and y, or None; n; and
    the sizes of the weights (`OneLayerSoftmax.size`). `seed` draws the random inputs. Random tables alone
    would seldom meet the corner cases: see `hard_inputs`.
    """
    chosen = read_settings(VerificationSettings, settings)
    model, task = chosen.weights(), FunctionComposition(chosen.size)
    row = {"n": chosen.size, "inputs": 0, "hard_inputs": 0, "errors": 0, "not_finite": 0, "exactly_right": 0,
           "worst_error": 0.0, "first_error": None}
    for batch, hard in _batches(chosen, task, seed):
        words, answer = task.tokens(*batch)[..., 1], task.answer(*batch)
        row["inputs"] += len(words)
        row["hard_inputs"] += hard
        if chosen.arithmetic == "exact":
            y = model.exact(words)
            off = [abs(a - b) for a, b in zip(y, answer.tolist(), strict=True)]
            wrong = [i for i, distance in enumerate(off) if 2 * distance >= 1]
            row["exactly_right"] += sum(distance == 0 for distance in off)
        else:
            y = model.forward(words.to(chosen.device), DTYPES[chosen.arithmetic]).double().cpu()
            distance = (y - answer).abs()
            wrong = (~(distance < 0.5)).nonzero().squeeze(1).tolist()    # a comparison with nan is False
            finite = distance.isfinite()
            row["not_finite"] += int((~finite).sum())
            row["exactly_right"] += int((distance == 0).sum())
            off = [distance[finite].max().item()] if finite.any() else []
        row["errors"] += len(wrong)
        row["worst_error"] = max([row["worst_error"], *(float(distance) for distance in off)])
        if wrong and row["first_error"] is None:
            row["first_error"] = _shown(batch, answer, y, wrong[0])
    return row | model.size()


def damaged(model: OneLayerSoftmax, damage: str) -> OneLayerSoftmax:
    """A copy of a construction with one wrong weight: the negative control. damage: a key of DAMAGES."""
    check_choice("damage", damage, DAMAGES)
    n = model.alphabet[0]
    if damage == "query":
        return model.with_entry(2 * n, 0, "x", 1)
    if damage == "switch":
        return model.with_entry(0, n - 1, "switch 0", -1)
    if damage == "value":
        return model.with_entry(n, n - 1, "table 0", 0)
    if damage == "staircase":
        neuron, form = next(iter(model.hidden[2].items()))
        return model.with_neuron(3, neuron, form - 1)
    return model.with_neuron(len(model.hidden), "gate", 0 * model.hidden[-1]["gate"])


def hard_inputs(n: int, s: int) -> Compositions:
    """Inputs at the corners of the constructions, each once: where random tables seldom go.

    x at both ends and in the middle; g a permutation, constant at a block border i, or i at x and as far from
    i as can be elsewhere (so that the pointer's leak is largest); h all n-1, all 0, alternating, a
    permutation, or a lone 0 or n-1 at or beside the place that is read (so that the digits behind it are
    extreme).
    """
    ends, far = torch.arange(n), (0, n - 1)
    borders = sorted({0, n - 1, *range(0, n, s), *range(s - 1, n, s)})
    words = []
    for x in sorted({0, n // 2, n - 1}):
        inner = [ends, ends.flip(0)]
        for i in borders:
            inner += [torch.full((n,), i)]
            leak = torch.full((n,), far[2 * i < n])
            leak[x] = i
            inner.append(leak)
        for g in inner:
            for h in _hard_tables(n, int(g[x])):
                words.append(torch.cat([g, h, torch.tensor([x])]))
    word = torch.stack(words).unique(dim=0)
    return Compositions(word[:, :n], word[:, n : 2 * n], word[:, -1])


def _hard_tables(n: int, read: int) -> list[Tensor]:
    places = torch.arange(n)
    tables = [places, places.flip(0), (n - 1) * (places % 2), (n - 1) * ((places + 1) % 2)]
    for most, lone in ((n - 1, 0), (0, n - 1)):
        tables.append(torch.full((n,), most))
        for i in {read, max(read - 1, 0), min(read + 1, n - 1)}:
            spike = torch.full((n,), most)
            spike[i] = lone
            tables.append(spike)
    return tables


def _batches(
    chosen: VerificationSettings, task: FunctionComposition, seed: int
) -> Iterator[tuple[Compositions, int]]:
    if chosen.inputs == "all":
        yield from ((batch, 0) for batch in task.all_inputs())
        return
    hard = hard_inputs(chosen.size, chosen.s)
    kept = min(len(hard.x), chosen.inputs // 2)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(hard.x), generator=generator)[:kept]
    if kept:
        yield Compositions(*(column[order] for column in hard)), kept
    yield task.sample(chosen.inputs - kept, seed=seed), 0


def _shown(batch: Compositions, answer: Tensor, y: Tensor | list[Fraction], i: int) -> dict:
    value = float(y[i])
    return {"g": batch.g[i].tolist(), "h": batch.h[i].tolist(), "x": int(batch.x[i]),
            "answer": int(answer[i]), "y": value if math.isfinite(value) else str(value)}  # JSON has no nan
