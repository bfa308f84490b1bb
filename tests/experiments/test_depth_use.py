"""How depth is used, on a small stand-in: rows, planted answers, and slow oracles."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from lib.experiments import depth_use, difficulty, fewer_layers, reading
from lib.experiments.depth_use import layer_table, measure_layers, measure_skips
from lib.experiments.difficulty import measure_difficulty, measure_tokens, slope
from lib.experiments.fewer_layers import (
    arithmetic_windows,
    measure_early_exit,
    measure_tasks,
    token_losses,
)
from lib.experiments.reading import losses_under
from lib.models.interventions import Skip
from lib.models.transformer import Transformer, TransformerConfig
from lib.tasks.text import austen_tokenizer

L = 5
CONFIG = TransformerConfig(
    vocab=1024, d_model=24, n_heads=3, n_kv_heads=1, n_layers=L, d_mlp=40, activation="swiglu", tied=True
)
TEXT = {"model": "stand-in", "text": "austen", "tokens": 96, "context": 24}
RUNS = {
    "layers": (measure_layers, {**TEXT, "lens_tokens": 2}),
    "skips": (measure_skips, {**TEXT, "positions": 1, "swap_windows": 3}),
    "arithmetic": (
        measure_difficulty,
        {"model": "stand-in", "levels": [1, 3], "prompts": 3, "asked": 4, "shots": 1},
    ),
    "multi-hop": (
        measure_difficulty,
        {"model": "stand-in", "task": "multi-hop", "levels": [1, 2], "hops": 2, "prompts": 3, "asked": 4},
    ),
    "tokens": (
        measure_tokens,
        {"model": "stand-in", "steps": 2, "prompts": 3, "mean_prompts": 2, "gradient_layers": [0, 3],
         "gradient_steps": 4},
    ),
    "tasks": (measure_tasks, {"model": "stand-in", "counts": [1, 3], "per_text": 3, "rank_windows": 1}),
    "exit": (measure_early_exit, {**TEXT, "thresholds": [0.0, 0.5, 2.0]}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """A random model in the place of a pretrained one, and one thread, as in a sweep."""
    monkeypatch.setattr(reading.pretrained, "load", lambda name, **_: Transformer(CONFIG, seed=3))
    monkeypatch.setattr(reading.pretrained, "load_tokenizer", lambda name: austen_tokenizer())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    return Transformer(CONFIG, seed=3).eval().requires_grad_(False)


SLOW = ("layers", "arithmetic", "tokens", "tasks")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RUNS]


@cache
def row_of(name):
    run, settings = RUNS[name]
    return run(settings, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_a_function_of_settings_and_seed(name):
    run, settings = RUNS[name]
    row = row_of(name)
    assert row == run(settings, seed=1)
    json.dumps(row, allow_nan=False)
    assert not row.keys() & {*settings, "seed", "wall_s", "core_s"}
    bounded = [key[:-3] for key in row if key.endswith("_lo")]
    assert bounded
    for key in bounded:
        lo, value, hi = (np.asarray(row[key + end], dtype=float) for end in ("_lo", "", "_hi"))
        assert lo.shape == value.shape == hi.shape
        assert (lo <= hi).all()
        if "_max" not in key and "_depth" not in key and "_break" not in key:  # biased, or steps
            assert (lo <= value + 1e-6).all(), key
            assert (value <= hi + 1e-6).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_the_untrained_control_has_other_weights_on_the_same_tokens(name):
    run, settings = RUNS[name]
    trained, untrained = row_of(name), run({**settings, "weights": "untrained"}, seed=1)
    assert trained["weights_hash"] != untrained["weights_hash"]
    assert trained["tokens_hash"] == untrained["tokens_hash"]


def test_the_seed_draws_the_questions_and_windows():
    run, settings = RUNS["exit"]
    assert run(settings, seed=2)["tokens_hash"] != row_of("exit")["tokens_hash"]
    chosen = difficulty.DifficultySettings(**RUNS["arithmetic"][1])
    one, two = (difficulty._ask(chosen, austen_tokenizer(), seed=seed)[0] for seed in (0, 1))
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("layers", {"lens_token": 3}, "did you mean 'lens_tokens'"),
        ("layers", {"lens_tokens": 24}, "23 with a next token"),
        ("skips", {"positions": 9}, "places in range"),
        ("skips", {"output_tokens": 24}, "output_tokens=24"),
        ("arithmetic", {"levels": [3, 1]}, "rise within 1 .. 6"),
        ("arithmetic", {"levels": [1]}, "two or more levels"),
        ("arithmetic", {"prompts": 2}, "at least 3"),
        ("arithmetic", {"task": "sums"}, "arithmetic"),
        ("multi-hop", {"levels": [1, 3]}, "within 1 .. 2"),
        ("multi-hop", {"asked": 2}, "at least 3"),
        ("tokens", {"steps": 9}, "1 .. 6"),
        ("tokens", {"gradient_layers": [5]}, "layers are 0 to 4"),
        ("tasks", {"counts": [5]}, "5 cannot be removed"),
        ("tasks", {"orders": ["first"]}, "order"),
        ("exit", {"thresholds": [0.9, 0.5]}, "that rise"),
        ("exit", {"exits": [5]}, "exits are taps"),
        ("exit", {"weights": "fresh"}, "weights"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(name, changed, message):
    run, settings = RUNS[name]
    with pytest.raises(ValueError, match=message):
        run({**settings, **changed}, seed=0)


def test_halves_and_break_find_a_planted_change():
    curve = np.array([8.0, 8.0, 8.0, 8.0, 2.0, 2.0, 2.0, 2.0])
    sample = np.stack([curve * scale for scale in (0.5, 1.0, 1.5)])[None]  # (1, P, L)
    assert depth_use._halves(np.mean)(sample) == pytest.approx([0.25])
    assert depth_use._halves(np.median)(sample) == pytest.approx([0.25])
    assert depth_use._break(sample) == [4.0]
    assert depth_use._break(np.roll(sample, 1, axis=2)[:, :, 1:]) == [4.0]
    noise = np.random.default_rng(0).random((6, 3, 9)) + 0.1
    for found, one in zip(depth_use._break(noise), noise, strict=True):
        log = np.log(one.mean(axis=0))
        error = [log[:l].var() * l + log[l:].var() * (9 - l) for l in range(1, 9)]
        assert found == 1 + int(np.argmin(error))


@pytest.mark.parametrize("n_layers", [4, 7])
def test_the_early_block_has_as_many_pairs_as_the_late_one(n_layers):
    found = {
        name: set(zip(s.tolist(), l.tolist(), strict=True))
        for name, (s, l) in depth_use._regions(n_layers).items()
    }
    assert len(found["late"]) == len(found["early_within"])
    pairs = {(s, l) for s in range(n_layers) for l in range(s + 1, n_layers)}
    assert found["early"] | found["late"] == pairs
    assert not found["early"] & found["late"]


def test_means_and_shares_of_skips_are_those_of_the_matrices():
    row = measure_skips({**TEXT, "positions": 1, "tokens": 24 * 5, "swap_windows": 3}, seed=0)
    for name in ("now", "later"):
        matrix = np.array(row[f"{name}_max"])
        assert matrix.shape == (L, L)
        assert not np.tril(matrix, -1).any()
        assert np.diag(matrix) == pytest.approx(np.full(L, float(name == "now")))
        typical = np.array(row[f"{name}_median"])
        assert (typical <= matrix + 1e-4).all()
        assert 1 <= row[f"{name}_score"] <= L - 1
    assert row["late_kept"] == pytest.approx(row["later_late"] / row["now_late"], rel=1e-3)
    assert row["early_kept"] == pytest.approx(row["later_early"] / row["now_early"], rel=1e-3)
    assert row["later_output"][-1] == 0, "the last layer is read by no later token"
    assert len(row["swap_output"]) == L - 1


@pytest.mark.parametrize("name", ["layers", "skips", "arithmetic", "tokens", "exit"])
def test_a_model_whose_output_nothing_changes_has_no_score_but_a_row(name, monkeypatch):
    certain = Transformer(CONFIG, seed=3)
    with torch.no_grad():
        certain.embedding.weight.mul_(1000)  # tied: it repeats its input token with probability 1
    monkeypatch.setattr(reading.pretrained, "load", lambda name, **_: certain)
    run, settings = RUNS[name]
    row = run(settings, seed=1)
    json.dumps(row, allow_nan=False)
    gone = row_of(name).keys() - row.keys()
    if name == "layers":
        assert {key.split("_")[0] for key in gone} == {"kl"}
    elif name in ("skips", "arithmetic"):
        assert gone
        assert all("output" in key or key.startswith(("now_s", "earlier_s")) for key in gone)
    else:
        assert not gone


def test_a_table_has_a_line_for_each_layer():
    row = row_of("layers")
    table = layer_table(row)
    assert list(table["layer"]) == list(range(L))
    assert table["kl_after"].iloc[-1] == pytest.approx(0, abs=1e-5)
    assert table["overlap_after"].iloc[-1] == 1
    assert row["kl"][0] > 0


def test_a_slope_is_that_of_least_squares_and_its_interval_holds_it():
    rng, levels = np.random.default_rng(0), [1, 2, 4, 6]
    for paired in (True, False):
        held = 0
        for _ in range(60):
            values = 3 + 0.7 * np.array(levels)[:, None] + rng.normal(size=(4, 20))
            found = slope("x", levels, values, paired=paired, seed=0)
            least_squares = np.polyfit(np.repeat(levels, 20), values.flatten(), 1)[0]
            assert found["x"] == pytest.approx(least_squares, abs=1e-5)
            held += found["x_lo"] < 0.7 < found["x_hi"]
        assert held >= 50, "of 60 intervals of nominally 95 %"
        flat = slope("x", levels, np.ones((4, 12)), paired=paired, seed=0)
        assert set(flat.values()) == {0.0}


def test_paired_prompts_that_differ_by_a_constant_give_an_interval_without_width():
    base = np.random.default_rng(0).normal(size=10)
    values = [base, base + 1, base + 2]
    paired = slope("x", [1, 2, 3], values, paired=True, seed=0)
    assert paired == pytest.approx({"x": 1.0, "x_lo": 1.0, "x_hi": 1.0})
    alone = slope("x", [1, 2, 3], values, paired=False, seed=0)
    assert alone["x_hi"] - alone["x_lo"] > 0.3


@pytest.mark.parametrize("name", ["arithmetic", "multi-hop"])
def test_questions_end_where_the_answer_begins_and_are_not_among_the_shots(name):
    settings = {**RUNS[name][1], "shots": 2, "asked": 9}
    chosen, tokenizer = difficulty.DifficultySettings(**settings), austen_tokenizer()
    for level, questions in zip(chosen.levels, difficulty._ask(chosen, tokenizer, seed=0), strict=True):
        assert len(questions) == 9
        for asked in questions:
            *shots, own = tokenizer.decode(asked.tokens.tolist()).split(
                " = " if name == "arithmetic" else "Answer:"
            )
            assert len(shots) == 3
            assert own == ""
            assert asked.answer in asked.choices
            assert len(set(asked.choices)) == len(asked.choices)
            if name == "arithmetic":
                assert shots[-1].count("+") + shots[-1].count("-") == level
                last = shots[-1].split("\n")[-1]
                assert tokenizer.decode([asked.answer]) == str(eval(last))
                assert last not in [shot.split("\n")[-1] for shot in shots[:-1]]
            else:
                assert shots[-1].count(" of ") == level


def test_multi_hop_levels_share_their_stories():
    chosen = difficulty.DifficultySettings(**RUNS["multi-hop"][1])
    one, two = difficulty._ask(chosen, austen_tokenizer(), seed=0)
    for a, b in zip(one, two, strict=True):
        texts = [austen_tokenizer().decode(x.tokens.tolist()).split("\n")[0] for x in (a, b)]
        assert texts[0] == texts[1]


def test_effects_on_an_answer_are_those_of_full_passes(model):
    chosen = difficulty.DifficultySettings(**RUNS["arithmetic"][1])
    questions = difficulty._ask(chosen, austen_tokenizer(), seed=0)[1][:3]
    found = difficulty._skips(model, questions, streams=4)
    for i, asked in enumerate(questions):
        tokens, T = asked.tokens[None], len(asked.tokens)
        y = model.trace(tokens).logits[0, -1].softmax(-1)
        for name, end in (("now", T), ("earlier", T - 1)):
            for l in range(L):
                at = (torch.arange(T) > 0) & (torch.arange(T) < end)
                edit = Skip(l, tokens=at)
                edited = model.trace(tokens, interventions=[edit]).logits[0, -1].softmax(-1)
                assert found[name][i, l] == pytest.approx((y - edited).norm().item(), abs=1e-5)


def test_accuracy_counts_the_likeliest_token(model):
    chosen = difficulty.DifficultySettings(**{**RUNS["arithmetic"][1], "asked": 8})
    questions = difficulty._ask(chosen, austen_tokenizer(), seed=0)[0]
    best = [int(model(q.tokens[None])[0, -1].argmax()) for q in questions]
    planted = [
        q._replace(answer=b if i % 2 else q.answer)
        for i, (q, b) in enumerate(zip(questions, best, strict=True))
    ]
    right = [q.answer == b for q, b in zip(planted, best, strict=True)]
    found = difficulty._answers(model, planted)
    assert found["accuracy"] == np.mean(right) >= 0.5
    assert found["accuracy_lo"] <= found["accuracy"] <= found["accuracy_hi"]


@pytest.mark.slow
def test_operands_are_the_numbers_that_are_asked_about():
    row = measure_tokens({**RUNS["tokens"][1], "shots": 1}, seed=0)
    names = row["names"]
    assert [names[i].strip().isdigit() for i in row["operands"]] == [True] * 3
    assert "".join(names[row["operands"][0] :]).strip().endswith("=")
    assert "\n" in "".join(names[: row["operands"][0]])
    effect = np.array(row["effect"])
    assert effect.shape == (L + 1, len(names))
    assert not effect[L, :-1].any(), "after the last layer only the token that is read can matter"
    at = effect[:, row["operands"]]
    assert row["needed"] == pytest.approx(at.sum(axis=0) / at.max(axis=0), rel=1e-2)
    assert np.array(row["gradient"]).sum(axis=1) == pytest.approx(np.ones(2), abs=1e-3)


def test_arithmetic_windows_hold_right_lines_and_mark_their_answers():
    tokenizer = austen_tokenizer()
    tokens, answers = arithmetic_windows(4, 64, tokenizer, steps=[1, 2], step=1, seed=0)
    assert tokens.shape == (4, 64)
    assert answers.shape == (4, 63)
    for ids, marked in zip(tokens, answers, strict=True):
        whole = tokenizer.decode(ids.tolist())
        assert tokenizer.encode(whole).ids == ids.tolist()
        lines = whole.split("\n")
        for line in lines[:-1]:
            question, answer = line.split(" = ")
            assert eval(question) == int(answer)
        said = [tokenizer.decode([i]) for i in ids[1:][marked].tolist()]
        expected = [line.split(" = ")[1] for line in lines[2:] if line.count(" = ") and line.split(" = ")[1]]
        assert said == expected
    other, _ = arithmetic_windows(4, 64, tokenizer, steps=[1, 2], step=0, seed=0)
    assert not torch.equal(tokens, other)
    with pytest.raises(ValueError, match="longer ones"):
        arithmetic_windows(2, 16, tokenizer, steps=[6], step=0, seed=0)


def test_losses_of_tokens_average_to_those_of_windows(model):
    tokens = torch.randint(1024, (5, 20), generator=torch.Generator().manual_seed(0))
    plans = [{}, {4: None}, {0: None, 3: None}]
    nats, best = token_losses(model, tokens, plans, batch=2)
    torch.testing.assert_close(
        nats.mean(dim=2), losses_under(model, tokens, plans, batch=3), rtol=1e-5, atol=1e-5
    )
    edits = [Skip(0), Skip(3)]
    logits = model.trace(tokens, interventions=edits).logits
    assert torch.equal(best[2], logits[:, :-1].argmax(-1) == tokens[:, 1:])


def test_increases_are_those_of_the_losses():
    row = row_of("tasks")
    assert row["removed_last"] == [4, 3, 2]
    assert row["removed_cheapest"] == sorted(range(L), key=lambda l: row["rank_cost"][l])[:3]
    for kind in fewer_layers.KINDS:
        for order in fewer_layers.ORDERS:
            relative = np.array(row[f"{kind}_{order}"]) / row[f"{kind}_loss"]
            assert row[f"{kind}_{order}_relative"] == pytest.approx(relative, abs=1e-5)
    beyond = np.array(row["code_last_relative"]) - np.array(row["prose_last_relative"])
    assert row["code_last_beyond"] == pytest.approx(beyond, abs=2e-6)
    assert 0 <= row["accuracy"] <= 1
    assert row["n_tokens"] == 3 * 3 * 64


def test_nobody_leaves_above_a_confidence_of_one_and_everybody_at_none():
    row = row_of("exit")
    assert row["layers"][0] == 1
    assert row["added"][0] == pytest.approx(row["fixed_added"][0], abs=1e-5)
    assert row["against_fixed"][0] == pytest.approx(0, abs=1e-5)
    assert row["layers"][-1] == L
    assert row["added"][-1] == row["against_fixed"][-1] == pytest.approx(0, abs=1e-6)
    assert row["agreement"][-1] == 1
    assert row["fixed_taps"] == [1, 2, 3, 4]
