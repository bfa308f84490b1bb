r"""What attention costs, with and without composition of its heads: weights, arithmetic, cache, saved floats.

    shape = AttentionShape(d_model=512, n_heads=8, composed=True, rank=2)
    parameters(shape)["total"], forward_flops(shape, T=1024)["total"], cache_floats(shape)

All formulas are exact for `lib.models.dcmha.DCMHA` and `lib.models.transformer.Transformer`, where the tests
count weights and observe the arithmetic; `parameter_ratio` and `flop_ratio` are the paper's approximations.
A multiplication with its addition counts as 2 FLOPs; softmax, norms and activations are not counted.
D width, H heads of width d, H_kv key and value heads, R rank, K = 2 R H hidden units of a composition,
S = number of weight sets (up to 4: before and after the softmax, on the query's and on the key's side).
Source: Xiao et al. 2024 (arXiv 2405.08553) and its released code for what is computed; the sums are derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib.choices import check_choice

if TYPE_CHECKING:
    from lib.models.transformer import TransformerConfig

FORMS = ("low_rank", "folded", "explicit")  # how a composition is applied to the pairs; the same function
PAIRS = ("all", "allowed")  # pairs of tokens: a full rectangle, or those that the mask allows
KEPT = ("all", "weights", "inputs")  # for the backward pass


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention layer, in the words of `DCMHA`. composed=False: softmax attention without composition.

    Static talking heads (Shazeer et al. 2020): composed, no query or key side, static=True.
    """

    d_model: int
    n_heads: int
    d_head: int | None = None  # None: d_model / n_heads
    n_kv_heads: int | None = None  # None: n_heads
    bias: bool = False  # on W_Q, W_K, W_V, W_O
    qk_norm: bool = False  # RMSNorm of queries and of keys, each with a scale over d
    causal: bool = True
    window: int | None = None  # keys that a query reads, itself included; None: all
    composed: bool = False
    rank: int = 2
    pre: bool = True  # compose scores
    post: bool = True  # compose weights
    query_side: bool = True
    key_side: bool = True
    gates: bool = True
    static: bool = False  # W_b, the same H x H matrix for all pairs

    def __post_init__(self):
        for name in ("d_model", "n_heads", "d_head", "n_kv_heads", "rank", "window"):
            value, optional = getattr(self, name), name in ("d_head", "n_kv_heads", "window")
            if not (value is None and optional):
                _check_count(name, value)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model when d_head is not given: "
                f"d_model={self.d_model}, n_heads={self.n_heads}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads: n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
            )
        if self.places and not (self.query_side or self.key_side or self.static):
            raise ValueError("nothing would be composed: query_side, key_side or static must be True")

    @classmethod
    def of(cls, config: TransformerConfig, layer: int = 0) -> AttentionShape:
        """The attention of one layer of a Transformer."""
        c = config
        if not 0 <= layer < c.n_layers:
            raise ValueError(f"no layer {layer}; allowed: 0 to {c.n_layers - 1}")
        return cls(
            d_model=c.d_model, n_heads=c.n_heads, d_head=c.head_width, n_kv_heads=c.kv_heads,
            bias=c.attention_bias, qk_norm=c.qk_norm, causal=c.causal,
            window=c.windows[layer % len(c.windows)], composed=c.attention == "dcmha", rank=c.dc_rank,
            pre=c.dc_pre, post=c.dc_post, query_side=c.dc_query_side, key_side=c.dc_key_side,
            gates=c.dc_gates, static=c.dc_static,
        )  # fmt: skip

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def places(self) -> int:
        """Where heads are composed: before the softmax, after it, both, or nowhere."""
        return (self.pre + self.post) if self.composed else 0

    @property
    def sets(self) -> int:
        """S, the number of weight sets that depend on the input."""
        return self.places * (self.query_side + self.key_side)

    @property
    def hidden(self) -> int:
        """K = 2 R H, hidden units of a composition."""
        return 2 * self.rank * self.n_heads


def parameters(shape: AttentionShape) -> dict[str, int]:
    r"""Weights of one attention layer, by part, with their total.

    projections $2D(H + H_{kv})d$ (and biases), norms $2d$ with qk_norm; of the S weight sets: hidden
    $S D K$, factors $S K^2$ (K inputs, 2 R H = K outputs), gates $S D H$; static $H^2$ a place. With all
    four sets, $(8R + 4) H D + 16 R^2 H^2$ more than MHA. Exact.
    """
    D, H, d, K = shape.d_model, shape.n_heads, shape.head_width, shape.hidden
    r, k = H * d, shape.kv_heads * d
    return _with_total(
        projections=D * (2 * r + 2 * k) + shape.bias * (r + 2 * k + D),
        norms=2 * d * shape.qk_norm,
        hidden=shape.sets * D * K,
        factors=shape.sets * K * K,
        gates=shape.sets * shape.gates * D * H,
        static=shape.places * shape.static * H * H,
    )


def n_pairs(shape: AttentionShape, T: int, *, pairs: str = "allowed") -> int:
    r"""Pairs (query, key) of a sequence of T tokens.

    pairs="all": $T^2$, what a computation without skipping makes. "allowed": those inside the mask,
    $T(T+1)/2$ if causal; with a window w, those with $|i - j| < w$ among them. Exact.
    """
    _check_count("T", T)
    check_choice("pairs", pairs, PAIRS)
    if pairs == "all":
        return T * T
    w = T if shape.window is None else min(shape.window, T)
    behind = w * (w + 1) // 2 + (T - w) * w  # 0 <= i - j < w
    return behind if shape.causal else 2 * behind - T


def forward_flops(
    shape: AttentionShape, T: int, *, form: str = "low_rank", pairs: str = "all"
) -> dict[str, int]:
    r"""FLOPs of one layer on one sequence of T tokens, by part, with their total. Exact for what it counts.

    A token costs 2 FLOPs for each weight of projections, hidden, factors and gates; a pair of tokens costs
    2 H d for its scores, 2 H d for its share of the mix, and for the compositions, by form:

    low_rank: `compose` 4 R H for each set (H scores to R numbers, R numbers to H), `gating` 2 H for each set
    with gates (elementwise: multiply, add), `static` 2 H^2 for each place with W_b.
    folded: `fold` builds w_1 w_2^T + diag(g), 2 R H^2 for each token and set; a pair then costs `compose`
    2 H^2 for each set, whatever gates and W_b there are (they and the identity are part of the matrix).
    explicit: `fold` the same; the sides' matrices are added for each pair (not counted), `compose` 2 H^2 for
    each place.

    pairs="all" counts T^2 pairs, "allowed" those that the mask allows (`n_pairs`).
    """
    check_choice("form", form, FORMS)
    return _flops(shape, T, n_pairs(shape, T, pairs=pairs), form)


def token_flops(shape: AttentionShape, context: int, *, form: str = "low_rank") -> dict[str, int]:
    """FLOPs of decoding one token with a cache, by part: it reads `context` keys, itself included.

    A window limits the keys that are read. As `forward_flops` otherwise.
    """
    _check_count("context", context)
    check_choice("form", form, FORMS)
    return _flops(shape, 1, context if shape.window is None else min(context, shape.window), form)


def _flops(shape: AttentionShape, tokens: int, pairs: int, form: str) -> dict[str, int]:
    D, H, R, S, places = shape.d_model, shape.n_heads, shape.rank, shape.sets, shape.places
    r, k, weights = H * shape.head_width, shape.kv_heads * shape.head_width, parameters(shape)
    low_rank = form == "low_rank" or not S  # without sides there is nothing to fold
    matrices = S if form == "folded" else places  # H x H, that act on each pair
    return _with_total(
        projections=2 * tokens * D * (2 * r + 2 * k),
        score=2 * pairs * r,
        mix=2 * pairs * r,
        hidden=2 * tokens * weights["hidden"],
        factors=2 * tokens * weights["factors"],
        gates=2 * tokens * weights["gates"],
        fold=0 if low_rank else 2 * tokens * S * R * H * H,
        compose=pairs * (4 * R * H * S if low_rank else 2 * H * H * matrices),
        gating=2 * pairs * S * H * shape.gates * low_rank,
        static=2 * pairs * places * H * H * shape.static * low_rank,
    )


def training_flops(forward: int) -> int:
    """3 x forward: each product of two matrices has two of the same size in its backward pass.

    Exact where both factors need a gradient; the input of a model's first layer has one when it is embedded.
    Recomputation in the backward pass is not counted: it is the price of what it does not save.
    """
    return 3 * forward


def transformer_flops(
    config: TransformerConfig, T: int, *, form: str = "low_rank", pairs: str = "all"
) -> dict[str, int]:
    """FLOPs of a Transformer's forward pass on one sequence: attention, mlp, readout, with their total.

    MLP: 2 FLOPs for each weight and token; readout: 2 D V for each token; embedding lookups cost none.
    A training step is `training_flops` of the total for each sequence of the batch, and the optimizer.
    """
    c, hidden = config, 2 if config.activation == "swiglu" else 1
    each = (forward_flops(AttentionShape.of(c, l), T, form=form, pairs=pairs) for l in range(c.n_layers))
    return _with_total(
        attention=sum(flops["total"] for flops in each),
        mlp=2 * T * c.n_layers * (hidden + 1) * c.d_model * c.mlp_width,
        readout=2 * T * c.d_model * c.n_out,
    )


def transformer_parameters(config: TransformerConfig) -> dict[str, int]:
    """Weights of a Transformer: embedding (with positions), attention, mlp, norms, readout; their total."""
    c, hidden = config, 2 if config.activation == "swiglu" else 1
    D, F, L = c.d_model, c.mlp_width, c.n_layers
    scale = {"none": 0, "rms": D, "layer": 2 * D}[c.norm] * c.norm_scale
    return _with_total(
        embedding=c.vocab * D + (c.max_tokens * D if c.positions == "learned" else 0),
        attention=sum(parameters(AttentionShape.of(c, l))["total"] for l in range(L)),
        mlp=L * ((hidden + 1) * D * F + hidden * F * c.mlp_bias + D * c.mlp_output_bias * (F > 0)),
        norms=(2 * L + 1) * scale,
        readout=(0 if c.tied else D * c.n_out) + c.n_out * c.readout_bias,
    )


def cache_floats(shape: AttentionShape, *, merged: bool = False) -> dict[str, int]:
    r"""Numbers that decoding keeps for each token: kv, composition, and their total. Exact.

    kv: $2 H_{kv} d$. composition: of the key's side alone (a query's weights are used once), the factors
    w_1, w_2 and the gate, $(2R + 1) H$ a place; merged=True: one H x H matrix, $H^2$ a place, as the released
    inference code keeps. Relative to K and V of all heads $(2R+1)/d$, against $H/d$.
    """
    H, places = shape.n_heads, shape.places * shape.key_side
    each = H * H if merged else (2 * shape.rank + shape.gates) * H
    return _with_total(kv=2 * shape.kv_heads * shape.head_width, composition=places * each)


def saved_per_pair(shape: AttentionShape, *, kept: str = "all") -> float:
    r"""Floats kept for the backward pass, for each pair of tokens and head: in units of B H T^2 floats.

    kept="all", what the formulas need as written: the softmax's output, 1; for each place one H-vector more
    (pre: the scores that it composes; post: the weights that it makes, for the mix), and for each set the R
    numbers that the heads were reduced to, R/H. In all $3 + 4R/H$, 4 at R = 2, H = 8; 1 without composition.
    "weights": the softmax's output, 1, the rest is made again. "inputs": none, all is made again from
    queries, keys, values and factors, whose number grows with T alone (fused attention, our fast kernel).
    An estimate, derived: masks (one byte a pair) and a second copy of the masked weights add to it, skipping
    what lies above the diagonal halves it.
    """
    check_choice("kept", kept, KEPT)
    if kept != "all":
        return float(kept == "weights")
    return 1.0 + shape.places + shape.sets * shape.rank / shape.n_heads


def parameter_ratio(d_head: int, rank: int, *, order: int = 1) -> float:
    r"""Weights that composition adds, relative to those of a layer: $(2R+1)/(3d)$.

    Where it comes from: four sets add $(8R+4) H D$ for hidden and gates, and $H D = D^2/d$; the layer has
    $4D^2$ in attention and $8D^2$ in an MLP of width 4 D, so the ratio is $(8R+4)/(12 d)$.
    Where it is approximate: it leaves out the factors' $16 R^2 H^2 = 16 R^2 D^2/d^2$, small for wide heads.
    order=2 adds them, $4R^2/(3d^2)$, and is exact for that layer (D = H d, no biases or norms, all four sets,
    no W_b). Source: Xiao et al. 2024 for order 1 (quoted second-hand); the derivation is ours.

    >>> [round(100 * parameter_ratio(d, 2), 1) for d in (128, 32)]
    [1.3, 5.2]
    """
    _check_count("d_head", d_head)
    _check_count("rank", rank)
    if order not in (1, 2):
        raise ValueError(f"order is 1 (hidden and gates) or 2 (with the factors), got {order!r}")
    return (2 * rank + 1) / (3 * d_head) + (order == 2) * 4 * rank**2 / (3 * d_head**2)


def flop_ratio(d_head: int, rank: int, *, T: int, d_model: int, order: int = 1) -> float:
    r"""FLOPs that composition adds, relative to those of a layer: $(2R+1)/(3d) (1 + ρ)/(1 + ρ/6)$, ρ = T/D.

    Where it comes from: a token of attention and MLP costs $24 D^2 + 4 T D$, a token of composition
    $2 (8R+4) H (D + T)$: 2 FLOPs for each weight of hidden and gates, and as many numbers act on each pair.
    Where it is approximate: it leaves out the factors' $32 R^2 H^2$ a token; order=2 adds them and is exact
    for `forward_flops` (low_rank). All T^2 pairs are counted; if only the causal half is computed, halve T.
    It says little of time: most of these FLOPs are narrow products over all pairs, bound by memory.
    Derived; a secondary source quotes 1.9 to 3.3 % of the paper for the sizes below.

    >>> [round(100 * flop_ratio(128, 2, T=T, d_model=4096), 1) for T in (2048, 4096, 8192)]
    [1.8, 2.2, 2.9]
    """
    _check_count("T", T)
    _check_count("d_model", d_model)
    rho, first = T / d_model, parameter_ratio(d_head, rank)
    factors = parameter_ratio(d_head, rank, order=order) - first
    return (first * (1 + rho) + factors) / (1 + rho / 6)


def _with_total(**parts: int) -> dict[str, int]:
    return {**parts, "total": sum(parts.values())}


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
