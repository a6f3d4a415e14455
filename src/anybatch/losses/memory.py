"""Per-example state: one logarithm a slot and direction, in buffers, so that a checkpoint holds it; whole on each rank, or shared out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.memory_states import fitted
from anybatch.losses.per_example import Keys, PerExample, extended, only_growing

VERSION = 3  # 2: the mean was over the candidates that were not masked
OTHER_KEYS = "The keys do not begin with those of the rows that the memory has. New rows go behind the old ones."
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class ExampleMemory(PerExample):
    """A moving average of exp(x) for each example, kept as its logarithm.

        memory_i <- log((1 - gamma) exp(memory_i) + gamma * mean over the row's occurrences in the batch of exp(x))

    Rows never visited are NaN (a flag of its own, not a threshold) and take the batch's value whole. Occurrences of one row in a
    batch are combined first, in their order, so that the result does not depend on the machine.

    Args:
        num_rows: n.
        num_directions: Independent states a row.
        dtype: "float32", or "float16", which keeps three digits (2^-11 relative): enough for a logarithm that moves by more
            than that a visit, that is for gamma above 0.05 or so; smaller steps are rounded away.
        sharded: Each rank stores the slots r with r % world_size == rank, instead of all of them. Decided when the memory is first used, because
            the process group seldom exists when a loss is made. Equal to the replicated memory bit for bit.

    A slot is a row, unless `from_keys` made rows share slots.

    Cost: 4 (2) bytes a slot and direction, divided by the ranks if sharded; an update touches B of them. Collectives a call with W ranks:
    one of sizes, two gathers of B numbers; sharded: one sum of B numbers more.
    """

    def __init__(
        self, num_rows: int, num_directions: int = 1, *, dtype: str = "float32", sharded: bool = False
    ) -> None:
        super().__init__()
        if num_rows < 2:
            raise AnybatchError(f"num_rows is {num_rows}; expected the number of rows of the data set, at least 2.")
        if dtype not in DTYPES:
            raise AnybatchError(
                f"The memory's dtype is {dtype!r}; expected 'float32' or 'float16' (bfloat16 never moves)."
            )
        self.sharded = sharded
        self.log_mean: Tensor
        self.version: Tensor
        self.dimensions: Tensor
        self.shard: Tensor
        self.slot: Tensor | None
        stored = 0 if sharded else num_rows
        log_mean = torch.full((num_directions, stored), torch.nan, dtype=DTYPES[dtype])
        self.register_rows("log_mean", log_mean, fresh=torch.nan)
        self.register_buffer("version", torch.tensor(VERSION))
        self.register_buffer("dimensions", torch.tensor(0))  # width of the embeddings it was filled from; 0 before that
        self.register_buffer(
            "shard", torch.tensor([0, 0 if sharded else 1, num_rows])
        )  # rank, ranks (0: not yet known), slots
        self.register_buffer("slot", None)

    @classmethod
    def from_keys(
        cls,
        keys: Keys,
        num_directions: int = 1,
        *,
        dtype: str = "float32",
        sharded: bool = False,
    ) -> ExampleMemory:
        """A memory in which rows of equal key share a slot: several rows of one query, several views of one image.

        Args:
            keys: (n,) integers.
            num_directions, dtype, sharded: See the class.

        Slots are numbered by first appearance, so that appending rows moves none. The map, 8 bytes a row, is a buffer on every rank
        and part of the state; where keys are 0..k-1 already, save it: make a memory of k rows and give the keys as `index`.

        A shared state must not depend on the row's own positive: keep the absolute log-mean of s_ij / tau in it, as `SogCLR` does, not the
        one relative to the positive.
        """
        slot = _slots(keys)
        memory = cls(int(slot.max()) + 1 if len(slot) else 0, num_directions, dtype=dtype, sharded=sharded)
        memory.slot = slot
        return memory

    @property
    def keyed(self) -> bool:
        """Whether rows share slots."""
        return self.slot is not None

    @property
    def num_slots(self) -> int:
        """Slots over all ranks."""
        return (
            int(self.shard[2]) if self.sharded else self.log_mean.shape[1]
        )  # without a look at the device where it can be

    @property
    def num_rows(self) -> int:
        """Rows of the data set that it covers."""
        return self.num_slots if self.slot is None else len(self.slot)

    @property
    def visited(self) -> Tensor:
        """(num_directions, stored slots) bool: of this rank's slots."""
        return ~self.log_mean.isnan()

    def check(self, dimensions: int) -> None:
        """Refuse embeddings of another width than the memory was filled from.

        Raises:
            AnybatchError: They are.
        """
        if int(self.dimensions) not in (0, dimensions):
            raise AnybatchError(
                f"The memory was filled from embeddings of {int(self.dimensions)} dimensions, these have {dimensions}. Denominators of different "
                "widths must not be mixed: use one loss a width (anybatch.losses.Matryoshka makes them)."
            )

    def blend(
        self,
        index: Tensor,
        batch: Tensor,
        *,
        said: Tensor | None = None,
        direction: int,
        gamma: float | Callable[[Tensor], tuple[Tensor, Tensor]],
        update: bool,
        dimensions: int,
    ) -> Tensor:
        """The new state of the batch's rows, stored if `update`.

        Args:
            index: (B,) int64 rows.
            batch: (B,) what this batch says: the log of a mean; -inf for a mean of 0, all of whose terms are masked.
            said: (B,) bool, false where it says nothing, as the mean is over nothing; None for none.
            direction: Which state.
            gamma: Weight of the batch, in (0, 1]; or a function of the old states that gives log gamma and log(1 - gamma).
            update: Store the result.
            dimensions: Width of the embeddings.

        Returns:
            (B,) in the dtype of `batch`; -inf for rows never visited of which the batch says nothing. Such rows, and those whose mean is 0, stay
            unvisited. Rows of which the batch says NaN or +inf keep what they knew, in the memory but not in what is returned.
        """
        sizes = distributed.gather_sizes(len(index), index.device)
        slot = index if self.slot is None else self.slot[index]
        said = torch.ones_like(batch) if said is None else said.to(batch.dtype)
        index_all = distributed.gather_rows(slot, sizes)
        figures = distributed.gather_rows(torch.stack([batch, said], dim=1), sizes)
        slots, inverse = torch.unique(index_all, return_inverse=True)
        combined, heard = _combine(figures[:, 0], figures[:, 1], inverse, len(slots))
        # The state is float32 (or float16); the arithmetic is the batch's, so that float64 checks see no rounding but the state's own.
        old = self._read(slots, direction).to(batch.dtype)
        if callable(gamma):
            log_gamma, log_stay = gamma(old)
        else:
            log_gamma, log_stay = math.log(gamma), math.log1p(-gamma) if gamma < 1 else -math.inf
        new = torch.where(old.isnan(), combined, torch.logaddexp(old + log_stay, combined + log_gamma))
        new = torch.where(heard, new, torch.where(old.isnan(), -torch.inf, old))
        if update:
            # A step that has diverged (NaN, +inf) is the trainer's to skip.
            stored = torch.where(new.isneginf(), torch.nan, torch.where(new.isfinite(), new, old))
            self._write(slots, stored, direction)
            self.dimensions.fill_(dimensions)
        first = sum(sizes[: distributed.rank()])
        return new[inverse[first : first + len(index)]]

    def read(self, rows: Tensor, *, direction: int = 0) -> Tensor:
        """The state of some rows, NaN where never visited.

        Args:
            rows: (R,) int64, **the same on every rank**.
            direction: Which state.

        Returns:
            (R,) in the memory's dtype. Collectives: none; sharded: one sum of R numbers.
        """
        return self._read(rows if self.slot is None else self.slot[rows], direction)

    def write(self, rows: Tensor, values: Tensor, *, direction: int = 0, dimensions: int) -> None:
        """Replace the state of some rows.

        Args:
            rows: (R,) int64, **the same on every rank**. Rows of one slot must come with one value.
            values: (R,) log-means; NaN for never visited.
            direction: Which state.
            dimensions: Width of the embeddings the values come from.
        """
        self._write(rows if self.slot is None else self.slot[rows], values, direction)
        self.dimensions.fill_(dimensions)

    def grow(self, num_rows: int | None = None, *, keys: Keys | None = None) -> None:
        """Make room for rows appended to the data set; the old ones keep their state, the new ones were never visited.

        Args:
            num_rows: The new number of rows, for a memory without keys.
            keys: (n,) keys of all rows, old and new, for a memory with keys.

        Raises:
            AnybatchError: Fewer rows than before; keys for a memory without them or the other way round; other keys for the old rows.
        """
        if (keys is not None) != self.keyed or (num_rows is None) != self.keyed:
            wanted = "keys=, the keys of all rows" if self.keyed else "num_rows, the new number of rows"
            raise AnybatchError(f"To grow this memory give {wanted}.")
        if keys is not None:
            slot = _slots(keys).to(self.log_mean.device)
            assert self.slot is not None
            if len(slot) < len(self.slot):
                raise only_growing(len(slot), len(self.slot))
            if not _begins(slot, self.slot):
                raise AnybatchError(OTHER_KEYS)
            self.slot, num_slots = slot, int(slot.max()) + 1
        else:
            assert num_rows is not None
            if num_rows < self.num_slots:
                raise only_growing(num_rows, self.num_slots)
            num_slots = num_rows
        self.shard[2] = num_slots
        if int(self.shard[1]):  # slot s is the owner's number s // ranks, so that no old slot moves
            self.grow_buffers(_stored(num_slots, int(self.shard[0]), int(self.shard[1])))

    def grow_state(self, state: dict[str, Any], prefix: str) -> None:
        """See `PerExample.grow_state`; with keys, those of the saved rows must be the first of this memory's.

        Raises:
            AnybatchError: The state is a shard, has other keys, or more rows.
        """
        name = prefix + "log_mean"
        if name not in state:
            return
        if int(state.get(prefix + "shard", torch.tensor([0, 1]))[1]) > 1:
            raise AnybatchError(
                "Only a whole state can be grown: join the shards first, with anybatch.losses.memory_states.join_shards."
            )
        saved = state.get(prefix + "slot")
        if saved is not None and self.slot is not None and len(saved) > len(self.slot):
            raise only_growing(len(self.slot), len(saved))
        if (saved is None) != (self.slot is None) or (
            saved is not None and self.slot is not None and not _begins(self.slot, saved)
        ):
            raise AnybatchError(OTHER_KEYS)
        if self.slot is not None:
            state[prefix + "slot"] = self.slot.clone()
        state[name] = extended(state[name], self.num_slots, torch.nan)
        state[prefix + "shard"] = torch.tensor([0, 1, self.num_slots])

    def settle(self) -> None:
        """Decide, from the process group at this moment, which slots of a sharded memory this rank stores. Every use does so.

        Raises:
            AnybatchError: It was decided before, for another number of ranks, and something is stored.
        """
        if not self.sharded:
            return
        rank, world_size, known = distributed.rank(), distributed.world_size(), int(self.shard[1])
        if (int(self.shard[0]), known) == (rank, world_size):
            return
        if known == 0 or not bool(
            self.visited.any()
        ):  # nothing is lost: somebody saved or copied it before the process group was there
            stored = _stored(self.num_slots, rank, world_size)
            with torch.inference_mode(False):  # written to later, outside of one as well
                self.log_mean = self.log_mean.new_full((len(self.log_mean), stored), torch.nan)
            self.shard[:2] = torch.tensor([rank, world_size])
        else:
            raise AnybatchError(
                f"This memory is shard {int(self.shard[0])} of {known}; this is rank {rank} of {world_size}. Join the shards with "
                "anybatch.losses.memory_states.join_shards and load the whole state."
            )

    def _read(self, slots: Tensor, direction: int) -> Tensor:
        self.settle()
        if not self.sharded or int(self.shard[1]) == 1:
            return self.log_mean[direction, slots]
        own, place = self._own(slots)
        # One rank adds the number (or NaN), the others zeros: the sum is that number exactly.
        dtype = torch.promote_types(self.log_mean.dtype, torch.float32)
        values = torch.zeros(len(slots), dtype=dtype, device=slots.device)
        values[own] = self.log_mean[direction, place].to(dtype)
        return distributed.sum_over_ranks(values).to(self.log_mean.dtype)

    def _write(self, slots: Tensor, values: Tensor, direction: int) -> None:
        self.settle()
        limits = torch.finfo(self.log_mean.dtype)  # float16 ends at 65,504, and infinity would be for ever
        values = values.to(self.log_mean.dtype).clamp(limits.min, limits.max)
        if self.sharded:
            own, place = self._own(slots)
            self.log_mean[direction, place] = values[own]
        else:
            self.log_mean[direction, slots] = values

    def _own(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `slots` this rank stores (bool), and where."""
        rank, ranks = int(self.shard[0]), int(self.shard[1])
        own = slots % ranks == rank
        return own, slots[own] // ranks

    def _save_to_state_dict(self, *arguments: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.settle()
        super()._save_to_state_dict(*arguments)

    def check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """See `PerExample.check_state`; a whole state also fits a shard."""
        self.settle()
        self._fitted(state, prefix)
        width, own_width = (int(one) for one in (state.get(prefix + "dimensions", 0), self.dimensions))
        if width and own_width and width != own_width:
            raise AnybatchError(
                f"The saved memory is of embeddings of {width} dimensions, this one of {own_width}. Load it into a loss just made."
            )
        super().check_state({name: value for name, value in state.items() if name == prefix + "version"}, prefix)

    def _fitted(self, state: Mapping[str, Any], prefix: str) -> Tensor | None:
        """What this rank stores of the saved states; None without any."""
        if not {prefix + "log_mean", prefix + "shard"} <= state.keys():
            return None
        return fitted(
            state[prefix + "log_mean"],
            state[prefix + "shard"].tolist(),
            state.get(prefix + "slot"),
            num_directions=len(self.log_mean),
            wanted=self.shard.tolist(),
            own_slot=self.slot,
        )

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        self.check_state(state_dict, prefix)
        own = self._fitted(state_dict, prefix)
        if own is not None:
            state_dict |= {prefix + "log_mean": own, prefix + "shard": self.shard.clone()}
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _stored(num_slots: int, rank: int, world_size: int) -> int:
    """How many slots s < num_slots have s % world_size == rank."""
    return (num_slots - rank + world_size - 1) // world_size


def _begins(longer: Tensor, shorter: Tensor) -> bool:
    """Whether `longer` begins with `shorter`."""
    return torch.equal(longer[: len(shorter)].cpu(), shorter.cpu())


def _slots(keys: Keys) -> Tensor:
    """(n,) int64: for each row the number of its key, keys counted in the order in which they first appear."""
    array = np.asarray(keys.cpu() if isinstance(keys, Tensor) else keys)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise AnybatchError(f"keys are {array.dtype} of shape {array.shape}; expected one integer a row.")
    _, first, inverse = np.unique(array, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return torch.as_tensor(number[inverse])


def _combine(values: Tensor, said: Tensor, inverse: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Log of the mean of exp(values) over those of each group for which `said` is 1, and (groups,) bool whether there are any."""
    total, count = values.new_full((num_groups,), -torch.inf), said.new_zeros(num_groups).index_add_(0, inverse, said)
    lengths = torch.bincount(inverse, minlength=num_groups)
    if int(lengths.max()) == 1:
        total[inverse] = values
        return total, count > 0
    values = torch.where(said > 0, values, -torch.inf)
    order = torch.argsort(inverse, stable=True)
    starts = lengths.cumsum(0) - lengths
    occurrence = torch.arange(len(order), device=order.device) - starts[inverse[order]]
    for number in range(int(lengths.max())):  # one occurrence of each row at a time: a fixed order of additions
        chosen = order[occurrence == number]
        groups = inverse[chosen]
        total[groups] = torch.logaddexp(total[groups], values[chosen])
    return total - count.clamp(min=1).log(), count > 0
