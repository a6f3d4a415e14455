"""The memory budget of cached steps: finds the mini-batch by probing, keeps graphs, learns from what did not fit."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from anybatch.caching.device_memory import device_of, memory_in_use, parse_memory, total_memory, unless_out_of_memory
from anybatch.caching.encoder import Tower, parameters_of
from anybatch.caching.rows import Rows
from anybatch.core import distributed
from anybatch.core.errors import AnybatchError

# Tensors of the embeddings' size at the loss's peak: the leaf, its gradient, and in the loss the candidates in one
# piece, the normalised rows and gradients on their way.
LEAF_COPIES = 6
# Larger mini-batches are not faster: on a CPU they leave the caches, on a GPU the units are busy.
MOST_TOKENS = {"cpu": 2048}
MOST_TOKENS_ACCELERATOR = 32_768
FEWEST_TOKENS = 64
NO_ROOM = (
    "the encoder does not fit with its longest input. Shorten the inputs, use gradient checkpointing inside the "
    "encoder, or a smaller model."
)
LOSS_RESERVE = 2**26  # score tiles; the embeddings and their gradients come on top (`leaf_bytes`)


class GraphBudget:
    """Keeps the graphs of one step while they fit: all of a small batch (plain training), the first few of a large one.

    What autograd saves for a mini-batch is counted, each storage once, without parameters and what a kept graph holds.
    The next mini-batch is no longer, so it has no more bytes per padded token:

        predicted = bytes measured last * padded tokens / padded tokens measured last
        keep if in use + reserve + leaves + spent + predicted + largest (a replay's working set) <= memory

    `reserve` bytes are for what comes later in the step: gradients of the parameters, the loss's tiles.
    """

    def __init__(
        self,
        memory: str | int = "80%",
        *,
        device: torch.device | str = "cpu",
        reserve: int = 0,
        num_rows: int = 0,
        most: int | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self.device = torch.device(device)
        self.limit = parse_memory(memory, total_memory(self.device))
        self.start = memory_in_use(self.device) + reserve
        self.num_rows = num_rows  # of the whole step, all towers together
        self.most = most  # bytes of kept graphs, where an earlier step has shown it
        self.leaves = 0  # bytes of the embeddings of all rows and what the loss makes of them, once seen
        self.spent = 0  # bytes of the graphs kept so far
        self.largest = 0  # bytes of the largest graph measured
        self.overrun = False  # whether memory ran out beside the kept graphs, in spite of the prediction
        self.bytes_per_token: float | None = None  # measured last; None before the first measurement in a tower
        self._last: dict[int, int] = {}  # storages of the last graph measured, and their bytes
        # Storages that cost nothing more: parameters, and what kept graphs hold. All alive: no address comes twice.
        self._there = _storages(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))

    def will_fit(self, slicer: Rows, rows: Tensor) -> bool:
        """Whether the graph of these rows fits beside what is kept and one working set; no before a measurement."""
        per_token = self.bytes_per_token
        return per_token is not None and self._fits(int(per_token * slicer.padded_tokens(rows)))

    def keep_last(self) -> bool:
        """Note that the graph measured last is kept, if it fits; whether it does."""
        size = sum(self._last.values())
        if not self._fits(size):
            return False
        self.spent += size
        self._there |= self._last
        return True

    def record_embeddings(self, outputs: Sequence[Tensor]) -> None:
        """Set memory aside for the embeddings of the whole step, now that some are there. Ranks share each other's."""
        self.leaves = max(self.leaves, leaf_bytes(outputs, self.num_rows * distributed.world_size()))

    @contextlib.contextmanager
    def measure(self, slicer: Rows, rows: Tensor) -> Iterator[None]:
        """Count the bytes that autograd saves inside."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            sizes.update(_storages([tensor]))
            # Not the tensor itself: an output that its own node saves would hold the graph, which would never be freed.
            return tensor.detach(), tensor._version

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
        self._last = {place: size for place, size in sizes.items() if place not in self._there}
        self.largest = max(self.largest, sum(self._last.values()))
        self.bytes_per_token = sum(self._last.values()) / slicer.padded_tokens(rows)

    def _fits(self, size: int) -> bool:
        if self.overrun or (self.most is not None and self.spent + size > self.most):
            return False
        return self.start + self.leaves + self.spent + size + max(self.largest, size) <= self.limit


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Addresses and bytes; a wrapper (sharded, quantised) has no storage of its own."""
    plain = (tensor.untyped_storage() for tensor in tensors if not is_traceable_wrapper_subclass(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in plain}


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    """The saved tensor; autograd's own check of its version rests where there are hooks."""
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(tensor.shape)} is at version {tensor._version}; expected version {version}."
        )
    return tensor


def leaf_bytes(outputs: Sequence[Tensor], num_rows: int) -> int:
    """Bytes that embeddings of `num_rows` rows, in float32 or better, and what the loss makes of them need."""
    sizes = (math.prod(o.shape[1:]) * torch.promote_types(o.dtype, torch.float32).itemsize for o in outputs)
    return LEAF_COPIES * num_rows * sum(sizes)


def gradient_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the gradients that a step will make."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters_of(modules))


class StepMemory:
    """A memory budget that lasts for many steps: give the same object to each of them.

        tokens = the largest power of two with  2 * (fixed + slope * tokens) <= memory - in use - gradients - embeddings

    where fixed and slope (bytes per padded token) are what autograd saves of the longest row, and of the longest two.
    Half of the room is left for kept graphs. It is found once for each encoder, and again when a longer row comes. When
    memory runs out all the same, the step goes on with halves, and later steps start from there.

    Args:
        memory: The most memory in use on the device, parameters, optimiser and other processes included: "8GiB", "80%",
            or bytes.

    Example:
        >>> from anybatch import InfoNCE, cached_step
        >>> encoder, memory = torch.nn.Linear(6, 4), StepMemory("80%")
        >>> for _ in range(2):
        ...     inputs = [torch.randn(8, 6), torch.randn(8, 6)]
        ...     settings = {"mini_batch_size": "auto", "keep_graphs": "auto", "memory": memory}
        ...     value = cached_step(InfoNCE(), encoder, inputs, **settings)
    """

    def __init__(self, memory: str | int = "80%") -> None:
        parse_memory(memory, 2**40)  # a wrong form is reported here, not in the first step
        self.memory = memory
        self.learned: int | None = None  # the most padded tokens of a mini-batch, once memory ran out
        self.learned_samples: int | None = None  # the same in rows, of inputs without lengths (images)
        self._most_kept: int | None = None
        self._budget: GraphBudget | None = None
        self._found: dict[tuple[object, ...], tuple[int, int]] = {}  # by modules: longest row measured, tokens

    def next_step(self, modules: Sequence[nn.Module], inputs: Sequence[object], *, num_rows: int) -> GraphBudget:
        """The budget of one step of `num_rows` rows, all towers together; takes note of what the step before found."""
        past = self._budget
        if past is not None and past.overrun:
            self._most_kept = int(0.9 * past.spent)
        device, reserve = device_of([*modules, *inputs]), LOSS_RESERVE + gradient_bytes(modules)
        self._budget = GraphBudget(
            self.memory, device=device, reserve=reserve, num_rows=num_rows, most=self._most_kept, modules=modules
        )
        return self._budget

    def limits(
        self, tower: Tower, mini_batch_size: int | str | None, max_tokens: int | None, *, num_rows: int
    ) -> tuple[int | None, int | None]:
        """`mini_batch_size` and `max_tokens` of a tower in a step of `num_rows` rows: as wanted, probed, learned."""
        by_rows = tower.slicer.lengths is None
        learned = self.learned_samples if by_rows else self.learned
        if mini_batch_size == "auto":
            probed = _least(self._probed(tower, num_rows), learned)
            return (probed, None) if by_rows else (None, _least(probed, max_tokens))
        rows: int | None = mini_batch_size  # type: ignore[assignment]
        return (_least(rows, learned), max_tokens) if by_rows else (rows, _least(max_tokens, learned))

    def record_out_of_memory(self, tokens: int, *, by_rows: bool) -> None:
        """Memory ran out; `tokens` padded tokens are tried next (rows, of inputs without lengths)."""
        if by_rows:
            self.learned_samples = _least(tokens, self.learned_samples)
        else:
            self.learned = _least(tokens, self.learned)

    def _probed(self, tower: Tower, num_rows: int) -> int:
        """Padded tokens of a mini-batch; rows, where there are no lengths."""
        if any(isinstance(module, FSDPModule) for module in tower.wrapped):
            raise AnybatchError(
                'mini_batch_size="auto" tries rows on each rank alone, and a sharded encoder (fully_shard) runs '
                "on all ranks together. Give mini_batch_size or max_tokens a number."
            )
        costs = tower.slicer.costs
        length = 1 if costs is None else int(costs.max())
        # A function may be made anew for every step, its modules are not. One model may take texts and images.
        kind = "rows" if costs is None else "tokens" if tower.slicer.patches is None else "patches"
        key = (tower.visible or tower.modules or (tower.encode,), kind)
        known = self._found.get(key)
        if known is None or length > known[0]:
            known = self._found[key] = length, self._probe(tower, num_rows)
        return known[1]

    def _probe(self, tower: Tower, num_rows: int) -> int:
        # 1. The longest row, and the longest two, with a graph.
        slicer = tower.slicer
        order = torch.arange(slicer.num_rows)
        if slicer.costs is not None:
            order = torch.sort(slicer.costs, descending=True, stable=True).indices
        one, leaves = graph_bytes(tower, order[:1], num_rows)
        two, _ = graph_bytes(tower, order[:2], num_rows)
        if one is None:
            raise AnybatchError(f"Out of memory with a single row: {NO_ROOM}")
        tokens = slicer.padded_tokens(order[:1])
        if two is None:
            return tokens
        # 2. What there is room for.
        slope = (two - one) / max(1, slicer.padded_tokens(order[:2]) - tokens) if len(order) > 1 else one / tokens
        fixed = max(0.0, one - slope * tokens)
        device = device_of([*tower.modules, slicer.inputs])
        limit = parse_memory(self.memory, total_memory(device))
        room = limit - memory_in_use(device) - LOSS_RESERVE - leaves - gradient_bytes(tower.facts.modules)
        if 2 * one > room:
            warnings.warn(
                f"memory={self.memory!r} leaves {max(0, room) / 2**20:.0f} MiB for the encoder, and one row ({tokens} "
                f"tokens) needs about {2 * one / 2**20:.0f} MiB. With single rows the budget will be exceeded.",
                stacklevel=2,
            )
            return tokens
        # 3. The tokens that fill half of it.
        most = MOST_TOKENS.get(device.type, MOST_TOKENS_ACCELERATOR)
        if slope <= 0:  # frozen: nothing is saved
            return most
        fits = (room / 2 - fixed) / slope
        fewest = FEWEST_TOKENS if slicer.lengths is not None else 1  # rows without lengths may be large each
        return max(fewest, min(most, 2 ** int(math.log2(max(fits, 1.0)))))


def graph_bytes(tower: Tower, rows: Tensor, num_rows: int) -> tuple[int | None, int]:
    """What autograd saves for these rows, None if they do not fit; and the loss's share for `num_rows`."""
    device = device_of([*tower.modules, tower.slicer.inputs])
    budget = GraphBudget(1, device=device, num_rows=num_rows, modules=tower.modules)
    with torch.enable_grad(), tower.leaving_no_trace(tower.random_state()):
        outputs, _ = unless_out_of_memory(partial(tower.embed, rows, budget.measure(tower.slicer, rows)))
    if outputs is None:
        return None, 0
    budget.record_embeddings(outputs)
    return budget.largest, budget.leaves


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
