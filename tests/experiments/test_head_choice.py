"""One layer that must choose where to look and what to read: arms, weights, rows, and what is looked at."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lib.experiments.head_choice as head_choice
from lib.experiments.head_choice import (
    ARMS,
    HeadChoiceSettings,
    look_inside,
    patterns,
    prompt_flops,
    train_heads,
    zero_padding,
)
from lib.experiments.recipe import read_settings
from lib.metrics.attention_cost import AttentionShape, parameters
from lib.models.constructions.retrieval import relational_retrieval
from lib.models.transformer import Transformer
from lib.tasks.retrieval import RelationalRetrieval
from lib.training import fit

TINY = dict(d_model=8, n_heads=2, steps=4, evaluate_every=2, batch=3, evaluation_prompts=5, warmup=1,
            N=3, C=2, W=2, V=3, Q=4)  # fmt: skip
RECOMBINATION = {**TINY, "task": "recombination", "A": 3}


@pytest.fixture(autouse=True)
def one_thread():
    """As in a sweep. Several threads on models this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(**settings):
    """A layer that training has not touched, but whose compositions are far from the identity."""
    chosen = read_settings(HeadChoiceSettings, {**TINY, **settings})
    task = chosen.make_task()
    model = Transformer(chosen.config(task), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".pre." in name or ".post." in name:
                weight.normal_(0, 0.7, generator=generator)
    return chosen, task, model


@pytest.mark.parametrize("settings", [{**TINY, "arm": "query"}, {**RECOMBINATION, "arm": "mha", "d_mlp": 4}])
def test_a_row_is_a_function_of_settings_and_seed(settings):
    row = train_heads(settings, seed=1)
    assert row == train_heads(settings, seed=1) == json.loads(json.dumps(row))
    other = train_heads(settings, seed=2)
    assert other["step0_hash"] != row["step0_hash"] and other["final_loss"] != row["final_loss"]
    assert row["steps_done"] == 4 and [step for step, _ in row["curve"]] == [2, 4]
    assert not set(row) & {*HeadChoiceSettings.__dataclass_fields__, "seed", "wall_s", "core_s"}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_the_same_entries_and_is_untrained_at_chance(arm):
    row = train_heads({**TINY, "arm": arm, "evaluation_prompts": 200}, seed=0)
    assert set(row) == set(train_heads({**TINY, "arm": "mha"}, seed=0))
    assert abs(row["untrained_accuracy"] - row["chance"]) < 0.15 and row["chance"] == 1 / 3
    sides = {"full", "full-pre", "full-post", "query", "query-pre", "query-post"}
    stages = [stage for stage in ("pre", "post") if arm in sides and not arm.endswith(("-pre", "-post"))]
    stages += [arm.split("-")[1]] if "-" in arm else []
    assert set(row["maps"]) == set(row["map_shares"]) == set(stages)
    for cells in row["maps"].values():
        assert torch.tensor(cells).shape == (2, 2, 2, 2)  # key attributes, values, heads, heads


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_of_a_seed_are_trained_and_judged_on_the_same_prompts(arm, monkeypatch):
    seen, batch = [], RelationalRetrieval.batch

    def watched(self, step, **options):
        prompts = batch(self, step, **options)
        seen.append((step, options["size"], prompts.tokens.sum().item(), prompts.answer.sum().item()))
        return prompts

    monkeypatch.setattr(RelationalRetrieval, "batch", watched)
    train_heads({**TINY, "arm": "mha"}, seed=3)
    first, seen[:] = list(seen), []
    train_heads({**TINY, "arm": arm}, seed=3)
    assert seen == first and len(first) == 4 + 2 + 2 + 1  # training, curve, before and after, looking inside


def test_an_interrupted_run_gives_the_row_of_an_unbroken_one(tmp_path, monkeypatch):
    settings, batch = {**TINY, "arm": "query"}, RelationalRetrieval.batch

    def interrupted(self, step, **options):
        if step == 3 and options["size"] == settings["batch"]:
            raise KeyboardInterrupt
        return batch(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RelationalRetrieval, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_heads(settings, seed=1, scratch=tmp_path)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    assert train_heads(settings, seed=1, scratch=tmp_path) == train_heads(settings, seed=1)


@pytest.mark.parametrize("arm", ARMS)
def test_without_an_mlp_the_layer_is_attention_and_nothing_else(arm):
    chosen, task, model = built(arm=arm, N=5, n_heads=4)
    shape = AttentionShape.of(chosen.config(task))
    assert sum(w.numel() for w in model.layers.parameters()) == parameters(shape)["total"]
    assert all("attention" in name for name, _ in model.layers.named_parameters())
    prompts = task.batch(0, seed=0, size=2)
    trace = model.trace(prompts.tokens, mask=task.mask(), read=("residual", "attention_out", "mlp_out"))
    assert trace.mlp_out.eq(0).all()
    assert trace.residual[1].equal(trace.residual[0] + trace.attention_out[0])
    row = train_heads({**TINY, "arm": arm, "N": 5, "n_heads": 4, "steps": 1}, seed=0)
    assert row["layer_parameters"] == parameters(shape)["total"]
    assert row["non_embedding_parameters"] == row["layer_parameters"] + 8 * 3 + 3


def test_the_controls_have_as_many_weights_as_the_compositions():
    def weights(**settings):
        chosen = HeadChoiceSettings(d_model=32, steps=1, **settings)
        task = chosen.make_task()
        return Transformer(chosen.config(task), seed=0).layers.parameters()

    count = {
        name: sum(w.numel() for w in weights(**settings))
        for name, settings in {
            "full": dict(arm="full", n_heads=4),
            "wider as full": dict(arm="mha", n_heads=4, d_head=15),
            "query": dict(arm="query", n_heads=4),
            "wider as query": dict(arm="mha", n_heads=4, d_head=12),
            "mha + MLP": dict(arm="mha", n_heads=4, d_mlp=60),
            "static + MLP": dict(arm="static", n_heads=4, d_mlp=60),
            "query + MLP": dict(arm="query", n_heads=4, d_mlp=32),
        }.items()
    }
    assert count["full"] == count["wider as full"] == 7680
    assert 0 < count["wider as query"] - count["query"] < 0.05 * count["query"]
    with_mlp = [count[name] for name in count if "MLP" in name]
    assert max(with_mlp) < 1.01 * min(with_mlp)


@pytest.mark.parametrize("arm", ["mha", "static", "query", "key", "full", "query-pre", "full-post"])
@pytest.mark.parametrize("d_mlp", [0, 5])
def test_flops_are_those_that_a_forward_pass_is_seen_to_spend(arm, d_mlp):
    chosen, task, model = built(arm=arm, d_mlp=d_mlp, N=5, Q=3, gates=arm == "mha", n_heads=4)
    written_out = dataclasses.replace(model.config, attention_kernel="explicit")
    model = Transformer(written_out, seed=0)  # without gates: elementwise, torch does not count them
    prompts = task.batch(0, seed=0, size=2)
    with FlopCounterMode(display=False) as counter:
        model(prompts.tokens, mask=task.mask(), rows=task.queries)
    assert counter.get_total_flops() == 2 * prompt_flops(chosen, task)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("arm", ARMS)
def test_the_patterns_looked_at_are_those_the_model_attends_with(arm, sink):
    _, task, model = built(arm=arm, sink=sink)
    prompts = task.batch(0, seed=0, size=4)
    trace = model.trace(prompts.tokens, mask=task.mask(), rows=task.queries, read=("attention_weight",))
    before, after = patterns(model, task, prompts)["post"]
    assert torch.allclose(after.float(), trace.attention_weight[0], atol=1e-5)  # float32 scores of size 10
    assert torch.allclose(before.sum(dim=-1), torch.ones((), dtype=torch.float64))
    changed = not torch.allclose(before, after)
    assert changed == (arm != "mha" and not arm.endswith("-pre"))


def test_a_hand_built_layer_is_read_as_built():
    C, K, W, V = 3, 3, 3, 2
    task = RelationalRetrieval(N=3, C=C, W=W, V=V, Q=5)
    row = look_inside(relational_retrieval(C, K, W, V, gain=2.0), task, seed=0)
    H = 3
    expected = torch.eye(H).repeat(C, W, 1, 1)
    for c in range(C):
        for w in range(W):
            expected[c, w, c, w] += 2.0 * H**0.5  # head w is given what head c found
    assert torch.allclose(torch.tensor(row["maps"]["post"]), expected, atol=1e-3)  # printed to 4 digits
    assert set(row["maps"]) == {"post"}
    assert row["map_shares"]["post"]["both"] == pytest.approx(1)
    assert max(row["map_shares"]["post"][name] for name in ("by", "give")) < 0.9
    assert row["scores_rank"]["before"] == row["scores_rank"]["after"]
    assert row["outside_span"]["pre"] == 0 < 0.1 < row["outside_span"]["post"]


def test_plain_scores_have_the_rank_of_a_head_and_composed_ones_more():
    for arm, bound in (("mha", 4), ("query-post", 4), ("static", 8), ("query", 8), ("full", 16)):
        _, task, model = built(arm=arm, d_model=16, n_heads=2, d_head=4, N=5, C=3, W=3)
        row = look_inside(model, task, seed=0)
        assert row["head_rank"]["before"] == 4
        assert row["head_rank"]["after"] == bound if bound <= 8 else 8 < row["head_rank"]["after"] <= bound
        assert row["head_effective_rank"]["after"] <= row["head_rank"]["after"]
        if arm in ("mha", "static"):
            assert max(row["outside_span"].values()) < 1e-12, "a fixed mixing stays in the span of the heads"


def test_padding_stays_zero_in_training():
    chosen, task, model = built(arm="query")
    zero_padding(model)
    mask = task.mask()

    def loss(model, prompts):
        logits = model(prompts.tokens, mask=mask, rows=task.queries)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), prompts.answer.flatten())

    before = model.embedding.weight.detach().clone()
    fit(
        model, loss, lambda t: task.batch(t, seed=0, size=4), steps=3, optimizer=chosen.plan(), progress=False
    )
    assert model.embedding.weight[0].eq(0).all()
    assert (model.embedding.weight[1:] != before[1:]).any(dim=1).all()


def test_the_answer_cannot_be_read_without_the_items(monkeypatch):
    """Negative control: answers of other prompts. Nothing above chance may be learned."""
    sample = RelationalRetrieval.sample

    def shuffled(self, size, **options):
        prompts = sample(self, size, **options)
        return prompts._replace(answer=prompts.answer.roll(1, dims=0))

    monkeypatch.setattr(RelationalRetrieval, "sample", shuffled)
    settings = {**TINY, "arm": "query", "steps": 60, "batch": 16, "evaluation_prompts": 300, "adamw_lr": 0.02}
    assert abs(train_heads(settings, seed=0)["accuracy"] - 1 / 3) < 0.06


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": "queri"}, "unknown arm 'queri'; did you mean 'query'"),
        ({"task": "recombine"}, "did you mean 'recombination'"),
        ({"n_head": 2}, "'n_head'; did you mean 'n_heads'"),
        ({"steps": 0}, "steps is a whole number of at least 1, got 0"),
        ({"d_mlp": -1}, "d_mlp is a whole number of at least 0, got -1"),
        ({"n_heads": 3}, "n_heads must divide d_model"),
        ({"W": 0}, "W is a whole number of at least 1, got 0"),
        ({"task": "recombination", "N": 9}, "V >= N: got V=3 values for N=9"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change, message, monkeypatch):
    monkeypatch.setattr(head_choice, "train", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        train_heads({**TINY, "arm": "mha", **change}, seed=0)


@pytest.mark.slow
def test_composition_by_the_query_learns_to_choose_and_fixed_heads_do_not_in_the_same_steps():
    settings = dict(d_model=32, n_heads=4, steps=250, batch=32, adamw_lr=0.02, sink=False)
    accuracy = {arm: train_heads({**settings, "arm": arm}, seed=0)["accuracy"] for arm in ("query", "mha")}
    assert accuracy["query"] > 0.8 > 0.5 > accuracy["mha"]
