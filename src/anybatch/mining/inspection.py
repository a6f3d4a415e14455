"""What a plan's batches hold, measured anew from the teacher's embeddings: negatives, suspects, hubs, clusters, expected loss.

A plan stores clusters and suspects, not scores; everything here follows from the embeddings again, on a sample of anchors, so
that the plan stays at a few bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from anybatch.errors import AnybatchError
from anybatch.mining.audit import most_wanted
from anybatch.mining.config import MiningConfig
from anybatch.mining.cosines import BatchScores, Cosines, unit
from anybatch.mining.graph import cut_windows
from anybatch.mining.mine import fit_window, scored_vectors
from anybatch.mining.neighbors import check_embeddings, exact_neighbors
from anybatch.mining.outlook import Outlook, mining_outlook
from anybatch.plan import BatchPlan

DUPLICATE = 0.95  # cosine of two positives from which they are shown as saying the same
SHOWN = 20  # pairs of rows kept of each kind


@dataclass(frozen=True, kw_only=True)
class RowPair:
    """Two rows and the figure that puts them on a list.

    Attributes:
        row, other: Row numbers.
        score: Suspects: the cosine of `row`'s anchor with `other`'s positive minus that with its own. Duplicates: the cosine of the two positives.
    """

    row: int
    other: int
    score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterExample:
    """One cluster.

    Attributes:
        number: The cluster; -1 for random rows.
        kind: "tightest", "typical" or "loosest" of those looked at, by the mean score between its rows; or "random": rows drawn
            at random, for comparison.
        rows: (K,) its rows.
        scores: (K, K) cosines of anchors (down) and positives (across).
    """

    number: int
    kind: str
    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanInspection:
    """What `inspect_plan` measured.

    Attributes:
        num_anchors: Anchors looked at, drawn at random; all rows where that is no more.
        skip, take: The rank window, the plan's own or (for random plans) the default that fits the data.
        temperature: Of the losses.
        window_in_batch, conflicts_in_batch: Wanted negatives and probable false negatives in the anchor's batch of epoch 0.
        random_window_in_batch, random_conflicts_in_batch: What a random batch of this size is expected to hold.
        window_by_partition, conflicts_by_partition: The same in the anchor's own cluster, for each of the plan's partitions.
        distinct_window, distinct_conflicts: Different ones over all partitions.
        planned, random: The teacher's scores in the plan's batches and in random ones.
        hubs: The most wanted rows with the number of windows they are in, scaled up from the anchors looked at.
        suspects: Suspects of the plan, the highest scores first (`SHOWN` at most).
        duplicates: Rows with nearly the same positive as an anchor looked at, highest first (`SHOWN` at most).
        duplicate_share: Share of the anchors looked at with such a row.
        repeated_anchors, repeated_positives: Rows whose anchor (positive) is another row's, letter by letter.
        clusters: Examples; empty for random plans.
        outlook: Whether mining is likely to help.
    """

    num_anchors: int
    skip: int
    take: int
    temperature: float
    window_in_batch: float
    conflicts_in_batch: float
    random_window_in_batch: float
    random_conflicts_in_batch: float
    window_by_partition: tuple[float, ...]
    conflicts_by_partition: tuple[float, ...]
    distinct_window: float
    distinct_conflicts: float
    planned: BatchScores
    random: BatchScores
    hubs: list[tuple[int, int]]
    suspects: list[RowPair]
    duplicates: list[RowPair]
    duplicate_share: float
    repeated_anchors: int
    repeated_positives: int
    clusters: list[ClusterExample]
    outlook: Outlook


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
) -> PlanInspection:
    """Measure a plan against random batches under a teacher's scores.

    Args:
        plan: Mined or random.
        anchor_embeddings, positive_embeddings: (n, D) float, the teacher's; may be memory-mapped.
        anchor_id, positive_id: (n,) int; equal for identical texts, which are no negatives of each other. None: all differ.
        temperature: Of the expected loss.
        num_anchors: Anchors looked at; a share measured on 2,000 of them has a standard error of at most 1.1 points.
        seed: Of the draws.
        progress: Called with the fraction of the ranking done.

    Raises:
        AnybatchError: Embeddings of another number of rows, or that cannot be ranked; a temperature or number of anchors below 1.

    Cost: num_anchors * n * D multiplications, as much of a look at every row, and two losses of num_anchors rows.
    """
    num_rows = plan.num_rows
    check_embeddings("anchor", anchor_embeddings, num_rows)
    check_embeddings("positive", positive_embeddings, num_rows)
    if not temperature > 0 or num_anchors < 1:
        raise AnybatchError(
            f"The temperature is {temperature} and the number of anchors {num_anchors}; expected above 0, and at least 1."
        )
    anchor_id = np.arange(num_rows) if anchor_id is None else np.asarray(anchor_id)
    positive_id = np.arange(num_rows) if positive_id is None else np.asarray(positive_id)
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(num_rows, min(num_anchors, num_rows), replace=False))
    defaults = MiningConfig()
    window = fit_window(plan.meta.get("skip", defaults.skip), plan.meta.get("take", defaults.take), num_rows)
    cut = {"skip": window[0], "take": window[1], "margin": plan.meta.get("margin")}
    queries, documents = scored_vectors(anchor_embeddings, positive_embeddings, plan.meta.get("score", "query"))
    neighbors = exact_neighbors(
        queries, documents, sum(window), anchor_id=anchor_id, positive_id=positive_id, rows=rows, progress=progress
    )
    wanted, conflict = cut_windows(neighbors, **cut)
    dealt = plan.epoch_batches(0)
    batch = np.full(num_rows, -1)
    batch[dealt] = np.arange(len(dealt))[:, None]
    home = batch[rows]
    together = (batch[neighbors.ids] == home[:, None]) & (home >= 0)[:, None]
    num_dealt = max(1, int((home >= 0).sum()))
    by_chance = (plan.batch_size - 1) / (num_rows - 1)  # that a given row is in an anchor's random batch

    pairs = Cosines(anchor_embeddings, positive_embeddings, anchor_id, positive_id)
    others = BatchPlan.random(num_rows, plan.batch_size, seed=seed).epoch_batches(0)
    planned, random = (pairs.batch_scores(batches, num_anchors, temperature) for batches in (dealt, others))
    beside = [(one[neighbors.ids] == one[rows, None]) & (one >= 0)[rows, None] for one in plan.partition_clusters]
    ever = np.any(beside, axis=0)
    duplicates = _duplicates(rows, neighbors.ids[:, :8], positive_embeddings)
    scale = num_rows / len(rows)
    return PlanInspection(
        num_anchors=len(rows),
        skip=window[0],
        take=window[1],
        temperature=temperature,
        window_in_batch=float((wanted & together).sum()) / num_dealt,
        conflicts_in_batch=float((conflict & together).sum()) / num_dealt,
        random_window_in_batch=float(wanted.sum()) / len(rows) * by_chance,
        random_conflicts_in_batch=float(conflict.sum()) / len(rows) * by_chance,
        window_by_partition=tuple(float((wanted & one).sum()) / len(rows) for one in beside),
        conflicts_by_partition=tuple(float((conflict & one).sum()) / len(rows) for one in beside),
        distinct_window=float((wanted & ever).sum()) / len(rows),
        distinct_conflicts=float((conflict & ever).sum()) / len(rows),
        planned=planned,
        random=random,
        hubs=[(row, round(count * scale)) for row, count in most_wanted(neighbors.ids[wanted])],
        suspects=_suspects(plan, pairs),
        duplicates=duplicates[:SHOWN],
        duplicate_share=len({pair.row for pair in duplicates}) / len(rows),
        repeated_anchors=_repeated(anchor_id),
        repeated_positives=_repeated(positive_id),
        clusters=_examples(plan, pairs, generator),
        outlook=mining_outlook(neighbors, plan.cluster, rows=rows, **cut),
    )


def _suspects(plan: BatchPlan, pairs: Cosines) -> list[RowPair]:
    """The plan's suspects by how far the other's positive scores above the own, in the direction in which it does so most."""
    if plan.suspects is None or not len(plan.suspects):
        return []
    both = np.concatenate([plan.suspects, plan.suspects[:, ::-1]])
    scores = np.concatenate([pairs.over_own(block[:, 0], block[:, 1]) for block in _blocks(both)])
    half = len(plan.suspects)
    forward = scores[:half] >= scores[half:]
    best = np.where(forward, scores[:half], scores[half:])
    order = np.argsort(-best, kind="stable")[:SHOWN]
    chosen = np.where(forward[order, None], both[order], both[half + order])
    return [RowPair(row=int(a), other=int(b), score=float(s)) for (a, b), s in zip(chosen, best[order], strict=True)]


def _blocks(pairs: np.ndarray, size: int = 8192) -> list[np.ndarray]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _duplicates(rows: np.ndarray, ids: np.ndarray, positives: np.ndarray) -> list[RowPair]:
    """Among each anchor's best neighbours those whose positive nearly equals its own."""
    line, column = np.nonzero(ids >= 0)
    found = []
    for block in _blocks(np.stack([rows[line], ids[line, column]], axis=1)):
        cosines = np.einsum("pd,pd->p", unit(positives[block[:, 0]]), unit(positives[block[:, 1]]))
        for place in np.flatnonzero(cosines >= DUPLICATE):
            found.append(RowPair(row=int(block[place, 0]), other=int(block[place, 1]), score=float(cosines[place])))
    return sorted(found, key=lambda pair: -pair.score)


def _repeated(ids: np.ndarray) -> int:
    _, counts = np.unique(ids, return_counts=True)
    return int(counts[counts > 1].sum())


def _examples(
    plan: BatchPlan, pairs: Cosines, generator: np.random.Generator, look_at: int = 200
) -> list[ClusterExample]:
    if plan.cluster_size == 1:
        return []
    numbers = np.sort(generator.choice(plan.num_clusters, min(look_at, plan.num_clusters), replace=False))
    order = np.argsort(plan.cluster, kind="stable")
    members = order[np.count_nonzero(plan.cluster < 0) :].reshape(plan.num_clusters, plan.cluster_size)[numbers]
    apart = ~np.eye(plan.cluster_size, dtype=bool)
    tight = np.argsort([-pairs.matrix(rows)[apart].mean() for rows in members], kind="stable")
    kinds = {"tightest": tight[0], "typical": tight[len(tight) // 2], "loosest": tight[-1]}
    chosen = [(int(numbers[place]), kind, members[place]) for kind, place in kinds.items()]
    chosen.append((-1, "random", np.sort(generator.choice(plan.num_rows, plan.cluster_size, replace=False))))
    return [
        ClusterExample(number=number, kind=kind, rows=rows, scores=pairs.matrix(rows)) for number, kind, rows in chosen
    ]
