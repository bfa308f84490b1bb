"""Tokenizers built from GGUF headers, against classes of transformers and published regular expressions."""

import pytest
import tokenizers

from lib.models import pretrained

TEXTS = [
    "The pump didn't stop; it's 1698, we'll say, and I'VE 3 of 12345 left.",
    "  two  spaces\n\n\nlines\t\ttabs \r\n end   ",
    "def f(x):\n    return x ** 2  # ok?!...",
    "naïve café Ångström e\u0301 你好世界 🙂🙂 Привет",
    "<|begin|>user<|end|> and plain",
    "",
]


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE with 300 entries and two control tokens: vocabulary and merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, show_progress=False, special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture
def build(trained, write_gguf, reference):
    def write(pre, **changes):
        vocabulary, merges = trained
        tokens = sorted(vocabulary, key=vocabulary.get)
        fields = {
            "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(merge) for merge in merges],
            "token_type": [3, 3] + [1] * (len(tokens) - 2),
        } | changes  # fmt: skip
        return write_gguf(
            reference(vocab_size=400), vocabulary={k: v for k, v in fields.items() if v is not None}
        )

    return write


@pytest.mark.parametrize("pre, name", [("qwen2", "Qwen2Tokenizer"), ("gpt-2", "GPT2Tokenizer")])
def test_the_tokenizer_is_that_of_transformers(build, trained, pre, name):
    import transformers

    vocabulary, merges = trained
    theirs = getattr(transformers, name)(vocab=vocabulary, merges=merges)
    theirs.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|end|>"]})
    ours = pretrained.load_tokenizer(build(pre))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_every_text_comes_back(build, pre):
    ours = pretrained.load_tokenizer(build(pre))
    for text in TEXTS:
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


LLAMA3 = (  # as in the tokenizer of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pre, rule", [("llama-bpe", LLAMA3), ("smollm", None)])
def test_text_is_cut_as_the_regular_expression_says(build, pre, rule):
    import regex

    cut = pretrained.load_tokenizer(build(pre)).pre_tokenizer
    for text in TEXTS:
        found = [text[a:b] for _, (a, b) in cut.pre_tokenize_str(text)]
        assert found == (regex.findall(rule, text) if rule else by_digits(regex, text)), text


def by_digits(regex, text):
    """SmolLM: first every numeric character stands alone, then GPT-2's rule cuts what lies between."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    pieces = regex.findall(r"\p{N}|[^\p{N}]+", text)
    return [word for piece in pieces for word in regex.findall(gpt2, piece)]


def test_a_text_begins_with_the_token_that_the_file_names(build):
    path = build("llama-bpe", add_bos_token=True, bos_token_id=0)
    ids = pretrained.load_tokenizer(path).encode("The pump").ids
    assert ids[0] == 0 and ids[1:] == pretrained.load_tokenizer(build("llama-bpe")).encode("The pump").ids


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "llama"}, "of kind 'llama'"),
        ({"model": None}, "no tokenizer"),
        ({"pre": "tekken"}, "'tekken'"),
    ],
)
def test_a_tokenizer_not_known_here_leaves_the_model_usable_and_names_the_way_out(
    build, trained, changes, words
):
    path = build(**{"pre": "gpt-2"} | changes)
    assert pretrained.load(path).config.vocab == 400
    with pytest.raises(pretrained.UnsupportedModel, match=f"{words}.*put the model's tokenizer.json beside"):
        pretrained.load_tokenizer(path)
    tokenizers.Tokenizer(tokenizers.models.BPE(*trained)).save(str(path.with_name("tokenizer.json")))
    assert pretrained.load_tokenizer(path).get_vocab_size() == len(trained[0])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"merges": ["no such"]}, "do not fit its vocabulary"),
        ({"merges": None}, "lacks the vocabulary or the merges"),
        ({"tokens": ["a", "a"]}, "repeated"),
        ({"add_bos_token": True, "bos_token_id": 999}, "999"),
    ],
)
def test_a_damaged_vocabulary_is_named(build, changes, words):
    with pytest.raises(pretrained.DamagedModel, match=words):
        pretrained.load_tokenizer(build("gpt-2", **changes))
