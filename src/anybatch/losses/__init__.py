"""Outlive the batch: one tiled softmax engine, rules and memory over it, one Module a method. Imports errors and distributed."""

from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.cluster_centres import ClusterCentreInfoNCE
from anybatch.losses.infonce import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE
from anybatch.losses.log_weights import (
    ClusterLogWeight,
    IdMask,
    LogWeight,
    SumLogWeight,
    SuspectMask,
    TensorLogWeight,
    inclusion_log_weights,
)
from anybatch.losses.sogclr import SogCLR

__all__ = [
    "ClusterCentreInfoNCE",
    "ClusterLogWeight",
    "ContrastiveLoss",
    "CountCorrectedInfoNCE",
    "DecoupledInfoNCE",
    "IdMask",
    "InfoNCE",
    "LogWeight",
    "SogCLR",
    "SumLogWeight",
    "SuspectMask",
    "TensorLogWeight",
    "inclusion_log_weights",
]
