"""What a forward pass depends on besides its inputs: random number generators, autocast, training mode.

Captured when a micro-batch is recorded, put back when it is replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class RandomState:
    """The states of torch's generators: CPU, and every CUDA, XPU and MPS device in use.

    All devices of an initialised backend are read, because an encoder may use others than its inputs do. Python's
    `random`, NumPy's generators and `torch.Generator` objects of the encoder are not covered (`verify` finds those).

    Cost: a copy of 5 kB for the CPU and a few bytes a device; no synchronisation.
    """

    def __init__(self) -> None:
        self.cpu: Tensor = torch.get_rng_state()
        self.cuda: list[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        xpu = getattr(torch, "xpu", None)
        self.xpu: list[Tensor] = xpu.get_rng_state_all() if xpu is not None and xpu.is_initialized() else []
        self.mps: Tensor | None = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Put every generator back to the captured state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.xpu:
            torch.xpu.set_rng_state_all(self.xpu)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)

    def equals(self, other: RandomState) -> bool:
        """Whether no random number was drawn between the two captures."""
        pairs = [(self.cpu, other.cpu), *zip(self.cuda, other.cuda), *zip(self.xpu, other.xpu)]
        if self.mps is not None and other.mps is not None:
            pairs.append((self.mps, other.mps))
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)


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
