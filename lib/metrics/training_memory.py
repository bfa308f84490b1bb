"""How many bytes training a Transformer takes on each device, by formula: before anything is allocated.

    parts = training_memory(config, micro_batch=8, T=2048, precision="bfloat16", ranks=2)
    parts["total"] / 1e9                                    # GB on each of two GPUs

Weights are float32, AdamW keeps two moments of each, and `lib.distributed` spreads them over the ranks. What
the backward pass needs is counted operation by operation, for torch's fused softmax attention and for what
`lib.models.dcmha` computes: blocks that are computed again, or, compiled, all pairs of tokens. The tests
compare it with the tensors that autograd keeps, on a CPU. Derived. What a GPU's allocator cannot reuse comes
on top.
"""

from __future__ import annotations

from lib.choices import check_choice
from lib.metrics.attention_cost import AttentionShape, transformer_parameters
from lib.models.transformer import TransformerConfig

BYTES = {"float32": 4, "bfloat16": 2}
AT_WORK = 4  # arrays of all pairs that the backward pass of one composed layer holds besides: estimated


def training_memory(
    config: TransformerConfig,
    *,
    micro_batch: int,
    T: int,
    precision: str = "float32",
    device: str = "cuda",
    compiled: bool = False,
    recompute: bool = False,
    ranks: int = 1,
    sharded: bool = True,
) -> dict[str, int]:
    """Bytes on each device, by part, with their total. micro_batch: sequences of T tokens at a time on it.

    states: 16 P bytes of weights, gradients and two moments, each rank's share if sharded. gathered: weights
    and gradients of what is computed just now, in the precision of the computation, and float32 gradients of
    what lies outside the layers. tokens, composed, pairs: `activation_floats`, the last two in float32, in
    which heads are composed whatever the precision. logits: the scores
    of the vocabulary, twice in float32 (log-softmax and its gradient) and twice in the precision (scores
    and their gradient).
    """
    check_choice("precision", precision, BYTES)
    for name, value in {"micro_batch": micro_batch, "ranks": ranks}.items():
        _check_count(name, value)
    kept = activation_floats(config, T, device=device, compiled=compiled, recompute=recompute)
    size, parameters = BYTES[precision], transformer_parameters(config)
    outside = parameters["embedding"] + parameters["readout"] + parameters["norms"]
    layer = (parameters["attention"] + parameters["mlp"]) // config.n_layers
    parts = {
        "states": 16 * parameters["total"] // (ranks if sharded else 1),
        "gathered": 2 * size * (outside + layer) + 4 * outside,
        "tokens": size * micro_batch * kept["tokens"],
        "composed": 4 * micro_batch * kept["composed"],
        "pairs": 4 * micro_batch * kept["pairs"],
        "logits": (8 + 2 * size) * micro_batch * T * config.n_out,
    }
    return {**parts, "total": sum(parts.values())}


def activation_floats(
    config: TransformerConfig,
    T: int,
    *,
    device: str = "cuda",
    compiled: bool = False,
    recompute: bool = False,
) -> dict[str, int]:
    r"""Numbers that the backward pass of one sequence of T tokens keeps, by kind. A model with RMSNorm.

    recompute: attention is computed again in the backward pass, and its numbers are kept of one layer at a
    time.
    tokens, each of the T, in a layer: 3 D for each of two norms (input, input without its size, output);
    4 F for a SwiGLU MLP of width F (gate, its silu, the other half, their product), else 2 F; in attention
    3 H d for queries, keys, values as they are used, 2 H d for the mix and its copy for W_O, with qk_norm
    2 (H + H_kv) d more. Then 3 D in the final norm. A fused norm keeps D less.
    composed: where heads are composed those numbers of attention, 5 K for each of S weight sets of K = 2 R H
    hidden units, and H^2 for each of P places.
    pairs of tokens, T^2 in a layer, windows or not: compiled, of DCMHA H (2 + P + S (1 + R/H)) (scores and
    softmax, a sum a place, a gated copy and R numbers a set), and 4 H of one layer in its backward pass.
    Otherwise none: blocks are computed again, as torch does for softmax attention. But there a window is a
    mask of T^2 numbers, and on the CPU torch then keeps H weights a pair.
    """
    check_choice("device", device, ("cpu", "cuda"))
    _check_count("T", T)
    c, inside, pairs = config, [], []
    composed = c.attention == "dcmha"
    for l in range(c.n_layers):
        shape = AttentionShape.of(c, l)
        H, d, S, P = shape.n_heads, shape.head_width, shape.sets, shape.places
        masked = shape.window is not None and not composed
        inside.append(5 * H * d + c.qk_norm * 2 * (H + shape.kv_heads) * d + masked * T)
        inside[-1] += 5 * S * shape.hidden + P * H * H
        written_out = H * (2 + P + S) + S * shape.rank if composed and compiled else 0
        pairs.append(written_out + masked * (device == "cpu") * H)
    once = max if recompute else sum
    mlp = (4 if c.activation == "swiglu" else 2) * c.mlp_width
    outside = c.n_layers * (6 * c.d_model + mlp) + 3 * c.d_model
    return {
        "tokens": T * (outside + (0 if composed else once(inside))),
        "composed": T * once(inside) if composed else 0,
        "pairs": T * T * (once(pairs) + composed * compiled * AT_WORK * c.n_heads),
    }


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
