"""Outlive the batch: one tiled softmax engine, rules and memory over it, one Module a method. Imports errors, ids and distributed."""

from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.cross_batch import CrossBatchInfoNCE
from anybatch.losses.infonce import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE
from anybatch.losses.log_weights import (
    ClusterLogWeight,
    IdMask,
    LogWeight,
    PairMask,
    SumLogWeight,
    TaskMask,
    TensorLogWeight,
    inclusion_log_weights,
)
from anybatch.losses.matryoshka import Matryoshka
from anybatch.losses.memory import ExampleMemory
from anybatch.losses.schedule import GammaSchedule
from anybatch.losses.sogclr import SogCLR

__all__ = [
    "ClusterLogWeight",
    "ContrastiveLoss",
    "CountCorrectedInfoNCE",
    "CrossBatchInfoNCE",
    "DecoupledInfoNCE",
    "ExampleMemory",
    "GammaSchedule",
    "IdMask",
    "InfoNCE",
    "LogWeight",
    "Matryoshka",
    "PairMask",
    "SogCLR",
    "SumLogWeight",
    "TaskMask",
    "TensorLogWeight",
    "inclusion_log_weights",
]
