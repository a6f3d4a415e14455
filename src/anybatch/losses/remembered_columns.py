"""Log-weights of candidates that came in earlier batches: what must be kept of a candidate, and how it is weighed beside a new batch.

A log-weight is described by features of rows and columns (`log_weights`); the features of a column, kept with its embedding, are enough to
weigh it against the rows of any later batch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.log_weights import (
    ClusterLogWeight,
    IdMask,
    LogWeight,
    PairMask,
    RowMask,
    SumLogWeight,
    TaskMask,
    TensorLogWeight,
)

FOREIGN = 2**40  # beyond the numbers of clusters


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """Columns of earlier batches.

    Attributes:
        num_columns: M, of the batch here; the remembered ones come behind.
        features: (F, S) int64, from `column_features`.
        rows: (S,) int64 rows of the data set.
        present: (S,) bool; the others are empty places.
        share: Which of the S are appended as columns here (under several ranks, this rank's).
        without_own: Remove those of a row's own cluster: where pairs of this batch stand among them, to be compared with others.
    """

    num_columns: int
    features: Tensor
    rows: Tensor
    present: Tensor
    share: slice
    without_own: bool = False

    def part(self, start: int, stop: int) -> Remembered:
        """Some of the features."""
        return replace(self, features=self.features[start:stop])


def with_remembered(log_weight: LogWeight | None, remembered: Remembered) -> LogWeight:
    """`log_weight` with the remembered columns appended, of which empty places are removed.

    Raises:
        AnybatchError: Log-weights that say nothing of other candidates.
    """
    present = remembered.present[remembered.share]
    empty = torch.zeros(1, remembered.num_columns + len(present), device=present.device)
    empty[0, remembered.num_columns :].masked_fill_(~present, -torch.inf)
    mask = TensorLogWeight(values=empty, normalised=False, by_row=False, by_column=True)
    return mask if log_weight is None else SumLogWeight(terms=(extended(log_weight, remembered), mask))


@singledispatch
def column_features(log_weight: LogWeight, num_columns: int) -> Tensor:
    """(F, M) int64: what a log-weight knows of its columns.

    Raises:
        AnybatchError: It is of a kind that cannot be taken to another batch.
    """
    raise AnybatchError(
        f"log_weight is a {type(log_weight).__name__}, which cannot weigh candidates of earlier batches. Give ids (anchor_id, candidate_id), "
        "a PairMask or the arguments of a RowTable, or use a loss without remembered embeddings."
    )


@singledispatch
def extended(log_weight: LogWeight, remembered: Remembered) -> LogWeight:
    """The same log-weight with the remembered columns behind its own."""
    column_features(log_weight, remembered.num_columns)  # raises
    raise NotImplementedError


@column_features.register
def _(log_weight: IdMask, num_columns: int) -> Tensor:
    return torch.stack([log_weight.column_id.long(), log_weight.column_anchor.long()])


@extended.register
def _(log_weight: IdMask, remembered: Remembered) -> IdMask:
    column_id, column_anchor = remembered.features[:, remembered.share]
    return replace(
        log_weight,
        column_id=torch.cat([log_weight.column_id, column_id]),
        column_anchor=torch.cat([log_weight.column_anchor, column_anchor]),
    )


@column_features.register
def _(log_weight: RowMask, num_columns: int) -> Tensor:
    return log_weight.column.new_zeros(0, num_columns)  # rows are remembered anyway


@extended.register
def _(log_weight: RowMask, remembered: Remembered) -> RowMask:
    return replace(log_weight, column=torch.cat([log_weight.column, remembered.rows[remembered.share]]))


@column_features.register
def _(log_weight: PairMask, num_columns: int) -> Tensor:
    return log_weight.column_key.long()[None]


@extended.register
def _(log_weight: PairMask, remembered: Remembered) -> PairMask:
    return replace(log_weight, column_key=torch.cat([log_weight.column_key, remembered.features[0, remembered.share]]))


@column_features.register
def _(log_weight: ClusterLogWeight, num_columns: int) -> Tensor:
    factor, task = log_weight.column_factor, log_weight.column_task
    cluster = log_weight.column_cluster.long()
    bits = torch.zeros_like(cluster) if factor is None else factor.double().view(torch.int64)
    return torch.stack([cluster, bits, torch.zeros_like(cluster) if task is None else task.long()])


@extended.register
def _(log_weight: ClusterLogWeight, remembered: Remembered) -> ClusterLogWeight:
    """A row of another cluster comes in the batch with chance q by each of its ways, and is one of m remembered of N: it stands for 1 / (ways q + m / N) rows. Those of
    the own cluster come with the batch itself; a remembered row is never one of them (another epoch may number other clusters).
    """
    cluster, bits, task = remembered.features
    share, own_task = remembered.share, log_weight.row_task
    if own_task is None:
        count = remembered.present.sum().double()
    else:
        count = ((own_task[:, None] == task) & remembered.present).sum(dim=1).double()
    spread = torch.as_tensor(log_weight.log_spread, dtype=torch.float64, device=cluster.device)
    among = count * spread.exp()
    factor, column_task = log_weight.column_factor, log_weight.column_task
    if not remembered.without_own:
        cluster = torch.where(cluster < 0, cluster, cluster + FOREIGN)
    return replace(
        log_weight,
        column_cluster=torch.cat([log_weight.column_cluster, cluster[share]]),
        without_own=remembered.without_own,
        among=among if among.ndim else float(among),
        column_factor=None if factor is None else torch.cat([factor, bits[share].contiguous().view(torch.float64)]),
        column_task=None if column_task is None else torch.cat([column_task, task[share]]),
    )


@column_features.register
def _(log_weight: TaskMask, num_columns: int) -> Tensor:
    return log_weight.column_task.long()[None]


@extended.register
def _(log_weight: TaskMask, remembered: Remembered) -> TaskMask:
    own, others = log_weight.column_task, remembered.features[0, remembered.share]
    return replace(
        log_weight,
        column_task=torch.cat([own, others]),
        column_remembered=torch.arange(len(own) + len(others), device=own.device) >= len(own),
    )


@column_features.register
def _(log_weight: TensorLogWeight, num_columns: int) -> Tensor:
    values = log_weight.values
    if log_weight.by_row and log_weight.by_column:
        raise AnybatchError(
            f"log_weight is a tensor of shape {tuple(values.shape)}, which does not cover the candidates of earlier batches. Give ids "
            "(anchor_id, candidate_id), a PairMask or the arguments of a RowTable, or a tensor of shape (1, M) or (B, 1)."
        )
    of_columns = values.double() if log_weight.by_column else values.new_zeros(1, 1, dtype=torch.float64)
    return of_columns.expand(1, num_columns).contiguous().view(torch.int64)


@extended.register
def _(log_weight: TensorLogWeight, remembered: Remembered) -> TensorLogWeight:
    if not log_weight.by_column:
        return log_weight
    kept = remembered.features[:, remembered.share].contiguous().view(torch.float64)
    own = log_weight.values.expand(1, remembered.num_columns)
    return replace(log_weight, values=torch.cat([own, kept.to(own.dtype)], dim=1))


@column_features.register
def _(log_weight: SumLogWeight, num_columns: int) -> Tensor:
    return torch.cat([column_features(term, num_columns) for term in log_weight.terms])


@extended.register
def _(log_weight: SumLogWeight, remembered: Remembered) -> SumLogWeight:
    terms: list[LogWeight] = []
    start = 0
    for term in log_weight.terms:
        stop = start + len(column_features(term, remembered.num_columns))
        terms.append(extended(term, remembered.part(start, stop)))
        start = stop
    return SumLogWeight(terms=tuple(terms))


def kinds(log_weight: LogWeight | None) -> int:
    """A number for the kinds of log-weights at hand, so that figures of one kind are not taken for those of another."""

    def names(part: LogWeight) -> str:
        if isinstance(part, SumLogWeight):
            return ",".join(filter(None, map(names, part.terms)))
        if isinstance(part, RowMask):  # comes and goes, and leaves nothing to remember
            return ""
        return type(part).__name__ + ("*" if isinstance(part, TensorLogWeight) and part.by_column else "")

    return 0 if log_weight is None or not names(log_weight) else zlib.crc32(names(log_weight).encode())
