"""Grow the batch: record embeddings, take the loss, replay. Imports errors and distributed."""

from anybatch.caching.memory import GraphBudget
from anybatch.caching.replay import Recording, record, replay
from anybatch.caching.rows import RowSlicer
from anybatch.caching.schedule import plan_micro_batches
from anybatch.caching.step import average_gradients, backward_to_leaves, cached_step

__all__ = [
    "GraphBudget",
    "Recording",
    "RowSlicer",
    "average_gradients",
    "backward_to_leaves",
    "cached_step",
    "plan_micro_batches",
    "record",
    "replay",
]
