"""Which tokens, at which depth, still matter for an answer; and what the order of the layers matters.

Residual erasure: the stream after l layers is overwritten at one token t by a mean stream,

    h̄_l[t] := mean_l,   effect[l, t] = max over the answer's tokens of ‖y − ȳ‖₂,   l = 0 … L,

row 0 the embeddings. Small from some l on: what token t holds has been read, or is not needed.

Order: the layers run in another order (two swapped, a block reversed); effect: ‖y − ȳ‖₂ and the loss it adds.

Source: Csordás, Manning and Potts 2025 (facts C.1 #6: erasure). They do not define swaps: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.metrics.depth.branches import Branch, clean_pass, output_change, run_layer
from lib.metrics.depth.contributions import walk
from lib.metrics.depth.pooled import PerPrompt, Pool, row_numbers
from lib.metrics.depth.prompts import batches, check_prompts
from lib.models.inputs import found
from lib.models.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Erasure:
    """Effects of erasing token t after l layers, one matrix (L + 1, T_i) for each of N prompts. Unit: 1."""

    peak: tuple[Tensor, ...]  # the largest over the answer's tokens, as in the paper
    mean: tuple[Tensor, ...]  # the mean over them
    answers: tuple[int, ...]  # how many tokens the answer of each prompt has

    def last(self, n: int, of: str = "peak") -> Tensor:
        """(N, L + 1, n): the last n tokens, so that prompts of different lengths end together."""
        effects = {"peak": self.peak, "mean": self.mean}[of]
        short = min(effect.shape[1] for effect in effects)
        if not 1 <= n <= short:
            raise ValueError(f"the shortest prompt has {short} tokens: 1 to {short}, got n={n}")
        return torch.stack([effect[:, -n:] for effect in effects])

    def over_tokens(self, of: str = "peak") -> Tensor:
        """(N, L + 1): the largest effect over the erased tokens of each prompt."""
        return torch.stack([effect.amax(dim=1) for effect in {"peak": self.peak, "mean": self.mean}[of]])


@torch.no_grad()
def mean_residual(model: Transformer, tokens: Tensor | Sequence[Tensor], *, batch_size: int = 8) -> Tensor:
    """(L + 1, D): the mean of residual[l] over all tokens (the first one too) of all prompts.

    Summed in float64. The paper takes 10 prompts. ValueError for prompts that do not fit, or a model that is
    not finite on them.
    """
    check_prompts(model, tokens)
    total = torch.zeros(model.config.n_layers + 1, model.config.d_model, dtype=torch.float64)
    for _, batch in batches(tokens, batch_size):
        for l, h, _, _ in walk(model, batch.to(model.embedding.weight.device)):
            total[l] += h.double().sum(dim=(0, 1)).cpu()
    return (total / sum(len(prompt) for prompt in tokens)).to(model.embedding.weight)


@torch.no_grad()
def residual_erasure(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    *,
    mean: Tensor,
    answer: int | Sequence[int],
    batch_size: int = 32,
    logits_at_once: int = 8_000_000,
    share: bool = True,
) -> Erasure:
    """Erase each token after each number of layers, one at a time, on prompts (B, T) or a list (T_i,), long.

    tokens:  each prompt with its answer at the end.
    mean:    (L + 1, D), what is written there: `mean_residual` of other prompts.
    answer:  how many tokens the answer has (for each prompt, or all alike); it is read at rows
             T − answer − 1 … T − 2, whose next tokens it is. Erasing the last token cannot matter: 0.
    batch_size: at most this many streams of a prompt's length run together. share: as for skips.
    ValueError before any work for prompts, means or answers that do not fit and for bidirectional models.
    """
    check_prompts(model, tokens)
    L, D = model.config.n_layers, model.config.d_model
    if not model.config.causal:
        raise ValueError("an answer is read token by token: erasure needs a causal model")
    if not isinstance(mean, Tensor) or mean.shape != (L + 1, D) or not mean.isfinite().all():
        raise ValueError(f"mean must be finite, ({L + 1}, {D}): see mean_residual; got {found(mean)}")
    answers = [answer] * len(tokens) if isinstance(answer, int) else [int(n) for n in answer]
    if len(answers) != len(tokens):
        raise ValueError(f"{len(answers)} answers for {len(tokens)} prompts: one each, or one number for all")
    for i, (prompt, n) in enumerate(zip(tokens, answers, strict=True)):
        if not 1 <= n < len(prompt):
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens: an answer has 1 to {len(prompt) - 1} tokens, got {n}"
            )
    if batch_size < 1 or logits_at_once < 1:
        raise ValueError(f"batch_size and logits_at_once are at least 1, got {batch_size}, {logits_at_once}")
    peaks, means = [], []
    for i, (prompt, n) in enumerate(zip(tokens, answers, strict=True)):
        effect = _erase_prompt(model, prompt, mean, n, batch_size, logits_at_once, share)  # (L + 1, T, n)
        if not effect.isfinite().all():
            raise ValueError(f"an effect of erasure in prompt {i} is not finite: the edited model overflows")
        peaks.append(effect.amax(dim=-1))
        means.append(effect.mean(dim=-1))
    return Erasure(tuple(peaks), tuple(means), tuple(answers))


def _erase_prompt(model, prompt, mean, n, batch_size, logits_at_once, share) -> Tensor:
    L, T = model.config.n_layers, len(prompt)
    rows = torch.arange(T - n - 1, T - 1)
    clean = [h[:, : T - 1] for h in clean_pass(model, prompt[None]).h]  # nothing reads the last token
    zero = torch.zeros(1, dtype=torch.long)
    effect = torch.zeros(L + 1, T, n, dtype=torch.float64)
    for first in range(0, T - 1, batch_size):
        places = range(first, min(T - 1, first + batch_size))
        taps = max(1, batch_size // len(places))
        for start in range(0, L + 1, taps):
            erased = range(start, min(L + 1, start + taps))
            streams = {t: None for t in places}
            for l in range(start, L + 1):
                if l > start:
                    branches = [Branch(t, h, zero.expand(len(h))) for t, h in streams.items()]
                    _, added = run_layer(model, l - 1, clean[l - 1], branches, parents_too=False, share=share)
                    streams = {t: h + c for (t, h), c in zip(streams.items(), added, strict=True)}
                if l in erased:
                    for t, before in streams.items():
                        h = clean[l][:, t:].clone()
                        h[:, 0] = mean[l].to(h)
                        streams[t] = h if before is None else torch.cat([before, h])
            ends = clean[L][:, rows].repeat(len(erased) * len(places), 1, 1)  # (taps places, n, D)
            ends = ends.unflatten(0, (len(erased), len(places)))
            for j, (t, h) in enumerate(streams.items()):
                ends[:, j, rows >= t] = h[:, rows[rows >= t] - t]
            change, _ = output_change(
                model, clean[L][0, rows], ends.flatten(0, 1), logits_at_once=logits_at_once
            )
            change = change.cpu().double().unflatten(0, (len(erased), len(places)))
            read = rows >= torch.tensor(places)[:, None]  # (places, n): earlier rows read nothing of t
            effect[start : start + len(erased), first : first + len(places)] = change * read
    return effect


@dataclass(frozen=True, eq=False)
class OrderEffects:
    """What K other orders of the layers do to the output of N prompts."""

    orders: tuple[tuple[int, ...], ...]  # which layer runs at each place
    output: PerPrompt  # (N, K): ‖y − ȳ‖₂
    added_nats: PerPrompt  # (N, K): loss of the next token, with the order minus without; nats
    pairs: tuple[tuple[int, int], ...] | None = None  # of swapped layers

    def matrix(self, values: Tensor) -> Tensor:
        """values (K,) of swapped pairs as a symmetric (L, L): diagonal 0, NaN where none was made."""
        if self.pairs is None:
            raise ValueError("these orders are not swaps of two layers: there is no matrix of pairs")
        L = len(self.orders[0])
        grid = torch.full((L, L), torch.nan, dtype=values.dtype).fill_diagonal_(0.0)
        for (i, j), value in zip(self.pairs, values, strict=True):
            grid[i, j] = grid[j, i] = value
        return grid


def layer_swaps(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    *,
    pairs: str | Sequence[tuple[int, int]] = "adjacent",
    **how,
) -> OrderEffects:
    """Exchange two layers, for all tokens. pairs: "adjacent" (l, l + 1), "all", or a list of pairs.

    how: the arguments of `order_effects`. ValueError for layers that do not exist and equal pairs.
    """
    L = model.config.n_layers
    if isinstance(pairs, str):
        reach = {"adjacent": 1, "all": L}
        if pairs not in reach:
            raise ValueError(f"unknown pairs {pairs!r}; allowed: adjacent, all, or a list of (i, j)")
        pairs = [(i, j) for i in range(L) for j in range(i + 1, min(L, i + reach[pairs] + 1))]
    pairs = tuple((min(i, j), max(i, j)) for i, j in pairs)
    orders = []
    for i, j in pairs:
        if not 0 <= i < j < L:
            raise ValueError(f"cannot swap layers {i} and {j}: two different layers of 0 to {L - 1}")
        order = list(range(L))
        order[i], order[j] = j, i
        orders.append(order)
    effects = order_effects(model, tokens, orders, **how)
    return OrderEffects(effects.orders, effects.output, effects.added_nats, pairs)


@torch.no_grad()
def order_effects(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    orders: Sequence[Sequence[int]],
    *,
    output_rows: slice = slice(None),
    batch_size: int = 16,
    logits_at_once: int = 8_000_000,
) -> OrderEffects:
    """Run the layers in other orders, on prompts (B, T) or a list of prompts (T_i,), long.

    orders:      layer numbers, one for each place; a layer may be missing from an order, or run twice.
    output_rows: a slice of each prompt's tokens; the effect and the added loss are measured there. The last
                 token has no next one: it is left out, as the loss needs one.
    batch_size:  at most this many streams run together. Each order starts from the cached stream before the
                 first place that it changes.
    ValueError before any work for prompts, rows or orders that do not fit; and if the model is not finite.
    """
    check_prompts(model, tokens)
    L = model.config.n_layers
    orders = tuple(tuple(int(l) for l in order) for order in orders)
    if not orders or any(len(order) != L or not all(0 <= l < L for l in order) for order in orders):
        raise ValueError(f"an order names a layer of 0 to {L - 1} for each of {L} places; give one at least")
    if batch_size < 1 or logits_at_once < 1:
        raise ValueError(f"batch_size and logits_at_once are at least 1, got {batch_size}, {logits_at_once}")
    if min(len(prompt) for prompt in tokens) < 2:
        raise ValueError("a prompt of one token has no next token to lose: give two at least")
    rows = row_numbers(output_rows, [len(prompt) for prompt in tokens])
    rows = [at[at < len(prompt) - 1] for at, prompt in zip(rows, tokens, strict=True)]
    if not all(len(at) for at in rows):
        raise ValueError(f"output_rows={output_rows} selects only the last token, which has no next one")

    output, nats = Pool(len(tokens), len(orders)), Pool(len(tokens), len(orders))
    first = [next((p for p in range(L) if order[p] != p), L) for order in orders]
    queue = sorted(range(len(orders)), key=first.__getitem__)
    for i, prompt in enumerate(tokens):
        clean, at = clean_pass(model, prompt[None]).h, rows[i]
        for start in range(0, len(queue), batch_size):
            chosen = queue[start : start + batch_size]
            ends = _reordered(model, clean, [orders[k] for k in chosen], [first[k] for k in chosen])
            change, lost = output_change(
                model, clean[L][0, at], ends[:, at], target=prompt[at + 1], logits_at_once=logits_at_once
            )
            output.put((i, torch.tensor(chosen)), change)
            nats.put((i, torch.tensor(chosen)), lost)
    return OrderEffects(orders, output.result("the effect of an order"), nats.result("the loss of an order"))


def _reordered(model: Transformer, clean: list[Tensor], orders, first: list[int]) -> Tensor:
    """The last stream (K, T, D) of each order; `first` ascends."""
    h = clean[0].new_empty(0, *clean[0].shape[1:])
    for place in range(first[0], len(clean) - 1):
        joining = sum(f == place for f in first)
        h = torch.cat([h, clean[place].expand(joining, -1, -1)])
        after = torch.empty_like(h)
        for l in sorted({order[place] for order in orders[: len(h)]}):
            members = [k for k in range(len(h)) if orders[k][place] == l]
            a, m = model.run_layer(l, h[members])
            after[members] = h[members] + a + m
        h = after
    joining = sum(f == len(clean) - 1 for f in first)
    return torch.cat([h, clean[-1].expand(joining, -1, -1)])
