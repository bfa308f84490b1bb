"""Maps between layers against least squares by SVD; a planted correspondence is found, another is not."""

import numpy as np
import pytest
import torch

from lib.metrics.depth.stitching import Stitching, stitching
from lib.models.transformer import Transformer, TransformerConfig

V = 13


def model_of(d_model, n_layers, *, seed=0, vocab=V):
    config = TransformerConfig(vocab=vocab, d_model=d_model, n_heads=2, d_head=2, n_layers=n_layers)
    model = Transformer(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def chunks(C=12, T=10, *, seed=3):
    return torch.randint(V, (C, T), generator=torch.Generator().manual_seed(seed))


def by_svd(x, y, x_new, y_new, ridge):
    """Errors per chunk by an augmented least squares problem: rows √(ridge N) · sd_j e_j below the data."""
    X, Y = x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy()
    N, penalty = len(X), np.diag(X.std(axis=0))
    left = np.concatenate([X - X.mean(0), np.sqrt(ridge * N) * penalty])
    right = np.concatenate([Y - Y.mean(0), np.zeros((X.shape[1], Y.shape[1]))])
    A = np.linalg.lstsq(left, right, rcond=None)[0]
    relative, unexplained = [], []
    for a, b in zip(x_new.numpy(), y_new.numpy(), strict=True):
        error = b - (Y.mean(0) + (a - X.mean(0)) @ A)
        relative.append(
            np.mean([np.linalg.norm(e) / np.linalg.norm(t) for e, t in zip(error, b, strict=True)])
        )
        unexplained.append((np.mean((error**2).sum(1)), np.mean(((b - Y.mean(0)) ** 2).sum(1))))
    return relative, unexplained


@pytest.mark.parametrize("ridge, first", [(0.0, True), (1e-2, True), (1e-2, False)])
def test_errors_are_those_of_least_squares_by_svd(ridge, first):
    shallow, deep, tokens = model_of(4, 2), model_of(6, 3, seed=1), chunks()
    found = stitching(shallow, deep, tokens, ridge=ridge, first_token=first, batch_size=5)
    xs, ys = (model.trace(tokens).residual.detach()[:, :, int(not first) :] for model in (shallow, deep))
    for m in range(3):
        for l in range(4):
            relative, squares = by_svd(xs[m, 0::2], ys[l, 0::2], xs[m, 1::2], ys[l, 1::2], ridge)
            assert found.relative[m, l].tolist() == pytest.approx(relative, rel=1e-8)
            assert found.residual_square[m, l].tolist() == pytest.approx([a for a, _ in squares], rel=1e-8)
            assert found.target_square[l].tolist() == pytest.approx([b for _, b in squares], rel=1e-10)
            assert found.error()[m, l].item() == pytest.approx(np.mean(relative), rel=1e-8)
            share = sum(a for a, _ in squares) / sum(b for _, b in squares)
            assert found.error("unexplained")[m, l].item() == pytest.approx(share, rel=1e-8)
    assert (found.fit_tokens, found.held_out_tokens) == (6 * (10 - (not first)),) * 2


def test_a_model_maps_onto_itself_without_error():
    model = model_of(6, 3)
    found = stitching(model, model, chunks(), ridge=0.0)
    assert found.error().diagonal().max() < 1e-10 and found.error("unexplained").diagonal().max() < 1e-18
    off = found.error()[~torch.eye(4, dtype=torch.bool)]
    assert off.min() > 0.01 and found.best().tolist() == [0, 1, 2, 3]
    summary = found.diagonal(seed=0)
    assert summary.relative < 1e-10 and summary.advantage == 0 and summary.slope == pytest.approx(1)
    assert summary.distance == 0 and tuple(summary.advantage_interval) == (0, 0)


def stretched(shallow, *, factor):
    """A deep model whose layer i·factor is layer i of the shallow one; the layers between add nothing."""
    config = TransformerConfig(**{**vars(shallow.config), "n_layers": factor * shallow.config.n_layers})
    deep = Transformer(config, seed=0, init="zeros").double()
    weights = {name: w for name, w in shallow.state_dict().items() if not name.startswith("layers")}
    for name, weight in deep.state_dict().items():
        _, l, rest = name.split(".", 2) if name.startswith("layers") else ("", "", "")
        if l and int(l) % factor == factor - 1:  # the work is done in the last layer of each group
            weights[name] = shallow.state_dict()[f"layers.{int(l) // factor}.{rest}"]
        elif l:
            weights[name] = weight
    deep.load_state_dict(weights)
    return deep


def extended(shallow, *, layers):
    """A deep model that begins with the shallow one and then computes something else."""
    deep = model_of(shallow.config.d_model, layers, seed=7)
    weights = deep.state_dict() | {
        name: w for name, w in shallow.state_dict().items() if name.startswith(("layers", "embedding"))
    }
    deep.load_state_dict(weights)
    return deep


def test_a_stretched_model_lies_on_the_relative_diagonal():
    shallow = model_of(6, 3)
    deep, tokens = stretched(shallow, factor=2), chunks(16)
    torch.testing.assert_close(deep(tokens), shallow(tokens), rtol=1e-10, atol=1e-12)
    found = stitching(shallow, deep, tokens)
    assert found.best().tolist() == [0, 0, 1, 1, 2, 2, 3]
    summary = found.diagonal(seed=0)
    assert summary.advantage_interval.lo > 0 and summary.relative < summary.absolute
    assert 0.7 < summary.slope < 1.1 and summary.distance < 0.1


def test_a_model_that_only_goes_on_lies_on_the_absolute_line():
    shallow = model_of(6, 3)
    found = stitching(shallow, extended(shallow, layers=6), chunks(16))
    assert found.best().tolist()[:4] == [0, 1, 2, 3]
    summary = found.diagonal(seed=0)
    assert summary.advantage_interval.hi < 0 and summary.absolute < summary.relative


def test_random_streams_are_not_explained():
    """Another seed, other embeddings, contexts of its own: the held-out share is near 1 and never near 0."""
    found = stitching(model_of(6, 2), model_of(6, 2, seed=5), chunks(40, 16))
    assert found.error("unexplained")[1:, 1:].min() > 0.05
    assert found.error("unexplained").max() < 1.2


def test_held_out_text_and_chosen_taps_are_used_as_given():
    shallow, deep, tokens = model_of(4, 2), model_of(6, 3, seed=1), chunks()
    every = stitching(shallow, deep, tokens)
    given = stitching(shallow, deep, tokens[0::2], held_out=tokens[1::2], shallow_taps=[2, 0], deep_taps=[3])
    assert given.shallow_taps == (0, 2) and given.deep_taps == (3,)
    torch.testing.assert_close(given.relative, every.relative[[0, 2]][:, [3]], rtol=1e-10, atol=0)
    same = stitching(deep, deep, tokens, shallow_taps=[1], deep_taps=[2, 3])
    torch.testing.assert_close(
        same.relative, stitching(deep, deep, tokens).relative[[1]][:, [2, 3]], rtol=1e-9, atol=0
    )


def test_errors_do_not_depend_on_the_units_of_the_stream():
    """A massive, or a constant, direction in x changes nothing: the penalty is in units of its variance."""
    shallow, deep, tokens = model_of(4, 2), model_of(6, 3, seed=1), chunks()
    before = stitching(shallow, deep, tokens, shallow_taps=[0], ridge=0.1)
    with torch.no_grad():
        shallow.embedding.weight[:, 1] *= 1e6
    after = stitching(shallow, deep, tokens, shallow_taps=[0], ridge=0.1)
    torch.testing.assert_close(after.relative, before.relative, rtol=1e-9, atol=0)
    with torch.no_grad():
        shallow.embedding.weight[:, 1] = 1000.1
    constant = stitching(shallow.float(), deep, tokens, shallow_taps=[0], ridge=0.0)
    x = deep.trace(tokens).residual.detach()
    kept = shallow.double().trace(tokens).residual.detach()[0][..., [0, 2, 3]]
    relative, _ = by_svd(kept[0::2], x[2, 0::2], kept[1::2], x[2, 1::2], 0.0)
    assert constant.relative[0, 2].tolist() == pytest.approx(relative, rel=1e-5)  # x is float32 here


def test_float32_models_agree_with_float64():
    pair = [model_of(4, 2), model_of(6, 3, seed=1)]
    exact = stitching(*pair, chunks())
    single = stitching(*(model.float() for model in pair), chunks())
    torch.testing.assert_close(single.relative, exact.relative, rtol=1e-4, atol=1e-5)


def test_the_summary_follows_the_errors_it_is_given():
    """Errors |m/S − l/T| + noise: slope 1, best taps on the diagonal; constant rows: slope 0."""
    S, T, C = 5, 9, 6
    taps = {
        "shallow_taps": tuple(range(S)),
        "deep_taps": tuple(range(T)),
        "shallow_layers": 4,
        "deep_layers": 8,
    }
    common = taps | {"fit_tokens": 1, "held_out_tokens": 1, "target_square": torch.ones(T, C).double()}
    gap = (torch.arange(S)[:, None] / 4 - torch.arange(T) / 8).abs()[..., None].expand(S, T, C).double()
    made = Stitching(relative=gap, residual_square=gap, **common)
    summary = made.diagonal(seed=0)
    assert summary.relative == pytest.approx(0.5 * (4 / 9) * 0.25, rel=1e-9)  # odd taps lie between two
    assert summary.absolute == pytest.approx(np.mean([abs(min(l, 4) / 4 - l / 8) for l in range(9)]))
    assert summary.slope == pytest.approx(1, abs=0.05) and summary.distance <= 0.125
    assert made.diagonal(seed=0, kind="unexplained").relative == pytest.approx(summary.relative)
    flat = torch.arange(S)[:, None, None].expand(S, T, C).double()
    none = Stitching(relative=flat, residual_square=flat, **common).diagonal(seed=0)
    assert none.slope == 0 and tuple(none.slope_interval) == (0, 0)
    noisy = gap + 0.2 * torch.rand(S, T, C, generator=torch.Generator().manual_seed(0)).double()
    wide = Stitching(relative=noisy, residual_square=noisy, **common).diagonal(seed=0)
    assert wide.advantage_interval.lo < wide.advantage < wide.advantage_interval.hi


def broken():
    model = model_of(4, 2)
    with torch.no_grad():
        model.layers[1].mlp.W_1.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    "models, tokens, options, message",
    [
        ((model_of(4, 2), model_of(4, 2, vocab=20)), chunks(), {}, "vocabularies of 13 and 20"),
        ((model_of(4, 2), model_of(4, 2)), chunks(2, 5), {}, "5 tokens cannot fit.* width 4: give 6"),
        ((model_of(4, 2), model_of(4, 2)), chunks(1), {}, "held-out tokens must be chunks"),
        ((model_of(4, 2), model_of(4, 2)), chunks()[0], {}, "must be chunks"),
        ((model_of(4, 2), model_of(4, 2)), chunks() + V, {}, "vocabulary"),
        ((model_of(4, 2), model_of(4, 2)), chunks(20, 1), {"first_token": False}, "first token"),
        ((model_of(4, 2), model_of(4, 2)), chunks(), {"ridge": -1.0}, "at least 0"),
        ((model_of(4, 2), model_of(4, 2)), chunks(), {"batch_size": 0}, "batch_size"),
        ((model_of(4, 2), model_of(4, 2)), chunks(), {"deep_taps": [3]}, "deep taps are 0 to 2"),
        ((model_of(4, 2), model_of(4, 2)), chunks(), {"shallow_taps": []}, "shallow taps"),
        ((model_of(4, 2), broken()), chunks(), {}, "tap 2 is not finite"),
        ((model_of(16, 1), model_of(4, 1)), chunks(30), {"ridge": 0.0}, "rank below its width 16"),
    ],
)
def test_what_cannot_be_stitched_is_refused(models, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        stitching(*models, tokens, **options)


def test_a_diagonal_needs_chunks_and_taps():
    pair = (model_of(4, 2), model_of(4, 2, seed=1))
    with pytest.raises(ValueError, match="two taps"):
        stitching(*pair, chunks(), deep_taps=[1]).diagonal(seed=0)
    with pytest.raises(ValueError, match="at least 3"):
        stitching(*pair, chunks(4)).diagonal(seed=0)
    with pytest.raises(ValueError, match="unknown error"):
        stitching(*pair, chunks()).error("relatve")
