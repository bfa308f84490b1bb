"""Skips against one full forward pass for each intervention, and the invariants of the facts."""

import itertools

import pytest
import torch

from lib.metrics.depth import (
    current_and_future,
    future_places,
    skip_effects,
    skips,
)
from lib.metrics.depth.branches import Branch, run_layer
from lib.models import pretrained
from lib.models.transformer import Skip, Transformer, TransformerConfig

L, V = 4, 13
EXACT = dict(rtol=1e-10, atol=1e-10)  # float64: sums in another order
KINDS = {
    "grouped heads, RoPE": {},
    "learned positions": dict(positions="learned", max_tokens=64, norm="layer", activation="gelu"),
    "no norm, no positions": dict(norm="none", positions="none", n_kv_heads=2, activation="relu"),
    "biases everywhere": dict(attention_bias=True, mlp_output_bias=True, readout_bias=True, tied=True),
}


def small(*, seed=0, dtype=torch.float64, **changes):
    shape = dict(vocab=V, d_model=8, n_heads=2, n_kv_heads=1, n_layers=L, d_mlp=12, activation="swiglu")
    model = Transformer(TransformerConfig(**shape | changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.to(dtype)


def prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (T,), generator=generator) for T in lengths]


# The oracle: everything whole, one pass for each intervention, one loop for each index.


@torch.no_grad()
def one_by_one(model, prompt, *, places, sublayer=None, local=False, first=1, rows=slice(None), clamp=1e-6):
    """Values of all measured tokens: {(s, l): [...]} and {s: [...]}. places: None for the all-token skip."""
    T, clean = len(prompt), model.trace(prompt[None])
    c, y = clean.attention_out + clean.mlp_out, clean.logits[0].softmax(-1)
    parts = {None: c, "attention": clean.attention_out, "mlp": clean.mlp_out}
    changes, outputs = {}, {}
    for s in range(L):
        for t in [None] if places is None else places:
            where = torch.zeros(T, dtype=torch.bool)
            where[first : T if t is None else t] = True
            seen = range(0 if t is None else t, T)
            if local:
                added, h = [], [tap.clone() for tap in clean.residual]
                for l in range(s + 1, L + 1):
                    h[l][0, where] -= parts[sublayer][s, 0, where]
                for l in range(L):
                    added.append(sum(model.run_layer(l, h[l])) if l != s else c[s].clone())
                added[s][0, where] -= parts[sublayer][s, 0, where]
                logits = model.readout(h[L])[0]
            else:
                edited = model.trace(prompt[None], interventions=[Skip(s, sublayer, where)])
                added, logits = edited.attention_out + edited.mlp_out, edited.logits[0]
            for l in range(L):
                for i in seen:
                    gap, size = (c[l] - added[l])[0, i].norm(), c[l][0, i].norm()
                    changes.setdefault((s, l), []).append((gap / max(size, torch.tensor(clamp))).item())
            for i in set(range(T)[rows]) & set(seen):
                outputs.setdefault(s, []).append((y[i] - logits.softmax(-1)[i]).norm().item())
    return changes, outputs


def assert_equal(found, tokens, model, *, of_prompt, tolerance=EXACT, **how):
    """Every pooled number of `found` is that of the oracle."""
    checked = 0
    for i, prompt in enumerate(tokens):
        changes, outputs = one_by_one(model, prompt, places=of_prompt[i], **how)
        for got, values in ((found.layers, changes), (found.output, outputs)):
            for place, x in values.items():
                x = torch.tensor(x, dtype=torch.float64)
                cell = (i, *place) if isinstance(place, tuple) else (i, place)
                for pool, want in (("peak", x.max()), ("mean", x.mean()), ("median", x.quantile(0.5))):
                    torch.testing.assert_close(got.read(pool)[cell], want, **tolerance)
                    checked += 1
                assert got.count[i] == len(x)
    assert checked == len(tokens) * 3 * (L * L + L)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sublayer", [None, "attention", "mlp"])
@pytest.mark.parametrize("local", [False, True])
def test_skips_are_those_of_full_passes(kind, sublayer, local):
    model, tokens = small(**KINDS[kind]), prompts(14, 11, 14)
    now, later = current_and_future(
        model, tokens, sublayer=sublayer, local=local, positions=(3, 9), batch_size=7
    )
    assert (now.future_only, later.future_only, later.positions) == (False, True, ((3, 9),) * 3)
    how = dict(sublayer=sublayer, local=local)
    assert_equal(now, tokens, model, of_prompt=[None] * 3, **how)
    assert_equal(later, tokens, model, of_prompt=later.positions, **how)


def test_a_bidirectional_model_is_skipped_at_all_tokens_and_has_no_future():
    model, tokens = small(causal=False), prompts(6, 6)
    assert_equal(skip_effects(model, tokens), tokens, model, of_prompt=[None] * 2)
    assert_equal(skip_effects(model, tokens, local=True), tokens, model, of_prompt=[None] * 2, local=True)
    with pytest.raises(ValueError, match="causal"):
        skip_effects(model, tokens, future_only=True, positions=(3,))


def test_in_float32_they_agree_with_full_passes_to_1e_minus_5():
    model, tokens = small(dtype=torch.float32), prompts(12, 12)
    now, later = current_and_future(model, tokens, positions=(4, 8))
    tolerance = dict(rtol=1e-5, atol=1e-5)
    assert_equal(now, tokens, model, of_prompt=[None] * 2, tolerance=tolerance)
    assert_equal(later, tokens, model, of_prompt=later.positions, tolerance=tolerance)


@pytest.mark.parametrize("how", [
    dict(batch_size=1), dict(batch_size=3), dict(batch_size=1000), dict(share=False), dict(logits_at_once=1),
    dict(share=False, local=True), dict(logits_at_once=2 * V),
])  # fmt: skip
def test_batches_chunks_and_shared_prefixes_change_nothing(how):
    model, tokens = small(), prompts(41, 45, 41)
    base = current_and_future(model, tokens, seed=3, local=how.get("local", False))
    for ours, other in zip(base, current_and_future(model, tokens, seed=3, **how), strict=True):
        assert ours.positions == other.positions
        for a, b in ((ours.layers, other.layers), (ours.output, other.output)):
            for pool in ("peak", "mean", "median"):
                torch.testing.assert_close(a.read(pool), b.read(pool), **EXACT)
    alone = skip_effects(model, tokens, future_only=True, seed=3, **how)
    torch.testing.assert_close(alone.layers.peak, base[1].layers.peak, **EXACT)
    torch.testing.assert_close(alone.output.mean, base[1].output.mean, **EXACT)


def test_the_matrix_has_the_diagonal_and_the_triangle_of_the_facts():
    """Below the diagonal 0 always; the diagonal 1 for the all-token skip, 0 for future tokens."""
    model, tokens = small(), prompts(37, 40)
    for local in (False, True):
        now, later = current_and_future(model, tokens, local=local)
        for found in (now, later):
            assert found.max().tril(-1).eq(0).all() and found.max().triu(1)[:-1].amax(dim=1).min() > 0
        torch.testing.assert_close(now.max().diagonal(), torch.ones(L, dtype=torch.float64))
        assert later.max().diagonal().eq(0).all()
        assert later.output.max()[-1] == 0, "the last layer's output at a token is read by no later token"
    assert 0 < now.output.max().max() <= 2**0.5


def test_skipping_a_sublayer_is_not_skipping_the_layer():
    """C.3 #4: the two hooks of the published code cancelled each other."""
    model, tokens = small(), prompts(9)
    found = {sub: skip_effects(model, tokens, sublayer=sub).max() for sub in (None, "attention", "mlp")}
    for one, other in itertools.combinations(found.values(), 2):
        assert (one - other).abs()[0, 1:].min() > 1e-3
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.W_O.weight.zero_()
    whole, mlp = (skip_effects(model, tokens, sublayer=sub).max() for sub in (None, "mlp"))
    torch.testing.assert_close(whole, mlp, **EXACT)  # without attention they are one


def test_the_first_token_is_spared_unless_asked():
    model, tokens = small(), prompts(7)
    spared, skipped = (skip_effects(model, tokens, first_token=how) for how in ("keep", "skip"))
    assert_equal(skipped, tokens, model, of_prompt=[None], first=0)
    assert (spared.average() - skipped.average()).triu(1).abs().max() > 1e-3
    one = prompts(1)
    assert skip_effects(model, one, first_token="skip").max().diagonal().eq(1).all()
    with pytest.raises(ValueError, match="one token"):
        skip_effects(model, one)


def test_the_papers_window_is_the_codes_one_token_later():
    model, tokens = small(), prompts(20)
    paper = skip_effects(model, tokens, future_only=True, positions=(7,), window="paper")
    code = skip_effects(model, tokens, future_only=True, positions=(8,), window="code")
    assert paper.positions == code.positions == ((8,),)
    assert torch.equal(paper.max(), code.max())
    assert_equal(paper, tokens, model, of_prompt=[(8,)])


def test_the_clamp_is_the_least_denominator():
    model, tokens = small(), prompts(9)
    assert_equal(skip_effects(model, tokens, clamp=5.0), tokens, model, of_prompt=[None], clamp=5.0)
    assert skip_effects(model, tokens, clamp=5.0).max().diagonal().max() < 1
    with torch.no_grad():
        for weight in (model.layers[1].attention.W_O.weight, model.layers[1].mlp.W_2.weight):
            weight.zero_()  # layer 1 adds nothing: 0 / clamp, not 0 / 0
    assert skip_effects(model, tokens).max()[:, 1].eq(0).all()


def test_the_output_is_compared_where_asked():
    model, tokens = small(), prompts(15, 12)
    for rows in (slice(-1, None), slice(5, None, 3)):
        now, later = current_and_future(model, tokens, positions=(4, 7), output_rows=rows)
        assert_equal(now, tokens, model, of_prompt=[None] * 2, rows=rows)
        assert_equal(later, tokens, model, of_prompt=later.positions, rows=rows)
    assert skip_effects(model, tokens, output_rows=None).output is None
    with pytest.raises(ValueError, match="no token from 7 on in prompt 0 of 15"):
        skip_effects(model, tokens, future_only=True, positions=(4, 7), output_rows=slice(0, 6))


def test_places_are_drawn_from_the_codes_range_and_differ_between_prompts():
    drawn = {future_places(64, 4, seed=seed) for seed in range(50)}
    assert len(drawn) > 10
    assert {t for places in drawn for t in places} == set(range(8, 60, 8))
    assert all(len(set(p)) == 4 and list(p) == sorted(p) for p in drawn)
    found = skip_effects(small(), prompts(64, 64, 64), future_only=True, seed=1)
    again = skip_effects(small(), prompts(64, 64, 64), future_only=True, seed=1)
    assert len(set(found.positions)) > 1 and found.positions == again.positions


@pytest.mark.parametrize("length, how, message", [
    (36, {}, "36 tokens has 3 places .* at least 37 tokens"),
    (12, dict(positions=1), "at least 13"),
    (20, dict(positions=0), "0 are asked"),
    (20, dict(positions=()), "prompt 0 of 20"),
    (20, dict(positions=(1,)), "must be 2 to 19"),
    (20, dict(positions=(20,)), "must be 2 to 19"),
    (20, dict(positions=(19,), window="paper"), "must be 2 to 19"),
    (20, dict(positions=(5,), window="text"), "unknown window"),
    (20, dict(positions=(5,), first_token="drop"), "unknown first_token"),
    (20, dict(positions=(5,), sublayer="ffn"), "unknown sublayer"),
    (20, dict(positions=(5,), batch_size=0), "batch_size"),
    (20, dict(positions=(5,), clamp=-1.0), "clamp"),
])  # fmt: skip
def test_windows_and_settings_that_do_not_fit_are_refused_before_any_work(length, how, message):
    model = small()
    model.run_layer = lambda *a, **k: pytest.fail("work was done")
    with pytest.raises(ValueError, match=message):
        skip_effects(model, prompts(length), future_only=True, **how)


def test_the_shortest_prompt_decides_and_37_tokens_are_enough():
    assert skip_effects(small(), prompts(37), future_only=True).positions == ((8, 16, 24, 32),)
    with pytest.raises(ValueError, match="30 tokens"):
        skip_effects(small(), prompts(50, 30), future_only=True)


def test_an_edited_model_that_overflows_is_refused():
    """Layer 0 keeps a layer without norm from overflowing; skipping it lets it."""
    model = small(norm="none", positions="none", activation="relu", dtype=torch.float32)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.W_O.weight.zero_()
            layer.mlp.W_2.weight.zero_()
        model.embedding.weight.fill_(1e10)
        model.layers[0].mlp.W_1.weight.fill_(1 / 8)
        model.layers[0].mlp.W_1.bias.zero_()
        model.layers[0].mlp.W_2.weight.fill_(-1 / 12)  # takes the stream to 0
        model.layers[1].mlp.W_1.weight.fill_(1e30)
        model.layers[1].mlp.W_2.weight.fill_(1.0)
        model.layers[1].mlp.W_1.bias.zero_()
    with pytest.raises(ValueError, match="the edited model overflows"):
        skip_effects(model, prompts(5))


def test_branches_are_whole_streams_from_their_start_on():
    """Tokens before the start are read, never computed; the negative control changes one of them."""
    model, generator = small(), torch.Generator().manual_seed(0)
    parents = torch.randn(3, 9, 8, generator=generator, dtype=torch.float64)
    own = [torch.randn(n, 9 - t, 8, generator=generator, dtype=torch.float64) for n, t in ((2, 4), (1, 7))]
    branches = [Branch(4, own[0], torch.tensor([2, 0])), Branch(7, own[1], torch.tensor([1]))]
    with torch.no_grad():
        whole, parts = run_layer(model, 1, parents, branches)
        torch.testing.assert_close(whole, sum(model.run_layer(1, parents)), **EXACT)
        for b, part in zip(branches, parts, strict=True):
            x = torch.cat([parents[b.parent, : b.start], b.h], dim=1)
            torch.testing.assert_close(part, sum(model.run_layer(1, x))[:, b.start :], **EXACT)
        none, same = run_layer(model, 1, parents, branches, parents_too=False)
        assert none is None
        torch.testing.assert_close(same[0], parts[0], **EXACT)
        parents[2, 3] += 1
        _, moved = run_layer(model, 1, parents, branches)
    assert (moved[0][0] - parts[0][0]).abs().max() > 1e-3 and torch.equal(moved[0][1], parts[0][1])


@pytest.mark.parametrize("batch_size", [5, 12, 30])
def test_no_more_streams_and_logits_are_held_than_asked_for(batch_size, monkeypatch):
    """A skip of one prompt is 1 + 4 streams; more prompts or layers must not add to what runs together."""
    model, streams, rows = small(), [], []

    def counted(model, l, parents, branches=(), **how):
        streams.append(len(parents) + sum(len(b.h) for b in branches))
        return run_layer(model, l, parents, branches, **how)

    readout = model.readout
    model.readout = lambda h: (rows.append(h.shape[:-1].numel()), readout(h))[1]
    monkeypatch.setattr(skips, "run_layer", counted)
    current_and_future(model, prompts(*[40] * 7), batch_size=batch_size, logits_at_once=10 * V)
    assert 5 <= max(streams) <= batch_size and max(rows) == 10


@pytest.mark.slow
@pytest.mark.skipif(not pretrained.available("smollm2-135m"), reason="fetch it with `make models`")
def test_on_smollm2_a_skip_is_that_of_a_full_pass():
    """Float32, massive activations and a vocabulary of 49,152: within 1e-4 of the largest effect."""
    model = pretrained.load("smollm2-135m")
    (tokens,) = torch.randint(1000, 20_000, (1, 1, 20), generator=torch.Generator().manual_seed(0))
    now, later = current_and_future(model, tokens, positions=(8,), output_rows=slice(-4, None))
    with torch.no_grad():
        clean = model.trace(tokens)
        c, y = clean.attention_out + clean.mlp_out, clean.logits.softmax(-1)
        for found, t in ((now, 20), (later, 8)):
            where = (torch.arange(20) >= 1) & (torch.arange(20) < t)
            seen = slice(0 if t == 20 else t, None)
            for s in (0, 12, 28):
                edited = model.trace(tokens, interventions=[Skip(s, tokens=where)])
                gap = (c - edited.attention_out - edited.mlp_out).norm(dim=-1) / c.norm(dim=-1)
                want = gap[:, 0, seen].amax(dim=-1).double()
                torch.testing.assert_close(found.layers.peak[0, s], want, rtol=1e-4, atol=1e-4)
                effect = (y - edited.logits.softmax(-1))[0, -4:].norm(dim=-1).max().double()
                torch.testing.assert_close(found.output.peak[0, s], effect, rtol=1e-4, atol=1e-5)
