"""Sides of a text, images or both from files: columns by convention and by name, lists, ragged rows, MMEB's folders."""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, Features, Image, Value

from anybatch.core.errors import AnybatchError
from anybatch.data.candidates import read_candidates
from anybatch.data.columns import choose_columns
from anybatch.data.images import ImageColumn
from anybatch.data.inputs import MixedColumn
from anybatch.data.reading import read_pairs
from anybatch.data.sets import files_of, find_sets
from anybatch.run.config import DataConfig, SetConfig
from anybatch.run.read_data import read_data
from tests.images import image
from tests.mmeb import write_mmeb


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(image(number))
    return root


@pytest.fixture(scope="session")
def mmeb(tmp_path_factory):
    return write_mmeb(tmp_path_factory.mktemp("mmeb"), 12)


def write(folder, rows, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(column):
    """Text and images of each row; None where there is nothing."""
    mixed = MixedColumn.of(column)
    return [row and (row.text, [one.encoded for one in row.images]) for row in mixed]


@pytest.mark.parametrize(
    ("present", "given", "sides"),
    [
        (["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"], {},
         [("qry", "qry_image_path"), ("pos_text", "pos_image_path"), ("neg_text", "neg_image_path")]),
        (["anchor_image", "anchor", "positive"], {}, [("anchor", "anchor_image"), ("positive",)]),
        (["query_img_paths", "positive"], {}, [("query_img_paths",), ("positive",)]),
        (["Query", "Query_Image", "answer"], {}, [("Query", "Query_Image"), ("answer",)]),
        (["q", "photo", "pos"], {"anchor": ["q", "photo"], "positive": "pos"}, [("q", "photo"), ("pos",)]),
        (["anchor", "anchor_image", "positive"], {"anchor": "anchor"}, [("anchor",), ("positive",)]),
        (["anchor", "positive", "n", "n_image", "m"], {"negatives": ["n", "n_image", "m"]},
         [("anchor",), ("positive",), ("n", "n_image"), ("m",)]),
        (["anchor", "positive", "negative_2_image", "negative_1", "negative_2"], {},
         [("anchor",), ("positive",), ("negative_1",), ("negative_2", "negative_2_image")]),
    ],
)  # fmt: skip
def test_columns_of_a_side(present, given, sides):
    settings = {"anchor": None, "positive": None, "negatives": None, **given}
    assert list(choose_columns(present, *settings.values(), "x").sides) == sides


def test_ragged_rows_of_all_kinds(photos, caplog):
    caplog.set_level(logging.INFO, "anybatch")
    rows = [
        {"query": "text alone", "query_image": "", "pos": "p0", "neg": [], "neg_image_path": []},
        {"query": None, "query_image": "1.png", "pos": "p1", "neg": ["a", ""], "neg_image_path": ["2.png", "3.png"]},
        {"query": "both", "query_image": ["2.png", "0.png"], "pos": "p2", "neg": "b", "neg_image_path": ""},
        {"query": "both", "query_image": "2.png", "pos": ["p3", "p4"], "neg": "", "neg_image_path": "4.png"},
    ]
    pairs = read_pairs(write(photos, rows))
    assert contents(pairs.anchors) == [
        ("text alone", []), (None, [image(1)]), ("both", [image(2), image(0)]), *[("both", [image(2)])] * 2,
    ]  # fmt: skip
    assert pairs.positives == [f"p{n}" for n in range(5)]
    assert contents(pairs.negatives[0]) == [None, ("a", [image(2)]), ("b", []), (None, [image(4)]), (None, [image(4)])]
    assert contents(pairs.negatives[1]) == [None, (None, [image(3)]), None, None, None]
    assert pairs.anchor_id.tolist() == [0, 1, 2, 3, 3]
    assert pairs.negative_id.tolist() == [[-1, -1], [5, 8], [6, -1], [7, -1], [7, -1]]
    assert pairs.anchors.images is pairs.negatives[0].images  # read once for all sides
    assert "anchor 'query' with 'query_image' (images), positive 'pos', negatives 'neg' with" in caplog.text
    elsewhere = photos.parent / "elsewhere"
    elsewhere.mkdir()
    assert read_pairs(write(elsewhere, rows), images=photos).digest == pairs.digest
    for row, name, value in (
        (0, "query", "text"),
        (3, "query_image", "5.png"),
        (1, "neg_image_path", ["2.png", "2.png"]),
    ):
        changed = [{**each, name: value} if place == row else each for place, each in enumerate(rows)]
        assert read_pairs(write(elsewhere, changed), images=photos).digest != pairs.digest
    (photos / "2.png").write_bytes(image(9))
    assert read_pairs(write(photos, rows)).digest != pairs.digest


def test_stored_images_beside_texts(tmp_path):
    stored = {"bytes": image(1), "path": None}
    columns = {"anchor": ["a", None, "c"], "anchor_image": [stored, stored, None], "positive": ["p", "q", "r"]}
    columns["negative"] = [None, stored, stored]
    features = Features(
        {"anchor": Value("string"), "anchor_image": Image(), "positive": Value("string"), "negative": Image()}
    )
    Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    pairs = read_pairs(tmp_path / "saved")
    assert contents(pairs.anchors) == [("a", [image(1)]), (None, [image(1)]), ("c", [])]
    assert contents(pairs.negatives[0]) == [None, (None, [image(1)]), (None, [image(1)])]
    assert pairs.negative_id[:, 0].tolist() == [-1, 3, 3]
    columns["positive"] = [["p", "q"], ["r"], ["s"]]
    features["positive"] = [Value("string")]
    Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "lists"))
    assert contents(read_pairs(tmp_path / "lists").anchors)[:3] == [("a", [image(1)])] * 2 + [(None, [image(1)])]


@pytest.mark.parametrize(
    ("cells", "match"),
    [
        ({"query": "", "query_image": ""}, r"Row 2 of .*'query' with 'query_image' are empty"),
        ({"query": "x", "query_image": "gone.png"}, r"no file .*gone\.png \(row 2\).*data\.images"),
        ({"query": ["x", "y"], "query_image": ["1.png", "2.png"]}, "An anchor is one text"),
        ({"pos": ["x", "y", "z"], "pos_image": ["1.png", "2.png"]}, "Row 2 of .* hold 3 texts and 2 images"),
        ({"pos": "", "pos_image": []}, "Row 2 of .*'pos' with 'pos_image' are empty"),
        ({"query": 7}, "Row 2 of .*'query' is 7, which is no text"),
        ({"neg": ["x"], "neg_image": ["1.png", "2.png"]}, "Row 2 of .* hold 1 texts and 2 images"),
        ({"neg": ["x", "y"], "neg_image": ["1.png"]}, "Row 2 of .* hold 2 texts and 1 images"),
        ({"query_image": "x" * 300 + ".png"}, r"no file .*x \(row 2\)"),
    ],
)
def test_bad_rows_are_named(photos, cells, match):
    names = ("query", "pos", "neg")
    row = dict.fromkeys(names, "text") | {f"{name}_image": "1.png" for name in names}
    read_pairs(write(photos, [row, row]))
    if cells.get("neg"):
        row = {**row, "neg": ["text", "text"], "neg_image": ["1.png", "2.png"]}
    if isinstance(cells.get("pos"), list):
        row = {**row, "pos": ["text", "text"], "pos_image": ["1.png", "2.png"]}
    with pytest.raises(AnybatchError, match=match):
        read_pairs(write(photos, [row, {**row, **cells}, row]))


def test_supposed_columns_without_images_are_not_used(photos, caplog):
    caplog.set_level(logging.INFO, "anybatch")
    rows = [{"anchor": f"a{n}", "anchor_image": f"number {n}", "positive": f"p{n}"} for n in range(3)]
    assert read_pairs(write(photos, rows)).anchors == ["a0", "a1", "a2"]
    assert "not used: 'anchor_image'" in caplog.text
    with pytest.raises(AnybatchError, match="anchor has 2 columns of texts"):
        read_pairs(write(photos, rows), anchor=["anchor", "anchor_image"])


def test_a_place_for_an_image_without_one_is_doubted(photos, caplog):
    rows = [
        {"qry": "<|image_1|>\nsee", "qry_image_path": path, "pos_text": f"p{path}"} for path in ("1.png", "", "2.png")
    ]
    assert len(read_pairs(write(photos, rows))) == 3
    assert "1 anchors have a place for an image (<|image_1|>) and none, such as that of pair 2" in caplog.text


def test_files_of_one_data_set(tmp_path):
    folder = tmp_path / "task [1]"
    folder.mkdir()
    for part in range(3):
        table = pa.table({"query": [f"q{part}", f"r{part}"], "pos": [f"p{part}"] * 2, "neg": [["n"] * part] * 2})
        parquet.write_table(table, folder / f"train-0000{part}-of-00003.parquet")
    [(name, path)] = find_sets(folder).items()
    assert name == "train"
    assert [file.name[:11] for file in files_of(path)] == ["train-00000", "train-00001", "train-00002"]
    pairs = read_pairs(path)
    assert pairs.anchors == ["q0", "r0", "q1", "r1", "q2", "r2"]
    assert (pairs.negative_id >= 0).sum(axis=1).tolist() == [0, 0, 1, 1, 2, 2]
    assert read_pairs(folder).digest == pairs.digest
    assert read_pairs(path, limit=3).anchors == ["q0", "r0", "q1"]
    parquet.write_table(pa.table({"query": ["q"]}), folder / "other.parquet")
    with pytest.raises(AnybatchError, match="holds the data sets other, train; expected one"):
        read_pairs(folder)


def test_training_folders_of_mmeb(mmeb):
    found = find_sets(mmeb / "train")
    assert sorted(found) == ["A-OKVQA", "CIRR", "ImageNet_1K", "MSCOCO", "MSCOCO_i2t", "MSCOCO_t2i"]
    assert {file.name for file in found.values()} == {"original-00000-of-00001.parquet"}
    other = find_sets(mmeb / "train" / "*" / "diverse_instruction-*")
    assert list(other) == sorted(found)
    pairs = read_data(DataConfig(path=str(mmeb / "train"), images=str(mmeb / "images")))
    assert [part.name for part in pairs.sets] == sorted(found)
    assert len(pairs) == 6 * 12
    by_set = {part.name: rows for part, rows in zip(pairs.sets, np.split(np.arange(72), 6), strict=True)}
    lacking = pairs.negative_id < 0
    assert lacking[by_set["MSCOCO"]].all()
    assert 0 < lacking[by_set["CIRR"]].sum() < 36
    texts = [row and row.text for row in pairs.anchors[72 - 12 :]]
    assert all(text.startswith("Find me an image") for text in texts)
    assert not MixedColumn.of(pairs.anchors).has_images[by_set["MSCOCO_t2i"]].any()
    assert pairs.anchors[0].images[0].where.startswith(f"row 1, 'qry_image_path' of {found['A-OKVQA']} (")
    assert pairs.positives[by_set["CIRR"][5]].images[0].where.startswith("row 6, 'pos_image_path' of ")
    (mmeb / "train" / "images_zip").mkdir(exist_ok=True)
    parquet.write_table(pa.table({"qry": ["x"]}), mmeb / "train" / "CIRR" / "train-00000-of-00001.parquet")
    assert find_sets(mmeb / "train")["CIRR"].name == "original-00000-of-00001.parquet"
    (mmeb / "train" / "CIRR" / "train-00000-of-00001.parquet").unlink()


def test_sets_have_their_own_columns_images_and_instructions(mmeb, photos, tmp_path):
    rows = [{"photo": f"{n}.png", "caption": f"c{n}"} for n in range(4)]
    path = write(tmp_path, rows)
    task = mmeb / "train" / "CIRR"
    sets = (
        SetConfig(path=str(path), name="photos", anchor="photo", positive="caption", images=str(photos),
                  anchor_prompt="Represent the image. "),
        SetConfig(path=str(task), anchor_prompt="Change: ", positive_prompt="See: "),
    )  # fmt: skip
    pairs = read_data(DataConfig(sets=sets, images=str(mmeb / "images")))
    prompted = pairs.prompted
    assert contents(prompted[0])[0] == ("Represent the image.", [image(0)])
    assert prompted[0][4].text.startswith("Change: <|image_1|>\n")
    assert prompted[1][0].text == "c0"
    assert prompted[1][4].text.startswith("See: <|image_1|>")
    assert contents(pairs.negatives[0])[:4] == [None] * 4
    assert isinstance(
        read_data(DataConfig(path=str(path), anchor="photo", positive="caption", images=str(photos))).anchors,
        ImageColumn,
    )


def test_evaluation_folders_of_mmeb(mmeb, tmp_path):
    for task in (mmeb / "eval").iterdir():
        data = read_candidates(task, mmeb / "images")
        assert len(data.of_row) == len(data.query) == 4
        assert all(len(numbers) == 4 for numbers in data.of_row)
        [table] = [parquet.read_table(file) for file in task.iterdir()]
        texts, images = table["tgt_text"].to_pylist(), table["tgt_img_path"].to_pylist()
        for row, numbers in enumerate(data.of_row):
            for place, number in enumerate(numbers):
                candidate = data.candidates[int(number)]
                text = candidate if isinstance(candidate, str) else candidate.text
                assert text == texts[row][place]
                if images[row][place]:
                    assert candidate.images[0].encoded == (mmeb / "images" / images[row][place]).read_bytes()
        query = data.queries[int(data.query[1])]
        assert (query if isinstance(query, str) else query.text) == table["qry_text"][1].as_py()
    assert len(read_candidates(mmeb / "eval" / "A-OKVQA", mmeb / "images").candidates) == 4  # each colour once


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"qry_text": "", "tgt_text": ["a"]}, "Row 1 of .*'qry_text' is empty, and has no image"),
        ({"qry_text": "a", "tgt_text": []}, "Row 1 of .*'tgt_text' is empty, and has no image"),
        ({"qry_text": "a", "tgt_text": ["a", "b"], "tgt_img_path": ["1.png"] * 3}, "hold 2 and 3"),
        ({"qry_text": "a", "tgt_text": ["", ""], "tgt_img_path": ["1.png", "gone.png"]}, r"gone\.png \(row 1\)"),
        ({"qry_text": "a", "target": ["x"]}, "no column 'tgt_text'"),
    ],
)
def test_bad_rows_of_evaluation_are_named(photos, row, match):
    with pytest.raises(AnybatchError, match=match):
        read_candidates(write(photos, [row]))


def test_a_right_candidate_alone_is_said(photos, caplog):
    row = {"qry_text": "x", "qry_img_path": "", "tgt_text": ["y", "y"], "tgt_img_path": ["", ""]}
    read_candidates(write(photos, [row, {**row, "tgt_text": ["y", "z"]}]))
    assert "1 of 2 rows have the right candidate alone" in caplog.text


def test_repeated_candidates_count_once(photos):
    row = {"qry_text": "a", "tgt_text": ["x", "y", "x"]}
    data = read_candidates(write(photos, [row, {**row, "tgt_text": ["y", "z"]}]))
    assert (data.queries, data.candidates, data.query.tolist()) == (["a"], ["x", "y", "z"], [0, 0])
    assert [numbers.tolist() for numbers in data.of_row] == [[0, 1], [1, 2]]


# Sides as {"text": ..., "image": ...}: a text, an image, both, two images; negatives are lists of any length.
SIDES = [
    {"query": ("a cat", [1]), "pos": ("p0", []), "neg": [("n0", [2]), ("n1", [])]},
    {"query": (None, [2]), "pos": ("p1", [3]), "neg": []},
    {"query": ("two", [3, 1]), "pos": (None, [4]), "neg": [(None, [5])]},
    {"query": ("text", []), "pos": ("p3", [0]), "neg": [("n3", [1]), (None, [0]), ("n5", [])]},
]


def as_objects(stored, *, several):
    """`SIDES` with objects as cells; `stored`: an image's number as it lies in the file."""

    def cell(text, numbers):
        images = [stored(number) for number in numbers]
        return {"text": text, "image": images if several else images[0] if images else None}

    rows = [{"query": cell(*row["query"]), "pos": cell(*row["pos"])} for row in SIDES]
    return [
        {**cells, "neg": [cell(*negative) for negative in row["neg"]]} for cells, row in zip(rows, SIDES, strict=True)
    ]


def expected(side):
    found = [(text, [image(number) for number in numbers]) for text, numbers in side]
    return [content if content != (None, []) else None for content in found]


@pytest.mark.parametrize("form", ["json", "datasets", "parquet", "without metadata"])
def test_objects_of_a_text_and_images(form, photos, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "anybatch")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paths = as_objects(lambda number: f"{number}.png", several=True)
    by_path = read_pairs(write(photos, paths))
    path = photos / "pairs.jsonl"
    if form != "json":
        rows = as_objects(lambda number: {"bytes": image(number), "path": None}, several=True)
        both = {"text": Value("string"), "image": [Image()]}
        path = tmp_path / "pairs.parquet"
        if form == "without metadata":
            parquet.write_table(pa.Table.from_pylist(rows, pa.schema([
                *((name, pa.struct([("text", pa.string()), ("image", pa.list_(STORED))])) for name in ("query", "pos")),
                ("neg", pa.list_(pa.struct([("text", pa.string()), ("image", pa.list_(STORED))]))),
            ])), path)  # fmt: skip
        else:
            dataset = Dataset.from_list(rows, features=Features({"query": both, "pos": both, "neg": [both]}))
            dataset.to_parquet(path) if form == "parquet" else dataset.save_to_disk(str(path := tmp_path / "saved"))
    pairs = read_pairs(path)
    assert contents(pairs.anchors) == expected(row["query"] for row in SIDES)
    assert contents(pairs.positives) == expected(row["pos"] for row in SIDES)
    for place, column in enumerate(pairs.negatives):
        wanted = [row["neg"][place] if place < len(row["neg"]) else (None, []) for row in SIDES]
        assert contents(column) == expected(wanted)
    assert len(pairs.negatives) == 3
    assert pairs.digest == by_path.digest
    assert pairs.anchors.images is pairs.positives.images  # read once for all sides
    assert pairs.positives[2].images[0].where.startswith(f"row 3, 'pos' of {path}")
    assert (
        "anchor 'query' (texts and images), positive 'pos' (texts and images), negatives 'neg' (texts and images)"
        in caplog.text
    )
    assert read_pairs(path, limit=2).digest == read_pairs(photos / "pairs.jsonl", limit=2).digest


STORED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_objects_of_one_image_and_columns_of_lists(photos, tmp_path):
    rows = [{"query": {"text": "a", "image": "1.png"}, "pos": "p"}, {"query": "text alone", "pos": {"image": "2.png"}}]
    pairs = read_pairs(write(photos, rows))
    assert contents(pairs.anchors) == [("a", [image(1)]), ("text alone", [])]
    assert contents(pairs.positives) == [("p", []), (None, [image(2)])]
    stored = [{"bytes": image(number), "path": None} for number in range(4)]
    columns = {"query_images": [stored[:2], stored[3:]], "query": ["a", "b"], "pos": [stored[1:2], stored[:3]]}
    features = Features({"query_images": [Image()], "query": Value("string"), "pos": [Image()]})
    Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "lists"))
    pairs = read_pairs(tmp_path / "lists")
    assert contents(pairs.anchors) == [("a", [image(0), image(1)]), ("b", [image(3)])]
    assert contents(pairs.positives) == [(None, [image(1)]), (None, [image(number) for number in range(3)])]


@pytest.mark.parametrize(
    ("cell", "match"),
    [
        ({"txt": "a"}, "'query' is an object with the key 'txt'; expected"),
        ({"text": 3}, "'query' is 3, which is no text"),
        ({"text": "a", "image": 3}, "'query' is an object with 3 as an image"),
        ({"text": "", "image": []}, "'query' is empty. Every row needs a text or an image there"),
        ({"image": "gone.png"}, r"no file .*gone\.png \(row 2\)"),
        ({"image": "iVBORw0KGgo" * 500}, r"no file .{1,300} \(row 2\)"),
        ([{"text": "a"}, {"text": "b"}], "An anchor is one text"),
    ],
)
def test_bad_objects_are_named(photos, cell, match):
    rows = [{"query": {"text": "a", "image": "1.png"}, "pos": "p"}, {"query": cell, "pos": "q"}]
    with pytest.raises(AnybatchError, match=match):
        read_pairs(write(photos, rows))


@pytest.mark.parametrize("form", ["files", "stored"])
def test_rows_with_broken_images_are_left_out(form, photos, tmp_path, caplog):
    """Whatever side they are on; what is left is as if they had never been there."""
    contents_of = {number: image(number) for number in range(6)} | {3: image(3)[:60], 4: b"<html>"}
    for number, content in contents_of.items():
        (photos / f"{number}.png").write_bytes(content)
    numbers = [(0, 1, []), (3, 1, []), (2, 0, [5, 4]), (5, 2, [1])]
    rows = [
        {"query": {"text": f"q{row}", "image": f"{anchor}.png"}, "pos": {"image": f"{positive}.png"},
         "neg": [{"image": f"{number}.png"} for number in negatives]}
        for row, (anchor, positive, negatives) in enumerate(numbers)
    ]  # fmt: skip
    path, fine = write(photos, rows), write(photos, [rows[0], rows[3]], "fine.jsonl")
    if form == "stored":
        of_file = lambda name: {"bytes": (photos / name).read_bytes(), "path": None}  # noqa: E731
        sides = [[row["query"], row["pos"], *row["neg"]] for row in rows]
        for cell in (cell for row in sides for cell in row):
            cell["image"] = of_file(cell["image"])
        both = {"text": Value("string"), "image": Image()}
        one = {"image": Image()}
        dataset = Dataset.from_list(rows, features=Features({"query": both, "pos": one, "neg": [one]}))
        dataset.save_to_disk(str(path := tmp_path / "saved"))
    with pytest.raises(AnybatchError, match="cannot be decoded"):
        _ = read_pairs(path).digest
    left = read_pairs(path, skip_bad=True)
    assert "2 rows left out (data.skip_bad): 2, 3. The first: The image in row 2, 'query' of" in caplog.text
    assert contents(left.anchors) == [("q0", [image(0)]), ("q3", [image(5)])]
    assert contents(left.positives) == [(None, [image(1)]), (None, [image(2)])]
    assert [contents(column) for column in left.negatives] == [[None, (None, [image(1)])]]
    assert left.digest == read_pairs(fine).digest
