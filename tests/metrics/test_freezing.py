"""The freezing argument on small protocols: true as counted, false without any one counted family."""

import itertools

import numpy as np
import pytest

from lib.metrics.freezing import (
    World,
    counted_functions,
    droppable,
    failing_pair,
    freeze,
    labels,
    random_world,
    unused,
)

TWO, THREE = (2, 2, 5, 60), (2, 2, 4, 6, 128)
SMALL = {2: (TWO, (2, 2), 0.15), 3: (THREE, (2, 2, 2), 0.07)}
RUNS = 6


@pytest.fixture(scope="module")
def worlds():
    return {L: [random_world(counts, rate=rate, seed=seed) for seed in range(RUNS)]
            for L, (counts, _, rate) in SMALL.items()}


def told_apart_in_python(world, kept):
    """Whether two z_L of R_L lead player -1 to different states, by loops over dictionaries."""
    for below in itertools.product(range(world.state.shape[0]), *kept.Z):
        if len({int(world.state[(*below, z)]) for z in kept.R}) > 1:
            return True
    return False


@pytest.mark.parametrize("L", [2, 3])
def test_a_random_protocol_is_forgetful(worlds, L):
    """Fact 4.1: a message to i depends on z_i … z_L alone; and given those, on everything it may."""
    world = worlds[L][0]
    for (t, j, i), message in world.messages.items():
        assert j > i and 1 <= t <= L
        for axis in range(i + 1):
            assert (message == message.take([0], axis)).all()
        if t == 1:
            others = tuple(axis for axis in range(message.ndim) if axis - 1 not in (i, j))
            assert (message == message[tuple(slice(0, 1) if a in others else slice(None)
                                             for a in range(message.ndim))]).all()
    late = [world.messages[L, L, -1] for world in worlds[L]]
    for axis in range(L + 2):
        assert any((message != message.take([0], axis)).any() for message in late)


@pytest.mark.parametrize("L", [2, 3])
def test_with_all_families_frozen_no_claim_fails(worlds, L):
    left = 0
    for world in worlds[L]:
        kept = freeze(world, SMALL[L][1])
        assert kept.violations == [] and not told_apart_in_python(world, kept)
        assert kept.functions == counted_functions(L, [world.state.shape[0], *map(len, kept.Z)])
        assert kept.sizes[-1] == len(kept.R) > 0
        left += len(kept.R) > 1 and all(len(Z) == 2 for Z in kept.Z)
    assert left >= RUNS / 2, "the claims say something only if several z_L are left"


@pytest.mark.parametrize("L, family", [(L, family) for L in (2, 3) for family in droppable(L)])
def test_without_any_one_family_a_claim_fails(worlds, L, family):
    """Each is counted for a reason: dropping it (or its runs over z_1) breaks a claim in some protocol."""
    kept = [freeze(world, SMALL[L][1], drop=[family]) for world in worlds[L]]
    more = [freeze(random_world(SMALL[L][0], rate=SMALL[L][2], seed=seed), SMALL[L][1], drop=[family])
            for seed in range(100, 112) if not any(k.violations for k in kept)]
    assert any(k.violations for k in kept + more)
    for world, one in zip(worlds[L], kept, strict=True):
        assert any(claim.startswith("end") for claim in one.violations) == told_apart_in_python(world, one)


@pytest.mark.parametrize("L", [2, 3])
def test_epoch_l_to_others_than_w_is_not_used_in_the_end(worlds, L):
    assert len(unused(L)) == L
    for world in worlds[L]:
        kept = freeze(world, SMALL[L][1], drop=unused(L))
        assert not any(claim.startswith("end") for claim in kept.violations)


def tiny(state, message):
    """L = 1: w, z_0 of one value each, z_1 of four."""
    shape = (1, 1, 4)
    silent = np.zeros(shape, dtype=np.int64)
    return World({(1, 1, -1): np.array(message).reshape(shape), (1, 0, -1): silent, (1, 1, 0): silent},
                 np.array(state).reshape(shape))


def test_the_commonest_message_is_kept_and_a_failing_pair_is_found():
    world, answers = tiny([7, 8, 7, 7], [1, 0, 1, 1]), np.array([0, 1, 2, 0]).reshape(1, 1, 4)
    kept = freeze(world, (1,))
    assert kept.R.tolist() == [0, 2, 3] and kept.sizes == [3] and not kept.violations
    assert failing_pair(world, kept, answers) == ((0, 0, 0), (0, 0, 2))
    assert failing_pair(world, kept, np.zeros((1, 1, 4))) is None, "equal answers: nobody errs"


def test_a_protocol_that_says_more_than_it_sends_is_caught():
    world = tiny([7, 8, 9, 7], [0, 0, 0, 1])          # the state tells z_1 = 0, 1, 2 apart, no message did
    kept = freeze(world, (1,))
    assert kept.violations == ["end: player -1 tells R_1 apart, for 1 choices of other inputs"]
    assert failing_pair(world, kept, np.arange(4).reshape(1, 1, 4)) is None


def test_labels_are_equal_where_all_parts_are():
    rng = np.random.default_rng(0)
    parts = [rng.integers(-3, 3, (4, 5, 6)) for _ in range(3)]
    label = labels(parts)
    rows = np.stack(parts, axis=-1).reshape(-1, 3).tolist()
    seen = {}
    for row, value in zip(rows, label.reshape(-1).tolist(), strict=True):
        assert seen.setdefault(tuple(row), value) == value
    assert len(set(seen.values())) == len(seen)


def test_what_does_not_fit_is_refused(worlds):
    with pytest.raises(ValueError, match="no such family"):
        freeze(worlds[2][0], (2, 2), drop=["stage 5: to 0 in epoch 1"])
    with pytest.raises(ValueError, match="2 sizes of at least 1"):
        freeze(worlds[2][0], (2,))
    with pytest.raises(ValueError, match="product of at most"):
        random_world((10, 10, 10**6), rate=0.1, seed=0)
