"""Clusters that are missing, unreachable, empty or run by someone else, with real schedulers and workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import dask
import pytest

from lib.evidence.rows import RowStore
from lib.paths import ROOT
from lib.sweeps import engines, run_sweep

GRID = [{"a": a} for a in range(4)]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def plain_run(settings, *, seed):
    raise AssertionError("a run began")


@pytest.mark.parametrize("backend, package", [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_named_with_its_install_line_before_any_run(backend, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what `import` finds then is an ImportError
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install -r requirements-"):
        run_sweep(plain_run, GRID, seeds=[0], backend=backend, progress=False)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'dsk'; did you mean 'dask'"):
        run_sweep(plain_run, GRID, seeds=[0], backend="dsk", progress=False)


@pytest.mark.slow
def test_a_dask_scheduler_that_does_not_answer_is_named_before_any_run(monkeypatch):
    monkeypatch.setattr(engines, "CONNECT_S", 1.0)
    with dask.config.set({"scheduler-address": "tcp://127.0.0.1:9"}):
        with pytest.raises(ConnectionError, match="no Dask scheduler answers at tcp://127.0.0.1:9 .*dask"):
            run_sweep(plain_run, GRID, seeds=[0], backend="dask", progress=False)


def test_a_port_that_speaks_something_else_is_no_scheduler(monkeypatch):
    """It takes the connection and says nothing: a client of Dask would wait for ever."""
    monkeypatch.setattr(engines, "CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with dask.config.set({"scheduler-address": address}):
            with pytest.raises(ConnectionError, match=f"no Dask scheduler answers at {address} "):
                run_sweep(plain_run, GRID, seeds=[0], backend="dask", progress=False)


def test_a_signal_while_connecting_stops_at_once(monkeypatch, capsys):
    monkeypatch.setattr(engines, "CONNECT_S", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:

        accepted = []

        def send_once_connected():
            accepted.append(mute.accept()[0])
            os.kill(os.getpid(), signal.SIGTERM)

        sender = threading.Thread(target=send_once_connected)
        sender.start()
        start = time.monotonic()
        with dask.config.set({"scheduler-address": f"tcp://127.0.0.1:{mute.getsockname()[1]}"}):
            with pytest.raises(SystemExit) as caught:
                run_sweep(plain_run, GRID, seeds=[0], backend="dask", progress=False)
        sender.join()
        accepted[0].close()
    assert caught.value.code == 143 and time.monotonic() - start < 30
    assert "Stopped: 0 of 4 runs" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_ray_cluster_that_does_not_answer_is_named_before_any_run(address, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address} .*ray start"):
        run_sweep(plain_run, GRID, seeds=[0], backend="ray", progress=False)


@pytest.fixture
def scheduler(tmp_path, until):
    """Start parts of a Dask cluster, each a process: scheduler() first, then workers."""
    processes, file = [], tmp_path / "scheduler.json"

    def start(*words):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "dask", *words, "--scheduler-file", file, "--no-dashboard"],
                env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        )

    start("scheduler", "--host", "127.0.0.1", "--port", "0")
    until(lambda: file.exists() and file.read_text().endswith("}"), "a scheduler that says where it is")
    workers = ("worker", "--nworkers", "2", "--nthreads", "1")
    yield json.loads(file.read_text())["address"], lambda: start(*workers), processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_cluster_without_workers_says_so_and_runs_once_they_come(tmp_path, scheduler):
    """On a scheduler with Dask's own settings; a run that kills its worker has failed there as anywhere."""
    address, start_workers, _ = scheduler
    notes = []
    log = tmp_path / "calls.log"

    def told(status):
        if status.note and not notes:
            notes.append(status.note)
            start_workers()

    def run(settings, *, seed):
        import os
        import signal

        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        if settings["a"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": settings["a"]}

    with dask.config.set({"scheduler-address": address}):
        rows = run_sweep(run, GRID, seeds=[0], backend="dask", progress=told)
    assert notes == [f"waiting for workers: the Dask scheduler at {address} has none"]
    assert [row["result"] for row in rows] == [{"value": 0}, None, {"value": 2}, {"value": 3}]
    assert "its worker process died" in rows[1]["failed"]
    assert str(os.getpid()) not in log.read_text().split()


@pytest.mark.slow
def test_a_scheduler_that_is_gone_stops_the_sweep_and_keeps_what_is_recorded(tmp_path, scheduler, until):
    address, start_workers, processes = scheduler
    start_workers()
    store = RowStore(tmp_path / "rows.jsonl", code="c0ffee")

    def told(status):
        if status.done == 1 and processes[0].poll() is None:
            os.killpg(processes[0].pid, signal.SIGKILL)
            processes[0].wait()

    def run(settings, *, seed):
        import time

        time.sleep(600 if settings["a"] else 0)
        return {"value": settings["a"]}

    with dask.config.set({"scheduler-address": address}):
        with pytest.raises(ConnectionError, match="scheduler of the cluster is gone; .*same command goes on"):
            run_sweep(run, GRID, seeds=[0], store=store, backend="dask", progress=told)
    assert [row["result"] for row in store.rows()] == [{"value": 0}]
