"""Warm start and the memory's figures with a real model and inside a run; sharded memories in checkpoints."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.data.reading import read_pairs
from anybatch.integrations.sentence_transformers import (
    CachedLoss,
    LossStateCallback,
    ModelConfig,
    TrainConfig,
    last_whole_checkpoint,
    warm_start_from_model,
)
from anybatch.losses import InfoNCE, SogCLR
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig
from anybatch.run import job
from anybatch.run.config import DataConfig, RunConfig

ROWS = 97


@pytest.fixture
def model(tiny_model_folder):
    return SentenceTransformer(str(tiny_model_folder), device="cpu")


@pytest.fixture
def pairs(pairs_file):
    return read_pairs(str(pairs_file))


def test_equals_the_loss_on_the_whole_data_set(model, pairs, tmp_path):
    """Encoded without dropout, one batch of everything with gamma = 1 leaves the same memory, duplicates and all."""
    trained, warmed, filed = (SogCLR(ROWS, gamma=1.0, direction="both") for _ in range(3))
    model.train()
    seen = []
    warm_start_from_model(model, pairs, warmed, progress=lambda *figures: seen.append(figures), batch_size=16)
    assert model.training
    assert [figures[0] for figures in seen] == [
        "warm start: anchors",
        "warm start: positives",
        "warm start: denominators",
        "warm start: denominators",
    ]
    anchors, positives = (
        model.encode(list(texts), convert_to_tensor=True) for texts in (pairs.anchors, pairs.positives)
    )
    ids = [torch.as_tensor(ids) for ids in (pairs.anchor_id, pairs.positive_id)]
    trained(
        anchors.clone().requires_grad_(),
        positives.clone(),
        index=torch.arange(ROWS),
        anchor_id=ids[0],
        candidate_id=ids[1],
    )
    torch.testing.assert_close(warmed.denominator.log_mean, trained.denominator.log_mean, rtol=1e-4, atol=1e-4)
    warm_start_from_model(model, pairs, filed, folder=tmp_path, batch_size=16)
    assert torch.equal(filed.denominator.log_mean, warmed.denominator.log_mean)
    seen.clear()
    warm_start_from_model(
        model, pairs, SogCLR(ROWS, direction="both"), folder=tmp_path, progress=lambda *f: seen.append(f)
    )
    assert [figures[1] for figures in seen[:2]] == [ROWS, ROWS]  # no text was encoded again
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    with pytest.raises(AnybatchError, match="another model"):
        warm_start_from_model(model, pairs, filed, folder=tmp_path)
    with pytest.raises(AnybatchError, match="InfoNCE has no memory"):
        warm_start_from_model(model, pairs, InfoNCE())


def run_config(pairs_file, folder, output, *, max_steps=12, **loss):
    return RunConfig(
        output=str(output),
        data=DataConfig(path=str(pairs_file)),
        model=ModelConfig(name=str(folder), device="cpu"),
        batch_size=8,
        mining=MiningConfig(method="random"),
        loss=LossConfig(name="sogclr", gamma=0.6, direction="both", **loss),
        train=TrainConfig(
            learning_rate=1e-3, micro_batch=4, save_steps=3, args={"max_steps": max_steps, "logging_steps": 1}
        ),
    )


def test_a_run_that_starts_warm_resumes_bit_for_bit(pairs_file, tiny_model_folder, tmp_path):
    settings = {"warm_start": True}
    stages: list[str] = []

    def listen(stage, done, total, figures=None):
        stages.append(stage)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job.train(run_config(pairs_file, tiny_model_folder, whole, **settings), progress=listen)
    first = stages.index("training")
    assert any(stage.startswith("warm start") for stage in stages[:first])
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))

    class KillError(Exception):
        pass

    def kill(stage, done, total, figures=None):
        if stage == "training" and done == 8:  # after the checkpoint of step 6, before that of step 9
            raise KillError

    with pytest.raises(KillError):
        job.train(run_config(pairs_file, tiny_model_folder, killed, **settings), progress=kill)
    assert last_whole_checkpoint(killed / "checkpoints").name == "checkpoint-6"
    job.train(run_config(pairs_file, tiny_model_folder, killed, **settings), resume=True)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = [
        load_file(last_whole_checkpoint(folder / "checkpoints") / "anybatch_loss.safetensors")
        for folder in (whole, killed)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_cold_run_differs(pairs_file, tiny_model_folder, tmp_path):
    """Else the warm start would not have reached the loss."""
    losses = []
    for name, settings in (("cold", {}), ("warm", {"warm_start": True})):
        job.train(run_config(pairs_file, tiny_model_folder, tmp_path / name, max_steps=1, **settings))
        losses.append(
            next(json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines())
        )
    assert losses[0] != losses[1]


def test_settings():
    for settings, match in (
        ({"name": "infonce", "warm_start": True}, "has no running denominator"),
        ({"name": "siglip", "warm_start": True}, "has no running denominator"),
    ):
        with pytest.raises(AnybatchError, match=match):
            LossConfig(**settings)


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
        loss.loss.denominator.fill(torch.arange(11), torch.arange(11.0), direction=0, dimensions=3)
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
