"""Shattering: brute force against the page, explicit sets on all labelings, certificates re-verified."""

import dataclasses
import doctest
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lib.metrics.shattering as module
from lib.experiments.shattering import shatter
from lib.metrics.shattering import (
    SCORES,
    composition_labels,
    composition_rows,
    excluded_by_means,
    index_labels,
    labelling_errors,
    parameters,
    radon_relation,
    search,
    split_vc,
    sum2_labels,
    sum2_rows,
    vc_dimension,
)


def sum2_with_repetition(n, M):
    """The j <= k convention, in plain Python."""
    return lambda words: np.array([
        any((word[j] + word[k]) % M == 0 for j in range(n) for k in range(j, n)) for word in words.tolist()])


@pytest.mark.parametrize("name, f, alphabets, expected", [
    ("Ind_2", index_labels(2), [2, 2, 2], 2),
    ("Ind_3", index_labels(3), [3, 2, 2, 2], 3),
    ("SUM2[3, 7]", sum2_labels(3, 7), [7, 7, 7], 3),
    ("(x1 and x2) xor (x3 and x4)", lambda x: (x[:, 0] & x[:, 1]) ^ (x[:, 2] & x[:, 3]) == 1, [2] * 4, 2),
    ("a constant", lambda x: x[:, 0] < 9, [3, 3], 0),
])
def test_split_vc_is_the_number_of_the_page(name, f, alphabets, expected):
    assert split_vc(f, alphabets) == expected, name


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_vc_dimension_agrees_with_its_definition(rows, columns, seed):
    table = np.random.default_rng(seed).integers(0, 2, (rows, columns)).astype(bool)
    by_definition = max(
        size for size in range(rows + 1) for chosen in itertools.combinations(range(rows), size)
        if len({tuple(column[list(chosen)]) for column in table.T}) == 2**size)
    assert vc_dimension(table) == by_definition


@pytest.mark.parametrize("n", range(2, 11))
def test_composition_shatters_n_rows_with_all_labelings(n):
    rows = composition_rows(n)
    assert len({tuple(label) for label in rows.labels.tolist()}) == 2**n
    assert rows.words().shape == (2**n, n, 2 * n + 1)
    assert labelling_errors(rows, composition_labels(n)) == 0
    assert (rows.words()[..., -1] == 0).all(), "no row may touch the output token's own symbol"


@pytest.mark.parametrize("n, M", [(n, 2 * n + 1) for n in range(2, 12)] + [(3, 60), (6, 14)])
@pytest.mark.parametrize("convention", [sum2_labels, sum2_with_repetition])
def test_sum2_shatters_n_minus_1_rows_in_both_conventions(n, M, convention):
    rows = sum2_rows(n, M)
    assert rows.labels.shape == (2 ** (n - 1), n - 1)
    words = rows.words()
    assert words.min() >= 0 and words.max() < M
    sample = words.shape[0] if n <= 8 else 64       # plain Python is slow; sum2 is checked on all of them
    if convention is sum2_labels:
        assert labelling_errors(rows, sum2_labels(n, M)) == 0
    else:
        part = dataclasses.replace(rows, columns=rows.columns[:sample], labels=rows.labels[:sample])
        assert labelling_errors(part, sum2_with_repetition(n, M)) == 0


@pytest.mark.parametrize("n", range(5, 16))
def test_sum2_with_as_many_residues_as_numbers_still_shatters_about_half(n):
    rows = sum2_rows(n, n)
    assert rows.labels.shape[1] == (n - 3) // 2
    assert labelling_errors(rows, sum2_labels(n, n)) == 0


def test_a_wrong_column_is_noticed():
    rows = composition_rows(4)
    columns = rows.columns.copy()
    columns[5, 2] = 1 - columns[5, 2]
    assert labelling_errors(dataclasses.replace(rows, columns=columns), composition_labels(4)) == 1
    crowded = dataclasses.replace(sum2_rows(4, 9), columns=sum2_rows(4, 9).columns % 7)
    assert labelling_errors(crowded, sum2_labels(4, 9)) > 0


def realised(inputs, score, certificate):
    """The labelling of a certificate by numpy in extended precision: an evaluation of its own."""
    x, v, w = inputs.astype(np.longdouble), np.array(certificate.v), np.array(certificate.w)
    if score == "uniform":
        scores = np.zeros(x.shape[:2], dtype=np.longdouble)
    elif score == "query":
        scores = x @ w
    else:
        d = x.shape[-1]
        scores = np.einsum("kd,de,kte->kt", x[:, -1], w.reshape(d, d), x)
    weight = np.exp(scores - scores.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return (weight * (x @ v)).sum(axis=1) + certificate.b


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_shattered_k_comes_with_a_certificate_for_every_labelling(score, d):
    k = parameters(d, "uniform") if score == "uniform" else {1: 3, 2: 6, 3: 8}[d]
    result = search(d, score, k, seed=0)
    assert result["shattered"] and result["fraction"] == 1.0
    assert {c.labels for c in result["certificates"]} == {
        (True, *rest) for rest in itertools.product([False, True], repeat=k - 1)}
    for certificate in result["certificates"]:
        f = realised(result["inputs"], score, certificate)
        assert ((f > 0) == certificate.labels).all()
        assert (abs(f) > module.LEAST_MARGIN * np.linalg.norm(certificate.v)).all()


def test_a_certificate_of_another_labelling_does_not_hold():
    result = search(2, "query", 4, seed=0)
    certificate = result["certificates"][0]
    assert certificate.holds(result["inputs"], "query")
    for i in range(4):
        flipped = tuple(label != (i == j) for j, label in enumerate(certificate.labels))
        assert not dataclasses.replace(certificate, labels=flipped).holds(result["inputs"], "query")
    assert not dataclasses.replace(certificate, v=(0.0, 0.0), b=0.0).holds(result["inputs"], "query")
    steep = dataclasses.replace(certificate, w=(1e5, 1e5))
    assert not steep.holds(result["inputs"], "query"), "scores too large to trust in float64 are refused"


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_linear_mean_control_stops_exactly_at_d_plus_1(d, seed):
    row = shatter(dict(d=d, score="uniform", k_max=8, draws=2), seed=seed)
    assert (row["shattered"], row["missed_k"], row["proved_optimal"]) == (d + 1, d + 2, True)
    assert 0 < row["missed_fraction"] < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_radons_relation_is_a_relation_even_between_repeated_points(d, seed, flat):
    rng = np.random.default_rng(seed)
    numerators = rng.integers(-4, 5, (d + 2, d)) * (0 if flat and d > 1 else 1)
    points = [[Fraction(int(a), 3) for a in p] for p in numerators]
    relation = radon_relation(points)
    assert any(relation) and sum(relation) == 0
    assert all(sum(r * p[i] for r, p in zip(relation, points, strict=True)) == 0 for i in range(d))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_no_affine_function_of_the_means_realises_the_excluded_labelling(d, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((d + 2, 4, d))
    excluded = np.array(excluded_by_means(inputs))
    means = inputs.mean(axis=1)
    values = means @ rng.standard_normal((d, 20_000)) + rng.standard_normal(20_000)     # (d + 2, 20000)
    patterns = {tuple(p) for p in (values > 0).T.tolist()}
    assert tuple(excluded.tolist()) not in patterns and tuple((~excluded).tolist()) not in patterns
    assert len(patterns) > 2 ** (d + 1), "a sample with few patterns would prove little"


def test_a_search_is_a_function_of_its_seed():
    first, again = search(1, "query", 4, seed=3, draws=1), search(1, "query", 4, seed=3, draws=1)
    assert first["certificates"] == again["certificates"] and np.array_equal(first["inputs"], again["inputs"])
    row, same = (shatter(dict(d=1, score="matrix", k_max=3), seed=5) for _ in range(2))
    assert row == same
    assert row["certificates"] == 1 + 2 + 4 and row["shattered"] == 3 and row["missed_k"] is None


def test_nonsense_is_refused_before_any_work():
    with pytest.raises(ValueError, match="unknown score 'querry'; did you mean 'query'"):
        search(1, "querry", 2, seed=0)
    with pytest.raises(ValueError, match="k=15 means 16384 labelings"):
        search(1, "query", 15, seed=0)
    with pytest.raises(ValueError, match="restarts must be at least 1, got restarts=0"):
        search(1, "query", 3, seed=0, restarts=0)
    with pytest.raises(ValueError, match="of 13 positions is too much"):
        split_vc(lambda x: x[:, 0] == 0, [2] * 13)
    with pytest.raises(ValueError, match="n >= 2, got n=1"):
        composition_rows(1)
    with pytest.raises(ValueError, match="n >= 2 and M >= 5 are needed, got n=4, M=4"):
        sum2_rows(4, 4)
    with pytest.raises(ValueError, match="takes d \\+ 2 = 4 points of R\\^2, got 3"):
        radon_relation([[0, 0], [1, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"missing \['score'\], unknown \['scor'\]"):
        shatter(dict(d=1, k_max=3, scor="query"), seed=0)


def test_the_worked_examples_hold():
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
