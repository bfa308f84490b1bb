"""One run of the shattering search: how many sequences one softmax layer labels in every way."""

from __future__ import annotations

from pathlib import Path

from lib.metrics.shattering import excluded_by_means, parameters, search


def shatter(settings: dict, *, seed: int, scratch: Path | None = None) -> dict:
    """Climb k = 1, 2, ... until the search misses a labelling, or k_max is done.

    settings: d, score ("uniform", "query", "matrix"), k_max, and optionally tokens, draws, restarts, steps
    as in `search`. scratch is not used: a run takes seconds and has nothing to resume.

    -> a JSON-able row. shattered: largest k with a verified certificate for each of its 2^(k-1) labelings (a
    lower bound on the VC dimension); missed_k, missed_fraction: the first k that failed and the part of its
    labelings found, None if none failed; certificates: how many were verified; proved_optimal, uniform
    score only: whether Radon's relation, in exact fractions, excludes a labelling of the missed d + 2
    sequences.
    """
    known = {"d", "score", "k_max", "tokens", "draws", "restarts", "steps"}
    missing, unknown = {"d", "score", "k_max"} - settings.keys(), settings.keys() - known
    if missing or unknown:
        raise ValueError(
            f"settings of the shattering search: missing {sorted(missing)}, unknown {sorted(unknown)}; "
            f"it takes {sorted(known)}"
        )
    d, score, k_max = settings["d"], settings["score"], settings["k_max"]
    options = {name: settings[name] for name in ("tokens", "draws", "restarts", "steps") if name in settings}
    row = dict(
        d=d,
        score=score,
        parameters=parameters(d, score),
        shattered=0,
        missed_k=None,
        missed_fraction=None,
        certificates=0,
        proved_optimal=None,
    )
    for k in range(1, k_max + 1):
        result = search(d, score, k, seed=seed, **options)
        row["certificates"] += sum(certificate is not None for certificate in result["certificates"])
        if not result["shattered"]:
            row |= dict(missed_k=k, missed_fraction=result["fraction"])
            if score == "uniform":
                row["proved_optimal"] = k == d + 2 and _radon_labelling_is_missed(result)
            break
        row["shattered"] = k
    return row


def _radon_labelling_is_missed(result: dict) -> bool:
    """Whether the search, rightly, found no certificate for the labelling that Radon's relation excludes."""
    excluded = excluded_by_means(result["inputs"])
    if not excluded[0]:  # the search labels the first sequence True; f -> -f
        excluded = tuple(not label for label in excluded)
    found = [c.labels for c in result["certificates"] if c is not None]
    return excluded not in found
