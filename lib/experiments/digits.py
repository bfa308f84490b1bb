"""Small Transformers that read handwritten digits, with plain, wider, fixedly mixed and composed heads.

A vision Transformer in miniature: 8 x 8 pixels in patches, learned positions, attention in both directions,
the answer read at a class token. Its size is that of a toy, about 0.1 M weights on 1,000 images; it says
whether composed heads help *here*, and nothing about images of a useful size.

Arms: "mha"; "wide-mlp" and "wide-heads", plain heads with as many weights as "dcmha" has, spent on hidden
units or on wider heads; "static" (talking heads: one fixed mixture before the softmax, one after); "dcmha".
Models of one seed see the same images in the same order, and begin with the same embeddings and first heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.recipe import read_settings
from lib.metrics.intervals import Interval, bootstrap
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.tasks.digits import CLASSES, LEVELS, TRAIN, Digits, Images, epoch_rows
from lib.training import fit, seeds_by_role

ARMS = ("mha", "wide-mlp", "wide-heads", "static", "dcmha")
STATIC = {"dc_query_side": False, "dc_key_side": False, "dc_gates": False, "dc_static": True}
READ = slice(-1, None)  # the class token


@dataclass(frozen=True, kw_only=True)
class DigitsSettings:
    """L layers of width d_model on patches of `patch` x `patch` pixels; steps x batch images are seen.

    d_mlp and the width of a head are those of "mha", "static" and "dcmha"; the two wide arms spend what the
    dynamic weights of "dcmha" cost; d_mlp=0 is attention only. Nothing is chosen by validation images: there
    is no early stop, and the last weights are judged.
    """

    arm: str
    L: int
    d_model: int
    n_heads: int
    d_mlp: int
    steps: int
    batch: int
    patch: int = 2
    dc_rank: int = 2
    adamw_lr: float = 1e-3
    decay: float = 0.05  # of AdamW
    warmup: int = 30  # steps; the rate falls linearly over the second half
    evaluate_every: int = 100  # steps
    device: str = "cpu"

    def __post_init__(self):
        check_choice("arm", self.arm, ARMS)
        counts = ("L", "d_model", "n_heads", "d_mlp", "steps", "batch", "dc_rank", "evaluate_every")
        for name in counts:
            value, least = getattr(self, name), 0 if name == "d_mlp" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")
        if self.arm == "wide-mlp" and not self.d_mlp:
            raise ValueError("arm 'wide-mlp' widens an MLP, so d_mlp is at least 1; or take 'wide-heads'")
        if self.batch > TRAIN:
            raise ValueError(f"a batch holds at most the {TRAIN} training images, got batch={self.batch}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model: d_model={self.d_model}, n_heads={self.n_heads}")
        Digits(self.patch)

    @property
    def dynamic_weights(self) -> int:
        """Weights a layer that "dcmha" has more than "mha": four sides of D 2RH + (2RH)² + D H."""
        D, H, K = self.d_model, self.n_heads, 2 * self.dc_rank * self.n_heads
        return 4 * (D * K + K * K + D * H)

    def config(self) -> TransformerConfig:
        """The shape of this arm's model."""
        task, D, H = Digits(self.patch), self.d_model, self.n_heads
        d_mlp, d_head = self.d_mlp, D // H
        if self.arm == "wide-mlp":
            d_mlp += round(self.dynamic_weights / (2 * D + 1))  # a hidden unit: D in, D out, a bias
        elif self.arm == "wide-heads":
            d_head += round(self.dynamic_weights / (4 * D * H))  # one more coordinate of Q, K, V, O a head
        composed = {"attention": "dcmha", "dc_rank": self.dc_rank} if self.arm in ("static", "dcmha") else {}
        return TransformerConfig(
            vocab=task.vocab, n_logits=CLASSES, d_model=D, n_heads=H, n_layers=self.L, d_mlp=d_mlp,
            d_head=d_head, norm="rms", activation="gelu", positions="learned", max_tokens=task.length,
            causal=False, readout_bias=True, **composed, **(STATIC if self.arm == "static" else {}),
        )  # fmt: skip


def train_digits(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One model trained on 1,000 images, judged on 797 others. Settings: of `DigitsSettings`. One row:

    accuracy, loss_nats, wrong_images: on the validation images after the last step, and the places of those
    it got wrong, from which `difference` pairs models image by image; train_accuracy; untrained_accuracy;
    curve [[steps, accuracy], ...] on the validation images; final_loss: mean of the last 50 steps, nats;
    linear_accuracy, linear_wrong_images: multinomial logistic regression on the pixels of the same split;
    neighbour_accuracy: the label of the nearest training image; majority: share of the commonest label;
    n_images, tokens_per_image, parameters, layer_parameters (all layers), step0_hash, seeds.
    """
    chosen = read_settings(DigitsSettings, settings)
    task, seeds, device = Digits(chosen.patch), seeds_by_role(seed), resolve_device(chosen.device)
    train, judged = task.split("train"), task.split("validation")
    tokens = task.tokens(train.pixels)
    model = untrained_model(chosen, seed=seeds["init"]).to(device)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = epoch_rows(step, seed=seeds["order"], size=chosen.batch)
        return tokens[at], train.label[at]

    def loss(model: Transformer, images: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(images[0], rows=READ)[:, 0], images[1])

    untrained = _judge(model, task, judged)
    history = fit(
        model,
        loss,
        batch,
        steps=chosen.steps,
        optimizer=Optimizer(adamw_lr=chosen.adamw_lr, decay=chosen.decay, warmup=chosen.warmup),
        evaluate=lambda model, step: {"accuracy": _judge(model, task, judged)["accuracy"]},
        evaluate_every=chosen.evaluate_every,
        checkpoint=None if scratch is None else Path(scratch) / "checkpoint",
        checkpoint_every=25,
        identity={"settings": dataclasses.asdict(chosen), "seed": seed},
        device=device,
        progress=False,
    )
    model.eval()
    last = history.loss[-50:]
    return {
        **_judge(model, task, judged),
        "train_accuracy": _judge(model, task, train)["accuracy"],
        "untrained_accuracy": untrained["accuracy"],
        "curve": [[step, score] for step, score in history.curve("accuracy")],
        "final_loss": sum(last) / len(last),
        **baselines(),
        "n_images": len(judged.label),
        "tokens_per_image": task.length,
        "parameters": model.n_parameters(),
        "layer_parameters": sum(p.numel() for p in model.layers.parameters()),
        "step0_hash": history.step0,
        "seeds": seeds,
    }


@torch.no_grad()
def untrained_model(chosen: DigitsSettings, *, seed: int) -> Transformer:
    """The model of an arm at step 0. Its patch embedding starts linear: value v of a pixel is v/16 of 16.

    A table drawn entry by entry knows of no order among the 17 values: with it a pilot stayed ten points of
    accuracy behind, below a linear classifier. In all else the arms of a seed begin alike, wherever their
    weights have the same shape.
    """
    model = Transformer(chosen.config(), seed=seed)
    rows = model.embedding.weight.view(chosen.patch**2, LEVELS + 1, chosen.d_model)
    rows[:, :LEVELS] = torch.arange(LEVELS)[:, None] / (LEVELS - 1) * rows[:, LEVELS - 1 : LEVELS].clone()
    return model


def difference(ours: Sequence[Mapping], baseline: Sequence[Mapping], *, seed: int) -> dict:
    """Accuracy of `ours` minus that of `baseline`, rows of equal seeds in equal order.

    mean, and 95 % intervals. over_seeds: other initial weights and orders, the same images;
    over_images: other images, the same models; over_both: both resampled, independently. At least 3 rows.
    """
    if [row["seeds"] for row in ours] != [row["seeds"] for row in baseline]:
        raise ValueError("the rows are no pairs: their seeds differ, or come in another order")
    D = correct(ours) - correct(baseline)  # (S, n)
    S, n = D.shape
    rng, draws = np.random.default_rng(seed), 4000
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=draws) / S
    images = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    both = np.quantile(((seeds @ D) * images).sum(axis=1), [0.025, 0.975])
    return {
        "mean": float(D.mean()),
        "over_seeds": bootstrap(D.mean(axis=1), seed=seed),
        "over_images": bootstrap(D.mean(axis=0), seed=seed, resamples=draws),
        "over_both": Interval(*map(float, both)),
    }


def correct(rows: Sequence[Mapping]) -> np.ndarray:
    """Which images each row's model got right, from its `wrong_images`. -> (rows, images) of 0 and 1."""
    found = np.ones((len(rows), rows[0]["n_images"]))
    for i, row in enumerate(rows):
        found[i, row["wrong_images"]] = 0
    return found


@cache
def baselines() -> dict:
    """What needs no Transformer: a linear classifier (scikit-learn), the nearest image, the commonest label.

    Logistic regression on pixels / 16 with its default penalty; the nearest of the training images in
    Euclidean distance, the earliest of equals. Both deterministic.
    """
    from sklearn.linear_model import LogisticRegression  # here: scikit-learn takes a second to import

    train, judged = Digits().split("train"), Digits().split("validation")
    X, Y = (part.pixels.flatten(1).double() for part in (train, judged))
    fitted = LogisticRegression(max_iter=2000).fit(X.numpy() / 16, train.label.numpy())
    linear = torch.from_numpy(fitted.predict(Y.numpy() / 16)) == judged.label
    squares = X.square().sum(dim=1) - 2 * Y @ X.T  # of whole numbers: exact, so equals are equal
    nearest = train.label[squares.argmin(dim=1)] == judged.label
    return {
        "linear_accuracy": linear.double().mean().item(),
        "linear_wrong_images": (~linear).nonzero().flatten().tolist(),
        "neighbour_accuracy": nearest.double().mean().item(),
        "majority": judged.label.bincount().max().item() / len(judged.label),
    }


@torch.no_grad()
def _judge(model: Transformer, task: Digits, images: Images) -> dict:
    """accuracy, loss_nats and wrong_images of a model on some images."""
    device = next(model.parameters()).device
    parts = task.tokens(images.pixels).split(256)
    logits = torch.cat([model(part.to(device), rows=READ)[:, 0].double().cpu() for part in parts])
    right = logits.argmax(dim=1) == images.label
    return {
        "accuracy": right.double().mean().item(),
        "loss_nats": cross_entropy(logits, images.label).item(),
        "wrong_images": (~right).nonzero().flatten().tolist(),
    }
