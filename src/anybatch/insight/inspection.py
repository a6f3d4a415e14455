"""What a plan's batches hold, measured anew from the teacher's embeddings: negatives, hubs, clusters, expected loss.

A plan stores clusters and suspects, not scores; everything here follows from the embeddings again, on a sample of
anchors, so that the plan stays at a few bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.insight.cosines import BatchScores, Cosines
from anybatch.mining.audit import Beside, most_wanted
from anybatch.mining.config import MiningConfig
from anybatch.mining.graph import Window
from anybatch.mining.inputs import check_embeddings, compact_ids, first_rows
from anybatch.mining.neighbors import exact_neighbors
from anybatch.mining.statistics import BatchStatistics, batch_statistics
from anybatch.plans.plan import BatchPlan

DUPLICATE = 0.95  # cosine of two positives from which they are shown as saying the same
SHOWN = 20  # pairs of rows kept of suspects, and of duplicates


@dataclass(frozen=True, kw_only=True)
class RowPair:
    """Two rows and the figure that puts them on a list.

    Attributes:
        row, other: Row numbers.
        score: Suspects: the cosine of `row`'s anchor with `other`'s positive minus that with its own. Duplicates: the
            cosine of the two positives.
    """

    row: int
    other: int
    score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterExample:
    """One cluster.

    Attributes:
        number: The cluster; -1 for random rows.
        kind: "tightest", "typical" or "loosest" of those looked at, by the mean score between its rows; or "random":
            rows drawn at random, for comparison.
        rows: (K,) its rows.
        scores: (K, K) cosines of anchors (down) and positives (across).
    """

    number: int
    kind: str
    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanInspection:
    """What `inspect_plan` measured of one data set.

    Attributes:
        num_anchors: Anchors looked at, drawn at random; all rows where that is no more.
        skip, take: The rank window, the plan's own or (for random plans) the default that fits the data.
        temperature: Of the losses.
        window_in_batch, conflicts_in_batch: Wanted negatives and probable false negatives in the anchor's batch of
            epoch 0.
        random_window_in_batch, random_conflicts_in_batch: What a random batch of this size is expected to hold.
        planned, random: The teacher's scores in the plan's batches and in random ones.
        hubs: The most wanted rows with the number of windows they are in, scaled up from the anchors looked at.
        suspects: Suspects of the plan, the highest scores first (`SHOWN` at most, of the same two positives one).
        duplicates: Rows with nearly the same positive as an anchor looked at, highest first (likewise).
        duplicate_share: Share of the anchors looked at with such a row.
        repeated_anchors, repeated_positives: Rows whose anchor (positive) is another row's, letter by letter.
        clusters: Examples; empty for random plans.
        statistics: Whether mining is likely to help.

    Example:
        >>> embeddings = np.random.default_rng(0).normal(size=(2, 64, 8))
        >>> seen = inspect_plan(BatchPlan.random(64, 8), *embeddings)[""]
        >>> seen.num_anchors, seen.clusters
        (64, [])
    """

    num_anchors: int
    skip: int
    take: int
    temperature: float
    window_in_batch: float
    conflicts_in_batch: float
    random_window_in_batch: float
    random_conflicts_in_batch: float
    planned: BatchScores
    random: BatchScores
    hubs: list[tuple[int, int]]
    suspects: list[RowPair]
    duplicates: list[RowPair]
    duplicate_share: float
    repeated_anchors: int
    repeated_positives: int
    clusters: list[ClusterExample]
    statistics: BatchStatistics


def inspect_plan(
    plan: BatchPlan,
    anchor_embeddings: np.ndarray,
    positive_embeddings: np.ndarray,
    *,
    anchor_id: np.ndarray | None = None,
    positive_id: np.ndarray | None = None,
    temperature: float = 0.05,
    num_anchors: int = 2000,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, PlanInspection]:
    """Measure a plan against random batches under a teacher's scores, each data set ranked by itself as in mining.

    Anchors are one set's rows in the plan's batches: of that set alone (`mixing="within"`), or with rows of others,
    which count in the expected loss. Random batches are sampled the same way, of the same sets with the same shares.

    Args:
        plan: Mined or random.
        anchor_embeddings, positive_embeddings: (n, D) float, the teacher's; may be memory-mapped.
        anchor_id, positive_id: (n,) int; equal for identical texts, which are no negatives of each other. None: all
            differ.
        temperature: Of the expected loss.
        num_anchors: Anchors looked at in each set; a share measured on 2,000 of them has a standard error of at most
            1.1 points.
        seed: Of the draws.
        progress: Called with the fraction of the ranking done.

    Returns:
        What was measured, by the data set's name, "" where the plan has one; row and cluster numbers are the plan's.
        Sets of which no row is in a batch are left out.

    Raises:
        AnybatchError: Embeddings of another number of rows, or that cannot be ranked; a temperature or number of
            anchors below 1.

    Cost, summed over sets of n rows: num_anchors * n * D multiplications, a look at every row, and two losses of
    num_anchors rows.
    """
    check_embeddings("anchor", anchor_embeddings, plan.num_rows)
    check_embeddings("positive", positive_embeddings, plan.num_rows)
    if not 0 < temperature < np.inf or num_anchors < 1:
        raise AnybatchError(
            f"The temperature is {temperature} and the number of anchors {num_anchors}; expected above 0, and at least "
            "1."
        )
    ids = compact_ids(plan.num_rows, anchor_id=anchor_id, positive_id=positive_id)
    pairs = Cosines(anchor_embeddings, positive_embeddings, *ids)
    placed = np.bincount(plan.epoch_batches(0).ravel(), minlength=plan.num_rows) > 0
    shown = {name: rows for name, rows in plan.set_rows.items() if placed[rows].any() and len(rows) > 1}

    def advance(done: int) -> Callable[[float], None]:
        return lambda fraction: progress((done + fraction) / len(shown)) if progress is not None else None

    return {
        name: _measure(plan, pairs, name, rows, temperature, num_anchors, seed, progress=advance(place))
        for place, (name, rows) in enumerate(shown.items())
    }


def _measure(
    plan: BatchPlan,
    pairs: Cosines,
    name: str,
    members: np.ndarray,
    temperature: float,
    num_anchors: int,
    seed: int,
    *,
    progress: Callable[[float], None],
) -> PlanInspection:
    """`members`: the rows of the set `name`, which are ranked among each other, ascending."""
    # 1. Some anchors, and how the teacher ranks the others for them.
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(members), min(num_anchors, len(members)), replace=False))
    rows = members[chosen]
    text = first_rows(pairs.positive_id[members])
    columns = np.flatnonzero(text == np.arange(len(text)))
    window = _window(plan, name, len(members), len(columns))
    whole = members[-1] - members[0] + 1 == len(members)  # then nothing is copied out of the files
    part = slice(int(members[0]), int(members[-1]) + 1) if whole else members
    neighbors = exact_neighbors(
        pairs.anchors[part],
        pairs.positives[part],
        window.depth,
        anchor_id=pairs.anchor_id[part],
        positive_id=pairs.positive_id[part],
        rows=chosen,
        columns=columns,
        progress=progress,
    )
    wanted, conflict = window.cut(neighbors)
    ids = np.where(neighbors.ids >= 0, members[neighbors.ids], -1)

    # 2. Which of them share the anchor's batch, and how many would by chance.
    batches = plan.epoch_batches(0)
    batch = np.full(plan.num_rows, -1)
    batch[batches] = np.arange(len(batches))[:, None]
    home = batch[rows]
    beside = Beside(batch[members], text)
    together = beside.count(home[:, None], neighbors.ids)
    num_placed = max(1, int((home >= 0).sum()))
    # That a given row of theirs is in an anchor's random batch: by how many of them such a batch holds.
    sizes = np.bincount(batch[members][batch[members] >= 0]).astype(np.float64)
    by_chance = float(np.sum(sizes * (sizes - 1))) / max(1.0, float(np.sum(sizes))) / max(1, len(members) - 1)

    # 3. The teacher's scores in the plan's batches and in random ones.
    among = np.isin(np.arange(plan.num_rows), members)
    planned, random = (
        pairs.batch_scores(some, num_anchors, temperature, among=among)
        for some in (batches, _random_batches(plan, seed))
    )
    duplicates = _duplicates(rows, ids[:, :8], pairs)
    scale = len(members) / len(rows)
    return PlanInspection(
        num_anchors=len(rows),
        skip=window.skip,
        take=window.take,
        temperature=temperature,
        window_in_batch=float((wanted * together).sum()) / num_placed,
        conflicts_in_batch=float((conflict * together).sum()) / num_placed,
        random_window_in_batch=float((wanted * beside.rows_of_text[neighbors.ids]).sum()) / len(rows) * by_chance,
        random_conflicts_in_batch=float((conflict * beside.rows_of_text[neighbors.ids]).sum()) / len(rows) * by_chance,
        planned=planned,
        random=random,
        hubs=[(row, round(count * scale)) for row, count in most_wanted(ids[wanted])],
        suspects=_suspects(plan, pairs, among),
        duplicates=_shown(duplicates, pairs.positive_id),
        duplicate_share=len({pair.row for pair in duplicates}) / len(rows),
        repeated_anchors=_repeated(pairs.anchor_id[members]),
        repeated_positives=_repeated(pairs.positive_id[members]),
        clusters=_examples(plan, pairs, members, generator),
        statistics=batch_statistics(neighbors, plan.cluster[members], window, text=text, rows=chosen),
    )


def _window(plan: BatchPlan, name: str, num_rows: int, num_texts: int) -> Window:
    """The rank window that a data set was mined with; the default one for plans that were not mined."""
    windows = plan.meta.get("windows")
    if windows is not None and name in windows:
        skip, take = windows[name]
        return Window(skip, take, plan.meta.get("margin"))
    return MiningConfig(batch_size=plan.batch_size).settled().window_for(num_rows, num_texts)[1]


def _random_batches(plan: BatchPlan, seed: int) -> np.ndarray:
    """An epoch of random batches, of the same data sets with the same shares; of none fewer rows than the plan's."""
    shares = plan.task_shares
    if plan.task is not None:
        rows = np.bincount(plan.task, minlength=len(plan.task_names))
        # At least one cluster of each data set is in a plan: more than its share, perhaps, and what fills a batch.
        clusters = np.asarray(plan.sampling.quotas)
        sampled = (clusters * plan.cluster_size + plan.sampling.single_rows) / np.maximum(rows, 1)
        asked = np.where(clusters, plan.task_shares or 1.0, 0.0)
        shares = tuple(np.where(rows, np.maximum(sampled, asked), 1.0).tolist())
    every = np.arange(plan.num_rows, dtype=np.int32)
    unmined = replace(plan, cluster_size=1, cluster=every, seed=seed, task_shares=shares, suspects=None, negatives=None)
    return unmined.epoch_batches(0)


def _suspects(plan: BatchPlan, pairs: Cosines, among: np.ndarray) -> list[RowPair]:
    """The plan's suspects by how far the other's positive scores above the own, in the worse of both directions."""
    suspects = np.zeros((0, 2), np.int32) if plan.suspects is None else plan.suspects
    suspects = suspects[among[suspects].all(axis=1)]
    rows, others = np.concatenate([suspects, suspects[:, ::-1]]).T
    scores = (pairs.between(rows, others) - pairs.between(rows, rows)).reshape(2, -1)
    score, worse = scores.max(axis=0), scores.argmax(axis=0)
    found = (
        RowPair(
            row=int(suspects[place, worse[place]]),
            other=int(suspects[place, 1 - worse[place]]),
            score=float(score[place]),
        )
        for place in np.argsort(-score, kind="stable")
    )
    return _shown(found, pairs.positive_id)


def _shown(pairs: Iterable[RowPair], positive_id: np.ndarray) -> list[RowPair]:
    """The first `SHOWN`, no two with the same two positives: one caption of many images would fill the list."""
    kinds: dict[frozenset[int], RowPair] = {}
    for pair in pairs:
        kinds.setdefault(frozenset(map(int, positive_id[[pair.row, pair.other]])), pair)
        if len(kinds) == SHOWN:
            break
    return list(kinds.values())


def _duplicates(rows: np.ndarray, ids: np.ndarray, pairs: Cosines) -> list[RowPair]:
    """Among each anchor's best neighbours those whose positive nearly equals its own."""
    line, column = np.nonzero(ids >= 0)
    others = ids[line, column]
    cosines = pairs.between(rows[line], others, positives=True)
    found = [
        RowPair(row=int(rows[line[place]]), other=int(others[place]), score=float(cosines[place]))
        for place in np.flatnonzero(cosines >= DUPLICATE)
    ]
    return sorted(found, key=lambda pair: -pair.score)


def _repeated(ids: np.ndarray) -> int:
    _, counts = np.unique(ids, return_counts=True)
    return int(counts[counts > 1].sum())


def _examples(
    plan: BatchPlan, pairs: Cosines, members: np.ndarray, generator: np.random.Generator, look_at: int = 200
) -> list[ClusterExample]:
    own = plan.cluster[members]
    placed = members[own >= 0]
    if plan.cluster_size == 1 or not len(placed):
        return []
    clusters = placed[np.argsort(plan.cluster[placed], kind="stable")].reshape(-1, plan.cluster_size)
    clusters = clusters[np.sort(generator.choice(len(clusters), min(look_at, len(clusters)), replace=False))]
    apart = ~np.eye(plan.cluster_size, dtype=bool)
    tight = np.argsort([-pairs.matrix(rows)[apart].mean() for rows in clusters], kind="stable")
    kinds = {"tightest": tight[0], "typical": tight[len(tight) // 2], "loosest": tight[-1]}
    chosen = [(int(plan.cluster[clusters[place][0]]), kind, clusters[place]) for kind, place in kinds.items()]
    chosen.append((-1, "random", np.sort(generator.choice(members, plan.cluster_size, replace=False))))
    return [
        ClusterExample(number=number, kind=kind, rows=rows, scores=pairs.matrix(rows)) for number, kind, rows in chosen
    ]
