"""Cross-batch memory through the whole pipeline: killed in mid-epoch and resumed with what it remembered, mined
batches, suspects.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from anybatch.integrations.sentence_transformers import ModelConfig, TrainConfig, last_whole_checkpoint
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig
from anybatch.run import job
from anybatch.run.config import DataConfig, RunConfig, TeacherConfig


def test_a_killed_run_goes_on_with_what_it_remembered(pairs_file, tiny_model_folder, tmp_path):
    loss = LossConfig(name="cross_batch", memory_size=20, direction="both", weights="inclusion", mask_suspects=True)

    def run(folder, **k):
        settings = RunConfig(
            output=str(folder),
            data=DataConfig(path=str(pairs_file), limit=40),
            model=ModelConfig(name=str(tiny_model_folder), device="cpu"),
            teacher=TeacherConfig(name=str(tiny_model_folder)),
            batch_size=8,
            mining=MiningConfig(method="anybatch", cluster_size=4, window=(1, 6)),
            loss=loss,
            train=TrainConfig(epochs=4, save_steps=3, mini_batch_size=4, learning_rate=1e-2, args={"logging_steps": 1}),
        )
        return job.train(settings, **k)

    def log(folder):
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    assert any(line.get("remembered", 0) > 10 for line in log(whole))

    class KillError(Exception):
        pass

    def kill(stage, done, total, figures=None):
        if stage == "training" and done == 8:
            raise KillError

    with pytest.raises(KillError):
        run(killed, progress=kill)
    checkpoint = last_whole_checkpoint(killed / "checkpoints")
    state = load_file(checkpoint / "anybatch_loss.safetensors")
    name = next(name for name in state if name.endswith("queue.rows"))
    assert int((state[name] >= 0).sum()) > 10
    run(killed, resume=True)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["loss"] for line in log(killed)] == [line["loss"] for line in log(whole)]
