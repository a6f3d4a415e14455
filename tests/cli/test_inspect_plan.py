"""`anybatch inspect plan`: where it finds its data, and what it says when it does not."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from anybatch.core.errors import AnybatchError
from anybatch.core.files import read_json, write_json
from tests.insight.test_report import Checker

from .test_cli import run, settings


@pytest.fixture
def mined(pairs_file, tiny_model_folder, tmp_path):
    """A run's folder with a plan mined from embeddings kept elsewhere."""
    generator = np.random.default_rng(0)
    anchors = generator.normal(size=(97, 8)).astype(np.float32)
    for name, rows in (("a", anchors), ("p", anchors + 0.2 * generator.normal(size=(97, 8)).astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    more = (
        "mining.cluster_size=4",
        "mining.window=[3, 9]",
        "mining.conflict_weight=0",
        "loss.temperature=0.2",
        "loss.name=infonce",
    )
    vectors = f"teacher.embeddings=[{tmp_path}/a.npy, {tmp_path}/p.npy]"
    run("mine", *settings(pairs_file, tiny_model_folder, tmp_path / "run", *more, vectors))
    return tmp_path / "run"


def test_a_run_folder_has_everything(mined, tmp_path, heard, pairs_file):
    files = ["--html", str(tmp_path / "plan.html"), "--json", str(tmp_path / "plan.json")]
    run("inspect", "plan", str(mined), *files)
    said = heard()
    assert "Not shown" not in said
    gradient = "gradient, error of an epoch: infonce, mask_suspects=True"  # "auto", on mined batches
    for name in ("softmax mass in the batch", "suspected false negatives per anchor", gradient, "40% or more"):
        assert name in said
    assert "set loss.mask_suspects" not in said
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "Not shown" not in page
    assert "Suspected false negatives" in page
    figures = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert set(figures) == {"plan", "sets", "gradient", "warnings", "missing"}
    assert f"{figures['sets']['']['planned']['in_batch']:.1%}" in said
    (error,) = (line["error"] for line in figures["gradient"] if line["batches"] == "plan")
    assert f"{error['epoch_error']:.2f} ± {error['epoch_error_se']:.2f}" in said
    for option, file in (("--html", "plan"), ("--json", "plan")):
        with pytest.raises(AnybatchError, match=rf"plan\.{option[2:]} exists"):
            run("inspect", "plan", str(mined), option, str(tmp_path / f"{file}.{option[2:]}"))


def test_a_plan_alone_says_what_is_missing_and_which_option_gives_it(mined, tmp_path, heard, pairs_file):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(mined / "plan.safetensors", alone)
    run("inspect", "plan", str(alone / "plan.safetensors"))
    said = heard()
    for option in ("--data", "--embeddings ANCHORS.npy POSITIVES.npy"):
        assert option in said
    assert "mass in the batch" not in said
    more = ["--data", str(pairs_file), "--embeddings", str(tmp_path / "a.npy"), str(tmp_path / "p.npy")]
    run("inspect", "plan", str(alone), *more, "--temperature", "0.1", "--anchors", "50")
    said = heard()[len(said) :]
    assert "mass in the batch" in said
    assert "Not shown" not in said


def test_without_embeddings_the_warnings_of_mining_are_shown(mined, tmp_path, heard):
    for name in ("a", "p"):
        (tmp_path / f"{name}.npy").unlink()
    path = mined / "mining.json"
    stored = read_json(path, "")
    write_json(path, {**stored, "warnings": ["Look twice."]})
    run("inspect", "plan", str(mined))
    assert heard().count("Warning: Look twice.") == 1
    write_json(path, {**read_json(path, ""), "plan": "another"})
    said = heard()
    run("inspect", "plan", str(mined))
    assert "Look twice" not in heard()[len(said) :]


def test_data_that_the_run_names_but_that_is_gone(mined, heard, pairs_file):
    pairs_file.unlink()
    run("inspect", "plan", str(mined))
    said = heard()
    assert "Not shown: Texts: There is no file" in said
    assert "Repeated texts are not recognised" in said
    assert "mass in the batch" in said


def test_moved_data_is_read_in_the_columns_of_the_run(mined, heard, pairs_file, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_text(pairs_file.read_text().replace('"anchor"', '"question"').replace('"positive"', '"answer"'))
    config = (mined / "config.yaml").read_text()
    (mined / "config.yaml").write_text(
        config.replace("anchor: anchor", "anchor: question").replace("positive: positive", "positive: answer")
    )
    run("inspect", "plan", str(mined), "--data", str(moved))
    assert "Not shown" not in heard()


def test_what_is_given_must_fit(mined, tmp_path, pairs_file):
    other = tmp_path / "other.jsonl"
    other.write_text(pairs_file.read_text().replace("mata", "mato"))
    with pytest.raises(AnybatchError, match="made for other data"):
        run("inspect", "plan", str(mined), "--data", str(other))
    np.save(tmp_path / "short.npy", np.ones((96, 8), np.float32))
    with pytest.raises(AnybatchError, match=r"shape \(96, 8\); expected floats of shape \(97"):
        run("inspect", "plan", str(mined), "--embeddings", str(tmp_path / "a.npy"), str(tmp_path / "short.npy"))
    with pytest.raises(AnybatchError, match="There is no plan"):
        run("inspect", "plan", str(tmp_path / "absent"))


def test_teacher_embeddings_of_the_run(pairs_file, tiny_model_folder, tmp_path, heard):
    """A run that embedded its data itself."""
    folder = tmp_path / "run"
    more = ("mining.cluster_size=4", "mining.window=[1, 6]")
    given = settings(pairs_file, tiny_model_folder, folder, *more)
    run("mine", *given, "--teacher", str(tiny_model_folder))
    run("inspect", "plan", str(folder))
    said = heard()
    assert "Not shown" not in said
    assert "own positive first" in said


def test_several_data_sets_have_figures_of_their_own(pairs_file, tmp_path, heard):
    lines = pairs_file.read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:50]), ("second", lines[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sets = [{"path": str(tmp_path / "first.jsonl"), "window": [2, 9]}, {"path": str(tmp_path / "second.jsonl")}]
    generator = np.random.default_rng(0)
    anchors = generator.normal(size=(97, 8)).astype(np.float32)
    for name, rows in (("a", anchors), ("p", anchors + 0.2 * generator.normal(size=(97, 8)).astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    config = {
        "output": str(tmp_path / "run"),
        "data": {"sets": sets},
        "batch_size": 8,
        "teacher": {"embeddings": [str(tmp_path / "a.npy"), str(tmp_path / "p.npy")]},
        "mining": {"cluster_size": 4, "window": [3, 9], "margin": None, "conflict_weight": 0.0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    run("mine", "--config", str(tmp_path / "run.yaml"))
    run("inspect", "plan", str(tmp_path / "run"), "--html", str(tmp_path / "plan.html"))
    said = heard()
    assert said.count("Not shown: ") == 1
    assert "Not shown: The gradient's error: of several data sets" in said
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    for name in ("first", "second"):
        assert re.search(rf"^{name} *$", said, re.MULTILINE)
        assert f"<h2>{name}</h2>" in page
    assert said.count("mass in the batch") == 2
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
