"""The rule behind "auto": what a run takes when it is not told."""

from dataclasses import replace

import numpy as np
import pytest

from anybatch.core.errors import AnybatchError
from anybatch.losses.registry import LossConfig, build_loss
from anybatch.mining import MiningConfig
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import DataConfig, RunConfig, TeacherConfig
from anybatch.run.recipe import with_recipe

CONFIG = RunConfig(output="run", data=DataConfig(path="pairs.jsonl"))
TEACHER = TeacherConfig(name="teacher")


@pytest.mark.parametrize(("batch_size", "name"), [(2, "cross_batch"), (256, "cross_batch"), (512, "count_corrected")])
def test_the_batch_decides_the_loss(batch_size, name):
    config = with_recipe(replace(CONFIG, batch_size=batch_size))
    assert (config.loss.name, config.mining.method, config.loss.weights) == (name, "random", "none")
    assert with_recipe(config) == config


def test_the_teacher_decides_the_batches_and_the_loss_agrees():
    config = with_recipe(replace(CONFIG, teacher=TEACHER))
    assert config.mining.method == "anybatch"
    assert (config.loss.weights, config.loss.mask_suspects) == ("inclusion", True)
    chosen = replace(CONFIG, teacher=TEACHER, mining=MiningConfig(method="random"))
    assert with_recipe(chosen).loss.weights == "none"


def test_what_is_given_beside_auto_holds():
    config = with_recipe(replace(CONFIG, loss=LossConfig(temperature=0.02, mask_suspects=True), teacher=TEACHER))
    assert (config.loss.temperature, config.loss.mask_suspects, config.loss.weights) == (0.02, True, "inclusion")
    named = replace(CONFIG, loss=LossConfig(name="infonce"), teacher=TEACHER)
    assert with_recipe(named).loss == named.loss


def test_a_given_plan_says_whether_it_is_mined(tmp_path):
    path = str(tmp_path / "plan.safetensors")
    cluster = np.repeat(np.arange(4, dtype=np.int32), 2)
    plan = BatchPlan(num_rows=8, batch_size=4, cluster_size=2, cluster=cluster, seed=0, data_digest="")
    plan.save(path)
    assert with_recipe(replace(CONFIG, plan=path)).loss.weights == "inclusion"


def test_what_nobody_settled_is_refused():
    with pytest.raises(AnybatchError, match="Name a method here"):
        build_loss(LossConfig(), num_rows=8)
    with pytest.raises(AnybatchError, match=r"loss.gamma is given, which the recommended loss .* it is for .*sogclr"):
        LossConfig(gamma=0.5)
