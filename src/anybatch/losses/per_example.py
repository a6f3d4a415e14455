"""State: buffers with an entry for each row of the data set, which casts leave alone and which grow with the data; and what a saved state must be to load."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError

OTHER_LOSS = (
    "Make the loss with the settings and the data set that the state was saved with, or, if rows were appended, pass the state through "
    "anybatch.losses.memory_states.grown_state(state, loss)."
)
Keys = np.ndarray | Tensor | Sequence[int]  # one integer a row


class PerExample(nn.Module):
    """A module some of whose buffers are (directions, rows, ...). A saved state loads whole or is refused, whatever `strict` says.

    Attributes:
        fresh: For each of those buffers, by name, what the entry of a row holds before its first visit.
        widths: Buffers whose last dimension is the width of the embeddings, 0 before the first; it comes with the state.
    """

    widths: tuple[str, ...] = ()

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

    def check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """Refuse a saved state that is not of a module like this one; its own entries, without its children's.

        Raises:
            AnybatchError: An entry of another shape or kind.
        """
        _check_entries(self, state, prefix, self.widths)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Everything below this module is checked first, so that nothing is loaded of a state that is refused."""
        for path, module in self.named_modules():
            check = module.check_state if isinstance(module, PerExample) else partial(_check_entries, module)
            check(state_dict, prefix + path + "." if path else prefix)
        wanted = self.state_dict(prefix=prefix, keep_vars=True).keys()
        saved = {name for name in state_dict if name.startswith(prefix)}
        missing, unexpected = (
            sorted(name.removeprefix(prefix) for name in names) for names in (wanted - saved, saved - wanted)
        )
        elsewhere = (
            prefix and not saved
        )  # a part of a model, whose state may have its own file; strictly, torch refuses it
        if (missing or unexpected) and not elsewhere:
            raise AnybatchError(
                f"The saved state is of another loss than this {type(self).__name__}: missing are {_listed(missing)}, unknown here are "
                f"{_listed(unexpected)}. " + OTHER_LOSS
            )
        for name in self.widths:
            if prefix + name in state_dict:
                setattr(self, name, self.get_buffer(name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def grow_state(self, state: dict[str, Any], prefix: str) -> None:
        """Append fresh entries to those of a saved state (changed in place) that are for fewer rows than this module.

        Args:
            state: Of the whole loss.
            prefix: This module's place in it, such as "memory.".
        """
        for name, fresh in self.fresh.items():
            if prefix + name in state:
                state[prefix + name] = extended(state[prefix + name], self.get_buffer(name).shape[1], fresh)


def _check_entries(module: nn.Module, state: Mapping[str, Any], prefix: str, widths: Sequence[str] = ()) -> None:
    """See `PerExample.check_state`."""
    for name, own in itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        saved = state.get(prefix + name)
        if saved is None:
            continue
        free = name in widths and 0 in (own.shape[-1], saved.shape[-1])
        shapes = [tuple(tensor.shape[: own.ndim - free]) for tensor in (saved, own)]
        if shapes[0] != shapes[1] or saved.ndim != own.ndim or saved.is_floating_point() != own.is_floating_point():
            raise AnybatchError(
                f"The saved state has {prefix + name} of shape {tuple(saved.shape)} ({saved.dtype}), this loss {tuple(own.shape)} ({own.dtype}). "
                + OTHER_LOSS
            )
        if name == "version" and int(saved) != int(own):
            raise AnybatchError(
                f"The saved state has version {int(saved)} ({prefix + name}); this anybatch reads version {int(own)}. Use the anybatch that it was "
                "saved with, or begin with a new loss."
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


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
