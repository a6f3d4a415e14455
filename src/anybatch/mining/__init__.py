"""Choose the batch: teacher embeddings to neighbours, to a signed graph, to equal clusters, to a plan. Imports errors, plan, blocks, files, distributed and resources; no training code."""

from anybatch.mining.audit import Audit, audit_clusters, suspect_pairs
from anybatch.mining.config import MiningConfig, MiningReport, MiningSet
from anybatch.mining.graph import MiningGraph, build_graph
from anybatch.mining.inverted import ivf_neighbors
from anybatch.mining.mine import (
    MiningResult,
    check_sizes,
    mine_plan,
    mine_shared,
    random_plan,
    rank_rows,
)
from anybatch.mining.negatives import sample_negatives
from anybatch.mining.neighbors import Neighbors, Stacked, exact_neighbors
from anybatch.mining.outlook import LIMITS, Outlook, OutlookLimits, mining_outlook
from anybatch.mining.partition import equal_clusters, metis_clusters

__all__ = [
    "LIMITS",
    "Audit",
    "MiningConfig",
    "MiningGraph",
    "MiningReport",
    "MiningResult",
    "MiningSet",
    "Neighbors",
    "Outlook",
    "OutlookLimits",
    "Stacked",
    "audit_clusters",
    "build_graph",
    "check_sizes",
    "equal_clusters",
    "exact_neighbors",
    "ivf_neighbors",
    "metis_clusters",
    "mine_plan",
    "mine_shared",
    "mining_outlook",
    "random_plan",
    "rank_rows",
    "sample_negatives",
    "suspect_pairs",
]
