"""One model on several processes: the curve is that of one process, and a kill at any moment loses no run.

The file is also the script that its tests start under torchrun, with two gloo processes on this machine.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

import lib.distributed.states as states
import lib.training
from lib.distributed import fit_distributed
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.paths import ROOT
from lib.tasks.hops import PermutationHops
from lib.training import fit

TASK = PermutationHops(n=4)
STEPS = 12
ADAMW = Optimizer(adamw_lr=1e-2, warmup=3, clip=0.5)
MUON = Optimizer(muon_lr=0.03, warmup=3, clip=0.5)
CASES = {
    "full": {"shard": "full"},
    "none": {"shard": "none"},
    "full, in parts": {"shard": "full", "micro_batches": 2},
    "none, in parts": {"shard": "none", "micro_batches": 2},
    "full, Muon": {"shard": "full", "optimizer": MUON},
    "none, Muon": {"shard": "none", "optimizer": MUON},
    "full, bfloat16": {"shard": "full", "precision": "bfloat16", "micro_batches": 2},
}
LONG = {"steps": 20, "checkpoint_every": 1}
REFUSED = {
    "rows": {"micro_batches": 3},
    "weights": {"model": lambda: new_model(seed=dist.get_rank())},
}


def new_model(seed: int = 0) -> Transformer:
    # Widths that two ranks cannot share evenly; learned positions and a tied readout stay with the root
    shape = {"d_model": 18, "n_heads": 2, "d_mlp": 33, "positions": "learned", "max_tokens": 12}
    return Transformer(TransformerConfig(vocab=TASK.vocab, causal=False, tied=True, **shape), seed=seed)


def batch(step):
    return TASK.batch(step, seed=1, size=8)


def loss(model, prompts):
    logits = model(prompts.tokens, mask=TASK.mask(), rows=TASK.queries)
    return cross_entropy(logits.flatten(0, 1), prompts.x.flatten())


def score(model, step):
    prompts = TASK.batch(step, seed=2, size=16)
    trace = model.trace(prompts.tokens, mask=TASK.mask(), read=("residual",), rows=TASK.queries)
    return {"score": -loss(model, prompts).item(), "stream": trace.residual.square().mean().item()}


def train(folder=None, *, model=new_model, **changes):
    """One run by `fit_distributed`. -> its model and history."""
    model = model()
    settings = {"steps": STEPS, "optimizer": ADAMW, "evaluate": score, "evaluate_every": 5}
    settings |= {"checkpoint": folder, "checkpoint_every": 2, "device": "cpu", "progress": False}
    settings |= changes
    return model, fit_distributed(model, settings.pop("loss", loss), settings.pop("batch", batch), **settings)


def whole(model):
    """Weights by name, gathered from their shards."""
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


# What the two processes do; the rest of the file asks them.


def main(role: str, folder: Path) -> None:
    torch.set_num_threads(1)
    {"compare": compare, "break": break_off, "print": print_steps}[role](folder)
    dist.destroy_process_group()


def compare(folder: Path) -> None:
    lib.training.cpu_has_bfloat16 = lambda: True  # slow where it is emulated, but right
    found = {}
    for name, changes in CASES.items():
        model, history = train(**changes)
        held = [None, None]
        dist.all_gather_object(held, sum(p.to_local().numel() for p in model.parameters()))
        found[name] = {"loss": history.loss, "evaluations": history.evaluations, "held": held}
        weights = whole(model)
        if dist.get_rank() == 0:
            safetensors.torch.save_file(weights, folder / f"{name}.safetensors")
    for name, changes in REFUSED.items():
        messages = [None, None]
        try:
            train(**changes)
        except ValueError as error:
            dist.all_gather_object(messages, str(error))
        found[name] = messages
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


def break_off(folder: Path) -> None:
    """The first time, rank 1 is killed while the state of step 6 is written; torchrun starts both anew."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        digest = states._digest

        def killed(path):
            if path.parent.name == "step-6.part":
                os.kill(os.getpid(), signal.SIGKILL)
            return digest(path)

        states._digest = killed
    model, history = train(folder / "run")
    weights = whole(model)
    if dist.get_rank() == 0:
        safetensors.torch.save_file(weights, folder / "weights.safetensors")
        (folder / "found.json").write_text(json.dumps([history.resumed_at, history.loss]))


def print_steps(folder: Path) -> None:
    def printing(step):
        os.write(1, f"{os.getpid()} {step}\n".encode())  # one write: the lines of two processes stay whole
        return batch(step)

    train(folder, batch=printing, **LONG)


def torchrun(role: str, folder: Path, *options: str) -> subprocess.Popen:
    """Two processes of this file on this machine, warnings as errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.Popen(
        [*command, __file__, role, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def alone():
    """One thread, and no process group from one test to the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """(folder, what the two processes found) in every case."""
    folder = tmp_path_factory.mktemp("compare")
    with torchrun("compare", folder) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder, json.loads((folder / "found.json").read_text())


def plain(rows=slice(None), **changes):
    """The same run by `lib.training.fit`. -> its model and history."""
    model = new_model()
    settings = {"steps": STEPS, "optimizer": ADAMW, "evaluate": score, "evaluate_every": 5}

    def some(step):
        return type(batch(step))(*(tensor[rows] for tensor in batch(step)))

    return model, fit(model, loss, some, progress=False, **(settings | changes))


def reference(case):
    return plain(optimizer=CASES[case].get("optimizer", ADAMW))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "bfloat16" not in case])
def test_two_ranks_train_as_one_process_does(two_ranks, case):
    folder, found = two_ranks
    model, history = reference(case)
    # Sums in another order: 1e-7 of float32, which Adam's division by small moments makes at most 1e-5
    assert found[case]["loss"] == pytest.approx(history.loss, abs=1e-5)
    for (step, there), (step_here, here) in zip(found[case]["evaluations"], history.evaluations, strict=True):
        assert step == step_here and there == pytest.approx(here, abs=1e-4)
    weights = safetensors.torch.load_file(folder / f"{case}.safetensors")
    for name, weight in model.named_parameters():
        assert torch.allclose(weights[name], weight, atol=1e-4), name
    half = plain(slice(4), optimizer=CASES[case].get("optimizer", ADAMW))[1]
    assert max(abs(a - b) for a, b in zip(half.loss, history.loss, strict=True)) > 1e-2, "a rank by itself"


@pytest.mark.slow
def test_bfloat16_follows_the_curve_of_float32(two_ranks):
    half, full = two_ranks[1]["full, bfloat16"]["loss"], two_ranks[1]["full, in parts"]["loss"]
    assert half != full and half == pytest.approx(full, rel=0.05)  # 8 bits, over 12 steps
    weights = safetensors.torch.load_file(two_ranks[0] / "full, bfloat16.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_full_shards_share_the_weights_and_none_copies_them(two_ranks, case):
    held, n = two_ranks[1][case]["held"], new_model().n_parameters()
    assert held == [n, n] if "none" in case else sum(held) == n and abs(held[0] - held[1]) < 0.05 * n


@pytest.mark.slow
def test_what_does_not_divide_or_agree_is_refused_on_every_rank(two_ranks):
    rows, weights = two_ranks[1]["rows"], two_ranks[1]["weights"]
    assert rows[0] == rows[1] and "8 rows does not divide into 2 rank(s) x 3 parts" in rows[0]
    assert weights[0] == weights[1] and "rank(s) 1 began with other weights than rank 0" in weights[0]


@pytest.mark.slow
def test_a_rank_killed_while_it_writes_a_state_is_started_anew_and_loses_no_bit(two_ranks, tmp_path):
    with torchrun("break", tmp_path, "--max-restarts=1") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "exitcode: -9" in errors and "Traceback" in errors, "one was killed, the other saw it go"
    resumed_at, losses = json.loads((tmp_path / "found.json").read_text())
    assert resumed_at == 4, "the state of step 6 was never whole"
    folder, found = two_ranks
    assert losses == found["full"]["loss"]
    ours = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    unbroken = safetensors.torch.load_file(folder / "full.safetensors")
    assert all(ours[name].equal(unbroken[name]) for name in unbroken) and len(ours) == len(unbroken)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"step-{STEPS}"]
    assert {path.suffix for path in (tmp_path / "run").rglob("*.*")} == {".json", ".safetensors"}, "no pickle"


@pytest.mark.slow
def test_after_a_kill_of_everything_one_process_continues_what_two_began(tmp_path):
    draw = random.Random()
    when = draw.randrange(2, 14)
    print(f"killed at step {when}")
    workers, reached = set(), 0
    with torchrun("print", tmp_path) as process:
        for line in process.stdout:
            pid, reached = map(int, line.split())
            workers.add(pid)
            if reached >= when and len(workers) == 2:
                break
        time.sleep(draw.random() * 0.05)  # somewhere within a step or its checkpoint
        process.kill()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        lines = process.stdout.read().splitlines()
        process.stderr.read()
    reached = max([reached, *(int(line.split()[1]) for line in lines)])
    _, history = train(tmp_path, **LONG)
    # A rank is at most one step ahead of the other, and a step is saved before the next begins
    assert history.resumed_at in (reached - 1, reached, reached + 1) and history.resumed_at >= when - 1
    assert history.loss == pytest.approx(plain(steps=LONG["steps"])[1].loss, abs=1e-4)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
