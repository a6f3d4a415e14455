"""Published runs: what --recipe b3 sets and what it leaves, and the example files, read and checked."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anybatch.cli.options import RunOptions
from anybatch.core.errors import AnybatchError
from anybatch.core.yaml_files import load_config, to_yaml
from anybatch.integrations.sentence_transformers.arguments import optimizer_of
from anybatch.losses.registry import build_loss
from anybatch.run.config import RunConfig, resolved
from anybatch.run.read_data import read_held_out, read_training_pairs
from anybatch.vision.mmeb import TASKS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def mmeb(tmp_path_factory):
    sys.path.insert(0, str(EXAMPLES))
    from synthetic_mmeb import write_mmeb

    sys.path.remove(str(EXAMPLES))
    folder = tmp_path_factory.mktemp("mmeb")
    write_mmeb(folder, 12)
    return folder


def configure(folder: Path, *sets: str, **options) -> RunConfig:
    given = {"output": "out", "data": str(folder / "train"), "images": str(folder / "images"), "model": "m"}
    return RunOptions(**{**given, "teacher": "t", "recipe": "b3", **options}, sets=list(sets)).resolve()


def test_the_table_has_mmebs_tasks():
    assert len({name.replace("ImageNet_1K", "ImageNet-1K") for name in TASKS}) == 36
    kinds = list(TASKS.values())
    assert [kinds.count(kind) for kind in ("classification", "vqa", "retrieval", "grounding")] == [11, 10, 12, 4]


def test_b3_is_the_papers_run(mmeb):
    config = resolved(configure(mmeb))
    mining = config.mining
    settled = mining.settled()
    assert (mining.method, mining.batch_size, settled.cluster_size) == ("published", 1024, 32)
    assert (mining.num_negatives, mining.mixing, settled.margin) == (5, "within", None)
    assert (config.loss.name, config.loss.temperature, config.loss.direction) == ("infonce", 0.02, "one_way")
    assert (config.loss.weights, config.loss.mask_suspects) == ("none", False)
    assert config.model.lora is not None
    assert (config.model.lora["r"], config.train.args["max_steps"], config.train.learning_rate) == (8, 2000, 1e-4)
    by_name = {of_set.name: (of_set.window, of_set.positive_prompt) for of_set in config.data.sets}
    assert by_name == {
        "A-OKVQA": ((70, 100), "Represent the answer: "),
        "CIRR": ((30, 100), ""),
        "ImageNet_1K": (None, "Represent the class label: "),
        "MSCOCO": ((30, 100), ""),
        "MSCOCO_i2t": ((30, 100), "Represent the image caption: "),
        "MSCOCO_t2i": ((30, 100), ""),
    }
    assert all("original" in of_set.path for of_set in config.data.sets)
    window, _ = settled.window_for(50_000, 1_000)  # of labels: 30% of them
    assert (window.skip, window.take) == (0, 300)
    assert load_config(RunConfig, written(config)) == config, "a run is resumed without the recipe"


def written(config: RunConfig) -> Path:
    path = Path("config.yaml")
    path.write_text(to_yaml(config))
    return path


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_the_user_sets_holds(mmeb):
    config = configure(
        mmeb, "model.lora={r: 16}", "mining.window=[5, 50]", "train.args.max_steps=3", "loss.name=sogclr", batch_size=64
    )
    assert config.model.lora is not None
    assert (config.model.lora["r"], config.model.lora["lora_alpha"]) == (16, 64)
    assert {of_set.window for of_set in config.data.sets} == {None}
    assert config.mining.window == (5, 50)
    assert (config.train.args["max_steps"], config.loss.name, config.loss.temperature) == (3, "sogclr", 0.02)
    assert resolved(config).mining.settled().cluster_size == 32
    assert configure(mmeb, "model.lora=null").model.lora is None
    path = str(mmeb / "train" / "CIRR" / "original-00000-of-00001.parquet")
    own = f"data.sets=[{{path: {path}, name: CIRR, window: [1, 2]}}, {{path: {path}, name: shop}}]"
    config = configure(mmeb, own, data=None)
    assert [(of_set.name, of_set.window) for of_set in config.data.sets] == [("CIRR", (1, 2)), ("shop", None)]


def test_tasks_that_are_none_of_mmebs_are_named(mmeb, caplog):
    caplog.set_level("INFO", "anybatch")
    configure(mmeb)
    assert "Recipe b3: batch_size=1024" in caplog.text
    assert "Not tasks of MMEB" not in caplog.text
    path = mmeb / "train" / "CIRR" / "original-00000-of-00001.parquet"
    configure(mmeb, f"data.sets=[{{path: {path}, name: shop}}]", data=None)
    assert "Not tasks of MMEB: shop. Their windows follow" in caplog.text


def test_an_unknown_recipe_is_refused(mmeb):
    with pytest.raises(AnybatchError, match="--recipe is 'b4'; expected one of: b3"):
        configure(mmeb, recipe="b4")


def test_prompts_of_targets_reach_training_and_evaluation(mmeb):
    config = configure(mmeb, "batch_size=4", "mining.cluster_size=4", f"evaluation.path={mmeb / 'eval'}")
    pairs = read_training_pairs(config)
    first = {part.name: sum(other.num_rows for other in pairs.sets[:place]) for place, part in enumerate(pairs.sets)}
    positives = pairs.prompted[1]
    assert positives[first["ImageNet_1K"]].text.startswith("Represent the class label: a ")
    assert positives[first["A-OKVQA"]].text.startswith("Represent the answer: ")
    held_out = read_held_out(config)
    texts = {
        name: {"" if isinstance(value, str) else "image" for value in part.candidates}
        for name, part in held_out.sets.items()
    }
    assert texts["CIRR"] == {"image"}
    assert {text.partition(":")[0] for text in held_out.sets["ImageNet_1K"].candidates} == {"Represent the class label"}
    plain = read_held_out(replace(config, data=replace(config.data, sets=(), path=str(mmeb / "train"))))
    assert not any(text.startswith("Represent") for text in plain.sets["ImageNet_1K"].candidates)
    assert plain.digest != held_out.digest


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_example_files_are_whole_and_their_losses_compute(name):
    config = resolved(load_config(RunConfig, EXAMPLES / name))
    loss = build_loss(config.loss, num_rows=500)
    two_way = config.data.views is None
    rows = torch.randn(2, 8, 6, requires_grad=True)
    loss(rows[0], rows[1], index=torch.arange(8)).backward()
    assert loss.direction == "both" if two_way else config.loss.gamma == 0.9
    assert [name for name, _ in loss.named_parameters()] == (["temperatures.log_temperature"] if two_way else [])
    if config.train.optimizer != "adamw":
        assert optimizer_of(config.train) is not None
