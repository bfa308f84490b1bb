"""What a trained composition does with its heads: maps by class of token, ranks, row sums, and its worth.

    inspect_heads({"arm": "dcmha", "L": 2, "d_model": 64, "n_heads": 8, ...}, seed=0)

A small language model is trained as in `lib.experiments.composed_language`, on the novels and on nothing
else, and looked into on windows of their validation split, beside the same model before training. The
measures and the lemma behind them stand in `lib.metrics.composition`. Two interventions say what the
composition is worth to the model that has it, and nothing of a model trained without: `fixed` puts the mean
over tokens in place of every M, `identity` leaves the heads as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from lib.choices import resolve_device
from lib.experiments.composed_language import (
    ComposedSettings,
    train_composed,
    untrained,
    validation_windows,
    window_losses,
)
from lib.experiments.probes import spread
from lib.experiments.recipe import read_settings
from lib.metrics import composition as measured
from lib.metrics.composition import compose, composition_matrices, with_interval
from lib.models.dcmha import DCMHA, rotate, rotation
from lib.models.transformer import Transformer
from lib.tasks import text
from lib.training import load_best, seeds_by_role

CLASSES = ("word", "inside", "capital", "punctuation", "paragraph")
PARTS = ("pre_query", "pre_key", "post_query", "post_key")
DIGITS = 5  # of the maps in a row: it stays readable


@dataclass(frozen=True, kw_only=True)
class HeadMapsSettings(ComposedSettings):
    """A composed arm of `ComposedSettings`, and how many validation windows it is looked at on."""

    map_windows: int = 24

    def __post_init__(self):
        super().__post_init__()
        if self.config().attention != "dcmha":
            raise ValueError(f"arm {self.arm!r} composes nothing; take 'dcmha' or one of its ablations")
        if not isinstance(self.map_windows, int) or self.map_windows < 3:
            raise ValueError(f"map_windows is at least 3, for intervals; got {self.map_windows!r}")


class Patterns(NamedTuple):
    """What one layer's heads do on B windows, in float64."""

    M: dict[str, Tensor]  # by part: (B, T, H, H)
    score: Tensor  # (B, H, T, T), for all pairs: no mask yet
    composed_score: Tensor
    weight: Tensor  # softmax of the composed scores over the allowed pairs
    composed_weight: Tensor
    allowed: Tensor  # (T, T) bool


def inspect_heads(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Train one composed language model and look inside. Settings: of `HeadMapsSettings`. One row:

    classes, parts, stages, tokens_by_class: names of the axes below; [mean, lo, hi] is over windows, 95 %.
    maps: {part: (L, classes, H, H)}, mean of M - I over the tokens of a class, from head g (row) to head h.
    trained, untrained: `look` at the model after and before training, on the same windows.
    lost_fixed, lost_identity: nats a token that the two interventions add, each [mean, lo, hi], paired by
    window: all compositions; lost_fixed_by_part: {part: [mean, lo, hi]}, that part alone.
    loss_nats, untrained_loss, loss_unigram, loss_bigram, parameters, tokens_trained, step0_hash,
    weights_hash, seeds: as in the row of `train_composed`.
    """
    chosen = read_settings(HeadMapsSettings, settings)
    plain = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(ComposedSettings)}
    seeds, device = seeds_by_role(seed), resolve_device(chosen.device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if scratch is None else scratch)
        row = train_composed(plain, seed=seed, scratch=folder)
        model = untrained(ComposedSettings(**plain), seed=seeds["init"]).to(device).eval()
        windows = validation_windows(chosen.T, chosen.map_windows).to(device)  # (n, T + 1)
        tokens = windows[:, :-1]
        control = look(model, tokens, seed=seeds["evaluation"])
        load_best(model, folder / "checkpoint")  # the latest weights: that is how `train_composed` ranks
    if model.weights_hash() != row["weights_hash"]:
        raise RuntimeError("the checkpoint does not hold the weights that training ended with")
    kept = ("loss_nats", "untrained_loss", "loss_unigram", "loss_bigram", "parameters", "tokens_trained")
    return {
        **{name: row[name] for name in (*kept, "step0_hash", "weights_hash", "seeds")},
        "classes": list(CLASSES),
        "stages": [stage for stage in ("pre", "post") if getattr(model.layers[0].attention, stage)],
        **class_maps(model, tokens, token_classes().to(device)[tokens], len(CLASSES)),
        "trained": look(model, tokens, seed=seeds["evaluation"]),
        "untrained": control,
        **losses_without(model, windows, seed=seeds["evaluation"]),
    }


@cache
def token_classes() -> Tensor:
    """Class of each of the 1,024 tokens, as index into `CLASSES`: (V,) long.

    word: letters after a space; inside: letters within a word; capital: letters, the first a capital, with
    or without a space; paragraph: a line end; punctuation: everything else, digits too.
    """
    tokenizer = text.austen_tokenizer()
    return torch.tensor([CLASSES.index(_class_of(tokenizer.decode([i]))) for i in range(text.VOCAB)])


def patterns_of(attention: DCMHA, x: Tensor) -> Patterns:
    """Scores and weights of a causal DCMHA before and after each stage, from its input x (B, T, D)."""
    T, d = x.shape[1], attention.d
    q = attention.q_norm(attention.W_Q(x).unflatten(-1, (-1, d)).transpose(1, 2)).double()  # (B, H, T, d)
    k = attention.k_norm(attention.W_K(x).unflatten(-1, (-1, d)).transpose(1, 2)).double()
    at = torch.arange(T, device=x.device)
    if attention.rope is not None:
        angles = rotation(at, d, base=attention.rope, like=q)
        q, k = rotate(q, *angles), rotate(k, *angles)
    distance = at[:, None] - at
    allowed = (distance >= 0) & (distance < (attention.window or T))
    M = _matrices(attention, x)
    score = q @ k.mT / math.sqrt(d)
    composed_score = compose(score, M.get("pre_query"), M.get("pre_key"))
    weight = composed_score.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    composed_weight = compose(weight, M.get("post_query"), M.get("post_key"))
    return Patterns(M, score, composed_score, weight, composed_weight, allowed)


@torch.no_grad()
def look(model: Transformer, tokens: Tensor, *, seed: int) -> dict:
    """Every measure, layer by layer, on tokens (n, T). Lists over L layers; [mean, lo, hi] over n windows.

    off_diagonal, distance: {part: (L, 3)}, mean over tokens of `off_diagonal_strength` and of
    `distance_from_identity`; dynamic_share, between_classes, between_shuffled: {part: (L,)}, pooled over
    windows: what of M - I depends on the token, and what of that its class tells (and a shuffled class).
    rank_over_heads: {stage: (L, 2, 3)}, effective, of allowed pairs, before and after; outside_span,
    change_outside_span: {stage: (L, 3)}, of A' and of A' - A. head_rank: (L, 2, 3), mean over heads of the
    effective rank of the T x T scores of all pairs, before and after pre; head_numerical_rank: (L, 2), mean.
    row_sum, row_sum_distance, negative_share, negative_mass: (L, 3); row_sum_quantiles: (L, 3), 5, 50, 95 %.
    """
    stream = model.trace(tokens, read=("residual",)).residual
    label = token_classes().to(tokens.device)[tokens].flatten()
    generator = torch.Generator().manual_seed(seed)
    shuffled = label[torch.randperm(len(label), generator=generator).to(label.device)]
    layers = []
    for l, layer in enumerate(model.layers):
        seen = patterns_of(layer.attention, layer.attention_norm(stream[l]))
        layers.append(
            {
                **_of_matrices(seen.M, label, shuffled, seed=seed),
                **_of_stages(seen, layer.attention, seed=seed),
                **_of_rows(seen, seed=seed),
            }
        )
    return _by_layer(layers)


@torch.no_grad()
def class_maps(
    model: Transformer, tokens: Tensor, label: Tensor, n_classes: int, *, mask: Tensor | None = None
) -> dict:
    """Mean of M - I over the tokens of each class, of any composed model on tokens (B, T) or (B, T, S).

    label: (B, T), 0 to n_classes - 1, or -1 for a token of no class. parts: names; tokens_by_class;
    maps {part: (L, n_classes, H, H)}, from head g (row) to head h, zeros for a class without tokens.
    """
    stream = model.trace(tokens, read=("residual",), mask=mask).residual
    inside = (label[:, :, None] == torch.arange(n_classes, device=label.device)).double()  # (B, T, classes)
    counts = inside.sum(dim=(0, 1))
    maps: dict[str, list] = {}
    for l, layer in enumerate(model.layers):
        for part, M in _matrices(layer.attention, layer.attention_norm(stream[l])).items():
            change = M - torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
            mean = torch.einsum("btc,btgh->cgh", inside, change) / counts.clamp(min=1)[:, None, None]
            maps.setdefault(part, []).append(_rounded(mean.tolist()))
    return {"parts": list(maps), "tokens_by_class": counts.long().tolist(), "maps": maps}


@torch.no_grad()
def losses_without(model: Transformer, windows: Tensor, *, seed: int) -> dict:
    """lost_fixed, lost_identity, lost_fixed_by_part on windows (n, T + 1); see `inspect_heads`.

    The mean over tokens is taken on as many windows of the training split, so no loss sees its own mean.
    """
    T, n = windows.shape[1] - 1, len(windows)
    fitted = text.chunks(text.austen_tokens("train"), T)
    fitted = fitted[spread(len(fitted), n)].to(windows.device)
    stream = model.trace(fitted, read=("residual",)).residual
    mean = []  # of each layer, by part: (H, H)
    for l, layer in enumerate(model.layers):
        M = _matrices(layer.attention, layer.attention_norm(stream[l]), static=False)
        mean.append({part: each.mean(dim=(0, 1)) for part, each in M.items()})
    whole = window_losses(model, windows)

    def lost(parts: list[str], change: Callable[[Tensor], Tensor]) -> list[float]:
        with replaced(model, [{p: change(of[p]) for p in parts if p in of} for of in mean]):
            return with_interval((window_losses(model, windows) - whole).tolist(), seed=seed)

    parts = [part for part in PARTS if part in mean[0]]
    return {
        "lost_fixed": lost(parts, lambda M: M),
        "lost_identity": lost(parts, lambda M: torch.eye(len(M), dtype=M.dtype, device=M.device)),
        "lost_fixed_by_part": {part: lost([part], lambda M: M) for part in parts},
    }


@contextmanager
def replaced(model: Transformer, matrices: list[dict[str, Tensor]]):
    """Inside, the dynamic side `part` of layer l is matrices[l][part] (H, H) at every token; the rest stays.

    A side becomes factors of rank H without gates, w1 = I and w2 = M - I, which says the same for every M.
    """
    with ExitStack() as stack:
        for layer, of_layer in zip(model.layers, matrices, strict=True):
            attention = layer.attention
            stack.callback(setattr, attention, "computation", attention.computation)
            attention.computation = "reference"  # takes factors of any rank
            for part, M in of_layer.items():
                stage, side = part.split("_")
                hook = getattr(getattr(attention, stage), side).register_forward_hook(_always(M))
                stack.callback(hook.remove)
        yield


def _always(M: Tensor) -> Callable:
    """A forward hook that gives the factors of M at every token, whatever the side computed."""
    eye = torch.eye(len(M), dtype=M.dtype, device=M.device)

    def hook(module, args, factors):
        shape = (*args[0].shape[:2], *M.shape)
        w1, w2 = (part.to(args[0].dtype).expand(shape) for part in (eye, M - eye))
        return w1, w2, None

    return hook


def _matrices(attention: DCMHA, x: Tensor, *, static: bool = True) -> dict[str, Tensor]:
    """M by part, (B, T, H, H). W_b counts with the queries, or alone where a stage has no dynamic side."""
    found = {}
    given = attention.compositions(x)
    for stage in ("pre", "post"):
        of_stage = getattr(attention, stage)
        W_b = None if of_stage is None or not static else of_stage.W_b
        for part in (f"{stage}_query", f"{stage}_key"):
            if part in given:
                found[part] = composition_matrices(*given[part], W_b=W_b)
                W_b = None
        if W_b is not None:
            H = len(W_b)
            M = torch.eye(H, dtype=torch.float64, device=x.device) + W_b.double()
            found[f"{stage}_query"] = M.expand(*x.shape[:2], H, H)
    return found


def _of_matrices(M: dict[str, Tensor], label: Tensor, shuffled: Tensor, *, seed: int) -> dict:
    found: dict[str, dict] = {}
    for part, each in M.items():
        flat = each.flatten(0, 1)
        for name, value in {
            "off_diagonal": _interval(measured.off_diagonal_strength(each).mean(dim=1), seed),
            "distance": _interval(measured.distance_from_identity(each).mean(dim=1), seed),
            "dynamic_share": measured.dynamic_share(flat),
            "between_classes": measured.share_between(flat, label),
            "between_shuffled": measured.share_between(flat, shuffled),
        }.items():
            found.setdefault(name, {})[part] = value
    return found


def _of_stages(seen: Patterns, attention: DCMHA, *, seed: int) -> dict:
    found: dict[str, dict] = {"rank_over_heads": {}, "outside_span": {}, "change_outside_span": {}}
    stages = {"pre": (seen.score, seen.composed_score), "post": (seen.weight, seen.composed_weight)}
    for stage, (before, after) in stages.items():
        if getattr(attention, stage) is None:
            continue
        ranks = [measured.effective_rank_over_heads(A, seen.allowed) for A in (before, after)]
        found["rank_over_heads"][stage] = [_interval(rank, seed) for rank in ranks]
        for name, A in (("outside_span", after), ("change_outside_span", after - before)):
            share = measured.share_outside_span(before, A, seen.allowed)
            found[name][stage] = _interval(share, seed)
    scores = (seen.score, seen.composed_score)
    return {
        **found,
        "head_rank": [_interval(measured.effective_rank(A).mean(dim=1), seed) for A in scores],
        "head_numerical_rank": [measured.numerical_rank(A).double().mean().item() for A in scores],
    }


def _of_rows(seen: Patterns, *, seed: int) -> dict:
    by_window = [measured.row_sums(A, seen.allowed) for A in seen.composed_weight]
    pooled = measured.row_sums(seen.composed_weight, seen.allowed)
    names = {"row_sum": "mean", "row_sum_distance": "distance"}
    names |= {name: name for name in ("negative_share", "negative_mass")}
    return {
        **{
            ours: with_interval([each[name] for each in by_window], seed=seed) for ours, name in names.items()
        },
        "row_sum_quantiles": [pooled[name] for name in ("low", "median", "high")],
    }


def _by_layer(layers: list[dict]) -> dict:
    """A list of equal dicts as a dict of lists, one level of inner dicts kept outside: {part: (L, …)}."""
    found = {}
    for name, first in layers[0].items():
        if isinstance(first, dict):
            found[name] = {part: [layer[name][part] for layer in layers] for part in first}
        else:
            found[name] = [layer[name] for layer in layers]
    return found


def _interval(values: Tensor, seed: int) -> list[float]:
    return with_interval(values.tolist(), seed=seed)


def _rounded(values: list | float) -> list | float:
    return [_rounded(v) for v in values] if isinstance(values, list) else round(values, DIGITS)


def _class_of(token: str) -> str:
    letters = [c for c in token if c.isalpha()]
    if letters:
        return "capital" if letters[0].isupper() else "word" if token[0] == " " else "inside"
    return "paragraph" if "\n" in token else "punctuation"
