"""Buffers with an entry for each row of the data set: casts leave them alone, and they grow with the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.errors import AnybatchError

Keys = np.ndarray | Tensor | Sequence[int]  # one integer a row


class PerExample(nn.Module):
    """A module some of whose buffers are (directions, rows, ...).

    Attributes:
        fresh: For each of those buffers, by name, what the entry of a row holds before its first visit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fresh: dict[str, float] = {}

    def register_rows(self, name: str, values: Tensor, *, fresh: float) -> None:
        """Register `values`, (directions, rows, ...), as a buffer that holds `fresh` for new rows."""
        self.register_buffer(name, values)
        self.fresh[name] = fresh

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PerExample:
        """Casts of a whole model below the buffers' own precision leave them alone: a state in bfloat16 hardly moves."""
        before = {name: self.get_buffer(name) for name in self.fresh}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype.itemsize < old.dtype.itemsize or new.dtype == torch.bfloat16:
                setattr(self, name, old.to(new.device))
        return self

    def grow_buffers(self, num_rows: int) -> None:
        """Append fresh entries up to `num_rows`.

        Raises:
            AnybatchError: There are more already.
        """
        for name, fresh in self.fresh.items():
            setattr(self, name, extended(self.get_buffer(name), num_rows, fresh))

    def grow_state(self, state: dict[str, Any], prefix: str) -> None:
        """Append fresh entries to those of a saved state (changed in place) that are for fewer rows than this module.

        Args:
            state: Of the whole loss.
            prefix: This module's place in it, such as "memory.".
        """
        for name, fresh in self.fresh.items():
            if prefix + name in state:
                state[prefix + name] = extended(state[prefix + name], self.get_buffer(name).shape[1], fresh)


def extended(values: Tensor, num_rows: int, fresh: float) -> Tensor:
    """(directions, num_rows, ...): `values`, and `fresh` behind them.

    Raises:
        AnybatchError: `values` has more rows.
    """
    if num_rows < values.shape[1]:
        raise only_growing(num_rows, values.shape[1])
    added = values.new_full((len(values), num_rows - values.shape[1], *values.shape[2:]), fresh)
    return torch.cat([values, added], dim=1)


def only_growing(num_rows: int, known: int) -> AnybatchError:
    """The refusal of fewer rows than there are."""
    return AnybatchError(f"num_rows is {num_rows}, fewer than the {known} there are already. A loss can only grow.")
