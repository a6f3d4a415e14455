"""The second half of a cached step: the gradients of the embeddings go back through the encoders, piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching.device_memory import unless_out_of_memory
from anybatch.caching.ranks import DataParallelReduction, no_reduction, reduces_now
from anybatch.caching.recording import Piece, Recording
from anybatch.caching.row_check import relative_difference
from anybatch.caching.state import training_modes, without_autocast
from anybatch.core.errors import AnybatchError

UNCHANGED = "No gradient was changed."
NEXT_STEP = "The next step takes less if it has the same StepMemory; or lower mini_batch_size, max_tokens"


class Aside:
    """Takes the `.grad` of parameters away, so that backward passes leave this step's contribution alone there. Hooks
    of the parameters (`register_hook`) rest meanwhile and run once, on the whole contribution, as in a plain step.
    Where gradients were accumulated before, it needs as much memory again.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._before = {parameter: (parameter.grad, parameter._backward_hooks) for parameter in parameters}
        for parameter, (_, hooks) in self._before.items():
            parameter.grad = None
            if hooks:
                parameter._backward_hooks = None

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether it will have a gradient when all is merged."""
        return parameter.grad is not None or self._before.get(parameter, (None, None))[0] is not None

    def put_back(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Leave all as it was before; returns what was found meanwhile."""
        found = [(parameter, parameter.grad) for parameter in self._before if parameter.grad is not None]
        for parameter, (grad, hooks) in self._before.items():
            parameter.grad = grad
            if hooks:
                parameter._backward_hooks = hooks
        self._before = {}
        return found

    @torch.no_grad()
    def merge(self) -> None:
        """Add this step's contribution to what was there."""
        before = self._before
        for parameter, found in self.put_back():
            grad, hooks = before[parameter]
            for hook in (hooks or {}).values():
                changed = hook(found)
                found = found if changed is None else changed
            if grad is None:
                parameter.grad = found
            elif grad.is_sparse:
                parameter.grad = found + grad  # torch adds a sparse tensor to a dense one, and not the other way round
            else:
                grad.add_(found)


def trained_parameters(recordings: Sequence[Recording]) -> list[nn.Parameter]:
    """Those whose gradients accumulate in `.grad`: not those of a sharded module, which keeps them elsewhere."""
    sharded = {p for r in recordings for m in r.wrapped if isinstance(m, FSDPModule) for p in m.parameters()}
    return [parameter for parameter in recordings[0].tower.facts.trained if parameter not in sharded]


def replay(
    recordings: Sequence[Recording],
    grads: Sequence[Sequence[Tensor | None]],
    *,
    scale: Tensor | float = 1.0,
    beside: Iterable[tuple[nn.Parameter, Tensor]] = (),
) -> None:
    """Send the gradients of the leaves into the encoders, mini-batch by mini-batch, in recorded order.

    Which graphs were kept changes not one bit of the gradient. A replayed mini-batch runs under the random state,
    buffers, autocast and training mode of its recording, and its embeddings are compared with the recorded ones. All or
    nothing: a step that fails leaves every `.grad` as it was.

    Encoders reduce over ranks only if they would do so now (an outer `no_sync` is respected): DistributedDataParallel
    once, after all passes; `fully_shard` in the last backward pass of the last recording that calls it.

    Args:
        recordings: All of one `record_towers`.
        grads: For each leaf of each recording its gradient `(B, ...)`, or None if the loss does not use it.
        scale: Multiplies every gradient, in their dtype, before they meet half precision.
        beside: Gradients that the loss gave to parameters itself, which wait for `scale`.

    Raises:
        AnybatchError: A recording used twice, gradients of another number or shape, out of memory in a backward pass,
            an encoder whose replay differs from its recording, on any rank.
    """
    # 1. This step's gradients, apart from what was accumulated before: those of the loss first.
    scaled = [_checked_grads(recording, given, scale) for recording, given in zip(recordings, grads, strict=True)]
    beside = list(beside)
    aside = Aside(dict.fromkeys([*trained_parameters(recordings), *(parameter for parameter, _ in beside)]))
    wrapped = dict.fromkeys(module for recording in recordings for module in recording.wrapped)
    failure: Exception | None = None
    try:
        reducing = [m for m in wrapped if isinstance(m, DistributedDataParallel) and reduces_now(m)]
        for parameter, gradient in beside:
            amount = gradient * torch.as_tensor(scale).to(gradient.device, gradient.dtype)
            parameter.grad = amount if parameter.grad is None else parameter.grad + amount
        # 2. All passes.
        try:
            _replay_all(recordings, scaled)
        except Exception as error:  # the other ranks must hear of it before this one leaves
            failure = error
        # 3. All ranks go on, or none does.
        reductions = [DataParallelReduction(m, aside.has_gradient, failed=failure is not None) for m in reducing]
        if failure is not None or any(reduction.failed for reduction in reductions):
            raise failure or AnybatchError(f"Another rank could not replay this step, and says why. {UNCHANGED}")
    except BaseException:
        aside.put_back()
        raise
    aside.merge()
    for reduction in reductions:
        reduction.run()


def _replay_all(recordings: Sequence[Recording], grads: Sequence[list[Tensor | None]]) -> None:
    step = recordings[0].tower  # what it knows of generators, buffers and modes it knows for all
    random, written, end = step.random_state(), step.facts.written, step.facts.written.now()
    queues = _pieces_to_replay(recordings, grads)
    differences: list[Tensor] = []
    torch.clear_autocast_cache()
    try:
        if any(piece.outputs is None for queue in queues for piece in queue):
            written.restore({})  # as before the step
        with torch.enable_grad(), training_modes(step.facts.flags):
            for recording, queue, given in zip(recordings, queues, grads):
                while queue:
                    _replay_next(recording, queue, given, differences)
    finally:
        random.restore()
        written.restore(end)
        torch.clear_autocast_cache()
    _refuse_different(differences, written.too_large)


def _pieces_to_replay(recordings: Sequence[Recording], grads: Sequence[list[Tensor | None]]) -> list[deque[Piece]]:
    """Every mini-batch in recorded order, kept or not: the sum of the gradients is the same to the last bit."""
    queues: list[deque[Piece]] = []
    reduced_later: set[nn.Module] = set()
    for recording, given in zip(reversed(recordings), reversed(grads)):
        active = any(grad is not None for grad in given)
        queue = deque(piece for piece in recording.pieces if piece.trains and active)
        if queue:
            modules = [m for m in recording.wrapped if isinstance(m, FSDPModule) and m not in reduced_later]
            queue[-1].reduce = tuple(module for module in modules if reduces_now(module))
            reduced_later.update(modules)  # type: ignore[arg-type]
        recording.spent = True
        queues.append(queue)
    return queues[::-1]


def _replay_next(
    recording: Recording, queue: deque[Piece], grads: list[Tensor | None], differences: list[Tensor]
) -> None:
    piece, tower = queue.popleft(), recording.tower
    local = [module for module in recording.wrapped if module not in piece.reduce]
    with recording.autocast.apply(), no_reduction(local):
        outputs, piece.outputs = piece.outputs, None  # a kept graph is freed by its backward pass
        if outputs is None:
            # 1. The forward pass again, with a graph, from the state of its recording.
            if piece.random is not None:
                piece.random.restore()
                tower.facts.written.restore(piece.written)
            if queue and queue[0].outputs is None:
                tower.slicer.prepare(queue[0].rows)
            outputs, error = unless_out_of_memory(partial(tower.embed, piece.rows))
            if outputs is None:
                _split(recording, queue, piece, error)
                return
            differences.append(_difference(outputs, recording.leaves, piece))
        # 2. The backward pass.
        with without_autocast():
            _, error = unless_out_of_memory(partial(_backward, outputs, grads, piece.rows))
    if error is not None:
        recording.record_out_of_memory(piece.rows)
        incomplete = "The gradients of this step are incomplete: set them to zero."
        raise AnybatchError(
            f"Out of memory in the backward pass of a mini-batch of {len(piece.rows)} rows. "
            f"{incomplete if tower.sharded else UNCHANGED} {NEXT_STEP}, memory or keep_graphs."
        ) from error


def _split(recording: Recording, queue: deque[Piece], piece: Piece, error: BaseException | None) -> None:
    """Put the two halves of a replay that did not fit in front of the queue."""
    recording.refuse_if_sharded(piece.rows, error)
    if piece.drew:
        recording.record_out_of_memory(piece.rows)
        raise AnybatchError(
            f"Out of memory while replaying a mini-batch of {len(piece.rows)} rows, which cannot be split now: its "
            f"random numbers (dropout) belong to the whole. {UNCHANGED} {NEXT_STEP}."
        ) from error
    halves = recording.split(piece.rows, error)
    queue.extendleft(Piece(rows=rows, drew=False, trains=True, dtypes=piece.dtypes) for rows in reversed(halves))


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
            "The encoder uses what an earlier forward pass computed from its parameters (weights kept in a dictionary, "
            "a parametrization under torch.nn.utils.parametrize.cached()), and one backward pass has used it up. "
            f"Compute it in each forward pass. {UNCHANGED}"
        ) from error


@torch.no_grad()
def _difference(outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...], piece: Piece) -> Tensor:
    """How far a replay is from its recording, over what rounding allows. On the device: it is read once per step."""
    dtypes = tuple(output.dtype for output in outputs)
    if dtypes != piece.dtypes:
        raise AnybatchError(
            f"The encoder returned {piece.dtypes} when it was recorded and {dtypes} in its replay, with gradients."
        )
    return relative_difference(outputs, [leaf.detach().index_select(0, piece.rows.to(leaf.device)) for leaf in leaves])


def _refuse_different(differences: Sequence[Tensor], too_large: Sequence[str]) -> None:
    """A compiler may draw in its own way in one graph and not in the other; generators may be out of sight."""
    devices = dict.fromkeys(difference.device for difference in differences)
    largest = (float(torch.stack([d for d in differences if d.device == device]).max()) for device in devices)
    difference = max(largest, default=0.0)
    if difference > 1:
        names = ", ".join(too_large[:3])
        named = f" It writes to {names}, too large to be kept for every mini-batch." if names else ""
        raise AnybatchError(
            f"A replay differs from its recording by {difference:.1f} times what rounding allows: the encoder drew "
            f"other random numbers (dropout), or something else that it depends on has changed.{named} Replayed are "
            "the global generators of torch, NumPy and Python, generator objects that the encoder visibly holds, "
            "buffers and numbers of its modules: keep such state there. If the encoder is compiled, set "
            "torch._inductor.config.fallback_random = True before compiling, and torch._dynamo.config.recompile_limit "
            "to more than twice the number of shapes (dynamic=True keeps them few), or use keep_graphs=1.0. "
            f"{UNCHANGED}"
        )


def _checked_grads(recording: Recording, given: Sequence[Tensor | None], scale: Tensor | float) -> list[Tensor | None]:
    if recording.spent:
        raise AnybatchError("This recording was already back-propagated; record the batch again for another pass.")
    if len(given) != len(recording.leaves):
        raise AnybatchError(f"{len(given)} gradients for {len(recording.leaves)} leaves; give one for each, or None.")
    for grad, leaf in zip(given, recording.leaves):
        if grad is not None and grad.shape != leaf.shape:
            raise AnybatchError(f"A gradient of shape {tuple(grad.shape)} for a leaf of shape {tuple(leaf.shape)}.")
    return [None if grad is None else grad.detach() * scale for grad in given]
