"""The two trained experiments, end to end: settings, rows, resumption, and what two layers can learn."""

import json

import pytest
import torch

import lib.experiments.composition
from lib.experiments.composition import train_composition
from lib.experiments.pair_sum import train_sum2
from lib.sweeps import run_sweep
from lib.tasks.hops import PermutationHops

TINY = {"L": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32, "steps": 6, "batch": 4, "evaluate_every": 3}
COMPOSITION = {**TINY, "n": 4, "evaluation_prompts": 16}
PAIR_SUM = {**TINY, "n": 3, "M": 7, "evaluation_prompts": 64}
RUNS = [(train_composition, COMPOSITION), (train_sum2, PAIR_SUM)]


@pytest.fixture(autouse=True)
def one_thread():
    """As in a sweep. Several threads on models this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("run, settings", RUNS)
def test_a_row_is_a_function_of_settings_and_seed(run, settings):
    row = run(settings, seed=1)
    assert row == run(settings, seed=1) == json.loads(json.dumps(row))
    other = run(settings, seed=2)
    assert other["step0_hash"] != row["step0_hash"] and other["final_loss"] != row["final_loss"]
    assert set(row["seeds"]) == {"init", "data", "order", "evaluation"}
    assert row["steps_done"] == 6 and [step for step, _ in row["curve"]] == [3, 6]


@pytest.mark.parametrize("run, settings", RUNS)
def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(run, settings, tmp_path, monkeypatch):
    task = "PermutationHops" if run is train_composition else "Sum2"
    module = __import__(run.__module__, fromlist=[task])
    batch = getattr(module, task).batch

    def interrupted(self, step, **options):
        if step == 4 and options["size"] == settings["batch"]:
            raise KeyboardInterrupt
        return batch(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(module, task), "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, seed=1, scratch=tmp_path)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    assert run(settings, seed=1, scratch=tmp_path) == run(settings, seed=1)


@pytest.mark.parametrize(
    "run, change, message",
    [
        (train_composition, {"d_mpl": 64}, "'d_mpl'; did you mean 'd_mlp'"),
        (train_composition, {"order": "last-fist"}, "did you mean 'last-first'"),
        (train_composition, {"supervise": "layer"}, "did you mean 'layers'"),
        (train_composition, {"optimizer": "adamv"}, "did you mean 'adamw'"),
        (train_composition, {"steps": 0}, "steps is a whole number of at least 1, got 0"),
        (train_composition, {"n": 1}, "n >= 2, got n=1"),
        (train_composition, {"n_heads": 3}, "n_heads must divide d_model"),
        (train_composition, {"device": "gpu"}, "unknown device 'gpu'"),
        (train_composition, {"steps": None}, "steps is a whole number"),
        (train_sum2, {"K": 2}, "unknown setting of PairSumSettings 'K'"),
        (train_sum2, {"M": 8}, "odd M, got M=8"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(run, change, message):
    with pytest.raises(ValueError, match=message):
        run({**(COMPOSITION if run is train_composition else PAIR_SUM), **change}, seed=0)


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match="PairSumSettings needs L, d_model, n_heads, d_mlp, steps, batch, M"):
        train_sum2({"n": 3}, seed=0)


def test_one_layer_with_a_wide_mlp_has_the_weights_of_two():
    two = train_composition({**COMPOSITION, "L": 2, "d_mlp": 2 * 16, "steps": 1}, seed=0)
    one = train_composition({**COMPOSITION, "L": 1, "d_mlp": 6 * 16, "steps": 1}, seed=0)
    d = 16  # 4 d d of attention and 2 d d_mlp + d_mlp of the MLP, in each layer
    assert two["layer_parameters"] == 2 * (4 * d * d + 2 * d * 2 * d + 2 * d)
    assert one["layer_parameters"] == two["layer_parameters"] + 2 * d  # the hidden biases: 6 d against 4 d
    for row in (one, two):
        assert row["embedding_parameters"] == (2 * 4 + 2 * 2 + 1) * d
        assert row["readout_parameters"] == 4 * d + 4
        assert row["parameters"] == sum(
            row[f"{part}_parameters"] for part in ("embedding", "readout", "layer")
        )


@pytest.mark.slow
def test_two_layers_learn_to_compose_and_one_layer_of_the_same_size_does_not_in_the_same_steps():
    settings = {"n": 8, "d_model": 64, "n_heads": 4, "batch": 32, "steps": 160}
    two = train_composition({**settings, "L": 2, "d_mlp": 128}, seed=0)
    one = train_composition({**settings, "L": 1, "d_mlp": 384}, seed=0)
    assert two["accuracy"] > 0.9 > 0.5 > one["accuracy"]
    assert abs(two["untrained_accuracy"] - two["chance"]) < 0.05
    assert one["hop_1"] > 0.9, "one layer learns to look a value up"


@pytest.mark.slow
def test_two_layers_learn_last_token_sum2_and_one_layer_of_the_same_size_does_not_in_the_same_steps():
    settings = {"n": 8, "M": 33, "d_model": 64, "n_heads": 4, "batch": 64, "steps": 200}
    two = train_sum2({**settings, "L": 2, "d_mlp": 128}, seed=0)
    one = train_sum2({**settings, "L": 1, "d_mlp": 384}, seed=0)
    assert two["accuracy"] > 0.9 > 0.7 > one["accuracy"]
    assert abs(two["untrained_accuracy"] - 0.5) < 0.1 and two["majority"] == 0.5


def test_the_answer_cannot_be_read_without_the_tables(monkeypatch):
    """Negative control: answers of other prompts. Nothing above chance may be learned."""
    answer = PermutationHops.answer

    def shuffled(self, tables, x, hops):
        return answer(self, tables.roll(1, dims=0), x, hops)

    monkeypatch.setattr(lib.experiments.composition.PermutationHops, "answer", shuffled)
    row = train_composition({**COMPOSITION, "steps": 60, "evaluation_prompts": 256}, seed=0)
    assert abs(row["accuracy"] - 0.25) < 0.07  # 1024 answers in 256 prompts: standard error below 0.03


def test_the_sweep_hands_a_scratch_folder_to_the_experiments(tmp_path):
    rows = run_sweep(train_composition, [COMPOSITION], seeds=[0], scratch=tmp_path, progress=False)
    assert rows[0]["failed"] is None and not list(tmp_path.iterdir())
    assert rows[0]["result"] == train_composition(COMPOSITION, seed=0)
