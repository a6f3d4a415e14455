"""Explicit hard negatives (B3++): drawn from what the members of a cluster want, the most wanted items most often."""

from __future__ import annotations

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.ids import known_positives
from anybatch.mining.compiled import compiled
from anybatch.mining.graph import MiningGraph
from anybatch.mining.neighbors import check_at_least, compact_ids


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

    An item of the window is drawn with probability proportional to the number of windows of the row's cluster that it is in,
    without repetition; rows of the cluster itself are left out, being in the batch already.

    Args:
        graph: From `build_graph`.
        cluster: (n,) int; -1 for none (such rows count their own window alone).
        num_negatives: h.
        anchor_id, positive_id: (n,) int; identical content, and positives of the same anchor in other rows, are never drawn.
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
    anchor, positive = (
        compact_ids(name, ids, num_rows) for name, ids in (("anchor_id", anchor_id), ("positive_id", positive_id))
    )
    order = np.argsort(cluster, kind="stable").astype(np.int64)
    window = graph.window
    result = np.full((num_rows, num_negatives), -1, np.int32)
    _draw(
        order, cluster, window.indptr.astype(np.int64), window.indices.astype(np.int64),
        anchor, positive, seed % 2**32, result,
    )  # fmt: skip
    # What another row pairs with the same anchor is a positive, not a negative.
    width = int(positive.max(initial=0)) + 1
    pairs = anchor[:, None] * width + positive[result]
    result[(result >= 0) & np.isin(pairs, known_positives(anchor, positive, width))] = -1
    return result


@compiled
def _beside(cluster, row, item):  # pragma: no cover - compiled
    """Whether two rows share a cluster."""
    return cluster[item] == cluster[row] and cluster[row] >= 0


@compiled
def _draw(order, cluster, indptr, indices, anchor_id, positive_id, seed, result):  # pragma: no cover - compiled
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator, not NumPy's
    num_rows = len(cluster)
    count = np.zeros(num_rows, np.int64)
    start = 0
    while start < num_rows:
        stop = start + 1
        while stop < num_rows and cluster[order[stop]] == cluster[order[start]] and cluster[order[start]] >= 0:
            stop += 1
        for place in range(start, stop):
            for edge in range(indptr[order[place]], indptr[order[place] + 1]):
                count[indices[edge]] += 1
        for place in range(start, stop):
            row = order[place]
            total = 0
            for edge in range(indptr[row], indptr[row + 1]):
                item = indices[edge]
                beside = _beside(cluster, row, item)
                if not beside and anchor_id[item] != anchor_id[row] and positive_id[item] != positive_id[row]:
                    total += count[item]
            for drawn in range(result.shape[1]):
                if total <= 0:
                    break
                mark = np.random.randint(0, total)  # noqa: NPY002
                for edge in range(indptr[row], indptr[row + 1]):
                    item = indices[edge]
                    beside = _beside(cluster, row, item)
                    if beside or anchor_id[item] == anchor_id[row] or positive_id[item] == positive_id[row]:
                        continue
                    taken = False
                    for earlier in range(drawn):
                        taken = taken or result[row, earlier] == item
                    if taken:
                        continue
                    mark -= count[item]
                    if mark < 0:
                        result[row, drawn] = item
                        total -= count[item]
                        break
        for place in range(start, stop):
            for edge in range(indptr[order[place]], indptr[order[place] + 1]):
                count[indices[edge]] = 0
        start = stop
