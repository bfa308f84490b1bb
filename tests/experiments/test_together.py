"""Composition along a model axis: the models of `train_composition`, several in one run."""

import json
from functools import cache

import pytest
import torch

from lib.experiments.composition import train_composition
from lib.experiments.together import train_compositions
from lib.sweeps import run_sweep
from lib.tasks.hops import PermutationHops

SHAPE = {"L": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32, "n": 4}
ONE = {**SHAPE, "steps": 12, "batch": 4, "evaluate_every": 6, "evaluation_prompts": 16}
THREE = {**ONE, "models": 3}
SHARED = {"parameters", "embedding_parameters", "readout_parameters", "layer_parameters", "chance"}


@pytest.fixture(autouse=True)
def one_thread():
    """As in a sweep. Several threads on models this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("change", [{}, {"L": 1, "supervise": "last", "optimizer": "adamw", "K": 3}], ids=str)
def test_each_model_is_the_one_that_is_trained_alone(change):
    row = train_compositions({**THREE, **change}, seed=2)
    assert row["model_seeds"] == [6, 7, 8]
    for g, seed in enumerate(row["model_seeds"]):
        alone = train_composition({**ONE, **change}, seed=seed)
        assert row.keys() - {"model_seeds"} == alone.keys()
        for name, value in alone.items():
            ours = row[name] if name in SHARED else row[name][g]
            if name == "final_loss":
                assert ours == pytest.approx(value, abs=1e-4)
            elif name.startswith(("accuracy", "hop_", "curve")):
                assert torch.allclose(torch.tensor(ours), torch.tensor(value), atol=0.04)  # one answer of 64
            else:
                assert ours == value, name


@cache
def unbroken():
    return train_compositions(THREE, seed=1)


def test_two_seeds_share_no_model():
    first, second = unbroken(), train_compositions(THREE, seed=2)
    assert [*first["model_seeds"], *second["model_seeds"]] == [3, 4, 5, 6, 7, 8]
    assert len({*first["step0_hash"], *second["step0_hash"]}) == 6


def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(tmp_path, monkeypatch):
    batch = PermutationHops.batch

    def interrupted(self, step, **options):
        if step == 8 and options["size"] == THREE["batch"]:
            raise KeyboardInterrupt
        return batch(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PermutationHops, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_compositions(THREE, seed=1, scratch=tmp_path)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    assert train_compositions(THREE, seed=1, scratch=tmp_path) == unbroken()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": 0}, "models is a whole number of at least 1, got 0"),
        ({"models": True}, "models is a whole number of at least 1, got True"),
        ({"model": 3}, "unknown setting of CompositionsSettings 'model'; did you mean 'models'"),
        ({"n_heads": 3}, "n_heads must divide d_model"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        train_compositions({**THREE, **change}, seed=0)


def test_bfloat16_is_refused(monkeypatch):
    monkeypatch.setattr("lib.training.cpu_has_bfloat16", lambda: True)
    with pytest.raises(ValueError, match="a model axis trains in float32, got precision='bfloat16'"):
        train_compositions({**THREE, "precision": "bfloat16"}, seed=0)


def test_a_sweep_trains_models_together_by_naming_the_run_function(tmp_path):
    [row] = run_sweep(train_compositions, [THREE], seeds=[1], scratch=tmp_path, progress=False)
    assert row["failed"] is None and row["result"] == unbroken() == json.loads(json.dumps(unbroken()))


@pytest.mark.slow
def test_models_that_learn_stop_one_by_one():
    settings = {**SHAPE, "steps": 200, "batch": 32, "models": 3, "stop_at": 0.9, "evaluate_every": 20}
    row = train_compositions(settings, seed=0)
    assert all(row["stopped_early"]) and len(set(row["steps_done"])) > 1
    assert min(row["accuracy"]) > 0.85 and max(row["untrained_accuracy"]) < 0.4
    assert [curve[-1][0] for curve in row["curve"]] == row["steps_done"]
