"""Where runs go: processes of this machine (joblib's), a Dask cluster, a Ray cluster. One future a run each.

An engine is a context manager with `submit(call) -> concurrent.futures.Future`, `deaths` (the exceptions of a
future whose worker died), `began(call)` and `overran(call)` (whether such a run was being computed, and hung
beyond its time limit), `waits_for()` (what a cluster lacks, for the reader) and `width`. Leaving it with an
exception ends what still runs.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from lib.sweeps.one_run import Call, attempt

BACKENDS = ("local", "dask", "ray")
CONNECT_S = 10.0  # to reach the scheduler of a cluster
IDLE_S = 300  # after which a worker process that nobody uses ends, as joblib has it
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


class Engine:
    deaths: tuple[type[BaseException], ...] = ()
    falls_together = False  # whether the death of one worker ends all runs under way
    width = 1  # runs at a time, as far as known

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close(kill=error is not None)

    def close(self, kill: bool) -> None:
        """kill: end what still runs, rather than find nothing that does."""

    def began(self, call: Call) -> bool:
        return True

    def overran(self, call: Call) -> bool:
        return False

    def waits_for(self) -> str:
        return ""


class Local(Engine):
    """Joblib's worker processes. They are its default pool, so they stay warm from one sweep to the next.

    The executor behind `joblib.Parallel` rather than Parallel itself: that gives up all results it holds when
    a worker dies or Ctrl-C comes, and cannot say which runs were under way.
    """

    deaths = (TerminatedWorkerError,)
    falls_together = True

    def __init__(self, n_jobs: int, *, keep: bool):
        self.width, self._keep, self._pool = n_jobs, keep, None
        self._marks = tempfile.TemporaryDirectory(prefix="sweep-", ignore_cleanup_errors=True)

    def __enter__(self):
        # The pool replaces a process whose memory grew by 300 MB, and warns of it from a thread of its own.
        # Where warnings are errors, that would end the thread, and the sweep would wait for ever.
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
        return self

    def submit(self, call: Call) -> Future:
        call = self._marked(call)
        call.started.unlink(missing_ok=True)
        call.overran.unlink(missing_ok=True)
        while True:
            # The same pool each time, or a new one after a worker's death broke it.
            self._pool = get_reusable_executor(
                max_workers=self.width, timeout=IDLE_S, env=ONE_THREAD, initializer=_join,
                initargs=(os.getpid(),),
            )  # fmt: skip
            try:
                return self._pool.submit(attempt, call)
            except TerminatedWorkerError:  # it broke just now
                continue

    def began(self, call: Call) -> bool:
        return self._marked(call).started.exists()

    def overran(self, call: Call) -> bool:
        file = self._marked(call).overran
        return file.exists() and file.stat().st_size > 0

    def close(self, kill: bool) -> None:
        if self._pool and (kill or not self._keep):
            self._pool.shutdown(wait=True, kill_workers=kill)
        self._marks.cleanup()
        self._quiet.__exit__(None, None, None)

    def _marked(self, call: Call) -> Call:
        return replace(call, marks=Path(self._marks.name))


def _join(driver: int) -> None:
    """A new worker process: leaves Ctrl-C to the driver, and ends when the driver is gone.

    Otherwise an orphan would train on in a scratch folder that the continued sweep uses.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    if hasattr(os, "getppid") and os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


class Dask(Engine):
    """The client of this process, else the scheduler that Dask is configured with, else processes of our own.

    Its executor rather than joblib's Dask backend: that one repeats no run after a worker's death, and
    does not say which run it was.
    """

    def __init__(self, n_jobs: int):
        distributed, dask = _package("distributed", "dask"), _package("dask", "dask")
        self.deaths = (distributed.KilledWorker,)
        self._cluster, self._own_client = None, True
        address = dask.config.get("scheduler-address", None)
        try:
            self._client, self._own_client = distributed.default_client(), False
        except ValueError:  # there is none
            if address:
                self._client = _connected(distributed, address)
            else:
                self._cluster = distributed.LocalCluster(
                    n_workers=n_jobs, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0",
                    memory_limit=0,  # a worker near its limit is paused, for ever if the memory is a model's
                    silence_logs=logging.CRITICAL,
                    # We repeat the run of a dead worker ourselves, with nothing beside it.
                    scheduler_kwargs={"allowed_failures": 0},
                )  # fmt: skip
                self._client = distributed.Client(self._cluster, set_as_default=False)
        self._executor = self._client.get_executor(pure=False)

    def submit(self, call: Call) -> Future:
        return self._executor.submit(attempt, call)

    def waits_for(self) -> str:
        try:
            self.width = len(self._client.scheduler_info(n_workers=-1)["workers"])
        except OSError:  # the scheduler is gone; the futures will say so
            return ""
        if self.width:
            return ""
        return f"waiting for workers: the Dask scheduler at {self._client.scheduler.address} has none"

    def close(self, kill: bool) -> None:
        if kill:
            self._executor.shutdown(wait=False)  # cancels; what runs on a cluster of others runs to its end
        if self._own_client:
            self._client.close()
        if self._cluster:
            self._cluster.close()


def _connected(distributed, address: str):
    try:
        _ask_who_it_is(distributed, address)
        return distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except Exception as error:
        what = f"no answer in {CONNECT_S:g} s" if isinstance(error, TimeoutError) else "no scheduler's answer"
        reason = str(error) if isinstance(error, (OSError, ValueError)) and str(error) else what
        raise ConnectionError(
            f"no Dask scheduler answers at {address} ({reason}); start one with `dask scheduler`, or correct "
            "the address that Dask is configured with (DASK_SCHEDULER_ADDRESS)"
        ) from error


def _ask_who_it_is(distributed, address: str) -> None:
    """Raises unless a scheduler answers soon. A Client waits for ever where something else listens.

    In a thread: this one may have an event loop, as a notebook's does, and has to hear Ctrl-C.
    """

    async def ask() -> None:
        security = distributed.Security().get_connection_args("client")
        async with distributed.rpc(address, timeout=CONNECT_S, connection_args=security) as scheduler:
            await asyncio.wait_for(scheduler.identity(), CONNECT_S)

    def work() -> None:
        try:
            answer.set_result(asyncio.run(ask()))
        except BaseException as error:
            answer.set_exception(error)

    answer = Future()
    threading.Thread(target=work, daemon=True).start()
    answer.result(timeout=CONNECT_S + 2)


class Ray(Engine):
    """The cluster that this process is connected to, else the one that Ray is configured with, else our own.

    Its own tasks rather than joblib's Ray backend: that one cannot hand over a row before all are done.
    """

    def __init__(self, n_jobs: int, *, gpu_share: float):
        self._ray = ray = _package("ray", "ray")
        died = ray.exceptions
        self.deaths = (died.WorkerCrashedError, died.OutOfMemoryError, died.NodeDiedError)
        self._gpu_share, self._refs = gpu_share, {}
        self._own = not ray.is_initialized()
        if self._own:
            _start_ray(ray, n_jobs)
        # We repeat the run of a dead worker ourselves, with nothing beside it.
        self._attempt = ray.remote(max_retries=0, num_cpus=1, num_gpus=gpu_share)(attempt)

    def submit(self, call: Call) -> Future:
        ref = self._attempt.remote(call)
        future = ref.future()
        self._refs[future] = ref
        future.add_done_callback(self._refs.pop)
        return future

    def waits_for(self) -> str:
        has = self._ray.cluster_resources()
        self.width = int(has.get("CPU", 0))
        if not self.width:
            return "waiting for workers: the Ray cluster has none"
        if self._gpu_share and not has.get("GPU"):
            return "waiting for a GPU: the Ray cluster has none"
        return ""

    def close(self, kill: bool) -> None:
        if kill:
            for ref in list(self._refs.values()):
                self._ray.cancel(ref, force=True)
        if self._own:
            self._ray.shutdown()


def _start_ray(ray, n_jobs: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    # Ray reads RAY_ADDRESS itself. We look because without one it would join whatever cluster this machine
    # had last, dead ones included, and because it tries for minutes to connect to one that is dead.
    if address := os.environ.get("RAY_ADDRESS"):
        _check_ray_answers(address)
        ray.init(**quiet)
    else:
        ray.init(address="local", num_cpus=n_jobs, include_dashboard=False, **quiet)


def _check_ray_answers(address: str) -> None:
    """ConnectionError if nothing listens there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto": the cluster of this machine
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or correct "
            "RAY_ADDRESS"
        ) from error


def _package(name: str, backend: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"backend {backend!r} needs the package {name}: pip install -r requirements-cluster.txt"
        ) from error
