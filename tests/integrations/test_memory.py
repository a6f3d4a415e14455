"""Sharded memories in checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import CachedLoss, LossStateCallback, last_whole_checkpoint
from anybatch.losses import SogCLR


def test_sharded_memory_in_checkpoints(tmp_path, monkeypatch):
    """Two ranks one after the other; nothing here needs a collective but the barrier. Rank 0 last, whose file marks the
    checkpoint whole.
    """
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    monkeypatch.setattr(dist, "barrier", lambda: None)

    def be(rank, ranks=2):
        monkeypatch.setattr(distributed, "is_active", lambda: ranks > 1)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        loss = CachedLoss(torch.nn.Linear(1, 1), SogCLR(11, sharded=True))
        return loss, SimpleNamespace(global_step=5, is_world_process_zero=rank == 0)

    for rank in (1, 0):
        assert last_whole_checkpoint(tmp_path) is None
        loss, state = be(rank)
        loss.loss.denominator.write("log_mean", torch.arange(11), torch.arange(11.0), direction=0)
        LossStateCallback(loss).on_save(arguments, state, None)
    checkpoint = last_whole_checkpoint(tmp_path)
    for rank in range(2):
        loss, state = be(rank)
        LossStateCallback(loss).on_train_begin(arguments, state, None)
        assert loss.loss.denominator.log_mean.tolist() == [[float(row) for row in range(rank, 11, 2)]]
    for ranks in (1, 3):  # other numbers of ranks join the shards, and take theirs
        loss, state = be(0, ranks=ranks)
        LossStateCallback(loss).on_train_begin(arguments, state, None)
        assert loss.loss.denominator.log_mean.tolist() == [np.arange(11.0)[::ranks].tolist()]
    (checkpoint / "anybatch_loss-1-of-2.safetensors").unlink()
    with pytest.raises(AnybatchError, match=r"cannot be read, anybatch_loss-1-of-2\.safetensors"):
        LossStateCallback(loss).on_train_begin(arguments, state, None)
