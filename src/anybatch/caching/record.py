"""Run the encoder over a big batch and keep the embeddings, with as few graphs alive as asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching.forward import Encoder, encode_rows
from anybatch.caching.memory import GraphBudget, out_of_memory_as_none, warn_split
from anybatch.caching.modules import (
    distributed_modules,
    modules_of,
    no_reduction,
    refuse_batch_statistics,
    refuse_hidden_distributed,
)
from anybatch.caching.replay import Piece, Recording
from anybatch.caching.rows import RowSlicer
from anybatch.caching.schedule import count_kept
from anybatch.caching.state import AutocastState, ModeState, RandomState
from anybatch.errors import AnybatchError


def record(
    encode: Encoder,
    inputs: Any,
    *,
    micro_batches: Sequence[Tensor],
    keep_graphs: int | float | GraphBudget = 0,
    modules: Sequence[nn.Module] | None = None,
) -> Recording:
    """Run the encoder over every micro-batch and keep the embeddings, but not (all of) the graphs.

    The first micro-batch runs with a graph even where none is kept: its output tells whether the encoder trains at
    all. A frozen encoder is recognised that way and is never replayed.

    Args:
        encode: Takes a micro-batch in the form of `inputs`, returns a floating tensor `(b, ...)` or a tuple of them. A
            row's embedding must not depend on the other rows.
        inputs: The batch (see `RowSlicer`), or a `RowSlicer` of it.
        micro_batches: Row indices as `plan_micro_batches` makes them; every row exactly once.
        keep_graphs: How many micro-batches, from the first, keep their graph: an int counts them, a float is a
            fraction, a `GraphBudget` keeps them while memory allows. 0 is pure GradCache, 1.0 plain training.
        modules: The modules that `encode` runs, where they cannot be found by looking at it (see `modules_of`).

    Returns:
        The recording. Under `torch.no_grad()` its leaves need no gradient and nothing can be replayed.

    Raises:
        AnybatchError: BatchNorm in training mode, rows missing or twice, outputs of another shape than promised.

    Warns:
        UserWarning: Memory ran out and a micro-batch was split.

    Cost: one forward pass of the batch, and the memory of one micro-batch's graph beside the kept ones.

    Reference: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (arXiv 2101.06983), section 3.2.
    """
    slicer = inputs if isinstance(inputs, RowSlicer) else RowSlicer(inputs)
    _check_rows(micro_batches, slicer.num_rows)
    held = modules_of(encode) if modules is None else list(modules)
    refuse_batch_statistics(held)
    wrapped = distributed_modules(held)
    called: set[DistributedDataParallel] = set()

    def note(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            called.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in wrapped]
    torch.clear_autocast_cache()  # a weight cast under no_grad earlier would reach our graphs without its gradient
    try:
        with no_reduction(wrapped), refuse_hidden_distributed(held):
            recorded = _Pass(encode, slicer, deque(micro_batches), keep_graphs)
            recorded.run()
    finally:
        torch.clear_autocast_cache()
        for hook in hooks:
            hook.remove()
    return Recording(
        leaves=tuple(recorded.flats),
        _encode=encode,
        _slicer=slicer,
        _pieces=recorded.pieces,
        _autocast=AutocastState(),
        _modes=ModeState(held),
        # A compiled encoder may not fire hooks; then every module found counts as called.
        _wrapped=tuple(module for module in wrapped if not called or module in called),
    )


class _Pass:
    """One pass over the batch: what has been recorded so far, and how many graphs may still be kept."""

    def __init__(
        self, encode: Encoder, slicer: RowSlicer, queue: deque[Tensor], keep_graphs: int | float | GraphBudget
    ) -> None:
        self.encode, self.slicer, self.queue = encode, slicer, queue
        self.budget = keep_graphs if isinstance(keep_graphs, GraphBudget) else None
        self.to_keep = 0 if isinstance(keep_graphs, GraphBudget) else count_kept(keep_graphs, len(queue))
        self.training = torch.is_grad_enabled()
        self.pieces: list[Piece] = []
        self.flats: list[Tensor] = []
        self.trains: list[bool] = []  # for each tensor that the encoder returns

    def run(self) -> None:
        while self.queue:
            self._record_next()  # a function of its own, so that no local name keeps a graph alive
        for flat, trains in zip(self.flats, self.trains):
            flat.requires_grad_(trains)

    def _record_next(self) -> None:
        rows, budget = self.queue.popleft(), self.budget
        before = RandomState() if self.training else None
        keep = len(self.pieces) < self.to_keep or (budget is not None and budget.has_room(self.slicer, rows))
        # Until an output needs a gradient a graph is asked for: it costs nothing where nothing trains, and tells so.
        with_graph = self.training and (keep or not any(self.trains))
        with torch.set_grad_enabled(with_graph), out_of_memory_as_none() as attempt:
            measuring = budget.measure(self.slicer, rows) if budget is not None and with_graph else None
            attempt.result = encode_rows(self.encode, self.slicer, rows, measuring)
        if attempt.error is not None:
            if before is not None:
                before.restore()
            self._make_room(rows, attempt.error, kept=with_graph and any(self.trains))
            return
        outputs: tuple[Tensor, ...] = attempt.result
        self._store(rows, outputs)
        piece = Piece(rows=rows, trains=any(self.trains))
        if with_graph:
            piece.trains = any(output.requires_grad for output in outputs)
            self.trains = [known or output.requires_grad for known, output in zip(self.trains, outputs)]
        if piece.trains:
            assert before is not None
            piece.random, piece.drew = before, not before.equals(RandomState())
            # The first graph was made before there was a measurement, so a budget is asked again.
            if keep or (with_graph and budget is not None and budget.has_room(self.slicer, rows)):
                piece.outputs = outputs
                if budget is not None:
                    budget.spend(self.slicer, rows)
        self.pieces.append(piece)

    def _make_room(self, rows: Tensor, error: BaseException, *, kept: bool) -> None:
        if kept:  # there was no room beside the graphs kept so far: keep no more, and run these rows without one
            self.to_keep, self.budget = 0, None
            self.queue.appendleft(rows)
        else:
            self.queue.extendleft(reversed(warn_split(rows, error)))

    def _store(self, rows: Tensor, outputs: tuple[Tensor, ...]) -> None:
        if not self.flats:
            self.flats = [_flat_like(output, self.slicer.num_rows) for output in outputs]
            self.trains = [False] * len(outputs)
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


def _check_rows(micro_batches: Sequence[Tensor], num_rows: int) -> None:
    rows = torch.cat(list(micro_batches)) if micro_batches else torch.empty(0, dtype=torch.int64)
    if num_rows == 0:
        raise AnybatchError("The batch has no rows; skip the step.")
    if not torch.equal(rows.sort().values, torch.arange(num_rows)):
        raise AnybatchError(
            f"The micro-batches name {len(rows)} rows of a batch of {num_rows}; every row must occur exactly once. "
            "Plan them with plan_micro_batches on the same inputs."
        )
