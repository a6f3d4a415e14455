"""`anybatch evaluate` for images: classes by their names, recall both ways, hit@1 among own candidates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
from tests.cli.test_cli import run
from tests.images import COLOURS, caption, image, save_clip, save_pairs
from tests.vision_models import folder_of

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def figures(tmp_path, *arguments: str) -> dict[str, float]:
    path = tmp_path / f"figures{len(list(tmp_path.glob('figures*')))}.json"
    run("evaluate", *arguments, "--output", str(path))
    return json.loads(path.read_text())


@pytest.fixture
def classes(tmp_path):
    """Images in a folder for each colour."""
    for number in range(20):
        folder = tmp_path / "classes" / list(COLOURS)[number % 5]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(image(number))
    return tmp_path / "classes"


def test_classes_are_told_by_their_names(classes, clip_folder, tmp_path, heard):
    """As by hand, with two templates; other names give other figures."""
    templates = ["a {} dot", "a {} bar at place 1"]
    given = [word for text in templates for word in ("--template", text)]
    found = figures(tmp_path, str(clip_folder), "--data", str(classes), *given)
    model = load_model(ModelConfig(name=str(clip_folder)))
    names = sorted(COLOURS)
    texts = model.encode([text.replace("{}", name) for name in names for text in templates], normalize_embeddings=True)
    means = texts.reshape(5, 2, -1).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    from PIL import Image

    files = sorted(classes.rglob("*.png"))
    images = model.encode([Image.open(file).convert("RGB") for file in files], normalize_embeddings=True)
    right = [
        names[best] == file.parent.name for best, file in zip((images @ means.T).argmax(axis=1), files, strict=True)
    ]
    assert found == pytest.approx({"top1": np.mean(right), "top5": 1.0})
    assert "top-1" in heard()

    path = tmp_path / "names.yaml"
    path.write_text("".join(f"{name}: {other}\n" for name, other in zip(names, [*names[1:], names[0]], strict=True)))
    options = ("--data", str(classes), "--template", templates[0])
    other = figures(tmp_path, str(clip_folder), *options, "--class-names", str(path))
    assert other.keys() == found.keys()
    with pytest.raises(AnybatchError, match=r'Templates hold "{}".* One is \'a dot\''):
        run("evaluate", str(clip_folder), "--data", str(classes), "--template", "a dot")
    path.write_text("red: x\n")
    with pytest.raises(AnybatchError, match="4 of 5 classes have no name, such as 'black'"):
        run("evaluate", str(clip_folder), *options, "--class-names", str(path))


def test_captions_and_images_find_each_other_whichever_is_the_anchor(clip_folder, tmp_path, heard):
    numbers = list(range(24))
    there = save_pairs(tmp_path / "there", numbers)
    back = ("--anchor", "caption", "--positive", "image")
    found = figures(tmp_path, str(clip_folder), "--data", str(there), "--anchor", "image", "--positive", "caption")
    other = figures(tmp_path, str(clip_folder), "--data", str(there), *back)
    both = {f"{way}@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert both <= found.keys()
    assert {name: found[name] for name in both} == {name: other[name] for name in both}
    assert found["recall@1"] == found["i2t@1"], "24 images with a caption each"
    assert other["recall@1"] == found["t2i@1"]
    assert len({caption(number) for number in numbers}) == 24
    assert "i2t R@1" in heard()


def test_hit_at_1_of_each_task_and_their_mean(tmp_path, heard, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from synthetic_mmeb import WORDINGS, write_mmeb

    write_mmeb(tmp_path / "mmeb", 12)
    model, data = str(folder_of("llava")), ["--data", str(tmp_path / "mmeb" / "eval")]
    data += ["--images", str(tmp_path / "mmeb" / "images")]
    found = figures(tmp_path, model, *data)
    assert set(found) == {"hit@1", *(f"hit@1 {task}" for task in WORDINGS)}
    assert found["hit@1"] == pytest.approx(np.mean([hit for name, hit in found.items() if name != "hit@1"]))
    prompted = figures(tmp_path, model, *data, "--recipe", "b3")
    assert prompted["hit@1 CIRR"] == found["hit@1 CIRR"], "its targets have no prompt"
    one = figures(tmp_path, model, "--data", str(tmp_path / "mmeb" / "eval" / "CIRR"), *data[2:])
    assert one == {"hit@1": found["hit@1 CIRR"], "hit@1 CIRR": found["hit@1 CIRR"]}
    assert "mean" in heard()
    with pytest.raises(AnybatchError, match=r"Got --anchor and --data \(queries with candidates of their own\)"):
        run("evaluate", model, *data, "--anchor", "qry_text")
    with pytest.raises(AnybatchError, match=r"Nothing to measure on"):
        run("evaluate", model, "--template", "a {}")


def test_a_plain_chat_model_is_pooled_at_its_last_token(caplog):
    """As a causal language model is; one that says how it is pooled is left as it is."""
    caplog.set_level("INFO", "anybatch")
    folder = folder_of("llava")
    plain = load_model(ModelConfig(name=str(folder.parent / "inner"), device="cpu"))
    assert plain[1].pooling_mode == "lasttoken"
    assert "is a plain chat model" in caplog.text
    texts = ["a red square", "find the blue dot"]
    ours, theirs = (
        model.encode(texts, normalize_embeddings=True)
        for model in (plain, load_model(ModelConfig(name=str(folder), device="cpu")))
    )
    assert np.allclose(ours, theirs, atol=1e-6)
    assert caplog.text.count("is a plain chat model") == 1
