"""Rows of the speed table for the use of depth: interventions against one full pass for each of them.

    python tests/bench_depth.py

SmolLM2-135M, or its shape with random weights where it was not fetched. Rates are per second of CPU time of
this process, on one thread. The baseline runs every sixth layer's interventions: each of them costs the same.
About 90 s of CPU time: the suite runs once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lib.metrics.depth import (
    contributions_and_cosines,
    current_and_future,
    layer_swaps,
    logit_lens,
    mean_residual,
    residual_erasure,
)
from lib.models import pretrained
from lib.models.transformer import Skip, Transformer, TransformerConfig

T, ANSWER, STEP = 64, 16, 6
SHAPE = dict(
    vocab=49_152, d_model=576, n_heads=9, n_kv_heads=3, n_layers=30, d_mlp=1536, activation="swiglu",
    mlp_bias=False, tied=True, rope_base=1e5,
)  # fmt: skip


def rows(
    tell: Callable[[str], None] = lambda what: None, *, turns: int = 2, model: Transformer | None = None
) -> list[tuple]:
    """(what, unit, ours, baseline, against, asked): the fields of `bench.Row`."""
    named = "SmolLM2-135M"
    if model is None and pretrained.available("smollm2-135m"):
        model = pretrained.load("smollm2-135m")
    elif model is None:
        model, named = Transformer(TransformerConfig(**SHAPE), seed=0), "the shape of SmolLM2-135M"
    L, high = model.config.n_layers, min(model.config.vocab, 20_000)
    tokens = torch.randint(high // 2, high, (1, T), generator=torch.Generator().manual_seed(0))

    ours, plain, no_output = [], [], []
    for turn in range(turns):
        took, (now, later) = timed(lambda: current_and_future(model, tokens))
        ours.append(5 * L / took)
        took, done = timed(lambda places=later.positions[0]: one_by_one(model, tokens, places))
        plain.append(len(done) / took)
        right(now, later, done)
        took, _ = timed(lambda: current_and_future(model, tokens, output_rows=slice(-1, None)))
        no_output.append(5 * L / took)
        tell(
            f"depth, turn {turn + 1}: skips {ours[-1]:.1f}/s, output at one token {no_output[-1]:.1f}/s, "
            f"one by one {plain[-1]:.1f}/s"
        )
    took, work = timed(lambda: suite(model, tokens))
    of_suite = work / took
    took, _ = timed(lambda: [plain_pass(model, tokens) for _ in range(5)])
    of_passes = 5 * T * L / took
    tell(f"depth: suite {of_suite:,.0f}, passes {of_passes:,.0f} tokens·layers/s")
    what = f"skip effects, {named}, all layers, all tokens and 4 positions"
    one = "one full pass each"
    return [
        (f"{what}, T = {T}", "skips/s", ours, plain, one, ">= 3"),
        (f"{what}, output at the last token", "skips/s", no_output, plain, f"{one}, all outputs", ""),
        (f"depth suite, {named}, as full passes", "tokens·layers/s", [of_suite], [of_passes], one, ""),
    ]


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    done = work()
    return time.process_time() - start, done


@torch.no_grad()
def plain_pass(model: Transformer, tokens: Tensor) -> Tensor:
    return model(tokens)


@torch.no_grad()
def one_by_one(model: Transformer, tokens: Tensor, places: tuple[int, ...]) -> dict[tuple, tuple]:
    """(s, t) -> largest changes (L,) and output effect, from one full pass for each; t = T: all tokens."""
    found, clean = {}, model.trace(tokens, read=("attention_out", "mlp_out"))
    c, y = clean.attention_out + clean.mlp_out, clean.logits.softmax(dim=-1)
    size = c.norm(dim=-1).clamp(min=1e-6)
    for s in range(0, model.config.n_layers, STEP):
        for t in (T, *places):
            where = torch.zeros(T, dtype=torch.bool)
            where[1:t] = True
            edited = model.trace(
                tokens, read=("attention_out", "mlp_out"), interventions=[Skip(s, tokens=where)]
            )
            change = (c - edited.attention_out - edited.mlp_out).norm(dim=-1) / size
            effect = (y - edited.logits.softmax(dim=-1)).norm(dim=-1)[0]
            seen = slice(0 if t == T else t, None)
            found[s, t] = change[:, 0, seen].amax(dim=-1), effect[seen].max()
    return found


def right(now, later, done: dict[tuple, tuple]) -> None:
    """AssertionError unless ours and the full passes agree to 1e-3 (float32, through 30 layers)."""
    for s in range(0, now.layers.peak.shape[1], STEP):
        changes, effects = zip(*(value for (l, t), value in done.items() if l == s and t < T), strict=True)
        for found, change, effect in (
            (now, *done[s, T]), (later, torch.stack(changes).amax(dim=0), torch.stack(effects).max()),
        ):  # fmt: skip
            gap = (found.layers.peak[0, s] - change).abs() / change.clamp(min=1.0)
            if not gap.max() < 1e-3 or not abs(found.output.peak[0, s] - effect) < 1e-3:
                raise AssertionError(f"skip of layer {s}: off by {gap.max():.1e} from a full pass")


def suite(model: Transformer, tokens: Tensor) -> int:
    """Contributions, lens, skips, adjacent swaps, erasure. -> tokens·layers of one full pass for each."""
    L, short = model.config.n_layers, tokens[:, :ANSWER]
    contributions_and_cosines(model, tokens)
    logit_lens(model, tokens)
    current_and_future(model, tokens, output_rows=slice(-1, None))
    layer_swaps(model, tokens, output_rows=slice(-8, None))
    residual_erasure(model, short, mean=mean_residual(model, tokens), answer=2)
    return L * (T * (3 + 5 * L + L - 1) + ANSWER * (1 + (L + 1) * (ANSWER - 1)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, unit, ours, baseline, against, asked in rows(print):
        ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
        print(f"{what}: {max(ours):.1f} {unit}, {max(baseline):.1f} by {against}, ratios {ratios} ({asked})")
