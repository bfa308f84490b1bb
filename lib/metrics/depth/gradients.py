"""Integrated gradients: how much each token's state at each layer adds to the probability of an answer.

Along the straight line from a baseline b to the states x, both at one layer, all tokens at once:

    attribution[t] = Σ_D (x − b)[t] · (1/n) Σ_i ∂F(b + r_i (x − b))/∂state[t], b (D) = mean of x over tokens,

F = Σ of the probabilities of the gold answer tokens, teacher forced; Σ_t attribution[t] → F(x) − F(b).

Sources: baseline, target and left sums of Csordás, Manning and Potts 2025 (facts C.1 #7). The midpoint rule:
its error falls with n² instead of n where the activation is smooth (derived).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.metrics.depth.pooled import full
from lib.metrics.depth.prompts import check_prompts
from lib.models.inputs import found
from lib.models.interventions import SUBLAYERS
from lib.models.transformer import Transformer

RULES = {"left": 0.0, "midpoint": 0.5}  # r_i = (i + offset) / steps, i = 0 … steps − 1


@dataclass(frozen=True, eq=False)
class Attribution:
    """Integrated gradients of one prompt with its answer; T tokens, the answer's included."""

    values: Tensor  # (layers, T): probability added by each token's state
    layers: tuple[int, ...]
    answer_value: float  # F(x): of the prompt as it is, between 0 and the number of answer tokens
    baseline_value: Tensor  # (layers,): F(b), with every token's state the mean
    prompt_length: int  # tokens before the answer

    @property
    def gap(self) -> Tensor:
        """(layers,): Σ_t values − (F(x) − F(b)), the error of the sum; 0 as the steps grow."""
        return self.values.sum(dim=1) - (self.answer_value - self.baseline_value)


def integrated_gradients(
    model: Transformer,
    tokens: Tensor,
    answer: Tensor,
    *,
    steps: int = 256,
    sublayer: str | None = None,
    batch: int = 16,
    layers: Sequence[int] | None = None,
    rule: str = "left",
) -> Attribution:
    """Attribution of the answer's probability to the states of every token after each layer.

    tokens, answer: (T_p,) and (A,) long; the model reads both, T = T_p + A, and the baseline is the mean over
              all T tokens.
    sublayer: None takes the stream after the layer, "attention" or "mlp" what that sublayer adds to it.
    steps:    points of the sum, `batch` of them in one pass, which starts at the layer from the clean states.
    rule:     "left" (r_i = i/steps, the paper's) or "midpoint". layers: all by default.
    Cost: steps · (later layers) forwards and backwards for each layer. Weights get no gradient.
    ValueError for inputs that do not fit, and for a model whose output is not finite.
    """
    check_choice("rule", rule, RULES)
    if sublayer is not None:
        check_choice("sublayer", sublayer, SUBLAYERS)
    for name, count in (("steps", steps), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name} is at least 1, got {count}")
    for name, part in (("tokens", tokens), ("answer", answer)):
        if not isinstance(part, Tensor) or part.dtype != torch.long or part.dim() != 1 or not len(part):
            raise ValueError(f"{name} must be torch.long (T,), not empty; got {found(part)}")
    L = model.config.n_layers
    chosen = tuple(range(L)) if layers is None else tuple(int(l) for l in layers)
    if not chosen or not all(0 <= l < L for l in chosen):
        raise ValueError(f"layers are 0 to {L - 1}, one or more; got {layers}")
    sequence = torch.cat([tokens, answer])
    check_prompts(model, [sequence])
    if int(answer.max()) >= model.config.n_out:
        raise ValueError(f"answer tokens are entries 0 to {model.config.n_out - 1} of the readout")

    device = model.embedding.weight.device
    sequence, answer = sequence.to(device), answer.to(device)
    rows = torch.arange(len(tokens) - 1, len(sequence) - 1, device=device)  # these predict the answer
    with torch.no_grad():
        before, outs = _clean(model, sequence)
        F = _answer_value(model.readout(before[-1][:, rows]), answer).item()
    points = (torch.arange(steps, dtype=torch.float64) + RULES[rule]) / steps
    values, baselines = [], []
    for l in chosen:
        a, m = outs[l]
        x = {None: before[l + 1], "attention": a, "mlp": m}[sublayer][0]  # (T, D)
        b = x.mean(dim=0)  # (D,): over tokens
        total = torch.zeros_like(x)
        for r in points.to(x).split(batch):
            state = (b + r[:, None, None] * (x - b)).requires_grad_()  # (n, T, D)
            value = _answer_value(_onwards(model, l, before[l], a, state, sublayer, rows), answer)
            total += torch.autograd.grad(value.sum(), state)[0].sum(dim=0)
        values.append(((x - b) * total / steps).sum(dim=-1))
        with torch.no_grad():
            at_baseline = b.expand(1, *x.shape)
            baselines.append(
                _answer_value(_onwards(model, l, before[l], a, at_baseline, sublayer, rows), answer)[0]
            )
    result = Attribution(
        values=torch.stack(values).cpu(),
        layers=chosen,
        answer_value=F,
        baseline_value=torch.stack(baselines).cpu(),
        prompt_length=len(tokens),
    )
    if not (result.values.isfinite().all() and result.baseline_value.isfinite().all()):
        raise ValueError("the model's output or its gradient is not finite: nothing can be attributed")
    return result


def _clean(model: Transformer, sequence: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """residual[0 … L], each (1, T, D), and what the two sublayers of each layer add."""
    h = model.embed(sequence[None])
    before, outs = [h], []
    for l in range(model.config.n_layers):
        outs.append(model.run_layer(l, h))
        h = h + outs[-1][0] + outs[-1][1]
        before.append(h)
    return before, outs


def _onwards(model, l, h, a, state, sublayer, rows) -> Tensor:
    """Logits (n, A, V) with the chosen state of layer l in place; h and a are the clean ones, (1, T, D)."""
    if sublayer is None:
        h = state
    elif sublayer == "mlp":
        h = h + a + state
    else:
        h = h + state
        h = h + model.layers[l].mlp(model.layers[l].mlp_norm(h))
    for later in range(l + 1, model.config.n_layers):
        a, m = model.run_layer(later, h)
        h = h + a + m
    return model.readout(h[:, rows])


def _answer_value(logits: Tensor, answer: Tensor) -> Tensor:
    """F (n,): the sum over answer tokens of their probability. logits (n, A, V), answer (A,)."""
    p = full(logits).softmax(dim=-1)
    return p.gather(-1, answer.expand(len(p), -1)[..., None])[..., 0].sum(dim=-1)
