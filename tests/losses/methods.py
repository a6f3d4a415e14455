"""Every loss by name, as the tests of what all losses promise need them."""

from __future__ import annotations

import copy
from functools import partial

import torch

from anybatch.losses import ContrastiveLoss, GammaSchedule
from anybatch.losses.log_weights import Inclusion, LogWeights
from anybatch.losses.registry import make_loss
from anybatch.plans.examples import Examples

ROWS, WIDTH = 40, 5
LEARNED, WIDE = {"learnable_temperature": True}, {"temperature_range": (0.002, 1.0)}
SCHEDULED = {"gamma": GammaSchedule(0.2, num_steps=4, steps_per_epoch=2)}
TABLE = {  # the name in the registry, and settings
    "infonce": ("infonce", LEARNED),
    "decoupled": ("decoupled", LEARNED),
    "count corrected": ("count_corrected", LEARNED),
    "sogclr": ("sogclr", {"gamma": 0.4, **LEARNED}),
    "sogclr scheduled": ("sogclr", SCHEDULED),
    "fastclip v0": ("fastclip", {"version": "v0", "gamma": 0.4, **WIDE}),
    "fastclip v1": ("fastclip", {"version": "v1", **SCHEDULED}),
    "fastclip v2": ("fastclip", {"version": "v2", "gamma": 0.4, **WIDE}),
    "fastclip v3": ("fastclip", {"version": "v3", "gamma": 0.4, **WIDE}),
    "isogclr": ("isogclr", {"gamma": 0.4, "eps": 1e-4, **WIDE}),
    "tempnet": ("tempnet", {"gamma": 0.4, "hidden": 3, **WIDE}),
    "nuclr": ("nuclr", {"gamma": 0.4, "margin_lr": 0.05, "learn_from": 1}),
    "glofnd": ("glofnd", {"gamma": 0.4, "alpha": 0.3, "learn_from": 1}),
    "emc2": ("emc2", LEARNED),
    "cross batch": ("cross_batch", {"memory_size": 11, **LEARNED}),
    "scent": ("scent", {"alpha": 0.3}),
}


def make(name: str, num_rows: int = ROWS, width: int = WIDTH, **options: object) -> ContrastiveLoss:
    """A loss of the table, with these settings in place of its own."""
    method, settings = TABLE[name]
    settings = {key: copy.deepcopy(value) for key, value in settings.items()}  # a schedule has a position
    if name == "tempnet":
        settings["dimensions"] = width
    return make_loss(method, num_rows, **{**settings, **options})


ALL = {name: partial(make, name) for name in TABLE}
STATEFUL = {name: ALL[name] for name in TABLE if name not in ("infonce", "decoupled", "count corrected")}


def cluster_weights(cluster, num_rows, *, same, other, loose=None, **columns):
    """Inclusion weights that are the same for every query; `loose` (None: `other`) of candidates in no cluster."""
    row = [same, other, other if loose is None else loose, other, other if loose is None else loose, 0.0]
    table = torch.tensor([[row, row]] * 2, dtype=torch.float64)
    return LogWeights.of(Examples(cluster=cluster, **columns), num_rows, Inclusion(table))


def floor(name: str, temperature: float) -> dict[str, float]:
    """A lower floor for a learned temperature, for the losses that have one."""
    return {} if name.startswith(("fastclip", "isogclr", "tempnet", "nuclr")) else {"min_temperature": temperature}
