"""Lens, early exits and integrated gradients against slow definitions in float64, one token at a time."""

import math

import pytest
import torch

from lib.metrics.depth.gradients import integrated_gradients
from lib.metrics.depth.lens import MEASURES, early_exit, logit_lens
from lib.models import pretrained
from lib.models.transformer import Replace, Transformer, TransformerConfig

V, D, L, T = 11, 12, 4, 9


def model_of(*, seed=0, dtype=torch.float64, **changes):
    """Small and random, with weights and norm scales large enough that every layer matters."""
    config = TransformerConfig(**dict(vocab=V, d_model=D, n_heads=3, n_layers=L, n_kv_heads=1) | changes)
    model = Transformer(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3)
            if name.startswith("norm"):  # a sharp output: entries differ
                weight.mul_(2)
    return model.to(dtype)


def prompts(*shape, seed=3):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def softmax(logits):
    top = max(logits)
    p = [math.exp(x - top) for x in logits]
    return [x / sum(p) for x in p]


def best_entries(p, k):
    return sorted(range(len(p)), key=lambda v: -p[v])[:k]


# The lens


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "layer", "tied": True}, {"causal": False, "readout_bias": True}]
)
def test_every_measure_is_its_definition(changes):
    model, tokens, k = model_of(**changes), prompts(2, T), 3
    lens = logit_lens(model, tokens, k=k, batch_size=1, logits_at_once=3 * V)
    trace, n = model.trace(tokens), 0
    for b in range(2):
        for t in range(T - 1):
            y = softmax(trace.logits[b, t].tolist())
            for l in range(L + 1):
                p = softmax(model.readout(trace.residual[l, b, t]).tolist())
                expected = {
                    "kl": sum(u * math.log(u / w) for u, w in zip(p, y, strict=True)),
                    "kl_reverse": sum(w * math.log(w / u) for u, w in zip(p, y, strict=True)),
                    "overlap": len(set(best_entries(p, k)) & set(best_entries(y, k))) / k,
                    "entropy": -sum(u * math.log(u) for u in p),
                    "confidence": max(p),
                    "target_log_probability": math.log(p[tokens[b, t + 1]]),
                }
                assert expected.keys() == set(MEASURES)
                for name, value in expected.items():
                    assert getattr(lens, name)[l, n].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name
            assert (lens.prompt[n], lens.row[n], lens.target[n]) == (b, t, tokens[b, t + 1])
            n += 1
    assert lens.kl.shape == (L + 1, n)


def test_the_last_tap_is_the_output_of_the_model():
    model, tokens = model_of(), prompts(3, T)
    lens = logit_lens(model, tokens)
    logp = model(tokens).log_softmax(-1)[:, :-1]
    told = logp.gather(-1, tokens[:, 1:, None]).flatten()
    torch.testing.assert_close(lens.target_log_probability[-1], told, rtol=0, atol=1e-12)
    assert lens.kl[-1].eq(0).all() and lens.kl_reverse[-1].eq(0).all() and lens.overlap[-1].eq(1).all()
    assert lens.kl[:-1].min() > 0 and lens.kl_reverse[:-1].min() > 0, "other taps differ"


def test_each_tap_is_normalised_by_its_own_statistics():
    """C.3 #9: a lens that reuses the scale of the last layer would be another one."""
    model, tokens = model_of(), prompts(1, T)
    lens, streams = logit_lens(model, tokens, targets="top"), model.trace(tokens).residual
    last_scale = streams[-1].square().mean(-1, keepdim=True).add(model.config.norm_eps).rsqrt()
    wrong = model.W_U(streams[1] * last_scale * model.norm.weight).softmax(-1)
    assert (lens.confidence[1] - wrong.max(-1).values[0]).abs().max() > 0.01
    scaled = model.readout(streams[1] * 7.0).softmax(-1).max(-1).values[0]  # RMS norm ignores a common factor
    torch.testing.assert_close(lens.confidence[1], scaled, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [slice(-3, None), torch.tensor([0, 4]), slice(1, 8, 2)])
def test_rows_and_chunks_change_nothing_but_what_is_read(rows):
    model, tokens = model_of(), prompts(3, T)
    every = logit_lens(model, tokens, targets="top")
    some = logit_lens(model, tokens, rows=rows, targets="top", batch_size=2, logits_at_once=1)
    chosen = torch.isin(every.row, torch.arange(T)[rows])
    for name in MEASURES:
        expected = getattr(every, name)[:, chosen]
        torch.testing.assert_close(getattr(some, name), expected, rtol=1e-9, atol=1e-12)
    assert some.row.tolist() == every.row[chosen].tolist()


def test_prompts_of_several_lengths_keep_their_order():
    model, tokens = model_of(), [prompts(5, seed=1), prompts(7, seed=2), prompts(5, seed=3)]
    together = logit_lens(model, tokens)
    alone = [logit_lens(model, prompt[None]) for prompt in tokens]
    apart = torch.cat([lens.kl for lens in alone], dim=1)
    torch.testing.assert_close(together.kl, apart, rtol=1e-9, atol=1e-12)
    assert together.prompt.tolist() == [0] * 4 + [1] * 6 + [2] * 4
    for i, lens in enumerate(alone):
        torch.testing.assert_close(together.per_prompt("entropy")[:, i], lens.mean("entropy"))
    lo, hi = together.interval("entropy", seed=0)
    mean = together.per_prompt("entropy").mean(dim=1)
    assert ((lo <= mean + 1e-9) & (mean <= hi + 1e-9)).all() and (lo < hi).all()
    assert (together.quantile("kl", 0.5)[:-1] > 0).all()


def test_the_target_is_what_is_asked_for():
    model, tokens = model_of(), prompts(2, T)
    asked = prompts(2 * T, seed=8)
    lens = logit_lens(model, tokens, targets=asked)
    expected = model(tokens).log_softmax(-1).flatten(0, 1).gather(1, asked[:, None])[:, 0]
    torch.testing.assert_close(lens.target_log_probability[-1], expected, rtol=1e-10, atol=1e-12)
    top = logit_lens(model, tokens, targets="top")
    assert top.target.tolist() == model(tokens).argmax(-1).flatten().tolist()
    assert torch.equal(top.target_log_probability[-1].exp(), top.confidence[-1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_is_read_in_float32(dtype, tolerance):
    tokens = prompts(2, T)
    exact, low = logit_lens(model_of(), tokens), logit_lens(model_of(dtype=dtype), tokens)
    assert low.kl.dtype == torch.float32 and low.kl[-1].eq(0).all()
    assert (low.kl.double() - exact.kl).abs().mean() < tolerance  # bfloat16: 3 digits in every layer


def test_a_model_that_does_nothing_is_settled_from_the_start():
    model = Transformer(TransformerConfig(vocab=V, d_model=D, n_heads=3, n_layers=2), seed=0)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.W_O.weight.zero_()
            layer.mlp.W_2.weight.zero_()
    lens = logit_lens(model, prompts(2, T), k=1)
    assert lens.kl.abs().max() == 0 and lens.overlap.eq(1).all()


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        ([], {}, "no prompts"),
        (torch.zeros(0, 5, dtype=torch.long), {}, "no prompts"),
        ([torch.zeros(0, dtype=torch.long)], {}, "prompt 0"),
        (torch.zeros(2, 5), {}, "torch.long"),
        (prompts(T), {}, r"\(B, T\)"),
        (prompts(2, 1), {}, "no next token"),
        (prompts(2, T), {"rows": slice(-1, None)}, "last token of prompt 0"),
        (prompts(2, T), {"rows": torch.tensor([T])}, "rows must select"),
        (prompts(2, T), {"targets": "gold"}, "unknown target 'gold'"),
        (prompts(2, T), {"targets": torch.zeros(3, dtype=torch.long)}, rf"\({2 * T},\)"),
        (prompts(2, T), {"targets": torch.full((2 * T,), V)}, "readout"),
        (prompts(2, T), {"k": V + 1}, f"1 to {V}"),
        (prompts(2, T), {"batch_size": 0}, "batch_size"),
        (prompts(2, T) + V, {}, "vocabulary"),
    ],
)
def test_what_does_not_fit_the_lens_is_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(model_of(), tokens, **options)


def test_an_unknown_measure_names_the_others():
    with pytest.raises(ValueError, match="overlap"):
        logit_lens(model_of(), prompts(1, T)).mean("overlpa")


@pytest.mark.parametrize(
    "measure",
    [logit_lens, lambda m, x: early_exit(m, x, [2.0]), lambda m, x: integrated_gradients(m, x[0], x[0])],
    ids=["lens", "early exit", "integrated gradients"],
)
def test_a_model_of_nan_is_refused(measure):
    model = model_of()
    with torch.no_grad():
        model.layers[2].mlp.W_1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        measure(model, prompts(2, T))


@pytest.mark.slow
@pytest.mark.skipif(
    not pretrained.available("smollm2-135m"), reason="SmolLM2 is not here; `make models` fetches it"
)
def test_the_lens_of_smollm2_ends_at_its_output():
    model, tokenizer = pretrained.load("smollm2-135m"), pretrained.load_tokenizer("smollm2-135m")
    text = "Water boils at one hundred degrees. The kettle on the stove begins to sing."
    tokens = torch.tensor([tokenizer.encode(text).ids])
    lens = logit_lens(model, tokens, rows=slice(-6, -1))
    with torch.no_grad():
        logp = model(tokens)[0].log_softmax(-1)[-6:-1]
    told = logp.gather(1, tokens[0, -5:, None])[:, 0]
    torch.testing.assert_close(lens.target_log_probability[-1], told, rtol=0, atol=1e-3)
    kl = lens.mean("kl")
    assert kl[-1] == 0 and kl[25:30].mean() < 0.7 * kl[5:15].mean(), "predictions settle late"
    assert lens.mean("overlap")[1:10].max() < lens.mean("overlap")[26:30].min()


# Early exits


def written_out_exit(model, prompt, level, taps):
    """The frozen scheme for one prompt, token by token in every layer: (exit, loss, best) of each."""
    n, left = len(prompt), {}
    h = model.embed(prompt[None])
    for l in range(L + 1):
        for t in range(n - 1):
            p = model.readout(h[0, t]).softmax(-1)
            if t not in left and (l == L or (l in taps and p.max() >= level)):
                left[t] = (l, -p[prompt[t + 1]].log().item(), int(p.argmax()))
        if l < L:
            a, m = model.run_layer(l, h)
            new = h.clone()
            for t in range(n):
                if t not in left:
                    new[0, t] = (h + a + m)[0, t]
            h = new
    return [left[t] for t in range(n - 1)]


@pytest.mark.parametrize("exits", [None, (0, 2)])
def test_tokens_leave_as_in_the_written_out_scheme(exits):
    model, tokens, levels = model_of(), prompts(4, T), [0.2, 0.35, 0.5, 0.7]
    found = early_exit(model, tokens, levels, exits=exits, batch_size=3, logits_at_once=2 * V)
    taps = exits or range(1, L)
    for i, level in enumerate(levels):
        expected = [row for prompt in tokens for row in written_out_exit(model, prompt, level, taps)]
        assert found.exit_layer[i].tolist() == [row[0] for row in expected]
        assert found.loss[i].tolist() == pytest.approx([row[1] for row in expected], rel=1e-9)
        full = model(tokens).argmax(-1)[:, :-1].flatten().tolist()
        assert found.agrees[i].tolist() == [row[2] == y for row, y in zip(expected, full, strict=True)]
    assert len(set(found.exit_layer.flatten().tolist())) >= 3, "the thresholds tell tokens apart"


def test_the_ideal_scheme_reads_the_lens_of_the_whole_model():
    model, tokens, levels = model_of(), prompts(3, T), [0.25, 0.4, 0.6]
    found, lens = early_exit(model, tokens, levels, scheme="ideal"), logit_lens(model, tokens)
    for i, level in enumerate(levels):
        for n in range(lens.kl.shape[1]):
            left = next((l for l in range(1, L) if lens.confidence[l, n] >= level), L)
            assert found.exit_layer[i, n] == left
            assert found.loss[i, n].item() == pytest.approx(-lens.target_log_probability[left, n].item())
    assert not torch.equal(found.loss, early_exit(model, tokens, levels).loss), (
        "frozen states are not the ideal"
    )


@pytest.mark.parametrize("scheme", ["frozen", "ideal"])
def test_nobody_leaves_above_one_and_everybody_at_zero(scheme):
    model, tokens = model_of(), prompts(3, T)
    found = early_exit(model, tokens, [0.0, 1.5], exits=[2, 3], scheme=scheme)
    assert found.exit_layer[0].eq(2).all() and found.exit_layer[1].eq(L).all()
    told = -model(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).flatten()
    torch.testing.assert_close(found.loss[1], told, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.full_loss, told, rtol=1e-10, atol=0)
    table = found.table(seed=0)
    assert table.layers.tolist() == [2.0, L] and table.agreement[1] == 1 and table.added_nats[1] == 0
    assert table.lo[0] <= table.added_nats[0] <= table.hi[0] and table.flops[0] < 1 < table.flops[1]


@pytest.mark.parametrize("scheme, keeps", [("frozen", True), ("ideal", False)])
def test_every_product_of_a_token_is_counted(scheme, keeps):
    """By the shapes of the weights: matrices, attention over t + 1 tokens, readouts, keys and values."""
    model, tokens, exits = model_of(), prompts(2, T), (1, 3)
    found = early_exit(model, tokens, [0.45], exits=exits, scheme=scheme)
    names = dict(model.layers[0].named_parameters())
    matrices = sum(w.numel() for w in names.values() if w.dim() == 2)
    keys = sum(names[f"attention.W_{x}.weight"].numel() for x in "KV")
    heads, width = model.config.n_heads, model.config.head_width
    for n in range(found.loss.shape[1]):
        t, left = int(found.row[n]), int(found.exit_layer[0, n])
        layer = 2 * matrices + 2 * 2 * heads * width * (t + 1)  # scores, and their mix of values
        looks = sum(1 for tap in exits if tap <= left) + (left == L)
        expected = left * layer + looks * 2 * V * D + keeps * (L - left) * 2 * keys
        assert found.flops[0, n] == expected and found.full_flops[n] == L * layer + 2 * V * D
    assert len(set(found.exit_layer[0].tolist())) > 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"thresholds": []}, "one or more"),
        ({"thresholds": [-0.1]}, "at least 0"),
        ({"thresholds": [math.nan]}, "at least 0"),
        ({"thresholds": [0.5], "exits": [L]}, f"0 to {L - 1}"),
        ({"thresholds": [0.5], "scheme": "free"}, "unknown scheme 'free'"),
    ],
)
def test_exits_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        early_exit(model_of(), prompts(2, T), **options)
    with pytest.raises(ValueError, match="causal"):
        early_exit(model_of(causal=False), prompts(2, T), [0.5])


# Integrated gradients


def by_definition(model, prompt, answer, l, sublayer, steps):
    """Attribution (T,) by full passes with Replace, one point of the sum at a time."""
    sequence = torch.cat([prompt, answer])[None]
    trace = model.trace(sequence)
    x = {None: trace.residual[l + 1], "attention": trace.attention_out[l], "mlp": trace.mlp_out[l]}[sublayer]
    x = x[0].detach()
    b, total = sum(x[t] for t in range(len(x))) / len(x), torch.zeros_like(x)
    for i in range(steps):
        state = (b + i / steps * (x - b)).requires_grad_()
        edit = Replace(l, lambda h, s=state: s[None], sublayer)
        p = model.trace(sequence, interventions=[edit]).logits.softmax(-1)
        F = sum(p[0, len(prompt) - 1 + j, answer[j]] for j in range(len(answer)))
        total += torch.autograd.grad(F, state)[0]
    return torch.stack([((x - b) * total / steps)[t].sum() for t in range(len(x))])


@pytest.mark.parametrize("sublayer", [None, "attention", "mlp"])
def test_attributions_are_their_definition(sublayer):
    model, prompt, answer = model_of(), prompts(5), prompts(2, seed=9)
    found = integrated_gradients(model, prompt, answer, steps=5, sublayer=sublayer, batch=2)
    assert found.values.shape == (L, 7) and found.prompt_length == 5
    for l in range(L):
        expected = by_definition(model, prompt, answer, l, sublayer, 5)
        torch.testing.assert_close(found.values[l], expected, rtol=1e-9, atol=1e-14)
    p = model(torch.cat([prompt, answer])[None]).softmax(-1)[0]
    assert found.answer_value == pytest.approx((p[4, answer[0]] + p[5, answer[1]]).item(), rel=1e-12)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("sublayer", [None, "mlp"])
def test_attributions_sum_to_what_the_baseline_lacks_as_the_steps_grow(sublayer):
    model, prompt, answer = model_of(activation="gelu"), prompts(6), prompts(1, seed=9)  # smooth
    gap = {
        (rule, steps): integrated_gradients(
            model, prompt, answer, steps=steps, rule=rule, sublayer=sublayer, batch=64
        ).gap.abs()
        for rule in ("left", "midpoint")
        for steps in (128, 512)
    }
    moved = integrated_gradients(model, prompt, answer, steps=1, sublayer=sublayer)
    size = (moved.answer_value - moved.baseline_value).abs().max()
    assert gap["left", 512].max() < 0.01 * size and gap["midpoint", 512].max() < 1e-4 * size
    assert gap["left", 512].max() < gap["left", 128].max() / 3, "first order: a quarter"
    assert gap["midpoint", 512].max() < gap["midpoint", 128].max() / 10, "second order: a sixteenth"


def test_states_that_are_the_same_for_every_token_get_nothing():
    """C.3 #5: the baseline is the mean over tokens. Without positions, one token repeated is constant."""
    model = model_of(positions="none")
    found = integrated_gradients(model, torch.full((5,), 3), torch.tensor([3]), steps=4)
    assert found.values.abs().max() < 1e-12 < found.answer_value
    assert found.baseline_value.tolist() == pytest.approx([found.answer_value] * L)


def test_chosen_layers_and_batches_change_nothing():
    model, prompt, answer = model_of(), prompts(5), prompts(2, seed=9)
    every = integrated_gradients(model, prompt, answer, steps=6, batch=6)
    some = integrated_gradients(model, prompt, answer, steps=6, batch=4, layers=[3, 1])
    assert some.layers == (3, 1)
    torch.testing.assert_close(some.values, every.values[[3, 1]], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": torch.zeros(0, dtype=torch.long)}, "tokens must be"),
        ({"answer": torch.zeros(0, dtype=torch.long)}, "answer must be"),
        ({"answer": torch.zeros(2)}, "answer must be"),
        ({"answer": torch.tensor([V])}, "vocabulary"),
        ({"steps": 0}, "steps is at least 1"),
        ({"batch": 0}, "batch is at least 1"),
        ({"layers": [L]}, f"0 to {L - 1}"),
        ({"layers": []}, "one or more"),
        ({"sublayer": "norm"}, "unknown sublayer"),
        ({"rule": "right"}, "unknown rule"),
    ],
)
def test_what_cannot_be_attributed_is_refused(changes, message):
    arguments = dict(tokens=prompts(4), answer=prompts(1, seed=9)) | changes
    with pytest.raises(ValueError, match=message):
        integrated_gradients(model_of(), arguments.pop("tokens"), arguments.pop("answer"), **arguments)
