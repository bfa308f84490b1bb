"""GGUF files written by the test from random models: equal logits, and one clear error for each fault."""

import struct

import gguf
import numpy as np
import pytest
import torch

from lib.models import pretrained
from lib.models.pretrained.gguf_file import GGUFFile, TensorEntry, read_gguf
from lib.models.pretrained.sources import _config

TOLERANCE = 1e-5  # float32, two layers: other orders of summation, relative to the largest logit


def difference(ours, theirs):
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def test_importing_the_package_loads_no_optional_library():
    import subprocess
    import sys

    code = (
        "import sys, lib.models.pretrained; print([m for m in ('transformers', 'gguf') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_a_llama_file_gives_the_logits_of_transformers(
    write_gguf, reference, logits, tokens, tied, heads, kv_heads
):
    model = reference(
        tie_word_embeddings=tied, num_attention_heads=heads, num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    path = write_gguf(model)
    ours = pretrained.load(path)
    assert ours.config.tied is tied and ours.config.kv_heads == kv_heads and ours.config.rope_base == 500.0
    assert difference(ours(tokens), logits(model, tokens)) < TOLERANCE


def test_query_rows_left_in_half_split_order_give_other_logits(write_gguf, reference, logits, tokens):
    model = reference()
    wrong = pretrained.load(write_gguf(model, permute=False))
    assert difference(wrong(tokens), logits(model, tokens)) > 1e-2


@pytest.mark.parametrize("head_dim", [4, 16])
def test_heads_need_not_fill_the_width(write_gguf, reference, logits, tokens, head_dim):
    model = reference(head_dim=head_dim)
    keys = {f"{key}": head_dim for key in ("attention.key_length", "attention.value_length")}
    path = write_gguf(model, keys=keys | {"rope.dimension_count": head_dim})
    assert difference(pretrained.load(path)(tokens), logits(model, tokens)) < TOLERANCE


def test_qwen2_has_biases_on_queries_keys_and_values_and_no_permutation(
    write_gguf, reference, logits, tokens
):
    model = reference("qwen2", tie_word_embeddings=True)
    ours = pretrained.load(write_gguf(model, family="qwen2"))
    assert ours.config.attention_bias and not ours.layers[0].attention.W_O.bias.any()
    assert difference(ours(tokens), logits(model, tokens)) < TOLERANCE


def test_llama_biases_are_permuted_with_their_rows(write_gguf, reference, logits, tokens):
    model = reference(attention_bias=True, mlp_bias=True)
    assert difference(pretrained.load(write_gguf(model))(tokens), logits(model, tokens)) < TOLERANCE


KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0])
def test_quantised_weights_are_those_that_the_blocks_encode(write_gguf, reference, logits, tokens, kind):
    model = reference(tie_word_embeddings=False)
    ours = pretrained.load(write_gguf(model, kind=kind))
    W = model.lm_head.weight.detach().numpy()
    encoded = gguf.quants.dequantize(gguf.quants.quantize(W, kind), kind)
    assert torch.equal(ours.W_U.weight, torch.from_numpy(encoded))
    assert 0 < np.abs(encoded - W).max() < 0.2
    assert (
        pretrained.source_facts(write_gguf(model, kind=kind))["stored"] == f"{kind.name}, expanded to float32"
    )


def test_q4_1_is_a_scale_and_a_least_value_for_32_numbers(write_gguf, reference):
    """The oracle: loops over blocks of 20 bytes: float16 scale, float16 least, 16 bytes of two numbers."""
    path = write_gguf(reference(), kind=KINDS.Q4_1)
    file = read_gguf(path)
    entry = file.tensors["blk.1.ffn_up.weight"]
    raw, checked = path.read_bytes()[entry.start : entry.start + entry.n_bytes], 0
    found = file.expand(entry.name).reshape(-1)
    for b in range(entry.n_bytes // 20):
        scale, least = struct.unpack("<ee", raw[20 * b : 20 * b + 4])
        for i in range(16):
            byte = raw[20 * b + 4 + i]
            low, high = (scale * q + least for q in (byte & 15, byte >> 4))
            assert abs(found[32 * b + i] - low) < 1e-6 and abs(found[32 * b + 16 + i] - high) < 1e-6
            checked += 2
    assert checked == 64 * 32


@pytest.mark.parametrize("name", "Q2_K Q3_K Q4_K Q5_K Q6_K Q5_1 IQ4_NL IQ4_XS".split())
def test_the_other_common_kinds_are_expanded(tmp_path, name):
    """Blocks of small bytes, which are finite scales in all of them; only their layout is checked here."""
    block, size = gguf.GGML_QUANT_SIZES[KINDS[name]]
    raw = np.random.default_rng(0).integers(0, 60, (3, 512 // block * size), dtype=np.uint8)
    (tmp_path / "blocks").write_bytes(b"four" + raw.tobytes())
    entry = TensorEntry("w", (3, 512), name, start=4, n_bytes=raw.nbytes)
    found = GGUFFile(tmp_path / "blocks", {}, {"w": entry}).expand("w")
    assert found.shape == (3, 512) and found.dtype == np.float32 and np.isfinite(found).all() and found.any()


# ---- faults: every message names the file ----------------------------------------------------------------


@pytest.fixture
def path(write_gguf, reference):
    return write_gguf(reference())


def refused(path, error, *words):
    with pytest.raises(error) as caught:
        pretrained.load(path)
    message = str(caught.value)
    assert str(path) in message and all(word in message for word in words), message
    assert "\n" not in message and not list(path.parent.glob("cache/*-1"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "begins with b''"),
        (b"hello", "no GGUF file"),
        (b"PK\x03\x04rest", "pickles are never read"),
        (b"\x80\x02}q\x00", "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_what_is_no_model_is_said_to_be_none(tmp_path, content, words):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(path, pretrained.UnsupportedModel, words)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_by_name_before_they_are_opened(tmp_path, suffix):
    with pytest.raises(pretrained.UnsupportedModel, match="never read"):
        pretrained.load(tmp_path / f"model{suffix}")


def test_a_file_cut_at_any_length_is_refused(path):
    """Every length of the header, and a few of the data."""
    whole = path.read_bytes()
    start = min(entry.start for entry in read_gguf(path).tensors.values())
    lengths = [*range(4, start, 7), start, start + 1, len(whole) // 2, len(whole) - 1000]
    assert len(lengths) > 100
    for length in lengths:
        path.write_bytes(whole[:length])
        refused(path, pretrained.DamagedModel, "cut short")


@pytest.mark.slow
def test_bytes_changed_in_the_header_never_end_in_another_kind_of_error(path):
    whole = bytearray(path.read_bytes())
    start = min(entry.start for entry in read_gguf(path).tensors.values())
    random, failed = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(4, start, size=3):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            file = read_gguf(path)
            _config(file)
        except (pretrained.DamagedModel, pretrained.UnsupportedModel) as error:
            failed += str(path) in str(error)
    assert failed > 150, "most changes are noticed, and each with the name of the file"


def test_numbers_that_are_not_finite_are_refused(path):
    entry = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[entry.start : entry.start + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    refused(path, pretrained.DamagedModel, "blk.1.ffn_up.weight", "not finite")


@pytest.mark.parametrize("version, words", [(1, "version 1"), (4, "version 4"), (0x03000000, "big-endian")])
def test_other_versions_are_refused(path, version, words):
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path.write_bytes(content)
    refused(path, pretrained.UnsupportedModel, words)


def test_another_architecture_is_named_with_those_supported(write_gguf, reference):
    refused(write_gguf(reference(), family="gemma3"), pretrained.UnsupportedModel, "'gemma3'", "llama, qwen2")


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0), ("expert_count", 8),
        ("attention.causal", False), ("logit_scale", 2.0), ("attention.scale", 0.5),
        ("rope.dimension_count", 4), ("attention.value_length", 16),
    ],
)  # fmt: skip
def test_what_a_file_asks_for_beyond_the_transformer_is_refused(write_gguf, reference, key, value):
    refused(write_gguf(reference(), keys={key: value}), pretrained.UnsupportedModel, f"llama.{key}")


def test_keys_that_ask_for_nothing_are_accepted(write_gguf, reference, logits, tokens):
    keys = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "expert_count": 0}
    model = reference()
    assert (
        difference(pretrained.load(write_gguf(model, keys=keys))(tokens), logits(model, tokens)) < TOLERANCE
    )


def test_a_window_is_a_limit_on_the_input_so_that_it_hides_nothing(write_gguf, reference):
    model = pretrained.load(write_gguf(reference(), keys={"attention.sliding_window": 12}))
    assert model.config.max_tokens == 12
    with pytest.raises(ValueError, match="at most max_tokens=12"):
        model(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    "key, words",
    [("attention.head_count", "must be one number"), ("attention.layer_norm_rms_epsilon", "one number"),
     ("embedding_length", "one number"), ("block_count", "one number")],
)  # fmt: skip
def test_a_missing_key_is_named(write_gguf, reference, key, words):
    refused(write_gguf(reference(), keys={key: None}), pretrained.DamagedModel, f"llama.{key}", words)


@pytest.mark.parametrize(
    "key, value", [("attention.head_count", 5), ("block_count", 0), ("attention.head_count_kv", 3)]
)
def test_impossible_sizes_are_refused(write_gguf, reference, key, value):
    refused(write_gguf(reference(), keys={key: value}), pretrained.DamagedModel)


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "output_norm.weight"]
)
def test_a_missing_tensor_is_named(write_gguf, reference, name):
    refused(write_gguf(reference(), drop=[name]), pretrained.DamagedModel, name)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q_norm.weight", "blk.2.attn_norm.weight"])
def test_a_tensor_of_unknown_use_is_never_ignored(write_gguf, reference, name):
    extra = {name: np.ones(8, dtype=np.float32)}
    refused(write_gguf(reference(), extra=extra), pretrained.UnsupportedModel, name, "another function")


def test_a_tensor_of_another_shape_is_named(write_gguf, reference):
    extra = {"blk.0.ffn_up.weight": np.ones((64, 16), dtype=np.float32)}
    refused(write_gguf(reference(), extra=extra), pretrained.DamagedModel, "(64, 16)", "(64, 32)")


def test_a_quantisation_that_nobody_knows_is_named(path):
    content = path.read_bytes()
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    refused(path, pretrained.UnsupportedModel, "blk.0.attn_q.weight", "999")
