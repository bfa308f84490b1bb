"""Composed attention looked into: each measure against a slow definition, and the lemma it rests on."""

import itertools
import math

import numpy as np
import pytest
import torch

from lib.metrics.composition import (
    compose,
    composition_matrices,
    distance_from_identity,
    dynamic_share,
    effective_rank,
    effective_rank_over_heads,
    numerical_rank,
    off_diagonal_strength,
    over_heads,
    row_sums,
    share_between,
    share_outside_span,
    with_interval,
)
from lib.models.dcmha import DCMHA


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors(B=2, T=5, R=2, H=3, seed=0):
    return draw(B, T, R, H, seed=seed), draw(B, T, R, H, seed=seed + 1), draw(B, T, H, seed=seed + 2)


@pytest.mark.parametrize("gated, static", list(itertools.product([True, False], repeat=2)))
def test_matrices_are_their_formula_entry_by_entry(gated, static):
    w1, w2, gates = factors()
    W_b = draw(3, 3, seed=9)
    M = composition_matrices(w1, w2, gates if gated else None, W_b if static else None)
    checked = 0
    for b, t, g, h in itertools.product(range(2), range(5), range(3), range(3)):
        value = float(g == h) + sum(float(w1[b, t, r, g] * w2[b, t, r, h]) for r in range(2))
        value += float(W_b[g, h]) if static else 0.0
        value += float(gates[b, t, h]) if gated and g == h else 0.0
        assert math.isclose(M[b, t, g, h], value, abs_tol=1e-12)
        checked += 1
    assert checked == M.numel() == 90


def test_composing_is_the_sum_over_heads_for_every_pair():
    A, query, key = draw(2, 3, 4, 5), draw(2, 4, 3, 3, seed=1), draw(2, 5, 3, 3, seed=2)
    both = compose(A, query, key)
    for b, h, i, j in itertools.product(range(2), range(3), range(4), range(5)):
        M = query[b, i] + key[b, j] - torch.eye(3, dtype=torch.float64)
        assert math.isclose(both[b, h, i, j], sum(A[b, g, i, j] * M[g, h] for g in range(3)), abs_tol=1e-12)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(compose(A, query), compose(A, query, eye.expand(2, 5, 3, 3)), atol=1e-12)
    assert torch.allclose(compose(A, None, key), compose(A, eye.expand(2, 4, 3, 3), key), atol=1e-12)
    assert compose(A).equal(A)


@pytest.mark.parametrize("static", [True, False])
def test_the_matrices_of_a_layer_give_the_attention_of_that_layer(static):
    """Scores and softmax from the layer's own projections, composed here, against what it returns."""
    layer = DCMHA(12, 3, rank=2, static=static, causal=True).double()
    with torch.no_grad():
        for k, weight in enumerate(layer.parameters()):
            weight.copy_(0.5 * draw(*weight.shape, seed=k))
    x = draw(2, 6, 12, seed=50)
    given = layer.compositions(x)
    W_b = {name: getattr(layer, name).W_b for name in ("pre", "post")}
    M = {
        name: composition_matrices(*parts, W_b=W_b[name.split("_")[0]] if name.endswith("query") else None)
        for name, parts in given.items()
    }
    q, k = (W(x).unflatten(-1, (3, 4)).transpose(1, 2) for W in (layer.W_Q, layer.W_K))
    score = compose(q @ k.mT / 2, M["pre_query"], M["pre_key"])
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    weight = score.masked_fill(future, -math.inf).softmax(dim=-1)
    after = compose(weight, M["post_query"], M["post_key"])
    expected = layer.attend(x, computation="explicit")[1]
    assert torch.allclose(after, expected, atol=1e-10)
    assert not torch.allclose(weight, expected, atol=1e-2), "the composition does something here"


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equal_singular_values_count_as_that_many(k):
    Q = torch.linalg.qr(draw(8, 5)).Q[:, :k]
    P = torch.linalg.qr(draw(7, 7, seed=1)).Q[:, :k]
    X = 3.7 * Q @ P.T
    assert math.isclose(effective_rank(X), k, rel_tol=1e-6) and int(numerical_rank(X)) == k
    assert math.isclose(effective_rank(X.float()), k, rel_tol=1e-4) and int(numerical_rank(X.float())) == k


def test_the_effective_rank_is_the_exponential_of_an_entropy():
    X = draw(3, 4, 6)
    for matrix, found in zip(X, effective_rank(X), strict=True):
        s = np.sqrt(np.linalg.eigvalsh(matrix.numpy() @ matrix.numpy().T))
        p = s / s.sum()
        assert math.isclose(found, math.exp(-sum(v * math.log(v) for v in p)), rel_tol=1e-8)
    with pytest.raises(ValueError, match="zeros has no effective rank"):
        effective_rank(torch.zeros(2, 3, 3))


def test_the_rank_over_heads_counts_different_patterns_and_no_masked_ones():
    one = draw(4, 4)
    same = torch.stack([one, 2 * one, -one])
    assert math.isclose(effective_rank_over_heads(same), 1, rel_tol=1e-6)
    assert int(numerical_rank(over_heads(same))) == 1
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    differ_outside = same + draw(3, 4, 4, seed=2) * ~allowed
    assert math.isclose(effective_rank_over_heads(differ_outside, allowed), 1, rel_tol=1e-6)
    assert effective_rank_over_heads(differ_outside) > 1.5
    assert over_heads(same, allowed).shape == (3, 10)


def best_fixed_mixture(before, after):
    """Share of `after` that least squares on the patterns `before` misses, head by head, in numpy."""
    X, Y = (part.flatten(1).numpy() for part in (before, after))
    missed = Y - (np.linalg.lstsq(X.T, Y.T, rcond=None)[0].T @ X)
    return (missed**2).sum() / (Y**2).sum()


def test_the_share_outside_is_what_least_squares_over_heads_misses():
    before, after = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    assert math.isclose(share_outside_span(before, after), best_fixed_mixture(before, after), rel_tol=1e-10)
    batch = share_outside_span(before.expand(2, 3, 4, 5), torch.stack([after, before]))
    assert math.isclose(batch[0], best_fixed_mixture(before, after), rel_tol=1e-10) and batch[1] < 1e-20
    twice = torch.stack([before[0], before[0], before[1]])  # a dependent head spans nothing new
    assert math.isclose(share_outside_span(twice, after), best_fixed_mixture(before[:2], after), rel_tol=1e-8)
    assert share_outside_span(before, torch.zeros_like(before)) == 0
    with pytest.raises(ValueError, match="two shapes"):
        share_outside_span(before, after[:, :3])


# The lemma: what a fixed mixture of heads cannot do, and one of the query's own can


@pytest.mark.parametrize("T, H, d", [(20, 3, 2), (7, 4, 1), (5, 4, 3)])
def test_mixed_scores_have_rank_at_most_all_head_widths_together(T, H, d):
    """One head: min(T, d). Mixed by a fixed M or the query's: min(T, H d); by both sides: min(T, 2 H d)."""
    S = draw(H, T, d) @ draw(H, d, T, seed=1)
    fixed = compose(S[None], draw(H, H, seed=2).expand(1, T, H, H))[0]
    of_query = compose(S[None], draw(1, T, H, H, seed=3))[0]
    assert numerical_rank(S, tolerance=1e-9).tolist() == [min(T, d)] * H
    assert numerical_rank(fixed, tolerance=1e-9).tolist() == [min(T, H * d)] * H
    assert numerical_rank(of_query, tolerance=1e-9).tolist() == [min(T, H * d)] * H
    both = compose(S[None], draw(1, T, H, H, seed=3), draw(1, T, H, H, seed=4))[0]
    assert numerical_rank(both, tolerance=1e-9).tolist() == [min(T, 2 * H * d)] * H


@pytest.mark.parametrize("H", [2, 3, 5])
def test_fixed_mixtures_stay_in_as_many_dimensions_as_heads_and_those_of_the_query_fill_all_rows(H):
    """Many draws of M on the same scores: the mixed patterns together span H, or T H, dimensions."""
    T, N = 6, 40
    S = draw(1, H, T, 9)
    fixed = [compose(S, draw(H, H, seed=k).expand(1, T, H, H)) for k in range(N)]
    of_query = [compose(S, draw(1, T, H, H, seed=100 + k)) for k in range(N)]
    span = [numerical_rank(torch.cat(mixed).flatten(2).flatten(0, 1)) for mixed in (fixed, of_query)]
    assert [int(rank) for rank in span] == [H, T * H]
    assert max(float(share_outside_span(S, mixed)) for mixed in fixed) < 1e-20
    assert min(float(share_outside_span(S, mixed)) for mixed in of_query) > 0.5


def choose_head(choice, n, h=0):
    """w1, w2 of rank 1 that give output head h the pattern of head choice[i] at query i: (1, n, 1, n)."""
    w1, w2 = torch.zeros(1, n, 1, n, dtype=torch.float64), torch.zeros(1, n, 1, n, dtype=torch.float64)
    for i, g in enumerate(choice):
        w1[0, i, 0, g] += 1.0
        w1[0, i, 0, h] -= 1.0  # what the identity brings is taken back
        w2[0, i, 0, h] = 1.0
    return w1, w2


@pytest.mark.parametrize("n", [2, 3, 4])
def test_no_fixed_mixture_chooses_a_head_by_query_and_rank_one_of_the_query_does(n):
    """n heads of width 1, head g reads key g at every query. Wanted: query i reads key c(i), any c.

    All n^n choices c. A fixed mixture has n equal rows 1 m', so its best is m = the mean row: it misses
    1 - Σ_k (#{i: c(i) = k})² / n² of the target, nothing only for constant c, 1 - 1/n for a permutation.
    """
    S = torch.stack([torch.ones(n, 1) @ torch.eye(n)[g : g + 1] for g in range(n)]).double()  # q = 1, k = e_g
    assert numerical_rank(S).tolist() == [1] * n
    checked, permutations = 0, 0
    for choice in itertools.product(range(n), repeat=n):
        target = torch.eye(n, dtype=torch.float64)[list(choice)]  # (queries, keys)
        missed = best_fixed_mixture(S, target[None].expand(n, n, n))
        counts = [choice.count(k) for k in range(n)]
        assert math.isclose(missed, 1 - sum(c * c for c in counts) / n**2, abs_tol=1e-12)
        assert math.isclose(share_outside_span(S, target.expand(n, n, n)), missed, abs_tol=1e-12)
        w1, w2 = choose_head(choice, n)
        composed = compose(S[None], composition_matrices(w1, w2))[0]
        assert composed[0].equal(target), "exactly, with rank 1"
        assert composed[1:].equal(S[1:]), "the other heads stay as they were"
        if sorted(choice) == list(range(n)):
            assert int(numerical_rank(target)) == n > 1, "nor does any single head of width 1"
            permutations += 1
        checked += 1
    assert checked == n**n and permutations == math.factorial(n)
    wrong = choose_head([1, 0, *range(2, n)], n)  # another choice gives another pattern
    composed = compose(S[None], composition_matrices(*wrong))
    assert not composed[0, 0].equal(torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_layer_of_rank_one_can_hold_the_choice_in_its_weights(rank):
    """The same in DCMHA itself, post, query side: w1 is normalised over heads, w2 makes up for it."""
    n = 3
    layer = DCMHA(n, n, rank=rank, pre=False, key_side=False, gates=False, causal=False, d_head=2)
    choice, x = [2, 0, 1], torch.eye(n)[None]  # token i is the unit vector i
    K = 2 * rank * n
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        side = layer.post.query
        side.W_1.weight[:n] = 10 * torch.eye(n)  # GELU(10) is 10: hidden unit i is on for token i alone
        w1, w2 = (part[0, :, 0] for part in choose_head(choice, n))  # (n, H)
        scale = (w1.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        out = torch.zeros(K, 2, rank, n)  # of hidden unit, to (w1 or w2, r, head)
        out[:n, 0, 0], out[:n, 1, 0] = w1.float() / 10, (w2 * scale).float() / 10
        side.W_2.weight.copy_(out.flatten(1).T)
    M = composition_matrices(*layer.compositions(x)["post_query"])[0]
    for i, g in enumerate(choice):
        wanted = torch.eye(n, dtype=torch.float64)
        wanted[:, 0] = wanted[:, g].clone() if g else wanted[:, 0]
        assert torch.allclose(M[i], wanted, atol=1e-4)  # the 1e-6 in the norm of a w1 that is 0 or not


# Rows, distances, shares


def test_softmax_rows_are_distributions_and_composed_ones_are_counted_as_they_are():
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    weight = draw(2, 3, 4, 4).masked_fill(~allowed, -math.inf).softmax(dim=-1)
    plain = row_sums(weight, allowed)
    assert all(math.isclose(plain[name], 1, rel_tol=1e-9) for name in ("mean", "low", "median", "high"))
    others = ("std", "distance", "negative_share", "negative_mass")
    assert all(abs(plain[name]) < 1e-9 for name in others)
    row = torch.tensor([[[2.0, -0.5], [0.25, 0.25]]])
    found = row_sums(row)  # sums 1.5 and 0.5
    assert found["mean"] == 1.0 and found["distance"] == 0.5 and found["std"] == 0.5
    assert found["negative_share"] == 0.25 and math.isclose(found["negative_mass"], 0.5 / 3.0)
    assert math.isclose(found["low"], 0.55) and math.isclose(found["high"], 1.45)
    with pytest.raises(ValueError, match="not finite"):
        row_sums(row / 0)


def test_masked_entries_do_not_thin_out_the_negative_ones():
    allowed = torch.ones(3, 3, dtype=torch.bool).tril()
    weight = torch.full((1, 3, 3), -1.0) * allowed
    assert row_sums(weight, allowed)["negative_share"] == 1.0
    assert row_sums(weight)["negative_share"] == 6 / 9


def test_distance_and_off_diagonal_strength_are_their_sums():
    M = draw(4, 3, 3)
    for matrix, far, off in zip(M, distance_from_identity(M), off_diagonal_strength(M), strict=True):
        entries = [(g, h, float(matrix[g, h])) for g in range(3) for h in range(3)]
        assert math.isclose(far, math.sqrt(sum((v - (g == h)) ** 2 for g, h, v in entries) / 3))
        assert math.isclose(off, math.sqrt(sum(v * v for g, h, v in entries if g != h) / 3))
    eye = torch.eye(3)
    assert distance_from_identity(eye) == off_diagonal_strength(eye) == 0
    assert math.isclose(distance_from_identity(2 * eye), 1) and off_diagonal_strength(2 * eye) == 0


def test_the_dynamic_share_is_what_one_fixed_matrix_cannot_do():
    eye, fixed = torch.eye(3, dtype=torch.float64), draw(3, 3)
    N = 50
    assert dynamic_share((eye + fixed).expand(N, 3, 3)) < 1e-25
    assert dynamic_share(eye.expand(N, 3, 3)) == 0
    moved = draw(N, 3, 3, seed=3)
    moved = moved - moved.mean(dim=0)
    assert math.isclose(dynamic_share(eye + moved), 1)
    whole = (fixed + moved).square().sum()
    assert math.isclose(dynamic_share(eye + fixed + moved), moved.square().sum() / whole, rel_tol=1e-9)


def test_the_share_between_classes_is_one_for_class_means_and_small_for_shuffled_labels():
    label = torch.arange(300) % 3
    means = draw(3, 4, 4, seed=5)
    assert math.isclose(share_between(means[label], label), 1)
    noise = draw(300, 4, 4, seed=6)
    assert share_between(noise, label) < 0.03  # expected 2 / 299, over 16 entries
    assert (
        share_between(means[label], label[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
        < 0.05
    )
    M, c = noise[:6], torch.tensor([0, 0, 1, 1, 1, 0])
    inside = sum((M[c == k] - M[c == k].mean(dim=0)).square().sum() for k in (0, 1))
    assert math.isclose(share_between(M, c), 1 - inside / (M - M.mean(dim=0)).square().sum(), rel_tol=1e-9)
    assert share_between(means[:1].expand(4, 4, 4), torch.tensor([0, 0, 1, 1])) == 0


def test_an_interval_holds_its_mean():
    mean, lo, hi = with_interval([1.0, 2.0, 3.0, 4.0], seed=0)
    assert mean == 2.5 and 1.0 <= lo < mean < hi <= 4.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: composition_matrices(draw(2, 5, 3), draw(2, 5, 3)), r"w1 and w2 are \(B, T, R, H\)"),
        (lambda: composition_matrices(*factors()[:2], gates=draw(2, 5, 4)), r"gates \(B, T, H\)"),
        (lambda: composition_matrices(*factors()[:2], W_b=draw(2, 2)), r"got .*\(2, 2\)"),
        (lambda: over_heads(draw(3, 3)), r"patterns are \(…, H, R, T\)"),
        (lambda: dynamic_share(draw(3, 3)), r"M is \(N, H, H\)"),
        (lambda: share_between(draw(4, 3, 3), torch.zeros(3)), "one label a token"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
