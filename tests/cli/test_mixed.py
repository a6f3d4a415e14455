"""A mixture whose sides are texts, images or both, with rows of fewer negatives, through every verb."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anybatch.core.errors import AnybatchError
from anybatch.data.inputs import MixedColumn
from anybatch.data.reading import read_pairs
from anybatch.integrations.sentence_transformers.embed import embed_texts
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model, side_inputs
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import DataConfig
from anybatch.run.read_data import read_data
from anybatch.run.try_step import inputs_of, telling_rows
from tests.cli.test_cli import run
from tests.images import save_clip
from tests.mmeb import write_mmeb
from tests.vision_models import folder_of

ROWS = 12


@pytest.fixture(scope="module")
def mmeb(tmp_path_factory):
    return write_mmeb(tmp_path_factory.mktemp("mmeb"), ROWS)


@pytest.fixture(scope="module")
def chat_model():
    return str(folder_of("qwen2vl"))


def settings(mmeb, output, *more):
    mined = ("mining.method=anybatch", "mining.cluster_size=2", "mining.window=[0, 2]", "mining.conflict_weight=0")
    data = ("--data", str(mmeb / "train"), "--images", str(mmeb / "images"), "--batch-size", "4")
    chosen = (*mined, "model.device=cpu", *more)
    return [*data, "--output", str(output), *(item for value in chosen for item in ("--set", value))]


def vectors(folder):
    """Embeddings of six tasks' rows, in which the sides of a pair are near."""
    truth = np.random.default_rng(0).normal(size=(6 * ROWS, 8))
    paths = [folder / f"{side}.npy" for side in ("anchor", "positive")]
    for seed, path in enumerate(paths, start=1):
        rows = truth + 0.3 * np.random.default_rng(seed).normal(size=truth.shape)
        np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    return [f"teacher.embeddings={json.dumps([str(path) for path in paths])}"]


def test_mined_and_looked_at(mmeb, chat_model, tmp_path, heard):
    run("mine", *settings(mmeb, tmp_path / "run"), "--teacher", chat_model)
    plan = BatchPlan.load(tmp_path / "run" / "plan.safetensors")
    assert plan.task_names == ("A-OKVQA", "CIRR", "ImageNet_1K", "MSCOCO", "MSCOCO_i2t", "MSCOCO_t2i")
    embedded = np.load(tmp_path / "run" / "teacher_anchor.npy")
    model = load_model(ModelConfig(name=chat_model, device="cpu"))
    pairs = read_data(DataConfig(path=str(mmeb / "train"), images=str(mmeb / "images")))
    written = []  # as one would write the inputs for sentence-transformers
    for row in pairs.anchors:
        text = row.text.removeprefix("<|image_1|>\n")
        written.append({"image": row.images[0].decode(), "text": text} if row.images else text)
    assert sum(isinstance(value, str) for value in written) == ROWS
    alone = np.stack([model.encode_query(value, normalize_embeddings=True) for value in written])
    np.testing.assert_allclose(embedded, alone, atol=2e-6)
    run("inspect", "plan", str(tmp_path / "run"), "--html", str(tmp_path / "plan.html"))
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    if "Suspected false negatives" in page:
        assert page.count("<img") > 0
        assert "Represent the given image" in page
    assert len(BatchPlan.load(tmp_path / "run" / "plan.safetensors").digest) == 32
    (mmeb / "images" / "CIRR" / "new.png").write_bytes(b"not named in any row")
    run("inspect", "plan", str(tmp_path / "run"))


def test_training_resumes(mmeb, chat_model, tmp_path):
    more = (
        *("mining.num_negatives=1", "train.epochs=1", "train.save_steps=4", "train.args.logging_steps=1"),
        *("train.mini_batch_size=3", "train.learning_rate=0.001", *vectors(tmp_path)),
    )
    whole = [*settings(mmeb, tmp_path / "whole", *more), "--model", chat_model]
    run("train", *whole)
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    shutil.rmtree(parts / "model")
    (parts / "metrics.json").unlink()
    steps = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in (parts / "checkpoints").iterdir())
    for step in steps[1:]:  # as after a kill
        shutil.rmtree(parts / "checkpoints" / f"checkpoint-{step}")
    run("train", *settings(mmeb, parts, *more), "--model", chat_model, "--resume")
    first, second = (
        load_file(next((folder / "model").rglob("model.safetensors"))) for folder in (tmp_path / "whole", parts)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len({line["num_negatives"] for line in log if "num_negatives" in line}) > 1  # as rows have them
    held_out = mmeb / "train" / "CIRR" / "original-00000-of-00001.parquet"
    figures = ["--data", str(held_out), "--images", str(mmeb / "images"), "--output", str(tmp_path / "figures.json")]
    run("evaluate", str(tmp_path / "whole" / "model"), *figures)
    assert json.loads((tmp_path / "figures.json").read_text())["num_queries"] == ROWS


def test_doctor(mmeb, chat_model, heard):
    data = ["--data", str(mmeb / "train" / "CIRR"), "--images", str(mmeb / "images")]
    run("doctor", *data, "--model", chat_model, "--rows", "8", "--set", "loss.name=infonce")
    assert "Exact: the cached step gives the plain step's gradient." in heard()


def test_first_rows_as_written_by_hand(mmeb, chat_model):
    pairs = read_pairs(mmeb / "train" / "CIRR", images=mmeb / "images")
    model = load_model(ModelConfig(name=chat_model, device="cpu"))
    inputs = inputs_of(model, pairs, np.arange(6))
    columns = [MixedColumn.of(column) for column in (pairs.anchors, pairs.positives, *pairs.negatives)]
    there = [[row for row in range(6) if column[row] is not None] for column in columns]
    assert [len(rows) for rows in there] != [6] * len(columns)
    kept = [(column, rows) for column, rows in zip(columns, there, strict=True) if rows]
    for place, ((column, rows), found) in enumerate(zip(kept, inputs, strict=True)):
        by_hand = [
            {"image": column[row].images[0].decode(), "text": column[row].text.removeprefix("<|image_1|>\n")}
            for row in rows
        ]
        expected = side_inputs(model, by_hand, "document" if place else "query")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


def test_a_model_of_one_kind_at_a_time(mmeb, tmp_path):
    clip = save_clip(tmp_path)
    given = ["--data", str(mmeb / "train" / "CIRR"), "--images", str(mmeb / "images"), "--batch-size", "4"]
    with pytest.raises(AnybatchError, match="holds images with texts in one input, and the model takes one"):
        run(
            "mine", *given, "--output", str(tmp_path / "run"), "--teacher", str(clip), "--set", "mining.method=anybatch"
        )
    rows = [{"query": "a red circle"}, {"query_image": "MSCOCO_t2i/{}"}, {"query": "a place"}]
    file = next((mmeb / "images" / "MSCOCO_t2i").iterdir())
    rows[1]["query_image"] = f"MSCOCO_t2i/{file.name}"
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": "", "pos": "p", **row}) + "\n" for row in rows))
    column = read_pairs(path, images=mmeb / "images").anchors
    model = load_model(ModelConfig(name=str(clip), device="cpu"))
    embedded = embed_texts(model, column)
    alone = [model.encode(value, normalize_embeddings=True) for value in ("a red circle", column[1].images[0].decode())]
    np.testing.assert_allclose(embedded[:2], np.stack(alone), atol=1e-6)


def test_late_images_are_tried_before_anything_is_done(mmeb, tiny_model_folder, tmp_path, chat_model):
    """Images of the anchors from row 9 on, of the positives in row 11: a model is refused before the folder is made."""
    file = next((mmeb / "images" / "MSCOCO_t2i").iterdir())
    rows = [{"query": f"mata {row}", "query_image": "", "pos": f"grao {row}", "pos_image": ""} for row in range(12)]
    for row in (8, 9, 10, 11):
        rows[row]["query_image"] = str(file)
    rows[9]["query"], rows[11]["pos_image"] = "", [str(file), str(file)]
    path, output = tmp_path / "pairs.jsonl", tmp_path / "run"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = ["--data", str(path), "--batch-size", "4", "--output", str(output), "--set", "model.device=cpu"]
    for model, match in (
        (tiny_model_folder, "holds images with texts in one input"),
        (save_clip(tmp_path), "holds images with texts in one input"),
    ):
        with pytest.raises(AnybatchError, match=match):
            run("train", *given, "--model", str(model))
        with pytest.raises(AnybatchError, match=match):
            run("doctor", *given[:4], "--model", str(model))
    assert not output.exists()
    pairs = read_pairs(path)
    (tried,) = telling_rows(load_model(ModelConfig(name=chat_model, device="cpu")), pairs, 4)
    assert {8, 9, 11} <= set(tried.tolist())
    assert len(tried) == 4


def test_a_model_of_one_kind_at_a_time_trains_on_sets_of_one_kind(mmeb, tmp_path):
    clip, files = save_clip(tmp_path), sorted((mmeb / "images" / "MSCOCO_t2i").iterdir())
    for name, key in (("texts", "query"), ("images", "query_image")):
        cells = {
            "query": [f"a red bar {row}" for row in range(8)],
            "query_image": [str(files[row]) for row in range(8)],
        }
        rows = [{key: cells[key][row], "pos": f"at place {row}"} for row in range(8)]
        (tmp_path / "sets").mkdir(exist_ok=True)
        (tmp_path / "sets" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--data", str(tmp_path / "sets"), "--model", str(clip), "--batch-size", "4", "--set", "model.device=cpu"]
    given += ["--set", "train.args.max_steps=3"]
    run("train", *given, "--output", str(tmp_path / "within"))
    with pytest.raises(AnybatchError, match="Some anchors are texts, others images, and this model reads each"):
        run("train", *given, "--output", str(tmp_path / "mixed"), "--set", "mining.mixing=mixed")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("loss", ["count_corrected", "cross_batch"])
def test_texts_with_fewer_negatives_in_some_rows(tiny_model_folder, tmp_path, loss):
    rows = [{"query": f"mata {row}", "pos": f"grao {row}", "neg": [f"sofis {row}"] * (row % 3)} for row in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = ["--data", str(path), "--model", str(tiny_model_folder), "--batch-size", "4", "--set", f"loss.name={loss}"]
    run(
        "train",
        *given,
        "--output",
        str(tmp_path / "run"),
        "--set",
        "train.args.logging_steps=1",
        "--set",
        "model.device=cpu",
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
