"""Sweeps: rows that depend on nothing but settings and seed, failures that stay alone, runs that continue."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lib.evidence.rows import RowStore
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.sweeps import run_sweep
from lib.tasks.sum2 import Sum2
from lib.training import fit

GRID = [{"a": 3}, {"a": 1}, {"a": 2}]


def sines(settings, *, seed):
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))
    return {"value": float((settings["a"] * x @ x).sin().sum()), "threads": torch.get_num_threads()}


def results(rows):
    return [(row["settings"], row["seed"], row["result"]) for row in rows]


def test_rows_come_in_the_order_of_the_grid_with_settings_outside():
    rows = run_sweep(sines, GRID, seeds=[5, 4], progress=False)
    assert [(row["settings"]["a"], row["seed"]) for row in rows] == [
        *itertools.product((3, 1, 2), (5, 4)),
    ]
    assert all(row["failed"] is None and row["wall_s"] >= 0 <= row["core_s"] for row in rows)
    assert {row["result"]["threads"] for row in rows} == {1}


@pytest.mark.slow
def test_rows_depend_neither_on_the_number_of_processes_nor_on_the_order():
    def run(settings, *, seed):  # defined here, so that it travels to the other process by value
        import torch

        x = torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))
        return {"value": float((settings["a"] * x @ x).sin().sum()), "threads": torch.get_num_threads()}

    one = run_sweep(run, GRID, seeds=[0, 1], progress=False)
    two = run_sweep(run, GRID, seeds=[0, 1], progress=False, n_jobs=2)
    assert results(one) == results(two)
    backwards = run_sweep(run, GRID[::-1], seeds=[1, 0], progress=False)
    assert results(one) == results(backwards)[::-1]


def test_runs_in_the_store_are_not_repeated(tmp_path):
    calls = []

    def run(settings, *, seed):
        calls.append((settings["a"], seed))
        return {"value": settings["a"] + seed}

    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    run_sweep(run, GRID[:2], seeds=[0], store=store, progress=False)
    rows = run_sweep(run, GRID, seeds=[0, 1], store=store, progress=False)
    assert calls == [(3, 0), (1, 0), (3, 1), (1, 1), (2, 0), (2, 1)]
    assert [row["result"]["value"] for row in rows] == [3, 4, 1, 2, 2, 3]
    other_code = RowStore(tmp_path / "rows.jsonl", code="decaf")
    run_sweep(run, GRID[:1], seeds=[0], store=other_code, progress=False)
    assert calls[-1] == (3, 0) and len(calls) == 7


def test_a_failing_run_is_tried_twice_recorded_and_stops_no_other(tmp_path, capsys):
    tries = []

    def run(settings, *, seed):
        tries.append(settings["a"])
        if settings["a"] == 1 or (settings["a"] == 2 and tries.count(2) == 1):
            raise RuntimeError("the cat sat on it")
        return {"value": settings["a"]}

    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    rows = run_sweep(run, GRID, seeds=[0], store=store)
    assert tries == [3, 1, 1, 2, 2]
    assert [row["result"] for row in rows] == [{"value": 3}, None, {"value": 2}]
    assert "the cat sat on it" in rows[1]["failed"]
    assert "2 done, 0 skipped, 1 failed" in capsys.readouterr().out
    run_sweep(run, GRID, seeds=[0], store=store)
    assert tries[5:] == [1, 1], "a failed run is tried again by the next sweep"


def test_scratch_folders_are_private_and_go_when_the_run_succeeded(tmp_path):
    seen = []

    def run(settings, *, seed, scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        seen.append(scratch)
        if settings["a"] == 1:
            raise RuntimeError("no")
        return {}

    run_sweep(run, GRID, seeds=[0], scratch=tmp_path, progress=False)
    assert len({*seen}) == 3 and {path.parent for path in seen} == {tmp_path}
    assert [path.exists() for path in seen] == [False, True, True, False]


def test_an_interrupted_sweep_continues_within_the_run(tmp_path):
    task = Sum2(n=3, M=7)
    shape = TransformerConfig(vocab=task.vocab, n_logits=2, d_model=8, n_heads=2, positions="none")
    interrupted = []

    def run(settings, *, seed, scratch: Path):
        def batch(step):
            if step == 7 and not interrupted:
                interrupted.append(step)
                raise KeyboardInterrupt
            return task.batch(step, seed=seed, size=4)

        def loss(model, sums):
            return cross_entropy(model(sums.tokens)[:, -1], sums.label)

        history = fit(
            Transformer(shape, seed=seed), loss, batch, steps=10, optimizer=Optimizer(),
            checkpoint=scratch / "checkpoint", progress=False,
        )  # fmt: skip
        return {"resumed_at": history.resumed_at, "loss": history.loss}

    with pytest.raises(KeyboardInterrupt):
        run_sweep(run, [{}], seeds=[0], scratch=tmp_path, progress=False)
    (row,) = run_sweep(run, [{}], seeds=[0], scratch=tmp_path, progress=False)
    (whole,) = run_sweep(run, [{}], seeds=[0], scratch=tmp_path / "other", progress=False)
    assert row["result"]["resumed_at"] == 7 and row["result"]["loss"] == whole["result"]["loss"]


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    run_sweep(sines, GRID[:1], seeds=[0], progress=False)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_run_that_changes_its_settings_is_recorded_under_those_of_the_grid(tmp_path):
    seen = []

    def run(settings, *, seed):
        seen.append((settings.pop("a"), [*settings["inner"]]))
        settings["inner"].append(4)
        if len(seen) == 1:
            raise RuntimeError("once more")
        return {}

    grid = [{"a": 1, "inner": [3]}]
    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")
    (row,) = run_sweep(run, grid, seeds=[0], store=store, progress=False)
    assert seen == [(1, [3]), (1, [3])], "each try has settings of its own"
    assert row["settings"] == {"a": 1, "inner": [3]} == grid[0]
    run_sweep(run, grid, seeds=[0], store=store, progress=False)
    assert len(seen) == 2


@pytest.mark.parametrize(
    "grid, seeds, n_jobs, message",
    [
        ([], [0], 1, "got 0 settings"),
        (GRID, [], 1, "0 seeds"),
        (GRID, [0], 0, "n_jobs=0"),
        ([{"a": 1}, {"a": 1}], [0], 1, "2 runs, only 1 different"),
        (GRID, [0, 0], 1, "6 runs, only 3 different"),
    ],
)
def test_a_sweep_of_nothing_or_of_repetitions_is_refused(grid, seeds, n_jobs, message):
    with pytest.raises(ValueError, match=message):
        run_sweep(sines, grid, seeds=seeds, n_jobs=n_jobs)


def some(settings):
    yield from settings


@pytest.mark.parametrize(
    "change, message",
    [
        ({"run": "sines"}, "run is a function"),
        ({"grid": some(GRID)}, "grid is a list of dicts"),
        ({"grid": {"a": 3}}, "grid is a list of dicts"),
        ({"grid": [3]}, "grid is a list of dicts"),
        ({"seeds": "012"}, "seeds is a list or range of whole numbers, got '012'"),
        ({"seeds": [0, True]}, "seeds is a list or range of whole numbers"),
        ({"n_jobs": True}, "n_jobs is a whole number of at least 1 or 'auto', got n_jobs=True"),
        ({"device": "cdua"}, "unknown device 'cdua'; did you mean 'cuda'"),
        ({"device": "cuda:x"}, "unknown device 'cuda:x'; only CUDA devices take an index"),
        ({"device": "cuda"}, "no device 'cuda': this machine has 0 GPUs"),
        ({"time_limit": "5"}, "time_limit is a number of seconds above 0, or None, got '5'"),
        ({"progress": "no"}, "progress is True, False or a function"),
    ],
)
def test_a_mistake_in_what_is_asked_for_is_refused_before_anything_runs(change, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def never(settings, *, seed):
        raise AssertionError("a run began")

    asked = {"run": never, "grid": GRID, "seeds": [0], "progress": False} | change
    with pytest.raises(ValueError, match=message):
        run_sweep(asked.pop("run"), asked.pop("grid"), **asked)
