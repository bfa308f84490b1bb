"""The integer decoder against its formula in exact fractions; in the limit it is the Transformer itself."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from lib.metrics.bounds import accumulator_size
from lib.models.constructions.sequential import sequential_composition_decoder
from lib.models.quantised import Block, Precision, QuantisedDecoder, quantise, random_decoder
from lib.models.transformer import Transformer, TransformerConfig
from lib.tasks.composition import SequentialComposition

TASK = SequentialComposition(2, (2,))
FEW = Precision(weight_bits=3, value_bits=3, grid_bits=6)


def every_prompt():
    batch = next(TASK.all_inputs())
    return batch, TASK.tokens(batch)


def drawn(seed=0, precision=FEW, *, examples=20, **shape):
    model = random_decoder(vocab=9, tokens=7, **dict(layers=2, heads=2, d_head=2) | shape, seed=seed)
    tokens = torch.randint(9, (40, 7), generator=torch.Generator().manual_seed(seed))
    return model, tokens, quantise(model, tokens[:examples], precision)


def in_fractions(decoder, tokens):
    """States after the last layer for one prompt: loops over tokens, heads, coordinates; norm "none"."""
    c, f = decoder.config, decoder.precision.grid_bits
    q, top_value = decoder.precision.weight_bits, decoder.precision.largest_value
    W = {name: [[Fraction(x) for x in row] for row in w.tolist()] if w.dim() == 2
         else [Fraction(x) for x in w.tolist()] for name, w in decoder.model.state_dict().items()}

    def grid(x):
        return Fraction(round(Fraction(x) * 2**f), 2**f)             # round: half to even

    def linear(name, x):
        bias = W.get(f"{name}.bias", [0] * len(W[f"{name}.weight"]))
        return [sum(w * s for w, s in zip(row, x, strict=True)) + b
                for row, b in zip(W[f"{name}.weight"], bias, strict=True)]

    d = c.head_width
    h = [[grid(a + b) for a, b in zip(W["embedding.weight"][s], W["position.weight"][t], strict=True)]
         for t, s in enumerate(tokens)]
    for l in range(c.n_layers):
        name, new = f"layers.{l}", []
        query, key = ([[grid(x) for x in linear(f"{name}.attention.W_{p}", row)] for row in h] for p in "QK")
        value = [linear(f"{name}.attention.W_V", row) for row in h]
        for t, row in enumerate(h):
            mix = []
            for head in range(c.n_heads):
                at, step = slice(head * d, head * d + d), decoder.step[l, head].item()
                top = decoder.top[l, head].item()
                numerator, denominator = [0] * d, 0
                for s in range(t + 1):
                    dot = sum(a * b for a, b in zip(query[t][at], key[s][at], strict=True))
                    x = min(float(dot) / math.sqrt(d) - top, 0.0)
                    weight = math.floor(2**q * math.exp(x))
                    denominator += weight
                    for e in range(d):
                        v = round(float(value[s][head * d + e]) / step)
                        numerator[e] += weight * max(-top_value, min(top_value, v))
                mix += [grid(step * n / max(denominator, 1)) for n in numerator]
            middle = [a + grid(b) for a, b in zip(row, linear(f"{name}.attention.W_O", mix), strict=True)]
            hidden = [max(Fraction(0), u) for u in linear(f"{name}.mlp.W_1", middle)]
            out = linear(f"{name}.mlp.W_2", hidden)
            new.append([a + grid(b) for a, b in zip(middle, out, strict=True)])
        h = new
    return h


@pytest.mark.parametrize("seed", range(4))
def test_the_decoder_is_its_formula_in_exact_fractions(seed):
    _, tokens, decoder = drawn(seed)
    states = decoder.run(tokens[20:23]).h
    for prompt, h in zip(tokens[20:23].tolist(), states.tolist(), strict=True):
        expected = in_fractions(decoder, prompt)
        assert [[Fraction(x) for x in row] for row in h] == expected
        assert len({tuple(row) for row in expected}) == len(expected)


@pytest.mark.parametrize("seed", range(3))
def test_with_many_bits_the_decoder_comes_close_to_its_transformer(seed):
    many = Precision(weight_bits=16, value_bits=16, grid_bits=12)
    model, tokens, decoder = drawn(seed, many, examples=40, sharpness=0.01)
    softmax = model.double()(tokens)[:, -1].detach()
    assert (decoder(tokens) - softmax).abs().max() < 0.01 < softmax.std()       # grid 2^-12, two layers
    _, _, coarse = drawn(seed, Precision(weight_bits=0, value_bits=2), sharpness=0.01)
    assert (coarse(tokens) - softmax).abs().max() > 0.05


@pytest.mark.parametrize("weight_bits, p, Hdp", [(0, 4, 8), (1, 5, 10), (6, 10, 20)])
def test_the_built_decoder_is_right_on_all_4096_inputs_with_accumulators_of_few_bits(weight_bits, p, Hdp):
    batch, prompts = every_prompt()
    decoder = quantise(sequential_composition_decoder(TASK), prompts,
                       Precision(weight_bits=weight_bits, value_bits=2))
    assert len(prompts) == 4096
    assert (decoder(prompts).argmax(-1) == TASK.answer(batch)).all()
    assert (decoder.accumulator_bits, decoder.Hdp) == (p, Hdp)
    assert decoder.message_bits == 3 * p <= 2 * Hdp, "H = 1, two value coordinates and the denominator"


def test_without_one_layer_the_built_decoder_errs():
    batch, prompts = every_prompt()
    model = sequential_composition_decoder(TASK)
    with torch.no_grad():
        model.layers[1].attention.W_V.weight.zero_()
    decoder = quantise(model, prompts, Precision(weight_bits=0, value_bits=2))
    assert (decoder(prompts).argmax(-1) != TASK.answer(batch)).sum() > 1000


@pytest.mark.slow
@pytest.mark.parametrize("m, ns, p, Hdp", [(2, (2, 2), 5, 15), (2, (2,) * 4, 7, 35), (3, (3, 2), 6, 30)])
def test_the_built_decoder_is_right_on_random_inputs_of_larger_worlds(m, ns, p, Hdp):
    task = SequentialComposition(m, ns)
    batch = task.sample(60, seed=1)
    examples = task.tokens(task.sample(60, seed=2))
    decoder = quantise(sequential_composition_decoder(task), examples, Precision(weight_bits=0, value_bits=2))
    assert (decoder(task.tokens(batch)).argmax(-1) == task.answer(batch)).all()
    assert (decoder.accumulator_bits, decoder.Hdp) == (p, Hdp)


@pytest.mark.parametrize("weight_bits, value_bits", [(0, 2), (2, 3), (5, 6)])
def test_p_bits_are_what_the_largest_block_sum_needs(weight_bits, value_bits):
    _, _, decoder = drawn(precision=Precision(weight_bits=weight_bits, value_bits=value_bits))
    largest = (7 - 1) * 2**weight_bits * (2 ** (value_bits - 1) - 1)
    p = decoder.accumulator_bits
    assert 2 ** (p - 2) <= largest < 2 ** (p - 1)
    assert p == accumulator_size(6, weight_bits=weight_bits, value_bits=value_bits)
    assert p <= weight_bits + value_bits + math.ceil(math.log2(6)) + 1


def test_weights_are_integers_that_the_score_alone_fixes():
    _, tokens, decoder = drawn(3)
    block = decoder.embed(tokens)
    weight, value = decoder._attend(0, block, block)
    score = decoder._scores(0, block, block) - decoder.top[0][:, None, None]
    expected = (8 * score.clamp(max=0).exp()).floor().tril()
    assert (weight == expected).all() and weight.max() == 8, "the largest score has weight 2^q"
    assert (value == value.round()).all() and value.abs().max() == 3
    assert weight.triu(1).eq(0).all()


def test_a_late_block_cannot_be_read_by_an_early_one():
    _, tokens, decoder = drawn()
    early, late = decoder.embed(tokens[:, :3]), decoder.embed(tokens[:, 3:], start=3)
    assert decoder.sums(0, late, early).shape == (40, 4, 2, 3)
    with pytest.raises(ValueError, match="not their past"):
        decoder.sums(0, early, late)


def test_the_model_it_was_made_from_is_left_alone():
    model = random_decoder(vocab=9, tokens=7, layers=1, heads=1, d_head=2, seed=0)
    before = model.weights_hash()
    quantise(model, torch.zeros(2, 7, dtype=torch.long), FEW)
    assert model.weights_hash() == before and next(model.parameters()).requires_grad


@pytest.mark.parametrize("changes, message", [
    (dict(causal=False), "causal"), (dict(activation="gelu"), "activation='relu'")])
def test_models_outside_the_protocol_are_refused(changes, message):
    config = TransformerConfig(vocab=5, d_model=4, n_heads=2, n_layers=1, **changes)
    with pytest.raises(ValueError, match=message):
        quantise(Transformer(config, seed=0), torch.zeros(1, 4, dtype=torch.long), FEW)


def test_sums_that_float64_would_round_are_refused():
    model, tokens, decoder = drawn()
    with torch.no_grad():
        decoder.model.embedding.weight.mul_(1e9)
    with pytest.raises(ValueError, match="exceed the 53 bits"):
        decoder.run(tokens)
    with pytest.raises(ValueError, match="do not fit"):
        QuantisedDecoder(model, Precision(weight_bits=16, value_bits=24), longest=2**20,
                         top=torch.zeros(2, 2), step=torch.ones(2, 2))
    with pytest.raises(ValueError, match="one number a head"):
        QuantisedDecoder(model, FEW, longest=7, top=torch.zeros(1, 2), step=torch.ones(2, 2))
    with pytest.raises(ValueError, match="T <= 7"):
        decoder(torch.zeros(1, 8, dtype=torch.long))


@pytest.mark.parametrize("bits", [dict(weight_bits=-1), dict(value_bits=1), dict(grid_bits=20)])
def test_bits_that_cannot_be_are_refused(bits):
    with pytest.raises(ValueError, match=f"{next(iter(bits))} is an integer"):
        Precision(**bits)


def test_precision_and_blocks_say_what_they_hold():
    assert dataclasses.asdict(FEW) == {"weight_bits": 3, "value_bits": 3, "grid_bits": 6}
    assert FEW.largest_value == 3
    assert Block(torch.zeros(1, 4, 2), 3).places == slice(3, 7)
