"""Check the hand-built Transformers for sequential composition against its definition, on every input.

One run, one row. The answer comes from `SequentialComposition`, the output from the weights through the
ordinary forward pass; a scratchpad really emits its tokens. `damage` is the negative control: something is
wrong, and the same check must find errors. A removed layer is such a control, no proof that depth is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.experiments.recipe import read_settings
from lib.models.constructions.reading import (
    KINDS,
    decode,
    margin,
    own_order,
    read_answers,
    sequential_composition,
)
from lib.models.constructions.sequential import layout, least_sharpness
from lib.models.transformer import Transformer
from lib.tasks.composition import ENUMERABLE, Instances, SequentialComposition

ARITHMETIC = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
DAMAGES = {
    "layer": "one layer (the setting `layer`, counted from 0) adds nothing",
    "order": "w comes first; for the causal encoder, which needs that, the paper's order, read at z_0",
    "mask": "the encoder, with all its weights, under a causal mask in the paper's order",
    "value": "the value 0 is embedded with its last bit wrong",
    "switch": "no query reads the bits of w_{L-1} (L >= 2)",
}
TOKENS = 2**14  # of a chunk, about: 2,048 inputs of 8 tokens, measured fastest
MARGIN_INPUTS = 512  # the margin is measured on the first of them only: it costs as much as the answers


@dataclass(frozen=True, kw_only=True)
class SequentialSettings:
    """Which construction for which sizes, in which arithmetic, on which inputs, damaged how."""

    construction: str               # one of KINDS
    m: int
    ns: Sequence[int] = ()          # n_1 … n_{L-1}
    inputs: int | None = None       # None: every input; or how many random ones
    arithmetic: str = "float32"
    sharpness: float = 2.0          # factor of the proved c*; 1 is enough in real arithmetic
    damage: str | None = None       # a key of DAMAGES
    layer: int | None = None        # the layer that damage "layer" removes

    def __post_init__(self):
        check_choice("construction", self.construction, KINDS)
        check_choice("arithmetic", self.arithmetic, ARITHMETIC)
        if not 0 < self.sharpness < math.inf:
            raise ValueError(f"sharpness is a positive factor of c*, got {self.sharpness!r}")
        if self.inputs is not None and (not isinstance(self.inputs, int) or self.inputs < 1):
            raise ValueError(f"inputs is None (every one) or a number of at least 1, got {self.inputs!r}")
        if self.inputs is None and self.task.n_inputs > ENUMERABLE:
            raise ValueError(f"m={self.m}, ns={tuple(self.ns)} has more inputs than the {ENUMERABLE:,} that "
                             "are listed; give the number of random ones")
        self._check_damage()

    def _check_damage(self):
        if self.damage is not None:
            check_choice("damage", self.damage, DAMAGES)
        if (self.damage == "layer") != (self.layer is not None):
            raise ValueError("damage 'layer' and the setting layer go together, got "
                             f"damage={self.damage!r}, layer={self.layer!r}")
        allowed = {"mask": self.construction == "encoder", "switch": self.task.L >= 2,
                   "order": self.construction != "encoder"}
        if not allowed.get(self.damage, True):
            reason = {"mask": "only the encoder reads both ways", "switch": "L = 1 has no w",
                      "order": "the encoder reads any order"}[self.damage]
            raise ValueError(f"damage {self.damage!r} does not fit construction {self.construction!r} with "
                             f"ns={tuple(self.ns)}: {reason}")
        if self.layer is not None:
            n_layers = sequential_composition(self.task, self.construction).config.n_layers
            if not 0 <= self.layer < n_layers:
                raise ValueError(f"no layer {self.layer}; allowed: 0 to {n_layers - 1}")

    @cached_property
    def task(self) -> SequentialComposition:
        return SequentialComposition(self.m, tuple(self.ns))

    @property
    def c_star(self) -> float:
        emitted = self.task.L + 1 if self.construction.startswith("scratchpad") else 0
        return least_sharpness(self.task.prompt_length + emitted)

    @cached_property
    def model(self) -> Transformer:
        """The construction, its weights damaged if asked."""
        model = sequential_composition(self.task, self.construction, sharpness=self.sharpness * self.c_star,
                                       dtype=ARITHMETIC[self.arithmetic])
        return model if self.damage is None else damaged(model, self.task, self.damage, self.layer)


def verify_sequential(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Count the inputs on which a construction does not say i_L: the settings give one row.

    Settings: the fields of `SequentialSettings`. Row: inputs_checked, and log2_world of all there are;
    errors; first_error, an input with its answer and the output (-1: no answer token), or None; least_margin,
    the least lead of a wanted key over the first margin_inputs (None where damaged), against proved_margin
    = 2c; c and c_star; n_tokens of the prompt and n_emitted; and the sizes of the Transformer.
    """
    chosen = read_settings(SequentialSettings, settings)
    task, model = chosen.task, chosen.model
    checked = errors = 0
    first = least = None
    measured = 0
    for instances in _batches(chosen, seed):
        answer, said = task.answer(instances), _said(chosen, instances)
        wrong = said != answer
        checked += len(answer)
        errors += int(wrong.sum())
        if first is None and wrong.any():
            first = _shown(instances, answer, said, int(wrong.nonzero()[0]))
        if chosen.damage is None and measured < MARGIN_INPUTS:
            some = _first(instances, MARGIN_INPUTS - measured)
            lead = min(margin(model, task, some, chosen.construction))
            least, measured = min(lead, math.inf if least is None else least), measured + len(some.z0)
    c = chosen.sharpness * chosen.c_star
    return {
        "inputs_checked": checked, "log2_world": math.log2(task.n_inputs), "errors": errors,
        "first_error": first, "least_margin": least, "proved_margin": 2 * c, "margin_inputs": measured,
        "c": c, "c_star": chosen.c_star, **_sizes(chosen),
    }  # fmt: skip


def find_sharpness(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Errors at falling sharpness, and the least c that makes none: the settings give one row.

    Settings: those of `verify_sequential`, and `factors` of c*, tried from the largest; `sharpness` is not
    used. Row: tried, [[c, errors], …]; least_error_free, the smallest c tried such that it and all larger
    ones make no error (None if the largest does); c_star; inputs_checked at each c; sizes.
    """
    settings = dict(settings)
    factors = sorted(settings.pop("factors", ()), reverse=True)
    if not factors:
        raise ValueError("find_sharpness needs factors, multiples of c* to try")
    chosen = read_settings(SequentialSettings, settings)
    tried, least = [], None
    for factor in factors:
        one = replace(chosen, sharpness=factor)
        wrong = checked = 0
        for instances in _batches(one, seed):
            wrong += int((_said(one, instances) != one.task.answer(instances)).sum())
            checked += len(instances.z0)
        tried.append([factor * chosen.c_star, wrong])
    for c, wrong in tried:
        if wrong:
            break
        least = c
    return {"tried": tried, "least_error_free": least, "c_star": chosen.c_star, "inputs_checked": checked,
            **_sizes(chosen)}


@torch.no_grad()
def damaged(
    model: Transformer, task: SequentialComposition, damage: str, layer: int | None = None
) -> Transformer:
    """The model with its weights damaged in place; "order" and "mask" leave them as they are."""
    check_choice("damage", damage, DAMAGES)
    columns = layout(task)
    if damage == "layer":
        model.layers[layer].attention.W_O.weight.zero_()
        model.layers[layer].mlp.W_2.weight.zero_()
        model.layers[layer].mlp.W_2.bias.zero_()
    elif damage == "value":
        row = task.symbols.index("value 0")
        for part in ("value", "current"):
            model.embedding.weight[row, columns[part].stop - 1] *= -1
    elif damage == "switch":
        for each in model.layers:
            part = columns[f"w_{task.L - 1}"]
            each.attention.W_Q.weight[:, part.start : part.stop] = 0
    return model


def _said(chosen: SequentialSettings, instances: Instances) -> Tensor:
    """What the model answers (B,)."""
    model, task, order, at, mask = chosen.model, chosen.task, own_order(chosen.construction), "last", None
    if chosen.damage == "order":
        order, at = ("paper", "z_0") if order == "w-first" else ("w-first", "last")
    if chosen.damage == "mask":
        mask = torch.ones(task.prompt_length, task.prompt_length, dtype=torch.bool).tril()
    if chosen.construction.startswith("scratchpad"):
        return decode(model, task, instances, order=order)
    return read_answers(model, task, instances, order=order, at=at, mask=mask)


def _batches(chosen: SequentialSettings, seed: int) -> Iterator[Instances]:
    chunk = max(16, TOKENS // chosen.task.prompt_length)
    if chosen.inputs is None:
        yield from chosen.task.all_inputs(chunk=chunk)
        return
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, chosen.inputs, chunk):
        yield chosen.task.sample(min(chunk, chosen.inputs - start), generator=generator)


def _first(instances: Instances, count: int) -> Instances:
    z0, tables, w = instances
    return Instances(z0[:count], tuple(table[:count] for table in tables), w[:count])


def _sizes(chosen: SequentialSettings) -> dict[str, int]:
    c, task = chosen.model.config, chosen.task
    return {
        "steps": task.L, "n_tokens": task.prompt_length, "n_layers": c.n_layers, "n_heads": c.n_heads,
        "n_emitted": task.L + 1 if chosen.construction.startswith("scratchpad") else 0,
        "d_model": c.d_model, "d_key": c.head_width, "d_mlp": c.mlp_width,
        "parameters": chosen.model.n_parameters(),
    }  # fmt: skip


def _shown(instances: Instances, answer: Tensor, said: Tensor, i: int) -> dict:
    return {"z0": int(instances.z0[i]), "tables": [table[i].tolist() for table in instances.tables],
            "w": instances.w[i].tolist(), "answer": int(answer[i]), "said": int(said[i])}
