"""Hugging Face folders saved by transformers, and hub ids that are, or are not, on this machine."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from lib.models import pretrained

TOLERANCE = 1e-5  # float32, two layers: other orders of summation, relative to the largest logit


@pytest.fixture
def folder(tmp_path, reference):
    return saved(reference(), tmp_path / "model")


def saved(model, path, **how):
    model.save_pretrained(path, **how)
    return path


def difference(ours, theirs):
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return folder


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_gives_the_logits_of_transformers(tmp_path, reference, logits, tokens, kind, tied):
    rope = {"rope_type": "default", "rope_theta": 300.0}
    model = reference(kind, tie_word_embeddings=tied, rope_parameters=rope)
    ours = pretrained.load(saved(model, tmp_path / kind))
    assert ours.config.tied is tied and ours.config.rope_base == 300.0
    assert difference(ours(tokens), logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 12}])
def test_biases_and_head_widths_are_those_of_the_config(tmp_path, reference, logits, tokens, changes):
    model = reference(**changes)
    assert (
        difference(pretrained.load(saved(model, tmp_path / "m"))(tokens), logits(model, tokens)) < TOLERANCE
    )


def test_weights_in_many_files_are_joined(tmp_path, reference, logits, tokens):
    model = reference()
    folder = saved(model, tmp_path / "parts", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert difference(pretrained.load(folder)(tokens), logits(model, tokens)) < TOLERANCE
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(pretrained.DamagedModel, match=f"lacks {first.name}"):
        pretrained.load(folder)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_stored_in_one_type_and_loaded_in_another(tmp_path, reference, stored, dtype):
    model = reference().to(stored)
    ours = pretrained.load(saved(model, tmp_path / "half"), dtype=dtype)
    assert {w.dtype for w in ours.parameters()} == {dtype}
    assert torch.equal(ours.embedding.weight, model.model.embed_tokens.weight.to(dtype))


def test_a_config_of_older_transformers_is_read(folder, tokens):
    """rope_theta and rope_scaling at the top, torch_dtype: names before version 5."""
    new = pretrained.load(folder)
    edit(folder, rope_parameters="gone", rope_theta=10000.0, rope_scaling=None, torch_dtype="float32")
    assert torch.equal(pretrained.load(folder)(tokens), new(tokens))


def test_the_facts_name_parameters_and_hash(folder, reference):
    facts = pretrained.source_facts(folder)
    assert facts["parameters"] == sum(w.numel() for w in reference().parameters())
    assert facts["kind"] == "folder" and len(facts["sha256"]) == 64 and facts["stored"] == "float32"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "gemma3_text"}, "llama, mistral, qwen2"),
        ({"model_type": "gone"}, "model_type is None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_parameters": "gone", "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_a_config_asks_for_beyond_the_transformer_is_refused(folder, changes, words):
    with pytest.raises(pretrained.UnsupportedModel, match=words) as caught:
        pretrained.load(edit(folder, **changes))
    assert str(folder) in str(caught.value)


def test_a_window_is_a_limit_on_the_input(tmp_path, reference):
    window = saved(reference("mistral", sliding_window=16), tmp_path / "window")
    assert pretrained.load(window).config.max_tokens == 16
    unused = saved(reference("qwen2", sliding_window=16, use_sliding_window=False), tmp_path / "unused")
    assert pretrained.load(unused).config.max_tokens == 50


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "config.json").write_text("{"), "no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not an object"),
        (lambda f: edit(f, hidden_size="gone"), "hidden_size"),
        (lambda f: edit(f, num_hidden_layers=3), "lacks tensor model.layers.2"),
        (lambda f: edit(f, intermediate_size=65), "has shape"),
        (lambda f: edit(f, num_attention_heads=3), "impossible model"),
        (lambda f: edit(f, tie_word_embeddings=True), "said to be tied"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no weights"), "no safetensors"),
        (lambda f: cut(f / "model.safetensors"), "damaged"),
    ],
)
def test_damage_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises(pretrained.DamagedModel, match=words) as caught:
        pretrained.load(folder)
    assert str(folder) in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_a_tensor_of_unknown_use_is_never_ignored(folder):
    with pytest.raises(pretrained.UnsupportedModel, match="layers.1.* and 8 more"):
        pretrained.load(edit(folder, num_hidden_layers=1))


def test_only_a_pickle_is_no_model(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        pretrained.UnsupportedModel, match="pytorch_model.bin is a pickle, which is never read"
    ):
        pretrained.load(folder)
    with pytest.raises(pretrained.UnsupportedModel, match="no config.json"):
        pretrained.load(folder.parent)
    with pytest.raises(pretrained.UnsupportedModel, match="give the folder"):
        (folder / "x.safetensors").write_bytes(b"")
        pretrained.load(folder / "x.safetensors")


def test_a_missing_or_damaged_tokenizer_is_named(folder):
    with pytest.raises(pretrained.NotAvailable, match="tokenizer.json is missing"):
        pretrained.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(pretrained.DamagedModel, match=r"tokenizer\.json"):
        pretrained.load_tokenizer(folder)


# ---- ids of the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_that_was_downloaded_is_loaded_without_network(hub, folder, tokens):
    assert not pretrained.available("someone/tiny")
    commit, place = "0" * 40, hub / "models--someone--tiny"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    assert pretrained.available("someone/tiny")
    assert torch.equal(pretrained.load("someone/tiny")(tokens), pretrained.load(folder)(tokens))
    assert pretrained.source_facts("someone/tiny")["kind"] == "hub"


def test_a_hub_id_that_is_not_here_is_not_downloaded_unasked(hub):
    with pytest.raises(pretrained.NotAvailable, match='make models MODELS="someone/tiny"') as caught:
        pretrained.load("someone/tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, changes):
    import os

    done = subprocess.run(
        [sys.executable, "-m", "lib.models.pretrained", "someone/tiny"], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1", **changes},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("someone/tiny: 'someone/tiny' is not on this machine")
    assert "the hub cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_without_huggingface_hub_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(pretrained.NotAvailable, match="needs the package huggingface_hub"):
        pretrained.load("someone/tiny")


# ---- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [pretrained.load, pretrained.load_tokenizer, pretrained.available])
def test_a_misspelt_name_is_refused_with_the_nearest(call):
    with pytest.raises(ValueError, match="did you mean 'smollm2-135m'"):
        call("smollm2-135")


@pytest.mark.parametrize("name", ["./none.gguf", "models/none.gguf", "/no/such/folder", "none.gguf"])
def test_a_path_that_does_not_exist_is_said_not_to(name):
    assert not pretrained.available(name)
    with pytest.raises(pretrained.NotAvailable, match="does not exist"):
        pretrained.load(name)


def test_types_that_are_no_floats_are_refused(folder):
    with pytest.raises(ValueError, match=r"allowed: torch\.float32"):
        pretrained.load(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="unknown device"):
        pretrained.load(folder, device="gpu")
