"""What the tasks with an answer share: questions as text, and batches of them in a task's own tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor


class Question(NamedTuple):
    """A prompt that ends where the answer begins."""

    prompt: str
    answer: str
    steps: int  # operations or hops that the answer takes
    choices: tuple[str, ...] = ()  # answers between which nothing but the asked steps decides


class Sequences(NamedTuple):
    """B sequences of T tokens: question, "=", answer, then padding."""

    tokens: Tensor  # (B, T) long
    answer_at: Tensor  # (B,) where "=" stands: the logits there are for the answer, the next token
    answer: Tensor  # (B,) tokens[b, answer_at[b] + 1]
    steps: Tensor  # (B,) operations or hops


def counted(sequences: Sequences, *, question: bool) -> Tensor:
    """Which next-token losses count: (B, T - 1), True at t if that of tokens[:, t + 1] does.

    question=False counts the answer alone; True also every token of the question from the second one on.
    Padding never counts.

    >>> one = Sequences(torch.tensor([[5, 9, 2, 0]]), *torch.tensor([[1], [2], [1]]))   # 5 = 2, one pad
    >>> counted(one, question=False), counted(one, question=True)
    (tensor([[False,  True, False]]), tensor([[ True,  True, False]]))
    """
    t = torch.arange(sequences.tokens.shape[1] - 1, device=sequences.tokens.device)
    end = sequences.answer_at[:, None]
    return t <= end if question else t == end


def encode_question(question: Question, tokenizer: Tokenizer) -> tuple[Tensor, int]:
    """Token ids of prompt and answer, and how many of them are the prompt. -> (n,) long, int.

    ValueError if the tokenizer merges across the seam: the answer's tokens would not be its own.
    """
    whole = tokenizer.encode(question.prompt + question.answer, add_special_tokens=False).ids
    prompt = tokenizer.encode(question.prompt, add_special_tokens=False).ids
    if not prompt or whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError(
            f"the tokenizer merges across the end of the prompt {question.prompt[-20:]!r} and the answer "
            f"{question.answer!r}; move the space between them from one to the other"
        )
    return torch.tensor(whole, dtype=torch.long), len(prompt)


def check_batch(size: int, steps: list[int], largest: int) -> None:
    """Refuses an empty batch, and numbers of steps outside 1 .. largest."""
    if size < 1:
        raise ValueError(f"a batch holds at least one question, got size={size}")
    if not steps or not all(isinstance(k, int) and 1 <= k <= largest for k in steps):
        raise ValueError(f"numbers of steps lie in 1 .. {largest}, got {steps}")
