"""Layers of a language model removed or made linear: how the loss grows with their number, what is saved.

Razzhigaev et al. 2024, section 3.4, remove the most linear layers one after another, replace them by fitted
linear maps, and distil these maps layer by layer by gradient training. Here the layers are ranked once on the
unchanged model (only "greedy-skip-cost" ranks again after every removal), and distillation is solved exactly.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.choices import check_choice
from lib.experiments.layer_costs import (
    HALVES,
    affine_maps,
    check_fit,
    fit_and_evaluation,
    increases,
    interval,
)
from lib.experiments.linearity import DIGITS, accumulate, fitted
from lib.experiments.reading import (
    Affine,
    ReadingSettings,
    check_layers,
    check_whole,
    layer_sizes,
    layer_streams,
    load,
    losses_under,
    step,
)
from lib.experiments.recipe import read_settings
from lib.models.transformer import Transformer
from lib.training import seeds_by_role

ORDERS = ("linearity", "linearity-without", "skip-cost", "replace-cost", "greedy-skip-cost", "random")
CHANGES = ("remove", "linear", "linear+distilled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimplifySettings(ReadingSettings):
    """order: which layers are changed first. "linearity": the highest held-out score with the residual;
    "linearity-without": without it; "skip-cost", "replace-cost": the lowest increase of the loss;
    "greedy-skip-cost": that again after every removal; "random": by the seed.

    change: "remove"; "linear": the unchanged model's least-squares maps; "linear+distilled": see `distil`.
    counts: how many layers are changed. tokens: of the evaluation part of `text`. fit_tokens: of the fit part
    of `fit_text` (None: of `text`), of which `order_windows` windows are set aside to rank costs on.
    """

    order: str = "linearity"
    change: str = "remove"
    counts: list[int]
    tokens: int = 2048
    fit_tokens: int = 16_384
    fit_text: str | None = None
    order_windows: int = 4
    ridge: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_fit(self)
        check_choice("order", self.order, ORDERS)
        check_choice("change", self.change, CHANGES)
        check_whole("order_windows", self.order_windows, 1)
        if not isinstance(self.counts, list) or not self.counts:
            raise ValueError(f"counts is a list of numbers of layers, got {self.counts!r}")
        for count in self.counts:
            check_whole("a count of layers", count, 1)
        if sorted(set(self.counts)) != self.counts:
            raise ValueError(f"counts rise from one to the next, got {self.counts}")


def simplify_model(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One model, changed layer by layer in one order. Settings: the fields of `SimplifySettings`. One row:

    loss, loss_lo, loss_hi: of the unchanged model, nats a token, bootstrap over windows; changed_layers: in
    order, as many as the largest count; criterion: what static orders rank by, for each layer of the model;
    losses: one for each count, on the evaluation text; increase, increase_lo, increase_hi: over `loss`,
    paired over windows; saved_parameters, saved_flops: exact, for each count, on a prompt of `context`
    tokens; layer_parameters ... model_flops as in `layer_costs`; n_fit, n_evaluated: tokens; weights_hash.
    """
    chosen = read_settings(SimplifySettings, settings)
    model = load(chosen)
    L, largest = model.config.n_layers, chosen.counts[-1]
    if largest > L - (chosen.change == "remove"):
        raise ValueError(f"{chosen.model} has {L} layers: {largest} cannot be changed by {chosen.change!r}")
    fit, evaluation = fit_and_evaluation(chosen, model, seed=seed)
    ranking, fit = set_aside(fit, chosen.order_windows)
    maps, scores = {}, {}
    if chosen.change == "linear" or chosen.order in ("linearity", "linearity-without", "replace-cost"):
        maps, scores = affine_maps(model, fit, ridge=chosen.ridge, batch=chosen.batch)
    if chosen.order == "greedy-skip-cost":
        order, criterion = greedy_order(model, ranking, largest, batch=chosen.batch), []
    else:
        criterion = _criterion(chosen, model, ranking, maps, scores, seed=seed)
        order = sorted(range(L), key=lambda l: criterion[l])[:largest]
    sets = [order[:count] for count in chosen.counts]
    if chosen.change == "linear+distilled":
        plans = distil(model, fit, sets, ridge=chosen.ridge, batch=chosen.batch)
    else:
        plans = [{l: maps[l] if chosen.change == "linear" else None for l in part} for part in sets]
    base, *found = losses_under(model, evaluation, [{}, *plans], batch=chosen.batch)
    sizes = layer_sizes(model, chosen.context)
    left = {"parameters": 0, "flops": 0} if chosen.change == "remove" else None
    saved = {
        what: sizes[f"layer_{what}"] - (left[what] if left else sizes[f"map_{what}"])
        for what in ("parameters", "flops")
    }
    return {
        **interval("loss", base, seed=seed),
        "changed_layers": order,
        "criterion": [round(value, DIGITS) for value in criterion],
        "losses": [round(losses.mean().item(), DIGITS) for losses in found],
        **increases("increase", torch.stack(found), base, seed=seed),
        **{f"saved_{what}": [count * one for count in chosen.counts] for what, one in saved.items()},
        **sizes,
        "n_fit": fit.numel(),
        "n_evaluated": evaluation.numel(),
        "weights_hash": model.weights_hash(),
    }


def set_aside(fit: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n windows spread over the fit text, and the others. (windows, T) -> (n, T), (windows - n, T)."""
    if n >= len(fit):
        raise ValueError(f"the fit text has {len(fit)} windows, order_windows={n} leaves none to fit on")
    chosen = torch.zeros(len(fit), dtype=torch.bool)
    chosen[torch.arange(n) * len(fit) // n] = True
    return fit[chosen], fit[~chosen]


def _criterion(chosen: SimplifySettings, model, ranking, maps, scores, *, seed: int) -> list[float]:
    """For each layer a number; the smallest is changed first. Linearity is negated for that."""
    L = model.config.n_layers
    if chosen.order == "random":
        generator = torch.Generator().manual_seed(seeds_by_role(seed)["order"])
        return [float(place) for place in torch.randperm(L, generator=generator)]
    if chosen.order in ("linearity", "linearity-without"):
        return [-scores[l][chosen.order == "linearity-without"] for l in range(L)]
    plans = [{l: maps[l] if chosen.order == "replace-cost" else None} for l in range(L)]
    base, *found = losses_under(model, ranking, [{}, *plans], batch=chosen.batch)
    return [(losses - base).mean().item() for losses in found]


def greedy_order(model: Transformer, tokens: Tensor, n: int, *, batch: int) -> list[int]:
    """n layers, each that whose removal costs least once those before it are gone. tokens: (windows, T)."""
    gone: list[int] = []
    for _ in range(n):
        left = [l for l in range(model.config.n_layers) if l not in gone]
        plans = [dict.fromkeys([*gone, l]) for l in left]
        cost = losses_under(model, tokens, plans, batch=batch).mean(dim=1)
        gone.append(left[int(cost.argmin())])
    return gone


def distil(
    model: Transformer, tokens: Tensor, sets: Sequence[Iterable[int]], *, ridge: float = 0.0, batch: int = 4
) -> list[dict[int, Affine]]:
    """For each set of layers, maps that imitate the unchanged model from a drifting stream. tokens: (n, T).

    From the bottom up, map l minimises sum |s A + b - t|^2 over tokens: s the changed model's stream before
    layer l (below it everything is final), t the unchanged model's residual[l + 1]. This is the minimum of
    the layer-wise mean squared error, in closed form, where the paper trained by gradient; layers that stay
    are not trained. The lowest map of a set is the plain least-squares map.
    """
    sets = [set(part) for part in sets]
    for part in sets:
        check_layers(model, part)
    plans: list[dict[int, Affine]] = [{} for _ in sets]
    streams: list[Tensor | None] = [None] * len(sets)  # None: still the unchanged model's
    groups = torch.arange(len(tokens)).tensor_split(HALVES)
    for l, x, a, m in layer_streams(model, tokens, batch=batch):
        target = x + a + m
        for i, part in enumerate(sets):
            s = x if streams[i] is None else streams[i]
            if l in part:
                plans[i][l] = fitted(accumulate(s, target - s, groups), ridge=ridge, like=s)
                streams[i] = plans[i][l](s)
            elif streams[i] is not None and l < max(part):  # above the last map nothing is left to fit
                streams[i] = torch.cat([step(model, l, piece, {}) for piece in s.split(batch)])
    return plans


def build(model: Transformer, layers: Iterable[int], maps: Mapping[int, Affine] | None = None) -> Transformer:
    """The model without `layers`, or with `maps` in their places: a Transformer to run, trace and time.

    Weights are shared, not copied. Removed layers are gone, so that n_layers is smaller; a map stands at its
    layer's place as an attention that reads its own token only, beside an MLP that adds nothing: there the
    attention_weight tap and masks mean nothing. ValueError if no layer is left, or maps are for other layers.
    """
    gone = set(layers)
    check_layers(model, gone)
    if maps is not None and not gone <= maps.keys():
        raise ValueError(f"no map for layers {sorted(gone - maps.keys())}; maps are for {sorted(maps)}")
    kept = []
    for l, layer in enumerate(model.layers):
        if l not in gone:
            kept.append(layer)
        elif maps is not None:
            kept.append(AffineLayer(maps[l]))
    if not kept:
        raise ValueError("no layer would be left; keep one, or replace some by maps")
    short = copy.copy(model)  # an nn.Module keeps its parts in dicts: the one that changes is copied
    short._modules = dict(model._modules)
    short.config = dataclasses.replace(model.config, n_layers=len(kept))
    short.layers = nn.ModuleList(kept)
    return short


class AffineLayer(nn.Module):
    """An affine map with the face of a layer of `Transformer`."""

    def __init__(self, affine: Affine):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.Identity(), nn.Identity()
        self.attention, self.mlp = _MapAsAttention(affine), _Nothing()


class _MapAsAttention(nn.Module):
    def __init__(self, affine: Affine):
        super().__init__()
        self.affine = affine

    def forward(self, x: Tensor, *, mask=None, rows=None, explicit=False) -> tuple[Tensor, None]:
        return self.affine.adds(x if rows is None else x[:, rows]), None


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
