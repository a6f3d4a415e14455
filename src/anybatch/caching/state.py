"""What a forward pass depends on besides its inputs: random number generators, buffers that it writes, autocast, training mode.

Captured when a micro-batch is recorded, put back when it is replayed.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from anybatch.core.errors import AnybatchError

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
LARGEST_BUFFER = (
    2**24
)  # bytes; what forward passes write into is small, and a replay that depends on more is found out by comparison
_written_parameters = WeakTensorKeyDictionary()  # frozen ones that a forward pass was seen to write to
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class RandomState:
    """The states of all generators that a forward pass may draw from.

    torch's: CPU, and every CUDA, XPU and MPS device in use (all of an initialised backend, because an encoder may use others than its inputs do);
    Python's `random`; NumPy's global one; and the generator objects given, of any of the three libraries (see `generators_of`).

    Cost: copies of 13 kB and a few bytes a device, 50 microseconds; no synchronisation.
    """

    def __init__(self, generators: Iterable[Generator] = ()) -> None:
        self.cpu: Tensor = torch.get_rng_state()
        self.cuda: list[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        xpu = getattr(torch, "xpu", None)
        self.xpu: list[Tensor] = xpu.get_rng_state_all() if xpu is not None and xpu.is_initialized() else []
        self.mps: Tensor | None = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self.python = random.getstate()
        self.numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        self.objects = [(generator, _state_of(generator)) for generator in generators]

    def restore(self) -> None:
        """Put every generator back to the captured state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.xpu:
            torch.xpu.set_rng_state_all(self.xpu)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        for generator, state in self.objects:
            _put_state(generator, state)

    def now(self) -> RandomState:
        """The present states of the same generators."""
        return RandomState([generator for generator, _ in self.objects])

    def equals(self, other: RandomState) -> bool:
        """Whether no random number was drawn between the two captures."""
        return all(_same(mine, theirs) for mine, theirs in zip(self._states(), other._states(), strict=True))

    def _states(self) -> list[Any]:
        return [self.cpu, self.cuda, self.xpu, self.mps, self.python, self.numpy, [state for _, state in self.objects]]


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state(legacy=False)


def _put_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return isinstance(theirs, Tensor) and torch.equal(mine, theirs)
    if isinstance(mine, np.ndarray):
        return np.array_equal(mine, theirs)
    if isinstance(mine, dict):
        return all(_same(value, theirs[key]) for key, value in mine.items())
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(_same(*pair) for pair in zip(mine, theirs))
    return mine == theirs


@dataclass
class _Buffer:
    """A buffer, and what was in it at one moment."""

    tensor: Tensor
    version: int
    content: Tensor | None  # None for a large one


class WrittenState:
    """Buffers, plain numbers and frozen parameters, watched for what a forward pass writes: counters, running averages, power iterations, teachers.

    `note` after every forward pass finds what it wrote; `snapshot` before one, and `restore` with it later, bring back what was there.

    Frozen parameters are many and seldom written: copied from the moment that one is about to be written (`before_write`), or has been.

    Cost: a copy of each buffer up to `LARGEST_BUFFER`, once; a comparison of versions and numbers, 50 nanoseconds each, a forward pass; copies of what is
    written.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        self.paths: list[str] = []  # of the modules that hold them
        self.frozen: list[tuple[dict[str, Any], str, str, int]] = []  # with their paths and versions
        for root in modules:
            for path, child in root.named_modules():
                holder = vars(child)
                self.places += [
                    (holder, key) for key, value in holder.items() if type(value) in (int, float) and key != "training"
                ]
                if child._buffers:
                    self.places += [(child._buffers, key) for key in child._buffers]
                self.paths += [path] * (len(self.places) - len(self.paths))
                self.frozen += [
                    (child._parameters, key, path, value._version)
                    for key, value in child._parameters.items()
                    if value is not None
                    and not (value.requires_grad or value.is_inference() or is_traceable_wrapper_subclass(value))
                ]
        self.values: dict[int, Any] = {place: _kept(holder[key]) for place, (holder, key) in enumerate(self.places)}
        self.first: dict[int, Any] = {}  # what was there before the first forward pass that wrote to it
        self.frozen_bytes = 0  # of those that are watched
        for holder, key, path, _ in self.frozen:
            if holder[key] in _written_parameters:
                self._watch(holder, key, path)

    @property
    def large(self) -> list[str]:
        """The names of written buffers that are too large to be brought back."""
        large = [place for place, kept in self.first.items() if isinstance(kept, _Buffer) and kept.content is None]
        return [f"{self.paths[place]}.{self.places[place][1]}".lstrip(".") for place in large]

    def now(self) -> dict[int, Any]:
        """A snapshot of the present, after `close` too."""
        return {place: _kept(holder.get(key)) for place in self.first for holder, key in [self.places[place]]}

    def note(self) -> bool:
        """Take down what the last forward pass has written; whether it wrote."""
        wrote = False
        for place, old in self.values.items():
            holder, key = self.places[place]
            now = holder.get(key)
            if now is not old and not _unchanged(old, now):
                self.first.setdefault(place, old)
                behind = isinstance(now, nn.Parameter) and now in _written_parameters
                self.values[place] = replace(_kept(now), version=-1) if behind else _kept(now)
                wrote = True
        return wrote

    def before_write(self, tensors: Iterable[Tensor]) -> None:
        """Keep what is in those of the frozen parameters that `tensors` are, or share memory with, and that are not watched yet.

        Raises:
            AnybatchError: They are too large to be kept for every micro-batch.
        """
        for tensor in tensors:
            if not tensor.requires_grad and self.frozen and not is_traceable_wrapper_subclass(tensor):
                memory = tensor.untyped_storage()._cdata
                for holder, key, path, _ in self.frozen:
                    if holder[key] not in _written_parameters and holder[key].untyped_storage()._cdata == memory:
                        self._watch(holder, key, path)

    def _watch(self, holder: dict[str, Any], key: str, path: str) -> None:
        self.frozen_bytes += holder[key].numel() * holder[key].element_size()
        if self.frozen_bytes > LARGEST_BUFFER:
            raise AnybatchError(
                f"The forward pass writes to {path}.{key}, a parameter that does not train, and what it so writes is too large to be brought back for every "
                "micro-batch. Update it (the moving average of a teacher) after the step, outside the forward pass."
            )
        _written_parameters[holder[key]] = True
        self.places.append((holder, key))
        self.paths.append(path)
        # Writes through `.data` move no version, so that it always counts as written.
        self.values[len(self.places) - 1] = replace(_kept(holder[key]), version=-1)

    def close(self) -> None:
        """Let go of what was never written."""
        for holder, key, path, version in self.frozen:
            if holder[key]._version != version and holder[key] not in _written_parameters:
                # Too late for what was there before: the replays start from what is there now, and leave it.
                self.places.append((holder, key))
                self.paths.append(path)
                place = len(self.places) - 1
                self.first[place] = self.values[place] = _kept(holder[key])
        self.frozen = []
        self.values = {place: self.values[place] for place in self.first}

    def snapshot(self) -> dict[int, Any]:
        """What is there now, of all that was ever written."""
        return {place: self.values[place] for place in self.first}

    def restore(self, snapshot: dict[int, Any]) -> None:
        """Bring back a snapshot; what was written only later gets what was there at first."""
        for place, first in self.first.items():
            holder, key = self.places[place]
            value = snapshot.get(place, first)
            if isinstance(value, _Buffer):
                holder[key] = value.tensor
                if value.content is not None and value.tensor._version != value.version:
                    with torch.no_grad():
                        value.tensor.copy_(value.content)
            else:
                holder[key] = value


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_inference() or is_traceable_wrapper_subclass(value):
        return value
    small = value.numel() * value.element_size() <= LARGEST_BUFFER
    return _Buffer(value, value._version, value.detach().clone() if small else None)


def _unchanged(old: Any, now: Any) -> bool:
    if isinstance(old, _Buffer):
        return now is old.tensor and now._version == old.version
    return type(now) is type(old) and not isinstance(now, Tensor) and bool(now == old)


class AutocastState:
    """Autocast as the caller had it, for every device type: enabled, dtype, and whether casts are cached."""

    def __init__(self) -> None:
        self.cache = torch.is_autocast_cache_enabled()
        self.devices: list[tuple[str, bool, torch.dtype]] = []
        for device in _AUTOCAST_DEVICES:
            # A device type that this build of torch lacks has no autocast state.
            with contextlib.suppress(RuntimeError):
                enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
                self.devices.append((device, enabled, dtype))

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """Run with the captured settings, whatever the surroundings are."""
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.devices:
                # Only what differs is entered: autocast warns about dtypes and devices that it cannot serve.
                if torch.is_autocast_enabled(device) == enabled and (
                    not enabled or torch.get_autocast_dtype(device) == dtype
                ):
                    continue
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Backward formulas must run in the dtypes that the forward pass chose, not be cast a second time."""
    with contextlib.ExitStack() as stack:
        for device in _AUTOCAST_DEVICES:
            with contextlib.suppress(RuntimeError):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        yield


class ModeState:
    """The training flag of every submodule.

    Cost: one walk over the modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.flags = {child: child.training for module in modules for child in module.modules()}

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """Run with the captured flags and put the present ones back afterwards."""
        present = [(child, child.training) for child, flag in self.flags.items() if child.training != flag]
        try:
            for child, flag in present:
                child.training = not flag
            yield
        finally:
            for child, flag in present:
                child.training = flag
