"""Gradients over ranks: encoders that reduce their own are found, kept from it until the end of the step, or refused.

A DistributedDataParallel would reduce what the last mini-batch used. So all passes accumulate locally, and one pass
without a gradient through every parameter follows: the wrapper then reduces by its own rules what any rank has left.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError

BUCKET_BYTES = 2**25  # gradients are averaged together in pieces of about this size
Wrapped = nn.Module  # a DistributedDataParallel, or sharded by `fully_shard` (an FSDPModule too)


def refuse_wrapper(module: nn.Module) -> None:
    """Refuse what reduces in a way that caching cannot hold back: each with what to use instead."""
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        raise AnybatchError(
            "DistributedDataParallel(static_graph=True) expects equal backward passes, and caching makes several. "
            "Build it with static_graph=False."
        )
    if isinstance(module, DistributedDataParallel) and module.mixed_precision is not None:
        raise AnybatchError(
            "DistributedDataParallel(mixed_precision=...) is not supported by caching, which runs under no_sync. Use "
            "autocast."
        )
    if isinstance(module, FullyShardedDataParallel):
        raise AnybatchError(
            "FullyShardedDataParallel is not supported by caching. Use fully_shard (torch.distributed.fsdp, in "
            "Accelerate fsdp_version: 2), whose reduction can be held back."
        )
    stage = 3 if any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()) else 0
    if type(module).__module__.partition(".")[0] == "deepspeed" and hasattr(module, "zero_optimization_stage"):
        stage = max(stage, int(module.zero_optimization_stage()))  # type: ignore[operator]
    if stage >= 2:
        raise AnybatchError(
            f"DeepSpeed ZeRO-{stage} shards the gradients in each backward pass, and caching makes several per step. "
            "Use fully_shard (FSDP2; in Accelerate fsdp_version: 2), which shards as much, or DistributedDataParallel, "
            "or DeepSpeed with zero_optimization.stage 1."
        )


def reduces_now(module: Wrapped) -> bool:
    """Whether a backward pass at this moment would reduce: False inside the caller's own `no_sync` and its like."""
    if isinstance(module, DistributedDataParallel):
        return module.require_backward_grad_sync
    states: list[Any] = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    # What holds the switch; torch has no public reader for it, and two spellings of the attribute.
    groups = [getattr(s, "_fsdp_param_groups", None) or [getattr(s, "_fsdp_param_group", None)] for s in states]
    return all(group.reduce_grads for of_module in groups for group in of_module if group is not None)


@contextlib.contextmanager
def no_reduction(wrapped: Iterable[Wrapped]) -> Iterator[None]:
    """Accumulate gradients locally: both the forward and the backward pass must run inside."""
    with contextlib.ExitStack() as stack:
        for module in wrapped:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif isinstance(module, FSDPModule) and reduces_now(module):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield


@contextlib.contextmanager
def refuse_hidden_wrappers(known: Container[nn.Module]) -> Iterator[None]:
    """Refuse, inside, the call of a module that reduces and is not `known`: it would do so after every mini-batch."""
    if not distributed.is_active():
        yield
        return

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, (DistributedDataParallel, FSDPModule)) and module not in known:
            raise AnybatchError(
                f"The encoder runs a {type(module).__name__} module that cannot be found by looking at it, so that its "
                "gradient reduction cannot be held back. Name it: modules=[module]."
            )

    hook = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def broadcast_buffers(wrapped: Iterable[Wrapped]) -> None:
    """Rank 0's buffers for all, as the first forward pass of a DistributedDataParallel would do it, but at once."""
    for module in wrapped:
        if isinstance(module, DistributedDataParallel) and module._check_sync_bufs_pre_fwd():
            module._sync_buffers()
            module.require_forward_param_sync = False


class DataParallelReduction:
    """The reduction at the end of a step, of one DistributedDataParallel, kept from it meanwhile (`no_reduction`).

    Asks the other ranks which parameters will have a gradient (a collective of a byte each) and whether their passes
    `failed`: then no rank goes on.
    """

    def __init__(
        self, module: DistributedDataParallel, has_gradient: Callable[[nn.Parameter], bool], *, failed: bool
    ) -> None:
        self.module = module
        named = module.module.named_parameters()
        self.parameters = [p for name, p in named if name not in module.parameters_to_ignore and p.is_floating_point()]
        flags = [*map(has_gradient, self.parameters), failed]
        *self.used, self.failed = _any_rank(flags, self.parameters[0].device, module.process_group)

    def run(self) -> None:
        """Reduce. A parameter without gradient is zero where another rank has one, and stays without where none has."""
        if not any(self.used):
            return
        frozen = [p for p in self.parameters if not p.requires_grad]  # since the wrapper was built: it waits for them
        inner = self.module.module
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            self.module.module = _Touch(self.parameters)
            with torch.enable_grad():
                self.module(torch.zeros((), device=self.parameters[0].device)).backward()
        finally:
            self.module.module = inner
            for parameter in frozen:
                parameter.requires_grad_(False)
        for parameter, used in zip(self.parameters, self.used):
            if not used:
                parameter.grad = None


class _Touch(nn.Module):
    """A forward pass in which every parameter takes part and none receives a gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.reached = parameters  # a list: not registered a second time

    def forward(self, start: Tensor) -> Tensor:
        return _TouchAll.apply(start, *self.reached)  # type: ignore[return-value]


class _TouchAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return torch.zeros_like(start)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * (1 + ctx.count)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average `.grad` over all ranks, for encoders that are not wrapped in DistributedDataParallel.

    A parameter without a gradient counts as zero where another rank has one; where no rank has one it stays without.
    Leave out the loss's own parameters: anybatch's losses give them the full gradient on every rank.

    Args:
        parameters: The same, in the same order, on every rank; those that do not require a gradient are skipped.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not distributed.is_active() or not trained:
        return
    used = _any_rank([parameter.grad is not None for parameter in trained], trained[0].device)
    buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in itertools.compress(trained, used):
        bucket = buckets.setdefault((parameter.dtype, parameter.device), [])
        bucket.append(parameter)
        if sum(p.numel() * p.element_size() for p in bucket) >= BUCKET_BYTES:
            _average(bucket)
            bucket.clear()
    for bucket in filter(None, buckets.values()):
        _average(bucket)


def _average(bucket: list[nn.Parameter]) -> None:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in bucket]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(bucket, flat.split([grad.numel() for grad in grads])):
        if parameter.grad is not None and not parameter.grad.is_sparse:
            parameter.grad.copy_(part.view_as(parameter))
        else:
            parameter.grad = part.view_as(parameter).clone()


def on_any_rank(flag: bool, *, ask: bool) -> bool:
    """Whether `flag` is set on any rank; on this one, where the ranks are not to `ask` each other."""
    return _any_rank([flag], _collective_device())[0] if ask else flag


def same_number_on_all_ranks(mini_batches: Sequence[Tensor]) -> list[Tensor]:
    """Cut the largest mini-batches until every rank has as many: a sharded encoder gathers weights in each pass."""
    pieces = list(mini_batches)
    extremes = torch.tensor([len(pieces), -sum(map(len, pieces))], device=_collective_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    wanted, fewest = int(extremes[0]), -int(extremes[1])
    if wanted > fewest:
        raise AnybatchError(
            f"One rank has {wanted} mini-batches and another {fewest} rows; a sharded encoder (fully_shard) must run "
            "equally often on every rank. Give all ranks as many rows, or raise mini_batch_size or max_tokens."
        )
    while len(pieces) < wanted:
        largest = max(range(len(pieces)), key=lambda number: len(pieces[number]))
        pieces[largest : largest + 1] = pieces[largest].tensor_split(2)
    return pieces


def _any_rank(flags: list[bool], device: torch.device, group: Any = None) -> list[bool]:
    """For each flag, whether it is set on any rank."""
    together = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in together.tolist()]


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
