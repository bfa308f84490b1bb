"""Facts: an answer is found by following the story as told, and by nothing shorter."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib.tasks.facts import NAMES, ORDERS, RELATIONS, SHORTCUTS, MultiHop
from lib.tasks.questions import counted


@st.composite
def tasks(draw):
    hops = draw(st.integers(1, 5))
    return MultiHop(hops, draw(st.integers(2, len(NAMES) // (hops + 1))), draw(st.sampled_from(ORDERS)))


def follow(facts: set[tuple[str, str, str]], name: str, relations: list[str]) -> str:
    """Look every hop up in the facts; each must be told exactly once."""
    for relation in relations:
        (name,) = [y for x, r, y in facts if (x, r) == (name, relation)]
    return name


def read(prompt: str) -> tuple[list[tuple[str, str, str]], str, list[str]]:
    """The facts told, the head, and the relations in the order of the hops, out of the text alone."""
    story, asked = re.fullmatch(r"(.*)\nQuestion: Who is (.*)\?\nAnswer:", prompt).groups()
    facts = [re.fullmatch(r"(\w+)'s (\w+) is (\w+)", fact).groups() for fact in story.rstrip(".").split(". ")]
    *relations, head = asked.split(" of ")
    return facts, head, [relation.removeprefix("the ") for relation in reversed(relations)]


@settings(deadline=None)
@given(task=tasks(), step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1))
def test_the_answer_is_found_by_following_the_text(task, step, seed):
    for k in range(1, task.hops + 1):
        for question in task.questions(step, seed=seed, size=2, hops=k):
            facts, head, relations = read(question.prompt)
            assert len(facts) == task.chains * task.hops and len(relations) == k == question.steps
            assert question.answer == f" {follow(set(facts), head, relations)}"
            heads = [x for x, r, _ in facts if r == relations[0]]
            found = {f" {follow(set(facts), other, relations)}" for other in heads}
            assert found == set(question.choices) and len(question.choices) == task.chains


@settings(deadline=None)
@given(task=tasks(), step=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1))
def test_own_tokens_tell_the_same_story_with_the_same_answer(task, step, seed):
    batch = task.batch(step, seed=seed, size=task.hops + 1)
    assert batch.tokens.shape == (task.hops + 1, task.length) and batch.tokens.max() < task.vocab
    for b, (tokens, at, answer, k) in enumerate(zip(*batch, strict=True)):
        words = task.read(tokens.tolist()).split()
        story, mark = words[: 3 * task.chains * task.hops], 3 * task.chains * task.hops
        told = list(zip(story[0::3], story[1::3], story[2::3], strict=True))
        assert words[mark] == "?" and words[int(at)] == "=" and set(words[int(at) + 2 :]) <= {"pad"}
        relations = words[mark + 2 : int(at)]
        assert len(relations) == int(k) == 1 + b % task.hops
        assert follow(set(told), words[mark + 1], relations) == words[int(at) + 1] == NAMES[int(answer)]
        text = task.questions(step, seed=seed, size=task.hops + 1, hops=int(k))[b]
        assert (
            read(text.prompt) == (told, words[mark + 1], relations)
            and text.answer == f" {NAMES[int(answer)]}"
        )


def test_the_story_is_the_same_for_any_number_of_hops():
    task = MultiHop()
    stories = {
        k: [read(q.prompt)[:2] for q in task.questions(3, seed=1, size=5, hops=k)] for k in (1, 2, 3, 4)
    }
    assert stories[1] == stories[2] == stories[3] == stories[4]


@settings(deadline=None)
@given(task=tasks(), seed=st.integers(0, 2**32 - 1))
def test_no_name_is_in_two_chains_and_no_relation_used_for_two_hops(task, seed):
    stories = task.stories(0, seed=seed, size=2)
    for b in range(2):
        people = stories.people[b].flatten().tolist()
        assert len(set(people)) == len(people) == task.chains * (task.hops + 1)
        assert len(set(stories.relations[b].tolist())) == task.hops
        assert sorted(stories.order[b].tolist()) == list(range(task.chains * task.hops))


@settings(deadline=None)
@given(task=tasks(), seed=st.integers(0, 2**32 - 1))
def test_the_order_says_which_hop_is_told_first(task, seed):
    assume(task.order != "shuffled")
    stories = task.stories(0, seed=seed, size=1)
    told = [stories.relations[0].tolist().index(r) for _, r, _ in stories.facts(0)]
    assert told == sorted(told, reverse=task.order == "backward")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_shortcuts_do_no_better_than_chance(order, k):
    task, n = MultiHop(hops=4, chains=3, order=order), 3000
    stories = task.stories(0, seed=k, size=n)
    answer, right = task.answer(stories, k).tolist(), Counter()
    for b in range(n):
        head, asked = int(stories.people[b, stories.asked[b], 0]), stories.relations[b, :k].tolist()
        for name, guess in SHORTCUTS.items():
            right[name] += guess(stories.facts(b), head, asked) == answer[b]
    # 4 standard deviations above 1/3: one of 30,000 draws of one shortcut
    most = n / 3 + 4 * np.sqrt(n * (1 / 3) * (2 / 3))
    assert all(count <= most for count in right.values()), right
    assert right["the last fact with the last relation"] > n / 4, "it does find one of the candidates"


def test_one_hop_is_answered_by_the_shortcut_that_answers_one_hop():
    task = MultiHop()
    stories = task.stories(0, seed=0, size=50)
    for b in range(50):
        head, asked = int(stories.people[b, stories.asked[b], 0]), stories.relations[b, :1].tolist()
        assert SHORTCUTS["the first hop only"](stories.facts(b), head, asked) == int(
            task.answer(stories, 1)[b]
        )


def test_every_chain_is_asked_and_every_place_in_the_story_can_hold_the_answer():
    task, n = MultiHop(hops=2, chains=2), 4000
    stories = task.stories(0, seed=0, size=n)
    answer, places = task.answer(stories, 2), Counter()
    for b in range(n):
        places[[y for _, _, y in stories.facts(b)].index(int(answer[b]))] += 1
    assert sorted(places) == [0, 1, 2, 3]
    # chi-square with 3 degrees of freedom: above 16.3 in one of 1000 seeds
    assert sum((count - n / 4) ** 2 / (n / 4) for count in places.values()) < 16.3
    assert abs(int(stories.asked.sum()) - n / 2) < 4 * np.sqrt(n) / 2


def test_a_batch_is_a_function_of_seed_and_step_alone():
    task = MultiHop()
    np.random.seed(0)
    first = task.batch(7, seed=3, size=4).tokens
    np.random.seed(1)
    task.batch(8, seed=3, size=4)
    assert first.equal(task.batch(7, seed=3, size=4).tokens)
    assert not first.equal(task.batch(8, seed=3, size=4).tokens)
    assert not first.equal(task.batch(7, seed=4, size=4).tokens)


def test_loss_counts_the_answer_alone_or_the_story_too():
    task = MultiHop(hops=3, chains=2)
    batch = task.batch(0, seed=0, size=6)
    assert batch.tokens[:, 1:][counted(batch, question=False)].equal(batch.answer)
    assert counted(batch, question=True).sum(1).equal(batch.answer_at + 1)


def test_names_and_relations_cannot_be_mistaken_for_each_other():
    words = MultiHop().names
    assert len(set(words)) == len(words) == MultiHop().vocab
    assert len(NAMES) == 40 and len(RELATIONS) == 10
    assert all(not a.startswith(b) for a in words for b in words if a != b), "no name begins another one"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MultiHop(hops=0), r"hops is a whole number in 1 \.\. 10"),
        (lambda: MultiHop(hops=11), "got 11"),
        (lambda: MultiHop(hops=4, chains=9), r"2 \.\. 8: 40 names"),
        (lambda: MultiHop(chains=1), "got 1"),
        (lambda: MultiHop(order="shufled"), "did you mean 'shuffled'"),
        (lambda: MultiHop(hops=2).questions(0, seed=0, size=1, hops=3), r"1 \.\. 2, got \[3\]"),
        (lambda: MultiHop(hops=2).batch(0, seed=0, size=1, mix=(0,)), r"got \[0\]"),
        (lambda: MultiHop().stories(0, seed=0, size=0), "at least one question"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_chance_is_one_in_the_number_of_chains():
    assert MultiHop(chains=4).chance == 1 / 4
    assert isinstance(MultiHop().batch(0, seed=0, size=1).steps, torch.Tensor)
