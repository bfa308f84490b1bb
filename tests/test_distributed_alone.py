"""The distributed loop in one process: what it refuses, what a checkpoint survives, what it leaves behind."""

import errno
import json
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from lib.checkpoints import CheckpointError
from lib.distributed import fit_distributed, load_trained, ranks, states
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.training import fit

STEPS = 6
PLAN = Optimizer(adamw_lr=1e-2, warmup=2)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, nothing of a launch in the environment, and no process group left to the next test."""
    for name in ranks.LAUNCH:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def new_model(seed: int = 0, **shape) -> Transformer:
    config = {"vocab": 5, "d_model": 8, "n_heads": 2, "n_layers": 1} | shape
    return Transformer(TransformerConfig(**config), seed=seed)


def batch(step):
    return torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(step))


def loss(model, tokens):
    return model(tokens).flatten(0, 1).logsumexp(-1).mean() - model(tokens)[..., 0].mean()


def score(model, step):
    return {"score": -loss(model, batch(step + 1000)).item()}


def train(folder=None, *, model=None, batch=batch, loss=loss, **changes):
    settings = {"steps": STEPS, "optimizer": PLAN, "evaluate": score, "evaluate_every": 2, "progress": False}
    settings |= {"checkpoint": folder, "checkpoint_every": 2, "device": "cpu"} | changes
    return fit_distributed(model or new_model(), loss, batch, **settings)


class KilledError(Exception):
    """Stands for the end of the process, where a test needs it at one exact place."""


def killed(*_, **__):
    raise KilledError


def stop_at(when):
    return lambda step: killed() if step == when else batch(step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("shard", ["full", "none"])
def test_one_process_without_torchrun_trains_as_fit_does(shard, micro_batches):
    history = train(shard=shard, micro_batches=micro_batches)
    plain = fit(
        new_model(),
        loss,
        batch,
        steps=STEPS,
        optimizer=PLAN,
        evaluate=score,
        evaluate_every=2,
        progress=False,
    )
    assert history.step0 == plain.step0
    assert history.loss == pytest.approx(plain.loss, abs=1e-5)  # float32, sums in another order
    assert history.curve("score") == [(step, pytest.approx(x, abs=1e-5)) for step, x in plain.curve("score")]


@pytest.mark.parametrize("when", [1, 2, 3, 5])
def test_a_broken_run_continues_from_its_last_state(tmp_path, when):
    unbroken = train()
    with pytest.raises(KilledError):
        train(tmp_path, batch=stop_at(when))
    history = train(tmp_path)
    assert history.resumed_at == when - when % 2
    assert (history.loss, history.evaluations) == (unbroken.loss, unbroken.evaluations)
    again = train(tmp_path)
    assert again.resumed_at == STEPS and again.loss == unbroken.loss


@pytest.mark.parametrize("place", ["digest", "rename", "delete"])
def test_a_kill_while_a_state_is_written_leaves_a_whole_one(tmp_path, monkeypatch, place):
    unbroken = train()
    with pytest.raises(KilledError):
        train(tmp_path, batch=stop_at(3))
    with monkeypatch.context() as broken, pytest.raises(KilledError):
        if place == "digest":  # the tensors are written, run.json is not
            broken.setattr(states, "_digest", killed_in(tmp_path / "step-4.part"))
        elif place == "rename":
            broken.setattr("pathlib.Path.rename", killed)
        else:
            broken.setattr(shutil, "rmtree", killed)
        train(tmp_path)
    assert names(tmp_path) == ["step-2", "step-4" if place == "delete" else "step-4.part"]
    history = train(tmp_path)
    assert history.resumed_at == (4 if place == "delete" else 2)
    assert history.loss == unbroken.loss
    assert names(tmp_path) == [f"step-{STEPS}"]


def killed_in(folder):
    digest = states._digest
    return lambda path: killed() if path.parent == folder else digest(path)


def test_a_full_disk_stops_the_run_and_keeps_the_last_state(tmp_path, monkeypatch):
    def full(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KilledError):
        train(tmp_path, batch=stop_at(3))
    with monkeypatch.context() as broken:
        broken.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(
            OSError, match="step-4.part could not be written: .*No space left.* Kept: .*step-2;"
        ):
            train(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("pathlib.Path.write_bytes", lambda self, content: full(None, None, None))
        with pytest.raises(OSError, match="step-4.part could not be written: .*the same command goes on"):
            train(tmp_path)
    assert train(tmp_path).resumed_at == 2


def test_a_file_that_only_its_writer_sees_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "gather", lambda own: [own, {"shard-00002-elsewhere.safetensors": "0"}])
    with pytest.raises(OSError, match="lacks shard-00002-elsewhere.*file system that all machines share"):
        train(tmp_path)


SHARD, OTHER = (
    "shard-00001-model-00001-of-00001.safetensors",
    "shard-00002-model-00001-of-00001.safetensors",
)
DAMAGE = {
    "flipped": lambda content: content[: len(content) // 2] + b"\0~\0~" + content[len(content) // 2 + 4 :],
    "truncated": lambda content: content[: len(content) // 2],
}


@pytest.mark.parametrize(
    "name, damage",
    [(name, damage) for name in ("run.json", SHARD) for damage in ("flipped", "truncated", "missing")]
    + [(OTHER, "too many")],
)
def test_damage_is_found_and_the_file_named(tmp_path, name, damage):
    train(tmp_path)
    path = tmp_path / f"step-{STEPS}" / name
    if damage == "missing":
        path.unlink()
    elif damage == "too many":
        path.write_bytes(path.with_name(SHARD).read_bytes())
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{name} is missing, damaged.*delete .*step-{STEPS}"):
        train(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} is missing, damaged"):
        load_trained(new_model(), tmp_path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"steps": 8}, "steps is 6 there and 8 here"),
        ({"identity": {"seed": 1}}, "seed is None there and 1 here"),
        ({"optimizer": Optimizer()}, "optimizer is"),
        ({"model": 1}, "step0 is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    train(tmp_path)
    change = dict(change)
    with pytest.raises(CheckpointError, match=f"run.json belongs to another run: .*{named}"):
        train(tmp_path, model=new_model(seed=change.pop("model", 0)), **change)


def test_shard_and_parts_may_change_when_a_run_continues(tmp_path):
    with pytest.raises(KilledError):
        train(tmp_path, batch=stop_at(3), shard="full")
    history = train(tmp_path, shard="none", micro_batches=2)
    assert history.resumed_at == 2 and history.loss == pytest.approx(train().loss, abs=1e-5)


@pytest.mark.parametrize("optimizer", [PLAN, Optimizer(muon_lr=0.03)])
def test_a_plain_model_takes_the_trained_weights(tmp_path, optimizer):
    model, plain = new_model(tied=True), new_model(seed=1, tied=True)
    train(tmp_path, model=model, optimizer=optimizer)
    assert load_trained(plain, tmp_path) == STEPS
    for name, weight in model.named_parameters():
        assert weight.full_tensor().equal(dict(plain.named_parameters())[name]), name
    assert "distributed" not in str(type(plain)), "a plain module"
    with pytest.raises(CheckpointError, match=f"step-{STEPS} does not fit this model"):
        load_trained(new_model(d_model=12), tmp_path)


def test_where_nothing_was_trained_there_is_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of fit_distributed"):
        load_trained(new_model(), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shard": "ful"}, "unknown shard 'ful'; did you mean 'full'"),
        ({"precision": "bfloat"}, "did you mean 'bfloat16'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"steps": 0}, "steps is at least 1, got 0"),
        ({"micro_batches": 0}, "micro_batches is at least 1"),
        ({"evaluate_every": 0}, "evaluate_every is at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is at least 1"),
        ({"micro_batches": 3}, r"4 rows does not divide into 1 rank\(s\) x 3 parts; .* multiple of 3"),
        ({"batch": lambda step: (batch(0), batch(0)[:2])}, r"same number of rows, got \[2, 4\]"),
    ],
)
def test_nonsense_is_refused_before_any_training(tmp_path, changes, message):
    model = new_model()
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=model, **changes)
    assert names(tmp_path) == []


def test_a_sharded_model_is_not_sharded_again():
    model = new_model()
    train(model=model)
    with pytest.raises(ValueError, match="sharded by an earlier fit_distributed"):
        train(model=model)


def test_half_of_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="RANK, WORLD_SIZE set .*, LOCAL_RANK, MASTER_ADDR, MASTER_PORT miss"
    ):
        train()
    assert not dist.is_initialized()


def test_each_rank_takes_its_gpu_and_a_rank_too_many_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ranks.LAUNCH:
        monkeypatch.setenv(name, "1")
    assert ranks.own_device("auto") == ranks.own_device("cuda") == "cuda:1"
    assert ranks.own_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 .* has no GPU of its own, there are 2; .*per-node=2"):
        ranks.own_device("auto")


def test_what_is_not_finite_stops_the_run(tmp_path):
    def broken(model, tokens):
        broken.calls += 1
        return loss(model, tokens) * (float("nan") if broken.calls == 4 else 1)

    broken.calls = 0
    with pytest.raises(FloatingPointError, match="loss nan.* at step 3;.*Kept: .*step-2; try a smaller"):
        train(tmp_path, loss=broken, evaluate=None)
    broken.calls = 3
    with pytest.raises(FloatingPointError, match="Kept: no checkpoint;"):
        train(loss=broken, evaluate=None)
    with pytest.raises(FloatingPointError, match="after 2 steps the evaluation gave"):
        train(evaluate=lambda model, step: {"score": float("inf")})


def test_batches_may_be_tensors_dicts_or_tuples():
    def first(given):
        return given if torch.is_tensor(given) else given["x"] if isinstance(given, dict) else given[0]

    expected = train().loss
    for make in (lambda x: {"x": x, "y": x}, lambda x: (x, x), lambda x: [(x,), x][1:]):
        history = train(batch=lambda t, m=make: m(batch(t)), loss=lambda m, given: loss(m, first(given)))
        assert history.loss == expected


def test_progress_is_silent_when_off(capsys):
    train(progress=True)
    assert "step" in capsys.readouterr().err
    train(progress=False)
    assert capsys.readouterr().err == ""


def test_the_state_is_plain_safetensors_and_json(tmp_path):
    train(tmp_path)
    assert names(tmp_path / f"step-{STEPS}") == ["run.json", SHARD]
    state = json.loads((tmp_path / f"step-{STEPS}" / "run.json").read_text())
    assert len(state["loss"]) == STEPS and state["evaluations"][-1][0] == STEPS
