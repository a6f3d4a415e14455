"""Check on the user's own model that the cached step and the plain step agree, and say what is in the way if not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.caching.forward import Encoder, encode_rows
from anybatch.caching.modules import generators_of, modules_of
from anybatch.caching.replay import DIFFERENT_REPLAYS
from anybatch.caching.rows import RowSlicer
from anybatch.caching.schedule import plan_micro_batches
from anybatch.caching.state import ModeState, RandomState, WrittenState, without_autocast
from anybatch.caching.step import cached_step
from anybatch.caching.towers import paired_encoders
from anybatch.core.errors import AnybatchError


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The two gradients of one batch, compared.

    Attributes:
        error: Norm of the difference of all gradients over the norm of the plain gradient.
        tolerance: What rounding allows in the coarsest dtype that took part, autocast's included.
        errors: The same for every parameter, by name: over its own norm, or a thousandth of that of all where its own is less
            (some gradients, such as that of a key's bias, are zero but for rounding).
        loss_error: Relative difference of the two losses.
        findings: What stands in the way of exactness, in sentences; empty where nothing was found.
    """

    error: float
    tolerance: float
    errors: dict[str, float]
    loss_error: float
    findings: tuple[str, ...]

    @classmethod
    def refused(cls, reason: str) -> Verification:
        """What there is to say when the cached step refuses to run: a finding, and no errors."""
        return cls(error=float("inf"), tolerance=0.0, errors={}, loss_error=float("inf"), findings=(reason,))

    @property
    def exact(self) -> bool:
        """Whether the gradients agree within the tolerance and nothing was found in the way."""
        return self.error <= self.tolerance and not self.findings

    def __str__(self) -> str:
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:3]
        lines = [f"relative error {self.error:.2e} (tolerance {self.tolerance:.0e}), loss {self.loss_error:.2e}"]
        lines += [f"  {name}: {error:.2e}" for name, error in worst]
        return "\n".join([*lines, *(f"! {finding}" for finding in self.findings)])


def verify(
    encoders: Encoder | Sequence[Encoder],
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    *,
    micro_batch: int = 4,
    keep_graphs: int | float = 0,
    loss_kwargs: Mapping[str, Any] | None = None,
    modules: Sequence[nn.Module] | None = None,
) -> Verification:
    """Take one batch both ways and compare every gradient.

    The plain way is the whole batch in one pass; where random numbers are drawn (dropout) or state is written it is the same
    micro-batches in one graph, so that the masks are the same. Gradients, buffers and random generators are put back afterwards,
    those of the loss included.

    Args:
        encoders: As in `cached_step`.
        inputs: One small batch a tower, more rows than `micro_batch`.
        loss: As in `cached_step`.
        micro_batch: Rows in a forward pass.
        keep_graphs: As in `cached_step`.
        loss_kwargs: As in `cached_step`.
        modules: As in `cached_step`.

    Returns:
        The comparison; print it.

    Raises:
        AnybatchError: Every tower fits in one micro-batch (the comparison would prove nothing), or what `cached_step`
            refuses (batch statistics).

    Cost: two steps, and a copy of the gradients and of the buffers.
    """
    towers = paired_encoders(encoders, inputs)
    slicers = [RowSlicer(batch) for batch in inputs]
    plans = [plan_micro_batches(slicer, micro_batch=micro_batch) for slicer in slicers]
    if all(len(plan) == 1 for plan in plans):
        raise AnybatchError(
            f"Every tower fits in one micro-batch of {micro_batch} rows, so there is nothing to compare. Pass more "
            "rows or a smaller micro_batch."
        )
    held = list(dict.fromkeys([m for tower in towers for m in modules_of(tower)])) if modules is None else list(modules)
    parts = [*held, loss] if isinstance(loss, nn.Module) else held
    names = _parameter_names(parts)
    findings: list[str] = []
    options: dict[str, Any] = {"loss_kwargs": loss_kwargs, "modules": modules}
    start = RandomState(g for tower in towers for g in generators_of(tower, held))
    written = WrittenState(held)
    with _untouched(parts, list(names)):
        different: list[str] = []
        token = DIFFERENT_REPLAYS.set(different)
        try:
            cached_value = cached_step(
                loss, towers, inputs, micro_batch=micro_batch, keep_graphs=keep_graphs, **options
            )
        finally:
            DIFFERENT_REPLAYS.reset(token)
        findings += different[:1]
        # Where random numbers are drawn or state is written, what a row meets belongs to its micro-batch.
        by_piece = written.note() or not start.equals(start.now())
        cached = _take_gradients(names)
    with _untouched(parts, list(names)):
        start.restore()
        written.restore({})
        # Otherwise the whole batch in one pass says more.
        split = plans if by_piece else [[torch.arange(slicer.num_rows)] for slicer in slicers]
        embedded = [_embedded(tower, slicer, plan) for tower, slicer, plan in zip(towers, slicers, split)]
        precise = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in embedded]
        with without_autocast():  # as in the cached step: the loss sees float32 or better, and no autocast
            value = loss(precise[0], *([torch.cat(precise[1:])] if len(precise) > 1 else []), **(loss_kwargs or {}))
            value.backward()
        plain = _take_gradients(names)
    with _untouched(parts, list(names)), torch.no_grad(), _evaluating(held):
        for number, (tower, slicer, plan, trained) in enumerate(zip(towers, slicers, plans, embedded)):
            before = start.now()
            pieces, whole = _embedded(tower, slicer, plan), _embedded(tower, slicer, [torch.arange(slicer.num_rows)])
            if pieces.dtype != trained.dtype:
                findings.append(
                    f"Tower {number} returns {trained.dtype} with gradients and {pieces.dtype} without: the recording "
                    "and the replay compute in different dtypes."
                )
            gap = float((pieces - whole).double().norm() / whole.double().norm().clamp_min(1e-300))
            state = written.note() or not before.equals(start.now())
            if gap > _tolerance([whole]) and not state:
                findings.append(
                    f"Tower {number}: a row's embedding depends on the rows that go through with it (relative change "
                    f"{gap:.1e} when the batch is split), so micro-batches cannot give the gradient of the whole batch."
                )
    start.restore()
    written.restore({})
    findings += [f"{name} gets a gradient one way only." for name in cached.keys() ^ plain.keys()]
    tolerance = _tolerance([*embedded, *plain.values()])
    encoder = {name for part in held for parameter in part.parameters() if (name := names.get(parameter))}
    findings += _wrong_sizes({n: g for n, g in plain.items() if n not in encoder}, cached, 100 * tolerance)
    return _compare(cached, plain, cached_value, value.detach(), tolerance, findings)


def _embedded(tower: Encoder, slicer: RowSlicer, plan: Sequence[Tensor]) -> Tensor:
    """The embeddings of a batch, micro-batch by micro-batch, in the row order of the batch."""
    pieces = [encode_rows(tower, slicer, rows)[0] for rows in plan]
    whole = torch.cat(pieces)
    return whole[torch.argsort(torch.cat(list(plan))).to(whole.device)]


def _tolerance(tensors: Sequence[Tensor]) -> float:
    """A multiple of the coarsest rounding; a smaller one in half precision, where 200 roundings would be everything."""
    dtypes = {tensor.dtype for tensor in tensors}
    for device in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max((200 if torch.finfo(dtype).bits >= 32 else 16) * torch.finfo(dtype).eps for dtype in dtypes)


def _compare(
    cached: dict[str, Tensor],
    plain: dict[str, Tensor],
    cached_value: Tensor,
    value: Tensor,
    tolerance: float,
    found: list[str],
) -> Verification:
    errors: dict[str, float] = {}
    floor = 1e-3 * sum(float(gradient.double().norm()) ** 2 for gradient in plain.values()) ** 0.5
    difference = reference = product = 0.0
    for name in sorted(plain.keys() & cached.keys()):
        wanted, got = plain[name].double(), cached[name].double()
        gap, size = float((got - wanted).norm()), float(wanted.norm())
        errors[name] = gap / max(size, floor) if max(size, floor) > 0 else float(gap > 0)
        difference, reference = difference + gap**2, reference + size**2
        product += float((got * wanted).sum())
    error = (difference / reference) ** 0.5 if reference > 0 else float(difference > 0)
    ratio = product / reference if reference > 0 else 1.0
    remainder = (max(0.0, difference - (ratio - 1) ** 2 * reference) / reference) ** 0.5 if reference > 0 else 0.0
    if error > tolerance and remainder <= tolerance:
        found.append(f"The gradient has the right direction and {ratio:.4g} times the right size: a scale is wrong.")
    elif error > tolerance and not found:
        found.append(
            "The gradients differ and nothing known explains it. Look for state that a forward pass changes (caches), "
            "for generators out of sight, and for rows that see the other rows of their micro-batch."
        )
    loss_error = abs(float(cached_value) - float(value)) / max(abs(float(value)), torch.finfo(torch.float64).tiny)
    return Verification(
        error=error, tolerance=tolerance, errors=errors, loss_error=loss_error, findings=tuple(dict.fromkeys(found))
    )


def _wrong_sizes(plain: dict[str, Tensor], cached: dict[str, Tensor], tolerance: float) -> list[str]:
    """Parameters of the loss are few and their gradients small: beside an encoder's, a wrong factor would go unseen."""
    found = []
    for name in plain.keys() & cached.keys():
        wanted, got = plain[name].double(), cached[name].double()
        size = float(wanted.norm())
        if size > 0 and float((got - wanted).norm()) > tolerance * size:
            ratio = float((got * wanted).sum()) / size**2
            found.append(f"The loss's own parameter {name} gets {ratio:.4g} times its gradient: a scale is wrong.")
    return found


def _parameter_names(parts: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    names: dict[nn.Parameter, str] = {}
    for number, part in enumerate(parts):
        prefix = f"{type(part).__name__}[{number}]" if len(parts) > 1 else ""
        for name, parameter in part.named_parameters():
            names.setdefault(parameter, f"{prefix}.{name}".lstrip("."))
    return names


def _take_gradients(names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for parameter, name in names.items() if parameter.grad is not None}


@contextlib.contextmanager
def _untouched(parts: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Start without gradients; put gradients and buffers back."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    buffers = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers()]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextlib.contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    modes = ModeState(modules)
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, flag in modes.flags.items():
            module.training = flag
