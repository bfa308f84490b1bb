"""Transformer(attention="dcmha"), windows by layer, QK norm: each sublayer against the written-out layer."""

import dataclasses
import json
import re

import pytest
import torch

from lib.models.quantised import Precision, QuantisedDecoder
from lib.models.transformer import Erase, Replace, Skip, Swap, Transformer, TransformerConfig

B, T, D, H, L, V = 2, 5, 8, 4, 2, 7
MHA = dict(attention="mha")
LOCAL = MHA | dict(windows=(2,))
TAPS = ("residual", "attention_out", "mlp_out", "attention_weight")
SMALL = dict(vocab=V, d_model=D, n_heads=H, n_layers=L, d_mlp=5, max_tokens=9)
CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64


def transformer(*, seed=0, **changes) -> Transformer:
    """A float64 model whose weights are all N(0, 1/fan_in), scales N(1, 1/4): far from the first draw."""
    model = Transformer(TransformerConfig(**SMALL | dict(attention="dcmha") | changes), seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
            weight.copy_(1 + drawn if "norm" in name and name.endswith("weight") else drawn)
    return model


def prompts(n=T, seed=3) -> torch.Tensor:
    return torch.randint(V, (B, n), generator=torch.Generator().manual_seed(seed))


def some_mask(*shape, seed=4) -> torch.Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return mask | torch.eye(shape[-1], dtype=torch.bool)


def settings(c: TransformerConfig, l: int) -> dict:
    """The layer's settings as the equation takes them, from the config alone."""
    composed = c.attention == "dcmha"
    return dict(
        n_heads=c.n_heads, rank=c.dc_rank, pre=composed and c.dc_pre, post=composed and c.dc_post,
        query_side=c.dc_query_side, key_side=c.dc_key_side, gates=c.dc_gates, static=c.dc_static,
        window=c.windows[l % len(c.windows)], causal=c.causal, qk_norm=c.qk_norm, d_head=c.d_head,
        n_kv_heads=c.n_kv_heads, rope=c.rope_base if c.positions == "rope" else None,
    )  # fmt: skip


CONFIGS = [
    dict(), dict(dc_rank=1), dict(dc_rank=3, dc_static=True), dict(dc_pre=False), dict(dc_post=False),
    dict(dc_query_side=False), dict(dc_key_side=False, dc_gates=False),
    dict(n_kv_heads=2, attention_bias=True),
    dict(dc_query_side=False, dc_key_side=False, dc_static=True), dict(qk_norm=True), dict(d_head=6),
    dict(windows=(2, None)), dict(windows=(3,), qk_norm=True, n_kv_heads=1), dict(causal=False),
    dict(causal=False, windows=(None, 2)), dict(positions="learned"), dict(positions="none", rope_base=3.0),
    dict(rope_base=7.0, n_heads=2), dict(attention_kernel="explicit", windows=(2,)), dict(d_mlp=0),
    dict(windows=(1, 2, 3), n_layers=4),
] + [MHA | changes for changes in (
    dict(windows=(2, None)), dict(windows=(2,), n_kv_heads=2, causal=False), dict(qk_norm=True),
    dict(qk_norm=True, windows=(None, 1), positions="none"), dict(d_mlp=0, attention_kernel="explicit"),
)]  # fmt: skip


MASKED = [
    (changes, mask)
    for changes in (dict(), dict(windows=(2, None)), dict(causal=False), LOCAL)
    for mask in (some_mask(T, T), some_mask(B, T, T))
]


@pytest.mark.parametrize("changes, mask", [(changes, None) for changes in CONFIGS] + MASKED)
def test_every_layer_is_the_equation_on_the_stream_it_reads(changes, mask, oracle):
    model, checked = transformer(**changes), 0
    trace = model.trace(prompts(), mask=mask, read=TAPS)
    for l, layer in enumerate(model.layers):
        x = layer.attention_norm(trace.residual[l])
        expected = oracle(layer.attention, x, mask=mask, **settings(model.config, l))
        torch.testing.assert_close(trace.attention_out[l], expected.out, **CLOSE)
        torch.testing.assert_close(trace.attention_weight[l], expected.weight, **CLOSE)
        written = trace.attention_out[l] + trace.mlp_out[l]
        torch.testing.assert_close(trace.residual[l + 1], trace.residual[l] + written, **CLOSE)
        a, m = model.run_layer(l, trace.residual[l], mask=mask)
        torch.testing.assert_close(a, trace.attention_out[l], **CLOSE)
        torch.testing.assert_close(m, trace.mlp_out[l], **CLOSE)
        checked += 1
    assert checked == model.config.n_layers
    torch.testing.assert_close(model(prompts(), mask=mask), trace.logits, **CLOSE)  # the fast computation


def test_the_weights_that_a_trace_shows_are_composed():
    trace = transformer().trace(prompts(), read="attention_weight")
    weight = trace.attention_weight
    assert weight.shape == (L, B, H, T, T) and weight.triu(1).eq(0).all()
    assert weight.min() < 0 and (weight.sum(dim=-1) - 1).abs().max() > 0.1  # no longer a distribution
    plain = transformer(dc_pre=True, dc_post=False).trace(prompts(), read="attention_weight").attention_weight
    torch.testing.assert_close(plain.sum(dim=-1), torch.ones(L, B, H, T).double(), **CLOSE)


@pytest.mark.parametrize("windows", [(None,), (1, 3), (2,), (None, None, 4)])
@pytest.mark.parametrize("attention", ["mha", "dcmha"])
def test_each_layer_reads_its_window_and_the_pattern_repeats(windows, attention):
    model = transformer(attention=attention, windows=windows, n_layers=5)
    weight = model.trace(prompts(9), read="attention_weight").attention_weight
    i, j = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    for l in range(5):
        window = windows[l % len(windows)] or 9
        near = (j <= i) & (i - j < window)
        assert weight[l][..., near].ne(0).all() and weight[l][..., ~near].eq(0).all()


@pytest.mark.parametrize("rows", [slice(3, None), slice(-1, None), torch.tensor([4, 0, 4])])
@pytest.mark.parametrize("mask", [None, some_mask(B, T, T)])
@pytest.mark.parametrize("changes", [dict(), dict(windows=(2,)), dict(causal=False), LOCAL])
def test_chosen_rows_are_those_of_the_full_pass(rows, mask, changes):
    model = transformer(**changes)
    for read in (TAPS, ("residual",)):  # read explicitly, and computed by the fast path
        full, part = (model.trace(prompts(), mask=mask, read=read, rows=which) for which in (None, rows))
        torch.testing.assert_close(part.logits, full.logits[:, rows], **CLOSE)
        for name in read:
            torch.testing.assert_close(getattr(part, name), getattr(full, name)[..., rows, :], **CLOSE)


@pytest.mark.parametrize("edits", [
    [Skip(0)], [Skip(1, "attention")], [Skip(0, "mlp", tokens=torch.arange(T) > 2)], [Swap(0, 1)],
    [Erase(0, torch.ones(D), tokens=torch.arange(T) == 2)],
], ids=repr)  # fmt: skip
def test_interventions_act_on_composed_layers(edits):
    model = transformer(windows=(2, None))
    trace = model.trace(prompts(), interventions=edits)
    h, edit = model.embed(prompts()), edits[0]
    for l in range(L):  # by hand, from the sublayers
        a, m = model.run_layer(1 - l if isinstance(edit, Swap) else l, h)
        if isinstance(edit, Skip) and edit.layer == l:
            chosen = edit.tokens if edit.tokens is not None else torch.ones(T, dtype=torch.bool)
            a = a.masked_fill(chosen[:, None], 0) if edit.sublayer in (None, "attention") else a
            _, m = (a, model.layers[l].mlp(model.layers[l].mlp_norm(h + a)))
            m = m.masked_fill(chosen[:, None], 0) if edit.sublayer in (None, "mlp") else m
        h = h + a + m
        if isinstance(edit, Erase) and edit.layer == l:
            h = torch.where(edit.tokens[:, None], edit.value.double(), h)
    torch.testing.assert_close(trace.logits, model.readout(h), **CLOSE)
    assert (trace.logits - model(prompts())).abs().max() > 1e-3
    same = model.trace(prompts(), interventions=[Replace(1, lambda h: h)]).logits
    torch.testing.assert_close(same, model.trace(prompts(), interventions=[Skip(1)]).logits, **CLOSE)


def test_later_tokens_reach_earlier_logits_only_in_a_bidirectional_model():
    changed = prompts()
    changed[:, 3:] = (changed[:, 3:] + 1) % V
    for causal in (True, False):
        model = transformer(causal=causal)
        moved = (model(prompts()) - model(changed)).abs()[:, :3].max()
        assert (moved < 1e-12) == causal and (moved > 1e-4) != causal


# The bridge to plain attention


@pytest.mark.parametrize("changes", [dict(), dict(windows=(2, None)), dict(qk_norm=True, n_kv_heads=2)])
def test_static_talking_heads_without_a_static_matrix_are_plain_attention(changes):
    plain = transformer(attention="mha", **changes)
    static = transformer(dc_query_side=False, dc_key_side=False, dc_static=True, **changes)
    missing = static.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    names = {f"layers.{l}.attention.{stage}.W_b" for l in range(L) for stage in ("pre", "post")}
    assert set(missing.missing_keys) == names
    with torch.no_grad():
        for name in names:
            static.get_parameter(name).zero_()
    ours, theirs = (model.trace(prompts(), read=TAPS) for model in (static, plain))
    for name in TAPS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        static.layers[0].attention.post.W_b[0, 1] = 0.1
    assert (static(prompts()) - ours.logits).abs().max() > 1e-4


def test_a_fresh_model_is_near_plain_attention_but_not_on_it():
    config = TransformerConfig(**SMALL | dict(d_model=32, d_mlp=None, attention="dcmha"))
    model = Transformer(config, seed=0)
    plain = Transformer(dataclasses.replace(config, attention="mha"), seed=1)
    plain.load_state_dict(model.state_dict(), strict=False)
    change = (model(prompts()) - plain(prompts())).norm() / plain(prompts()).norm()
    assert 1e-5 < change < 0.03


# Weights


@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("static", [True, False])
def test_composition_adds_the_parameters_of_the_formula(R, static):
    plain = Transformer(TransformerConfig(**SMALL), seed=0).n_parameters()
    config = TransformerConfig(**SMALL, attention="dcmha", dc_rank=R, dc_static=static)
    composed = Transformer(config, seed=0).n_parameters()
    a_layer = 4 * (D * 2 * R * H + (2 * R * H) ** 2 + D * H) + (2 * H**2 if static else 0)
    assert composed - plain == L * a_layer


def test_the_seed_decides_all_weights_and_the_first_draw_has_the_published_scales():
    shape = dict(vocab=V, d_model=64, n_heads=8)
    config = TransformerConfig(**shape, attention="dcmha", dc_static=True, qk_norm=True)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    model = Transformer(config, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.weights_hash() == Transformer(config, seed=5).weights_hash()
    assert model.weights_hash() != Transformer(config, seed=6).weights_hash()
    K, checked = 32, 0
    std = {"W_1": (2 / (64 + K)) ** 0.5, "W_2": 0.01 / (8**0.5 * 10), "W_g": 0.005 * (2 / 72) ** 0.5}
    for name, weight in model.named_parameters():
        found = re.search(r"attention\.(pre|post)\.(query|key)\.(W_.)", name)
        if found:  # at least 512 draws: a standard error of 3 %, here 5 of them
            assert abs(weight.std() / std[found[3]] - 1) < 0.16, name
            checked += 1
        elif "W_b" in name or "_norm" in name:
            assert weight.eq(1 if "norm" in name else 0).all()
    assert checked == 2 * 12
    zeros = Transformer(config, seed=5, init="zeros").state_dict()
    assert all(weight.eq(0).all() for name, weight in zeros.items() if "norm" not in name)


@pytest.mark.parametrize("changes", [dict(), dict(dc_rank=3), dict(dc_pre=False, dc_static=True)])
def test_with_one_seed_all_arms_of_a_comparison_start_from_the_same_plain_weights(changes):
    plain = Transformer(TransformerConfig(**SMALL, qk_norm=True), seed=5).state_dict()
    composed = Transformer(TransformerConfig(**SMALL, qk_norm=True, attention="dcmha", **changes), seed=5)
    extra = set(composed.state_dict()) - set(plain)
    assert extra and all(re.match(r"layers\.\d\.attention\.(pre|post)\.", name) for name in extra)
    for name, weight in plain.items():
        assert torch.equal(composed.state_dict()[name], weight), name


def test_every_weight_gets_a_gradient_through_the_model():
    model = transformer(dc_static=True, qk_norm=True, attention_bias=True, windows=(3, None))
    model(prompts()).logsumexp(dim=-1).mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().max() > 1e-9, name


def test_a_model_loads_what_it_saved(tmp_path):
    model, other = (transformer(seed=seed, dc_static=True, qk_norm=True) for seed in (0, 1))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(prompts()), model(prompts()))


# Configurations


@pytest.mark.parametrize("changes", [dict(), dict(windows=(256, None)), dict(windows=[3], dc_gates=False)])
def test_a_config_survives_json(changes):
    config = TransformerConfig(**SMALL | dict(attention="dcmha", qk_norm=True) | changes)
    again = TransformerConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config) and isinstance(again.windows, tuple)


@pytest.mark.parametrize("changes, message", [
    (dict(attention="dmha"), "unknown attention 'dmha'; did you mean '(dcmha|mha)'"),
    (dict(dc_query_side=False, dc_key_side=False), "dc_query_side, dc_key_side or dc_static"),
    (dict(dc_rank=0), "dc_rank must be a whole number of at least 1, got 0"),
    (dict(windows=()), "windows must name at least one"),
    (dict(windows=(0,)), "window must be a whole number of at least 1, got 0"),
    (dict(windows=(None, "G")), "window must be a whole number of at least 1, got 'G'"),
    (dict(windows=256), "windows.*256"),
    (dict(windows="LG"), "window.*'L"),
    (dict(d_head=3), "head width must be even"),
    (dict(dc_pre=False, dc_post=False), "dc_pre.*dc_post"),
    (dict(attention="mha", dc_rank=3), "dc_rank would have no effect"),
    (dict(attention="mha", dc_pre=False), "dc_pre would have no effect"),
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SMALL | dict(attention="dcmha") | changes)


@pytest.mark.parametrize("attention", ["mha", "dcmha"])
def test_a_row_that_the_window_leaves_nothing_is_refused_or_reads_nothing(attention):
    model, mask = transformer(attention=attention, windows=(1,)), torch.zeros(T, T, dtype=torch.bool)
    mask[:, 0] = True  # token 0 only, which a window of one token hides from all others
    for read in ((), TAPS):
        try:
            logits = model.trace(prompts(), mask=mask, read=read).logits
        except ValueError as error:
            assert "may read nothing" in str(error)
        else:
            assert logits.isfinite().all()


@pytest.mark.parametrize("changes", [dict(), MHA | dict(windows=(3,)), MHA | dict(qk_norm=True)])
def test_code_that_knows_plain_attention_only_refuses_the_rest(changes):
    model = transformer(activation="relu", positions="none", **changes)
    assert not model.config.plain and transformer(attention="mha").config.plain
    ones = torch.ones(L, H)
    with pytest.raises(ValueError, match="plain attention"):
        QuantisedDecoder(model, Precision(), longest=5, top=ones, step=ones)
