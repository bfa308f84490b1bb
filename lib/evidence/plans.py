"""Plans: which runs a file of rows is to hold, and how two plans differ.

A plan is {"grid": [settings, ...], "seeds": [seed, ...], "run": "lib.experiments.module.function"}; plans of
before `run` was written down lack it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

_VALUES, _LENGTH = 6, 40  # values of one setting, and characters of one value, that a message shows


def canonical(value: object) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def keys(plan: Mapping) -> dict[str, tuple[dict, int]]:
    """The planned runs: key -> (settings, seed), settings outside, seeds inside."""
    pairs = [(settings, seed) for settings in plan["grid"] for seed in plan["seeds"]]
    return {canonical({"seed": seed, "settings": settings}): (settings, seed) for settings, seed in pairs}


def difference(old: Mapping, new: Mapping) -> str:
    """What of `old` is missing in `new`, with the settings that changed; empty if `new` has all of it."""
    before, after = keys(old), keys(new)
    gone, added = before.keys() - after.keys(), after.keys() - before.keys()
    if not gone:
        return ""
    there, here = _values(old), _values(new)
    changed = [
        f"{name}: {_listed(there.get(name))} → {_listed(here.get(name))}"
        for name in dict.fromkeys([*there, *here])
        if set(there.get(name, ())) != set(here.get(name, ()))
    ]
    if not changed:  # the same values, otherwise combined
        lost = next(key for key in before if key in gone)
        changed = [f"for one, {_short(lost)} is no more"]
    counted = f"{len(gone)} of {len(before)} planned runs are not asked for any more, {len(added)} are new"
    return "; ".join([counted, *changed])


def _values(plan: Mapping) -> dict[str, list[str]]:
    """Every setting, and `seeds`, with the values it takes in the plan, as JSON."""
    found: dict[str, dict[str, None]] = {}
    for settings in plan["grid"]:
        for name, value in settings.items():
            found.setdefault(name, {})[canonical(value)] = None
    return {name: list(values) for name, values in found.items()} | {
        "seeds": [canonical(seed) for seed in plan["seeds"]]
    }


def _listed(values: list[str] | None) -> str:
    if not values:
        return "(absent)"
    more = ", …" if len(values) > _VALUES else ""
    return ", ".join(_short(value) for value in values[:_VALUES]) + more


def _short(text: str) -> str:
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 1]}…"
