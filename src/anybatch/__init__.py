"""anybatch: contrastive training at any batch size. The public names, imported on first use; nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anybatch import sample as sample
    from anybatch.caching import cached_step as cached_step
    from anybatch.data import PairData as PairData
    from anybatch.data import read_pairs as read_pairs
    from anybatch.errors import AnybatchError as AnybatchError
    from anybatch.evaluation.retrieval import retrieval_metrics as retrieval_metrics
    from anybatch.losses import CountCorrectedInfoNCE as CountCorrectedInfoNCE
    from anybatch.losses import DecoupledInfoNCE as DecoupledInfoNCE
    from anybatch.losses import InfoNCE as InfoNCE
    from anybatch.losses import SogCLR as SogCLR
    from anybatch.mining import MiningConfig as MiningConfig
    from anybatch.mining import mine_plan as mine_plan
    from anybatch.plan import BatchPlan as BatchPlan
    from anybatch.plan import PlanSampler as PlanSampler
    from anybatch.rows import RowTable as RowTable

__version__ = "0.1.0"

_HOME = {
    "AnybatchError": "errors",
    "BatchPlan": "plan",
    "CountCorrectedInfoNCE": "losses",
    "DecoupledInfoNCE": "losses",
    "InfoNCE": "losses",
    "MiningConfig": "mining",
    "PairData": "data",
    "PlanSampler": "plan",
    "RowTable": "rows",
    "SogCLR": "losses",
    "cached_step": "caching",
    "mine_plan": "mining",
    "read_pairs": "data",
    "retrieval_metrics": "evaluation.retrieval",
}
__all__ = [*sorted(_HOME), "sample"]


def __getattr__(name: str) -> Any:
    if name == "sample":
        return importlib.import_module("anybatch.sample")
    if name in _HOME:
        return getattr(importlib.import_module(f"anybatch.{_HOME[name]}"), name)
    raise AttributeError(f"module 'anybatch' has no attribute {name!r}")
