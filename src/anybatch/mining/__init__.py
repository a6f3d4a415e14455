"""Choose the batch: teacher embeddings to neighbours, signed graph, equal clusters, plan. No training code."""

from anybatch.mining.config import MiningConfig, MiningReport, MiningSet, RankWindow
from anybatch.mining.graph import MiningGraph, Window, build_graph, suspect_pairs
from anybatch.mining.inverted import ivf_neighbors
from anybatch.mining.mine import MiningResult, check_sizes, mine_plan, mine_shared, random_plan
from anybatch.mining.negatives import sample_negatives
from anybatch.mining.neighbors import Neighbors, exact_neighbors
from anybatch.mining.partition import equal_clusters, metis_clusters

__all__ = [
    "MiningConfig",
    "MiningGraph",
    "MiningReport",
    "MiningResult",
    "MiningSet",
    "Neighbors",
    "RankWindow",
    "Window",
    "build_graph",
    "check_sizes",
    "equal_clusters",
    "exact_neighbors",
    "ivf_neighbors",
    "metis_clusters",
    "mine_plan",
    "mine_shared",
    "random_plan",
    "sample_negatives",
    "suspect_pairs",
]
