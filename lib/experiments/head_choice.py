"""Train one layer on retrieval whose query chooses where to look and what to read: which attention learns it?

The layer is that of `lib.models.transformer`, pre-norm with a residual stream and no positions, computed at
the queries only. d_mlp=0 is a layer without an MLP, so nothing but attention stands between embedding and
readout; with d_mlp > 0 the MLP is the control: it can undo, behind the attention, what the heads mixed up.
All arms of one seed see the same prompts in the same order and are judged on the same fresh ones.

    mha          softmax attention            static      W_b only: talking heads (Shazeer et al. 2020)
    full         DCMHA: before and after the softmax, from the query and from the key
    full-pre     before the softmax only      full-post   after it only
    query        the query's side only        key         the key's side only
    query-pre    the query's side, before     query-post  the query's side, after

Wider MHA is arm "mha" with more or wider heads: n_heads and d_head are free of each other and of d_model. For
H = 4, D = 32 heads of width 15 have exactly the weights of "full", of width 12 about those of "query".
A training failure is evidence about training, never about impossibility.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.recipe import EVALUATION_STEP, read_settings, train
from lib.metrics.attention_cost import AttentionShape, forward_flops, training_flops
from lib.metrics.composition import (
    compose,
    composition_matrices,
    effective_rank,
    effective_rank_over_heads,
    numerical_rank,
    share_between,
    share_outside_span,
)
from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Optimizer
from lib.tasks.retrieval import Recombination, RelationalRetrieval, Retrievals
from lib.training import check_precision, seeds_by_role

TASKS = ("relational", "recombination")
_QUERY, _KEY = {"dc_key_side": False}, {"dc_query_side": False}
ARMS = {
    "mha": {"attention": "mha"},
    "static": {"dc_query_side": False, "dc_key_side": False, "dc_static": True},
    "full": {},
    "full-pre": {"dc_post": False},
    "full-post": {"dc_pre": False},
    "query": _QUERY,
    "query-pre": {**_QUERY, "dc_post": False},
    "query-post": {**_QUERY, "dc_pre": False},
    "key": _KEY,
}
PROBE_PROMPTS = 16  # fresh prompts on which scores are looked at


@dataclass(frozen=True, kw_only=True)
class HeadChoiceSettings:
    """One layer of one arm on one task. The sizes of the tasks: see `lib.tasks.retrieval`."""

    arm: str
    d_model: int
    n_heads: int
    steps: int
    task: str = "relational"
    d_head: int | None = None  # None: d_model / n_heads
    d_mlp: int = 0  # hidden units of the MLP; 0: no MLP
    rank: int = 2  # R of the dynamic compositions
    gates: bool = True
    N: int = 8  # items
    C: int = 4  # key attributes (relational)
    W: int = 4  # value attributes (relational)
    A: int = 4  # attributes (recombination)
    V: int = 8  # values of an attribute; of a key attribute N
    Q: int = 16  # queries a prompt
    sink: bool = True  # a query may read itself too, and so leave a head without an item
    batch: int = 64  # prompts a step
    adamw_lr: float = 3e-3
    warmup: int = 30  # steps; the rate falls linearly over the second half, to 3 %
    evaluate_every: int = 25  # steps
    stop_at: float | None = None  # accuracy at which training ends early; None: never, so that arms compare
    evaluation_prompts: int = 128  # with Q queries each
    look: bool = True  # measure ranks and composition maps of the trained layer
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self):
        check_choice("arm", self.arm, ARMS)
        check_choice("task", self.task, TASKS)
        for name in ("d_model", "n_heads", "steps", "d_mlp", "rank", "batch", "evaluate_every",
                     "evaluation_prompts"):  # fmt: skip
            value, least = getattr(self, name), 0 if name == "d_mlp" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")
        check_precision(self.precision, resolve_device(self.device))

    def make_task(self) -> RelationalRetrieval | Recombination:
        if self.task == "recombination":
            return Recombination(N=self.N, A=self.A, V=self.V, Q=self.Q, sink=self.sink)
        return RelationalRetrieval(N=self.N, C=self.C, W=self.W, V=self.V, Q=self.Q, sink=self.sink)

    def plan(self) -> Optimizer:
        """AdamW (0.9, 0.98) without decay, gradients clipped at 1."""
        return Optimizer(adamw_lr=self.adamw_lr, warmup=self.warmup)

    def config(self, task: RelationalRetrieval | Recombination) -> TransformerConfig:
        """One pre-norm layer, RMSNorm without scale, ReLU where there is an MLP, affine readout."""
        kind = {"attention": "dcmha", **ARMS[self.arm]}
        return TransformerConfig(
            vocab=task.vocab, n_logits=task.n_answers, d_model=self.d_model, n_heads=self.n_heads,
            d_head=self.d_head, n_layers=1, d_mlp=self.d_mlp, norm="rms", norm_scale=False, mlp_bias=True,
            activation="relu", positions="none", max_tokens=task.length, causal=False, readout_bias=True,
            dc_rank=self.rank, dc_gates=self.gates, **kind,
        )  # fmt: skip


def train_heads(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """One layer trained on RelationalRetrieval or Recombination. Settings: `HeadChoiceSettings`. One row:

    accuracy, untrained_accuracy: share of right answers on `evaluation_prompts` fresh prompts, after and
    before training; chance: of a guess; levels: accuracy of half solutions, by name (see the tasks);
    curve [[steps, accuracy], …]; steps_done; layer_parameters, non_embedding_parameters (and the readout's)
    and the other counts of `recipe.sizes`; flops_per_step: forward and backward, low-rank form, of one batch;
    and, if `look`, the entries of `look_inside`.
    """
    chosen = read_settings(HeadChoiceSettings, settings)
    task, seeds = chosen.make_task(), seeds_by_role(seed)
    device = resolve_device(chosen.device)
    mask = task.mask().to(device)
    model = Transformer(chosen.config(task), seed=seeds["init"])
    zero_padding(model)

    def loss(model: Transformer, prompts: Retrievals) -> Tensor:
        logits = model(prompts.tokens, mask=mask, rows=task.queries)  # (B, Q, V)
        return cross_entropy(logits.flatten(0, 1), prompts.answer.flatten())

    @torch.no_grad()
    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        prompts = task.batch(step, seed=seeds["evaluation"], size=chosen.evaluation_prompts)
        logits = model(prompts.tokens.to(device), mask=mask, rows=task.queries)
        return {"accuracy": (logits.argmax(dim=-1).cpu() == prompts.answer).double().mean().item()}

    row = train(
        chosen,
        model,
        loss,
        lambda step: task.batch(step, seed=seeds["data"], size=chosen.batch),
        evaluate,
        seed=seed,
        scratch=scratch,
    )
    return {
        **row,
        "non_embedding_parameters": row["layer_parameters"] + row["readout_parameters"],
        "chance": task.chance,
        "levels": task.levels(),
        "flops_per_step": training_flops(chosen.batch * prompt_flops(chosen, task)),
        **(look_inside(model, task, seed=seeds["evaluation"]) if chosen.look else {}),
    }


def zero_padding(model: Transformer) -> None:
    """Make row 0 of the embedding the zero vector for good: it has no gradient."""
    model.embedding.padding_idx = 0
    with torch.no_grad():
        model.embedding.weight[0] = 0.0


def prompt_flops(chosen: HeadChoiceSettings, task: RelationalRetrieval | Recombination) -> int:
    """FLOPs of one prompt, forward, as it is computed here: queries, outputs, MLP and readout at Q rows only.

    The parts of `lib.metrics.attention_cost` for T tokens and T² pairs, each by its share of rows: keys and
    values (half of the projections) and the key's side take all T, all else Q; pairs are Q T.
    """
    config = chosen.config(task)
    shape, T, Q = AttentionShape.of(config), task.length, task.Q
    part = forward_flops(shape, T)
    per_pair = part["score"] + part["mix"] + part["compose"] + part["gating"] + part["static"]
    sides = shape.query_side * Q + shape.key_side * T  # rows of the weight sets, of (sides) T
    n_sides = max(1, shape.query_side + shape.key_side)
    sets = (part["hidden"] + part["factors"] + part["gates"]) * sides // (n_sides * T)
    rows = part["projections"] * (Q + T) // (2 * T) + per_pair * Q // T + sets
    return rows + 2 * Q * config.d_model * (2 * config.mlp_width + config.n_out)


@torch.no_grad()
def look_inside(model: Transformer, task: RelationalRetrieval | Recombination, *, seed: int) -> dict:
    """Ranks and composition maps of a one-layer model, on PROBE_PROMPTS fresh prompts. Keys are the N items.

    scores_rank, weights_rank: {"before", "after"}: effective rank over heads of the scores, composed before
    the softmax, and of the weights, composed after it; mean over prompts, 1 to H.
    outside_span: {"pre", "post"}: share of what a stage adds that no fixed mixing of heads adds; mean.
    head_rank: {"before", "after"}: numerical rank of a head's scores as one matrix, every query there is by
    every item of the probe, mean over heads. Before: at most d. After: at most H d, 2 H d with both sides.
    head_effective_rank: the same with the effective rank.
    maps: for each stage with a query's side its M_i, from head g to head h, mean over the queries (by, ·,
    give): [by][give][g][h]. map_shares: the share of the variance of M_i over all queries that lies between
    those with the same "by", the same "give", the same of "both". {} without such a stage.
    """
    layer, H = model.layers[0], model.config.n_heads
    prompts = task.batch(EVALUATION_STEP + 1, seed=seed, size=PROBE_PROMPTS)
    device = model.embedding.weight.device
    found = patterns(model, task, prompts)
    found = {stage: [A[..., : task.N] for A in pair] for stage, pair in found.items()}
    asked = task.all_asked()  # (by, value, give, 3)
    by, _, give = asked.flatten(0, 2).T
    z = layer.attention_norm(model.embed(task.query_tokens(asked.flatten(0, 2))[None].to(device)))
    items = layer.attention_norm(model.embed(prompts.tokens[:, : task.N].flatten(0, 1)[None].to(device)))
    everything = _scores(layer.attention, H, z, items)  # (1, H, queries, items) twice
    maps, shares = {}, {}
    for stage in ("pre", "post"):
        part = _stage(layer.attention, stage)
        if part is not None and part.query is not None:
            M = _matrices(layer.attention, stage, z, z)[0][0].cpu()  # (queries, H, H)
            maps[stage] = [
                [[[round(m, 4) for m in row] for row in cell] for cell in line]
                for line in M.unflatten(0, asked.shape[:3]).mean(dim=1).tolist()
            ]
            labels = {"by": by, "give": give, "both": by * asked.shape[2] + give}
            shares[stage] = {name: share_between(M, label) for name, label in labels.items()}
    return {
        "scores_rank": _before_after(found["pre"], effective_rank_over_heads),
        "weights_rank": _before_after(found["post"], effective_rank_over_heads),
        "outside_span": {s: share_outside_span(A, B - A).mean().item() for s, (A, B) in found.items()},
        "head_rank": _before_after(everything, numerical_rank),
        "head_effective_rank": _before_after(everything, effective_rank),
        "maps": maps,
        "map_shares": shares,
    }


def patterns(model: Transformer, task: RelationalRetrieval | Recombination, prompts: Retrievals) -> dict:
    """{"pre": scores before and after composition, "post": weights}: pairs of (B, H, Q, T), float64."""
    attention, H, device = model.layers[0].attention, model.config.n_heads, model.embedding.weight.device
    x = model.layers[0].attention_norm(model.embed(prompts.tokens.to(device)))  # (B, T, D)
    queries = x[:, task.queries]
    before, after = _scores(attention, H, queries, x)
    weights = after.masked_fill(~task.mask()[task.queries].to(device), -math.inf).softmax(dim=-1)
    composed = compose(weights, *_matrices(attention, "post", queries, x))
    return {"pre": (before, after), "post": (weights, composed)}


def _stage(attention: nn.Module, name: str) -> nn.Module | None:
    return getattr(attention, name, None)  # softmax attention has none


def _before_after(pair, rank) -> dict[str, float]:
    return {name: rank(A).double().mean().item() for name, A in zip(("before", "after"), pair, strict=True)}


def _scores(attention: nn.Module, H: int, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, H, R, T) of queries (B, R, D) and keys (B, T, D), before and after their composition."""
    q, k = (W(x).unflatten(-1, (H, -1)).transpose(1, 2).double()
            for W, x in ((attention.W_Q, queries), (attention.W_K, keys)))  # fmt: skip
    before = q @ k.mT / q.shape[-1] ** 0.5
    return before, compose(before, *_matrices(attention, "pre", queries, keys))


def _matrices(attention: nn.Module, stage: str, queries: Tensor, keys: Tensor):
    """M_i (B, R, H, H) of the queries and M_j (B, T, H, H) of the keys; None for a side that is not there.

    A static W_b goes with the query's side; static talking heads have it alone.
    """
    part = _stage(attention, stage)
    if part is None:
        return None, None
    W_b, (B, R) = part.W_b, queries.shape[:2]
    query = None if part.query is None else composition_matrices(*part.query(queries), W_b)
    if query is None and W_b is not None:
        query = (torch.eye(len(W_b), dtype=torch.float64) + W_b.double()).expand(B, R, *W_b.shape)
    return query, None if part.key is None else composition_matrices(*part.key(keys))
