r"""What a table can say through one quantised attention layer, and where it must therefore fail.

One layer reads a table z of m values through H heads. With the receiver's query fixed, the table reaches
the receiver only as its *message*: for every head the sums of weight * value (d numbers) and of weights
(one number) over the table's tokens. Two tables with one message that differ at j, and the question "what
is z(j)?": the receiver ends in the same state twice and owes two answers. So the layer errs, *whatever MLP
follows*.

For a given layer that is a certificate, found by running through all tables; with accumulators of p bits it
exists for every layer as soon as H(d+1)p < m log2 m (`lib.metrics.bounds.least_bits`).

Everything is integers: weights, values and accumulators, so "the same" means equal. Source: proved in
`one-layer-limits`; the counting bound is after Peng, Narayanan and Papadimitriou, arXiv 2402.08164.

Several layers, as a protocol of many players: `lib.metrics.protocol`, whose names are importable from here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lib.metrics.protocol import Message as Message
from lib.metrics.protocol import Player as Player
from lib.metrics.protocol import Transcript as Transcript
from lib.metrics.protocol import protocol_bits as protocol_bits
from lib.metrics.protocol import sequential_parties as sequential_parties
from lib.metrics.protocol import simulate as simulate

ENUMERABLE = 2_000_000    # tables: 7^7 = 823543 fit, 8^8 = 16.8 million do not; 9! = 362880 permutations do


@dataclass(frozen=True)
class QuantisedLayer:
    """One attention layer as its receiver sees it: integer weight and value of every token it may meet.

    The prompt is the table (m tokens, token i carries z(i)) and R further tokens that depend on the
    question j alone: the token of z_0 = j and the receiver in 1-FuncComp; the tokens of g with g(0) = j,
    and of x, in Comp_m. The receiver's own state does not depend on j, so all weights are fixed numbers.

    table_weight: (H, m, m) int64, weight of table token i carrying symbol y.   table_value: (H, m, m, d)
    int64. rest_weight: (H, m, R) int64, of the other tokens under question j.         rest_value: (H, m, R,
    d) int64. Head output: sum of weight * value / max(1, sum of weight), an exact fraction.
    """

    table_weight: np.ndarray
    table_value: np.ndarray
    rest_weight: np.ndarray
    rest_value: np.ndarray

    def __post_init__(self):
        H, m, R = self.rest_weight.shape
        d = self.table_value.shape[-1]
        wanted = {"table_weight": (H, m, m), "table_value": (H, m, m, d), "rest_weight": (H, m, R),
                  "rest_value": (H, m, R, d)}
        for name, shape in wanted.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.int64:
                raise ValueError(f"{name} must be int64 of shape {shape}, got {array.dtype} {array.shape}")
        if self.table_weight.min() < 0 or self.rest_weight.min() < 0:
            raise ValueError("attention weights are exponentials: they cannot be negative")
        largest = max(int(self.table_weight.max()), int(self.rest_weight.max()))
        value = max(int(abs(self.table_value).max()), int(abs(self.rest_value).max()), 1)
        if (m + R) * largest * value >= 2**62:
            raise ValueError(
                f"weights up to {largest} times values up to {value} overflow 64-bit accumulators; "
                "use fewer bits")

    @property
    def heads(self) -> int:
        return self.table_weight.shape[0]

    @property
    def value_dim(self) -> int:
        return self.table_value.shape[-1]

    @property
    def m(self) -> int:
        """Length of the table, and number of symbols and of questions."""
        return self.table_weight.shape[1]

    @property
    def accumulator_bits(self) -> int:
        """Least p such that p bits (two's complement) hold every block sum: the p of H(d+1)p >= m log2 m."""
        product = self.table_weight[..., None] * self.table_value                     # (H, m, m, d)
        numbers = [product, self.table_weight[..., None]]
        top = max(int(part.max(axis=2).sum(axis=1).max()) for part in numbers)
        bottom = min(int(part.min(axis=2).sum(axis=1).min()) for part in numbers)
        return max(top.bit_length(), (-bottom - 1).bit_length() if bottom < 0 else 0) + (bottom < 0)

    def state(self, z: tuple[int, ...], j: int) -> tuple[Fraction, ...]:
        """What the receiver knows after attention when it is asked for z(j): H * d exact fractions.

        Its own embedding comes on top, the same for every input. Plain Python over the whole prompt, token by
        token: the check that `messages` and `find_collision` are held to.
        """
        outputs = []
        for head in range(self.heads):
            weights = [int(self.table_weight[head, i, y]) for i, y in enumerate(z)]
            values = [self.table_value[head, i, y].tolist() for i, y in enumerate(z)]
            weights += self.rest_weight[head, j].tolist()
            values += self.rest_value[head, j].tolist()
            total = max(1, sum(weights))
            outputs += [Fraction(sum(w * value[c] for w, value in zip(weights, values, strict=True)), total)
                        for c in range(self.value_dim)]
        return tuple(outputs)


def random_layer(
    m: int, heads: int, value_dim: int, *, bits: int, score_bits: int, seed: int
) -> QuantisedLayer:
    """A random integer decoder for 1-FuncComp: m table tokens, the token of z_0, the receiver w.

    Token states are vectors of `value_dim` random integers of `bits` bits, one per (position, symbol); Q, K
    and V are random matrices of such integers, per head. Scores are clipped to 0 .. score_bits, a weight is
    2^score; values wrap around to `bits` bits, two's complement. Raises ValueError for sizes below 1.
    """
    for name, value in dict(m=m, heads=heads, value_dim=value_dim, bits=bits).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    if not 0 <= score_bits <= 40 or bits > 12:
        raise ValueError(
            "64-bit sums of weights 2^score take score_bits in 0 .. 40 and bits <= 12; "
            f"got score_bits={score_bits}, bits={bits}")
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    state = rng.integers(low, high, (m + 2, m, value_dim))                    # (position, symbol)
    Q, K, V = rng.integers(low, high, (3, heads, value_dim, value_dim))
    query = state[m + 1, 0] @ Q                                               # (H, d): w carries one symbol
    score = np.einsum("hd,pye,hed->hpy", query, state, K)
    weight = 2 ** score.clip(0, score_bits)                                   # (H, m + 2, m)
    value = (np.einsum("pye,hed->hpyd", state, V) - low) % 2**bits + low      # (H, m + 2, m, d)
    own_weight = np.broadcast_to(weight[:, m + 1, :1], (heads, m))
    own_value = np.broadcast_to(value[:, m + 1, :1], (heads, m, value_dim))
    return QuantisedLayer(
        weight[:, :m], value[:, :m], np.stack([weight[:, m], own_weight], axis=2),
        np.stack([value[:, m], own_value], axis=2))


def quantise_layer(
    table, rest, receiver, W_Q, W_K, W_V, *, bits: int, weight_bits: int, scale: float | None = None
) -> QuantisedLayer:
    """A given attention layer, trained or built, with integer weights and values.

    table: (m, m, D), the state of table token i carrying symbol y, as the layer reads it (after its norm).
    rest: (m, R, D), the states of all other tokens under question j, the receiver's among them.
    receiver: (D,), its state, which asks.  W_Q, W_K: (H, D, d_k), W_V: (H, D, d), used as state @ W.
    scale: of the scores, 1 / sqrt(d_k) by default.

    Weights become floor(2^weight_bits * exp(score - largest possible score)): the largest is a constant of
    the layer, so no token needs to know the others; a token far below it gets weight 0. Values become
    `bits`-bit integers on a grid that the largest one fills. Both are functions of the token alone, which is
    what the certificate needs.
    """
    table, rest, receiver, W_Q, W_K, W_V = (
        np.asarray(a, dtype=np.float64) for a in (table, rest, receiver, W_Q, W_K, W_V))
    m, D = table.shape[0], table.shape[-1]
    if table.shape != (m, m, D) or rest.shape != (m, *rest.shape[1:2], D) or receiver.shape != (D,):
        raise ValueError(
            "states must be table (m, m, D), rest (m, R, D), receiver (D,); got "
            f"{table.shape}, {rest.shape}, {receiver.shape}")
    if W_K.ndim != 3 or W_K.shape[1] != D or W_Q.shape != W_K.shape or W_V.shape[:-1] != W_K.shape[:-1]:
        raise ValueError(
            f"W_Q, W_K: (H, {D}, d_k) and W_V: (H, {D}, d) are needed; got "
            f"{W_Q.shape}, {W_K.shape}, {W_V.shape}")
    if bits < 2 or weight_bits < 0:
        raise ValueError(f"signed values take bits >= 2, weights weight_bits >= 0; got {bits}, {weight_bits}")
    scale = 1 / math.sqrt(W_K.shape[-1]) if scale is None else scale
    key = scale * np.einsum("d,hdk,hek->he", receiver, W_Q, W_K)                       # (H, D)
    score = [np.einsum("iye,he->hiy", states, key) for states in (table, rest)]
    value = [np.einsum("iye,hed->hiyd", states, W_V) for states in (table, rest)]
    top = np.maximum(*(s.max(axis=(1, 2), keepdims=True) for s in score))              # (H, 1, 1)
    largest = np.maximum(*(abs(v).max(axis=(1, 2, 3), keepdims=True) for v in value))  # (H, 1, 1, 1)
    unit = np.where(largest > 0, largest, 1) / (2 ** (bits - 1) - 1)
    weight = [np.floor(2.0**weight_bits * np.exp(s - top)).astype(np.int64) for s in score]
    value = [np.rint(v / unit).astype(np.int64) for v in value]
    return QuantisedLayer(weight[0], value[0], weight[1], value[1])


@dataclass(frozen=True)
class Collision:
    """Two tables with the same message, and a question j = z_0 on which they must be told apart."""

    z: tuple[int, ...]
    z_prime: tuple[int, ...]
    j: int

    @property
    def answers(self) -> tuple[int, int]:
        """What the two inputs ask for; they differ."""
        return self.z[self.j], self.z_prime[self.j]


@dataclass(frozen=True)
class Census:
    """All tables run through one layer."""

    tables: int                    # how many tables were tried
    messages: int                  # how many different messages they sent
    collision: Collision | None    # None if every table has a message of its own: then nothing is proved
    inputs: int                    # tables * questions
    forced_errors: int             # inputs on which the layer errs at least, whatever MLP follows


def all_tables(m: int, *, permutations: bool = False) -> np.ndarray:
    """Every table of m values out of m, in counting order; or only those that are permutations. -> (N, m)."""
    if m < 1:
        raise ValueError(f"a table has at least one entry, got m={m}")
    count = math.factorial(m) if permutations else m**m
    if count > ENUMERABLE:
        raise ValueError(
            f"{count} tables at m={m}, more than the {ENUMERABLE} that are enumerated; "
            f"take m <= {9 if permutations else 7}")
    if permutations:
        return np.array(list(itertools.permutations(range(m))))
    return np.stack([axis.ravel() for axis in np.indices((m,) * m)], axis=1)


def messages(layer: QuantisedLayer, tables: np.ndarray) -> np.ndarray:
    """What each table sends: numerators and denominator of every head. (N, m) -> (N, H (d + 1)) int64."""
    weight = layer.table_weight[..., None]                                        # (H, m, m, 1)
    part = np.concatenate([weight * layer.table_value, weight], axis=-1)          # (H, m, m, d + 1)
    part = part.transpose(1, 2, 0, 3).reshape(layer.m, layer.m, -1)               # (m, m, H (d + 1))
    message = np.zeros((len(tables), part.shape[-1]), dtype=np.int64)
    for i in range(layer.m):
        message += part[i, tables[:, i]]
    return message


def census(layer: QuantisedLayer, tables: np.ndarray | None = None) -> Census:
    """Run all tables (or the given ones, (N, m)) through the layer and look for two with one message.

    forced_errors counts, for every message and question, the tables outside the commonest answer: the
    receiver has one state for all of them. It is a lower bound: states that differ may still be confused.
    """
    tables = all_tables(layer.m) if tables is None else np.asarray(tables)
    if tables.ndim != 2 or tables.shape[1] != layer.m or not len(tables):
        raise ValueError(f"tables must be (N, {layer.m}) with N >= 1, got {tables.shape}")
    if tables.min() < 0 or tables.max() >= layer.m:
        raise ValueError(f"a table's entries lie in 0 .. {layer.m - 1}, got {tables.min()} .. {tables.max()}")
    _, first, sender = np.unique(messages(layer, tables), axis=0, return_index=True, return_inverse=True)
    sender = sender.reshape(-1)                                                   # (N,) number of the message
    forced = 0
    for j in range(layer.m):
        answers = np.bincount(sender * layer.m + tables[:, j], minlength=len(first) * layer.m)
        forced += len(tables) - int(answers.reshape(-1, layer.m).max(axis=1).sum())
    return Census(
        len(tables), len(first), _first_collision(tables, first[sender]), len(tables) * layer.m, forced)


def _first_collision(tables: np.ndarray, twin: np.ndarray) -> Collision | None:
    """twin: (N,) the earliest table with the same message. The first table that is not its own twin tells."""
    for later in np.flatnonzero(twin != np.arange(len(tables))):
        z, z_prime = tables[twin[later]].tolist(), tables[later].tolist()
        differ = [j for j, (a, b) in enumerate(zip(z, z_prime, strict=True)) if a != b]
        if differ:                                     # no: the same table was given twice
            return Collision(tuple(z), tuple(z_prime), differ[0])
    return None


def verify(layer: QuantisedLayer, collision: Collision) -> bool:
    """Whether both inputs, run through the layer token by token, end in equal states but owe two answers.

    True is a proof that this layer, with whatever MLP, errs on (z, j) or on (z_prime, j).
    """
    first, second = (layer.state(z, collision.j) for z in (collision.z, collision.z_prime))
    return first == second and collision.answers[0] != collision.answers[1]
