"""Run the freezing argument of the lower bound: on random protocols, and on decoders that must then fail.

`freeze`: are the claims of the proof true on small random protocols, and false once a family is not frozen?
`fail_decoders`: a two-layer decoder with integer accumulators becomes a protocol on every input of a small
world, and the argument hands over two inputs, one of which it gets wrong whatever reads its last state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib.choices import check_choice
from lib.experiments.protocols import Sizes, built_decoder, draw_decoder
from lib.experiments.recipe import read_settings
from lib.metrics import freezing
from lib.metrics.protocol import sequential_parties, simulate
from lib.models.quantised import QuantisedDecoder
from lib.tasks.composition import SequentialComposition

LARGEST_WORLD = 20_000  # inputs that a decoder is run on, all at once


@dataclass(frozen=True, kw_only=True)
class FreezingSettings:
    """Random protocols of L = len(counts) - 2 layers, and what is not frozen in them."""

    counts: tuple[int, ...] = (2, 2, 4, 6, 128)  # values of w, z_0, z_1, …, z_L
    x: tuple[int, ...] = (2, 2, 2)               # sizes of Z_0, …, Z_{L-1}
    rate: float = 0.1                            # how often a message is 1
    protocols: int = 15
    drop: str | None = None                      # one of `lib.metrics.freezing.droppable`

    def __post_init__(self):
        object.__setattr__(self, "counts", tuple(self.counts))
        object.__setattr__(self, "x", tuple(self.x))
        if len(self.counts) < 3 or len(self.x) != len(self.counts) - 2 or min(*self.counts, *self.x) < 1:
            raise ValueError(f"counts of w, z_0 … z_L and sizes x_0 … x_{{L-1}} are needed, each at least 1; "
                             f"got counts={self.counts}, x={self.x}")
        if self.protocols < 1 or not 0 <= self.rate <= 1:
            raise ValueError(f"protocols >= 1, 0 <= rate <= 1; got {self.protocols}, {self.rate}")
        if self.drop is not None:
            check_choice("family to drop", self.drop, freezing.droppable(len(self.x)))


def freeze(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Draw random forgetful protocols and run the argument on each. Settings: `FreezingSettings`. One row:

    L; inputs of one world; violated: protocols in which a claim fails (0 by the proof if nothing is dropped),
    end_violated: in which player -1 tells R_L apart; several: protocols with |R_L| > 1, in which the claims
    say something; left: mean |R_L|; functions: how many were frozen, counted: as many by the proof's count
    (equal if nothing is dropped); first_violation in words, or None.
    """
    chosen = read_settings(FreezingSettings, settings)
    row = {"L": len(chosen.x), "inputs": int(np.prod(chosen.counts)), "violated": 0, "end_violated": 0,
           "several": 0, "left": 0.0, "functions": 0, "counted": 0, "first_violation": None}
    for number in range(chosen.protocols):
        protocol_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        world = freezing.random_world(chosen.counts, rate=chosen.rate, seed=protocol_seed)
        kept = freezing.freeze(world, chosen.x, drop=() if chosen.drop is None else (chosen.drop,))
        row["violated"] += bool(kept.violations)
        row["end_violated"] += any(claim.startswith("end") for claim in kept.violations)
        row["several"] += len(kept.R) > 1
        row["left"] += len(kept.R) / chosen.protocols
        row["functions"] += kept.functions
        row["counted"] += freezing.counted_functions(len(chosen.x), [chosen.counts[0], *map(len, kept.Z)])
        if kept.violations and row["first_violation"] is None:
            row["first_violation"] = kept.violations[0]
    return row


@dataclass(frozen=True, kw_only=True)
class FailingSettings(Sizes):
    """Random decoders of L = len(ns) + 1 layers, or the built one of L + 1, on every input of L-FuncComp."""

    weight_bits: int = 1
    value_bits: int = 2
    x: tuple[int, ...] = (2, 1)  # sizes of Z_0, …, Z_{L-1}

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "x", tuple(self.x))
        inputs = SequentialComposition(self.m, self.ns).n_inputs
        if len(self.x) != len(self.ns) + 1 or not self.ns or inputs > LARGEST_WORLD:
            raise ValueError(
                f"all inputs are run: at most {LARGEST_WORLD}, with L >= 2 and x_0 … x_{{L-1}}; got "
                f"m={self.m}, ns={self.ns} ({inputs} inputs), x={self.x}")


def fail_decoders(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Freeze random decoders until two inputs look the same to them. Settings: `FailingSettings`. One row:

    inputs of the world; accumulator_bits, message_bits, Hdp of these decoders; failing: decoders for which
    the argument exhibits two inputs; confirmed: of these, how many end in equal states when each input is run
    alone and owe different answers; violated: decoders in which the end of the proof fails, 0 by the proof
    for L layers; the built decoder has one more, tells its R_L apart and has no failing inputs; left: mean
    |R_L|; example: the first pair, as tables, with its answers, or None.
    """
    chosen = read_settings(FailingSettings, settings)
    task = SequentialComposition(chosen.m, chosen.ns)
    batch = next(task.all_inputs(chunk=task.n_inputs))
    prompts, answers = task.tokens(batch), _on_axes(task, task.answer(batch).numpy())
    row = {"inputs": task.n_inputs, "failing": 0, "confirmed": 0, "violated": 0, "left": 0.0, "example": None}
    for number in range(chosen.decoders):
        decoder = (built_decoder(chosen, task, prompts) if chosen.decoder == "built"
                   else draw_decoder(chosen, task, prompts, seed=seed, number=number))
        world = decoder_world(decoder, task, prompts)
        kept = freezing.freeze(world, chosen.x, drop=freezing.unused(task.L))
        row["violated"] += any(claim.startswith("end") for claim in kept.violations)
        row["left"] += len(kept.R) / chosen.decoders
        pair = freezing.failing_pair(world, kept, answers)
        if pair is not None:
            number_of = _on_axes(task, np.arange(task.n_inputs))
            both = torch.tensor([int(number_of[one]) for one in pair])
            states = [decoder.run(prompts[i : i + 1]).h[0, -1] for i in both]
            row["failing"] += 1
            row["confirmed"] += bool((states[0] == states[1]).all() and answers[pair[0]] != answers[pair[1]])
            row["example"] = row["example"] or _shown(task, batch, both)
    bits = ("accumulator_bits", "message_bits", "Hdp")
    return row | {name: getattr(decoder, name) for name in bits}


def decoder_world(decoder: QuantisedDecoder, task: SequentialComposition, prompts) -> freezing.World:
    """The decoder as a protocol on every input. prompts: those of `task.all_inputs`, in that order."""
    transcript = simulate(decoder, prompts, sequential_parties(task.m, task.ns))
    messages = {(m.epoch, m.sender, m.receiver): _on_axes(task, _values(m.code.flatten(1).numpy()))
                for m in transcript.messages}
    return freezing.World(messages, _on_axes(task, _values(transcript.state.numpy())))


def _values(rows: np.ndarray) -> np.ndarray:
    """One integer for each distinct row: (B, k) -> (B,)."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _on_axes(task: SequentialComposition, column: np.ndarray) -> np.ndarray:
    """(n_inputs,) in counting order -> axes w, z_0, z_1 … z_L, where z_L counts slowest and w fastest."""
    tables = [N**N for N in reversed(task.N)]
    return column.reshape(*tables, task.m, int(np.prod(task.ns))).transpose()


def _shown(task: SequentialComposition, batch, both) -> dict:
    one, other = both.tolist()
    return {"z_0": int(batch.z0[one]), "w": batch.w[one].tolist(),
            **{f"z_{l}": table[one].tolist() for l, table in enumerate(batch.tables, 1)},
            f"other z_{task.L}": batch.tables[-1][other].tolist(),
            "answers": task.answer(batch)[both].tolist()}
