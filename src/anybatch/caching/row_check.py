"""Whether a row's embedding depends on the rows beside it: looked at once for each encoder, on a real micro-batch.

Batch statistics by functional calls, attention over the batch, experts with a capacity: no type of module tells. What goes in twice with other neighbours does.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anybatch.caching.forward import Encoder, encode_rows
from anybatch.caching.memory import out_of_memory_as_none
from anybatch.caching.rows import RowSlicer
from anybatch.caching.state import ModeState, RandomState, WrittenState
from anybatch.errors import AnybatchError

MOST_CHECKS = 16  # of one model: a function that is new in every step is not looked at for ever
_checked: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
_checked_functions: set[Any] = set()  # of encoders whose modules are not found


def rounding_of(tensor: Tensor) -> float:
    """How far rounding alone takes two computations of one embedding apart, relative to it: of the coarsest dtype that may have taken part."""
    dtypes = {tensor.dtype}
    if torch.is_autocast_enabled(tensor.device.type):
        dtypes.add(torch.get_autocast_dtype(tensor.device.type))
    half = max((4 * torch.finfo(dtype).eps for dtype in dtypes if torch.finfo(dtype).bits < 32), default=0.0)
    if torch.float32 in dtypes:  # off the CPU its matrix products may be TF32
        return max(half, 1e-4 if tensor.device.type == "cpu" else 4e-3)
    return max(half, 1e-9)


def relative_gap(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """The largest relative difference of the tensors, over what rounding allows; on their device. Above 1 they differ."""
    gaps = []
    for output, reference in zip(outputs, references):
        wide = torch.promote_types(reference.dtype, torch.float32)
        size = reference.to(wide).norm()
        gap = (output.to(wide) - reference.to(wide)).norm() / size.clamp_min(1e-30)
        # What was not finite before cannot be compared; what has become so is different.
        gaps.append(torch.where(size.isfinite(), gap.nan_to_num(torch.inf), 0.0) / rounding_of(output))
    return torch.stack([gap.double() if gap.device.type != "mps" else gap for gap in gaps]).max()


def refuse_neighbours(
    encode: Encoder,
    slicer: RowSlicer,
    micro_batches: Sequence[Tensor],
    modules: Sequence[nn.Module],
    random: RandomState,
    written: WrittenState,
) -> None:
    """Take half of a micro-batch without the other half, and compare.

    Dropout and torch's other random numbers are made constant for it, because a mask has the shape of what goes through together. Where other
    generators are drawn from, the comparison is made in evaluation mode; where that draws too, there is none.

    Raises:
        AnybatchError: The embeddings are not the same up to rounding.

    Cost: one and a half forward passes of a micro-batch without a graph, once for each encoder, mode and form of inputs.
    """
    if len(micro_batches) < 2:
        return
    key = (_signature(encode, 2), _form(slicer.inputs), tuple(module.training for module in modules))
    seen = [_checked.setdefault(module, set()) for module in modules] or [_checked_functions]
    if all(key in keys or len(keys) >= MOST_CHECKS for keys in seen):
        return
    rows = micro_batches[0] if len(micro_batches[0]) > 1 else torch.cat([micro_batches[0], micro_batches[1][:1]])
    if slicer.lengths is not None:  # the longest row stays, and with it the width
        rows = rows[torch.sort(slicer.lengths[rows], descending=True, stable=True).indices]
    modes = ModeState(modules)
    gap: Tensor | None = None
    with torch.no_grad(), _eager(), out_of_memory_as_none() as attempt:
        for training in (True, False):
            if not training:
                modes.flags = dict.fromkeys(modes.flags, False)
            with modes.apply():
                gap = _gap_alone(encode, slicer, rows, random, written)
            if gap is not None:
                break
    if attempt.error is None:
        if gap is not None and float(gap) > 2:
            raise AnybatchError(
                "A row's embedding depends on the rows that go through the encoder with it: half of a micro-batch alone has other embeddings. So "
                "micro-batches cannot give the gradient of the whole batch. Look for statistics over the batch (batch normalisation, x - x.mean(0)), attention "
                "between rows, experts with a capacity; replace them (LayerNorm, GroupNorm), put them in evaluation mode, or train without caching."
            )
        for keys in seen:
            keys.add(key)


def _gap_alone(
    encode: Encoder, slicer: RowSlicer, rows: Tensor, random: RandomState, written: WrittenState
) -> Tensor | None:
    """How much rows change without the others, or None where random numbers were drawn that are not under control."""
    alone = rows[: (len(rows) + 1) // 2].flip(0)
    try:
        with _Constant():
            together = encode_rows(encode, slicer, rows)
            written.note()
            written.restore({})
            drew = not random.now().equals(random)
            random.restore()
            apart = encode_rows(encode, slicer, alone)
        drew = drew or not random.now().equals(random)
    finally:
        random.restore()
        written.note()
        written.restore({})
        written.note()
    if drew:
        return None
    return relative_gap([part.flip(0) for part in apart], [whole[: len(alone)] for whole in together])


class _Constant(TorchDispatchMode):
    """torch's random operations give constants: dropout keeps all, noise is its middle, permutations turn round."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
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
    """What tells inputs of another kind apart: keys, and words such as a task."""
    if isinstance(inputs, Mapping):
        return tuple((str(key), value if isinstance(value, str) else None) for key, value in inputs.items())
    return type(inputs)


def _signature(value: Any, depth: int) -> Any:
    """What tells two encoders over the same modules apart, such as a tower's number in a closure."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, functools.partial):
        return tuple(_signature(part, depth) for part in (value.func, *value.args, *value.keywords.values()))
    if isinstance(value, types.FunctionType) and depth > 0:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return (value.__code__, *(_signature(part, depth - 1) for part in (*cells, *(value.__defaults__ or ()))))
    return value.__func__ if isinstance(value, types.MethodType) else type(value)
