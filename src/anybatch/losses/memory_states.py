"""Saved states: joined from shards, grown for appended rows, cut to what a rank stores.

A state of an `ExampleMemory` is what `state_dict` gives: `log_mean` (directions, stored slots), `shard` (rank, ranks, slots), and `slot` (n,)
where rows share slots.
Nothing here needs a process group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.losses.per_example import OTHER_LOSS, PerExample


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


def grown_state(state: Mapping[str, Tensor], loss: nn.Module) -> dict[str, Tensor]:
    """A whole saved state, made to fit a loss for a data set to which rows were appended.

    `loss.load_state_dict(grown_state(torch.load(path), loss))` is the explicit request without which a state of another size is refused. The old
    rows come back as they were saved: memory, learned values and their velocities, kept embeddings. The new ones are as in a loss just made.

    Args:
        state: What `loss.state_dict()` gave, of fewer rows or as many.
        loss: Any loss of the library, or a module that holds some: made for the new number of rows (and the new keys), or grown to it.

    Raises:
        AnybatchError: The state has more rows, is a shard (join them first), or has keys that are not the first of the loss's.
    """
    grown = dict(state)
    for path, module in loss.named_modules(remove_duplicate=False):  # a state has an entry for every name
        if isinstance(module, PerExample):
            module.grow_state(grown, path + "." if path else "")
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
            + OTHER_LOSS
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
