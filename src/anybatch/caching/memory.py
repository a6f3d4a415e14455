"""How much memory the kept graphs may take, and what to do when it runs out."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from anybatch.caching.rows import RowSlicer
from anybatch.errors import AnybatchError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_memory(memory: str | int, total: int) -> int:
    """Bytes of `"8GiB"`, `"500MB"`, `"80%"` (of `total` bytes) or a plain number.

    Raises:
        AnybatchError: Not one of these forms, zero, or more than 100%.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", str(memory), flags=re.IGNORECASE)
    unit = match.group(2).upper() if match else None
    if match is None or (unit != "%" and unit not in _UNITS):
        raise AnybatchError(f'memory is {memory!r}; write it as "8GiB", "500MB", "80%" or a number of bytes.')
    number = float(match.group(1))
    if number == 0 or (unit == "%" and number > 100):
        raise AnybatchError(f"memory is {memory!r}; it must be above zero and at most 100%.")
    return int(total * number / 100) if unit == "%" else int(number * _UNITS[str(unit)])


class GraphBudget:
    """Keeps graphs while they fit: all of them for a small batch (plain training), the first few for a large one.

    The tensors that autograd saves for the first micro-batch are counted (each storage once, parameters not). Later
    micro-batches are no longer than that one, so bytes for each row and token stay below the measured ratio:

        predicted = measured bytes * padded tokens / padded tokens measured
        keep if in use + predicted + one more of the largest kind (the replay's working set) <= memory

    Args:
        memory: The most memory in use on the device, parameters and optimiser included: "8GiB", "80%", or bytes.
        device: Whose memory. On CUDA "in use" is what torch has allocated; on the CPU it is the process's resident set.

    One object serves all recordings of a step. Make a new one for every step.

    Cost: one Python call for each tensor saved in the first micro-batch.
    """

    def __init__(self, memory: str | int = "80%", *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.limit = parse_memory(memory, _total_memory(self.device))
        self.start = _memory_in_use(self.device)
        self.spent = 0
        self.largest = 0  # bytes of the largest graph predicted or measured
        self._bytes_per_token = 0.0

    def has_room(self, slicer: RowSlicer, rows: Tensor) -> bool:
        """Whether the graph of these rows fits beside what is kept and one working set. Unknown before a measurement: no."""
        if self._bytes_per_token == 0.0:
            return False
        predicted = self._predict(slicer, rows)
        return self.start + self.spent + predicted + max(self.largest, predicted) <= self.limit

    def spend(self, slicer: RowSlicer, rows: Tensor) -> None:
        """Note that the graph of these rows is kept."""
        self.spent += self._predict(slicer, rows)

    @contextlib.contextmanager
    def measure(self, slicer: RowSlicer, rows: Tensor) -> Iterator[None]:
        """Count the bytes that autograd saves inside, unless an earlier measurement covers these rows."""
        tokens = _tokens(slicer, rows)
        if self._bytes_per_token and self._predict(slicer, rows) <= self.largest:
            yield
            return
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not (tensor.is_leaf and tensor.requires_grad):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self._bytes_per_token = max(self._bytes_per_token, sum(sizes.values()) / tokens)
        self.largest = max(self.largest, sum(sizes.values()))

    def _predict(self, slicer: RowSlicer, rows: Tensor) -> int:
        return int(self._bytes_per_token * _tokens(slicer, rows))


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
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        # The traceback would keep the failed pass's tensors alive.
        attempt.result, attempt.error = None, error.with_traceback(None)
    if attempt.error is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def warn_split(rows: Tensor, error: BaseException | None) -> list[Tensor]:
    """The two halves of a micro-batch that did not fit.

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
        f"Out of memory with a micro-batch of {len(rows)} rows: it was split into {len(halves[0])} and {len(halves[1])}. "
        "Lower micro_batch or max_tokens to avoid the failed attempts.",
        stacklevel=2,
    )
    return halves


def _tokens(slicer: RowSlicer, rows: Tensor) -> int:
    """Padded tokens of a micro-batch; rows, where there are no lengths."""
    return len(rows) * (max(1, int(slicer.lengths[rows].max())) if slicer.lengths is not None else 1)


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    raise AnybatchError(
        f"The memory of a {device.type} device cannot be read; give keep_graphs a number instead of 'auto'."
    )


def _memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError as error:
        raise AnybatchError(
            "The memory this process uses cannot be read on this system; give keep_graphs a number instead of 'auto'."
        ) from error
