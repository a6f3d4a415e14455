"""Clusters of exactly equal size: a graph partitioner begins, a swap search on the signed objective finishes.

Published B3 stops at METIS k-way, whose 3% of balance slack cripples it at 32 rows a cluster; recursive bisection is the start
here. Leaving conflicts out of the graph does not keep such rows apart, so they are in the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from scipy import sparse

HARD = 1e6  # a pair that must not share a batch outweighs any sum of wanted edges


def metis_clusters(weight: sparse.csr_matrix, num_clusters: int, *, recursive: bool, seed: int = 0) -> np.ndarray:
    """METIS on a graph with positive weights.

    Args:
        weight: (n, n) symmetric CSR, weights >= 0.
        num_clusters: C.
        recursive: Recursive bisection (ours), or k-way with default options (the published call).
        seed: METIS's.

    Returns:
        (n,) int32; sizes are roughly, not exactly, equal.
    """
    import pymetis

    num_rows = len(weight.indptr) - 1
    if num_clusters == 1:
        return np.zeros(num_rows, np.int32)
    if weight.nnz == 0:
        return (np.arange(num_rows) % num_clusters).astype(np.int32)
    pointers: Any = weight.indptr.astype(np.int32)
    indices: Any = weight.indices.astype(np.int32)
    whole: Any = _whole_weights(weight)
    options = pymetis.Options(seed=seed)
    _, parts = pymetis.part_graph(
        num_clusters, xadj=pointers, adjncy=indices, eweights=whole, recursive=recursive, options=options
    )
    return np.asarray(parts, dtype=np.int32)


def _whole_weights(weight: sparse.csr_matrix) -> np.ndarray:
    """Partitioners take whole numbers: sixteenths of the mean weight resolve hub weighting well enough."""
    data = np.asarray(weight.data, dtype=np.float64)
    return np.maximum(1, np.rint(data * (16 / data.mean()))).astype(np.int32) if len(data) else data.astype(np.int32)


def equal_clusters(
    start: np.ndarray,
    signed: sparse.csr_matrix,
    cluster_size: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    sweeps: int = 10,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Make every cluster exactly `cluster_size` rows and raise the signed objective by swapping rows.

        objective = sum of signed weights inside clusters - HARD * (pairs inside a cluster with the same anchor or positive)

    Args:
        start: (n,) int clusters 0 .. n // cluster_size - 1 of any sizes.
        signed: (n, n) symmetric CSR: wanted weights minus conflicts.
        cluster_size: K.
        anchor_id, positive_id: (n,) int; rows that share either must not share a cluster.
        sweeps: Passes over all rows, at most; it stops when a pass gains less than a thousandth.
        seed: Of the order of the rows.
        progress: Called with the fraction of the sweeps done.

    Returns:
        (n,) int32; -1 for the n modulo K rows that found no place: those whose absence costs the objective least.

    Cost: a sweep is n * K * (edges a row) additions, on one core.
    """
    num_rows = len(start)
    num_clusters = num_rows // cluster_size
    indptr, indices, data = (
        signed.indptr.astype(np.int64),
        signed.indices.astype(np.int32),
        signed.data.astype(np.float32),
    )
    twins = np.zeros(num_rows, np.bool_)
    for ids in (anchor_id, positive_id):
        _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        twins |= counts[inverse] > 1
    anchor_id, positive_id = np.asarray(anchor_id, np.int64), np.asarray(positive_id, np.int64)
    cluster = start.astype(np.int32).copy()
    members = np.full((num_clusters + 1, max(cluster_size, 1)), -1, np.int32)
    _repair(cluster, members, num_clusters, cluster_size, indptr, indices, data, twins, anchor_id, positive_id)
    generator = np.random.default_rng(seed)
    for sweep in range(sweeps):
        order = generator.permutation(num_rows).astype(np.int32)
        gain, total = _sweep(
            order, cluster, members, num_clusters, indptr, indices, data, twins, anchor_id, positive_id
        )
        if progress is not None:
            progress((sweep + 1) / sweeps)
        if gain <= 1e-3 * max(abs(total), 1.0):
            break
    if progress is not None:
        progress(1.0)
    cluster[cluster == num_clusters] = -1
    return cluster


@numba.njit(cache=True)
def _same_content(row, other, anchor_id, positive_id):  # pragma: no cover - compiled
    return anchor_id[row] == anchor_id[other] or positive_id[row] == positive_id[other]


@numba.njit(cache=True)
def _clashes(row, without, group, twins, anchor_id, positive_id):  # pragma: no cover - compiled
    """Members of `group` (but `without` and the row itself) whose content the row shares."""
    if not twins[row]:
        return 0
    count = 0
    for other in group:
        if other >= 0 and other != row and other != without and _same_content(row, other, anchor_id, positive_id):
            count += 1
    return count


@numba.njit(cache=True)
def _links(row, one, two, cluster, indptr, indices, data):  # pragma: no cover - compiled
    """Sum of the row's signed weights into two clusters."""
    to_one, to_two = 0.0, 0.0
    for edge in range(indptr[row], indptr[row + 1]):
        where = cluster[indices[edge]]
        if where == one:
            to_one += data[edge]
        elif where == two:
            to_two += data[edge]
    return to_one, to_two


@numba.njit(cache=True)
def _repair(
    cluster, members, num_clusters, size, indptr, indices, data, twins, anchor_id, positive_id
):  # pragma: no cover - compiled
    """Evict the worst rows of clusters that are too large, place all evicted where they fit best; the rest go to the pool C."""
    num_rows = len(cluster)
    counts = np.zeros(num_clusters + 1, np.int64)
    value = np.empty(num_rows, np.float64)
    for row in range(num_rows):
        own, _ = _links(row, cluster[row], -1, cluster, indptr, indices, data)
        value[row] = own
        counts[cluster[row]] += 1
    order = np.argsort(-value, kind="mergesort")
    filled = np.zeros(num_clusters + 1, np.int64)
    evicted = np.empty(num_rows, np.int64)
    num_evicted = 0
    for row in order:  # the best rows of each cluster stay, and of rows with the same content only the first
        home = cluster[row]
        if filled[home] < size and _clashes(row, -1, members[home, : filled[home]], twins, anchor_id, positive_id) == 0:
            members[home, filled[home]] = row
            filled[home] += 1
        else:
            evicted[num_evicted] = row
            num_evicted += 1
    for position in range(num_evicted):
        cluster[evicted[position]] = num_clusters
    link = np.zeros(num_clusters, np.float64)
    free = 0
    waiting = np.empty(num_evicted, np.int64)
    num_waiting = 0
    for position in range(num_evicted):
        row = evicted[position]
        best, best_value = -1, 0.0
        for edge in range(indptr[row], indptr[row + 1]):
            where = cluster[indices[edge]]
            if where < num_clusters:
                link[where] += data[edge]
        for edge in range(indptr[row], indptr[row + 1]):
            where = cluster[indices[edge]]
            # Cheap tests first; a link of 0 was looked at already or attracts nothing.
            fits = where < num_clusters and link[where] > best_value and filled[where] < size
            if fits and _clashes(row, -1, members[where, : filled[where]], twins, anchor_id, positive_id) == 0:
                best, best_value = where, link[where]
        for edge in range(indptr[row], indptr[row + 1]):
            where = cluster[indices[edge]]
            if where < num_clusters:
                link[where] = 0.0
        if best >= 0:
            members[best, filled[best]] = row
            filled[best] += 1
            cluster[row] = best
        else:
            waiting[num_waiting] = row
            num_waiting += 1
    for attempt in range(2):  # first without clashes, then wherever there is room; the sweeps sort it out
        left = 0
        for position in range(num_waiting):
            row = waiting[position]
            while free < num_clusters and filled[free] == size:
                free += 1
            place = -1
            if attempt == 1 or not twins[row]:
                place = free if free < num_clusters else -1
            else:
                for offset in range(min(num_clusters - free, 64)):  # a bounded search: half of all rows may be twins
                    where = free + offset
                    if (
                        filled[where] < size
                        and _clashes(row, -1, members[where, : filled[where]], twins, anchor_id, positive_id) == 0
                    ):
                        place = where
                        break
            if place >= 0:
                members[place, filled[place]] = row
                filled[place] += 1
                cluster[row] = place
            else:
                waiting[left] = row
                left += 1
        num_waiting = left
    for position in range(num_waiting):
        members[num_clusters, position] = waiting[position]


@numba.njit(cache=True)
def _sweep(
    order, cluster, members, num_clusters, indptr, indices, data, twins, anchor_id, positive_id
):  # pragma: no cover - compiled
    """One pass: each row is offered the two clusters that attract it most, and takes the best exchange with a member of them."""
    link = np.zeros(num_clusters + 1, np.float64)
    gained, total = 0.0, 0.0
    for row in order:
        home = cluster[row]
        first, second = -1, -1
        for edge in range(indptr[row], indptr[row + 1]):
            link[cluster[indices[edge]]] += data[edge]
        at_home = link[home] if home < num_clusters else 0.0
        total += at_home
        for edge in range(indptr[row], indptr[row + 1]):
            where = cluster[indices[edge]]
            if where == home or where == num_clusters or where == first or where == second:  # noqa: SIM109 - compiled
                continue
            if first < 0 or link[where] > link[first]:
                first, second = where, first
            elif second < 0 or link[where] > link[second]:
                second = where
        leaving_clashes = _clashes(row, -1, members[home], twins, anchor_id, positive_id) if home < num_clusters else 0
        if first < 0 and leaving_clashes > 0:
            first = (home + 1) % num_clusters  # nothing attracts it, but it must not stay
        best_gain, best_cluster, best_place = 1e-6, -1, -1
        for target in (first, second):
            if target < 0 or target == home:
                continue
            if link[target] - at_home + HARD * leaving_clashes <= 0 and leaving_clashes == 0:
                # Even then an exchange may pay if the other gains much; rare, and left to the other row's own turn.
                continue
            for place in range(members.shape[1]):
                other = members[target, place]
                to_home, to_target = _links(other, home, target, cluster, indptr, indices, data)
                if home == num_clusters:
                    to_home = 0.0
                between = 0.0
                for edge in range(indptr[row], indptr[row + 1]):
                    if indices[edge] == other:
                        between = data[edge]
                        break
                gain = (
                    link[target] - at_home - between - (between if home < num_clusters else 0.0) + to_home - to_target
                )
                if gain + HARD * leaving_clashes <= best_gain and not twins[other]:
                    continue
                clashes = _clashes(row, other, members[target], twins, anchor_id, positive_id) - leaving_clashes
                clashes -= _clashes(other, -1, members[target], twins, anchor_id, positive_id)
                if home < num_clusters:
                    clashes += _clashes(other, row, members[home], twins, anchor_id, positive_id)
                gain -= HARD * clashes
                if gain > best_gain:
                    best_gain, best_cluster, best_place = gain, target, place
        for edge in range(indptr[row], indptr[row + 1]):
            link[cluster[indices[edge]]] = 0.0
        link[home] = 0.0
        if best_cluster >= 0:
            other = members[best_cluster, best_place]
            members[best_cluster, best_place] = row
            for place in range(members.shape[1]):
                if members[home, place] == row:
                    members[home, place] = other
                    break
            cluster[row], cluster[other] = best_cluster, home
            gained += best_gain
    return gained, total
