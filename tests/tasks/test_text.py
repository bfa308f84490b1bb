"""Text: nothing is lost on the way from the package to the tokens, and the splits share nothing."""

import hashlib
import lzma
import random
import zlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tasks import austen, questions, text

COUNTS = {  # characters, counted when the package was first opened
    "Emma": 883_027,
    "Mansfield Park": 883_278,
    "Northanger Abbey": 433_410,
    "Persuasion": 466_853,
    "Pride and Prejudice": 684_767,
    "Sense and Sensibility": 673_687,
}


@pytest.fixture(scope="module")
def tokenizer():
    return text.austen_tokenizer()


def serialised(lines: list[str], encoding_bits: int = 4) -> bytes:
    """A record as R writes it: the 31-byte header, then flags, length and bytes of each line."""
    header = b"X\n" + bytes([0, 0, 0, 3, 0, 4, 2, 1, 0, 3, 5, 0]) + (5).to_bytes(4, "big") + b"UTF-8"
    record = header + bytes([0, 0, 0, 16]) + len(lines).to_bytes(4, "big")
    for line in lines:
        data = line.encode()
        record += bytes([0, encoding_bits, 0, 9]) + len(data).to_bytes(4, "big") + data
    return record


def database(records: list[bytes]) -> bytes:
    return b"".join(len(record).to_bytes(4, "big") + zlib.compress(record) for record in records)


def test_the_six_novels_have_their_characters():
    assert {title: len(body) for title, body in text.novels().items()} == COUNTS
    assert sum(COUNTS.values()) == 4_025_022
    assert tuple(COUNTS) == austen.TITLES


def test_the_plain_text_has_its_hash():
    plain = lzma.decompress(text.FILES["austen"].read_bytes())
    assert hashlib.sha256(plain).hexdigest() == austen.TEXT_SHA256
    assert plain == austen.join(text.novels())


@settings(deadline=None)
@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\n")), max_size=5), max_size=4))
def test_a_database_of_lines_is_read_back_whole(records):
    found = [austen.lines(record) for record in austen.records(database([serialised(r) for r in records]))]
    assert found == records


def test_a_record_is_its_lines_and_eight_bytes_each_and_a_header():
    lines = ["It is a truth", "", "£9"]
    record = serialised(lines)
    assert len(record) - austen.HEADER == sum(len(line.encode()) + 8 for line in lines)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda r: r[:-1], "a line is lost or invented"),
        (lambda r: r + b"x", "a line is lost or invented"),
        (lambda r: r[: austen.HEADER + 3] + b"\x10" + r[austen.HEADER + 4 :], "no string begins at byte 31"),
        (lambda r: r[: austen.HEADER + 4] + b"\xff" * 4 + r[austen.HEADER + 8 :], "length -1"),
    ],
)
def test_a_damaged_record_is_refused(break_it, message):
    with pytest.raises(ValueError, match=message):
        austen.lines(break_it(serialised(["one", "two"])))


def test_a_damaged_database_and_a_wrong_package_are_refused(tmp_path):
    whole = database([serialised(["one"])])
    with pytest.raises(ValueError, match="cut short"):
        list(austen.records(whole[:-3]))
    with pytest.raises(ValueError, match="cut short, or its length"):
        list(austen.records(b"\0\0\0\1" + whole[4:]))
    (tmp_path / "package.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(ValueError, match=austen.PACKAGE_SHA256):
        austen.read_package(tmp_path / "package.deb")


def test_unwrapping_changes_nothing_but_white_space():
    for title, body in text.documents("austen"):
        assert body.split() == text.novels()[title].split()
        assert "\n" not in body.replace("\n\n", "") and "  " not in body


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 50))
def test_blocks_join_to_the_text_and_end_with_paragraphs(body, size):
    found = text.blocks(body, size)
    assert "".join(found) == body
    assert all(block.endswith("\n\n") and len(block) >= min(size, 2) for block in found[:-1])
    assert all(block for block in found)


def test_the_splits_part_the_novels():
    train, validation = (text.austen_blocks(split) for split in text.SPLITS)
    assert not {block for _, block in train} & {block for _, block in validation}
    for title, body in text.documents("austen"):
        parts = [[b for t, b in split if t == title] for split in (train, validation)]
        assert Counter("".join(parts[0] + parts[1])) == Counter(body)
        share = len("".join(parts[1])) / len(body)
        assert 0.07 < share < 0.12, f"validation is about a tenth of {title}: {share:.3f}"


def test_no_long_passage_of_validation_stands_in_training():
    train = "".join(block for _, block in text.austen_blocks("train"))
    for _, block in text.austen_blocks("validation"):
        for at in random.Random(0).sample(range(len(block) - 200), 3):
            assert block[at : at + 200] not in train


@pytest.mark.slow
def test_the_tokens_of_a_split_decode_to_its_text(tokenizer):
    for split, count in (("validation", 126_693), ("train", 1_253_530)):
        tokens = text.austen_tokens(split)
        assert tokenizer.decode(tokens.tolist()) == "".join(block for _, block in text.austen_blocks(split))
        assert len(tokens) == count and 0 <= tokens.min() and tokens.max() < text.VOCAB


def test_tokens_handed_out_can_be_changed_without_harm():
    tokens = text.austen_tokens("validation")
    tokens.zero_()
    assert text.austen_tokens("validation").count_nonzero() > 0


def test_windows_never_cross_from_one_novel_to_the_next(tokenizer):
    windows, novel = text.austen_chunks("validation", 128)
    assert windows.shape == (len(novel), 128) and novel.bincount().min() > 100
    assert novel.tolist() == sorted(novel.tolist())
    for i, title in enumerate(austen.TITLES):
        body = "".join(block for t, block in text.austen_blocks("validation") if t == title)
        first, last = (tokenizer.decode(windows[novel == i][at].tolist()) for at in (0, -1))
        assert body.startswith(first)
        assert last in body


@pytest.mark.parametrize("name", ["prose", "code"])  # the novels: by their splits, above
def test_the_tokenizer_loses_nothing(name, tokenizer):
    for title, body in text.documents(name):
        assert tokenizer.decode(tokenizer.encode(body).ids) == body, title


@given(st.text())
def test_the_tokenizer_loses_nothing_of_any_text(tokenizer, body):
    assert tokenizer.decode(text.encode(body, tokenizer).tolist()) == body


def test_the_tokenizer_has_1024_entries_and_no_special_ones(tokenizer):
    assert tokenizer.get_vocab_size() == 1024
    assert not tokenizer.get_added_tokens_decoder()


def merges_by_counting(words: list[str], rounds: int) -> list[str]:
    """BPE from its definition: merge the commonest pair of neighbours, `rounds` times. -> what was made."""
    pieces, made = [list(word) for word in words], []
    for _ in range(rounds):
        counts: dict[tuple[str, str], int] = {}
        for word in pieces:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        ranked = sorted(counts.values(), reverse=True)
        assert len(ranked) == 1 or ranked[0] > ranked[1], "choose a text without ties"
        best = max(counts, key=counts.get)
        made.append("".join(best))
        for word in pieces:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return made


def test_training_merges_the_commonest_pair_again_and_again():
    words = ["abab"] * 8 + ["abc"] * 5 + ["xab"] * 3 + ["cd"] * 2
    made = merges_by_counting(words, 3)
    learned = text.train_bpe(" ".join(words).replace(" ", "\n\n"), vocab=256 + 3).get_vocab()
    assert [word for word, i in sorted(learned.items(), key=lambda at: at[1]) if i >= 256] == made


def test_training_twice_gives_the_same_tokenizer_and_other_text_another_one():
    blocks = [block for _, block in text.austen_blocks("train")]
    first, again, other = (
        text.train_bpe(part, vocab=400).to_str() for part in (blocks[0], blocks[0], blocks[9])
    )
    assert first == again != other


@pytest.mark.slow
def test_the_tokenizer_of_the_repository_is_the_one_training_gives():
    whole = "".join(block for _, block in text.austen_blocks("train"))
    assert text.train_bpe(whole).to_str(pretty=True) + "\n" == text.BPE.read_text(encoding="utf-8")


@given(st.integers(1, 40), st.integers(0, 200))
def test_windows_are_consecutive_and_only_a_remainder_is_dropped(T, more):
    tokens = torch.arange(T + more)
    windows = text.chunks(tokens, T)
    assert windows.flatten().equal(tokens[: windows.numel()])
    assert 0 <= len(tokens) - windows.numel() < T


def test_a_batch_is_a_function_of_seed_and_step_alone():
    tokens = torch.arange(1000)
    torch.manual_seed(0)
    first = text.batch(tokens, 5, seed=3, size=8, T=16)
    torch.manual_seed(1)
    text.batch(tokens, 6, seed=3, size=8, T=16)
    assert first.equal(text.batch(tokens, 5, seed=3, size=8, T=16))
    assert not first.equal(text.batch(tokens, 6, seed=3, size=8, T=16))
    assert not first.equal(text.batch(tokens, 5, seed=4, size=8, T=16))
    assert first.shape == (8, 17) and (first.diff(dim=1) == 1).all(), "windows are consecutive tokens"


def test_every_window_can_be_drawn_the_last_one_included():
    starts = {int(w[0]) for w in text.batch(torch.arange(12), 0, seed=0, size=2000, T=8)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["prose", "code"])
def test_fit_and_evaluation_share_no_document_and_are_all_there_is(name, tokenizer):
    parts = [text.document_tokens(name, tokenizer, part) for part in ("fit", "evaluation")]
    fit, evaluation = (tokenizer.decode(part.tolist()) for part in parts)
    for i, (title, body) in enumerate(text.documents(name)):
        assert (body in fit, body in evaluation) == ((True, False) if i % 2 == 0 else (False, True)), title
    whole = tokenizer.decode(text.document_tokens(name, tokenizer).tolist())
    assert whole == {"prose": text.prose, "code": text.code}[name]()


def test_the_parts_of_the_novels_are_their_splits_in_the_tokens_given(tokenizer, monkeypatch):
    evaluation = text.document_tokens("austen", tokenizer, "evaluation")
    assert evaluation.equal(text.austen_tokens("validation"))
    bytewise = text.train_bpe("none", vocab=256)
    found = text.document_tokens("austen", bytewise, "evaluation")
    assert len(found) == sum(len(block.encode()) for _, block in text.austen_blocks("validation"))
    asked = []
    monkeypatch.setattr(text, "austen_tokens", lambda split, own: asked.append((split, own)))
    text.document_tokens("austen", tokenizer, "fit")
    assert asked == [("train", tokenizer)]


def test_the_code_is_thirty_thousand_characters_of_python():
    found = text.documents("code")
    assert all(title.endswith(".py") for title, _ in found) and len(found) == 6
    for title, body in found:
        compile(body, title, "exec")
    assert 25_000 < len(text.code()) < 40_000


def test_the_prose_has_many_documents_of_paragraphs():
    found = text.documents("prose")
    assert len(found) >= 4 and len({title for title, _ in found}) == len(found)
    assert all("\n\n" in body for _, body in found)


def test_a_file_of_documents_is_read_with_its_titles(tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text(
        "# One\n\nA line\nbroken.\n\n\nSecond.\n\n# Two words\nText # not a title.\n"
    )
    monkeypatch.setitem(text.FILES, "prose", tmp_path / "own.txt")
    assert text.documents("prose") == [
        ("One", "A line broken.\n\nSecond."),
        ("Two words", "Text # not a title."),
    ]
    assert text.prose() == "A line broken.\n\nSecond.\n\nText # not a title."


@pytest.mark.parametrize(
    "content, message",
    [("No title.\n", "list of documents"), ("", "list of documents"), ("# A\n# B\nb\n", "without text: A")],
)
def test_a_file_that_is_no_list_of_documents_is_refused(content, message, tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text(content)
    monkeypatch.setitem(text.FILES, "prose", tmp_path / "own.txt")
    with pytest.raises(ValueError, match=message):
        text.documents("prose")


def test_a_missing_file_says_where_it_belongs(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setitem(text.FILES, "prose", tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"data/README\.md"):
        text.prose()
    monkeypatch.setattr(text, "BPE", tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="python -m lib.tasks.austen"):
        text.austen_tokenizer()
    (tmp_path / "one.txt").write_text("# One\ntext\n")
    monkeypatch.setitem(text.FILES, "prose", tmp_path / "one.txt")
    with pytest.raises(ValueError, match="takes two documents"):
        text.document_tokens("prose", tokenizer, "evaluation")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: text.documents("pose"), "did you mean 'prose'"),
        (lambda: text.austen_tokens("val"), "Allowed: train, validation"),
        (lambda: text.document_tokens("prose", None, "fitted"), "did you mean 'fit'"),
        (lambda: text.chunks(torch.arange(5), 6), "there are 5"),
        (lambda: text.chunks(torch.arange(5), 0), "T >= 1"),
        (lambda: text.batch(torch.arange(5), 0, seed=0, size=1, T=5), "5 tokens"),
        (lambda: text.batch(torch.arange(5), 0, seed=0, size=0, T=2), "size >= 1"),
        (lambda: text.blocks("a", 0), "size=0"),
        (lambda: text.train_bpe("a", vocab=100), "256 bytes at least"),
        (lambda: text.train_bpe("ab ab", vocab=300), "were asked for"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_question_is_encoded_with_the_length_of_its_prompt(tokenizer):
    question = questions.Question("The answer is", " Anna", 1)
    ids, n = questions.encode_question(question, tokenizer)
    assert tokenizer.decode(ids[:n].tolist()) == "The answer is"
    assert tokenizer.decode(ids[n:].tolist()) == " Anna"


def test_an_answer_that_merges_into_its_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="move the space"):
        questions.encode_question(questions.Question("and w", "e", 1), tokenizer)
    with pytest.raises(ValueError, match="move the space"):  # longer than the prompt, and yet no answer to it
        questions.encode_question(questions.Question("and w", "e then", 1), tokenizer)
    with pytest.raises(ValueError, match="merges across"):
        questions.encode_question(questions.Question("the answer", "", 1), tokenizer)
