"""The gradients of one step, kept apart from what was there before until all of it is known to be right."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Aside:
    """Takes the `.grad` of parameters away, so that backward passes leave this step's contribution alone in it.

    Then `merge` adds both, or `put_back` leaves the parameters as they were. Hooks of the parameters (`register_hook`) rest meanwhile and run once, on
    the whole contribution, as they do in a plain step.

    Args:
        parameters: Those that the step trains.

    Cost: where gradients were accumulated before, as much memory again.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._before = {p: (p.grad, p._backward_hooks) for p in parameters}
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
