"""Partitioners, and several partitions in turn, on the neighbours of one data set.

Usage: python -m benchmarks.mining_partitions --anchor-embeddings A.npy --positive-embeddings P.npy [--partitioners metis kaminpar]

The embeddings are a teacher's, (n, D) float each; `anybatch mine` leaves them in its output folder. Writes docs/benchmarks/mining_partitions.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from anybatch.insight import markdown_table
from anybatch.mining import (
    MiningConfig,
    MiningGraph,
    audit_clusters,
    audit_cycle,
    build_graph,
    equal_clusters,
    exact_neighbors,
)
from anybatch.mining.mine import SPENT
from anybatch.mining.partition import start_clusters

SKIP, TAKE, SIZE = 30, 100, 32
WEIGHT = MiningConfig().conflict_weight
SHARES = (1.0, 0.5, 0.25, 0.0)


def main() -> None:
    """Both tables on the same graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor-embeddings", required=True)
    parser.add_argument("--positive-embeddings", required=True)
    parser.add_argument("--partitioners", nargs="+", default=["metis", "kaminpar"])
    parser.add_argument("--partitions", type=int, default=3, help="of the second table")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--neighbors", type=Path, help="keep the neighbours here, to go on after a kill")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/mining_partitions.md"))
    options = parser.parse_args()
    anchors, positives = (
        np.load(path, mmap_mode="r") for path in (options.anchor_embeddings, options.positive_embeddings)
    )
    same: dict[str, Any] = {"anchor_id": np.arange(len(anchors)), "positive_id": np.arange(len(anchors))}
    neighbors = exact_neighbors(anchors, positives, SKIP + TAKE, folder=options.neighbors, **same)
    graph = build_graph(neighbors, skip=SKIP, take=TAKE)
    first = [partitioner_row(graph, name, same) for name in options.partitioners]
    cluster = further(graph, 0, same)
    found = [alternated(graph, cluster, share, options.partitions, same) for share in options.shares]
    header_one = ["start", "wanted weight cut", "sizes", "seconds", "objective a row", "window", "conflicts", "seconds"]
    header_two = ["weight kept by pairs that met", "window of each partition", "conflicts of each"]
    header_two += [f"different window after {count}" for count in range(1, options.partitions + 1)]
    header_two += ["different conflicts"]
    options.out.write_text(
        f"# Partitioners, and several partitions in turn: {len(anchors):,} pairs\n\n`python -m benchmarks.mining_partitions` on the training pairs of "
        "arxiv-title-abstract, all-MiniLM-L6-v2, 64 tokens. Machine: 2-core x86 CPU, shared; seconds are processor time of one thread "
        f"({torch.get_num_threads()} for torch).\n\nClusters of {SIZE}, skip {SKIP}, take {TAKE}, conflict weight {WEIGHT:g}, {MiningConfig().sweeps} sweeps. "
        "Window and conflicts: wanted negatives and probable false negatives an anchor.\n\n## Partitioners\n\n"
        "First the start alone, then the exchange search from it.\n\n"
        + markdown_table(header_one, first)
        + f"\n## {options.partitions} partitions\n\nEpochs take the partitions in turn. In the search for each further one, pairs that shared a cluster already keep a share of their "
        f"wanted weight (1: nothing but other seeds; the library's is {SPENT:g}). Different: wanted negatives that shared the anchor's cluster at least once.\n\n"
        + markdown_table(header_two, found),
        encoding="utf-8",
    )


def partitioner_row(graph: MiningGraph, name: str, same: dict[str, Any]) -> list[str]:
    """The start, and where the search gets from it."""
    wanted, num_rows = graph.attraction(WEIGHT), len(same["anchor_id"])
    begun = time.process_time()
    start = start_clusters(wanted, num_rows // SIZE, partitioner=name)
    partitioned = time.process_time() - begun
    signed = graph.signed(WEIGHT)
    begun = time.process_time()
    cluster = equal_clusters(start, signed, SIZE, **same)
    searched = time.process_time() - begun
    audit, sizes = audit_clusters(graph, cluster, **same), np.bincount(start, minlength=num_rows // SIZE)
    row = [
        name,
        f"{1 - inside(wanted, start) / wanted.sum():.4f}",
        f"{sizes.min()}-{sizes.max()}",
        f"{partitioned:.1f}",
        f"{inside(signed, cluster) / 2 / num_rows:.3f}",
        f"{audit.window_per_anchor:.3f}",
        f"{audit.conflicts_per_anchor:.4f}",
        f"{searched:.1f}",
    ]
    print(row, flush=True)
    return row


def inside(matrix: sparse.csr_matrix, cluster: np.ndarray) -> float:
    """Sum of the entries inside clusters."""
    rows = np.repeat(np.arange(len(cluster)), np.diff(matrix.indptr))
    together = (cluster[rows] == cluster[matrix.indices]) & (cluster[rows] >= 0)
    return float(matrix.data[together].sum(dtype=np.float64))


def further(graph: MiningGraph, number: int, same: dict[str, Any]) -> np.ndarray:
    """A partition as `mine_plan` makes it."""
    num_clusters = len(same["anchor_id"]) // SIZE
    start = start_clusters(graph.attraction(WEIGHT), num_clusters, partitioner="metis", seed=number)
    return equal_clusters(start, graph.signed(WEIGHT), SIZE, seed=number, **same)


def alternated(graph: MiningGraph, first: np.ndarray, share: float, partitions: int, same: dict[str, Any]) -> list[str]:
    """Several partitions, the further ones with this share."""
    clusters, left = [first], graph
    for number in range(1, partitions):
        left = left.spent(clusters[-1], share)
        clusters.append(further(left, number, same))
    cycles = [audit_cycle(graph, np.stack(clusters[: count + 1]), **same) for count in range(partitions)]
    row = [
        f"{share:g}",
        ", ".join(f"{audit.window_per_anchor:.2f}" for audit in cycles[-1].partitions),
        ", ".join(f"{audit.conflicts_per_anchor:.3f}" for audit in cycles[-1].partitions),
        *(f"{cycle.distinct_window_per_anchor:.2f}" for cycle in cycles),
        f"{cycles[-1].distinct_conflicts_per_anchor:.3f}",
    ]
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
