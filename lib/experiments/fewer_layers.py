"""What fewer layers cost: on prose, code and arithmetic, and when each token leaves as soon as it is sure.

    measure_tasks:      the last, the cheapest or random layers removed: is arithmetic more fragile?
    measure_early_exit: the lens decides where a token leaves; loss, layers and FLOPs, beside a fixed exit

Sources: the question is that of Csordás, Manning and Potts 2025 (what later layers are for); orders, texts
and the comparison with a fixed exit are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.depth_use import DIGITS, WindowSettings, described, read_windows, rounded
from lib.experiments.reading import (
    READOUT_TOKENS,
    WEIGHTS,
    Plan,
    ReadingSettings,
    check_whole,
    load,
    losses_under,
    step,
    windows,
)
from lib.experiments.recipe import read_settings
from lib.metrics.depth import early_exit
from lib.metrics.depth.lens import SCHEMES
from lib.models import pretrained
from lib.models.transformer import Transformer
from lib.tasks.arithmetic import Arithmetic
from lib.tasks.questions import encode_question
from lib.tasks.text import encode
from lib.training import seeds_by_role

TEXTS = ("prose", "code", "arithmetic")
KINDS = (*TEXTS, "answers")  # what a loss is measured on; answers: of the arithmetic, from line SHOTS on
ORDERS = ("last", "cheapest", "random")
SHOTS = 2  # lines of arithmetic that a model may read before its answers count
LINES = 8  # lines of arithmetic drawn at once
PARTS = {"fit": 0, "evaluation": 1}  # ranked on, judged on
RESAMPLES = 2_000


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """n windows of `context` tokens of each text; layers are ranked on `rank_windows` others of each.

    counts: how many layers are removed. orders: "last": from the top; "cheapest": those whose removal alone
    raises the loss least, relative to the loss, mean over the three texts; "random": by the seed.
    steps: operations of the arithmetic, a line each, all equally often.
    """

    model: str
    counts: list[int]
    orders: list[str] | None = None  # None: all
    per_text: int = 10
    rank_windows: int = 2
    context: int = 64
    steps: list[int] | None = None  # None: one
    weights: str = "trained"
    batch: int = 4
    device: str = "cpu"

    def __post_init__(self):
        for name, low in (("per_text", 3), ("rank_windows", 1), ("context", 32), ("batch", 1)):
            check_whole(name, getattr(self, name), low)
        for name, values in (("counts", self.counts), ("steps", self.steps)):
            if values is None:
                continue
            if not isinstance(values, list) or not values or sorted(set(values)) != values:
                raise ValueError(f"{name} is a rising list of whole numbers, got {values!r}")
            check_whole(f"the first of {name}", values[0], 1)
        for order in self.orders or []:
            check_choice("order", order, ORDERS)
        check_choice("weights", self.weights, WEIGHTS)
        resolve_device(self.device)


def measure_tasks(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Layers removed, and its cost on each kind of text. Settings: the fields of `TaskSettings`. One row:

    For x in prose, code, arithmetic, answers: x_loss, .._lo, .._hi: nats a token, bootstrap over windows. For
    each order o: removed_o: layers, in order; lists, one value a count: x_o: increase of the loss, nats;
    x_o_relative: increase / loss, means over windows; x_o_beyond: that less the one of prose (code,
    arithmetic and answers only); each with .._lo, .._hi. accuracy, accuracy_o: part of the answers that are
    the likeliest token. n_answers, n_tokens; rank_cost: relative increase by layer, mean over the texts.

    Prose and code are ranked on documents that are not evaluated, arithmetic on other lines.
    """
    chosen = read_settings(TaskSettings, settings)
    shape = ReadingSettings(
        model=chosen.model, context=chosen.context, tokens=3 * chosen.context, device=chosen.device
    )
    model = load(shape, weights=chosen.weights, seed=seed)
    L, most = model.config.n_layers, chosen.counts[-1]
    if most >= L:
        raise ValueError(f"{chosen.model} has {L} layers: {most} cannot be removed, {L - 1} at most")
    tokenizer = pretrained.load_tokenizer(chosen.model)
    ranked, evaluated = (
        {text: _read(chosen, text, tokenizer, part, model.config.vocab, seed=seed) for text in TEXTS}
        for part in PARTS
    )
    row, orders = {}, chosen.orders or list(ORDERS)
    order_of = {"last": list(range(L - 1, -1, -1))}
    if "cheapest" in orders:
        costs = []
        for tokens, _ in ranked.values():
            alone = [{l: None} for l in range(L)]
            base, *found = losses_under(model, tokens, [{}, *alone], batch=chosen.batch)
            costs.append(torch.stack([losses.mean() / base.mean() - 1 for losses in found]))
        cost = torch.stack(costs).mean(dim=0)
        row["rank_cost"] = rounded(cost)
        order_of["cheapest"] = cost.argsort(stable=True).tolist()
    generator = torch.Generator().manual_seed(seeds_by_role(seed)["order"])
    order_of["random"] = torch.randperm(L, generator=generator).tolist()
    plans = [dict.fromkeys(order_of[order][:count]) for order in orders for count in chosen.counts]
    losses, right = _measured(model, evaluated, [{}, *plans], batch=chosen.batch)
    answers = int(evaluated["arithmetic"][1].sum())
    row |= _report(chosen, orders, losses, right / answers, seed=seed)
    row |= {f"removed_{order}": order_of[order][:most] for order in orders}
    everything = torch.cat([tokens for tokens, _ in evaluated.values()])
    return {**row, "n_answers": answers, "n_tokens": everything.numel(), **described(model, everything)}


def _read(chosen: TaskSettings, text: str, tokenizer: Tokenizer, part: str, vocab: int, *, seed: int):
    """Windows (n, T) of a text, and which of its next tokens are answers (n, T - 1) bool."""
    n = chosen.per_text if part == "evaluation" else chosen.rank_windows
    if text == "arithmetic":
        tokens, answers = arithmetic_windows(
            n, chosen.context, tokenizer, steps=chosen.steps or [1], step=PARTS[part], seed=seed
        )
    else:
        shared = {"context": chosen.context, "seed": seed, "vocab": vocab}
        tokens = windows(text, tokenizer, part=part, tokens=max(n, 3) * chosen.context, **shared)[:n]
        answers = torch.zeros(len(tokens), chosen.context - 1, dtype=torch.bool)
    return tokens, answers


def arithmetic_windows(
    n: int, T: int, tokenizer: Tokenizer, *, steps: Sequence[int], step: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Lines "5 + 3 = 8" of one-digit results in n windows of T tokens, each cut at T; no line spans two.

    -> tokens (n, T), and which next tokens are answers, (n, T - 1) bool, those of the first SHOTS lines left
    out. The k-th line of a window has steps[k mod len(steps)] operations. A function of (seed, step) alone.
    """
    role, end = seeds_by_role(seed)["data"], encode("\n", tokenizer)
    tasks = {k: Arithmetic(steps=k, operators="+-", results=(0, 9)) for k in steps}
    tokens, answers = torch.zeros(n, T, dtype=torch.long), torch.zeros(n, T, dtype=torch.bool)
    for window in range(n):
        at, k, queue = 0, 0, {}
        while at < T:
            count = steps[k % len(steps)]
            if not queue.get(count):
                batch = 1_000_000 * step + 1_000 * window + k
                queue[count] = tasks[count].questions(batch, seed=role, size=LINES)
            ids, where = encode_question(queue[count].pop(), tokenizer)
            line = torch.cat([ids, end])[: T - at]
            tokens[window, at : at + len(line)] = line
            if k >= SHOTS:
                answers[window, at + where : at + len(ids)] = True
            at, k = at + len(line), k + 1
    if not answers.any(dim=1).all():
        raise ValueError(f"windows of {T} tokens hold no answer behind the first {SHOTS} lines: longer ones")
    return tokens, answers[:, 1:]


@torch.no_grad()
def _measured(
    model: Transformer, texts: Mapping[str, tuple[Tensor, Tensor]], plans: Sequence[Plan], *, batch: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of each kind, (plans, n) nats a token, and how many answers are the likeliest token, (plans,).

    An answer's window counts by its mean over its answers. Text by text, the unchanged prefix is shared.
    """
    losses, right = {}, torch.empty(0)
    for text, (tokens, answers) in texts.items():
        nats, best = token_losses(model, tokens, plans, batch=batch)  # (plans, n, T - 1)
        losses[text] = nats.mean(dim=2)
        if text == "arithmetic":
            losses["answers"] = (nats * answers).sum(dim=2) / answers.sum(dim=1)
            right = (best & answers).sum(dim=(1, 2)).double()
    return losses, right


@torch.no_grad()
def token_losses(
    model: Transformer, tokens: Tensor, plans: Sequence[Plan], *, batch: int
) -> tuple[Tensor, Tensor]:
    """Loss of each next token under each plan, nats, and whether it was the likeliest. (plans, n, T - 1)."""
    device = next(model.parameters()).device
    nats, best = [], []
    for block in tokens.to(device).split(batch):
        ends = final_streams(model, block, plans)  # (plans, b, T, D)
        rows, goal = ends[:, :, :-1].flatten(0, 2), block[:, 1:].repeat(len(plans), 1).flatten()
        found, right = [], []
        for part, target in zip(rows.split(READOUT_TOKENS), goal.split(READOUT_TOKENS), strict=True):
            logits = model.readout(part).float()
            found.append(cross_entropy(logits, target, reduction="none").double().cpu())
            right.append((logits.argmax(dim=-1) == target).cpu())
        shape = (len(plans), len(block), tokens.shape[1] - 1)
        nats.append(torch.cat(found).view(shape))
        best.append(torch.cat(right).view(shape))
    return torch.cat(nats, dim=1), torch.cat(best, dim=1)


def final_streams(model: Transformer, block: Tensor, plans: Sequence[Plan]) -> Tensor:
    """residual[L] under each plan, (plans, b, T, D), from the prefix that no plan changes."""
    L = model.config.n_layers
    first = [min(plan, default=L) for plan in plans]
    clean, streams = model.embed(block), [None] * len(plans)
    for l in range(L):
        for i, plan in enumerate(plans):
            if l >= first[i]:
                streams[i] = step(model, l, clean if streams[i] is None else streams[i], plan)
        if l < max(first):
            clean = step(model, l, clean, {})
    return torch.stack([clean if h is None else h for h in streams])


def _report(
    chosen: TaskSettings, orders: Sequence[str], losses: Mapping[str, Tensor], right: Tensor, *, seed: int
) -> dict:
    """losses: of each kind (plans, n), unchanged model first. Each text is resampled alone."""
    means, row = {}, {}  # (1 + RESAMPLES, plans): first the mean over windows, then over resampled ones
    for i, kind in enumerate(KINDS):
        values = losses[kind].numpy()
        n = values.shape[1]
        draws = np.random.default_rng([seed, i]).integers(n, size=(RESAMPLES, n))
        means[kind] = np.concatenate([values.mean(axis=1)[None], values[:, draws].mean(axis=2).T])
        row |= {name: value[0] for name, value in _columns(f"{kind}_loss", means[kind][:, :1]).items()}
    relative = {kind: mean[:, 1:] / mean[:, :1] - 1 for kind, mean in means.items()}
    for o, order in enumerate(orders):
        part = slice(o * len(chosen.counts), (o + 1) * len(chosen.counts))
        for kind, mean in means.items():
            row |= _columns(f"{kind}_{order}", (mean[:, 1:] - mean[:, :1])[:, part])
            row |= _columns(f"{kind}_{order}_relative", relative[kind][:, part])
            if kind != "prose":
                row |= _columns(f"{kind}_{order}_beyond", (relative[kind] - relative["prose"])[:, part])
        row[f"accuracy_{order}"] = rounded(right[1:][part])
    return row | {"accuracy": rounded(right[:1])[0]}


def _columns(name: str, values: np.ndarray) -> dict[str, list[float]]:
    """values (1 + R, K): the first row is the estimate, the others are resamples."""
    lo, hi = np.quantile(values[1:], [0.025, 0.975], axis=0)
    found = ((name, values[0]), (f"{name}_lo", lo), (f"{name}_hi", hi))
    return {key: np.round(numbers, DIGITS).tolist() for key, numbers in found}


@dataclass(frozen=True, kw_only=True)
class ExitSettings(WindowSettings):
    """thresholds: of the lens' confidence. exits: taps where a token may leave; None: all but the first.
    scheme: whose keys and values later tokens read, see `lib.metrics.depth.early_exit`.
    """

    tokens: int = 512
    thresholds: list[float]
    exits: list[int] | None = None
    scheme: str = "frozen"

    def __post_init__(self):
        super().__post_init__()
        check_choice("scheme", self.scheme, SCHEMES)
        if not isinstance(self.thresholds, list) or sorted(set(self.thresholds)) != self.thresholds:
            raise ValueError(f"thresholds is a list of numbers that rise, got {self.thresholds!r}")
        if self.exits is not None and (not self.exits or sorted(set(self.exits)) != self.exits):
            raise ValueError(f"exits is a list of taps that rise, or None for all; got {self.exits!r}")


def measure_early_exit(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Early exit by lens confidence beside a fixed exit. Settings: the fields of `ExitSettings`. One row:

    loss, .._lo, .._hi: of the whole model, nats a token, bootstrap over windows. For each threshold, lists:
    layers: mean number run; added, .._lo, .._hi: loss less the whole model's, paired over windows; agreement
    with its likeliest token; flops: share of the whole model's, readouts looked at included; against_fixed,
    .._lo, .._hi: loss less that of all tokens leaving at one tap, at the same mean number of layers
    (interpolated between taps, the whole model included): below 0, choosing by confidence pays.
    fixed_taps, fixed_added, .._lo, .._hi: every token leaves at the tap.
    n_windows ... tokens_hash as in `lib.experiments.depth_use`.
    """
    chosen = read_settings(ExitSettings, settings)
    model, tokens, row = read_windows(chosen, seed=seed)
    L, n = model.config.n_layers, len(tokens)
    taps = list(range(1, L)) if chosen.exits is None else chosen.exits
    left = early_exit(
        model, tokens, chosen.thresholds, exits=taps, scheme=chosen.scheme, batch_size=chosen.batch
    )
    fixed = losses_under(model, tokens, [dict.fromkeys(range(tap, L)) for tap in taps], batch=chosen.batch)
    by_window = (left.loss.double(), left.exit_layer.double(), left.full_loss[None].double())
    loss, layers, whole = (x.view(len(x), n, -1).mean(dim=2).numpy() for x in by_window)
    K, F = len(loss), len(taps)
    sample = np.concatenate([loss, layers, fixed.numpy(), whole])  # (2 K + F + 1, n)
    draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    means = np.concatenate([sample.mean(axis=1)[None], sample[:, draws].mean(axis=2).T])
    loss, layers, fixed, whole = np.split(means, [K, 2 * K, 2 * K + F], axis=1)
    curve = np.concatenate([fixed, whole], axis=1)  # (1 + R, F + 1), at the taps and at L
    same = [[np.interp(x, [*taps, L], y) for x in at] for at, y in zip(layers, curve, strict=True)]
    return {
        **row,
        **{name: value[0] for name, value in _columns("loss", whole).items()},
        "layers": np.round(layers[0], DIGITS).tolist(),
        **_columns("added", loss - whole),
        "agreement": rounded(left.agrees.double().mean(dim=1)),
        "flops": rounded(left.flops.sum(dim=1) / left.full_flops.sum()),
        **_columns("against_fixed", loss - np.array(same)),
        "fixed_taps": taps,
        **_columns("fixed_added", fixed - whole),
    }
