"""The tokenizer that a GGUF file carries: byte-level BPE, as a `tokenizers.Tokenizer`.

tokenizer.ggml.pre names how text is cut before merging. The cuts of SmolLM, GPT-2, Llama 3 and Qwen2 are
known here; for others the model's own tokenizer.json is the way out. Sources: the tokenizer.json files of
these models and llama.cpp's regular expressions of the same names.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from lib.models.pretrained.errors import DamagedModel, UnsupportedModel

CONTROL, USER_DEFINED = 3, 4  # kinds of entries in tokenizer.ggml.token_type
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(WORDS.format(digits=digits)), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


CUTS = {
    "smollm": _smollm,
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}
SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def gguf_tokenizer(metadata: Mapping, *, path: object) -> Tokenizer:
    """The tokenizer in the header of a GGUF file; UnsupportedModel for one that is not known here."""
    way_out = f"put the model's tokenizer.json beside {path}"
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        kind = "no tokenizer" if model is None else f"a tokenizer of kind {model!r}"
        raise UnsupportedModel(f"{path} holds {kind}; only byte-level BPE ('gpt2') is built here; {way_out}")
    named = metadata.get("tokenizer.ggml.pre", "default")
    pre = SAME.get(named, named)
    if pre not in CUTS:
        raise UnsupportedModel(
            f"{path}: text is cut by the rules {named!r}; known: {', '.join(CUTS)}; {way_out}"
        )
    tokens, merges = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise DamagedModel(f"{path} lacks the vocabulary or the merges of its tokenizer; {way_out}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise DamagedModel(f"{path}: {len(tokens) - len(vocabulary)} tokens of its vocabulary are repeated")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise DamagedModel(f"{path}: its merges do not fit its vocabulary: {error}; {way_out}") from error
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = CUTS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    tokenizer.post_processor = _post_processor(metadata, tokens, path=path)
    return tokenizer


def _post_processor(metadata: Mapping, tokens: list[str], *, path: object) -> processors.PostProcessor:
    """Adds the token that begins a text, where the file says so."""
    bytes_ = processors.ByteLevel(trim_offsets=False)
    if not metadata.get("tokenizer.ggml.add_bos_token", False):
        return bytes_
    i = metadata.get("tokenizer.ggml.bos_token_id")
    if not isinstance(i, int) or not 0 <= i < len(tokens):
        raise DamagedModel(f"{path}: texts begin with token {i!r}, which is not in its vocabulary")
    first = tokens[i]
    begin = processors.TemplateProcessing(
        single=[first, "$A"], pair=[first, "$A", first, "$B"], special_tokens=[(first, i)]
    )
    return processors.Sequence([bytes_, begin])
