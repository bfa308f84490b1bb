"""Language models with and without composition of their heads, matched by weights, arithmetic or time.

    train_composed({"arm": "dcmha", "L": 2, "d_model": 64, "n_heads": 8, ...}, seed=0)

Decoders with RMSNorm, RoPE, a GELU MLP without biases and an untied readout read the novels of
`lib.tasks.text` in its 1,024 tokens. An arm changes the attention, or the MLP to match an arm that does.
All arms of a seed read the same windows in the same order, are judged on the same text, and begin with the
same weights wherever these have the same shape, so that their losses are compared pair by pair.

Time is matched on the page: a row's steps are a setting and its core-seconds are recorded beside it.
Source of the module and of the ablated parts: Xiao et al. 2024; of "lightweight", composition after the
softmax without gates: modded-nanogpt pull request 315. Sizes, text and matching are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.probes import spread
from lib.experiments.recipe import read_settings
from lib.metrics.attention_cost import training_flops, transformer_flops, transformer_parameters
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.tasks import text
from lib.training import fit, seeds_by_role

ARMS: dict[str, dict] = {  # what differs from softmax attention, as fields of TransformerConfig
    "mha": {},
    "mha_parameters": {},  # its MLP is widened until it has as many weights as "dcmha"
    "mha_flops": {},  # the same, until a token costs as many FLOPs
    "dcmha": {"attention": "dcmha"},
    "pre_only": {"attention": "dcmha", "dc_post": False},
    "post_only": {"attention": "dcmha", "dc_pre": False},
    "query_only": {"attention": "dcmha", "dc_key_side": False},
    "key_only": {"attention": "dcmha", "dc_query_side": False},
    "no_gates": {"attention": "dcmha", "dc_gates": False},
    "rank_1": {"attention": "dcmha", "dc_rank": 1},
    "rank_4": {"attention": "dcmha", "dc_rank": 4},
    "with_static": {"attention": "dcmha", "dc_static": True},
    "static": {
        "attention": "dcmha", "dc_static": True, "dc_query_side": False, "dc_key_side": False,
        "dc_gates": False,
    },
    "lightweight": {"attention": "dcmha", "dc_pre": False, "dc_gates": False},
}  # fmt: skip
MATCHED = 0.01  # largest relative mismatch of weights or FLOPs
POINTS = 10  # of the loss curve, at even distances
BLOCKS = 16  # stretches of the validation text, for intervals over text
BIGRAM_PRIOR = 50.0  # tokens of the unigram distribution that each bigram row is mixed with
AT_ONCE = 8192  # tokens measured at once: bounded memory


@dataclass(frozen=True, kw_only=True)
class ComposedSettings:
    """One arm of L layers with n_heads heads on windows of T tokens. steps x batch x T tokens are read."""

    arm: str
    L: int
    d_model: int
    n_heads: int
    d_mlp: int  # of "mha" and every composed arm; the matched arms widen it
    T: int  # tokens a window
    batch: int  # windows a step
    steps: int  # a multiple of 10: the curve has 10 points
    windows: tuple[int | None, ...] = (None,)  # keys a query reads, by layer, repeated: (64, None) is "LG"
    qk_norm: bool = False
    adamw_lr: float = 1e-2
    composition_lr: float = 2e-3  # of the weights that only composed arms have; see `SlowComposition`
    warmup: int = 50  # steps; the rates fall linearly over the second half
    curve_windows: int = 64  # windows of validation text that the curve is measured on
    final_windows: int | None = None  # of the final loss; None: all
    device: str = "cpu"

    def __post_init__(self):
        check_choice("arm", self.arm, ARMS)
        for name in ("L", "d_model", "n_heads", "d_mlp", "T", "batch", "steps", "curve_windows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
        if self.steps % POINTS:
            raise ValueError(f"steps is a multiple of {POINTS}, the points of the curve; got {self.steps}")
        if self.final_windows is not None and not self.final_windows >= BLOCKS:
            raise ValueError(
                f"final_windows is at least {BLOCKS}, a window for each stretch of the text, or None for all "
                f"windows; got {self.final_windows}"
            )
        for name in ("adamw_lr", "composition_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not isinstance(self.warmup, int) or isinstance(self.warmup, bool) or self.warmup < 0:
            raise ValueError(f"warmup is a whole number of at least 0, got {self.warmup!r}")
        object.__setattr__(self, "windows", tuple(self.windows))  # JSON brings a list
        self.config()  # a shape that cannot be, or be matched, is refused here

    def config(self) -> TransformerConfig:
        """The shape of this arm. ValueError where its MLP cannot be widened to match within 1 %."""
        return config_of(self, self.arm)

    def plan(self) -> Optimizer:
        """AdamW (0.9, 0.98) without decay, gradients clipped at 1."""
        return SlowComposition(adamw_lr=self.adamw_lr, composition_lr=self.composition_lr, warmup=self.warmup)


@dataclass(frozen=True, kw_only=True)
class SlowComposition(Optimizer):
    """AdamW with a learning rate of its own for the weights that compose heads.

    These start near 0 and move every head's scores at once: at a rate that suits the other matrices of so
    small a model they throw training back (measured on seeds that no result uses).
    """

    composition_lr: float = 1e-2

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Two AdamW, or one for a model without composition; schedules and all else alike."""
        named = dict(model.named_parameters())
        composing = [name for name in named if ".pre." in name or ".post." in name]
        parts = (
            ([p for n, p in named.items() if n not in composing], self.adamw_lr),
            ([named[n] for n in composing], self.composition_lr),
        )
        built = [
            torch.optim.AdamW(weights, lr=lr, betas=self.betas, weight_decay=self.decay, fused=True)
            for weights, lr in parts
            if weights
        ]
        for part in built:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]
        return built


def config_of(chosen: ComposedSettings, arm: str) -> TransformerConfig:
    """The shape of any arm at these sizes."""
    plain = TransformerConfig(
        vocab=text.VOCAB, d_model=chosen.d_model, n_heads=chosen.n_heads, n_layers=chosen.L,
        d_mlp=chosen.d_mlp, norm="rms", activation="gelu", positions="rope", mlp_bias=False,
        windows=chosen.windows, qk_norm=chosen.qk_norm,
    )  # fmt: skip
    if arm not in ("mha_parameters", "mha_flops"):
        return dataclasses.replace(plain, **ARMS[arm])
    measure = {
        "mha_parameters": lambda config: transformer_parameters(config)["total"],
        "mha_flops": lambda config: flops_per_window(config, chosen.T),
    }[arm]
    goal = measure(dataclasses.replace(plain, **ARMS["dcmha"]))
    unit = measure(dataclasses.replace(plain, d_mlp=chosen.d_mlp + 1)) - measure(plain)
    wider = dataclasses.replace(plain, d_mlp=chosen.d_mlp + round((goal - measure(plain)) / unit))
    if abs(measure(wider) / goal - 1) >= MATCHED:
        raise ValueError(
            f"{arm}: the nearest MLP, {wider.mlp_width} wide, gives {measure(wider):,.0f} for "
            f"{goal:,.0f} of dcmha, more than {MATCHED:.0%} off; choose a larger model"
        )
    return wider


def flops_per_window(config: TransformerConfig, T: int) -> int:
    """FLOPs of a forward pass on T tokens: low-rank composition, and only the pairs that are allowed."""
    return transformer_flops(config, T, form="low_rank", pairs="allowed")["total"]


def train_composed(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Train one arm. Settings: the fields of `ComposedSettings`. One row:

    loss_nats: mean cross-entropy a token on the validation split; loss_nats_per_character: the same a
    character; block_losses: means over 16 consecutive stretches of it, whose block_tokens count.
    measured_at, loss_curve: 10 steps, and the loss after them on curve_windows windows of validation text;
    untrained_loss: the same before the first; training_loss: mean over the last tenth of the steps.
    parameters; layer_parameters (without embedding and readout); attention_parameters; mlp_width.
    flops_per_token (forward, allowed pairs only), training_flops (3 times that, for all tokens trained on),
    tokens_trained, tokens_measured.
    loss_unigram, loss_bigram: of counts on the training split, the bigram mixed with the unigram.
    step0_hash, weights_hash, seeds.
    """
    chosen = read_settings(ComposedSettings, settings)
    seeds, device, every = seeds_by_role(seed), resolve_device(chosen.device), chosen.steps // POINTS
    tokens, final = text.austen_tokens("train"), validation_windows(chosen.T, chosen.final_windows)
    curve = validation_windows(chosen.T, chosen.curve_windows)
    model = untrained(chosen, seed=seeds["init"]).to(device)
    before = window_losses(model, curve).mean().item()

    def batch(step: int) -> Tensor:
        return text.batch(tokens, step, seed=seeds["data"], size=chosen.batch, T=chosen.T)

    def loss(model: Transformer, windows: Tensor) -> Tensor:
        return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        """`fit` ranks by the first score: the latest weights count as the best."""
        return {"step": step, "loss": window_losses(model, curve).mean().item()}

    history = fit(
        model,
        loss,
        batch,
        steps=chosen.steps,
        optimizer=chosen.plan(),
        evaluate=evaluate,
        evaluate_every=every,
        checkpoint=None if scratch is None else Path(scratch) / "checkpoint",
        checkpoint_every=every,
        identity={"settings": dataclasses.asdict(chosen), "seed": seed},
        device=device,
        progress=False,
    )
    losses = window_losses(model.eval(), final)  # (n,)
    parts = losses.tensor_split(BLOCKS)
    size, flops = transformer_parameters(model.config), flops_per_window(model.config, chosen.T)
    windows_trained = chosen.steps * chosen.batch
    return {
        "loss_nats": losses.mean().item(),
        "loss_nats_per_character": losses.mean().item() * _tokens_per_character(),
        "block_losses": [part.mean().item() for part in parts],
        "block_tokens": [len(part) * chosen.T for part in parts],
        "measured_at": [step for step, _ in history.evaluations],
        "loss_curve": [scores["loss"] for _, scores in history.evaluations],
        "untrained_loss": before,
        "training_loss": sum(history.loss[-every:]) / every,
        "parameters": model.n_parameters(),
        "layer_parameters": size["attention"] + size["mlp"] + size["norms"],
        "attention_parameters": size["attention"],
        "mlp_width": model.config.mlp_width,
        "flops_per_token": flops / chosen.T,
        "training_flops": training_flops(flops * windows_trained),
        "tokens_trained": windows_trained * chosen.T,
        "tokens_measured": len(losses) * chosen.T,
        **references(),
        "step0_hash": history.step0,
        "weights_hash": model.weights_hash(),
        "seeds": seeds,
    }


def untrained(chosen: ComposedSettings, *, seed: int) -> Transformer:
    """The arm before training: what it shares with "mha" by name and shape has that model's weights."""
    model = Transformer(chosen.config(), seed=seed)
    plain = dict(Transformer(config_of(chosen, "mha"), seed=seed).named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in plain and plain[name].shape == weight.shape:
                weight.copy_(plain[name])
    return model


def validation_windows(T: int, n: int | None = None) -> Tensor:
    """n windows (None: all) of the validation split, evenly spread: (n, T + 1), T inputs and T targets.

    Windows overlap by one token, so each token but the first is a target once; a rest of < T is left out.
    """
    windows = text.austen_tokens("validation").unfold(0, T + 1, T)
    return windows if n is None else windows[spread(len(windows), n)]


@torch.no_grad()
def window_losses(model: Transformer, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each window: (n, T + 1) -> (n,) float64, on the CPU."""
    device, found = next(model.parameters()).device, []
    for part in windows.split(max(1, AT_ONCE // windows.shape[1])):
        part = part.to(device)
        logits = model(part[:, :-1])  # (n, T, V)
        each = cross_entropy(logits.mT, part[:, 1:], reduction="none")  # (n, T)
        found.append(each.double().mean(dim=1).cpu())
    return torch.cat(found)


@cache
def references() -> dict[str, float]:
    """Nats a token, on the validation split, of guesses from counts n of the training split.

    Unigram: p(b) = (n_b + 1) / (Σ n + V). Bigram: p(b | a) = (n_ab + 50 p(b)) / (n_a + 50).
    """
    V, train, judged = text.VOCAB, text.austen_tokens("train"), text.austen_tokens("validation")
    p = torch.bincount(train, minlength=V).double() + 1
    p /= p.sum()
    pairs = torch.bincount(train[:-1] * V + train[1:], minlength=V * V).view(V, V).double()
    bigram = (pairs + BIGRAM_PRIOR * p) / (pairs.sum(dim=1, keepdim=True) + BIGRAM_PRIOR)
    return {
        "loss_unigram": -p[judged[1:]].log().mean().item(),
        "loss_bigram": -bigram[judged[:-1], judged[1:]].log().mean().item(),
    }


@cache
def _tokens_per_character() -> float:
    characters = sum(len(block) for _, block in text.austen_blocks("validation"))
    return len(text.austen_tokens("validation")) / characters
