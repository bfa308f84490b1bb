"""Places on GPUs, with counts of GPUs that this machine need not have, in real processes."""

from collections import Counter

import pytest
import torch

from lib.sweeps import gpus, run_sweep

GRID = [{"a": a} for a in range(4)]


@pytest.mark.parametrize(
    "device, per_gpu, expected",
    [
        ("cpu", 2, []),
        ("mps", 2, []),
        ("cuda", 1, [(0, 0), (1, 0)]),
        ("cuda", 2, [(0, 0), (1, 0), (0, 1), (1, 1)]),
        ("cuda:1", 2, [(1, 0), (1, 1)]),
    ],
)
def test_processes_spread_over_the_gpus_before_two_share_one(device, per_gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus.places(device, per_gpu) == expected


@pytest.mark.parametrize(
    "n_jobs, device, per_gpu, n", [(8, "cuda", 2, 4), (3, "cuda", 2, 3), (8, "cuda:0", 2, 2)]
)
def test_no_more_processes_than_places(n_jobs, device, per_gpu, n, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = []

    def local(width, *, keep):
        made.append((width, keep))
        raise InterruptedError

    monkeypatch.setattr("lib.sweeps.Local", local)
    with pytest.raises(InterruptedError):
        run_sweep(
            lambda settings, *, seed: {}, GRID, seeds=[0, 1], n_jobs=n_jobs, device=device, per_gpu=per_gpu,
            progress=False,
        )  # fmt: skip
    assert made == [(n, False)], "idle processes would keep memory of a GPU"


def make_two_gpus():
    """What `about` does first in each worker: from then on this machine has two GPUs. It travels by value."""

    def about():
        import torch

        torch.cuda.device_count = lambda: 2
        torch.cuda.set_device = lambda index: setattr(torch.cuda, "taken", index)
        return {}

    return about


def make_run(folder, together):
    """A run that waits until as many others are under way as there must be, and says which GPU it has."""

    def run(settings, *, seed):
        import os
        import time

        import torch

        (folder / f"{settings['a']}.here").touch()
        deadline = time.monotonic() + 60
        while len([*folder.glob("*.here")]) < together:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return {"gpu": torch.cuda.taken, "pid": os.getpid()}

    return run


@pytest.mark.slow
def test_each_worker_process_has_a_gpu_and_shares_it_with_no_more_than_asked(tmp_path, monkeypatch):
    per_gpu = 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    together = 2 * per_gpu
    rows = run_sweep(
        make_run(tmp_path, together), GRID[:together], seeds=[0], n_jobs=8, device="cuda", per_gpu=per_gpu,
        about=make_two_gpus(), progress=False,
    )  # fmt: skip
    assert [row["failed"] for row in rows] == [None] * together
    found = [(row["result"]["gpu"], row["result"]["pid"]) for row in rows]
    assert Counter(gpu for gpu, _ in found) == {0: per_gpu, 1: per_gpu}
    assert len({pid for _, pid in found}) == together


@pytest.mark.slow
def test_a_killed_process_frees_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def run(settings, *, seed):
        import os
        import signal

        import torch

        once = tmp_path / str(settings["a"])
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"gpu": torch.cuda.taken}

    rows = run_sweep(
        run, GRID, seeds=[0], n_jobs=2, device="cuda", about=make_two_gpus(), time_limit=60, progress=False
    )
    assert [row["failed"] for row in rows] == [None] * 4
    assert {row["result"]["gpu"] for row in rows} <= {0, 1}


def test_a_process_prefers_the_gpu_it_had(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(gpus, "_last", [(1, 0)])
    for _ in range(2):
        with gpus.gpu("cuda", 1, "test"):
            with gpus.gpu("cuda", 1, "test"):
                pass
    gpus.free_gpus("test")
    assert taken == [1, 0, 0, 1]


def test_a_worker_that_sees_one_gpu_takes_it_without_asking(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with gpus.gpu("cuda", 1, "test"), gpus.gpu("cuda", 1, "test"):
        pass
    assert taken == [0, 0] and not gpus._folder("test").exists()
