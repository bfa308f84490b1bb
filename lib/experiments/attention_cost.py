"""What composing heads costs on this machine: time, saved and live memory, decoding, beside the formulas.

    row = measure_cost({"T": 512, "d_model": 512, "n_heads": 8}, seed=0)
    row["training_dcmha_ratio"], row["flops_dcmha_ratio"]     # time and arithmetic, both against SDPA

Unlike every other experiment of the book, this one measures time: its rows differ from run to run. Counts
(FLOPs, weights, cache, saved and live floats) do not. All arms run in one process on one thread and take
turns, in an order drawn anew each turn, so that what slows the machine slows them alike; a ratio is taken
within a turn. Only right answers are timed: the arms that compute the same are compared first.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lib.choices import check_choice, resolve_device
from lib.experiments.recipe import read_settings
from lib.metrics import attention_cost as formulas
from lib.metrics.attention_cost import AttentionShape
from lib.metrics.intervals import bootstrap
from lib.metrics.resources import PeakFloats, alternate, one_thread, saved_floats
from lib.models.dcmha import DCMHA
from lib.models.transformer import Transformer, TransformerConfig
from lib.training import seeds_by_role

BASE = 1e4  # of the rotary positions, which all arms have
COMPOSED = {  # arms that compose heads: how they differ from DCMHA with both sides, both places and gates
    "dcmha": {},
    "dcmha_reference": {"computation": "reference"},
    "dcmha_query": {"key_side": False},
    "dcmha_post": {"pre": False, "gates": False},
    "static": {"query_side": False, "key_side": False, "static": True},
}
ARMS = ("mha", "mha_explicit", *COMPOSED)  # mha: torch's fused attention, the baseline of the ratios
KEPT = {"mha_explicit": "all", "dcmha_reference": "all"}  # for the backward pass; the others: inputs alone
SHOWN = 4  # digits of a time or ratio: more would be noise


@dataclass(frozen=True, kw_only=True)
class AttentionCostSettings:
    """One shape: T tokens, width d_model, n_heads heads; an MLP of width 4 d_model.

    arms: names among `ARMS`; "mha" and "dcmha" are always measured. turns: at least 7, one time an arm each.
    least_s: a time is the mean over calls for at least so many seconds. depth, vocab: layers and readout of
    the model whose step is put together from its timed parts. decoded: tokens read one by one after T.
    """

    T: int
    d_model: int
    n_heads: int
    batch: int = 1
    rank: int = 2
    arms: tuple[str, ...] = ARMS
    turns: int = 7
    least_s: float = 0.02
    depth: int = 12
    vocab: int = 4096
    decoded: int = 16
    device: str = "cpu"

    def __post_init__(self):
        for name in ("T", "d_model", "n_heads", "batch", "rank", "turns", "depth", "vocab", "decoded"):
            value, least = getattr(self, name), {"T": 2, "turns": 7}.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")
        if not 0 <= self.least_s < float("inf"):
            raise ValueError(f"least_s is a number of seconds of at least 0, got {self.least_s!r}")
        if isinstance(self.arms, str):
            raise ValueError(f"arms is a list of names, got {self.arms!r}")
        for name in self.arms:
            check_choice("arm", name, ARMS)
        wanted = {"mha", "dcmha", *self.arms}
        object.__setattr__(self, "arms", tuple(name for name in ARMS if name in wanted))
        resolve_device(self.device)
        for attention in ("mha", "dcmha"):
            self.config(attention)

    def config(self, attention: str) -> TransformerConfig:
        """The whole model with either attention."""
        rank = {"dc_rank": self.rank} if attention == "dcmha" else {}
        return TransformerConfig(
            vocab=self.vocab, d_model=self.d_model, n_heads=self.n_heads, n_layers=self.depth,
            attention=attention, rope_base=BASE, **rank,
        )  # fmt: skip

    def shape(self, arm: str) -> AttentionShape:
        """The attention of an arm, for the formulas."""
        switches = {name: on for name, on in COMPOSED.get(arm, {}).items() if name != "computation"}
        return AttentionShape(
            d_model=self.d_model, n_heads=self.n_heads, rank=self.rank, composed=arm in COMPOSED, **switches
        )


def measure_cost(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One shape, all arms. Settings: the fields of `AttentionCostSettings`. One row.

    Times, <what>_<arm>_ms: medians over the turns; of CPU time on a CPU, of wall time elsewhere. With
    <what>_<arm>_ratio to "mha" in the same turn: median, and its 95 % bootstrap interval, _lo to _hi.
    - forward, training: one attention layer without and with the backward pass (all gradients), each arm.
    - block: training of a whole layer, norms and MLP included; model: `depth` blocks and the rest (embedding,
      readout and loss, rest_ms), put together; both for mha and dcmha, the optimizer's step left out.
    - decode: a token after T others, attention with a cache, for dcmha and for mha, the same class with
      nothing composed; decode_block: with the MLP (decode_mlp_ms). tokens_per_s_<arm>: of decode.
    turns_forward, turns_training: {arm: ms of each turn}.

    Counts, the same in every run, by arm:
    - flops and parameters of the layer (formulas; forward, all pairs, the whole batch), flops_block,
      flops_model; flops_observed: products of matrices in a training pass as torch counts them, to
      compare with 3 flops (not for mha: torch does not see into fused attention on a CPU).
    - cache: floats a token in a real cache; cache_formula.
    - in units of B H T^2 floats: saved for the backward pass, saved_pairs: the part of it that grows with
      T^2, saved_formula; peak: alive at the worst moment of a training pass, beside weights and input.
    difference: of dcmha from its reference, relative to the largest output; RuntimeError above 1e-4.
    """
    chosen = read_settings(AttentionCostSettings, settings)
    seeds, device = seeds_by_role(seed), resolve_device(chosen.device)
    with one_thread():
        parts = Parts(chosen, seed=seeds["init"], device=device)
        x = parts.stream(chosen.T, seed=seeds["data"])
        row = {"difference": parts.check(x)}
        row |= _times(chosen, parts, x, seed=seeds["order"], device=device)
        row |= _formulas(chosen)
        for arm in chosen.arms:
            row |= _memory(parts, arm, x)
        for arm in ("mha", "dcmha"):
            row[f"cache_{arm}"] = parts.cached_floats(arm, x) // (chosen.batch * chosen.T)
    return row


class Parts:
    """The modules that are timed, and what a call of each is."""

    def __init__(self, chosen: AttentionCostSettings, *, seed: int, device: str):
        self.chosen, self.device, c = chosen, device, chosen
        self.models = {
            name: Transformer(replace(c.config(name), n_layers=1), seed=seed).to(device)
            for name in ("mha", "dcmha")
        }
        self.layers, shared = {}, dict(rank=c.rank, rope=BASE)
        for arm in ("none", *(arm for arm in c.arms if arm in COMPOSED)):
            switches = {"pre": False, "post": False} if arm == "none" else COMPOSED[arm]
            layer = DCMHA(c.d_model, c.n_heads, **shared, **switches)
            generator = torch.Generator().manual_seed(seed)
            layer.reset_parameters(generator)
            with torch.no_grad():
                for name, weight in layer.named_parameters():
                    if "W_2" in name or "W_b" in name:  # compositions start near 0: a check would see nothing
                        weight.normal_(0.0, 0.05, generator=generator)
            self.layers[arm] = layer.to(device)

    def stream(self, T: int, *, seed: int) -> Tensor:
        """A normalised residual stream (B, T, D)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.chosen.batch, T, self.chosen.d_model, generator=generator).to(self.device)

    def attention(self, arm: str) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        """x (B, T, D) -> (B, T, D), and the module whose weights it uses."""
        if arm in COMPOSED:
            return self.layers[arm], self.layers[arm]
        layer = self.models["mha"].layers[0].attention
        return lambda x: layer(x, mask=None, rows=None, explicit=arm == "mha_explicit")[0], layer

    def block(self, name: str) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        """A whole layer: norm, attention, norm, MLP, and the residual stream around them."""
        model = self.models[name]
        return lambda x: x + sum(model.run_layer(0, x)), model.layers[0]

    def rest(self, tokens: Tensor) -> Callable[[], object]:
        """What a training step does outside the layers: embedding, final norm, readout, cross-entropy."""
        model = self.models["mha"]
        weights = [p for name, p in model.named_parameters() if not name.startswith("layers.")]

        def run() -> object:
            logits = model.readout(model.embed(tokens))  # (B, T, V)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            return torch.autograd.grad(loss, weights)

        return run

    def decoder(self, arm: str, x: Tensor, after: Tensor) -> Callable[[], Tensor]:
        """Reads `after` (B, n, D) token by token, behind a cache of x. Each call starts from that cache."""
        layer, cache = self.layers["none" if arm == "mha" else arm], self.filled(arm, x)

        @torch.no_grad()
        def run() -> Tensor:
            mine = copy.copy(cache)  # the cache is extended by new tensors, so a shallow copy is enough
            each = range(after.shape[1])
            return torch.cat([layer(after[:, t : t + 1], cache=mine) for t in each], dim=1)

        return run

    @torch.no_grad()
    def filled(self, arm: str, x: Tensor) -> object:
        layer = self.layers["none" if arm == "mha" else arm]
        cache = layer.new_cache()
        layer(x, cache=cache)
        return cache

    def cached_floats(self, arm: str, x: Tensor) -> int:
        """Floats in a cache of x, counted."""
        return sum(part.numel() for part in tree_leaves(vars(self.filled(arm, x))) if torch.is_tensor(part))

    @torch.no_grad()
    def check(self, x: Tensor) -> float:
        """RuntimeError unless arms that compute the same agree. -> the relative gap of fast and reference.

        Tolerance 1e-4 of the largest output, float32: sums of up to T or D products, rounded at 6e-8 each.
        """
        fast, T = self.layers["dcmha"], x.shape[1]
        half = max(1, T // 2)
        reference, y = fast.attend(x, computation="reference")[0], fast(x)
        sdpa, explicit = (self.attention(arm)[0](x) for arm in ("mha", "mha_explicit"))
        decoded = self.decoder("dcmha", x[:, :half], x[:, half : half + 4])()
        gaps = {
            "dcmha and its reference": _gap(y, reference),
            "mha and mha_explicit": _gap(sdpa, explicit),
            "dcmha decoded and whole": _gap(decoded, y[:, half : half + 4]),
        }
        for what, gap in gaps.items():
            if not gap <= 1e-4:
                raise RuntimeError(f"{what} differ by {gap:.1e} of the largest output: nothing was timed")
        return gaps["dcmha and its reference"]


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _training(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward pass: the gradients of the input and of all weights."""
    x = x.clone().requires_grad_()
    weights, ones = [x, *module.parameters()], torch.ones_like(x)
    return lambda: torch.autograd.grad(call(x), weights, ones)


def _times(chosen: AttentionCostSettings, parts: Parts, x: Tensor, *, seed: int, device: str) -> dict:
    c, runs = chosen, {}
    for arm in c.arms:
        call, module = parts.attention(arm)
        runs[f"forward_{arm}"] = torch.no_grad()(lambda call=call: call(x))
        runs[f"training_{arm}"] = _training(call, module, x)
    for name in ("mha", "dcmha"):
        runs[f"block_{name}"] = _training(*parts.block(name), x)
        runs[f"decode_{name}"] = parts.decoder(name, x, x[:, -1:].expand(-1, c.decoded, -1))
    mlp = parts.models["mha"].layers[0].mlp
    runs["decode_mlp"] = torch.no_grad()(lambda: [mlp(x[:, :1]) for _ in range(c.decoded)])
    generator = torch.Generator().manual_seed(seed)
    runs["rest"] = parts.rest(torch.randint(c.vocab, (c.batch, c.T), generator=generator).to(device))

    ms = {
        name: [1e3 * each / (c.decoded if name.startswith("decode") else 1) for each in taken]
        for name, taken in alternate(runs, turns=c.turns, least_s=c.least_s, seed=seed, device=device).items()
    }
    for name in ("mha", "dcmha"):  # put together, turn by turn
        pairs = zip(ms[f"block_{name}"], ms["rest"], strict=True)
        ms[f"model_{name}"] = [c.depth * block + rest for block, rest in pairs]
        pairs = zip(ms[f"decode_{name}"], ms["decode_mlp"], strict=True)
        ms[f"decode_block_{name}"] = [attention + mlp for attention, mlp in pairs]
    row = {"rest_ms": _shown(ms["rest"]), "decode_mlp_ms": _shown(ms["decode_mlp"])}
    for what in ("forward", "training", "block", "model", "decode", "decode_block"):
        for arm in c.arms if what in ("forward", "training") else ("mha", "dcmha"):
            row[f"{what}_{arm}_ms"] = _shown(ms[f"{what}_{arm}"])
            if arm != "mha":
                row |= _ratio(f"{what}_{arm}_ratio", ms[f"{what}_{arm}"], ms[f"{what}_mha"], seed=seed)
    for name in ("mha", "dcmha"):
        row[f"tokens_per_s_{name}"] = _round(1e3 * c.batch / statistics.median(ms[f"decode_{name}"]))
    for what in ("forward", "training"):
        row[f"turns_{what}"] = {arm: [_round(t) for t in ms[f"{what}_{arm}"]] for arm in c.arms}
    return row


def _ratio(name: str, ours: Sequence[float], baseline: Sequence[float], *, seed: int) -> dict[str, float]:
    """Median over the turns of the ratio within a turn, and its bootstrap interval."""
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    lo, hi = bootstrap(ratios, "median", seed=seed)
    return {name: _shown(ratios), f"{name}_lo": _round(lo), f"{name}_hi": _round(hi)}


def _formulas(chosen: AttentionCostSettings) -> dict:
    """Exact counts of one layer, and of the model; FLOPs of a forward pass on the batch, with all pairs."""
    c, row = chosen, {}
    mlp = 2 * c.T * 8 * c.d_model**2
    for arm in c.arms:
        shape = c.shape(arm)
        row[f"flops_{arm}"] = c.batch * formulas.forward_flops(shape, c.T)["total"]
        row[f"parameters_{arm}"] = formulas.parameters(shape)["total"]
        row[f"cache_formula_{arm}"] = formulas.cache_floats(shape)["total"]
        row[f"saved_formula_{arm}"] = formulas.saved_per_pair(shape, kept=KEPT.get(arm, "inputs"))
    for name in ("mha", "dcmha"):
        row[f"flops_block_{name}"] = row[f"flops_{name}"] + c.batch * mlp
        row[f"flops_model_{name}"] = c.batch * formulas.transformer_flops(c.config(name), c.T)["total"]
    for what in ("flops", "flops_block", "flops_model", "parameters"):
        row[f"{what}_dcmha_ratio"] = row[f"{what}_dcmha"] / row[f"{what}_mha"]
    return row


def _memory(parts: Parts, arm: str, x: Tensor) -> dict:
    """Floats saved for the backward pass and alive at its worst moment, in units of B H T^2."""
    call, module = parts.attention(arm)
    B, T, _ = x.shape

    def saved(T: int) -> float:
        """In units of B H."""
        start = x[:, :T].clone().requires_grad_()
        return saved_floats(lambda: call(start), module.parameters()) / (B * parts.chosen.n_heads)

    whole, half = saved(T), saved(T // 2)
    squares = (whole / T - half / (T // 2)) / (T - T // 2)  # of a T + b T^2, b
    start, ones = x.clone().requires_grad_(), torch.ones_like(x)
    with PeakFloats() as counter, FlopCounterMode(display=False) as flops:
        call(start).backward(ones)
    module.zero_grad()
    observed = {} if arm == "mha" else {f"flops_observed_{arm}": flops.get_total_flops()}
    return observed | {
        f"saved_{arm}": whole / T**2,
        f"saved_pairs_{arm}": squares,
        f"peak_{arm}": counter.peak / (B * parts.chosen.n_heads * T**2),
    }


def _shown(values: Sequence[float]) -> float:
    return _round(statistics.median(values))


def _round(value: float) -> float:
    return float(f"{value:.{SHOWN}g}")
