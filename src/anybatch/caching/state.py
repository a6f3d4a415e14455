"""What a forward pass depends on besides its inputs: random numbers, what earlier passes wrote, autocast, modes."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from anybatch.core.errors import AnybatchError

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
# Bytes. What forward passes write to is small, and a replay that depends on more is found out by comparison.
LARGEST_BUFFER = 2**24
_written_parameters = WeakTensorKeyDictionary()  # frozen ones that a forward pass was seen to write to
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class RandomState:
    """The states of all generators that a forward pass may draw from: torch's, Python's, NumPy's, and those given."""

    def __init__(self, generators: Iterable[Generator] = ()) -> None:
        self.generators = tuple(generators)
        self._states = [(put, get()) for get, put in _sources(self.generators)]

    def restore(self) -> None:
        """Put every generator back to the captured state."""
        for put, state in self._states:
            put(state)

    def now(self) -> RandomState:
        """The present states of the same generators."""
        return RandomState(self.generators)

    def equals(self, other: RandomState) -> bool:
        """Whether no random number was drawn between the two captures."""
        return _same([state for _, state in self._states], [state for _, state in other._states])


def _sources(generators: Iterable[Generator]) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How the state of each generator is read, and how it is set."""
    yield torch.get_rng_state, torch.set_rng_state
    for backend in (torch.cuda, getattr(torch, "xpu", None)):  # all devices: an encoder may use others than its inputs
        if backend is not None and backend.is_initialized():
            yield backend.get_rng_state_all, backend.set_rng_state_all
    if torch.backends.mps.is_available():
        yield torch.mps.get_rng_state, torch.mps.set_rng_state
    yield random.getstate, random.setstate
    yield partial(np.random.get_state, legacy=False), np.random.set_state
    for generator in generators:
        if isinstance(generator, torch.Generator):
            yield generator.get_state, generator.set_state
        elif isinstance(generator, random.Random):
            yield generator.getstate, generator.setstate
        elif isinstance(generator, np.random.Generator):
            bits: Any = generator.bit_generator
            yield lambda bits=bits: copy.deepcopy(bits.state), partial(setattr, bits, "state")
        else:
            yield partial(generator.get_state, legacy=False), generator.set_state


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, np.ndarray):
        return np.array_equal(mine, theirs)
    if isinstance(mine, dict):
        return all(_same(value, theirs[key]) for key, value in mine.items())
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return mine == theirs


class Place(NamedTuple):
    """Where a value is kept that forward passes may write to."""

    holder: dict[str, Any]  # attributes, buffers or parameters of a module
    key: str
    path: str  # of the module

    @property
    def name(self) -> str:
        """As in `named_parameters`."""
        return f"{self.path}.{self.key}".lstrip(".")


class _Content(NamedTuple):
    """A tensor, and what was in it at one moment."""

    tensor: Tensor
    version: int
    content: Tensor | None  # None for a large one


class WrittenState:
    """Numbers and buffers (`places`) and frozen parameters, watched for what forward passes write.

    `update` after every forward pass finds what it wrote (counters, running averages, teachers); `snapshot` before one,
    and `restore` with it later, bring back what was there. Frozen parameters are many and seldom written: they are
    copied from the moment that one is about to be written (`before_write`), or has been in an earlier step.
    """

    def __init__(self, places: Iterable[Place] = (), frozen: Iterable[Place] = ()) -> None:
        self.places = list(places)
        self.values: dict[int, Any] = {n: _kept(place.holder[place.key]) for n, place in enumerate(self.places)}
        self.first: dict[int, Any] = {}  # what was there before the first forward pass that wrote to it
        values = ((place, place.holder[place.key]) for place in frozen)
        self._frozen = [(place, value._version) for place, value in values if not _unreadable(value)]
        self._watched_bytes = 0  # of frozen parameters
        for place, _ in self._frozen if _written_parameters else ():
            if place.holder[place.key] in _written_parameters:
                self._watch(place)

    @property
    def too_large(self) -> list[str]:
        """The names of written buffers that are too large to be brought back."""
        kept = self.first.items()
        return [self.places[n].name for n, value in kept if isinstance(value, _Content) and value.content is None]

    def update(self) -> bool:
        """Take down what the last forward pass has written; whether it wrote."""
        wrote = False
        for number, old in self.values.items():
            holder, key, _ = self.places[number]
            value = holder.get(key)
            if value is not old and not _unchanged(old, value):
                self.first.setdefault(number, old)
                frozen = isinstance(value, nn.Parameter) and value in _written_parameters
                self.values[number] = _kept(value)._replace(version=-1) if frozen else _kept(value)
                wrote = True
        return wrote

    def before_write(self, tensors: Iterable[Tensor]) -> None:
        """Start to watch those of the frozen parameters that `tensors` are, or share memory with."""
        for tensor in tensors:
            if not tensor.requires_grad and self._frozen and not is_traceable_wrapper_subclass(tensor):
                memory = tensor.untyped_storage()._cdata
                for place, _ in self._frozen:
                    parameter = place.holder[place.key]
                    if parameter not in _written_parameters and parameter.untyped_storage()._cdata == memory:
                        self._watch(place)

    def _watch(self, place: Place) -> None:
        parameter = place.holder[place.key]
        self._watched_bytes += parameter.numel() * parameter.element_size()
        if self._watched_bytes > LARGEST_BUFFER:
            raise AnybatchError(
                f"The forward pass writes to {place.name}, a parameter that does not train and is too large to be "
                "brought back for every mini-batch. Update it (the moving average of a teacher) after the step."
            )
        _written_parameters[parameter] = True
        # Writes through `.data` move no version, so that it always counts as written.
        self.values[len(self.places)] = _kept(parameter)._replace(version=-1)
        self.places.append(place)

    def close(self) -> None:
        """Let go of what was never written."""
        for place, version in self._frozen:
            parameter = place.holder[place.key]
            if parameter._version != version and parameter not in _written_parameters:
                # Too late for what was there before: the replays start from what is there now, and leave it.
                self.first[len(self.places)] = self.values[len(self.places)] = _kept(parameter)
                self.places.append(place)
        self._frozen = []
        self.values = {number: self.values[number] for number in self.first}

    def snapshot(self) -> dict[int, Any]:
        """What was there after the last `update`, of all that was ever written."""
        return {number: self.values[number] for number in self.first}

    def now(self) -> dict[int, Any]:
        """A snapshot of the present."""
        return {number: _kept(self.places[number].holder.get(self.places[number].key)) for number in self.first}

    def restore(self, snapshot: dict[int, Any]) -> None:
        """Bring back a snapshot; what was written only later gets what was there at first."""
        for number, first in self.first.items():
            holder, key, _ = self.places[number]
            value = snapshot.get(number, first)
            if isinstance(value, _Content):
                holder[key] = value.tensor
                if value.content is not None and value.tensor._version != value.version:
                    with torch.no_grad():
                        value.tensor.copy_(value.content)
            else:
                holder[key] = value


def _unreadable(tensor: Tensor) -> bool:
    """Tensors without versions, or without a storage of their own (sharded, quantised)."""
    return tensor.is_inference() or is_traceable_wrapper_subclass(tensor)


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor) or _unreadable(value):
        return value
    small = value.numel() * value.element_size() <= LARGEST_BUFFER
    return _Content(value, value._version, value.detach().clone() if small else None)


def _unchanged(old: Any, value: Any) -> bool:
    if isinstance(old, _Content):
        return value is old.tensor and value._version == old.version
    return type(value) is type(old) and not isinstance(value, Tensor) and bool(value == old)


class AutocastState:
    """Autocast as the caller had it, for every device type: enabled, dtype, and whether casts are cached."""

    def __init__(self) -> None:
        self.cache = torch.is_autocast_cache_enabled()
        self.devices: list[tuple[str, bool, torch.dtype]] = []
        for device in _AUTOCAST_DEVICES:
            with contextlib.suppress(RuntimeError):  # this build of torch lacks the device type
                self.devices.append((device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """Run with the captured settings, whatever the surroundings are."""
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.devices:
                same = torch.is_autocast_enabled(device) == enabled
                # Only what differs is entered: autocast warns about dtypes and devices that it cannot serve.
                if not same or (enabled and torch.get_autocast_dtype(device) != dtype):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            yield


def without_autocast() -> contextlib.AbstractContextManager[None]:
    """Backward formulas must run in the dtypes that the forward pass chose, not be cast a second time."""
    state = AutocastState()
    state.devices = [(device, False, dtype) for device, _, dtype in state.devices]
    return state.apply()


@contextlib.contextmanager
def training_modes(flags: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Run with these training flags, and put the present ones back afterwards."""
    others = {module: flag for module, flag in flags.items() if module.training != flag}
    try:
        for module, flag in others.items():
            module.training = flag
        yield
    finally:
        for module, flag in others.items():
            module.training = not flag


@contextlib.contextmanager
def untouched(modules: Iterable[nn.Module], random: RandomState | None = None) -> Iterator[None]:
    """Begin without gradients; undo at the end what happens to gradients, buffers, modes and generators (`random`)."""
    random = RandomState() if random is None else random
    flags = {part: part.training for module in modules for part in module.modules()}
    grads = {parameter: parameter.grad for part in flags for parameter in part.parameters(recurse=False)}
    buffers = [(part._buffers, dict(part._buffers)) for part in flags]  # some are replaced, such as a queue that grows
    contents = [(b, b.clone()) for _, held in buffers for b in held.values() if b is not None]
    for parameter in grads:
        parameter.grad = None
    try:
        yield
    finally:
        random.restore()
        for part, flag in flags.items():
            part.training = flag
        for parameter, grad in grads.items():
            parameter.grad = grad
        for holder, held in buffers:
            holder.clear()
            holder.update(held)
        with torch.no_grad():
            for buffer, before in contents:
                buffer.copy_(before)
