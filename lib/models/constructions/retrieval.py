"""Attention-only layers that find an item by any key and return any of its values, in weights.

Three forms, for the task `lib.tasks.retrieval.RelationalRetrieval`, whose rows of the embedding table they
take: nothing, C K keys, W V values, W words for what is asked. All are ours.

"composed", H = max(C, W) heads. Head c finds: it attends to the item whose key c is that of the query. Head w
carries: it copies value w to the answer. The question (c, v, w) composes them after the softmax, with rank 1,
w1 = one-hot(c) and w2 = gain · one-hot(w) (√H: w1 is divided by its root mean square over the heads):

    A'_w = A_w + gain √H A_c

"fixed": the same without the composition; head h reads its own pattern and carries its own value. A control.
"plain", H = W heads of softmax attention, C times as wide. Head w finds by all keys at once (a query names
one of them) and carries value w; unless that is asked for, it looks at the query token itself, which carries
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.choices import check_choice
from lib.models.transformer import Transformer, TransformerConfig

FORMS = ("composed", "fixed", "plain")
HIDDEN = 64.0  # GELU is the identity here to the last bit, and 0 at 0


def relational_retrieval(
    C: int,
    K: int,
    W: int,
    V: int,
    *,
    how: str = "composed",
    sharpness: float = 32.0,
    gain: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Transformer:
    """The layer for C keys with K values each and W values out of V. Logits (B, T, V) at the query tokens.

    how: a form of the module's list. sharpness: the score of the item that matches; all others have 0.
    gain: None is 4 H. Give it the task's mask. ValueError on another form or sizes below 1.
    """
    check_choice("form", how, FORMS)
    for name, size in dict(C=C, K=K, W=W, V=V).items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is a whole number of at least 1, got {size!r}")
    vocab = 1 + C * K + W * V + W
    H, d = (W, max(C * K, V) + 1) if how == "plain" else (max(C, W), max(K, V))
    shape = dict(
        vocab=vocab, d_model=vocab + V, n_layers=1, n_heads=H, d_head=d, d_mlp=0, n_logits=V, norm="none",
        positions="none", causal=False,
    )  # fmt: skip
    if how != "plain":
        shape |= dict(attention="dcmha", dc_rank=1, dc_pre=False, dc_key_side=False, dc_gates=False)
    model = Transformer(TransformerConfig(**shape), seed=0, init="zeros")
    model = model.to(dtype).requires_grad_(False)
    key = torch.arange(C * K).view(C, K) + 1  # coordinate of "key c is v"
    value = torch.arange(W * V).view(W, V) + 1 + C * K
    asks = torch.arange(W) + 1 + C * K + W * V
    answer = torch.arange(V) + vocab
    attention = model.layers[0].attention
    W_Q, W_K, W_V = (m.weight.view(H, d, -1) for m in (attention.W_Q, attention.W_K, attention.W_V))
    W_O = attention.W_O.weight.view(-1, H, d)

    model.embedding.weight[1:, 1:vocab] = torch.eye(vocab - 1, dtype=dtype)  # row 0 is nothing
    model.W_U.weight[torch.arange(V), answer] = 1
    meets = [key.flatten()] * W if how == "plain" else list(key)  # by head: the values that meet themselves
    for h, values in enumerate(meets):
        at = torch.arange(len(values))
        W_Q[h, at, values] = sharpness * d**0.5
        W_K[h, at, values] = 1
        W_K[h, : len(values), asks] = -1  # a query token holds a key too: it is not an item
    for w in range(W):
        W_V[w, torch.arange(V), value[w]] = 1
        W_O[answer, w, torch.arange(V)] = 1
    if how == "plain":
        for w in range(W):  # not asked for, a head looks at the query token
            W_Q[w, -1, asks[torch.arange(W) != w]] = 2 * sharpness * d**0.5
            W_K[w, -1, asks] = 1
    elif how == "composed":
        _read_question(attention.post.query, key, asks, 4 * H if gain is None else gain)
    return model


def _read_question(question: torch.nn.Module, key: Tensor, asks: Tensor, gain: float) -> None:
    """w1 = one-hot(c) and w2 = gain · one-hot(w), through 2 H hidden units: which key, which value."""
    H = question.shape[-1]
    hidden, factors = question.W_1.weight, question.W_2.weight.view(2, H, 2 * H)
    for c in range(len(key)):
        hidden[c, key[c]] = HIDDEN
        factors[0, c, c] = 1
    for w in range(len(asks)):
        hidden[H + w, asks[w]] = HIDDEN
        factors[1, w, H + w] = gain / HIDDEN
