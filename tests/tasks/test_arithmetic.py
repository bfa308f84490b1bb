"""Arithmetic: what is written has the answer given, by an evaluator that shares no code with the task."""

import ast
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.tasks.arithmetic import OPERATORS, SHAPES, Arithmetic, ModularArithmetic, few_shot, programs
from lib.tasks.questions import Question, counted

operator_sets = st.sets(st.sampled_from(OPERATORS), min_size=1).map(lambda s: "".join(sorted(s)))
modular = st.builds(
    ModularArithmetic,
    steps=st.integers(1, 6),
    operators=operator_sets,
    shape=st.sampled_from(SHAPES),
    modulus=st.integers(2, 13),
)


def results_of(text: str) -> list[int]:
    """Every operation's result, by Python's own parser; the answer last."""
    found = []

    def value(node):
        if isinstance(node, ast.Constant):
            return node.value
        a, b = value(node.left), value(node.right)
        found.append(
            a + b if isinstance(node.op, ast.Add) else a - b if isinstance(node.op, ast.Sub) else a * b
        )
        return found[-1]

    tree = ast.parse(text, mode="eval").body
    assert all(isinstance(node, (ast.BinOp, ast.Constant, ast.operator)) for node in ast.walk(tree)), (
        "numbers and operations, nothing else"
    )
    value(tree)
    return found


def from_the_left(words: list[str], modulus: int) -> int:
    """A chain without brackets, read like a desk calculator."""
    value = int(words[0])
    for operator, operand in zip(words[1::2], words[2::2], strict=True):
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[operator]
    return value % modulus


@settings(deadline=None)
@given(
    k=st.integers(1, 6),
    operators=operator_sets,
    shape=st.sampled_from(SHAPES),
    high=st.sampled_from([40, 99, 999]),
    step=st.integers(0, 10**9),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_answer_is_what_python_reads(k, operators, shape, high, step, seed):
    task = Arithmetic(
        k, operators, shape, operands=(1, 5), results=(-20, high) if "-" in operators else (0, 20_000)
    )
    for question in task.questions(step, seed=seed, size=5):
        text = question.prompt.removesuffix(" = ")
        results = results_of(text)
        assert str(results[-1]) == question.answer and len(results) == k == question.steps
        assert all(task.results[0] <= value <= task.results[1] for value in results)
        numbers = [word.strip("()") for word in text.split() if word.strip("()").isdigit()]
        assert len(numbers) == k + 1 and all(1 <= int(number) <= 5 for number in numbers)
        assert set(text) - set("() 0123456789") <= set(operators)


@settings(deadline=None)
@given(k=st.integers(1, 6), data=st.data())
def test_brackets_are_written_where_they_are_needed_and_nowhere_else(k, data):
    shape = data.draw(st.sampled_from(SHAPES))
    tree = data.draw(st.integers(0, len(programs(shape, k)) - 1))
    operators = "".join(data.draw(st.lists(st.sampled_from(OPERATORS), min_size=k, max_size=k)))
    operands = data.draw(st.lists(st.integers(0, 9), min_size=k + 1, max_size=k + 1))
    text = Arithmetic(k, shape=shape).question(operands, operators, tree).prompt.removesuffix(" = ")
    meant = ast.dump(ast.parse(text, mode="eval"))
    for at in [i for i, letter in enumerate(text) if letter == "("]:
        depth, end = 0, at
        while not (text[end] == ")" and depth == 1):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        without = text[:at] + text[at + 1 : end] + text[end + 1 :]
        assert ast.dump(ast.parse(without, mode="eval")) != meant, f"{text} could be {without}"


@pytest.mark.parametrize("k", range(1, 7))
def test_there_are_catalan_many_trees_and_one_chain(k):
    trees = programs("nested", k)
    assert len(trees) == math.comb(2 * k, k) // (k + 1) == len({tree.brackets for tree in trees})
    assert all(math.ceil(math.log2(k + 1)) <= tree.height <= k for tree in trees)
    assert {tree.height for tree in trees} == set(range(math.ceil(math.log2(k + 1)), k + 1))
    (chain,) = programs("chain", k)
    assert (
        chain.height == k
        and chain.plain
        == tuple(i for pair in zip(range(k + 1), range(k + 1, 2 * k + 2), strict=True) for i in pair)[
            : 2 * k + 1
        ]
    )


def test_all_trees_are_equally_likely():
    batch = ModularArithmetic(3, "+", "nested").batch(0, seed=0, size=5000, mix=(3,))
    task = ModularArithmetic(3, "+", "nested")
    counts = Counter(
        "".join("n" if w.isdigit() else w for w in task.read(row[:11].tolist()).split())
        for row in batch.tokens
    )
    assert len(counts) == 5
    # chi-square with 4 degrees of freedom: above 18.5 in one of 1000 seeds
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 18.5


@settings(deadline=None)
@given(task=modular, step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1))
def test_own_tokens_read_as_a_question_with_its_answer(task, step, seed):
    batch = task.batch(step, seed=seed, size=12)
    assert batch.tokens.shape == (12, task.length) and batch.tokens.dtype == torch.long
    for tokens, at, answer, k in zip(*batch, strict=True):
        words = task.read(tokens.tolist()).split()
        question, rest = words[: int(at)], words[int(at) :]
        assert rest[:2] == ["=", str(int(answer))] and set(rest[2:]) <= {"pad"}
        assert sum(word in OPERATORS for word in question) == k
        if task.shape == "chain":
            assert int(answer) == from_the_left(question, task.modulus)
            factors = [int(b) for a, b in itertools.pairwise(question) if a == "*"]
            assert all(math.gcd(factor, task.modulus) == 1 for factor in factors)
        else:
            assert int(answer) == results_of(" ".join(question))[-1] % task.modulus
            assert question.count("(") == question.count(")") == k - 1
    assert batch.steps.tolist() == [1 + i % task.steps for i in range(12)]


def test_no_operand_of_a_chain_can_be_ignored_and_answers_are_uniform():
    m, units = 10, (1, 3, 7, 9)
    for operators in itertools.product(OPERATORS, repeat=2):
        choices = [range(m)] + [units if operator == "*" else range(m) for operator in operators]
        answers = {
            abc: from_the_left([str(abc[0]), operators[0], str(abc[1]), operators[1], str(abc[2])], m)
            for abc in itertools.product(*choices)
        }
        assert len(set(Counter(answers.values()).values())) == 1 and len(set(answers.values())) == m
        for position in (0, 1):  # a change of any operand but a factor changes the answer, whatever the rest
            if position and operators[0] == "*":
                continue
            for rest in {abc[:position] + abc[position + 1 :] for abc in answers}:
                seen = [answers[rest[:position] + (x,) + rest[position:]] for x in choices[position]]
                assert len(set(seen)) == len(seen)


WRITTEN = {  # all trees of k operations: a .. d operands, + for any operator
    1: ["a+b"],
    2: ["(a+b)+c", "a+(b+c)"],
    3: ["((a+b)+c)+d", "(a+(b+c))+d", "(a+b)+(c+d)", "a+((b+c)+d)", "a+(b+(c+d))"],
}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_chance_of_nested_expressions_is_the_share_of_the_commonest_answer(k):
    task, counts = ModularArithmetic(3, "+*", "nested", modulus=4), Counter()
    for written in WRITTEN[k]:
        for operators in itertools.product("+*", repeat=k):
            pieces = written.split("+")
            text = "".join(a + b for a, b in zip(pieces, [*operators, ""], strict=True))
            value = eval(f"lambda a=0, b=0, c=0, d=0: {text}")
            counts.update(value(*operands) % 4 for operands in itertools.product(range(4), repeat=k + 1))
    share = np.array([counts[value] for value in range(4)]) / counts.total()
    assert task.distribution(k) == pytest.approx(share)
    assert task.chance(k) == pytest.approx(share.max()) and share.max() > 1 / 4


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_answers_follow_the_stated_distribution(shape):
    task = ModularArithmetic(4, shape=shape)
    batch = task.batch(0, seed=1, size=20_000, mix=(4,))
    expected = 20_000 * task.distribution(4)
    # chi-square with 9 degrees of freedom: above 27.9 in one of 1000 seeds
    assert ((batch.answer.bincount(minlength=10).numpy() - expected) ** 2 / expected).sum() < 27.9


def test_ten_answers_are_equally_likely_in_a_chain():
    assert [ModularArithmetic().chance(k) for k in range(1, 7)] == [0.1] * 6


def test_a_batch_is_a_function_of_seed_and_step_alone():
    for draw in (
        lambda step, seed: ModularArithmetic(3).batch(step, seed=seed, size=8).tokens.tolist(),
        lambda step, seed: Arithmetic(3).questions(step, seed=seed, size=8),
    ):
        torch.manual_seed(0)
        np.random.seed(0)
        first = draw(7, 3)
        torch.manual_seed(1)
        np.random.seed(1)
        draw(8, 3)
        assert first == draw(7, 3) and first != draw(8, 3) and first != draw(7, 4)


def test_the_vocabulary_does_not_depend_on_the_number_of_steps():
    assert ModularArithmetic(2).names == ModularArithmetic(6).names
    assert (
        ModularArithmetic(2).vocab == len(ModularArithmetic(2).names) == len(set(ModularArithmetic(2).names))
    )
    short, long = ModularArithmetic(2), ModularArithmetic(6)
    assert short.encode("5 + 7 * 3 = 6 pad").equal(long.encode("5 + 7 * 3 = 6 pad"))


@settings(deadline=None)
@given(task=modular)
def test_loss_counts_the_answer_or_every_token_but_the_first_and_padding(task):
    batch = task.batch(0, seed=0, size=6)
    target = batch.tokens[:, 1:]
    answer, all_of_it = (counted(batch, question=question) for question in (False, True))
    assert target[answer].equal(batch.answer)
    assert all_of_it.equal(target != task.vocab - 1), "with the question, everything but padding"
    assert not (answer & ~all_of_it).any()


def test_solved_questions_stand_before_another_one():
    questions = Arithmetic(2, "+").questions(0, seed=0, size=3)
    lines = (few_shot(questions[:2]) + questions[2].prompt).split("\n")
    assert lines == [q.prompt + q.answer for q in questions[:2]] + [questions[2].prompt]
    assert few_shot([]) == ""


def test_only_addition_needs_no_brackets():
    assert Arithmetic(2, "+").question([5, 7, 5], "++") == Question("5 + 7 + 5 = ", "17", 2)
    assert Arithmetic(2).question([5, 7, 5], "*+").prompt == "5 * 7 + 5 = "
    assert Arithmetic(2, shape="nested").question([5, 7, 5], "--", tree=0) == Question(
        "5 - (7 - 5) = ", "3", 2
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Arithmetic(0), r"in 1 \.\. 6, got 0"),
        (lambda: Arithmetic(7), "got 7"),
        (lambda: Arithmetic(2.0), "whole number"),
        (lambda: Arithmetic(2, "+/"), "unknown operator '/'"),
        (lambda: Arithmetic(2, ""), "one or more"),
        (lambda: Arithmetic(2, "++"), "each once"),
        (lambda: Arithmetic(2, shape="chian"), "did you mean 'chain'"),
        (lambda: Arithmetic(2, operands=(3, 1)), "smallest to the largest"),
        (lambda: Arithmetic(2, operands=(-1, 1)), "without a sign"),
        (
            lambda: Arithmetic(2, "+", operands=(5, 9), results=(0, 9)).questions(0, seed=0, size=1),
            "hardly any",
        ),
        (lambda: Arithmetic(2).questions(0, seed=0, size=0), "at least one question"),
        (lambda: Arithmetic(2).question([1, 2], "+"), "take 3 operands, got 2"),
        (lambda: Arithmetic(2).question([1, 2, 3], "+:"), "unknown operator ':'"),
        (lambda: ModularArithmetic(modulus=1), "at least 2"),
        (lambda: ModularArithmetic(3).batch(0, seed=0, size=2, mix=(4,)), r"in 1 \.\. 3, got \[4\]"),
        (lambda: ModularArithmetic(3).batch(0, seed=0, size=2, mix=()), r"got \[\]"),
        (lambda: ModularArithmetic(3).chance(4), r"in 1 \.\. 3"),
        (lambda: ModularArithmetic(3).encode("5 + x"), "unknown token 'x'"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()
