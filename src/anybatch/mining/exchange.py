"""The compiled search of `equal_clusters`: rows change places while that raises the signed objective.

Rows without a cluster are in the pool, which is the cluster C behind the last one. `place` is a position in a cluster.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from anybatch.mining.compiled import compiled

HARD = 1e6  # a pair that must not share a batch outweighs any sum of wanted edges
TRIALS = 8  # members looked at before an exchange


class SearchGraph(NamedTuple):
    """The signed graph, a symmetric CSR matrix, and which rows must be kept apart."""

    indptr: np.ndarray  # (n + 1,) int64
    indices: np.ndarray  # (e,) int32
    data: np.ndarray  # (e,) float32, the signed weights
    duplicates: np.ndarray  # (n,) bool, rows that share an anchor or a positive with another
    anchor_id: np.ndarray  # (n,) int64, equal for identical texts
    positive_id: np.ndarray
    known: np.ndarray  # ascending keys anchor * width + positive of pairs that other rows know; at the end the width


class Clusters(NamedTuple):
    """Where each row is."""

    cluster: np.ndarray  # (n,) int32, 0 to C; C is the pool
    members: np.ndarray  # (C + 1, K) int32, the rows of each cluster and of the pool; -1 for nobody
    tie: np.ndarray  # (n,) float32, each row's signed weight into its own cluster, 0 in the pool; for `anneal`


@compiled
def _listed(keys, key):  # pragma: no cover - compiled
    """Whether an ascending array holds a number."""
    place = np.searchsorted(keys, key)
    return place < len(keys) and keys[place] == key


@compiled
def _same_content(graph, row, other):  # pragma: no cover - compiled
    anchor_id, positive_id = graph.anchor_id, graph.positive_id
    if anchor_id[row] == anchor_id[other] or positive_id[row] == positive_id[other]:
        return True
    if len(graph.known) < 2:
        return False
    keys, width = graph.known[:-1], graph.known[-1]
    return _listed(keys, anchor_id[row] * width + positive_id[other]) or _listed(
        keys, anchor_id[other] * width + positive_id[row]
    )


@compiled
def _clashes(graph, row, without, group):  # pragma: no cover - compiled
    """Members of `group` (but `without` and the row itself) whose content the row shares."""
    if not graph.duplicates[row]:
        return 0
    count = 0
    for other in group:
        if other >= 0 and other != row and other != without and _same_content(graph, row, other):
            count += 1
    return count


@compiled
def _more_clashes(graph, members, row, other, home, target, leaving):  # pragma: no cover - compiled
    """How many more clashes there are after `row` and `other` changed places; `leaving`: those of the row at home."""
    clashes = _clashes(graph, row, other, members[target]) - leaving
    clashes -= _clashes(graph, other, -1, members[target])
    if home < len(members) - 1:
        clashes += _clashes(graph, other, row, members[home])
    return clashes


@compiled
def _links(graph, cluster, row, one, two):  # pragma: no cover - compiled
    """Sum of the row's signed weights into two clusters."""
    to_one, to_two = 0.0, 0.0
    for edge in range(graph.indptr[row], graph.indptr[row + 1]):
        where = cluster[graph.indices[edge]]
        if where == one:
            to_one += graph.data[edge]
        elif where == two:
            to_two += graph.data[edge]
    return to_one, to_two


@compiled
def repair(graph, clusters):  # pragma: no cover - compiled
    """Make all clusters equal: the worst rows of those that are too large go where they fit best."""
    cluster, members = clusters.cluster, clusters.members
    filled = np.zeros(len(members), np.int64)
    evicted = _keep_best(graph, cluster, members, filled)
    waiting = _place_attracted(graph, cluster, members, filled, evicted)
    for anywhere in (False, True):  # first without clashes, then wherever a place is free; the sweeps sort it out
        waiting = _place_free(graph, cluster, members, filled, waiting, anywhere)
    members[-1, : len(waiting)] = waiting


@compiled
def _keep_best(graph, cluster, members, filled):  # pragma: no cover - compiled
    """The best rows of each cluster stay, and of rows with the same content only the first; returns the others."""
    num_rows, size = len(cluster), members.shape[1]
    value = np.empty(num_rows, np.float64)
    for row in range(num_rows):
        value[row], _ = _links(graph, cluster, row, cluster[row], -1)
    evicted = np.empty(num_rows, np.int32)
    num_evicted = 0
    for row in np.argsort(-value, kind="mergesort"):
        home = cluster[row]
        if filled[home] < size and _clashes(graph, row, -1, members[home, : filled[home]]) == 0:
            members[home, filled[home]] = row
            filled[home] += 1
        else:
            evicted[num_evicted] = row
            num_evicted += 1
    for row in evicted[:num_evicted]:
        cluster[row] = len(members) - 1
    return evicted[:num_evicted]


@compiled
def _place_attracted(graph, cluster, members, filled, rows):  # pragma: no cover - compiled
    """Each row goes to the cluster with a free place that attracts it most; returns those that none attracts."""
    pool, size = len(members) - 1, members.shape[1]
    link = np.zeros(pool, np.float64)
    num_waiting = 0
    waiting = np.empty(len(rows), np.int32)
    for row in rows:
        best, best_value = -1, 0.0
        for edge in range(graph.indptr[row], graph.indptr[row + 1]):
            where = cluster[graph.indices[edge]]
            if where < pool:
                link[where] += graph.data[edge]
        for edge in range(graph.indptr[row], graph.indptr[row + 1]):
            where = cluster[graph.indices[edge]]
            # Cheap tests first; a link of 0 was looked at already or attracts nothing.
            fits = where < pool and link[where] > best_value and filled[where] < size
            if fits and _clashes(graph, row, -1, members[where, : filled[where]]) == 0:
                best, best_value = where, link[where]
        for edge in range(graph.indptr[row], graph.indptr[row + 1]):
            where = cluster[graph.indices[edge]]
            if where < pool:
                link[where] = 0.0
        num_waiting = _place_or_wait(cluster, members, filled, row, best, waiting, num_waiting)
    return waiting[:num_waiting]


@compiled
def _place_free(graph, cluster, members, filled, rows, anywhere):  # pragma: no cover - compiled
    """Each row goes to a free place, without clashes unless `anywhere`; returns those that found none."""
    pool, size = len(members) - 1, members.shape[1]
    free, num_waiting = 0, 0
    waiting = np.empty(len(rows), np.int32)
    for row in rows:
        while free < pool and filled[free] == size:
            free += 1
        target = -1
        if anywhere or not graph.duplicates[row]:
            target = free if free < pool else -1
        else:
            for where in range(free, min(pool, free + 64)):  # a bounded search: half of all rows may be duplicates
                if filled[where] < size and _clashes(graph, row, -1, members[where, : filled[where]]) == 0:
                    target = where
                    break
        num_waiting = _place_or_wait(cluster, members, filled, row, target, waiting, num_waiting)
    return waiting[:num_waiting]


@compiled
def _place_or_wait(cluster, members, filled, row, target, waiting, num_waiting):  # pragma: no cover - compiled
    """The row goes to the cluster `target`, or waits where that is -1; returns how many wait."""
    if target < 0:
        waiting[num_waiting] = row
        return num_waiting + 1
    members[target, filled[target]] = row
    filled[target] += 1
    cluster[row] = target
    return num_waiting


@compiled
def _exchange(members, row, home, target, place):  # pragma: no cover - compiled
    """The row takes that place of the target, whose member takes its own."""
    for old in range(members.shape[1]):
        if members[home, old] == row:
            members[home, old] = members[target, place]
            break
    members[target, place] = row


@compiled
def best_exchanges(graph, clusters, order):  # pragma: no cover - compiled
    """One pass: each row takes the best exchange with the two clusters that attract it most; returns the gain."""
    cluster, members = clusters.cluster, clusters.members
    pool = len(members) - 1
    link = np.zeros(pool + 1, np.float64)
    gained = 0.0
    for row in order:
        home = cluster[row]
        for edge in range(graph.indptr[row], graph.indptr[row + 1]):
            link[cluster[graph.indices[edge]]] += graph.data[edge]
        targets = _two_strongest(graph, cluster, link, row, pool)
        leaving = _clashes(graph, row, -1, members[home]) if home < pool and graph.duplicates[row] else 0
        if targets[0] < 0 and leaving > 0:
            targets = ((home + 1) % pool, -1)  # nothing attracts it, but it must not stay
        gain, target, place = _best_place(graph, clusters, link, row, targets, leaving)
        for edge in range(graph.indptr[row], graph.indptr[row + 1]):
            link[cluster[graph.indices[edge]]] = 0.0
        link[home] = 0.0
        if target >= 0:
            cluster[row], cluster[members[target, place]] = target, home
            _exchange(members, row, home, target, place)
            gained += gain
    return gained


@compiled
def _two_strongest(graph, cluster, link, row, pool):  # pragma: no cover - compiled
    """The two clusters, other than its own and the pool, with the largest links to the row; -1 for none."""
    home, first, second = cluster[row], -1, -1
    for edge in range(graph.indptr[row], graph.indptr[row + 1]):
        where = cluster[graph.indices[edge]]
        if where == home or where == pool or where == first or where == second:  # noqa: SIM109 - compiled
            continue
        if first < 0 or link[where] > link[first]:
            first, second = where, first
        elif second < 0 or link[where] > link[second]:
            second = where
    return first, second


@compiled
def _best_place(graph, clusters, link, row, targets, leaving):  # pragma: no cover - compiled
    """(gain, target, place) of the best exchange; -1 where none gains. `link`: the row's to all clusters."""
    cluster, members = clusters.cluster, clusters.members
    home, pool = cluster[row], len(members) - 1
    at_home = link[home] if home < pool else 0.0
    best_gain, best_target, best_place = 1e-6, -1, -1
    for target in targets:
        if target < 0 or target == home:
            continue
        if link[target] - at_home + HARD * leaving <= 0 and leaving == 0:
            # Even then an exchange may pay if the other gains much; rare, and left to the other row's own turn.
            continue
        for place in range(members.shape[1]):
            other = members[target, place]
            to_home, to_target = _links(graph, cluster, other, home, target)
            if home == pool:
                to_home = 0.0
            between = 0.0
            for edge in range(graph.indptr[row], graph.indptr[row + 1]):
                if graph.indices[edge] == other:
                    between = graph.data[edge]
                    break
            gain = link[target] - at_home - between - (between if home < pool else 0.0) + to_home - to_target
            if gain + HARD * leaving <= best_gain and not graph.duplicates[other]:
                continue
            if graph.duplicates[row] or graph.duplicates[other]:
                gain -= HARD * _more_clashes(graph, members, row, other, home, target, leaving)
            if gain > best_gain:
                best_gain, best_target, best_place = gain, target, place
    return best_gain, best_target, best_place


@compiled
def measure_ties(graph, clusters):  # pragma: no cover - compiled
    """Fill `tie`."""
    cluster, pool = clusters.cluster, len(clusters.members) - 1
    for row in range(len(cluster)):
        clusters.tie[row] = 0.0
        if cluster[row] < pool:
            for edge in range(graph.indptr[row], graph.indptr[row + 1]):
                if cluster[graph.indices[edge]] == cluster[row]:
                    clusters.tie[row] += graph.data[edge]


@compiled
def anneal(graph, clusters, temperature, seed):  # pragma: no cover - compiled
    """One pass: each row is drawn to a cluster by its ties, and changes places with a member that holds little to it.

    An exchange that gains g happens with chance exp(g / temperature), at most 1.
    """
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator, not NumPy's
    cluster, members, tie = clusters.cluster, clusters.members, clusters.tie
    pool = len(members) - 1
    link = np.zeros(pool + 1, np.float32)
    seen = np.empty(pool + 1, np.int32)
    seen_in = np.full(pool + 1, -1, np.int64)  # a link of 0 would not say it: wanted edges and conflicts cancel
    for step in range(len(cluster)):
        row = np.random.randint(len(cluster))  # noqa: NPY002
        home = cluster[row]
        leaving = _clashes(graph, row, -1, members[home]) if home < pool and graph.duplicates[row] else 0
        target, to_target = _drawn_target(graph, cluster, link, seen, seen_in, row, step, temperature, leaving)
        if target < 0 or target == home:
            continue
        place = -1
        for _ in range(TRIALS):  # the one that holds least to its cluster
            trial = np.random.randint(members.shape[1])  # noqa: NPY002
            if place < 0 or tie[members[target, trial]] < tie[members[target, place]]:
                place = trial
        other = members[target, place]
        to_home, between = 0.0, 0.0
        for edge in range(graph.indptr[other], graph.indptr[other + 1]):
            if graph.indices[edge] == row:
                between = graph.data[edge]
            if cluster[graph.indices[edge]] == home and home < pool:
                to_home += graph.data[edge]
        gain = to_target - tie[row] + to_home - tie[other] - (2 * between if home < pool else between)
        if graph.duplicates[row] or graph.duplicates[other]:
            gain -= HARD * _more_clashes(graph, members, row, other, home, target, leaving)
        if gain > temperature * np.log(np.random.random() + 1e-300) + 1e-6:  # noqa: NPY002
            _move(graph, clusters, row, home, target)
            _move(graph, clusters, other, target, home)
            _exchange(members, row, home, target, place)


@compiled
def _drawn_target(graph, cluster, link, seen, seen_in, row, step, temperature, leaving):  # pragma: no cover - compiled
    """(cluster, link to it), drawn from the softmax of link / temperature over those with a link above 0; -1: none.

    `link` is all 0 before and after; `seen` and `seen_in` are workspace.
    """
    home, pool, num_seen = cluster[row], len(link) - 1, 0
    for edge in range(graph.indptr[row], graph.indptr[row + 1]):
        where = cluster[graph.indices[edge]]
        if where != home and where < pool:
            if seen_in[where] != step:
                seen_in[where] = step
                seen[num_seen] = where
                num_seen += 1
            link[where] += graph.data[edge]
    target, best, to_target = -1, -np.inf, 0.0
    for position in range(num_seen):
        where = seen[position]
        if link[where] > 0.0:
            # The largest of the values plus Gumbel noise is a draw from their softmax.
            noise = -temperature * np.log(-np.log(np.random.random() + 1e-300))  # noqa: NPY002
            if link[where] + noise > best:
                target, best, to_target = where, link[where] + noise, link[where]
    if target < 0 and leaving > 0:  # nothing attracts it, but it must not stay
        target = np.random.randint(pool)  # noqa: NPY002
        to_target = link[target]
    for position in range(num_seen):
        link[seen[position]] = 0.0
    return target, to_target


@compiled
def _move(graph, clusters, row, home, target):  # pragma: no cover - compiled
    """Take the row from one cluster to another, its neighbours' ties with it."""
    cluster, tie, pool = clusters.cluster, clusters.tie, len(clusters.members) - 1
    own = 0.0
    for edge in range(graph.indptr[row], graph.indptr[row + 1]):
        other = graph.indices[edge]
        where = cluster[other]
        if where == home and home < pool:
            tie[other] -= graph.data[edge]
        elif where == target and target < pool:
            tie[other] += graph.data[edge]
            own += graph.data[edge]
    cluster[row], tie[row] = target, own
