"""Record the embeddings of a big batch, take any loss on them, then send the gradient back through the encoder.

    recording = record(encode, inputs, micro_batches=plan_micro_batches(inputs, micro_batch=32), keep_graphs=0)
    loss(recording.embeddings).backward()
    recording.backward(recording.embeddings.grad)

leaves in every parameter's `.grad` what `loss(encode(inputs)).backward()` would have left, while the activations of one
micro-batch (and of those kept) are alive at a time. It holds because the loss depends on the encoder only through its
embeddings: d loss / d theta = sum over micro-batches of (d embeddings_m / d theta)^T (d loss / d embeddings_m).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching.memory import GraphBudget, out_of_memory_as_none, warn_split
from anybatch.caching.modules import distributed_modules, modules_of, no_reduction, refuse_batch_statistics
from anybatch.caching.rows import RowSlicer
from anybatch.caching.schedule import count_kept
from anybatch.caching.state import AutocastState, ModeState, RandomState, without_autocast
from anybatch.errors import AnybatchError

Encoder = Callable[[Any], Tensor | tuple[Tensor, ...]]


@dataclass(kw_only=True)
class _Piece:
    """One recorded micro-batch."""

    rows: Tensor  # (b,) int64, CPU
    random: RandomState | None = None  # before its forward pass; None where nothing will be replayed
    drew: bool = True  # whether the forward pass drew random numbers
    outputs: tuple[Tensor, ...] | None = None  # with their graph, where it is kept
    trains: bool = False  # whether a gradient must reach the encoder through it


@dataclass(kw_only=True)
class _Job:
    """One replay: a forward pass with a graph, and its backward pass."""

    recording: Recording
    piece: _Piece
    zero: bool = False  # nothing to add; only lets a DistributedDataParallel reduce
    reduce: tuple[DistributedDataParallel, ...] = ()


@dataclass(kw_only=True)
class Recording:
    """The embeddings of a batch, cut off from the encoder, and what is needed to get back into it.

    Attributes:
        leaves: One tensor `(B, ...)` for each tensor that the encoder returns, in the row order of the batch; float32 or
            float64. They require grad where the encoder's did.
    """

    leaves: tuple[Tensor, ...]
    _encode: Encoder
    _slicer: RowSlicer
    _pieces: list[_Piece]
    _autocast: AutocastState
    _modes: ModeState
    _wrapped: tuple[DistributedDataParallel, ...] = ()
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
        replay([self], [grads], scale=scale)


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
    hooks = [module.register_forward_pre_hook(lambda this, _: called.add(this)) for module in wrapped]
    torch.clear_autocast_cache()  # a weight cast under no_grad earlier would reach our graphs without its gradient
    try:
        with no_reduction(wrapped):
            pieces, leaves = _run(encode, slicer, deque(micro_batches), keep_graphs)
    finally:
        torch.clear_autocast_cache()
        for hook in hooks:
            hook.remove()
    return Recording(
        leaves=leaves,
        _encode=encode,
        _slicer=slicer,
        _pieces=pieces,
        _autocast=AutocastState(),
        _modes=ModeState(held),
        # A compiled encoder may not fire hooks; then every module found counts as called.
        _wrapped=tuple(module for module in wrapped if not called or module in called),
    )


def _run(
    encode: Encoder, slicer: RowSlicer, queue: deque[Tensor], keep_graphs: int | float | GraphBudget
) -> tuple[list[_Piece], tuple[Tensor, ...]]:
    budget = keep_graphs if isinstance(keep_graphs, GraphBudget) else None
    to_keep = 0 if isinstance(keep_graphs, GraphBudget) else count_kept(keep_graphs, len(queue))
    training = torch.is_grad_enabled()
    pieces: list[_Piece] = []
    flats: list[Tensor] = []
    trains = [False]  # for each tensor that the encoder returns
    while queue:
        piece = _Piece(rows=queue.popleft(), random=RandomState() if training else None)
        wanted = len(pieces) < to_keep if budget is None else budget.has_room(slicer, piece.rows)
        # Until some output needs a gradient, a graph costs nothing if there is nothing to train, and tells if there is.
        with_graph = training and (wanted or not any(trains))
        with torch.set_grad_enabled(with_graph), out_of_memory_as_none() as attempt:
            measuring = budget.measure(slicer, piece.rows) if budget is not None and with_graph else None
            attempt.result = _encoded(encode, slicer, piece.rows, measuring)
        outputs = attempt.result
        if outputs is None:
            if piece.random is not None:
                piece.random.restore()
            if with_graph and any(trains):  # room for the micro-batch, but not beside the graphs already kept
                to_keep, budget = 0, None
                queue.appendleft(piece.rows)
            else:
                queue.extendleft(reversed(warn_split(piece.rows, attempt.error)))
            continue
        if not flats:
            flats = [_flat_like(output, slicer.num_rows) for output in outputs]
            trains = [False] * len(outputs)
        _check_same(outputs, flats)
        for flat, output in zip(flats, outputs):
            flat.index_copy_(0, piece.rows.to(flat.device), output.detach().to(flat.dtype))
        if with_graph:
            needs = [output.requires_grad for output in outputs]
            trains = [before or now for before, now in zip(trains, needs)]
            piece.trains = any(needs)
            # Without a budget of its own to prove room, the graph of the first is dropped unless asked for.
            if piece.trains and (wanted or (budget is not None and budget.has_room(slicer, piece.rows))):
                piece.outputs = outputs
                if budget is not None:
                    budget.spend(slicer, piece.rows)
        else:
            piece.trains = any(trains)
        if piece.trains and piece.random is not None:
            piece.drew = not piece.random.equals(RandomState())
        else:
            piece.random = None
        pieces.append(piece)
    for flat, needs in zip(flats, trains):
        flat.requires_grad_(needs)
    return pieces, tuple(flats)


def replay(
    recordings: Sequence[Recording], grads: Sequence[Sequence[Tensor | None]], *, scale: Tensor | float = 1.0
) -> None:
    """Send the gradients of the leaves into the encoders of one step: kept graphs first, then the replays.

    A replayed micro-batch runs under the random state, autocast and training mode of its recording; afterwards the
    random generators are where they were. An encoder wrapped in DistributedDataParallel reduces its gradients in
    the last backward pass of the last recording that calls it, and only if it would do so now (an outer `no_sync`
    is respected). Where that recording kept every graph, one row more is run, with a zero gradient, to let it reduce.

    Args:
        recordings: All recordings of the step, in the same order on every rank.
        grads: For each recording, for each of its leaves, the gradient `(B, ...)`, or None if the loss does not use it.
        scale: Multiplies every gradient, in their dtype, before they meet half precision (a gradient scaler, an outer
            gradient).

    Raises:
        AnybatchError: A recording used twice, gradients of another number or shape, out of memory in a backward pass.

    Cost: forward and backward of every micro-batch that was not kept; one gradient reduction a step for each
        DistributedDataParallel.
    """
    scaled = [_checked_grads(recording, given, scale) for recording, given in zip(recordings, grads, strict=True)]
    gradient_of = {id(recording): given for recording, given in zip(recordings, scaled)}
    before = RandomState()
    torch.clear_autocast_cache()
    try:
        with torch.enable_grad():
            jobs = deque(_plan_jobs(recordings, gradient_of))
            while jobs:
                _replay_piece(jobs, gradient_of)
    finally:
        before.restore()
        torch.clear_autocast_cache()


def _plan_jobs(recordings: Sequence[Recording], gradient_of: dict[int, list[Tensor | None]]) -> list[_Job]:
    """Back-propagate what was kept (which frees it) and list what must be replayed."""
    reducing = {module: module.require_backward_grad_sync for r in recordings for module in r._wrapped}
    active = [r for r in recordings if r.trains and any(grad is not None for grad in gradient_of[id(r)])]
    jobs: list[_Job] = []
    for recording in active:
        with no_reduction(recording._wrapped), without_autocast():
            for piece in recording._pieces:
                if piece.outputs is not None:
                    _backward(piece.outputs, gradient_of[id(recording)], piece.rows)
                    piece.outputs, piece.trains = None, False
    for position, recording in enumerate(active):
        own = [_Job(recording=recording, piece=piece) for piece in recording._pieces if piece.trains]
        later = {module for other in active[position + 1 :] for module in other._wrapped}
        due = tuple(module for module in recording._wrapped if reducing[module] and module not in later)
        if due and not own:
            last = recording._pieces[-1]  # the shortest
            own = [_Job(recording=recording, piece=_Piece(rows=last.rows[-1:]), zero=True)]
        if own:
            own[-1].reduce = due
        jobs += own
    for recording in recordings:
        recording._spent = True
    return jobs


def _replay_piece(jobs: deque[_Job], gradient_of: dict[int, list[Tensor | None]]) -> None:
    job = jobs.popleft()
    recording, piece = job.recording, job.piece
    local = [module for module in recording._wrapped if module not in job.reduce]
    with recording._autocast.apply(), recording._modes.apply(), no_reduction(local):
        if piece.random is not None:
            piece.random.restore()
        with out_of_memory_as_none() as attempt:
            attempt.result = _encoded(recording._encode, recording._slicer, piece.rows, None)
        outputs = attempt.result
        if outputs is None:
            if piece.drew or job.reduce:
                raise AnybatchError(
                    f"Out of memory while replaying a micro-batch of {len(piece.rows)} rows, which cannot be split now: "
                    "its dropout masks (or its gradient reduction) belong to the whole. Lower micro_batch or max_tokens."
                ) from attempt.error
            for rows in reversed(warn_split(piece.rows, attempt.error)):
                part = _Piece(rows=rows, random=piece.random, drew=False, trains=True)
                jobs.appendleft(_Job(recording=recording, piece=part))
            return
        with without_autocast():
            _backward(outputs, gradient_of[id(recording)], piece.rows, zero=job.zero)


def _backward(outputs: tuple[Tensor, ...], grads: list[Tensor | None], rows: Tensor, *, zero: bool = False) -> None:
    pairs = [
        (output, grad.index_select(0, rows.to(grad.device)).to(device=output.device, dtype=output.dtype))
        for output, grad in zip(outputs, grads)
        if grad is not None and output.requires_grad
    ]
    if pairs:
        values = [torch.zeros_like(grad) if zero else grad for _, grad in pairs]
        torch.autograd.backward([output for output, _ in pairs], values)


def _encoded(encode: Encoder, slicer: RowSlicer, rows: Tensor, context: Any) -> tuple[Tensor, ...]:
    if context is None:
        outputs = encode(slicer.take(rows))
    else:
        with context:
            outputs = encode(slicer.take(rows))
    several = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(several, (tuple, list)) or not all(isinstance(output, Tensor) for output in several):
        raise AnybatchError(
            f"The encoder returned {type(outputs).__name__}; a Tensor (b, D) or a tuple of Tensors is expected. Pick the "
            'embedding inside, for instance lambda batch: model(batch)["sentence_embedding"].'
        )
    for output in several:
        if output.ndim == 0 or output.shape[0] != len(rows) or not output.is_floating_point():
            raise AnybatchError(
                f"The encoder returned a {output.dtype} tensor of shape {tuple(output.shape)} for {len(rows)} rows; a "
                "floating tensor with one embedding a row is expected."
            )
    return tuple(several)


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


def _checked_grads(recording: Recording, given: Sequence[Tensor | None], scale: Tensor | float) -> list[Tensor | None]:
    if recording._spent:
        raise AnybatchError("This recording was already back-propagated; record the batch again for another pass.")
    if len(given) != len(recording.leaves):
        raise AnybatchError(f"{len(given)} gradients for {len(recording.leaves)} leaves; give one for each, or None.")
    for grad, leaf in zip(given, recording.leaves):
        if grad is not None and grad.shape != leaf.shape:
            raise AnybatchError(f"A gradient of shape {tuple(grad.shape)} for a leaf of shape {tuple(leaf.shape)}.")
    return [None if grad is None else grad.detach() * scale for grad in given]


def _check_rows(micro_batches: Sequence[Tensor], num_rows: int) -> None:
    rows = torch.cat(list(micro_batches)) if micro_batches else torch.empty(0, dtype=torch.int64)
    if num_rows == 0:
        raise AnybatchError("The batch has no rows; skip the step.")
    if not torch.equal(rows.sort().values, torch.arange(num_rows)):
        raise AnybatchError(
            f"The micro-batches name {len(rows)} rows of a batch of {num_rows}; every row must occur exactly once. Plan "
            "them with plan_micro_batches on the same inputs."
        )
