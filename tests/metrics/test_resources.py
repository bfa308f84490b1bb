"""The clock, on a clock that only the arms advance, and the counts of floats, on sums done by hand."""

import pytest
import torch

from lib.metrics import resources
from lib.metrics.resources import PeakFloats, alternate, one_thread, saved_floats


def test_arms_take_turns_in_orders_that_the_seed_decides(monkeypatch):
    """A clock that only the arms advance: 1 s for a, 2 s for b; the first call of each is not timed."""
    clock, log = [0.0], []
    monkeypatch.setattr(resources.time, "process_time", lambda: clock[0])

    def arm(name, seconds):
        def run():
            log.append(name)
            clock[0] += seconds

        return run

    def measure(seed, least_s=0.0):
        log.clear()
        arms = {"a": arm("a", 1.0), "b": arm("b", 2.0), "c": arm("c", 0.5)}
        return alternate(arms, turns=9, least_s=least_s, seed=seed), list(log)

    found, order = measure(0)
    assert found == {"a": [1.0] * 9, "b": [2.0] * 9, "c": [0.5] * 9}
    turns = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(turns) == 10 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 2
    assert measure(0)[1] == order != measure(1)[1]
    found, order = measure(0, least_s=2.0)
    assert found == {"a": [1.0] * 9, "b": [2.0] * 9, "c": [0.5] * 9}
    assert [order.count(name) for name in "abc"] == [1 + 9 * 2, 1 + 9 * 1, 1 + 9 * 4]


def test_inside_there_is_one_thread_and_after_it_as_many_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_saved_floats_count_memory_once_and_weights_never():
    x, weight = torch.ones(10, 10, requires_grad=True), torch.ones(10, 10, requires_grad=True)
    assert saved_floats(lambda: x.exp(), [weight]) == 100  # its result
    assert saved_floats(lambda: x * x, [weight]) == 100  # the same factor twice
    assert saved_floats(lambda: x.T @ weight, [weight]) == 100  # a view of x; the weight is not counted
    assert saved_floats(lambda: x + x, [weight]) == 0
    assert saved_floats(lambda: x.masked_fill(x.detach() > 0, 0.0), [weight]) == 25  # 100 bytes of mask


def test_the_peak_is_what_was_alive_at_once():
    x = torch.ones(100)
    with PeakFloats() as counter:
        y = x + 1  # 100
        z = y.exp()  # 200
        del y
        z = z + 1  # 200 while both are there, then 100
        w = z.view(10, 10).T  # a view
        w = torch.cat([w, w, w]).sum()  # 300 more, and 1
    assert counter.peak == pytest.approx(401) and counter.alive == 101
    del z, w
    assert counter.alive == 0


def test_memory_that_is_not_written_does_not_count_until_it_is():
    with PeakFloats() as counter:
        unused, used = torch.empty(1000), torch.empty(100)
        assert counter.peak == 0
        used[:10] = 1.0
        used.add_(1.0)
        del unused
        x = used.new_empty(50)
        x.zero_()
    assert counter.peak == counter.alive == 150


def test_the_peak_sees_the_backward_pass():
    x = torch.ones(100, requires_grad=True)
    with PeakFloats() as forward:
        y = x.exp().exp()
    with PeakFloats() as whole:
        torch.autograd.grad(x.exp().exp(), x, torch.ones(100))
    assert forward.peak == 200 and whole.peak > 300
    assert y.shape == (100,)
