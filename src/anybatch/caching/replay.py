"""Record the embeddings of a big batch, take any loss on them, then send the gradient back through the encoder.

    recording = record(encode, inputs, micro_batches=plan_micro_batches(inputs, micro_batch=32), keep_graphs=0)
    loss(recording.embeddings).backward()
    recording.backward(recording.embeddings.grad)

leaves in every parameter's `.grad` what `loss(encode(inputs)).backward()` would have left, while the activations of one
micro-batch (and of those kept) are alive at a time. It holds because the loss depends on the encoder only through its
embeddings: d loss / d theta = sum over micro-batches of (d embeddings_m / d theta)^T (d loss / d embeddings_m).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from anybatch import distributed
from anybatch.caching.forward import Encoder, encode_rows
from anybatch.caching.memory import GraphBudget, out_of_memory_as_none, sharded_out_of_memory, warn_split
from anybatch.caching.modules import modules_of, refuse_batch_statistics
from anybatch.caching.recording import Piece, Recording, RecordingPass
from anybatch.caching.reduction import (
    Wrapped,
    distributed_modules,
    no_reduction,
    reduces_now,
    refuse_hidden_distributed,
    same_number_on_all_ranks,
)
from anybatch.caching.rows import RowSlicer
from anybatch.caching.state import AutocastState, ModeState, RandomState, without_autocast
from anybatch.errors import AnybatchError

# Where a list is set, replays that differ from their recordings are told there instead of raising: for `verify`, which shows what comes of it.
DIFFERENT_REPLAYS: ContextVar[list[str] | None] = ContextVar("DIFFERENT_REPLAYS", default=None)
REPLAY_TOLERANCE = 0.01  # of a row's norm: other dropout masks move an embedding by more, rounding by less


def record(
    encode: Encoder,
    inputs: Any,
    *,
    micro_batches: Sequence[Tensor],
    keep_graphs: int | float | GraphBudget = 0,
    modules: Sequence[nn.Module] | None = None,
    on_split: Callable[[int], None] | None = None,
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
        on_split: Called with the padded tokens that are tried next, when a micro-batch ran out of memory.

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
    sharded = distributed.is_active() and any(isinstance(module, FSDPModule) for module in wrapped)
    if sharded:
        micro_batches = same_number_on_all_ranks(slicer, micro_batches)
        if isinstance(keep_graphs, GraphBudget):
            warnings.warn(
                "keep_graphs='auto' is ignored for a sharded encoder (fully_shard), which must run equally often on every rank. "
                "Give keep_graphs a number.",
                stacklevel=2,
            )
            keep_graphs = 0
    called: set[nn.Module] = set()

    def note(module: nn.Module, _: Any) -> None:
        called.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in wrapped]  # type: ignore[union-attr]
    torch.clear_autocast_cache()  # some releases reuse a cast made under no_grad, which has no gradient
    try:
        with no_reduction(wrapped), refuse_hidden_distributed(held):
            recorded = RecordingPass(encode, slicer, deque(micro_batches), keep_graphs, on_split, may_split=not sharded)
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
        _on_split=on_split,
        _sharded=sharded,
    )


@dataclass(kw_only=True)
class _Job:
    """One replay: a forward pass with a graph, and its backward pass."""

    recording: Recording
    piece: Piece
    zero: bool = False  # nothing to add; only lets a DistributedDataParallel reduce
    reduce: tuple[Wrapped, ...] = ()


def replay(
    recordings: Sequence[Recording], grads: Sequence[Sequence[Tensor | None]], *, scale: Tensor | float = 1.0
) -> None:
    """Send the gradients of the leaves into the encoders of one step, micro-batch by micro-batch, in recorded order.

    Which graphs were kept changes the time and not one bit of the gradient.

    A replayed micro-batch runs under the random state, autocast and training mode of its recording; afterwards the
    random generators are where they were. An encoder wrapped in DistributedDataParallel or `fully_shard` reduces its gradients in
    the last backward pass of the last recording that calls it, and only if it would do so now (an outer `no_sync`
    is respected). Where its last graph was kept, one row more is run, with a zero gradient, to let it reduce.

    Args:
        recordings: All recordings of the step, in the same order on every rank.
        grads: For each recording, for each of its leaves, the gradient `(B, ...)`, or None if the loss does not use it.
        scale: Multiplies every gradient, in their dtype, before they meet half precision (a gradient scaler, an outer
            gradient).

    Raises:
        AnybatchError: A recording used twice, gradients of another number or shape, out of memory in a backward pass, a compiled encoder whose
            replay draws other random numbers than its recording did.

    Cost: forward and backward of every micro-batch that was not kept; one gradient reduction a step for each
        DistributedDataParallel and sharded encoder. A sharded one gathers its weights in every pass.
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
    """Every micro-batch in recorded order, kept or not: the sum of the gradients is the same to the last bit."""
    reducing = {module: reduces_now(module) for r in recordings for module in r._wrapped}
    active = [r for r in recordings if r.trains and any(grad is not None for grad in gradient_of[id(r)])]
    jobs: list[_Job] = []
    for position, recording in enumerate(active):
        own = [_Job(recording=recording, piece=piece) for piece in recording._pieces if piece.trains]
        later = {module for other in active[position + 1 :] for module in other._wrapped}
        due = tuple(module for module in recording._wrapped if reducing[module] and module not in later)
        if own[-1].piece.outputs is not None and any(isinstance(module, DistributedDataParallel) for module in due):
            # A kept graph was made with the reduction held back, and cannot reduce.
            rows = recording._pieces[-1].rows[-1:]  # the shortest
            own.append(_Job(recording=recording, piece=Piece(rows=rows), zero=True))
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
        outputs, piece.outputs = piece.outputs, None  # a kept graph is freed by its backward pass
        if outputs is None:
            if piece.random is not None:
                piece.random.restore()
            with out_of_memory_as_none() as attempt:
                attempt.result = encode_rows(recording._encode, recording._slicer, piece.rows)
            outputs = attempt.result
            if outputs is None:
                _split(jobs, job, attempt.error)
                return
            if piece.drew and not job.zero:
                _check_replay(outputs, recording.leaves, piece.rows)
        with without_autocast(), out_of_memory_as_none() as attempt:
            attempt.result = _backward(outputs, gradient_of[id(recording)], piece.rows, zero=job.zero)
        if attempt.error is not None:
            raise AnybatchError(
                f"Out of memory in the backward pass of a micro-batch of {len(piece.rows)} rows. The gradients of this step "
                "are incomplete: set them to zero. Lower micro_batch, max_tokens, memory or keep_graphs."
            ) from attempt.error


def _split(jobs: deque[_Job], job: _Job, error: BaseException | None) -> None:
    """Put the two halves of a replay that did not fit in front of the queue."""
    recording, piece = job.recording, job.piece
    if recording._sharded:
        raise sharded_out_of_memory(piece.rows) from error
    if piece.drew:
        raise AnybatchError(
            f"Out of memory while replaying a micro-batch of {len(piece.rows)} rows, which cannot be split "
            "now: its random numbers (dropout) belong to the whole. Lower micro_batch or max_tokens."
        ) from error
    smaller = warn_split(recording._slicer, piece.rows, error, recording._on_split)
    halves = [Piece(rows=rows, drew=False, trains=True) for rows in smaller]
    jobs.appendleft(_Job(recording=recording, piece=halves[1], reduce=job.reduce))
    jobs.appendleft(_Job(recording=recording, piece=halves[0]))


def _backward(outputs: tuple[Tensor, ...], grads: list[Tensor | None], rows: Tensor, *, zero: bool = False) -> None:
    pairs = [
        (output, grad.index_select(0, rows.to(grad.device)).to(device=output.device, dtype=output.dtype))
        for output, grad in zip(outputs, grads)
        if grad is not None and output.requires_grad
    ]
    if pairs:
        values = [torch.zeros_like(grad) if zero else grad for _, grad in pairs]
        torch.autograd.backward([output for output, _ in pairs], values)


@torch.no_grad()
def _check_replay(outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...], rows: Tensor) -> None:
    """Whether the replay drew the recording's random numbers.

    A compiler may draw them in its own way in one graph and not in the other, and says nothing when it gives up compiling; what is compiled does not
    always show. So every replay that draws is compared.

    Raises:
        AnybatchError: The embeddings are further from the recorded ones than rounding brings them.
    """
    for output, leaf in zip(outputs, leaves):
        recorded = leaf.detach().index_select(0, rows.to(leaf.device))
        gap = float((output.to(recorded.dtype) - recorded).norm() / recorded.norm().clamp_min(1e-30))
        if gap > max(REPLAY_TOLERANCE, 16 * torch.finfo(output.dtype).eps):
            different = DIFFERENT_REPLAYS.get()
            if different is not None:
                different.append(
                    f"A replay is {gap:.1%} away from its recording: the encoder drew other random numbers, or what it depends on changed."
                )
                return
            raise AnybatchError(
                f"The replay is {gap:.1%} away from its recording: the encoder drew other random numbers (dropout), or something else that it depends on has "
                "changed; `anybatch.caching.verify` may name it. If it is compiled, set torch._inductor.config.fallback_random = True before compiling, and "
                "torch._dynamo.config.recompile_limit to more than twice the number of shapes (pad_to_multiple keeps them few), or use keep_graphs=1.0. The "
                "gradients of this step are incomplete."
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
            f"The micro-batches name {len(rows)} rows of a batch of {num_rows}; every row must occur exactly once. "
            "Plan them with plan_micro_batches on the same inputs."
        )
