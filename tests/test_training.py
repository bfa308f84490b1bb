"""The training loop: what it computes, what it leaves on disk, and what a killed run loses."""

import json
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import safetensors.torch
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lib.training
from lib.checkpoints import Checkpoint, CheckpointError
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.paths import ROOT
from lib.tasks.hops import PermutationHops
from lib.training import fit, load_best, seeds_by_role

TASK = PermutationHops(n=4)
PLAN = Optimizer(muon_lr=0.03, warmup=5)


@pytest.fixture(autouse=True)
def one_thread():
    """As in a sweep. Several threads on models this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_model(seed: int = 0, **shape) -> Transformer:
    config = {"vocab": TASK.vocab, "d_model": 16, "n_heads": 2, "positions": "none", "causal": False} | shape
    return Transformer(TransformerConfig(**config), seed=seed)


def loss(model, prompts):
    logits = model(prompts.tokens, mask=TASK.mask(), rows=TASK.queries)
    return cross_entropy(logits.flatten(0, 1), prompts.x.flatten())


def batch(step):
    return TASK.batch(step, seed=1, size=4)


def score(model, step):
    return {"score": -loss(model, TASK.batch(step, seed=2, size=16)).item(), "also": 1.0}


def train(model, folder=None, *, batch=batch, **changes):
    settings = {"steps": 30, "optimizer": PLAN, "evaluate": score, "evaluate_every": 7, "progress": False}
    return fit(model, loss, batch, checkpoint=folder, **(settings | changes))


class KilledError(Exception):
    """Stands for the end of the process, where a test needs it at one exact place."""


def killed_at(when):
    def until(step):
        if step == when:
            raise KilledError
        return batch(step)

    return until


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def slots(folder):
    """The last two saves of a folder, the newer one first."""
    files = [folder / "last-0.safetensors", folder / "last-1.safetensors"]
    return sorted(files, key=lambda f: -int(safetensors.torch.load_file(f)["steps_done"]))


def test_training_is_the_loop_that_anyone_would_write():
    model, twin = new_model(), new_model()
    history = train(model, optimizer=Optimizer(adamw_lr=1e-2, clip=0.5, warmup=3, hold=0.5, floor=0.1))
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    rate = [min((t + 1) / 3, 1.0 if t < 15 else 1 - 0.9 * (t - 15) / 14) for t in range(30)]
    for t in range(30):
        plain.param_groups[0]["lr"] = 1e-2 * rate[t]
        plain.zero_grad()
        value = loss(twin, batch(t))
        value.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
        assert history.loss[t] == pytest.approx(value.item(), abs=1e-4)
    for name, p in twin.named_parameters():
        assert torch.allclose(dict(model.named_parameters())[name], p, atol=1e-4), (
            name
        )  # fused AdamW, float32
    assert [step for step, _ in history.evaluations] == [7, 14, 21, 28, 30]
    assert history.step0 == new_model().weights_hash() != model.weights_hash()


@pytest.mark.parametrize("when", [0, 1, 6, 7, 8, 14, 29])
def test_a_resumed_run_ends_where_the_unbroken_one_does(tmp_path, when):
    unbroken, resumed = new_model(), new_model()
    whole = train(unbroken)
    with pytest.raises(KilledError):
        train(resumed, tmp_path, batch=killed_at(when))
    resumed = new_model()
    history = train(resumed, tmp_path)
    assert history.resumed_at == when
    assert same(weights(resumed), weights(unbroken))
    assert (history.loss, history.evaluations) == (whole.loss, whole.evaluations)
    again = train(new_model(), tmp_path)
    assert again.resumed_at == 30 and again.loss == whole.loss, "a finished run is only read"


def test_a_slot_that_was_being_written_costs_one_step(tmp_path):
    whole = train(new_model())
    with pytest.raises(KilledError):
        train(new_model(), tmp_path, batch=killed_at(12))
    newest = slots(tmp_path)[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # half new, and the flag is 0
    newest.write_bytes(content)
    history = train(new_model(), tmp_path)
    assert history.resumed_at == 11 and history.loss == whole.loss


@pytest.mark.parametrize("every", [4, 100])
def test_rarer_checkpoints_lose_steps_but_no_bits(tmp_path, every):
    whole = train(new_model())
    with pytest.raises(KilledError):
        train(new_model(), tmp_path, batch=killed_at(15), checkpoint_every=every)
    history = train(new_model(), tmp_path, checkpoint_every=every)
    assert history.resumed_at == {4: 12, 100: 0}[every]
    assert (history.loss, history.evaluations) == (whole.loss, whole.evaluations)


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.tasks.hops import PermutationHops
from lib.training import fit
from torch.nn.functional import cross_entropy
import safetensors.torch

folder = Path(sys.argv[1])
task = PermutationHops(n=6)
shape = TransformerConfig(vocab=task.vocab, d_model=32, n_heads=2, positions="none", causal=False)
model = Transformer(shape, seed=0)

def loss(model, prompts):
    logits = model(prompts.tokens, mask=task.mask(), rows=task.queries)
    return cross_entropy(logits.flatten(0, 1), task.after_layer(prompts, 2).flatten())

def batch(step):
    print(step, flush=True)
    return task.batch(step, seed=1, size=16)

def evaluate(model, step):
    return {"score": -loss(model, task.batch(step, seed=2, size=16)).item()}

history = fit(model, loss, batch, steps=60, optimizer=Optimizer(muon_lr=0.03), evaluate=evaluate,
              evaluate_every=5, checkpoint=folder, progress=False)
safetensors.torch.save_file(model.state_dict(), folder / "final.safetensors")
(folder / "history.json").write_text(json.dumps([history.step0, history.loss, history.evaluations]))
"""


def child(folder):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_a_run_killed_three_times_ends_byte_for_byte_like_an_unbroken_one(tmp_path):
    draw, unbroken, broken = random.Random(0), tmp_path / "unbroken", tmp_path / "broken"
    with child(unbroken) as process:
        assert [int(line) for line in process.stdout] == list(range(60))
    assert process.returncode == 0
    reached = 0
    for when in (3, 24, 55):
        with child(broken) as process:
            first = int(process.stdout.readline())
            assert first >= reached, "more than the step in flight was lost"
            for line in process.stdout:
                if int(line) >= when:
                    break
            time.sleep(draw.random() * 0.01)  # somewhere within a step
            process.kill()
            reached = max([int(line), *map(int, process.stdout.read().split())])
        assert process.returncode == -signal.SIGKILL
    with child(broken) as process:
        assert int(process.stdout.readline()) in (reached, reached + 1)
        process.stdout.read()
    assert process.returncode == 0
    for name in ("final.safetensors", "history.json"):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()
    ours = {path.name: path for path in broken.iterdir()}
    assert {path.suffix for path in ours.values()} == {".json", ".safetensors"}, "no pickle"
    assert same(*(safetensors.torch.load_file(slots(folder)[0]) for folder in (broken, unbroken)))


@pytest.mark.parametrize("name", ["last", "state.json", "best"])
def test_a_flipped_bit_is_found_and_the_file_named(tmp_path, name):
    train(new_model(), tmp_path)
    path = {"last": slots(tmp_path)[0], "state.json": tmp_path / name}.get(name)
    path = path or tmp_path / json.loads((tmp_path / "state.json").read_text())["best"]["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged.*delete"):
        load_best(new_model(), tmp_path) if name == "best" else train(new_model(), tmp_path)


def test_a_truncated_slot_and_a_missing_index_are_errors(tmp_path):
    train(new_model(), tmp_path)
    slot = slots(tmp_path)[0]
    content = slot.read_bytes()
    slot.write_bytes(content[:20])
    with pytest.raises(CheckpointError, match=f"{slot.name} is damaged"):
        train(new_model(), tmp_path)
    slot.write_bytes(content)
    (tmp_path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="state.json is missing"):
        train(new_model(), tmp_path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"steps": 40}, "steps is 30 there and 40 here"),
        ({"identity": {"seed": 1}}, "seed is None there and 1 here"),
        ({"optimizer": Optimizer()}, "optimizer is"),
        ({"model": 1}, "step0 is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    train(new_model(), tmp_path)
    change = dict(change)
    other = new_model(seed=change.pop("model", 0))
    with pytest.raises(CheckpointError, match=f"state.json belongs to another run: .*{named}"):
        train(other, tmp_path, **change)


def test_a_slot_of_another_run_is_refused(tmp_path):
    train(new_model(), tmp_path / "a")
    train(new_model(seed=1), tmp_path / "b")
    slot = slots(tmp_path / "a")[0]
    slot.write_bytes((tmp_path / "b" / slot.name).read_bytes())
    with pytest.raises(CheckpointError, match=f"{slot.name} belongs to another run"):
        train(new_model(), tmp_path / "a")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_step(tmp_path, bad):
    def broken(model, prompts):
        broken.calls += 1
        return loss(model, prompts) * (bad if broken.calls == 10 else 1)

    broken.calls = 0
    model = new_model()
    settings = {"steps": 30, "optimizer": PLAN, "checkpoint": tmp_path, "progress": False}
    with pytest.raises(FloatingPointError, match=rf"loss {bad}.* at step 9;.* after step 8, is kept in"):
        fit(model, broken, batch, **settings)
    resumed = new_model()
    history = fit(resumed, broken, batch, **settings)
    assert history.resumed_at == 9 and history.steps == 30
    assert all(p.isfinite().all() for p in model.parameters()), "the bad step changed no weight"


def test_a_gradient_that_is_not_finite_is_found_under_a_finite_loss():
    def broken(model, prompts):
        return (model.W_U.weight.sum() * 0).sqrt() + loss(model, prompts)  # 0, with slope infinity times 0

    with pytest.raises(FloatingPointError, match="gradient norm nan at step 0.*No checkpoint was kept"):
        fit(new_model(), broken, batch, steps=3, optimizer=PLAN, progress=False)


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="after 7 steps the evaluation gave"):
        train(new_model(), evaluate=lambda model, step: {"score": float("nan")})


def test_training_stops_at_the_target_and_stays_stopped(tmp_path):
    goal = train(new_model()).evaluations[2][1]["score"]
    history = train(new_model(), tmp_path, stop=goal)
    assert history.stopped and history.steps == 21
    again = train(new_model(), tmp_path, stop=goal)
    assert again.stopped and again.steps == again.resumed_at == 21


def test_the_best_weights_are_those_of_the_best_evaluation(tmp_path):
    rising_then_falling = {7: 0.1, 14: 0.9, 21: 0.9, 28: 0.3, 30: 0.2}
    seen = {}

    def evaluate(model, step):
        seen[step] = weights(model)
        return {"score": rising_then_falling[step], "zeta": 0.0, "alpha": 0.0}

    history = train(new_model(), tmp_path, evaluate=evaluate)
    assert history.best == (14, 0.9) and history.curve("score")[1] == (14, 0.9)
    best = new_model(seed=1)
    load_best(best, tmp_path)
    assert same(weights(best), seen[14])
    again = train(new_model(), tmp_path, evaluate=evaluate)
    assert again.best == (14, 0.9) and again.evaluations == history.evaluations


def test_without_an_evaluation_there_is_no_best(tmp_path):
    train(new_model(), tmp_path, evaluate=None)
    with pytest.raises(FileNotFoundError, match="names no best weights"):
        load_best(new_model(), tmp_path)


def test_a_tied_readout_is_saved_once_and_resumed(tmp_path):
    def model():
        return new_model(tied=True)

    whole = train(model())
    with pytest.raises(KilledError):
        train(model(), tmp_path, batch=killed_at(9))
    assert train(model(), tmp_path).loss == whole.loss


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr(lib.training, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="emulated, 9 to 22 times slower"):
        train(new_model(), precision="bfloat16")
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        train(new_model(), precision="bfloat")


def test_bfloat16_trains_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(lib.training, "cpu_has_bfloat16", lambda: True)
    half, full = train(new_model(), precision="bfloat16"), train(new_model())
    assert half.loss != full.loss and half.loss[0] == pytest.approx(full.loss[0], rel=0.02)  # 8 bits


def test_nonsense_is_refused_before_any_work():
    for changes in ({"steps": 0}, {"evaluate_every": 0}, {"stop": 0.5, "evaluate": None}):
        with pytest.raises(ValueError, match="at least 1|needs `evaluate`"):
            train(new_model(), **changes)


def test_progress_shows_the_loss_and_is_silent_when_off(capsys, monkeypatch):
    # At every step: by default tqdm draws every 0.1 s, which 30 small steps may not take.
    monkeypatch.setattr("lib.training.tqdm", partial(tqdm, mininterval=0, miniters=1))
    train(new_model(), progress=True)
    assert "loss" in capsys.readouterr().err
    train(new_model(), progress=False)
    assert capsys.readouterr().err == ""


def test_batches_may_be_tensors_dicts_or_tuples():
    for make in (lambda b: b.tokens, lambda b: {"tokens": b.tokens}, lambda b: (b.tokens, b.x), lambda b: b):

        def first_logit(model, given):
            tokens = (
                given if torch.is_tensor(given) else given["tokens"] if isinstance(given, dict) else given[0]
            )
            return model(tokens).square().mean()

        history = fit(
            new_model(),
            first_logit,
            lambda t, make=make: make(batch(t)),
            steps=2,
            optimizer=PLAN,
            progress=False,
        )
        assert history.steps == 2


def test_seeds_of_different_roles_and_runs_differ():
    seeds = [value for seed in range(50) for value in seeds_by_role(seed).values()]
    assert len(set(seeds)) == 200


def test_a_checkpoint_holds_every_weight_and_what_the_optimizers_remember(tmp_path):
    train(new_model(), tmp_path)
    tensors = safetensors.torch.load_file(slots(tmp_path)[0])
    assert {f"model/{name}" for name in weights(new_model())} <= tensors.keys()
    remembered = sum(key.startswith("optimizer/") for key in tensors)
    assert remembered == 9 * 3 + 12 * 1  # AdamW: a counter and two moments each; Muon: one average each
    assert Checkpoint(tmp_path, {}).load(any_run=True)[1]["loss"].shape == (30,)
