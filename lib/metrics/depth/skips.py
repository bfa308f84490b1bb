"""What skipping a layer does to the contributions of later layers, and to the output.

Layer s adds nothing at some tokens; the stream h̄ goes on from there. For l > s, at a measured token,

    E[s, l] = ‖c_l − c̄_l‖ / ‖c_l‖,   c_l = h_{l+1} − h_l = a_l + m_l   (denominator clamped below),

and on the output ‖y − ȳ‖₂ between the probability vectors, in [0, √2]. Rows are the skipped layers.

* all tokens:    s is skipped at every token (but the first), E is measured at every token. E[s, s] = 1.
* future tokens: s is skipped before a token t, E is measured from t on: does s matter to *later* tokens?
                 Causal models only. E[s, s] = 0.
* local (direct) effect: nothing propagates. Each later layer reads h_l − c_s on the skipped tokens, h_l on
                 the others, and on the output readout(h_L − c_s).

Speed: a skip of s starts from the cached h_s and leaves layer s itself uncomputed; skips run together; the
skips before each t share their prefix with the skip of all tokens. Source: Csordás, Manning and Potts 2025
(facts C.1 #3, 3o, 3f, 3s, 4; what the code and the paper do differently is an argument); sharing: derived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.metrics.depth.branches import Branch, Clean, clean_pass, output_change, run_layer
from lib.metrics.depth.pooled import PerPrompt, Pool, check_clamp, relative, row_numbers
from lib.metrics.depth.prompts import batches, check_prompts
from lib.models.interventions import SUBLAYERS
from lib.models.transformer import Transformer

FIRST_TOKEN = ("keep", "skip")
WINDOWS = {"code": 0, "paper": 1}
FIRST_PLACE, STRIDE, LAST_TOKENS = 8, 8, 4  # places are range(8, T - 4, 8), as in the paper's code


@dataclass(frozen=True, eq=False)
class SkipEffects:
    """Effects of every skipped layer s. `max`, `quantile`, `average`, `interval` are those of `layers`."""

    layers: PerPrompt  # (N, L, L): E[s, l], 0 below the diagonal
    output: PerPrompt | None  # (N, L): ‖y − ȳ‖₂; None where output_rows was None
    future_only: bool
    positions: tuple[tuple[int, ...], ...]  # of each prompt: tokens t from which nothing is skipped
    sublayer: str | None
    local: bool

    def max(self, of: str = "peak") -> Tensor:
        return self.layers.max(of)

    def quantile(self, q: float, of: str = "peak") -> Tensor:
        return self.layers.quantile(q, of)

    def average(self, of: str = "mean") -> Tensor:
        return self.layers.average(of)

    def interval(self, *, seed: int, **how) -> Tensor:
        return self.layers.interval(seed=seed, **how)


def skip_effects(
    model: Transformer, tokens: Tensor | Sequence[Tensor], *, future_only: bool = False, **how
) -> SkipEffects:
    """Skip every layer in turn, on prompts (B, T) or a list of prompts (T_i,), long. Units: 1.

    how: the arguments of `current_and_future`, which says what they mean and what is refused.
    """
    return _effects(model, tokens, wanted=(not future_only, future_only), **how)[int(future_only)]


def current_and_future(
    model: Transformer, tokens: Tensor | Sequence[Tensor], **how
) -> tuple[SkipEffects, SkipEffects]:
    """`skip_effects` with future_only False and True from one computation: they share most of their work.

    sublayer:     None, the whole layer; "attention" or "mlp": its output is 0, the other one's is not. The
                  MLP behind a skipped attention reads the stream without it.
    local:        the direct effect, without propagation; a sublayer's own output then takes the place of c_s.
    positions:    future tokens: how many places t to draw from range(8, T − 4, 8), for each prompt; or the
                  places themselves, the same for every prompt.
    window:       "code": skip the tokens before t, measure from t on. "paper": skip through t, measure after.
    first_token:  "keep": the first token is never skipped (the paper's code). "skip": it is.
    output_rows:  a slice of the tokens of each prompt where the output is compared (of these, the measured
                  ones); None: nowhere. With a large vocabulary this is the dear part; slice(-1, None) is not.
    clamp:        least denominator of E.   seed: of the places.
    batch_size:   at most this many streams of a prompt's length run together, or those of one skip.
    logits_at_once: numbers of a readout held at a time.
    share:        False: every stream runs whole. Only for comparison: the results are the same.
    ValueError before any work: no prompts, prompts shorter than the windows, places out of range, unknown
    names, future tokens of a bidirectional model; then, if the model, or an edited one, is not finite.
    """
    now, later = _effects(model, tokens, wanted=(True, True), **how)
    return now, later


@torch.no_grad()
def _effects(
    model: Transformer,
    tokens: Tensor | Sequence[Tensor],
    *,
    wanted: tuple[bool, bool],
    sublayer: str | None = None,
    local: bool = False,
    positions: int | Sequence[int] = 4,
    window: str = "code",
    first_token: str = "keep",
    output_rows: slice | None = slice(None),
    clamp: float = 1e-6,
    seed: int = 0,
    batch_size: int = 16,
    logits_at_once: int = 8_000_000,
    share: bool = True,
) -> tuple[SkipEffects | None, SkipEffects | None]:
    check_prompts(model, tokens)
    check_clamp(clamp)
    if sublayer is not None:
        check_choice("sublayer", sublayer, SUBLAYERS)
    check_choice("first_token", first_token, FIRST_TOKEN)
    check_choice("window", window, WINDOWS)
    if batch_size < 1 or logits_at_once < 1:
        raise ValueError(f"batch_size and logits_at_once are at least 1, got {batch_size}, {logits_at_once}")
    lengths, first = [len(prompt) for prompt in tokens], int(first_token == "keep")
    if min(lengths) <= first:
        raise ValueError("a prompt of one token has nothing to skip: first_token='keep' spares it")
    now, future = wanted
    if future and not model.config.causal:
        raise ValueError("future tokens read earlier ones only in a causal model; this one is bidirectional")
    places = [()] * len(tokens)
    if future:
        places = [_places(T, positions, window, first, seed, i) for i, T in enumerate(lengths)]
    rows = None
    if output_rows is not None:
        rows = row_numbers(output_rows, lengths, least=[max(p, default=0) for p in places])

    N, L = len(tokens), model.config.n_layers
    pools = {name: (Pool(N, L, L), Pool(N, L)) for name, on in (("now", now), ("future", future)) if on}
    streams = int(now or not local) + max(len(p) for p in places)  # of one skip of one prompt
    n_skips = max(1, min(L, batch_size // streams))
    plan = _Plan(model, sublayer, local, first, now, n_skips, clamp, logits_at_once, share)
    for which, batch in batches(tokens, max(1, batch_size // (streams * n_skips))):
        plan.measure(which, clean_pass(model, batch), places, rows, pools)

    found = []
    for name in ("now", "future"):
        if name not in pools:
            found.append(None)
            continue
        layers, output = (pool.result(f"the effect of a skip ({name})") for pool in pools[name])
        taken = tuple(places) if name == "future" else ((),) * N
        found.append(
            SkipEffects(layers, None if rows is None else output, name == "future", taken, sublayer, local)
        )
    return tuple(found)


def future_places(T: int, count: int, *, seed: int) -> tuple[int, ...]:
    """`count` places of range(8, T − 4, 8), drawn without replacement, in order. ValueError if T is short."""
    allowed = np.arange(FIRST_PLACE, T - LAST_TOKENS, STRIDE)
    if count < 1 or len(allowed) < count:
        need = FIRST_PLACE + STRIDE * (max(count, 1) - 1) + LAST_TOKENS + 1
        raise ValueError(
            f"a prompt of {T} tokens has {len(allowed)} places in range(8, T - 4, 8), and {count} are asked "
            f"for: give prompts of at least {need} tokens, or name the positions"
        )
    drawn = np.random.default_rng(seed).choice(allowed, size=count, replace=False)
    return tuple(sorted(int(t) for t in drawn))


def _places(T: int, positions, window: str, first: int, seed: int, i: int) -> tuple[int, ...]:
    """For prompt i the first tokens that are not skipped."""
    if isinstance(positions, int):
        state = np.random.SeedSequence([seed, i]).generate_state(1)[0]
        places = future_places(T, positions, seed=int(state))
    else:
        places = tuple(sorted({int(t) for t in positions}))
    places = tuple(t + WINDOWS[window] for t in places)
    if not places or not all(first < t < T for t in places):
        raise ValueError(
            f"prompt {i} of {T} tokens: with window={window!r}, skipping before {list(places)} leaves none "
            f"to skip or none to measure; the first token not skipped must be {first + 1} to {T - 1}"
        )
    return places


@dataclass(frozen=True, eq=False)
class _Plan:
    """How skips run on prompts of one length. Streams of several skips lie one after the other: (k b, …)."""

    model: Transformer
    sublayer: str | None
    local: bool
    first: int  # tokens at the start that are never skipped: 0 or 1
    now: bool
    n_skips: int  # layers skipped at once
    clamp: float
    logits_at_once: int
    share: bool

    def measure(self, which: list[int], clean: Clean, places, rows, pools: dict) -> None:
        b, T, L = *clean.h[0].shape[:2], len(clean.a)
        here = [places[i] for i in which]
        starts = {t: [j for j in range(b) if t in here[j]] for t in sorted({t for p in here for t in p})}
        end = T if self.now else max(starts)  # no later token of a stream skipped throughout is read
        ends = {name: [[] for _ in which] for name in pools}  # streams at the end, of each prompt
        for s in range(0, L, self.n_skips):
            skips = range(s, min(L, s + self.n_skips))
            last, stacked = None, {t: None for t in starts}
            for l in range(s, L):
                done = [q for q in skips if q < l]
                if done:
                    if self.local:
                        last = torch.cat([self._without(clean, q, l, end) for q in done])
                        stacked = {t: clean.h[l][m, t:].repeat(len(done), 1, 1) for t, m in starts.items()}
                    last, stacked = self._layer(which, clean, l, done, last, stacked, starts, pools)
                if l in skips:
                    self._own(which, clean, l, pools)
                    if not self.local:
                        last = _join(last, self._skipped(clean, l)[:, :end])
                        stacked = {t: _join(stacked[t], clean.h[l + 1][m, t:]) for t, m in starts.items()}
            if self.local:
                last = torch.cat([self._without(clean, q, L, end) for q in skips])
                stacked = {t: clean.h[L][m, t:].repeat(len(skips), 1, 1) for t, m in starts.items()}
            if rows is not None:
                self._collect(which, len(skips), rows, last, stacked, starts, ends)
        if rows is not None:
            self._outputs(which, clean.h[L], here, rows, ends, pools)

    def _layer(self, which, clean, l, done, last, stacked, starts, pools):
        """Layer l on the streams of the skips `done`: notes its changes, gives the streams after it."""
        k, b = len(done), len(which)
        branches = []
        for t, members in starts.items():
            parent = torch.arange(k)[:, None] * b + torch.tensor(members)
            branches.append(Branch(t, stacked[t], parent.flatten()))
        too = self.now or not self.local
        out, outs = run_layer(self.model, l, last, branches, parents_too=too, share=self.share)
        c = clean.added(l)
        if self.now:
            change = relative(c - out.unflatten(0, (k, b)), c, self.clamp)  # (k, b, T)
            pools["now"][0].put(_cells(which, done, l), change.transpose(0, 1))
        if starts:
            values = [[] for _ in which]
            for (t, members), added in zip(starts.items(), outs, strict=True):
                part = c[members, t:]
                change = relative(part - added.unflatten(0, (k, len(members))), part, self.clamp)
                for j, member in enumerate(members):
                    values[member].append(change[:, j])
            for i, found in zip(which, values, strict=True):
                pools["future"][0].put((i, torch.tensor(done), l), torch.cat(found, dim=-1))
        if self.local:
            return None, stacked
        after = [stacked[t] + added for t, added in zip(starts, outs, strict=True)]
        return last + out, dict(zip(starts, after, strict=True))

    def _own(self, which, clean: Clean, s: int, pools) -> None:
        """The diagonal: what is left of layer s itself. Future tokens keep all of it: 0."""
        if self.now:
            c, left = clean.added(s), self._left(clean, s)
            change = relative(c - left, c, self.clamp)
            change[:, : self.first] = 0
            pools["now"][0].put((torch.tensor(which), s, s), change)

    def _left(self, clean: Clean, s: int) -> Tensor:
        """What layer s still adds where it is skipped."""
        if self.sublayer is None:
            return torch.zeros_like(clean.a[s])
        if self.sublayer == "mlp":
            return clean.a[s]
        if self.local:
            return clean.m[s]
        return self.model.layers[s].mlp(self.model.layers[s].mlp_norm(clean.h[s]))

    def _skipped(self, clean: Clean, s: int) -> Tensor:
        """h̄_{s+1} (b, T, D)."""
        h = clean.h[s] + self._left(clean, s)
        h[:, : self.first] = clean.h[s + 1][:, : self.first]
        return h

    def _without(self, clean: Clean, s: int, l: int, end: int) -> Tensor:
        """The local effect's input of layer l: what s added is taken away, nothing else changes."""
        gone = {None: clean.added, "attention": clean.a.__getitem__, "mlp": clean.m.__getitem__}
        h = clean.h[l].clone()
        h[:, self.first :] -= gone[self.sublayer](s)[:, self.first :]
        return h[:, :end]

    def _collect(self, which, k: int, rows, last, stacked, starts, ends) -> None:
        b = len(which)
        for j, i in enumerate(which):
            if self.now:
                ends["now"][j].append(last.unflatten(0, (k, b))[:, j, rows[i]])
            if starts:
                own = []
                for t, members in starts.items():
                    if j in members:
                        at = rows[i][rows[i] >= t] - t
                        own.append(stacked[t].unflatten(0, (k, -1))[:, members.index(j), at])
                ends["future"][j].append(torch.cat(own, dim=1))

    def _outputs(self, which, clean_end: Tensor, here, rows, ends, pools) -> None:
        for name, collected in ends.items():
            for j, i in enumerate(which):
                at = rows[i]
                if name == "future":
                    at = torch.cat([at[at >= t] for t in here[j]])
                edited = torch.cat(collected[j])  # (L, R, D)
                change, _ = output_change(
                    self.model, clean_end[j, at], edited, logits_at_once=self.logits_at_once
                )
                pools[name][1].put((i,), change)


def _join(streams: Tensor | None, more: Tensor) -> Tensor:
    return more if streams is None else torch.cat([streams, more])


def _cells(which: list[int], done: list[int], l: int) -> tuple:
    return torch.tensor(which)[:, None], torch.tensor(done), l
