"""Depth, scratchpad and L-FuncComp, trained: settings, rows, targets, and a little of what is learned."""

import itertools
import json

import pytest
import torch

from lib.experiments.depth import query_target, table_target, train_depth
from lib.experiments.scratchpad import train_scratchpad
from lib.experiments.sequential_training import layer_target, train_sequential
from lib.experiments.sequential_training import table_target as mixture
from lib.tasks.chains import ScratchpadHops
from lib.tasks.composition import SequentialComposition
from lib.tasks.hops import PermutationHops
from lib.tasks.sequential_prompts import ORDERS, SequentialPrompts

TINY = {"d_model": 16, "n_heads": 2, "d_mlp": 32, "steps": 6, "batch": 4, "evaluate_every": 3,
        "evaluation_prompts": 16}  # fmt: skip
DEPTH = {**TINY, "n": 4, "K": 3, "L": 3}
PAD = {**TINY, "n": 3, "K": 4}
SEQUENTIAL = {**TINY, "m": 3, "ns": [2], "L": 3}
TASKS = {train_depth: PermutationHops, train_scratchpad: ScratchpadHops, train_sequential: SequentialPrompts}
RUNS = [
    (train_depth, DEPTH),
    (train_depth, {**DEPTH, "supervision": "doubling", "order": "last", "asked": "mixed"}),
    (train_depth, {**DEPTH, "supervision": "none", "mask": "encoder"}),
    (train_scratchpad, PAD),
    (train_scratchpad, {**PAD, "writes": "steps", "L": 2}),
    (train_scratchpad, {**PAD, "writes": "answer"}),
    (train_sequential, SEQUENTIAL),
    (train_sequential, {**SEQUENTIAL, "order": "w-first", "maps": "permutations", "supervision": "none"}),
    (train_sequential, {**SEQUENTIAL, "ns": [2, 2], "supervision": "early"}),
    (train_sequential, {**SEQUENTIAL, "ns": [], "order": "joint", "L": 1}),
]


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
    assert row["steps_done"] == 6 and [step for step, _ in row["curve"]] == [3, 6]
    assert not row.keys() & settings.keys(), "a result never shadows a setting"
    scores = [name for name in row if f"untrained_{name}" in row]
    assert "accuracy" in scores and all(0 <= row[name] <= 1 for name in scores)


@pytest.mark.parametrize("run, settings", [RUNS[0], RUNS[3], RUNS[4], RUNS[6]])
def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(run, settings, tmp_path, monkeypatch):
    task = PermutationHops if settings.get("writes") == "steps" else TASKS[run]
    batch = task.batch

    def interrupted(self, step, **options):
        if step == 4 and options["size"] == settings["batch"]:
            raise KeyboardInterrupt
        return batch(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(task, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, seed=1, scratch=tmp_path)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    assert run(settings, seed=1, scratch=tmp_path) == run(settings, seed=1)


@pytest.mark.parametrize(
    "run, change, message",
    [
        (train_depth, {"order": "last-first"}, "did you mean 'first'|did you mean 'last'"),
        (train_depth, {"mask": "encodr"}, "did you mean 'encoder'"),
        (train_depth, {"supervision": "double"}, "did you mean 'doubling'"),
        (train_depth, {"asked": "mixed", "n": 2}, "2 queries cannot ask for 3 hop counts"),
        (train_depth, {"tables_read": "all"}, "unknown setting of DepthSettings 'tables_read'"),
        (train_depth, {"n": 1}, "n >= 2, got n=1"),
        (train_scratchpad, {"writes": "value"}, "did you mean 'values'"),
        (train_scratchpad, {"K": 0}, "K >= 1, got K=0"),
        (train_scratchpad, {"m": 2}, "unknown setting of ScratchpadSettings 'm'"),
        (train_sequential, {"order": "w-frist"}, "did you mean 'w-first'"),
        (train_sequential, {"maps": "permutation"}, "did you mean 'permutations'"),
        (train_sequential, {"supervision": "earli"}, "did you mean 'early'"),
        (train_sequential, {"ns": [0]}, "integers >= 1"),
        (train_sequential, {"m": 1}, "m >= 2, got m=1"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(run, change, message):
    base = {train_depth: DEPTH, train_scratchpad: PAD, train_sequential: SEQUENTIAL}[run]
    with pytest.raises(ValueError, match=message):
        run({**base, **change}, seed=0)


@pytest.mark.parametrize("order", ["last-first", "first-first"])
@pytest.mark.parametrize("l", [1, 2, 3])
def test_doubling_asks_tables_for_2_to_the_l_hops_and_queries_for_one_less(order, l):
    task, checked = PermutationHops(n=4, K=5, order=order), 0
    prompts = task.batch(0, seed=0, size=3, mix=(1, 3, 5))
    asked = query_target(task, prompts, l, doubling=True)
    at_tables = table_target(task, prompts.tables, l)
    for b, (tables, tokens) in enumerate(zip(prompts.tables.tolist(), prompts.tokens.tolist(), strict=True)):
        for t, token in enumerate(tokens[: task.K * task.n]):
            key, _, table = (int(task.row(i).split()[1]) for i in token)
            value = key
            for z in tables[table - 1 :][: 2**l]:
                value = z[value]
            assert at_tables[b, t] == value
            checked += 1
        for q, (x, k) in enumerate(zip(prompts.x[b].tolist(), prompts.hops[b].tolist(), strict=True)):
            for z in tables[: min(2**l - 1, k)]:
                x = z[x]
            assert asked[b, q] == x
    assert checked == 3 * 5 * 4


@pytest.mark.parametrize("order", ORDERS)
def test_the_answering_token_is_asked_for_one_look_up_a_layer(order):
    prompts = SequentialPrompts(SequentialComposition(3, (2, 2)), order)
    batch = prompts.batch(0, seed=0, size=2)
    late = {"paper": 1, "z_1-first": 1, "w-first": 0, "joint": 0}[order]
    for t in range(1, 7):
        assert layer_target(prompts, batch, t).equal(batch.values[:, :, [0, 1, 2, 3, 3, 3, 3][t - late]])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("t", [1, 2, 3])
def test_early_supervision_asks_a_table_token_for_what_its_value_can_become(order, t):
    task = SequentialComposition(2, (2, 3))
    prompts = SequentialPrompts(task, order)
    batch = prompts.batch(0, seed=0, size=2)
    target = mixture(prompts, batch.tables, t)
    assert target.shape == (2, 2 + 4 + 12, 12)
    names = ["z_1", "z_2", "z_3"] if order == "z_1-first" else ["z_3", "z_2", "z_1"]
    for b in range(2):
        z = {f"z_{l}": table[b].tolist() for l, table in enumerate(batch.tables, 1)}
        token = 0
        for name in names:
            first = int(name[2:])
            for value in z[name]:
                values = [value]
                for l in range(first, min(first + t, 3)):  # z_{l+1}(w_l, value) for every w_l
                    n, inner = task.ns[l - 1], task.N[l - 1]
                    values = [z[f"z_{l + 1}"][w * inner + v] for v, w in itertools.product(values, range(n))]
                expected = [values.count(answer) / len(values) for answer in range(12)]
                assert target[b, token].tolist() == pytest.approx(expected, abs=1e-6)
                token += 1
        assert token == 18


def test_a_row_says_what_a_guess_would_score():
    row = train_sequential({**SEQUENTIAL, "maps": "permutations"}, seed=0)
    assert row["chance"] == pytest.approx(1 / 6) and row["chance_knowing_w"] == pytest.approx(1 / 3)
    assert row["chance_knowing_start"] == pytest.approx(1 / 2)
    assert row["tokens"] == 3 + 6 + 2 and row["composed"] == 2
    assert train_scratchpad(PAD, seed=0)["emitted"] == 4
    assert train_scratchpad({**PAD, "writes": "answer"}, seed=0)["emitted"] == 1


def test_without_a_scratchpad_every_hop_count_takes_its_turn(monkeypatch):
    asked, batch = set(), PermutationHops.batch

    def watched(self, step, *, mix, **options):
        asked.update((step, k) for k in mix[: self.n] if step < 10**6)
        return batch(self, step, mix=mix, **options)

    monkeypatch.setattr(PermutationHops, "batch", watched)
    train_scratchpad({**PAD, "K": 6, "writes": "steps", "evaluate_every": 6}, seed=0)
    assert {k for _, k in asked} == {1, 2, 3, 4, 5, 6}, "although there are 3 queries only"


@pytest.mark.slow
def test_one_layer_learns_four_hops_with_a_scratchpad_and_not_without_one():
    settings = {"n": 6, "K": 4, "d_model": 32, "n_heads": 2, "d_mlp": 64, "batch": 32, "steps": 160}
    written = train_scratchpad({**settings, "writes": "values"}, seed=0)
    at_once = train_scratchpad({**settings, "writes": "answer"}, seed=0)
    assert written["accuracy"] > 0.95 > 0.3 > at_once["accuracy"]
    assert abs(written["untrained_accuracy"] - 1 / 6) < 0.1


@pytest.mark.slow
def test_three_layers_learn_two_step_composition_with_w_last_and_the_untrained_model_does_not_know_it():
    settings = {"m": 4, "ns": [2], "d_model": 64, "n_heads": 4, "d_mlp": 128, "batch": 32, "steps": 240,
                "optimizer": "adamw", "adamw_lr": 2e-3}  # fmt: skip
    three = train_sequential({**settings, "L": 3}, seed=0)
    assert three["accuracy"] > 0.9 > three["chance_knowing_start"] > three["untrained_accuracy"]
    assert three["behind_1"] > 0.95 and three["behind_2"] > 0.95
