"""Tiny random models of the Llama family: in transformers, and as GGUF files written from them."""

import gguf
import numpy as np
import pytest
import torch

SIZES = dict(
    vocab_size=67, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    intermediate_size=64, max_position_embeddings=50, rms_norm_eps=1e-5,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
GGUF_ENDS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, request):
    """An empty cache for each test, but for those of the real model."""
    if request.path.name != "test_smollm2.py":
        monkeypatch.setenv("PROOF_AND_PROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokens():
    return torch.randint(SIZES["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def reference():
    return random_reference


@pytest.fixture
def logits():
    return reference_logits


@pytest.fixture
def write_gguf(tmp_path):
    def write(model, name="tiny.gguf", **changes):
        return write_llama_gguf(model, tmp_path / name, **changes)

    return write


def random_reference(kind="llama", *, seed=0, **changes):
    """A model of transformers in which every weight, biases and norm scales too, is random."""
    import transformers

    stem = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[kind]
    config = getattr(transformers, f"{stem}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(torch.randn(w.shape, generator=generator) * (0.3 if w.dim() == 2 else 1.0))
    return model


def reference_logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def interleave(w, heads):
    """Half-split to interleaved-pair order with loops: row 2j + s of a head is its row s·(d/2) + j."""
    d, out = len(w) // heads, np.empty_like(w)
    for h in range(heads):
        for j in range(d // 2):
            for s in (0, 1):
                out[h * d + 2 * j + s] = w[h * d + s * (d // 2) + j]
    return out


def write_llama_gguf(
    model, path, *, family="llama", kind=None, drop=(), extra=(), keys=(), vocabulary=None, permute=True
):
    """The weights of a transformers model as a GGUF file. kind: quantisation of matrices, None is float32.

    drop: tensors left out; extra: tensors added or replaced, name -> array; keys: settings changed, None is
    left out; vocabulary: fields of tokenizer.ggml.
    """
    c = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    settings = {
        "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": c.rope_parameters["rope_theta"],
    } | dict(keys)  # fmt: skip
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    fields = {f"{family}.{key}": value for key, value in settings.items()}
    fields |= {f"tokenizer.ggml.{key}": value for key, value in (vocabulary or {}).items()}
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    tensors = {}
    for name, w in model.state_dict().items():
        w, (stem, end) = w.numpy().copy(), name.rsplit(".", 1)
        if stem == "lm_head" and c.tie_word_embeddings:
            continue
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if family == "llama" and permute and stem.endswith(part):
                w = interleave(w, heads)
        _, _, rest = stem.partition("model.layers.")
        l, _, inner = rest.partition(".")
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        tensors[f"{top[stem] if stem in top else f'blk.{l}.{GGUF_ENDS[inner]}'}.{end}"] = w
    for name, w in (tensors | dict(extra)).items():
        if name in drop:
            continue
        if kind is None or w.ndim == 1:
            writer.add_tensor(name, w)
        else:
            writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
