"""Outlive the batch: one tiled softmax engine, and losses put together from denominators, temperatures and log-weights."""

from anybatch.losses.base import ContrastiveLoss, SoftmaxLoss
from anybatch.losses.cross_batch import CrossBatchInfoNCE
from anybatch.losses.denominators import RunningDenominator
from anybatch.losses.gamma import GammaSchedule
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
from anybatch.losses.methods import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR

__all__ = [
    "ClusterLogWeight",
    "ContrastiveLoss",
    "CountCorrectedInfoNCE",
    "CrossBatchInfoNCE",
    "DecoupledInfoNCE",
    "GammaSchedule",
    "IdMask",
    "InfoNCE",
    "LogWeight",
    "Matryoshka",
    "PairMask",
    "RunningDenominator",
    "SoftmaxLoss",
    "SogCLR",
    "SumLogWeight",
    "TaskMask",
    "TensorLogWeight",
    "inclusion_log_weights",
]
