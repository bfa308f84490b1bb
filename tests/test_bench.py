"""The speed table: what it prints, what it compares, and that it times nothing wrong. No time is asserted."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location("bench", Path(__file__).with_name("bench.py"))
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_the_table_has_medians_and_the_ratios_of_single_turns():
    halved = bench.Row("train", "steps/s", [30.0, 50.0, 12.0], [15.0, 100.0, 4.0], "a loop", ">= 1")
    lines = bench.table([halved, bench.Row("render", "s", [7.25])]).splitlines()
    assert lines == [
        "what    unit     ours  baseline  ratio  range     the baseline is  asked",
        "train   steps/s    30        15      2  0.5 to 3  a loop           >= 1",
        "render  s        7.25",
    ]


def test_arms_take_turns_after_a_warm_up_that_is_not_counted():
    calls, told = [], []

    def arm(name):
        calls.append(name)
        return 1

    arms = {name: lambda name=name: arm(name) for name in "ab"}
    found = bench.rates(arms, turns=3, least_s=1e-5, tell=told.append)
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order == ["a", "b"] * 4 and calls[:2] == ["a", "b"]
    assert [len(found[name]) for name in "ab"] == [3, 3] and len(told) == 3


def test_the_plain_model_computes_what_ours_computes():
    ours, plain, task = bench.our_model(), bench.Plain(), bench.TASK
    plain.load_state_dict(bench.plain_weights(ours))  # strict: each weight has its place in the other
    assert sum(p.numel() for p in plain.parameters()) == ours.n_parameters()
    tokens = task.batch(0, seed=0, size=4).tokens
    expected = ours(tokens, mask=task.mask(), rows=task.queries)
    # float32, two layers of width 64: another order of summation moves the last two of seven digits
    torch.testing.assert_close(plain(tokens, task.mask())[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_both_loops_take_the_same_steps_with_adamw():
    ours = bench.our_run(muon=False)
    plain = bench.plain_run(bench.plain_weights(bench.our_model()), muon=False)
    assert len(ours) == len(plain) == bench.SETTINGS.steps
    # rounding grows from step to step; losses are near 4, and another rate or data would differ by 0.01
    assert ours[:5] == pytest.approx(plain[:5], abs=1e-3)


def test_a_run_that_does_not_learn_is_not_timed():
    assert bench.steps_done(lambda: [2.0, *[1.0] * 5]) == 6
    for losses in ([2.0, *[2.1] * 5], [2.0, *[float("nan")] * 5]):
        with pytest.raises(AssertionError, match="6 steps took the loss from 2.00 to"):
            bench.steps_done(lambda losses=losses: losses)


def test_a_build_that_rendered_nothing_has_no_row(tmp_path):
    record = tmp_path / "run.json"
    assert bench.rendering(record) == []
    run = {"command": "book", "finished": "2026-01-02T03:04:05+00:00", "render_seconds": 21.5}
    record.write_text(json.dumps({**run, "site": None}))
    assert bench.rendering(record) == []
    record.write_text(json.dumps({**run, "site": "build/html/index.html"}))
    (row,) = bench.rendering(record)
    assert (row.ours, row.unit) == ([21.5], "s") and "2026-01-02" in row.what


def test_pretrained_models_have_sections_and_a_missing_one_is_told(tmp_path, monkeypatch, capsys):
    assert {bench.linearity_scores, bench.pretrained_models, bench.use_of_depth} <= {*bench.SECTIONS}
    monkeypatch.setenv("PROOF_AND_PROBE_CACHE", str(tmp_path))  # where no model is
    monkeypatch.setattr(bench, "SECTIONS", (bench.pretrained_models,))
    monkeypatch.setattr(bench, "rendering", list)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda n: None)  # other tests keep theirs
    bench.main()
    printed = capsys.readouterr()
    assert "what needs it was not timed. `make models` fetches it" in printed.out
    assert "tokens/s" not in printed.out and "not on this machine: make models" in printed.err


@pytest.mark.slow
def test_composed_heads_have_a_section_whose_rows_are_rows_of_the_table():
    file = Path(bench.__file__).with_name("bench_dcmha.py")
    spec = importlib.util.spec_from_file_location("bench_dcmha", file)
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    made = [bench.Row(*row) for row in own.rows(turns=1, shapes=[(1, 24, 32, 4, "<= 9")])]
    assert bench.composed_heads in bench.SECTIONS
    assert [row.asked for row in made[:3]] == ["<= 9", "", ""] and all(row.cells() for row in made)


@pytest.mark.slow
def test_a_timed_sweep_records_each_run_and_a_failed_one_is_not_timed():
    tiny = {**bench.TINY, "steps": 2}
    assert 0 < bench.sweep_s(bench.train_composition, tiny, runs=2, n_jobs=1)
    with pytest.raises(AssertionError, match="(?s)a run failed.*d_modl"):
        bench.sweep_s(bench.train_composition, {**tiny, "d_modl": 1}, runs=1, n_jobs=1)
