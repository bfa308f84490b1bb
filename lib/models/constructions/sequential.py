r"""Hand-built Transformers for L-step sequential composition: deep decoder, encoder, scratchpad.

All rest on one gadget, the *associative fetch*. A table token of z_l has as key its type and the bits of its
place (w_{l-1}, i_{l-1}); a query asks for a type and for bits, with weight c:

    score = c (big · [type wanted] + agreeing bits - differing bits),   big = 2 (ω + b) + 2.

Any other key scores at least 2c less than the wanted one, so T tokens put at most (T-1) e^{-2c} elsewhere and
a fetched bit ±1 is off by at most 1/2 if c >= c*(T) = ln(4 (T-1)) / 2. The MLP clamps it back to exactly ±1:
no error adds up over layers. In floats, rounding leaves some units in the last place.

Sizes, with ω = Σ_l max(1, ceil log2 n_l) and b = max(1, ceil log2 N_{L-1}):

    d_model = 2L + 4 + 3ω + 4b,  d_key = L + 2 + ω + b,
    decoder                   L + 1 layers                   1 head    MLP 6b
    encoder                   2 + ceil log2(L+1) layers      1 head    MLP max(7b, 6ω)
    scratchpad                1 layer, L + 1 tokens emitted  2 heads   MLP 6b + 7ω + L + 1
    scratchpad, values only   2 layers, L + 1 tokens         1 head    MLP max(6b + L + 1, 6ω)

L = 1 has no w (ω = 0): the encoder and the last scratchpad drop the layer that fetches it.
Ours, unrefereed; the depths are those of Chen, Peng and Wu 2024 as we know them (second-hand).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from lib.choices import check_choice
from lib.models.constructions.named_layers import (
    Fetch,
    NamedLayer,
    assemble,
    bit_names,
    bits,
    clamp,
    clamp_if,
    erase,
    erase_if,
)
from lib.models.named_weights import Form, coordinates
from lib.models.transformer import Transformer
from lib.tasks.composition import SequentialComposition

CARRIES = ("pair", "value")


def least_sharpness(T: int) -> float:
    """c*(T) = ln(4 (T-1)) / 2, the least c for which the fetch among T tokens is proved right.

    Sufficient in real arithmetic, not necessary. Emitted tokens count. ValueError if T < 2.
    """
    if T < 2:
        raise ValueError(f"a fetch chooses among at least 2 tokens, got T={T}")
    return 0.5 * math.log(4 * (T - 1))


def layout(task: SequentialComposition) -> dict[str, range]:
    """Where each part of the residual stream stands: {part: columns}, the same for every construction.

    type: one-hot z_0 … z_L, w.  emitted: one-hot C_0 … C_L.  at w_l, at i: the place of a table entry, which
    is its key.  value: what the entry holds.  w_l: the switches, where known.  current: the value so far.
    fetched, fetched w_l: what attention has just brought.  one: always 1.  Bits are ±1 (`read_bits`).
    """
    columns, start = {}, 0
    for part, names in _parts(task).items():
        columns[part] = range(start, start + len(names))
        start += len(names)
    return columns


def sequential_composition_decoder(
    task: SequentialComposition, *, sharpness: float | None = None, dtype: torch.dtype = torch.float32
) -> Transformer:
    """A causal Transformer of L + 1 layers and one head that says i_L at the token w, the last of the prompt.

    Layer t (from 0) fetches i_t from z_t with the bits of w and of i_{t-1}. Input: `task.tokens(instances)`.
    Output: logits (B, T, N_{L-1}); the answer is the argmax at the last token, where the right value leads
    by 2. sharpness: c, by default 2 c*(T), which leaves room for rounding.
    """
    p = _Parts.of(task)
    layers = []
    for t in range(task.L + 1):
        fetch = Fetch(query=p.query({t: coordinates("w")[0]}), key=p.key, value=coordinates(*p.value),
                      writes=p.fetched)
        copies, shift = clamp(p.fetched, p.current)
        layers.append(NamedLayer(heads=[fetch], neurons=erase(p.current) + copies + erase(p.fetched),
                                 shift=shift))
    return _assemble(task, p, layers, causal=True, sharpness=sharpness, dtype=dtype)


def sequential_composition_encoder(
    task: SequentialComposition, *, causal: bool = False, sharpness: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Pointer doubling in 2 + ceil log2(L+1) layers: tokens read both ways, the answer stands at the last, w.

    Layer 0 brings w to every token (not for L = 1). Then, s = 1, 2, 4, … <= L: a token of z_l, l + s <= L,
    holds the value after z_l … z_{l+s-1}; it fetches what z_{l+s} holds at that place, the value after
    z_l … z_{l+2s-1}. The last layer copies what z_0 holds to w.
    causal=True: the same weights under a causal mask without the last layer, 1 + ceil log2(L+1) layers. They
    are right where tables are read after w: order "w-first", at the last token, z_0. In the paper's order
    they fail. Logits and sharpness as in the decoder.
    """
    p = _Parts.of(task)
    layers = [p.fetch_w()] if p.switches else []
    for s in (2**k for k in range(task.L.bit_length())):
        source = {l + s: coordinates(f"z_{l}")[0] for l in range(task.L - s + 1)}
        fetch = Fetch(query=p.query(source), key=p.key, value=coordinates(*p.current), writes=p.fetched)
        layers.append(p.replace_current(fetch, sum(source.values(), start=Form())))
    if not causal:
        w, = coordinates("w")
        fetch = Fetch(query=p.query({0: w}, bits=False), key=p.key, value=coordinates(*p.current),
                      writes=p.fetched)
        layers.append(p.replace_current(fetch, w))
    return _assemble(task, p, layers, causal=causal, sharpness=sharpness, dtype=dtype)


def sequential_composition_scratchpad(
    task: SequentialComposition, *, carry: str = "pair", sharpness: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """One causal layer with two heads that emits C_0 … C_L after the prompt; C_L says the answer.

    carry="pair": C_l carries w_l and i_l (C_0 and C_L only i_l). Head 0 fetches i_{l+1} from z_{l+1}, head 1
    the switches from the token w, of which C_{l+1} keeps w_{l+1}. carry="value": C_l carries i_l alone, and
    a layer that fetches w comes first, so two layers with one head (L = 1 has no w and needs one).
    Logits: one for each token that may be emitted, `emitted_tokens`; `decode` emits them. Sharpness: c, by
    default 2 c*(T + L + 1). Source: two layers are the facts' remark, here built.
    """
    check_choice("carry", carry, CARRIES)
    p = _Parts.of(task)
    turn = {0: coordinates("w")[0]} | {l + 1: coordinates(f"C_{l}")[0] for l in range(task.L)}
    fetch = Fetch(query=p.query(turn), key=p.key, value=coordinates(*p.value), writes=p.fetched)
    copies, shift = clamp(p.fetched, p.current)
    neurons = erase(p.current) + copies + erase(p.fetched)
    marks = ["w", *(f"C_{l}" for l in range(task.L + 1))]
    for old, new in pairwise(marks):
        neurons.append((coordinates(old)[0], {old: -1, new: 1}))
    if carry == "value":
        layers = [p.fetch_w()] if p.switches else []
        layers.append(NamedLayer(heads=[fetch], neurons=neurons, shift=shift))
    else:
        own, brought = [name for slot in p.switches for name in slot], p.brought_w
        for l, slot in enumerate(p.switches, 1):  # C_{l-1} keeps w_l for C_l
            g, = coordinates(f"C_{l - 1}")
            neurons += clamp_if(g, [f"fetched {name}" for name in slot], slot)
        neurons += erase(own) + erase(brought)
        layers = [NamedLayer(heads=[fetch, p.w_head()], neurons=neurons, shift=shift)]
    return _assemble(task, p, layers, causal=True, sharpness=sharpness, dtype=dtype,
                     emitted=emitted_tokens(task, carry=carry))


class Emitted(NamedTuple):
    """A token C_step that a scratchpad may emit, with the value i and the switch w_step (None: absent)."""

    step: int
    i: int
    w: int | None


def emitted_tokens(task: SequentialComposition, *, carry: str = "pair") -> list[Emitted]:
    """What a scratchpad may emit, in the order of its logits: token e is row task.vocab + e of the embedding.

    carry="pair": n_l N_{l-1} = N_l tokens C_l, N_{L-1} for C_L.  carry="value": N_{l-1} (m for C_0).
    """
    check_choice("carry", carry, CARRIES)
    found = []
    for step in range(task.L + 1):
        paired = carry == "pair" and 1 <= step < task.L
        switches = range(task.ns[step - 1]) if paired else [None]
        found += [Emitted(step, i, w) for w in switches for i in range(task.N[max(step - 1, 0)])]
    return found


class _Parts(NamedTuple):
    """The names that the constructions share, and the layers built from them alone."""

    task: SequentialComposition
    value: list[str]
    current: list[str]
    fetched: list[str]
    switches: list[list[str]]  # the coordinates of w_1 … w_{L-1}

    @classmethod
    def of(cls, task: SequentialComposition) -> _Parts:
        names = [bit_names(part, task.n_answers) for part in ("value", "current", "fetched")]
        return cls(task, *names, [bit_names(f"w_{l}", n) for l, n in enumerate(task.ns, 1)])

    @property
    def brought_w(self) -> list[str]:
        return [f"fetched {name}" for slot in self.switches for name in slot]

    @property
    def big(self) -> int:
        return 2 * (sum(map(len, self.switches)) + len(self.current)) + 2

    @property
    def key(self) -> list[Form]:
        """Type (L + 2), place in w (ω), place in i (b)."""
        types = [*(f"z_{l}" for l in range(self.task.L + 1)), "w"]
        places = [f"at {name}" for slot in self.switches for name in slot]
        return coordinates(*types, *places, *bit_names("at i", self.task.n_answers))

    def query(self, wanted: dict[int | str, Form], *, bits: bool = True) -> list[Form]:
        """Asks for type t (l for z_l, or "w") where wanted[t] = 1, and for the bits of w and of current."""
        types = [self.big * wanted.get(t, Form()) for t in (*range(self.task.L + 1), "w")]
        names = [name for slot in (*self.switches, self.current) for name in slot]
        return types + (coordinates(*names) if bits else [Form()] * len(names))

    def w_head(self) -> Fetch:
        """Every token fetches all of w."""
        one, = coordinates("one")
        own = [name for slot in self.switches for name in slot]
        return Fetch(query=self.query({"w": one}, bits=False), key=self.key, value=coordinates(*own),
                     writes=self.brought_w)

    def fetch_w(self) -> NamedLayer:
        """The layer after which every token that may read the token w knows it."""
        own = [name for slot in self.switches for name in slot]
        copies, shift = clamp(self.brought_w, own)
        return NamedLayer(heads=[self.w_head()], neurons=erase(own) + copies + erase(self.brought_w),
                          shift=shift)

    def replace_current(self, fetch: Fetch, g: Form) -> NamedLayer:
        """What was fetched becomes current where g = 1, and is dropped elsewhere."""
        neurons = erase_if(g, self.current) + clamp_if(g, self.fetched, self.current) + erase(self.fetched)
        return NamedLayer(heads=[fetch], neurons=neurons, shift={})


def _parts(task: SequentialComposition) -> dict[str, list[str]]:
    """Every coordinate of the stream, by part, in order."""
    L, n = task.L, task.n_answers
    slots = {f"w_{l}": bit_names(f"w_{l}", size) for l, size in enumerate(task.ns, 1)}
    parts = {"type": [*(f"z_{l}" for l in range(L + 1)), "w"], "emitted": [f"C_{l}" for l in range(L + 1)]}
    parts |= {f"at {slot}": [f"at {name}" for name in names] for slot, names in slots.items()}
    parts |= {"at i": bit_names("at i", n), "value": bit_names("value", n)} | slots
    parts |= {"current": bit_names("current", n), "fetched": bit_names("fetched", n)}
    parts |= {f"fetched {slot}": [f"fetched {name}" for name in names] for slot, names in slots.items()}
    return parts | {"one": ["one"]}


def _symbols(task: SequentialComposition, emitted: Sequence[Emitted]) -> list[Form]:
    """The embedding: one row for each of task.symbols, then one for each token that may be emitted."""
    n, one = task.n_answers, Form({"one": 1})
    rows = [Form(), *(one + Form({f"z_{l}": 1}) for l in range(task.L + 1)), one + Form({"w": 1})]
    rows += [bits(f"at w_{l}", v, size) for l, size in enumerate(task.ns, 1) for v in range(size)]
    rows += [bits("at i", i, n) for i in range(task.N[max(task.L - 2, 0)])]
    rows += [bits("value", v, n) + bits("current", v, n) for v in range(n)]
    rows += [bits(f"w_{l}", v, size) for l, size in enumerate(task.ns, 1) for v in range(size)]
    return rows + [one + _carried(task, token) for token in emitted]


def _carried(task: SequentialComposition, token: Emitted, mark: int = 1) -> Form:
    """What an emitted token says, as a form: its step, its value and its switch."""
    form = mark * Form({f"C_{token.step}": 1}) + bits("current", token.i, task.n_answers)
    return form if token.w is None else form + bits(f"w_{token.step}", token.w, task.ns[token.step - 1])


def _assemble(task: SequentialComposition, p: _Parts, layers: Sequence[NamedLayer], *, causal: bool,
              sharpness: float | None, dtype: torch.dtype, emitted: Sequence[Emitted] = ()) -> Transformer:
    T = task.prompt_length + (task.L + 1 if emitted else 0)
    c = 2 * least_sharpness(T) if sharpness is None else sharpness
    if not 0 < c < math.inf:
        raise ValueError(f"sharpness multiplies the scores: a positive number, got {sharpness}; the proved "
                         f"one for {T} tokens is {least_sharpness(T):.3f}")
    # a wrong step loses 2, a wrong bit 2: the right token leads by 2
    readout = [_carried(task, token, mark=2) for token in emitted]
    readout = readout or [bits("current", v, task.n_answers) for v in range(task.n_answers)]
    names = [name for part in _parts(task).values() for name in part]
    return assemble(names, _symbols(task, emitted), layers, readout, d_head=len(p.key), c=c, causal=causal,
                    dtype=dtype)
