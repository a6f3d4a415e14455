"""Mining in one call: teacher embeddings in, plan and report out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core.blocks import release_pages
from anybatch.core.distributed import alone
from anybatch.core.errors import AnybatchError
from anybatch.core.resources import Measure
from anybatch.mining.audit import audit_clusters, most_wanted, suspect_pairs
from anybatch.mining.cells import cell_clusters
from anybatch.mining.config import MiningConfig, MiningReport, MiningSet
from anybatch.mining.graph import Edges, MiningGraph, build_graph
from anybatch.mining.inverted import ivf_neighbors
from anybatch.mining.negatives import sample_negatives
from anybatch.mining.neighbors import Embeddings, Neighbors, Stacked, check_embeddings, compact_ids, exact_neighbors
from anybatch.mining.outlook import mining_outlook
from anybatch.mining.partition import equal_clusters, metis_clusters
from anybatch.mining.recipes import bandwidth_clusters, kmeans_clusters, loss_ordered_clusters
from anybatch.plans.plan import BatchPlan
from anybatch.plans.sampling import ClusterSampling

Progress = Callable[[str, float], None]
EXACT_ROWS = 200_000  # up to here exact neighbours take minutes on two cores


@dataclass(frozen=True, kw_only=True, eq=False)
class MiningResult:
    """The plan and the report on it; the graph, for those who want to look."""

    plan: BatchPlan
    report: MiningReport
    graph: MiningGraph | None = None


def mine_plan(
    anchor_embeddings: np.ndarray,
    positive_embeddings: np.ndarray,
    *,
    config: MiningConfig,
    anchor_id: np.ndarray | None = None,
    positive_id: np.ndarray | None = None,
    sets: Sequence[MiningSet] = (),
    data_digest: str = "",
    start: np.ndarray | None = None,
    device: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> MiningResult:
    """Choose the batches.

    Args:
        anchor_embeddings, positive_embeddings: (n, D) float, the teacher's; may be memory-mapped. Scores are inner products.
        config: See `MiningConfig`.
        anchor_id, positive_id: (n,) int; equal for identical texts, which are never put together. None: all differ.
        sets: Several data sets, one after the other in the rows: each is mined by itself with its own window, into one plan.
        data_digest: `PairData.digest`, which binds the plan to its data.
        start: (n,) int clusters of an earlier plan of the same sizes, from which the search goes on instead of from a partitioner.
        device: Where the neighbours are searched, e.g. "cuda"; None for the compiled search on the CPU.
        folder: The neighbours are kept here as they are found; a killed search goes on and a finished one is not repeated.
        progress: Called with (stage, fraction done).

    Returns:
        Plan, report and graph (None for several data sets).

    Raises:
        AnybatchError: Embeddings that cannot be ranked; sizes that do not fit.

    Warns:
        UserWarning: The rank window is wider than the data and was cut.

    Cost: neighbours n * n * D (exact); then a few seconds for each 100,000 rows. Memory 8 bytes * (skip + take) a row, and about
        as much again three times for the graph.

    Reference: B3, arXiv 2505.11293, section 3, and what this library does differently in docs/mining.md.
    """
    _check_both(anchor_embeddings, positive_embeddings)
    num_rows = len(anchor_embeddings)
    report = MiningReport()
    parts = _parts(sets, num_rows)
    anchor_id, positive_id = (
        np.arange(num_rows) if ids is None else compact_ids(name, ids, num_rows)
        for name, ids in (("anchor_id", anchor_id), ("positive_id", positive_id))
    )
    if config.method == "random":
        return MiningResult(
            plan=random_plan(num_rows, config=config, sets=sets, data_digest=data_digest), report=report
        )
    check_sizes(num_rows, config=config, sets=sets)
    if start is not None and start.shape != (num_rows,):
        raise AnybatchError(f"start has shape {start.shape}; expected ({num_rows},), a cluster for each row.")
    cluster = np.full(num_rows, -1, np.int32)
    negatives = np.full((num_rows, config.num_negatives), -1, np.int32) if config.num_negatives else None
    suspects, graph = [], None
    for one, rows in parts:
        part = report if not sets else report.sets.setdefault(one.name, MiningReport())
        if one.num_rows < config.cluster_size:
            warnings.warn(
                f"The data set '{one.name}' has {one.num_rows} rows, no cluster of {config.cluster_size}: its rows come one by one in the batches of "
                "others, and with inclusion weights they have hardly any negatives.",
                stacklevel=2,
            )
            part.notes.append(
                f"{one.num_rows} rows make no cluster of {config.cluster_size}; they come one by one in the batches of others."
            )
            continue
        chosen = _Part(
            config=_windowed(config, one),
            anchors=anchor_embeddings[rows],
            positives=positive_embeddings[rows],
            anchor_id=anchor_id[rows],
            positive_id=positive_id[rows],
            start=None if start is None else start[rows],
            device=device,
            folder=folder / one.name if sets and folder is not None else folder,
            progress=_named(progress, one.name if sets else ""),
        )
        own, pairs, drawn, graph = chosen.mine(part)
        first = int(cluster.max()) + 1
        cluster[rows] = np.where(own >= 0, own + first, -1)
        suspects.append(pairs + rows.start)
        if negatives is not None and drawn is not None:
            negatives[rows] = np.where(drawn >= 0, drawn + rows.start, -1)
    meta = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("seed", "batch_size", "cluster_size", "mixing", "refresh_epochs")
    }
    if not sets:
        meta |= dict(zip(("skip", "take"), fit_window(config.skip, config.take, num_rows), strict=True))
    plan = BatchPlan(
        cluster_size=config.cluster_size,
        cluster=cluster,
        suspects=np.concatenate(suspects) if suspects else None,
        negatives=negatives,
        meta=meta,
        **_plan_settings(num_rows, config, sets, data_digest),
    )
    _note_single_rows(plan, report)
    return MiningResult(plan=plan, report=report, graph=None if sets else graph)


def _note_single_rows(plan: BatchPlan, report: MiningReport) -> None:
    """Say so where the rows of small data sets are too many for their shares."""
    wanted, sampled = sum(plan.sampling.single_quotas), plan.sampling.num_single_rows
    if sampled < wanted:
        note = (
            f"The data sets without a cluster have more rows than half of the places of an epoch: {sampled} of their {wanted} come in an epoch. "
            "Lower mining.cluster_size, or leave data sets out."
        )
        report.notes.append(note)
        warnings.warn(note, stacklevel=3)


def random_plan(
    num_rows: int, *, config: MiningConfig, sets: Sequence[MiningSet] = (), data_digest: str = ""
) -> BatchPlan:
    """Random batches with the data sets, shares and mixing of `config`; every row is its own cluster. Arguments as in `mine_plan`.

    Raises:
        AnybatchError: See `check_sizes`; `config.method` is taken for "random", whatever it is.
    """
    check_sizes(num_rows, config=replace(config, method="random"), sets=sets)
    return BatchPlan(
        cluster=np.arange(num_rows, dtype=np.int32),
        cluster_size=1,
        meta={"method": "random"},
        **_plan_settings(num_rows, config, sets, data_digest),
    )


def _plan_settings(num_rows: int, config: MiningConfig, sets: Sequence[MiningSet], data_digest: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_rows": num_rows,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "data_digest": data_digest,
    }
    if sets:
        settings |= {
            "task": np.repeat(np.arange(len(sets), dtype=np.int32), [one.num_rows for one in sets]),
            "task_names": tuple(one.name for one in sets),
            "task_shares": tuple(one.share for one in sets),
            "mixing": config.mixing,
        }
    return settings


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One data set on its way to clusters. `config` has its own window."""

    config: MiningConfig
    anchors: np.ndarray
    positives: np.ndarray
    anchor_id: np.ndarray
    positive_id: np.ndarray
    start: np.ndarray | None
    device: str | None
    folder: Path | None
    progress: Progress | None

    def mine(self, report: MiningReport) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, MiningGraph]:
        """(rows,) clusters, suspects, hard negatives and graph; what it found and cost goes into `report`."""
        config, ids = self.config, {"anchor_id": self.anchor_id, "positive_id": self.positive_id}
        num_rows = len(self.anchors)
        skip, take = _fitting_window(config, num_rows, report)
        with _stage(report, "neighbors", self.progress) as advance:
            neighbors = rank_rows(
                self.anchors,
                self.positives,
                config=config,
                num_neighbors=skip + take,
                device=self.device,
                folder=self.folder,
                progress=advance,
                **ids,
            )
            report.recall = neighbors.recall
        with _stage(report, "graph", self.progress):
            published = config.method == "published"
            edges: Edges = "mutual" if published else "union"
            graph = build_graph(neighbors, skip=skip, take=take, margin=config.margin, edges=edges)
            release_pages(neighbors.ids, neighbors.scores, self.anchors, self.positives)
        cluster = self._partition(graph, neighbors, (skip, take), report)
        with _stage(report, "audit", self.progress):
            report.audit = audit_clusters(graph, cluster, **ids)
            report.outlook = mining_outlook(neighbors, cluster, skip=skip, take=take, margin=config.margin)
            report.hubs = most_wanted(graph.window.indices)
            suspects, negatives = suspect_pairs(graph, cluster if config.suspects == "cluster" else None), None
            if config.num_negatives:
                negatives = sample_negatives(graph, cluster, config.num_negatives, seed=config.seed, **ids)
        return cluster, suspects, negatives, graph

    def _partition(
        self, graph: MiningGraph, neighbors: Neighbors, window: tuple[int, int], report: MiningReport
    ) -> np.ndarray:
        """(rows,) equal clusters."""
        config = self.config
        with _stage(report, "communities", self.progress) as advance:
            start = self._begin(graph, neighbors, window, advance)
        with _stage(report, "refinement", self.progress) as advance:
            ours = config.method == "anybatch"  # the others are kept as they are, but for equal sizes
            return equal_clusters(
                start,
                graph.signed(config.conflict_weight if ours else 0.0),
                config.cluster_size,
                sweeps=config.sweeps if ours else 0,
                seed=config.seed,
                progress=advance,
                anchor_id=self.anchor_id,
                positive_id=self.positive_id,
            )

    def _begin(
        self,
        graph: MiningGraph,
        neighbors: Neighbors,
        window: tuple[int, int],
        progress: Callable[[float], None],
    ) -> np.ndarray:
        """(rows,) clusters of any sizes."""
        config = self.config
        num_clusters = len(self.anchors) // config.cluster_size
        if self.start is not None:
            _, start = np.unique(self.start, return_inverse=True)  # -1, the remainder, becomes a cluster that dissolves
            return np.minimum(start, num_clusters - 1).astype(np.int32)
        if config.method == "kmeans":
            return kmeans_clusters(self.anchors, self.positives, num_clusters, seed=config.seed)
        if config.method == "bandwidth":
            return bandwidth_clusters(graph.weight, num_clusters)
        if config.method == "loss_ordered":
            return loss_ordered_clusters(neighbors, num_clusters)
        if config.cells > 1:
            ids = {"anchor_id": self.anchor_id, "positive_id": self.positive_id}
            return mine_cells(
                neighbors,
                self.positives,
                window,
                config=config,
                folder=self.folder,
                progress=progress,
                **ids,
            )
        if config.method == "published":
            return metis_clusters(graph.weight, num_clusters, recursive=False, seed=config.seed)
        attraction = graph.attraction(config.conflict_weight)
        return metis_clusters(attraction, num_clusters, recursive=True, seed=config.seed)


def _parts(sets: Sequence[MiningSet], num_rows: int) -> list[tuple[MiningSet, slice]]:
    """Each data set with its rows.

    Raises:
        AnybatchError: Names that occur twice; sizes that do not add up to the rows.
    """
    chosen = list(sets) or [MiningSet(name="data", num_rows=num_rows)]
    names = [one.name for one in chosen]
    if len(set(names)) < len(names) or sum(one.num_rows for one in chosen) != num_rows:
        sizes = ", ".join(f"{one.name}: {one.num_rows}" for one in chosen)
        raise AnybatchError(f"The data sets are {sizes}; expected different names, and {num_rows} rows in all.")
    ends = np.cumsum([one.num_rows for one in chosen]).tolist()
    return [(one, slice(end - one.num_rows, end)) for one, end in zip(chosen, ends, strict=True)]


def check_sizes(num_rows: int, *, config: MiningConfig, sets: Sequence[MiningSet] = ()) -> None:
    """Refuse what no search can mend, before it: the same on every rank, because it reads nothing but sizes. Arguments as in `mine_plan`.

    Raises:
        AnybatchError: A batch that is no whole number of clusters, more than the rows, or more than the clusters that an epoch deals.
    """
    parts = _parts(sets, num_rows)
    if num_rows < config.batch_size:
        raise AnybatchError(
            f"The data has {num_rows} rows, fewer than one batch of {config.batch_size}. Lower the batch size."
        )
    size = 1 if config.method == "random" else config.cluster_size
    if config.batch_size % size:
        raise AnybatchError(
            f"batch_size {config.batch_size} is not a multiple of mining.cluster_size {size}; choose one that is."
        )
    counts = [one.num_rows // size for one, _ in parts]
    deal = ClusterSampling(
        cluster_task=np.repeat(np.arange(len(parts)), counts),
        shares=tuple(one.share for one, _ in parts),
        clusters_per_batch=config.batch_size // size,
        within=config.mixing == "within",
    )
    rows = "rows" if size == 1 else f"clusters of {size} rows"
    if deal.num_batches < 1:
        raise AnybatchError(
            f"An epoch deals {sum(deal.quotas)} of {sum(counts)} {rows}, which do not fill one batch of {config.batch_size}. Lower the "
            "batch size, or raise the shares of the data sets."
        )
    for (one, _), chance in zip(parts, deal.sampled_shares, strict=True):
        if one.num_rows >= size and not chance:
            raise AnybatchError(
                f"The data set '{one.name}' would never be dealt: an epoch has fewer of its {rows} than a batch holds ({deal.clusters_per_batch}), and "
                "those left over of all data sets do not fill a batch that they could share. Lower the batch size, or set mining.mixing to 'mixed'."
            )


def _check_both(anchors: np.ndarray, positives: np.ndarray) -> None:
    check_embeddings("anchor", anchors)
    check_embeddings("positive", positives, len(anchors))
    if anchors.shape[1] != positives.shape[1]:
        raise AnybatchError(
            f"Anchors have {anchors.shape[1]} dimensions, positives {positives.shape[1]}; expected the same."
        )


def _windowed(config: MiningConfig, one: MiningSet) -> MiningConfig:
    own = {name: getattr(one, name) for name in ("skip", "take", "margin") if getattr(one, name) is not None}
    return replace(config, **own)


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None or not name:
        return progress
    return lambda stage, fraction: progress(f"{name}: {stage}", fraction)


def mine_shared(
    anchor_embeddings: np.ndarray,
    positive_embeddings: np.ndarray,
    *,
    config: MiningConfig,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    folder: Path,
    sets: Sequence[MiningSet] = (),
    device: str | None = None,
    progress: Progress | None = None,
) -> None:
    """The stages of `mine_plan` that all ranks share: neighbours, and the coarse cells' clusters if `config.cells` asks for them.

    Rank 0 then finds them finished in `folder`, and does the rest by itself. Arguments as in `mine_plan`.

    Raises:
        AnybatchError: What `mine_plan` refuses, on every rank and before the search.
    """
    check_sizes(len(anchor_embeddings), config=config, sets=sets)
    with alone() as chosen:
        if chosen:
            _check_both(anchor_embeddings, positive_embeddings)
    anchor_id, positive_id = (
        compact_ids(name, ids, len(anchor_embeddings))
        for name, ids in (("anchor_id", anchor_id), ("positive_id", positive_id))
    )
    for one, rows in _parts(sets, len(anchor_embeddings)):
        if one.num_rows < config.cluster_size:
            continue
        own, own_progress = _windowed(config, one), _named(progress, one.name)
        window = fit_window(own.skip, own.take, one.num_rows)
        known: dict[str, Any] = {
            "config": own,
            "anchor_id": anchor_id[rows],
            "positive_id": positive_id[rows],
            "folder": folder / one.name if sets else folder,
        }
        with _stage(MiningReport(), "neighbors", own_progress) as advance:
            neighbors = rank_rows(
                anchor_embeddings[rows],
                positive_embeddings[rows],
                num_neighbors=sum(window),
                device=device,
                progress=advance,
                **known,
            )
        if own.cells > 1:
            with _stage(MiningReport(), "communities", own_progress) as advance:
                mine_cells(neighbors, positive_embeddings[rows], window, progress=advance, **known)


def mine_cells(
    neighbors: Neighbors,
    positives: np.ndarray,
    window: tuple[int, int],
    *,
    config: MiningConfig,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    folder: Path | None,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """`cell_clusters` as `config` asks for it; `window` is (skip, take) as the data allows them. Small data sets get fewer cells."""
    return cell_clusters(
        neighbors,
        positives,
        min(config.cells, max(1, len(positives) // (4 * config.cluster_size))),
        cluster_size=config.cluster_size,
        skip=window[0],
        take=window[1],
        margin=config.margin,
        conflict_weight=config.conflict_weight,
        sweeps=config.sweeps,
        seed=config.seed,
        anchor_id=anchor_id,
        positive_id=positive_id,
        folder=folder and folder / "clusters",
        progress=progress,
    )


def rank_rows(
    anchors: np.ndarray,
    positives: np.ndarray,
    *,
    config: MiningConfig,
    num_neighbors: int,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    device: str | None = None,
    folder: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Neighbors:
    """The neighbours that `config` asks for: its score, and exact or approximate search. Arguments as in `mine_plan`."""
    queries, documents = scored_vectors(anchors, positives, config.score)
    where: dict[str, Any] = {"device": device, "folder": folder, "progress": progress}
    ids = {"anchor_id": anchor_id, "positive_id": positive_id}
    exact = config.neighbors == "exact" or (config.neighbors == "auto" and len(anchors) <= EXACT_ROWS)
    if exact:
        return exact_neighbors(queries, documents, num_neighbors, **ids, **where)
    return ivf_neighbors(queries, documents, num_neighbors, **ids, seed=config.seed, **where)


def scored_vectors(anchors: np.ndarray, positives: np.ndarray, score: str) -> tuple[Embeddings, Embeddings]:
    """Two arrays whose inner products are the scores that `MiningConfig.score` names."""
    if score == "symmetric":  # q_i . p_j + q_j . p_i is one inner product of twice the width
        return Stacked(anchors, positives), Stacked(positives, anchors)
    return anchors, positives


def fit_window(skip: int, take: int, num_rows: int) -> tuple[int, int]:
    """A window that the data can fill: skip at most a tenth of the rows, take at most half of them."""
    return min(skip, num_rows // 10), min(take, max(1, num_rows // 2))


def _fitting_window(config: MiningConfig, num_rows: int, report: MiningReport) -> tuple[int, int]:
    skip, take = fit_window(config.skip, config.take, num_rows)
    if (skip, take) != (config.skip, config.take):
        note = (
            f"The rank window (skip {config.skip}, take {config.take}) is wider than {num_rows} rows allow; using skip {skip}, take {take}. "
            "Set mining.skip to at most a tenth of the rows and mining.take to at most half of them."
        )
        report.notes.append(note)
        warnings.warn(note, stacklevel=3)
    return skip, take


@contextmanager
def _stage(report: MiningReport, name: str, progress: Progress | None) -> Any:
    """Measure a stage and say where it is; yields the function that reports its fraction."""
    if progress is not None:
        progress(name, 0.0)
    with Measure() as measure:
        yield lambda fraction: progress(name, fraction) if progress is not None else None
    report.seconds[name] = report.seconds.get(name, 0.0) + measure.seconds
    report.peak_bytes[name] = max(report.peak_bytes.get(name, 0), measure.peak_bytes)
    if progress is not None:
        progress(name, 1.0)
