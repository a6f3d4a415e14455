"""Several ranks on one machine: `on_ranks(function, world_size, ...)` gives what each rank returned.

A rank's process is forked from a server that has imported torch once. It does not go through the interpreter's
finalisation: a thread of gloo that still holds the last collective's tensor would ask for the interpreter's lock then,
and abort the process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

SECONDS = 300  # for all that the ranks do; a collective that the others never enter ends earlier
multiprocessing.set_forkserver_preload(["torch", "anybatch.losses", "anybatch.caching"])


def _rank(function: Callable[..., Any], rank: int, world_size: int, folder: str, seconds: float, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )
    try:
        torch.save(function(rank, world_size, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    gc.collect()
    dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 60) -> list[Any]:
    """What `function(rank, world_size, *args)` returned on each rank of a gloo group, `None` for a rank that ended
    itself.

    Args:
        function: Of a module, so that a new process can import it.
        world_size: Number of ranks.
        args: Must pickle.
        seconds: How long a collective waits for the other ranks.

    Raises:
        AssertionError: A rank raised an error; with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, seconds, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(SECONDS)
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n\n".join(errors)
        assert not late, f"{len(late)} ranks did not end in {SECONDS} s"
        codes = [process.exitcode for process in ranks]
        assert codes == [0] * world_size, f"exit codes of the ranks: {codes}"
        files = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]
