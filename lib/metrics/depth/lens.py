"""The logit lens: what the model would answer if it stopped after l layers, and what stopping there saves.

The lens at tap l reads residual[l] with the final norm (with that tap's own statistics) and the readout:

    p_l = softmax(readout(residual[l])),   l = 0 … L,   p_L = the output of the model.

Logarithms are natural: entropy, KL and loss are in nats. Half precision becomes float32 before a softmax.

Sources: Csordás, Manning and Potts 2025 (the lens at the input of each layer, KL from lens to output, top-5
overlap; facts C.1 #5). Early exits and their accounting: derived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.metrics.cost import cost
from lib.metrics.depth.pooled import full
from lib.metrics.depth.prompts import batches, check_prompts
from lib.metrics.intervals import bootstrap, paired_bootstrap
from lib.models.inputs import check_rows, found
from lib.models.transformer import Transformer

MEASURES = ("kl", "kl_reverse", "overlap", "entropy", "confidence", "target_log_probability")
SCHEMES = ("frozen", "ideal")


@dataclass(frozen=True, eq=False)
class Lens:
    """What the lens read at L + 1 taps and N tokens; every measure is (L + 1, N) on the CPU."""

    kl: Tensor  # KL(p_l ‖ p_L), nats: lens first, as the paper has it
    kl_reverse: Tensor  # KL(p_L ‖ p_l), nats
    overlap: Tensor  # the part of the k best entries that tap l shares with the output, in [0, 1]
    entropy: Tensor  # of p_l, nats
    confidence: Tensor  # max p_l
    target_log_probability: Tensor  # log p_l(target), nats
    target: Tensor  # (N,) vocabulary entries
    prompt: Tensor  # (N,) which prompt a token belongs to
    row: Tensor  # (N,) where in its prompt it stands
    k: int

    def mean(self, measure: str) -> Tensor:
        """(L + 1,): mean over tokens, as in the paper."""
        return self._read(measure).mean(dim=1)

    def quantile(self, measure: str, q: float) -> Tensor:
        """(L + 1,): the q-quantile over tokens, 0 <= q <= 1."""
        return self._read(measure).quantile(q, dim=1)

    def per_prompt(self, measure: str) -> Tensor:
        """(L + 1, P): mean over the tokens of each prompt, prompts in the order given."""
        values = self._read(measure)
        P = int(self.prompt.max()) + 1
        sums = values.new_zeros(len(values), P).index_add_(1, self.prompt, values)
        return sums / self.prompt.bincount(minlength=P)

    def interval(self, measure: str, *, seed: int, level: float = 0.95) -> Tensor:
        """(2, L + 1): lo and hi of the mean over prompts, each prompt counting once. Needs 3 prompts."""
        rows = self.per_prompt(measure).tolist()
        return torch.tensor([bootstrap(row, seed=seed, level=level) for row in rows], dtype=torch.float64).T

    def _read(self, measure: str) -> Tensor:
        check_choice("measure", measure, MEASURES)
        return getattr(self, measure)


@torch.no_grad()
def logit_lens(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    *,
    rows: slice | Tensor | None = None,
    targets: str | Tensor = "next",
    k: int = 5,
    batch_size: int = 8,
    logits_at_once: int = 4_000_000,
) -> Lens:
    """The lens at every tap, on prompts (B, T) or a list of prompts (T_i,), long.

    rows:    a slice or token indices (R,), applied to each prompt (a slice may count from its end).
             None: every token that has a target.
    targets: "next": the token that follows; "top": the entry that the output ranks first; or entries (N,)
             long, one for each token read, prompt by prompt.
    k:       how many of the best entries are compared, by their indices.
    batch_size prompts run together; `logits_at_once` numbers of a readout are held at a time (about eight
    times as much in temporaries). The output is tap L of the same computation: KL is 0 and overlap 1 there.
    ValueError for prompts, rows or targets that do not fit, and for a model whose logits are not finite.
    """
    taken, targets = _places(model, tokens, rows, targets)
    V = model.config.n_out
    if not 1 <= k <= V:
        raise ValueError(f"k counts entries of the vocabulary: 1 to {V}, got {k}")
    kept = {name: [] for name in (*MEASURES, "target", "prompt", "row")}
    for which, batch in batches(tokens, batch_size):
        places = [taken[i] for i in which]
        streams = torch.stack(list(_streams(model, batch.to(_device(model)), places)))  # (L + 1, n, D)
        prompt = torch.cat([torch.full_like(place, i) for i, place in zip(which, places, strict=True)])
        row = torch.cat(places)
        goal = None if targets is None else torch.cat([targets[i] for i in which])
        n = max(1, logits_at_once // V)
        for start in range(0, len(row), n):
            part = slice(start, start + n)
            values = _compare(model, streams[:, part], None if goal is None else goal[part], k)
            values |= {"prompt": prompt[part], "row": row[part]}
            for name, value in values.items():
                kept[name].append(value.cpu())
    joined = {name: torch.cat(value, dim=-1) for name, value in kept.items()}
    order = torch.argsort(joined["prompt"], stable=True)  # prompts of one length ran together
    return Lens(**{name: value[..., order] for name, value in joined.items()}, k=k)


def _compare(model: Transformer, streams: Tensor, target: Tensor | None, k: int) -> dict[str, Tensor]:
    """All measures of one chunk. streams: (L + 1, n, D); target (n,), None for the output's best entry."""
    last = log_probabilities(model, streams[-1], len(streams) - 1)  # (n, V)
    best = last.topk(k).indices  # (n, k)
    target = (best[:, 0] if target is None else target.to(best.device))[:, None]  # (n, 1)
    p_last, found = last.exp(), {name: [] for name in MEASURES}
    for l, stream in enumerate(streams):
        lens = last if l == len(streams) - 1 else log_probabilities(model, stream, l)
        p, gap = lens.exp(), lens - last
        top = lens.topk(k)
        shared = (top.indices[:, :, None] == best[:, None, :]).any(dim=-1)  # (n, k)
        found["kl"].append((p * gap).sum(dim=-1))
        found["kl_reverse"].append(-(p_last * gap).sum(dim=-1))
        found["overlap"].append(shared.to(lens).mean(dim=-1))
        found["entropy"].append(-(p * lens).sum(dim=-1))
        found["confidence"].append(top.values[:, 0].exp())
        found["target_log_probability"].append(lens.gather(1, target)[:, 0])
    return {name: torch.stack(values) for name, values in found.items()} | {"target": target[:, 0]}


def log_probabilities(model: Transformer, h: Tensor, l: int) -> Tensor:
    """log p_l (n, V) of streams h (n, D), in float32 at least. ValueError if the logits are not finite."""
    logits = full(model.readout(h))
    if not logits.sum().isfinite() and not logits.isfinite().all():
        raise ValueError(f"the model's logits at tap {l} are not finite: nothing can be measured on it")
    return logits.log_softmax(dim=-1)


# Leaving early


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """Where N tokens left the model at each of K thresholds, and the cost; targets are the next tokens."""

    thresholds: Tensor  # (K,)
    exit_layer: Tensor  # (K, N) layers run before the answer was read: L if none was confident enough
    loss: Tensor  # (K, N) nats
    agrees: Tensor  # (K, N) bool: its best entry is the full model's
    flops: Tensor  # (K, N) float64: with the lens readouts, and the keys and values of layers left out
    full_loss: Tensor  # (N,) of the whole model
    full_flops: Tensor  # (N,)
    prompt: Tensor  # (N,)
    row: Tensor  # (N,)
    n_layers: int
    scheme: str

    def table(self, *, seed: int, level: float = 0.95) -> pd.DataFrame:
        """A row for each threshold: threshold, layers (mean run), loss_nats, added_nats with its interval
        lo, hi over prompts (paired with the whole model; at least 3), agreement with the whole model's best
        entry, flops (as a part of the whole model's).
        """
        rows = []
        for i, threshold in enumerate(self.thresholds.tolist()):
            ours, whole = self._by_prompt(self.loss[i]), self._by_prompt(self.full_loss)
            lo, hi = paired_bootstrap(ours, whole, seed=seed, level=level)
            rows.append(
                {
                    "threshold": threshold,
                    "layers": self.exit_layer[i].double().mean().item(),
                    "loss_nats": self.loss[i].double().mean().item(),
                    "added_nats": float((self.loss[i].double() - self.full_loss.double()).mean()),
                    "lo": lo,
                    "hi": hi,
                    "agreement": self.agrees[i].double().mean().item(),
                    "flops": float(self.flops[i].sum() / self.full_flops.sum()),
                }
            )
        return pd.DataFrame(rows)

    def _by_prompt(self, values: Tensor) -> list[float]:
        sums = torch.zeros(int(self.prompt.max()) + 1, dtype=torch.float64)
        sums.index_add_(0, self.prompt, values.double())
        return (sums / self.prompt.bincount(minlength=len(sums))).tolist()


@torch.no_grad()
def early_exit(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    thresholds: Sequence[float],
    *,
    exits: Sequence[int] | None = None,
    scheme: str = "frozen",
    batch_size: int = 8,
    logits_at_once: int = 4_000_000,
) -> EarlyExit:
    """A token leaves at the first tap in `exits` where max p_l >= threshold; its prediction is read there.

    thresholds: at least 0; above 1 nobody leaves. exits: taps 0 to L - 1, by default 1 to L - 1.
    Later tokens read keys and values of tokens that left; `scheme` says whose:
    "frozen": the stream of a token that left stays as it was, and each later layer computes keys and values
              from it: a decoder can do so. They are counted: 2 D · 2 (kv heads) d FLOPs a layer left out.
    "ideal":  as if the token had gone on for its readers, at no cost: a bound that no decoder reaches.
    FLOPs of a token at row t, counted as in `lib.metrics.cost`: (layers run) · (2 matrices + 4 (t + 1) H d)
    + 2 D V for each readout looked at + keys and values as above. The readouts are not a detail: with a large
    vocabulary one costs several layers.
    The last token of a prompt has no next token: it is run, never counted. Causal models only (ValueError).
    """
    c = model.config
    check_choice("scheme", scheme, SCHEMES)
    if not c.causal:
        raise ValueError("early exit reads the next token: it needs a causal model")
    levels = [float(x) for x in thresholds]
    if not levels or not all(x >= 0 for x in levels):
        raise ValueError(f"thresholds are numbers of at least 0, one or more; got {list(thresholds)}")
    taps = tuple(range(1, c.n_layers)) if exits is None else tuple(sorted({int(l) for l in exits}))
    if any(not 0 <= l < c.n_layers for l in taps):
        raise ValueError(f"exits are taps 0 to {c.n_layers - 1}, got {list(exits)}")
    _, targets = _places(model, tokens, None, "next")

    names, kept = ("exit_layer", "loss", "best"), {}
    walk = _frozen if scheme == "frozen" else _ideal
    for which, batch in batches(tokens, batch_size):
        batch = batch.to(_device(model))
        goal = torch.stack([targets[i] for i in which]).to(batch.device)  # (b, T - 1)
        found = walk(model, batch, goal, [*levels, math.inf], taps, logits_at_once)
        for name, value in zip(names, found, strict=True):
            kept.setdefault(name, []).append(value.flatten(1).cpu())  # (K + 1, b (T - 1))
        prompt = torch.tensor(which)[:, None].expand(goal.shape)
        kept.setdefault("prompt", []).append(prompt.flatten())
        kept.setdefault("row", []).append(torch.arange(goal.shape[1]).repeat(len(which)))
    joined = {name: torch.cat(value, dim=-1) for name, value in kept.items()}
    order = torch.argsort(joined["prompt"], stable=True)
    joined = {name: value[..., order] for name, value in joined.items()}
    left, loss, best, row = (joined[name] for name in (*names, "row"))
    looks = sum((left >= l).double() for l in taps) + (left == c.n_layers) if taps else (left > -1).double()
    flops = _flops(model, left, looks, row, scheme)
    whole = _flops(model, torch.full_like(left[-1], c.n_layers), torch.ones(len(row)), row, scheme)
    return EarlyExit(
        thresholds=torch.tensor(levels, dtype=torch.float64),
        exit_layer=left[:-1],
        loss=loss[:-1],
        agrees=best[:-1] == best[-1],
        flops=flops[:-1],
        full_loss=loss[-1],
        full_flops=whole,
        prompt=joined["prompt"],
        row=row,
        n_layers=c.n_layers,
        scheme=scheme,
    )


def _frozen(model, batch, goal, levels, taps, at_once) -> tuple[Tensor, Tensor, Tensor]:
    """exit_layer, loss and best entry, each (K, b, T - 1): one pass for each threshold."""
    found = [_frozen_pass(model, batch, goal, level, taps, at_once) for level in levels]
    return tuple(torch.stack(values) for values in zip(*found, strict=True))


def _frozen_pass(model, batch, goal, level, taps, at_once):
    L, h = model.config.n_layers, model.embed(batch)  # (b, T, D)
    left = torch.full_like(goal, L)
    loss, best = h.new_zeros(goal.shape, dtype=_read_dtype(h)), torch.zeros_like(goal)
    inside = torch.ones_like(batch, dtype=torch.bool)  # (b, T): the last token never leaves
    for l in range(L + 1):
        if (l in taps and level <= 1) or l == L:
            open_ = inside[:, :-1]
            said, nats, top = _answers(model, h[:, :-1][open_], goal[open_], l, at_once)
            go = said >= (level if l < L else 0.0)
            places = torch.zeros_like(open_).masked_scatter(open_, go)
            left[places], loss[places], best[places] = l, nats[go], top[go]
            inside[:, :-1] &= ~places
        if l < L:
            a, m = model.run_layer(l, h)
            h = torch.where(inside[..., None], h + a + m, h)
    return left, loss, best


def _ideal(model, batch, goal, levels, taps, at_once) -> tuple[Tensor, Tensor, Tensor]:
    """As `_frozen`, from one pass of the whole model."""
    L, h, seen = model.config.n_layers, model.embed(batch), []
    for l in range(L + 1):
        if l in taps or l == L:
            h_rows, flat = h[:, :-1].flatten(0, 1), goal.flatten()
            seen.append((l, *_answers(model, h_rows, flat, l, at_once)))
        if l < L:
            a, m = model.run_layer(l, h)
            h = h + a + m
    found = []
    for level in levels:
        left, loss, best = None, None, None
        for l, said, nats, top in reversed(seen):  # the earliest confident tap overwrites the later ones
            if l == L:
                left, loss, best = torch.full_like(top, L), nats, top
                continue
            go = said >= level
            left = torch.where(go, l, left)
            loss, best = torch.where(go, nats, loss), torch.where(go, top, best)
        found.append(tuple(x.view(goal.shape) for x in (left, loss, best)))
    return tuple(torch.stack(values) for values in zip(*found, strict=True))


def _answers(model, h, target, l, at_once) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, loss in nats and best entry, each (n,), read from streams h (n, D) at tap l."""
    found, n = [], max(1, at_once // model.config.n_out)
    for start in range(0, len(h), n):
        logp = log_probabilities(model, h[start : start + n], l)
        said, best = logp.max(dim=-1)
        found.append((said.exp(), -logp.gather(1, target[start : start + n, None])[:, 0], best))
    if not found:
        return h.new_zeros(0, dtype=_read_dtype(h)), h.new_zeros(0, dtype=_read_dtype(h)), target
    return tuple(torch.cat(values) for values in zip(*found, strict=True))


def _flops(model: Transformer, left: Tensor, looks: Tensor, row: Tensor, scheme: str) -> Tensor:
    """FLOPs (…, N) float64 of tokens that ran `left` layers and `looks` readouts; formula in `early_exit`."""
    c = model.config
    one = cost(c, 1).token_flops / c.n_layers  # a token at row 1, which reads two
    pair = 4 * c.n_heads * c.head_width
    layer = one + pair * (row.double() - 1)
    keys = 4 * c.d_model * c.kv_heads * c.head_width if scheme == "frozen" else 0
    return left * layer + looks * (2 * c.d_model * c.n_out) + (c.n_layers - left) * keys


def _places(model, tokens, rows, targets) -> tuple[list[Tensor], list[Tensor] | None]:
    """For each prompt the rows that are read, and their targets (None: the output's best entry)."""
    check_prompts(model, tokens)
    if isinstance(targets, str):
        check_choice("target", targets, ("next", "top"))
    following = isinstance(targets, str) and targets == "next"
    taken = []
    for i, prompt in enumerate(tokens):
        T = len(prompt)
        if following and T < 2:
            raise ValueError(f"prompt {i} has no next token: give two tokens, or targets='top'")
        chosen = (slice(0, T - 1) if following else slice(None)) if rows is None else rows
        check_rows(chosen, T=T)
        taken.append(torch.arange(T)[chosen if isinstance(chosen, slice) else chosen.cpu()])
        if following and int(taken[-1].max()) == T - 1:
            raise ValueError(
                f"the last token of prompt {i} has no next token; leave it out of rows, or give targets"
            )
    if following:
        goals = [prompt.cpu()[place + 1] for prompt, place in zip(tokens, taken, strict=True)]
    elif isinstance(targets, str):
        return taken, None
    else:
        counts = [len(place) for place in taken]
        if not isinstance(targets, Tensor) or targets.dtype != torch.long or targets.shape != (sum(counts),):
            raise ValueError(
                f"targets must be torch.long ({sum(counts)},), one a token; got {found(targets)}"
            )
        goals = list(targets.cpu().split(counts))
    for goal in goals:
        if int(goal.min()) < 0 or int(goal.max()) >= model.config.n_out:
            raise ValueError(f"targets are entries 0 to {model.config.n_out - 1} of the readout")
    return taken, goals


def _streams(model: Transformer, batch: Tensor, places: list[Tensor]) -> Iterator[Tensor]:
    """residual[l] at the places of each prompt, (n, D), for l = 0 … L; no other token of it is kept."""
    prompt = torch.cat([torch.full_like(place, i) for i, place in enumerate(places)])
    row = torch.cat(places)
    h = model.embed(batch)
    yield h[prompt, row]
    for l in range(model.config.n_layers):
        a, m = model.run_layer(l, h)
        h = h + a + m
        yield h[prompt, row]


def _device(model: Transformer) -> torch.device:
    return model.embedding.weight.device


def _read_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32
