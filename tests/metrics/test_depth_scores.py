"""Depth scores and effective depths against their definitions in plain Python; each rule's failure, shown."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.metrics.depth.scores import (
    depth_score,
    depth_score_interval,
    effective_depth,
    effective_depth_interval,
    effective_depths,
    over_prompts,
)


def matrix(L=6, *, seed=0):
    values = np.random.default_rng(seed).random((L, L))
    return np.triu(values, 1) + np.eye(L)  # a skip of all tokens: its own contribution changes by all of it


def written_out(E, first):
    L = len(E)
    e = [sum(E[s][l] for l in range(s + 1, L)) / max(1, L - 1 - s) for s in range(L)]
    return sum((s + first) * e[s] for s in range(L)) / sum(e)


@pytest.mark.parametrize("from_one", [True, False])
@pytest.mark.parametrize("L", [2, 3, 7])
def test_the_score_of_a_matrix_is_its_definition(L, from_one):
    E = matrix(L)
    assert depth_score(E, from_one=from_one) == pytest.approx(
        written_out(E.tolist(), int(from_one)), rel=1e-12
    )
    assert depth_score(torch.tensor(E)) - depth_score(torch.tensor(E), from_one=False) == pytest.approx(1)


def test_the_score_is_the_place_of_the_only_effect():
    for s in range(5):
        one = np.zeros(5)
        one[s] = 0.3
        assert depth_score(one) == s + 1 and depth_score(one, from_one=False) == s
    E = np.zeros((5, 5))
    E[2, 3] = 1.0
    assert depth_score(E) == 3


def test_the_diagonal_and_the_scale_do_not_count():
    E = matrix()
    assert depth_score(np.triu(E, 1)) == depth_score(E) == pytest.approx(depth_score(10 * E))
    assert depth_score(np.ones((6, 6)) - np.tril(np.ones((6, 6)), -1)) == pytest.approx(
        (1 + 2 + 3 + 4 + 5) / 5
    )


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12).filter(lambda e: sum(e) > 1e-6))
def test_the_score_stays_between_the_first_and_the_last_layer(effects):
    assert 1 - 1e-9 <= depth_score(effects) <= len(effects) + 1e-9


@pytest.mark.parametrize("reduce", ["max", "mean", "median"])
def test_the_interval_is_over_prompts(reduce):
    many = np.stack([matrix(seed=seed) for seed in range(12)])
    score, (lo, hi) = depth_score_interval(many, seed=1, reduce=reduce)
    assert score == pytest.approx(depth_score(getattr(np, reduce)(many, axis=0)))
    assert lo < hi and (reduce == "max" or lo < score < hi), "resamples of a maximum miss it"
    again = depth_score_interval(torch.tensor(many), seed=1, reduce=reduce)[1]
    assert tuple(again) == (lo, hi)
    same = np.repeat(many[:1], 4, axis=0)
    assert depth_score_interval(same, seed=0, reduce=reduce)[1] == pytest.approx([depth_score(many[0])] * 2)
    outputs = depth_score_interval(many[:, 0] + 0.1, seed=1, reduce=reduce)
    assert outputs[0] == pytest.approx(depth_score(getattr(np, reduce)(many[:, 0] + 0.1, axis=0)))


def test_an_interval_over_prompts_covers_its_statistic():
    """25 normal values, nominal 95 %, 300 samples: at a true 92 % fewer than 260 hits has chance 5e-4."""
    generator, hits = np.random.default_rng(0), 0
    for trial in range(300):
        sample = generator.normal(2.0, 1.0, size=25)
        lo, hi = over_prompts(sample, lambda draws: draws.mean(axis=1), seed=trial, resamples=400)
        hits += lo <= 2.0 <= hi
    assert hits >= 260


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once():
    sample = np.random.default_rng(0).random((5, 300))
    small = over_prompts(sample, lambda draws: draws.mean(axis=(1, 2)), seed=0, resamples=50)
    tiled = np.tile(sample, (1, 400))  # 600,000 numbers: six draws at a time
    large = over_prompts(tiled, lambda draws: draws.mean(axis=(1, 2)), seed=0, resamples=50)
    assert large == pytest.approx(small, rel=1e-9)


@pytest.mark.parametrize(
    "effects, message",
    [
        (np.zeros(4), "every effect is 0"),
        (np.eye(4), "every effect is 0"),
        (np.array([1.0, -0.1]), "at least 0"),
        (np.array([1.0, np.nan]), "finite"),
        (np.array([1.0, np.inf]), "finite"),
        (np.zeros((2, 3)), r"\(L, L\)"),
        (np.zeros(0), r"\(L,\)"),
        (np.ones((1, 1)), "two layers"),
        (matrix().T, r"effect \(1, 0\).*transposed"),
        (np.zeros((2, 3, 3)), r"\(L, L\)"),
    ],
)
def test_what_are_no_effects_is_refused(effects, message):
    with pytest.raises(ValueError, match=message):
        depth_score(effects)


def test_an_interval_needs_three_prompts_and_a_known_reduction():
    with pytest.raises(ValueError, match="at least 3"):
        depth_score_interval(np.stack([matrix()] * 2), seed=0)
    with pytest.raises(ValueError, match="unknown reduction"):
        depth_score_interval(np.stack([matrix()] * 3), seed=0, reduce="sum")
    with pytest.raises(ValueError, match=r"\(P, L, L\)"):
        depth_score_interval(np.ones(4), seed=0)


# Effective depth


def published(curve, kind):
    """The rules as the follow-up's code has them, in plain Python; None where there is no crossing."""
    if kind == "cosine":
        turns = [l for l in range(1, len(curve)) if curve[l - 1] < 0 <= curve[l]]
        return turns[-1] if turns else (0 if curve[0] >= 0 else None)
    late = [l for l, x in enumerate(curve) if (x < 0.5 * max(curve) if kind == "kl" else x > 0.3)]
    return late[0] if late else None


CURVES = {
    "cosine": st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=12),
    "kl": st.lists(st.floats(0, 20, width=32), min_size=2, max_size=12).filter(lambda c: max(c) > 0.1),
    "overlap": st.lists(st.floats(0, 1, width=32), min_size=2, max_size=12),
}


@pytest.mark.parametrize("kind", CURVES)
@given(data=st.data())
def test_the_published_rule_is_its_definition(kind, data):
    curve = data.draw(CURVES[kind])
    found, expected = effective_depth(curve, kind, rule="published"), published(curve, kind)
    assert found.reached == (expected is not None)
    assert found.layer == (len(curve) if expected is None else expected)
    assert found.fraction == min(1, found.layer / (len(curve) - (kind != "cosine")))


def margins(curve, kind, unit=None):
    if kind == "kl":
        quartile = np.quantile(curve, 0.75)
        unit = unit or (quartile if quartile > 0 else max(curve))
        return [0.5 - x / unit for x in curve]
    return [x - (0.3 if kind == "overlap" else 0) for x in curve]


@pytest.mark.parametrize("kind", CURVES)
@given(data=st.data())
def test_the_robust_rule_separates_the_sides_best(kind, data):
    """By trying every place: none has a larger margin on its sides."""
    curve = data.draw(CURVES[kind])
    c, found = margins(curve, kind), effective_depth(curve, kind).layer
    gain = [sum(c[l:]) - sum(c[:l]) for l in range(len(c) + 1)]
    assert gain[found] >= max(gain) - 1e-9


@pytest.mark.parametrize("kind", CURVES)
@given(data=st.data())
def test_the_rules_agree_where_the_curve_changes_sides_once(kind, data):
    """Off exact ties, on curves that go one way; for KL with a plateau, so that the units are the same."""
    curve = sorted(data.draw(CURVES[kind]), reverse=kind == "kl")
    curve = curve[:1] * len(curve) + curve if kind == "kl" else curve
    if min(abs(x) for x in margins(curve, kind)) > 1e-6:
        assert effective_depth(curve, kind) == effective_depth(curve, kind, rule="published")


def test_one_early_dip_of_the_kl_decides_the_published_rule_alone():
    """C.3 #6: layer 1 of 28 for a model whose lens settles at 22."""
    kl = np.concatenate([np.full(22, 9.0), np.linspace(4, 0, 7)])  # taps 0 … 28
    assert effective_depth(kl, "kl") == effective_depth(kl, "kl", rule="published")
    kl[1] = 2.0
    assert effective_depth(kl, "kl", rule="published").layer == 1
    robust = effective_depth(kl, "kl")
    assert robust.layer == 22 and robust.fraction == pytest.approx(22 / 28)


def test_one_huge_kl_at_the_embeddings_does_not_set_the_bar():
    """The shape measured on SmolLM2: 11 at the embeddings, a plateau at 5, then a slow fall."""
    kl = np.concatenate([[11.3], np.full(20, 5.2), np.linspace(5, 0, 10)])
    assert effective_depth(kl, "kl", rule="published").layer == 1
    assert effective_depth(kl, "kl").layer == 26, "the first below half of the plateau"


def test_an_early_overlap_and_a_late_cosine_do_not_move_the_robust_rule():
    overlap = np.array([0, 0, 0.4, 0, 0, 0, 0.1, 0.6, 0.8, 1.0])
    assert effective_depth(overlap, "overlap", rule="published").layer == 2
    assert effective_depth(overlap, "overlap").layer == 7
    cosine = np.array([-0.3, -0.4, -0.2, 0.1, 0.3, 0.2, 0.3, -0.05, 0.1])
    assert effective_depth(cosine, "cosine", rule="published").layer == 8
    assert effective_depth(cosine, "cosine").layer == 3


@pytest.mark.parametrize("rule", ["published", "robust"])
def test_a_curve_that_never_changes_says_so(rule):
    never = effective_depth([-0.1, -0.2, -0.3], "cosine", rule=rule)
    assert (never.layer, never.fraction, never.reached) == (3, 1.0, False)
    always = effective_depth([0.1, 0.2, 0.3], "cosine", rule=rule)
    assert (always.layer, always.fraction, always.reached) == (0, 0.0, True)
    assert not effective_depth([0.0, 0.1, 0.2], "overlap", rule=rule).reached


def test_noise_moves_the_robust_rule_less():
    """A settled curve at 12 of 20 with noise: mean error over 200 draws."""
    generator, errors = np.random.default_rng(0), {"published": [], "robust": []}
    clean = np.where(np.arange(21) < 12, 6.0, 1.0)
    for _ in range(200):
        curve = np.clip(clean + generator.normal(0, 1.5, size=21), 0, None)
        for rule, found in errors.items():
            found.append(abs(effective_depth(curve, "kl", rule=rule).layer - 12))
    assert np.mean(errors["robust"]) < 0.5 * np.mean(errors["published"])


def test_all_depths_and_their_intervals():
    cosine, overlap = np.linspace(-1, 1, 9) + 0.05, np.linspace(0, 1, 10)
    kl = torch.linspace(9, 0, 10).clamp(max=5)  # the upper quartile is the maximum
    found = effective_depths(cosine=cosine, kl=kl, overlap=overlap)
    assert {kind: by["robust"].layer for kind, by in found.items()} == {"cosine": 4, "kl": 7, "overlap": 3}
    assert all(by["robust"] == by["published"] for by in found.values())
    noise = np.random.default_rng(0).normal(0, 0.2, size=(15, 10))
    depth, (lo, hi) = effective_depth_interval(overlap + noise, "overlap", seed=0)
    assert depth == effective_depth((overlap + noise).mean(axis=0), "overlap")
    assert lo <= depth.layer <= hi and lo < hi
    exact = effective_depth_interval(np.tile(overlap, (4, 1)), "overlap", seed=0)[1]
    assert tuple(exact) == (3.0, 3.0)


@pytest.mark.parametrize(
    "curve, kind, options, message",
    [
        ([0.1, 0.2], "cosines", {}, "unknown kind"),
        ([0.1, 0.2], "cosine", {"rule": "frist"}, "unknown rule"),
        ([], "cosine", {}, "flat"),
        ([1.0], "kl", {}, "flat"),
        (np.ones((3, 3)), "kl", {}, "shape"),
        ([1.0, np.nan], "kl", {}, "not finite"),
        ([0.0, 0.0], "kl", {}, "no positive value"),
    ],
)
def test_what_is_no_curve_is_refused(curve, kind, options, message):
    with pytest.raises(ValueError, match=message):
        effective_depth(curve, kind, **options)
