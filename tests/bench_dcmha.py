"""Rows of the speed table for composed heads: DCMHA's fast computation against plain attention and itself.

    python tests/bench_dcmha.py

One layer with its projections, causal, B = 1, float32, one thread: forward and backward, in ms of CPU time of
this process. All four sides, gates, R = 2. Memory: what a forward pass keeps for the backward pass, weights
left out. About 60 s of CPU time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lib.metrics.resources import alternate, saved_floats
from lib.models.attention import Attention
from lib.models.dcmha import DCMHA
from lib.models.transformer import TransformerConfig

SHAPES = [  # B, T, D, H, what was asked of the ratio to SDPA
    (1, 512, 512, 8, "<= 1.5"),
    (1, 1024, 512, 8, "<= 2.5"),
    (1, 512, 256, 16, "<= 3"),
    (1, 2048, 512, 8, ""),
    (4, 128, 128, 8, ""),
    (32, 32, 64, 8, ""),
]
PREFIX, NEW = 512, 32  # tokens in the cache, tokens decoded after them


def rows(tell: Callable[[str], None] = lambda what: None, *, turns: int = 5, shapes=SHAPES) -> list[tuple]:
    """(what, unit, ours, baseline, against, asked): the fields of `bench.Row`."""
    table = []
    for B, T, D, H, asked in shapes:
        torch.manual_seed(0)
        plain, layer = (
            Attention(TransformerConfig(vocab=1, d_model=D, n_heads=H, positions="none")),
            DCMHA(D, H),
        )
        x = torch.randn(B, T, D, requires_grad=True)
        right(layer, x)
        arms = {"ours": layer, "MHA with SDPA": called(plain, explicit=False)}
        if T <= 1024:  # beyond, whole maps take gigabytes
            arms["MHA written out"] = called(plain, explicit=True)
            arms["our reference"] = lambda x, layer=layer: layer.attend(x, computation="reference")[0]
        took = alternate(
            {name: partial(forward_and_backward, arm, x) for name, arm in arms.items()},
            turns=turns, least_s=0.3, seed=0,
        )  # fmt: skip
        took = {name: [1e3 * s for s in seconds] for name, seconds in took.items()}
        what = f"DCMHA, forward and backward, B={B} T={T} D={D} H={H}"
        tell(f"{what}: {', '.join(f'{name} {min(ms):.1f} ms' for name, ms in took.items())}")
        for against in list(arms)[1:]:
            wish = asked if against == "MHA with SDPA" else ""
            table.append((what, "ms", took["ours"], took[against], against, wish))
    return table + decoding(turns) + memory()


def called(plain: Attention, *, explicit: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: plain(x, mask=None, rows=None, explicit=explicit)[0]


def forward_and_backward(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    layer(x).sum().backward()


def right(layer: DCMHA, x: Tensor) -> None:
    """AssertionError unless fast and reference agree to 1e-5 on an output and an input gradient."""
    short, found = x[:1, :96].detach().requires_grad_(), []
    for computation in ("fast", "reference"):
        out = layer.attend(short, computation=computation)[0]
        found.append((out, *torch.autograd.grad(out.square().sum(), short)))
    for a, b in zip(*found, strict=True):
        if not (a - b).abs().max() < 1e-5 * b.abs().max():
            raise AssertionError("the fast computation is off from the reference")


@torch.no_grad()
def decoding(turns: int, D: int = 512, H: int = 8) -> list[tuple]:
    """ms a token after PREFIX tokens, with the cache, against one pass over all tokens so far, for each."""
    layer, x = DCMHA(D, H), torch.randn(1, PREFIX + NEW, D)
    filled = layer.new_cache()
    layer(x[:, :PREFIX], cache=filled)

    def decode() -> Tensor:
        cache = replace(filled)  # a copy: decoding puts new tensors into it
        return torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(PREFIX, PREFIX + NEW)], dim=1)

    full = layer(x)
    if not (decode() - full[:, PREFIX:]).abs().max() < 1e-5 * full.abs().max():
        raise AssertionError("decoding with a cache is off from the full pass")
    took = alternate({"cached": decode, "again": partial(layer, x)}, turns=turns, least_s=0.0, seed=0)
    cached, again = [1e3 * s / NEW for s in took["cached"]], [1e3 * s for s in took["again"]]
    what = f"DCMHA, one token after {PREFIX}, D={D} H={H}"
    return [(what, "ms", cached, again, "a pass over all", "")]


def memory(T: int = 512, D: int = 512, H: int = 8) -> list[tuple]:
    """Saved numbers in units of B·H·T·T: ours against the reference and the other attentions."""
    x, plain = (
        torch.randn(1, T, D),
        Attention(TransformerConfig(vocab=1, d_model=D, n_heads=H, positions="none")),
    )
    layer = DCMHA(D, H)
    ours, table = [saved_floats(partial(layer, x), layer.parameters()) / (H * T * T)], []
    for against, model, arm in (
        ("our reference", layer, lambda x: layer.attend(x, computation="reference")[0]),
        ("MHA written out", plain, called(plain, explicit=True)),
        ("MHA with SDPA", plain, called(plain, explicit=False)),
    ):
        baseline = [saved_floats(partial(arm, x), model.parameters()) / (H * T * T)]
        what, asked = f"DCMHA, saved for backward, T={T} D={D} H={H}", "ours <= 1.25"
        table.append((what, "B·H·T·T floats", ours, baseline, against, asked if not table else ""))
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, unit, ours, baseline, against, asked in rows(print):
        ratios = sorted(a / b for a, b in zip(ours, baseline, strict=True))
        middle, ends = ratios[len(ratios) // 2], f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        cost = f"{min(ours):.2f} {unit}, {min(baseline):.2f} {against}"
        print(f"{what}: {cost}, ratio {middle:.2f} ({ends}) {asked}")
