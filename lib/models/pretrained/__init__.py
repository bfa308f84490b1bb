"""Pretrained models, read into the book's own Transformer, so that every layer is open.

    model = load("smollm2-135m")                  # or "austen", a GGUF file, a Hugging Face folder, a hub id
    tokenizer = load_tokenizer("smollm2-135m")
    tokens = torch.tensor([tokenizer.encode("Water boils at").ids])
    model.trace(tokens).residual                  # (L + 1, B, T, D)

Nothing is downloaded but by `fetch` (`make models`), and no pickle is ever read.
"""

from lib.models.pretrained.errors import DamagedModel, NoRoom, NotAvailable, UnsupportedModel
from lib.models.pretrained.sources import NAMES, available, fetch, load, load_tokenizer, source_facts
from lib.models.pretrained.stored import save_embedded

__all__ = [
    "NAMES",
    "DamagedModel",
    "NoRoom",
    "NotAvailable",
    "UnsupportedModel",
    "available",
    "fetch",
    "load",
    "load_tokenizer",
    "save_embedded",
    "source_facts",
]
