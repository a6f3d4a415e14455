"""Mixed columns: texts, images or both in one side, lazily, told apart by their content; and what a model is given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL.Image import Image
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.modality import InputFormatter

from anybatch.data.images import EncodedImage, ImageColumn
from anybatch.data.inputs import MixedColumn, MixedInput, describe, guest_input, pick, row_keys
from anybatch.data.pairs import PairData
from anybatch.integrations.sentence_transformers.collating import ImageCollator
from tests.images import image

FORMATTER = InputFormatter("qwen2_vl", message_format="structured")


@pytest.fixture
def photos(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    return ImageColumn.of_paths([f"{number}.png" for number in range(4)], tmp_path, "'photo' of pairs.csv")


@pytest.fixture
def column(photos):
    places = np.array([[1, -1], [-1, -1], [0, 3], [2, -1]])
    return MixedColumn(["a cat", "a dog ", "both", None], photos, places)


def contents(column):
    return [(row.text, [image.encoded for image in row.images]) for row in column]


def test_rows_slices_and_selections(column):
    expected = [("a cat", [image(1)]), ("a dog ", []), ("both", [image(0), image(3)]), (None, [image(2)])]
    assert contents(column) == expected
    assert contents(column[1:3]) == expected[1:3]
    assert contents(pick(column, np.array([3, 0, 0]))) == [expected[3], expected[0], expected[0]]
    assert column[-1].images[0].where.startswith("row 3, 'photo' of pairs.csv (")
    assert column[-1].images[0].where.endswith("2.png)")
    assert column.has_text.tolist() == [True, True, True, False]
    assert column.has_images.tolist() == [True, False, True, True]


def test_joined(column, photos, tmp_path):
    texts, images = MixedColumn.of(["a", "b"]), MixedColumn.of(photos[:2])
    joined = MixedColumn.join([texts, column, images, column[:1]])
    assert contents(joined) == [*contents(texts), *contents(column), *contents(images), *contents(column)[:1]]
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes(b"no image")
    second = MixedColumn.of(ImageColumn.of_paths(["x.png"], other, "'photo' of other.csv"))
    assert MixedColumn.join([column, second])[4].images[0].where.startswith("row 1, 'photo' of other.csv (")


def test_images_are_read_once(column, photos, monkeypatch):
    read = []
    original = ImageColumn._image
    monkeypatch.setattr(
        ImageColumn, "_image", lambda self, value, place: read.append(place) or original(self, value, place)
    )
    joined = MixedColumn.join([column, column[1:]])
    pairs = PairData(anchors=column, positives=column[::-1], negatives=(photos,))
    _ = pairs.anchor_id, pairs.negative_id, pairs.digest, list(row_keys(joined))
    assert sorted(read) == [0, 1, 2, 3]


def test_a_file_that_many_rows_name_is_read_once(photos, tmp_path, monkeypatch):
    again = ImageColumn.of_paths(["1.png", "0.png", "1.png", "1.png"], tmp_path, "'photo' of pairs.csv")
    read = []
    original = ImageColumn._image
    monkeypatch.setattr(ImageColumn, "_image", lambda self, value, at: read.append(at) or original(self, value, at))
    assert np.array_equal(again.keys, photos.keys[[1, 0, 1, 1]])
    assert read == [0, 1, 0, 1, 2, 3]


def test_ids_and_keys_are_of_the_content(column, photos):
    assert len(set(row_keys(column))) == 4
    assert next(row_keys(MixedColumn.of(photos[2:]))) == next(row_keys(photos[2:])) == list(row_keys(column))[3]
    assert list(row_keys(MixedColumn.of(["a dog "]))) == list(row_keys(["a dog "])) == [b"a dog "]
    assert list(row_keys(column, stripped=True))[1] == b"a dog"
    swapped = MixedColumn(column.texts, photos, column.places[:, ::-1])  # of row 2 the other order, of others the same
    assert [one == other for one, other in zip(row_keys(column), row_keys(swapped), strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip
    pairs = PairData(anchors=["x"] * 4, positives=column, negatives=(["a dog", "b", "both", "c"], photos))
    assert pairs.negative_id[:, 0].tolist() == [pairs.positive_id[1], 4, 5, 6]
    assert pairs.negative_id[2, 1] == pairs.positive_id[3]


def test_instructions_go_before_texts(column):
    prompted = column.instructed(["see: ", "find: ", "", "Represent the image. "])
    assert list(prompted.texts) == ["see: a cat", "find: a dog ", "both", "Represent the image."]
    assert column.instructed([""] * 4).texts[3] is None
    assert contents(prompted)[3][1] == [image(2)]


def test_described(column):
    assert describe(column[0], 7) == "[image 20x20, row 7] a cat"
    assert describe(column[1], 7) == "a dog"
    assert describe(column[3], 7) == "[image 24x16, row 7]"


def test_as_a_data_set(column, photos):
    absent = MixedColumn([None, *column.texts[1:]], photos, np.array([[-1, -1], *column.places[1:]]))
    dataset = PairData(anchors=column, positives=list("abcd"), negatives=(absent,)).to_dataset()
    assert dataset.column_names == ["anchor", "positive", "negative_1"]
    assert [row and (row["text"], len(row["image"])) for row in dataset["negative_1"]] == [
        None, ("a dog ", 0), ("both", 2), (None, 1),
    ]  # fmt: skip
    assert dataset[2]["anchor"]["image"][1]["path"].endswith("3.png")
    collate = ImageCollator(BaseDataCollator(preprocess_fn=lambda values, **_: {"values": values}))
    batch = collate(list(dataset))
    assert len(batch["negative_1_pixel_values"].values) == 3
    assert contents(absent[1:]) == contents(column[1:])


def encoded(number):
    return EncodedImage(encoded=image(number), where="here")


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        ("a cat", "text"),
        (encoded(1), "image"),
        (MixedInput(text="a <|image_1|> cat"), "text"),
        (MixedInput(text=None, images=(encoded(1),)), "image"),
        (MixedInput(text="<|image_1|>\n", images=(encoded(1),)), "image"),
        (MixedInput(text=None, images=(encoded(1), encoded(2))), ["image", "image"]),
        (MixedInput(text="<|image_1|>\na cat", images=(encoded(1),)), ["image", "a cat"]),
        (MixedInput(text="Find: <|image_1|>\na cat", images=(encoded(1),)), ["image", "Find: a cat"]),
        (MixedInput(text="a cat: <|image_1|>", images=(encoded(1),)), ["a cat: ", "image"]),
        (MixedInput(text="<|image_1|><|image_2|>two", images=(encoded(1), encoded(2))), ["image", "image", "two"]),
    ],
)
def test_what_a_model_is_given(value, kinds):
    given = guest_input(value)
    if kinds == "text":
        assert given == (value if isinstance(value, str) else value.text)
    elif kinds == "image":
        assert isinstance(given, Image)
        assert given.mode == "RGB"
    else:
        parts = [part for entry in given.values() for part in (entry if isinstance(entry, list) else [entry])]
        assert ["image" if isinstance(part, Image) else part for part in parts] == kinds
        modality, inputs, _ = FORMATTER.parse_inputs([given])
        [[message]] = FORMATTER.batch_to_message(modality, inputs)[1]["message"]
        assert [part["type"] for part in message["content"]] == [
            "image" if kind == "image" else "text" for kind in kinds
        ]
