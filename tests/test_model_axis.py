"""The model axis: every model is trained as `fit` would train it alone, whatever its neighbours do."""

import os
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn.functional import cross_entropy

from lib.checkpoints import CheckpointError
from lib.model_axis import fit_together
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.paths import ROOT
from lib.tasks.hops import PermutationHops, Prompts
from lib.training import fit

TASK = PermutationHops(n=4)
MUON = Optimizer(muon_lr=0.03, warmup=5, clip=0.5, decay=0.1)
ADAMW = Optimizer(adamw_lr=1e-2, warmup=5, clip=0.5, decay=0.1)
G = 3


@pytest.fixture(autouse=True)
def one_thread():
    """As in a sweep. Several threads on models this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_model(seed, *, dtype=torch.float64, **shape):
    config = {"vocab": TASK.vocab, "d_model": 16, "n_heads": 2, "positions": "none", "causal": False} | shape
    return Transformer(TransformerConfig(**config), seed=seed).to(dtype)


def loss(model, prompts):
    logits = model(prompts.tokens, mask=TASK.mask(), rows=TASK.queries)
    return cross_entropy(logits.flatten(0, 1), prompts.x.flatten())


def own_batch(g):
    return lambda step: TASK.batch(step, seed=10 + g, size=4)


def batch(step):
    return Prompts(
        *(torch.stack(parts) for parts in zip(*(own_batch(g)(step) for g in range(G)), strict=True))
    )


def score(g, model, step):
    return {"score": -loss(model, TASK.batch(step, seed=20 + g, size=16)).item(), "also": 1.0}


def together(models, folder=None, *, batch=batch, loss=loss, **changes):
    settings = {"steps": 30, "optimizer": MUON, "evaluate": score, "evaluate_every": 7, "progress": False}
    return fit_together(models, loss, batch, checkpoint=folder, **(settings | changes))


def alone(g, model, **changes):
    settings = {"steps": 30, "optimizer": MUON, "evaluate_every": 7, "progress": False}
    return fit(model, loss, own_batch(g), **({"evaluate": partial(score, g)} | settings | changes))


def distance(a, b):
    """Largest difference between two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


class KilledError(Exception):
    """Stands for the end of the process, where a test needs it at one exact place."""


def killed_at(when):
    def until(step):
        if step == when:
            raise KilledError
        return batch(step)

    return until


def everything(models, histories):
    weights = [{name: w.tolist() for name, w in model.state_dict().items()} for model in models]
    return weights, [(h.step0, h.loss, h.evaluations, h.stopped) for h in histories]


@pytest.mark.parametrize("plan", [MUON, ADAMW], ids=["muon", "adamw"])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=str)
def test_each_model_is_trained_as_it_would_be_alone(plan, dtype, near):
    models = [new_model(g, dtype=dtype) for g in range(G)]
    histories = together(models, optimizer=plan, steps=17)
    for g, (model, history) in enumerate(zip(models, histories, strict=True)):
        twin = new_model(g, dtype=dtype)
        single = alone(g, twin, optimizer=plan, steps=17)
        assert history.step0 == single.step0
        assert history.loss == pytest.approx(single.loss, abs=near)
        assert distance(model, twin) < near
        assert [step for step, _ in history.evaluations] == [7, 14, 17]
        for (_, ours), (_, theirs) in zip(history.evaluations, single.evaluations, strict=True):
            assert list(ours) == ["score", "also"] and ours == pytest.approx(theirs, abs=near)
    first, second = (torch.tensor(history.loss) for history in histories[:2])
    assert (first - second).abs().max() > 0.05, "models on different data have different losses"


SHAPES = [
    {"norm": "layer", "positions": "rope", "causal": True, "n_kv_heads": 1, "activation": "swiglu"},
    {"positions": "learned", "max_tokens": 12, "tied": True, "attention_kernel": "explicit"},
    {"n_layers": 1, "activation": "gelu", "readout_bias": True, "attention_bias": True, "norm": "none"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=["rope and swiglu", "tied", "biases"])
def test_a_transformer_of_any_shape_has_a_model_axis(shape):
    def plain(model, prompts):
        return cross_entropy(model(prompts.tokens[..., 0]).flatten(0, 1), prompts.tokens[..., 1].flatten())

    models = [new_model(g, **shape) for g in range(G)]
    histories = together(models, loss=plain, steps=4, evaluate=None)
    for g, model in enumerate(models):
        twin = new_model(g, **shape)
        single = fit(twin, plain, own_batch(g), steps=4, optimizer=MUON, progress=False)
        assert histories[g].loss == pytest.approx(single.loss, abs=1e-11) and distance(model, twin) < 1e-11


def test_a_weight_that_the_loss_does_not_use_stays_as_it_was():
    def lookup(model, prompts):
        logits = model.readout(model.embed(prompts.tokens))
        return cross_entropy(logits.flatten(0, 1), prompts.tokens[..., 1].flatten())

    models, twins = [new_model(g) for g in range(G)], [new_model(g) for g in range(G)]
    together(models, loss=lookup, steps=4, evaluate=None)
    for g, (model, twin) in enumerate(zip(models, twins, strict=True)):
        fit(twin, lookup, own_batch(g), steps=4, optimizer=MUON, progress=False)
        assert distance(model, twin) < 1e-11 and distance(model, new_model(g)) > 1e-3
        assert distance(model.layers, new_model(g).layers) == 0


ENDS = (6, 10, 16)  # steps after which the models stop; the last one uses its whole budget
STOPPING = {"steps": 16, "evaluate_every": 2, "stop": 1.0}


def nearly(g, model, step):
    """Reaches 1 after ENDS[g] steps; the last model does not, in its budget."""
    return {"share": step / (ENDS[g] + (g == 2)), **score(g, model, step)}


def test_a_model_that_reaches_the_target_freezes_while_the_others_go_on():
    models = [new_model(g) for g in range(G)]
    histories = together(models, evaluate=nearly, **STOPPING)
    assert [h.steps for h in histories] == list(ENDS)
    assert [h.stopped for h in histories] == [True, True, False]
    for g, (model, history) in enumerate(zip(models, histories, strict=True)):
        twin = new_model(g)
        single = alone(g, twin, evaluate=partial(nearly, g), **STOPPING)
        assert history.loss == pytest.approx(single.loss, abs=1e-11) and distance(model, twin) < 1e-11
        assert [step for step, _ in history.evaluations] == [step for step, _ in single.evaluations]


def test_a_model_does_not_notice_its_neighbours():
    def run(neighbour):
        models = [new_model(0), new_model(neighbour), new_model(2)]
        histories = together(models, steps=5)
        return everything(models[::2], histories[::2]), histories[1].loss

    (ours, first), (theirs, second) = run(1), run(7)
    assert ours == theirs and first != second


@cache
def unbroken():
    """A run in which models stop one after the other: what all the broken ones must end like."""
    models = [new_model(g) for g in range(G)]
    return everything(models, together(models, evaluate=nearly, **STOPPING))


@pytest.mark.parametrize("when", [0, 1, 6, 7, 13])
def test_a_resumed_run_ends_where_the_unbroken_one_does(tmp_path, when):
    """At 7 and 13 one and two models have stopped before; they stay frozen."""
    with pytest.raises(KilledError):
        fresh = [new_model(g) for g in range(G)]
        together(fresh, tmp_path, evaluate=nearly, batch=killed_at(when), **STOPPING)
    for at in (when, max(ENDS)):  # a finished run is only read
        models = [new_model(g) for g in range(G)]
        histories = together(models, tmp_path, evaluate=nearly, **STOPPING)
        assert everything(models, histories) == unbroken()
        assert [history.resumed_at for history in histories] == [min(at, end) for end in ENDS]


CHILD = """
import sys, torch
torch.set_num_threads(1)
from test_model_axis import Path, batch, new_model, together

def told(step):
    print(step, flush=True)
    return batch(step)

together([new_model(g) for g in range(3)], Path(sys.argv[1]), batch=told)
"""


@pytest.mark.slow
def test_a_killed_process_loses_at_most_the_step_in_flight(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        for line in process.stdout:
            if int(line) == 17:
                process.kill()
                break
        reached = max([17, *map(int, process.stdout.read().split())])
    assert process.returncode == -signal.SIGKILL and reached < 29
    steps = []

    def noted(step):
        steps.append(step)
        return batch(step)

    models, twins = [new_model(g) for g in range(G)], [new_model(g) for g in range(G)]
    continued = everything(models, together(models, tmp_path, batch=noted))
    assert steps[0] in (reached, reached + 1) and steps[-1] == 29
    assert continued == everything(twins, together(twins))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    together([new_model(g) for g in range(G)], tmp_path, steps=2, evaluate=None)
    with pytest.raises(CheckpointError, match="belongs to another run: steps is 2 there and 3 here"):
        together([new_model(g) for g in range(G)], tmp_path, steps=3, evaluate=None)
    with pytest.raises(CheckpointError, match="step0 is"):
        together([new_model(5 + g) for g in range(G)], tmp_path, steps=2, evaluate=None)


def test_a_loss_that_is_not_finite_names_its_model_and_keeps_the_last_good_step(tmp_path):
    def scaled(model, given):
        return loss(model, given["prompts"]) * given["scale"]

    def broken(step):
        scale = torch.ones(G, dtype=torch.float64)
        scale[1] = float("nan") if step == 4 else 1.0
        return {"prompts": batch(step), "scale": scale}

    models = [new_model(g) for g in range(G)]
    with pytest.raises(
        FloatingPointError, match="model 1 of 3: loss nan.* at step 4;.* after step 3, is kept"
    ):
        together(models, tmp_path, loss=scaled, batch=broken, evaluate=None)
    saved = [safetensors.torch.load_file(tmp_path / f"last-{i}.safetensors") for i in (0, 1)]
    newest = max(saved, key=lambda tensors: int(tensors["steps_done"]))
    assert int(newest["steps_done"]) == 4
    for g, model in enumerate(models):
        for name, weight in model.named_parameters():
            assert weight.equal(newest[f"model/{g}.{name}"]), "the bad step changed a weight"


def shared():
    model = new_model(0)
    return [model, new_model(1), model]


def frozen():
    model = new_model(0)
    model.b_U = torch.nn.Parameter(torch.zeros(TASK.vocab), requires_grad=False)
    return [model]


@pytest.mark.parametrize(
    "models, changes, message",
    [
        (lambda: [], {}, "needs models, got none"),
        (lambda: [new_model(0), new_model(1), new_model(2, n_heads=4)], {}, "model 2 has another config"),
        (lambda: [new_model(0), new_model(1, d_mlp=8), new_model(2)], {}, "model 1 has another config"),
        (shared, {}, "two of the models share weights"),
        (frozen, {}, "b_U of model 0 is not trained"),
        (None, {"steps": 0}, "steps and evaluate_every are at least 1, got 0, 7"),
        (None, {"stop": 0.5, "evaluate": None}, "needs `evaluate`"),
        (None, {"batch": own_batch(0)}, r"one entry for each of 3 models first, got shape \(4, 12, 3\)"),
        (None, {"optimizer": Optimizer(muon_lr=0.03, muon_on=("blocks",))}, "names no matrix"),
    ],
)
def test_nonsense_is_refused_before_any_work(models, changes, message):
    models = models() if models else [new_model(g) for g in range(G)]
    before = [model.weights_hash() for model in models]
    with pytest.raises(ValueError, match=message):
        together(models, **changes)
    assert [model.weights_hash() for model in models] == before


def test_a_token_outside_the_vocabulary_is_refused_as_by_the_model():
    def wrong(step):
        prompts = batch(step)
        prompts.tokens[1, 0, 0, 0] = TASK.vocab
        return prompts

    with pytest.raises(ValueError, match=f"tokens run from 0 to {TASK.vocab}; the vocabulary allows"):
        together([new_model(g) for g in range(G)], batch=wrong)


def test_progress_shows_how_many_models_run_and_is_silent_when_off(capsys):
    together([new_model(g) for g in range(G)], steps=2, progress=True)
    assert "step" in capsys.readouterr().err
    together([new_model(g) for g in range(G)], steps=1)
    assert capsys.readouterr().err == ""
