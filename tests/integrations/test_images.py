"""A model for images and texts through embedding, the cached step and training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator

from anybatch.core.errors import AnybatchError
from anybatch.data.images import EncodedImage
from anybatch.data.inputs import MixedColumn
from anybatch.data.pairs import PairData, text_digest
from anybatch.data.reading import read_pairs
from anybatch.integrations.sentence_transformers import embed as module
from anybatch.integrations.sentence_transformers.collating import (
    ImageCollator,
    UndecodedRows,
    as_columns,
    rows_on_demand,
    undecoded,
)
from anybatch.integrations.sentence_transformers.embed import embed_texts, embed_to_file
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.integrations.sentence_transformers.model import side_inputs
from anybatch.integrations.sentence_transformers.sets import cells_of, row_ids, with_index
from anybatch.losses import InfoNCE
from tests.images import caption, image, save_clip, save_pairs
from tests.vision_models import folder_of


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


def test_images_for_a_processor_without_a_part_for_them_are_refused(pairs):
    """transformers gives a tokenizer alone where it does not know the class, and images would be left out silently."""
    model = SentenceTransformer(str(folder_of("llava")), device="cpu")
    embed_texts(model, pairs.anchors)
    module: Any = model[0]
    module.processor = module.processor.tokenizer
    assert model.supports("image")
    with pytest.raises(AnybatchError, match="holds images, and the model has a tokenizer alone"):
        embed_texts(model, pairs.anchors)


def test_an_image_that_the_processor_refuses_is_named(tmp_path):
    """Qwen's takes no image that is 200 times as wide as high; with the tiny ones' settings, none of 1 x 600 pixels."""
    from PIL import Image as Pillow

    model = SentenceTransformer(str(folder_of("qwen3vl")), device="cpu")
    saved = save_pairs(tmp_path / "saved", list(range(5)))
    rows = [{**row, "image": row["image"] if row["caption"] != caption(3) else Pillow.new("RGB", (600, 1))}
            for row in Dataset.load_from_disk(str(saved))]  # fmt: skip
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "wide"))
    anchors = read_pairs(tmp_path / "wide", anchor="image", positive="caption").anchors
    match = "processor refuses the image in row 4, 'image' of .*: absolute aspect ratio must be smaller than 200"
    with pytest.raises(AnybatchError, match=match):
        embed_texts(model, anchors)
    collated = rows_on_demand(model, {"pixel_values": UndecodedRows(anchors)})
    with pytest.raises(AnybatchError, match=match):
        collated.take(torch.arange(5))
    with pytest.raises(AnybatchError, match=match):
        side_inputs(model, list(anchors), "query")


def test_objects_of_a_data_set_have_the_ids_and_the_digest_of_a_file_and_stay_undecoded(tmp_path):
    """The same photograph in two rows is no negative of itself, whichever way the rows were shuffled since."""
    features = Features({"anchor": {"text": Value("string"), "image": Image()}, "positive": {"image": [Image()]}})
    photo = [{"bytes": image(number), "path": None} for number in range(4)]
    rows = [
        {
            "anchor": {"text": f"q{row}", "image": photo[row] if row % 2 else None},
            "positive": {"image": [photo[row % 2]]},
        }
        for row in range(4)
    ]
    dataset = Dataset.from_list(rows, features=features)
    ids = row_ids({"": with_index(dataset).shuffle(seed=1)})
    assert ids["positive_id"].tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    assert len(set(ids["anchor_id"].tolist())) == 4
    dataset.save_to_disk(str(tmp_path / "saved"))
    pairs = read_pairs(tmp_path / "saved")
    columns: list[Any] = [cells_of(dataset, name) for name in ("anchor", "positive")]
    assert text_digest(columns) == pairs.digest
    first: Any = undecoded(dataset)[0]
    assert first["positive"] == {"image": [photo[0]]}


@pytest.mark.parametrize(
    "settings", [{"mini_batch_size": 3}, {"mini_batch_size": 4, "max_tokens": 20}, {"mini_batch_size": "auto"}]
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


def trained(model_folder, pairs, output, collate):
    """The weights after three steps of a user's own Trainer on image-caption pairs."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = SentenceTransformer(str(model_folder), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        str(output), per_device_train_batch_size=6, max_steps=3, learning_rate=1e-3, use_cpu=True, report_to="none"
    )
    loss = CachedLoss(model, InfoNCE(temperature=0.1), mini_batch_size=2, keep_graphs=0.4)
    dataset = pairs.to_dataset()
    dataset = undecoded(dataset) if collate else dataset
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    if collate:
        trainer.data_collator = ImageCollator(trainer.data_collator)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    return model.state_dict()


def test_a_trainer_decodes_by_mini_batch(clip_folder, pairs, tmp_path, monkeypatch):
    """Dropout is on: the weights are those of decoded batches, to the last bit."""
    whole = trained(clip_folder, pairs, tmp_path / "whole", collate=False)
    sizes, decode = [], EncodedImage.decode
    preprocess = SentenceTransformer.preprocess

    def counted(self, inputs, **settings):
        sizes.append(len(inputs))
        return preprocess(self, inputs, **settings)

    seen = []
    monkeypatch.setattr(EncodedImage, "decode", lambda image: seen.append(image) or decode(image))
    monkeypatch.setattr(SentenceTransformer, "preprocess", counted)
    parts = trained(clip_folder, pairs, tmp_path / "parts", collate=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert seen
    assert sizes.count(6) <= 3  # the captions' columns (the last batch of an epoch has one row)
    assert sizes.count(2) >= 2 * (3 + 2)  # twice three mini-batches, of which two are replayed


def test_what_cannot_be_decoded_is_named_in_training(model):
    rows = [{"bytes": b"no image", "path": "broken.png"}] * 4
    loss = CachedLoss(model, InfoNCE(temperature=0.1), mini_batch_size=2)
    with pytest.raises(AnybatchError, match=r"training set \(broken.png\) cannot be decoded"):
        loss([{"pixel_values": UndecodedRows(rows)}, dict(model.preprocess(["a dot"] * 4))])
    missing = [{"bytes": None, "path": "nowhere.png"}] * 4
    with pytest.raises(AnybatchError, match=r"Cannot read the image nowhere\.png"):
        loss([{"pixel_values": UndecodedRows(missing)}, dict(model.preprocess(["a dot"] * 4))])


def test_columns_of_every_kind_reach_the_model(model, pairs):
    """Texts as they are, all else by row number; absent negatives are left out, and a column without any."""
    absent = MixedColumn([None] * 13, pairs.anchors, np.where(np.arange(13) % 3 == 0, np.arange(13), -1)[:, None])
    dataset, columns = as_columns(
        PairData(anchors=pairs.anchors, positives=pairs.positives, negatives=(absent,), source="")
    )
    assert list(columns) == ["anchor", "negative_1"]
    assert dataset[3]["positive"] == pairs.positives[3]
    collate = ImageCollator(BaseDataCollator(preprocess_fn=model.preprocess), columns)
    batch = collate([dataset[row] for row in (3, 4, 6)])
    assert [image.encoded for image in batch["anchor_pixel_values"].values] == [
        pairs.anchors[row].encoded for row in (3, 4, 6)
    ]
    assert len(batch["positive_input_ids"]) == 3
    assert [side.images[0].encoded for side in batch["negative_1_pixel_values"].values] == [
        pairs.anchors[row].encoded for row in (3, 6)
    ]
    assert not any(key.startswith("negative") for key in collate([dataset[4]]))
