"""The first half of a cached step: every mini-batch through its encoder; embeddings are kept, graphs mostly not."""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching.device_memory import unless_out_of_memory
from anybatch.caching.encoder import Encoder, Tower, towers_of
from anybatch.caching.memory import NO_ROOM, GraphBudget, StepMemory
from anybatch.caching.ranks import Wrapped, no_reduction, refuse_hidden_wrappers, same_number_on_all_ranks
from anybatch.caching.row_check import refuse_neighbours, settle_trimming
from anybatch.caching.schedule import check_limits, count_kept, plan_mini_batches
from anybatch.caching.state import AutocastState, RandomState
from anybatch.core.errors import AnybatchError

Auto = Literal["auto"]


@dataclass(kw_only=True)
class Piece:
    """One recorded mini-batch."""

    rows: Tensor  # (b,) int64, CPU
    random: RandomState | None = None  # before its forward pass; None where nothing will be replayed
    written: dict[int, Any] = field(default_factory=dict)  # likewise what forward passes write to
    drew: bool = True  # whether the forward pass drew random numbers or wrote
    dtypes: tuple[torch.dtype, ...] = ()  # of the outputs
    outputs: tuple[Tensor, ...] | None = None  # with their graph, where it is kept
    trains: bool = False  # whether a gradient must reach the encoder through it
    reduce: tuple[Wrapped, ...] = ()  # sharded modules that reduce over ranks in its backward pass: the step's last


@dataclass(kw_only=True)
class Recording:
    """The embeddings of one tower's batch, cut off from the encoder, and what leads back into it."""

    tower: Tower
    memory: StepMemory
    budget: GraphBudget | None  # of the step, where it decides which graphs are kept
    autocast: AutocastState = field(default_factory=AutocastState)
    # For each tensor that the encoder returns one (B, ...), in the row order of the batch, in float32 or float64; it
    # requires grad where the encoder's did.
    leaves: tuple[Tensor, ...] = ()
    pieces: list[Piece] = field(default_factory=list)
    wrapped: list[Wrapped] = field(default_factory=list)  # must not reduce over ranks before the step's last pass
    spent: bool = False

    @property
    def embeddings(self) -> Tensor:
        """The one leaf `(B, D)`."""
        if len(self.leaves) != 1:
            raise AnybatchError(f"The encoder returned {len(self.leaves)} tensors; read .leaves, not .embeddings.")
        return self.leaves[0]

    def refuse_if_sharded(self, rows: Tensor, error: BaseException | None) -> None:
        """A mini-batch of a sharded encoder that ran out of memory ends the step."""
        if self.tower.sharded:
            raise AnybatchError(
                f"Out of memory with a mini-batch of {len(rows)} rows of a sharded encoder (fully_shard), which "
                "cannot be split now: all ranks take part. Lower mini_batch_size, max_tokens or keep_graphs on all."
            ) from error

    def split(self, rows: Tensor, error: BaseException | None) -> list[Tensor]:
        """The two halves of a mini-batch that did not fit; later steps start from their size."""
        if len(rows) == 1:
            raise AnybatchError(f"Out of memory with a single row: {NO_ROOM}") from error
        slicer, halves = self.tower.slicer, list(rows.tensor_split(2))
        warnings.warn(
            f"Out of memory with a mini-batch of {len(rows)} rows ({slicer.padded_tokens(rows)} padded tokens): split "
            f"into {len(halves[0])} and {len(halves[1])}. Lower mini_batch_size or max_tokens to save failed attempts.",
            stacklevel=2,
        )
        self.memory.record_out_of_memory(max(map(slicer.padded_tokens, halves)), by_rows=slicer.lengths is None)
        return halves

    def record_out_of_memory(self, rows: Tensor) -> None:
        """A pass over these rows failed for good: later steps take fewer, and keep fewer graphs."""
        slicer = self.tower.slicer
        self.memory.record_out_of_memory(max(1, slicer.padded_tokens(rows) // 2), by_rows=slicer.lengths is None)
        if self.budget is not None:
            self.budget.overrun = True


def record_towers(
    encoders: Sequence[Encoder],
    inputs: Sequence[Any],
    *,
    mini_batch_size: int | Auto | None = 32,
    max_tokens: int | None = None,
    keep_graphs: int | float | Auto = 0,
    memory: str | int | StepMemory = "80%",
    sort_by_length: bool = True,
    modules: Sequence[nn.Module] | None = None,
) -> list[Recording]:
    """Run every encoder over the mini-batches of its batch and keep the embeddings, but not (all of) the graphs.

    Arguments as in `cached_step`; an encoder may also return a floating tensor `(b, ...)` or a tuple of them, and a
    row's embedding must not depend on the other rows.

    Returns:
        One recording for each tower, to be replayed together. Under `torch.no_grad()` their leaves need no gradient.

    Raises:
        AnybatchError: What `ModuleFacts`, `RowSlicer`, `plan_mini_batches` and `refuse_neighbours` refuse.
    """
    # 1. What the step must know before any pass: the form of the inputs, the modules, the memory there is.
    check_limits(mini_batch_size=mini_batch_size, max_tokens=max_tokens, keep_graphs=keep_graphs)
    towers = towers_of(encoders, inputs, modules)
    if not all(tower.slicer.num_rows for tower in towers):
        raise AnybatchError("The batch has no rows; skip the step.")
    num_rows = sum(tower.slicer.num_rows for tower in towers)
    step_memory, budget = memory if isinstance(memory, StepMemory) else StepMemory(memory), None
    if keep_graphs == "auto":
        budget, keep_graphs = step_memory.next_step(towers[0].facts.modules, inputs, num_rows=num_rows), 0
    recordings = []
    for tower in towers:
        recording = Recording(tower=tower, memory=step_memory, budget=budget)
        with _recording(tower) as called:
            # 2. The mini-batches: no padding beyond what the encoder needs, sizes that memory has room for.
            settle_trimming(tower)
            tower.slicer = tower.slicer.settled()
            rows, tokens = step_memory.limits(tower, mini_batch_size, max_tokens, num_rows=num_rows)
            plan = plan_mini_batches(
                tower.slicer, mini_batch_size=rows, max_tokens=tokens, sort_by_length=sort_by_length
            )
            if tower.sharded:
                plan, recording.budget = same_number_on_all_ranks(plan), None
                if budget is not None:
                    warnings.warn(
                        "keep_graphs='auto' is ignored for a sharded encoder (fully_shard), which must run equally "
                        "often on every rank. Give keep_graphs a number.",
                        stacklevel=2,
                    )
            # 3. Rows that see each other are refused.
            first = torch.is_grad_enabled() and refuse_neighbours(tower, plan)
            # 4. The passes.
            _Recorder(recording, plan, count_kept(keep_graphs, len(plan)), first=first).run()
        # A compiled encoder may not fire hooks; then every module found in it counts as called. A
        # DistributedDataParallel reduces whatever was called.
        called = called or set(tower.wrapped)
        recording.wrapped = [m for m in tower.facts.wrapped if m in called or isinstance(m, DistributedDataParallel)]
        recordings.append(recording)
    towers[0].facts.written.close()
    return recordings


@contextlib.contextmanager
def _recording(tower: Tower) -> Iterator[set[Any]]:
    """Nothing reduces inside, and casts are not reused across passes; yields the wrappers that are called."""
    called: set[Any] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in tower.facts.wrapped]
    torch.clear_autocast_cache()  # some releases reuse a cast made under no_grad, which has no gradient
    try:
        with no_reduction(tower.facts.wrapped), refuse_hidden_wrappers(tower.facts.flags):
            yield called
    finally:
        torch.clear_autocast_cache()
        for hook in hooks:
            hook.remove()


class _Recorder:
    """One pass over a tower's batch: what has been recorded so far, and how many graphs may still be kept."""

    def __init__(self, recording: Recording, plan: Sequence[Tensor], to_keep: int, *, first: bool) -> None:
        self.recording, self.queue, self.to_keep = recording, deque(plan), to_keep
        self.first = first  # step of this encoder
        self.tower, self.budget, self.pieces = recording.tower, recording.budget, recording.pieces
        if self.budget is not None:
            self.budget.bytes_per_token = None  # another tower's say nothing
        self.training = torch.is_grad_enabled()
        self.random = self.tower.random_state()
        self.flats: list[Tensor] = []
        self.trains: list[bool] = []  # for each tensor that the encoder returns

    def run(self) -> None:
        """Record every mini-batch of the queue."""
        while self.queue:
            self._record_next()  # a function of its own, so that no local name keeps a graph alive
        self.recording.leaves = tuple(flat.requires_grad_(trains) for flat, trains in zip(self.flats, self.trains))

    def _record_next(self) -> None:
        rows, budget, slicer, written = self.queue.popleft(), self.budget, self.tower.slicer, self.tower.facts.written
        if self.queue:
            slicer.prepare(self.queue[0])
        before, there = self.random, written.snapshot()
        # 1. One forward pass. Until an output needs a gradient a graph is asked for: it costs nothing where nothing
        #    trains, and tells so. In an encoder's first step always, and dropped: what it keeps for later passes
        #    (weights for each width) then leads to its parameters.
        keep = len(self.pieces) < self.to_keep or (budget is not None and budget.will_fit(slicer, rows))
        with_graph = self.training and (keep or not any(self.trains))
        with torch.set_grad_enabled(with_graph or self.first):
            measuring = budget.measure(slicer, rows) if budget is not None and with_graph else None
            outputs, error = unless_out_of_memory(partial(self.tower.embed, rows, measuring))
        # 2. No room: as before the pass, then once more with less.
        if outputs is None:
            self.recording.refuse_if_sharded(rows, error)
            if self.training:
                before.restore()
            written.update()
            written.restore(there)
            if self.first and not with_graph:
                self.first = False
                self.queue.appendleft(rows)
            elif with_graph and any(self.trains):
                self._drop_graph(rows)
            else:
                self.queue.extendleft(reversed(self.recording.split(rows, error)))
            return
        # 3. The embeddings, and what a replay will need.
        self._store(rows, outputs)
        wrote = written.update()
        if self.training:
            self.random = before.now()  # which the next one starts from
        piece = Piece(rows=rows, trains=any(self.trains), dtypes=tuple(output.dtype for output in outputs))
        if with_graph:
            piece.trains = any(output.requires_grad for output in outputs)
            self.trains = [known or output.requires_grad for known, output in zip(self.trains, outputs)]
        if piece.trains:
            piece.random, piece.written = before, there
            piece.drew = wrote or not before.equals(self.random)
            # A budget is asked again: the first graph was made before a measurement, the others may be larger.
            if with_graph and (budget.keep_last() if budget is not None else keep):
                piece.outputs = outputs
        self.pieces.append(piece)

    def _drop_graph(self, rows: Tensor) -> None:
        """There was no room beside the graphs kept so far: keep no more, and run these rows without one."""
        holding = [piece for piece in self.pieces if piece.outputs is not None]
        if holding:  # the last one makes room for the replays, whose mini-batches are no larger
            holding[-1].outputs = None
        warnings.warn(
            f"Out of memory with {len(holding)} graphs kept: no more are kept in this step. Lower memory or "
            "keep_graphs to avoid the failed attempts.",
            stacklevel=2,
        )
        self.to_keep = 0
        if self.budget is not None:
            self.budget.overrun = True
        self.queue.appendleft(rows)

    def _store(self, rows: Tensor, outputs: tuple[Tensor, ...]) -> None:
        if not self.flats:
            num_rows = self.tower.slicer.num_rows
            for output in outputs:
                dtype = torch.promote_types(output.dtype, torch.float32)
                self.flats.append(torch.empty((num_rows, *output.shape[1:]), dtype=dtype, device=output.device))
            self.trains = [False] * len(outputs)
            if self.budget is not None:
                self.budget.record_embeddings(outputs)
        if [output.shape[1:] for output in outputs] != [flat.shape[1:] for flat in self.flats]:
            raise AnybatchError(
                f"The encoder returned shapes {[tuple(o.shape) for o in outputs]} for one mini-batch and "
                f"{[(len(rows), *flat.shape[1:]) for flat in self.flats]} would fit the first. Embeddings must have "
                "the same shape; token embeddings must be padded to a fixed width inside the encoder."
            )
        for flat, output in zip(self.flats, outputs):
            flat.index_copy_(0, rows.to(flat.device), output.detach().to(flat.dtype))
