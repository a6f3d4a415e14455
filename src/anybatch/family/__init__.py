"""Published relatives of SogCLR and InfoNCE, one Module a method. The core never imports this room."""

from anybatch.family.emc2 import EMC2
from anybatch.family.fastclip import FastCLIP
from anybatch.family.glofnd import GloFND
from anybatch.family.isogclr import ISogCLR, TempNet
from anybatch.family.nuclr import NUCLR
from anybatch.family.pairwise import AUCCL, SigLIP
from anybatch.family.scent import SCENT

__all__ = ["AUCCL", "EMC2", "NUCLR", "SCENT", "FastCLIP", "GloFND", "ISogCLR", "SigLIP", "TempNet"]
