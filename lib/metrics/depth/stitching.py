"""Maps between the layers of two models: does relative or absolute depth decide which layers correspond?

For every pair of taps (m of the shallow model, l of the deep one), on the same tokens, the affine map

    f(x) = x A + b  minimises  Σ ‖y − f(x)‖² + ridge · N · Σ_j var(x_j) ‖A_j‖²,

for x = residual[m], y = residual[l]. It is fitted on some chunks of text and judged on others. A_j is row j
of A: the penalty does not depend on the units of x. Closed form: (C + ridge · diag C) A = S with C and S the
centred covariances of x and of x with y. C is factorised once for each m.

Sources: the pairs and the relative error of Csordás, Manning and Potts 2025 (facts C.1 #9). The ridge, the
held-out error and the summary of the diagonal: derived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.choices import check_choice
from lib.metrics.depth.scores import over_prompts
from lib.metrics.intervals import Interval
from lib.models.inputs import check_tokens, found
from lib.models.transformer import Transformer

ERRORS = ("relative", "unexplained")
TOKENS_AT_ONCE = 2048  # in one block of float64 products


@dataclass(frozen=True)
class Diagonal:
    """Relative depth against absolute depth, from one matrix of errors; intervals over held-out chunks.

    The relative line joins tap m of the shallow model to tap m · L_deep / L_shallow of the deep one, the
    absolute line m to m, and the last to all deeper ones. Errors between taps are interpolated linearly.
    """

    relative: float  # mean error on the relative line
    absolute: float  # mean error on the absolute line
    advantage: float  # absolute − relative: positive where the same relative depth corresponds
    advantage_interval: Interval
    slope: float  # of the best tap's relative depth on the target's: 1 on the diagonal, 0 for one best tap
    slope_interval: Interval
    distance: float  # mean |relative depth of the best tap − the target's|


@dataclass(frozen=True, eq=False)
class Stitching:
    """Held-out errors of the maps; S taps of the shallow model, T of the deep one, C held-out chunks."""

    relative: Tensor  # (S, T, C): mean over a chunk's tokens of ‖y − f(x)‖ / ‖y‖
    residual_square: Tensor  # (S, T, C): mean over its tokens of ‖y − f(x)‖²
    target_square: Tensor  # (T, C): mean over its tokens of ‖y − mean y of the fit‖²
    shallow_taps: tuple[int, ...]
    deep_taps: tuple[int, ...]
    shallow_layers: int  # L of the models
    deep_layers: int
    fit_tokens: int
    held_out_tokens: int

    def error(self, kind: str = "relative") -> Tensor:
        """(S, T). "relative": mean ‖y − f(x)‖ / ‖y‖, as the paper; "unexplained": 1 − R² about the mean."""
        return torch.from_numpy(self._errors(kind, np.arange(self.relative.shape[2])[None])[0].copy())

    def best(self, kind: str = "relative") -> Tensor:
        """(T,): for each tap of the deep model the tap of the shallow one with the least error."""
        return torch.tensor(self.shallow_taps)[self.error(kind).argmin(dim=0)]

    def diagonal(self, *, seed: int, kind: str = "relative", level: float = 0.95) -> Diagonal:
        """The summary of the diagonal. Needs 3 held-out chunks and 2 taps of each model (ValueError)."""
        S, T, C = self.relative.shape
        if S < 2 or T < 2:
            raise ValueError(f"a diagonal needs two taps of each model, got {S} and {T}")
        depth = np.array(self.deep_taps) / self.deep_layers  # (T,)
        own = np.array(self.shallow_taps) / self.shallow_layers  # (S,)
        position = np.array(self.shallow_taps, dtype=float)
        lines = {
            "relative": depth * self.shallow_layers,
            "absolute": np.minimum(self.deep_taps, self.shallow_layers).astype(float),
        }
        weights = {name: _interpolation(position, line) for name, line in lines.items()}  # (S, T)

        def on(name: str, errors: np.ndarray) -> np.ndarray:
            return (errors * weights[name]).sum(axis=1).mean(axis=1)

        def slopes(errors: np.ndarray) -> np.ndarray:
            centred = depth - depth.mean()
            return own[errors.argmin(axis=1)] @ centred / (centred @ centred)

        def interval(statistic) -> Interval:
            return over_prompts(
                np.arange(C), lambda draws: statistic(self._errors(kind, draws)), seed=seed, level=level
            )

        errors = self._errors(kind, np.arange(C)[None])
        relative, absolute = (float(on(name, errors)[0]) for name in ("relative", "absolute"))
        return Diagonal(
            relative=relative,
            absolute=absolute,
            advantage=absolute - relative,
            advantage_interval=interval(lambda e: on("absolute", e) - on("relative", e)),
            slope=float(slopes(errors)[0]),
            slope_interval=interval(slopes),
            distance=float(np.abs(own[errors.argmin(axis=1)] - depth).mean()),
        )

    def _errors(self, kind: str, draws: np.ndarray) -> np.ndarray:
        """Errors (R, S, T) on R draws of chunks (R, C): a product with how often each chunk was drawn."""
        check_choice("error", kind, ERRORS)
        C = self.relative.shape[2]
        counts = torch.stack([one.bincount(minlength=C) for one in torch.from_numpy(draws)])
        counts = counts.double() / C  # (R, C)
        if kind == "relative":
            return (self.relative @ counts.T).permute(2, 0, 1).numpy()
        errors = self.residual_square @ counts.T  # (S, T, R)
        return (errors / (self.target_square @ counts.T)).permute(2, 0, 1).numpy()


@torch.no_grad()
def stitching(
    shallow: Transformer,
    deep: Transformer,
    tokens: Tensor,
    *,
    held_out: Tensor | None = None,
    ridge: float = 1e-3,
    shallow_taps: Sequence[int] | None = None,
    deep_taps: Sequence[int] | None = None,
    first_token: bool = True,
    batch_size: int = 8,
) -> Stitching:
    """Maps from every tap of one model to every tap of another, and their errors on text they have not seen.

    tokens:   chunks (C, T) long that both models read.
    held_out: chunks (C', T') that judge the maps; None: every second chunk of `tokens`, and the others fit.
    ridge:    >= 0, in units of the variances of x. With 0 a stream of too low rank is a ValueError.
    *_taps:   0 (embeddings) to L (before the final norm); all by default.
    first_token=False leaves token 0 of every chunk out of fits and errors: it can be massive.
    Memory: the chosen taps of all tokens, in the models' dtype. Products and solutions are float64.
    ValueError for models with different vocabularies, fewer tokens to fit than D + 2, taps or chunks that
    do not fit, and streams that are not finite.
    """
    if shallow.config.vocab != deep.config.vocab:
        raise ValueError(
            f"the models have vocabularies of {shallow.config.vocab} and {deep.config.vocab} entries: they "
            "must read the same tokens"
        )
    if not ridge >= 0:
        raise ValueError(f"ridge is at least 0, got {ridge}")
    sources, targets = _taps(shallow, shallow_taps, "shallow"), _taps(deep, deep_taps, "deep")
    fit, judge = (tokens[0::2], tokens[1::2]) if held_out is None else (tokens, held_out)
    for name, part in (("tokens", fit), ("held-out tokens", judge)):
        if not isinstance(part, Tensor) or part.dim() != 2 or not part.numel():
            raise ValueError(f"{name} must be chunks (C, T), torch.long, not empty; got {found(part)}")
        if part.shape[1] < 2 and not first_token:
            raise ValueError(f"{name}: without the first token, chunks of one token are empty")
        for model in (shallow, deep):
            check_tokens(part, vocab=model.config.vocab, max_tokens=model.config.max_tokens)
    skip, D = int(not first_token), shallow.config.d_model
    N = len(fit) * (fit.shape[1] - skip)
    if N < D + 2:
        raise ValueError(
            f"{N} tokens cannot fit a map from width {D}: give {D + 2} at least, better 10 times D"
        )

    same = shallow is deep
    wanted = sorted({*sources, *targets}) if same else targets
    deep_fit = _streams(deep, fit, wanted, skip, batch_size)  # tap -> (C, T, D)
    deep_judge = _streams(deep, judge, wanted, skip, batch_size)
    shallow_fit = deep_fit if same else _streams(shallow, fit, sources, skip, batch_size)
    shallow_judge = deep_judge if same else _streams(shallow, judge, sources, skip, batch_size)

    means = {l: _mean(deep_fit[l]) for l in targets}
    target_square = torch.stack([_square(deep_judge[l], means[l]) for l in targets])
    relative, square = [], []
    for m in sources:
        x_mean = _mean(shallow_fit[m])
        solve = _factorised(shallow_fit[m], x_mean, ridge, m)
        rows = []
        for l in targets:
            A = solve(_product(shallow_fit[m], x_mean, deep_fit[l], means[l]))  # (D, D')
            rows.append(_judge(shallow_judge[m], x_mean, deep_judge[l], means[l], A))
        relative.append(torch.stack([row[0] for row in rows]))
        square.append(torch.stack([row[1] for row in rows]))
    return Stitching(
        relative=torch.stack(relative).cpu(),
        residual_square=torch.stack(square).cpu(),
        target_square=target_square.cpu(),
        shallow_taps=sources,
        deep_taps=targets,
        shallow_layers=shallow.config.n_layers,
        deep_layers=deep.config.n_layers,
        fit_tokens=N,
        held_out_tokens=len(judge) * (judge.shape[1] - skip),
    )


def _factorised(x: Tensor, mean: Tensor, ridge: float, m: int):
    """S ↦ A with (C + ridge · diag C) A = S, from one Cholesky factorisation of the standardised C."""
    C = _product(x, mean, x, mean)
    size = C.diagonal().clamp_min(0).sqrt()
    constant = size <= 1e-7 * mean.abs()  # up to float32 rounding: the map does not read it
    size = torch.where(constant, 1.0, size)
    standard = C / size / size[:, None]
    standard.diagonal().add_(ridge).masked_fill_(constant, 1.0)
    factor, failed = torch.linalg.cholesky_ex(standard)
    if failed:
        raise ValueError(
            f"the stream at tap {m} of the shallow model has a rank below its width {len(C)}, so the map is "
            f"not unique at ridge={ridge:g}; give a larger ridge, such as 1e-3"
        )
    return lambda S: torch.cholesky_solve(S / size[:, None], factor) / size[:, None]


def _product(x: Tensor, x_mean: Tensor, y: Tensor, y_mean: Tensor) -> Tensor:
    """Centred covariance (D, D') in float64 of x (C, T, D) and y (C, T, D')."""
    blocks = _blocks(x, y)
    total = sum((a.double() - x_mean).T @ (b.double() - y_mean) for a, b in blocks)
    return total / (x.shape[0] * x.shape[1])


def _judge(x, x_mean, y, y_mean, A) -> tuple[Tensor, Tensor]:
    """(C',) each: mean over a chunk's tokens of ‖y − f(x)‖ / ‖y‖, and of ‖y − f(x)‖²."""
    ratios, squares = [], []
    for a, b in _blocks(x, y):
        b = b.double()
        error = (b - y_mean - (a.double() - x_mean) @ A).square().sum(dim=-1)
        ratios.append((error / b.square().sum(dim=-1).clamp_min(1e-12)).sqrt())  # ‖y‖ at least 1e-6
        squares.append(error)
    shape = x.shape[:2]
    return torch.cat(ratios).view(shape).mean(dim=1), torch.cat(squares).view(shape).mean(dim=1)


def _square(y: Tensor, mean: Tensor) -> Tensor:
    """(C',): mean over a chunk's tokens of ‖y − mean‖²."""
    return torch.stack([(chunk.double() - mean).square().sum(dim=-1).mean() for chunk in y])


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.flatten(0, 1).split(TOKENS_AT_ONCE), y.flatten(0, 1).split(TOKENS_AT_ONCE), strict=True)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(0, 1).mean(dim=0, dtype=torch.float64)


def _streams(model: Transformer, tokens: Tensor, taps: Sequence[int], skip: int, batch_size: int):
    """tap -> residual[tap] (C, T - skip, D) of all chunks."""
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    kept: dict[int, list[Tensor]] = {tap: [] for tap in taps}
    for batch in tokens.to(model.embedding.weight.device).split(batch_size):
        h = model.embed(batch)
        for l in range(max(taps) + 1):
            if l in kept:
                kept[l].append(h[:, skip:])
            if l < max(taps):
                a, m = model.run_layer(l, h)
                h = h + a + m
    found = {tap: torch.cat(kept.pop(tap)) for tap in sorted(kept)}  # pop: one tap at a time is held twice
    for tap, stream in found.items():
        if not stream.isfinite().all():
            raise ValueError(f"the model's stream at tap {tap} is not finite: no map can be fitted to it")
    return found


def _taps(model: Transformer, taps: Sequence[int] | None, name: str) -> tuple[int, ...]:
    L = model.config.n_layers
    chosen = tuple(range(L + 1)) if taps is None else tuple(sorted({int(tap) for tap in taps}))
    if not chosen or not all(0 <= tap <= L for tap in chosen):
        raise ValueError(f"{name} taps are 0 to {L}, one or more; got {list(taps)}")
    return chosen


def _interpolation(taps: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Weights (S, T) of linear interpolation between `taps` at the places `line`; the ends are held."""
    return np.stack([np.interp(line, taps, unit) for unit in np.eye(len(taps))])
