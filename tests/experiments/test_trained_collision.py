import numpy as np
import pytest
import torch

from lib.experiments.trained_collision import (
    TrainedCollisionSettings,
    float_accuracy,
    quantised_attention,
    refute_trained,
)
from lib.metrics.communication import all_tables, census
from lib.tasks.hops import PermutationHops

SETTINGS = {"n": 4, "d_model": 16, "n_heads": 2, "d_mlp": 32, "steps": 6, "batch": 8, "evaluate_every": 3}


def model_and_task(n, seed=0):
    task = PermutationHops(n)
    chosen = TrainedCollisionSettings(**SETTINGS | {"n": n})
    model = chosen.model(vocab=task.vocab, n_logits=n, max_tokens=task.length, seed=seed).double()
    return model, task


def prompt(task, z1, z2):
    tables = torch.tensor([[z1, z2]])
    x = torch.zeros(1, 1, dtype=torch.long)
    return task.tokens(tables, x, x + 2), task.mask()[: 2 * task.n + 1, : 2 * task.n + 1]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_finely_quantised_layer_sends_what_the_models_attention_sends(seed):
    model, task = model_and_task(4, seed)
    layer = quantised_attention(model, task, bits=22, weight_bits=26)
    W_O = model.layers[0].attention.W_O.weight
    unit = None
    for z2 in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 3, 0, 1]):
        for j, z1 in ((0, [0, 1, 2, 3]), (2, [2, 1, 0, 3])):
            tokens, mask = prompt(task, z1, z2)
            out = model.trace(tokens, mask=mask, read=("attention_out",)).attention_out[0, 0, -1]
            mix = torch.linalg.lstsq(W_O, out[:, None]).solution[:, 0]          # W_O is square: (H d)
            state = np.array([float(value) for value in layer.state(tuple(z2), j)])
            scale = mix.detach().numpy() / state                                # one grid unit for each head
            unit = scale if unit is None else unit
            assert np.allclose(scale, unit, rtol=1e-3)
            for head in scale.reshape(2, -1):
                assert np.allclose(head, head[0], rtol=1e-3)


def test_float_accuracy_counts_every_permutation_with_every_pointer():
    model, task = model_and_task(3)
    right = 0
    for z2 in all_tables(3, permutations=True).tolist():
        for j in range(3):
            z1 = [0, 1, 2]
            z1[0], z1[j] = j, 0
            tokens, mask = prompt(task, z1, z2)
            right += int(model(tokens, mask=mask)[0, -1].argmax()) == z2[j]
    assert float_accuracy(model, task) == right / 18


def test_no_mlp_beats_the_accuracy_that_a_coarse_layer_leaves():
    row = refute_trained(SETTINGS | {"value_bits": [2, 8], "weight_bits": [0, 8]}, seed=0)
    coarse, fine = row["quantised"]
    assert coarse["tables"] == fine["tables"] == 24
    assert coarse["messages"] < 24 and coarse["verified"] and coarse["best_accuracy"] < 1
    assert fine["messages"] > coarse["messages"] and fine["best_accuracy"] >= coarse["best_accuracy"]
    assert 0 <= row["float_accuracy"] <= 1


def test_the_forced_errors_of_equal_messages_are_counted_by_hand():
    model, task = model_and_task(3)
    layer = quantised_attention(model, task, bits=2, weight_bits=0)
    tables = all_tables(3, permutations=True)
    states = {}
    for z in tables.tolist():
        for j in range(3):
            states.setdefault((j, layer.state(tuple(z), j)), []).append(z[j])
    forced = sum(len(answers) - max(map(answers.count, answers)) for answers in states.values())
    assert census(layer, tables).forced_errors <= forced  # equal messages give equal states; others may, too
    assert forced < 18


@pytest.mark.parametrize(("change", "message"), [
    ({"L": 2}, "one layer and two hops"),
    ({"K": 3}, "one layer and two hops"),
    ({"value_bits": (2,)}, "in pairs"),
    ({"valu_bits": (2,)}, "did you mean 'value_bits'"),
])
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        refute_trained(SETTINGS | change, seed=0)
