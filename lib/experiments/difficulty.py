"""Do harder questions use more depth? Depth scores against the steps a question takes, and what is read when.

    measure_difficulty: layers skipped while a model reads arithmetic of 1 to 6 operations, or multi-hop facts
    measure_tokens:     through how many layers each token of an expression matters: erasure, gradients

Source: Csordás, Manning and Potts 2025 (depth score against hops and levels; erasure; gradients), who report
no intervals. The accuracy stands beside the scores: depth says little about questions a model cannot answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from lib.choices import check_choice, resolve_device
from lib.experiments.depth_use import DIGITS, any_effect, described, rounded, statistic
from lib.experiments.reading import WEIGHTS, ReadingSettings, check_whole, load
from lib.experiments.recipe import read_settings
from lib.metrics.depth import (
    current_and_future,
    depth_score,
    depth_score_interval,
    integrated_gradients,
    mean_residual,
    residual_erasure,
)
from lib.metrics.intervals import proportion
from lib.models import pretrained
from lib.models.transformer import Transformer
from lib.tasks.arithmetic import Arithmetic, few_shot
from lib.tasks.facts import MultiHop
from lib.tasks.questions import Question, encode_question
from lib.training import seeds_by_role

TASKS = ("arithmetic", "multi-hop")
BETWEEN = {"arithmetic": "", "multi-hop": "\n\n"}  # stands between a solved question and the next one
RESAMPLES = 2_000
COMMONEST_OF = 2_000  # questions whose commonest answer is the chance level


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """A model that is asked. shots: solved questions, of the same difficulty, that stand before each one."""

    model: str
    shots: int = 0
    weights: str = "trained"
    streams: int = 16  # edited streams in one pass: memory and speed, not results
    device: str = "cpu"

    def __post_init__(self):
        check_whole("shots", self.shots, 0)
        check_whole("streams", self.streams, 1)
        check_choice("weights", self.weights, WEIGHTS)
        resolve_device(self.device)

    def load(self, seed: int) -> Transformer:
        shape = ReadingSettings(model=self.model, context=2, tokens=6, device=self.device)
        return load(shape, weights=self.weights, seed=seed)


@dataclass(frozen=True, kw_only=True)
class DifficultySettings(QuestionSettings):
    """task: "arithmetic": chains of + and -, every result one digit; levels are operations, 1 .. 6.
    "multi-hop": a story of `chains` chains of `hops` facts, the same for all levels; levels are hops asked.

    prompts: questions of each level whose layers are skipped; asked: questions answered, the same and more.
    """

    task: str = "arithmetic"
    levels: list[int]
    prompts: int = 10
    asked: int = 40
    chains: int = 2
    hops: int = 4

    def __post_init__(self):
        super().__post_init__()
        check_choice("task", self.task, TASKS)
        check_whole("prompts", self.prompts, 3)
        check_whole("asked", self.asked, self.prompts)
        MultiHop(hops=self.hops, chains=self.chains)
        most = {"arithmetic": 6, "multi-hop": self.hops}[self.task]
        if not isinstance(self.levels, list) or len(set(self.levels)) < 2:
            raise ValueError(f"levels is a list of two or more levels, got {self.levels!r}")
        if sorted(set(self.levels)) != self.levels or not set(self.levels) <= set(range(1, most + 1)):
            raise ValueError(f"levels of {self.task} rise within 1 .. {most}, got {self.levels}")


class Asked(NamedTuple):
    """One question, as tokens: shots, question, answer."""

    tokens: Tensor  # (T,) long, up to where the answer begins
    answer: int  # its first token
    choices: tuple[int, ...]  # first tokens of what stands to choice, all different


def measure_difficulty(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """Depth scores of one model at each level. Settings: the fields of `DifficultySettings`. One row:

    For each level, lists: accuracy, .._lo, .._hi (Clopper and Pearson): the answer's first token is the
    likeliest of all; chosen, .._lo, .._hi: it is the likeliest of the choices; chance: of choosing by
    knowing no more than the commonest answer; answer_nats: mean loss of that token; n_prompt: mean number of
    tokens.
    For x in now (layers skipped at all tokens but the first), earlier (at all but the first and the last),
    seen at the last token of the prompt, which predicts the answer: x_output: effects (levels, L) of skipped
    layers on the output, means over prompts; x_score, .._lo, .._hi: their depth score, in layers from 1;
    x_score_max: of the largest effects. x_matrix_score, x_matrix_score_max: of E[s, l] at that token for
    "earlier" (largest: the paper's score), pooled over all tokens for "now".
    x_slope, x_matrix_slope, .._lo, .._hi: layers a level, least squares through the scores of single prompts,
    bootstrap over prompts (of multi-hop together for all levels: they share their stories). Without x_score
    and x_slope if no skip changes the output of some prompt (see `measure_skips`).
    """
    chosen = read_settings(DifficultySettings, settings)
    model, tokenizer = chosen.load(seed), pretrained.load_tokenizer(chosen.model)
    asked = _ask(chosen, tokenizer, seed=seed)
    row: dict[str, list] = {}
    scores: dict[str, list[list[float]]] = {}  # of single prompts, level by level
    measured = [_skips(model, level[: chosen.prompts], streams=chosen.streams) for level in asked]
    blank = {name for found in measured for name, x in found.items() if x.ndim == 2 and not any_effect(x)}
    for level, questions, skipped in zip(chosen.levels, asked, measured, strict=True):
        found = _answers(model, questions) | {"chance": _chance(chosen, level, seed=seed)}
        for name, effects in skipped.items():
            if effects.ndim == 2:
                found[f"{name}_output"] = rounded(effects.mean(dim=0))
            if name in blank:
                continue
            for suffix, reduce in (("", "mean"), ("_max", "max")):
                key = f"{name}_score{suffix}"
                value, (lo, hi) = depth_score_interval(effects, reduce=reduce, seed=seed)
                found |= {key: value, f"{key}_lo": lo, f"{key}_hi": hi}
            scores.setdefault(name, []).append([depth_score(one) for one in effects])
        for name, value in found.items():
            row.setdefault(name, []).append(round(value, DIGITS) if isinstance(value, float) else value)
    for name, values in scores.items():
        row |= slope(f"{name}_slope", chosen.levels, values, paired=chosen.task == "multi-hop", seed=seed)
    everything = torch.cat([question.tokens for level in asked for question in level])
    return {**row, **described(model, everything)}


def slope(
    name: str, levels: Sequence[int], values: Sequence[Sequence[float]], *, paired: bool, seed: int
) -> dict[str, float]:
    """Least-squares slope of values against their level, and its bootstrap interval over prompts.

    values: for each level one number a prompt, equally many. paired: prompt i is the same at every level and
    is resampled whole; else each level is resampled by itself.
    """
    grid = np.array(values)  # (levels, P)
    K, P = grid.shape
    x = np.array(levels, dtype=float) - np.mean(levels)
    draws = np.random.default_rng(seed).integers(P, size=(RESAMPLES, 1 if paired else K, P))
    means = np.take_along_axis(grid[None], np.broadcast_to(draws, (RESAMPLES, K, P)), axis=2).mean(axis=2)
    lo, hi = np.quantile(means @ x / (x @ x), [0.025, 0.975])
    value = grid.mean(axis=1) @ x / (x @ x)
    found = {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
    return {key: round(float(number), DIGITS) for key, number in found.items()}


def _ask(chosen: DifficultySettings, tokenizer: Tokenizer, *, seed: int) -> list[list[Asked]]:
    """`asked` questions of each level. Of multi-hop, question i goes through story i at every level."""
    roles, levels, more = seeds_by_role(seed), chosen.levels, 2 * chosen.asked + 8
    drawn, before = [], []
    for level in levels:
        task, hops = _task(chosen, level), {"hops": level} if chosen.task == "multi-hop" else {}
        shown = task.questions(1, seed=roles["data"], size=chosen.shots, **hops) if chosen.shots else []
        drawn.append(task.questions(0, seed=roles["data"], size=more, **hops))
        between = BETWEEN[chosen.task]
        text = between.join([few_shot([q]) for q in shown]) + (between if shown else "")
        before.append((text, {q.prompt for q in shown}))
    found: list[list[Asked]] = [[] for _ in levels]
    for row in zip(*drawn, strict=True):
        one = [_asked(q, text, tokenizer) for q, (text, _) in zip(row, before, strict=True)]
        fresh = all(q.prompt not in shown for q, (_, shown) in zip(row, before, strict=True))
        if fresh and all(len(set(a.choices)) == len(a.choices) for a in one):
            for level, a in zip(found, one, strict=True):
                level.append(a)
    if len(found[0]) < chosen.asked:
        raise ValueError(
            f"only {len(found[0])} of {more} questions have answers whose first tokens differ, and are not "
            f"among the shots; asked={chosen.asked}: with this tokenizer they cannot be told apart"
        )
    return [level[: chosen.asked] for level in found]


def _task(chosen: DifficultySettings, level: int) -> Arithmetic | MultiHop:
    if chosen.task == "arithmetic":
        return Arithmetic(steps=level, operators="+-", results=(0, 9))
    return MultiHop(hops=chosen.hops, chains=chosen.chains)


def _asked(question: Question, before: str, tokenizer: Tokenizer) -> Asked:
    whole = question._replace(prompt=before + question.prompt)
    ids, n = encode_question(whole, tokenizer)
    others = question.choices or tuple(str(digit) for digit in range(10))
    firsts = tuple(int(encode_question(whole._replace(answer=c), tokenizer)[0][n]) for c in others)
    return Asked(ids[:n], int(ids[n]), firsts)


@torch.no_grad()
def _answers(model: Transformer, questions: Sequence[Asked]) -> dict[str, float]:
    right, chosen, nats = 0, 0, 0.0
    for which in _by_length(questions).values():
        logits = model(torch.stack([questions[i].tokens for i in which]), rows=slice(-1, None))[:, 0]
        for i, z in zip(which, logits.float().cpu(), strict=True):
            answer, choices = questions[i].answer, list(questions[i].choices)
            right += int(z.argmax()) == answer
            chosen += choices[int(z[choices].argmax())] == answer
            nats += float(cross_entropy(z[None], torch.tensor([answer])))
    n = len(questions)
    found = {"answer_nats": nats / n, "n_prompt": float(np.mean([len(q.tokens) for q in questions]))}
    for name, count in (("accuracy", right), ("chosen", chosen)):
        lo, hi = proportion(count, n)
        found |= {name: count / n, f"{name}_lo": lo, f"{name}_hi": hi}
    return found


def _chance(chosen: DifficultySettings, level: int, *, seed: int) -> float:
    if chosen.task == "multi-hop":
        return 1 / chosen.chains
    drawn = _task(chosen, level).questions(2, seed=seeds_by_role(seed)["data"], size=COMMONEST_OF)
    return Counter(q.answer for q in drawn).most_common(1)[0][1] / COMMONEST_OF


def _skips(model: Transformer, questions: Sequence[Asked], *, streams: int) -> dict[str, Tensor]:
    """Effects of every prompt on the output, (P, L), and on later layers, (P, L, L): means over tokens."""
    L, P = model.config.n_layers, len(questions)
    shapes = {"now": (P, L), "earlier": (P, L), "now_matrix": (P, L, L), "earlier_matrix": (P, L, L)}
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for T, which in _by_length(questions).items():
        tokens = torch.stack([questions[i].tokens for i in which])
        both = current_and_future(
            model, tokens, positions=[T - 1], output_rows=slice(-1, None), batch_size=streams
        )
        for name, effects in zip(("now", "earlier"), both, strict=True):
            found[name][which] = effects.output.mean
            found[f"{name}_matrix"][which] = effects.layers.mean
    return found


def _by_length(questions: Sequence[Asked]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(len(question.tokens), []).append(i)
    return groups


@dataclass(frozen=True, kw_only=True)
class TokenSettings(QuestionSettings):
    """Expressions of `steps` operations, every result one digit. mean_prompts: others, whose mean stream is
    what is written where a token is erased. gradient_layers: after which layers gradients are taken; they
    need many steps: gradient_gap says whether there were enough.
    """

    steps: int = 4
    prompts: int = 5
    mean_prompts: int = 10
    gradient_layers: list[int] | None = None  # None: no gradients
    gradient_steps: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name, low in (("steps", 2), ("prompts", 3), ("mean_prompts", 1), ("gradient_steps", 1)):
            check_whole(name, getattr(self, name), low)
        Arithmetic(steps=self.steps)
        if self.gradient_layers is not None and not isinstance(self.gradient_layers, list):
            raise ValueError(f"gradient_layers is a list of layers, or None; got {self.gradient_layers!r}")


def measure_tokens(settings: Mapping, *, seed: int, scratch: Path | None = None) -> dict:
    """When each token of an expression stops to matter. Settings: the fields of `TokenSettings`. One row:

    names: the tokens of the first prompt; operands: where the numbers asked about stand, in reading order.
    effect: (L + 1, T), |y - y'| of the answer when the stream of a token is overwritten by a mean after l
    layers, mean over prompts. needed, .._lo, .._hi: for each operand sum over l of its effect / the largest
    effect, the number of layers through which it matters. needed_slope, .._lo, .._hi: layers that an operand
    is read later than the one before it; the first token of the prompt is left out, which attention sinks
    hold on to. Working from left to right, a layer or more a step, has a slope of 1 or more.
    gradient: (gradient_layers, T), share of the attribution's size that falls to each token, mean
    over prompts, midpoint rule; gradient_gap: for each layer the mean |error| of the sum over tokens, to be
    read beside answer_probability, .._lo, .._hi: of the right answer, mean over prompts.
    """
    chosen = read_settings(TokenSettings, settings)
    model, tokenizer = chosen.load(seed), pretrained.load_tokenizer(chosen.model)
    asked, operands = _expressions(chosen, tokenizer, seed=seed)
    prompts, others = asked[: chosen.prompts], asked[chosen.prompts :]
    mean = mean_residual(model, others)
    erased = residual_erasure(model, prompts, mean=mean, answer=1, batch_size=chosen.streams)
    effect = torch.stack(erased.peak)[:, :, :-1]  # (P, L + 1, T): the answer's own token is read by nobody
    counted = [place for place in operands if place > 0]

    def needed(sample: np.ndarray) -> np.ndarray:  # (R, P, L + 1, operands) -> (R, operands)
        curve = sample.mean(axis=1)
        return curve.sum(axis=1) / np.maximum(curve.max(axis=1), 1e-12)

    at = np.asarray(effect[..., operands])
    draws = np.random.default_rng(seed).integers(len(at), size=(RESAMPLES, len(at)))
    lo, hi = np.quantile(needed(at[draws]), [0.025, 0.975], axis=0)
    x = np.arange(len(counted)) - (len(counted) - 1) / 2
    row = {
        "names": [tokenizer.decode([i], skip_special_tokens=False) for i in prompts[0][:-1].tolist()],
        "operands": operands,
        "effect": rounded(effect.mean(dim=0), digits=5),
        "needed": rounded(torch.from_numpy(needed(at[None])[0])),
        "needed_lo": rounded(torch.from_numpy(lo)),
        "needed_hi": rounded(torch.from_numpy(hi)),
        **statistic("needed_slope", effect[..., counted], lambda s: needed(s) @ x / (x @ x), seed=seed),
        **_gradients(chosen, model, prompts, seed=seed),
    }
    return {**row, **described(model, torch.stack(prompts))}


def _expressions(chosen: TokenSettings, tokenizer: Tokenizer, *, seed: int) -> tuple[list[Tensor], list[int]]:
    """Prompts with their answers (T + 1,), all of one shape, and the places of the operands."""
    task, role = Arithmetic(steps=chosen.steps, operators="+-", results=(0, 9)), seeds_by_role(seed)["data"]
    shown = task.questions(1, seed=role, size=chosen.shots) if chosen.shots else []
    drawn = task.questions(0, seed=role, size=chosen.prompts + chosen.mean_prompts)
    encoded = [encode_question(q._replace(prompt=few_shot(shown) + q.prompt), tokenizer) for q in drawn]
    start = len(tokenizer.encode(few_shot(shown), add_special_tokens=False).ids)
    places = set()
    for ids, n in encoded:
        words = [tokenizer.decode([i]).strip() for i in ids[start:n].tolist()]
        places.add((len(ids), n, *(start + t for t, word in enumerate(words) if word.isdigit())))
    length, n, *operands = next(iter(places))
    if len(places) > 1 or len(operands) != chosen.steps + 1 or length != n + 1:
        raise ValueError("this tokenizer does not give each digit a token: expressions differ in shape")
    return [ids for ids, _ in encoded], operands


def _gradients(chosen: TokenSettings, model: Transformer, prompts: Sequence[Tensor], *, seed: int) -> dict:
    found = {}
    if chosen.gradient_layers:
        how = {"steps": chosen.gradient_steps, "layers": chosen.gradient_layers, "rule": "midpoint"}
        each = [integrated_gradients(model, p[:-1], p[-1:], batch=chosen.streams, **how) for p in prompts]
        size = torch.stack([one.values[:, :-1].abs() for one in each]).double()  # (P, layers, T)
        share = size / size.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        found["gradient"] = rounded(share.mean(dim=0), digits=5)
        found["gradient_gap"] = rounded(torch.stack([one.gap.abs() for one in each]).mean(dim=0))
    with torch.no_grad():
        logits = model(torch.stack([p[:-1] for p in prompts]), rows=slice(-1, None))[:, 0].float().cpu()
    said = logits.softmax(dim=-1).gather(1, torch.stack([p[-1:] for p in prompts]))[:, 0]
    return found | statistic("answer_probability", said[:, None], lambda s: s.mean(axis=(1, 2)), seed=seed)
