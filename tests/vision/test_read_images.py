"""One column of images and its classes, from a folder of files, from Parquet and from a saved data set."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as Feature

from anybatch.core.errors import AnybatchError
from anybatch.vision.read_images import LabelledImages, read_images
from tests.images import image


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        place = tmp_path / "pictures" / ("cat", "dog")[number % 2] / "more"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(image(number))
    (tmp_path / "pictures" / "readme.txt").write_text("no image")
    return tmp_path / "pictures"


def stored(path, **columns):
    features = {
        "photo": Feature(),
        "label": ClassLabel(names=["cat", "dog"]),
        "second": Feature(),
        "label_word": Value("string"),
    }
    rows = {"photo": [{"bytes": image(number), "path": None} for number in range(4)], **columns}
    dataset = Dataset.from_dict(rows, features=Features({name: features[name] for name in rows}))
    if path.suffix:
        dataset.to_parquet(str(path))
    else:
        dataset.save_to_disk(str(path))
    return str(path)


def test_a_folder_a_class(folder):
    images = read_images(str(folder))
    assert images.labels.tolist() == ["cat"] * 3 + ["dog"] * 3
    assert [one.encoded for one in images.images] == [image(number) for number in (0, 2, 4, 1, 3, 5)]
    assert len(read_images(str(folder), limit=4).images) == 4
    flat = read_images(str(folder / "cat" / "more"))
    assert flat.classes is None
    assert len(flat.images) == 3
    (folder / "beside.jpg").write_bytes(image(7))
    assert read_images(str(folder)).classes is None  # not every image has a class


@pytest.mark.parametrize("name", ["photos.parquet", "photos"])
def test_stored_images(tmp_path, name):
    images = read_images(stored(tmp_path / name, label=[0, 1, 1, 0]))
    assert images.labels.tolist() == ["cat", "dog", "dog", "cat"]
    assert [one.encoded for one in images.images] == [image(number) for number in range(4)]
    assert read_images(str(tmp_path / name), limit=3).labels.tolist() == ["cat", "dog", "dog"]
    assert read_images(stored(tmp_path / f"plain-{name}")).classes is None


def test_messages(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnybatchError, match="no file named as an image"):
        read_images(str(tmp_path / "empty"))
    two = stored(tmp_path / "two.parquet", second=[{"bytes": image(9), "path": None}] * 4)
    with pytest.raises(AnybatchError, match=r"its columns of images are 'photo', 'second'. Expected one"):
        read_images(two)
    assert len(read_images(two, column="second").images) == 4
    with pytest.raises(AnybatchError, match=r"There is no column 'foto'.*Did you mean 'photo'"):
        read_images(two, column="foto")
    (tmp_path / "words.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(AnybatchError, match="its columns of images are none"):
        read_images(str(tmp_path / "words.jsonl"))
    plain = read_images(str(folder / "cat" / "more"))
    with pytest.raises(AnybatchError, match="have no classes, by which a model is measured"):
        LabelledImages(known=read_images(str(folder)), test=plain)


def test_one_class_is_refused_before_anything_is_embedded(tmp_path):
    one = read_images(stored(tmp_path / "one.parquet", label=[1] * 4))
    with pytest.raises(AnybatchError, match=r"one\.parquet are of one class; expected 2 or more"):
        LabelledImages(known=one, test=one)


def test_the_digest_is_of_images_and_classes(tmp_path):
    first, second = (
        read_images(stored(tmp_path / f"{n}.parquet", label=labels))
        for n, labels in enumerate(([0, 1, 1, 0], [0, 1, 1, 1]))
    )
    digests = {LabelledImages(known=a, test=b).digest for a, b in ((first, second), (second, first), (first, first))}
    assert len(digests) == 3


def test_classes_that_cannot_be_learned_are_said(folder, tmp_path, caplog):
    known = read_images(str(folder))
    (tmp_path / "test" / "owl").mkdir(parents=True)
    (tmp_path / "test" / "owl" / "1.png").write_bytes(image(1))
    LabelledImages(known=known, test=read_images(str(tmp_path / "test")))
    assert "1 of 1 classes of" in caplog.text
    assert "such as 'owl'" in caplog.text


def test_a_broken_file_is_named(folder):
    (folder / "dog" / "more" / "1.png").write_bytes(b"<html>")
    with pytest.raises(AnybatchError, match=r"dog/more/1\.png\) cannot be decoded \(it is none that Pillow knows"):
        [image.decode() for image in read_images(str(folder)).images]


def test_images_without_a_class_train_and_are_not_measured(tmp_path, caplog):
    """-1 is how data sets on the hub say that a label is not told, None how tables do."""
    for name, labels in (("a", [-1, 1, 1, 0]), ("b", [None, 1, 1, 0]), ("c", [-1] * 4)):
        images = read_images(stored(tmp_path / f"{name}.parquet", label=labels))
        assert len(images.images) == 4
        with pytest.raises(AnybatchError, match=f"{labels.count(labels[0])} of the images of .* have no classes"):
            _ = images.labels


@pytest.mark.parametrize("kind", ["a pattern", "a folder"])
def test_several_files_are_one_data_set(kind, tmp_path):
    for part in range(2):
        stored(tmp_path / f"train-{part:05}-of-00002.parquet", label=[part, 1, 1, 0])
    images = read_images(str(tmp_path / "train-*.parquet" if kind == "a pattern" else tmp_path))
    assert images.labels.tolist() == ["cat", "dog", "dog", "cat", "dog", "dog", "dog", "cat"]
    assert [one.encoded for one in images.images] == [image(number) for number in range(4)] * 2
    assert len(read_images(str(tmp_path), limit=5).images) == 5


def test_broken_images_are_left_out(folder, caplog):
    (folder / "dog" / "more" / "1.png").write_bytes(b"<html>")
    images = read_images(str(folder), skip_bad=True)
    assert images.labels.tolist() == ["cat"] * 3 + ["dog"] * 2
    assert len(images.images.keys) == 5
    assert "1 row left out (data.skip_bad): 4. The first: The image in row 4" in caplog.text
    assert any(said.endswith("cannot be decoded (it is none that Pillow knows).") for said in caplog.messages)
