"""The rule behind "auto": what a run takes when it is not told."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from anybatch.core.errors import AnybatchError
from anybatch.data.images import ImageColumn
from anybatch.data.pairs import PairData
from anybatch.losses.registry import LossConfig, build_loss
from anybatch.mining import MiningConfig
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import DataConfig, RunConfig, TeacherConfig
from anybatch.run.make_plan import check_start, existing_plan
from anybatch.run.read_data import read_training_pairs
from anybatch.run.recipe import with_batches, with_recipe

CONFIG = RunConfig(output="run", data=DataConfig(path="pairs.jsonl"))
PAIRS = PairData(anchors=["a", "b"] * 2_560, positives=["c", "d"] * 2_560)
TEACHER = TeacherConfig(name="teacher")
MINED = MiningConfig(method="anybatch")


def test_a_transformer_remembers_nothing():
    config = with_recipe(replace(CONFIG, batch_size=64), PAIRS, None, pretrained=True)
    assert (config.loss.name, config.mining.method, config.loss.weights) == ("count_corrected", "random", "none")


@pytest.mark.parametrize(
    ("batch_size", "num_rows", "name"),
    [
        (2, 5_120, "cross_batch"),
        (256, 5_120, "cross_batch"),
        (256, 5_119, "count_corrected"),
        (512, 5_120, "count_corrected"),
    ],
)
def test_batch_and_rows_decide_the_loss(batch_size, num_rows, name):
    pairs = PairData(anchors=PAIRS.anchors[:num_rows], positives=PAIRS.positives[:num_rows])
    config = with_recipe(replace(CONFIG, batch_size=batch_size), pairs, None, pretrained=False)
    assert (config.loss.name, config.mining.method, config.loss.weights) == (name, "random", "none")
    assert with_recipe(config, pairs, None, pretrained=False) == config


@pytest.mark.parametrize(
    ("given", "name", "mined", "random"),
    [
        ({}, "auto", ("infonce", "none"), ("count_corrected", "none")),
        ({"weights": "inclusion"}, "count_corrected", ("count_corrected", "inclusion"), None),
        ({"name": "sogclr"}, "sogclr", ("sogclr", "inclusion"), ("sogclr", "none")),
    ],
)
def test_with_a_teacher_the_mined_plan_decides_and_the_loss_agrees(given, name, mined, random):
    """The mined plan decides, so the configuration that is kept, and resumed with, says "auto"."""
    asked = replace(CONFIG, teacher=TEACHER, loss=LossConfig(**given))
    config = with_recipe(asked, PAIRS, None, pretrained=True)
    assert (config.mining.method, config.loss.name, config.loss.mask_suspects) == ("auto", name, "auto")
    assert with_recipe(config, PAIRS, None, pretrained=True) == config
    for are_mined, expected in ((True, mined), (False, random)):
        if expected is not None:
            after = with_batches(config, mined=are_mined)
            assert (after.mining.method, after.loss.mask_suspects) == (
                "anybatch" if are_mined else "random",
                are_mined,
            )
            assert (after.loss.name, after.loss.weights) == expected
    named = replace(asked, mining=MINED)
    settled = with_recipe(named, PAIRS, None, pretrained=True).loss
    assert (settled.name, settled.weights, settled.mask_suspects) == (*mined, True)


def test_the_teacher_of_a_model_that_remembers(caplog):
    caplog.set_level("INFO", "anybatch")
    asked = replace(CONFIG, teacher=TEACHER)
    config = with_recipe(asked, PAIRS, None, pretrained=False)
    assert (config.mining.method, config.loss.name) == ("random", "cross_batch")
    assert "the teacher is not used: under the loss that is recommended here" in caplog.text
    negatives = replace(asked, mining=MiningConfig(num_negatives=2))  # random batches bring none
    assert with_recipe(negatives, PAIRS, None, pretrained=False).mining.method == "anybatch"
    plain = replace(asked, loss=LossConfig(name="infonce"))
    assert with_recipe(plain, PAIRS, None, pretrained=False).mining.method == "auto"
    chosen = replace(asked, mining=MiningConfig(method="random"))
    assert with_recipe(chosen, PAIRS, None, pretrained=False).loss.weights == "none"


@pytest.mark.skipif(find_spec("PIL") is None, reason="images need Pillow")
def test_images_are_not_mined_and_the_unused_teacher_is_named(caplog, tmp_path):
    caplog.set_level("INFO", "anybatch")
    pairs = PairData(anchors=ImageColumn.of_paths(["a.png", "b.png"], tmp_path, "pairs"), positives=["c", "d"])
    config = with_recipe(replace(CONFIG, teacher=TEACHER), pairs, None, pretrained=False)
    assert (config.mining.method, config.loss.name, config.loss.weights) == ("random", "count_corrected", "none")
    assert "the teacher is not used" in caplog.text


def test_what_is_given_beside_auto_holds():
    config = with_recipe(
        replace(CONFIG, loss=LossConfig(temperature=0.02, mask_suspects=True), mining=MINED, teacher=TEACHER),
        PAIRS,
        None,
        pretrained=False,
    )
    assert (config.loss.temperature, config.loss.mask_suspects, config.loss.weights) == (0.02, True, "inclusion")
    named = replace(CONFIG, loss=LossConfig(name="infonce"), teacher=TEACHER)
    assert with_recipe(named, PAIRS, None, pretrained=False).loss.name == "infonce"


def test_a_given_plan_says_whether_it_is_mined(tmp_path):
    path = str(tmp_path / "plan.safetensors")
    cluster = np.repeat(np.arange(4, dtype=np.int32), 2)
    plan = BatchPlan(num_rows=8, batch_size=4, cluster_size=2, cluster=cluster, seed=0, data_digest="")
    plan.save(path)
    assert (
        with_recipe(replace(CONFIG, plan=path), PAIRS, BatchPlan.load(path), pretrained=False).loss.weights
        == "inclusion"
    )


def test_mined_batches_are_weighed_and_masked_for_any_loss_unless_told_otherwise(caplog):
    caplog.set_level("INFO", "anybatch")
    mined = replace(CONFIG, mining=MINED, teacher=TEACHER)
    settled = [
        with_recipe(replace(mined, loss=LossConfig(**given)), PAIRS, None, pretrained=False).loss
        for given in (
            {"name": "infonce"},
            {"name": "sogclr"},
            {"weights": "none", "mask_suspects": False},
        )
    ]
    expected = [("none", True), ("inclusion", True), ("none", False)]
    assert [(loss.weights, loss.mask_suspects) for loss in settled] == expected
    assert "loss.mask_suspects=true (what mining suspects is no negative)" in caplog.text


def test_what_nobody_settled_is_refused():
    with pytest.raises(AnybatchError, match="Name a method here"):
        build_loss(LossConfig(), num_rows=8)
    with pytest.raises(AnybatchError, match=r"loss.gamma is given, which the recommended loss .* it is for .*sogclr"):
        LossConfig(gamma=0.5)


def test_what_random_batches_do_not_use_is_named(pairs_file, tmp_path, caplog):
    paths = (str(tmp_path / "a.npy"), str(tmp_path / "p.npy"))
    mining = MiningConfig(method="random", window=(3, 9), margin=None)
    config = replace(CONFIG, data=DataConfig(path=str(pairs_file)), batch_size=8, mining=mining)
    config = replace(config, teacher=TeacherConfig(embeddings=paths))
    check_start(config, read_training_pairs(config), existing_plan(config))
    assert "Not used: mining.window, mining.margin, teacher.embeddings. mining.method is 'random'" in caplog.text
