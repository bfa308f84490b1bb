"""What the tests of sweeps share: real drivers in processes of their own, and how to wait for one."""

import logging
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lib.paths import ROOT

# A driver: runs of a few short steps that are counted in a log, and that go on where a killed one stopped.
DRIVER = """
import sys
from pathlib import Path

from lib.evidence.rows import RowStore
from lib.sweeps import run_sweep

folder, backend, n_jobs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def run(settings, *, seed, scratch):
    import os, time
    scratch.mkdir(parents=True, exist_ok=True)
    saved = scratch / "step"
    first = int(saved.read_text()) if saved.exists() else 0
    for step in range(first, settings["steps"]):
        with open(folder / "steps.log", "a") as log:
            log.write(f"{os.getpid()} {settings['a']} {seed} {step}\\n")
        time.sleep(0.05)
        while (folder / "pause").exists():
            time.sleep(0.05)
        temporary = saved.with_suffix(".new")
        temporary.write_text(str(step + 1))
        temporary.replace(saved)
    return {"value": settings["a"] * 10 + seed}


if __name__ == "__main__":
    store = RowStore(folder / "rows.jsonl", code="c0ffee")
    grid = [{"a": a, "steps": 8} for a in range(3)]
    rows = run_sweep(
        run, grid, seeds=[0, 1], store=store, backend=backend, n_jobs=n_jobs, scratch=folder / "scratch"
    )
    print("rows", len(rows), flush=True)
"""  # the first argument is a folder; runs pause while it holds a file `pause`


def until(claim, what, seconds=60):
    """Wait until `claim()` holds, and give its value; fail saying what never happened."""
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.02)
    return value


def alive(pid):
    """Whether the process runs; one that only waits for its parent to notice its death does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Driver:
    """A sweep in a process of its own: `started` once a run has begun, `pids` of its workers."""

    def __init__(self, folder, backend="local", n_jobs=2, program=DRIVER):
        self.folder = folder
        script = folder / "driver.py"
        script.write_text(textwrap.dedent(program))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", script, folder, backend, str(n_jobs)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def run(self, monkeypatch):
        """The driver's run function, for a sweep of this process."""
        arguments = ["driver.py", str(self.folder), "local", "1"]
        monkeypatch.setattr(sys, "argv", arguments)
        return runpy.run_path(str(self.folder / "driver.py"))["run"]

    def steps(self):
        """(pid, a, seed, step) of every step that any driver in this folder has taken, whole lines only."""
        log = self.folder / "steps.log"
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return [tuple(int(part) for part in line.split()) for line in lines]

    def after(self, steps):
        """Wait until that many steps were taken in all."""
        until(lambda: len(self.steps()) >= steps or self.process.poll() is not None, f"{steps} steps")
        assert self.process.poll() is None, self.process.communicate()[0]
        return self

    def send(self, number):
        os.kill(self.process.pid, number)
        return self

    def end(self):
        """(exit status, all it wrote), after its end."""
        out, _ = self.process.communicate(timeout=120)
        return self.process.returncode, out


@pytest.fixture(name="until")
def _until():
    return until


@pytest.fixture(name="alive")
def _alive():
    return alive


@pytest.fixture
def drive(tmp_path):
    drivers = []

    def start(*args, **kwargs):
        drivers.append(Driver(tmp_path, *args, **kwargs))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            os.killpg(driver.process.pid, signal.SIGKILL)
            driver.process.communicate()


@pytest.fixture
def engine(request):
    """A backend by name. Dask and Ray have two worker processes, started once for all tests of a file."""
    if request.param != "local":
        request.getfixturevalue(f"{request.param}_cluster")
    return request.param


@pytest.fixture(scope="module")
def dask_cluster():
    from distributed import Client, LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit=0,
        silence_logs=logging.CRITICAL, scheduler_kwargs={"allowed_failures": 0},
    ) as cluster, Client(cluster):  # fmt: skip
        yield


@pytest.fixture(scope="module")
def ray_cluster():
    ray = pytest.importorskip("ray", reason="no ray: pip install -r requirements-cluster.txt")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level=logging.CRITICAL,
    )  # fmt: skip
    yield
    ray.shutdown()
