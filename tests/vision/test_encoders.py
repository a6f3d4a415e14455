"""The small network and the projection head as modules of sentence-transformers: saved, loaded, measured, dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
from anybatch.integrations.sentence_transformers.two_views import add_head
from anybatch.vision.encoders import ProjectionHead, SmallResNet, small_resnet


def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (30, 40, 3)).astype(np.uint8)) for _ in range(5)]


def test_the_small_network_is_saved_and_loaded(tmp_path):
    model = load_model(ModelConfig(name="small-resnet", device="cpu"))
    embeddings = model.encode(pictures())
    assert embeddings.shape == (5, 128) == (5, model.get_embedding_dimension())
    assert model.modalities == ["image"]
    np.testing.assert_array_equal(
        load_model(ModelConfig(name="small-resnet", device="cpu")).encode(pictures()), embeddings
    )
    model.save_pretrained(str(tmp_path / "model"))
    np.testing.assert_array_equal(
        load_model(ModelConfig(name=str(tmp_path / "model"), device="cpu")).encode(pictures()), embeddings
    )
    trusted = SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(trusted.encode(pictures()), embeddings)
    assert small_resnet("another/model") is None
    np.testing.assert_allclose(model.encode(pictures(), batch_size=1), embeddings, atol=1e-6)


def test_a_model_is_measured_without_its_head():
    model = SentenceTransformer(modules=[SmallResNet(width=8)], device="cpu")
    plain = model.encode(pictures())
    add_head(model, seed=3)
    np.testing.assert_array_equal(model.encode(pictures()), plain)
    assert model.get_embedding_dimension() == 32
    features = model.preprocess(pictures())
    training = model.train()(dict(features))["sentence_embedding"]
    assert training.shape == (5, 128)
    add_head(model, seed=3)
    assert torch.equal(model[1].layers[0].weight, model[2].layers[0].weight)
    del model[1:]
    np.testing.assert_array_equal(model.encode(pictures()), plain)


def test_the_head_takes_what_an_encoder_in_bfloat16_gives():
    embeddings = torch.ones(2, 4, dtype=torch.bfloat16)
    assert ProjectionHead(4, 3).train()({"sentence_embedding": embeddings})["sentence_embedding"].dtype == torch.float32


def test_kwargs_of_a_loader_that_the_small_network_lacks_are_refused():
    with pytest.raises(AnybatchError, match="kwargs are given, for the loader of transformers, which small-resnet"):
        load_model(ModelConfig(name="small-resnet", device="cpu", kwargs={"dtype": "bfloat16"}))


def test_the_head_is_saved_with_checkpoints(tmp_path):
    head = ProjectionHead(4, 3)
    head.save(str(tmp_path))
    loaded = ProjectionHead.load(str(tmp_path))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in head.state_dict().items())
