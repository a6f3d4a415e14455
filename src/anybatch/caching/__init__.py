"""Grow the batch: record embeddings, take the loss, replay. Imports errors and distributed."""

from anybatch.caching.memory import GraphBudget
from anybatch.caching.recording import Recording
from anybatch.caching.reduction import average_gradients
from anybatch.caching.replay import record, replay
from anybatch.caching.rows import RowSlicer, Shared
from anybatch.caching.schedule import plan_micro_batches
from anybatch.caching.step import backward_to_leaves, cached_step
from anybatch.caching.step_memory import StepMemory
from anybatch.caching.towers import record_towers

__all__ = [
    "GraphBudget",
    "Recording",
    "RowSlicer",
    "Shared",
    "StepMemory",
    "average_gradients",
    "backward_to_leaves",
    "cached_step",
    "plan_micro_batches",
    "record",
    "record_towers",
    "replay",
]
