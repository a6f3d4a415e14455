from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import ModelConfig, embed_texts, embed_to_file, load_model
from anybatch.integrations.sentence_transformers import embed as embed_module
from anybatch.integrations.sentence_transformers.model import keep_first_layers

from ..conftest import sentence

TEXTS = [sentence(number, 2 + number % 7) for number in range(23)]


class Killed(Exception):
    pass


def test_embedding_goes_on_after_a_kill(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "SHARD", 5)
    model = SentenceTransformer(str(tiny_model_folder), device="cpu", prompts={"query": "mata "})
    whole = embed_texts(model, TEXTS, side="query")
    assert not np.allclose(whole, embed_texts(model, TEXTS), atol=1e-3)
    calls, options = [], {"identity": {"model": "m"}, "side": "query"}

    def count(texts):
        calls.append(texts)
        if len(calls) == 3 and not (tmp_path / "again").exists():
            raise Killed

    path = tmp_path / "teacher.npy"
    with pytest.raises(Killed):
        embed_to_file(model, TEXTS, path, progress=count, **options)
    assert not path.exists()
    (tmp_path / "again").touch()
    calls.clear()
    rows = embed_to_file(model, TEXTS, path, progress=count, **options)
    assert calls[0] == 15, "three shards were done; they are not made again"
    assert sum(calls) == len(TEXTS)
    np.testing.assert_allclose(rows, whole, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_work_of_another_teacher_is_not_resumed_and_not_overwritten(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "SHARD", 5)
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")
    path = tmp_path / "teacher.npy"
    embed_to_file(model, TEXTS, path, identity={"model": "one"})
    before = path.read_bytes()
    for identity, texts in (({"model": "two"}, TEXTS), ({"model": "one"}, [*TEXTS[:-1], "changed"])):
        with pytest.raises(AnybatchError, match="another model or of other texts"):
            embed_to_file(model, texts, path, identity=identity)
    assert path.read_bytes() == before
    np.testing.assert_array_equal(embed_to_file(model, TEXTS, path, identity={"model": "one"}), np.load(path))


def test_a_teacher_trained_further_is_another_teacher(tiny_model_folder, tmp_path, monkeypatch):
    """Same name, same lengths, other weights: a half-done file is started anew, a finished one refused."""
    monkeypatch.setattr(embed_module, "SHARD", 5)
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")
    path = tmp_path / "teacher.npy"

    def stop(count):
        raise Killed

    with pytest.raises(Killed):
        embed_to_file(model, TEXTS, path, identity={"model": "m"}, progress=stop)
    with torch.no_grad():
        model[0].model.encoder.layer[1].output.dense.weight[3, 4] += 0.5
    with pytest.warns(UserWarning, match="starts again"):
        rows = embed_to_file(model, TEXTS, path, identity={"model": "m"})
    np.testing.assert_allclose(rows, embed_texts(model, TEXTS), atol=1e-6)
    model.half().float()  # the same weights to a hundredth, and still others
    with pytest.raises(AnybatchError, match="another model or of other texts"):
        embed_to_file(model, TEXTS, path, identity={"model": "m"})


def test_an_empty_prompt_is_no_prompt_also_where_the_model_has_a_default_one(tiny_model_folder):
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")
    plain = embed_texts(model, TEXTS)
    model.prompts, model.default_prompt_name = {"any": "mata nodis ", "query": ""}, "any"
    np.testing.assert_array_equal(embed_texts(model, TEXTS, side="query"), plain)
    assert not np.allclose(embed_texts(model, TEXTS), plain, atol=1e-3)
    np.testing.assert_array_equal(embed_texts(model, TEXTS), embed_texts(model, TEXTS, side="document"))


def test_first_layers_survive_saving(tiny_model_folder, tmp_path):
    model = load_model(ModelConfig(name=str(tiny_model_folder), num_layers=1, max_length=9, device="cpu"))
    assert model.max_seq_length == 9
    model.save_pretrained(str(tmp_path / "cut"))
    again = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    np.testing.assert_array_equal(again.encode(TEXTS[:3]), model.encode(TEXTS[:3]))
    whole = SentenceTransformer(str(tiny_model_folder), device="cpu")
    assert sum(p.numel() for p in whole.parameters()) > sum(p.numel() for p in model.parameters())


def test_layers_that_two_modules_hold_are_not_cut_in_one_of_them(tiny_model_folder):
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")
    encoder = model[0].model.encoder
    encoder.other = torch.nn.Module()
    encoder.other.layer = encoder.layer
    with pytest.raises(AnybatchError, match="this model has 2"):
        keep_first_layers(model, 1)
    assert len(encoder.layer) == 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"num_layers": 3}, "expected 1 to 2"), ({"num_layers": 0}, "at least 1"), ({"max_length": 1}, "at least 2")],
)
def test_mistakes(tiny_model_folder, settings, match):
    with pytest.raises(AnybatchError, match=match):
        load_model(ModelConfig(name=str(tiny_model_folder), device="cpu", **settings))
    with pytest.raises(AnybatchError, match="Cannot load the model"):
        load_model(ModelConfig(name=str(tiny_model_folder / "absent"), device="cpu"))
