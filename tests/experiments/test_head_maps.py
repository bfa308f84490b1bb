"""Composed heads looked into: patterns as the model has them, controls that must give zero, interventions."""

import dataclasses
import json
import math

import pytest
import torch

import lib.experiments.composed_language as composed_language
from lib.experiments.composed_language import window_losses
from lib.experiments.head_maps import (
    CLASSES,
    HeadMapsSettings,
    class_maps,
    inspect_heads,
    look,
    losses_without,
    patterns_of,
    replaced,
    token_classes,
)
from lib.models.transformer import Transformer
from lib.tasks import text

TINY = {
    "arm": "dcmha", "L": 2, "d_model": 16, "n_heads": 4, "d_mlp": 24, "T": 12, "batch": 2, "steps": 10,
    "curve_windows": 16, "final_windows": 16, "map_windows": 4, "warmup": 2,
}  # fmt: skip
ARMS = ["dcmha", "with_static", "static", "post_only", "pre_only", "query_only", "key_only", "lightweight"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """The first tokens of each split: enough for models this small."""
    of = {split: text.austen_tokens(split)[:6000] for split in text.SPLITS}
    cached = (composed_language.references, composed_language._tokens_per_character)
    for each in cached:
        each.cache_clear()
    monkeypatch.setattr(text, "austen_tokens", lambda split: of[split].clone())
    yield
    for each in cached:
        each.cache_clear()


def composed_model(seed=0, **change):
    """A model whose compositions are far from the identity: every weight of theirs is drawn anew, large."""
    model = Transformer(HeadMapsSettings(**TINY | change).config(), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".attention.pre." in name or ".attention.post." in name:
                weight.normal_(0.0, 0.3, generator=generator)
    return model


def windows(n=4, T=12):
    return text.chunks(text.austen_tokens("validation"), T + 1)[:n]


CASES = [*({"arm": arm} for arm in ARMS), {"windows": (5, None)}, {"qk_norm": True}]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_patterns_are_the_attention_that_the_model_computes(change):
    model, tokens = composed_model(**change), windows()[:, :-1]
    with torch.no_grad():
        trace = model.trace(tokens, read=("residual", "attention_weight"))
        for l, layer in enumerate(model.layers):
            seen = patterns_of(layer.attention, layer.attention_norm(trace.residual[l]))
            expected = trace.attention_weight[l].double()
            assert torch.allclose(seen.composed_weight, expected, atol=2e-5)  # float32 projections
            assert seen.composed_weight.masked_fill(seen.allowed, 0.0).eq(0).all()
            assert torch.allclose(seen.weight.sum(dim=-1), torch.ones(4, 4, 12, dtype=torch.float64))
            if change.get("arm") != "pre_only":
                assert not torch.allclose(seen.weight, expected, atol=0.02), "the composition does something"


def test_a_fixed_mixture_adds_nothing_outside_its_heads_and_a_dynamic_one_does():
    tokens = windows()[:, :-1]
    fixed, moving = (look(composed_model(arm=arm), tokens, seed=0) for arm in ("static", "dcmha"))
    for stage in ("pre", "post"):
        for l in range(2):
            assert max(fixed["change_outside_span"][stage][l]) < 1e-12
            assert moving["change_outside_span"][stage][l][1] > 0.01
            assert fixed["dynamic_share"][f"{stage}_query"][l] < 1e-12
            assert 0 < moving["dynamic_share"][f"{stage}_query"][l] <= 1
    assert set(fixed["off_diagonal"]) == {"pre_query", "post_query"}, "W_b counts with the queries"
    assert set(look(composed_model(arm="post_only"), tokens, seed=0)["rank_over_heads"]) == {"post"}


def test_heads_have_the_rank_of_their_width_before_composition_and_more_after():
    model = composed_model()  # 4 heads of width 4 on 12 tokens
    found = look(model, windows()[:, :-1], seed=0)
    for l in range(2):
        assert found["head_numerical_rank"][l][0] == 4.0 < found["head_numerical_rank"][l][1]
        before, after = found["head_rank"][l]
        assert before[0] <= 4 and after[0] > before[0]


def test_rows_sum_to_one_exactly_where_nothing_follows_the_softmax():
    tokens = windows()[:, :-1]
    plain, moved = (look(composed_model(arm=arm), tokens, seed=0) for arm in ("pre_only", "post_only"))
    for l in range(2):
        assert plain["row_sum_distance"][l][2] < 1e-12 and plain["negative_share"][l] == [0, 0, 0]
        assert all(math.isclose(value, 1) for value in plain["row_sum_quantiles"][l])
        assert moved["row_sum_distance"][l][1] > 0.02 and moved["negative_share"][l][1] > 0.02


def test_an_untrained_model_is_near_the_identity():
    model = Transformer(HeadMapsSettings(**TINY).config(), seed=0).eval()
    found = look(model, windows()[:, :-1], seed=0)
    for part in found["distance"]:
        for mean, lo, hi in found["distance"][part]:
            assert 0 < lo <= mean <= hi < 0.05
    assert max(hi for _, _, hi in found["row_sum_distance"]) < 0.05


def test_class_maps_are_means_of_the_matrices_over_the_tokens_of_each_class():
    model, tokens = composed_model(), windows()[:, :-1]
    label = token_classes()[tokens]
    label[1, 3:6] = -1  # of no class
    found = class_maps(model, tokens, label, len(CLASSES))
    assert found["parts"] == ["pre_query", "pre_key", "post_query", "post_key"]
    assert found["tokens_by_class"] == [int((label == c).sum()) for c in range(5)]
    with torch.no_grad():
        x = model.layers[1].attention_norm(model.trace(tokens, read=("residual",)).residual[1])
        M = patterns_of(model.layers[1].attention, x).M["post_key"]
    for c in range(5):
        here = [M[b, t] for b in range(4) for t in range(12) if int(label[b, t]) == c]
        mean = sum(here) / len(here) - torch.eye(4) if here else torch.zeros(4, 4)  # (from, to)
        assert torch.allclose(torch.tensor(found["maps"]["post_key"][1][c]), mean.float(), atol=1e-4)


def test_every_token_has_a_class():
    tokenizer, classes = text.austen_tokenizer(), token_classes()
    assert classes.shape == (1024,) and set(classes.tolist()) == set(range(len(CLASSES)))

    def named(written):
        return [CLASSES[int(classes[i])] for i in tokenizer.encode(written).ids]

    assert named(" the") == ["word"] and named(" Mr") == ["capital"] and named("\n") == ["paragraph"]
    assert named(",") == named(' "') == named("7") == ["punctuation"]
    assert "inside" in named(" unprepossessing")


def test_replacing_every_composition_by_the_identity_gives_softmax_attention():
    model, tokens = composed_model(), windows()[:, :-1]
    config = dataclasses.replace(model.config, attention="mha")
    plain = Transformer(config, seed=1).eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    eye = torch.eye(4, dtype=torch.float64)
    parts = ("pre_query", "pre_key", "post_query", "post_key")
    with torch.no_grad():
        before = model(tokens)
        with replaced(model, [dict.fromkeys(parts, eye)] * 2):
            inside = model(tokens)
        assert torch.allclose(inside, plain(tokens), atol=1e-5)
        assert not torch.allclose(before, inside, atol=1e-2)
        assert torch.equal(model(tokens), before), "afterwards the model is as it was"
        with replaced(model, [dict.fromkeys(parts[:3], eye), {}]):
            assert not torch.allclose(model(tokens), plain(tokens), atol=1e-3)


def test_a_composition_that_is_the_same_at_every_token_loses_nothing_when_fixed():
    """A side whose weights depend on nothing: W_1 and gates are 0, so M = I; fixed and identity agree."""
    model, seen = composed_model(), windows()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "W_1.weight" in name and "attention" in name or "W_g" in name:
                weight.zero_()
    found = losses_without(model, seen, seed=0)
    for value in (*found["lost_fixed"], *found["lost_identity"], *found["lost_fixed_by_part"]["post_key"]):
        assert abs(value) < 1e-5
    moving = losses_without(composed_model(), seen, seed=0)
    assert any(abs(value) > 1e-3 for value in (*moving["lost_fixed"], *moving["lost_identity"]))


def test_what_is_lost_is_the_difference_of_the_losses():
    model, seen = composed_model(), windows()
    found = losses_without(model, seen, seed=0)["lost_identity"][0]
    eye = torch.eye(4, dtype=torch.float64)
    whole = window_losses(model, seen).mean()
    with replaced(model, [dict.fromkeys(("pre_query", "pre_key", "post_query", "post_key"), eye)] * 2):
        assert math.isclose(found, window_losses(model, seen).mean() - whole, abs_tol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["dcmha", "static"])
def test_a_row_is_plain_and_a_function_of_settings_and_seed(arm, tmp_path):
    row = inspect_heads(TINY | {"arm": arm}, seed=1)
    assert row == inspect_heads(TINY | {"arm": arm}, seed=1, scratch=tmp_path)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    taken = {field.name for field in dataclasses.fields(HeadMapsSettings)} | {"seed", "wall_s", "core_s"}
    assert not row.keys() & taken
    assert inspect_heads(TINY | {"arm": arm}, seed=2)["weights_hash"] != row["weights_hash"]
    assert sum(row["tokens_by_class"]) == 4 * 12 and row["stages"] == ["pre", "post"]
    for part in row["parts"]:
        assert torch.tensor(row["maps"][part]).shape == (2, 5, 4, 4)
    for state in ("trained", "untrained"):
        for name, shape in {"rank_over_heads": (2, 2, 3), "outside_span": (2, 3)}.items():
            for stage in row["stages"]:
                assert torch.tensor(row[state][name][stage]).shape == shape
        assert torch.tensor(row[state]["row_sum_quantiles"]).shape == (2, 3)
    assert row["trained"]["distance"] != row["untrained"]["distance"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": "mha"}, "composes nothing"),
        ({"arm": "dcmah"}, "did you mean 'dcmha'"),
        ({"map_windows": 2}, "at least 3, for intervals"),
        ({"head": 2}, "unknown setting of HeadMapsSettings 'head'"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        inspect_heads(TINY | change, seed=0)
