"""Mining on arxiv-title-abstract: the published recipe beside ours, and the trade-off over the weight of conflicts.

Usage: python -m benchmarks.mining --anchor-embeddings A.npy --positive-embeddings P.npy

The embeddings are a teacher's, (n, D) float each; `anybatch mine` leaves them in its output folder. Writes
docs/benchmarks/mining.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from anybatch.core.resources import Measure
from anybatch.insight import markdown_table
from anybatch.mining import (
    MiningConfig,
    Window,
    build_graph,
    equal_clusters,
    exact_neighbors,
    metis_clusters,
    mine_plan,
)
from anybatch.mining.recipes import bandwidth_clusters, kmeans_clusters, loss_ordered_clusters
from benchmarks.clusters import Audit, audit_clusters

SKIP, TAKE, SIZE = 30, 100, 32
LAMBDAS = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0)
LONG = 200  # sweeps of the long search, ten times the default


def main() -> None:
    """Run everything on the same neighbours and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor-embeddings", required=True)
    parser.add_argument("--positive-embeddings", required=True)
    parser.add_argument(
        "--teacher", default="all-MiniLM-L6-v2, 64 tokens", help="what made the embeddings, for the page"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/mining.md"))
    options = parser.parse_args()
    anchors, positives = np.load(options.anchor_embeddings), np.load(options.positive_embeddings)
    num_rows = len(anchors)
    same = {"anchor_id": np.arange(num_rows), "positive_id": np.arange(num_rows)}
    with Measure() as measure:
        neighbors = exact_neighbors(anchors, positives, SKIP + TAKE, **same)
    ranking = (
        f"Exact neighbours (top {SKIP + TAKE}): {measure.seconds:.0f} s, peak {measure.peak_bytes / 2**30:.1f} GiB."
    )
    print(ranking)
    union = build_graph(neighbors, Window(SKIP, TAKE))
    mutual = build_graph(neighbors, Window(SKIP, TAKE), edges="mutual")
    rows: list[list[str]] = []

    def record(name: str, seconds: float, audit: Audit) -> None:
        ratio = audit.window_per_anchor / float(rows[0][1]) if rows else 1.0
        conflicts = audit.conflicts_per_anchor / float(rows[0][3]) if rows else 1.0
        sizes = f"{audit.smallest}-{audit.largest}" if audit.smallest != audit.largest else f"all {audit.smallest}"
        rows.append(
            [
                name,
                f"{audit.window_per_anchor:.3f}",
                f"{ratio:.2f}",
                f"{audit.conflicts_per_anchor:.4f}",
                f"{conflicts:.2f}",
                sizes,
                f"{seconds:.1f}",
            ]
        )
        print(rows[-1], flush=True)

    num_clusters = num_rows // SIZE
    with Measure() as measure:
        published = metis_clusters(mutual.weight, num_clusters, recursive=False)
    record("published: mutual edges, METIS k-way", measure.seconds, audit_clusters(union, published, **same))
    with Measure() as measure:
        start = metis_clusters(union.weight, num_clusters, recursive=True)
    record("union of edges, recursive bisection", measure.seconds, audit_clusters(union, start, **same))
    recipes = {
        "k-means cells of [anchor; positive]": lambda: kmeans_clusters(anchors, positives, num_clusters),
        "bandwidth order (GCBS)": lambda: bandwidth_clusters(union.weight, num_clusters),
        "loss order (OSGD under the teacher)": lambda: loss_ordered_clusters(neighbors, num_clusters),
    }
    for name, recipe in recipes.items():
        with Measure() as measure:
            cluster = equal_clusters(recipe(), union.signed(0.0), SIZE, sweeps=0, **same)
        record(f"{name}, made equal", measure.seconds, audit_clusters(union, cluster, **same))
    for weight in LAMBDAS:
        for sweeps in (20, LONG) if weight == 3.0 else (20,):
            with Measure() as measure:
                begin = metis_clusters(union.attraction(weight), num_clusters, recursive=True)
                cluster = equal_clusters(begin, union.signed(weight), SIZE, sweeps=sweeps, **same)
            name = f"ours: signed edges, exchange search, conflict weight {weight:g}" + (
                f", {sweeps} sweeps" if sweeps == LONG else ""
            )
            record(name, measure.seconds, audit_clusters(union, cluster, **same))
    random = np.random.default_rng(0).permutation(num_rows) // SIZE
    record("random", 0.0, audit_clusters(union, np.where(random < num_clusters, random, -1), **same))
    with Measure() as measure:
        settings = {"window": (SKIP, TAKE), "margin": None, "conflict_weight": 3.0}
        mine_plan(anchors, positives, config=MiningConfig(cluster_size=SIZE, **settings))
    peak = f"{measure.peak_bytes / 2**30:.1f} GiB"
    whole = f"The whole of `mine_plan` with its defaults otherwise: {measure.seconds:.0f} s, peak {peak}."
    header = ["clusters", "window negatives an anchor", "ratio", "conflicts an anchor", "ratio", "sizes", "seconds"]
    options.out.write_text(
        f"# Mining {num_rows:,} pairs\n\n`python -m benchmarks.mining --anchor-embeddings A.npy --positive-embeddings "
        f"P.npy` on the training pairs of arxiv-title-abstract. Teacher: {options.teacher}. Machine: 2-core x86 CPU, "
        f"shared, {torch.get_num_threads()} thread(s).\n\nClusters of {SIZE}, skip {SKIP}, take {TAKE}. Window "
        f"negatives: rows of ranks {SKIP + 1} to {SKIP + TAKE} in the anchor's own cluster. Conflicts: rows of the "
        f"first {SKIP} ranks there. Ratios are to the published recipe, measured in the same run on the same "
        "neighbours.\n\n" + markdown_table(header, rows) + f"\n{ranking} {whole}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
