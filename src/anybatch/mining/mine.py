"""Mining in one call: teacher embeddings in, plan and report out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anybatch.errors import AnybatchError
from anybatch.mining.audit import Audit, audit_clusters, most_wanted, suspect_pairs
from anybatch.mining.graph import Edges, MiningGraph, build_graph
from anybatch.mining.inverted import ivf_neighbors
from anybatch.mining.negatives import sample_negatives
from anybatch.mining.neighbors import Embeddings, Neighbors, Stacked, check_embeddings, exact_neighbors
from anybatch.mining.outlook import Outlook, mining_outlook
from anybatch.mining.partition import equal_clusters, metis_clusters
from anybatch.mining.recipes import bandwidth_clusters, kmeans_clusters, loss_ordered_clusters
from anybatch.plan import BatchPlan
from anybatch.resources import Measure

Progress = Callable[[str, float], None]
EXACT_ROWS = 200_000  # up to here exact neighbours take minutes on two cores


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """How batches are chosen.

    Attributes:
        method: "anybatch" (union of windows, recursive bisection, swap search with conflicts), "published" (B3 as released: mutual
            edges, METIS k-way, conflicts left out of the graph but not kept apart; cut to equal sizes, which plans need), "random";
            to compare with: "kmeans" (cells of [anchor; positive]), "bandwidth" (GCBS), "loss_ordered" (OSGD under the teacher).
        batch_size: Rows of a batch, over all ranks.
        cluster_size: Rows that sit together; the batch is a multiple of it.
        skip: First ranks, taken for false negatives. B3: 30 for retrieval, 70 for short repeated answers. Lower it for small data.
        take: Ranks after them that are wanted. More than twice the cluster size shrinks everything and gains nothing.
        margin: Also a false negative: what scores above this share of the own positive (0.95 is usual); None for ranks alone.
        score: "query" (anchor to positives, as published) or "symmetric" (both ways, as one inner product).
        edges: "union" or "mutual"; None for what the method uses.
        hub_weight: Wanted edges weigh the wanted row's in-degree to minus this power; 0 counts edges.
        conflict_weight: What a probable false negative in the cluster costs, in wanted edges.
        neighbors: "exact", "ivf", or "auto" by the number of rows.
        num_negatives: Explicit hard negatives drawn for each row (B3++).
        sweeps: Passes of the exchange search; each doubling gains a little more.
        seed: Of everything random.
    """

    method: Literal["anybatch", "published", "random", "kmeans", "bandwidth", "loss_ordered"] = "anybatch"
    batch_size: int = 64
    cluster_size: int = 32
    skip: int = 30
    take: int = 64
    margin: float | None = None
    score: Literal["query", "symmetric"] = "query"
    edges: Edges | None = None
    hub_weight: float = 0.0
    conflict_weight: float = 3.0
    neighbors: Literal["auto", "exact", "ivf"] = "auto"
    num_negatives: int = 0
    sweeps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("cluster_size", 2),
            ("skip", 0),
            ("take", 1),
            ("num_negatives", 0),
            ("sweeps", 0),
            ("conflict_weight", 0),
        ):
            if getattr(self, name) < least:
                raise AnybatchError(f"mining.{name} is {getattr(self, name)}; expected at least {least}.")


@dataclass(kw_only=True)
class MiningReport:
    """What mining did and what it cost.

    Attributes:
        audit: What the clusters hold; None for random batches.
        outlook: Whether mining is likely to help, with warnings; None for random batches.
        hubs: The rows that are in most rank windows, with the number of windows, most wanted first.
        recall: Of the neighbours, measured; 1.0 if exact.
        seconds: Wall time of each stage.
        peak_bytes: Peak resident memory in each stage.
        notes: What had to be changed, in words.
    """

    audit: Audit | None = None
    outlook: Outlook | None = None
    hubs: list[tuple[int, int]] = field(default_factory=list)
    recall: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


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
    data_digest: str = "",
    device: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> MiningResult:
    """Choose the batches.

    Args:
        anchor_embeddings, positive_embeddings: (n, D) float, the teacher's; may be memory-mapped. Scores are inner products.
        config: See `MiningConfig`.
        anchor_id, positive_id: (n,) int; equal for identical texts, which are never put together. None: all differ.
        data_digest: `PairData.digest`, which binds the plan to its data.
        device: Where the neighbours are searched, e.g. "cuda"; None for the compiled search on the CPU.
        folder: The neighbours are kept here as they are found; a killed search goes on and a finished one is not repeated.
        progress: Called with (stage, fraction done).

    Returns:
        Plan, report and graph.

    Raises:
        AnybatchError: Embeddings that cannot be ranked; sizes that do not fit.

    Warns:
        UserWarning: The rank window is wider than the data and was cut.

    Cost: neighbours n * n * D (exact); then a few seconds for each 100,000 rows. Memory 8 bytes * (skip + take) a row, and about
        as much again three times for the graph.

    Reference: B3, arXiv 2505.11293, section 3, and what this library does differently in docs/mining.md.
    """
    num_rows = len(anchor_embeddings)
    check_embeddings("anchor", anchor_embeddings)
    check_embeddings("positive", positive_embeddings, num_rows)
    if anchor_embeddings.shape[1] != positive_embeddings.shape[1]:
        raise AnybatchError(
            f"Anchors have {anchor_embeddings.shape[1]} dimensions, positives {positive_embeddings.shape[1]}; expected the same."
        )
    report = MiningReport()
    plan_settings: dict[str, Any] = {"seed": config.seed, "data_digest": data_digest}
    if config.method == "random":
        return MiningResult(plan=BatchPlan.random(num_rows, config.batch_size, **plan_settings), report=report)
    if config.batch_size % config.cluster_size:
        raise AnybatchError(
            f"batch_size {config.batch_size} is not a multiple of mining.cluster_size {config.cluster_size}; choose one that is."
        )
    if num_rows < config.batch_size:
        raise AnybatchError(
            f"The data has {num_rows} rows, fewer than one batch of {config.batch_size}. Lower the batch size."
        )
    anchor_id = np.arange(num_rows) if anchor_id is None else np.asarray(anchor_id)
    positive_id = np.arange(num_rows) if positive_id is None else np.asarray(positive_id)
    skip, take = _fitting_window(config, num_rows, report)

    with _stage(report, "neighbors", progress) as advance:
        neighbors = rank_rows(
            anchor_embeddings,
            positive_embeddings,
            config=config,
            num_neighbors=skip + take,
            anchor_id=anchor_id,
            positive_id=positive_id,
            device=device,
            folder=folder,
            progress=advance,
        )
        report.recall = neighbors.recall
    with _stage(report, "graph", progress):
        published = config.method == "published"
        edges: Edges = config.edges or ("mutual" if published else "union")
        graph = build_graph(
            neighbors, skip=skip, take=take, margin=config.margin, edges=edges, hub_weight=config.hub_weight
        )
    with _stage(report, "communities", progress):
        num_clusters = num_rows // config.cluster_size
        if config.method == "kmeans":
            start = kmeans_clusters(anchor_embeddings, positive_embeddings, num_clusters, seed=config.seed)
        elif config.method == "bandwidth":
            start = bandwidth_clusters(graph.weight, num_clusters)
        elif config.method == "loss_ordered":
            start = loss_ordered_clusters(neighbors, num_clusters)
        else:
            wanted = graph.weight if published else graph.attraction(config.conflict_weight)
            start = metis_clusters(wanted, num_clusters, recursive=not published, seed=config.seed)
    with _stage(report, "refinement", progress) as advance:
        ours = config.method == "anybatch"  # the others are kept as they are, but for equal sizes
        cluster = equal_clusters(
            start,
            graph.signed(config.conflict_weight if ours else 0.0),
            config.cluster_size,
            anchor_id=anchor_id,
            positive_id=positive_id,
            sweeps=config.sweeps if ours else 0,
            seed=config.seed,
            progress=advance,
        )
    with _stage(report, "audit", progress):
        report.audit = audit_clusters(graph, cluster, anchor_id=anchor_id, positive_id=positive_id)
        report.outlook = mining_outlook(neighbors, cluster, skip=skip, take=take, margin=config.margin)
        report.hubs = most_wanted(graph.window.indices)
        suspects = suspect_pairs(graph, cluster)
        negatives = None
        if config.num_negatives:
            negatives = sample_negatives(
                graph, cluster, config.num_negatives, anchor_id=anchor_id, positive_id=positive_id, seed=config.seed
            )
    meta = {name: value for name, value in asdict(config).items() if name not in ("seed", "batch_size", "cluster_size")}
    plan = BatchPlan(
        num_rows=num_rows,
        batch_size=config.batch_size,
        cluster_size=config.cluster_size,
        cluster=cluster,
        suspects=suspects,
        negatives=negatives,
        meta={**meta, "skip": skip, "take": take},
        **plan_settings,
    )
    return MiningResult(plan=plan, report=report, graph=graph)


def mine_neighbors(
    anchor_embeddings: np.ndarray,
    positive_embeddings: np.ndarray,
    *,
    config: MiningConfig,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    folder: Path,
    device: str | None = None,
    progress: Progress | None = None,
) -> None:
    """The first stage of `mine_plan` alone, shared by all ranks; rank 0 then finds it finished in `folder`. Arguments as in `mine_plan`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mine_plan warns of the window, once
        skip, take = _fitting_window(config, len(anchor_embeddings), MiningReport())
    with _stage(MiningReport(), "neighbors", progress) as advance:
        rank_rows(
            anchor_embeddings,
            positive_embeddings,
            config=config,
            num_neighbors=skip + take,
            anchor_id=anchor_id,
            positive_id=positive_id,
            device=device,
            folder=folder,
            progress=advance,
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
            "Set mining.skip and mining.take to choose yourself."
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
    report.seconds[name], report.peak_bytes[name] = measure.seconds, measure.peak_bytes
    if progress is not None:
        progress(name, 1.0)
