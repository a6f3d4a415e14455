"""Saved states of an `ExampleMemory`: joined from shards, grown for appended rows, cut to what a rank stores.

A state is what `state_dict` gives: `log_mean` (directions, stored slots), `shard` (rank, ranks, slots), and `slot` (n,) where rows share slots.
Nothing here needs a process group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anybatch.errors import AnybatchError


def join_shards(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One whole state from the state dictionaries of all ranks of a loss (or memory) with sharded memories, in any order.

    It loads into a replicated memory, and into a sharded one of any number of ranks. Needs no process group: read the ranks' files.

    Raises:
        AnybatchError: A shard is missing or comes twice.
    """
    whole = dict(states[0])
    for name in [name for name in whole if name.endswith("log_mean")]:
        prefix = name.removesuffix("log_mean")
        parts = {int(state[prefix + "shard"][0]): state[name] for state in states}
        ranks, num_slots = int(whole[prefix + "shard"][1]), int(whole[prefix + "shard"][2])
        if sorted(parts) != list(range(ranks)) or len(states) != ranks:
            raise AnybatchError(
                f"Got the shards {sorted(parts)} from {len(states)} states; expected each of 0 to {ranks - 1} once."
            )
        joined = parts[0].new_empty((len(parts[0]), num_slots))
        for rank, part in parts.items():
            joined[:, rank::ranks] = part
        whole[name], whole[prefix + "shard"] = joined, torch.tensor([0, 1, num_slots])
    return whole


def grown_state(state: Mapping[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """A whole saved state, made to fit a loss for a data set to which rows were appended: the new rows were never visited.

    For memories without keys. `loss.load_state_dict(grown_state(torch.load(path), num_rows))` is the explicit request without which
    a state of another size is refused.

    Raises:
        AnybatchError: The state has more rows, is a shard (join them first), or has keys (load it, then call `grow(keys=...)`).
    """
    grown = dict(state)
    for name in [name for name in grown if name.endswith("log_mean")]:
        prefix, old = name.removesuffix("log_mean"), grown[name]
        if prefix + "slot" in grown or int(grown.get(prefix + "shard", torch.tensor([0, 1]))[1]) != 1:
            raise AnybatchError(
                "Only a whole state without keys can be grown: join shards first; with keys load, then call memory.grow(keys=...)."
            )
        if num_rows < old.shape[1]:
            raise AnybatchError(
                f"num_rows is {num_rows}, fewer than the {old.shape[1]} of the saved memory. It can only grow."
            )
        grown[name] = torch.cat([old, old.new_full((len(old), num_rows - old.shape[1]), torch.nan)], dim=1)
        grown[prefix + "shard"] = torch.tensor([0, 1, num_rows])
    return grown


def fitted(
    state: Tensor,
    saved: Sequence[int],
    slot: Tensor | None,
    *,
    num_directions: int,
    wanted: Sequence[int],
    own_slot: Tensor | None,
) -> Tensor:
    """What a rank stores, out of a saved state.

    Args:
        state: (directions, stored slots), the saved `log_mean`.
        saved: Its rank, ranks and slots.
        slot: (n,) int64, its map from rows to slots; None where each row is one.
        num_directions: Of the memory that loads it.
        wanted: Rank, ranks and slots of that memory.
        own_slot: (n,) int64, the map of that memory, or None.

    Returns:
        (directions, slots of the rank).

    Raises:
        AnybatchError: Another size, other shared slots, a shard that is not the wanted one.
    """
    rank, ranks, num_slots = saved
    if (len(state), num_slots) != (num_directions, wanted[2]):
        raise AnybatchError(
            f"The saved memory has shape {(len(state), num_slots)}, this loss {(num_directions, wanted[2])} (directions, rows). "
            "Resume with the loss and the data set that the run was started with, or, if rows were appended, pass the state through "
            "anybatch.losses.memory_states.grown_state."
        )
    if (slot is None) != (own_slot is None) or (
        slot is not None and own_slot is not None and not torch.equal(slot.cpu(), own_slot.cpu())
    ):
        raise AnybatchError(
            "The saved memory shares its slots between other rows. Resume with the keys that the run was started with."
        )
    if [rank, ranks] == list(wanted[:2]):
        return state
    if ranks != 1:
        raise AnybatchError(
            f"The saved memory is shard {rank} of {ranks}, wanted is shard {wanted[0]} of {wanted[1]}. Join the shards with "
            "anybatch.losses.memory_states.join_shards and load the whole state."
        )
    return state[:, wanted[0] :: wanted[1]]
