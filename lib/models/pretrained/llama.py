"""What a checkpoint of the Llama family says, in the terms of `lib.models.transformer`.

Llama, Mistral and Qwen2 are that Transformer: RMSNorm with scale, RoPE over the full head width, SwiGLU,
grouped query heads; Qwen2 adds biases on queries, keys and values. What else a checkpoint may ask for (scaled
rotations, experts, other norms, tensors of unknown use) is refused, never ignored.

Llama-type GGUF files keep the rows of W_Q and W_K in interleaved-pair order within each head; row
s·(d/2) + j of the half-split order used here is their row 2j + s, s ∈ {0, 1}, j < d/2 (derived, and checked
against transformers). Sources: config.json of transformers 5, tensor names of the GGUF specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lib.models.pretrained.errors import DamagedModel, UnsupportedModel
from lib.models.pretrained.stored import weight_shapes
from lib.models.transformer import TransformerConfig

GGUF_FAMILY = ("llama", "qwen2")
HF_FAMILY = ("llama", "mistral", "qwen2")
PERMUTED = ("llama",)  # GGUF architectures whose query and key rows are in interleaved-pair order
GGUF_NAMES = {  # ours -> theirs, without .weight and .bias
    "embedding": "token_embd", "norm": "output_norm", "W_U": "output",
    "attention_norm": "blk.{l}.attn_norm", "mlp_norm": "blk.{l}.ffn_norm",
    "attention.W_Q": "blk.{l}.attn_q", "attention.W_K": "blk.{l}.attn_k",
    "attention.W_V": "blk.{l}.attn_v", "attention.W_O": "blk.{l}.attn_output",
    "mlp.W_gate": "blk.{l}.ffn_gate", "mlp.W_1": "blk.{l}.ffn_up", "mlp.W_2": "blk.{l}.ffn_down",
}  # fmt: skip
HF_NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "W_U": "lm_head",
    "attention_norm": "model.layers.{l}.input_layernorm",
    "mlp_norm": "model.layers.{l}.post_attention_layernorm",
    "attention.W_Q": "model.layers.{l}.self_attn.q_proj",
    "attention.W_K": "model.layers.{l}.self_attn.k_proj",
    "attention.W_V": "model.layers.{l}.self_attn.v_proj",
    "attention.W_O": "model.layers.{l}.self_attn.o_proj",
    "mlp.W_gate": "model.layers.{l}.mlp.gate_proj", "mlp.W_1": "model.layers.{l}.mlp.up_proj",
    "mlp.W_2": "model.layers.{l}.mlp.down_proj",
}  # fmt: skip
# Keys of a GGUF architecture, and the values with which they ask for nothing beyond the config. Others: any.
HARMLESS = {
    "expert_count": (0,), "expert_used_count": (0,), "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,), "rope.scale_linear": (1.0,), "attention.causal": (True,),
    "rope.scaling.finetuned": (False,), "use_parallel_residual": (False,),
}  # fmt: skip
READ = (
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "tensor_data_layout",
)  # fmt: skip


def gguf_config(
    metadata: Mapping, tensors: Mapping[str, tuple[int, ...]], *, path: object
) -> TransformerConfig:
    """The shape of the model in a GGUF file. tensors: name -> shape."""
    family = metadata.get("general.architecture")
    if family not in GGUF_FAMILY:
        raise UnsupportedModel(
            f"{path} holds a model of architecture {family!r}; supported: {', '.join(GGUF_FAMILY)}"
        )
    found = {k.removeprefix(f"{family}."): v for k, v in metadata.items() if k.startswith(f"{family}.")}
    for key, value in found.items():
        if key in HARMLESS and value in HARMLESS[key]:
            continue
        if key not in READ:
            raise UnsupportedModel(f"{path} asks for {family}.{key} = {value!r}, which is not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise DamagedModel(f"{path} has no tensor token_embd.weight (vocabulary, width)")

    def number(key: str, *, default: object = None) -> int | float:
        value = found.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = DamagedModel if value is None else UnsupportedModel
            raise kind(f"{path}: {family}.{key} must be one number, found {value!r}")
        return value

    D, H = number("embedding_length"), number("attention.head_count")
    width = number("attention.key_length", default=D // H if H > 0 else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, default=width) != width:
            raise UnsupportedModel(
                f"{path}: {family}.{key} is {found[key]}, but a head is {width} wide; only equal widths fit"
            )
    return _config(
        path, vocab=embedding[0], d_model=D, n_heads=H, d_head=width, d_mlp=number("feed_forward_length"),
        n_layers=number("block_count"), n_kv_heads=number("attention.head_count_kv", default=H),
        norm_eps=number("attention.layer_norm_rms_epsilon"), rope_base=number("rope.freq_base", default=1e4),
        max_tokens=_shorter(number("context_length"), number("attention.sliding_window", default=0)),
        tied="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors, mlp_output_bias="blk.0.ffn_down.bias" in tensors,
    )  # fmt: skip


def hf_config(config: Mapping, *, path: object) -> TransformerConfig:
    """The shape that a config.json of transformers describes."""
    family = config.get("model_type")
    if family not in HF_FAMILY:
        raise UnsupportedModel(f"{path}: model_type is {family!r}; supported: {', '.join(HF_FAMILY)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope_type": (kind, "default"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)), 1.0,
        ),
        "quantization_config": (config.get("quantization_config"), None),
    }  # fmt: skip
    for key, (value, needed) in refused.items():
        if value != needed:
            raise UnsupportedModel(f"{path}: {key} is {value!r}; supported: {needed!r}")
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers",
                    "intermediate_size", "rms_norm_eps", "max_position_embeddings")
        if not isinstance(config.get(key), int | float)
    ]  # fmt: skip
    if missing:
        raise DamagedModel(f"{path} has no number for {', '.join(missing)}")
    window = config.get("sliding_window") if config.get("use_sliding_window", family == "mistral") else None
    H = config["num_attention_heads"]
    return _config(
        path, vocab=config["vocab_size"], d_model=config["hidden_size"], n_heads=H,
        n_layers=config["num_hidden_layers"], n_kv_heads=config.get("num_key_value_heads") or H,
        d_head=config.get("head_dim") or config["hidden_size"] // H, d_mlp=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"], rope_base=rope.get("rope_theta", config.get("rope_theta", 1e4)),
        max_tokens=_shorter(config["max_position_embeddings"], window or 0),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)), mlp_output_bias=bool(config.get("mlp_bias", False)),
    )  # fmt: skip


def weight_sources(
    config: TransformerConfig, tensors: Mapping[str, tuple[int, ...]], names: Mapping[str, str], *,
    path: object, optional: Iterable[str] = (), ignored: Iterable[str] = (),
) -> dict[str, str | None]:  # fmt: skip
    """Our weights -> their tensors; None where an `optional` one (ends of names) is not there: then it is 0.

    tensors: name -> shape, all there are. An error for one that is missing, of unknown use (unless it is
    among `ignored`) or of another shape.
    """
    sources: dict[str, str | None] = {}
    for name, shape in weight_shapes(config).items():
        source = translated(name, names)
        if source not in tensors and name.endswith(tuple(optional)):
            sources[name] = None
            continue
        if source not in tensors:
            raise DamagedModel(f"{path} lacks tensor {source}; is the file, or one of its parts, missing?")
        if tensors[source] != shape:
            raise DamagedModel(
                f"{path}: tensor {source} has shape {tensors[source]}, but its config needs {shape}"
            )
        sources[name] = source
    unknown = sorted(set(tensors) - set(sources.values()) - set(ignored))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UnsupportedModel(
            f"{path} holds tensor {unknown[0]}{more}, of which this Transformer has no use: "
            "leaving it out would compute another function"
        )
    return sources


def translated(name: str, names: Mapping[str, str]) -> str:
    """Our weight's name as theirs."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, l, stem = stem.split(".", 2)
        return f"{names[stem].format(l=l)}.{kind}"
    return f"{names[stem]}.{kind}"


def half_split(w: Tensor, heads: int) -> Tensor:
    """Rows (heads · d, …) from interleaved-pair to half-split order: row 2j + s goes to s·(d/2) + j."""
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def from_gguf(name: str, w: Tensor, config: TransformerConfig, *, family: str) -> Tensor:
    """Weight `name` as the Transformer wants it, from the tensor of a GGUF file."""
    if family in PERMUTED and ".W_Q." in name:
        return half_split(w, config.n_heads)
    if family in PERMUTED and ".W_K." in name:
        return half_split(w, config.kv_heads)
    return w


def _config(path: object, **fields: object) -> TransformerConfig:
    try:
        return TransformerConfig(
            norm="rms", norm_scale=True, activation="swiglu", positions="rope", causal=True, **fields
        )
    except ValueError as error:
        raise DamagedModel(f"{path} describes an impossible model: {error}") from error


def _shorter(context: int, window: int) -> int:
    """The longest input for which a sliding window of that many tokens hides nothing; 0 is no window."""
    return min(context, window) if window > 0 else context
