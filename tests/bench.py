"""The speed table, `make bench`: ours against a plain way of doing the same, in one run on one thread.

Figures per second are rates: work done in a second of CPU time of this process. Those in s or ms are wall
time. Ours and its baseline take turns; figures are medians over the turns. A ratio is ours / baseline within
one turn, with its median and range over the turns; above 1, ours has the higher rate, or takes longer. A
wrong answer ends the bench: only right ones are timed. Figures vary with machine and load, ratios less.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention

from lib.evidence.provenance import machine, version
from lib.evidence.rows import RowStore
from lib.experiments.composition import CompositionSettings, train_composition
from lib.experiments.verification import verify_composition
from lib.metrics.bounds import largest_allowed_n
from lib.models import pretrained
from lib.models.transformer import Transformer
from lib.optimizers import Optimizer
from lib.paths import BUILD
from lib.sweeps import run_sweep
from lib.tasks.hops import PermutationHops, Prompts
from lib.training import fit

HEADS = ("what", "unit", "ours", "baseline", "ratio", "range", "the baseline is", "asked")
SHAPES = {  # heads, value dimension, widths of the MLP
    "one head, small MLP": (1, 1, [16]),
    "GPT-2 small": (12, 64, [3072]),
    "GPT-3": (96, 128, [49152]),
}


class Row(NamedTuple):
    """One line of the table. ours, baseline: one value a turn; no baseline, nothing to compare with."""

    what: str
    unit: str
    ours: Sequence[float]
    baseline: Sequence[float] = ()
    against: str = ""
    asked: str = ""

    def cells(self) -> list[str]:
        numbers = [_short(statistics.median(self.ours)), "", "", ""]
        if self.baseline:
            ratios = [ours / baseline for ours, baseline in zip(self.ours, self.baseline, strict=True)]
            medians = [_short(statistics.median(self.baseline)), _short(statistics.median(ratios))]
            numbers[1:] = [*medians, f"{_short(min(ratios))} to {_short(max(ratios))}"]
        return [self.what, self.unit, *numbers, self.against, self.asked]


def table(rows: Sequence[Row]) -> str:
    """Plain text: numbers to the right, words to the left."""
    lines = [list(HEADS), *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    numeric = (2, 3, 4)
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in numeric else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main() -> None:
    torch.set_num_threads(1)
    start = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {what}", file=sys.stderr, flush=True)

    print(facts(), flush=True)
    book, rows = rendering(), []
    for section in SECTIONS:
        rows += section(tell)
    print(f"\n{table([*rows, *book])}\n")
    if not book:
        print("No rendering is on record in build/run.json; `make book` makes one.")
    if not pretrained.available("smollm2-135m"):
        print("SmolLM2-135M is not on this machine: what needs it was not timed. `make models` fetches it.")
    took = f"The bench took {time.monotonic() - start:.0f} s."
    print(f"Rates are per second of CPU time, s and ms wall time, ratios ours / baseline in one turn. {took}")


def facts() -> str:
    """The machine in one line."""
    found = machine()
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['system']}; Python {platform.python_version()}, "
        f"torch {version('torch')}, {torch.get_num_threads()} thread; load average {load}"
    )


def rates(
    arms: Mapping[str, Callable[[], int]], *, turns: int, least_s: float, tell: Callable[[str], None]
) -> dict[str, list[float]]:
    """Rates of each arm, one a turn; the arms take turns. An arm returns the work it has done.

    A turn lasts at least `least_s` seconds of CPU time. First calls (imports, caches) are not measured.
    """
    found = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for turn in range(turns):
        for name, arm in arms.items():
            done, start = 0, time.process_time()
            while not done or time.process_time() - start < least_s:
                done += arm()
            found[name].append(done / (time.process_time() - start))
        tell(f"turn {turn + 1} of {turns}: " + ", ".join(f"{n} {_short(r[-1])}/s" for n, r in found.items()))
    return found


# ---- the largest n that a theorem allows -----------------------------------------------------------------


def bound_search(tell: Callable[[str], None]) -> list[Row]:
    rows = []
    for name, (heads, value_dim, widths) in SHAPES.items():
        for theorem in ("B*", "B**"):
            n = largest_allowed_n(heads, value_dim, widths, theorem=theorem)

            def search(way: Callable, shape=(heads, value_dim, widths), theorem=theorem, n=n) -> int:
                if (found := way(*shape, theorem=theorem)) != n:
                    raise AssertionError(f"{theorem}, {shape}: n <= {found} by {way.__name__}, not {n}")
                return 1

            tell(f"bound search: {name}, {theorem}")
            arms = {"ours": partial(search, largest_allowed_n), "scan": partial(search, scan)}
            rate = rates(arms, turns=3, least_s=0.05, tell=_quiet)
            what = f"bound search, {name}, {theorem}: n <= {n:,}"
            rows.append(Row(what, "calls/s", rate["ours"], rate["scan"], "n = k, k+1, … in floats"))
    return rows


def scan(heads: int, value_dim: int, widths: Sequence[int], *, theorem: str) -> int:
    """B* or B** as on the page, for one n after another, in floats. Rounding could decide a close case."""
    k, layers = heads * (value_dim + 1), len(widths) + 1
    fixed = layers * math.log2(2 * math.e / (value_dim + 1)) + sum(map(math.log2, widths))
    n = k
    while True:
        grows = layers * math.log2(n) + (math.log2(n - 1) if theorem == "B**" else 0.0)
        left = n * math.log2(n) if theorem == "B**" else n
        if left > layers + k * (fixed + grows):
            return n - 1
        n += 1


# ---- every input of a hand-built layer -------------------------------------------------------------------


def verification(tell: Callable[[str], None]) -> list[Row]:
    """The whole experiment: build the weights of Proposition T, n = 3, try all 2,187 inputs, compare."""

    def every_input(s: int, arithmetic: str) -> int:
        row = verify_composition({"n": 3, "s": s, "arithmetic": arithmetic}, seed=0)
        if row["inputs"] != 3**7 or row["errors"]:
            raise AssertionError(f"s={s}, {arithmetic}: {row['errors']} errors on {row['inputs']} inputs")
        return row["inputs"]

    rows = []
    for s in (1, 3):
        tell(f"verification: all inputs of Proposition T, n = 3, s = {s}")
        arms = {kind: partial(every_input, s, kind) for kind in ("float64", "exact")}
        rate = rates(arms, turns=3, least_s=0.2, tell=_quiet)
        what = f"verify T, n = 3, s = {s}: every input, float64"
        rows.append(Row(what, "inputs/s", rate["float64"], rate["exact"], "exact arithmetic", ">= 20,000"))
    return rows


# ---- training steps --------------------------------------------------------------------------------------

TASK = PermutationHops(8)
SETTINGS = CompositionSettings(n=8, L=2, d_model=64, n_heads=4, d_mlp=128, steps=40, batch=32)


def training(tell: Callable[[str], None]) -> list[Row]:
    """Runs of 40 steps on the composition task, building the model included: same first weights, same data.

    In both the learning rate is constant and each layer has a term in the loss. The plain loop saves nothing.
    """
    start = plain_weights(our_model())
    runs = {
        "plain": partial(plain_run, start, muon=False),
        "ours": partial(our_run, muon=False),
        "ours + checkpoint": partial(our_run, muon=False, saved=True),
        "plain Muon": partial(plain_run, start, muon=True),
        "ours Muon": partial(our_run, muon=True),
        "ours Muon + checkpoint": partial(our_run, muon=True, saved=True),
    }
    tell(f"training, {SETTINGS.steps} steps a turn: {', '.join(runs)}")
    arms = {name: partial(steps_done, run) for name, run in runs.items()}
    rate = rates(arms, turns=9, least_s=0.0, tell=tell)
    loops = {"": "plain loop, fused AdamW", " Muon": "plain loop, torch.optim.Muon"}
    return [
        Row(
            f"train, {'Muon and AdamW' if muon else 'AdamW'}{', checkpoint each step' if saved else ''}",
            "steps/s", rate[f"ours{muon}{saved}"], rate[f"plain{muon}"], loop,
        )  # fmt: skip
        for muon, loop in loops.items()
        for saved in ("", " + checkpoint")
    ]


def steps_done(run: Callable[[], list[float]]) -> int:
    """Steps of a run whose loss fell; a run that does not learn is no run to time."""
    losses = run()
    if not statistics.mean(losses[-5:]) < losses[0]:
        raise AssertionError(f"{len(losses)} steps took the loss from {losses[0]:.2f} to {losses[-1]:.2f}")
    return len(losses)


def our_run(*, muon: bool, saved: bool = False) -> list[float]:
    """`Transformer` and `fit`, with the loss of `lib.experiments.composition`. -> the loss of each step."""
    model, mask = our_model(), TASK.mask()

    def loss(model: Transformer, prompts: Prompts) -> Tensor:
        trace = model.trace(prompts.tokens, mask=mask, read=("residual",), rows=TASK.queries)
        logits = [model.readout(trace.residual[1]), trace.logits]
        return sum(_after_layer(prompts, l + 1, each) for l, each in enumerate(logits))

    muon_lr = SETTINGS.muon_lr if muon else None
    plan = Optimizer(adamw_lr=SETTINGS.adamw_lr, muon_lr=muon_lr, warmup=0, hold=1.0)
    with tempfile.TemporaryDirectory() as folder:
        history = fit(
            model, loss, _batch, steps=SETTINGS.steps, optimizer=plan,
            checkpoint=Path(folder) if saved else None, progress=False,
        )  # fmt: skip
    return history.loss


def our_model() -> Transformer:
    return SETTINGS.model(vocab=TASK.vocab, n_logits=TASK.n, max_tokens=TASK.length, seed=0)


def plain_run(start: Mapping[str, Tensor], *, muon: bool) -> list[float]:
    """The loop that one writes in a notebook, from the weights `start`. -> the loss of each step."""
    model, mask, losses = Plain(), TASK.mask(), []
    model.load_state_dict(start)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if muon else []
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    lr, muon_lr = SETTINGS.adamw_lr, SETTINGS.muon_lr
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, momentum=0.95))
    for step in range(SETTINGS.steps):
        prompts = _batch(step)
        logits = model(prompts.tokens, mask)
        loss = sum(_after_layer(prompts, l + 1, each) for l, each in enumerate(logits))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


class Block(nn.Module):
    """Pre-norm attention and MLP, query, key and value in one matrix."""

    def __init__(self, D: int, H: int, d_mlp: int):
        super().__init__()
        self.H = H
        self.norm = nn.RMSNorm(D, eps=1e-5, elementwise_affine=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, d_mlp)
        self.down = nn.Linear(d_mlp, D, bias=False)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        B, T, D = h.shape
        q, k, v = self.qkv(self.norm(h)).view(B, T, 3, self.H, D // self.H).permute(2, 0, 3, 1, 4)
        mix = scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, d)
        h = h + self.out(mix.transpose(1, 2).reshape(B, T, D))
        return h + self.down(relu(self.up(self.norm(h))))


class Plain(nn.Module):
    """The shape of `our_model()`, for this task alone: no taps, no interventions, no checks."""

    def __init__(self):
        super().__init__()
        D = SETTINGS.d_model
        self.embedding = nn.Embedding(TASK.vocab, D)
        self.blocks = nn.ModuleList(Block(D, SETTINGS.n_heads, SETTINGS.d_mlp) for _ in range(SETTINGS.L))
        self.norm = nn.RMSNorm(D, eps=1e-5, elementwise_affine=False)
        self.readout = nn.Linear(D, TASK.n)

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """tokens (B, T, 3) -> after each layer, logits (B, Q, n) of the queries."""
        h, logits = self.embedding(tokens).sum(dim=2), []
        for block in self.blocks:
            h = block(h, mask)
            logits.append(self.readout(self.norm(h[:, TASK.queries])))
        return logits


def plain_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights of `our_model()` under the names of `Plain`."""
    w = model.state_dict()
    named = {"embedding.weight": w["embedding.weight"], "readout.weight": w["W_U.weight"]}
    named["readout.bias"] = w["b_U"]
    for l in range(SETTINGS.L):
        block, layer = f"blocks.{l}", f"layers.{l}"
        named[f"{block}.qkv.weight"] = torch.cat(
            [w[f"{layer}.attention.{name}.weight"] for name in ("W_Q", "W_K", "W_V")]
        )
        named[f"{block}.out.weight"] = w[f"{layer}.attention.W_O.weight"]
        named[f"{block}.up.weight"] = w[f"{layer}.mlp.W_1.weight"]
        named[f"{block}.up.bias"] = w[f"{layer}.mlp.W_1.bias"]
        named[f"{block}.down.weight"] = w[f"{layer}.mlp.W_2.weight"]
    return named


def _batch(step: int) -> Prompts:
    return TASK.batch(step, seed=0, size=SETTINGS.batch)


def _after_layer(prompts: Prompts, l: int, logits: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), TASK.after_layer(prompts, l).flatten())


# ---- sweeps ----------------------------------------------------------------------------------------------

TINY = {"n": 4, "L": 1, "d_model": 32, "n_heads": 2, "d_mlp": 64, "steps": 120, "batch": 32}


def sweeps(tell: Callable[[str], None]) -> list[Row]:
    """Tiny trainings by two processes and by one; and what the sweep costs a run that does nothing."""

    def nothing(settings: Mapping, *, seed: int) -> dict:
        return {}

    start, two, one, idle = sweep_s(nothing, {}, runs=2, n_jobs=2), [], [], []
    for turn in range(3):
        tell(f"sweeps: turn {turn + 1} of 3, 32 tiny trainings by two processes, then by one")
        two.append(sweep_s(train_composition, TINY, runs=32, n_jobs=2))
        one.append(sweep_s(train_composition, TINY, runs=32, n_jobs=1))
        idle.append(1000 * sweep_s(nothing, {}, runs=64, n_jobs=2) / 64)
    return [
        Row("sweep, 32 tiny trainings, n_jobs=2", "s", two, one, "the same, n_jobs=1", "ratio <= 0.6"),
        Row("sweep, start of 2 processes, once", "s", [start]),
        Row("sweep, a run that does nothing, n_jobs=2", "ms", idle, asked="<= 20"),
    ]


def sweep_s(run: Callable[..., dict], settings: Mapping, *, runs: int, n_jobs: int) -> float:
    """Wall seconds of a sweep that records its rows as evidence is recorded."""
    with tempfile.TemporaryDirectory() as folder:
        store, start = RowStore(Path(folder) / "rows.jsonl", code="bench"), time.perf_counter()
        rows = run_sweep(run, [settings], seeds=range(runs), store=store, n_jobs=n_jobs, progress=False)
        took = time.perf_counter() - start
    if failed := [row["failed"] for row in rows if row.get("failed")]:
        raise AssertionError(f"a run failed: {failed[0]}")
    return took


# ---- pretrained models, and the metrics for them: each in a file of its own --------------------------------


def linearity_scores(tell: Callable[[str], None]) -> list[Row]:
    return rows_of("bench_linearity", tell)


def pretrained_models(tell: Callable[[str], None]) -> list[Row]:
    """No row without SmolLM2."""
    return rows_of("bench_pretrained", tell)


def use_of_depth(tell: Callable[[str], None]) -> list[Row]:
    """Without SmolLM2 on random weights of its shape, and the rows say so."""
    return rows_of("bench_depth", tell)


def composed_heads(tell: Callable[[str], None]) -> list[Row]:
    return rows_of("bench_dcmha", tell)


def rows_of(file: str, tell: Callable[[str], None]) -> list[Row]:
    """What `rows` of that file, beside this one, finds."""
    spec = importlib.util.spec_from_file_location(file, Path(__file__).with_name(f"{file}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tell(module.__doc__.splitlines()[0])
    return [Row(*row) for row in module.rows(tell)]


SECTIONS = (bound_search, verification, training, sweeps, linearity_scores, pretrained_models, use_of_depth,
            composed_heads)  # fmt: skip


# ---- the book --------------------------------------------------------------------------------------------


def rendering(record: Path = BUILD / "run.json") -> list[Row]:
    """The time that the latest build took to render all pages, as it noted it; [] if it rendered nothing."""
    if not record.exists():
        return []
    run = json.loads(record.read_text(encoding="utf-8"))
    if not run["site"]:
        return []
    what = f"render the book (`make {run['command']}`, {run['finished'][:10]})"
    return [Row(what, "s", [run["render_seconds"]], asked="<= 40")]


def _short(number: float) -> str:
    """Three digits, or all of a whole number: a timing has no more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _quiet(what: str) -> None:
    """For rows that are over in a second."""


if __name__ == "__main__":
    main()
