"""The memory budget of cached steps: finds the micro-batch by probing, keeps graphs, and learns from what did not fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from anybatch.caching.device_memory import memory_in_use, parse_memory, total_memory
from anybatch.caching.forward import Encoder, encode_rows
from anybatch.caching.memory import GraphBudget, out_of_memory_as_none, padded_tokens
from anybatch.caching.modules import modules_of
from anybatch.caching.reduction import distributed_modules, no_reduction
from anybatch.caching.rows import RowSlicer
from anybatch.caching.state import RandomState
from anybatch.core.errors import AnybatchError

# Larger micro-batches are not faster: on a CPU they leave the caches, on a GPU the units are busy.
MOST_TOKENS = {"cpu": 2048}
MOST_TOKENS_ACCELERATOR = 32_768
FEWEST_TOKENS = 64
LOSS_RESERVE = 2**26  # score tiles; the embeddings and their gradients come on top (`leaf_bytes`)


class StepMemory:
    """A memory budget that lasts for many steps: give the same object to each of them.

        tokens = the largest power of two with  2 * (fixed + slope * tokens) <= memory - in use - gradients - embeddings

    where fixed and slope (bytes a padded token) are measured by running the longest row, and the longest two, with a graph
    and counting what autograd saves. Half of the room is left for kept graphs. It is found once for each encoder, and again
    when a longer row comes. When memory runs out all the same, the step goes on with halves, and later steps
    start from there.

    Args:
        memory: The most memory in use on the device, parameters, optimiser and other processes included: "8GiB", "80%",
            or bytes.

    Attributes:
        learned: The most padded tokens of a micro-batch, learned from running out of memory; None while it never did.
        learned_samples: The same in rows, of inputs without lengths (pictures).

    Cost: three rows through each encoder, once.
    """

    def __init__(self, memory: str | int = "80%") -> None:
        parse_memory(memory, 2**40)  # a wrong form is reported here, not in the first step
        self.memory = memory
        self.learned: int | None = None
        self.learned_samples: int | None = None
        self._most_kept: int | None = None
        self._budget: GraphBudget | None = None
        self._found: dict[tuple[object, ...], tuple[int, int]] = {}  # modules: longest row measured, tokens

    def next_step(self, modules: Sequence[nn.Module], inputs: Sequence[object], *, num_rows: int = 0) -> GraphBudget:
        """A `GraphBudget` for one step of `num_rows` rows, all towers together; takes note of what the step before it found."""
        past = self._budget
        if past is not None and past.overrun:
            self._most_kept = int(0.9 * past.spent)
        device = _device_of([*modules, *inputs])
        reserve = LOSS_RESERVE + _gradient_bytes(modules)
        self._budget = GraphBudget(
            self.memory, device=device, reserve=reserve, num_rows=num_rows, most=self._most_kept, modules=modules
        )
        return self._budget

    def max_tokens(
        self, encode: Encoder, slicer: RowSlicer, modules: Sequence[nn.Module], *, num_rows: int | None = None
    ) -> int:
        """Padded tokens of a micro-batch (rows, where there are no lengths) for this encoder and batch, in a step of `num_rows` rows (None: this batch).

        Raises:
            AnybatchError: A single row does not fit on the device; a sharded encoder, which cannot run on one rank alone.
        """
        if any(isinstance(module, FSDPModule) for module in distributed_modules(modules)):
            raise AnybatchError(
                'micro_batch="auto" tries rows on each rank by itself, and a sharded encoder (fully_shard) runs on all ranks '
                "together. Give micro_batch or max_tokens a number."
            )
        length = int(slicer.lengths.max()) if slicer.lengths is not None else 1
        samples = slicer.lengths is None
        # A function may be made anew for every step, its modules are not. One model may take texts and pictures, which cost differently.
        key = (tuple(modules_of(encode)) or tuple(modules) or (encode,), samples)
        known = self._found.get(key)
        if known is None or length > known[0]:
            known = length, self._probe(encode, slicer, modules, slicer.num_rows if num_rows is None else num_rows)
            self._found[key] = known
        learned = self.learned_samples if samples else self.learned
        return known[1] if learned is None else min(known[1], learned)

    def note_split(self, tokens: int, *, samples: bool = False) -> None:
        """Memory ran out; `tokens` padded tokens are tried next (rows, if `samples`)."""
        if samples:
            self.learned_samples = tokens if self.learned_samples is None else min(self.learned_samples, tokens)
        else:
            self.learned = tokens if self.learned is None else min(self.learned, tokens)

    def _probe(self, encode: Encoder, slicer: RowSlicer, modules: Sequence[nn.Module], num_rows: int) -> int:
        order = torch.arange(slicer.num_rows)
        if slicer.lengths is not None:
            order = torch.sort(slicer.lengths, descending=True, stable=True).indices
        device = _device_of([*modules, slicer.inputs])
        most = MOST_TOKENS.get(device.type, MOST_TOKENS_ACCELERATOR)
        (one, leaves), (two, _) = (
            _graph_bytes(encode, slicer, order[:count], modules, device, num_rows) for count in (1, min(2, len(order)))
        )
        if one is None:
            raise AnybatchError(
                "Out of memory with a single row: the encoder does not fit with its longest input. Shorten the inputs, use "
                "gradient checkpointing inside the encoder, or a smaller model."
            )
        tokens = padded_tokens(slicer, order[:1])
        if two is None:
            return tokens
        slope = (two - one) / tokens if len(order) > 1 else one / tokens
        fixed = max(0.0, one - slope * tokens)
        limit = parse_memory(self.memory, total_memory(device))
        room = limit - memory_in_use(device) - LOSS_RESERVE - leaves - _gradient_bytes(modules)
        if 2 * one > room:
            warnings.warn(
                f"memory={self.memory!r} leaves {max(0, room) / 2**20:.0f} MiB for the encoder, and a micro-batch of one row "
                f"({tokens} tokens) needs about {2 * one / 2**20:.0f} MiB. Going on with single rows: the budget will be exceeded.",
                stacklevel=2,
            )
            return tokens
        if slope <= 0:  # frozen: nothing is saved
            return most
        fits = (room / 2 - fixed) / slope
        fewest = FEWEST_TOKENS if slicer.lengths is not None else 1  # rows without lengths may be large each
        return max(fewest, min(most, 2 ** int(math.log2(max(fits, 1.0)))))


def _graph_bytes(
    encode: Encoder,
    slicer: RowSlicer,
    rows: Tensor,
    modules: Sequence[nn.Module],
    device: torch.device,
    num_rows: int,
) -> tuple[int | None, int]:
    """What autograd saves for these rows, None if they do not fit; and the loss's share for `num_rows`. Random generators are put back."""
    budget, before = GraphBudget(1, device=device, num_rows=num_rows, modules=modules), RandomState()
    try:
        with torch.enable_grad(), no_reduction(distributed_modules(modules)), out_of_memory_as_none() as attempt:
            attempt.result = encode_rows(encode, slicer, rows, budget.measure(slicer, rows))
        if attempt.error is not None:
            return None, 0
        budget.note_embeddings(attempt.result)
        return budget.largest, budget.leaves
    finally:
        before.restore()


def _gradient_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of the gradients that the step will make."""
    parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _device_of(places: Sequence[object]) -> torch.device:
    """The first device found that is not the CPU, else the CPU."""
    for place in places:
        if isinstance(place, nn.Module):
            values = place.parameters()
        else:
            values = place.values() if isinstance(place, Mapping) else [place]
        for value in values:
            if isinstance(value, Tensor) and value.device.type != "cpu":
                return value.device
    return torch.device("cpu")
