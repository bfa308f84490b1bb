"""A damaged file of rows: its damaged lines go aside, its sound ones stay as they are, to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.evidence import rows
from lib.evidence.files import append, write_bytes_atomically


@dataclass(frozen=True)
class Mended:
    """damaged: the lines that were moved to `aside`. homeless: rows that stay, but whose provenance went."""

    damaged: list[rows.Damage]
    aside: Path
    kept: int
    homeless: int


def mend(path: Path) -> Mended:
    """Move the damaged lines of `path` to the end of `path`.damaged.

    Raises EvidenceError, and leaves the file as it is, while somebody records into it and if a line is of
    another schema: that is no damage. A cut-off last line stays for the next append, which removes it.
    """
    path = Path(path).resolve()
    aside = path.with_name(f"{path.name}.damaged")
    with rows.alone_in(path):
        found = rows.read(path, damaged="collect")
        numbers = {damage.line for damage in found.damaged}
        *lines, rest = path.read_bytes().split(b"\n")
        numbered = [(number, line + b"\n") for number, line in enumerate(lines, start=1)]
        if numbers:
            # First aside, then out: killed in between, it leaves the lines in both files and not in neither.
            append(aside, lambda _: b"".join(line for number, line in numbered if number in numbers))
            kept = b"".join(line for number, line in numbered if number not in numbers)
            write_bytes_atomically(path, kept + rest)
    homeless = sum(row["provenance"] not in found.provenance for row in found.rows)
    return Mended(found.damaged, aside, len(lines) - len(numbers), homeless)
