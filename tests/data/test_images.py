"""Columns of images: lazy, the same image by its bytes, in every file that holds them, and refused where they cannot
be.
"""

from __future__ import annotations

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk

from anybatch.core.errors import AnybatchError
from anybatch.data.images import EncodedImage, ImageColumn
from anybatch.data.inputs import describe, pick
from anybatch.data.pairs import PairData, PairSet, join_pairs
from anybatch.data.reading import read_pairs
from anybatch.data.sets import find_sets
from anybatch.integrations.sentence_transformers import PlanBatches, with_index
from anybatch.plans.plan import BatchPlan
from anybatch.run.hard_negatives import with_mined_negatives
from tests.images import caption, image, save_pairs

NUMBERS = [0, 1, 2, 3, 4, 1, 6, 0, 8]


@pytest.fixture
def folder(tmp_path):
    return save_pairs(tmp_path / "saved", NUMBERS)


@pytest.fixture
def pairs(folder):
    return read_pairs(folder, anchor="image", positive="caption")


def test_a_saved_folder(pairs, monkeypatch):
    monkeypatch.setattr(EncodedImage, "decode", lambda self: pytest.fail("decoded"))
    assert isinstance(pairs.anchors, ImageColumn)
    assert len(pairs) == len(NUMBERS)
    assert [one.encoded for one in pairs.anchors] == [image(number) for number in NUMBERS]
    assert pairs.anchors[-1].encoded == image(8)
    assert list(pairs.positives) == [caption(number) for number in NUMBERS]
    assert pairs.anchor_id.tolist() == [0, 1, 2, 3, 4, 1, 5, 0, 6]
    assert pairs.positive_id.tolist() == [0, 1, 2, 3, 4, 1, 5, 0, 6]


def test_blocks_and_selections(pairs, monkeypatch):
    monkeypatch.setattr("anybatch.data.images.BLOCK", 4)
    column = pairs.anchors
    assert [one.encoded for one in column] == [image(number) for number in NUMBERS]
    part = column[2:7]
    assert isinstance(part, ImageColumn)
    assert "keys" not in vars(part)
    assert np.array_equal(part.keys, column.keys[2:7])
    chosen = pick(part, np.array([4, 0, 4]))
    assert [one.encoded for one in chosen] == [image(6), image(2), image(6)]
    assert np.array_equal(chosen.keys, column.keys[[6, 2, 6]])
    assert chosen[0].where.startswith("row 7, 'image' of ")  # counted in the file
    assert pick(["a", "b"], np.array([1, 0])) == ["b", "a"]


def test_digest_is_of_the_bytes(pairs, folder, tmp_path):
    assert read_pairs(folder, anchor="image", positive="caption").digest == pairs.digest
    other = read_pairs(save_pairs(tmp_path / "other", [*NUMBERS[:-1], 9]), anchor="image", positive="caption")
    assert other.digest != pairs.digest
    fewer = read_pairs(folder, anchor="image", positive="caption", limit=8)
    assert len(fewer) == 8
    assert fewer.digest != pairs.digest
    assert (
        fewer.digest
        == read_pairs(save_pairs(tmp_path / "eight", NUMBERS[:8]), anchor="image", positive="caption").digest
    )


def test_parquet_and_paths_give_the_same(pairs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load_from_disk(str(folder)).to_parquet(str(tmp_path / "pairs.parquet"))
    parquet = read_pairs(tmp_path / "pairs.parquet", anchor="image", positive="caption")
    assert isinstance(parquet.anchors, ImageColumn)
    assert parquet.digest == pairs.digest
    (tmp_path / "files").mkdir()
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for row, number in enumerate(NUMBERS):
            (tmp_path / "files" / f"{row}.png").write_bytes(image(number))
            file.write(json.dumps({"image": f"files/{row}.png", "caption": caption(number)}) + "\n")
    named = {"anchor": "image", "positive": "caption"}
    paths = read_pairs(tmp_path / "pairs.jsonl", **named)
    assert paths.digest == pairs.digest
    assert isinstance(read_pairs(tmp_path / "pairs.jsonl", **named, images="").anchors[0], str)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "pairs.jsonl").rename(tmp_path / "elsewhere" / "pairs.jsonl")
    assert read_pairs(moved, **named, images=tmp_path).digest == pairs.digest
    (tmp_path / "files" / "3.png").unlink()
    with pytest.raises(AnybatchError, match=r"3\.png \(row 4, 'image' of .*No such file"):
        _ = paths.digest, list(paths.anchors)
    with pytest.raises(
        AnybatchError, match=r"'image' .*seems to hold paths.*no file .*3\.png \(row 4\).*data\.images=\"\""
    ):
        read_pairs(moved, **named, images=tmp_path)


def test_both_sides_and_negatives(tmp_path):
    rows = [{"a": image(n), "b": image(n + 1), "n": image(n + 2), "t": caption(n)} for n in range(6)]
    columns = {name: [{"bytes": row[name], "path": None} for row in rows] for name in "abn"}
    features = Features({name: Image() for name in "abn"} | {"t": Value("string")})
    Dataset.from_dict(columns | {"t": [row["t"] for row in rows]}, features=features).save_to_disk(str(tmp_path / "d"))
    pairs = read_pairs(tmp_path / "d", anchor="a", positive="b", negatives=["n", "t"])
    assert pairs.positive_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert pairs.negative_id[:, 0].tolist() == [1, 2, 3, 4, 5, 6]  # the next row's positive, and one of its own
    assert pairs.negative_id[:, 1].min() == 7  # a text is no image
    dataset = pairs.to_dataset()
    assert dataset.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert with_index(dataset).column_names == [*dataset.column_names, "label"]
    assert np.array_equal(np.asarray(dataset[1]["anchor"]), np.asarray(dataset[0]["positive"]))
    assert dataset[2]["negative_2"] == caption(2)
    only = PairData(anchors=pairs.anchors, positives=pairs.positives).to_dataset()
    assert only.column_names == ["anchor", "positive"]


def test_the_trainer_reads_what_embedding_reads(pairs):
    dataset = pairs.to_dataset()
    assert list(with_index(dataset)[0]) == ["anchor", "positive", "label"]  # the Trainer goes by this order
    for row in (0, 5):
        assert dataset[row]["anchor"].mode == "RGB"
        assert np.array_equal(np.asarray(dataset[row]["anchor"]), np.asarray(pairs.anchors[row].decode()))


def test_negatives_are_written_out_elsewhere(pairs, folder):
    before = sorted(folder.iterdir())
    rows = np.array([4, 0, 8, 1, 2, 7, 7, 3, 5])
    images = PairData(anchors=pairs.positives, positives=pairs.anchors, negatives=(pick(pairs.anchors, rows),))
    dataset = images.to_dataset()
    assert dataset.column_names == ["anchor", "positive", "negative_1"]
    for row in (0, 5, 6):
        expected = pairs.anchors[int(rows[row])].decode()
        assert np.array_equal(np.asarray(dataset[row]["negative_1"]), np.asarray(expected))
    assert sorted(folder.iterdir()) == before  # nothing appears beside the user's data
    assert all(str(folder) not in file["filename"] or Path(file["filename"]) in before for file in dataset.cache_files)


def test_a_plan_is_refused_for_other_images(pairs, tmp_path):
    plan = BatchPlan.random(len(pairs), 4, data_digest=pairs.digest)
    PlanBatches(plan).check(with_index(pairs.to_dataset()), plan)
    other = read_pairs(save_pairs(tmp_path / "other", [*NUMBERS[:-1], 9]), anchor="image", positive="caption")
    other = PairData(anchors=other.anchors, positives=pairs.positives)
    with pytest.raises(AnybatchError, match="made for other data"):
        PlanBatches(plan).check(with_index(other.to_dataset()), plan)


def test_several_sets(tmp_path):
    features = Features({"image": Image(), "caption": Value("string")})
    splits = {
        name: Dataset.from_dict(
            {"image": [{"bytes": image(n), "path": None} for n in part], "caption": [caption(n) for n in part]},
            features=features,
        )
        for name, part in (("one", range(4)), ("two", range(3, 9)))
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "sets"))
    found = find_sets(tmp_path / "sets")
    parts = [read_pairs(path, anchor="image", positive="caption") for path in found.values()]
    sets = [PairSet(name=name, num_rows=len(part)) for name, part in zip(found, parts, strict=True)]
    joined = join_pairs(parts, sets)
    assert joined.anchor_id.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert [one.encoded for one in joined.anchors[3:6]] == [image(n) for n in (3, 3, 4)]
    assert len(joined.to_dataset()) == 10
    instructed = [PairSet(name="one", num_rows=4, positive_prompt="find: "), sets[1]]
    prompted = join_pairs(parts, instructed).prompted
    assert isinstance(prompted[0], ImageColumn)
    assert list(prompted[1][3:5]) == [f"find: {caption(3)}", caption(3)]
    beside = join_pairs(parts, [sets[0], PairSet(name="two", num_rows=6, anchor_prompt="see: ")])
    assert [row.text for row in beside.prompted[0][3:5]] == [None, "see:"]
    swapped = PairData(anchors=parts[1].positives, positives=parts[1].anchors)
    mixed = join_pairs([parts[0], swapped], sets)
    assert mixed.has_images
    assert mixed.anchors[3].images[0].encoded == mixed.positives[4].images[0].encoded == image(3)
    assert mixed.anchors[4].text == caption(3)


def test_rows_without_an_image(tmp_path):
    features = Features({"image": Image(), "caption": Value("string")})
    rows = {"image": [{"bytes": image(0), "path": None}, None], "caption": ["a", "b"]}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "gap"))
    with pytest.raises(AnybatchError, match=r"Row 2 of .*'image' is empty\. Every row needs a text or an image there"):
        read_pairs(tmp_path / "gap", anchor="image", positive="caption")
    with pytest.raises(AnybatchError, match=r"no column 'imag' .* Did you mean 'image'"):
        read_pairs(tmp_path / "gap", anchor="imag", positive="caption")


def test_shown(pairs):
    from PIL import Image as Pillow

    assert describe(pairs.anchors[1], 17) == "[image 20x20, row 17]"
    assert describe("two\n words", 17) == "two words"
    large = BytesIO()
    Pillow.new("RGBA", (400, 100), (255, 0, 0, 0)).save(large, "PNG")
    thumbnail = EncodedImage(encoded=large.getvalue(), where="here").thumbnail()
    start = "data:image/jpeg;base64,"
    assert thumbnail.startswith(start)
    small = Pillow.open(BytesIO(base64.b64decode(thumbnail.removeprefix(start))))
    assert small.size == (64, 16)
    assert min(small.getpixel((5, 5))) > 250  # what is transparent is white
    broken = EncodedImage(encoded=b"no image", where="row 3, 'image' of here")
    assert broken.thumbnail() is None
    assert describe(broken, 3) == "[image, row 3]"
    with pytest.raises(AnybatchError, match=r"row 3, 'image' of here cannot be decoded"):
        broken.decode()


def test_without_pillow(pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert len(pairs.digest) == 32  # plans need no decoding
    assert describe(pairs.anchors[0], 0) == "[image, row 0]"
    assert pairs.anchors[0].thumbnail() is None
    for decode in (pairs.to_dataset, pairs.anchors[0].decode):
        with pytest.raises(AnybatchError, match=r"pip install 'anybatch\[vision\]'"):
            decode()


def test_parquet_names_are_no_patterns(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "a [x]"
    place.mkdir()
    for name in ("q?.parquet", "q1.parquet", "b[1].parquet"):
        load_from_disk(str(folder)).to_parquet(str(place / name))
        assert len(read_pairs(place / name, anchor="image", positive="caption")) == len(NUMBERS)


def test_backwards(pairs):
    assert [one.encoded for one in pairs.anchors[::-1]] == [image(number) for number in reversed(NUMBERS)]
    assert pairs.anchors[::-1][0].where.startswith("row 9, ")


def test_stand_ins_are_of_the_own_set_and_all_different():
    task = np.repeat([0, 1], [6, 6]).astype(np.int32)
    negatives = np.full((12, 2), -1, np.int32)
    negatives[5] = (2, -1)
    plan = BatchPlan(
        num_rows=12, batch_size=4, cluster_size=2, cluster=np.arange(12, dtype=np.int32) // 2, seed=0, data_digest="",
        task=task, task_names=("a", "b"), negatives=negatives, suspects=np.array([[5, 0]], np.int32),
    )  # fmt: skip
    texts = [f"p{row}" for row in range(12)]
    texts[1] = "p0"
    pairs = PairData(anchors=[f"a{row}" for row in range(12)], positives=texts)
    first, second = with_mined_negatives(pairs, plan).negatives
    for row in range(12):
        own = set(texts[:6]) if row < 6 else set(texts[6:])
        assert {first[row], second[row]} <= own - {texts[row]}
        assert first[row] != second[row]
    assert (first[5], second[5]) == ("p2", "p3")  # row 0 is a suspect of row 5, and row 1 has the same text


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pixels_of_16_bits_are_scaled_and_of_32_refused(kind):
    from PIL import Image as Pillow

    def stored(pixels, kind):
        file = BytesIO()
        Pillow.fromarray(pixels).save(file, kind)
        return EncodedImage(encoded=file.getvalue(), where="row 3, 'image' of here")

    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    decoded = np.asarray(stored(grey, kind).decode())
    assert decoded.tolist() == np.repeat((grey // 256)[..., None], 3, axis=2).tolist()
    if kind == "TIFF":  # of the other byte order
        file = BytesIO()
        Pillow.frombytes("I;16B", (8, 8), grey.astype(">u2").tobytes()).save(file, kind)
        decoded = np.asarray(EncodedImage(encoded=file.getvalue(), where="here").decode())
        assert decoded[..., 0].tolist() == (grey // 256).tolist()
    for wide in (np.float32, np.int32):
        with pytest.raises(AnybatchError, match="row 3, 'image' of here has numbers of 32 bits"):
            stored(grey.astype(wide), "TIFF").decode()


def encoded_as(kind, **options):
    from PIL import Image as Pillow

    file = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Pillow.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


WHOLE = {kind: encoded_as(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_decoded_is_found_without_decoding(kind, monkeypatch):
    whole = WHOLE[kind]
    EncodedImage(encoded=whole + b"\0" * 8, where="here").check()
    for length in (0, 5, len(whole) // 3, len(whole) * 9 // 10):
        cut = EncodedImage(encoded=whole[:length], where="row 3, 'image' of here")
        with pytest.raises(AnybatchError, match="row 3, 'image' of here cannot be decoded"):
            cut.check()
        with pytest.raises(AnybatchError, match="row 3, 'image' of here cannot be decoded"):
            cut.decode()
    if kind in ("JPEG", "PNG", "WEBP"):  # what data sets are made of
        monkeypatch.setattr(EncodedImage, "decode", lambda self: pytest.fail("decoded"))
        EncodedImage(encoded=whole, where="here").check()


def test_a_file_with_more_behind_its_end_is_taken():
    image = EncodedImage(encoded=WHOLE["JPEG"] + b"more" * 99, where="here")  # as some cameras write
    image.check()
    assert image.decode().size == (40, 40)


def test_all_broken_images_are_named_at_once(tmp_path):
    files = {
        "fine.jpg": WHOLE["JPEG"],
        "cut.jpg": WHOLE["JPEG"][:300],
        "page.jpg": b"<html>not found</html>",
        "no.png": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    names = ["fine.jpg", "cut.jpg", "page.jpg", "cut.jpg", "fine.jpg", "no.png"]
    rows = [{"image": name, "caption": f"c{row}"} for row, name in enumerate(names)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(tmp_path / "pairs.jsonl", anchor="image", positive="caption")
    match = r"image in row 2, .*cut\.jpg\) cannot be decoded .*In all 4 rows are refused: 2, 3, 4, 6\."
    with pytest.raises(AnybatchError, match=match):
        _ = pairs.digest


def test_a_thumbnail_shows_16_bits():
    from PIL import Image as Pillow

    file = BytesIO()
    Pillow.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(file, "PNG")
    shown = EncodedImage(encoded=file.getvalue(), where="here").thumbnail().partition(",")[2]
    assert abs(Pillow.open(BytesIO(base64.b64decode(shown))).getpixel((4, 4))[0] - 0x40) < 3
