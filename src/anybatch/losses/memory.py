"""Per-example state: one logarithm a row and direction, in buffers, so that a checkpoint holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.errors import AnybatchError

VERSION = 1


class ExampleMemory(nn.Module):
    """A moving average of exp(x) for each example, kept as its logarithm.

        memory_i <- log((1 - gamma) exp(memory_i) + gamma * mean over the row's occurrences in the batch of exp(x))

    Rows never visited are NaN (a flag of its own, not a threshold) and take the batch's value whole. Occurrences of one row in a
    batch are combined first, in their order, so that the result does not depend on the machine. Under several ranks every rank
    holds the whole memory, and all make the same update.

    Args:
        num_rows: n.
        num_directions: Independent states a row.

    Cost: 4 bytes a row and direction; an update touches B of them. Collectives: two gathers of B numbers.
    """

    def __init__(self, num_rows: int, num_directions: int = 1) -> None:
        super().__init__()
        if num_rows < 2:
            raise AnybatchError(f"num_rows is {num_rows}; expected the number of rows of the data set, at least 2.")
        self.log_mean: Tensor
        self.version: Tensor
        self.dimensions: Tensor
        self.register_buffer("log_mean", torch.full((num_directions, num_rows), torch.nan))
        self.register_buffer("version", torch.tensor(VERSION))
        self.register_buffer("dimensions", torch.tensor(0))  # width of the embeddings it was filled from; 0 before that

    @property
    def visited(self) -> Tensor:
        """(num_directions, num_rows) bool."""
        return ~self.log_mean.isnan()

    def check(self, index: Tensor | None, dimensions: int) -> Tensor:
        """The index, if it fits this memory.

        Raises:
            AnybatchError: Missing, out of range, or embeddings of another width than the memory was filled from.
        """
        num_rows = self.log_mean.shape[1]
        if index is None:
            raise AnybatchError(
                "This loss remembers each row: give index=, the row numbers of the batch in the data set."
            )
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= num_rows):
            raise AnybatchError(
                f"index runs from {int(index.min())} to {int(index.max())}; expected rows 0 to {num_rows - 1}. "
                "Make the loss with the num_rows of this data set."
            )
        if int(self.dimensions) not in (0, dimensions):
            raise AnybatchError(
                f"The memory was filled from embeddings of {int(self.dimensions)} dimensions, these have {dimensions}. Denominators of different "
                "widths must not be mixed: use one loss a width (under Matryoshka, a loss without memory)."
            )
        return index

    def blend(
        self,
        index: Tensor,
        batch: Tensor,
        *,
        direction: int,
        gamma: float | Callable[[Tensor], tuple[Tensor, Tensor]],
        update: bool,
        dimensions: int,
    ) -> Tensor:
        """The new state of the batch's rows, stored if `update`.

        Args:
            index: (B,) int64 rows.
            batch: (B,) what this batch says: the log of a mean; -inf where it says nothing.
            direction: Which state.
            gamma: Weight of the batch, in (0, 1]; or a function of the old states that gives log gamma and log(1 - gamma).
            update: Store the result.
            dimensions: Width of the embeddings.

        Returns:
            (B,) in the dtype of `batch`; -inf for rows never visited of which the batch says nothing.
        """
        sizes = distributed.gather_sizes(len(index), index.device)
        index_all, batch_all = distributed.gather_rows(index, sizes), distributed.gather_rows(batch, sizes)
        rows, inverse = torch.unique(index_all, return_inverse=True)
        combined = _combine(batch_all, inverse, len(rows))
        # The state is float32; the arithmetic is the batch's, so that float64 checks see no rounding but the state's own.
        old = self.log_mean[direction, rows].to(batch.dtype)
        if callable(gamma):
            log_gamma, log_stay = gamma(old)
        else:
            log_gamma, log_stay = math.log(gamma), math.log1p(-gamma) if gamma < 1 else -math.inf
        new = torch.where(old.isnan(), combined, torch.logaddexp(old + log_stay, combined + log_gamma))
        new = torch.where(combined.isneginf(), torch.where(old.isnan(), combined, old), new)
        if update:
            stored = torch.where(new.isneginf(), torch.nan, new)
            self.log_mean[direction, rows] = stored.to(self.log_mean.dtype)
            self.dimensions.fill_(dimensions)
        first = sum(sizes[: distributed.rank()])
        return new[inverse[first : first + len(index)]]

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        state = state_dict.get(prefix + "log_mean")
        if state is not None and state.shape != self.log_mean.shape:
            raise AnybatchError(
                f"The saved memory has shape {tuple(state.shape)}, this loss {tuple(self.log_mean.shape)} (directions, rows). "
                "Resume with the loss and the data set that the run was started with."
            )
        version = state_dict.get(prefix + "version")
        if version is not None and int(version) > VERSION:
            raise AnybatchError(
                f"The saved memory has version {int(version)}; this anybatch reads up to {VERSION}. Update anybatch."
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _combine(values: Tensor, inverse: Tensor, num_groups: int) -> Tensor:
    """Log of the mean of exp(values) over each group, leaving out -inf; -inf for a group of nothing else."""
    said = ~values.isneginf()
    total = values.new_full((num_groups,), -torch.inf)
    count = torch.bincount(inverse[said], minlength=num_groups).to(values.dtype)
    if int(torch.bincount(inverse, minlength=num_groups).max()) == 1:
        total[inverse] = values
        return total
    order = torch.argsort(inverse, stable=True)
    lengths = torch.bincount(inverse, minlength=num_groups)
    starts = lengths.cumsum(0) - lengths
    occurrence = torch.arange(len(order), device=order.device) - starts[inverse[order]]
    for number in range(int(lengths.max())):  # one occurrence of each row at a time: a fixed order of additions
        chosen = order[occurrence == number]
        groups = inverse[chosen]
        total[groups] = torch.logaddexp(total[groups], values[chosen])
    return torch.where(count > 0, total - count.clamp(min=1).log(), total)
