"""Image-caption pairs through the command line: mine, inspect, train, resume. The files are made as docs/images.md
makes them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anybatch.core.errors import AnybatchError
from anybatch.data.images import EncodedImage
from anybatch.data.reading import read_pairs
from anybatch.insight import plan_page
from anybatch.integrations.sentence_transformers.embed import embed_texts
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
from anybatch.plans.plan import BatchPlan
from tests.cli.test_cli import run
from tests.images import image, save_clip, save_pairs

COUNT = 40


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pairs(tmp_path_factory.mktemp("pairs") / "images", [*range(COUNT - 2), 3, 4])


def settings(saved, output, *more):
    mined = ("mining.method=anybatch", "mining.cluster_size=4", "mining.window=[2, 8]", "mining.conflict_weight=0")
    chosen = (*mined, *more)
    data = ("--data", str(saved), "--anchor", "image", "--positive", "caption", "--batch-size", "8")
    return [*data, "--output", str(output), *(item for value in chosen for item in ("--set", value))]


def write_files(folder, numbers, name="pairs.jsonl"):
    """Images as files in `folder`/files, and a file of pairs that names them."""
    (folder / "files").mkdir(parents=True, exist_ok=True)
    for row, number in enumerate(numbers):
        (folder / "files" / f"{row}.png").write_bytes(image(number))
    rows = [{"image": f"files/{row}.png", "caption": f"a dot at place {row}"} for row in range(len(numbers))]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def vectors(folder):
    """A joint space: what an image shows, and a little noise on each side."""
    generator = np.random.default_rng(0)
    truth = generator.normal(size=(COUNT, 8))
    paths = []
    for side in ("anchor", "positive"):
        rows = (truth + 0.4 * generator.normal(size=truth.shape)).astype(np.float32)
        rows[[-2, -1]] = rows[[3, 4]]
        paths.append(folder / f"{side}.npy")
        np.save(paths[-1], rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return [f"teacher.embeddings={json.dumps([str(path) for path in paths])}"]


def test_mining_from_embeddings_decodes_nothing(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(EncodedImage, "decode", lambda self: pytest.fail("decoded"))
    run("mine", *settings(saved, tmp_path / "run", *vectors(tmp_path)))
    plan = BatchPlan.load(tmp_path / "run" / "plan.safetensors")
    assert plan.num_rows == COUNT
    for same in ({3, COUNT - 2}, {4, COUNT - 1}):
        first, second = same
        assert plan.cluster[first] != plan.cluster[second]  # the same image is never put beside itself


def test_mining_with_a_model_and_looking_at_the_plan(saved, clip_folder, tmp_path, heard, monkeypatch):
    run("mine", *settings(saved, tmp_path / "run"), "--teacher", str(clip_folder))
    assert np.load(tmp_path / "run" / "teacher_anchor.npy").shape == (COUNT, 16)
    run("inspect", "plan", str(tmp_path / "run"), "--html", str(tmp_path / "plan.html"))
    said = heard()
    assert "Not shown" not in said
    assert re.search(r"row (\d+) anchor: \[image 2[04]x(20|16), row \1\]", said)
    assert re.search(r"own positive: a (red|green|blue|black|white) ", said)
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    images = re.findall(r'<img src="data:image/jpeg;base64,[\w+/=]+" alt="\[image 2[04]x\d\d, row (\d+)\]"', page)
    assert len(images) == page.count("<img") >= 10
    assert "Suspected false negatives" in page
    monkeypatch.setattr(plan_page, "IMAGE_CHARACTERS", 3000)  # a page stays small: then images are named
    run("inspect", "plan", str(tmp_path / "run"), "--html", str(tmp_path / "small.html"))
    small = (tmp_path / "small.html").read_text(encoding="utf-8")
    assert 1 <= small.count("<img") <= 5
    assert "[image 20x20, row " in re.sub("<img[^>]*>", "", small)


def test_prompts_are_for_texts(saved, clip_folder, tmp_path):
    teacher = f"teacher.name={clip_folder}"
    for given in (["model.anchor_prompt=see", *vectors(tmp_path)], ["teacher.anchor_prompt=see", teacher]):
        with pytest.raises(AnybatchError, match=r"anchor_prompt is set, and the anchors are images"):
            run("mine", *settings(saved, tmp_path / "run", *given))
        assert not (tmp_path / "run").exists()


def test_paths_in_a_file(clip_folder, tmp_path):
    given = settings(write_files(tmp_path, range(20)), tmp_path / "run")
    run("mine", *given, "--teacher", str(clip_folder))
    assert np.load(tmp_path / "run" / "teacher_anchor.npy").shape == (20, 16)


def test_training_resumes_and_evaluates(saved, clip_folder, tmp_path):
    more = (
        *(
            "mining.num_negatives=1",
            "train.epochs=2",
            "train.save_steps=3",
            "train.args.logging_steps=1",
            "model.device=cpu",
        ),
        *("train.mini_batch_size=3", "train.learning_rate=0.001", f"evaluation.path={saved}"),
        *vectors(tmp_path),
    )
    whole = [*settings(saved, tmp_path / "whole", *more), "--model", str(clip_folder)]
    run("train", *whole)
    result = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert result["num_steps"] == 10
    assert 0 < result["metrics"]["recall@10"] <= 1
    assert result["metrics"] != result["metrics_untrained"]
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    for name in ("model", "metrics.json"):
        shutil.rmtree(parts / name) if name == "model" else (parts / name).unlink()
    for folder in (parts / "checkpoints").iterdir():  # as after a kill in step 8
        if int(folder.name.removeprefix("checkpoint-")) > 6:
            shutil.rmtree(folder)
    run("train", *settings(saved, parts, *more), "--model", str(clip_folder), "--resume")
    first, second = (
        load_file(next(Path(folder / "model").rglob("model.safetensors"))) for folder in (tmp_path / "whole", parts)
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    before = load_file(next(clip_folder.rglob("model.safetensors")))
    changed = [name for name, tensor in first.items() if not torch.equal(tensor, before[name])]
    assert any("vision_model" in name for name in changed)
    assert any("text_model" in name for name in changed)


def test_files_of_images_are_named_to_every_verb(clip_folder, tmp_path):
    columns = ["--data", str(write_files(tmp_path, range(20))), "--anchor", "image", "--positive", "caption"]
    run("evaluate", str(clip_folder), *columns, "--images", str(tmp_path), "--output", str(tmp_path / "images.json"))
    run("evaluate", str(clip_folder), *columns, "--output", str(tmp_path / "found.json"))
    run("evaluate", str(clip_folder), *columns, "--images", "", "--output", str(tmp_path / "names.json"))
    images, found, names = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("images", "found", "names")
    )
    assert found == images  # paths of files that exist are images, also where nobody says so
    assert names != images
    given = settings(tmp_path / "pairs.jsonl", tmp_path / "run")
    run("mine", *given, "--images", str(tmp_path), "--teacher", str(clip_folder))
    shutil.copy(tmp_path / "run" / "plan.safetensors", tmp_path / "copy.safetensors")
    run("inspect", "plan", str(tmp_path / "copy.safetensors"), *columns, "--images", str(tmp_path))


def test_images_as_hard_negatives(saved, clip_folder, tmp_path):
    more = (
        "mining.num_negatives=1",
        "train.args.logging_steps=1",
        "model.device=cpu",
        "train.mini_batch_size=auto",
        *vectors(tmp_path),
    )
    given = settings(saved, tmp_path / "run", *more)
    sides = {"image": "caption", "caption": "image"}
    run("train", *(sides.get(value, value) for value in given), "--model", str(clip_folder))
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == COUNT // 8
    assert all(0 < json.loads(line)["loss"] < 10 for line in lines)
    plan = BatchPlan.load(tmp_path / "run" / "plan.safetensors")
    assert plan.negatives_per_row == 1
    run("doctor", *(sides.get(value, value) for value in given[:8]), "--model", str(clip_folder))


def test_broken_images_are_refused_before_anything_is_done(clip_folder, tmp_path):
    path = write_files(tmp_path, range(20))
    (tmp_path / "files" / "7.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "files" / "9.png").write_bytes(image(9)[:60])
    given, model = settings(path, tmp_path / "run"), str(clip_folder)
    named = r"image in row 8, 'image' of .*7\.png\) cannot be decoded .*In all 2 rows are refused: 8, 10\."
    for verb in (
        ("mine", *given, "--teacher", model),
        ("train", *given, "--teacher", model, "--model", model),
        ("doctor", "--data", str(path), "--anchor", "image", "--positive", "caption", "--model", model),
        ("evaluate", model, "--data", str(path), "--anchor", "image", "--positive", "caption"),
    ):
        with pytest.raises(AnybatchError, match=named):
            run(*verb)
    fine = write_files(tmp_path / "fine", range(20))
    columns = ("--anchor", "image", "--positive", "caption", "--batch-size", "8", "--output", str(tmp_path / "run"))
    with pytest.raises(AnybatchError, match=named):  # of what is held out as well
        run("train", "--data", str(fine), *columns, "--teacher", model, "--model", model, "--eval", str(path))
    assert not (tmp_path / "run").exists()


def test_held_out_data_that_the_model_does_not_read_are_refused_before_mining(saved, clip_folder, tmp_path):
    (tmp_path / "both.jsonl").write_text('{"image": {"text": "a dot", "image": "files/0.png"}, "caption": "a dot"}\n')
    write_files(tmp_path, range(2))
    sides = ("--model", str(clip_folder), "--teacher", str(clip_folder), "--eval", str(tmp_path / "both.jsonl"))
    with pytest.raises(AnybatchError, match="images with texts in one input, and the model takes one of them"):
        run("train", *settings(saved, tmp_path / "run"), *sides)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_texts_embeds_no_captions_of_images(saved, tiny_model_folder, clip_folder, tmp_path):
    given = [
        "caption" if value == "image" else "image" if value == "caption" else value
        for value in settings(saved, tmp_path / "run")
    ]
    with pytest.raises(AnybatchError, match="holds images, and the model takes text only"):
        run("train", *given, "--model", str(clip_folder), "--teacher", str(tiny_model_folder))
    assert not list((tmp_path / "run").glob("teacher_*"))


def test_the_teacher_has_its_own_kwargs(saved, clip_folder, tmp_path):
    """The embeddings that the loader's and the processor's settings give; files of others are refused."""
    kwargs = {"dtype": "float64", "processor": {"image_mean": [0.1, 0.2, 0.3]}}
    given = settings(saved, tmp_path / "run", f"teacher.kwargs={json.dumps(kwargs)}")
    run("mine", *given, "--teacher", str(clip_folder))
    found = np.load(tmp_path / "run" / "teacher_anchor.npy")
    pairs = read_pairs(saved, anchor="image", positive="caption")
    model = load_model(ModelConfig(name=str(clip_folder), kwargs=kwargs, device="cpu"))
    assert next(model.parameters()).dtype == torch.float64
    np.testing.assert_allclose(found, embed_texts(model, pairs.anchors, side="query"), atol=1e-6)
    plain = load_model(ModelConfig(name=str(clip_folder), device="cpu"))
    assert np.abs(found - embed_texts(plain, pairs.anchors, side="query")).max() > 0.01
    record = json.loads((tmp_path / "run" / "teacher_anchor.npy.origin").read_text())
    assert record["identity"]["kwargs"] == kwargs


def test_held_out_images_have_their_own_root(clip_folder, tmp_path):
    """The same paths below two folders: the training's and the evaluation's."""
    data = write_files(tmp_path / "data", range(20))
    held_out = write_files(tmp_path / "held", range(20, 36))
    figures = {}
    for name, folder in (("own", "held"), ("training's", "data")):
        output = tmp_path / name
        given = [*settings(data, output), "--images", str(tmp_path / "data"), "--eval", str(held_out)]
        more = [f"evaluation.images={tmp_path / folder}", "mining.method=random", "train.args.max_steps=1"]
        run("train", *given, "--model", str(clip_folder), *(item for value in more for item in ("--set", value)))
        figures[name] = json.loads((output / "metrics.json").read_text())["metrics_untrained"]
    run(
        "evaluate", str(clip_folder), "--data", str(held_out), "--anchor", "image", "--positive", "caption",
        "--set", "model.kwargs={dtype: float32}", "--output", str(tmp_path / "alone.json"),
    )  # fmt: skip
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert figures["own"] == alone != figures["training's"]
    with pytest.raises(AnybatchError, match=r"evaluation\.images is given, .* names no data"):
        run("train", *settings(data, tmp_path / "x"), "--model", "m", "--set", "evaluation.images=held")
    with pytest.raises(AnybatchError, match=r"Got --set loss\.name=infonce; expected a setting of the model"):
        run("evaluate", str(clip_folder), "--data", str(held_out), "--set", "loss.name=infonce")
