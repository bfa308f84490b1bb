"""Contributions and cosines against loops over tokens in plain floats, and the facts' pitfalls (C.3)."""

import math
import os
import subprocess
import sys

import pytest
import torch

from lib.metrics.depth import (
    PerPrompt,
    contributions_and_cosines,
    relative_contributions,
    sublayer_cosines,
)
from lib.metrics.depth.contributions import random_walk_ratio, walk
from lib.metrics.depth.pooled import Pool, relative
from lib.models import pretrained
from lib.models.transformer import Transformer, TransformerConfig

L, D, V = 3, 8, 11
RATIOS, COSINES = ("attention", "mlp", "layer"), ("attention", "mlp", "layer", "neighbours")


def small(*, seed=0, dtype=torch.float64, scale=0.3, **changes):
    shape = dict(vocab=V, d_model=D, n_heads=2, n_kv_heads=1, n_layers=L, d_mlp=8, activation="swiglu")
    model = Transformer(TransformerConfig(**shape | changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return model.to(dtype)


def prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (T,), generator=generator) for T in lengths]


def norm(x):
    return math.sqrt(sum(v * v for v in x))


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / (norm(x) * norm(y))


def by_hand(model, prompt, leave_out=0):
    """Every measure: (layer) -> list of one value a token, from the taps, in plain floats."""
    trace = model.trace(prompt[None])
    h, a, m = (x[:, 0, leave_out:].tolist() for x in (trace.residual, trace.attention_out, trace.mlp_out))
    add = lambda x, y: [u + v for u, v in zip(x, y, strict=True)]  # noqa: E731
    ratios = {name: [[] for _ in range(L)] for name in RATIOS}
    cosines = {name: [[] for _ in range(L)] for name in COSINES}
    for l in range(L):
        for h_t, a_t, m_t, next_t in zip(h[l], a[l], m[l], h[l + 1], strict=True):
            middle, both = add(h_t, a_t), add(a_t, m_t)
            for name, x, y in (("attention", a_t, h_t), ("mlp", m_t, middle), ("layer", both, h_t)):
                ratios[name][l].append(norm(x) / norm(y))
                cosines[name][l].append(cosine(x, y))
            cosines["neighbours"][l].append(cosine(h_t, next_t))
    return ratios, cosines, [[norm(x) for x in tap] for tap in h]


def median(values):
    s = sorted(values)
    return (s[(len(s) - 1) // 2] + s[len(s) // 2]) / 2


@pytest.mark.parametrize("changes", [{}, {"causal": False, "norm": "layer"}, {"norm": "none", "scale": 0.1}])
@pytest.mark.parametrize("leave_out", [0, 2])
def test_every_measure_is_its_definition_token_by_token(changes, leave_out):
    model, checked = small(**changes), 0
    tokens = prompts(5, 8, 5, 6)
    ratios, cosines = contributions_and_cosines(model, tokens, leave_out=leave_out, batch_size=2)
    expected = [by_hand(model, prompt, leave_out) for prompt in tokens]
    for place, found, names in ((0, ratios, RATIOS), (1, cosines, COSINES)):
        for name in names:
            got = getattr(found, name)
            for i, one in enumerate(expected):
                for l in range(L):
                    values = one[place][name][l]
                    want = {"peak": max(values), "mean": sum(values) / len(values), "median": median(values)}
                    for pool, value in want.items():
                        assert got.read(pool)[i, l] == pytest.approx(value, rel=1e-10, abs=1e-12)
                        checked += 1
            every = [sum((one[place][name][l] for one in expected), []) for l in range(L)]
            means = torch.tensor([sum(x) / len(x) for x in every], dtype=torch.float64)
            torch.testing.assert_close(got.average(), means)  # over tokens, not over prompts
    assert checked == 4 * L * 7 * 3
    for i, one in enumerate(expected):
        torch.testing.assert_close(ratios.norm.mean[i], torch.tensor(one[2], dtype=torch.float64).mean(dim=1))


def test_a_mean_of_ratios_is_not_a_ratio_of_means():
    model, tokens = small(), prompts(7)
    trace = model.trace(tokens[0][None])
    of_means = trace.attention_out[:, 0].norm(dim=-1).mean(-1) / trace.residual[:-1, 0].norm(dim=-1).mean(-1)
    assert (relative_contributions(model, tokens).attention.average() - of_means).abs().min() > 1e-3


def test_half_precision_is_measured_in_float32():
    tokens = prompts(6)
    fine, coarse = (relative_contributions(small(dtype=d), tokens) for d in (torch.float64, torch.bfloat16))
    assert (coarse.layer.mean / fine.layer.mean - 1).abs().max() < 0.2
    x = torch.full((1, 300), 200.0, dtype=torch.float16)  # the sum of squares overflows in float16
    assert relative(x, x, 1e-6).item() == pytest.approx(1.0)


def test_a_zero_denominator_is_clamped_and_a_zero_vector_has_cosine_zero():
    model = small(norm="none", positions="none")
    with torch.no_grad():
        model.embedding.weight.zero_()
    ratios, cosines = contributions_and_cosines(model, prompts(4), clamp=0.5)
    trace = model.trace(prompts(4)[0][None])
    assert trace.residual[0].eq(0).all() and trace.mlp_out[0].abs().max() > 0
    torch.testing.assert_close(ratios.layer.peak[0, 0], trace.mlp_out[0, 0].norm(dim=-1).max() / 0.5)
    assert cosines.layer.peak[0, 0] == 0 and cosines.attention.mean[0, 0] == 0


def test_a_stream_that_only_grows_in_its_own_direction_has_cosine_one_and_one_that_shrinks_minus_one():
    for sign in (1.0, -1.0):
        model = small(norm="none", activation="relu", d_mlp=2 * D, positions="none", mlp_bias=False)
        eye = torch.eye(D, dtype=torch.float64)
        with torch.no_grad():
            for layer in model.layers:  # attention 0; mlp(h) = sign * 0.5 * (relu(h) - relu(-h))
                layer.attention.W_O.weight.zero_()
                layer.mlp.W_1.weight.copy_(torch.cat([eye, -eye]))
                layer.mlp.W_2.weight.copy_(sign * 0.5 * torch.cat([eye, -eye], dim=1))
        ratios, cosines = contributions_and_cosines(model, prompts(5))
        torch.testing.assert_close(ratios.mlp.mean, torch.full((1, L), 0.5, dtype=torch.float64))
        torch.testing.assert_close(cosines.layer.mean, torch.full((1, L), sign, dtype=torch.float64))
        torch.testing.assert_close(cosines.neighbours.mean, torch.ones(1, L, dtype=torch.float64))


def test_a_contribution_is_read_before_it_is_added_to_the_stream():
    """C.3 #8: with zero attention output its contribution is 0; a residual-added tap would give 1."""
    model = small()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.W_O.weight.zero_()
    found = relative_contributions(model, prompts(5))
    assert found.attention.peak.eq(0).all() and found.mlp.mean.min() > 0
    torch.testing.assert_close(found.layer.mean, found.mlp.mean)


def test_every_tap_of_the_walk_has_one_shape_and_the_last_gives_the_logits():
    """C.3 #3 and #10."""
    model, batch = small(), torch.stack(prompts(5, 5))
    steps = list(walk(model, batch))
    assert [step[0] for step in steps] == list(range(L + 1))
    assert all(x.shape == (2, 5, D) for step in steps[:-1] for x in step[1:])
    assert steps[-1][2] is None and steps[-1][3] is None
    torch.testing.assert_close(model.readout(steps[-1][1]), model(batch))


@pytest.mark.slow
def test_importing_the_metrics_needs_no_network_environment_variable_or_heavy_package():
    """C.3 #1 and #2: in a bare process, with sockets forbidden."""
    code = (
        "import sys, socket\n"
        "def no(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = no\n"
        "import lib.metrics.depth as d\n"
        "bad = {'transformers', 'nnsight', 'huggingface_hub', 'matplotlib'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "assert all(hasattr(d, name) for name in d.__all__) and len(d.__all__) > 20\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_pooling_keeps_the_largest_the_mean_and_the_median_of_each_prompt():
    pool = Pool(2, 1)
    pool.put((0, 0), torch.tensor([3.0, 1.0, 2.0, 10.0]))
    pool.put((1, 0), torch.tensor([5.0]))
    found = pool.result("this")
    assert found.peak.flatten().tolist() == [10, 5] and found.mean.flatten().tolist() == [4, 5]
    assert found.median.flatten().tolist() == [2.5, 5] and found.count.tolist() == [4, 1]
    assert found.max().item() == 10 and found.average().item() == pytest.approx(21 / 5)
    assert found.average("peak").item() == 7.5 and found.quantile(0.5).item() == 7.5


def test_the_interval_of_every_cell_is_the_bootstrap_of_its_prompts():
    values = torch.rand(12, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = PerPrompt(values, values, values, torch.ones(12, dtype=torch.long))
    lo, hi = found.interval(seed=0)
    middle = values.quantile(0.5, dim=0)
    assert (
        lo.shape == hi.shape == (2, 3) and (lo <= middle).all() and (middle <= hi).all() and (lo < hi).all()
    )
    assert found.interval(seed=0)[0, 1, 2] == lo[1, 2] and found.max()[1, 2] == values[:, 1, 2].max()
    with pytest.raises(ValueError, match="at least 3"):
        PerPrompt(*[values[:2]] * 3, torch.ones(2)).interval(seed=0)
    with pytest.raises(ValueError, match="unknown pooling 'maen'; did you mean 'mean'"):
        found.max("maen")


@pytest.mark.parametrize("measure", [relative_contributions, sublayer_cosines])
@pytest.mark.parametrize("tokens, message", [
    ([], "no prompts"),
    (torch.zeros(0, 4, dtype=torch.long), "no prompts"),
    ([torch.zeros(0, dtype=torch.long)], "prompt 0"),
    (torch.zeros(4, dtype=torch.long), "prompts"),
    ([torch.zeros(4)], "torch.long"),
    ([torch.tensor([0, V])], "vocabulary"),
])  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(measure, tokens, message):
    with pytest.raises(ValueError, match=message):
        measure(small(), tokens)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="leave_out=4 tokens of a prompt of 4; allowed: 0 to 3"):
        relative_contributions(small(), prompts(6, 4), leave_out=4)
    with pytest.raises(ValueError, match="clamp"):
        relative_contributions(small(), prompts(4), clamp=0.0)
    with pytest.raises(ValueError, match="batch_size"):
        relative_contributions(small(), prompts(4), batch_size=0)


@pytest.mark.parametrize("layer", range(L))
def test_a_model_that_gives_nan_is_refused_and_the_layer_named(layer):
    model = small()
    with torch.no_grad():
        model.layers[layer].mlp.W_2.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"after layer {layer} is not finite"):
        sublayer_cosines(model, prompts(4))


@pytest.mark.slow
@pytest.mark.skipif(not pretrained.available("smollm2-135m"), reason="fetch it with `make models`")
def test_the_taps_of_smollm2_give_finite_contributions_that_are_small_in_the_middle():
    model = pretrained.load("smollm2-135m")
    tokens = torch.randint(1000, 20_000, (1, 24), generator=torch.Generator().manual_seed(0))
    ratios, cosines = contributions_and_cosines(model, tokens)
    middle = ratios.layer.median[0]
    assert ratios.layer.mean.shape == (1, 30) and middle[0] > 4 * middle[15] > 0
    assert cosines.neighbours.median[0, 5:-2].min() > 0.7  # measured: 0.78 at layer 24


def test_random_steps_shrink_relative_to_the_stream_as_the_null_model_says():
    """In high dimension random directions are nearly orthogonal: no expectation is needed."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(13, 100_000, generator=generator, dtype=torch.float64)
    steps = steps / steps.norm(dim=1, keepdim=True)
    stream = 3 * steps[0]
    for l, step in enumerate(steps[1:]):
        expected = random_walk_ratio(l, embedding=3, contribution=1)
        assert float(step.norm() / stream.norm()) == pytest.approx(expected, rel=0.02)
        stream = stream + step
    with pytest.raises(ValueError, match="a stream that is not 0"):
        random_walk_ratio(0, embedding=0, contribution=1)
