"""Cross-batch memory through the whole pipeline: killed in mid-epoch and resumed with what it remembered, mined batches, suspects, refresh."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from anybatch.integrations.sentence_transformers import last_whole_checkpoint
from anybatch.losses.registry import LossConfig
from anybatch.run import job

from .test_refresh import config


@pytest.mark.parametrize("refresh", [0, 2])
def test_a_killed_run_goes_on_with_what_it_remembered(refresh, pairs_file, tiny_model_folder, tmp_path):
    loss = LossConfig(name="cross_batch", memory_size=20, direction="both", weights="inclusion", mask_suspects=True)

    def run(folder, **k):
        settings = config(pairs_file, tiny_model_folder, folder, refresh_epochs=refresh)
        return job.train(replace(settings, loss=loss), **k)

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
