"""Where the candidates of all ranks are: gathered once, or travelling from rank to rank, a rank's block at a time.

    gathered   every rank holds all M_all candidates and the gradient of all; one gather, one sum
    ring       every rank holds its own candidates, and twice a block that travels, with its gradient; a ring pass is
               W - 1 sends of blocks, and W of gradients, each over while the block at hand is being scored

Both hand out `Block`s, so that the solver does not know which it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError


class Layout(NamedTuple):
    """Where this rank's rows and columns are among those of all ranks."""

    row_sizes: list[int]
    column_sizes: list[int]
    own_rows: slice
    own_columns: slice
    positive_columns: Tensor | slice  # (B_all,) the columns that are positives, in the order of the rows

    @classmethod
    def of(cls, num_rows: int, num_columns: int, device: torch.device) -> Layout:
        """One collective a side under several ranks, none otherwise.

        Raises:
            AnybatchError: No rank has a row, so that there is no mean; on some ranks there may be none.
        """
        row_sizes = distributed.gather_sizes(num_rows, device)
        if not sum(row_sizes):
            raise AnybatchError(
                "The batch has no rows, so the loss has no mean. Skip it, or look at what made it empty."
            )
        column_sizes = distributed.gather_sizes(num_columns, device)
        starts = [sum(column_sizes[:number]) for number in range(len(column_sizes))]
        positive_columns: Tensor | slice = slice(0, num_rows)
        if len(row_sizes) > 1:
            parts = [torch.arange(start, start + size) for start, size in zip(starts, row_sizes, strict=True)]
            positive_columns = torch.cat(parts).to(device)
        own = distributed.own_part(row_sizes), distributed.own_part(column_sizes)
        return cls(row_sizes, column_sizes, *own, positive_columns)

    def shifted(self, rows: slice) -> slice:
        """Rows of this rank, numbered among all."""
        return slice(self.own_rows.start + rows.start, self.own_rows.start + rows.stop)


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Candidates that are scored at once."""

    candidates: Tensor  # (m, D)
    gradient: Tensor | None  # (m, D), to be added to; None in a pass without gradients
    columns: slice  # where they are among the columns of all ranks
    rows: slice  # the rows among all whose positives are in the block
    positives: Tensor | slice  # which of the block's columns those are, in the order of the rows
    own: bool  # whether the positives of this rank's rows are in the block


class Gathered:
    """All candidates in one block: M_all x D numbers on every rank, twice with gradients."""

    num_blocks = 1

    def __init__(self, candidates: Tensor, layout: Layout) -> None:
        self.layout = layout
        self.candidates = distributed.gather_rows(candidates, layout.column_sizes)
        self.widest = len(self.candidates)
        self._gradient: Tensor | None = None

    def blocks(self, *, gradients: bool) -> Iterator[Block]:
        """The one block."""
        self._gradient = torch.zeros_like(self.candidates) if gradients else None
        yield Block(
            candidates=self.candidates,
            gradient=self._gradient,
            columns=slice(0, len(self.candidates)),
            rows=slice(0, sum(self.layout.row_sizes)),
            positives=self.layout.positive_columns,
            own=True,
        )

    def gradient(self) -> Tensor:
        """(M, D) of this rank's candidates, over the rows of all ranks, after a pass with gradients. One sum."""
        assert self._gradient is not None
        return distributed.sum_over_ranks(self._gradient)[self.layout.own_columns]


class Ring:
    """A rank's candidates at a time: a block goes from rank to rank + 1, with its gradient, until both are home.

    Each rank must take every ring pass to its end. It holds at most two blocks of candidates beside its own, and two of
    gradients, whatever the number of ranks.
    """

    def __init__(self, candidates: Tensor, layout: Layout) -> None:
        self.candidates, self.layout = candidates.detach().contiguous(), layout
        self.num_blocks = len(layout.column_sizes)
        self.widest = max(layout.column_sizes)
        self._gradient: Tensor | None = None

    def blocks(self, *, gradients: bool) -> Iterator[Block]:
        """One ring pass: this rank's block first, then that of the rank before it, and so on around."""
        world_size, rank, sizes = self.num_blocks, distributed.rank(), self.layout.column_sizes
        block = self.candidates
        gradient = torch.zeros_like(block) if gradients else None
        for step in range(world_size):
            owner, following = (rank - step) % world_size, (rank - step - 1) % world_size
            arriving = _exchange(block, sizes[following], tag=0) if step < world_size - 1 else None
            first_row, first_column = sum(self.layout.row_sizes[:owner]), sum(sizes[:owner])
            yield Block(
                candidates=block,
                gradient=gradient,
                columns=slice(first_column, first_column + sizes[owner]),
                rows=slice(first_row, first_row + self.layout.row_sizes[owner]),
                positives=slice(0, self.layout.row_sizes[owner]),
                own=owner == rank,
            )
            if gradient is not None:
                gradient = _exchange(gradient, sizes[following], tag=1).wait()
            if arriving is not None:
                block = arriving.wait()
        self._gradient = gradient

    def gradient(self) -> Tensor:
        """(M, D) of this rank's candidates, over the rows of all ranks, after a pass with gradients."""
        assert self._gradient is not None
        return self._gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class _Arriving:
    """A block under way."""

    received: Tensor
    sent: Tensor  # held until it has left
    works: list[dist.Work]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _exchange(block: Tensor, num_arriving: int, *, tag: int) -> _Arriving:
    """Send a block to the next rank while one of `num_arriving` rows comes from the one before; not if it is empty."""
    world_size, rank = distributed.world_size(), distributed.rank()
    received = block.new_empty((num_arriving, *block.shape[1:]))
    operations = []
    if block.numel():
        operations.append(dist.P2POp(dist.isend, block, (rank + 1) % world_size, tag=tag))
    if received.numel():
        operations.append(dist.P2POp(dist.irecv, received, (rank - 1) % world_size, tag=tag))
    works = dist.batch_isend_irecv(operations) if operations else []
    return _Arriving(received=received, sent=block, works=works)
