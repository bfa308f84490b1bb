"""Fine-tune a language model on another kind of text: do its layers become more linear?

Razzhigaev et al. 2024 (Table 1) report that fine-tuning always raises the score without the residual, with
their in-sample estimator. Here all estimators, with and without the residual, are measured before and after
on held-out text of both domains, the old ("home") and the new one, on the same tokens both times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.reading import check_whole, layer_streams, losses, windows
from lib.experiments.recipe import read_settings
from lib.metrics.linearity import ESTIMATORS, LinearityAccumulator
from lib.models import pretrained
from lib.models.transformer import Transformer
from lib.optimizers import Optimizer
from lib.tasks import text as corpus
from lib.tasks.arithmetic import Arithmetic, few_shot
from lib.training import fit, seeds_by_role

TEXTS = (*corpus.FILES, "arithmetic")
GROUPS = 8  # of neighbouring windows: held-out maps are fitted on every other one
LARGEST_KEPT = 20_000_000  # weights: a larger model leaves no checkpoint, which would cost more than steps
LINE = 8  # tokens, about the shortest line of arithmetic: so many lines are drawn at a time


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """steps x batch windows of `context` tokens of `text`; scores on `tokens` tokens of each text at most."""

    model: str  # "austen", "smollm2-135m", a path or a hub id
    text: str = "prose"  # trained on: "prose", "austen", "code", "arithmetic"
    home: str = "austen"  # measured beside it
    steps: int = 200
    batch: int = 8
    context: int = 128
    adamw_lr: float = 5e-4
    warmup: int = 10
    tokens: int = 8192
    reading_batch: int = 8  # windows in one pass when measuring: memory and speed, not results
    device: str = "cpu"

    def __post_init__(self):
        for name in ("text", "home"):
            check_choice("text", getattr(self, name), TEXTS)
        if self.text == self.home:
            raise ValueError(f"text and home are both {self.text!r}; fine-tuning needs a second domain")
        for name in ("steps", "batch", "context", "tokens", "reading_batch", "warmup"):
            check_whole(name, getattr(self, name), {"context": 2, "warmup": 0}.get(name, 1))
        if not 0 < self.adamw_lr < math.inf:
            raise ValueError(f"adamw_lr must be positive and finite, got {self.adamw_lr}")
        if self.tokens < GROUPS * self.context:
            raise ValueError(
                f"the scores need {GROUPS} windows: tokens >= {GROUPS} * context = {GROUPS * self.context}, "
                f"got tokens={self.tokens}"
            )
        resolve_device(self.device)


def finetune(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One model, fine-tuned. Settings: the fields of `FinetuneSettings`. One row:

    For each place, "home" or "new" (the text trained on; its held-out part), and each time, "before" or
    "after": <place>_loss_<time> in nats a token; <place>_<form>_<estimator>_<time>, lists over layers, form
    "with" or "without" (the residual), estimator "held_out", "adjusted" or "raw";
    <place>_norm_ratio_<time>, lists: centred Frobenius norms, what the layer adds / the stream after it.
    <place>_<form>_<estimator>_change: mean over layers, after minus before. n_layers, d_model, parameters,
    home_tokens, new_tokens (measured), training_tokens (different ones), tokens_trained, first_loss and
    last_loss (means over a tenth of the steps), step0_hash, weights_hash.
    """
    chosen = read_settings(FinetuneSettings, settings)
    seeds = seeds_by_role(seed)
    model = pretrained.load(chosen.model, device=resolve_device(chosen.device))
    tokenizer = pretrained.load_tokenizer(chosen.model)
    known = {"tokenizer": tokenizer, "context": chosen.context, "seed": seed, "vocab": model.config.vocab}
    held_out = {
        "home": read(chosen.home, part="evaluation", tokens=chosen.tokens, **known),
        "new": read(chosen.text, part="evaluation", tokens=chosen.tokens, **known),
    }
    check_enough(held_out, D=model.config.d_model)
    wanted = max(chosen.steps * chosen.batch, 3) * chosen.context
    training = read(chosen.text, part="fit", tokens=wanted, **known).flatten()
    row = {f"{place}_tokens": tokens.numel() for place, tokens in held_out.items()}
    row |= _measured(model, held_out, "before", batch=chosen.reading_batch)

    def batch(step: int) -> Tensor:
        return corpus.batch(training, step, seed=seeds["data"], size=chosen.batch, T=chosen.context)

    def loss(model: Transformer, tokens: Tensor) -> Tensor:
        return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    small = scratch is not None and model.n_parameters() <= LARGEST_KEPT
    model.requires_grad_(True)
    history = fit(
        model,
        loss,
        batch,
        steps=chosen.steps,
        optimizer=Optimizer(adamw_lr=chosen.adamw_lr, warmup=chosen.warmup),
        checkpoint=Path(scratch) / "checkpoint" if small else None,
        checkpoint_every=10,
        identity={"settings": dataclasses.asdict(chosen), "seed": seed},
        device=resolve_device(chosen.device),
        progress=False,
    )
    model.eval().requires_grad_(False)
    row |= _measured(model, held_out, "after", batch=chosen.reading_batch)
    tenth = max(1, chosen.steps // 10)
    return {
        **row,
        **_changes(row),
        "n_layers": model.config.n_layers,
        "d_model": model.config.d_model,
        "parameters": model.n_parameters(),
        "training_tokens": len(training),
        "tokens_trained": chosen.steps * chosen.batch * chosen.context,
        "first_loss": sum(history.loss[:tenth]) / tenth,
        "last_loss": sum(history.loss[-tenth:]) / tenth,
        "step0_hash": history.step0,
        "weights_hash": model.weights_hash(),
    }


def read(
    name: str, *, part: str, tokens: int, tokenizer: Tokenizer, context: int, seed: int, vocab: int
) -> Tensor:
    """At most `tokens` tokens of a text in windows, (n, context). part: "fit" or "evaluation".

    Arithmetic is drawn afresh, a line an expression of 1 to 3 operations with its answer; its two parts come
    from different seeds, and short expressions occur in both.
    """
    if name != "arithmetic":
        return windows(name, tokenizer, part=part, context=context, tokens=tokens, seed=seed, vocab=vocab)
    role = seeds_by_role(seed)["data" if part == "fit" else "evaluation"]
    ids = corpus.encode(arithmetic(tokens // LINE, seed=role), tokenizer)
    step = 1
    while len(ids) < tokens:
        ids = torch.cat([ids, corpus.encode(arithmetic(tokens // LINE, seed=role, step=step), tokenizer)])
        step += 1
    return corpus.chunks(ids, context)[: tokens // context]


def arithmetic(lines: int, *, seed: int, step: int = 0) -> str:
    """About `lines` solved expressions of 1, 2 and 3 operations in turn. A function of (seed, step) alone.

    >>> print(arithmetic(3, seed=0), end="")
    8 - 6 = 2
    8 + 6 + 5 = 19
    8 + 6 + 5 + 3 = 22
    """
    each = max(1, lines // 3)
    drawn = [Arithmetic(steps=k).questions(step, seed=seed, size=each) for k in (1, 2, 3)]
    return few_shot([question for three in zip(*drawn, strict=True) for question in three])


def check_enough(held_out: Mapping[str, Tensor], *, D: int) -> None:
    """ValueError unless half of the groups holds more tokens than a map of width D needs."""
    for place, tokens in held_out.items():
        smallest = (len(tokens) // GROUPS) * (GROUPS // 2) * tokens.shape[1]
        if smallest < D + 2:
            raise ValueError(
                f"{tokens.numel()} tokens of the {place} text are too few for a stream of width {D}: "
                f"{2 * (D + 2)} at the least in {GROUPS} equal groups, 10 * {D} are sensible"
            )


@torch.no_grad()
def layer_scores(model: Transformer, tokens: Tensor, *, batch: int) -> dict[str, list[float] | float]:
    """loss, <form>_<estimator> and norm_ratio, lists over layers. tokens: (n, T), n >= 8."""
    found: dict[str, list[float] | float] = {}
    parts = torch.arange(len(tokens)).tensor_split(GROUPS)
    for _, x, a, m in layer_streams(model, tokens, batch=batch):
        f = a + m
        sums = LinearityAccumulator(1, x.shape[-1], groups=GROUPS, directions=False, device=x.device)
        for group, part in enumerate(parts):
            sums.add_layer(0, x[part], f[part], group)
        for residual, form in ((True, "with"), (False, "without")):
            for estimator in ESTIMATORS:
                value = float(sums.scores(estimator, residual=residual))
                found.setdefault(f"{form}_{estimator.replace('-', '_')}", []).append(value)
        found.setdefault("norm_ratio", []).append(float(sums.norm_ratio()))
        last = x + f
    return {"loss": losses(model, last, tokens).mean().item(), **found}


def _measured(model: Transformer, held_out: Mapping[str, Tensor], when: str, *, batch: int) -> dict:
    found = {}
    for place, tokens in held_out.items():
        for name, value in layer_scores(model, tokens, batch=batch).items():
            found[f"{place}_{name}_{when}"] = value
    return found


def _changes(row: Mapping) -> dict[str, float]:
    """Mean over layers of after minus before, for every score."""
    found = {}
    for name, after in row.items():
        if name.endswith("_after") and isinstance(after, list):
            stem = name.removesuffix("_after")
            before = row[f"{stem}_before"]
            found[f"{stem}_change"] = sum(a - b for a, b in zip(after, before, strict=True)) / len(after)
    return found
