"""Dynamically composable multi-head attention (DCMHA), in one file that needs torch alone: copy it.

Each pair of query i and key j mixes its H attention scores by an H×H matrix of its own, before the softmax
(pre) and after it (post). The matrix is a sum of a part that query i computes and one that key j computes:

    A'_{h,ij} = A_{h,ij} (1 + g^q_{i,h} + g^k_{j,h}) + Σ_g A_{g,ij} W_b[g,h]
                + Σ_r (Σ_g A_{g,ij} w1^q_{i,r,g}) w2^q_{i,r,h} + Σ_r (Σ_g A_{g,ij} w1^k_{j,r,g}) w2^k_{j,r,h}

    scores Q K^T / √d → pre → mask → softmax → post → values. After post, rows need not sum to 1.

B batch, T tokens, D width, H heads, d head width, R rank; R query rows where `rows` are asked for. Weights
are (out, in). Source: Xiao et al. 2024, "Improving Transformers with Dynamically Composable Multi-Head
Attention"; the order of the steps follows the authors' code.

    layer = DCMHA(d_model=256, n_heads=8, rope=1e4)
    y = layer(x)                                             # (B, T, D) -> (B, T, D)
    cache = layer.new_cache()
    y = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(x.shape[1])], dim=1)  # the same
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

COMPUTATIONS = ("fast", "reference", "explicit")
BLOCK = 2**18  # scores in a block of the fast computation: 1 MiB in float32, what a core's cache holds
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
        self.W_2 = nn.Linear(K, K, bias=False)
        self.W_g = nn.Linear(d_model, n_heads, bias=False) if gates else None

    def forward(self, x: Tensor) -> Factors:
        w1, w2 = self.W_2(gelu(self.W_1(x))).unflatten(-1, self.shape).unbind(dim=-3)  # (B, T, R, H)
        w1 = w1 * (w1.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        return w1, w2, None if self.W_g is None else torch.tanh(self.W_g(x))


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

    def extend(self, k: Tensor, v: Tensor, factors: dict, n_tokens: int, window: int | None):
        """Put what is kept before the new k, v and key factors; keep what the next token can read."""
        (k, self.k), (v, self.v) = extended(self.k, k, window, 2), extended(self.v, v, window, 2)
        for place in ("pre", "post"):
            if (new := factors.get(f"{place}_key")) is not None:
                pairs = zip(getattr(self, place) or (None, None, None), new, strict=True)
                both = [extended(a, b, window, 1) for a, b in pairs]
                factors[f"{place}_key"], kept = zip(*both, strict=True)
                setattr(self, place, kept)
        self.n_tokens = n_tokens
        return k, v


class DCMHA(nn.Module):
    """Attention from x (B, T, D) to (B, T, D) whose heads are composed anew for every query and key.

    rank: R of each dynamic part. pre, post: compose before, after the softmax. query_side, key_side, gates,
    static: the parts of the composition; static is a learned H×H matrix (talking heads). window: a query
    reads the last `window` keys, itself included (on both sides of itself if not causal). qk_norm: RMSNorm
    over d, with a scale, of queries and keys. rope: base of the rotary positions. d_head: None is D / H.
    n_kv_heads: grouped heads, query head i reads key/value head i // (H / H_kv). computation: "explicit", an
    H×H matrix for every pair; "reference", low rank; "fast", equal to both: `BlockwiseAttention`, but under
    torch.compile the reference, for the compiler to fuse. Low precision is composed in float32.
    """

    def __init__(
        self, d_model: int, n_heads: int, *, rank: int = 2, pre: bool = True, post: bool = True,
        query_side: bool = True, key_side: bool = True, gates: bool = True, static: bool = False,
        window: int | None = None, causal: bool = True, qk_norm: bool = False, rope: float | None = None,
        d_head: int | None = None, n_kv_heads: int | None = None, bias: bool = False,
        computation: str = "fast",
    ):  # fmt: skip
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        counts = dict(d_model=d_model, n_heads=n_heads, rank=rank, n_kv_heads=n_kv_heads)
        for name, n in (counts | dict(d_head=d_head, window=window)).items():
            whole = n is None or isinstance(n, int) and not isinstance(n, bool) and n >= 1
            check(whole, f"{name} must be a whole number of at least 1, got {n!r}")
        fits = d_head is not None or d_model % n_heads == 0
        check(fits, f"n_heads must divide d_model: {d_model=}, {n_heads=}; or give d_head")
        check(n_heads % n_kv_heads == 0, f"n_kv_heads must divide n_heads: {n_heads=}, {n_kv_heads=}")
        self.d = d = d_model // n_heads if d_head is None else d_head
        turns = rope is None or d % 2 == 0 and rope is not True and rope > 0
        check(turns, f"RoPE needs an even head width and a positive base, as rope=1e4; got {d=}, {rope=}")
        composed = query_side or key_side or static or not (pre or post)
        check(composed, "nothing would be composed: query_side, key_side or static must be True")
        check(computation in COMPUTATIONS, f"unknown {computation=}; allowed: {', '.join(COMPUTATIONS)}")
        self.n_heads, self.n_kv_heads, self.window, self.causal = n_heads, n_kv_heads, window, causal
        self.rope, self.computation = rope, computation
        self.W_Q = nn.Linear(d_model, n_heads * d, bias=bias)
        self.W_K = nn.Linear(d_model, n_kv_heads * d, bias=bias)
        self.W_V = nn.Linear(d_model, n_kv_heads * d, bias=bias)
        self.W_O = nn.Linear(n_heads * d, d_model, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=1e-6) if qk_norm else nn.Identity() for _ in "qk")
        sides = dict(query_side=query_side, key_side=key_side, gates=gates, static=static)
        self.pre, self.post = (Stage(d_model, n_heads, rank, **sides) if on else None for on in (pre, post))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, in the order of `named_parameters()`, by `init_std`: A' starts near A."""
        for name, weight in self.named_parameters():
            std = self.init_std(name)
            weight.fill_(1.0) if std is None else weight.normal_(0.0, std, generator=generator)

    def init_std(self, name: str) -> float | None:
        """Standard deviation at the start (W_1, W_2, W_g as in the authors' JAX code). None: a scale, 1."""
        *_, part, kind = name.split(".")
        if kind in ("bias", "W_b"):
            return 0.0
        shape, H = self.get_parameter(name).shape, self.n_heads
        both = math.sqrt(2 / (shape[0] + shape[-1]))
        small = {"W_1": both, "W_2": 0.01 / (math.sqrt(H) * (H + 2)), "W_g": 0.005 * both}
        return (small | {"q_norm": None, "k_norm": None}).get(part, shape[-1] ** -0.5)

    new_cache = staticmethod(Cache)  # an empty cache for decoding: pass it to every call

    def forward(self, x: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). Arguments as in `attend`."""
        return self.attend(x, mask=mask, cache=cache)[0]

    def attend(
        self, x: Tensor, *, mask: Tensor | None = None, rows: slice | Tensor | None = None,
        cache: Cache | None = None, computation: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x (B, T, D) -> out (B, R, D), and the composed attention (B, H, R, T) except from "fast".

        mask: (T, T) or (B, T, T) bool, True where row may read column; given, it replaces the causal mask
        (the window stays). A row that may read nothing gives 0. rows: these query rows only. cache: x
        continues the tokens in it; it takes neither mask nor rows.
        """
        computation, D = computation or self.computation, self.W_Q.in_features
        check(computation in COMPUTATIONS, f"unknown {computation=}; allowed: {', '.join(COMPUTATIONS)}")
        check(x.dim() == 3 and x.shape[-1] == D, f"x must be (B, T, {D}), got {tuple(x.shape)}")
        B, T, shape = *x.shape[:2], None if mask is None else (mask.dtype, tuple(mask.shape))
        fits = mask is None or shape in ((torch.bool, (T, T)), (torch.bool, (B, T, T)))
        check(fits, f"mask must be torch.bool ({T}, {T}) or ({B}, {T}, {T}), got {shape}")
        alone = cache is None or mask is None and rows is None and self.causal
        check(alone, "decoding with a cache is causal and takes neither mask nor rows")
        kept = B if cache is None or cache.k is None else len(cache.k)
        check(kept == B, f"the cache holds a batch of {kept}, x has {B}")
        rows = slice(None) if rows is None else rows
        start, end = (0, T) if cache is None else (cache.n_tokens, cache.n_tokens + T)
        at = torch.arange(start, end, device=x.device)  # positions of x
        q = self.q_norm(self.W_Q(x[:, rows]).unflatten(-1, (-1, self.d)).transpose(1, 2))  # (B, H, R, d)
        k = self.k_norm(self.W_K(x).unflatten(-1, (-1, self.d)).transpose(1, 2))  # (B, H_kv, T, d)
        v = self.W_V(x).unflatten(-1, (-1, self.d)).transpose(1, 2)
        if self.rope is not None:
            q = rotate(q, *rotation(at[rows], self.d, base=self.rope, like=q))
            k = rotate(k, *rotation(at, self.d, base=self.rope, like=k))
        factors = self.compositions(x, rows=rows)
        if cache is not None:
            k, v = cache.extend(k, v, factors, end, self.window)
        if self.n_kv_heads != self.n_heads:
            k, v = (part.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for part in (k, v))
        here = torch.arange(end - k.shape[2], end, device=x.device)  # positions of the keys
        readable = self._readable(at[rows], here, mask if mask is None else mask[..., rows, :])
        with torch.autocast(x.device.type, enabled=False):
            mix, weight = self._mix(q / math.sqrt(self.d), k, v, factors, readable, computation)
        return self.W_O(mix.transpose(1, 2).flatten(2)), weight

    def compositions(self, x: Tensor, *, rows: slice | Tensor = slice(None)) -> dict[str, Factors]:
        """What x (B, T, D) gives, by "pre_query", "pre_key", "post_query", "post_key"; queries: `rows`."""
        return {
            f"{place}_{side}": getattr(stage, side)(x if side == "key" else x[:, rows])
            for place, stage in (("pre", self.pre), ("post", self.post))
            for side in ("query", "key")
            if getattr(stage, side, None) is not None
        }

    def _readable(self, at: Tensor, here: Tensor, mask: Tensor | None) -> Tensor:
        """Which query positions `at` may read which key positions `here`: (B or 1, R, T) bool."""
        at = at[:, None]
        readable = (here <= at) | (not self.causal) if mask is None else mask
        if self.window is not None:
            readable = readable & (here > at - self.window) & (here < at + self.window)
        return readable.view(-1, *readable.shape[-2:])

    def _mix(self, q, k, v, factors: dict, readable, computation: str) -> tuple[Tensor, Tensor | None]:
        """Mixed values (B, H, R, d) and weight (B, H, R, T), or None from "fast". q is scaled already."""
        wide = torch.promote_types(v.dtype, torch.float32)
        factors = {n: tuple(None if w is None else w.to(wide) for w in f) for n, f in factors.items()}
        pre, post = (
            (factors.get(f"{place}_query"), factors.get(f"{place}_key"), getattr(stage, "W_b", None))
            for place, stage in (("pre", self.pre), ("post", self.post))
        )
        if computation == "fast" and not torch.compiler.is_compiling():
            q, k, parts = q.to(wide), k.to(wide), (*fold(q, k, *pre), *fold(q, k, *post))
            return BlockwiseAttention.apply(readable, q, k, v.to(wide), *parts).to(v.dtype), None
        compose = compose_explicit if computation == "explicit" else compose_low_rank
        score, hidden = compose((q @ k.mT).to(wide), *pre), ~readable[:, None]  # (B, H, R, T)
        weight = score.masked_fill(hidden, -math.inf).softmax(dim=-1)
        weight = compose(weight.masked_fill(hidden, 0.0), *post)  # a row of -inf alone would be NaN
        return weight.to(v.dtype) @ v, None if computation == "fast" else weight


def compose_low_rank(A: Tensor, query: Factors | None, key: Factors | None, W_b: Tensor | None) -> Tensor:
    """A' of the module's formula, from A (B, H, R, T); query factors (B, R, …), key factors (B, T, …)."""
    out = A if W_b is None else A + torch.einsum("bgij,gh->bhij", A, W_b)
    for factors, t in ((query, "i"), (key, "j")):
        w1, w2, g = factors or (None, None, None)
        if w1 is not None:
            mixed = torch.einsum(f"bgij,b{t}rg->brij", A, w1)
            out = out + torch.einsum(f"brij,b{t}rh->bhij", mixed, w2)
        if g is not None:
            out = out + A * g.mT.unsqueeze(-1 if t == "i" else -2)
    return out


def compose_explicit(A: Tensor, query: Factors | None, key: Factors | None, W_b: Tensor | None) -> Tensor:
    """The same with the H×H matrix of every pair written out: (B, R, T, H, H), for checks."""
    M = torch.eye(A.shape[1], dtype=A.dtype, device=A.device) + (0 if W_b is None else W_b)
    M = M if query is None else M + matrices(query)[:, :, None]
    M = M if key is None else M + matrices(key)[:, None]
    return torch.einsum("bgij,bijgh->bhij", A, M.expand(len(A), *A.shape[2:], -1, -1))


def matrices(factors: Factors) -> Tensor:
    """Σ_r w1 w2^T + diag(g) as (B, T, H, H), from head g to head h."""
    w1, w2, g = factors
    M = torch.einsum("btrg,btrh->btgh", w1, w2)
    return M if g is None else M + torch.diag_embed(g)


class BlockwiseAttention(torch.autograd.Function):
    """softmax(compose(q k^T)), composed again, times v, by blocks of queries and the keys that they may read.

    apply(readable, q, k, v, *pre, *post) -> (B, H, R, d); q as that, k, v (B, H, T, d); pre, post: `fold`.
    The query's side is one H×H matrix M_i a row: scores A of C rows, laid out (C, B, H, S), are composed by
    C·B products M_i^T A_i. The key's side stays low rank. Only the inputs are saved; the backward pass
    computes each block again. There, with dA' for the gradient of A',

        dA_ij = M_i dA'_ij + g_j dA'_ij + Σ_r w1_j (w2_j · dA'_ij),   dM_i = A_i dA'_i^T,
        dw1_j = Σ_i A_ij (w2_j · dA'_ij),   dw2_j = Σ_i dA'_ij (w1_j · A_ij),   dg_j = Σ_i A_ij dA'_ij.
    """

    @staticmethod
    def forward(ctx, readable: Tensor, q: Tensor, k: Tensor, v: Tensor, *folded):
        torch.empty(2**23 - 2**12)  # its end teaches glibc to reuse what blocks free: no page faults (-15 %)
        (B, H, R, d), T = q.shape, k.shape[2]
        q, k, v = (x.reshape(B * H, -1, d).contiguous() for x in (q, k, v))
        ctx.shape, ctx.blocks, out = (B, H, R, T), [*blocks(B, H, R, T, readable)], torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, *folded)
        for b, h, i, j, seen in ctx.blocks:
            pre, post = (part(x, b, i, j) for x in (folded[:4], folded[4:]))
            composed, _ = compose_block(block_weights(q[h, i], k[h, j], pre, seen)[1], *post)
            out[h, i] = torch.bmm(composed.flatten(1, 2).transpose(0, 1), v[h, j])
        return out.view(B, H, R, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (q, k, v, *folded), (B, H, R, T) = ctx.saved_tensors, ctx.shape
        dq, d_out, d = torch.zeros_like(q), d_out.reshape(q.shape).contiguous(), q.shape[-1]
        dk, dv = k.new_zeros(B * H, d, T), v.new_zeros(B * H, d, T)  # transposed: faster to add to
        d_folded = [None if x is None else torch.zeros_like(x) for x in folded]
        sets = folded[:4], folded[4:], d_folded[:4], d_folded[4:]
        with torch.autocast(q.device.type, enabled=False):
            for b, h, i, j, seen in ctx.blocks:
                pre, post, d_pre, d_post = (part(x, b, i, j) for x in sets)
                A, P, mixed_pre = block_weights(q[h, i], k[h, j], pre, seen)
                composed, mixed_post = compose_block(P, *post)
                dv[h, :, j].baddbmm_(d_out[h, i].mT, composed.flatten(1, 2).transpose(0, 1))
                dP = torch.bmm(d_out[h, i], v[h, j].mT).transpose(0, 1).contiguous().view_as(P)
                dP = compose_block_backward(P, dP, mixed_post, post, d_post)
                dA = torch._softmax_backward_data(dP, P, -1, P.dtype)
                dA = compose_block_backward(A, dA, mixed_pre, pre, d_pre).flatten(1, 2).transpose(0, 1)
                dq[h, i] = torch.bmm(dA, k[h, j])
                dk[h, :, j].baddbmm_(q[h, i].mT, dA)
        return None, dq.view(B, H, R, d), dk.mT.view(B, H, T, d), dv.mT.view(B, H, T, d), *d_folded


def fold(q: Tensor, k: Tensor, query, key, W_b) -> tuple[Tensor | None, ...]:
    """M_i = 1 + W_b + Σ_r w1 w2^T + diag(g) (B, R, H, H), the keys' w1, w2 (rank, B, H, T), g (B, H, T)."""
    (B, H, R, _), T = q.shape, k.shape[2]
    M = None if query is None and W_b is None else torch.eye(H, dtype=q.dtype, device=q.device)
    M = M if W_b is None else M + W_b
    M = M if query is None else M + matrices(query)
    w1, w2, g = key or (q.new_empty(B, T, 0, H), q.new_empty(B, T, 0, H), None)
    w1, w2 = (w.permute(2, 0, 3, 1).contiguous() for w in (w1, w2))
    return None if M is None else M.expand(B, R, H, H), w1, w2, None if g is None else g.mT.contiguous()


def part(folded, b: slice, i: slice, j: slice) -> list[Tensor | None]:
    """Views of what composes a block: M (C, b, H, H), w1, w2 (rank, b, H, S), g (b, H, S)."""
    M, *key = folded
    return [M if M is None else M[b, i].transpose(0, 1), *(w if w is None else w[..., b, :, j] for w in key)]


def blocks(B: int, H: int, R: int, T: int, readable: Tensor):
    """Batch elements b, their heads h, queries i, keys j from first to last that i may read, which it may."""
    C = min(64, max(16, BLOCK // (H * T)))
    several = max(1, BLOCK // (min(C, R + 1) * H * T))
    for b in (slice(start, min(start + several, B)) for start in range(0, B, several)):
        for i in (slice(start, start + C) for start in range(0, R, C)):
            seen = readable[b if len(readable) > 1 else slice(1), i]  # (b or 1, C, T)
            columns = seen.any(dim=0).any(dim=0).nonzero()
            if len(columns):
                j = slice(int(columns[0]), int(columns[-1]) + 1)
                yield b, slice(b.start * H, b.stop * H), i, j, seen[..., j].transpose(0, 1)[:, :, None]


def block_weights(q: Tensor, k: Tensor, pre, seen: Tensor):
    """Scores A (C, b, H, S), the softmax P of their composition, and what `compose_block` keeps."""
    A = torch.bmm(q, k.mT).transpose(0, 1).contiguous().unflatten(1, (-1, pre[1].shape[2]))
    P, mixed = compose_block(A, *pre)
    P += P.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)  # faster than to fill each head
    torch.softmax(P, dim=-1, out=P)
    if (blank := ~seen.any(dim=-1, keepdim=True)).any():
        P.masked_fill_(blank, 0.0)
    return A, P, mixed


def compose_block(A: Tensor, M, w1, w2, g) -> tuple[Tensor, list[Tensor]]:
    """A' of a block A (C, b, H, S), and Σ_g A_g w1_g (C, b, 1, S) for each rank of the key side."""
    out = A.clone() if M is None else torch.bmm(M.flatten(0, 1).mT, A.flatten(0, 1)).view_as(A)
    if g is not None:
        out.addcmul_(A, g)
    mixed = [(A * w).sum(dim=2, keepdim=True) for w in w1]
    for each, w in zip(mixed, w2, strict=True):
        out.addcmul_(each, w)
    return out, mixed


def compose_block_backward(A: Tensor, d_out: Tensor, mixed: list[Tensor], part, d_part) -> Tensor:
    """dA, from d_out = dA'. What M, w1, w2 and g receive is added to d_part."""
    (M, w1, w2, g), (dM, dw1, dw2, dg) = part, d_part
    if M is None:
        dA = d_out.clone()
    else:
        dA = torch.bmm(M.flatten(0, 1), d_out.flatten(0, 1)).view_as(A)
        dM += torch.bmm(A.flatten(0, 1), d_out.flatten(0, 1).mT).view_as(M)
    if g is not None:
        dA.addcmul_(d_out, g)
        dg += (A * d_out).sum(dim=0)
    for r, each in enumerate(mixed):
        dw2[r] += (d_out * each).sum(dim=0)
        d_each = (d_out * w2[r]).sum(dim=2, keepdim=True)
        dw1[r] += (A * d_each).sum(dim=0)
        dA.addcmul_(d_each, w1[r])
    return dA


def rotation(at: Tensor, d: int, *, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, d/2) of the angles t · base^(−2j/d), position t of `at` (T,), pair j; as `like`."""
    angle = at[:, None] * base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=at.device) / d)
    return angle.cos().to(like), angle.sin().to(like)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (…, T, d), in the half-split order of Llama: coordinate j turns with coordinate j + d/2."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def extended(old: Tensor | None, new: Tensor | None, window: int | None, dim: int):
    """old, then new; and the last window − 1 of these, without the memory of the rest."""
    if new is None:
        return None, None
    x = new.clone() if old is None else torch.cat([old, new], dim)
    drop = 0 if window is None else max(0, x.shape[dim] + 1 - window)
    return x, x.narrow(dim, drop, x.shape[dim] - drop).clone() if drop else x


def check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
