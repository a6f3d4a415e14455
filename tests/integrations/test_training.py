"""`train_model`: what it leaves in its folder, and what it does with what it finds there."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from anybatch.errors import AnybatchError
from anybatch.integrations.sentence_transformers import CachedLoss, TrainConfig, last_whole_checkpoint, train_model
from anybatch.losses import InfoNCE, SogCLR
from anybatch.plan import BatchPlan

from ..conftest import sentence

ROWS = 24
PLAN = BatchPlan.random(ROWS, 8, seed=1, data_digest="")
DATA = {
    "anchor": [sentence(row, 2 + row % 5) for row in range(ROWS)],
    "positive": [sentence(row + 50, 3 + row % 7) for row in range(ROWS)],
}


def train(folder, output, *, loss=None, resume=False, evaluate=None, **settings):
    """Train three steps (or as `settings` say); returns the log, the model and the loss."""
    torch.manual_seed(0)
    model = SentenceTransformer(str(folder), device="cpu")
    cached = CachedLoss(model, SogCLR(ROWS) if loss is None else loss, micro_batch=8)
    config = TrainConfig(**{"learning_rate": 1e-3, "save_steps": 2, "log_steps": 2, **settings})
    log = train_model(
        model, cached, Dataset.from_dict(DATA), PLAN, config, output=output, resume=resume, evaluate=evaluate
    )
    return log, model, cached


def test_a_folder_with_checkpoints_or_a_log_is_left_alone_without_resume(tiny_model_folder, tmp_path):
    train(tiny_model_folder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(AnybatchError, match="already holds checkpoints or a log"):
        train(tiny_model_folder, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert any("checkpoint-2" in str(path) for path in before)


def test_resuming_deletes_only_what_was_cut_short(tiny_model_folder, tmp_path):
    train(tiny_model_folder, tmp_path)
    checkpoints = tmp_path / "checkpoints"
    for name in ("checkpoint-best", "checkpoint-9"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "something").write_text("x")
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    log, _, _ = train(tiny_model_folder, tmp_path, resume=True, epochs=2)
    assert (checkpoints / "checkpoint-best" / "something").read_text() == "x"
    assert not (checkpoints / "checkpoint-9").exists()
    assert [line["step"] for line in log] == [2, 4, 6]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == log
