"""Every loss by name, as the tests of what all losses promise need them."""

from __future__ import annotations

import torch

from anybatch.family import EMC2, NUCLR, SCENT, FastCLIP, GloFND, ISogCLR, TempNet
from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE, DecoupledInfoNCE, GammaSchedule, InfoNCE, SogCLR
from anybatch.losses.log_weights import Inclusion, LogWeights
from anybatch.plans.examples import Examples

ROWS, WIDTH = 40, 5
STATELESS = {
    "infonce": lambda **k: InfoNCE(learnable_temperature=True, **k),
    "decoupled": lambda **k: DecoupledInfoNCE(learnable_temperature=True, **k),
    "count corrected": lambda **k: CountCorrectedInfoNCE(ROWS, learnable_temperature=True, **k),
}
STATEFUL = {
    "sogclr": lambda **k: SogCLR(ROWS, gamma=0.4, learnable_temperature=True, **k),
    "sogclr scheduled": lambda **k: SogCLR(ROWS, gamma=GammaSchedule(0.2, num_steps=4, steps_per_epoch=2), **k),
    "fastclip v0": lambda **k: FastCLIP(ROWS, version="v0", gamma=0.4, temperature_range=(0.002, 1.0), **k),
    "fastclip v1": lambda **k: FastCLIP(ROWS, version="v1", gamma=GammaSchedule(0.2, num_steps=4), **k),
    "fastclip v2": lambda **k: FastCLIP(ROWS, version="v2", gamma=0.4, temperature_range=(0.002, 1.0), **k),
    "fastclip v3": lambda **k: FastCLIP(ROWS, version="v3", gamma=0.4, temperature_range=(0.002, 1.0), **k),
    "isogclr": lambda **k: ISogCLR(ROWS, gamma=0.4, eps=1e-4, temperature_range=(0.002, 1.0), **k),
    "tempnet": lambda **k: TempNet(ROWS, WIDTH, gamma=0.4, temperature_range=(0.002, 1.0), hidden=3, **k),
    "nuclr": lambda **k: NUCLR(ROWS, gamma=0.4, margin_lr=0.05, margin_start=1, **k),
    "glofnd": lambda **k: GloFND(ROWS, gamma=0.4, alpha=0.3, threshold_start=1, **k),
    "emc2": lambda **k: EMC2(ROWS, learnable_temperature=True, **k),
    "emc2 with states": lambda **k: EMC2(ROWS, dimensions=WIDTH, learnable_temperature=True, **k),
    "cross batch": lambda **k: CrossBatchInfoNCE(ROWS, memory_size=11, learnable_temperature=True, **k),
    "scent": lambda **k: SCENT(ROWS, alpha=0.3, **k),
}
ALL = {**STATELESS, **STATEFUL}


def cluster_weights(cluster, num_rows, *, same, other, loose=None, cap=None, **columns):
    """Inclusion weights that are the same for every query; `loose` (None: `other`) of candidates in no cluster."""
    row = [same, other, other if loose is None else loose, other, other if loose is None else loose, 0.0]
    table = torch.tensor([[row, row]] * 2, dtype=torch.float64)
    return LogWeights.of(Examples(cluster=cluster, **columns), num_rows, Inclusion(table, cap))


def floor(name: str, temperature: float) -> dict[str, float]:
    """A lower floor for a learned temperature, for the losses that have one."""
    return {} if name.startswith(("fastclip", "isogclr", "tempnet", "nuclr")) else {"min_temperature": temperature}
