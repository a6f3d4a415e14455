"""Which pairs to hold out for evaluation: whole groups of pairs that share a text or image, from each data set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from anybatch.data.inputs import pick
from anybatch.data.pairs import PairData

SHARE, FEWEST, MOST = 0.05, 50, 1_000
LARGEST_SHARE = 0.2  # what the fewest may be of all
LARGEST_GROUP = 0.1  # of the rows that a data set is to hold out: a few large groups would be no sample


def held_out_rows(pairs: PairData, batch_size: int, seed: int) -> np.ndarray:
    """Rows to hold out, ascending: 5% of the pairs, at least 50 and at most 1,000; none where that cannot be done.

    No text or image of theirs, on whichever side, is in another row. Each data set gives its part if a batch of
    `batch_size` is left of it. The same pairs and seed give the same rows. Cost: 1 s a million pairs.

    >>> held_out_rows(PairData(anchors=["a"] * 9, positives=["b"] * 9), batch_size=4, seed=0)
    array([], dtype=int64)
    """
    total = min(max(round(SHARE * len(pairs)), FEWEST), MOST)
    nothing = np.empty(0, np.int64)
    if total > LARGEST_SHARE * len(pairs):
        return nothing
    # 1. Groups: rows are joined where they share a text, on either side.
    anchor, positive = pairs.shared_id
    number = max(anchor.max(), positive.max()) + 1
    links = coo_matrix((np.ones(len(pairs)), (anchor, positive)), shape=(number, number))
    group = connected_components(links, directed=False)[1][anchor]
    size = np.bincount(group)
    # 2. Of each data set, whole groups in random order, none of which reaches into another data set.
    random = np.random.default_rng(seed)
    place = random.permutation(len(size))
    lengths = [part.num_rows for part in pairs.sets] or [len(pairs)]
    chosen = [nothing]
    for first, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
        quota = round(total * length / len(pairs))
        if length - quota < batch_size:
            continue
        of_rows = group[first : first + length]
        inside = np.bincount(of_rows, minlength=len(size))
        fitting = np.flatnonzero((inside == size) & (inside > 0) & (size <= max(1, LARGEST_GROUP * quota)))
        fitting = fitting[np.argsort(place[fitting])]
        fitting = fitting[np.cumsum(size[fitting]) <= quota]
        chosen.append(first + np.flatnonzero(np.isin(of_rows, fitting)))
    rows = np.concatenate(chosen)
    return rows if len(rows) >= FEWEST else nothing


def split_pairs(pairs: PairData, rows: np.ndarray) -> tuple[PairData, PairData]:
    """The pairs without `rows`, and those of `rows` as a model reads them: with instructions, without negatives."""
    anchors, positives = (pick(column, rows) for column in pairs.prompted[:2])
    left = select_pairs(pairs, np.setdiff1d(np.arange(len(pairs)), rows))
    return left, PairData(anchors=anchors, positives=positives, source=pairs.source)


def select_pairs(pairs: PairData, rows: np.ndarray) -> PairData:
    """The pairs of some rows, ascending, in their data sets."""
    last = np.cumsum([part.num_rows for part in pairs.sets])
    counts = np.diff(np.searchsorted(rows, last), prepend=0).tolist()
    return PairData(
        anchors=pick(pairs.anchors, rows),
        positives=pick(pairs.positives, rows),
        negatives=tuple(pick(column, rows) for column in pairs.negatives),
        source=pairs.source,
        sets=tuple(replace(part, num_rows=count) for part, count in zip(pairs.sets, counts, strict=True)),
    )
