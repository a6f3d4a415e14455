"""Whether a row's embedding depends on the rows beside it, or on its padding: what goes in twice tells."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anybatch.caching.device_memory import is_out_of_memory, unless_out_of_memory
from anybatch.caching.encoder import Tower
from anybatch.caching.ranks import on_any_rank
from anybatch.caching.spans import Trim
from anybatch.caching.state import WrittenState, training_modes
from anybatch.core.errors import AnybatchError

MOST_ANSWERS = 64  # of one model and question
_WORDS = (str, int, float, type(None))
_NO_MODULE = nn.Module()  # stands for those of encoders whose modules are not found
# For each module: what was found by each question (the function that asks), by encoder and form of inputs.
_found: WeakKeyDictionary[nn.Module, dict[Any, dict[Any, Any]]] = WeakKeyDictionary()
Answer = TypeVar("Answer")


def rounding_of(tensor: Tensor) -> float:
    """How far rounding alone takes two computations of an embedding apart, relative to it: of the coarsest dtype."""
    dtypes = {tensor.dtype}
    if torch.is_autocast_enabled(tensor.device.type):
        dtypes.add(torch.get_autocast_dtype(tensor.device.type))
    half = max((4 * torch.finfo(dtype).eps for dtype in dtypes if torch.finfo(dtype).bits < 32), default=0.0)
    if torch.float32 in dtypes:  # off the CPU its matrix products may be TF32
        return max(half, 1e-4 if tensor.device.type == "cpu" else 4e-3)
    return max(half, 1e-9)


def relative_difference(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """The largest relative difference of the tensors, over what rounding allows (1). On their device."""
    differences = []
    for output, reference in zip(outputs, references):
        wide = torch.promote_types(reference.dtype, torch.float32)
        size = reference.to(wide).norm()
        difference = (output.to(wide) - reference.to(wide)).norm() / size.clamp_min(1e-30)
        # What was not finite before cannot be compared; what has become so is different.
        difference = torch.where(size < torch.inf, difference.nan_to_num(torch.inf), 0.0) / rounding_of(output)
        differences.append(difference.double() if difference.device.type != "mps" else difference)
    return torch.stack(differences).max()


def settle_trimming(tower: Tower) -> None:
    """Cut no padding that this encoder depends on, and all that it does not: seen on two short rows, with and without,
    before mini-batches are planned. Three forward passes of two rows, once for each encoder, mode and form of inputs; a
    sharded encoder is not looked at.
    """
    padded = tower.slicer.padded
    if padded is None:
        return
    key, answers = _key(tower), _answers(settle_trimming, tower)
    trim: Trim | None = next((known[key] for known in answers if key in known), None)
    if trim is None and torch.is_grad_enabled() and not tower.sharded:
        passes = _Passes(tower)
        trim = _constant_in_some_mode(passes, lambda: _harmless_trim(passes, *padded))
        if trim is not None:
            _remember(answers, key, trim)
    tower.slicer.trim_to(tower.slicer.untested_trim if trim is None else trim)


def refuse_neighbours(tower: Tower, mini_batches: Sequence[Tensor]) -> bool:
    """Refuse an encoder that gives half of a mini-batch other embeddings without the other half; whether it was asked.
    One and a half forward passes of a mini-batch, once for each encoder, mode and form of inputs. Ranks of a sharded
    encoder agree on each, because they must run equally many.
    """
    if len(mini_batches) < 2:
        return False
    key, answers = _key(tower), _answers(refuse_neighbours, tower)
    unknown = any(key not in known and len(known) < MOST_ANSWERS for known in answers)
    if not on_any_rank(unknown, ask=tower.sharded):
        return False
    rows = mini_batches[0] if len(mini_batches[0]) > 1 else torch.cat([mini_batches[0], mini_batches[1][:1]])
    if tower.slicer.lengths is not None:  # the longest row stays, and with it the width
        rows = rows[torch.sort(tower.slicer.lengths[rows], descending=True, stable=True).indices]
    passes = _Passes(tower)
    difference = _constant_in_some_mode(passes, lambda: _difference_alone(passes, rows))
    if passes.any_rank(difference is not None and difference > 2):
        raise AnybatchError(
            "A row's embedding depends on the rows that go through the encoder with it: half of a mini-batch alone "
            "has other embeddings. Look for statistics over the batch (batch normalisation, x - x.mean(0)), attention "
            "between rows, experts with a capacity; replace them (LayerNorm, GroupNorm), put them in evaluation mode, "
            "or train without caching."
        )
    _remember(answers, key, difference)
    return True


class _Passes:
    """Forward passes that all start from one state, and leave it."""

    def __init__(self, tower: Tower) -> None:
        self.tower, self.random = tower, tower.random_state()
        self.any_rank = functools.partial(on_any_rank, ask=tower.sharded)
        self.drew = False  # random numbers that are not under control
        self.first = True

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        # The first pass of all has a graph: what the encoder keeps for later passes must lead to its parameters.
        with_graph, self.first = self.first, False
        with self.tower.leaving_no_trace(self.random):
            try:
                with _Constant(self.tower.facts.written), torch.set_grad_enabled(with_graph):
                    return tuple(output.detach() for output in self.tower.embed(rows))
            finally:
                self.drew = self.drew or not self.random.now().equals(self.random)


def _constant_in_some_mode(passes: _Passes, ask: Callable[[], Answer | None]) -> Answer | None:
    """What comes of passes in which nothing is random; None where there are none, or no memory for them.

    Where generators other than torch's are drawn from, the passes are made in evaluation mode.
    """
    as_is = passes.tower.facts.flags
    for flags in (as_is, dict.fromkeys(as_is, False)):
        passes.drew = False
        with torch.no_grad(), _eager(), training_modes(flags):
            answer, error = unless_out_of_memory(ask)
        if error is not None:
            return None
        if not passes.any_rank(passes.drew):
            return answer
    return None


def _difference_alone(passes: _Passes, rows: Tensor) -> float | None:
    """How much rows change without the others, over what rounding allows; None where that cannot be told."""
    alone = rows[: (len(rows) + 1) // 2].flip(0)
    together = passes(rows)
    try:
        apart = passes(alone)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None  # made for a fixed number of rows
    except ValueError:  # of torch's normalisations: no variance over one row
        return None if len(alone) > 1 else float("inf")
    if [part.shape[1:] for part in apart] != [part.shape[1:] for part in together]:
        return None  # outputs of several shapes are refused elsewhere
    wanted = [whole[: len(alone)] for whole in together]
    difference = float(relative_difference([part.flip(0) for part in apart], wanted))
    # Embeddings that are not even the same twice are found out, and named, when they are replayed.
    different = passes.any_rank(difference > 2)
    again = (float(relative_difference(passes(rows), together)) for _ in range(4))
    return None if different and any(passes.any_rank(other > 1) for other in again) else difference


def _harmless_trim(passes: _Passes, rows: Tensor, leading: bool) -> Trim:
    """How much padding can be cut from `rows` with the same embeddings."""
    slicer = passes.tower.slicer
    before = slicer.trim
    try:
        slicer.trim_to("none")
        whole = passes(rows)
        candidates: tuple[Trim, ...] = ("both", "trailing") if leading else ("trailing",)
        for trim in candidates:
            slicer.trim_to(trim)
            cut = passes(rows)
            same = [part.shape for part in cut] == [part.shape for part in whole]
            if not same or float(relative_difference(cut, whole)) <= 2:  # other shapes are refused elsewhere
                return trim
        return "none"
    finally:
        slicer.trim_to(before)


def _answers(question: Callable[..., Any], tower: Tower) -> list[dict[Any, Any]]:
    return [_found.setdefault(module, {}).setdefault(question, {}) for module in tower.modules or (_NO_MODULE,)]


def _remember(answers: list[dict[Any, Any]], key: Any, answer: Any) -> None:
    for known in answers:
        if len(known) >= MOST_ANSWERS:
            known.pop(next(iter(known)))
        known[key] = answer


def _key(tower: Tower) -> Any:
    modes = tuple(module.training for module in tower.modules)
    return _signature(tower.encode, 2), _form(tower.slicer.inputs), modes


class _Constant(TorchDispatchMode):
    """torch's random operations give constants: dropout keeps all, permutations turn round. A mask has the shape of
    what goes through together. Frozen parameters are kept before they are written.
    """

    def __init__(self, written: WrittenState) -> None:
        super().__init__()
        self.written = written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name.endswith("_") and args and name != "embedding_renorm_":  # which changes nothing the second time
            targets = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
            self.written.before_write(target for target in targets if isinstance(target, Tensor))
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "randperm":
            return torch.arange(args[0] - 1, -1, -1, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
        middle = _MIDDLE.get(name.rstrip("_"))
        if middle is None or torch.Tag.nondeterministic_seeded not in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            for place in (names.index(part) for part in ("dropout_p", "dropout") if part in names):
                args = (*args[:place], 0.0, *args[place + 1 :]) if place < len(args) else args
            return func(*args, **kwargs)
        if name == "uniform_" and len(args) > 1:
            middle = (args[1] + (args[2] if len(args) > 2 else 1.0)) / 2
        if not isinstance(args[0], Tensor):
            return torch.full(args[0], middle, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
        return (args[0] if name.endswith("_") else torch.empty_like(args[0])).fill_(middle)


_MIDDLE = {"bernoulli": 1.0, "uniform": 0.5, "exponential": 1.0, "normal": 0.0} | {
    "rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0
}  # fmt: skip


def _eager() -> contextlib.AbstractContextManager[Any]:
    """A compiled encoder is not compiled for the check's shapes."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance is not None and "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _form(inputs: Any) -> Any:
    """What tells inputs of another kind apart: keys, and words or numbers such as a task or the number of a tower."""
    if isinstance(inputs, Mapping):
        return tuple((str(key), _form(value)) for key, value in inputs.items())
    if isinstance(inputs, Tensor):
        return inputs.item() if inputs.ndim == 0 and inputs.device.type == "cpu" else Tensor
    return inputs if isinstance(inputs, _WORDS) else type(inputs)


def _signature(value: Any, depth: int) -> Any:
    """What tells two encoders over the same modules apart, such as a tower's number in a closure or an attribute."""
    if isinstance(value, _WORDS):
        return value
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, types.MethodType):
        return (value.__func__, _signature(value.__self__, depth))
    if isinstance(value, functools.partial):
        parts: Iterable[Any] = (value.func, *value.args, *value.keywords.values())
    elif depth == 0:
        return type(value)
    elif isinstance(value, types.FunctionType):
        parts = (*(cell.cell_contents for cell in value.__closure__ or ()), *(value.__defaults__ or ()))
        return (value.__code__, *(_signature(part, depth - 1) for part in parts))
    else:
        parts = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", {}).values()
    return (type(value), *(_signature(part, depth - 1) for part in parts))
