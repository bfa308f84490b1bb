"""One Transformer: hand-built solvers, toys trained in the chapters and SmolLM2 run through this class.

A pre-norm Transformer. Layers count from 0, h is the residual stream (B, T, D), residual[0] the embeddings:

    a_l = Attention_l(Norm(h_l)),   m_l = MLP_l(Norm(h_l + a_l)),   h_{l+1} = h_l + a_l + m_l,
    logits = readout(h_L) = Norm(h_L) W_U^T (+ b_U).

B batch, T tokens, D model width, H heads, d head width, L layers, V logits. Weight matrices are (out, in):
a linear map computes x @ W.T. Norm "none" is the identity, so that hand-built weights keep their values.

    model = Transformer(TransformerConfig(vocab=7, max_tokens=16), seed=0)
    trace = model.trace(tokens, read=("residual", "attention_weight"), interventions=[Skip(1)])

Sources: Vaswani et al. 2017 (attention), Xiong et al. 2020 (pre-norm), Su et al. 2021 (RoPE), Zhang and
Sennrich 2019 (RMSNorm), Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (grouped query heads).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.choices import check_choice
from lib.models.attention import Attention, ComposedAttention, check_attention
from lib.models.inputs import check_count, check_mask, check_rows, check_tokens
from lib.models.interventions import (
    Erase,
    Intervention,
    Replace,
    Skip,
    Swap,
    check_interventions,
    swapped_order,
)
from lib.models.mlp import MLP, NoMLP

__all__ = ["Erase", "Replace", "Skip", "Swap", "Trace", "Transformer", "TransformerConfig"]

CHOICES = {
    "norm": ("none", "layer", "rms"),
    "activation": ("relu", "gelu", "swiglu"),
    "positions": ("none", "learned", "rope"),
    "attention": ("mha", "dcmha"),
    "attention_kernel": ("sdpa", "explicit"),
}
INITS = ("default", "zeros")
TAPS = ("residual", "attention_out", "mlp_out", "attention_weight")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a Transformer. ValueError on an impossible one, naming what is allowed.

    None means "derived": the numbers in force are the properties head_width, kv_heads, mlp_width and n_out.
    """

    vocab: int
    d_model: int = 64
    n_heads: int = 4
    n_layers: int = 2
    d_head: int | None = None  # None: d_model / n_heads
    n_kv_heads: int | None = None  # None: n_heads. Query head i reads kv head i // (n_heads / n_kv_heads)
    d_mlp: int | None = None  # None: 4 d_model. 0: attention-only layers
    n_logits: int | None = None  # None: vocab. Fewer when the answers are a smaller set than the inputs
    norm: str = "rms"  # none | layer | rms
    norm_scale: bool = True  # a learned scale (and, for "layer", a learned shift)
    norm_eps: float = 1e-5
    activation: str = "relu"  # relu | gelu (exact, not tanh) | swiglu: W_2 (silu(W_gate x) * W_1 x)
    positions: str = "rope"  # none | learned | rope
    max_tokens: int | None = None  # longest input; needed by learned positions, otherwise None is no limit
    rope_base: float = 1e4
    causal: bool = True
    tied: bool = False  # the readout is the transposed embedding
    attention_bias: bool = False  # on W_Q, W_K, W_V and W_O
    mlp_bias: bool = True  # on the hidden units: W_1 (and W_gate)
    mlp_output_bias: bool = False  # on W_2
    readout_bias: bool = False
    attention: str = "mha"  # | dcmha: heads composed per query and key, lib.models.dcmha
    attention_kernel: str = "sdpa"  # sdpa: torch's fused softmax attention (or DCMHA's fast one) | explicit
    qk_norm: bool = False  # RMSNorm, with a scale, of queries and keys over the head width
    windows: tuple[int | None, ...] = (None,)  # keys a query reads, by layer, repeated: (256, None) is "LG"
    dc_rank: int = 2  # this and the following: the switches of lib.models.dcmha.DCMHA
    dc_pre: bool = True
    dc_post: bool = True
    dc_query_side: bool = True
    dc_key_side: bool = True
    dc_gates: bool = True
    dc_static: bool = False

    def __post_init__(self):
        for kind, allowed in CHOICES.items():
            check_choice(kind, getattr(self, kind), allowed)
        for name in ("vocab", "d_model", "n_heads", "n_layers", "dc_rank"):
            check_count(name, getattr(self, name))
        for name in ("d_head", "n_kv_heads", "d_mlp", "n_logits", "max_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0 if name == "d_mlp" else 1)
        for name in ("norm_eps", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_attention(self)
        object.__setattr__(self, "windows", tuple(self.windows))  # JSON brings a list
        D, H = self.d_model, self.n_heads
        if self.d_head is None and D % H:
            raise ValueError(
                f"n_heads must divide d_model when d_head is not given: d_model={D}, n_heads={H}; "
                f"allowed n_heads: {_divisors(D)}, or any with d_head given"
            )
        if H % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads: n_heads={H}, n_kv_heads={self.n_kv_heads}; "
                f"allowed n_kv_heads: {_divisors(H)}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"RoPE rotates pairs, so the head width must be even, got {self.head_width}; "
                "give an even d_head, or positions='learned' or 'none'"
            )
        if self.positions == "learned" and self.max_tokens is None:
            raise ValueError("learned positions need max_tokens, the number of positions to learn")
        if self.tied and self.n_out != self.vocab:
            raise ValueError(
                f"a tied readout has one logit per vocabulary entry: vocab={self.vocab}, "
                f"n_logits={self.n_logits}; leave n_logits out, or set tied=False"
            )

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def mlp_width(self) -> int:
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    @property
    def n_out(self) -> int:
        return self.n_logits or self.vocab

    @property
    def plain(self) -> bool:
        """Whether attention is softmax attention and nothing else: no composition, QK norm or window."""
        return self.attention == "mha" and not self.qk_norm and set(self.windows) == {None}


@dataclass(frozen=True, eq=False)
class Trace:
    """What a pass left behind: the logits (B, T, V) and the taps that were read. With `rows`, R tokens for T.

    A tap that was not read is an AttributeError that says how to read it. Taps keep their gradient.
    """

    logits: Tensor
    taps: dict[str, Tensor]

    @property
    def residual(self) -> Tensor:
        """(L + 1, B, T, D): the stream before layer 0, 1, …, and last before the final norm."""
        return self._tap("residual")

    @property
    def attention_out(self) -> Tensor:
        """(L, B, T, D): a_l, what attention adds to the stream, before it is added."""
        return self._tap("attention_out")

    @property
    def mlp_out(self) -> Tensor:
        """(L, B, T, D): m_l, what the MLP adds to the stream, before it is added."""
        return self._tap("mlp_out")

    @property
    def attention_weight(self) -> Tensor:
        """(L, B, H, T, T): row reads column; with `rows`: (L, B, H, R, T). Uncomposed, rows sum to 1."""
        return self._tap("attention_weight")

    def _tap(self, name: str) -> Tensor:
        if name not in self.taps:
            raise AttributeError(
                f"this trace did not read {name}; ask for it: trace(tokens, read=({name!r},))"
            )
        return self.taps[name]


class Transformer(nn.Module):
    """A Transformer of the given shape, its weights drawn from `seed` on the CPU in float32.

    init="default": embeddings and learned positions N(0, 0.5²); every other matrix N(0, 1/fan_in), W_O and
    W_2 further divided by √(2L), which keeps the stream from growing with depth; biases 0, norm scales 1.
    Draws follow the order of `named_parameters()`: embedding, positions, then layer by layer W_Q, W_K, W_V,
    W_O, W_gate, W_1, W_2, then W_U; compositions of heads come from a generator of their own, so that
    models of one seed agree in all else. The global random state is neither read nor changed.
    init="zeros": every matrix 0, for weights that are set by hand or loaded.
    """

    def __init__(self, config: TransformerConfig, *, seed: int, init: str = "default"):
        super().__init__()
        check_choice("init", init, INITS)
        self.config = c = config
        with torch.device("meta"):  # shapes only: nn.Linear would draw from the global random state
            self.embedding = nn.Embedding(c.vocab, c.d_model)
            if c.positions == "learned":
                self.position = nn.Embedding(c.max_tokens, c.d_model)
            self.layers = nn.ModuleList(Layer(c, l) for l in range(c.n_layers))
            self.norm = _norm(c)
            if not c.tied:
                self.W_U = nn.Linear(c.d_model, c.n_out, bias=False)
            self.b_U = nn.Parameter(torch.empty(c.n_out)) if c.readout_bias else None
        self.to_empty(device="cpu")
        self._draw(seed, init)

    @torch.no_grad()
    def _draw(self, seed: int, init: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        composing = torch.Generator().manual_seed(seed + 2**40)  # so a seed gives mha and dcmha the same rest
        for name, weight in self.named_parameters():
            if part := re.fullmatch(r"(layers\.\d+\.attention)\.((?:pre|post)\..*)", name):
                std = self.get_submodule(part[1]).init_std(part[2]) if init == "default" else 0.0
                weight.normal_(0.0, std, generator=composing)
            elif weight.dim() == 1:  # biases, and the norms' scale and shift
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif init == "zeros":
                weight.zero_()
            else:
                std = 0.5 if name in ("embedding.weight", "position.weight") else weight.shape[1] ** -0.5
                if name.endswith(("W_O.weight", "W_2.weight")):
                    std /= math.sqrt(2 * self.config.n_layers)
                weight.normal_(0.0, std, generator=generator)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, rows: slice | Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V), or (B, R, V) at `rows` only. Arguments and errors as in `trace`."""
        return self.trace(tokens, mask=mask, rows=rows, read=()).logits

    def trace(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        read: Iterable[str] = ("residual", "attention_out", "mlp_out"),
        interventions: Iterable[Intervention] = (),
        rows: slice | Tensor | None = None,
    ) -> Trace:
        """One pass that keeps the taps named in `read` and applies `interventions`. Differentiable.

        tokens: (B, T) long, or (B, T, S) long, where an input token is the sum of S embeddings.
        mask:   (T, T) or (B, T, T) bool, True where row may read column. Given, it replaces the causal mask.
                A row that may read nothing is an error.
        read:   names among residual, attention_out, mlp_out, attention_weight; only these are kept. Reading
                attention_weight computes the attention explicitly.
        rows:   a slice, or a tensor of token indices (R,): logits and taps at these tokens only. The last
                layer computes nothing else, which is exact: no later layer reads the other tokens.
        ValueError for tokens, masks, taps or interventions that do not fit, before anything is computed.
        """
        read = (read,) if isinstance(read, str) else tuple(read)
        for name in read:
            check_choice("tap", name, TAPS)
        if (
            not torch.compiler.is_compiling()
        ):  # a compiled graph cannot read values: check one batch uncompiled
            check_tokens(tokens, vocab=self.config.vocab, max_tokens=self.config.max_tokens)
            check_mask(mask, B=tokens.shape[0], T=tokens.shape[1], windows=self.config.windows)
            check_rows(rows, T=tokens.shape[1])
        B, T, L = *tokens.shape[:2], self.config.n_layers
        edits = check_interventions(interventions, B=B, T=T, D=self.config.d_model, L=L)
        place = swapped_order(edits, L)
        edits = [edit for edit in edits if not isinstance(edit, Swap)]

        kept = {name: [] for name in read}
        explicit = "attention_weight" in read or self.config.attention_kernel == "explicit"
        h = self.embed(tokens)  # (B, T, D)
        for edit in edits:
            h = edit.on_layer(h, h, None) if edit.layer == -1 else h
        _keep(kept, rows, residual=h)
        for l in range(L):
            layer, here = self.layers[place[l]], [edit for edit in edits if edit.layer == l]
            last = rows if l == L - 1 else None  # in the last layer only these tokens are computed
            a, weight = layer.attention(layer.attention_norm(h), mask=mask, rows=last, explicit=explicit)
            h = h if last is None else h[:, last]  # (B, R, D)
            for edit in here:
                a = edit.on_sublayer("attention", h, a, last)
            middle = h + a
            m = layer.mlp(layer.mlp_norm(middle))
            for edit in here:
                m = edit.on_sublayer("mlp", middle, m, last)
            after = middle + m
            for edit in here:
                after = edit.on_layer(h, after, last)
            h = after
            todo = rows if last is None else None
            _keep(kept, todo, residual=h, attention_out=a, mlp_out=m, attention_weight=weight)
        return Trace(self.readout(h), {name: torch.stack(values) for name, values in kept.items()})

    def embed(self, tokens: Tensor) -> Tensor:
        """residual[0] (B, T, D): embeddings, summed over S for tokens (B, T, S), plus learned positions."""
        h = self.embedding(tokens)
        h = h.sum(dim=2) if tokens.dim() == 3 else h
        return h + self.position.weight[: h.shape[1]] if self.config.positions == "learned" else h

    def run_layer(self, l: int, h: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(a_l, m_l), each (B, T, D), that layer l adds to a stream h (B, T, D), wherever h comes from."""
        if not 0 <= l < self.config.n_layers:
            raise ValueError(f"no layer {l}; allowed: 0 to {self.config.n_layers - 1}")
        if h.dim() != 3 or h.shape[-1] != self.config.d_model:
            raise ValueError(f"h must be (B, T, {self.config.d_model}), got {tuple(h.shape)}")
        check_mask(mask, B=h.shape[0], T=h.shape[1], windows=self.config.windows)
        layer = self.layers[l]
        explicit = self.config.attention_kernel == "explicit"
        a, _ = layer.attention(layer.attention_norm(h), mask=mask, rows=None, explicit=explicit)
        return a, layer.mlp(layer.mlp_norm(h + a))

    def readout(self, h: Tensor) -> Tensor:
        """Logits (…, V) of a stream h (…, D), normalised by its own statistics: readout(residual[-1]) is the
        model's output, readout(residual[l]) the logit lens at the input of layer l."""
        W = self.embedding.weight if self.config.tied else self.W_U.weight  # (V, D)
        return nn.functional.linear(self.norm(h), W, self.b_U)

    def n_parameters(self) -> int:
        """Number of weights; a tied readout counts once."""
        return sum(weight.numel() for weight in self.parameters())

    def weights_hash(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every weight; the same on every device."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """The shape in words, on a few lines."""
        c = self.config
        grouped = f" on {c.kv_heads} key/value heads" if c.kv_heads != c.n_heads else ""
        grouped += ", composed" * (c.attention == "dcmha") + ", QK norm" * c.qk_norm
        grouped += f", windows {c.windows}" if set(c.windows) != {None} else ""
        return (
            f"Transformer, {self.n_parameters():,} parameters\n"
            f"  {c.n_layers} layers of width {c.d_model}, {'causal' if c.causal else 'bidirectional'}, "
            f"norm {c.norm}, positions {c.positions}\n"
            f"  {c.n_heads} heads of width {c.head_width}{grouped}, {c.activation} MLP {c.mlp_width} wide\n"
            f"  vocabulary {c.vocab}, {c.n_out} logits{' from the tied embedding' if c.tied else ''}"
        )

    __repr__ = describe


class Layer(nn.Module):
    """Two sublayers, each behind its norm."""

    def __init__(self, c: TransformerConfig, l: int):
        super().__init__()
        kind = Attention if c.attention == "mha" else ComposedAttention
        self.attention_norm, self.attention = _norm(c), kind(c, window=c.windows[l % len(c.windows)])
        self.mlp_norm, self.mlp = (_norm(c), MLP(c)) if c.mlp_width else (nn.Identity(), NoMLP())


def _norm(c: TransformerConfig) -> nn.Module:
    if c.norm == "none":
        return nn.Identity()
    kind = nn.LayerNorm if c.norm == "layer" else nn.RMSNorm
    return kind(c.d_model, eps=c.norm_eps, elementwise_affine=c.norm_scale)


def _keep(kept: dict[str, list[Tensor]], rows, **taps: Tensor | None) -> None:
    for name, x in taps.items():
        if name in kept:
            kept[name].append(x if rows is None else x[..., rows, :])  # tokens are the axis before the last


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
