"""A Hugging Face folder: config.json, weights in safetensors (one file or many), tokenizer.json.

Also ids of models on the hub ("org/name"): `huggingface_hub` keeps such a folder in a cache of its own, and
only `fetch` asks the network for one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from lib.models.pretrained.cache import file_hash
from lib.models.pretrained.errors import DamagedModel, NotAvailable, UnsupportedModel
from lib.models.pretrained.llama import HF_NAMES, hf_config, weight_sources
from lib.models.pretrained.stored import assemble
from lib.models.transformer import Transformer

INDEX = "model.safetensors.index.json"
NEEDED = ("config.json", "*.safetensors", INDEX, "tokenizer.json", "README.md")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store these angles, which follow from the config


def read_folder(folder: Path, *, dtype: torch.dtype) -> Transformer:
    """The model in `folder`, converted to `dtype`."""
    settings = read_config(folder)
    config = hf_config(settings, path=folder / "config.json")
    where = tensor_files(folder)
    shapes = _shapes(where)
    ignored = {name for name in shapes if name.endswith(COMPUTED)} | (
        {"lm_head.weight"} if config.tied else set()
    )
    optional = ("W_O.bias",) if settings["model_type"] == "qwen2" else ()
    sources = weight_sources(config, shapes, HF_NAMES, path=folder, optional=optional, ignored=ignored)

    def tensor(name: str) -> Tensor:
        with safetensors.safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    if config.tied and "lm_head.weight" in shapes:
        if not torch.equal(tensor("lm_head.weight"), tensor(HF_NAMES["embedding"] + ".weight")):
            raise DamagedModel(f"{folder}: its readout is said to be tied, but differs from its embedding")
    weights = {}
    for name, source in sources.items():
        weight = torch.zeros(config.d_model) if source is None else tensor(source)
        if not weight.is_floating_point():
            raise UnsupportedModel(f"{folder}: tensor {source} is stored as {weight.dtype}, not as floats")
        weights[name] = weight.to(dtype)
    return assemble(config, weights)


def read_config(folder: Path) -> dict:
    """config.json of `folder`."""
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModel(f"{folder} is no model folder: it has no config.json")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedModel(f"{path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise DamagedModel(f"{path} holds {type(settings).__name__}, not an object")
    return settings


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    if (folder / INDEX).is_file():
        try:
            parts = sorted(
                {str(part) for part in json.loads((folder / INDEX).read_bytes())["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedModel(f"{folder / INDEX} is damaged: {error!r}") from error
        files = [folder / part for part in parts]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].is_file():
            pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
            raise UnsupportedModel(
                f"{folder} has no model.safetensors and no {INDEX}"
                + (
                    f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors"
                    * bool(pickles)
                )
            )
    where: dict[str, Path] = {}
    for path in files:
        if not path.is_file():
            raise DamagedModel(f"{folder} lacks {path.name}, which its index names; fetch it again")
        where |= dict.fromkeys(_names(path), path)
    return where


def folder_facts(folder: Path) -> dict:
    """What is known about the model in a folder; the hash covers its safetensors files in order of name."""
    settings = read_config(folder)
    config, where = hf_config(settings, path=folder / "config.json"), tensor_files(folder)
    shapes = _shapes(where)
    used = {
        name
        for name in shapes
        if not name.endswith(COMPUTED) and not (config.tied and name == "lm_head.weight")
    }
    hashes = [file_hash(path) for path in sorted(set(where.values()))]
    return {
        "source": f"{settings.get('model_type')} checkpoint in safetensors",
        "licence": None,
        "sha256": hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "stored": str(settings.get("dtype", settings.get("torch_dtype", "float32"))),
        "instruction_tuned": None,
        "parameters": sum(torch.Size(shapes[name]).numel() for name in used),
    }


def hub_folder(name: str, *, download: bool) -> Path:
    """The folder of model `name` of the hub; with `download` the network is asked for what is missing."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise NotAvailable(
            f"{name!r} is a model of the Hugging Face hub, which needs the package huggingface_hub "
            "(`.venv/bin/python -m pip install transformers`); or give the path of a folder or GGUF file"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(NEEDED), local_files_only=not download
        )
    except LocalEntryNotFoundError as error:
        raise NotAvailable(
            f"{name!r} is not on this machine"
            + (
                ", and the hub cannot be reached; fetch it where there is a network"
                if download
                else f'; download it from the hub with `make models MODELS="{name}"`'
            )
            + ", or give the path of a folder or GGUF file"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotAvailable(f"{name!r} cannot be had from the hub: {first}") from error
    return Path(folder)


def _names(path: Path) -> list[str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedModel(f"{path} is damaged or no safetensors file: {error}; fetch it again") from error


def _shapes(where: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(where.values())):
        with safetensors.safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes
