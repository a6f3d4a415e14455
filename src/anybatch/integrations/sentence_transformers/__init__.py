"""sentence-transformers: our cached step, plans and memory inside its Trainer. Imported when a name is asked for."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Trainer": "trainer",
    "CachedLoss": "loss",
    "TwoViewLoss": "two_views",
    "PlanBatches": "batches",
    "with_index": "sets",
    "ImageCollator": "collating",
    "undecoded": "collating",
    "LossStateCallback": "callback",
    "last_whole_checkpoint": "callback",
    "load_grown_loss": "callback",
    "TrainConfig": "training",
    "TrainResult": "training",
    "train_model": "training",
    "ModelConfig": "model",
    "load_model": "model",
    "embed_texts": "embed",
    "embed_to_file": "embed",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
