"""Text to measure and train on: six novels, newly written prose, program code; and a small tokenizer.

    austen_tokens("train")                      the training split of the novels, token by token
    document_tokens("prose", tokenizer)         the prose, as a pretrained model's tokenizer reads it
    chunks(tokens, 256)                         windows without overlap; `batch` draws random ones

Every file is a list of documents, each headed by a line "# Title"; paragraphs are separated by blank lines.
"prose" was written for this book and is what pretrained models are measured on: they have very likely read
the novels. "code" is a frozen copy of modules of this book. How the novels were obtained stands in
`lib.tasks.austen`, where they come from in `data/README.md`.
"""

from __future__ import annotations

import lzma
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from lib.choices import check_choice
from lib.paths import DATA

FILES = {"austen": DATA / "austen.txt.xz", "prose": DATA / "prose.txt", "code": DATA / "code.txt"}
BPE = DATA / "models" / "austen-bpe.json"
VOCAB = 1024
SPLITS = ("train", "validation")
PARTS = ("all", "fit", "evaluation")
BLOCK = 20_000  # characters; the next paragraph end closes a block
STRETCH = 200_000  # characters encoded at once: memory grows faster than the text
EVERY = 10  # one block in ten is validation, the fifth: openings and endings of novels are odd text


def documents(name: str) -> list[tuple[str, str]]:
    """(title, text) of every document of "austen", "prose" or "code", as a model reads it.

    Prose and novels come with one line a paragraph, blank lines between: where a printed line ends is no
    property of the language. Code comes as it is. FileNotFoundError if the file is not there.
    """
    found = _documents(FILES[check_choice("text", name, FILES)])
    return [(title, text if name == "code" else unwrap(text)) for title, text in found]


def novels() -> dict[str, str]:
    """The six novels by title, printed line by printed line: 4,025,022 characters."""
    return dict(_documents(FILES["austen"]))


def prose() -> str:
    """All prose, titles left out."""
    return _joined("prose")


def code() -> str:
    """All code, file names left out."""
    return _joined("code")


def unwrap(text: str) -> str:
    """One line a paragraph: line ends and runs of spaces within a paragraph become one space.

    >>> unwrap("It is a truth\\nuniversally  acknowledged,\\n\\n\\n\\nChapter 2")
    'It is a truth universally acknowledged,\\n\\nChapter 2'
    """
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def blocks(text: str, size: int = BLOCK) -> list[str]:
    """`text` cut after the first paragraph end at or behind each `size` characters; joined they are `text`.

    >>> blocks("one\\n\\ntwo\\n\\nthree", size=4)
    ['one\\n\\n', 'two\\n\\n', 'three']
    """
    if size < 1:
        raise ValueError(f"a block holds at least one character, got size={size}")
    found, start = [], 0
    while start < len(text):
        end = text.find("\n\n", max(start, start + size - 2))
        end = len(text) if end < 0 else end + 2
        found.append(text[start:end])
        start = end
    return found


@cache
def austen_blocks(split: str) -> tuple[tuple[str, str], ...]:
    """(novel, text) for each block of a split, "train" or "validation": large blocks, never random lines.

    Of every ten blocks of some 20,000 characters of each novel, the fifth is validation.
    """
    check_choice("split", split, SPLITS)
    return tuple(
        (title, block)
        for title, text in documents("austen")
        for i, block in enumerate(blocks(text))
        if (i % EVERY == EVERY // 2 - 1) == (split == "validation")
    )


def austen_tokens(split: str, tokenizer: Tokenizer | None = None) -> Tensor:
    """The token ids of a split, novel after novel. -> (n,) long. By default in the book's own tokens."""
    return _tokens_of(split).clone() if tokenizer is None else _encode_blocks(split, tokenizer)[0]


def austen_chunks(split: str, T: int, tokenizer: Tokenizer | None = None) -> tuple[Tensor, Tensor]:
    """Windows of T tokens, none of which crosses from one novel to the next, and the novel of each.

    -> (n, T) and (n,) with novels numbered in the order of `novels()`.
    """
    tokens, novel = _encode_blocks(split, austen_tokenizer() if tokenizer is None else tokenizer)
    parts = [chunks(tokens[novel == i], T) for i in novel.unique().tolist()]
    labels = [torch.full((len(part),), i) for i, part in zip(novel.unique().tolist(), parts, strict=True)]
    return torch.cat(parts), torch.cat(labels)


def document_tokens(name: str, tokenizer: Tokenizer, part: str = "all") -> Tensor:
    """The token ids of all documents of a text, one after another, titles left out. -> (n,) long.

    part: "all", or one of two that share no document: what a map is fitted on ("fit") and what it is judged
    on ("evaluation"). Every other document, the first included, is "fit"; "austen" is parted by its splits.
    """
    check_choice("part", part, PARTS)
    if name == "austen" and part != "all":
        return austen_tokens("train" if part == "fit" else "validation", tokenizer)
    texts = [text for _, text in documents(name)]
    texts = {"all": texts, "fit": texts[0::2], "evaluation": texts[1::2]}[part]
    if not texts:
        raise ValueError(f"{name} has no document for {part!r}: it takes two documents, there is one")
    stretches = blocks("\n\n".join(texts), STRETCH)
    return torch.cat([encode(stretch, tokenizer) for stretch in stretches])


def encode(text: str, tokenizer: Tokenizer) -> Tensor:
    """Token ids of a text, without special tokens. -> (n,) long."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)


def chunks(tokens: Tensor, T: int) -> Tensor:
    """All windows of T tokens without overlap; what is left at the end is dropped. (n,) -> (n // T, T).

    >>> chunks(torch.arange(7), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    if T < 1 or len(tokens) < T:
        raise ValueError(f"a window of T={T} tokens needs T >= 1 and as many tokens; there are {len(tokens)}")
    return tokens[: len(tokens) // T * T].view(-1, T)


def batch(tokens: Tensor, step: int, *, seed: int, size: int, T: int) -> Tensor:
    """`size` random windows for one training step, a function of (seed, step) alone. -> (size, T + 1).

    A window holds T inputs and, one further, T targets.
    """
    if size < 1 or T < 1 or len(tokens) < T + 1:
        raise ValueError(
            f"a batch needs size >= 1, T >= 1 and T + 1 tokens; got size={size}, T={T}, {len(tokens)} tokens"
        )
    state = np.random.SeedSequence([seed, step]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(state))
    start = torch.randint(len(tokens) - T, (size, 1), generator=generator)
    return tokens[start + torch.arange(T + 1)]


def train_bpe(text: str, *, vocab: int = VOCAB) -> Tokenizer:
    """Byte-level BPE with `vocab` entries: 256 bytes, then the commonest pair merged, again and again.

    The same text gives the same tokenizer. It decodes to what was encoded for any text: no byte is unknown.
    There are no special tokens. Source: Sennrich, Haddow and Birch 2016; bytes and pre-tokeniser of GPT-2.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab < len(alphabet):
        raise ValueError(f"a byte-level vocabulary holds the {len(alphabet)} bytes at least, got {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} entries, {vocab} were asked for")
    return tokenizer


def austen_tokenizer() -> Tokenizer:
    """The book's own tokenizer, 1,024 entries, made by `train_bpe` from the training split."""
    if not BPE.is_file():
        raise FileNotFoundError(f"{BPE} is not there; `python -m lib.tasks.austen` makes it")
    return Tokenizer.from_str(BPE.read_text(encoding="utf-8"))


def _joined(name: str) -> str:
    return "\n\n".join(text for _, text in documents(name))


@cache
def _documents(path: Path) -> tuple[tuple[str, str], ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; it belongs to the repository, see data/README.md")
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    before, *rest = re.split(r"^# (.+)\n", text, flags=re.MULTILINE)
    if before.strip() or not rest:
        raise ValueError(f"{path} is no list of documents: its first line must be '# ' and a title")
    found = tuple(
        (title.strip(), body.strip("\n")) for title, body in zip(rest[::2], rest[1::2], strict=True)
    )
    empty = [title for title, body in found if not body]
    if empty:
        raise ValueError(f"{path} has documents without text: {', '.join(empty)}")
    return found


@cache
def _tokens_of(split: str) -> Tensor:
    return _encode_blocks(split, austen_tokenizer())[0]


def _encode_blocks(split: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids of a split, and which novel each is from. -> (n,), (n,)."""
    number = {title: i for i, title in enumerate(novels())}
    pieces = [(number[title], encode(block, tokenizer)) for title, block in austen_blocks(split)]
    novel = [torch.full_like(ids, i) for i, ids in pieces]
    return torch.cat([ids for _, ids in pieces]), torch.cat(novel)
