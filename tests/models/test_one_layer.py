"""One softmax layer with named weights: both evaluators against a literal reading of the definition."""

import itertools
from fractions import Fraction

import pytest
import torch

from lib.models.constructions import proposition_t, proposition_t_many_heads, sum2_counter
from lib.models.named_weights import Form, Head, coordinates
from lib.models.one_layer import OneLayerSoftmax


def read(form: Form, entries: dict) -> Fraction:
    """One entry of weight matrix times vector, plus bias."""
    total = Fraction(form.bias)
    for name, w in form.weight.items():
        total += Fraction(w) * Fraction(entries.get(name, 0))
    return total


def literal(model: OneLayerSoftmax, word: list[int]) -> Fraction:
    """The definition of the model, loop by loop, each number a Fraction, nothing shared or skipped."""
    tokens = [model.embed(p, symbol) for p, symbol in enumerate(word)]
    activations = {}
    for head in model.heads:
        weights, values = [], []
        for token in tokens:
            score = Fraction(0)
            for q, k in zip(head.query, head.key, strict=True):
                score += read(q, tokens[-1]) * read(k, token)
            assert score.denominator == 1
            weights.append(Fraction(head.base) ** int(score))
            values.append([read(v, token) for v in head.value])
        for c in range(len(head.value)):
            top = sum((w * v[c] for w, v in zip(weights, values, strict=True)), Fraction(0))
            activations[f"{head.name}[{c}]"] = top / sum(weights)
    activations = {name: read(form, activations) for name, form in model.W_O.items()}
    for layer in model.hidden:
        activations = {name: max(Fraction(0), read(form, activations)) for name, form in layer.items()}
    return read(model.output, activations)


def words_of(model: OneLayerSoftmax, count: int, *, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(size, (count,), generator=generator) for size in model.alphabet]
    return torch.stack(columns, dim=1).tolist()


def fractional() -> OneLayerSoftmax:
    """Three tokens of two symbols and weights that come out even nowhere: y is a true fraction."""
    one, s, v, w = coordinates("one", "s", "v", "w")
    heads = (
        Head(name="a", base=3, query=(one, s), key=(s, one), value=(v, v + 2 * w)),
        Head(name="b", base=5, query=(-one,), key=(2 * s + 1,), value=(w - Fraction(1, 7),)),
    )
    a0, a1, b0 = coordinates("a[0]", "a[1]", "b[0]")
    u, t = coordinates("u", "t")
    p, q = coordinates("p", "q")
    return OneLayerSoftmax(
        name="fractional", alphabet=(2, 2, 2), features=("one", "s", "v", "w"), heads=heads,
        embed=lambda p, symbol: {"one": 1, "s": symbol, "v": Fraction(p + symbol, 3), "w": symbol - p},
        W_O={"u": a0 - 3 * b0, "t": a1 + Fraction(1, 5)},
        hidden=({"p": u - t, "q": Fraction(2, 3) * t + 1}, {"p": p - q + 1, "q": p + q}),
        output=p - 2 * q + Fraction(1, 11))


MODELS = {
    "fractional": fractional(),
    "T, n=2, s=1": proposition_t(2, 1),
    "T, n=5, s=2": proposition_t(5, 2),
    "T, n=9, s=3": proposition_t(9, 3),
    "T', 2 banks": proposition_t_many_heads(2, 1, 2),
    "SUM2[3, 6]": sum2_counter(3, 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_evaluation_is_the_definition_loop_by_loop(name):
    model = MODELS[name]
    words = words_of(model, 12, seed=1)
    answers = model.exact(words)
    assert answers == [literal(model, word) for word in words] and len(answers) == 12
    assert all(isinstance(y, Fraction) for y in answers)


def test_exact_evaluation_keeps_fractions_that_never_become_integers():
    model, checked = MODELS["fractional"], 0
    for word in itertools.product(range(2), repeat=3):
        [y] = model.exact([word])
        assert y == literal(model, list(word)) and y.denominator > 1
        checked += 1
    assert checked == 8


@pytest.mark.parametrize("name", MODELS)
def test_float64_agrees_with_exact_arithmetic(name):
    model = MODELS[name]
    words = torch.tensor(words_of(model, 200, seed=2))
    exact = torch.tensor([float(y) for y in model.exact(words)], dtype=torch.float64)
    # peeling multiplies the rounding of the packed table, some 2^-52, by (2n)^s <= 18^3 at n = 9, s = 3
    assert torch.allclose(model.forward(words), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_forward_returns_one_number_a_word_in_the_dtype_asked_for(dtype):
    model = proposition_t(4, 2)
    y = model.forward(torch.zeros(3, 9, dtype=torch.long), dtype)
    assert y.shape == (3,) and y.dtype == dtype and y.tolist() == [0, 0, 0]


def test_forward_does_not_depend_on_how_the_batch_is_cut(monkeypatch):
    model = proposition_t(6, 2)
    words = torch.tensor(words_of(model, 50, seed=3))
    whole = model.forward(words)
    monkeypatch.setattr("lib.models.one_layer.CHUNK_ENTRIES", 300)     # 300 // (13 tokens · 3) = 7 words
    assert torch.equal(model.forward(words), whole)


def test_every_float16_result_is_stored_in_float16():
    W, b = proposition_t(5, 2)._float_tables(torch.float16, torch.device("cpu")).layers[1]
    assert torch.equal(W, W.half().float()) and torch.equal(b, b.half().float())
    third = fractional().with_neuron(1, "q", Form(bias=Fraction(1, 3)))
    stored = third._float_tables(torch.float16, torch.device("cpu")).layers[1][1]
    assert stored[1].item() == torch.tensor(1 / 3, dtype=torch.float16).item() != 1 / 3


def test_overflow_in_float16_is_left_to_happen():
    model = proposition_t(3, 1)
    layer = model.hidden[0]
    neuron = next(iter(layer))
    loud = model.with_neuron(1, neuron, layer[neuron] * 10**6)          # beyond 65504
    words = torch.full((1, 7), 2)
    assert loud.forward(words, torch.float64).isfinite().all()
    assert not loud.forward(words, torch.float16).isfinite().any()


def test_logits_are_the_dot_products_that_the_head_describes():
    """Query and key of T's pointer give -(p - x)² on every pair of a place and a point."""
    model, n = proposition_t(7, 3), 7
    pointer, checked = model.heads[0], 0
    for x, p in itertools.product(range(n), range(2 * n)):
        asks = [read(form, model.embed(2 * n, x)) for form in pointer.query]
        keys = [read(form, model.embed(p, 0)) for form in pointer.key]
        assert sum(q * k for q, k in zip(asks, keys, strict=True)) == -((p - x) ** 2)
        checked += 1
    assert checked == 98


def test_size_counts_what_stands_in_the_weights():
    size = fractional().size()
    assert (size["heads"], size["value_dim"], size["hidden_layers"], size["widths"]) == (2, 2, 2, [2, 2])
    assert size["product"] == 2 * 3 * 3
    assert size["mlp_weights"] == 6 + 6 + 3            # two layers 2 x 2 with biases, one output
    assert size["mlp_nonzero"] == (2 + 2) + (3 + 2) + 3
    assert size["value_bits"] == 5                     # a[1] runs from -10/3 to 7/3: 17 thirds


def test_a_description_names_every_head_and_layer():
    lines = proposition_t(4, 2).describe().splitlines()
    assert len(lines) == 1 + 2 + 1 + 5 + 1             # name, heads, W_O, hidden layers, output
    assert "q = (2·x, - one, - x²), k = (p, p², one), v = (g(p))" in lines[1]
    assert "uniform" in lines[2]


def test_forms_print_as_they_are_written():
    x, one = coordinates("x", "one")
    assert str(2 * x - one + 3) == "2·x - one + 3"
    assert str(1 - x) == "- x + 1" and str(x - x) == "0"


def test_a_form_reading_an_unknown_name_is_refused_with_the_nearest():
    model = proposition_t(3, 1)
    with pytest.raises(ValueError, match=r"coordinate of output: 'gat'; did you mean 'gate'"):
        OneLayerSoftmax(**(fields(model) | {"output": coordinates("gat")[0]}))


def test_scores_that_are_not_integers_are_refused():
    model = proposition_t(3, 1)
    with pytest.raises(ValueError, match="'pointer': queries and keys must be integers"):
        model.with_entry(6, 1, "x", Fraction(1, 2))


def test_weights_that_are_floats_are_refused():
    with pytest.raises(ValueError, match="exact weights are integers or fractions"):
        proposition_t(3, 1).with_entry(3, 1, "table 0", 0.5)


@pytest.mark.parametrize("word", [[0] * 6, [0] * 8, [0, 0, 3, 0, 0, 0, 0], [0, -1, 0, 0, 0, 0, 0]])
def test_words_that_are_not_inputs_are_refused_by_both_evaluators(word):
    model = proposition_t(3, 1)
    for evaluate in (lambda: model.exact([word]), lambda: model.forward(torch.tensor([word]))):
        with pytest.raises(ValueError, match="reads .*7.* token p in 0 .. alphabet"):
            evaluate()


def test_a_float_format_that_is_not_offered_is_refused():
    with pytest.raises(ValueError, match="unknown dtype 'int64'"):
        proposition_t(3, 1).forward(torch.zeros(1, 7, dtype=torch.long), torch.int64)


def test_heads_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match="query has 1 entries, key 0"):
        Head(name="a", base=2, query=tuple(coordinates("x")), key=(), value=())
    with pytest.raises(ValueError, match="base of the weights must be >= 1"):
        Head(name="a", base=0, query=(), key=(), value=())


def test_two_heads_of_one_name_are_refused():
    model = proposition_t(3, 1)
    with pytest.raises(ValueError, match=r"names of their own, got \['pointer', 'pointer'\]"):
        OneLayerSoftmax(**(fields(model) | {"heads": (model.heads[0], model.heads[0])}))


def test_places_that_do_not_exist_cannot_be_damaged():
    model = proposition_t(3, 1)
    with pytest.raises(ValueError, match=r"no token \(7, 0\)"):
        model.with_entry(7, 0, "x", 1)
    with pytest.raises(ValueError, match=r"hidden layers 1 .. 4, got 5"):
        model.with_neuron(5, "gate", Form())
    with pytest.raises(ValueError, match="did you mean 'gate'"):
        model.with_neuron(4, "gates", Form())


def fields(model: OneLayerSoftmax) -> dict:
    return {name: getattr(model, name) for name in OneLayerSoftmax.__dataclass_fields__}
