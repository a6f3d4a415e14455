"""Published relatives of SogCLR and InfoNCE, each a composition with its equation. The core never imports this room."""

from anybatch.family.debiased import DebiasedInfoNCE
from anybatch.family.emc2 import EMC2
from anybatch.family.glofnd import GloFND
from anybatch.family.nuclr import NUCLR
from anybatch.family.pairwise import AUCCL, SigLIP
from anybatch.family.robust import FastCLIP, ISogCLR, TempNet
from anybatch.family.scent import SCENT

__all__ = ["AUCCL", "EMC2", "NUCLR", "SCENT", "DebiasedInfoNCE", "FastCLIP", "GloFND", "ISogCLR", "SigLIP", "TempNet"]
