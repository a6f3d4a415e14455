"""Encoders that reduce their gradients over ranks: found, kept from reducing before the last micro-batch, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from anybatch import distributed
from anybatch.caching.rows import RowSlicer
from anybatch.errors import AnybatchError

Wrapped = DistributedDataParallel | FSDPModule


def distributed_modules(modules: Iterable[nn.Module]) -> list[Wrapped]:
    """Every DistributedDataParallel, and every outermost `fully_shard`ed module, in or below the given ones, each once.

    Raises:
        AnybatchError: What caching cannot serve: `static_graph=True`, which counts on one forward pass a step; the older
            FullyShardedDataParallel; DeepSpeed's ZeRO-2 and ZeRO-3. The message says what to use.
    """
    found: dict[Any, None] = {}
    inner: set[nn.Module] = set()
    for module in modules:
        for child in module.modules():
            _refuse(child)
            if isinstance(child, DistributedDataParallel):
                found[child] = None
            elif isinstance(child, FSDPModule) and child not in inner:
                found[child] = None
                inner.update(part for part in child.modules() if part is not child)
    return [module for module in found if module not in inner]


def reduces_now(module: Wrapped) -> bool:
    """Whether a backward pass at this moment would reduce: False inside the caller's own `no_sync` and its like."""
    if isinstance(module, DistributedDataParallel):
        return module.require_backward_grad_sync
    groups = [group for part in module.modules() if isinstance(part, FSDPModule) for group in _parameter_groups(part)]  # type: ignore[attr-defined]
    return all(group.reduce_grads for group in groups)


@contextlib.contextmanager
def no_reduction(wrapped: Iterable[Wrapped]) -> Iterator[None]:
    """Accumulate gradients locally: both the forward and the backward pass must run inside."""
    with contextlib.ExitStack() as stack:
        for module in wrapped:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif reduces_now(module):
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield


@contextlib.contextmanager
def refuse_hidden_distributed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Watch a call in which no module could be found beforehand, and refuse if it runs one that reduces.

    Unknown to us it would reduce after every micro-batch, adding up what was reduced before.

    Raises:
        AnybatchError: Inside, where such a module is called.
    """
    if not distributed.is_active() or any(True for _ in modules):
        yield
        return

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, (DistributedDataParallel, FSDPModule)):
            raise AnybatchError(
                f"The encoder runs a {type(module).__name__} module that cannot be found by looking at it, so its "
                "gradient reduction cannot be held back until the last micro-batch. Name it: modules=[module]."
            )

    hook = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def same_number_on_all_ranks(slicer: RowSlicer, micro_batches: Sequence[Tensor]) -> list[Tensor]:
    """Cut the largest micro-batches until every rank has as many: a sharded encoder gathers its weights in each pass.

    Raises:
        AnybatchError: One rank has fewer rows than another has micro-batches; on all ranks, so that none waits for another.

    Cost: one collective of 16 bytes.
    """
    extremes = torch.tensor([len(micro_batches), -slicer.num_rows])
    if dist.get_backend() == "nccl":
        extremes = extremes.cuda()
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    wanted, fewest = int(extremes[0]), -int(extremes[1])
    if wanted > fewest:
        raise AnybatchError(
            f"One rank has {wanted} micro-batches and another {fewest} rows, but a sharded encoder (fully_shard) must run "
            "equally often on every rank. Give all ranks as many rows, or raise micro_batch or max_tokens."
        )
    pieces = list(micro_batches)
    while len(pieces) < wanted:
        largest = max(range(len(pieces)), key=lambda number: len(pieces[number]))
        pieces[largest : largest + 1] = pieces[largest].tensor_split(2)
    return pieces


def _refuse(module: nn.Module) -> None:
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        raise AnybatchError(
            "DistributedDataParallel(static_graph=True) expects the same use of every parameter in each "
            "backward pass, and caching makes several. Build it with static_graph=False."
        )
    if isinstance(module, FullyShardedDataParallel):
        raise AnybatchError(
            "FullyShardedDataParallel is not supported by caching. Use fully_shard (torch.distributed.fsdp, in Accelerate "
            "fsdp_version: 2), whose gradient reduction can be held back until the last micro-batch."
        )
    sharded = any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))
    stage = 3 if sharded else 0
    if type(module).__module__.partition(".")[0] == "deepspeed" and hasattr(module, "zero_optimization_stage"):
        stage = max(stage, int(module.zero_optimization_stage()))  # type: ignore[operator]
    if stage >= 2:
        raise AnybatchError(
            f"DeepSpeed ZeRO-{stage} shards the gradients in each backward pass, and caching makes several a step, so all but the "
            "last would be lost or reduced twice. Use fully_shard (FSDP2; in Accelerate fsdp_version: 2), which shards as much, or "
            "DistributedDataParallel, or DeepSpeed with zero_optimization.stage 1."
        )


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """What holds the switch; torch has no public reader for it, and two spellings of the attribute."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
