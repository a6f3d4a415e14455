"""How much memory a device has, how much of it is taken, and what is done when it runs out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CGROUP = Path("/sys/fs/cgroup")
Result = TypeVar("Result")


def parse_memory(memory: str | int, total: int) -> int:
    """Bytes of `"8GiB"`, `"500MB"`, `"80%"` (of `total` bytes) or a plain number; else an AnybatchError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", str(memory), flags=re.IGNORECASE)
    unit = match.group(2).upper() if match else None
    if match is None or (unit != "%" and unit not in _UNITS):
        raise AnybatchError(f'memory is {memory!r}; write it as "8GiB", "500MB", "80%" or a number of bytes.')
    number = float(match.group(1))
    if number == 0 or (unit == "%" and number > 100):
        raise AnybatchError(f"memory is {memory!r}; it must be above zero and at most 100%.")
    return int(total * number / 100) if unit == "%" else int(number * _UNITS[str(unit)])


def total_memory(device: torch.device) -> int:
    """Bytes of the device; on the CPU those of the machine, or of its container where that has fewer."""
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "mem_get_info"):  # CUDA (and ROCm), XPU
        return backend.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type == "cpu":
        return min(psutil.virtual_memory().total, _container_limit() or 2**63)
    raise AnybatchError(
        f"The memory of a {device.type} device cannot be read. Give mini_batch_size and keep_graphs numbers."
    )


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process cannot have: its own tensors, and whatever others hold on the device."""
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "mem_get_info"):
        free, total = backend.mem_get_info(device)
        # What torch has reserved and not handed out is free to us.
        return total - free - (backend.memory_reserved(device) - backend.memory_allocated(device))
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    if _container_limit() is None:
        memory = psutil.virtual_memory()
        return memory.total - memory.available
    current = int((_CGROUP / "memory.current").read_text())
    caches = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), flags=re.MULTILINE)
    return current - (int(caches.group(1)) if caches else 0)


def _container_limit() -> int | None:
    try:
        return int((_CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no such file; "max"
        return None


def device_of(places: Sequence[object]) -> torch.device:
    """The first device of modules and inputs that is not the CPU, else the CPU."""
    for place in places:
        held = place.parameters() if isinstance(place, nn.Module) else [place]
        for value in place.values() if isinstance(place, Mapping) else held:
            if isinstance(value, Tensor) and value.device.type != "cpu":
                return value.device
    return torch.device("cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU that is a plain RuntimeError of the allocator."""
    by_allocator = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return by_allocator or isinstance(error, torch.OutOfMemoryError)


def unless_out_of_memory(work: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    """What `work` returns, and None; or None, and the error that says that memory ran out. Other errors pass."""
    try:
        return work(), None
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        failure = error.with_traceback(None)  # which would keep the failed pass's tensors alive
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None, failure
