"""Outlive the batch: one tiled softmax engine, and losses composed of denominators, temperatures and log-weights."""

from anybatch.losses.base import ContrastiveLoss, SoftmaxLoss
from anybatch.losses.cross_batch import CrossBatchInfoNCE
from anybatch.losses.denominators import RunningDenominator
from anybatch.losses.gamma import GammaSchedule
from anybatch.losses.log_weights import LogWeights, removed
from anybatch.losses.matryoshka import Matryoshka
from anybatch.losses.methods import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from anybatch.plans.examples import Examples

__all__ = [
    "ContrastiveLoss",
    "CountCorrectedInfoNCE",
    "CrossBatchInfoNCE",
    "DecoupledInfoNCE",
    "Examples",
    "GammaSchedule",
    "InfoNCE",
    "LogWeights",
    "Matryoshka",
    "RunningDenominator",
    "SoftmaxLoss",
    "SogCLR",
    "removed",
]
