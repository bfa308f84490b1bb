"""Rows as they finish, from an engine or from this process, whatever becomes of workers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait

import torch

from lib.sweeps.engines import Engine
from lib.sweeps.one_run import DIED, Call, attempt, over_limit, row
from lib.sweeps.progress import Reporter
from lib.sweeps.stopping import Interrupted, Stop

POLL_S = 0.2  # until a signal is noticed
LOOK_S = 2.0  # until a cluster without workers is noticed
SETTLE_S = 5.0  # for all futures of a broken pool to know it
IN_VAIN = 3  # times that workers die before they begin a run; then something is wrong with all of them


def one_by_one(calls: Sequence[Call], stop: Stop) -> Iterator[tuple[Call, dict]]:
    """In this process, where a debugger can follow."""
    for call in calls:
        threads = torch.get_num_threads()
        try:
            with stop.interrupting():
                outcome = attempt(call, here=True)
        except Interrupted:
            return
        finally:
            torch.set_num_threads(threads)  # `attempt` took one; the caller may want them back
        yield call, _checked(outcome)


def spread(
    calls: Sequence[Call], engine: Engine, stop: Stop, report: Reporter
) -> Iterator[tuple[Call, dict]]:
    """On an engine. Runs whose worker died are repeated at the end, each with nothing beside it.

    When a stop is asked for, rows that are ready still come, and then no more.
    """
    suspects = []
    yield from _together(calls, engine, stop, report, suspects)
    for i, call in enumerate(suspects):
        if stop.asked:
            return
        report.note(f"{len(suspects) - i} to repeat alone, as their worker died")
        again = []
        yield from _together([call], engine, stop, report, again)
        if again:
            yield call, row(call, None, DIED)
    report.note("")


def _together(calls, engine, stop, report, suspects: list[Call]) -> Iterator[tuple[Call, dict]]:
    waiting = {engine.submit(call): call for call in calls}
    in_vain, look = 0, time.monotonic()
    while waiting:
        done, _ = wait(waiting, timeout=0 if stop.asked else POLL_S, return_when=FIRST_COMPLETED)
        if engine.falls_together and any(_died(future, engine) for future in done):
            done, _ = wait(waiting, timeout=SETTLE_S)
        dead = []
        for future in done:
            call = waiting.pop(future)
            if _died(future, engine):
                dead.append(call)
            else:
                yield call, _checked(_outcome(future))
        if stop.asked:
            return
        late = [call for call in dead if engine.overran(call)]
        for call in late:
            yield call, row(call, None, over_limit(call), wall_s=call.time_limit)
        begun = [call for call in dead if engine.began(call) and call not in late]
        if not late:  # else it is known who ended the others' processes
            suspects += begun
        again = [call for call in dead if call not in late and (late or call not in begun)]
        if done:
            in_vain = in_vain + 1 if len(dead) == len(done) and not late and not begun else 0
        if in_vain == IN_VAIN:
            raise RuntimeError(
                f"worker processes died {IN_VAIN} times before they began a run; they may lack memory"
            )
        waiting |= {engine.submit(call): call for call in again}
        if waiting and not done and time.monotonic() > look:
            if (lacks := engine.waits_for()) or not suspects:
                report.note(lacks)
            look = time.monotonic() + LOOK_S


def _died(future: Future, engine: Engine) -> bool:
    return not future.cancelled() and isinstance(future.exception(), engine.deaths)


def _outcome(future: Future) -> dict:
    """What `attempt` returned. An exception here is none of the run's: those are in its row."""
    try:
        return future.result()
    except CancelledError as error:
        raise ConnectionError(
            "the scheduler of the cluster is gone; once it is back, the same command goes on from here"
        ) from error
    except OSError as error:
        raise RuntimeError(
            f"a worker could not take a run: {type(error).__name__}: {error}. Look at the disk, folder or "
            "connection that this names, on the machine of that worker; then the same command goes on"
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"a worker could not take a run: {type(error).__name__}: {error}. Workers need the same checkout "
            "installed (pip install -e .) and the same packages"
        ) from error


def _checked(outcome: dict) -> dict:
    if "refused" in outcome:  # `about` found fault with the worker
        raise outcome["refused"]
    return outcome
