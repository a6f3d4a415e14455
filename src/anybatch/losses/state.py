"""What a loss remembers: buffers with an entry per row of the data set. Saved, refused and grown here, and nowhere
else. Every rank holds all of them, and needs no process group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError

VERSION = 6  # 6: one whole state, which every rank has
OTHER_LOSS = (
    "Make the loss with the settings and the data set that the state was saved with, or, if rows were appended, pass "
    "the state through anybatch.losses.state.grown_state(state, loss)."
)


class State(nn.Module):
    """Base of losses and their parts: a saved state loads whole or is refused, whatever `strict` says; casts leave it
    in float32 or better.

    Args:
        num_rows: n, rows of the data set; None for what depends on no number of rows.

    Attributes:
        fresh: For each buffer with entries per row, by name, what the entry holds before the row's first visit.
        widths: Buffers whose last dimension is the width of the embeddings, 0 before the first; it comes with the
            state.
        needs_index: Whether calls must say which rows of the data set they hold.
    """

    widths: tuple[str, ...] = ()
    needs_index = False
    version: Tensor
    embedding_width: Tensor
    data_rows: Tensor

    def __init__(self, num_rows: int | None = None) -> None:
        super().__init__()
        if num_rows is not None and num_rows < 2:
            raise AnybatchError(f"num_rows is {num_rows}; expected the number of rows of the data set, at least 2.")
        self.num_rows = num_rows
        self.fresh: dict[str, float] = {}

    def register_header(self) -> None:
        """Bind the saved state to the number of rows, a version and a width."""
        self.register_buffer("version", torch.tensor(VERSION))
        self.register_buffer("embedding_width", torch.tensor(0))
        self.register_buffer("data_rows", torch.tensor(self.num_rows))

    def register_rows(self, name: str, *, fresh: float, directions: int) -> None:
        """Register a float32 buffer (directions, rows) that holds `fresh`."""
        if not self.fresh:
            self.register_header()
        assert self.num_rows is not None
        self.register_buffer(name, torch.full((directions, self.num_rows), fresh))
        self.fresh[name] = fresh

    def check_width(self, width: int) -> None:
        """Refuse embeddings of another width than the state was made from."""
        if int(self.embedding_width) not in (0, width):
            raise AnybatchError(
                f"The loss remembers rows by embeddings of {int(self.embedding_width)} dimensions, these have {width}. "
                "Denominators of different widths must not be mixed: use one loss a width (anybatch.losses.Matryoshka "
                "makes them)."
            )

    def grow(self, num_rows: int) -> None:
        """Make room for rows appended to the data set: the loss becomes that for `num_rows` rows, and the old ones keep
        their states.

        The new ones are as in a loss just made, and what follows from the number of rows (`eps=None`, ...) follows from
        the new one. Buffers are replaced, parameters, which an optimizer may hold, are not; grow before the loss is
        wrapped in DDP, on every rank.
        """
        growing = [part for part in self.modules() if isinstance(part, State) and part.num_rows is not None]
        for part in growing:
            _check_growing(num_rows, part.num_rows or 0)
        for part in growing:
            part.num_rows = num_rows
            if "data_rows" in part._buffers:
                part.data_rows.fill_(num_rows)
            for name, fresh in part.fresh.items():
                setattr(part, name, _extended(part.get_buffer(name), num_rows, fresh))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> State:
        """A small step would not move a state, or what the loss learns itself, in half a float."""

        def careful(values: Tensor) -> Tensor:  # parameters, their gradients, buffers; a network's as well
            changed = fn(values)
            shortened = changed.dtype != values.dtype and changed.dtype in (torch.float16, torch.bfloat16)
            return values.detach().to(changed.device) if shortened else changed

        super()._apply(careful, recurse)
        return self

    def refuse_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """Refuse a saved state whose entries fit and mean something else: a hook, which does nothing here."""

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # 1. Everything below this module is checked first, so that nothing is loaded of a state that is refused.
        for path, module in self.named_modules():
            check = module._check_state if isinstance(module, State) else partial(_check_entries, module)
            check(state_dict, prefix + path + "." if path else prefix)
        wanted = self.state_dict(prefix=prefix, keep_vars=True).keys()
        saved = {name for name in state_dict if name.startswith(prefix)}
        missing, unexpected = (
            sorted(name.removeprefix(prefix) for name in names) for names in (wanted - saved, saved - wanted)
        )
        # Of a part of a model the state may have its own file; strictly, torch refuses that.
        if (missing or unexpected) and (saved or not prefix):
            raise AnybatchError(
                f"The saved state is of another loss than this {type(self).__name__}: missing are {_listed(missing)}, "
                f"unknown here are {_listed(unexpected)}. {OTHER_LOSS}"
            )
        # 2. What has the width of the saved embeddings takes it.
        for name in self.widths:
            if prefix + name in state_dict:
                setattr(self, name, self.get_buffer(name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """Refuse a saved state that is not of a module like this one; its own entries, without its children's."""
        num_rows = state.get(prefix + "data_rows", self.num_rows)
        if "data_rows" in self._buffers and num_rows != self.num_rows:
            raise AnybatchError(f"The saved state is for {num_rows} rows, this loss for {self.num_rows}. " + OTHER_LOSS)
        _check_entries(self, state, prefix)
        self.refuse_state(state, prefix)
        if "embedding_width" not in self._buffers:
            return
        width, own_width = int(state.get(prefix + "embedding_width", 0)), int(self.embedding_width)
        if width and own_width and width != own_width:
            raise AnybatchError(
                f"The saved state is of embeddings of {width} dimensions, this one of {own_width}. Load it into a loss "
                "just made."
            )


def grown_state(state: Mapping[str, Tensor], loss: nn.Module) -> dict[str, Tensor]:
    """A saved state, made to fit a loss for a data set to which rows were appended.

    `loss.load_state_dict(grown_state(torch.load(path), loss))` is the explicit request without which a state of another
    size is refused. The old rows come back as they were saved; the new ones are as in a loss just made. `loss` (or a
    module that holds some) is made for the new number of rows, or grown to it.
    """
    grown = dict(state)
    for path, module in loss.named_modules(remove_duplicate=False):  # a state has an entry for every name
        prefix = path + "." if path else ""
        if not isinstance(module, State) or module.num_rows is None or prefix + "data_rows" not in grown:
            continue
        _check_growing(module.num_rows, int(grown[prefix + "data_rows"]))
        for name, fresh in module.fresh.items():
            if prefix + name in grown:
                grown[prefix + name] = _extended(grown[prefix + name], module.num_rows, fresh)
        grown[prefix + "data_rows"] = torch.tensor(module.num_rows)
    return grown


def occurrences(inverse: Tensor, num_groups: int) -> Iterator[Tensor]:
    """Positions of the first member of each group, of the second, and so on: one of each group at a time, so that
    additions have a fixed order. `inverse` (b,) says the group of each position.
    """
    count = torch.bincount(inverse, minlength=num_groups)
    order = torch.argsort(inverse, stable=True)
    place = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[inverse[order]]
    for number in range(int(count.max()) if len(order) else 0):
        yield order[place == number]


def last_places(rows: Tensor) -> Tensor:
    """The place of the last occurrence of each of these rows, ascending."""
    distinct, inverse = torch.unique(rows, return_inverse=True)
    numbers = torch.arange(len(rows), device=rows.device)
    return torch.zeros_like(distinct).scatter_reduce_(0, inverse, numbers, "amax").sort().values


def _check_entries(module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Refuse entries of another shape or kind."""
    widths = module.widths if isinstance(module, State) else ()
    for name, own in itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        saved = state.get(prefix + name)
        if saved is None:
            continue
        expected, given = list(own.shape), list(saved.shape)
        if name in widths and given and 0 in (expected[-1], given[-1]):
            expected[-1] = given[-1]
        if expected != given or saved.is_floating_point() != own.is_floating_point():
            raise AnybatchError(
                f"The saved state has {prefix + name} of shape {tuple(saved.shape)} ({saved.dtype}), this loss "
                f"{tuple(own.shape)} ({own.dtype}). " + OTHER_LOSS
            )
        if name == "version" and int(saved) != int(own):
            raise AnybatchError(
                f"The saved state has version {int(saved)} ({prefix + name}); this anybatch reads version {int(own)}. "
                "Use the anybatch that it was saved with, or begin with a new loss."
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


def _extended(values: Tensor, num_rows: int, fresh: float) -> Tensor:
    """(directions, num_rows): `values`, and `fresh` behind them."""
    added = values.new_full((len(values), num_rows - values.shape[1]), fresh)
    return torch.cat([values, added], dim=1)


def _check_growing(num_rows: int, before: int) -> None:
    if num_rows < before:
        raise AnybatchError(f"num_rows is {num_rows}, fewer than the {before} there are already. A loss can only grow.")
