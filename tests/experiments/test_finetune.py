"""Fine-tuning: rows, texts that are held out, scores against explicit least squares, refusals."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import lib.experiments.finetune as tuning
from lib.experiments.finetune import FinetuneSettings, arithmetic, finetune, layer_scores, read
from lib.models import pretrained
from lib.models.transformer import Transformer, TransformerConfig
from lib.tasks import text

TINY = {"model": "austen", "text": "arithmetic", "home": "prose", "steps": 4, "batch": 2, "context": 16,
        "tokens": 512, "warmup": 0}  # fmt: skip
CONFIG = TransformerConfig(vocab=1024, d_model=8, n_heads=2, n_layers=2, d_mlp=16, activation="gelu")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """An untrained model in place of the embedded one, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrained, "load", lambda name, **options: Transformer(CONFIG, seed=0))
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda name: text.austen_tokenizer())
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_row_is_plain_and_a_function_of_settings_and_seed(tmp_path):
    row = finetune(TINY, seed=1)
    assert row == finetune(TINY, seed=1, scratch=tmp_path) and (tmp_path / "checkpoint").exists()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert not row.keys() & ({field.name for field in fields(FinetuneSettings)} | {"seed", "wall_s"})
    assert finetune(TINY, seed=2)["weights_hash"] != row["weights_hash"]
    assert row["step0_hash"] == Transformer(CONFIG, seed=0).weights_hash() != row["weights_hash"]
    for place in ("home", "new"):
        assert row[f"{place}_tokens"] == 512
        for form in ("with", "without"):
            for estimator in ("held_out", "adjusted", "raw"):
                before, after = (row[f"{place}_{form}_{estimator}_{when}"] for when in ("before", "after"))
                assert len(before) == len(after) == 2 and all(0 <= s <= 1 for s in before + after)
                change = row[f"{place}_{form}_{estimator}_change"]
                assert change == pytest.approx(np.mean(after) - np.mean(before), abs=1e-12)


@pytest.mark.slow
def test_training_lowers_the_loss_on_the_new_text_and_leaves_the_home_text_unread():
    row = finetune(TINY | {"steps": 60, "batch": 8, "adamw_lr": 1e-2}, seed=0)
    assert row["new_loss_after"] < row["new_loss_before"] - 1 and row["last_loss"] < row["first_loss"] - 1
    assert row["home_loss_after"] > row["new_loss_after"] + 1
    assert row["training_tokens"] == row["tokens_trained"] == 60 * 8 * 16


def test_a_large_model_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "LARGEST_KEPT", 100)
    finetune(TINY | {"steps": 1}, seed=0, scratch=tmp_path)
    assert not list(tmp_path.iterdir())


def test_scores_agree_with_least_squares_on_explicit_streams():
    model = Transformer(CONFIG, seed=1).double()
    tokens = read("prose", part="evaluation", tokens=640, tokenizer=text.austen_tokenizer(), context=16,
                  seed=0, vocab=1024)  # fmt: skip
    found = layer_scores(model, tokens, batch=3)
    with torch.no_grad():
        trace = model.trace(tokens, read=("residual",))
        loss = cross_entropy(trace.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-9)
    for l in range(2):
        x, y = (s.reshape(-1, 8).numpy() for s in trace.residual[l : l + 2])
        ones = np.column_stack([x, np.ones(len(x))])
        for form, target in (("with", y), ("without", y - x)):
            left = target - ones @ np.linalg.lstsq(ones, target, rcond=None)[0]
            r2 = 1 - (left**2).sum() / ((target - target.mean(0)) ** 2).sum()
            assert found[f"{form}_raw"][l] == pytest.approx(r2, rel=1e-8)
            assert found[f"{form}_adjusted"][l] == pytest.approx(1 - (1 - r2) * 639 / (639 - 8), rel=1e-8)
            assert abs(found[f"{form}_held_out"][l] - r2) < 0.05  # 8 columns, 320 tokens a half


@pytest.mark.parametrize("name", ["prose", "code", "arithmetic"])
def test_what_is_measured_is_not_what_is_trained_on(name):
    parts = {}
    for part in ("fit", "evaluation"):
        tokens = read(name, part=part, tokens=2048, tokenizer=text.austen_tokenizer(), context=32, seed=0,
                      vocab=1024)  # fmt: skip
        assert tokens.shape == (64, 32)
        parts[part] = {tuple(window) for window in tokens.tolist()}
    assert len(parts["fit"]) > 60 and not parts["fit"] & parts["evaluation"]


def test_arithmetic_is_right_and_a_function_of_seed_and_step():
    lines = arithmetic(300, seed=5).splitlines()
    assert len(lines) == 300 and len({line.count(" ") for line in lines}) == 3
    for line in lines:
        expression, answer = line.split(" = ")
        assert eval(expression, {"__builtins__": {}}) == int(answer)
    assert lines == arithmetic(300, seed=5).splitlines() != arithmetic(300, seed=6).splitlines()
    assert arithmetic(300, seed=5, step=1).splitlines() != lines


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modell": "austen"}, "did you mean 'model'"),
        ({"text": "proze"}, "did you mean 'prose'"),
        ({"home": "arithmetic"}, "needs a second domain"),
        ({"steps": 0}, "steps is a whole number of at least 1"),
        ({"context": 1}, "context is a whole number of at least 2"),
        ({"adamw_lr": 0.0}, "adamw_lr must be positive"),
        ({"tokens": 64}, "8 windows: tokens >= 8"),
        ({"device": "gpu"}, "unknown device"),
        ({"context": 2, "tokens": 16}, "16 tokens of the home text are too few for a stream of width 8"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        finetune(TINY | change, seed=0)


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match="FinetuneSettings needs model"):
        finetune({"text": "prose"}, seed=0)
