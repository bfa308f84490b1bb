"""Whether the present code gives what older code gave, for the runs that a file of rows holds from both.

Compared are the results as JSON, to the byte. A result named with the suffix `_s` is a time, or a speed (per
second), which no repetition gives again: such a name must be there, its value may be any. So are, in a row
that holds times in `_ms`, these, `turns_` of them, and what has `_ratio` or `_per_s` in its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lib.evidence.plans import canonical

_PLACE = ("device", "machine", "python", "torch", "numpy")  # of a provenance: what may change the last digit
_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Agreement:
    """same, differ: runs of the present code whose result the older code gave too, or not.

    elsewhere: those of `differ` that another machine or version made. timed: whether times were left out.
    unchecked: runs by such older code as made none of the compared ones.
    """

    same: int = 0
    differ: int = 0
    elsewhere: int = 0
    unchecked: int = 0
    timed: bool = False

    @property
    def repeated(self) -> int:
        return self.same + self.differ

    @property
    def vouches(self) -> bool:
        """Whether the older rows may stand: all that was repeated agrees, and no code was passed over."""
        return self.same > 0 and not self.differ and not self.unchecked

    def words(self) -> str:
        """What to add where older rows are mentioned; empty if none was repeated."""
        if not self.repeated:
            return ""
        repeated = f"{'was' if self.repeated == 1 else 'were'} repeated by the present one"
        if not self.differ:
            times = ", times apart" if self.timed else ""
            said = f"{self.repeated} {repeated}, with the same results to the byte{times}"
        else:
            differ = "differs" if self.differ == 1 else "differ"
            said = f"of {self.repeated} that {repeated}, {self.differ} {differ}"
            if self.elsewhere:
                said += f" ({self.elsewhere} of them on another machine or version)"
        if self.unchecked:
            said += f"; {self.unchecked} are by yet other code, of which none was repeated"
        return said


def older_codes(tries: Mapping[str, list[dict]], code: str) -> Counter:
    """The codes other than `code` that finished a run last, each with the number of these runs.

    tries: the rows of each run, oldest first.
    """
    finished = [[row["code"] for row in rows if not row.get("failed")] for rows in tries.values()]
    return Counter(codes[-1] for codes in finished if codes and codes[-1] != code)


def pairs(
    tries: Mapping[str, list[dict]], code: str, older: Mapping
) -> Iterator[tuple[str, dict, list[dict]]]:
    """Of each run that both have finished: its key, its row by `code`, and its newest by each of `older`."""
    for key, rows in tries.items():
        finished = {row["code"]: row for row in rows if not row.get("failed")}
        before = [finished[other] for other in older if other in finished]
        if code in finished and before:
            yield key, finished[code], before


def compare(tries: Mapping[str, list[dict]], code: str, provenance: Mapping[str, dict]) -> Agreement:
    """How the runs that `code` repeated agree with the rows of older code that are in use.

    tries: the rows of each planned run, oldest first. provenance: of these rows, by id.
    """
    older = older_codes(tries, code)
    if not older:
        return Agreement()
    same = differ = elsewhere = 0
    checked: set[str] = set()
    timed = False
    for _, now, before in pairs(tries, code, older):
        checked.update(row["code"] for row in before)
        timed |= any(is_timed(name, now["result"]) for name in now["result"])
        others = [row for row in before if untimed(row["result"]) != untimed(now["result"])]
        same += not others
        differ += bool(others)
        elsewhere += any(_place(row, provenance) != _place(now, provenance) for row in others)
    unchecked = sum(count for other, count in older.items() if other not in checked)
    return Agreement(same, differ, elsewhere, unchecked if checked else 0, timed)


def untimed(result: Mapping) -> str:
    """A result as it must come out again: canonical JSON, of the timed parts only the names."""
    return canonical({name: None if is_timed(name, result) else value for name, value in result.items()})


def is_timed(name: str, result: Mapping) -> bool:
    """Whether a part of a result is a time, a speed, or made of such."""
    in_ms = any(other.endswith("_ms") for other in result)
    return (
        name.endswith("_s")
        or in_ms
        and (name.endswith("_ms") or name.startswith("turns_") or "_ratio" in name or "_per_s" in name)
    )


def differences(before: Mapping, now: Mapping) -> list[str]:
    """Which parts of a result differ, a line each, and by how much; empty if it is the same."""
    lines = [f"{name}: gone" for name in before if name not in now]
    for name, value in now.items():
        if name not in before:
            lines.append(f"{name}: new, {_short(value)}")
        elif not is_timed(name, now) and canonical(value) != canonical(before[name]):
            lines.append(f"{name}: {_change(before[name], value)}")
    return lines


def _change(before: object, now: object) -> str:
    old, new = list(_leaves(before)), list(_leaves(now))
    if [place for place, _ in old] != [place for place, _ in new]:
        return f"of another form, {_short(before)} → {_short(now)}"
    changed = [(a, b) for (_, a), (_, b) in zip(old, new, strict=True) if canonical(a) != canonical(b)]
    most = max((abs(b - a) for a, b in changed if _is_number(a) and _is_number(b)), default=None)
    by = "" if most is None else f"by {most:.3g}"
    if len(old) == 1:
        return f"{_short(before)} → {_short(now)}" + (f", {by}" if by else "")
    return f"{len(changed)} of {len(old)} values" + (f", {by} at most" if by else "")


def _leaves(value: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Every number, string or None inside `value`, with where it stands."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from _leaves(value[name], f"{place}.{name}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{place}[{i}]")
    else:
        yield place, value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = canonical(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _place(row: Mapping, provenance: Mapping[str, dict]) -> dict:
    """Where a row was made, as far as it is known."""
    made = provenance.get(row["provenance"], {})
    return {part: made.get(part) for part in _PLACE}
