r"""Shattering: how many rows can one layer, or one function, label in every way?

Three tools, from exact to searched:

- `split_vc`: the split-VC dimension of a function of few symbols, by brute force;
- `composition_rows`, `sum2_rows`: the explicit shattering sets behind the theorems, to be checked by
  `labelling_errors`;
- `search`: can one softmax layer f(X) = sum_i softmax_i(score_i) v.x_i + b give k sequences every labelling?
  What it finds is a certificate; what it does not find is *not found*, which proves nothing. Its control,
  the uniform score, is a linear classifier of the means and provably stops at d + 1: `radon_relation` is
  the proof.

Sources: split-VC after Kozachinskiy et al., arXiv 2501.19215, definition 3.1; the sets are proved in
`one-layer-limits`, ours, unrefereed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from lib.choices import check_choice
from lib.tasks.function_composition import FunctionComposition, Indexing
from lib.tasks.sum2 import Sum2

SCORES = ("uniform", "query", "matrix")
LEAST_MARGIN = 1e-4              # |f| / ||v|| that counts as a sign, far above float64 rounding
SCORE_SCALES = (0.5, 2.0, 6.0)   # initial scores of the rounds of a search, from flat to sharp attention


def vc_dimension(table: np.ndarray) -> int:
    """VC dimension of the columns as 0/1 functions of the rows. table: (rows, columns) bool.

    By brute force, level by level: a set is tried only if it extends a shattered one.
    """
    table = np.unique(np.unique(np.asarray(table, dtype=np.int64), axis=0), axis=1)
    shattered: list[tuple[int, ...]] = [()]
    for size in itertools.count(1):
        if 2**size > table.shape[1]:
            return size - 1
        extended = [
            (*rows, row) for rows in shattered for row in range(rows[-1] + 1 if rows else 0, table.shape[0])
            if len(np.unique(2 ** np.arange(size) @ table[[*rows, row]])) == 2**size]
        if not extended:
            return size - 1
        shattered = extended


def split_vc(f: Callable[[np.ndarray], np.ndarray], alphabets: Sequence[int]) -> int:
    """Split-VC dimension of f, exactly: the largest VC dimension over all splits of the positions in two.

    f: words (B, N) of symbols -> (B,) bool.  alphabets: symbols at each position, 0 .. alphabets[i]-1. A
    split makes the words on one side rows and those on the other columns; every column is a function of
    rows. All words are enumerated: raises ValueError beyond a million of them, or beyond 12 positions.

    >>> split_vc(lambda x: (x[:, 0] & x[:, 1]) ^ (x[:, 2] & x[:, 3]) == 1, [2, 2, 2, 2])
    2
    """
    N, count = len(alphabets), math.prod(alphabets)
    if N > 12 or count > 10**6 or count < 1:
        raise ValueError(
            f"brute force over {count} words of {N} positions is too much; it takes 1 .. 10^6 words of at "
            "most 12 positions")
    words = np.stack([axis.ravel() for axis in np.indices(tuple(alphabets))], axis=1)     # (count, N)
    answer = np.asarray(f(words), dtype=bool).reshape(tuple(alphabets))
    largest = 0
    for size in range(N + 1):
        for rows in itertools.combinations(range(N), size):
            columns = [i for i in range(N) if i not in rows]
            height = math.prod(alphabets[i] for i in rows)
            if min(height, math.log2(count / height)) > largest:     # else too few rows or columns
                largest = max(largest, vc_dimension(answer.transpose(*rows, *columns).reshape(height, -1)))
    return largest


@dataclass(frozen=True)
class ShatteringSet:
    """k rows and 2^k columns such that the column of a labelling gives each row its label.

    A word is put together from a row (on `row_positions`) and a column (on `column_positions`).
    """

    row_positions: tuple[int, ...]
    rows: np.ndarray               # (k, len(row_positions))
    column_positions: tuple[int, ...]
    columns: np.ndarray            # (2^k, len(column_positions))
    labels: np.ndarray             # (2^k, k) bool, all of them

    def words(self) -> np.ndarray:
        """Every row with every column. -> (2^k, k, N)."""
        C, k = self.labels.shape
        words = np.empty((C, k, len(self.row_positions) + len(self.column_positions)), dtype=np.int64)
        words[..., list(self.row_positions)] = self.rows
        words[..., list(self.column_positions)] = self.columns[:, None]
        return words


def composition_rows(n: int) -> ShatteringSet:
    """n rows that Comp_n shatters, n >= 2: x = 0, rows g(0) = i; the column of label c has h(i) = 1 - c_i.

    Words are the 2n + 1 symbols g, h, x; the label is "the answer is 0". The rows never touch x, the output
    token's own symbol. Source: proved in `one-layer-limits`, ours, unrefereed.
    """
    if n < 2:
        raise ValueError(f"h needs two values to tell labels apart: n >= 2, got n={n}")
    labels = _labelings(n)
    rows = np.zeros((n, n + 1), dtype=np.int64)                        # g and x, frozen at 0 ...
    rows[:, 0] = np.arange(n)                                          # ... except g(0)
    return ShatteringSet(
        (*range(n), 2 * n), rows, tuple(range(n, 2 * n)), np.where(labels, 0, 1), labels)


def sum2_rows(n: int, M: int) -> ShatteringSet:
    """r = min(n-1, (M-3)//2) rows that SUM2[n, M] shatters; n - 1 of them once M >= 2n + 1.

    Row: x_1 = 1 .. r. The column of label c has x_{i+1} = M - i where c_i = 1, else r + 1, and r + 1 in the
    places that are left. Words are the n residues; the label is the answer, for j < k and for j <= k alike.
    Source: proved in `one-layer-limits`, ours, unrefereed.
    """
    r = min(n - 1, (M - 3) // 2)
    if r < 1:
        raise ValueError(f"no row is left: n >= 2 and M >= 5 are needed, got n={n}, M={M}")
    labels, rows = _labelings(r), np.arange(1, r + 1)
    columns = np.full((2**r, n - 1), r + 1, dtype=np.int64)
    columns[:, :r] = np.where(labels, M - rows, r + 1)
    return ShatteringSet((0,), rows[:, None], tuple(range(1, n)), columns, labels)


def composition_labels(n: int) -> Callable[[np.ndarray], np.ndarray]:
    """Comp_n as a Boolean function of words (B, 2n + 1): is h(g(x)) = 0? By the task's own definition."""
    task = FunctionComposition(n)

    def label(words: np.ndarray) -> np.ndarray:
        word = torch.from_numpy(words)
        return (task.answer(word[:, :n], word[:, n : 2 * n], word[:, -1]) == 0).numpy()

    return label


def index_labels(n: int) -> Callable[[np.ndarray], np.ndarray]:
    """Ind_n as a Boolean function of words (B, 1 + n), g(0) and then h with values in {0, 1}."""
    task = Indexing(n)
    return lambda words: task.answer(torch.from_numpy(words[:, 0]), torch.from_numpy(words[:, 1:])).numpy()


def sum2_labels(n: int, M: int) -> Callable[[np.ndarray], np.ndarray]:
    """SUM2[n, M] as a Boolean function of words (B, n), by the task's own definition."""
    task = Sum2(n, M)
    return lambda words: task.answer(torch.from_numpy(words)).numpy()


def labelling_errors(rows: ShatteringSet, f: Callable[[np.ndarray], np.ndarray]) -> int:
    """How many of the k 2^k (row, column) pairs f labels wrongly; 0 means that f shatters the rows.

    f: words (B, N) -> (B,) bool.
    """
    words = rows.words()
    answer = np.asarray(f(words.reshape(-1, words.shape[-1])), dtype=bool)
    return int((answer.reshape(rows.labels.shape) != rows.labels).sum())


@dataclass(frozen=True)
class Certificate:
    """One layer that gives k sequences one labelling: f(X) = sum_i softmax_i(w.phi_i) v.x_i + b.

    phi_i is x_i for the score "query", the outer product of the last token and x_i for "matrix", and empty
    (w = ()) for "uniform".
    """

    labels: tuple[bool, ...]
    v: tuple[float, ...]
    b: float
    w: tuple[float, ...]

    def holds(self, inputs: np.ndarray, score: str) -> bool:
        """Whether each label is the sign of f, with |f| > LEAST_MARGIN ||v||. inputs: (k, T, d).

        Plain float64 sums, independent of the search. Scores beyond 10^4 are refused; below, rounding moves
        f by less than 1e-9 ||v||, five orders under the margin, so the signs are those of real arithmetic.
        """
        least = LEAST_MARGIN * math.hypot(*self.v)
        for X, label in zip(inputs.tolist(), self.labels, strict=True):
            scores = [math.fsum(w * p for w, p in zip(self.w, _features(X, i, score), strict=True))
                      for i in range(len(X))]
            weights = [math.exp(s - max(scores)) for s in scores]
            mix = math.fsum(a * v * x for a, token in zip(weights, X, strict=True)
                            for v, x in zip(self.v, token, strict=True))
            f = mix / math.fsum(weights) + self.b
            if not (f if label else -f) > least or max(map(abs, scores)) > 1e4:
                return False
        return True


def parameters(d: int, score: str) -> int:
    """Real parameters of the searched layer: v and b, and the score's own (none, d, or d^2)."""
    return d + 1 + {"uniform": 0, "query": d, "matrix": d * d}[check_choice("score", score, SCORES)]


def search(
    d: int, score: str, k: int, *, seed: int, tokens: int = 6, draws: int = 4, restarts: int = 8,
    steps: int = 400,
) -> dict:
    """Look for k sequences of `tokens` Gaussian vectors in R^d that one softmax layer labels in all 2^k ways.

    f and -f are the same layer, so 2^(k-1) labelings suffice (the first sequence is labelled True). All
    labelings and restarts are one batch, fitted by Adam on softplus(-3 margin), up to three rounds with
    sharper initial scores for what is left, and up to `draws` draws of the sequences; the best draw is
    returned.

    -> dict: d, score, k, parameters; inputs (k, tokens, d); labelings (2^(k-1), k) bool; certificates, one
    verified `Certificate` or None (not found) a labelling; fraction found; shattered (all found).
    A failure bounds no VC dimension from above. Raises ValueError for k > 14, an unknown score, sizes < 1.
    """
    check_choice("score", score, SCORES)
    for name, value in dict(d=d, k=k, tokens=tokens, draws=draws, restarts=restarts, steps=steps).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    if k > 14:
        raise ValueError(f"k={k} means {2 ** (k - 1)} labelings in one batch; k <= 14 fits in memory")
    labelings = _labelings(k)[2 ** (k - 1):]
    best: dict = {"fraction": -1.0}
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        inputs = rng.standard_normal((k, tokens, d))
        found = _fit_labelings(inputs, score, labelings, rng, restarts, steps)
        fraction = sum(c is not None for c in found) / len(found)
        if fraction > best["fraction"]:
            best = dict(
                d=d, score=score, k=k, parameters=parameters(d, score), inputs=inputs, labelings=labelings,
                certificates=found, fraction=fraction, shattered=fraction == 1.0)
        if best["shattered"]:
            break
    return best


def radon_relation(points: Sequence[Sequence[Fraction]]) -> list[Fraction]:
    """Weights, not all 0, with sum_j r_j = 0 and sum_j r_j p_j = 0, for d + 2 points of R^d. Exact.

    They label the points in a way no affine function realises (Radon): f > 0 where r_j > 0 and f <= 0 where
    r_j <= 0 would make sum_j r_j f(p_j) positive, yet it is 0 for every affine f.
    """
    columns = [[*map(Fraction, p), Fraction(1)] for p in points]
    d = len(columns[0]) - 1
    if len(columns) != d + 2:
        raise ValueError(f"Radon's relation takes d + 2 = {d + 2} points of R^{d}, got {len(columns)}")
    rows = [list(row) for row in zip(*columns, strict=True)]        # (d + 1) equations in d + 2 unknowns
    pivots: list[int] = []
    for column in range(d + 2):
        below = [i for i in range(len(pivots), d + 1) if rows[i][column] != 0]
        if not below:
            continue
        top = len(pivots)
        rows[top], rows[below[0]] = rows[below[0]], rows[top]
        rows[top] = [a / rows[top][column] for a in rows[top]]
        for i in range(d + 1):
            if i != top and rows[i][column] != 0:
                rows[i] = [a - rows[i][column] * b for a, b in zip(rows[i], rows[top], strict=True)]
        pivots.append(column)
    free = next(c for c in range(d + 2) if c not in pivots)
    relation = [Fraction(0)] * (d + 2)
    relation[free] = Fraction(1)
    for row, column in zip(rows, pivots, strict=False):             # rows past the rank are 0
        relation[column] = -row[free]
    return relation


def excluded_by_means(inputs: np.ndarray) -> tuple[bool, ...]:
    """A labelling of d + 2 sequences that no linear function of their means realises, proved in fractions.

    inputs: (d + 2, T, d). The means of floats are rationals; Radon's relation between them is the
    certificate, and it is checked here before its labelling is returned. So the uniform score stops at k =
    d + 1.
    """
    means = [[sum(map(Fraction, axis)) / len(X) for axis in zip(*X, strict=True)] for X in inputs.tolist()]
    relation = radon_relation(means)
    moments = [sum(r * p for r, p in zip(relation, axis, strict=True)) for axis in zip(*means, strict=True)]
    if any(moments) or sum(relation) != 0 or not any(relation):
        raise ArithmeticError("the relation found is no Radon relation; this is a defect of radon_relation")
    return tuple(r > 0 for r in relation)


def _labelings(k: int) -> np.ndarray:
    """All labelings of k rows, counting upwards with the first row as the leading digit. -> (2^k, k) bool."""
    return (np.arange(2**k)[:, None] >> np.arange(k - 1, -1, -1) & 1).astype(bool)


def _features(X: list[list[float]], i: int, score: str) -> list[float]:
    """What the score of token i is linear in."""
    if score == "uniform":
        return []
    return X[i] if score == "query" else [a * b for a in X[-1] for b in X[i]]


def _fit_labelings(inputs, score, labelings, rng, restarts, steps) -> list[Certificate | None]:
    """A verified certificate, or None, for each labelling. inputs: (k, T, d), labelings: (count, k) bool."""
    k, T, _ = inputs.shape
    x = inputs.reshape(k * T, -1).astype(np.float32)
    phi = np.array([_features(X, i, score) for X in inputs.tolist() for i in range(T)], dtype=np.float32)
    found: list[Certificate | None] = [None] * len(labelings)
    for scale in SCORE_SCALES if score != "uniform" else SCORE_SCALES[:1]:
        left = np.array([i for i, certificate in enumerate(found) if certificate is None], dtype=int)
        if not len(left):
            break
        labels = np.repeat(labelings[left], restarts, axis=0)                # (P, k)
        theta, solved = _adam(x, phi, labels, T, restarts, scale, rng, steps)
        d = x.shape[1]
        for row in np.flatnonzero(solved):
            v, (b,), w = (part.tolist() for part in np.split(theta[row].astype(float), [d, d + 1]))
            certificate = Certificate(tuple(labels[row].tolist()), tuple(v), b, tuple(w))
            if found[left[row // restarts]] is None and certificate.holds(inputs, score):
                found[left[row // restarts]] = certificate
    return found


def _adam(x, phi, labels, T, restarts, scale, rng, steps):
    """Fit P layers at once. x: (k T, d), phi: (k T, F), labels: (P, k) -> theta (P, d + 1 + F), solved (P,).

    theta holds v, b, w side by side. Once a labelling is found, all its restarts are left
    alone.
    """
    (P, k), d = labels.shape, x.shape[1]
    theta = rng.standard_normal((P, d + 1 + phi.shape[1])).astype(np.float32)
    theta[:, d] = 0
    theta[:, d + 1:] *= scale
    sign = np.where(labels, 1, -1).astype(np.float32)
    solved, active = np.zeros(P, dtype=bool), np.arange(P)
    moving, first, second = theta.copy(), np.zeros_like(theta), np.zeros_like(theta)
    for step in range(steps + 1):
        v, b, w = moving[:, :d], moving[:, d:d + 1], moving[:, d + 1:]
        z = (v @ x.T).reshape(-1, k, T)
        weight = (w @ phi.T).reshape(-1, k, T)
        weight = np.exp(weight - weight.max(axis=2, keepdims=True))
        weight /= weight.sum(axis=2, keepdims=True)
        mix = (weight * z).sum(axis=2)                                        # (P, k)
        margin = sign * (mix + b)
        if step % 20 == 0 or step == steps:
            done = (margin > 2 * LEAST_MARGIN * np.linalg.norm(v, axis=1, keepdims=True)).all(axis=1)
            theta[active], solved[active] = moving, done
            if done.any():
                keep = ~np.isin(active // restarts, active[done] // restarts)
                active, moving, first, second, sign = (a[keep] for a in (active, moving, first, second, sign))
                z, weight, mix, margin = (a[keep] for a in (z, weight, mix, margin))
            if not len(active):
                break
        slope = -3 * sign / (1 + np.exp(np.minimum(3 * margin, 80)))   # of softplus(-3 margin)
        pull = slope[:, :, None] * weight                                     # (P, k, T)
        gradient = np.concatenate([
            pull.reshape(-1, k * T) @ x, slope.sum(axis=1, keepdims=True),
            (pull * (z - mix[:, :, None])).reshape(-1, k * T) @ phi], axis=1)
        first += 0.1 * (gradient - first)
        second += 0.01 * (gradient**2 - second)
        rate = 0.05 + (0.01 - 0.05) * step / steps
        moving = moving - rate * (first / (1 - 0.9 ** (step + 1))) / (
            np.sqrt(second / (1 - 0.99 ** (step + 1))) + 1e-8)
    return theta, solved
