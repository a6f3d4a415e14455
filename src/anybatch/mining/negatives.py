"""Explicit hard negatives (B3++): drawn for a whole cluster, from what its members want and do not suspect."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.core.ids import known_positives
from anybatch.mining.compiled import compiled
from anybatch.mining.exchange import _same_content
from anybatch.mining.graph import MiningGraph
from anybatch.mining.inputs import check_at_least, compact_ids, first_rows


def sample_negatives(
    graph: MiningGraph,
    cluster: np.ndarray,
    num_negatives: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    power: int = 2,
    penalty: int = 2,
    own_texts: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Hard negatives for the rows of each cluster, as all of its anchors are contrasted with all of them.

        weight of a text = (windows of the cluster that it is in - penalty * members that suspect it) ** power

    Texts are drawn in proportion to their weights, where the base is above 0, without return until none is left. Each
    goes to a row that wants it, if one has a place, else to any row.

    Args:
        graph: From `build_graph`.
        cluster: (n,) int; -1 for none: such a row draws from its own window.
        num_negatives: h.
        anchor_id, positive_id: (n,) int; identical content, and positives of the same anchor in other rows, are never
            given to a row.
        power: 1 is published. With 2, clusters of 32 have 25 window items of an anchor among 5 negatives a row in place
            of 21, and as few that it suspects (.4 and 1.9 in place of .3 and 1.5, on two data sets).
        penalty: 1 is published (released code: a count over windows and suspected ranks, less 2 for the latter).
        own_texts: Whether those of the cluster's own rows may be drawn; published for labels.

    Returns:
        (n, h) int32 row numbers, none twice in a row; -1 where there are too few.

    Cost: for K rows of a cluster with windows of m ranks, n * h * K * m steps at most; on one core.

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
    width = int(positive.max(initial=0)) + 1
    wanted = _Wanted(
        *_arrays(graph.window),
        *_arrays(graph.conflict),
        text=first_rows(positive),
        anchor_id=anchor,
        positive_id=positive,
        known=np.append(known_positives(anchor, positive, width), width),
    )
    result = np.full((num_rows, num_negatives), -1, np.int32)
    order = np.argsort(cluster, kind="stable").astype(np.int64)
    if num_negatives:
        _draw(wanted, cluster, order, power, penalty, own_texts, seed % 2**32, result)
    return result


def _arrays(matrix: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)


class _Wanted(NamedTuple):
    """CSR of rank windows and conflicts; of each row the one ranked for its text; ids as in `SearchGraph`."""

    indptr: np.ndarray
    indices: np.ndarray
    conflict_indptr: np.ndarray
    conflict_indices: np.ndarray
    text: np.ndarray
    anchor_id: np.ndarray
    positive_id: np.ndarray
    known: np.ndarray


@compiled
def _draw(wanted, cluster, order, power, penalty, own_texts, seed, result):  # pragma: no cover - compiled
    """`order`: rows, cluster after cluster."""
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator, not NumPy's
    place = np.full(len(cluster), -1, np.int64)  # of a text among the items of this cluster
    start = 0
    while start < len(order):
        home, stop = cluster[order[start]], start + 1
        while home >= 0 and stop < len(order) and cluster[order[stop]] == home:
            stop += 1
        rows = order[start:stop]
        items, weight = _weigh(wanted, rows, place, power, penalty, own_texts or home < 0)
        for _ in range(result.shape[1]):  # from the beginning again where all were drawn and places are free
            if _spread(wanted, rows, items, weight.copy(), result) == 0:
                break
        for item in items:
            place[item] = -1
        start = stop


@compiled
def _weigh(wanted, rows, place, power, penalty, own_texts):  # pragma: no cover - compiled
    """The texts in the windows of these rows, with their weights; `place` says where each text is among them."""
    total = 0
    for row in rows:
        total += wanted.indptr[row + 1] - wanted.indptr[row]
    items, weight, num = np.empty(total, np.int64), np.zeros(total, np.int64), 0
    for row in rows:
        for item in wanted.indices[wanted.indptr[row] : wanted.indptr[row + 1]]:
            if place[item] < 0:
                place[item] = num
                items[num] = item
                num += 1
            weight[place[item]] += 1
    for row in rows:
        for item in wanted.conflict_indices[wanted.conflict_indptr[row] : wanted.conflict_indptr[row + 1]]:
            if place[item] >= 0:
                weight[place[item]] -= penalty
    for row in rows:
        for item in (row, wanted.text[row]):
            if not own_texts and place[item] >= 0:
                weight[place[item]] = 0
    return items[:num], np.maximum(weight[:num], 0) ** power


@compiled
def _spread(wanted, rows, items, weight, result):  # pragma: no cover - compiled
    """Draw until all is drawn or every row has what it needs; how many were given to a row. `weight` is used up."""
    total, given = weight.sum(), 0
    free = 0
    for row in rows:
        free += np.count_nonzero(result[row] < 0)
    while total > 0 and given < free:
        mark, drawn = np.random.randint(0, total), 0  # noqa: NPY002
        while mark >= weight[drawn]:
            mark -= weight[drawn]
            drawn += 1
        total -= weight[drawn]
        weight[drawn] = 0
        taker, wants = -1, False
        first = np.random.randint(0, len(rows))  # noqa: NPY002
        for turn in range(len(rows)):
            row = rows[(first + turn) % len(rows)]
            if result[row, -1] >= 0 or np.any(result[row] == items[drawn]) or _same_content(wanted, row, items[drawn]):
                continue
            window = wanted.indices[wanted.indptr[row] : wanted.indptr[row + 1]]
            where = np.searchsorted(window, items[drawn])
            wants = where < len(window) and window[where] == items[drawn]
            if wants or taker < 0:
                taker = row
            if wants:
                break
        if taker >= 0:
            result[taker, np.argmin(result[taker])] = items[drawn]  # the first -1
            given += 1
    return given
