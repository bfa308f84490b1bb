"""A small random Transformer, and its formulas in plain Python: lists and loops, no code of `lib`."""

import cmath
import math

import pytest
import torch

from lib.models.transformer import Transformer, TransformerConfig

TAPS = ("residual", "attention_out", "mlp_out", "attention_weight")


@pytest.fixture
def make():
    return random_transformer


@pytest.fixture
def oracle():
    return written_out


@pytest.fixture
def assert_taps():
    return assert_equal


def random_transformer(*, seed=0, **changes) -> Transformer:
    """A small float64 model with every bias, in which every weight (scales and biases too) is random."""
    config = TransformerConfig(
        **dict(vocab=7, d_model=6, n_heads=4, n_layers=2, d_head=2, n_kv_heads=2, d_mlp=5, max_tokens=9)
        | dict(attention_bias=True, mlp_bias=True, mlp_output_bias=True, readout_bias=True)
        | changes
    )
    model = Transformer(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


# The oracle: loops over batch, layer, head, row and key; x is a list of D floats, W the weights by name.


def linear(W, name, x):
    bias = W.get(f"{name}.bias", [0.0] * len(W[f"{name}.weight"]))
    rows = zip(W[f"{name}.weight"], bias, strict=True)
    return [sum(w * xi for w, xi in zip(row, x, strict=True)) + b for row, b in rows]


def normalise(W, name, x, c):
    if c.norm == "none":
        return x
    mean = sum(x) / len(x) if c.norm == "layer" else 0.0
    size = math.sqrt(sum((xi - mean) ** 2 for xi in x) / len(x) + c.norm_eps)
    scale = W.get(f"{name}.weight", [1.0] * len(x))
    shift = W.get(f"{name}.bias", [0.0] * len(x))
    return [(xi - mean) / size * s + b for xi, s, b in zip(x, scale, shift, strict=True)]


def turned(x, t, c):
    if c.positions != "rope":
        return x
    d = len(x)
    pairs = [
        complex(x[j], x[j + d // 2]) * cmath.exp(1j * t * c.rope_base ** (-2 * j / d)) for j in range(d // 2)
    ]
    return [z.real for z in pairs] + [z.imag for z in pairs]


def softmax_over(readable, score):
    """The weights of one row: exp(score[j]) over their sum for the keys it may read, 0 for the others."""
    mass = [math.exp(s) if may else 0.0 for s, may in zip(score, readable, strict=True)]
    return [w / sum(mass) for w in mass]


def mlp(W, name, x, c):
    hidden = linear(W, f"{name}.W_1", x)
    if c.activation == "relu":
        hidden = [max(0.0, u) for u in hidden]
    elif c.activation == "gelu":
        hidden = [u * (1 + math.erf(u / math.sqrt(2))) / 2 for u in hidden]
    else:
        gate = linear(W, f"{name}.W_gate", x)
        hidden = [u * g / (1 + math.exp(-g)) for u, g in zip(hidden, gate, strict=True)]
    return linear(W, f"{name}.W_2", hidden)


def add(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def unedited(l, where, b, t, before, out):
    return out


def written_out(model, tokens, *, mask=None, edit=unedited, order=None) -> dict[str, torch.Tensor]:
    """Logits and all taps. edit(l, "attention" | "mlp" | "layer", b, t, before, out) may change a result."""
    c, W = model.config, {name: weight.tolist() for name, weight in model.state_dict().items()}
    d = c.d_head or c.d_model // c.n_heads
    kv = c.n_kv_heads or c.n_heads
    n = tokens.shape[1]
    if mask is None:
        mask = torch.tensor([[j <= i or not c.causal for j in range(n)] for i in range(n)])
    may_read = mask.expand(len(tokens), n, n).tolist()
    taps = {name: [] for name in ("logits", *TAPS)}
    for b, prompt in enumerate(tokens.tolist()):
        h = [W["embedding.weight"][i] for i in prompt]
        if c.positions == "learned":
            h = [add(x, W["position.weight"][t]) for t, x in enumerate(h)]
        h = [edit(-1, "layer", b, t, x, x) for t, x in enumerate(h)]
        residual, outs, mlps, weights = [h], [], [], []
        for l in range(c.n_layers):
            name = f"layers.{order[l] if order else l}"
            x = [normalise(W, f"{name}.attention_norm", row, c) for row in h]
            q, k, v = ([linear(W, f"{name}.attention.W_{p}", row) for row in x] for p in "QKV")
            mix = [[] for _ in range(n)]
            weights.append([])
            for head in range(c.n_heads):
                group = head // (c.n_heads // kv)
                weights[-1].append([])
                for i in range(n):
                    qi, score = turned(q[i][head * d : (head + 1) * d], i, c), []
                    for j in range(n):
                        kj = turned(k[j][group * d : (group + 1) * d], j, c)
                        score.append(sum(s * r for s, r in zip(qi, kj, strict=True)) / math.sqrt(d))
                    row = softmax_over(may_read[b][i], score)
                    weights[-1][-1].append(row)
                    mix[i] += [sum(row[j] * v[j][group * d + e] for j in range(n)) for e in range(d)]
            a, m, new = [], [], []
            for t in range(n):
                a.append(edit(l, "attention", b, t, h[t], linear(W, f"{name}.attention.W_O", mix[t])))
                middle = add(h[t], a[t])
                out = mlp(W, f"{name}.mlp", normalise(W, f"{name}.mlp_norm", middle, c), c)
                m.append(edit(l, "mlp", b, t, middle, out))
                new.append(edit(l, "layer", b, t, h[t], add(middle, m[t])))
            h = new
            residual.append(h)
            outs.append(a)
            mlps.append(m)
        W_U, b_U = W["embedding.weight"] if c.tied else W["W_U.weight"], W.get("b_U", [0.0] * c.n_out)
        readout = {"readout.weight": W_U, "readout.bias": b_U}
        taps["logits"].append([linear(readout, "readout", normalise(W, "norm", row, c)) for row in h])
        for name, value in zip(TAPS, (residual, outs, mlps, weights), strict=True):
            taps[name].append(value)
    taps = {name: torch.tensor(value, dtype=torch.float64) for name, value in taps.items()}
    return {name: value if name == "logits" else value.transpose(0, 1) for name, value in taps.items()}


def assert_equal(trace, expected):
    """Every tap and the logits of `trace` are those of the oracle, and the numbers are not trivial."""
    for name in ("logits", *TAPS):
        torch.testing.assert_close(getattr(trace, name), expected[name], rtol=1e-11, atol=1e-11)  # float64
    assert expected["residual"].isfinite().all() and expected["residual"].std() > 0.1
