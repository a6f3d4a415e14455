"""Neighbouring recipes over the same parts, to compare with: SaHa, k-means cells, bandwidth order, loss order."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from anybatch.mining.inverted import assign_cells, spherical_kmeans
from anybatch.mining.neighbors import Neighbors

SAHA_POOL = 6  # times the rows beside an anchor: the ranks whose anchors are compared; published


def kmeans_clusters(anchors: np.ndarray, positives: np.ndarray, num_clusters: int, *, seed: int = 0) -> np.ndarray:
    """Cells of k-means over the doubled vectors [anchor; positive]: near anchors or near positives sit together.

    (n,) int32 of any sizes.

    Cost: n * num_clusters * 2 D multiplications, and as many for each round of k-means; a float32 copy of both sides.
    Reference: TAS-Balanced, arXiv 2104.06967; the doubled vectors are CDE's, arXiv 2410.02525.
    """
    data = np.concatenate([anchors, positives], axis=1).astype(np.float32)
    return assign_cells(data, spherical_kmeans(data, num_clusters, seed, None), None).astype(np.int32)


def saha_clusters(
    anchors: np.ndarray, neighbors: Neighbors, text: np.ndarray, cluster_size: int, *, farthest: bool
) -> np.ndarray:
    """Row after row, one that is free joins free rows that have texts of its first ranks: of each text the row with the
    nearest anchor, and of `SAHA_POOL` times as many as there is room for the `farthest` anchors, as near ones may ask
    for the same (published but for labels, where the first ranks are taken).

    (n,) int32 of equal size but for the rows that found too few. Cost: n times the ranks, on one core.
    Reference: Ju and Lee 2026, "From Generator to Embedder", arXiv 2508.00955; the order of its released code.
    """
    order = np.argsort(text, kind="stable")  # the rows of a text, one after the other
    first, last = (np.searchsorted(text[order], np.arange(len(text)), side) for side in ("left", "right"))
    cluster, number, beside = np.full(len(text), -1, np.int32), 0, cluster_size - 1
    for row in range(len(text)):
        owners: list[int] = []
        for item in neighbors.ids[row] if cluster[row] < 0 else ():
            rows = order[first[item] : last[item]] if item >= 0 else order[:0]
            rows = rows[(cluster[rows] < 0) & (rows != row)]
            if len(rows):
                owners.append(int(rows[np.argmax(anchors[rows] @ anchors[row])]))
            if len(owners) == SAHA_POOL * beside:
                break
        if len(owners) >= beside:
            near = anchors[owners] @ anchors[row] if farthest else np.zeros(len(owners))
            cluster[[row, *np.array(owners)[np.argsort(near, kind="stable")[:beside]]]] = number
            number += 1
    left = np.flatnonzero(cluster < 0)  # released: with rows that were taken, which a plan has once
    cluster[left] = np.minimum(number + np.arange(len(left)) // cluster_size, len(text) // cluster_size - 1)
    return cluster


def bandwidth_clusters(weight: sparse.csr_matrix, num_clusters: int) -> np.ndarray:
    """Consecutive rows of the order that gathers the graph's edges round the diagonal (reverse Cuthill-McKee).

    Reference: GCBS, Sachidananda et al. 2023, "Global Selection of Contrastive Batches via Optimization on Sample
    Permutations".
    """
    order = sparse.csgraph.reverse_cuthill_mckee(weight, symmetric_mode=True)
    return _consecutive(order, num_clusters)


def loss_ordered_clusters(neighbors: Neighbors, num_clusters: int, *, temperature: float = 0.05) -> np.ndarray:
    """Rows of like loss under the teacher sit together, the hardest with the hardest.

    The loss of row i is logsumexp over its neighbours of (s_ij - s_ii) / temperature.

    Reference: ordered SGD over batches of contrastive losses, arXiv 2307.05906.
    """
    relative = (neighbors.scores - neighbors.own_score[:, None]) / temperature
    return _consecutive(np.argsort(-np.logaddexp.reduce(relative, axis=1), kind="stable"), num_clusters)


def _consecutive(order: np.ndarray, num_clusters: int) -> np.ndarray:
    """(n,) int32; all of equal size but for the last rows, which join the last cluster."""
    cluster = np.empty(len(order), np.int32)
    cluster[order] = np.minimum(np.arange(len(order)) // (len(order) // num_clusters), num_clusters - 1)
    return cluster
