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
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching.forward import Encoder, encode_rows
from anybatch.caching.gradients import Aside
from anybatch.caching.memory import GraphBudget, out_of_memory_as_none, sharded_out_of_memory, warn_split
from anybatch.caching.modules import (
    generators_of,
    modules_of,
    parameters_of,
    refuse_batch_statistics,
    refuse_optimizer_in_backward,
)
from anybatch.caching.recording import Piece, Recording, RecordingPass
from anybatch.caching.reduction import (
    DataParallelReduction,
    Wrapped,
    broadcast_buffers,
    distributed_modules,
    no_reduction,
    reduces_now,
    refuse_hidden_distributed,
    same_number_on_all_ranks,
)
from anybatch.caching.row_check import refuse_neighbours, relative_gap, settle_trimming
from anybatch.caching.rows import RowSlicer
from anybatch.caching.state import AutocastState, ModeState, RandomState, WrittenState, without_autocast
from anybatch.core import distributed
from anybatch.core.errors import AnybatchError

# Where a list is set, replays that differ from their recordings are told there instead of raising: for `verify`, which shows what comes of it.
DIFFERENT_REPLAYS: ContextVar[list[str] | None] = ContextVar("DIFFERENT_REPLAYS", default=None)


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
    training = torch.is_grad_enabled()
    if training:
        refuse_optimizer_in_backward(held)
    called: set[nn.Module] = set()

    def note(module: nn.Module, _: Any) -> None:
        called.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in wrapped]  # type: ignore[union-attr]
    torch.clear_autocast_cache()  # some releases reuse a cast made under no_grad, which has no gradient
    try:
        with no_reduction(wrapped), refuse_hidden_distributed(wrapped):
            settle_trimming(encode, slicer, held)
            broadcast_buffers(wrapped)
            random = RandomState(generators_of(encode, held) if training else ())
            written = WrittenState(held if training else ())
            first = training and refuse_neighbours(
                encode, slicer, micro_batches, held, random, written, sharded=sharded
            )
            recorded = RecordingPass(
                encode,
                slicer,
                deque(micro_batches),
                keep_graphs,
                on_split,
                random=random,
                written=written,
                may_split=not sharded,
                first=first,
            )
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
        _modules=tuple(held),
        _written=written,
        # A compiled encoder may not fire hooks; then every module found counts as called. What is not sharded reduces whatever was called.
        _wrapped=tuple(m for m in wrapped if not called or m in called or isinstance(m, DistributedDataParallel)),
        _on_split=on_split,
        _budget=recorded.budget,
        _sharded=sharded,
    )


@dataclass(kw_only=True)
class _Job:
    """One replay: a forward pass with a graph, and its backward pass."""

    recording: Recording
    piece: Piece
    reduce: tuple[Wrapped, ...] = ()


def replay(
    recordings: Sequence[Recording],
    grads: Sequence[Sequence[Tensor | None]],
    *,
    scale: Tensor | float = 1.0,
    beside: Iterable[tuple[nn.Parameter, Tensor]] = (),
    aside: Aside | None = None,
) -> None:
    """Send the gradients of the leaves into the encoders of one step, micro-batch by micro-batch, in recorded order.

    Which graphs were kept changes the time and not one bit of the gradient.

    A replayed micro-batch runs under the random state, buffers, autocast and training mode of its recording, and its embeddings are compared with the
    recorded ones; afterwards generators and buffers are where they were. All or nothing: a step that fails leaves every `.grad` as it was.

    Encoders reduce over ranks only if they would do so now (an outer `no_sync` is respected): DistributedDataParallel once, after all passes, over
    all that any micro-batch of any rank used; `fully_shard` in the last backward pass of the last recording that calls it.

    Args:
        recordings: All recordings of the step, in the same order on every rank.
        grads: For each recording, for each of its leaves, the gradient `(B, ...)`, or None if the loss does not use it.
        scale: Multiplies every gradient, in their dtype, before they meet half precision (a gradient scaler, an outer
            gradient).
        beside: Gradients that the loss gave to parameters itself, which wait for `scale`.
        aside: Where the gradients of this step have been collected already.

    Raises:
        AnybatchError: A recording used twice, gradients of another number or shape, out of memory in a backward pass, an encoder whose
            replay differs from its recording, on any rank.

    Cost: forward and backward of every micro-batch that was not kept; one gradient reduction a step for each
        DistributedDataParallel and sharded encoder. A sharded one gathers its weights in every pass.
    """
    scaled = [_checked_grads(recording, given, scale) for recording, given in zip(recordings, grads, strict=True)]
    gradient_of = {id(recording): given for recording, given in zip(recordings, scaled)}
    beside = list(beside)
    if aside is None:
        aside = Aside(dict.fromkeys([*trained_parameters(recordings), *(parameter for parameter, _ in beside)]))
    reducing = [
        module
        for module in dict.fromkeys(m for r in recordings for m in r._wrapped)
        if isinstance(module, DistributedDataParallel) and reduces_now(module)
    ]
    failure: Exception | None = None
    try:
        for parameter, gradient in beside:
            amount = gradient * torch.as_tensor(scale).to(gradient.device, gradient.dtype)
            parameter.grad = amount if parameter.grad is None else parameter.grad + amount
        _replay_all(recordings, gradient_of)
    except Exception as error:  # the other ranks must hear of it before this one leaves
        failure = error
    except BaseException:
        aside.put_back()
        raise
    reductions = [DataParallelReduction(m, aside.has_gradient, failed=failure is not None) for m in reducing]
    if failure is not None or any(reduction.failed for reduction in reductions):
        aside.put_back()
        raise failure or AnybatchError(
            "Another rank could not replay this step, and says why. No gradient was changed."
        )
    aside.merge()
    for reduction in reductions:
        reduction.run()


def trained_parameters(recordings: Sequence[Recording]) -> list[nn.Parameter]:
    """The parameters of the encoders whose gradients accumulate in `.grad`: not those of a sharded module, which keeps them elsewhere."""
    sharded = {p for r in recordings for m in r._wrapped if isinstance(m, FSDPModule) for p in m.parameters()}  # type: ignore[attr-defined]
    modules = dict.fromkeys(m for r in recordings for m in r._modules)
    return [p for p in parameters_of(modules) if p not in sharded]


def _replay_all(recordings: Sequence[Recording], gradient_of: dict[int, list[Tensor | None]]) -> None:
    states = [RandomState(g for r in recordings for p in r._pieces[:1] if p.random for g, _ in p.random.objects)]
    ends = [(recording._written, recording._written.now()) for recording in recordings]
    jobs = _plan_jobs(recordings, gradient_of)
    gaps: list[Tensor] = []
    torch.clear_autocast_cache()
    try:
        if any(job.piece.outputs is None for queue in jobs for job in queue):
            for recording in reversed(recordings):
                recording._written.restore({})  # as before the step
        with torch.enable_grad():
            for recording, queue in zip(recordings, jobs):
                with recording._modes.apply():
                    while queue:
                        _replay_piece(queue, gradient_of[id(recording)], gaps)
                recording._written.restore(recording._written.values)
    finally:
        states[0].restore()
        for written, end in ends:
            written.restore(end)
        torch.clear_autocast_cache()
    _refuse_different(gaps, list(dict.fromkeys(name for r in recordings for name in r._written.large)))


def _plan_jobs(recordings: Sequence[Recording], gradient_of: dict[int, list[Tensor | None]]) -> list[deque[_Job]]:
    """Every micro-batch in recorded order, kept or not: the sum of the gradients is the same to the last bit."""
    jobs: list[deque[_Job]] = []
    later: set[Wrapped] = set()
    for recording in reversed(recordings):
        active = recording.trains and any(grad is not None for grad in gradient_of[id(recording)])
        pieces = [piece for piece in recording._pieces if piece.trains] if active else []
        jobs.append(deque(_Job(recording=recording, piece=piece) for piece in pieces))
        if pieces:
            sharded = [m for m in recording._wrapped if isinstance(m, FSDPModule) and m not in later and reduces_now(m)]
            jobs[-1][-1].reduce = tuple(sharded)
            later.update(sharded)
        recording._spent = True
    return jobs[::-1]


def _replay_piece(jobs: deque[_Job], grads: list[Tensor | None], gaps: list[Tensor]) -> None:
    job = jobs.popleft()
    recording, piece = job.recording, job.piece
    local = [module for module in recording._wrapped if module not in job.reduce]
    with recording._autocast.apply(), no_reduction(local):
        outputs, piece.outputs = piece.outputs, None  # a kept graph is freed by its backward pass
        if outputs is None:
            if piece.random is not None:
                piece.random.restore()
                recording._written.restore(piece.written)
            with out_of_memory_as_none() as attempt:
                attempt.result = encode_rows(recording._encode, recording._slicer, piece.rows)
            outputs = attempt.result
            if outputs is None:
                _split(jobs, job, attempt.error)
                return
            gaps.append(_gap(outputs, recording.leaves, piece))
        with without_autocast(), out_of_memory_as_none() as attempt:
            attempt.result = _backward(outputs, grads, piece.rows)
        if attempt.error is not None:
            recording.note_out_of_memory(piece.rows)
            raise AnybatchError(
                f"Out of memory in the backward pass of a micro-batch of {len(piece.rows)} rows. {_undone(recording)} The next step takes less if it has "
                "the same StepMemory; or lower micro_batch, max_tokens, memory or keep_graphs."
            ) from attempt.error


def _undone(recording: Recording) -> str:
    if recording._sharded:
        return "The gradients of this step are incomplete: set them to zero."
    return "No gradient was changed."


def _split(jobs: deque[_Job], job: _Job, error: BaseException | None) -> None:
    """Put the two halves of a replay that did not fit in front of the queue."""
    recording, piece = job.recording, job.piece
    if recording._sharded:
        raise sharded_out_of_memory(piece.rows) from error
    if piece.drew:
        recording.note_out_of_memory(piece.rows)
        raise AnybatchError(
            f"Out of memory while replaying a micro-batch of {len(piece.rows)} rows, which cannot be split "
            "now: its random numbers (dropout) belong to the whole. No gradient was changed. The next step takes less if it has the same StepMemory; or "
            "lower micro_batch or max_tokens."
        ) from error
    smaller = warn_split(recording._slicer, piece.rows, error, recording._on_split)
    halves = [Piece(rows=rows, drew=False, trains=True, dtypes=piece.dtypes) for rows in smaller]
    jobs.appendleft(_Job(recording=recording, piece=halves[1], reduce=job.reduce))
    jobs.appendleft(_Job(recording=recording, piece=halves[0]))


def _backward(outputs: tuple[Tensor, ...], grads: list[Tensor | None], rows: Tensor) -> None:
    pairs = [
        (output, grad.index_select(0, rows.to(grad.device)).to(device=output.device, dtype=output.dtype))
        for output, grad in zip(outputs, grads)
        if grad is not None and output.requires_grad
    ]
    if not pairs:
        return
    try:
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise AnybatchError(
            "The encoder uses what an earlier forward pass computed from its parameters, such as weights kept in a dictionary or a parametrization under "
            "torch.nn.utils.parametrize.cached(). One backward pass has used it up, and every micro-batch has its own. Compute it in each forward pass. "
            "No gradient was changed."
        ) from error


@torch.no_grad()
def _gap(outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...], piece: Piece) -> Tensor:
    """How far a replay is from its recording, over what rounding allows. Left on the device: it is read once a step."""
    dtypes = tuple(output.dtype for output in outputs)
    if dtypes != piece.dtypes:
        _different(
            f"The encoder returned {piece.dtypes} when it was recorded and {dtypes} in its replay, with gradients."
        )
    recorded = [leaf.detach().index_select(0, piece.rows.to(leaf.device)) for leaf in leaves]
    return relative_gap(outputs, recorded)


def _refuse_different(gaps: Sequence[Tensor], large: Sequence[str]) -> None:
    """Whether the replays had the recordings' random numbers, and whatever else they depend on.

    A compiler may draw in its own way in one graph and not in the other, and says nothing when it gives up compiling; generators may be out of sight. So every
    replay is compared.

    Raises:
        AnybatchError: Embeddings are further from the recorded ones than rounding brings them.
    """
    devices = dict.fromkeys(gap.device for gap in gaps)
    gap = max(
        (float(torch.stack([gap for gap in gaps if gap.device == device]).max()) for device in devices), default=0.0
    )
    if gap > 1:
        named = f" It writes to {', '.join(large[:3])}, too large to be kept for every micro-batch." if large else ""
        _different(
            f"A replay differs from its recording by {gap:.1f} times what rounding allows: the encoder drew other random numbers (dropout), or something else "
            f"that it depends on has changed.{named} What torch, NumPy and Python draw by their global generators or by generator objects that the encoder "
            "visibly holds is replayed, and so are buffers and numbers that its modules count; keep such state there, or outside the encoder. If the encoder is "
            "compiled, set torch._inductor.config.fallback_random = True before compiling, and torch._dynamo.config.recompile_limit to more than twice the "
            "number of shapes (pad_to_multiple keeps them few), or use keep_graphs=1.0. No gradient was changed."
        )


def _different(reason: str) -> None:
    told = DIFFERENT_REPLAYS.get()
    if told is None:
        raise AnybatchError(reason)
    told.append(reason)


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
