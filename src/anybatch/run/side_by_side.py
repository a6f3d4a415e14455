"""Several small runs, two at a time, each in a process of one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from anybatch.core.errors import AnybatchError
from anybatch.core.progress import Progress, no_progress
from anybatch.run.config import RunConfig, RunResult

Key = TypeVar("Key")


def train_all(
    runs: Mapping[Key, RunConfig], *, stage: str, progress: Progress = no_progress, new_processes: bool = False
) -> dict[Key, RunResult]:
    """The result of `job.train` for each run, by any key, in the runs' order.

    Whatever ends this ends the processes: an error, Ctrl-C, a signal that is raised as an exception.

    Args:
        runs: Begun in this order.
        stage: What `progress`, called after each run, calls them.
        new_processes: Each run in a new process, so that its peak of memory is its own; else a process goes on with the
            next, which saves the seconds of its start.

    Raises:
        AnybatchError: What a run is refused for; a process was ended from outside.
    """
    pool = ProcessPoolExecutor(
        min(2, os.cpu_count() or 1),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        max_tasks_per_child=1 if new_processes else None,
    )
    results: dict[Key, RunResult] = {}
    try:
        progress(stage, 0, len(runs))
        futures = {pool.submit(_train, config): key for key, config in runs.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            progress(stage, len(results), len(runs))
    except BrokenProcessPool as error:
        raise AnybatchError(
            f"A process ({stage}) was ended from outside, most likely because memory ran out. Close other programs, "
            "then begin again in another folder."
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return {key: results[key] for key in runs}


def _begin() -> None:
    """One thread; and Ctrl-C, which a terminal sends to all, is left to the process that started this one."""
    import torch
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and stays behind where one is ended


def _train(config: RunConfig) -> RunResult:
    from anybatch.run import job

    return job.train(config)
