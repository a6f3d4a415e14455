"""Clusters of exactly equal size: METIS begins, a search by exchanges on the signed objective finishes. METIS k-way,
where published B3 stops, has 3% of slack, which cripples it at 32 rows a cluster; recursive bisection is the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.core.ids import known_positives
from anybatch.mining.exchange import Clusters, SearchGraph, anneal, best_exchanges, measure_ties, repair
from anybatch.mining.inputs import check_at_least, compact_ids

SWEEPS = 20  # ten times as many gain 4% of the wanted negatives (docs/benchmarks/mining.md)
# Temperatures of the search in mean wanted edges: an exchange that loses that much is taken with chance 1/e.
HOT, COLD = 1.2, 0.35


def metis_clusters(weight: sparse.csr_matrix, num_clusters: int, *, recursive: bool, seed: int = 0) -> np.ndarray:
    """METIS on a graph, (n, n) symmetric CSR with weights >= 0: (n,) int32 clusters of roughly equal size.

    By recursive bisection (ours), or k-way with default options (the published call).
    """
    import pymetis

    num_rows = len(weight.indptr) - 1
    check_at_least("num_clusters", num_clusters, 1)
    if num_clusters == 1:
        return np.zeros(num_rows, np.int32)
    if weight.nnz == 0:
        return (np.arange(num_rows) % num_clusters).astype(np.int32)
    pointers: Any = weight.indptr.astype(np.int32)
    indices: Any = weight.indices.astype(np.int32, copy=False)
    whole: Any = whole_weights(weight)
    options = pymetis.Options(seed=seed % 2**31)
    _, parts = pymetis.part_graph(
        num_clusters, xadj=pointers, adjncy=indices, eweights=whole, recursive=recursive, options=options
    )
    return np.asarray(parts, dtype=np.int32)


def whole_weights(weight: sparse.csr_matrix) -> np.ndarray:
    """METIS takes whole numbers: sixteenths of the mean weight."""
    if not len(weight.data):
        return np.zeros(0, np.int32)
    mean = weight.data.mean(dtype=np.float64)
    if not (weight.data.min() >= 0 and 0 < mean < np.inf):  # nan is neither
        raise AnybatchError(
            f"The weights of the graph run from {weight.data.min()} to {weight.data.max()}; expected numbers of 0 or "
            "more, some of them above."
        )
    whole = weight.data * np.float32(min(16 / mean, 1e38))
    np.rint(whole, out=whole)
    return np.clip(whole, 1, 2**24, out=whole).astype(np.int32)


def equal_clusters(
    start: np.ndarray,
    signed: sparse.csr_matrix,
    cluster_size: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    sweeps: int = SWEEPS,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Make every cluster exactly `cluster_size` rows and raise the signed objective by exchanging rows.

        objective = sum of signed weights inside clusters - HARD * (pairs in a cluster with the same anchor or positive)

    The first and the last sweep take, for each row, the best exchange with the two clusters that attract it most. Those
    between anneal: a row is drawn to a cluster by its ties there, changes places with a member that holds little to it,
    and losses are taken with a chance that falls from sweep to sweep.

    Args:
        start: (n,) int clusters 0 .. n // cluster_size - 1 of any sizes.
        signed: (n, n) symmetric CSR: wanted weights minus conflicts.
        cluster_size: K.
        anchor_id, positive_id: (n,) int; rows that share either must not share a cluster, nor must rows of which one's
            anchor has the other's positive in a third row.
        sweeps: Passes over all rows; 0 only makes the sizes equal.
        progress: Called with the fraction of the sweeps done.

    Returns:
        (n,) int32; -1 for the n modulo K rows that found no place: those whose absence costs the objective least.

    Cost: an annealing sweep is n * 2 * (edges a row) additions, the first and last K times that at most; on one core.
        Memory: one copy of `signed`.
    """
    num_rows = len(start)
    check_at_least("cluster_size", cluster_size, 1)
    check_at_least("sweeps", sweeps, 0)
    num_clusters = num_rows // cluster_size
    _check_start(start, signed, num_clusters)
    ids = compact_ids(num_rows, anchor_id=anchor_id, positive_id=positive_id)
    # Rows in the order of METIS's clusters, which is a walk through the graph: neighbours lie side by side in memory.
    order = np.argsort(start, kind="stable")
    graph = _search_graph(sparse.csr_matrix(signed[order][:, order]), *(side[order] for side in ids))
    clusters = Clusters(
        cluster=start[order].astype(np.int32),
        members=np.full((num_clusters + 1, cluster_size), -1, np.int32),
        tie=np.empty(num_rows, np.float32),
    )
    repair(graph, clusters)
    generator = np.random.default_rng(seed)
    wanted = graph.data[graph.data > 0]
    scale = float(wanted.mean()) if len(wanted) else 1.0
    for sweep in range(sweeps):
        if sweep in (0, sweeps - 1):  # annealing keeps much of a good beginning, and ends near, not in, an optimum
            best_exchanges(graph, clusters, generator.permutation(num_rows).astype(np.int32))
            measure_ties(graph, clusters)
        else:
            temperature = scale * HOT * (COLD / HOT) ** ((sweep - 1) / max(1, sweeps - 3))
            anneal(graph, clusters, temperature, int(generator.integers(2**31)))
        if progress is not None:
            progress((sweep + 1) / sweeps)
    if progress is not None:
        progress(1.0)
    result = np.empty(num_rows, np.int32)
    result[order] = np.where(clusters.cluster == num_clusters, -1, clusters.cluster)
    return result


def _search_graph(signed: sparse.csr_matrix, anchor_id: np.ndarray, positive_id: np.ndarray) -> SearchGraph:
    duplicates = np.zeros(len(anchor_id), np.bool_)
    for ids in (anchor_id, positive_id):
        duplicates |= np.bincount(ids)[ids] > 1
    width = int(positive_id.max(initial=0)) + 1
    return SearchGraph(
        indptr=signed.indptr.astype(np.int64),
        indices=signed.indices.astype(np.int32, copy=False),
        data=signed.data.astype(np.float32, copy=False),
        duplicates=duplicates,
        anchor_id=anchor_id,
        positive_id=positive_id,
        known=np.append(known_positives(anchor_id, positive_id, width), width),
    )


def _check_start(start: np.ndarray, signed: sparse.csr_matrix, num_clusters: int) -> None:
    """Refuse what the compiled loops, which check no index, would follow out of their arrays."""
    if not len(start):
        return
    if not np.issubdtype(start.dtype, np.integer) or start.min() < 0 or start.max() >= num_clusters:
        raise AnybatchError(
            f"start is {start.dtype} from {start.min()} to {start.max()}; expected whole numbers from 0 to "
            f"{num_clusters - 1}, a cluster for each row."
        )
    if signed.shape != (len(start), len(start)) or not np.isfinite(signed.data).all():
        raise AnybatchError(
            f"The graph has shape {signed.shape} and {np.count_nonzero(~np.isfinite(signed.data))} weights that are no "
            f"finite numbers; expected ({len(start)}, {len(start)}) and none."
        )
