"""DCMHA by its equation, one H×H matrix for each pair (i, j): no code of `lib`, float64, differentiable."""

import math
from types import SimpleNamespace

import pytest
import torch

from lib.models.dcmha import DCMHA

DEFAULTS = dict(rank=2, pre=True, post=True, query_side=True, key_side=True, gates=True, static=False)
DEFAULTS |= dict(window=None, causal=True, qk_norm=False, rope=None, d_head=None, n_kv_heads=None, bias=False)


@pytest.fixture
def make():
    return random_layer


@pytest.fixture
def inputs():
    return standard_normal


@pytest.fixture
def oracle():
    return written_out


@pytest.fixture
def error():
    return relative_error


@pytest.fixture
def distance():
    return relative_distance


def random_layer(d_model=8, n_heads=4, *, seed=0, dtype=torch.float64, **changes) -> DCMHA:
    """A layer far from the identity, so that every term counts: weights N(0, 1/width), scales about 1.

    All weights are float32 numbers, whatever the dtype: in both dtypes it is the same function.
    """
    layer = DCMHA(d_model, n_heads, **changes).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
            weight.copy_(1 + drawn if "norm" in name else drawn)
    return layer


def standard_normal(*shape, seed=3, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_distance(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖ of all tensors of a dict together, as one vector."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([each[name].double().flatten() for name in expected]) for each in (found, expected))
    return ((a - b).norm() / b.norm()).item()


def relative_error(found, expected) -> float:
    """max |found − expected| / max |expected|, of a tensor, or the largest of a dict of them.

    In a dict no scale is less than 1e-3 of the largest: a gradient that is zero but for rounding has none.
    """
    if not isinstance(expected, dict):
        found, expected = {"": found}, {"": expected}
    assert found.keys() == expected.keys() and len(expected)
    size = {name: each.abs().max().item() for name, each in expected.items()}
    assert max(size.values()) > 1e-3, "a comparison with nothing proves nothing"
    errors = []
    for name, each in expected.items():
        assert found[name].shape == each.shape and each.isfinite().all() and found[name].isfinite().all()
        difference = (found[name].double() - each.double()).abs().max().item()
        errors.append(difference / max(size[name], 1e-3 * max(size.values())))
    return max(errors)


# The oracle. W: the weights by name, float64; every matrix is (out, in). Loops over batch, row, key and head.


def written_out(layer, x, *, mask=None, out_gradient=None, **changes) -> SimpleNamespace:
    """out (B, T, D) and weight (B, H, T, T); with out_gradient also `gradients`, of x and of every weight.

    The settings come from `changes`, not from the layer: a layer that ignores a flag is found out.
    """
    c = SimpleNamespace(D=x.shape[-1], **DEFAULTS | changes)
    W = {name: w.detach().double().requires_grad_() for name, w in layer.named_parameters()}
    x = x.detach().double().requires_grad_()
    B, T, _ = x.shape
    may_read = [[[readable(c, i, j, mask, b) for j in range(T)] for i in range(T)] for b in range(B)]
    results = [one_sequence(W, c, x[b], may_read[b]) for b in range(B)]
    out, weight = (torch.stack(parts) for parts in zip(*results, strict=True))
    gradients = None
    if out_gradient is not None:
        found = torch.autograd.grad(out, [x, *W.values()], out_gradient.double(), allow_unused=True)
        gradients = dict(zip(["x", *W], found, strict=True))
    return SimpleNamespace(out=out.detach(), weight=weight.detach(), gradients=gradients)


def readable(c, i, j, mask, b) -> bool:
    """May row i read column j? A mask replaces the causal mask and is cut by the window like it."""
    near = c.window is None or abs(i - j) < c.window
    if mask is not None:
        return near and bool((mask if mask.dim() == 2 else mask[b])[i, j])
    return near and (j <= i or not c.causal)


def one_sequence(W, c, x, may_read):
    """x (T, D) -> out (T, D), post-composed weights (H, T, T)."""
    T, H = len(x), c.n_heads
    d = c.d_head or c.D // H
    kv = c.n_kv_heads or H
    q, k, v = ([linear(W, f"W_{name}", row).view(-1, d) for row in x] for name in "QKV")  # T × (heads, d)
    if c.qk_norm:
        q = [scaled_rms(W, "q_norm", rows) for rows in q]
        k = [scaled_rms(W, "k_norm", rows) for rows in k]
    if c.rope is not None:
        q = [turned(rows, t, c.rope) for t, rows in enumerate(q)]
        k = [turned(rows, t, c.rope) for t, rows in enumerate(k)]
    parts = {place: [sides(W, c, place, row) for row in x] for place in ("pre", "post")}
    group = [h // (H // kv) for h in range(H)]  # which key/value head each head reads
    out, weight = [], torch.zeros(H, T, T, dtype=torch.float64)
    for i in range(T):
        keys = [j for j in range(T) if may_read[i][j]]
        if not keys:  # a row that may read nothing mixes nothing
            out.append(linear(W, "W_O", torch.zeros(H * d, dtype=torch.float64)))
            continue
        scores = []
        for j in keys:
            score = (q[i] * k[j][group]).sum(dim=-1) / math.sqrt(d)  # (H)
            scores.append(score @ matrix(W, c, "pre", parts, i, j))
        row = torch.stack(scores).exp()  # (keys, H)
        row = row / row.sum(dim=0)
        row = torch.stack([row[n] @ matrix(W, c, "post", parts, i, j) for n, j in enumerate(keys)])
        weight[:, i, keys] = row.T
        mix = sum(row[n, :, None] * v[j][group] for n, j in enumerate(keys))  # (H, d)
        out.append(linear(W, "W_O", mix.flatten()))
    return torch.stack(out), weight


def matrix(W, c, place, parts, i, j):
    """The (H, H) matrix M of this pair: A'_h = Σ_g A_g M[g, h]. The identity where nothing is composed."""
    M = torch.eye(c.n_heads, dtype=torch.float64)
    if not getattr(c, place):
        return M
    M = M + W[f"{place}.W_b"] if c.static else M
    M = M + parts[place][i]["query"] if c.query_side else M
    return M + parts[place][j]["key"] if c.key_side else M


def sides(W, c, place, x) -> dict:
    """What one token x (D) adds to the matrices of its queries and of its keys: Σ_r w1_r w2_r^T + diag(g)."""
    found, R, H = {}, c.rank, c.n_heads
    for side in ("query", "key"):
        if not getattr(c, place) or not getattr(c, f"{side}_side"):
            continue
        u = linear(W, f"{place}.{side}.W_1", x)
        u = u * (1 + torch.erf(u / math.sqrt(2))) / 2  # the exact GELU
        w1, w2 = linear(W, f"{place}.{side}.W_2", u).view(2, R, H)
        w1 = [w / (w.square().sum() / H + 1e-6).sqrt() for w in w1]
        found[side] = sum(torch.outer(w1[r], w2[r]) for r in range(R))
        if c.gates:
            found[side] = found[side] + torch.diag(torch.tanh(linear(W, f"{place}.{side}.W_g", x)))
    return found


def linear(W, name, x):
    return W[f"{name}.weight"] @ x + W.get(f"{name}.bias", 0.0)


def scaled_rms(W, name, rows):
    return rows / (rows.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * W[f"{name}.weight"]


def turned(rows, t, base):
    """RoPE: coordinates j and j + d/2 of each row (…, d) turn by t · base^(−2j/d)."""
    d = rows.shape[-1]
    angle = torch.tensor([t * base ** (-2 * j / d) for j in range(d // 2)], dtype=torch.float64)
    z = torch.complex(rows[..., : d // 2], rows[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)
