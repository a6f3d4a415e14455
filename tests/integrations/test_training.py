"""`train_model`: what it leaves in its folder, and what it does with what it finds there."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from anybatch.errors import AnybatchError
from anybatch.integrations.sentence_transformers import CachedLoss, TrainConfig, last_whole_checkpoint, train_model
from anybatch.integrations.sentence_transformers import callback as callback_module
from anybatch.integrations.sentence_transformers.training import _make_recorder
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
    """Train three steps (or as `settings` say); returns the result, the model and the loss."""
    torch.manual_seed(0)
    model = SentenceTransformer(str(folder), device="cpu")
    cached = CachedLoss(model, SogCLR(ROWS) if loss is None else loss, micro_batch=8)
    config = TrainConfig(**{"learning_rate": 1e-3, "save_steps": 2, "log_steps": 2, **settings})
    result = train_model(
        model, cached, Dataset.from_dict(DATA), PLAN, config, output=output, resume=resume, evaluate=evaluate
    )
    return result, model, cached


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
    result, _, _ = train(tiny_model_folder, tmp_path, resume=True, epochs=2)
    assert (checkpoints / "checkpoint-best" / "something").read_text() == "x"
    assert not (checkpoints / "checkpoint-9").exists()
    assert [line["step"] for line in result.log] == [2, 4, 6]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == result.log


def test_only_the_first_rank_writes_the_log(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "epoch": 0.1 * step, "loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ep')
    before = path.read_text()
    state = SimpleNamespace(global_step=2, epoch=0.2, is_world_process_zero=False)
    other = _make_recorder(path, None, None, None)
    other.on_train_begin(None, state, None)
    other.on_log(None, state, None, logs={"loss": 1.0})
    assert path.read_text() == before
    state.is_world_process_zero = True
    first = _make_recorder(path, None, None, None)
    first.on_train_begin(None, state, None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2] == first.lines


def test_a_checkpoint_is_declared_whole_after_all_ranks_have_written(tiny_model_folder, tmp_path, monkeypatch):
    """Every rank passes the barrier of on_save after its own rng_state; the file that says "whole" must come later."""
    whole = []

    def barrier():
        whole.append(len(list(tmp_path.glob(f"checkpoints/*/{callback_module.LOSS_STATE}"))))

    monkeypatch.setattr(callback_module.distributed, "barrier", barrier)
    train(tiny_model_folder, tmp_path)
    assert whole == [0, 0, 1], "the barriers of the start, of checkpoint-2 and of checkpoint-3"


def test_weight_decay_leaves_the_temperature_alone(tiny_model_folder, tmp_path):
    temperatures, weights = [], []
    for decay in (0.0, 50.0):
        output = tmp_path / str(decay)
        output.mkdir()
        loss = InfoNCE(temperature=0.05, learnable_temperature=True)
        _, model, cached = train(tiny_model_folder, output, loss=loss, weight_decay=decay, max_steps=1, warmup=0.0)
        temperatures.append(cached.loss.log_temperature.item())
        weights.append(model[0].model.encoder.layer[0].output.dense.weight.norm().item())
    assert temperatures[0] == temperatures[1] != torch.tensor(0.05).log().item()
    assert weights[1] < 0.97 * weights[0], "the encoder does decay"


def test_steps_and_seconds_are_those_of_training(tiny_model_folder, tmp_path):
    """Five steps, logged every second: the last logged step is the fourth."""

    def evaluate(model):
        time.sleep(0.2)
        return {"figure": 1.0}

    result, _, _ = train(tiny_model_folder, tmp_path, evaluate=evaluate, epochs=2, max_steps=5, eval_steps=2)
    assert result.num_steps == 5
    assert [line["step"] for line in result.log if "loss" in line] == [2, 4]
    assert 0.4 <= result.evaluation_seconds < 5.0


@pytest.mark.parametrize(
    ("warmup", "expected"), [(1.0, [0, 1 / 3, 2 / 3]), (0.5, [0, 1 / 2, 1]), (0.0, [1, 2 / 3, 1 / 3])]
)
def test_warmup_is_a_fraction_also_when_it_is_one(tiny_model_folder, tmp_path, warmup, expected):
    """Three steps; all of them of warm-up, two, none."""
    result, _, _ = train(tiny_model_folder, tmp_path, warmup=warmup, log_steps=1)
    assert [line["learning_rate"] / 1e-3 for line in result.log if "loss" in line] == pytest.approx(expected)
