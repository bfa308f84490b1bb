"""Time and memory of a computation: arms that take turns, floats kept for backward, floats alive at once.

times = alternate({"ours": run, "theirs": other}, turns=7, least_s=0.02, seed=0)   # seconds a call, by turn
saved = saved_floats(lambda: layer(x), layer.parameters())
with PeakFloats() as counter: step()
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def alternate(
    arms: Mapping[str, Callable[[], object]], *, turns: int, least_s: float, seed: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds a call of each arm, one value a turn; arms take turns in an order drawn anew each time.

    CPU time of this process on a CPU, wall time with synchronisation on other devices. A value is the mean
    over calls of at least `least_s` seconds in all; the first call of each arm is not measured.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    generator, names = np.random.default_rng(seed), list(arms)

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    for arm in arms.values():
        arm()
    for _ in range(turns):
        for i in generator.permutation(len(names)):
            calls, start = 0, now()
            while not calls or now() - start < least_s:
                arms[names[i]]()
                calls += 1
            found[names[i]].append((now() - start) / calls)
    return found


def saved_floats(run: Callable[[], object], weights: Iterable[Tensor]) -> float:
    """Floats (4 bytes) that autograd keeps for the backward pass of `run`; weights are not counted.

    Tensors that share their memory count once; a mask of booleans is a quarter of a float each.
    """
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # keeps the memory, so no address is seen twice, but not the graph in a circle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()  # held: its graph holds what is saved
    del result
    return sum(kept.values()) / 4


class PeakFloats(TorchDispatchMode):
    """Floats (4 bytes) of tensors made inside this context that were alive at once, at most: `.peak`.

    Every tensor that an operation of torch returns is followed until it is freed; one that is not filled
    (torch.empty) counts from its first use on, since a machine gives memory to what is written. Buffers
    inside one operation are not seen.
    """

    def __init__(self):
        super().__init__()
        self.peak = self.alive = 0.0
        self.floats: dict[int, float] = {}  # by storage that is alive; 0: not filled yet

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        used = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        filled = "empty" not in func.overloadpacket.__name__
        for key, storage in (_storages(result) | used).items():
            if key not in self.floats and key not in used:
                self.floats[key] = 0.0
                weakref.finalize(storage, self._freed, key)
            if self.floats.get(key) == 0.0 and (filled or key in used):
                self.floats[key] = storage.nbytes() / 4
                self.alive += self.floats[key]
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, key: int) -> None:
        self.alive -= self.floats.pop(key)


def _storages(tree: object) -> dict:
    found = [x.untyped_storage() for x in tree_leaves(tree) if torch.is_tensor(x)]
    return {id(storage): storage for storage in found}


@contextmanager
def one_thread():
    """torch on one thread inside, as many as before after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
