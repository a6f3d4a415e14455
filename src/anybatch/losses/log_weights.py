"""Log-weights of pairs, b_ij, without ever holding all of them: masks by id, weights of mined batches, plain tensors.

A log-weight is added to the logit of the pair; -inf removes the pair. Each is described by features of rows and columns
(ids, clusters), so that ranks can exchange the features rather than B x M numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.ids import as_integers


@runtime_checkable
class LogWeight(Protocol):
    """b_ij for tiles of pairs.

    Attributes:
        normalised: True if `sum_j exp(b_ij) x_j` estimates the mean of x over the data set, so that a loss adds no
            correction for the number of negatives; False for masks, whose finite values are 0.
    """

    @property
    def normalised(self) -> bool:
        """See the class."""
        ...

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The log-weights of these rows and columns: float, broadcastable to (rows, columns)."""
        ...

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> LogWeight:
        """The same over the rows and columns of all ranks."""
        ...

    def reversed(self, num_rows: int) -> LogWeight:
        """The same from the first `num_rows` candidates, the positives, to the anchors."""
        ...


def _cast(weight: LogWeight, *names: str) -> None:
    """Some fields of a log-weight as int64: a difference of unsigned ones is no difference, and bool is no id."""
    for name in names:
        if getattr(weight, name) is not None:
            values = as_integers(f"{type(weight).__name__}.{name}", getattr(weight, name))
            object.__setattr__(weight, name, values)


@dataclass(frozen=True, kw_only=True)
class IdMask:
    """-inf where the candidate is a positive of the anchor under another row: identical content is never a negative.

    Attributes:
        row_positive: (B,) id of each row's own positive.
        row_anchor: (B,) id of each row's anchor.
        column_id: (M,) id of each candidate, in the id space of `row_positive`.
        column_anchor: (M,) id of the anchor that the candidate is a positive of; -1 for explicit negatives.
    """

    row_positive: Tensor
    row_anchor: Tensor
    column_id: Tensor
    column_anchor: Tensor
    normalised: bool = False

    def __post_init__(self) -> None:
        _cast(self, "row_positive", "row_anchor", "column_id", "column_anchor")

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `LogWeight.tile`."""
        same = self.row_positive[rows, None] == self.column_id[None, columns]
        same |= self.row_anchor[rows, None] == self.column_anchor[None, columns]
        return torch.zeros(same.shape, device=same.device).masked_fill_(same, -torch.inf)

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> IdMask:
        """See `LogWeight.gathered`."""
        return IdMask(
            row_positive=distributed.gather_rows(self.row_positive, row_sizes),
            row_anchor=distributed.gather_rows(self.row_anchor, row_sizes),
            column_id=distributed.gather_rows(self.column_id, column_sizes),
            column_anchor=distributed.gather_rows(self.column_anchor, column_sizes),
        )

    def reversed(self, num_rows: int) -> IdMask:
        """See `LogWeight.reversed`."""
        return IdMask(
            row_positive=self.row_anchor,
            row_anchor=self.row_positive,
            column_id=self.row_anchor,
            column_anchor=self.row_positive,
        )


@dataclass(frozen=True, kw_only=True)
class RowMask:
    """-inf where the candidate is the anchor's own row, which came a second time.

    Attributes:
        row: (B,) int64 row of the data set.
        column: (M,) int64; -1 for explicit negatives.
    """

    row: Tensor
    column: Tensor
    normalised: bool = False

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `LogWeight.tile`."""
        same = self.row[rows, None] == self.column[None, columns]
        return torch.zeros(same.shape, device=same.device).masked_fill_(same, -torch.inf)

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> RowMask:
        """See `LogWeight.gathered`."""
        return RowMask(
            row=distributed.gather_rows(self.row, row_sizes), column=distributed.gather_rows(self.column, column_sizes)
        )

    def reversed(self, num_rows: int) -> RowMask:
        """See `LogWeight.reversed`."""
        return RowMask(row=self.column[:num_rows], column=self.row)


@dataclass(frozen=True, kw_only=True)
class PairMask:
    """-inf for pairs on a list: suspected false negatives, or positives that are known from other rows.

    A pair is on the list if `row_key + column_key` is one of `keys`.

    Attributes:
        row_key: (B,) int64.
        column_key: (M,) int64.
        keys: (p,) int64, ascending; the same on every rank.

    Cost: a binary search a pair, in a list of p.
    """

    row_key: Tensor
    column_key: Tensor
    keys: Tensor
    normalised: bool = False

    def __post_init__(self) -> None:
        _cast(self, "row_key", "column_key", "keys")

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `LogWeight.tile`."""
        wanted = self.row_key[rows, None] + self.column_key[None, columns]
        if not len(self.keys):
            return torch.zeros(wanted.shape, device=wanted.device)
        place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        listed = self.keys[place] == wanted
        return torch.zeros(listed.shape, device=listed.device).masked_fill_(listed, -torch.inf)

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> PairMask:
        """See `LogWeight.gathered`."""
        return PairMask(
            row_key=distributed.gather_rows(self.row_key, row_sizes),
            column_key=distributed.gather_rows(self.column_key, column_sizes),
            keys=self.keys,
        )

    def reversed(self, num_rows: int) -> PairMask:
        """See `LogWeight.reversed`. The pair of anchor i and candidate j is the same pair on the way back."""
        return PairMask(row_key=self.column_key[:num_rows], column_key=self.row_key, keys=self.keys)


@dataclass(frozen=True, kw_only=True)
class ClusterLogWeight:
    """Weights of a mined batch: `same` where anchor and candidate belong to one cluster, `other` elsewhere.

    Attributes:
        row_cluster: (B,) cluster of each row; negative (a remainder row) for none. -1 is the same as nothing; any other number is the same as itself.
        column_cluster: (M,) cluster of each candidate; of an explicit negative, that of the row that brings it.
        same, other: Log-weights; (B,) tensors where they differ by row (plans over several data sets, remainder rows).
        remainder: Log-weight of candidates in no cluster, likewise; None for `other`.
        column_factor: (M,) added for each candidate: minus the log of how many ways it has to come into a batch. Anchors
            have one way. None for 0.
        row_task, column_task: (B,) and (M,) data set of each; others than the row's own are removed. None for one data set.
        exact_other, exact_remainder: `other` and `remainder` without the cap; None if there is none.
        log_spread: log of (n - 1) over the rows that `other` is an estimate over (of the row's data set, outside its cluster); (B,) or a number.
        cap: Upper limit on the weights relative to `same`; it has been applied to `other` and `remainder`.
        among: Of candidates that may also come from a memory, how many the memory holds, times exp(log_spread); (B,) or a number; None without a memory.
        without_own: Remove pairs of one cluster instead.
    """

    row_cluster: Tensor
    column_cluster: Tensor
    same: float | Tensor
    other: float | Tensor
    remainder: float | Tensor | None = None
    column_factor: Tensor | None = None
    row_task: Tensor | None = None
    column_task: Tensor | None = None
    exact_other: float | Tensor | None = None
    exact_remainder: float | Tensor | None = None
    log_spread: float | Tensor = 0.0
    cap: float | None = None
    among: float | Tensor | None = None
    without_own: bool = False
    normalised: bool = True

    def __post_init__(self) -> None:
        _cast(self, "row_cluster", "column_cluster", "row_task", "column_task")

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `LogWeight.tile`."""
        row, column = self.row_cluster[rows, None], self.column_cluster[None, columns]
        other, remainder = self.other, self.other if self.remainder is None else self.remainder
        if self.among is not None and self.exact_other is not None:
            other = self.exact_other
            remainder = other if self.exact_remainder is None else self.exact_remainder
        same, other, remainder = (
            value[rows, None]
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=torch.float64, device=row.device)
            for value in (self.same, other, remainder)
        )
        factor = same.new_zeros(1, 1) if self.column_factor is None else self.column_factor[None, columns]
        elsewhere = torch.where(column < 0, remainder, other) + factor
        if self.among is not None:
            among = self.among[rows, None] if isinstance(self.among, Tensor) else self.among
            elsewhere = -((-elsewhere).exp() + among).log().clamp(min=0)  # no row stands for more than all
            if self.cap is not None:
                elsewhere = torch.minimum(elsewhere, same + factor + math.log(self.cap))
        of_own = same.new_full((), -torch.inf) if self.without_own else same + factor
        weights = torch.where((row == column) & (row != -1), of_own, elsewhere)
        if self.row_task is not None and self.column_task is not None:
            foreign = self.row_task[rows, None] != self.column_task[None, columns]
            weights = weights.masked_fill(foreign, -torch.inf)
        return weights

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> ClusterLogWeight:
        """See `LogWeight.gathered`."""

        def rows(value: Any) -> Any:
            return distributed.gather_rows(value, row_sizes) if isinstance(value, Tensor) else value

        def columns(value: Tensor | None) -> Any:
            return None if value is None else distributed.gather_rows(value, column_sizes)

        with_memory = (
            {}
            if self.among is None
            else {
                "exact_other": rows(self.exact_other),
                "exact_remainder": rows(self.exact_remainder),
                "among": rows(self.among),
            }
        )
        return replace(
            self,
            row_cluster=rows(self.row_cluster),
            column_cluster=columns(self.column_cluster),
            same=rows(self.same),
            other=rows(self.other),
            remainder=rows(self.remainder),
            column_factor=columns(self.column_factor),
            row_task=rows(self.row_task),
            column_task=columns(self.column_task),
            **with_memory,
        )

    def reversed(self, num_rows: int) -> ClusterLogWeight:
        """See `LogWeight.reversed`."""
        return replace(
            self,
            row_cluster=self.column_cluster[:num_rows],
            column_cluster=self.row_cluster,
            column_factor=None,
            column_task=self.row_task,
        )


@dataclass(frozen=True, kw_only=True)
class TaskMask:
    """-inf where a candidate of an earlier batch belongs to another data set. Those of the batch itself stay, wherever they come from.

    Attributes:
        row_task: (B,) int64.
        column_task: (M,) int64.
        column_remembered: (M,) bool; None for a batch without a memory.
    """

    row_task: Tensor
    column_task: Tensor
    column_remembered: Tensor | None = None
    normalised: bool = False

    def __post_init__(self) -> None:
        _cast(self, "row_task", "column_task")

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `LogWeight.tile`."""
        if self.column_remembered is None:
            return torch.zeros(1, 1, device=self.row_task.device)
        foreign = self.row_task[rows, None] != self.column_task[None, columns]
        foreign &= self.column_remembered[None, columns]
        return torch.zeros(foreign.shape, device=foreign.device).masked_fill_(foreign, -torch.inf)

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> TaskMask:
        """See `LogWeight.gathered`."""
        if self.column_remembered is None:
            return self
        return TaskMask(
            row_task=distributed.gather_rows(self.row_task, row_sizes),
            column_task=distributed.gather_rows(self.column_task, column_sizes),
            column_remembered=distributed.gather_rows(self.column_remembered, column_sizes),
        )

    def reversed(self, num_rows: int) -> TaskMask:
        """See `LogWeight.reversed`."""
        return TaskMask(row_task=self.column_task[:num_rows], column_task=self.row_task)


@dataclass(frozen=True, kw_only=True)
class TensorLogWeight:
    """A tensor broadcastable to (B, M): a mask, or any log-weights.

    Attributes:
        values: Dimensions (B, M), (1, M) or (B, 1).
        normalised: See `LogWeight`.
        by_row, by_column: Whether values differ by row, and by column; None: as the shape says, which is wrong on a rank whose share is a
            single row.
    """

    values: Tensor
    normalised: bool
    by_row: bool | None = None
    by_column: bool | None = None

    def __post_init__(self) -> None:
        for name, size in zip(("by_row", "by_column"), self.values.shape, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, size > 1)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `LogWeight.tile`."""
        values = self.values if self.values.shape[0] == 1 else self.values[rows]
        return values if values.shape[1] == 1 else values[:, columns]

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> TensorLogWeight:
        """See `LogWeight.gathered`.

        Raises:
            AnybatchError: A (B, M) tensor, which says nothing of the pairs across ranks.
        """
        if self.by_row and self.by_column:
            raise AnybatchError(
                f"log_weight is a tensor of shape {tuple(self.values.shape)}, which does not cover the candidates of the other ranks. "
                "Give a LogWeight made of ids or clusters, or a tensor of shape (1, M) or (B, 1)."
            )
        if not (self.by_row or self.by_column):
            return self
        sizes = row_sizes if self.by_row else column_sizes
        flat = distributed.gather_rows(self.values.expand(*self._shape(sizes)).reshape(-1), sizes)
        return replace(self, values=flat[:, None] if self.by_row else flat[None])

    def _shape(self, sizes: list[int]) -> tuple[int, int]:
        """Of this rank's share; a rank whose values are all the same may have given one number."""
        own = sizes[distributed.rank()]
        return (own, 1) if self.by_row else (1, own)

    def reversed(self, num_rows: int) -> TensorLogWeight:
        """See `LogWeight.reversed`."""
        values = self.values[:, :num_rows] if self.by_column else self.values
        return replace(self, values=values.T, by_row=self.by_column, by_column=self.by_row)


@dataclass(frozen=True, kw_only=True)
class SumLogWeight:
    """Several log-weights at once."""

    terms: tuple[LogWeight, ...]

    @property
    def normalised(self) -> bool:
        """One normalised term makes the sum so: masks only remove pairs."""
        return any(term.normalised for term in self.terms)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See `LogWeight.tile`."""
        total = self.terms[0].tile(rows, columns)
        for term in self.terms[1:]:
            total = total + term.tile(rows, columns)
        return total

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> SumLogWeight:
        """See `LogWeight.gathered`."""
        return SumLogWeight(terms=tuple(term.gathered(row_sizes, column_sizes) for term in self.terms))

    def reversed(self, num_rows: int) -> SumLogWeight:
        """See `LogWeight.reversed`."""
        return SumLogWeight(terms=tuple(term.reversed(num_rows) for term in self.terms))


def as_log_weight(log_weight: LogWeight | Tensor, num_rows: int, num_columns: int) -> LogWeight:
    """Accept a tensor in place of a LogWeight; one that holds only 0 and -inf is a mask, any other is taken as normalised.

    Raises:
        AnybatchError: A shape that does not broadcast to (B, M), NaN or +inf.
    """
    if not isinstance(log_weight, Tensor):
        return log_weight
    if not log_weight.is_floating_point():
        raise AnybatchError(
            f"log_weight is {log_weight.dtype}; expected floats: 0 keeps a pair, -inf removes it, log(2) counts it twice."
        )
    values = log_weight.detach()
    while values.ndim < 2:
        values = values[None]
    if values.ndim != 2 or values.shape[0] not in (1, num_rows) or values.shape[1] not in (1, num_columns):
        raise AnybatchError(
            f"log_weight has shape {tuple(log_weight.shape)}; expected something broadcastable to ({num_rows}, {num_columns})."
        )
    if log_weight.requires_grad:
        raise AnybatchError(
            "log_weight requires a gradient, and the losses give it none. Detach it; for learned margins there is NUCLR."
        )
    if bool((values.isnan() | (values == torch.inf)).any()):
        raise AnybatchError("log_weight holds NaN or +inf; expected finite numbers, or -inf to remove a pair.")
    # Every rank must take the tensors for the same thing, whatever its own share happens to hold.
    weighs = (~((values == 0) | values.isneginf())).any().float()
    varies = [torch.tensor(float(size > 1), device=values.device) for size in values.shape]
    normalised, by_row, by_column = (distributed.sum_over_ranks(torch.stack([weighs, *varies])) > 0).tolist()
    return TensorLogWeight(values=values, normalised=normalised, by_row=by_row, by_column=by_column)


def inclusion_log_weights(
    num_rows: int, chance_beside: float, *, chance_same: float = 1.0, cap: float | None = None
) -> tuple[float, float]:
    """Log of one over the chance of sharing a batch, divided by n - 1, for a plan whose clusters are combined at random.

        same cluster:   log(1 / chance_same) + log(1 / (n - 1))
        other cluster:  log(1 / chance_beside) + log(1 / (n - 1))

    With them `sum_j exp(b_ij) x_j` over the batch is an unbiased estimate of the mean of x over the n - 1 other rows. Pairs with
    remainder rows have chances of their own (`ClusterSampling.chances`).

    Args:
        num_rows: n, rows that the mean is over.
        chance_beside: That a given row of another cluster shares the batch: (m - 1) / (C - 1) for m of C clusters without remainder rows.
            0 means that such rows never come, and no weight can stand for them.
        chance_same: That a given row of the anchor's own cluster does: 1 where no remainder row can take its place.
        cap: Upper limit on the weight of another cluster's row relative to one of the own cluster; None for the exact
            weight. A cap trades variance for bias.

    Returns:
        (same, other).
    """
    if num_rows < 2:
        raise AnybatchError(f"Inclusion weights need at least 2 rows; got {num_rows}.")
    if not 0 <= chance_beside <= 1 or not 0 < chance_same <= 1:
        raise AnybatchError(
            f"chance_beside is {chance_beside} and chance_same {chance_same}; expected probabilities, the latter above 0."
        )
    if cap is not None and cap < 1:
        raise AnybatchError(
            f"The cap on the weights is {cap}; expected at least 1, the weight of a row of the own cluster."
        )
    same = -math.log(num_rows - 1) - math.log(chance_same)
    ratio = chance_same / chance_beside if chance_beside > 0 else 1.0
    return same, same + math.log(ratio if cap is None else min(ratio, cap))
