"""Grow the batch: record embeddings, take the loss, replay."""

from anybatch.caching.memory import StepMemory
from anybatch.caching.on_demand import RowsOnDemand
from anybatch.caching.ranks import average_gradients
from anybatch.caching.recording import record_towers
from anybatch.caching.replay import replay
from anybatch.caching.rows import RowSlicer, Shared
from anybatch.caching.schedule import plan_mini_batches
from anybatch.caching.step import cached_step

__all__ = [
    "RowSlicer",
    "RowsOnDemand",
    "Shared",
    "StepMemory",
    "average_gradients",
    "cached_step",
    "plan_mini_batches",
    "record_towers",
    "replay",
]
