"""sentence-transformers: our cached step, plans and memory inside its Trainer. Imported when a name is asked for."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "trainer": ("Trainer",),
    "loss": ("CachedLoss",),
    "two_views": ("TwoViewLoss",),
    "batches": ("PlanBatches",),
    "sets": ("with_index",),
    "collating": ("ImageCollator", "undecoded"),
    "callback": ("LossStateCallback", "last_whole_checkpoint", "load_grown_loss"),
    "training": ("TrainConfig", "TrainResult", "train_model"),
    "model": ("ModelConfig", "load_model"),
    "embed": ("embed_texts", "embed_to_file"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
