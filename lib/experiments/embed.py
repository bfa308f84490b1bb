"""Put a trained language model where the book loads it from: `python -m lib.experiments.embed`.

Training (`lib.experiments.language`, export = true) leaves its weights in build/; this writes them to
data/models/austen.safetensors in the format of `lib.models.pretrained`, with what is to be said about them.
Apart from training, so that the record of a long run does not depend on how models are stored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import safetensors

from lib.experiments.language import EXPORTED
from lib.models.pretrained import save_embedded
from lib.models.transformer import Transformer, TransformerConfig
from lib.paths import DATA

EMBEDDED = DATA / "models" / "austen.safetensors"
LARGEST = 8_000_000  # bytes that the repository gives to it
ABOUT = {
    "source": "trained for this book on six novels of Jane Austen, by lib.experiments.language",
    "licence": "MIT; the text is in the public domain",
    "instruction_tuned": False,
}


def read_exported(path: Path = EXPORTED) -> tuple[Transformer, dict]:
    """The model that training left at `path`, and what it was told: settings, seed, loss_nats."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; train a language model with export=True first")
    with safetensors.safe_open(path, "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    model = Transformer(TransformerConfig(**json.loads(metadata["config"])), seed=0, init="zeros")
    named = dict(model.named_parameters())
    if named.keys() != weights.keys():
        raise ValueError(f"{path}: its weights are not those of its config")
    for name, weight in named.items():
        weight.data.copy_(weights[name])
    return model, json.loads(metadata["about"])


def embed(path: Path = EXPORTED, to: Path = EMBEDDED) -> Path:
    """Write the model at `path` to `to`. ValueError if it is larger than 8 MB."""
    model, about = read_exported(path)
    if (size := 4 * model.n_parameters()) > LARGEST:
        raise ValueError(f"{model.n_parameters():,} weights take {size:,} bytes; at most {LARGEST:,} fit")
    save_embedded(model, to, {**ABOUT, "training": about, "weights_hash": model.weights_hash()})
    return to


if __name__ == "__main__":
    print(embed(*map(Path, sys.argv[1:])))
