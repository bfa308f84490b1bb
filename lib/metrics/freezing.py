r"""The heart of the lower bound, run on small protocols: choose Z_1, Z_2, …, freeze, see what looks the same.

A protocol on a small world is a table: for every input (w, z_0, z_1 … z_L) the value of every message.
`freeze` follows the proof. Stage 0 keeps the commonest values of the messages to w in epoch 1. Stage l picks
x_l inputs z_l, and keeps, among the (z_{l+1} … z_L) that go with all of them, the commonest values of exactly
the families counted in `lib.metrics.sequential_bounds.frozen_families`. What is left is R_L; claimed is

    (F_l)  every message from j >= l to i < l in an epoch t <= l is the same for all of R_l, given z_{<l};
    end    the last state of player -1 is the same for all of R_L, for every w, z_0 in Z_0, …, z_{L-1}.

Two z_L in R_L that owe different answers are then two inputs, one of which fails. Evidence for the proof's
bookkeeping, not a proof: the worlds are too small for the inequalities to close. Without a family that is
counted for a reason a claim must break. Ours, unrefereed; theory of `depth-width`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.metrics.sequential_bounds import Family, frozen_families

LARGEST = 4_000_000  # inputs of a world: each message is an int64 for each of them


@dataclass(frozen=True, eq=False)
class World:
    """A protocol, written out. Axes of every array: w, z_0, z_1 … z_L (player i is axis i + 1).

    messages[t, j, i]: value of the message from j to i in epoch t, an integer for every input.
    state: the last state of player -1, likewise.
    """

    messages: dict[tuple[int, int, int], np.ndarray]
    state: np.ndarray

    @property
    def L(self) -> int:  # noqa: N802
        return self.state.ndim - 2


@dataclass
class Frozen:
    """What a run kept, and every claim that failed on it."""

    Z: list[np.ndarray] = field(default_factory=list)  # Z_0 … Z_{L-1}, indices
    R: np.ndarray | None = None  # R_L, indices of z_L
    sizes: list[int] = field(default_factory=list)  # |R_1|, …, |R_L|
    functions: int = 0  # functions of the remaining inputs that were made constant, one for each choice
    violations: list[str] = field(default_factory=list)


def freeze(world: World, x: Sequence[int], *, drop: Collection[str] = ()) -> Frozen:
    """Build Z_0 … Z_{L-1} and R_L in `world`, and check the claims.

    x: (x_0 … x_{L-1}), sizes of the sets. Z_l is the x_l inputs that leave most, all subsets tried (one input
    where none leaves anything). drop: families that are *not* frozen, named as in `droppable`.
    ValueError for sizes or names that do not fit.
    """
    if len(x) != world.L or min(x) < 1:
        raise ValueError(f"x is x_0 … x_{{L-1}}, {world.L} sizes of at least 1; got {x}")
    unknown = set(drop) - set(droppable(world.L))
    if unknown:
        raise ValueError(f"no such family: {sorted(unknown)}; allowed: {droppable(world.L)}")
    shape, kept = world.state.shape, Frozen()
    kept.Z.append(np.arange(min(x[0], shape[1])))
    R = np.ones(shape[2:], dtype=bool)                         # over (z_1 … z_L)
    for stage in range(world.L):
        if stage:
            chosen, R = _pick(R, x[stage])
            kept.Z.append(chosen)
        columns = [column for family in frozen_families(stage)
                   for column in _functions(world, family, kept.Z, drop)]
        R = _commonest(R, columns)
        kept.functions += len(columns)
        kept.sizes.append(int(R.sum()))
        kept.violations += _broken(world, stage + 1, kept.Z, R)
    kept.R = np.flatnonzero(R)
    kept.violations += _told_apart(world, kept)
    return kept


def droppable(L: int) -> list[str]:
    """Names of the families of an L-layer proof, as "stage 1: to 0 in epoch 1".

    With " for each z_1" at the end: the family is frozen, but for one z_1 instead of each.
    """
    names = []
    for stage in range(L):
        for family in frozen_families(stage):
            names.append(_name(family))
            if 1 in family.choices and family.receiver != 1:
                names.append(f"{_name(family)} for each z_1")
    return names


def unused(L: int) -> list[str]:
    """Families that (F_L) asks for and the end of the proof does not use: epoch L, to others than w."""
    return [_name(family) for family in frozen_families(L - 1) if family.epoch == L and family.receiver >= 0]


def counted_functions(L: int, sizes: Sequence[int]) -> int:
    """How many functions the proof counts, from |Z_{-1}|, |Z_0|, …, |Z_{L-1}|: each costs m_i beta bits.

    >>> counted_functions(2, [2, 2, 1])    # stage 0: 2·2 to w; stage 1: 1, 1 to 1, 2·2 to w, 2, 2 to 0
    14
    """
    return sum((L - family.stage) * int(np.prod([sizes[k + 1] for k in family.choices]))
               for stage in range(L) for family in frozen_families(stage))


def failing_pair(world: World, kept: Frozen, answers: np.ndarray) -> tuple[tuple, tuple] | None:
    """Two inputs (w, z_0, …, z_L) that end in one state of player -1 and owe two answers, or None.

    answers: what each input of the world asks for. Whatever reads the answer off that state errs on one of
    the two. Read off the table, so true whether or not the counting closes.
    """
    for below in itertools.product(range(world.state.shape[0]), *(Z.tolist() for Z in kept.Z)):
        first = int(kept.R[0])
        for other in kept.R[1:].tolist():
            same = world.state[(*below, first)] == world.state[(*below, other)]
            if same and answers[(*below, first)] != answers[(*below, other)]:
                return (*below, first), (*below, other)
    return None


def random_world(counts: Sequence[int], *, rate: float, seed: int) -> World:
    """A random forgetful protocol. counts: how many values w, z_0, z_1 … z_L can take; L + 2 numbers.

    A message is one bit, a random function of the sender's and the receiver's state, 1 with probability
    `rate`. Rarely 1, so that something is left after freezing.
    """
    L, total = len(counts) - 2, int(np.prod(counts))
    if L < 1 or total > LARGEST:
        raise ValueError(f"counts are |w|, |z_0|, … |z_L| with a product of at most {LARGEST}; got {counts}")
    axes = np.indices(counts, sparse=True)
    state = {i: _spread(axes[i + 1], counts) for i in range(-1, L + 1)}
    messages = {}
    for t in range(1, L + 1):
        for i, j in itertools.combinations(range(-1, L + 1), 2):
            noise = _hash(seed, t, j, i, state[j], state[i])
            messages[t, j, i] = (noise >> np.uint64(32) < np.uint64(rate * 2**32)).astype(np.int64)
        state = {i: labels([state[i], *(messages[t, j, i] for j in range(i + 1, L + 1))])
                 for i in range(-1, L + 1)}
    return World(messages, state[-1])


def _name(family: Family) -> str:
    return f"stage {family.stage}: {family.name}"


def _functions(world: World, family: Family, Z: list[np.ndarray], drop) -> Iterator[np.ndarray]:
    """The counted functions of one family, each an array over (z_{stage+1} … z_L)."""
    if _name(family) in drop:
        return
    choices = {k: range(world.state.shape[0]) if k == -1 else Z[k] for k in family.choices}
    if f"{_name(family)} for each z_1" in drop:
        choices[1] = choices[1][:1]
    for sender in range(family.stage + 1, world.L + 1):
        table = world.messages[family.epoch, sender, family.receiver]
        for values in itertools.product(*choices.values()):
            # by the proof the message depends on these and on z_{>stage}: the other axes stand anywhere
            at = [Z[k][0] if 0 <= k < len(Z) else 0 for k in range(-1, family.stage + 1)]
            for k, value in zip(family.choices, values, strict=True):
                at[k + 1] = value
            yield table[tuple(at)]


def _pick(R: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """x_l inputs z_l and the set R' of all that goes with each of them. R over (z_l … z_L)."""
    alive = np.flatnonzero(R.any(axis=tuple(range(1, R.ndim))))
    for most in range(min(size, len(alive)), 0, -1):
        subsets = [np.array(chosen) for chosen in itertools.combinations(alive, most)]
        best = max(subsets, key=lambda chosen: int(R[chosen].all(axis=0).sum()))
        if R[best].all(axis=0).any():
            break
    return best, R[best].all(axis=0)


def _commonest(R: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
    """The part of R on which all columns keep their commonest joint value."""
    if not columns:
        return R
    rows = np.stack([np.broadcast_to(column, R.shape)[R] for column in columns], axis=1)
    _, group, count = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    kept = np.zeros_like(R)
    kept[R] = group.reshape(-1) == count.argmax()
    return kept


def _broken(world: World, l: int, Z: list[np.ndarray], R: np.ndarray) -> list[str]:
    """Where (F_l) fails; R over (z_l … z_L). (F_1) is claimed for player -1 alone."""
    found = []
    below = [range(world.state.shape[0]), *Z]                  # w, Z_0 … Z_{l-1}
    for t, j, i in world.messages:
        if t > l or j < l or i >= l or (l == 1 and i != -1):
            continue
        part = world.messages[t, j, i][np.ix_(*below)]         # (…, z_l … z_L)
        values = part[..., R]                                  # (|W|, |Z_0| …, |R|)
        broken = (values != values[..., :1]).any(axis=-1).sum()
        if broken:
            found.append(f"F_{l}: {j} to {i} in epoch {t}, for {broken} choices of the inputs below")
    return found


def _told_apart(world: World, kept: Frozen) -> list[str]:
    states = world.state[np.ix_(range(world.state.shape[0]), *kept.Z)][..., kept.R]
    broken = (states != states[..., :1]).any(axis=-1).sum()
    return [f"end: player -1 tells R_{world.L} apart, for {broken} choices of other inputs"] if broken else []


def _spread(axis: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    return np.broadcast_to(axis.astype(np.int64), counts)


def labels(parts: list[np.ndarray]) -> np.ndarray:
    """One integer for each combination of values: equal exactly where all parts are equal."""
    label = np.zeros(parts[0].size, dtype=np.int64)
    for part in parts:
        _, dense = np.unique(part.reshape(-1), return_inverse=True)
        _, label = np.unique(label * (int(dense.max()) + 1) + dense.reshape(-1), return_inverse=True)
    return label.reshape(parts[0].shape)


def _hash(seed: int, t: int, j: int, i: int, *states: np.ndarray) -> np.ndarray:
    """64 pseudo-random bits for each pair of states (SplitMix64's finaliser)."""
    key = np.random.SeedSequence([seed, t, j + 1, i + 1]).generate_state(1, np.uint64)[0]
    noise = np.full(states[0].shape, key, dtype=np.uint64)
    for state in states:
        noise = noise + (state.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            noise = (noise ^ (noise >> np.uint64(shift))) * np.uint64(factor)
        noise = noise ^ (noise >> np.uint64(31))
    return noise
