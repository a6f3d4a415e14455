"""Mining in one call: teacher embeddings in, plan and report out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anybatch.core.blocks import release_pages
from anybatch.core.distributed import alone
from anybatch.core.errors import AnybatchError
from anybatch.mining.audit import advice
from anybatch.mining.config import MiningConfig, MiningReport, MiningSet, SettledConfig, label_like
from anybatch.mining.graph import MiningGraph, Window, build_graph, suspect_pairs
from anybatch.mining.inputs import check_embeddings, compact_ids, first_rows
from anybatch.mining.inspection import inspect_plan
from anybatch.mining.inverted import ivf_neighbors
from anybatch.mining.negatives import sample_negatives
from anybatch.mining.neighbors import Neighbors, exact_neighbors
from anybatch.mining.partition import SWEEPS, equal_clusters, metis_clusters
from anybatch.mining.recipes import bandwidth_clusters, kmeans_clusters, loss_ordered_clusters
from anybatch.plans.plan import BatchPlan, check_batch
from anybatch.plans.sampling import ClusterSampling

Progress = Callable[[str, float], None]
HARDEST_LABELS = 10  # of which hard negatives are drawn: published
EXACT_ROWS = 200_000  # up to here exact neighbours take minutes on two cores


@dataclass(frozen=True, kw_only=True, eq=False)
class MiningResult:
    """The plan and the report on it; the graph, of one data set, for those who want to look.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
        >>> result = mine_plan(vectors, vectors, config=MiningConfig(batch_size=16))
        >>> result.plan.num_rows, result.report.recall
        (64, 1.0)
    """

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
    device: str | None = None,
    folder: Path | None = None,
    temperature: float = 0.05,
    progress: Progress | None = None,
) -> MiningResult:
    """Choose the batches.

    Args:
        anchor_embeddings, positive_embeddings: (n, D) float, the teacher's; may be memory-mapped. Scores are inner
            products.
        config: See `MiningConfig`.
        anchor_id, positive_id: (n,) int; equal for identical texts, which are never put together. None: all differ.
        sets: Several data sets, one after the other: each is mined by itself with its own window, into one plan.
        data_digest: `PairData.digest`, which binds the plan to its data.
        device: Where the neighbours are searched, e.g. "cuda"; None for the compiled search on the CPU.
        folder: The neighbours are kept here: a killed search goes on, a finished one is not repeated.
        temperature: Of the softmax whose mass is reported; it decides nothing.
        progress: Called with (stage, fraction done).

    Raises:
        AnybatchError: Embeddings that cannot be ranked; sizes that do not fit.

    Warns:
        UserWarning: The rank window is wider than the data and was cut.

    Cost: neighbours n * d * D for d distinct positives (exact); then a few seconds for each 100,000 rows. Memory 32
        bytes a row and rank of the window.

    Reference: Thirukovalluru et al. 2025, "Breaking the Batch Barrier (B3) of Contrastive Learning via Smart Batch
    Mining", arXiv 2505.11293, section 3; what this library does differently: docs/choose.md.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
        >>> config = MiningConfig(batch_size=16, cluster_size=8, window=(2, 16))
        >>> mine_plan(vectors, vectors, config=config).plan.epoch_batches(0).shape
        (12, 16)
    """
    # 1. Refuse what no search can mend, before it.
    settled = config.settled()
    _check_both(anchor_embeddings, positive_embeddings)
    num_rows, report = len(anchor_embeddings), MiningReport()
    _given_sets(sets, num_rows)
    ids = compact_ids(num_rows, anchor_id=anchor_id, positive_id=positive_id)
    if config.method == "random":
        plan = random_plan(num_rows, config=config, sets=sets, data_digest=data_digest)
        return MiningResult(plan=plan, report=report)
    check_sizes(num_rows, config=config, sets=sets)

    # 2. Mine each data set by itself.
    cluster = np.full(num_rows, -1, np.int32)
    negatives = np.full((num_rows, config.num_negatives), -1, np.int32) if config.num_negatives else None
    suspects, graph, windows = [], None, {}
    for one in _each_set(anchor_embeddings, positive_embeddings, ids, settled, sets, folder, progress):
        part = report if not sets else report.sets.setdefault(one.name, MiningReport())
        if len(one.anchors) < settled.cluster_size:
            _note_small_set(one, settled, part)
            continue
        mined = _mine_set(one, settled, device, part)
        graph = mined.graph
        cluster[one.rows] = np.where(mined.cluster >= 0, mined.cluster + cluster.max() + 1, -1)
        windows[one.name if sets else ""] = [mined.window.skip, mined.window.take]
        suspects.append(mined.suspects + one.rows.start)
        if negatives is not None and mined.negatives is not None:
            negatives[one.rows] = np.where(mined.negatives >= 0, mined.negatives + one.rows.start, -1)

    # 3. Put them together.
    names = ("method", "margin", "conflict_weight", "neighbors", "num_negatives")
    settings = {name: getattr(settled, name) for name in names} | {"windows": windows}
    plan = BatchPlan(
        cluster_size=settled.cluster_size,
        cluster=cluster,
        suspects=np.concatenate(suspects) if suspects else None,
        negatives=negatives,
        meta=settings,
        **_plan_settings(num_rows, config, sets, data_digest),
    )
    _note_single_rows(plan, report)

    # 4. Look at its batches.
    with _stage("figures", progress or (lambda *_: None)) as advance:
        seen = inspect_plan(
            plan, anchor_embeddings, positive_embeddings, anchor_id=ids[0], positive_id=ids[1], temperature=temperature,
            progress=advance,
        )  # fmt: skip
    for name, part in report.sets.items() if sets else [("", report)]:
        if name in windows and name in seen:
            part.figures = seen[name].figures
            part.warnings = advice(part.figures)
    return MiningResult(plan=plan, report=report, graph=None if sets else graph)


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
    """What all ranks share of `mine_plan`: the neighbours. Rank 0 then finds them in `folder`, and does the rest.

    Arguments and errors as in `mine_plan`; every rank refuses, before the search.
    """
    num_rows, settled = len(anchor_embeddings), config.settled()
    check_sizes(num_rows, config=config, sets=sets)
    with alone() as chosen:
        if chosen:
            _check_both(anchor_embeddings, positive_embeddings)
    ids = compact_ids(num_rows, anchor_id=anchor_id, positive_id=positive_id)
    for one in _each_set(anchor_embeddings, positive_embeddings, ids, settled, sets, folder, progress):
        if len(one.anchors) >= settled.cluster_size:
            _rank(one, settled, device)


def random_plan(
    num_rows: int, *, config: MiningConfig, sets: Sequence[MiningSet] = (), data_digest: str = ""
) -> BatchPlan:
    """Random batches with the data sets and mixing of `config`, whatever its method. See `mine_plan`."""
    check_sizes(num_rows, config=replace(config, method="random", conflict_weight="auto", num_negatives=0), sets=sets)
    return BatchPlan(
        cluster=np.arange(num_rows, dtype=np.int32),
        cluster_size=1,
        meta={"method": "random"},
        **_plan_settings(num_rows, config, sets, data_digest),
    )


def check_sizes(num_rows: int, *, config: MiningConfig, sets: Sequence[MiningSet] = ()) -> None:
    """Refuse what no search can mend, before it: the same on every rank, because it reads nothing but sizes."""
    settled, given = config.settled(), [one for one, _ in _given_sets(sets, num_rows)]
    size = 1 if config.method == "random" else settled.cluster_size
    check_batch(num_rows, config.batch_size, size, "mining.cluster_size")
    counts = [one.num_rows // size for one in given]
    sampling = ClusterSampling(
        cluster_task=np.repeat(np.arange(len(given)), counts),
        num_sets=len(given),
        clusters_per_batch=config.batch_size // size,
        within=config.mixing == "within",
    )
    rows = "rows" if size == 1 else f"clusters of {size} rows"
    if sampling.num_batches < 1:
        raise AnybatchError(
            f"An epoch has {sum(counts)} {rows}, which do not fill one batch of {config.batch_size}. Lower the batch "
            "size."
        )
    for one, share in zip(given, sampling.sampled_shares, strict=True):
        if one.num_rows >= size and not share:
            raise AnybatchError(
                f"The data set '{one.name}' would never be sampled: an epoch has fewer of its {rows} than a batch "
                f"holds ({sampling.clusters_per_batch}), and those left over of all data sets do not fill a batch that "
                "they could share. Lower the batch size, or set mining.mixing to 'mixed'."
            )


class _Set(NamedTuple):
    """One data set on its way to clusters."""

    name: str
    rows: slice
    anchors: np.ndarray
    positives: np.ndarray
    ids: dict[str, np.ndarray]  # anchor_id and positive_id, (rows,) int
    text: np.ndarray  # of each row the first one with its positive, which stands for it where positives are ranked
    window: Window  # as its texts allow it
    asked: Window  # as the configuration says
    auto: bool  # whether the window was left to mining
    folder: Path | None
    progress: Progress

    @property
    def texts(self) -> np.ndarray:
        """The rows that stand for the distinct positives, ascending."""
        return np.flatnonzero(self.text == np.arange(len(self.text)))

    @property
    def labels(self) -> bool:
        """Whether its positives are labels."""
        return label_like(len(self.text), len(self.texts))

    @property
    def apart(self) -> dict[str, np.ndarray]:
        """The ids that rows of one cluster must not share; of labels, which it may hold twice, the anchors' alone.

        A place of a label that is there already is lost, as the loss masks it; but what is beside it is harder.
        """
        return self.ids | ({"positive_id": np.arange(len(self.text))} if self.labels else {})


def _each_set(
    anchors: np.ndarray,
    positives: np.ndarray,
    ids: tuple[np.ndarray, ...],
    config: SettledConfig,
    sets: Sequence[MiningSet],
    folder: Path | None,
    progress: Progress | None,
) -> Iterator[_Set]:
    def named(stage: str, fraction: float, prefix: str) -> None:
        if progress is not None:
            progress(prefix + stage, fraction)

    for one, rows in _given_sets(sets, len(anchors)):
        text = first_rows(ids[1][rows])
        asked, window = config.window_for(len(text), len(np.unique(text)), one.window)
        yield _Set(
            name=one.name,
            rows=rows,
            anchors=anchors[rows],
            positives=positives[rows],
            ids={"anchor_id": ids[0][rows], "positive_id": ids[1][rows]},
            text=text,
            window=window,
            asked=asked,
            auto=(config.window if one.window is None else one.window) == "auto",
            folder=folder / one.name if sets and folder is not None else folder,
            progress=partial(named, prefix=f"{one.name}: " if sets else ""),
        )


class _Mined(NamedTuple):
    """What was mined of one data set, rows and clusters numbered within it."""

    cluster: np.ndarray
    suspects: np.ndarray
    negatives: np.ndarray | None
    graph: MiningGraph
    window: Window


def _mine_set(one: _Set, config: SettledConfig, device: str | None, report: MiningReport) -> _Mined:
    """Mine one data set; what is to be said of it goes into `report`."""
    if one.window != one.asked:
        _note_window(one, report)

    # 1. Rank: for each anchor the teacher's best positives.
    neighbors = _rank(one, config, device)
    report.recall = neighbors.recall
    if one.auto and config.method != "published":
        one = one._replace(window=one.window.to_conflicts(neighbors))

    # 2. Join: who wants to sit beside whom, and who must not.
    with _stage("graph", one.progress):
        edges = "mutual" if config.method == "published" else "union"
        graph = build_graph(neighbors, one.window, text=one.text, edges=edges, seed=config.seed)
        release_pages(neighbors.ids, neighbors.scores, one.anchors, one.positives)

    # 3. Cut into clusters, of any sizes at first, then of equal ones.
    with _stage("communities", one.progress):
        begun = _begin(one, config, graph, neighbors)
    with _stage("refinement", one.progress) as advance:
        ours = config.method == "anybatch"  # the others are kept as they are, but for equal sizes
        cluster = equal_clusters(
            begun,
            graph.signed(config.conflict_weight),
            config.cluster_size,
            sweeps=SWEEPS if ours else 0,
            seed=config.seed,
            progress=advance,
            **one.apart,
        )

    # 4. Name suspected false negatives, draw hard ones.
    negatives = None
    if config.num_negatives:
        with _stage("hard negatives", one.progress):
            published, source = config.method == "published", graph
            of_labels = published and one.auto and one.labels
            if of_labels:
                few = replace(one.window, take=min(HARDEST_LABELS, one.window.take))
                source = build_graph(neighbors, few, text=one.text)
            power = penalty = 1 if published else 2
            how: dict[str, Any] = {"power": power, "penalty": penalty, "own_texts": of_labels, **one.ids}
            negatives = sample_negatives(source, cluster, config.num_negatives, seed=config.seed, **how)
    return _Mined(cluster, suspect_pairs(graph.conflict), negatives, graph, one.window)


def _rank(one: _Set, config: SettledConfig, device: str | None) -> Neighbors:
    """The neighbours, by exact or by approximate search."""
    exact = config.neighbors == "exact" or (config.neighbors == "auto" and len(one.anchors) <= EXACT_ROWS)
    search = exact_neighbors if exact else partial(ivf_neighbors, seed=config.seed)
    with _stage("neighbors", one.progress) as advance:
        where: dict[str, Any] = {"device": device, "folder": one.folder, "progress": advance}
        found = search(one.anchors, one.positives, one.window.depth, columns=one.texts, **one.ids, **where)
    anchor, positive = (side.mean(axis=0, dtype=np.float64) for side in (one.anchors, one.positives))
    return replace(found, mean_score=float(anchor @ positive))


def _begin(one: _Set, config: SettledConfig, graph: MiningGraph, neighbors: Neighbors) -> np.ndarray:
    """(rows,) clusters of any sizes, as the method has them."""
    num_clusters = len(one.anchors) // config.cluster_size
    if config.method == "kmeans":
        return kmeans_clusters(one.anchors, one.positives, num_clusters, seed=config.seed)
    if config.method == "bandwidth":
        return bandwidth_clusters(graph.weight, num_clusters)
    if config.method == "loss_ordered":
        return loss_ordered_clusters(neighbors, num_clusters)
    published = config.method == "published"
    weight = graph.weight if published else graph.attraction(config.conflict_weight)
    return metis_clusters(weight, num_clusters, recursive=not published, seed=config.seed)


def _given_sets(sets: Sequence[MiningSet], num_rows: int) -> list[tuple[MiningSet, slice]]:
    """Each data set with its rows."""
    given = list(sets) or [MiningSet(name="data", num_rows=num_rows)]
    if len({one.name for one in given}) < len(given) or sum(one.num_rows for one in given) != num_rows:
        sizes = ", ".join(f"{one.name}: {one.num_rows}" for one in given)
        raise AnybatchError(f"The data sets are {sizes}; expected different names, and {num_rows} rows in all.")
    ends = np.cumsum([one.num_rows for one in given]).tolist()
    return [(one, slice(end - one.num_rows, end)) for one, end in zip(given, ends, strict=True)]


def _plan_settings(num_rows: int, config: MiningConfig, sets: Sequence[MiningSet], data_digest: str) -> dict[str, Any]:
    settings = {"num_rows": num_rows, "batch_size": config.batch_size, "seed": config.seed, "data_digest": data_digest}
    if not sets:
        return settings
    task = np.repeat(np.arange(len(sets), dtype=np.int32), [one.num_rows for one in sets])
    return settings | {"task": task, "task_names": tuple(one.name for one in sets), "mixing": config.mixing}


def _check_both(anchors: np.ndarray, positives: np.ndarray) -> None:
    check_embeddings("anchor", anchors)
    check_embeddings("positive", positives, len(anchors))
    widths = anchors.shape[1], positives.shape[1]
    if widths[0] != widths[1]:
        raise AnybatchError(f"Anchors have {widths[0]} dimensions, positives {widths[1]}; expected the same.")


def _note_small_set(one: _Set, config: SettledConfig, report: MiningReport) -> None:
    beside = "come one by one in the batches of others"
    report.notes.append(f"{len(one.anchors)} rows make no cluster of {config.cluster_size}; they {beside}.")
    warnings.warn(
        f"The data set '{one.name}' has {len(one.anchors)} rows, no cluster of {config.cluster_size}: its rows "
        f"{beside}, and with inclusion weights they have hardly any negatives.",
        stacklevel=3,
    )


def _note_single_rows(plan: BatchPlan, report: MiningReport) -> None:
    """Say so where the rows of small data sets are too many."""
    wanted, sampled = sum(plan.sampling.single_rows), plan.sampling.num_single_rows
    if sampled < wanted:
        report.notes.append(
            f"The data sets without a cluster have more rows than half of the places of an epoch: {sampled} of their "
            f"{wanted} come in an epoch. Lower mining.cluster_size, or leave data sets out."
        )
        warnings.warn(report.notes[-1], stacklevel=3)


def _note_window(one: _Set, report: MiningReport) -> None:
    report.notes.append(
        f"The rank window [{one.asked.skip}, {one.asked.take}] is wider than {len(one.texts)} distinct positives "
        f"allow; using [{one.window.skip}, {one.window.take}]. Set mining.window to at most a tenth and a half of them."
    )
    warnings.warn(report.notes[-1], stacklevel=4)


@contextmanager
def _stage(name: str, progress: Progress) -> Iterator[Callable[[float], None]]:
    """Say where a stage is; yields the function that reports its fraction."""
    progress(name, 0.0)
    yield partial(progress, name)
    progress(name, 1.0)
