"""Language models trained here: rows, resumption, what is measured against explicit loops, probes, export."""

import json
from dataclasses import fields

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn.functional import cross_entropy

import lib.experiments.language as language
from lib.experiments.embed import embed, read_exported
from lib.experiments.language import LanguageSettings, measured_steps, penalty, train_language_model
from lib.experiments.probes import BATCH, LABELS, RIDGE, commonest, probe_layers, probe_text, spread
from lib.models.pretrained.stored import read_about, read_model
from lib.models.transformer import Transformer, TransformerConfig
from lib.tasks import text

TINY = {
    "L": 2, "d_model": 8, "n_heads": 2, "d_mlp": 16, "T": 16, "batch": 2, "steps": 12,
    "evaluation_chunks": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """The first tokens of each split: enough for models this small."""
    of = {split: text.austen_tokens(split)[:6000] for split in text.SPLITS}
    monkeypatch.setattr(text, "austen_tokens", lambda split: of[split].clone())


def small_model(seed=0, *, L=2, D=8):
    config = TransformerConfig(
        vocab=1024, d_model=D, n_heads=2, n_layers=L, d_mlp=16, activation="gelu", mlp_bias=False
    )
    return Transformer(config, seed=seed)


def windows(n=16, T=16):
    return text.chunks(text.austen_tokens("validation"), T)[:n]


def explicit_streams(model, tokens):
    """residual (L + 1, B, T, D), layer by layer from the modules themselves."""
    h, found = model.embedding(tokens), []
    for layer in model.layers:
        found.append(h)
        a, _ = layer.attention(layer.attention_norm(h), mask=None, rows=None, explicit=True)
        h = h + a + layer.mlp(layer.mlp_norm(h + a))
    return torch.stack([*found, h])


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"regulariser": "cosine", "strength": 0.5}, {"tied": True}])
def test_a_row_is_plain_and_a_function_of_settings_and_seed(change):
    row = train_language_model(TINY | change, seed=1)
    assert row == train_language_model(TINY | change, seed=1)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    taken = {field.name for field in fields(LanguageSettings)} | {"seed", "wall_s", "core_s"}
    assert not row.keys() & taken
    other = train_language_model(TINY | change, seed=2)
    assert other["step0_hash"] != row["step0_hash"] and other["loss_nats"] != row["loss_nats"]
    assert row["measured_at"] == [0, 10, 12]
    for name in (*(f"{curve}_curve" for curve in language.CURVES), "skip_cost"):
        per_step = row[name] if name.endswith("_curve") else [row[name]] * 3
        assert len(per_step) == 3 and all(len(layers) == 2 for layers in per_step)
    assert row["n_tokens"] == 16 * 16 and row["tokens_trained"] == 12 * 2 * 16


@pytest.mark.slow
def test_regularised_models_are_paired_with_the_plain_one_of_their_seed(monkeypatch):
    seen = []
    draw = text.batch
    monkeypatch.setattr(text, "batch", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    plain = train_language_model(TINY, seed=3)
    pulled = train_language_model(TINY | {"regulariser": "mse", "strength": 0.1}, seed=3)
    assert plain["step0_hash"] == pulled["step0_hash"] and plain["weights_hash"] != pulled["weights_hash"]
    assert plain["loss_curve"][0] == pulled["loss_curve"][0]
    assert len(seen) == 24 and all(torch.equal(a, b) for a, b in zip(seen[:12], seen[12:], strict=True))


@pytest.mark.slow
def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(tmp_path, monkeypatch):
    draw = text.batch

    def interrupted(tokens, step, **options):
        if step == 11:
            raise KeyboardInterrupt
        return draw(tokens, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(text, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_language_model(TINY, seed=1, scratch=tmp_path)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    monkeypatch.setattr(text, "batch", lambda *a, **k: pytest.fail("early") if a[1] < 10 else draw(*a, **k))
    resumed = train_language_model(TINY, seed=1, scratch=tmp_path)
    monkeypatch.setattr(text, "batch", draw)
    assert resumed == train_language_model(TINY, seed=1)


def test_penalties_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=generator)
    cosine, mse = [], []
    for l in range(3):
        x, y = e[l].reshape(6, 5), e[l + 1].reshape(6, 5)
        pairs = list(zip(x, y, strict=True))
        cosine.append(sum(1 - float(a @ b) / float(a.norm() * b.norm()) for a, b in pairs) / 6)
        mse.append(sum(float((b - a) @ (b - a)) for a, b in pairs) / 6)
    for name, each in (("cosine", cosine), ("mse", mse)):
        assert penalty(e, name).item() == pytest.approx(sum(each), rel=1e-12)
        assert penalty(e, name, over_layers="mean").item() == pytest.approx(sum(each) / 3, rel=1e-12)
    same = e[:1].expand(4, -1, -1, -1)
    assert penalty(same, "mse") == 0 and abs(penalty(same, "cosine")) < 1e-12
    assert penalty(2 * e, "cosine").item() == pytest.approx(sum(cosine)), "cosines do not see the scale"


def test_what_is_measured_agrees_with_explicit_loops():
    model, tokens = small_model().double(), windows()
    scores, final = language.measure(model, tokens), language.final_scores(model, tokens)
    with torch.no_grad():
        stream = explicit_streams(model, tokens)
        logits = model(tokens)
    loss = [
        -float(logits[i, t].log_softmax(0)[tokens[i, t + 1]]) for i in range(16) for t in range(15)
    ]
    assert scores["loss"] == pytest.approx(np.mean(loss), rel=1e-9)
    for l in range(2):
        x, y = (s.reshape(-1, 8).numpy() for s in stream[l : l + 2])
        f = y - x
        ones = np.column_stack([x, np.ones(len(x))])
        for form, target in (("with", y), ("without", f)):
            left = target - ones @ np.linalg.lstsq(ones, target, rcond=None)[0]
            r2 = 1 - (left**2).sum() / ((target - target.mean(0)) ** 2).sum()
            assert final[f"{form}_raw"][l] == pytest.approx(r2, rel=1e-8)
            assert final[f"{form}_adjusted"][l] == pytest.approx(1 - (1 - r2) * 255 / (255 - 8), rel=1e-8)
            assert final[f"{form}_lo"][l] <= scores[f"{form}/{l}"] <= final[f"{form}_hi"][l]
        norms = np.linalg.norm(f, axis=1) / np.linalg.norm(x, axis=1)
        assert np.sort(norms)[127] - 1e-9 <= scores[f"token_norm_ratio/{l}"] <= np.sort(norms)[128] + 1e-9
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert scores[f"cosine/{l}"] == pytest.approx(cosine.mean(), rel=1e-9)
        ratio = np.linalg.norm(f - f.mean(0)) / np.linalg.norm(y - y.mean(0))
        assert scores[f"norm_ratio/{l}"] == pytest.approx(ratio, rel=1e-8)


def test_a_skip_costs_what_a_model_without_that_layer_loses():
    model, tokens = small_model(L=3), windows()
    costs = language.skip_costs(model, tokens)
    with torch.no_grad():
        whole = cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    for l in range(3):
        short = small_model(L=3)
        del short.layers[l]
        with torch.no_grad():
            h = explicit_streams(short, tokens)[-1]
            loss = cross_entropy(short.readout(h)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert costs[l] == pytest.approx(loss - whole, abs=1e-5)


def test_probes_are_ridge_regression_on_each_stream():
    model = small_model()
    fit = {"tokens": windows(40), "novel": torch.arange(40) % 3}
    judge = {"tokens": windows(60)[40:], "novel": torch.arange(20) % 3}
    classes = {"two_back": 1024, "next": 1024, "novel": 3}
    found = probe_layers(model, fit, judge, classes=classes)
    label = {
        "two_back": lambda w, n, i, t: int(w[i, t - 2]),
        "next": lambda w, n, i, t: int(w[i, t + 1]),
        "novel": lambda w, n, i, t: int(n[i]),
    }
    with torch.no_grad():
        streams = [explicit_streams(model, part["tokens"]).double().numpy() for part in (fit, judge)]
    assert 40 % BATCH, "the last batch is a part of one"
    for name in LABELS:
        assert len(found[name]) == 3
        for l in range(3):
            (X, y), (Z, want) = (
                (
                    np.array([s[l, i, t] for i in range(s.shape[1]) for t in range(2, 15)]),
                    np.array([label[name](p["tokens"], p["novel"], i, t) for i in range(s.shape[1])
                              for t in range(2, 15)]),
                )
                for s, p in zip(streams, (fit, judge), strict=True)
            )  # fmt: skip
            Y, mean = np.eye(classes[name])[y], X.mean(0)
            S = (X - mean).T @ (X - mean)
            W = np.linalg.solve(S + RIDGE * np.trace(S) / 8 * np.eye(8), (X - mean).T @ (Y - Y.mean(0)))
            right = ((Z - mean) @ W + Y.mean(0)).argmax(1) == want
            assert found[name][l] == pytest.approx(right.mean(), abs=2.5 / len(want))  # float32 ties


def test_a_probe_cannot_find_labels_that_are_not_there():
    model, generator = small_model(), torch.Generator().manual_seed(0)
    fit = {"tokens": windows(200), "novel": torch.randint(2, (200,), generator=generator)}
    judge = {"tokens": windows(300)[200:], "novel": torch.randint(2, (100,), generator=generator)}
    found = probe_layers(model, fit, judge, classes={"two_back": 1024, "next": 1024, "novel": 2})
    assert all(abs(share - 0.5) < 0.2 for share in found["novel"])  # 100 windows: four standard errors
    embedding_knows = found["two_back"][0] - commonest(judge, fit)["two_back"]
    assert abs(embedding_knows) < 0.05, "before layer 0 the stream holds one token, not the one two back"


@pytest.mark.slow
def test_probe_text_comes_from_the_split_and_names_its_novel():
    found = probe_text("validation", 16, 60)
    assert found["tokens"].shape == (60, 16) and set(found["novel"].tolist()) == set(range(6))
    with pytest.raises(ValueError, match="T >= 4"):
        probe_text("validation", 3, 10)


def test_windows_are_spread_evenly():
    assert spread(10, 4).tolist() == [0, 2, 5, 7] and spread(3, 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="4 windows are asked for, the text holds 3"):
        spread(3, 4)


@pytest.mark.parametrize("steps", [1, 10, 11, 300, 6000])
def test_curves_begin_at_ten_steps_and_end_with_the_last(steps):
    found = measured_steps(steps)
    assert found[-1] == steps and found == sorted(set(found))
    assert set(found) - {steps} == {s for s in (10, 30, 100, 300, 1000, 3000) if s < steps}


@pytest.mark.slow
def test_an_exported_model_is_embedded_and_says_what_it_said(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "EXPORTED", tmp_path / "build" / "trained.safetensors")
    row = train_language_model(TINY | {"export": True}, seed=1)
    model, about = read_exported(language.EXPORTED)
    assert model.weights_hash() == row["weights_hash"] and about["loss_nats"] == row["loss_nats"]
    assert language.loss_on(model, text.chunks(text.austen_tokens("validation"), 16)) == row["loss_nats"]
    to = embed(language.EXPORTED, tmp_path / "models" / "austen.safetensors")
    assert torch.equal(read_model(to)(windows()), model(windows()))
    assert read_about(to)["training"]["settings"]["steps"] == 12
    assert [path.name for path in language.EXPORTED.parent.iterdir()] == ["trained.safetensors"]


def test_a_model_that_is_missing_too_large_or_of_another_shape_is_not_embedded(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="export=True"):
        embed(tmp_path / "none.safetensors", tmp_path / "to")
    model, path = small_model(), tmp_path / "trained.safetensors"
    monkeypatch.setattr(language, "EXPORTED", path)
    language._export(model, {}, 0, {"loss_nats": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr("lib.experiments.embed.LARGEST", 1000)
        with pytest.raises(ValueError, match="at most 1,000 fit"):
            embed(path, tmp_path / "to")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({"W": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="not those of its config"):
        embed(path, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_mpl": 64}, "'d_mpl'; did you mean 'd_mlp'"),
        ({"regulariser": "cosin", "strength": 1.0}, "did you mean 'cosine'"),
        ({"regulariser": "cosine"}, "a regulariser has a strength above 0"),
        ({"strength": 0.5}, "'none' has 0"),
        ({"regulariser": "mse", "strength": float("nan")}, "strength above 0"),
        ({"over_layers": "max"}, "unknown over_layers 'max'"),
        ({"steps": 0}, "steps is a whole number of at least 1, got 0"),
        ({"T": True}, "T is a whole number"),
        ({"evaluation_chunks": 4}, "evaluation_chunks is at least 8"),
        ({"probe_chunks": 2}, "probe_chunks 0 or at least 4"),
        ({"n_heads": 3}, "n_heads must divide d_model"),
        ({"evaluation_chunks": 10**6}, "windows are asked for"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        train_language_model(TINY | change, seed=0)


@pytest.mark.slow
def test_a_model_learns_and_the_cosine_regulariser_pulls_neighbours_together():
    settings = TINY | {"L": 3, "d_model": 16, "d_mlp": 32, "batch": 8, "steps": 100, "adamw_lr": 1e-2}
    plain = train_language_model(settings, seed=0)
    pulled = train_language_model(settings | {"regulariser": "cosine", "strength": 2.0}, seed=0)
    assert plain["loss_nats"] < plain["untrained_loss_nats"] - 1
    assert np.mean(pulled["cosine_curve"][-1]) > np.mean(plain["cosine_curve"][-1]) + 0.02
