"""Train a language model of paper-like size, with or without composed heads, on a corpus the reader names.

One GPU, in a notebook or a sweep: `train_large(settings, seed=0)`. Several GPUs for one model, or one model
without a notebook:

    torchrun --nproc-per-node=8 -m lib.experiments.large_language settings.json --seed 0 --folder runs/dcmha
    python -m lib.experiments.large_language settings.json --estimate --ranks 8      # compute, train nothing

The loop is `lib.distributed.fit_distributed`, in one process too: it adds up the gradients of a batch over
micro-batches, keeps weights and moments in float32 and computes in bfloat16 where asked. Before training,
`lib.experiments.large_estimates` says what it will take, and a model that cannot fit is refused.

Set-up of the 405M models: L 24, D 1024, H 16, SwiGLU MLP 2816, windows 256 and none in turn, QK norm, RoPE;
13,500 steps of 256 windows of 2,048 tokens, AdamW (0.9, 0.95), rate 3e-4, 1 % warm-up, cosine to 10 %, decay
0.1, gradients clipped at 1 (released configuration of Xiao et al. 2024; batch, schedule and optimizer also in
Xiao et al. 2025, MUDDFormer). Ours: the initial weights (see `Transformer`), decay of every weight, and the
order of the windows: each is read once an epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lib.choices import check_choice
from lib.distributed import fit_distributed
from lib.distributed.loop import SHARDS
from lib.distributed.ranks import DEVICES, join, on_rank_0, own_device
from lib.experiments.large_estimates import check_fits, estimate_large, report, timed
from lib.experiments.recipe import read_settings
from lib.metrics.attention_cost import transformer_parameters
from lib.models.pretrained import load_tokenizer
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.paths import BUILD
from lib.tasks.corpus import Corpus, Tokens, n_windows, token_file, window_batch, windows
from lib.training import check_precision, seeds_by_role

ATTENTIONS = ("mha", "dcmha")
SCHEDULES = ("cosine", "linear")
# What may change when a run is continued: where and how it is computed, not what
MACHINE = (
    "micro_batch", "compile", "recompute", "shard", "device", "trial_steps", "check_memory",
    "device_memory_gb", "cache", "keep", "checkpoint_every",
)  # fmt: skip
COUNTS = (
    "L", "d_model", "n_heads", "d_mlp", "T", "batch", "steps", "micro_batch", "evaluation_windows",
    "evaluate_every", "checkpoint_every",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LargeSettings:
    """L layers of width d_model, trained on steps x batch windows of T tokens of a corpus."""

    corpus: str  # a UTF-8 text file, a dataset "org/name" of the Hugging Face hub, or "austen"
    tokenizer: str  # "austen", a folder that holds tokenizer.json, or a hub id that `make models` fetched
    L: int
    d_model: int
    n_heads: int
    d_mlp: int
    T: int  # tokens a window
    batch: int  # windows a step, over all GPUs
    steps: int
    attention: str = "mha"  # | dcmha
    dc_rank: int = 2  # this and the following: the switches of lib.models.dcmha.DCMHA
    dc_pre: bool = True
    dc_post: bool = True
    dc_query_side: bool = True
    dc_key_side: bool = True
    dc_gates: bool = True
    dc_static: bool = False
    windows: tuple[int | None, ...] = (256, None)  # keys a query reads, layer by layer, repeated
    qk_norm: bool = True
    rope_base: float = 1e4
    tied: bool = False
    adamw_lr: float = 3e-4
    schedule: str = "cosine"  # | linear: both to `floor` of the rate, after the warm-up
    warmup_share: float = 0.01  # of the steps
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.1
    clip: float = 1.0
    subset: str | None = None  # this and the following: of a dataset of the hub
    split: str = "train"
    column: str = "text"
    end_of_text: str | None = None  # a token put after each of its rows
    corpus_tokens: int | None = None  # kept of the corpus; None: what training reads, once, and evaluation
    evaluation_windows: int = 128  # the last ones of the corpus, never trained on
    evaluate_every: int = 500  # steps
    micro_batch: int = 8  # windows at a time on each GPU; gradients of batch / (GPUs x micro_batch) are added
    precision: str = "float32"  # | bfloat16
    compile: bool = False  # torch.compile each attention and MLP
    recompute: bool | None = None  # attention, in the backward pass; None: compiled composed attention
    shard: str = "full"  # over GPUs: weights and moments; "none": every GPU holds all
    device: str = "auto"
    trial_steps: int = 3  # timed before training; 0: none
    check_memory: bool = True  # refuse what the estimate says cannot fit
    device_memory_gb: float | None = None  # None: what the device has
    checkpoint_every: int = 250  # steps
    cache: str | None = None  # folder of token files, shared by runs; None: build/tokens
    keep: bool = False  # keep the checkpoint in build/large, for `lib.distributed.load_trained`

    def __post_init__(self):
        for name in (*COUNTS, "trial_steps"):
            value, least = getattr(self, name), int(name != "trial_steps")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("shard", self.shard, SHARDS)
        check_choice("device", self.device, DEVICES)
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch must be a multiple of micro_batch: batch={self.batch}, micro_batch={self.micro_batch}"
            )
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share is between 0 and 1, got {self.warmup_share}")
        for name in ("windows", "betas"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON brings lists
        Corpus(source=self.corpus)
        self.config(vocab=64)
        self.plan()

    def config(self, *, vocab: int) -> TransformerConfig:
        """The shape; the vocabulary is rounded up to a multiple of 64, which matrix units take faster."""
        composed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name[:3] == "dc_"}
        return TransformerConfig(
            vocab=-(-vocab // 64) * 64, d_model=self.d_model, n_heads=self.n_heads, n_layers=self.L,
            d_mlp=self.d_mlp, norm="rms", activation="swiglu", positions="rope", rope_base=self.rope_base,
            tied=self.tied, mlp_bias=False, attention=self.attention, windows=self.windows,
            qk_norm=self.qk_norm, **composed,
        )  # fmt: skip

    def plan(self) -> Optimizer:
        """AdamW; the rate rises over the warm-up, then falls to `floor`, reached at the last step."""
        kind = Cosine if self.schedule == "cosine" else Optimizer
        return kind(
            adamw_lr=self.adamw_lr, betas=self.betas, decay=self.decay, clip=self.clip,
            warmup=round(self.warmup_share * self.steps), hold=0.0, floor=self.floor,
        )  # fmt: skip

    @property
    def recomputes(self) -> bool:
        """Whether attention is computed again. Compiled, DCMHA keeps some 8 numbers a head and token pair,
        uncompiled none: there it computes its blocks again by itself."""
        return self.attention == "dcmha" and self.compile if self.recompute is None else self.recompute

    def micro_batches(self, ranks: int) -> int:
        """Parts whose gradients a rank adds up. ValueError if the batch does not divide."""
        if self.batch % (ranks * self.micro_batch):
            raise ValueError(
                f"a batch of {self.batch} windows does not divide into {ranks} process(es) x "
                f"{self.micro_batch} windows at a time; give a multiple of {ranks * self.micro_batch}"
            )
        return self.batch // (ranks * self.micro_batch)

    def tokens_kept(self) -> int:
        """Tokens that the token file holds: what training and evaluation read, each once, or as asked."""
        return self.corpus_tokens or (self.steps * self.batch + self.evaluation_windows) * self.T + 1


@dataclass(frozen=True, kw_only=True)
class Cosine(Optimizer):
    """AdamW with the schedule of the published runs: linear warm-up, then half a cosine down to `floor`."""

    def factor(self, step: int, steps: int) -> float:
        """
        >>> plan = Cosine(warmup=2, floor=0.1)
        >>> [round(plan.factor(t, 10), 3) for t in range(10)]
        [0.5, 1.0, 0.966, 0.868, 0.722, 0.55, 0.378, 0.232, 0.134, 0.1]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup + 1) / max(1, steps - self.warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def train_large(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One language model. Settings: the fields of `LargeSettings`. One row:

    loss_nats, perplexity: on the held-out windows, after training. untrained_loss_nats: on the first batch.
    loss_curve: [steps done, nats] at each evaluation. training_loss_nats: mean over the last 50 steps.
    tokens_trained, epochs (how often each window was read), corpus_windows, corpus_sha256 of the token file,
    vocabulary; parameters, in all and by part; step0_hash, weights_hash, seeds.
    estimates: of `estimate_large` and of the timed trial. These alone differ from one run to the next.
    Models of one seed are paired: the same windows in the same order, whatever the attention.
    Raises ValueError, FileNotFoundError, ImportError or ConnectionError before training: see `token_file`,
    `load_tokenizer` and `check_fits`; what `fit_distributed` raises, in training.
    """
    chosen = read_settings(LargeSettings, settings)
    tokenizer = load_tokenizer(chosen.tokenizer)
    device = own_device(chosen.device)
    check_precision(chosen.precision, device)
    join(device)
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    micro_batches = chosen.micro_batches(ranks)
    config = chosen.config(vocab=tokenizer.get_vocab_size())
    found = estimate_large(chosen, config, ranks=ranks, device=device)
    if first:
        print(report(found), flush=True)
    if chosen.check_memory:
        check_fits(found, chosen)
    tokens = _tokens(chosen, tokenizer, progress=first and sys.stderr.isatty())
    n = n_windows(tokens.ids, chosen.T) - chosen.evaluation_windows  # of training
    if n < chosen.batch:
        raise ValueError(
            f"the corpus {chosen.corpus} is too short: {len(tokens.ids)} tokens are {max(0, n)} windows of "
            f"T={chosen.T} besides the {chosen.evaluation_windows} of evaluation, and a batch takes "
            f"{chosen.batch}; give a longer corpus, a smaller batch or shorter windows"
        )
    seeds = seeds_by_role(seed)

    def batch(step: int) -> Tensor:
        return window_batch(tokens.ids, step, seed=seeds["order"], size=chosen.batch, T=chosen.T, n=n)

    def new_model() -> Transformer:
        return _prepared(Transformer(config, seed=seeds["init"]), chosen)

    def fit(model: Transformer, batch, **changes):
        common = {
            "steps": chosen.steps, "optimizer": chosen.plan(), "micro_batches": micro_batches,
            "shard": chosen.shard, "precision": chosen.precision, "device": device.partition(":")[0],
            "progress": False,
        }  # fmt: skip
        return fit_distributed(model, loss, batch, **common | changes)

    if chosen.trial_steps:
        found |= timed(chosen, new_model, fit, batch, device=device)
        if first:
            print(report(found, trial=True), flush=True)
    held_out = range(n, n + chosen.evaluation_windows)
    measure = evaluation(tokens.ids, held_out, chosen)
    model = new_model()
    history = fit(
        model,
        batch,
        evaluate=measure,
        evaluate_every=min(chosen.evaluate_every, chosen.steps),
        checkpoint=_folder(chosen, seed, scratch),
        checkpoint_every=chosen.checkpoint_every,
        identity={"settings": _identity(chosen), "seed": seed, "tokens": tokens.sha256},
        progress=sys.stderr.isatty(),
    )
    final, counted = history.evaluations[-1][1]["loss"], transformer_parameters(config)
    return {
        "loss_nats": final,
        "perplexity": math.exp(min(final, 700.0)),
        "untrained_loss_nats": history.loss[0],
        "loss_curve": [[step, scores["loss"]] for step, scores in history.evaluations],
        "training_loss_nats": float(np.mean(history.loss[-50:])),
        "tokens_trained": chosen.steps * chosen.batch * chosen.T,
        "epochs": chosen.steps * chosen.batch / n,
        "corpus_windows": n,
        "corpus_sha256": tokens.sha256,
        "vocabulary": config.vocab,
        "parameters": counted.pop("total"),
        **{f"{part}_parameters": count for part, count in counted.items()},
        "step0_hash": history.step0,
        "weights_hash": weights_hash(model),
        "estimates": found,
        "seeds": seeds,
    }


def loss(model: Transformer, windows: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats; the logits in float32. windows: (B, T + 1)."""
    logits = model(windows[:, :-1])  # (B, T, V)
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def evaluation(ids: np.ndarray, held_out: range, chosen: LargeSettings):
    """evaluate(model, step) for `fit_distributed`: the mean loss of the held-out windows, on every rank."""

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        device, total = next(model.parameters()).device, 0.0
        for at in range(0, len(held_out), chosen.micro_batch):
            part = windows(ids, held_out[at : at + chosen.micro_batch], chosen.T).to(device)
            total += loss(model, part).item() * len(part)
        return {"loss": total / len(held_out)}

    return evaluate


def weights_hash(model: Transformer) -> str:
    """SHA-256 over names and bytes of all weights, gathered from all ranks."""
    digest = hashlib.sha256()
    for name, weight in sorted(get_model_state_dict(model).items()):
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        digest.update(f"{name} {tuple(whole.shape)}\n".encode())
        digest.update(whole.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _prepared(model: Transformer, chosen: LargeSettings) -> Transformer:
    """Compile what the sublayers compute, and have attention computed again in the backward pass, as asked.

    FSDP gathers weights around a sublayer's forward, so graphs stay whole; layers of one shape share them.
    """
    for layer in model.layers:
        for sublayer in (layer.attention, layer.mlp):
            if chosen.compile:
                sublayer.forward = torch.compile(sublayer.forward)
        if chosen.recomputes:
            layer.attention.forward = partial(
                checkpoint, layer.attention.forward, use_reentrant=False, preserve_rng_state=False
            )
    return model


def _tokens(chosen: LargeSettings, tokenizer, *, progress: bool) -> Tokens:
    corpus = Corpus(
        source=chosen.corpus, subset=chosen.subset, split=chosen.split, column=chosen.column,
        end_of_text=chosen.end_of_text,
    )  # fmt: skip
    folder = BUILD / "tokens" if chosen.cache is None else Path(chosen.cache).expanduser()
    return token_file(corpus, tokenizer, n_tokens=chosen.tokens_kept(), folder=folder, progress=progress)


def _identity(chosen: LargeSettings) -> dict:
    """What makes a run this one. The corpus is known by the digest of its tokens, wherever it lies."""
    return {name: value for name, value in asdict(chosen).items() if name not in (*MACHINE, "corpus")}


def _folder(chosen: LargeSettings, seed: int, scratch: Path | None) -> Path | None:
    """Where the checkpoint goes: kept in build/large, or in scratch, which a sweep removes after the run."""
    if chosen.keep:
        name = json.dumps([_identity(chosen), chosen.corpus, seed], sort_keys=True)
        return BUILD / "large" / f"{chosen.attention}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return None if scratch is None else Path(scratch) / "checkpoint"


def main(arguments: list[str] | None = None) -> None:
    """The command line: one run, or its estimate."""
    parser = argparse.ArgumentParser(prog="python -m lib.experiments.large_language")
    parser.add_argument("settings", type=Path, help="a JSON file: fields of LargeSettings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="checkpoint and row.json; the same command goes on there")
    parser.add_argument("--estimate", action="store_true", help="what it would take; trains nothing")
    parser.add_argument("--ranks", type=int, default=1, help="processes (GPUs) that --estimate is for")
    asked = parser.parse_args(arguments)
    settings = json.loads(asked.settings.read_text())
    if asked.estimate:
        chosen = read_settings(LargeSettings, settings)
        config = chosen.config(vocab=load_tokenizer(chosen.tokenizer).get_vocab_size())
        device = "cuda" if chosen.device == "auto" else chosen.device
        print(report(estimate_large(chosen, config, ranks=asked.ranks, device=device)))
        return
    row = train_large(settings, seed=asked.seed, scratch=asked.folder)
    if dist.get_rank() == 0:
        print(json.dumps(row, indent=1))
    if asked.folder:
        on_rank_0(lambda: (asked.folder / "row.json").write_text(json.dumps(row, indent=1)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
