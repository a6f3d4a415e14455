"""A model for images and texts through embedding, the cached step and training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from anybatch.core.errors import AnybatchError
from anybatch.data.images import EncodedImage
from anybatch.data.pairs import PairData
from anybatch.data.reading import read_pairs
from anybatch.integrations.sentence_transformers import embed as module
from anybatch.integrations.sentence_transformers.embed import embed_texts, embed_to_file
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.losses import InfoNCE
from tests.images import save_clip, save_pairs


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model(clip_folder):
    return SentenceTransformer(str(clip_folder), device="cpu")


@pytest.fixture
def pairs(tmp_path):
    return read_pairs(save_pairs(tmp_path / "saved", list(range(13))), anchor="image", positive="caption")


def test_embedding_is_the_models_own(model, pairs):
    got = embed_texts(model, pairs.anchors, batch_size=5)
    expected = model.encode([one.decode() for one in pairs.anchors], normalize_embeddings=True, batch_size=13)
    assert got.shape == (13, 16)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert len(np.unique(got.round(4), axis=0)) == 13
    assert embed_texts(model, pairs.positives).shape == (13, 16)
    assert embed_texts(model, pairs.anchors[:0]).shape == (0, 16)


def test_few_images_are_decoded_at_once(model, pairs, monkeypatch):
    alive, most, forward = 0, 0, module._forward
    decode = EncodedImage.decode

    def counted(self):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return decode(self)

    def encode(model, inputs, batch_size, prompt):
        nonlocal alive
        alive -= len(inputs)
        return forward(model, inputs, batch_size, prompt)

    monkeypatch.setattr(EncodedImage, "decode", counted)
    monkeypatch.setattr(module, "_forward", encode)
    embed_texts(model, pairs.anchors, batch_size=4)
    assert most == 4
    assert alive == 0


def test_resumes_and_knows_its_images(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)
    whole = embed_texts(model, pairs.anchors)
    seen, encode = 0, module._encode

    def failing(model, texts, batch_size, prompt):
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt
        return encode(model, texts, batch_size, prompt)

    monkeypatch.setattr(module, "_encode", failing)
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(model, pairs.anchors, tmp_path / "e.npy", identity={"of": 1})
    got = embed_to_file(model, pairs.anchors, tmp_path / "e.npy", identity={"of": 1})
    assert seen == 3 + 2  # of four shards two were there
    np.testing.assert_array_equal(got, whole)
    other = PairData(anchors=pairs.anchors.select(np.arange(13)[::-1]), positives=pairs.positives)
    with pytest.raises(AnybatchError, match="another model or of other texts"):
        embed_to_file(model, other.anchors, tmp_path / "e.npy", identity={"of": 1})


def test_images_for_a_model_of_texts_are_refused(pairs, tiny_model_folder):
    reader = SentenceTransformer(str(tiny_model_folder), device="cpu")
    with pytest.raises(AnybatchError, match="holds images, and the model takes text"):
        embed_texts(reader, pairs.anchors)


@pytest.mark.parametrize(
    "settings", [{"micro_batch": 3}, {"micro_batch": 4, "max_tokens": 20}, {"micro_batch": "auto"}]
)
def test_cached_step_equals_the_plain_one(model, pairs, settings):
    """Pixels have no lengths: they are cut by rows, also where `max_tokens` limits the texts."""
    model.double().train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model[0].model.vision_model.config.attention_dropout = 0.0
    for layer in model[0].model.vision_model.encoder.layers:
        layer.self_attn.dropout = 0.0
    features = []
    for inputs in ([one.decode() for one in pairs.anchors], list(pairs.positives)):
        made = model.preprocess(inputs)
        features.append({k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in made.items()})
    assert "pixel_values" in features[0]
    assert "attention_mask" in features[1]
    sides = [model(dict(side))["sentence_embedding"] for side in features]
    plain = InfoNCE(temperature=0.1, normalize=True)(*sides)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = CachedLoss(model, InfoNCE(temperature=0.1, normalize=True), keep_graphs=0.0, **settings)
    value = loss(features)
    value.backward()
    torch.testing.assert_close(value, plain.detach())
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
