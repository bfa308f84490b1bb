"""The collision adversary against a trained layer: train one, quantise its attention, list all messages.

The inputs are the two-hop queries of `PermutationHops` at x = 0: every permutation z_2, and for every j one
z_1 with z_1(0) = j (the transposition of 0 and j). Only z_2 is the table that must come through as a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lib.experiments.composition import CompositionSettings, train_composition
from lib.experiments.recipe import read_settings
from lib.metrics.communication import QuantisedLayer, all_tables, census, quantise_layer, verify
from lib.models.transformer import Transformer
from lib.tasks.hops import PermutationHops
from lib.training import load_best, seeds_by_role


@dataclass(frozen=True, kw_only=True)
class TrainedCollisionSettings(CompositionSettings):
    """value_bits, weight_bits: the quantisations to try, in pairs; the rest trains a one-layer model."""

    L: int = 1
    value_bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    weight_bits: tuple[int, ...] = (2, 3, 4, 6, 8)

    def __post_init__(self):
        super().__post_init__()
        if self.L != 1 or self.K != 2:
            raise ValueError(f"the adversary is for one layer and two hops, got L={self.L}, K={self.K}")
        if len(self.value_bits) != len(self.weight_bits):
            raise ValueError("value_bits and weight_bits are tried in pairs: give as many of each")


def refute_trained(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Train one layer, refute its quantised attention. Settings: `TrainedCollisionSettings`. One row:

    float_accuracy: of the trained layer with its own MLP, on all n! n inputs; quantised: for each pair of
    bits a dict of value_bits, weight_bits, accumulator_bits, tables, messages, verified (whether a collision
    was found and holds token by token) and best_accuracy, which no MLP behind that attention can exceed on
    the same inputs. Source: the finite-precision bound of `one-layer-limits`, run on one given layer.
    """
    chosen = read_settings(TrainedCollisionSettings, settings)
    with TemporaryDirectory() as own:
        folder = Path(scratch or own)
        training = {name: settings[name] for name in settings if name not in ("value_bits", "weight_bits")}
        train_composition(training | {"L": 1}, seed=seed, scratch=folder)
        task = PermutationHops(chosen.n, chosen.K, chosen.order, chosen.tables_read)
        model = chosen.model(
            vocab=task.vocab, n_logits=task.n, max_tokens=task.length, seed=seeds_by_role(seed)["init"]
        )
        load_best(model, folder / "checkpoint")
    tables = all_tables(task.n, permutations=True)
    quantised = []
    for bits, weight_bits in zip(chosen.value_bits, chosen.weight_bits, strict=True):
        layer = quantised_attention(model, task, bits=bits, weight_bits=weight_bits)
        found = census(layer, tables)
        quantised.append({
            "value_bits": bits, "weight_bits": weight_bits, "accumulator_bits": layer.accumulator_bits,
            "tables": found.tables, "messages": found.messages,
            "verified": found.collision is not None and verify(layer, found.collision),
            "best_accuracy": 1 - found.forced_errors / found.inputs,
        })  # fmt: skip
    return {"float_accuracy": float_accuracy(model, task), "quantised": quantised}


def quantised_attention(
    model: Transformer, task: PermutationHops, *, bits: int, weight_bits: int
) -> QuantisedLayer:
    """What the query (x = 0, two hops) sees of its prompt through the model's one layer, in integers."""
    with torch.no_grad():
        states = _normed(model, task, torch.arange(task.n).repeat(task.n, 1).T)  # row y: z_2 is y everywhere
        where = task.n if task.order == "first-first" else 0  # z_2's tokens
        table = states[:, where : where + task.n].transpose(0, 1)  # (n, n, D): token i carrying symbol y
        asked = _normed(model, task, torch.arange(task.n).expand(task.n, -1))  # row j: z_1(0) = j
        inner = asked[:, task.n - where : 2 * task.n - where]  # z_1's tokens
        rest = torch.cat([inner, asked[:, -1:]], dim=1)  # (n, n + 1, D)
        attention, H = model.layers[0].attention, model.config.n_heads
        heads = [W.weight.unflatten(0, (H, -1)).mT for W in (attention.W_Q, attention.W_K, attention.W_V)]
        states = [part.numpy() for part in (table, rest, asked[0, -1], *heads)]  # heads: (H, D, d)
    return quantise_layer(*states, bits=bits, weight_bits=weight_bits)


@torch.no_grad()
def float_accuracy(model: Transformer, task: PermutationHops) -> float:
    """Share of the n! n inputs that the layer answers rightly, with its own MLP, unquantised."""
    mask = _mask(task)
    right = inputs = 0
    for z2 in torch.from_numpy(all_tables(task.n, permutations=True)).split(256):
        outer = z2.repeat_interleave(task.n, dim=0)  # every z_2 with every j
        prompts = _tokens(task, outer, torch.arange(task.n).repeat(len(z2)))
        answer = model(prompts, mask=mask)[:, -1].argmax(dim=-1).reshape(-1, task.n)
        right += int((answer == z2).sum())  # z_2(z_1(0)) = z_2(j)
        inputs += answer.numel()
    return right / inputs


def _normed(model: Transformer, task: PermutationHops, outer: torch.Tensor) -> torch.Tensor:
    """(n, T, D): what attention reads when z_2 is row j of `outer` and z_1(0) = j."""
    return model.layers[0].attention_norm(model.embed(_tokens(task, outer, torch.arange(task.n))))


def _tokens(task: PermutationHops, outer: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Prompts (B, 2n + 1, 3) with one query: z_2 = outer (B, n), z_1 swaps 0 and j (B,), x = 0, two hops."""
    inner = torch.arange(task.n).repeat(len(j), 1)
    inner[torch.arange(len(j)), j] = 0
    inner[:, 0] = j
    x = torch.zeros(len(j), 1, dtype=torch.long)
    return task.tokens(torch.stack([inner, outer], dim=1), x, x + 2)


def _mask(task: PermutationHops) -> torch.Tensor:
    """The task's mask for a prompt with one query."""
    return task.mask()[: 2 * task.n + 1, : 2 * task.n + 1]
