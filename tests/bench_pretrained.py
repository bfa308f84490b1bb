"""Rows of the speed table for pretrained models: `rows(tell)` -> fields of `bench.Row`, one tuple a row.

Run alone: .venv/bin/python tests/bench_pretrained.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from operator import truediv

import torch
from torch import Tensor

from lib.models import pretrained
from lib.models.pretrained.llama import HF_NAMES, translated
from lib.models.transformer import Transformer

NAME = "smollm2-135m"
T = 256  # tokens of a forward: one window of the pages' default


def rows(tell: Callable[[str], None], *, turns: int = 5) -> list[tuple]:
    """Forward with taps against transformers with output_hidden_states, same weights; loading from the cache.

    Without the model on this machine, or without transformers, there is no row.
    """
    if not pretrained.available(NAME):
        tell(f"{NAME} is not on this machine: make models")
        return []
    loads = [timed(lambda: pretrained.load(NAME)) for _ in range(turns)]
    model = pretrained.load(NAME)
    theirs = reference(model)
    tokens = torch.randint(model.config.vocab, (1, T), generator=torch.Generator().manual_seed(0))

    def ours() -> Tensor:
        return model.trace(tokens, read=("residual",)).logits

    def other() -> Tensor:
        return theirs(tokens, output_hidden_states=True, use_cache=False).logits

    with torch.inference_mode():
        gap = (ours() - other()).abs().max() / other().abs().max()
        if not gap < 1e-4:
            raise AssertionError(f"the logits differ from those of transformers by {gap:.1e}")
        rate = {ours: [], other: []}
        for turn in range(turns):
            for arm, found in rate.items():
                found.append(T / timed(arm, clock=time.process_time))
            tell(f"turn {turn + 1} of {turns}: {rate[ours][-1]:.0f} tokens/s, {rate[other][-1]:.0f} tokens/s")
    what = f"SmolLM2-135M, {T} tokens, residual stream of all layers"
    return [
        (what, "tokens/s", rate[ours], rate[other], "transformers, hidden states", ">= 0.9"),
        ("SmolLM2-135M, load from the cache", "s", loads, (), "", "<= 2"),
    ]


def reference(model: Transformer):
    """transformers' own model of that shape, on the same weights in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.d_model, num_attention_heads=c.n_heads, head_dim=c.head_width,
        num_key_value_heads=c.kv_heads, num_hidden_layers=c.n_layers, intermediate_size=c.mlp_width,
        rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_tokens, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
    )  # fmt: skip
    weights = {translated(name, HF_NAMES): w.detach() for name, w in model.named_parameters()}
    if c.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(weights, assign=True)
    return theirs


def timed(work: Callable[[], object], *, clock: Callable[[], float] = time.monotonic) -> float:
    start = clock()
    work()
    return clock() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, unit, ours, baseline, *_ in rows(print):
        against = f", {statistics.median(map(truediv, ours, baseline)):.3g} x" if baseline else ""
        print(f"{what}: {statistics.median(ours):.3g} {unit}{against}")
