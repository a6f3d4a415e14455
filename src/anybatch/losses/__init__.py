"""Outlive the batch: one tiled softmax engine, rules and memory over it, one Module a method. Imports errors, ids and distributed."""

from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.cross_batch import CrossBatchInfoNCE
from anybatch.losses.infonce import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE
from anybatch.losses.log_weights import LogWeights, removed
from anybatch.losses.matryoshka import Matryoshka
from anybatch.losses.memory import ExampleMemory
from anybatch.losses.schedule import GammaSchedule
from anybatch.losses.sogclr import SogCLR
from anybatch.plans.examples import Examples

__all__ = [
    "ContrastiveLoss",
    "CountCorrectedInfoNCE",
    "CrossBatchInfoNCE",
    "DecoupledInfoNCE",
    "ExampleMemory",
    "Examples",
    "GammaSchedule",
    "InfoNCE",
    "LogWeights",
    "Matryoshka",
    "SogCLR",
    "removed",
]
