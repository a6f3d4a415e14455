"""Batches chosen before training: `BatchPlan`, on disk and bound to its data, and `PlanSampler`, which gives them out.

Cost: 4 bytes a row, and one permutation of the clusters an epoch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors
from torch.utils.data import BatchSampler

from anybatch.core.errors import AnybatchError
from anybatch.core.files import SEAL, digest_of, read_sealed, tensors_metadata, write_sealed
from anybatch.plans.sampling import ClusterSampling

FORMAT = "anybatch-plan"
VERSION = 7
ARRAYS = ("cluster", "suspects", "negatives", "task")


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """Equal batches over the rows of one data set, or of several, made of clusters that are combined anew every epoch.

    In every epoch each row occurs at most once and every batch has exactly `batch_size` rows: `batch_size /
    cluster_size` whole clusters, drawn at random. Rows in no cluster take the places of others, epoch by epoch others,
    so that no row is lost for ever (`ClusterSampling`). All of it depends on nothing but the plan and the epoch.

    Attributes:
        num_rows: Rows of the data.
        batch_size: Rows of a batch, over all ranks.
        cluster_size: Rows of a cluster; 1 makes plain random batches.
        cluster: (num_rows,) int32, each row's cluster 0, 1, ...; -1 for rows in none.
        seed: Of the combination of clusters.
        data_digest: Digest of the texts (`PairData.digest`).
        suspects: (p, 2) int32 suspected false negatives: a row, and one of any cluster whose text may be right for it;
            None: not looked for.
        negatives: (num_rows, h) int32 rows mined as hard negatives of each anchor, -1 for none; None for none at all.
        task: (num_rows,) int32, each row's data set; None for one data set.
        task_names: Their names.
        mixing: Of several data sets: batches "within" one each, or "mixed".
        meta: How the plan was made; anything that JSON holds.

    Raises:
        AnybatchError: Sizes that do not fit; a negative seed; clusters that are not all of `cluster_size`; fewer rows
            than a batch.

    Example:
        >>> plan = BatchPlan(
        ...     num_rows=9, batch_size=4, cluster_size=2, cluster=np.array([0, 0, 1, 1, 2, 2, 3, 3, -1]), seed=0,
        ...     data_digest="",
        ... )
        >>> plan.epoch_batches(0).shape, len(plan.rows_left_out(0))
        ((2, 4), 1)
    """

    num_rows: int
    batch_size: int
    cluster_size: int
    cluster: np.ndarray
    seed: int
    data_digest: str
    suspects: np.ndarray | None = None
    negatives: np.ndarray | None = None
    task: np.ndarray | None = None
    task_names: tuple[str, ...] = ()
    mixing: Literal["mixed", "within"] = "mixed"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_batch(self.num_rows, self.batch_size, self.cluster_size)
        if self.seed < 0:
            raise AnybatchError(f"seed is {self.seed}; expected 0 or more.")
        self._check_numbers()
        self._check_clusters()
        self._check_tasks()
        if self.num_clusters < self.clusters_per_batch or self.num_batches < 1:
            raise AnybatchError(
                f"{self.num_clusters} clusters of {self.cluster_size} rows do not fill one batch of {self.batch_size}. "
                "Lower the batch size."
            )

    @classmethod
    def random(cls, num_rows: int, batch_size: int, *, seed: int = 0, data_digest: str = "") -> BatchPlan:
        """Plain random batches: every row its own cluster."""
        check_batch(num_rows, batch_size, 1)
        return cls(
            num_rows=num_rows,
            batch_size=batch_size,
            cluster_size=1,
            cluster=np.arange(num_rows, dtype=np.int32),
            seed=seed,
            data_digest=data_digest,
            meta={"method": "random"},
        )

    @property
    def clusters_per_batch(self) -> int:
        """Clusters in a batch."""
        return self.batch_size // self.cluster_size

    @cached_property
    def num_clusters(self) -> int:
        """Clusters in all."""
        return int(self.cluster.max(initial=-1)) + 1

    @property
    def negatives_per_row(self) -> int:
        """Hard negatives mined for each row."""
        return 0 if self.negatives is None else self.negatives.shape[1]

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return self.sampling.num_batches

    @cached_property
    def sampling(self) -> ClusterSampling:
        """How clusters come together, and with what chances rows do."""
        cluster_task = np.zeros(self.num_clusters, np.int32)
        if self.task is not None and self.num_clusters:
            cluster_task = self.task[self._members[:, 0]]
        return ClusterSampling(
            cluster_task=cluster_task,
            num_sets=len(self._loose),
            clusters_per_batch=self.clusters_per_batch,
            within=self.mixing == "within",
            cluster_size=self.cluster_size,
            remainders=tuple(map(len, self._loose)),
        )

    @cached_property
    def digest(self) -> str:
        """Identifies what the plan makes of its data: sizes, clusters, seed, data, hard negatives and suspects."""
        parts = [json.dumps([self.num_rows, self.batch_size, self.cluster_size, self.seed, self.data_digest]).encode()]
        if self.task is not None:
            parts.append(json.dumps([self.task_names, self.mixing]).encode())
        for name in ARRAYS:
            array = getattr(self, name)
            if array is not None and len(array):
                parts += [name.encode(), np.ascontiguousarray(array, np.int32).tobytes()]
        return digest_of(parts)

    def epoch_batches(self, epoch: int) -> np.ndarray:
        """The batches of an epoch: (num_batches, batch_size) int64 row numbers, cluster after cluster."""
        return self.sampling.batches(self._members, self._loose, np.random.default_rng([self.seed, epoch]))

    def rows_left_out(self, epoch: int) -> np.ndarray:
        """The rows that are in no batch of this epoch, ascending, int64."""
        return np.setdiff1d(np.arange(self.num_rows), self.epoch_batches(epoch))

    def check(self, *, num_rows: int, data_digest: str) -> None:
        """Refuse the plan for other data: another number of rows, or other texts."""
        if num_rows != self.num_rows:
            raise AnybatchError(
                f"The plan was made for other data: it has {self.num_rows} rows, the data has {num_rows}. "
                "Mine these data anew."
            )
        if data_digest != self.data_digest:
            raise AnybatchError(
                f"The plan was made for other data: the row counts agree ({num_rows}), the texts do not (digest "
                f"{self.data_digest[:12]} in the plan, {data_digest[:12]} in the data). Give the file that was mined, "
                "rows in the same order, or mine these data anew."
            )

    @property
    def set_rows(self) -> dict[str, np.ndarray]:
        """Each data set's rows, ascending, by its name; all rows under "" where there is one."""
        if self.task is None:
            return {"": np.arange(self.num_rows)}
        return {name: np.flatnonzero(self.task == number) for number, name in enumerate(self.task_names)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan: safetensors with a JSON header, atomically."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        arrays = {name: np.ascontiguousarray(values[name], np.int32) for name in ARRAYS if values[name] is not None}
        header = {name: value for name, value in values.items() if name not in ARRAYS} | {"meta": dict(self.meta)}
        # One key, because safetensors writes several in no fixed order, and equal plans should be equal files.
        metadata = {FORMAT: json.dumps({"digest": SEAL, "version": VERSION, "plan": header})}
        write_sealed(path, safetensors.save(arrays, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BatchPlan:
        """Read a plan; refuses one that is damaged, or of another version."""
        if not Path(path).is_file():
            folder = Path(path).is_dir()
            what = "is a folder: give the plan.safetensors in it" if folder else "is not there: check the path"
            raise AnybatchError(f"There is no plan at {path}, which {what}, or make one with `anybatch mine`.")
        content = read_sealed(path, "Give the plan.safetensors that `anybatch mine` wrote, or make it again.")
        try:
            kept, arrays = json.loads(tensors_metadata(content)[FORMAT]), safetensors.load(content)
        except (SafetensorError, KeyError, ValueError) as error:
            raise AnybatchError(f"{path} is no plan. Give the plan.safetensors that `anybatch mine` wrote.") from error
        if kept["version"] != VERSION:
            raise AnybatchError(
                f"{path} has plan format {kept['version']}; this anybatch reads {VERSION}. Mine with the anybatch that "
                "reads it."
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept["plan"].items()
        }
        return cls(**{**values, **arrays})

    def _check_numbers(self) -> None:
        """Shapes and ranges, before anything is counted by them."""
        num_clusters = self.num_rows // self.cluster_size
        for name, shape, least, end, what in (
            ("cluster", (self.num_rows,), -1, num_clusters, "one cluster a row, -1 for none"),
            ("suspects", (None, 2), 0, self.num_rows, "pairs of rows"),
            ("negatives", (self.num_rows, None), -1, self.num_rows, "rows for each row, -1 for none"),
            ("task", (self.num_rows,), 0, max(1, len(self.task_names)), "one data set a row"),
        ):
            array: np.ndarray | None = getattr(self, name)
            if array is None:
                continue
            fits = [wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=False)]
            if array.ndim != len(shape) or not all(fits):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise AnybatchError(f"{name} has shape {array.shape}; expected ({wanted}), {what}.")
            if array.dtype.kind not in "iu":
                raise AnybatchError(f"{name} holds {array.dtype}; expected whole numbers, {what}.")
            if array.size and not (least <= array.min() and array.max() < end):
                raise AnybatchError(
                    f"{name} holds numbers from {array.min()} to {array.max()}; expected {least} to {end - 1}, {what}."
                )

    def _check_clusters(self) -> None:
        placed = self.cluster[self.cluster >= 0]
        sizes = np.bincount(placed)
        if np.any(sizes != self.cluster_size):
            raise AnybatchError(
                f"Clusters have {sizes.min()} to {sizes.max()} rows; expected exactly {self.cluster_size} in each."
            )
        if self.cluster_size == 1 and len(placed) < self.num_rows:
            raise AnybatchError(
                f"{self.num_rows - len(placed)} rows are in no cluster, and clusters have one row; expected each row "
                "in a cluster of its own."
            )

    def _check_tasks(self) -> None:
        if self.mixing not in ("mixed", "within"):
            raise AnybatchError(f"mixing is {self.mixing!r}; expected 'mixed' or 'within'.")
        if self.task is None:
            return
        tasks = self.task[self._members]
        if np.any(tasks != tasks[:, :1]):
            raise AnybatchError("A cluster holds rows of several data sets; expected each within one.")

    @cached_property
    def _members(self) -> np.ndarray:
        """(num_clusters, cluster_size) rows of each cluster."""
        order = np.argsort(self.cluster, kind="stable")
        return order[np.count_nonzero(self.cluster < 0) :].reshape(self.num_clusters, self.cluster_size)

    @cached_property
    def _loose(self) -> list[np.ndarray]:
        """For each data set its rows in no cluster."""
        rows = np.flatnonzero(self.cluster < 0)
        if self.task is None:
            return [rows]
        return [rows[self.task[rows] == number] for number in range(len(self.task_names))]


class PlanSampler(BatchSampler):
    """The batches of a plan, for a `DataLoader` (`batch_sampler=`) or any loop.

    Args:
        plan: Where the batches come from.
        rank: Give this rank's share of each global batch only; None gives the shares of all ranks one after the other,
            which is what Accelerate's batch sampler shards expect (and, with one rank, simply the batches).
        world_size: Ranks that share a batch.
        epoch: The first epoch.

    Raises:
        AnybatchError: A batch that the ranks cannot share equally.

    Example:
        >>> sampler = PlanSampler(BatchPlan.random(100, 8), rank=1, world_size=2)
        >>> len(sampler), {len(rows) for rows in sampler}
        (12, {4})
    """

    def __init__(self, plan: BatchPlan, *, rank: int | None = None, world_size: int = 1, epoch: int = 0) -> None:
        if plan.batch_size % world_size:
            raise AnybatchError(
                f"The plan's batches of {plan.batch_size} rows cannot be shared equally by {world_size} ranks. "
                f"Use a multiple of {world_size}."
            )
        if rank is not None and not 0 <= rank < world_size:
            raise AnybatchError(f"rank is {rank}; expected 0 to {world_size - 1}.")
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.batch_size = plan.batch_size // world_size
        self.drop_last = True
        self.epoch = epoch
        self.position = 0  # global batches of this epoch given out so far
        self._start = 0  # where the next iteration begins; only a loaded state sets it

    def set_epoch(self, epoch: int) -> None:
        """Go to this epoch: to its beginning, or to a loaded state's position if the state is of this epoch."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def __len__(self) -> int:
        return self.plan.num_batches * (self.world_size if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.plan.epoch_batches(self.epoch)
        shares = range(self.world_size) if self.rank is None else (self.rank,)
        start, self._start = self._start, 0
        for number in range(start, len(batches)):
            self.position = number + 1
            for share in shares:
                yield batches[number, share * self.batch_size : (share + 1) * self.batch_size].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position. A prefetching loader runs ahead of training: set `position` to the steps really taken."""
        return {"plan": self.plan.digest, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same plan; the next `iter` gives exactly the rest of its epoch."""
        if state["plan"] != self.plan.digest:
            raise AnybatchError("The state belongs to another plan. Resume with the plan that the run began with.")
        if not 0 <= state["position"] <= self.plan.num_batches:
            raise AnybatchError(f"Position {state['position']} is outside the plan's {self.plan.num_batches} batches.")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._start = self.position


def check_batch(num_rows: int, batch_size: int, cluster_size: int, name: str = "cluster_size") -> None:
    """Refuse a batch that is no number of whole clusters, or more than the data."""
    if cluster_size < 1 or batch_size < 2:
        raise AnybatchError(f"batch_size is {batch_size} and cluster_size {cluster_size}; expected at least 2 and 1.")
    if batch_size % cluster_size:
        raise AnybatchError(f"batch_size {batch_size} is not a multiple of {name} {cluster_size}; choose one that is.")
    if num_rows < batch_size:
        raise AnybatchError(
            f"The data has {num_rows} rows, fewer than one batch of {batch_size}. Lower the batch size to at most "
            f"{num_rows}."
        )
