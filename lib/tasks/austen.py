"""How `data/austen.txt.xz` and the tokenizer were made: `python -m lib.tasks.austen PACKAGE.deb`.

The text is read out of Debian's package r-cran-janeaustenr (`apt-get download r-cran-janeaustenr`), by the
standard library alone. Without an argument only the tokenizer is made anew, from the text in `data/`.

An R lazy-load database is a row of records: 4 bytes with the length of the plain data, big-endian, and a zlib
stream. Each record here is one serialised vector of strings, the printed lines of a novel: a header of 31
bytes, of which the last 4 are the number of lines, and for each line a flag word, its length, its bytes.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from lib.tasks import text

PACKAGE_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
TEXT_SHA256 = "5454990481f9574d3376a2438540eed21a0ba7256208e322e6d3528935ac62d8"  # of the plain text
TITLES = (  # the order of the file
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)
HEADER = 31  # bytes before the first line of a record


def read_package(path: Path) -> dict[str, str]:
    """The six novels by title, lines joined by newlines. ValueError unless it is the package of the hash."""
    data = Path(path).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != PACKAGE_SHA256:
        raise ValueError(f"{path} has SHA-256 {found}; r-cran-janeaustenr 1.0.0-1 has {PACKAGE_SHA256}")
    with tarfile.open(fileobj=io.BytesIO(_member(data, "data.tar.xz"))) as archive:
        database = archive.extractfile("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read()
    return {title: "\n".join(lines(record)) for title, record in zip(TITLES, records(database), strict=True)}


def records(database: bytes) -> Iterator[bytes]:
    """The plain records of an R lazy-load database."""
    while database:
        stream = zlib.decompressobj()
        record = stream.decompress(database[4:])
        if not stream.eof or len(record) != int.from_bytes(database[:4], "big"):
            raise ValueError("a record is cut short, or its length is not the one it begins with")
        yield record
        database = stream.unused_data


def lines(record: bytes) -> list[str]:
    """The strings of a serialised character vector; (bytes + 8) summed over lines = record - 31 exactly."""
    found, at = [], HEADER
    for _ in range(int.from_bytes(record[HEADER - 4 : HEADER], "big")):
        flags, length = record[at : at + 4], int.from_bytes(record[at + 4 : at + 8], "big", signed=True)
        if len(flags) < 4 or flags[0] != 0 or flags[1] > 15 or flags[3] != 9 or length < 0:
            raise ValueError(f"no string begins at byte {at}: flags {flags.hex()}, length {length}")
        found.append(record[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    if at != len(record):
        raise ValueError(f"{len(record)} bytes hold lines up to byte {at}: a line is lost or invented")
    return found


def join(novels: Mapping[str, str]) -> bytes:
    """The novels as a file of documents, before compression."""
    return "\n\n".join(f"# {title}\n\n{body}" for title, body in novels.items()).encode() + b"\n"


def write(package: Path | None = None) -> None:
    """Write `data/austen.txt.xz` if the package is given, and `data/models/austen-bpe.json`."""
    if package is not None:
        text.FILES["austen"].write_bytes(
            lzma.compress(join(read_package(package)), preset=9 | lzma.PRESET_EXTREME)
        )
    tokenizer = text.train_bpe("".join(block for _, block in text.austen_blocks("train")))
    text.BPE.parent.mkdir(parents=True, exist_ok=True)
    text.BPE.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")


def _member(archive: bytes, name: str) -> bytes:
    """One file of an `ar` archive: 60-byte headers, contents padded to even lengths."""
    at = 8
    while at < len(archive):
        length = int(archive[at + 48 : at + 58])
        if archive[at : at + 16].decode().strip().rstrip("/") == name:
            return archive[at + 60 : at + 60 + length]
        at += 60 + length + length % 2
    raise ValueError(f"no {name} in the archive")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
