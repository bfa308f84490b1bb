"""Arithmetic, shapes and stitched models: rows, oracles for what they measure, controls, refusals."""

import json
import math

import numpy as np
import pytest
import torch

from lib.experiments import reasoning, shapes
from lib.experiments.reasoning import ReasonerSettings, asked, lens_answers, slope, train_reasoner
from lib.experiments.recipe import read_settings
from lib.experiments.shapes import (
    best_correlation,
    correspondence,
    interaction,
    interior_advantage,
    layer_use,
    stitch_models,
    train_shapes,
)
from lib.metrics.depth import depth_score
from lib.models.transformer import Skip, Transformer, TransformerConfig
from lib.tasks.arithmetic import ModularArithmetic
from lib.training import seeds_by_role

SIZES = {"L": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32}
REASON = {**SIZES, "L": 3, "steps": 6, "batch": 8, "evaluate_every": 3, "evaluation_prompts": 16,
          "depth_prompts": 5, "trained_to": 2, "asked_to": 3}  # fmt: skip
LANGUAGE = {**SIZES, "T": 16, "batch": 4, "steps": 6, "evaluation_chunks": 16}
SHAPE = {**LANGUAGE, "validation_chunks": 24}
STITCH = {**LANGUAGE, "deep_layers": 4, "fit_chunks": 20}
RUNS = [
    (train_reasoner, REASON),
    (train_reasoner, {**REASON, "sharing": "layers", "loss_on_question": True}),
    (train_shapes, SHAPE),
    (stitch_models, STITCH),
]


@pytest.fixture(autouse=True)
def one_thread():
    """As in a sweep. Several threads on models this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, float):
        yield value


@pytest.mark.slow
@pytest.mark.parametrize("run, settings", RUNS)
def test_a_row_is_a_function_of_settings_and_seed(run, settings):
    row = run(settings, seed=1)
    assert row == run(settings, seed=1) == json.loads(json.dumps(row))
    other = run(settings, seed=2)
    assert not row.keys() & {*settings, "seed", "wall_s", "core_s"}, "a result never shadows a setting"
    assert row.keys() == other.keys() and row["seeds"] != other["seeds"]
    hashes = [name for name in row if name.endswith("step0_hash")]
    assert hashes and all(row[name] != other[name] for name in hashes)
    assert all(math.isfinite(x) for x in numbers(row))
    untrained = [name for name in row if name.startswith("untrained_")]
    assert len(untrained) >= 10 and all(name.removeprefix("untrained_") in row for name in untrained)


@pytest.mark.slow
@pytest.mark.parametrize("run, settings", RUNS[1:])
def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(run, settings, tmp_path, monkeypatch):
    whole, room = run(settings, seed=0), reasoning if run is train_reasoner else shapes
    name, calls = ("lens_answers", 0) if room is reasoning else ("loss_on", 0)
    real = getattr(room, name)

    def interrupted(*given, **options):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(room, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, seed=0, scratch=tmp_path)
    assert run(settings, seed=0, scratch=tmp_path) == whole


@pytest.mark.parametrize(
    "run, settings, message",
    [
        (train_reasoner, {**REASON, "trained": 2}, "did you mean 'trained_to'"),
        (train_reasoner, {**REASON, "sharing": "layer"}, "did you mean 'layers'"),
        (train_reasoner, {**REASON, "trained_to": 4}, "got trained_to=4, asked_to=3"),
        (train_reasoner, {**REASON, "asked_to": 7}, "asked_to <= 6"),
        (train_reasoner, {**REASON, "depth_prompts": 2}, "intervals need 3 prompts"),
        (train_reasoner, {**REASON, "loss_on_question": "no"}, "is true or false"),
        (train_reasoner, {**REASON, "modulus": 1}, "modulus of at least 2"),
        (train_reasoner, {**REASON, "expressions": "tree"}, "shape"),
        (train_shapes, {**SHAPE, "validation_chunks": 0}, "whole number of at least 3, got 0"),
        (train_shapes, {**SHAPE, "n_heads": 3}, "n_heads must divide d_model"),
        (train_shapes, {**SHAPE, "T": 0}, "T is a whole number of at least 1"),
        (train_shapes, {**SHAPE, "muon_lr": -1.0}, "muon_lr must be positive"),
        (train_shapes, {**SHAPE, "deep_layers": 8}, "unknown setting of ShapeSettings"),
        (stitch_models, {**STITCH, "deep_layers": 2}, "got L=2, deep_layers=2"),
        (stitch_models, {**STITCH, "L": 1}, "L >= 2"),
        (stitch_models, {**STITCH, "deep": 8}, "unknown setting of StitchSettings"),
        (stitch_models, {**STITCH, "fit_chunks": 10**6}, "windows are asked for"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(run, settings, message):
    with pytest.raises(ValueError, match=message):
        run(settings, seed=0)


def test_shared_layers_are_one_set_of_weights_in_every_place():
    stacked, shared = (
        read_settings(ReasonerSettings, {**REASON, "sharing": one}).decoder(seed=3)
        for one in ("none", "layers")
    )
    layer = sum(p.numel() for p in stacked.layers[0].parameters())
    assert stacked.n_parameters() - shared.n_parameters() == 2 * layer
    assert len(shared.layers) == 3 and all(one is shared.layers[0] for one in shared.layers)
    for name, weight in shared.named_parameters():
        assert weight.equal(stacked.get_parameter(name)), "what remains is paired with the stacked model"
    tokens = torch.arange(6)[None]
    h = shared.embed(tokens)
    for _ in range(3):
        a, m = shared.run_layer(0, h)
        h = h + a + m
    torch.testing.assert_close(shared.readout(h), shared(tokens))


def test_training_keeps_shared_layers_shared_and_moves_them():
    settings = {**REASON, "sharing": "layers"}
    row = train_reasoner(settings, seed=0)
    assert row["output_effects"] != row["untrained_output_effects"]
    assert row["layer_parameters"] == train_reasoner(REASON, seed=0)["layer_parameters"] / 3


def test_questions_have_no_padding_and_the_answer_last():
    chosen = read_settings(ReasonerSettings, REASON)
    for k in (1, 2, 3):
        batch = asked(chosen, k, 0, 0)
        task = ModularArithmetic(steps=k, modulus=5)
        assert batch.tokens.shape == (16, 2 * k + 3) and (batch.steps == k).all()
        for tokens, answer in zip(batch.tokens.tolist(), batch.answer.tolist(), strict=True):
            words = task.read(tokens).split()
            value = int(words[0])
            for operator, operand in zip(words[1:-2:2], words[2:-2:2], strict=True):
                value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[
                    operator
                ]
            assert words[-2] == "=" and int(words[-1]) == value % 5 == answer


def test_asked_questions_are_not_those_of_training():
    chosen = read_settings(ReasonerSettings, {**REASON, "modulus": 11, "trained_to": 3})
    seen = set()
    for step in range(20):
        batch = chosen.task(3).batch(step, seed=seeds_by_role(0)["data"], size=9, mix=[3])
        seen |= {tuple(tokens) for tokens in batch.tokens.tolist()}
    new = {tuple(tokens) for tokens in asked(chosen, 3, reasoning.MEASURED_STEP, 0).tokens.tolist()}
    assert not seen & new


def test_effects_and_scores_are_those_of_one_full_pass_for_each_skip():
    chosen = read_settings(ReasonerSettings, {**REASON, "depth_prompts": 4})
    model = chosen.decoder(seed=0).eval()
    found = reasoning.depth_use(model, chosen, seed=0)
    for i, k in enumerate((1, 2, 3)):
        batch = asked(chosen, k, reasoning.MEASURED_STEP, 0, size=4)
        prompts, effects = batch.tokens[:, :-1], torch.zeros(4, 3)
        everywhere = torch.ones(prompts.shape, dtype=torch.bool)
        everywhere[:, 0] = False
        with torch.no_grad():
            clean = model(prompts)[:, -1].softmax(-1)
            for l in range(3):
                edited = model.trace(prompts, read=(), interventions=[Skip(l, tokens=everywhere)]).logits
                effects[:, l] = (edited[:, -1].softmax(-1) - clean).norm(dim=-1)
            residual = model.trace(prompts, read=("residual",)).residual
            for l in range(4):
                guess = model.readout(residual[l][:, -1]).argmax(-1)
                assert found["lens_accuracies"][i][l] == (guess == batch.answer).double().mean()
            guesses = model.readout(residual[:, :, -1]).argmax(-1).T.tolist()
            settled = [next(l for l in range(4) if set(said[l:]) == {said[-1]}) for said in guesses]
        assert found["settled"][i] == np.mean(settled)
        assert found["output_effects"][i] == pytest.approx(effects.mean(0).tolist(), rel=1e-3, abs=1e-6)
        by_hand = sum((l + 1) * e for l, e in enumerate(found["output_effects"][i]))
        assert found["depth_scores"][i] == pytest.approx(by_hand / sum(found["output_effects"][i]))
        assert found["depth_lo"][i] <= found["depth_scores"][i] <= found["depth_hi"][i]


def test_the_last_tap_of_the_lens_is_the_models_answer():
    chosen = read_settings(ReasonerSettings, REASON)
    model, batch = chosen.decoder(seed=1).eval(), asked(chosen, 2, 0, 0)
    right = model(batch.tokens[:, :-1])[:, -1].argmax(-1) == batch.answer
    assert (lens_answers(model, batch)[:, -1] == batch.answer).equal(right)


def test_the_slope_is_the_least_squares_line_through_the_scores():
    generator = np.random.default_rng(0)
    flat = [generator.uniform(0.5, 1.0, size=(40, 4)) for _ in range(3)]
    deeper = [one * np.exp(k * np.arange(4)) for k, one in enumerate(flat)]
    for effects, growing in ((flat, False), (deeper, True)):
        scores = [depth_score(one.mean(axis=0)) for one in effects]
        found = slope("depth_slope", effects, reasoning._scores, seed=0)
        assert found["depth_slope"] == pytest.approx(np.polyfit([1, 2, 3], scores, 1)[0])
        assert found["depth_slope_lo"] <= found["depth_slope"] <= found["depth_slope_hi"]
        assert (found["depth_slope_lo"] > 0) == growing
    assert slope("x", flat[:1], reasoning._scores, seed=0) == {"x": None, "x_lo": None, "x_hi": None}


@pytest.mark.slow
def test_a_reasoner_learns_one_addition_and_the_untrained_one_does_not_know_it():
    settings = {**REASON, "L": 2, "d_model": 32, "d_mlp": 64, "n_heads": 2, "operators": "+", "modulus": 3,
                "trained_to": 1, "asked_to": 2, "steps": 150, "batch": 32, "adamw_lr": 5e-3,
                "evaluate_every": 150}  # fmt: skip
    row = train_reasoner(settings, seed=0)
    assert row["accuracies"][0] > 0.95 > 0.7 > row["untrained_accuracies"][0]
    assert row["chances"] == pytest.approx([1 / 3, 1 / 3]) and row["longer_accuracy"] == row["accuracies"][1]
    assert row["depth_slope"] is None
    assert sum(row["output_effects"][0]) > sum(row["untrained_output_effects"][0])


def language_model(L, *, seed=0, vocab=1024, d_model=16):
    return Transformer(
        TransformerConfig(vocab=vocab, d_model=d_model, n_heads=2, n_layers=L, d_mlp=32), seed=seed
    ).eval()


@torch.no_grad()
def test_summaries_of_layers_are_their_definitions():
    model = language_model(3)
    windows = torch.randint(1024, (4, 16), generator=torch.Generator().manual_seed(0))
    found = layer_use(model, windows)
    trace = model.trace(windows)
    by_hand = [
        (trace.residual[l + 1] - trace.residual[l]).norm(dim=-1).div(trace.residual[l].norm(dim=-1)).mean()
        for l in range(3)
    ]
    assert found["contribution_layer"] == pytest.approx([float(x) for x in by_hand], rel=1e-4)
    assert found["late_contribution"] == pytest.approx(float(by_hand[2] / by_hand[0]), rel=1e-4)
    costs = np.maximum(found["skip_cost"], 0)
    assert costs.sum() > 0 and found["late_cost"] == pytest.approx(costs[2] / costs.sum())
    assert found["skip_score"] == pytest.approx((costs @ [1, 2, 3]) / costs.sum() / 3)
    one = layer_use(language_model(1), windows)
    assert one["late_contribution"] is None and one["late_cost"] is None and one["contribution_score"] == 1


@pytest.mark.slow
def test_shapes_of_one_seed_see_the_same_data_and_are_judged_on_the_same_windows(monkeypatch):
    seen, real = [], shapes.loss_on

    def watched(model, windows):
        seen.append(windows)
        return real(model, windows)

    monkeypatch.setattr(shapes, "loss_on", watched)
    wide = train_shapes(SHAPE, seed=0)
    deep = train_shapes({**SHAPE, "L": 3, "d_model": 8}, seed=0)
    assert len(seen) == 4 and all(windows.equal(seen[0]) for windows in seen)
    assert wide["n_tokens"] == deep["n_tokens"] == 24 * 16 and wide["seeds"] == deep["seeds"]
    assert len(wide["skip_cost"]) == 2 and len(deep["contribution_layer"]) == 3
    assert wide["loss_nats"] < wide["untrained_loss_nats"]


def test_a_model_against_a_copy_of_itself_lies_on_the_diagonal():
    model, generator = language_model(4, vocab=64), torch.Generator().manual_seed(0)
    fitted, judged = (torch.randint(64, (n, 16), generator=generator) for n in (40, 12))
    twin = Transformer(model.config, seed=9).eval()
    twin.load_state_dict(model.state_dict())
    found = correspondence(model, twin, fitted, judged, ridge=1e-6, seed=0)
    assert found["best_taps"] == [0, 1, 2, 3, 4]
    assert found["slope"] == pytest.approx(1) and found["best_correlation"] == pytest.approx(1)
    assert found["distance"] == 0 and found["advantage"] == pytest.approx(0)
    assert found["interior_advantage"] == pytest.approx(0), "relative and absolute depth are the same here"


def test_the_deep_model_does_not_begin_with_the_layers_of_the_shallow_one():
    chosen = read_settings(shapes.StitchSettings, STITCH)
    shallow, deep = (
        shapes._untrained(shapes._one(chosen, L), shapes.start_seed(name, 0))
        for name, L in (("shallow", 2), ("deep", 4))
    )
    for name, weight in shallow.named_parameters():
        if "norm" not in name:  # all ones in both
            one, other = weight.flatten(), deep.get_parameter(name).flatten()
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.2


def test_correlation_and_advantage_tell_relative_from_absolute_depth():
    shallow, deep = np.arange(4) / 3, np.arange(7) / 6
    relative = torch.tensor(abs(shallow[:, None] - deep))  # the same relative depth is exact
    absolute = torch.tensor(abs(np.arange(4.0)[:, None] - np.arange(7)))
    assert best_correlation(relative.argmin(dim=0)) > 0.9
    assert interior_advantage(relative) > 0 > interior_advantage(absolute)
    assert best_correlation(torch.tensor([0, 2, 2, 2])) == 0
    rich, hard = torch.tensor(-shallow)[:, None], torch.tensor(deep**2)
    assert interaction(rich + hard) == (0, 0), "a rich source and a hard target are no correspondence"
    order, share = interaction(rich + hard + 0.1 * relative)
    assert order < -0.8 and 0 < share < 0.1
    assert interaction(rich - 0.1 * torch.tensor(np.outer(shallow, deep)))[0] == pytest.approx(-1)
    assert interaction(rich + 0.1 * torch.tensor(np.outer(shallow, deep)))[0] == pytest.approx(1)
    assert interior_advantage(relative[:2]) is None
