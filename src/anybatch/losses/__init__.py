"""Outlive the batch: one tiled softmax engine, rules and memory over it, one Module a method. Imports errors, ids and distributed."""

from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.cross_batch import CrossBatchInfoNCE
from anybatch.losses.emc2 import EMC2
from anybatch.losses.fastclip import FastCLIP
from anybatch.losses.glofnd import GloFND
from anybatch.losses.infonce import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE
from anybatch.losses.isogclr import ISogCLR, TempNet
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
from anybatch.losses.nuclr import NUCLR
from anybatch.losses.pairwise import AUCCL, SigLIP
from anybatch.losses.scent import SCENT
from anybatch.losses.schedule import GammaSchedule
from anybatch.losses.sogclr import SogCLR

__all__ = [
    "AUCCL",
    "EMC2",
    "NUCLR",
    "SCENT",
    "ClusterLogWeight",
    "ContrastiveLoss",
    "CountCorrectedInfoNCE",
    "CrossBatchInfoNCE",
    "DecoupledInfoNCE",
    "ExampleMemory",
    "FastCLIP",
    "GammaSchedule",
    "GloFND",
    "ISogCLR",
    "IdMask",
    "InfoNCE",
    "LogWeight",
    "Matryoshka",
    "PairMask",
    "SigLIP",
    "SogCLR",
    "SumLogWeight",
    "TaskMask",
    "TempNet",
    "TensorLogWeight",
    "inclusion_log_weights",
]
