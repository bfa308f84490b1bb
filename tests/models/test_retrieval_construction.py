"""Hand-built retrieval: composed heads and plain heads answer every prompt; without composition none does."""

import itertools

import pytest
import torch

from lib.experiments.retrieval_verification import n_prompts, questions, verify_retrieval
from lib.models.constructions.retrieval import relational_retrieval
from lib.tasks.retrieval import RelationalRetrieval

SIZES = [dict(zip("NCWV", n, strict=True)) for n in ((2, 2, 2, 2), (3, 2, 2, 2), (2, 3, 3, 2), (2, 2, 2, 4))]


@pytest.mark.parametrize("arithmetic", ["float64", "float32", "float16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_composed_heads_answer_every_question_of_every_prompt(sizes, arithmetic):
    row = verify_retrieval(sizes | {"arithmetic": arithmetic})
    assert row["composed_errors"] == 0 and row["composed_margin"] > 5
    assert row["composed_heads"] == max(sizes["C"], sizes["W"])
    assert row["fixed_errors"] > 0.2 * row["inputs"]  # the control must fail


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_many_plain_heads_as_values_answer_every_question_too_if_they_are_wide(sizes):
    row = verify_retrieval(sizes)
    assert row["plain_errors"] == 0 and row["plain_margin"] > 0.9
    assert row["plain_heads"] == sizes["W"]


def test_plain_heads_without_a_place_to_rest_fail():
    task = RelationalRetrieval(N=3, C=2, W=2, V=3, Q=7, sink=False)
    prompts = task.batch(0, seed=1, size=200)
    right = {}
    for how in ("composed", "plain"):
        model = relational_retrieval(task.C, task.K, task.W, task.V, how=how)
        found = model(prompts.tokens, mask=task.mask(), rows=task.queries).argmax(dim=-1)
        right[how] = (found == prompts.answer).double().mean().item()
    assert right["composed"] == 1 and right["plain"] < 0.95


def test_the_verification_sees_every_prompt_once():
    sizes = SIZES[0]
    row = verify_retrieval(sizes)
    task = RelationalRetrieval(**sizes, Q=8)
    prompts = {
        (keys_1, keys_2, values)
        for keys_1 in itertools.permutations(range(2))
        for keys_2 in itertools.permutations(range(2))
        for values in itertools.product(range(2), repeat=4)
    }
    assert row["prompts"] == len(prompts) == n_prompts(task)
    assert row["inputs"] == len(prompts) * 2 * 2 * 2


def test_the_weights_agree_with_a_look_up_by_hand():
    task = RelationalRetrieval(N=4, C=3, W=2, V=5, Q=7)
    prompts = task.batch(0, seed=1, size=50)
    model = relational_retrieval(task.C, task.K, task.W, task.V)
    found = model(prompts.tokens, mask=task.mask(), rows=task.queries).argmax(dim=-1)
    for b, q in itertools.product(range(50), range(7)):
        c, v, w = prompts.asked[b, q].tolist()
        item = next(item for item in prompts.items[b].tolist() if item[c] == v)
        assert found[b, q] == item[task.C + w]


@pytest.mark.parametrize("V", [2, 3, 4])
def test_scores_that_do_not_see_what_is_asked_answer_no_more_than_the_additive_limit(V):
    """The best additive table F(prompt, c, v)[a] + G(w)[a], fitted for each swapped pair: 3 of 4, never 4."""
    a, b, best = 0, 1, 0
    generator = torch.Generator().manual_seed(V)
    for _ in range(2_000):
        F, G = torch.randn(2, V, generator=generator), torch.randn(2, V, generator=generator)
        logits = F[:, None] + G  # prompt with values (a, b) or (b, a); asked w = 0 or 1
        right = torch.tensor([[a, b], [b, a]])
        best = max(best, int((logits.argmax(dim=-1) == right).sum()))
    assert best == 3


def test_all_questions_are_asked_of_every_item():
    task = RelationalRetrieval(N=3, C=2, W=2, V=2, Q=12)
    items = task.batch(0, seed=0, size=5).items
    asked = questions(task, items)
    assert asked.shape == (5, 12, 3) and len(asked[0].unique(dim=0)) == 12


@pytest.mark.parametrize(
    "wrong, said",
    [(dict(how="static"), "unknown form"), (dict(C=0), "C is a whole number"), (dict(V=1.5), "V is a whole")],
)
def test_impossible_layers_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        relational_retrieval(**dict(C=2, K=2, W=2, V=2) | wrong)


def test_too_many_prompts_are_refused_before_any_work():
    with pytest.raises(ValueError, match="too many to try all"):
        verify_retrieval(dict(N=5, C=3, W=3, V=4))
