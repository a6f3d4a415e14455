"""Training on a plan of several partitions: table and sampler change together, and a killed run goes on in the middle of the second."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from anybatch.integrations.sentence_transformers import last_whole_checkpoint
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan
from anybatch.run import job

from .test_refresh import config


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [0, 2])
def test_a_killed_run_goes_on_in_the_partition_of_its_epoch(
    refresh, pairs_file, tiny_model_folder, tmp_path, monkeypatch
):
    seen = []
    arguments = RowTable.arguments

    def watched(self, index, **settings):
        found = arguments(self, index, **settings)
        seen.append((self.epoch, self.cluster.tolist(), sorted(index.tolist())))
        return found

    monkeypatch.setattr(RowTable, "arguments", watched)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = (pairs_file, tiny_model_folder)
    settings = {"partitions": 2, "refresh_epochs": refresh}
    job.train(config(*given, whole, **settings))
    first = BatchPlan.load(whole / "plan.safetensors")
    second = BatchPlan.load(whole / "plan_epoch_2.safetensors") if refresh else first
    assert first.num_partitions == second.num_partitions == 2
    assert (first.digest != second.digest) == bool(refresh)
    plans = [first, first, second, second]
    expected = [
        (epoch, plan.partition(epoch).cluster.tolist(), sorted(batch.tolist()))
        for epoch, plan in enumerate(plans)
        for batch in plan.epoch_batches(epoch)
    ]
    assert seen == expected
    assert len({tuple(clusters) for _, clusters, _ in seen}) == (4 if refresh else 2)

    class KillError(Exception):
        pass

    for step, last in ((8, 6), (19, 18)):  # in the middle of epoch 1, and of epoch 3: the second partition

        def kill(stage, done, total, figures=None, step=step):
            if stage == "training" and done == step:
                raise KillError

        with pytest.raises(KillError):
            job.train(config(*given, killed, **settings), resume=killed.exists(), progress=kill)
        assert last_whole_checkpoint(killed / "checkpoints").name == f"checkpoint-{last}"
    seen.clear()
    job.train(config(*given, killed, **settings), resume=True)
    assert seen == expected[18:]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(killed) == losses(whole)
    single = tmp_path / "single"
    job.train(config(*given, single, refresh_epochs=refresh))
    assert losses(single)[:5] == losses(whole)[:5]
    assert losses(single)[5:10] != losses(whole)[5:10]
