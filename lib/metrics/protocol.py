r"""A decoder run as the multi-party protocol behind the lower bound for L layers, every message counted.

The prompt z_L … z_1, z_0, w is cut into contiguous blocks, one a player: player L holds the first, player -1
holds w and answers. In epoch t = 1 … L (layer t - 1) every player i shows its states to all j > i, whose
tokens stand earlier; each such j answers, for every token of i and every head, the sums of weight · value and
of weights over its own tokens. Player i adds its own terms, divides, applies its MLP. *Forgetful:* j keeps
nothing of what it was shown. So

    bits = Σ_t Σ_i m_i · #{j > i} · beta,   m_i tokens of player i,   beta = H (d + 1) p bits a token.

A player is a frozen object that holds its own states and nothing else; a message is p-bit codes. Source:
Chen, Peng and Wu 2024 (their protocol, second-hand); this simulation is ours, unrefereed; theory of
`depth-width`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class States(Protocol):
    """Contiguous tokens with their states h (B, n, D); `lib.models.quantised.Block`."""

    h: Tensor
    start: int

    def _replace(self, **changes: Any) -> States: ...


class BlockDecoder(Protocol):
    """What a model must offer to be run block by block; `lib.models.quantised.QuantisedDecoder` does."""

    accumulator_bits: int
    message_bits: int
    n_layers: int

    def check(self, tokens: Tensor) -> None: ...

    def embed(self, tokens: Tensor, *, start: int) -> States: ...

    def sums(self, l: int, receivers: States, senders: States) -> Tensor: ...

    def advance(self, l: int, block: States, sums: Tensor) -> States: ...

    def answer(self, block: States) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Message:
    """What `sender` tells the tokens of `receiver` in one epoch; as long for each prompt of a batch."""

    epoch: int  # 1 … L
    sender: int
    receiver: int  # < sender
    tokens: range  # places of the receiver's tokens in the prompt
    code: Tensor  # (B, m_i, H, d + 1) int64 in 0 … 2^p - 1: two's complement of p bits each
    bits_per_token: int  # beta

    @property
    def bits(self) -> int:
        return len(self.tokens) * self.bits_per_token


@dataclass(frozen=True, eq=False)
class Transcript:
    """A finished run: what player -1 answers, and everything that was sent."""

    output: Tensor  # (B, V) logits
    state: Tensor  # (B, D) state of the last token
    messages: tuple[Message, ...]

    @property
    def bits(self) -> int:
        """Bits sent for one prompt, added message by message."""
        return sum(message.bits for message in self.messages)

    def by_token(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(epoch, sender, receiver, receiver's token, bits), one row for each piece that is sent."""
        for m in self.messages:
            for token in m.tokens:
                yield m.epoch, m.sender, m.receiver, token, m.bits_per_token

    def message(self, epoch: int, sender: int, receiver: int) -> Message:
        for m in self.messages:
            if (m.epoch, m.sender, m.receiver) == (epoch, sender, receiver):
                return m
        raise ValueError(f"nobody sent a message {sender} -> {receiver} in epoch {epoch}")


@dataclass(frozen=True, eq=False)
class Player:
    """One party: the decoder's weights, which all know, and the states of its own tokens. Nothing else."""

    name: int
    decoder: BlockDecoder
    block: States

    def show(self) -> States:
        """Its states, for those whose tokens stand earlier; a copy, so nothing can be written into them."""
        return self.block._replace(h=self.block.h.clone())

    def reply(self, l: int, shown: States) -> Tensor:
        """To a later player's states: (B, m_i, H, d + 1) codes. A function of both; nothing is kept."""
        return encode(self.decoder.sums(l, shown, self.block), self.decoder.accumulator_bits)

    def hear(self, l: int, codes: Sequence[Tensor]) -> Player:
        """The player after the epoch: own terms plus what every earlier player sent, then the layer."""
        sums = self.decoder.sums(l, self.block, self.block)
        sums = sum((decode(code, self.decoder.accumulator_bits) for code in codes), start=sums)
        return Player(self.name, self.decoder, self.decoder.advance(l, self.block, sums))


def simulate(model: BlockDecoder, prompt: Tensor, parties: Sequence[int]) -> Transcript:
    """Run `model` as a protocol on prompts (B, T) or (B, T, S), all of one length T.

    parties: how many tokens each player holds, in the order of the prompt: (N_{L-1}, …, N_0, 1, 1) from
    `sequential_parties`, or any other cut with a sum of T. The last is player -1, the one before player 0.
    The output equals `model(prompt)` bit for bit. ValueError unless the parties cover the prompt.
    """
    model.check(prompt)
    if len(parties) < 1 or any(size < 1 for size in parties) or sum(parties) != prompt.shape[1]:
        raise ValueError(f"parties hold at least one token each, together T={prompt.shape[1]}; got {parties}")
    names = range(len(parties) - 2, -2, -1)
    players, start = {}, 0
    for name, size in zip(names, parties, strict=True):
        tokens = prompt[:, start : start + size].clone()
        players[name] = Player(name, model, model.embed(tokens, start=start))
        start += size
    messages = []
    for l in range(model.n_layers):
        sent = [_send(l, sender, receiver) for receiver in players.values() for sender in players.values()
                if sender.name > receiver.name]
        players = {i: player.hear(l, [m.code for m in sent if m.receiver == i])
                   for i, player in players.items()}
        messages += sent
    last = players[-1].block
    return Transcript(model.answer(last), last.h[:, -1], tuple(messages))


def _send(l: int, sender: Player, receiver: Player) -> Message:
    shown = receiver.show()
    tokens = range(shown.start, shown.start + shown.h.shape[1])
    code = sender.reply(l, shown)
    return Message(l + 1, sender.name, receiver.name, tokens, code, sender.decoder.message_bits)


def sequential_parties(m: int, ns: Sequence[int]) -> tuple[int, ...]:
    """Tokens of the players L, …, 1, 0, -1 of L-FuncComp: N_{L-1}, …, N_0, 1, 1.

    >>> sequential_parties(2, (3,))                     # z_2 has 6 entries, z_1 has 2, then z_0 and w
    (6, 2, 1, 1)
    """
    sizes = [m]
    for n in ns:
        sizes.append(sizes[-1] * n)
    return (*reversed(sizes), 1, 1)


def protocol_bits(parties: Sequence[int], epochs: int, beta: int) -> int:
    """Σ_t Σ_i m_i · #{j > i} · beta: what `simulate` must count. Exact.

    >>> protocol_bits((4, 2, 1, 1), epochs=2, beta=8)   # 2 · (2·1 + 1·2 + 1·3) · 8
    112
    """
    return epochs * beta * sum(size * earlier for earlier, size in enumerate(parties))


def encode(sums: Tensor, bits: int) -> Tensor:
    """Integers as p-bit two's complement codes 0 … 2^p - 1; OverflowError if one does not fit."""
    half = 2 ** (bits - 1)
    if sums.numel() and not -half <= int(sums.min()) <= int(sums.max()) < half:
        raise OverflowError(f"{int(sums.min())} … {int(sums.max())} do not fit into {bits} bits")
    return sums % 2**bits


def decode(code: Tensor, bits: int) -> Tensor:
    """The integers behind p-bit codes."""
    return torch.where(code >= 2 ** (bits - 1), code - 2**bits, code)
