"""Clusters of exactly equal size: a graph partitioner begins, a swap search on the signed objective finishes.

Published B3 stops at METIS k-way, whose 3% of balance slack cripples it at 32 rows a cluster; recursive bisection is the start
here. Leaving conflicts out of the graph does not keep such rows apart, so they are in the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.core.ids import known_positives
from anybatch.mining.compiled import compiled
from anybatch.mining.neighbors import check_at_least, compact_ids

HARD = 1e6  # a pair that must not share a batch outweighs any sum of wanted edges
# Temperatures of the search in mean wanted edges: an exchange that loses that much is taken with chance 1/e.
HOT, COLD = 1.2, 0.35
TRIALS = 8  # members looked at before an exchange


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
    """Partitioners take whole numbers: sixteenths of the mean weight resolve them well enough.

    Raises:
        AnybatchError: Weights that are negative or no numbers, or none above 0.
    """
    if not len(weight.data):
        return np.zeros(0, np.int32)
    mean = weight.data.mean(dtype=np.float64)
    if not (weight.data.min() >= 0 and 0 < mean < np.inf):  # nan is neither
        raise AnybatchError(
            f"The weights of the graph run from {weight.data.min()} to {weight.data.max()}; expected numbers of 0 or more, some of them above."
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
    sweeps: int = 20,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Make every cluster exactly `cluster_size` rows and raise the signed objective by exchanging rows.

        objective = sum of signed weights inside clusters - HARD * (pairs inside a cluster with the same anchor or positive)

    The first and the last sweep take, for each row, the best exchange with the two clusters that attract it most. Those between
    anneal: a row is drawn to a cluster by its ties there, changes places with a member that holds little to it, and losses are
    taken with a chance that falls from sweep to sweep. A single pair of rows is moved at a time; moving groups of 2, 4 or 8 gained
    nothing over that (docs/mining.md).

    Args:
        start: (n,) int clusters 0 .. n // cluster_size - 1 of any sizes.
        signed: (n, n) symmetric CSR: wanted weights minus conflicts.
        cluster_size: K.
        anchor_id, positive_id: (n,) int; rows that share either must not share a cluster, nor must rows of which one's anchor has the
            other's positive in a third row.
        sweeps: Passes over all rows; 0 only makes the sizes equal.
        seed: Of everything random.
        progress: Called with the fraction of the sweeps done.

    Returns:
        (n,) int32; -1 for the n modulo K rows that found no place: those whose absence costs the objective least.

    Cost: an annealing sweep is n * 2 * (edges a row) additions, the first and last K times that at most; on one core. Memory: one
        copy of `signed`.
    """
    num_rows = len(start)
    check_at_least("cluster_size", cluster_size, 1)
    check_at_least("sweeps", sweeps, 0)
    num_clusters = num_rows // cluster_size
    _check_start(start, signed, num_clusters)
    anchor_id, positive_id = (
        compact_ids(name, ids, num_rows) for name, ids in (("anchor_id", anchor_id), ("positive_id", positive_id))
    )
    # Rows in the order of the partitioner's clusters, which is a walk through the graph: neighbours lie side by side in memory.
    order = np.argsort(start, kind="stable")
    signed = sparse.csr_matrix(signed[order][:, order])
    indptr, indices, data = (
        signed.indptr.astype(np.int64),
        signed.indices.astype(np.int32, copy=False),
        signed.data.astype(np.float32, copy=False),
    )
    anchor_id, positive_id = anchor_id[order], positive_id[order]
    twins = np.zeros(num_rows, np.bool_)
    for ids in (anchor_id, positive_id):
        _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        twins |= counts[inverse] > 1
    width = int(positive_id.max(initial=0)) + 1
    known = np.append(known_positives(anchor_id, positive_id, width), width)
    cluster = start[order].astype(np.int32)
    members = np.full((num_clusters + 1, max(cluster_size, 1)), -1, np.int32)
    _repair(cluster, members, num_clusters, cluster_size, indptr, indices, data, twins, anchor_id, positive_id, known)
    generator = np.random.default_rng(seed)
    scale = float(data[data > 0].mean()) if (data > 0).any() else 1.0
    graph = (indptr, indices, data, twins, anchor_id, positive_id, known)
    tie = np.empty(num_rows, np.float32)
    for sweep in range(sweeps):
        if sweep in (0, sweeps - 1):  # annealing keeps much of a good beginning, and ends near, not in, an optimum
            _best_exchanges(generator.permutation(num_rows).astype(np.int32), cluster, members, num_clusters, *graph)
            _measure_ties(tie, cluster, num_clusters, indptr, indices, data)
        else:
            temperature = scale * HOT * (COLD / HOT) ** ((sweep - 1) / max(1, sweeps - 3))
            _anneal(cluster, members, tie, num_clusters, *graph, temperature, int(generator.integers(2**31)))
        if progress is not None:
            progress((sweep + 1) / sweeps)
    if progress is not None:
        progress(1.0)
    cluster[cluster == num_clusters] = -1
    result = np.empty(num_rows, np.int32)
    result[order] = cluster
    return result


def _check_start(start: np.ndarray, signed: sparse.csr_matrix, num_clusters: int) -> None:
    """Refuse what the compiled loops, which check no index, would follow out of their arrays."""
    if not len(start):
        return
    if not np.issubdtype(start.dtype, np.integer) or start.min() < 0 or start.max() >= num_clusters:
        raise AnybatchError(
            f"start is {start.dtype} from {start.min()} to {start.max()}; expected whole numbers from 0 to {num_clusters - 1}, a cluster for each row."
        )
    if signed.shape != (len(start), len(start)) or not np.isfinite(signed.data).all():
        raise AnybatchError(
            f"The graph has shape {signed.shape} and {np.count_nonzero(~np.isfinite(signed.data))} weights that are no finite numbers; expected "
            f"({len(start)}, {len(start)}) and none."
        )


@compiled
def _listed(keys, key):  # pragma: no cover - compiled
    """Whether an ascending array holds a number."""
    place = np.searchsorted(keys, key)
    return place < len(keys) and keys[place] == key


@compiled
def _same_content(row, other, anchor_id, positive_id, known):  # pragma: no cover - compiled
    if anchor_id[row] == anchor_id[other] or positive_id[row] == positive_id[other]:
        return True
    if len(known) < 2:  # its last number is the width of the keys
        return False
    keys, width = known[:-1], known[-1]
    return _listed(keys, anchor_id[row] * width + positive_id[other]) or _listed(
        keys, anchor_id[other] * width + positive_id[row]
    )


@compiled
def _clashes(row, without, group, twins, anchor_id, positive_id, known):  # pragma: no cover - compiled
    """Members of `group` (but `without` and the row itself) whose content the row shares."""
    if not twins[row]:
        return 0
    count = 0
    for other in group:
        if (
            other >= 0
            and other != row
            and other != without
            and _same_content(row, other, anchor_id, positive_id, known)
        ):
            count += 1
    return count


@compiled
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


@compiled
def _repair(
    cluster, members, num_clusters, size, indptr, indices, data, twins, anchor_id, positive_id, known
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
        if (
            filled[home] < size
            and _clashes(row, -1, members[home, : filled[home]], twins, anchor_id, positive_id, known) == 0
        ):
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
            if fits and _clashes(row, -1, members[where, : filled[where]], twins, anchor_id, positive_id, known) == 0:
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
                        and _clashes(row, -1, members[where, : filled[where]], twins, anchor_id, positive_id, known)
                        == 0
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


@compiled
def _measure_ties(tie, cluster, num_clusters, indptr, indices, data):  # pragma: no cover - compiled
    """Each row's signed weight into its own cluster; 0 for rows without one."""
    for row in range(len(cluster)):
        tie[row] = 0.0
        if cluster[row] < num_clusters:
            for edge in range(indptr[row], indptr[row + 1]):
                if cluster[indices[edge]] == cluster[row]:
                    tie[row] += data[edge]


@compiled
def _move(row, home, target, num_clusters, cluster, tie, indptr, indices, data):  # pragma: no cover - compiled
    """Take the row from one cluster to another, its neighbours' ties with it."""
    own = 0.0
    for edge in range(indptr[row], indptr[row + 1]):
        other = indices[edge]
        where = cluster[other]
        if where == home and home < num_clusters:
            tie[other] -= data[edge]
        elif where == target and target < num_clusters:
            tie[other] += data[edge]
            own += data[edge]
    cluster[row], tie[row] = target, own


@compiled
def _best_exchanges(
    order, cluster, members, num_clusters, indptr, indices, data, twins, anchor_id, positive_id, known
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
        leaving_clashes = (
            _clashes(row, -1, members[home], twins, anchor_id, positive_id, known) if home < num_clusters else 0
        )
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
                clashes = _clashes(row, other, members[target], twins, anchor_id, positive_id, known) - leaving_clashes
                clashes -= _clashes(other, -1, members[target], twins, anchor_id, positive_id, known)
                if home < num_clusters:
                    clashes += _clashes(other, row, members[home], twins, anchor_id, positive_id, known)
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


@compiled
def _anneal(
    cluster, members, tie, num_clusters, indptr, indices, data, twins, anchor_id, positive_id, known, temperature, seed
):  # pragma: no cover - compiled
    """One pass: each row is drawn to a cluster by its ties there, and changes places with one of the members that hold least to it.

    An exchange that gains g happens with chance exp(g / temperature), at most 1.
    """
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator, not NumPy's
    size = members.shape[1]
    link = np.zeros(num_clusters + 1, np.float32)
    seen = np.empty(num_clusters + 1, np.int32)
    seen_in = np.full(num_clusters + 1, -1, np.int64)  # a link of 0 would not say it: wanted edges and conflicts cancel
    for step in range(len(cluster)):
        row = np.random.randint(len(cluster))  # noqa: NPY002
        home = cluster[row]
        num_seen = 0
        for edge in range(indptr[row], indptr[row + 1]):
            where = cluster[indices[edge]]
            if where != home and where < num_clusters:
                if seen_in[where] != step:
                    seen_in[where] = step
                    seen[num_seen] = where
                    num_seen += 1
                link[where] += data[edge]
        leaving = _clashes(row, -1, members[home], twins, anchor_id, positive_id, known) if home < num_clusters else 0
        target, best, to_target = -1, -np.inf, 0.0
        for position in range(num_seen):
            where = seen[position]
            if link[where] > 0.0:
                # The largest of the values plus Gumbel noise is a draw from their softmax.
                noise = -temperature * np.log(-np.log(np.random.random() + 1e-300))  # noqa: NPY002
                if link[where] + noise > best:
                    target, best, to_target = where, link[where] + noise, link[where]
        if target < 0 and leaving > 0:  # nothing attracts it, but it must not stay
            target = np.random.randint(num_clusters)  # noqa: NPY002
            to_target = link[target]
        for position in range(num_seen):
            link[seen[position]] = 0.0
        if target < 0 or target == home:
            continue
        place = -1
        for _ in range(TRIALS):
            trial = np.random.randint(size)  # noqa: NPY002
            if place < 0 or tie[members[target, trial]] < tie[members[target, place]]:
                place = trial
        other = members[target, place]
        to_home, between = 0.0, 0.0
        for edge in range(indptr[other], indptr[other + 1]):
            if indices[edge] == row:
                between = data[edge]
            if cluster[indices[edge]] == home and home < num_clusters:
                to_home += data[edge]
        gain = to_target - tie[row] + to_home - tie[other] - (2 * between if home < num_clusters else between)
        clashes = _clashes(row, other, members[target], twins, anchor_id, positive_id, known) - leaving
        clashes -= _clashes(other, -1, members[target], twins, anchor_id, positive_id, known)
        if home < num_clusters:
            clashes += _clashes(other, row, members[home], twins, anchor_id, positive_id, known)
        gain -= HARD * clashes
        if gain > temperature * np.log(np.random.random() + 1e-300) + 1e-6:  # noqa: NPY002
            for old in range(size):
                if members[home, old] == row:
                    members[home, old] = other
                    break
            members[target, place] = row
            _move(row, home, target, num_clusters, cluster, tie, indptr, indices, data)
            _move(other, target, home, num_clusters, cluster, tie, indptr, indices, data)
