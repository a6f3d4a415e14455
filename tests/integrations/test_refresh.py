"""Plans mined anew while training, and resumed in the middle of one."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import ModelConfig, TrainConfig, last_whole_checkpoint
from anybatch.integrations.sentence_transformers.refresh import RefreshPlan
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig
from anybatch.plans.plan import BatchPlan, PlanSampler
from anybatch.run import job
from anybatch.run.config import DataConfig, RunConfig, TeacherConfig


def config(pairs_file, model, output, **mining):
    return RunConfig(
        output=str(output),
        data=DataConfig(path=str(pairs_file), limit=40),
        model=ModelConfig(name=str(model), device="cpu"),
        teacher=TeacherConfig(name=str(model)),
        batch_size=8,
        mining=MiningConfig(cluster_size=4, skip=1, take=6, **mining),
        loss=LossConfig(name="count_corrected", weights="inclusion", mask_suspects=True),
        train=TrainConfig(epochs=4, log_steps=1, save_steps=3, micro_batch=4, learning_rate=1e-2),
    )


@pytest.mark.slow
def test_new_plans_come_from_the_student_and_a_killed_run_goes_on_with_them(pairs_file, tiny_model_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    job.train(config(pairs_file, tiny_model_folder, whole, refresh_epochs=2))
    first, second = (BatchPlan.load(whole / name) for name in ("plan.safetensors", "plan_epoch_2.safetensors"))
    assert sorted(path.name for path in whole.glob("plan_epoch*")) == ["plan_epoch_2.safetensors"]
    assert not np.array_equal(first.cluster, second.cluster)
    assert (first.num_batches, first.data_digest) == (second.num_batches, second.data_digest)

    class KillError(Exception):
        pass

    for step in (
        11,
        13,
    ):  # after checkpoint 9, the plan of epoch 2 begins behind step 10; after checkpoint 12 it is in use

        def kill(stage, done, total, figures=None, step=step):
            if stage == "training" and done == step:
                raise KillError

        with pytest.raises(KillError):
            job.train(
                config(pairs_file, tiny_model_folder, killed, refresh_epochs=2), resume=killed.exists(), progress=kill
            )
        assert last_whole_checkpoint(killed / "checkpoints").name == f"checkpoint-{step // 3 * 3}"
    job.train(config(pairs_file, tiny_model_folder, killed, refresh_epochs=2), resume=True)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (whole, killed)
    ]
    assert logs[0] == logs[1]
    without = tmp_path / "without"
    job.train(config(pairs_file, tiny_model_folder, without))
    plain = [json.loads(line)["loss"] for line in (without / "log.jsonl").read_text().splitlines()]
    assert plain[:10] == logs[0][:10]
    assert plain[10:] != logs[0][10:]


def test_a_plan_that_is_gone_is_missed(pairs_file, tiny_model_folder, tmp_path):
    def kill(stage, done, total, figures=None):
        if stage == "training" and done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.train(config(pairs_file, tiny_model_folder, tmp_path / "run", refresh_epochs=2), progress=kill)
    (tmp_path / "run" / "plan_epoch_2.safetensors").unlink()
    with pytest.raises(AnybatchError, match="is gone"):
        job.train(config(pairs_file, tiny_model_folder, tmp_path / "run", refresh_epochs=2), resume=True)


def test_plans_of_an_earlier_run_are_not_deleted(tmp_path):
    plan = BatchPlan.random(8, 4)
    earlier = tmp_path / "plan_epoch_2.safetensors"
    plan.save(earlier)
    before = earlier.read_bytes()

    def begin(**settings):
        refresh = RefreshPlan(SimpleNamespace(rows=None), lambda plan: plan, every=2, folder=tmp_path, **settings)
        loader = SimpleNamespace(batch_sampler=PlanSampler(plan))
        refresh.on_train_begin(None, SimpleNamespace(global_step=0, epoch=0), None, train_dataloader=loader)

    with pytest.raises(AnybatchError, match=r"an earlier run.*plan_epoch_2\.safetensors.*another folder"):
        begin()
    assert earlier.read_bytes() == before
    begin(restart=True)  # the run's own, from before its first checkpoint
    assert not earlier.exists()
    begin()


def test_a_run_killed_before_its_first_checkpoint_makes_its_plans_anew(pairs_file, tiny_model_folder, tmp_path):
    settings = config(pairs_file, tiny_model_folder, tmp_path / "run", refresh_epochs=1)
    settings = replace(settings, train=replace(settings.train, save_steps=100, epochs=2))

    def kill(stage, done, total, figures=None):
        if stage == "training" and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.train(settings, progress=kill)
    path = tmp_path / "run" / "plan_epoch_1.safetensors"
    before = path.read_bytes()
    job.train(settings, resume=True)
    assert path.read_bytes() == before


def test_settings_that_cannot_be_refreshed():
    with pytest.raises(AnybatchError, match="no mined negatives"):
        MiningConfig(refresh_epochs=1, num_negatives=2)
    with pytest.raises(AnybatchError, match="'kmeans'"):
        MiningConfig(refresh_epochs=1, method="kmeans")
