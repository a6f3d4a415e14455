"""Where this rank's rows and candidates are among those of all ranks, and the candidates gathered."""

from __future__ import annotations

from typing import NamedTuple

import torch
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
            raise AnybatchError("The batch has no rows, so the loss has no mean. Skip it, or see what made it empty.")
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


class Gathered:
    """The candidates of all ranks: M_all x D numbers on every rank, twice with gradients.

    Attributes:
        candidates: (C, D).
        d_candidates: (C, D), to be added to over this rank's rows.
    """

    def __init__(self, candidates: Tensor, layout: Layout, *, gradients: bool) -> None:
        self.layout = layout
        self.candidates = distributed.gather_rows(candidates, layout.column_sizes)
        self.d_candidates = torch.zeros_like(self.candidates) if gradients else self.candidates[:0]

    def gradient(self) -> Tensor:
        """(M, D) of this rank's candidates, over the rows of all ranks. One sum."""
        return distributed.sum_over_ranks(self.d_candidates)[self.layout.own_columns]
