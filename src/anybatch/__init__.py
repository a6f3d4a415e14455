"""anybatch: contrastive training at any batch size. The public names, imported on first use; nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anybatch.caching import cached_step as cached_step
    from anybatch.core.errors import AnybatchError as AnybatchError
    from anybatch.data import sample as sample
    from anybatch.data.pairs import PairData as PairData
    from anybatch.data.reading import read_pairs as read_pairs
    from anybatch.evaluation.retrieval import retrieval_metrics as retrieval_metrics
    from anybatch.losses import CountCorrectedInfoNCE as CountCorrectedInfoNCE
    from anybatch.losses import DecoupledInfoNCE as DecoupledInfoNCE
    from anybatch.losses import InfoNCE as InfoNCE
    from anybatch.losses import SogCLR as SogCLR
    from anybatch.losses.rows import RowTable as RowTable
    from anybatch.mining import MiningConfig as MiningConfig
    from anybatch.mining import mine_plan as mine_plan
    from anybatch.plans.plan import BatchPlan as BatchPlan
    from anybatch.plans.plan import PlanSampler as PlanSampler

__version__ = "0.1.0"

_HOME = {
    "AnybatchError": "core.errors",
    "BatchPlan": "plans.plan",
    "CountCorrectedInfoNCE": "losses",
    "DecoupledInfoNCE": "losses",
    "InfoNCE": "losses",
    "MiningConfig": "mining",
    "PairData": "data.pairs",
    "PlanSampler": "plans.plan",
    "RowTable": "losses.rows",
    "SogCLR": "losses",
    "cached_step": "caching",
    "mine_plan": "mining",
    "read_pairs": "data.reading",
    "retrieval_metrics": "evaluation.retrieval",
}
__all__ = [*sorted(_HOME), "sample"]


def __getattr__(name: str) -> Any:
    if name == "sample":
        return importlib.import_module("anybatch.data.sample")
    if name in _HOME:
        return getattr(importlib.import_module(f"anybatch.{_HOME[name]}"), name)
    raise AttributeError(f"module 'anybatch' has no attribute {name!r}")
