"""What a plan's batches hold under the teacher's scores: softmax mass, suspected false negatives, the teacher itself.

A plan stores clusters and suspected pairs, not scores: all figures follow from a teacher's embeddings again, on a
sample of anchors against all rows, each data set ranked by itself as in mining, and beside random batches of the same
size. Mining, `anybatch inspect plan` and `anybatch recommend` have them from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from anybatch.core.blocks import release_pages
from anybatch.core.errors import AnybatchError
from anybatch.mining.config import MARGIN
from anybatch.mining.inputs import check_embeddings, compact_ids
from anybatch.plans.plan import BatchPlan

SHOWN = 20  # pairs kept, the nearest first
LOOKED_AT = 200  # pairs of a block of rows, of which many may have the same anchor or the same two positives
BLOCK = 2**22  # scores held at once
TIE = 1e-6  # of cosines in float32


@dataclass(frozen=True, kw_only=True)
class RowPair:
    """A suspected false negative: the positive of `other`, in the batch of `row`, may answer its anchor as well.

    Attributes:
        row, other: Row numbers.
        own, score: Cosines of `row`'s anchor with its own positive and with `other`'s.
    """

    row: int
    other: int
    own: float
    score: float


@dataclass(frozen=True, kw_only=True)
class BatchMass:
    """Where the negatives' softmax mass is, exp(s_ij / tau) over its sum over all rows that are negatives of i.

    Attributes:
        in_batch: Share in the anchor's batch, hard negatives included.
        masked: Share that the plan suspects to be false negatives, wherever it is; `loss.mask_suspects` removes it.
        suspects: Negatives in the batch that the plan suspects; of a plan that did not look for them, those that score
            above `MARGIN` of the own positive.
    """

    in_batch: float
    masked: float
    suspects: float


@dataclass(frozen=True, kw_only=True)
class PlanInspection:
    """What `inspect_plan` measured of one data set.

    Attributes:
        num_anchors: Anchors looked at, drawn at random from those in the batches of epoch 0.
        own_first: Share of anchors whose own positive the teacher scores above every negative of the data set.
        planned, random: In the plan's batches, and expected of random ones of the same size.
        suspects: Of the suspected false negatives in the plan's batches the nearest, one an anchor, and of the same two
            positives one pair.

    Example:
        >>> embeddings = np.random.default_rng(0).normal(size=(2, 64, 8))
        >>> seen = inspect_plan(BatchPlan.random(64, 8), *embeddings)[""]
        >>> seen.num_anchors, round(seen.random.in_batch, 3)  # 7 of 63 others
        (64, 0.111)
    """

    num_anchors: int
    own_first: float
    planned: BatchMass
    random: BatchMass
    suspects: list[RowPair]

    @property
    def figures(self) -> dict[str, float]:
        """What `advice` goes by: of `planned`, and how many times the mass of random batches it holds."""
        planned, gain = self.planned, self.planned.in_batch / max(self.random.in_batch, 1e-30)
        return {"own_first": self.own_first, "suspects": planned.suspects, "masked": planned.masked, "gain": gain}


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
    """Where the negatives' softmax mass is under a teacher's scores, and how many may be false.

    Args:
        plan: Mined or random.
        anchor_embeddings, positive_embeddings: (n, D) float, the teacher's; may be memory-mapped.
        anchor_id, positive_id: (n,) int; equal for identical texts, no negatives of each other. None: all differ.
        temperature: Of the softmax.
        num_anchors: Anchors looked at in each set, drawn by `seed`; a share measured on 2,000 of them has a standard
            error of at most 1.1 points.
        progress: Called with the fraction done.

    Returns:
        What was measured, by the data set's name, "" where the plan has one. Sets of which no row is in a batch are
        left out.

    Raises:
        AnybatchError: Embeddings of another number of rows, or that cannot be ranked; no temperature or anchors.

    Cost, summed over sets of n rows: num_anchors * n * D multiplications, as many exponentials; seconds for 100,000
        rows. The positives are read once, in pieces.
    """
    check_embeddings("anchor", anchor_embeddings, plan.num_rows)
    check_embeddings("positive", positive_embeddings, plan.num_rows)
    if not 0 < temperature < np.inf or num_anchors < 1:
        raise AnybatchError(
            f"The temperature is {temperature} and the number of anchors {num_anchors}; expected above 0, and at least "
            "1."
        )
    ids = compact_ids(plan.num_rows, anchor_id=anchor_id, positive_id=positive_id)
    batches = plan.epoch_batches(0)
    home = np.full(plan.num_rows, -1)
    home[batches] = np.arange(len(batches))[:, None]
    shown = {name: rows for name, rows in plan.set_rows.items() if (home[rows] >= 0).any() and len(rows) > 1}
    return {
        name: _inspect_set(
            plan, batches, home, members, (anchor_embeddings, positive_embeddings), ids, temperature, num_anchors, seed,
            lambda done, place=place: progress((place + done) / len(shown)) if progress else None,
        )
        for place, (name, members) in enumerate(shown.items())
    }  # fmt: skip


def _inspect_set(
    plan: BatchPlan,
    batches: np.ndarray,
    home: np.ndarray,
    members: np.ndarray,
    sides: tuple[np.ndarray, np.ndarray],
    ids: tuple[np.ndarray, ...],
    temperature: float,
    num_anchors: int,
    seed: int,
    progress: Callable[[float], None],
) -> PlanInspection:
    """`members`: the rows that are ranked among each other, ascending; `home`: each row's batch, -1 for none."""
    # 1. Some anchors, and what the plan says of their rows.
    placed = members[home[members] >= 0]
    chosen = np.sort(np.random.default_rng(seed).choice(placed, min(num_anchors, len(placed)), replace=False))
    anchors, own = _unit(sides[0][chosen]), np.empty((len(chosen), 1), np.float32)
    own[:, 0] = (anchors * _unit(sides[1][chosen])).sum(axis=1)
    suspected, brought = _suspected(plan, chosen, members, ids[1]), _brought(plan, batches, members)
    best, sums = np.full((len(chosen), 1), -np.inf), np.zeros((len(chosen), 3))
    pairs, near, above = [], 0, 0
    width = max(1, BLOCK // len(chosen))
    for start in range(0, len(members), width):
        # 2. The softmax over each anchor's negatives, so far relative to the best of them.
        part = slice(start, start + width)
        others = members[part]
        scores = anchors @ _unit(sides[1][others]).T
        negative = np.logical_and.reduce([side[chosen][:, None] != side[others] for side in ids])
        highest = np.maximum(best, np.where(negative, scores, -2).max(axis=1, keepdims=True))
        sums *= np.exp((best - highest) / temperature)
        best = highest
        mass = np.exp(np.where(negative, (scores - best) / temperature, -np.inf))
        # 3. Which of them share the batch, and are suspected.
        in_batch = home[chosen][:, None] == home[others]
        if brought is not None:
            in_batch |= brought[:, part].tocsr()[home[chosen]].toarray()
        if suspected is None:
            may_be_right = negative & (own > 0) & (scores >= MARGIN * own)
        else:
            may_be_right = suspected[:, part].toarray() & negative
            sums[:, 2] += (mass * may_be_right).sum(axis=1)
        sums[:, 0] += mass.sum(axis=1)
        sums[:, 1] += (mass * in_batch).sum(axis=1)
        above += int(may_be_right.sum())
        line, column = np.nonzero(may_be_right & in_batch)
        near += len(line)
        most = np.argsort(-scores[line, column], kind="stable")[:LOOKED_AT]
        line, column = line[most], column[most]
        pairs += zip(chosen[line], others[column], own[line, 0], scores[line, column], strict=True)
        progress(min(1.0, (start + width) / len(members)))
    release_pages(*sides)
    # 4. That a given row of theirs is in an anchor's random batch: by how many of them such a batch holds.
    sizes = np.bincount(home[placed]).astype(np.float64)
    by_chance = float(np.sum(sizes * (sizes - 1))) / len(placed) / (len(members) - 1)
    in_batch, masked = (sums[:, 1:] / np.maximum(sums[:, :1], 1e-30)).mean(axis=0).tolist()
    return PlanInspection(
        num_anchors=len(chosen),
        own_first=float((best <= own + TIE).mean()),
        planned=BatchMass(in_batch=in_batch, masked=masked, suspects=near / len(chosen)),
        random=BatchMass(in_batch=by_chance, masked=0.0, suspects=above / len(chosen) * by_chance),
        suspects=_most_suspected(pairs, ids[1]),
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _suspected(
    plan: BatchPlan, chosen: np.ndarray, members: np.ndarray, positive_id: np.ndarray
) -> sparse.csc_matrix | None:
    """(chosen, members) bool by row and text, whoever brings it: what `RowTable` masks. None: the plan did not look."""
    if plan.suspects is None:
        return None
    rows, others = plan.suspects.T
    shape = plan.num_rows, plan.num_rows
    texts = sparse.csr_matrix((np.ones(len(rows), bool), (rows, positive_id[others])), shape=shape)[chosen]
    columns = np.ones(len(members), bool), (positive_id[members], np.arange(len(members)))
    return (texts @ sparse.csr_matrix(columns, shape=(plan.num_rows, len(members)))).tocsc()


def _brought(plan: BatchPlan, batches: np.ndarray, members: np.ndarray) -> sparse.csc_matrix | None:
    """(batches, members) bool: whose positives are hard negatives of a batch's rows."""
    if plan.negatives is None:
        return None
    place = np.full(plan.num_rows + 1, -1)  # the last of no row
    place[members] = np.arange(len(members))
    columns = place[plan.negatives[batches].reshape(len(batches), -1)]
    lines, kept = np.arange(len(batches))[:, None] + 0 * columns, columns >= 0
    entries = np.ones(int(kept.sum()), bool), (lines[kept], columns[kept])
    return sparse.csc_matrix(entries, shape=(len(batches), len(members)))


def _most_suspected(pairs: Sequence[tuple[int, int, float, float]], positive_id: np.ndarray) -> list[RowPair]:
    """The nearest `SHOWN`, one an anchor, no two with the same positives: one caption of many images would fill all."""
    shown: list[RowPair] = []
    seen: set[object] = set()
    for row, other, own, score in sorted(pairs, key=lambda pair: -pair[3]):
        keys = int(row), frozenset(map(int, positive_id[[row, other]]))
        if len(shown) < SHOWN and not seen.intersection(keys):
            shown.append(RowPair(row=int(row), other=int(other), own=float(own), score=float(score)))
            seen.update(keys)
    return shown
