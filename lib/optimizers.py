"""What moves the weights: AdamW, Muon for matrices where asked, and one schedule for both.

Muon (K. Jordan, 2024) replaces the averaged gradient of a matrix by the nearest matrix with all singular
values near 1. At the sizes of this book it halves the number of steps of a two-layer model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Jordan's quintic: steep at 0, so that small singular values rise fast; all end in about [0.7, 1.2]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW for everything, or Muon for the matrices under the modules in `muon_on` and AdamW for the rest.

    Learning rate at step t of `steps`: linear warm-up over `warmup` steps, constant up to the share `hold` of
    the budget, then linear down to the share `floor`, reached at the last step. It depends on t alone, so a
    resumed run continues it.
    """

    adamw_lr: float = 4e-3
    muon_lr: float | None = None  # None: no Muon
    muon_on: tuple[str, ...] = ("layers",)  # names of modules; their two-dimensional weights
    betas: tuple[float, float] = (0.9, 0.98)
    decay: float = 0.0  # decoupled, of the AdamW weights only
    momentum: float = 0.95  # of Muon, in Nesterov's form
    clip: float = 1.0  # largest gradient norm, over all weights together
    warmup: int = 20
    hold: float = 0.5
    floor: float = 0.03

    def __post_init__(self):
        for name in ("adamw_lr", "muon_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.hold <= 1 or not 0 <= self.floor <= 1 or self.warmup < 0:
            raise ValueError(
                "the schedule needs 0 <= hold <= 1, 0 <= floor <= 1 and warmup >= 0, "
                f"got hold={self.hold}, floor={self.floor}, warmup={self.warmup}"
            )

    def factor(self, step: int, steps: int) -> float:
        """Share of the learning rate used at `step` (0-based) of `steps`.

        >>> plan = Optimizer(warmup=2, hold=0.5, floor=0.1)
        >>> [round(plan.factor(t, 10), 3) for t in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]
        """
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        start, end = self.hold * steps, steps - 1
        fall = min(1.0, max(0.0, (step - start) / (end - start))) if end > start else 0.0
        return min(rise, 1 - (1 - self.floor) * fall)

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """The torch optimizers of this plan. ValueError if `muon_on` names nothing in the model."""
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = []
        if self.muon_lr is not None:
            matrices = [
                name for name, p in weights.items() if p.ndim == 2 and name.startswith(self._prefixes())
            ]
            if not matrices:
                raise ValueError(
                    f"muon_on={self.muon_on} names no matrix of this model; its weights: {', '.join(weights)}"
                )
        rest = [p for name, p in weights.items() if name not in matrices]
        built = []
        if rest:  # fused: one pass over all weights instead of a dozen small operations for each
            built.append(
                torch.optim.AdamW(
                    rest, lr=self.adamw_lr, betas=self.betas, weight_decay=self.decay, fused=True
                )
            )
        if matrices:
            built.append(Muon([weights[name] for name in matrices], lr=self.muon_lr, momentum=self.momentum))
        for part in built:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]
        return built

    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.muon_on)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation; matrices only.

    M <- momentum M + (1 - momentum) G,  U = (1 - momentum) G + momentum M  (Nesterov),
    W <- W - lr sqrt(max(1, rows / columns)) orthogonalise(U).

    Why not `torch.optim.Muon`: it iterates in bfloat16, one matrix after another. On the two-layer model of
    chapter 1 its step took 5.0 ms against 2.1 ms here (float32, matrices of one shape as one batch), on a CPU
    *with* bfloat16 instructions, and its update was 1.4 % off. `tests/test_optimizers.py` compares the two.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95):
        matrices = list(matrices)
        for W in matrices:
            if W.ndim != 2:
                raise ValueError(f"Muon moves matrices, not shape {tuple(W.shape)}; give it to AdamW")
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            momentum = group["momentum"]
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for W in group["params"]:
                if W.grad is None:
                    continue
                state = self.state[W]
                if not state:
                    state["momentum"] = torch.zeros_like(W)
                M = state["momentum"].lerp_(W.grad, 1 - momentum)
                U = W.grad.lerp(M, momentum)
                wide = U if len(U) <= U.shape[1] else U.mT  # orthogonalise commutes with transposing
                by_shape.setdefault(tuple(wide.shape), []).append((W, wide))
            for same in by_shape.values():
                directions = orthogonalise(torch.stack([wide for _, wide in same]))
                for (W, _), direction in zip(same, directions, strict=True):
                    rows, columns = W.shape
                    direction = direction if rows <= columns else direction.mT
                    W.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalise(G: Tensor, *, iterations: int = 5) -> Tensor:
    """G = U S V^T -> about U V^T, by Newton-Schulz iterations. G: (..., rows, columns), rows <= columns.

    X <- a X + (b A + c A A) X with A = X X^T acts on each singular value s as a s + b s^3 + c s^5. After five
    iterations values that began above 0.01 of the Frobenius norm lie in about [0.7, 1.2], smaller ones lower.
    """
    a, b, c = NEWTON_SCHULZ
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values at most 1; an all-zero G stays 0
    for _ in range(iterations):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X
