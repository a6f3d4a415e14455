"""One pass of the encoder over a big batch: the embeddings, the graphs kept, and what a replay needs of the others."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.caching.forward import Encoder, encode_rows
from anybatch.caching.memory import (
    GraphBudget,
    out_of_memory_as_none,
    padded_tokens,
    sharded_out_of_memory,
    warn_split,
)
from anybatch.caching.reduction import Wrapped
from anybatch.caching.rows import RowSlicer
from anybatch.caching.schedule import count_kept
from anybatch.caching.state import AutocastState, ModeState, RandomState, WrittenState
from anybatch.core.errors import AnybatchError


@dataclass(kw_only=True)
class Piece:
    """One recorded micro-batch."""

    rows: Tensor  # (b,) int64, CPU
    random: RandomState | None = None  # before its forward pass; None where nothing will be replayed
    written: dict[int, Any] = field(default_factory=dict)  # likewise what forward passes write to
    drew: bool = True  # whether the forward pass drew random numbers or wrote
    dtypes: tuple[torch.dtype, ...] = ()  # of the outputs
    outputs: tuple[Tensor, ...] | None = None  # with their graph, where it is kept
    trains: bool = False  # whether a gradient must reach the encoder through it


@dataclass(kw_only=True)
class Recording:
    """The embeddings of a batch, cut off from the encoder, and what is needed to get back into it.

    Attributes:
        leaves: One tensor `(B, ...)` for each tensor that the encoder returns, in the row order of the batch; float32
            or float64. They require grad where the encoder's did.
    """

    leaves: tuple[Tensor, ...]
    _encode: Encoder
    _slicer: RowSlicer
    _pieces: list[Piece]
    _autocast: AutocastState
    _modes: ModeState
    _modules: tuple[nn.Module, ...] = ()
    _written: WrittenState = field(default_factory=lambda: WrittenState([]))
    _wrapped: tuple[Wrapped, ...] = ()
    _on_split: Callable[[int], None] | None = None
    _budget: GraphBudget | None = None
    _sharded: bool = False  # over ranks, which then must run equally many passes
    _spent: bool = field(default=False)

    @property
    def embeddings(self) -> Tensor:
        """The one leaf `(B, D)`.

        Raises:
            AnybatchError: The encoder returns several tensors; read `leaves`.
        """
        if len(self.leaves) != 1:
            raise AnybatchError(
                f"The encoder returned {len(self.leaves)} tensors; read .leaves instead of .embeddings."
            )
        return self.leaves[0]

    @property
    def trains(self) -> bool:
        """False for a frozen encoder, which is never replayed."""
        return any(piece.trains for piece in self._pieces)

    @property
    def num_kept(self) -> int:
        """How many micro-batches hold their graph at this moment."""
        return sum(piece.outputs is not None for piece in self._pieces)

    def backward(self, *grads: Tensor | None, scale: Tensor | float = 1.0) -> None:
        """`replay` for this recording alone; one gradient for each leaf."""
        from anybatch.caching.replay import replay  # which imports this module

        replay([self], [grads], scale=scale)

    def note_out_of_memory(self, rows: Tensor) -> None:
        """A pass over these rows failed: later steps take fewer, and keep fewer graphs."""
        if self._on_split is not None:
            self._on_split(max(1, padded_tokens(self._slicer, rows) // 2))
        if self._budget is not None:
            self._budget.overrun = True


class RecordingPass:
    """One pass over the batch: what has been recorded so far, and how many graphs may still be kept."""

    def __init__(
        self,
        encode: Encoder,
        slicer: RowSlicer,
        queue: deque[Tensor],
        keep_graphs: int | float | GraphBudget,
        on_split: Callable[[int], None] | None,
        *,
        random: RandomState,
        written: WrittenState,
        may_split: bool = True,
        first: bool = False,
    ) -> None:
        self.encode, self.slicer, self.queue, self.on_split = encode, slicer, queue, on_split
        self.budget = keep_graphs if isinstance(keep_graphs, GraphBudget) else None
        self.to_keep = 0 if isinstance(keep_graphs, GraphBudget) else count_kept(keep_graphs, len(queue))
        self.random, self.written = random, written
        self.may_split, self.first = may_split, first
        self.training = torch.is_grad_enabled()
        self.pieces: list[Piece] = []
        self.flats: list[Tensor] = []
        self.trains: list[bool] = []  # for each tensor that the encoder returns

    def run(self) -> None:
        """Record every micro-batch of the queue."""
        while self.queue:
            self._record_next()  # a function of its own, so that no local name keeps a graph alive
        self.written.close()
        for flat, trains in zip(self.flats, self.trains):
            flat.requires_grad_(trains)

    def _record_next(self) -> None:
        rows, budget = self.queue.popleft(), self.budget
        before = self.random
        there = self.written.snapshot()
        keep = len(self.pieces) < self.to_keep or (budget is not None and budget.has_room(self.slicer, rows))
        # Until an output needs a gradient a graph is asked for: it costs nothing where nothing trains, and tells so.
        with_graph = self.training and (keep or not any(self.trains))
        # In an encoder's first step always, and dropped: what it keeps for later passes (weights for each width) then leads to its parameters.
        with torch.set_grad_enabled(with_graph or self.first), out_of_memory_as_none() as attempt:
            measuring = budget.measure(self.slicer, rows) if budget is not None and with_graph else None
            attempt.result = encode_rows(self.encode, self.slicer, rows, measuring)
        if attempt.error is not None:
            if not self.may_split:
                raise sharded_out_of_memory(rows) from attempt.error
            if self.training:
                before.restore()
            self.written.note()
            self.written.restore(there)
            if self.first and not with_graph:
                self.first = False
                self.queue.appendleft(rows)
            else:
                self._make_room(rows, attempt.error, kept=with_graph and any(self.trains))
            return
        outputs: tuple[Tensor, ...] = attempt.result
        self._store(rows, outputs)
        wrote = self.written.note()
        if self.training:
            self.random = before.now()  # which the next one starts from
        piece = Piece(rows=rows, trains=any(self.trains), dtypes=tuple(output.dtype for output in outputs))
        if with_graph:
            piece.trains = any(output.requires_grad for output in outputs)
            self.trains = [known or output.requires_grad for known, output in zip(self.trains, outputs)]
        if piece.trains:
            piece.random, piece.written = before, there
            piece.drew = wrote or not before.equals(self.random)
            # A budget is asked again: the first graph was made before there was a measurement, the others may be larger.
            if with_graph and (budget.keep_last() if budget is not None else keep):
                piece.outputs = outputs
        self.pieces.append(piece)

    def _make_room(self, rows: Tensor, error: BaseException, *, kept: bool) -> None:
        if not kept:
            self.queue.extendleft(reversed(warn_split(self.slicer, rows, error, self.on_split)))
            return
        # There was no room beside the graphs kept so far: keep no more, and run these rows without one. The last one kept
        # makes room for the replays, whose micro-batches are no larger.
        holding = [piece for piece in self.pieces if piece.outputs is not None]
        if holding:
            holding[-1].outputs = None
        warnings.warn(
            f"Out of memory with {len(holding)} graphs kept: no more are kept in this step. Lower memory or keep_graphs to "
            "avoid the failed attempts.",
            stacklevel=2,
        )
        self.to_keep = 0
        if self.budget is not None:
            self.budget.overrun = True
        self.queue.appendleft(rows)

    def _store(self, rows: Tensor, outputs: tuple[Tensor, ...]) -> None:
        if not self.flats:
            self.flats = [_flat_like(output, self.slicer.num_rows) for output in outputs]
            self.trains = [False] * len(outputs)
            if self.budget is not None:
                self.budget.note_embeddings(outputs)
        _check_same(outputs, self.flats)
        for flat, output in zip(self.flats, outputs):
            flat.index_copy_(0, rows.to(flat.device), output.detach().to(flat.dtype))


def _flat_like(output: Tensor, num_rows: int) -> Tensor:
    dtype = torch.promote_types(output.dtype, torch.float32)
    return torch.empty((num_rows, *output.shape[1:]), dtype=dtype, device=output.device)


def _check_same(outputs: tuple[Tensor, ...], flats: list[Tensor]) -> None:
    if [output.shape[1:] for output in outputs] != [flat.shape[1:] for flat in flats]:
        raise AnybatchError(
            f"The encoder returned shapes {[tuple(o.shape) for o in outputs]} for one micro-batch and "
            f"{[(len(outputs[0]), *f.shape[1:]) for f in flats]} would fit the first. Embeddings must have the same "
            "shape in every micro-batch; token embeddings, whose width follows the longest row, must be padded to a "
            "fixed width inside the encoder."
        )
