"""Digits read by small Transformers: rows, arms of equal size, pairs image by image, and the baselines."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

import lib.experiments.digits as digits
from lib.experiments.digits import (
    ARMS,
    DigitsSettings,
    baselines,
    correct,
    difference,
    train_digits,
    untrained_model,
)
from lib.models.transformer import Transformer
from lib.tasks.digits import Digits, epoch_rows

TINY = {
    "arm": "mha", "L": 1, "d_model": 16, "n_heads": 4, "d_mlp": 16, "steps": 30, "batch": 20,
    "patch": 4, "evaluate_every": 10, "warmup": 5,
}  # fmt: skip
REAL = TINY | {"L": 2, "d_model": 64, "n_heads": 8, "d_mlp": 128, "patch": 2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["mha", "static", "dcmha"])
def test_a_row_is_plain_and_a_function_of_settings_and_seed(arm):
    row = train_digits(TINY | {"arm": arm}, seed=1)
    assert row == train_digits(TINY | {"arm": arm}, seed=1)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert not row.keys() & ({field.name for field in fields(DigitsSettings)} | {"seed", "wall_s", "core_s"})
    other = train_digits(TINY | {"arm": arm}, seed=2)
    assert other["step0_hash"] != row["step0_hash"] and other["loss_nats"] != row["loss_nats"]
    assert [step for step, _ in row["curve"]] == [10, 20, 30] and row["curve"][-1][1] == row["accuracy"]
    assert row["n_images"] == 797 and row["tokens_per_image"] == 5
    assert math.isclose(row["accuracy"], 1 - len(row["wrong_images"]) / 797)
    assert 0 < row["untrained_accuracy"] < 0.35, "chance is about 0.1, and a draw of weights is one draw"


@pytest.mark.slow
def test_a_few_steps_teach_more_than_the_commonest_label_and_training_images_more_than_others():
    row = train_digits(TINY | {"steps": 150, "adamw_lr": 3e-3}, seed=0)
    assert row["accuracy"] > 0.6 > 0.2 > row["majority"]
    assert row["train_accuracy"] > row["accuracy"] - 0.03


@pytest.mark.slow
def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(tmp_path, monkeypatch):
    def interrupted(step, **options):
        if step == 27:
            raise KeyboardInterrupt
        return epoch_rows(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "epoch_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_digits(TINY, seed=1, scratch=tmp_path)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    seen = []
    monkeypatch.setattr(digits, "epoch_rows", lambda step, **o: seen.append(step) or epoch_rows(step, **o))
    resumed = train_digits(TINY, seed=1, scratch=tmp_path)
    assert seen == list(range(25, 30))
    assert resumed == train_digits(TINY, seed=1)


@pytest.mark.slow
def test_models_of_one_seed_see_the_same_images_in_the_same_order(monkeypatch):
    seen = []
    draw = epoch_rows
    monkeypatch.setattr(digits, "epoch_rows", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    for arm in ("mha", "dcmha"):
        train_digits(TINY | {"arm": arm, "steps": 6}, seed=4)
    assert len(seen) == 12 and all(a.equal(b) for a, b in zip(seen[:6], seen[6:], strict=True))


def test_arms_begin_with_the_same_embeddings_and_first_heads():
    models = {arm: untrained_model(DigitsSettings(**REAL | {"arm": arm}), seed=3) for arm in ARMS}
    for arm in ("wide-mlp", "static", "dcmha"):
        for name in ("embedding.weight", "position.weight", "layers.0.attention.W_Q.weight"):
            ours, plain = (model.get_parameter(name) for model in (models[arm], models["mha"]))
            assert ours.equal(plain), (arm, name)
    assert models["wide-heads"].embedding.weight.equal(models["mha"].embedding.weight)


@pytest.mark.parametrize("change", [{}, {"d_model": 32}, {"dc_rank": 1}, {"n_heads": 4}, {"L": 3}])
def test_the_wide_arms_have_as_many_weights_as_the_composed_one(change):
    size = {}
    for arm in ARMS:
        chosen = DigitsSettings(**REAL | change | {"arm": arm})
        size[arm] = Transformer(chosen.config(), seed=0).n_parameters()
    assert size["dcmha"] - size["mha"] == chosen.L * chosen.dynamic_weights
    D, H = chosen.d_model, chosen.n_heads
    for arm, unit in (("wide-mlp", 2 * D + 1), ("wide-heads", 4 * D * H)):
        assert abs(size[arm] - size["dcmha"]) <= chosen.L * unit / 2, "no unit more or less comes nearer"
    assert all(abs(size[arm] / size["dcmha"] - 1) < 0.025 for arm in ("wide-mlp", "wide-heads"))
    assert size["static"] - size["mha"] == chosen.L * 2 * chosen.n_heads**2


def test_the_patch_embedding_starts_linear_in_every_pixel():
    model = untrained_model(DigitsSettings(**REAL), seed=0)
    table = model.embedding.weight.detach()
    for p in range(4):
        for v in range(17):
            assert torch.allclose(table[18 * p + v], v / 16 * table[18 * p + 16])
        assert not torch.allclose(table[18 * p + 17], 17 / 16 * table[18 * p + 16], atol=0.1)
    drawn = Transformer(DigitsSettings(**REAL).config(), seed=0).embedding.weight
    assert torch.equal(drawn[17::18], table[17::18]), "the class token's rows are as they were drawn"


def test_the_answer_is_read_at_the_class_token_alone():
    model = untrained_model(DigitsSettings(**REAL), seed=0).eval()
    tokens = Digits(2).tokens(Digits(2).split("train").pixels[:3])
    assert torch.allclose(model(tokens, rows=digits.READ)[:, 0], model(tokens)[:, 16], atol=1e-5)


def rows(wrong, n=50):
    return [
        {"seeds": {"init": i}, "n_images": n, "wrong_images": each, "accuracy": 1 - len(each) / n}
        for i, each in enumerate(wrong)
    ]


def test_a_difference_pairs_models_image_by_image():
    generator = np.random.default_rng(0)
    hard = generator.choice(50, 12, replace=False)
    ours = rows([sorted(generator.choice(hard, 5, replace=False).tolist()) for _ in range(5)])
    base = rows([sorted(generator.choice(hard, 9, replace=False).tolist()) for _ in range(5)])
    found = difference(ours, base, seed=0)
    means = [a["accuracy"] - b["accuracy"] for a, b in zip(ours, base, strict=True)]
    assert math.isclose(found["mean"], np.mean(means)) and math.isclose(found["mean"], 4 / 50)
    assert found["over_seeds"].lo == pytest.approx(0.08) == found["over_seeds"].hi
    slow, D = [], correct(ours) - correct(base)
    for _ in range(2000):
        s, i = generator.integers(5, size=5), generator.integers(50, size=50)
        slow.append(np.mean([[D[a, b] for b in i] for a in s]))
    for ours_end, end in zip(found["over_both"], np.quantile(slow, [0.025, 0.975]), strict=True):
        assert abs(ours_end - end) < 0.012  # 2000 and 4000 resamples of a mean with deviation 0.03
    assert found["over_images"].lo < 0.08 < found["over_images"].hi
    same = difference(ours, ours, seed=0)
    assert same["mean"] == 0 and same["over_both"] == (0, 0)


def test_rows_of_other_seeds_are_no_pairs():
    ours = rows([[1], [2], [3]])
    with pytest.raises(ValueError, match="no pairs"):
        difference(ours, ours[::-1], seed=0)
    with pytest.raises(ValueError, match="no pairs"):
        difference(ours, ours[:2], seed=0)


@pytest.mark.slow
def test_the_baselines_are_what_they_say():
    found = baselines()
    train, judged = Digits().split("train"), Digits().split("validation")
    known = train.pixels.flatten(1).tolist()
    right = []
    for image, label in zip(judged.pixels[:60].flatten(1).tolist(), judged.label[:60].tolist(), strict=True):
        squares = [sum((a - b) ** 2 for a, b in zip(image, other, strict=True)) for other in known]
        right.append(int(train.label[squares.index(min(squares))]) == label)
    X, Y = (part.pixels.flatten(1).double() for part in (train, judged))
    nearest = train.label[torch.cdist(Y, X).argmin(dim=1)] == judged.label
    assert nearest[:60].tolist() == right
    assert math.isclose(found["neighbour_accuracy"], nearest.double().mean())
    assert math.isclose(found["linear_accuracy"], 1 - len(found["linear_wrong_images"]) / 797)
    # least squares on the labels is another linear classifier, and a weaker one
    ones = torch.ones(len(X), 1, dtype=torch.float64)
    W = torch.linalg.lstsq(
        torch.cat([X, ones], dim=1), torch.nn.functional.one_hot(train.label).double(), driver="gelsd"
    ).solution
    weaker = (torch.cat([Y, ones[: len(Y)]], dim=1) @ W).argmax(dim=1) == judged.label
    assert 0.85 < weaker.double().mean() < found["linear_accuracy"] < found["neighbour_accuracy"] < 1
    counts = [judged.label.tolist().count(k) for k in range(10)]
    assert math.isclose(found["majority"], max(counts) / 797)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": "dcmh"}, "did you mean 'dcmha'"),
        ({"batch": 1001}, "at most the 1000 training images"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
        ({"patch": 3}, "patch divides 8"),
        ({"steps": 0}, "steps is a whole number of at least 1, got 0"),
        ({"d_mlp": -1}, "d_mlp is a whole number of at least 0"),
        ({"d_mlp": 0, "arm": "wide-mlp"}, "widens an MLP"),
        ({"heads": 2}, "unknown setting of DigitsSettings 'heads'"),
    ],
)
def test_impossible_settings_are_refused_before_training(change, message, monkeypatch):
    monkeypatch.setattr(digits, "fit", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        train_digits(TINY | change, seed=0)
