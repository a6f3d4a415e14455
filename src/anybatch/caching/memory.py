"""How much memory the kept graphs may take, and what to do when it runs out."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from anybatch.caching.device_memory import is_out_of_memory, memory_in_use, parse_memory, total_memory
from anybatch.caching.rows import RowSlicer
from anybatch.core import distributed
from anybatch.core.errors import AnybatchError

LEAF_COPIES = 6  # tensors of the embeddings' size at the loss's peak: see `leaf_bytes`


class GraphBudget:
    """Keeps graphs while they fit: all of them for a small batch (plain training), the first few for a large one.

    The tensors that autograd saves for each micro-batch are counted (each storage once, parameters and what a kept graph
    holds already not). The next micro-batch is no longer than the last, so its bytes for each padded token are no more:

        predicted = bytes measured last * padded tokens / padded tokens measured last
        keep if in use + reserve + leaves + kept + predicted + the largest graph (a replay's working set) <= memory

    Args:
        memory: The most memory in use on the device, parameters, optimiser and other processes included: "8GiB", "80%",
            or bytes.
        device: Whose memory.
        reserve: Bytes set aside for what comes later in the step (gradients of the parameters, the loss's tiles).
        num_rows: Rows of the whole step, all towers together: when the first embeddings show how wide they are, `LEAF_COPIES` times the bytes of
            all of them are set aside as well.
        most: The most bytes of kept graphs, where an earlier step has shown it.
        modules: Their parameters and buffers are there anyway and are not counted.

    One object serves all recordings of a step. Make a new one for every step (`StepMemory` does).

    Attributes:
        spent: Bytes of the graphs kept so far.
        largest: Bytes of the largest graph measured.
        leaves: Bytes set aside for the embeddings of all rows and what the loss makes of them; 0 before the first ones are seen.
        overrun: Whether memory ran out beside the kept graphs, in spite of the prediction.

    Cost: one Python call for each tensor that autograd saves.
    """

    def __init__(
        self,
        memory: str | int = "80%",
        *,
        device: torch.device | str = "cpu",
        reserve: int = 0,
        num_rows: int = 0,
        most: int | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self.device = torch.device(device)
        self.limit = parse_memory(memory, total_memory(self.device))
        self.start = memory_in_use(self.device) + reserve
        self.num_rows = num_rows
        self.leaves = 0
        self.most = most
        self.spent = self.largest = 0
        self.overrun = False
        self._bytes_per_token = 0.0
        self._measured: weakref.ref[RowSlicer] | None = (
            None  # the tower that the ratio belongs to; its inputs are not kept alive
        )
        self._last: dict[int, int] = {}  # storages of the last graph measured
        # Storages that cost nothing more: parameters, and what kept graphs hold. They are alive, so no address comes twice.
        self._there = {
            tensor.untyped_storage().data_ptr()
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
            if not is_traceable_wrapper_subclass(tensor)
        }

    def has_room(self, slicer: RowSlicer, rows: Tensor) -> bool:
        """Whether the graph of these rows fits beside what is kept and one working set; no before a measurement."""
        if self._measured is None or self._measured() is not slicer:
            return False
        return self._fits(int(self._bytes_per_token * padded_tokens(slicer, rows)))

    def keep_last(self) -> bool:
        """Note that the graph measured last is kept, if it fits; whether it does."""
        size = sum(self._last.values())
        if not self._fits(size):
            return False
        self.spent += size
        self._there |= self._last.keys()
        return True

    def note_embeddings(self, outputs: Sequence[Tensor]) -> None:
        """Set memory aside for the embeddings of the whole step, now that some are there. Ranks share each other's."""
        rows = self.num_rows * distributed.world_size()
        self.leaves = max(self.leaves, leaf_bytes(outputs, rows))

    @contextlib.contextmanager
    def measure(self, slicer: RowSlicer, rows: Tensor) -> Iterator[None]:
        """Count the bytes that autograd saves inside."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            if not is_traceable_wrapper_subclass(
                tensor
            ):  # such a tensor (sharded, quantised) has no storage of its own
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            # Not the tensor itself: an output that its own node saves would hold the graph, and a graph that is dropped would never be freed.
            return tensor.detach(), tensor._version

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
        self._last = {place: size for place, size in sizes.items() if place not in self._there}
        self.largest = max(self.largest, sum(self._last.values()))
        self._bytes_per_token = sum(self._last.values()) / padded_tokens(slicer, rows)
        self._measured = weakref.ref(slicer)

    def _fits(self, size: int) -> bool:
        if self.overrun or (self.most is not None and self.spent + size > self.most):
            return False
        return self.start + self.leaves + self.spent + size + max(self.largest, size) <= self.limit


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    """The saved tensor; autograd's own check of its version rests where there are hooks."""
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
            f"{tuple(tensor.shape)} is at version {tensor._version}; expected version {version}. Use the operation that is not in place in the encoder."
        )
    return tensor


def leaf_bytes(outputs: Sequence[Tensor], num_rows: int) -> int:
    """Bytes that embeddings like these, of `num_rows` rows, and what the loss makes of them need at once.

        LEAF_COPIES * num_rows * sum over the outputs of elements a row * bytes of float32 (float64 for float64)

    The copies are the leaf, its gradient, and in the loss the candidates in one piece, the normalised rows and gradients on their way.
    """
    a_row = sum(
        math.prod(output.shape[1:]) * torch.promote_types(output.dtype, torch.float32).itemsize for output in outputs
    )
    return LEAF_COPIES * num_rows * a_row


class Attempt:
    """What came out of a block: a result, or the error that said memory had run out."""

    result: Any = None
    error: BaseException | None = None


@contextlib.contextmanager
def out_of_memory_as_none() -> Iterator[Attempt]:
    """Swallow an out-of-memory error of the block, leaving `result` at None. Any other error passes."""
    attempt = Attempt()
    try:
        yield attempt
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        # The traceback would keep the failed pass's tensors alive.
        attempt.result, attempt.error = None, error.with_traceback(None)
    if attempt.error is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def warn_split(
    slicer: RowSlicer, rows: Tensor, error: BaseException | None, on_split: Callable[[int], None] | None
) -> list[Tensor]:
    """The two halves of a micro-batch that did not fit; `on_split` is told their padded tokens.

    Raises:
        AnybatchError: It has one row only.
    """
    if len(rows) == 1:
        raise AnybatchError(
            "Out of memory with a single row in the micro-batch: the encoder does not fit with its longest input. "
            "Shorten the inputs, use gradient checkpointing inside the encoder, or a smaller model."
        ) from error
    halves = list(rows.tensor_split(2))
    warnings.warn(
        f"Out of memory with a micro-batch of {len(rows)} rows ({padded_tokens(slicer, rows)} padded tokens): split into "
        f"{len(halves[0])} and {len(halves[1])}. Lower micro_batch or max_tokens to avoid the failed attempts.",
        stacklevel=2,
    )
    if on_split is not None:
        on_split(max(padded_tokens(slicer, half) for half in halves))
    return halves


def sharded_out_of_memory(rows: Tensor) -> AnybatchError:
    """Why a micro-batch of a sharded encoder is not split."""
    return AnybatchError(
        f"Out of memory with a micro-batch of {len(rows)} rows of a sharded encoder (fully_shard), which cannot be split now: the "
        "other ranks take part in each of its passes. Lower micro_batch, max_tokens or keep_graphs on all ranks."
    )


def padded_tokens(slicer: RowSlicer, rows: Tensor) -> int:
    """Padded tokens of a micro-batch; rows, where there are no lengths."""
    return len(rows) * (max(1, int(slicer.lengths[rows].max())) if slicer.lengths is not None else 1)
