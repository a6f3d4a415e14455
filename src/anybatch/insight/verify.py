"""Check on the user's own model that the cached step and the plain step agree, and say what is in the way if not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.caching.encoder import Encoder, Tower, towers_of
from anybatch.caching.schedule import plan_mini_batches
from anybatch.caching.state import untouched, without_autocast
from anybatch.caching.step import cached_step, paired_encoders
from anybatch.core.errors import AnybatchError


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The two gradients of one batch, compared.

    Example:
        >>> from anybatch import InfoNCE
        >>> verify(nn.Linear(6, 4), [torch.randn(8, 6), torch.randn(8, 6)], InfoNCE()).exact
        True
    """

    error: float  # norm of the difference of all gradients over the norm of the plain gradient
    tolerance: float  # what rounding allows in the coarsest dtype that took part, autocast's included
    # The error of every parameter, by name: over its own norm, or a thousandth of that of all where its own is less
    # (some gradients, such as that of a key's bias, are zero but for rounding).
    errors: dict[str, float]
    loss_error: float  # relative difference of the two losses
    findings: tuple[str, ...]  # what stands in the way of exactness, in sentences

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
    mini_batch_size: int = 4,
    keep_graphs: int | float = 0,
    loss_kwargs: Mapping[str, Any] | None = None,
    modules: Sequence[nn.Module] | None = None,
) -> Verification:
    """Take one batch both ways and compare every gradient.

    The plain way is the whole batch in one pass; where random numbers are drawn (dropout) or state is written it is
    the same mini-batches in one graph, so that the masks are the same. Gradients, buffers and random generators are
    put back afterwards, those of the loss included.

    Args:
        inputs: One small batch for each tower, more rows than `mini_batch_size`; all else as in `cached_step`.

    Returns:
        The comparison. What `cached_step` refuses (rows that see each other, a replay that differs) is its finding.

    Raises:
        AnybatchError: Every tower fits in one mini-batch (the comparison would prove nothing), or batch statistics.

    Cost: two steps, and a copy of the gradients and of the buffers.
    """
    # 1. What both ways start from.
    towers = towers_of(paired_encoders(encoders, inputs), inputs, modules)
    plans = [plan_mini_batches(tower.slicer, mini_batch_size=mini_batch_size) for tower in towers]
    if all(len(plan) == 1 for plan in plans):
        raise AnybatchError(
            f"Every tower fits in one mini-batch of {mini_batch_size} rows, so there is nothing to compare. Pass more "
            "rows or a smaller mini_batch_size."
        )
    facts, start = towers[0].facts, towers[0].random_state()
    written = facts.written
    parts = [*facts.modules, *([loss] if isinstance(loss, nn.Module) else [])]
    names = _parameter_names(parts)
    # 2. The cached step.
    with untouched(parts, start):
        try:
            limits = {"mini_batch_size": mini_batch_size, "keep_graphs": keep_graphs}
            cached_value = cached_step(loss, encoders, inputs, **limits, loss_kwargs=loss_kwargs, modules=modules)
        except AnybatchError as error:
            return Verification.refused(str(error))
        finally:
            # Where random numbers are drawn or state is written, what a row meets belongs to its mini-batch.
            by_piece = written.update() or not start.equals(start.now())
            written.restore({})
        cached = _take_gradients(names)
    # 3. The plain step; the whole batch in one pass says more, where it may be compared.
    with untouched(parts, start):
        split = plans if by_piece else [[torch.arange(tower.slicer.num_rows)] for tower in towers]
        embedded = [_embedded(tower, plan) for tower, plan in zip(towers, split)]
        precise = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in embedded]
        with without_autocast():  # as in the cached step: the loss sees float32 or better, and no autocast
            value = loss(precise[0], *([torch.cat(precise[1:])] if len(precise) > 1 else []), **(loss_kwargs or {}))
            value.backward()
        plain = _take_gradients(names)
    written.restore({})
    # 4. The difference, and what may explain it.
    tolerance = _tolerance([*embedded, *plain.values()])
    findings = [f"{name} gets a gradient one way only." for name in cached.keys() ^ plain.keys()]
    encoder = {name for part in facts.modules for parameter in part.parameters() if (name := names.get(parameter))}
    findings += _wrong_sizes({n: g for n, g in plain.items() if n not in encoder}, cached, 100 * tolerance)
    return _compare(cached, plain, (float(cached_value), float(value.detach())), tolerance, findings)


def _embedded(tower: Tower, plan: Sequence[Tensor]) -> Tensor:
    """The embeddings of a batch, mini-batch by mini-batch, in the row order of the batch."""
    whole = torch.cat([tower.embed(rows)[0] for rows in plan])
    return whole[torch.argsort(torch.cat(list(plan))).to(whole.device)]


def _tolerance(tensors: Sequence[Tensor]) -> float:
    """A multiple of the coarsest rounding; a smaller one in half precision, where 200 roundings would be everything."""
    dtypes = {tensor.dtype for tensor in tensors}
    for device in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    return max((200 if torch.finfo(dtype).bits >= 32 else 16) * torch.finfo(dtype).eps for dtype in dtypes)


def _compare(
    cached: dict[str, Tensor], plain: dict[str, Tensor], values: tuple[float, float], tolerance: float, found: list[str]
) -> Verification:
    errors: dict[str, float] = {}
    floor = 1e-3 * sum(float(gradient.double().norm()) ** 2 for gradient in plain.values()) ** 0.5
    difference = reference = product = 0.0
    for name in sorted(plain.keys() & cached.keys()):
        error, size, along = _against(cached[name], plain[name])
        errors[name] = error / max(size, floor) if max(size, floor) > 0 else float(error > 0)
        difference, reference = difference + error**2, reference + size**2
        product += along
    error = (difference / reference) ** 0.5 if reference > 0 else float(difference > 0)
    ratio = product / reference if reference > 0 else 1.0
    remainder = (max(0.0, difference - (ratio - 1) ** 2 * reference) / reference) ** 0.5 if reference > 0 else 0.0
    if error > tolerance and remainder <= tolerance:
        found.append(f"The gradient has the right direction and {ratio:.4g} times the right size: a scale is wrong.")
    elif error > tolerance and not found:
        found.append(
            "The gradients differ and nothing known explains it. Look for state that a forward pass changes (caches), "
            "for generators out of sight, and for rows that see the other rows of their mini-batch."
        )
    loss_error = abs(values[0] - values[1]) / max(abs(values[1]), torch.finfo(torch.float64).tiny)
    return Verification(
        error=error, tolerance=tolerance, errors=errors, loss_error=loss_error, findings=tuple(dict.fromkeys(found))
    )


def _wrong_sizes(plain: dict[str, Tensor], cached: dict[str, Tensor], tolerance: float) -> list[str]:
    """Parameters of the loss are few and their gradients small: beside an encoder's, a wrong factor would go unseen."""
    found = []
    for name in plain.keys() & cached.keys():
        error, size, along = _against(cached[name], plain[name])
        if size > 0 and error > tolerance * size:
            ratio = along / size**2
            found.append(f"The loss's own parameter {name} gets {ratio:.4g} times its gradient: a scale is wrong.")
    return found


def _against(got: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Norm of the difference, norm of what is wanted, and their product."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm()), float(wanted.norm()), float((got * wanted).sum())


def _parameter_names(parts: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    names: dict[nn.Parameter, str] = {}
    for number, part in enumerate(parts):
        prefix = f"{type(part).__name__}[{number}]" if len(parts) > 1 else ""
        for name, parameter in part.named_parameters():
            names.setdefault(parameter, f"{prefix}.{name}".lstrip("."))
    return names


def _take_gradients(names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for parameter, name in names.items() if parameter.grad is not None}
