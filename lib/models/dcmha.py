"""Dynamically composable multi-head attention (DCMHA), in one file that needs torch alone: copy it.

Each pair of query i and key j mixes its H attention scores by an H×H matrix of its own, before the softmax
(pre) and after it (post). The matrix is a sum of a part that query i computes and one that key j computes:

    A'_{h,ij} = A_{h,ij} (1 + g^q_{i,h} + g^k_{j,h}) + Σ_g A_{g,ij} W_b[g,h]
                + Σ_r (Σ_g A_{g,ij} w1^q_{i,r,g}) w2^q_{i,r,h} + Σ_r (Σ_g A_{g,ij} w1^k_{j,r,g}) w2^k_{j,r,h}

    scores Q K^T / √d → pre → mask → softmax → post → values. After post, rows need not sum to 1.

B batch, T tokens, D model width, H heads, d head width, R rank of a dynamic part; R query rows where `rows`
asks for some. Weight matrices are (out, in). Source: Xiao et al. 2024, "Improving Transformers with
Dynamically Composable Multi-Head Attention"; the order of the steps follows the authors' code.

    layer = DCMHA(d_model=256, n_heads=8, rope=1e4)
    y = layer(x)                                             # (B, T, D) -> (B, T, D)
    cache = layer.new_cache()
    y = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(x.shape[1])], dim=1)  # the same
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

COMPUTATIONS = ("fast", "reference", "explicit")
Factors = tuple[Tensor, Tensor, Tensor | None]  # w1, w2 (B, T, R, H), gates (B, T, H)


class Composition(nn.Module):
    """What one side (queries or keys) adds at one stage, from the layer's input x (B, T, D).

    [w1; w2] = W_2 GELU(W_1 x), each (B, T, R, H), w1 divided by its root mean square over the heads;
    gates g = tanh(W_g x) (B, T, H). K = 2 R H hidden units. W_2 starts small: at first A' is nearly A.
    """

    def __init__(self, d_model: int, n_heads: int, rank: int, gates: bool):
        super().__init__()
        self.shape, K = (2, rank, n_heads), 2 * rank * n_heads
        self.W_1 = nn.Linear(d_model, K, bias=False)
        self.W_2 = nn.Linear(K, 2 * rank * n_heads, bias=False)
        self.W_g = nn.Linear(d_model, n_heads, bias=False) if gates else None

    def forward(self, x: Tensor) -> Factors:
        w1, w2 = self.W_2(gelu(self.W_1(x))).unflatten(-1, self.shape).unbind(dim=-3)  # (B, T, R, H)
        w1 = w1 * (w1.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        return w1, w2, None if self.W_g is None else torch.tanh(self.W_g(x))

    def init_std(self, name: str) -> float:
        """Standard deviation that W_1, W_2 or W_g starts with (the authors' JAX code)."""
        (K, D), H = self.W_1.weight.shape, self.shape[-1]
        return {
            "W_1": math.sqrt(2 / (D + K)),
            "W_2": 0.01 / (math.sqrt(H) * (H + 2)),
            "W_g": 0.005 * math.sqrt(2 / (D + H)),
        }[name]


class Stage(nn.Module):
    """The composition before the softmax, or the one after it: a query side, a key side, a static W_b."""

    def __init__(self, d_model, n_heads, rank, *, query_side, key_side, gates, static):
        super().__init__()
        self.query = Composition(d_model, n_heads, rank, gates) if query_side else None
        self.key = Composition(d_model, n_heads, rank, gates) if key_side else None
        self.W_b = nn.Parameter(torch.zeros(n_heads, n_heads)) if static else None  # W_b[g, h]: from g to h


@dataclass
class Cache:
    """What decoding keeps of the tokens so far: keys, values (B, H_kv, T, d) and the key sides' factors."""

    k: Tensor | None = None
    v: Tensor | None = None
    pre: Factors | None = None
    post: Factors | None = None
    n_tokens: int = 0  # seen so far; with a window fewer are kept


class DCMHA(nn.Module):
    """Attention from x (B, T, D) to (B, T, D) whose heads are composed anew for every query and key.

    rank: R of each dynamic part. pre, post: compose before, after the softmax. query_side, key_side, gates,
    static: the parts of the composition; static is a learned H×H matrix (talking heads). window: a query
    reads the last `window` keys, itself included (on both sides of itself if not causal). qk_norm: RMSNorm
    over d, with a scale, of queries and keys. rope: base of the rotary positions, None for none.
    d_head: None is D / H. n_kv_heads: grouped heads, query head i reads key/value head i // (H / H_kv).
    computation: "fast"; "reference", low rank and readable; "explicit", an H×H matrix for every pair.

    Weights are drawn by `reset_parameters`: W_Q, W_K, W_V, W_O from N(0, 1/fan_in), the compositions so that
    A' starts near A, W_b = 0. ValueError on a shape that cannot be.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        rank: int = 2,
        pre: bool = True,
        post: bool = True,
        query_side: bool = True,
        key_side: bool = True,
        gates: bool = True,
        static: bool = False,
        window: int | None = None,
        causal: bool = True,
        qk_norm: bool = False,
        rope: float | None = None,
        d_head: int | None = None,
        n_kv_heads: int | None = None,
        bias: bool = False,
        computation: str = "fast",
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        for name, value in dict(
            d_model=d_model, n_heads=n_heads, rank=rank, n_kv_heads=n_kv_heads, d_head=d_head, window=window
        ).items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if d_head is None and d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model: {d_model=}, {n_heads=}; or give d_head")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads: {n_heads=}, {n_kv_heads=}")
        if computation not in COMPUTATIONS:
            raise ValueError(f"unknown computation {computation!r}; allowed: {', '.join(COMPUTATIONS)}")
        self.d = d = d_model // n_heads if d_head is None else d_head
        if rope is not None and (d % 2 or not rope > 0):
            raise ValueError(f"RoPE needs an even head width and a positive base, got d={d}, rope={rope}")
        if (pre or post) and not (query_side or key_side or static):
            raise ValueError("nothing would be composed: query_side, key_side or static must be True")
        self.n_heads, self.n_kv_heads, self.window, self.causal = n_heads, n_kv_heads, window, causal
        self.rope, self.computation = rope, computation
        self.W_Q = nn.Linear(d_model, n_heads * d, bias=bias)
        self.W_K = nn.Linear(d_model, n_kv_heads * d, bias=bias)
        self.W_V = nn.Linear(d_model, n_kv_heads * d, bias=bias)
        self.W_O = nn.Linear(n_heads * d, d_model, bias=bias)
        self.q_norm = nn.RMSNorm(d, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d, eps=1e-6) if qk_norm else nn.Identity()
        sides = dict(query_side=query_side, key_side=key_side, gates=gates, static=static)
        self.pre = Stage(d_model, n_heads, rank, **sides) if pre else None
        self.post = Stage(d_model, n_heads, rank, **sides) if post else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, in the order of `named_parameters()`."""
        for name, weight in self.named_parameters():
            std = self.init_std(name)
            if weight.is_meta:
                continue
            weight.fill_(1.0) if std is None else weight.normal_(0.0, std, generator=generator)

    def init_std(self, name: str) -> float | None:
        """Standard deviation of the parameter of that name at the start; None: a norm's scale, which is 1."""
        *path, part, kind = name.split(".") if "." in name else ("", name)
        if kind in ("bias", "W_b"):
            return 0.0
        if part in ("q_norm", "k_norm"):
            return None
        if part in ("W_1", "W_2", "W_g"):
            return self.get_submodule(".".join(path)).init_std(part)
        return self.get_parameter(name).shape[1] ** -0.5

    def new_cache(self) -> Cache:
        """An empty cache for decoding; pass it to every call."""
        return Cache()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). Arguments as in `attend`."""
        return self.attend(x, mask=mask, cache=cache)[0]

    def attend(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        rows: slice | Tensor | None = None,
        cache: Cache | None = None,
        computation: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) -> out (B, R, D), and the composed attention (B, H, R, T) except from "fast".

        mask: (T, T) or (B, T, T) bool, True where row may read column; given, it replaces the causal mask
        (the window stays). A row that may read nothing gives 0. rows: these query rows only. cache: x
        continues the tokens in it; it takes neither mask nor rows.
        """
        if cache is not None and (mask is not None or rows is not None or not self.causal):
            raise ValueError("decoding with a cache is causal and takes neither mask nor rows")
        start, T = (0 if cache is None else cache.n_tokens), x.shape[1]
        here = torch.arange(start, start + T, device=x.device)  # positions of x
        at = here if rows is None else here[rows]
        xq = x if rows is None else x[:, rows]
        q = self.q_norm(self.W_Q(xq).unflatten(-1, (-1, self.d)).transpose(1, 2))  # (B, H, R, d)
        k = self.k_norm(self.W_K(x).unflatten(-1, (-1, self.d)).transpose(1, 2))  # (B, H_kv, T, d)
        v = self.W_V(x).unflatten(-1, (-1, self.d)).transpose(1, 2)
        if self.rope is not None:
            q = rotate(q, *rotation(at, self.d, base=self.rope, like=q))
            k = rotate(k, *rotation(here, self.d, base=self.rope, like=k))
        stages = {name: getattr(self, name) for name in ("pre", "post")}
        query = {n: s.query(xq) if s is not None and s.query is not None else None for n, s in stages.items()}
        key = {n: s.key(x) if s is not None and s.key is not None else None for n, s in stages.items()}
        if cache is not None:
            k, v, key, here = self._extend(cache, k, v, key, start + T)
        if self.n_kv_heads != self.n_heads:
            k, v = (part.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for part in (k, v))
        allowed = self._allowed(at, here, mask if mask is None or rows is None else mask[..., rows, :])
        compose = compose_explicit if (computation or self.computation) == "explicit" else compose_low_rank
        static = {n: None if s is None else s.W_b for n, s in stages.items()}
        score = (q / math.sqrt(self.d)) @ k.mT  # (B, H, R, T)
        score = compose(score, query["pre"], key["pre"], static["pre"])
        if allowed is not None:
            score = score.masked_fill(~allowed, -math.inf)
        weight = torch.softmax(score, dim=-1, dtype=torch.promote_types(score.dtype, torch.float32))
        if allowed is not None:
            weight = weight.masked_fill(~allowed, 0.0)  # a row of -inf alone would be NaN
        weight = compose(weight.to(v.dtype), query["post"], key["post"], static["post"])
        return self.W_O((weight @ v).transpose(1, 2).flatten(2)), weight

    def compositions(self, x: Tensor) -> dict[str, Factors]:
        """The factors that x (B, T, D) gives, by "pre_query", "pre_key", "post_query", "post_key"."""
        found = {}
        for name, stage in (("pre", self.pre), ("post", self.post)):
            for side in ("query", "key"):
                part = None if stage is None else getattr(stage, side)
                if part is not None:
                    found[f"{name}_{side}"] = part(x)
        return found

    def _allowed(self, at: Tensor, here: Tensor, mask: Tensor | None) -> Tensor | None:
        """Which query positions `at` may read which key positions `here`: (…, 1, R, T) bool, None: all."""
        distance = at[:, None] - here  # (R, T)
        allowed = mask
        if mask is None and self.causal:
            allowed = distance >= 0
        if self.window is not None:
            near = distance.abs() < self.window
            allowed = near if allowed is None else allowed & near
        return None if allowed is None else allowed.unsqueeze(-3)

    def _extend(self, cache: Cache, k: Tensor, v: Tensor, key: dict, n: int):
        """The cache with the new tokens; -> all keys, values and factors in it, and their positions."""
        if cache.k is not None:
            k, v = torch.cat([cache.k, k], dim=2), torch.cat([cache.v, v], dim=2)
            for name, old in (("pre", cache.pre), ("post", cache.post)):
                if old is not None:
                    parts = zip(old, key[name], strict=True)
                    key[name] = tuple(None if a is None else torch.cat([a, b], dim=1) for a, b in parts)
        keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)  # for the next token
        tail = slice(k.shape[2] - keep, None)
        cache.k, cache.v, cache.n_tokens = k[:, :, tail], v[:, :, tail], n
        for name in ("pre", "post"):
            if key[name] is not None:
                setattr(cache, name, tuple(None if a is None else a[:, tail] for a in key[name]))
        return k, v, key, torch.arange(n - k.shape[2], n, device=k.device)


def compose_low_rank(A: Tensor, query: Factors | None, key: Factors | None, W_b: Tensor | None) -> Tensor:
    """A' of the module's formula, from A (B, H, R, T); query factors (B, R, …), key factors (B, T, …)."""
    out = A
    if W_b is not None:
        out = out + torch.einsum("bgij,gh->bhij", A, W_b)
    for factors, t in ((query, "i"), (key, "j")):
        if factors is None:
            continue
        w1, w2, g = factors
        mixed = torch.einsum(f"bgij,b{t}rg->brij", A, w1)
        out = out + torch.einsum(f"brij,b{t}rh->bhij", mixed, w2)
        if g is not None:
            out = out + A * (g.mT[:, :, :, None] if t == "i" else g.mT[:, :, None, :])
    return out


def compose_explicit(A: Tensor, query: Factors | None, key: Factors | None, W_b: Tensor | None) -> Tensor:
    """The same with the H×H matrix of every pair written out: (B, R, T, H, H), for checks."""
    H = A.shape[1]
    M = torch.eye(H, dtype=A.dtype, device=A.device) + (0 if W_b is None else W_b)
    M = M.expand(A.shape[0], *A.shape[2:], H, H)
    if query is not None:
        M = M + matrices(query)[:, :, None]
    if key is not None:
        M = M + matrices(key)[:, None]
    return torch.einsum("bgij,bijgh->bhij", A, M)


def matrices(factors: Factors) -> Tensor:
    """Σ_r w1 w2^T + diag(g) as (B, T, H, H), from head g to head h."""
    w1, w2, g = factors
    M = torch.einsum("btrg,btrh->btgh", w1, w2)
    return M if g is None else M + torch.diag_embed(g)


def rotation(at: Tensor, d: int, *, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, d/2) of the angles t · base^(−2j/d), position t of `at` (T,), pair j; as `like`."""
    speed = base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=at.device) / d)
    angle = at[:, None] * speed  # float64: exact enough at any position
    return angle.cos().to(like), angle.sin().to(like)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (…, T, d), in the half-split order of Llama: coordinate j turns with coordinate j + d/2."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
