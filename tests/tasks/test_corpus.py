"""A corpus becomes a file of tokens: all of it, once, in order, whatever is killed or unreadable."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lib.tasks.corpus as corpora
from lib.tasks import text
from lib.tasks.corpus import Corpus, n_windows, token_file, window_batch, windows

TOKENIZER = text.austen_tokenizer()


@pytest.fixture
def small(monkeypatch):
    """Pieces so small that a short text takes many, and a state is saved after each."""
    monkeypatch.setattr(corpora, "PIECE", 500)
    monkeypatch.setattr(corpora, "SAVE_EVERY", 1)


def written(folder, body=None, name="corpus.txt"):
    path = folder / name
    path.write_bytes((text.prose()[:6_000] if body is None else body).encode())
    return str(path)


def make(folder, source, n_tokens=10**6, **corpus):
    return token_file(
        Corpus(source=source, **corpus), TOKENIZER, n_tokens=n_tokens, folder=folder / "cache", progress=False
    )


def decoded(tokens):
    return TOKENIZER.decode(tokens.ids.tolist(), skip_special_tokens=False)


def test_the_tokens_say_the_text_again_letter_by_letter(tmp_path, small):
    body = text.prose()[:5_000] + " naïve — “quoted”, 漢字\n" * 20
    tokens = make(tmp_path, written(tmp_path, body))
    assert decoded(tokens) == body
    assert tokens.whole and tokens.ids.dtype == np.uint16


def test_in_one_piece_the_tokens_are_those_of_the_tokenizer(tmp_path):
    body = text.prose()[:5_000]
    assert make(tmp_path, written(tmp_path, body)).ids.tolist() == text.encode(body, TOKENIZER).tolist()


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    assert decoded(make(tmp_path, written(tmp_path, "\ufeffIt was.\n"))) == "It was.\n"


def test_only_the_first_tokens_are_kept_where_fewer_are_asked_for(tmp_path, small):
    source = written(tmp_path)
    whole, part = make(tmp_path, source), make(tmp_path, source, n_tokens=700)
    assert part.ids.tolist() == whole.ids[:700].tolist()
    assert not part.whole and whole.whole


def test_the_file_is_made_once_and_anew_when_the_text_changed(tmp_path, monkeypatch):
    source = written(tmp_path)
    first = make(tmp_path, source)
    with monkeypatch.context() as quiet:
        quiet.setattr(corpora, "_make", lambda *_: pytest.fail("it was there"))
        assert make(tmp_path, source).path == first.path
    written(tmp_path, "Something else.\n")
    assert decoded(make(tmp_path, source)) == "Something else.\n"


@pytest.mark.parametrize("piece", [1, 3, 5])
def test_a_killed_process_goes_on_and_the_file_is_that_of_an_unbroken_run(
    tmp_path, small, monkeypatch, piece
):
    source, read = written(tmp_path), corpora._read
    whole = make(tmp_path / "other", source).ids.tolist()
    positions = []

    def breaking(corpus, position):
        positions.append(position)
        for i, part in enumerate(read(corpus, position)):
            if i == piece and len(positions) == 2:  # the first time it only looks
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(corpora, "_read", breaking)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, source)
    part = next((tmp_path / "cache").glob("*.part"))
    with part.open("ab") as file:
        file.write(b"half a write")
    assert make(tmp_path, source).ids.tolist() == whole
    assert positions[-1] > 0


def test_a_token_file_that_was_changed_is_refused(tmp_path):
    source = written(tmp_path)
    path = make(tmp_path, source).path
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="missing, cut short or changed; delete .*json"):
        make(tmp_path, source)


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        (b"", ValueError, "is empty"),
        (b"  \n\n \n", ValueError, "begins without text"),
        ("café".encode("latin1"), ValueError, "not UTF-8: byte 3 is 0xe9"),
        ("It was.".encode("utf-16"), ValueError, "not UTF-8: byte 0 is 0xff"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(tmp_path, body, error, said):
    (tmp_path / "corpus.txt").write_bytes(body)
    with pytest.raises(error, match=said):
        make(tmp_path, str(tmp_path / "corpus.txt"))


def test_the_byte_that_is_no_utf8_is_named_wherever_it_is(tmp_path, small):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"It was a line.\n" * 100 + b"caf\xe9\n")
    with pytest.raises(ValueError, match="byte 1503 is 0xe9"):
        make(tmp_path, str(path))


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("", ValueError, "no corpus is named"),
        ("nowhere/corpus.txt", FileNotFoundError, "does not exist; give the path of a UTF-8 text file"),
        ("corpus", FileNotFoundError, "does not exist"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused(tmp_path, source, error, said):
    with pytest.raises(error, match=said):
        make(tmp_path, source)


def test_a_folder_a_line_without_end_and_a_full_disk_are_refused(tmp_path, small, monkeypatch):
    with pytest.raises(ValueError, match="is a folder; give one text file"):
        make(tmp_path, str(tmp_path))
    monkeypatch.setattr(corpora, "LONGEST", 1_000)
    with pytest.raises(ValueError, match="a line of more than 1000 bytes"):
        make(tmp_path, written(tmp_path, "word " * 1_000))
    monkeypatch.setattr(corpora.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"0\.0 GB free"):
        make(tmp_path, written(tmp_path))


def test_the_novels_come_with_the_book(tmp_path):
    tokens = make(tmp_path, "austen", n_tokens=2_000)
    assert decoded(tokens)[:200] == text.documents("austen")[0][1][:200]


# Datasets of the hub: a stand-in for the package, which is no dependency


class Stream:
    """A streamed dataset that counts the rows that were asked for."""

    def __init__(self, rows, skipped=0):
        self.rows, self.skipped = rows, skipped

    def skip(self, n):
        return Stream(self.rows, n)

    def __iter__(self):
        for i in range(self.skipped, len(self.rows)):
            HUB["read"] = max(HUB.get("read", 0), i + 1)
            if i == HUB.get("breaks"):
                raise OSError("the connection was lost")
            yield self.rows[i]


HUB = {}


@pytest.fixture
def hub(monkeypatch):
    HUB.clear()
    HUB["rows"] = [{"text": f"Row {i} of it all.", "id": i} for i in range(1_000)]

    def load_dataset(source, *, name, split, streaming):
        assert streaming
        HUB["asked"] = (source, name, split)
        if "error" in HUB:
            raise HUB["error"]
        return Stream(HUB["rows"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return HUB


def test_rows_are_streamed_no_further_than_they_are_needed(tmp_path, hub):
    tokens = make(tmp_path, "org/name", n_tokens=500, subset="en", split="validation")
    joined = "".join(row["text"] for row in hub["rows"])
    assert joined.startswith(decoded(tokens))
    assert hub["asked"] == ("org/name", "en", "validation")
    assert hub["read"] <= 2 * corpora.ROWS < len(hub["rows"])


def test_the_end_of_each_row_is_marked_where_a_token_is_named(tmp_path, hub):
    hub["rows"] = hub["rows"][:3]
    tokens = make(tmp_path, "org/name", end_of_text="Ġthe")
    end = TOKENIZER.token_to_id("Ġthe")
    assert tokens.ids.tolist() == [
        id for row in hub["rows"] for id in [*text.encode(row["text"], TOKENIZER).tolist(), end]
    ]
    with pytest.raises(ValueError, match="end_of_text '<end>' is no token of this tokenizer of 1024"):
        make(tmp_path, "org/name", end_of_text="<end>")


def test_a_lost_connection_is_told_and_what_was_tokenised_is_not_read_again(
    tmp_path, hub, small, monkeypatch
):
    monkeypatch.setattr(corpora, "ROWS", 100)
    hub["breaks"] = 730
    with pytest.raises(ConnectionError, match="the connection was lost.*what was tokenised so far is kept"):
        make(tmp_path, "org/name")
    state = json.loads(next((tmp_path / "cache").glob("*.state")).read_text())
    assert state["position"] == 700
    del hub["breaks"]
    assert decoded(make(tmp_path, "org/name")) == "".join(row["text"] for row in hub["rows"])


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"error": OSError("offline mode")}, ConnectionError, "cannot be had from the .* hub: offline mode"),
        ({"error": ValueError("Unknown split 'x'")}, ValueError, "'org/name': Unknown split 'x'"),
        ({"rows": [{"content": "a"}]}, ValueError, "unknown column of org/name 'text'; .*content"),
        ({"rows": [{"text": 3}]}, ValueError, "column 'text' of org/name holds int, not text"),
        ({"rows": []}, ValueError, "begins without text"),
    ],
)
def test_what_a_dataset_lacks_is_told_before_any_work(tmp_path, hub, change, error, said):
    hub.update(change)
    with pytest.raises(error, match=said):
        make(tmp_path, "org/name")


def test_without_the_package_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        make(tmp_path, "org/name")


# Windows


def test_each_epoch_reads_every_window_once_in_an_order_of_its_own():
    ids, T, size = np.arange(101), 4, 6
    n = n_windows(ids, T)
    assert n == 25
    drawn = torch.cat([window_batch(ids, step, seed=3, size=size, T=T, n=n) for step in range(26)])
    starts = (drawn[:, 0] // T).tolist()
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(T + 1))
    epochs = [starts[i : i + n] for i in range(0, 150, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_batch_depends_on_seed_and_step_alone():
    ids = np.arange(401)
    first = window_batch(ids, 7, seed=3, size=5, T=4, n=90)
    window_batch(ids, 400, seed=1, size=5, T=4, n=90)
    assert torch.equal(first, window_batch(ids, 7, seed=3, size=5, T=4, n=90))
    assert not torch.equal(first, window_batch(ids, 7, seed=4, size=5, T=4, n=90))


def test_windows_meet_in_one_token_the_target_of_one_and_the_input_of_the_next():
    found = windows(np.arange(13, dtype=np.uint16), range(3), 4)
    assert found.dtype == torch.long
    assert found.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
