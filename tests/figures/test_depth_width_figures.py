"""The pictures of depth against width: what they say is what the numbers say, whatever they are."""

import pandas as pd
import pytest

from lib.figures import depth_width as draw
from lib.metrics.communication import sequential_parties, simulate
from lib.models.constructions import sequential_composition_decoder
from lib.models.quantised import Precision, quantise
from lib.tasks.composition import SequentialComposition


def trained(**means):
    """Five seeds a cell, spread by ±0.02."""
    offsets = (-0.02, -0.01, 0.0, 0.01, 0.02)
    return {name: pd.DataFrame({"accuracy": [mean + o for o in offsets], "chance": 0.125})
            for name, mean in means.items()}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 6])
def test_the_picture_of_look_ups_shows_what_the_model_read(seed):
    task = SequentialComposition(m=3, ns=(2,))
    one = task.sample(1, seed=seed)
    figure = draw.look_ups(sequential_composition_decoder(task), task, one)
    read = ", then ".join(f"$i_{l}={value}$" for l, value in enumerate(task.steps(one)[0].tolist()))
    assert read in figure.caption and f"the task's answer is {int(task.answer(one)[0])}" in figure.caption


def test_a_solver_that_reads_something_else_is_drawn_as_it_is():
    task = SequentialComposition(m=3, ns=(2,))
    one, model = task.sample(1, seed=6), sequential_composition_decoder(task)
    model.layers[1].attention.W_Q.weight.data.zero_()
    assert "$i_1=2$" in draw.look_ups(sequential_composition_decoder(task), task, one).caption
    assert "$i_1=2$" not in draw.look_ups(model, task, one).caption


def test_the_conversation_shows_the_bits_that_were_counted():
    task = SequentialComposition(m=2, ns=(2,))
    prompts = task.tokens(task.sample(64, seed=0))
    decoder = quantise(sequential_composition_decoder(task), prompts, Precision(weight_bits=0, value_bits=2))
    transcript = simulate(decoder, prompts, sequential_parties(task.m, task.ns))
    figure = draw.conversation(transcript)
    assert f"{transcript.bits:,} bits in all" in figure.caption
    message = transcript.message(1, 2, 1)
    assert f"player 2 to player 1 {message.bits} bits" in figure.alt


def test_the_captions_of_bounds_end_where_the_tables_end():
    table = pd.DataFrame({"L": [2, 3], "ours": [6, 19], "paper": [256, 4096]})
    assert "one over 19 (proved here) or one over 4,096" in draw.exponents(table).caption
    exact = pd.DataFrame({"beta": [2, 4], "tokens": [92, 674]})
    coarse = pd.DataFrame({"beta": [2, 2048], "tokens": [445, 9.4e15]})
    assert "at 92 tokens with 2 bits, at 674 with 4" in draw.certified_prompts(exact, coarse).caption


def test_errors_above_the_proved_sharpness_would_be_told():
    rows = pd.DataFrame({"sharpness": [0.2, 1.0, 2.0], "arithmetic": "float16", "errors": [900, 0, 3],
                         "inputs_checked": 4096})  # fmt: skip
    assert "From the proved sharpness on, 3 answers are wrong" in draw.sharpness(rows).caption
    assert "float16 up to 2 c*" in draw.sharpness(rows).caption


@pytest.mark.parametrize(("three", "two"), [(0.98, 0.2), (0.3, 0.6)])
def test_training_figures_follow_the_numbers(three, two):
    cells = trained(three=three, two=two)
    assert f"three: {three:.2f}; two: {two:.2f}" in draw.found_by_training(cells).caption
    lines = {name: pd.concat([rows.assign(d_model=D) for D in (16, 32)]) for name, rows in cells.items()}
    caption = draw.accuracy_against_width(lines, 0.5).caption
    assert f"leads the second by at least {three - two:.2f}" in caption


def test_the_bars_of_errors_and_the_bills_name_their_extremes():
    figure = draw.error_bars({"right": (0, 4096), "wrong": (1792, 4096)})
    assert "right: 0 of 4,096; wrong: 1,792 of 4,096" in figure.caption
    bills = pd.DataFrame({"way": ["decoder", "scratchpad"], "L": 7, "MFLOPs": [9.5, 2.0],
                          "in a row": [8, 9]})  # fmt: skip
    caption = draw.bills(bills).caption
    assert "least arithmetic: scratchpad (2.0 MFLOPs)" in caption and "shortest row: decoder (8" in caption
