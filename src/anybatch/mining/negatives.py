"""Explicit hard negatives (B3++): drawn from what the members of a cluster want, the most wanted items most often."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.ids import known_positives
from anybatch.mining.compiled import compiled
from anybatch.mining.graph import MiningGraph
from anybatch.mining.inputs import check_at_least, compact_ids


def sample_negatives(
    graph: MiningGraph,
    cluster: np.ndarray,
    num_negatives: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    seed: int = 0,
) -> np.ndarray:
    """Hard negatives for each row, from its own rank window.

    An item of the window is drawn with probability proportional to the number of windows of the row's cluster that it
    is in, without repetition; rows of the cluster itself are left out, being in the batch already.

    Args:
        graph: From `build_graph`.
        cluster: (n,) int; -1 for none (such rows count their own window alone).
        num_negatives: h.
        anchor_id, positive_id: (n,) int; identical content, and positives of the same anchor in other rows, are never
            drawn.
        seed: Of the draws.

    Returns:
        (n, h) int32 row numbers; -1 where a window has too few.

    Reference: B3, arXiv 2505.11293, section 3 (B3++).
    """
    cluster = np.asarray(cluster).astype(np.int64)
    check_at_least("num_negatives", num_negatives, 0)
    num_rows = len(graph.window.indptr) - 1
    if cluster.shape != (num_rows,):
        raise AnybatchError(
            f"The graph is of {num_rows} rows, cluster has shape {cluster.shape}; expected ({num_rows},)."
        )
    anchor, positive = compact_ids(num_rows, anchor_id=anchor_id, positive_id=positive_id)
    windows = _Windows(
        indptr=graph.window.indptr.astype(np.int64),
        indices=graph.window.indices.astype(np.int64),
        cluster=cluster,
        anchor_id=anchor,
        positive_id=positive,
    )
    result = np.full((num_rows, num_negatives), -1, np.int32)
    _draw(windows, np.argsort(cluster, kind="stable").astype(np.int64), seed % 2**32, result)
    # What another row pairs with the same anchor is a positive, not a negative.
    width = int(positive.max(initial=0)) + 1
    pairs = anchor[:, None] * width + positive[result]
    result[(result >= 0) & np.isin(pairs, known_positives(anchor, positive, width))] = -1
    return result


class _Windows(NamedTuple):
    """Whose windows are drawn from: CSR of the rank windows; (n,) cluster and ids of each row."""

    indptr: np.ndarray
    indices: np.ndarray
    cluster: np.ndarray
    anchor_id: np.ndarray
    positive_id: np.ndarray


@compiled
def _draw(windows, order, seed, result):  # pragma: no cover - compiled
    """`order`: rows, cluster after cluster."""
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator, not NumPy's
    cluster = windows.cluster
    count = np.zeros(len(cluster), np.int64)  # windows of this cluster that an item is in
    start = 0
    while start < len(order):
        home, stop = cluster[order[start]], start + 1
        while home >= 0 and stop < len(order) and cluster[order[stop]] == home:
            stop += 1
        for row in order[start:stop]:
            for item in windows.indices[windows.indptr[row] : windows.indptr[row + 1]]:
                count[item] += 1
        for row in order[start:stop]:
            _draw_row(windows, row, count, result[row])
        for row in order[start:stop]:
            for item in windows.indices[windows.indptr[row] : windows.indptr[row + 1]]:
                count[item] = 0
        start = stop


@compiled
def _draw_row(windows, row, count, result):  # pragma: no cover - compiled
    """Fill a row of the result, as far as its window goes."""
    home, anchor, positive = windows.cluster[row], windows.anchor_id[row], windows.positive_id[row]
    items = windows.indices[windows.indptr[row] : windows.indptr[row + 1]]
    weight = np.zeros(len(items), np.int64)
    for place, item in enumerate(items):
        beside = home >= 0 and windows.cluster[item] == home
        if not beside and windows.anchor_id[item] != anchor and windows.positive_id[item] != positive:
            weight[place] = count[item]
    total = weight.sum()
    for number in range(len(result)):
        if total <= 0:
            break
        mark = np.random.randint(0, total)  # noqa: NPY002
        for place, item in enumerate(items):
            mark -= weight[place]
            if mark < 0:
                result[number] = item
                total -= weight[place]
                weight[place] = 0  # without repetition
                break
