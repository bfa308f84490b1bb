"""Decoder = protocol, bit for bit; every bit is counted; no player knows more than the model allows."""

import dataclasses

import pytest
import torch

from lib.metrics.communication import protocol_bits, sequential_parties, simulate
from lib.metrics.protocol import Player, decode, encode
from lib.models.constructions.sequential import sequential_composition_decoder
from lib.models.quantised import Block, Precision, quantise, random_decoder
from lib.models.transformer import Transformer, TransformerConfig
from lib.tasks.composition import SequentialComposition

TASK = SequentialComposition(2, (2,))
PARTIES = (4, 2, 1, 1)
BITS = Precision(weight_bits=4, value_bits=4)


def prompts(size=200, task=TASK, seed=0):
    return task.tokens(task.sample(size, seed=seed))


def drawn(seed=0, layers=2, task=TASK, precision=BITS, **shape):
    model = random_decoder(vocab=task.vocab, tokens=task.prompt_length, layers=layers,
                           **dict(heads=2, d_head=2) | shape, seed=seed)
    return quantise(model, prompts(50, task, seed=99), precision)


@pytest.mark.parametrize("layers, m, ns", [(1, 4, ()), (2, 2, (2,)), (3, 2, (2, 2)), (4, 3, (2,))])
@pytest.mark.parametrize("precision", [Precision(weight_bits=0, value_bits=2), BITS])
def test_a_decoder_and_its_protocol_answer_the_same_bit_for_bit(layers, m, ns, precision):
    task = SequentialComposition(m, ns)
    for seed in range(5):
        decoder = drawn(seed, layers, task, precision)
        batch = prompts(100, task)
        transcript = simulate(decoder, batch, sequential_parties(m, ns))
        assert torch.equal(transcript.output, decoder(batch))
        assert torch.equal(transcript.state, decoder.run(batch).h[:, -1])


@pytest.mark.parametrize("shape", [
    dict(norm="rms", positions="rope"), dict(norm="layer", positions="none"),
    dict(n_kv_heads=1, attention_bias=True, mlp_output_bias=True, norm="none", positions="learned")])
def test_norms_rotations_and_grouped_heads_are_run_as_protocols_too(shape):
    config = TransformerConfig(vocab=TASK.vocab, d_model=8, n_heads=2, d_head=4, n_layers=3,
                               max_tokens=8, **shape)
    decoder = quantise(Transformer(config, seed=1), prompts(50), BITS)
    for parties in (PARTIES, (1,) * 8, (8,), (3, 3, 2)):
        assert torch.equal(simulate(decoder, prompts(), parties).output, decoder(prompts()))


def test_the_built_decoder_answers_every_input_as_a_protocol():
    batch = next(TASK.all_inputs())
    tokens = TASK.tokens(batch)
    decoder = quantise(sequential_composition_decoder(TASK), tokens, Precision(weight_bits=0, value_bits=2))
    transcript = simulate(decoder, tokens, PARTIES)
    assert len(tokens) == 4096 and torch.equal(transcript.output, decoder(tokens))
    assert (transcript.output.argmax(-1) == TASK.answer(batch)).all()
    assert transcript.bits == protocol_bits(PARTIES, 3, 12) == 252


@pytest.mark.parametrize("parties, layers", [(PARTIES, 2), ((8,), 3), ((1,) * 8, 1), ((5, 2, 1), 2)])
def test_bits_are_counted_message_by_message(parties, layers):
    decoder = drawn(layers=layers)
    transcript = simulate(decoder, prompts(3), parties)
    beta, expected, names = decoder.message_bits, 0, range(len(parties) - 2, -2, -1)
    assert beta == 2 * (2 + 1) * decoder.accumulator_bits
    for _ in range(layers):
        for i, size in zip(names, parties, strict=True):
            for j in names:
                expected += size * beta * (j > i)
    assert transcript.bits == protocol_bits(parties, layers, beta) == expected
    rows = list(transcript.by_token())
    assert sum(bits for *_, bits in rows) == expected and len(set(rows)) == len(rows)
    assert all(sender > receiver for _, sender, receiver, _, _ in rows)
    if len(parties) > 1:
        assert {token for *_, token, _ in rows} == set(range(parties[0], 8)), "only the first hears nothing"


def test_what_is_sent_is_as_long_as_what_is_counted():
    decoder = drawn()
    p = decoder.accumulator_bits
    for message in simulate(decoder, prompts(), PARTIES).messages:
        assert message.code.dtype == torch.int64 and 0 <= message.code.min() and message.code.max() < 2**p
        assert message.code[0].numel() * p == message.bits


def test_messages_depend_only_on_the_players_who_may_speak():
    """Fact 4.1: change the input of player k, and no message to a player above k changes in any bit."""
    decoder = drawn(layers=3)
    first, second = prompts(seed=1), prompts(seed=2)
    before = simulate(decoder, first, PARTIES)
    places = {2: slice(0, 4), 1: slice(4, 6), 0: slice(6, 7), -1: slice(7, 8)}
    for k, place in places.items():
        mixed = first.clone()
        mixed[:, place] = second[:, place]
        changed = set()
        for old, new in zip(before.messages, simulate(decoder, mixed, PARTIES).messages, strict=True):
            if not torch.equal(old.code, new.code):
                changed.add((old.epoch, old.sender, old.receiver))
        assert changed, "some message depends on every player"
        assert all(receiver <= k for _, _, receiver in changed)
        silent = {(1, j, i) for j in places for i in places if i < j and k not in (i, j)}
        assert not changed & silent, "in epoch 1 nobody has heard of anybody else"


def test_a_reply_needs_nothing_but_the_two_players():
    """Each message, computed again by a player that was never part of the run."""
    decoder, batch = drawn(layers=2), prompts(20)
    transcript = simulate(decoder, batch, PARTIES)
    start = {2: 0, 1: 4, 0: 6, -1: 7}
    stop = {2: 4, 1: 6, 0: 7, -1: 8}
    whole = [decoder.embed(batch)]
    whole.append(decoder.advance(0, whole[0], decoder.sums(0, whole[0], whole[0])))
    for message in transcript.messages:
        states = whole[message.epoch - 1].h
        own, shown = (Block(states[:, start[i] : stop[i]], start[i])
                      for i in (message.sender, message.receiver))
        lonely = Player(message.sender, decoder, own)
        assert torch.equal(lonely.reply(message.epoch - 1, shown), message.code)


def test_a_player_holds_its_own_states_and_cannot_keep_or_write_anything():
    decoder = drawn()
    player = Player(1, decoder, decoder.embed(prompts(5)[:, 4:6], start=4))
    assert [f.name for f in dataclasses.fields(player)] == ["name", "decoder", "block"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        player.block = None
    shown = player.show()
    before = player.block.h.clone()
    shown.h.zero_()
    assert torch.equal(player.block.h, before), "writing into what is shown does not reach the player"


def test_a_sender_that_remembers_what_it_was_shown_would_be_noticed():
    """The negative control: if player 2 adds what player 0 showed it, the messages to player 1 change."""
    decoder, batch = drawn(), prompts(50)
    honest = simulate(decoder, batch, PARTIES)

    class Remembering(Player):
        def reply(self, l, shown):
            told = super().reply(l, shown)
            self.block.h.add_(shown.h[:, :1])
            return told

    players = {2: Remembering(2, decoder, decoder.embed(batch[:, :4]))}
    shown = {i: decoder.embed(batch[:, a:b], start=a) for i, a, b in ((-1, 7, 8), (0, 6, 7), (1, 4, 6))}
    told = {i: players[2].reply(0, shown[i]) for i in (0, 1)}
    assert torch.equal(told[0], honest.message(1, 2, 0).code)
    assert not torch.equal(told[1], honest.message(1, 2, 1).code)


@pytest.mark.parametrize("bits", [1, 2, 5, 20])
def test_codes_are_twos_complement(bits):
    integers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))[: 2**12]
    code = encode(integers, bits)
    assert 0 <= code.min() and code.max() < 2**bits and torch.equal(decode(code, bits), integers)
    assert code.unique().numel() == integers.numel()
    for outside in (2 ** (bits - 1), -(2 ** (bits - 1)) - 1):
        with pytest.raises(OverflowError, match=f"do not fit into {bits} bits"):
            encode(torch.tensor([outside]), bits)


def test_parties_that_do_not_cover_the_prompt_are_refused():
    decoder = drawn()
    for parties in ((4, 2, 1), (4, 2, 1, 1, 0), (), (9, -1)):
        with pytest.raises(ValueError, match="together T=8"):
            simulate(decoder, prompts(2), parties)
    with pytest.raises(ValueError, match="nobody sent"):
        simulate(decoder, prompts(2), PARTIES).message(3, 2, 1)
