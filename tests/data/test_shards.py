"""Shards of webdataset: read where they lie, in row order, and what is wrong with one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from anybatch.core.errors import AnybatchError
from anybatch.data.images import ImageColumn
from anybatch.data.reading import read_pairs
from anybatch.data.sets import find_sets

from ..images import image


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for kind, content in members.items():
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Seven samples in two shards, images as PNG and as JPEG by name."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, numbers in enumerate((range(4), range(4, 7))):
        samples = {
            f"{number:04d}": {"jpg" if number % 2 else "png": image(number), "txt": f"image {number}".encode()}
            for number in numbers
        }
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_images_stay_in_their_tars(shards, pattern):
    path = shards / pattern
    (found,) = find_sets(path).values()
    pairs = read_pairs(found, anchor="image", positive="txt")
    assert isinstance(pairs.anchors, ImageColumn)
    assert [stored.encoded for stored in pairs.anchors] == [image(number) for number in range(7)]
    assert pairs.positives == [f"image {number}" for number in range(7)]
    part = pairs.anchors[5:]
    assert part[0].encoded == image(5)
    assert part[0].decode().size == (20, 20)


def test_one_shard_with_captions_in_json_and_a_limit(shards):
    pairs = read_pairs(shards / "00000.tar", anchor="txt", positive="image", limit=2)
    assert (len(pairs), pairs.anchors) == (2, ["image 0", "image 1"])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:700]), "as a webdataset shard"),
        (lambda path: path.write_bytes(b"no tar at all" * 99), "as a webdataset shard"),
        (lambda path: write_shard(path, {"1": {"png": b"a", "jpg": b"b"}}), "'1' .* two members 'image'"),
        (lambda path: write_shard(path, {"1": {"png": b"a"}, "2": {"txt": b"b"}}), "row 1|Row 1"),
    ],
)
def test_what_is_wrong_with_a_shard_is_named(tmp_path, damage, match):
    path = write_shard(tmp_path / "bad.tar", {"1": {"png": image(1), "txt": b"x" * 3000}})
    damage(path)
    with pytest.raises(AnybatchError, match=match):
        list(read_pairs(path, anchor="image", positive="txt").anchors)


def test_the_tars_of_a_pattern_and_no_others(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in ("cc-train-0000", "cc-train-0001", "cc-validation-0000"):
        write_shard(tmp_path / "shards" / f"{name}.tar", {name: {"png": image(1), "txt": name.encode()}})
    (found,) = find_sets(tmp_path / "shards" / "cc-train-*.tar").values()
    assert read_pairs(found, anchor="image", positive="txt").positives == ["cc-train-0000", "cc-train-0001"]
    for path in ("shards", "shards/*.tar"):
        with pytest.raises(AnybatchError, match=r"cc-validation-0000\.tar would be trained on"):
            find_sets(tmp_path / path)


def test_a_pattern_that_leaves_out_files_of_a_set(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(AnybatchError, match=r"matches 1 of the 2 files of the data set 'train', and not train-00001"):
        find_sets(tmp_path / "train-00000*")
