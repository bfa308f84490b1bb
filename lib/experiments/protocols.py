"""Decoder against protocol, bit for bit: the lemma behind the lower bound, run.

A decoder with integer accumulators computes a batch of prompts as a whole, then as a protocol whose players
each hold one table. Outputs must be equal, and the bits that were sent as many as the formula says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.experiments.recipe import read_settings
from lib.metrics.protocol import protocol_bits, sequential_parties, simulate
from lib.models.constructions.sequential import sequential_composition_decoder
from lib.models.quantised import Precision, QuantisedDecoder, quantise, random_decoder
from lib.tasks.composition import SequentialComposition

CALIBRATION = 64  # prompts that fix the constants of the heads
DECODERS = ("random", "built")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A task and decoders for it: random ones, or the hand-built one of L + 1 layers (`decoder`)."""

    m: int
    ns: tuple[int, ...]
    decoder: str = "random"  # or "built", which sets its own heads and sharpness
    heads: int = 1
    d_head: int = 1
    weight_bits: int = 4
    value_bits: int = 4
    sharpness: float = 0.5  # scales the scores of random decoders
    decoders: int = 1

    def __post_init__(self):
        object.__setattr__(self, "ns", tuple(self.ns))
        check_choice("decoder", self.decoder, DECODERS)
        if self.decoders < 1 or (self.decoder == "built" and self.decoders != 1):
            raise ValueError(f"decoders >= 1, and decoders=1 for the built one; got {self.decoders}")


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings(Sizes):
    """Which decoders to compare with their protocols."""

    layers: int | None = None  # of random decoders; None: L, the steps of the task
    prompts: int = 100  # for each decoder, random

    def __post_init__(self):
        super().__post_init__()
        if self.prompts < 1 or (self.layers is not None and self.layers < 1):
            raise ValueError(f"prompts and layers are at least 1; got {self.prompts}, {self.layers}")


def compare_protocol(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Run decoders whole and as protocols. Settings: the fields of `ProtocolSettings`. One row:

    compared: (decoder, prompt) pairs; mismatches: pairs whose logits differ in any bit, 0 by the lemma;
    outputs: different logit vectors seen, so that equality says something; errors: of the built decoder, None
    for random ones; bits_sent for one prompt, added message by message; bits_formula; accumulator_bits p,
    message_bits beta, Hdp; prompt_length; parties: tokens of the players L … -1; message_values: largest
    number of different values that one message (epoch, sender, receiver) took in one decoder.
    """
    chosen = read_settings(ProtocolSettings, settings)
    task = SequentialComposition(chosen.m, chosen.ns)
    parties = sequential_parties(task.m, task.ns)
    built = chosen.decoder == "built"
    row = {"compared": 0, "mismatches": 0, "outputs": 0, "errors": 0 if built else None, "message_values": 0,
           "prompt_length": task.prompt_length, "parties": list(parties)}
    generator = torch.Generator().manual_seed(seed)
    for number in range(chosen.decoders):
        batch = task.sample(chosen.prompts, generator=generator)
        prompts = task.tokens(batch)
        examples = task.tokens(task.sample(CALIBRATION, generator=generator))
        decoder = (built_decoder(chosen, task, examples) if built
                   else draw_decoder(chosen, task, examples, seed=seed, number=number, layers=chosen.layers))
        logits, transcript = decoder(prompts), simulate(decoder, prompts, parties)
        row["compared"] += len(prompts)
        row["mismatches"] += int((logits != transcript.output).any(dim=1).sum())
        row["outputs"] += len(logits.unique(dim=0))
        row["message_values"] = max(row["message_values"], *(
            len(message.code.flatten(1).unique(dim=0)) for message in transcript.messages))
        if built:
            row["errors"] += int((logits.argmax(dim=-1) != task.answer(batch)).sum())
    return row | {
        "bits_sent": transcript.bits,
        "bits_formula": protocol_bits(parties, decoder.config.n_layers, decoder.message_bits),
        "accumulator_bits": decoder.accumulator_bits, "message_bits": decoder.message_bits,
        "Hdp": decoder.Hdp}


def draw_decoder(sizes: Sizes, task: SequentialComposition, examples: Tensor, *, seed: int, number: int,
                 layers: int | None = None) -> QuantisedDecoder:
    """A random decoder for the prompts of a task, L layers by default: a function of its arguments."""
    model = random_decoder(
        vocab=task.vocab, tokens=task.prompt_length, layers=layers or task.L, heads=sizes.heads,
        d_head=sizes.d_head, sharpness=sizes.sharpness,
        seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
    return quantise(model, examples, _precision(sizes))


def built_decoder(sizes: Sizes, task: SequentialComposition, examples: Tensor) -> QuantisedDecoder:
    """The hand-built decoder of L + 1 layers with integer accumulators."""
    return quantise(sequential_composition_decoder(task), examples, _precision(sizes))


def _precision(sizes: Sizes) -> Precision:
    return Precision(weight_bits=sizes.weight_bits, value_bits=sizes.value_bits)
