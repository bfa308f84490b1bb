"""Language models with composed heads: matching, pairing, rows, losses against explicit loops."""

import dataclasses
import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

import lib.experiments.composed_language as composed
from lib.experiments.composed_language import ARMS, ComposedSettings, config_of, train_composed
from lib.optimizers import Optimizer
from lib.tasks import text

TINY = {
    "arm": "dcmha", "L": 2, "d_model": 16, "n_heads": 4, "d_mlp": 32, "T": 16, "batch": 2, "steps": 10,
    "curve_windows": 16,
}  # fmt: skip
COMPOSED = [arm for arm in ARMS if not arm.startswith("mha")]


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
    composed.references.cache_clear()
    yield
    composed.references.cache_clear()


def settings(**change):
    return ComposedSettings(**(TINY | change))


def built(chosen, seed=0):
    return composed.untrained(chosen, seed=seed)


@pytest.mark.parametrize("size", [(2, 64, 8, 256, 128), (3, 48, 6, 192, 64), (1, 32, 4, 100, 256)])
def test_matched_arms_have_the_weights_or_the_arithmetic_of_dcmha_within_one_percent(size):
    L, D, H, d_mlp, T = size
    shape = dict(L=L, d_model=D, n_heads=H, d_mlp=d_mlp, T=T)
    count = {
        arm: sum(p.numel() for p in built(settings(arm=arm, **shape)).parameters())
        for arm in ("mha", "mha_parameters", "mha_flops", "dcmha")
    }
    assert count["mha"] < 0.97 * count["dcmha"], "the control: unmatched, they differ"
    assert abs(count["mha_parameters"] / count["dcmha"] - 1) < 0.01

    def flops(arm):  # counted by hand: 2 for each weight but the embedding, and for each pair what it meets
        own, R = settings(arm=arm, **shape).config(), 2
        weights = sum(
            p.numel()
            for name, p in built(settings(arm=arm, **shape)).named_parameters()
            if p.dim() == 2 and name != "embedding.weight"
        )
        each = 4 * D + (4 * (4 * R * H + 2 * H) if own.attention == "dcmha" else 0)
        return 2 * weights * T + L * each * T * (T + 1) // 2

    assert composed.flops_per_window(config_of(settings(**shape), "dcmha"), T) == flops("dcmha")
    assert flops("mha") < 0.97 * flops("dcmha")
    assert abs(flops("mha_flops") / flops("dcmha") - 1) < 0.01


def test_arms_differ_in_the_named_part_and_nothing_else():
    plain = settings(arm="mha").config()
    for arm, change in ARMS.items():
        own = settings(arm=arm).config()
        if arm in ("mha_parameters", "mha_flops"):
            assert own == dataclasses.replace(plain, d_mlp=own.d_mlp) and own.d_mlp > plain.d_mlp
        else:
            assert own == dataclasses.replace(plain, **change)
    assert len({settings(arm=arm).config() for arm in ARMS}) == len(ARMS)
    windowed = settings(arm="post_only", windows=[8, None], qk_norm=True).config()
    assert windowed.windows == (8, None) and windowed.qk_norm


@pytest.mark.parametrize("arm", COMPOSED)
def test_composed_arms_start_as_the_plain_model_of_their_seed(arm):
    plain, model = built(settings(arm="mha")), built(settings(arm=arm))
    own = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(own[name], weight)
    extra = own.keys() - dict(plain.named_parameters()).keys()
    assert extra and all(".pre." in name or ".post." in name for name in extra)
    windows = composed.validation_windows(16, 16)
    apart = composed.window_losses(model, windows) - composed.window_losses(plain, windows)
    assert apart.abs().max() < 0.02  # of about 7 nats: composition starts near the identity
    other = built(settings(arm=arm), seed=1)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def test_a_window_loss_is_the_mean_of_its_tokens_and_each_token_is_a_target_once():
    model = built(settings()).double()
    tokens = text.austen_tokens("validation")[: 16 * 5 + 3]
    windows = tokens.unfold(0, 17, 16)
    assert windows.shape == (5, 17) and torch.equal(composed.validation_windows(16)[:5], windows)
    targets = composed.validation_windows(16)[:, 1:].flatten()
    everything = text.austen_tokens("validation")
    assert torch.equal(targets, everything[1 : len(targets) + 1]) and len(everything) - len(targets) <= 16
    found = composed.window_losses(model, windows)
    for window, loss in zip(windows, found, strict=True):
        with torch.no_grad():
            p = model(window[None, :-1])[0].log_softmax(dim=-1)
        each = [-float(p[t, window[t + 1]]) for t in range(16)]
        assert loss.item() == pytest.approx(sum(each) / 16, rel=1e-12)


def test_losses_do_not_depend_on_how_many_windows_are_measured_at_once(monkeypatch):
    model, windows = built(settings()), composed.validation_windows(16, 40)
    whole = composed.window_losses(model, windows)
    monkeypatch.setattr(composed, "AT_ONCE", 3 * 17)
    assert torch.allclose(composed.window_losses(model, windows), whole, atol=1e-6)


def test_references_are_counts_and_the_bigram_knows_more():
    found = composed.references()
    train, judged = (text.austen_tokens(split).tolist() for split in ("train", "validation"))
    V, n = text.VOCAB, len(train)
    unigram = [(train.count(b) + 1) / (n + V) for b in range(V)]
    pairs = list(zip(train[:-1], train[1:], strict=True))
    loss_1 = loss_2 = 0.0
    sample = list(zip(judged[:-1], judged[1:], strict=True))
    both, first = {}, {}
    for a, b in pairs:
        both[a, b], first[a] = both.get((a, b), 0) + 1, first.get(a, 0) + 1
    for a, b in sample:
        loss_1 -= math.log(unigram[b]) / len(sample)
        loss_2 -= math.log((both.get((a, b), 0) + 50 * unigram[b]) / (first.get(a, 0) + 50)) / len(sample)
    assert found["loss_unigram"] == pytest.approx(loss_1) and found["loss_bigram"] == pytest.approx(loss_2)
    assert loss_2 < loss_1 < math.log(V)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"arm": "mha_flops"}, {"windows": [4, None], "final_windows": 32}])
def test_a_row_is_plain_and_a_function_of_settings_and_seed(change):
    row = train_composed(TINY | change, seed=1)
    assert row == train_composed(TINY | change, seed=1)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    taken = {field.name for field in fields(ComposedSettings)} | {"seed", "wall_s", "core_s"}
    assert not row.keys() & taken
    other = train_composed(TINY | change, seed=2)
    assert other["step0_hash"] != row["step0_hash"] and other["loss_nats"] != row["loss_nats"]
    assert row["measured_at"] == list(range(1, 11)) and len(row["loss_curve"]) == 10
    assert len(row["block_losses"]) == len(row["block_tokens"]) == 16
    weighted = np.average(row["block_losses"], weights=row["block_tokens"])
    assert row["loss_nats"] == pytest.approx(weighted, rel=1e-12)
    n = change.get("final_windows") or (6000 - 1) // 16
    assert row["tokens_measured"] == sum(row["block_tokens"]) == n * 16
    assert row["tokens_trained"] == 10 * 2 * 16
    assert row["training_flops"] == 3 * row["flops_per_token"] * row["tokens_trained"]
    model = built(settings(**change))
    layers = sum(p.numel() for p in [*model.layers.parameters(), *model.norm.parameters()])
    assert row["layer_parameters"] == layers and row["parameters"] == model.n_parameters()
    assert row["attention_parameters"] < layers and row["mlp_width"] == model.config.mlp_width


@pytest.mark.slow
def test_all_arms_of_a_seed_read_the_same_windows_and_are_judged_on_the_same_text(monkeypatch):
    seen, judged, draw, measure = [], [], text.batch, composed.window_losses
    monkeypatch.setattr(text, "batch", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    monkeypatch.setattr(composed, "window_losses", lambda m, w: judged.append(w) or measure(m, w))
    arms = ("mha", "mha_parameters", "dcmha", "static")
    rows = [train_composed(TINY | {"arm": arm}, seed=3) for arm in arms]
    order, text_of = (torch.stack(x).view(4, -1) for x in (seen, [w[:16] for w in judged]))
    assert order.shape[1] == 10 * 2 * 17
    assert all(torch.equal(order[0], other) for other in order[1:])
    assert all(torch.equal(text_of[0], other) for other in text_of[1:])
    assert len({row["weights_hash"] for row in rows}) == 4
    for name in ("loss_unigram", "loss_bigram", "block_tokens", "tokens_trained", "measured_at", "seeds"):
        assert all(row[name] == rows[0][name] for row in rows)
    train_composed(TINY, seed=4)  # the control: another seed, other text
    assert not torch.equal(torch.stack(seen[-10:]).flatten(), order[0])


@pytest.mark.slow
def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(tmp_path, monkeypatch):
    draw, chosen = text.batch, TINY | {"arm": "query_only", "steps": 20}

    def interrupted(tokens, step, **options):
        if step == 11:
            raise KeyboardInterrupt
        return draw(tokens, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(text, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_composed(chosen, seed=1, scratch=tmp_path)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    monkeypatch.setattr(text, "batch", lambda *a, **k: pytest.fail("early") if a[1] < 10 else draw(*a, **k))
    resumed = train_composed(chosen, seed=1, scratch=tmp_path)
    monkeypatch.setattr(text, "batch", draw)
    assert resumed == train_composed(chosen, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["mha", "dcmha", "static"])
def test_every_arm_learns_and_every_weight_moves(arm):
    chosen = settings(arm=arm, steps=50, batch=8)
    row = train_composed(dataclasses.asdict(chosen), seed=0)
    assert row["loss_nats"] < row["untrained_loss"] - 1 and row["training_loss"] < row["untrained_loss"] - 1
    assert row["loss_curve"][-1] < row["loss_curve"][0]
    model, windows = built(chosen), composed.validation_windows(16, 16)
    with torch.no_grad():  # away from the start, where W_2 is nearly 0 and W_1 would hardly matter
        for name, weight in model.named_parameters():
            if ".pre." in name or ".post." in name:
                weight.add_(0.1)
    composed.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_composing_weights_have_a_rate_of_their_own_and_every_weight_has_one():
    plan = settings(adamw_lr=1e-2, composition_lr=3e-4).plan()
    model = built(settings(arm="with_static"))
    rate = {
        id(p): group["peak_lr"]
        for part in plan.build(model)
        for group in part.param_groups
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert rate.pop(id(p)) == (3e-4 if ".pre." in name or ".post." in name else 1e-2)
    assert not rate and len(plan.build(built(settings(arm="mha")))) == 1


@pytest.mark.slow
def test_the_same_rate_for_all_is_plain_adamw():
    """Two optimizers of one rate are one, but for the order of sums: none is across weights."""
    chosen = settings(adamw_lr=5e-3, composition_lr=5e-3)
    models = [built(chosen), built(chosen)]
    plans = [chosen.plan(), Optimizer(adamw_lr=5e-3, warmup=chosen.warmup)]
    windows = composed.validation_windows(16, 16)
    for model, plan in zip(models, plans, strict=True):
        parts = plan.build(model)
        for _ in range(5):
            model.zero_grad()
            composed.window_losses.__wrapped__(model, windows).mean().backward()
            for part in parts:
                part.step()
    assert models[0].weights_hash() == models[1].weights_hash() != built(chosen).weights_hash()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": "dcmah"}, "did you mean 'dcmha'"),
        ({"n_head": 4}, "did you mean 'n_heads'"),
        ({"steps": 25}, "a multiple of 10"),
        ({"steps": 0}, "steps is a whole number of at least 1"),
        ({"T": True}, "T is a whole number"),
        ({"n_heads": 3}, "n_heads must divide d_model"),
        ({"windows": [0]}, "a window must be a whole number"),
        ({"windows": []}, "at least one layer"),
        ({"final_windows": 15}, "final_windows is at least 16"),
        ({"curve_windows": 10**6}, "windows are asked for"),
        ({"warmup": -1}, "warmup is a whole number of at least 0, got -1"),
        ({"adamw_lr": float("nan")}, "adamw_lr must be positive and finite, got nan"),
        ({"composition_lr": 0}, "composition_lr must be positive"),
        ({"device": "gpu"}, "unknown device"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change, message, monkeypatch):
    monkeypatch.setattr(composed, "fit", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        train_composed(TINY | change, seed=0)


def test_a_match_that_is_too_coarse_is_refused(monkeypatch):
    monkeypatch.setattr(composed, "MATCHED", 1e-9)
    with pytest.raises(ValueError, match="mha_flops: the nearest MLP"):
        settings(arm="mha_flops")
