"""Images without labels through the command line: train, resume, mine, evaluate, doctor; two ranks; what is refused."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anybatch.core.errors import AnybatchError
from anybatch.plans.plan import BatchPlan
from tests.cli.test_cli import run
from tests.cli.test_train_ranks import launch
from tests.images import image

PAGE = Path(__file__).parents[2] / "docs" / "images.md"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders, train and test, of four classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(48):
        place = folder / ("train" if number < 32 else "test") / f"class {number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(image(number))
    return folder


def settings(pictures, output, *more):
    values = ("loss.name=sogclr", "loss.temperature=0.1", "train.learning_rate=3e-3", "train.epochs=2", "seed=3")
    values += ("train.mini_batch_size=3", "train.args.logging_steps=1", "train.save_steps=4", "model.device=cpu", *more)
    given = ("--data", str(pictures / "train"), "--views", "2", "--model", "small-resnet", "--batch-size", "8")
    return [*given, "--output", str(output), *(item for value in values for item in ("--set", value))]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    more = (f"evaluation.path={pictures / 'test'}", "train.eval_steps=4")
    run("train", *settings(pictures, folder, *more))
    return folder


def test_training_measures_and_drops_the_head(trained, pictures, heard, tmp_path):
    figures = json.loads((trained / "metrics.json").read_text())
    assert figures["num_steps"] == 8
    for part in ("metrics", "metrics_untrained"):
        assert figures[part].keys() == {"knn", "linear"}
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_knn" in line] == [4, 8]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    cosine = [3e-3 * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)]
    assert rates == pytest.approx([0, *cosine])
    kinds = [part["type"] for part in json.loads((trained / "model" / "modules.json").read_text())]
    assert kinds == ["anybatch.vision.encoders.SmallResNet"]
    sides = ("--labelled", str(pictures / "train"), "--data", str(pictures / "test"))
    run("evaluate", str(trained / "model"), *sides, "--output", str(tmp_path / "figures.json"))
    assert json.loads((tmp_path / "figures.json").read_text()) == pytest.approx(figures["metrics"])
    assert "linear probe" in heard()


def test_killed_and_resumed_equals_uninterrupted(trained, tmp_path):
    killed = tmp_path / "killed"
    shutil.copytree(trained, killed)
    for name in ("metrics.json", "model", "checkpoints/checkpoint-8"):
        path = killed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run("train", "--resume", "--output", str(killed))
    for name, value in weights(trained).items():
        assert torch.equal(weights(killed)[name], value), name
    assert (killed / "log.jsonl").read_text() == (trained / "log.jsonl").read_text()


def test_the_schedule_and_lars(pictures, tmp_path):
    more = (
        "train.optimizer=lars",
        "train.learning_rate=0.5",
        "train.args.lr_scheduler_type=linear",
        "train.args.warmup_steps=0",
    )
    run("train", *settings(pictures, tmp_path / "run", *more))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.5 * k / 8 for k in range(8, 0, -1)])
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=False)
    assert {group["trust_coefficient"] for group in state["param_groups"]} == {1e-3}


def test_mining_with_one_column(pictures, tmp_path, heard):
    more = ("mining.method=anybatch", "mining.cluster_size=4", "mining.window=[1, 6]", "mining.num_negatives=1")
    run("train", *settings(pictures, tmp_path / "run", *more), "--teacher", "small-resnet")
    plan = BatchPlan.load(tmp_path / "run" / "plan.safetensors")
    assert plan.negatives.shape == (32, 1)
    assert not (tmp_path / "run" / "teacher_positive.npy").exists()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(
        14 < line["num_negatives"] <= 14 + 16 for line in lines
    )  # both views of the others, and of a negative each
    run("inspect", "plan", str(tmp_path / "run"))
    assert "[image 20x20, row" in heard()


def test_doctor(pictures, heard):
    run(
        "doctor",
        "--data",
        str(pictures / "train"),
        "--views",
        "2",
        "--model",
        "small-resnet",
        "--set",
        "loss.name=sogclr",
    )
    assert "Exact" in heard()


def test_the_page(pictures, tmp_path, monkeypatch):
    """The commands of docs/images.md, with a small model and few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(pictures)
    [block] = [
        code
        for code in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        if "--views" in code
    ]
    smaller = {
        "facebook/dinov2-small": "small-resnet",
        "256": "8",
        "epochs=100": "epochs=1",
        "eval_steps=500": "eval_steps=2",
    }
    for name, value in smaller.items():
        assert name in block
        block = block.replace(name, value)
    _, train, evaluate = block.replace("\\\n", " ").strip().splitlines()
    for line in (train, evaluate):
        program, *arguments = shlex.split(line)
        assert program == "anybatch"
        run(*arguments)


@pytest.mark.distributed
def test_two_ranks_equal_one(pictures, tmp_path):
    """By LARS, whose steps do not magnify rounding as Adam's do."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("train.optimizer=lars", "train.learning_rate=0.5")
    run("train", *settings(pictures, one, *more))
    launch("train", *settings(pictures, two, *more))
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("data.views is 3; expected 2", ("--views", "3")),
        ("no file named as an image", ("--data", "EMPTY")),
        ("data.positive is given, and data.views", ("--positive", "caption")),
        ("have no classes, by which a model is measured", ("--set", "evaluation.path=FLAT")),
        ("no column 'photo' in it", ("--anchor", "photo")),
        ("evaluation.images is given, .* holds no such paths", ("--eval", "FLAT", "--set", "evaluation.images=x")),
        ("has 32 rows, fewer than one batch of 64", ("--batch-size", "64")),
    ],
)
def test_refused(message, arguments, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "FLAT": pictures / "test" / "class 0"}
    for name, place in places.items():
        arguments = [value.replace(name, str(place)) for value in arguments]
    with pytest.raises(AnybatchError, match=message):
        run("train", *settings(pictures, tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_evaluate_refuses(pictures, trained):
    with pytest.raises(AnybatchError, match=r"Nothing to measure on: .* Give --data"):
        run("evaluate", str(trained / "model"), "--labelled", str(pictures / "train"))
    sides = ("--labelled", str(pictures / "train"), "--data", str(pictures / "test"))
    with pytest.raises(AnybatchError, match="Got --positive and --labelled"):
        run("evaluate", str(trained / "model"), *sides, "--positive", "caption")
