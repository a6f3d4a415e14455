"""Gather once, reduce once; the ranks of torchrun. Without a process group of several ranks these are identities.

Nothing here takes part in autograd: gradients of gathered tensors are formed by their owner, without a collective.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from anybatch.core.errors import AnybatchError

_working_alone = False  # see `alone`


def is_active() -> bool:
    """Whether a process group of more than one rank exists at this moment."""
    return not _working_alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_active() else 0


def gather_sizes(num_rows: int, device: torch.device) -> list[int]:
    """Every rank's number of rows. One collective of 8 bytes a rank."""
    if not is_active():
        return [num_rows]
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = num_rows
    dist.all_reduce(sizes)
    return sizes.tolist()


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """All ranks' rows, one rank after the other, detached: (sum of `sizes`, ...). One collective."""
    rows = rows.detach()
    if not is_active():
        return rows
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def shares(num_rows: int) -> list[int]:
    """How many of `num_rows` rows each rank works on, as equal as can be. No collective."""
    return [num_rows // world_size() + (number < num_rows % world_size()) for number in range(world_size())]


def own_part(sizes: list[int]) -> slice:
    """Where this rank's rows are among those of all ranks, each of which has `sizes[rank]`."""
    first = sum(sizes[: rank()])
    return slice(first, first + sizes[rank()])


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over all ranks, in a new tensor. One collective."""
    value = value.detach().clone()
    if is_active():
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait for all ranks. One collective."""
    if is_active():
        dist.barrier()


def agree(error: Exception | None = None) -> None:
    """All ranks go on, or none does, so that none waits: what one found (`error`) is raised on each. One collective."""
    if is_active():
        words = "" if error is None else str(error) if isinstance(error, AnybatchError) else repr(error)
        said: list[str | None] = [None] * world_size()
        dist.all_gather_object(said, words)
        if error is None and any(said):
            raise AnybatchError(next(filter(None, said)))
    if error is not None:
        raise error


@contextmanager
def agreed() -> Iterator[None]:
    """What every rank does for itself, without a collective inside: if one fails, so do all. One `agree` at the end."""
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    agree(failed)


@contextmanager
def launched_ranks() -> Iterator[None]:
    """Join the processes that torchrun started, over gloo, for as long as this is open; nothing outside torchrun.

    The others may wait for hours while one works, so that the limit on waiting is a week.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    yield
    dist.destroy_process_group()  # not after an error: torchrun ends the other ranks, which would never arrive


@contextmanager
def alone() -> Iterator[bool]:
    """What rank 0 does by itself: yields whether this is rank 0; inside there is no group.

    At the end all ranks meet in one `agree`: if rank 0 fails, so do the others.

    >>> with alone() as chosen:
    ...     if chosen:
    ...         print("written once")
    written once
    """
    global _working_alone
    chosen = rank() == 0
    with agreed():
        before, _working_alone = _working_alone, True
        try:
            yield chosen
        finally:
            _working_alone = before
