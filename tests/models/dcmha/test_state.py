"""The weights of DCMHA: names and shapes that saved models rely on, counts, the first draw, and copies."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch

from lib.models.dcmha import DCMHA

SWITCHES = ("pre", "post", "query_side", "key_side", "gates", "static")
SIDES = [f"{stage}.{side}" for stage, side in itertools.product(("pre", "post"), ("query", "key"))]


def test_the_state_dict_keeps_its_names_and_shapes():
    """Frozen: saved models must keep loading. D = 12, H = 4, d = 3, R = 2, K = 2 R H = 16."""
    layer = DCMHA(12, 4, static=True, qk_norm=True, bias=True, n_kv_heads=2)
    side = {"W_1.weight": (16, 12), "W_2.weight": (16, 16), "W_g.weight": (4, 12)}
    expected = {
        "W_Q.weight": (12, 12), "W_Q.bias": (12,), "W_K.weight": (6, 12), "W_K.bias": (6,),
        "W_V.weight": (6, 12), "W_V.bias": (6,), "W_O.weight": (12, 12), "W_O.bias": (12,),
        "q_norm.weight": (3,), "k_norm.weight": (3,), "pre.W_b": (4, 4), "post.W_b": (4, 4),
    }  # fmt: skip
    expected |= {f"{name}.{part}": shape for name in SIDES for part, shape in side.items()}
    assert {name: tuple(weight.shape) for name, weight in layer.state_dict().items()} == expected
    names = [name for name, _ in layer.named_parameters()]  # seeds draw in this order: it is frozen too
    assert names == [
        "W_Q.weight", "W_Q.bias", "W_K.weight", "W_K.bias", "W_V.weight", "W_V.bias", "W_O.weight",
        "W_O.bias", "q_norm.weight", "k_norm.weight",
        *(f"pre.{part}" for part in ("W_b", *(f"{s}.{w}" for s in ("query", "key") for w in side))),
        *(f"post.{part}" for part in ("W_b", *(f"{s}.{w}" for s in ("query", "key") for w in side))),
    ]  # fmt: skip


@pytest.mark.parametrize("computation", ["fast", "reference", "explicit"])
def test_a_plain_layer_has_the_four_matrices_of_attention_and_no_buffers(computation):
    layer = DCMHA(8, 2, pre=False, post=False, computation=computation)
    assert set(layer.state_dict()) == {"W_Q.weight", "W_K.weight", "W_V.weight", "W_O.weight"}
    assert not list(DCMHA(8, 2, rope=1e4, window=3, computation=computation).buffers())


@pytest.mark.parametrize("D, H, R", [(8, 2, 1), (12, 4, 2), (24, 3, 3)])
def test_the_parameters_are_those_of_the_formula(D, H, R):
    checked = 0
    for values in itertools.product((True, False), repeat=len(SWITCHES)):
        s = dict(zip(SWITCHES, values, strict=True))
        if (s["pre"] or s["post"]) and not (s["query_side"] or s["key_side"] or s["static"]):
            continue
        stages, sides = s["pre"] + s["post"], s["query_side"] + s["key_side"]
        a_side = D * 2 * R * H + (2 * R * H) ** 2 + (D * H if s["gates"] else 0)
        extra = stages * (sides * a_side + (H**2 if s["static"] else 0))
        found = sum(weight.numel() for weight in DCMHA(D, H, rank=R, **s).parameters())
        assert found == 4 * D**2 + extra
        if all(values):
            assert extra == (8 * R + 4) * H * D + 16 * R**2 * H**2 + 2 * H**2  # the sum for all four sides
        checked += 1
    assert checked == 2**6 - 3 * 2


# The first draw


def test_the_global_seed_or_a_generator_decides_the_weights():
    def weights(layer):
        return torch.cat([weight.detach().flatten() for weight in layer.parameters()])

    torch.manual_seed(3)
    first = weights(DCMHA(8, 4, static=True))
    torch.manual_seed(3)
    assert torch.equal(weights(DCMHA(8, 4, static=True)), first)
    assert not torch.equal(weights(DCMHA(8, 4, static=True)), first)
    layer, drawn = DCMHA(8, 4, static=True), []
    state = torch.random.get_rng_state()
    for seed in (7, 7, 8):
        layer.reset_parameters(generator=torch.Generator().manual_seed(seed))
        drawn.append(weights(layer))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), state)  # a generator leaves the global state alone


def test_weights_start_at_the_published_scales():
    D, H, R = 128, 16, 2
    K = 2 * R * H
    torch.manual_seed(0)
    layer = DCMHA(D, H, rank=R, static=True, qk_norm=True, bias=True)
    std = {"W_1": math.sqrt(2 / (D + K)), "W_2": 0.01 / (math.sqrt(H) * (H + 2))}
    std |= {"W_g": 0.005 * math.sqrt(2 / (D + H))} | dict.fromkeys(("W_Q", "W_K", "W_V", "W_O"), D**-0.5)
    for name, weight in layer.named_parameters():
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind in std:  # 2048 draws or more: a standard error of 1.6 %, here 5 of them
            assert abs(weight.std() / std[kind] - 1) < 0.08 and abs(weight.mean()) < 0.12 * std[kind]
        else:
            assert weight.eq(1 if "norm" in name else 0).all(), name
    assert layer.pre.query.W_2.weight.numel() == 4096


def test_a_layer_made_on_the_meta_device_is_drawn_when_it_is_emptied():
    with torch.device("meta"):
        layer = DCMHA(8, 4, static=True, qk_norm=True, rope=1e4)
    layer.to_empty(device="cpu").reset_parameters(generator=torch.Generator().manual_seed(1))
    other = DCMHA(8, 4, static=True, qk_norm=True, rope=1e4)
    other.reset_parameters(generator=torch.Generator().manual_seed(1))
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# Copies


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "file"])
@pytest.mark.parametrize("changes", [dict(), dict(static=True, window=3, rope=1e4, qk_norm=True)])
def test_a_copy_computes_the_same_and_shares_nothing(way, changes, make, inputs):
    layer, x = make(8, 4, **changes), inputs(2, 5, 8)
    expected = layer(x)
    if way == "state_dict":
        twin = DCMHA(8, 4, **changes).double()
        twin.load_state_dict(layer.state_dict())
    elif way == "file":
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        twin = DCMHA(8, 4, **changes).double()
        twin.load_state_dict(torch.load(file, weights_only=True))
    else:
        twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(layer(x), expected)


def test_a_layer_moves_between_dtypes(make, inputs):
    layer, x = make(8, 4, rope=1e4, static=True, dtype=torch.float32), inputs(2, 5, 8)
    first = layer(x.float())
    assert layer.double()(x).dtype == torch.float64
    assert torch.equal(layer.float()(x.float()), first)


def test_a_layer_says_what_it_is():
    words = repr(DCMHA(8, 4, window=3, rope=1e4))
    assert "DCMHA" in words and "Composition" in words
