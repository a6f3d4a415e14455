from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict

from anybatch.core.errors import AnybatchError
from anybatch.data.pairs import PairData, PairSet, join_pairs, text_digest
from anybatch.data.reading import read_pairs
from anybatch.data.retrieval import find_retrieval, read_retrieval
from anybatch.data.sets import find_sets
from tests.images import image

ROWS = [
    {"q": "first question", "a": "an answer, with a comma", "n": "wrong"},
    {"q": "second question", "a": 'a "quoted" answer', "n": "an answer, with a comma"},
    {"q": " first question ", "a": "übrigens", "n": "other"},
]


@pytest.fixture(
    params=["pairs.jsonl", "pairs.jsonl.gz", "pairs.csv", "pairs.tsv", "pairs.csv.gz", "pairs.parquet", "folder"]
)
def any_format(request, tmp_path):
    path = tmp_path / request.param
    frame = pandas.DataFrame(ROWS)
    if "jsonl" in request.param:
        frame.to_json(path, orient="records", lines=True)
    elif "csv" in request.param or "tsv" in request.param:
        frame.to_csv(path, index=False, sep="\t" if "tsv" in request.param else ",")
    elif request.param == "pairs.parquet":
        frame.to_parquet(path)
    else:
        Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def test_every_format_gives_the_same(any_format):
    data = read_pairs(any_format, anchor="q", positive="a", negatives=["n"])
    assert list(data.anchors) == [row["q"] for row in ROWS]
    assert list(data.positives) == [row["a"] for row in ROWS]
    assert list(data.negatives[0]) == [row["n"] for row in ROWS]
    expected = PairData(
        anchors=[r["q"] for r in ROWS], positives=[r["a"] for r in ROWS], negatives=([r["n"] for r in ROWS],)
    )
    assert data.digest == expected.digest
    assert data.to_dataset().column_names == ["anchor", "positive", "negative_1"]
    assert len(read_pairs(any_format, anchor="q", positive="a", limit=2)) == 2


def test_every_format_names_a_misspelt_column(any_format):
    with pytest.raises(AnybatchError, match=r"no column 'qq'.*'q'"):
        read_pairs(any_format, anchor="qq", positive="a")


def test_ids_and_digest():
    data = PairData(anchors=["x", "y", " x"], positives=["p", "q", "q "], negatives=(["q", "r", "p"],))
    np.testing.assert_array_equal(data.anchor_id, [0, 1, 0])
    np.testing.assert_array_equal(data.positive_id, [0, 1, 1])
    np.testing.assert_array_equal(data.negative_id, [[1], [2], [0]])
    assert PairData(anchors=["x"], positives=["y"]).negative_id is None
    swapped = PairData(anchors=["y", "x", " x"], positives=["p", "q", "q "], negatives=(["q", "r", "p"],))
    assert swapped.digest != data.digest
    moved = PairData(anchors=["x", "y", " x", "p"], positives=["q", "q ", "q", "r"])
    assert moved.digest != data.digest


def refuse(path, content, match, **options):
    path.write_text(content, encoding="utf-8") if isinstance(content, str) else path.write_bytes(content)
    with pytest.raises(AnybatchError, match=match):
        read_pairs(path, **options)


GOOD = '{"anchor": "a", "positive": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.jsonl", "", "empty"),
        ("p.jsonl", "\n\n", "no rows"),
        ("p.jsonl", GOOD + "{oops\n", "Line 2 .*no JSON"),
        ("p.jsonl", GOOD + "[1]\n", "Line 2 .*holds a list"),
        ("p.jsonl", GOOD + '{"anchor": "a", "positive": "  "}\n', "Row 2 .*'positive' is empty"),
        ("p.jsonl", GOOD + '{"anchor": null, "positive": "b"}\n', "Row 2 .*'anchor' is empty"),
        ("p.jsonl", GOOD + '{"anchor": 7, "positive": "b"}\n', "Row 2 .*'anchor' is 7, which is no text"),
        ("p.jsonl", GOOD + '{"anchor": "a", "postive": "b"}\n', "no column 'positive' in row 2.*mean 'postive'"),
        ("p.jsonl", b'{"anchor": "\xff", "positive": "b"}\n', "Cannot read.*UTF-8"),
        ("p.csv", "anchor,positive\na,b,c\n", "Line 2 .*number of fields"),
        ("p.csv", ",anchor,positive\n0,a,b,c\n", "Line 2 .*number of fields"),
        ("p.csv", "anchor,positive\na\n", "Line 2 .*number of fields"),
        ("p.csv", "anchor,positive\n", "no rows"),
        ("p.csv", "anchor,anchor,positive\na,b,c\n", "column 'anchor' more than once"),
        ("p.jsonl.gz", gzip.compress(GOOD.encode() * 50, mtime=0)[:-9], "Cannot read"),
        ("p.parquet", "no parquet", "as Parquet"),
        ("p.xlsx", "x", "Cannot tell the format"),
        ("p.jsonl", GOOD + r'{"anchor": "a \ud83d b", "positive": "b"}', "Line 2 .*surrogate pair"),
    ],
)
def test_mistakes_are_named(tmp_path, name, content, match):
    refuse(tmp_path / name, content, match)


def test_questions_that_make_no_sense_are_refused(tmp_path):
    refuse(tmp_path / "p.jsonl", GOOD, "name one column twice", anchor="positive", positive="positive")
    refuse(tmp_path / "p.jsonl", GOOD, "limit is 0", limit=0)
    with pytest.raises(AnybatchError, match="There is no file"):
        read_pairs(tmp_path / "absent.jsonl")
    (tmp_path / "plain").mkdir()
    with pytest.raises(AnybatchError, match="no folder saved by datasets"):
        read_pairs(tmp_path / "plain")


@pytest.fixture
def retrieval(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": 4, "title": "T", "text": "four"}\n{"id": "5", "text": "five"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "one"}\n{"_id": "2", "text": "two"}\n')
    (tmp_path / "qrels.tsv").write_text("query_id\tdoc_id\tscore\tsplit\n1\t4\t1\ttest\n2\t5\t2\ttrain\n")
    return [tmp_path / name for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv")]


def test_retrieval(retrieval):
    with pytest.raises(AnybatchError, match="splits test, train"):
        read_retrieval(*retrieval)
    retrieval[2].write_text("query_id\tdoc_id\tscore\tsplit\n1\t4\t1\ttest\n")
    data = read_retrieval(*retrieval)
    assert data.query_ids == ["1"]
    assert data.query_texts == ["one"]
    assert data.corpus_texts == ["T four", "five"]
    assert data.relevance == {"1": {"4": 1}}
    retrieval[2].write_text("query_id\tdoc_id\tscore\n")
    with pytest.raises(AnybatchError, match="has no judgements"):
        read_retrieval(*retrieval)
    retrieval[2].write_text("query_id\tdoc_id\tscore\n1\t9\t1\n")
    with pytest.raises(AnybatchError, match="judges document 9"):
        read_retrieval(*retrieval)


def test_quotes_in_judgements_are_characters(retrieval):
    retrieval[1].write_text(r'{"id": "\"1", "text": "one"}' + "\n" + r'{"id": "2\"", "text": "two"}' + "\n")
    retrieval[2].write_text('query_id\tdoc_id\tscore\n"1\t4\t1\n2"\t5\t2\n')
    assert read_retrieval(*retrieval, quoting="raw").relevance == {'"1': {"4": 1}, '2"': {"5": 2}}
    with pytest.raises(AnybatchError, match=r"Line 2 .*ends in line 3.*quoting=raw"):
        read_retrieval(*retrieval)
    retrieval[2].write_text('query_id\tdoc_id\tscore\n"""1"\t4\t1\n2"\t5\t2\n')
    assert read_retrieval(*retrieval).relevance == {'"1': {"4": 1}, '2"': {"5": 2}}


def test_a_csv_with_the_unnamed_index_column_of_pandas(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(",anchor,positive\n0,a,b\n1,c,d\n")
    assert list(read_pairs(path).positives) == ["b", "d"]


@pytest.mark.parametrize(("name", "content"), [("p.jsonl.gz", GOOD), ("p.csv.gz", "anchor,positive\na,b\n")])
def test_a_flipped_bit_in_a_packed_file_is_named(tmp_path, name, content):
    packed = bytearray(gzip.compress((content * 500).encode(), mtime=0))
    packed[12] ^= 0xFF
    refuse(tmp_path / name, bytes(packed), "Cannot read")


def test_whole_surrogate_pairs_are_characters(tmp_path):
    (tmp_path / "p.jsonl").write_text(r'{"anchor": "\ud83d\ude00", "positive": "b"}')
    assert list(read_pairs(tmp_path / "p.jsonl").anchors) == ["😀"]


@pytest.mark.parametrize("grade", ["", "high", "1.5", "nan", "inf"])
def test_grades_that_are_no_whole_number(retrieval, grade):
    retrieval[2].write_text(f"query_id\tdoc_id\tscore\n2\t5\t1\n1\t4\t{grade}\n")
    with pytest.raises(AnybatchError, match=r"Row 2 .*grade.*whole number"):
        read_retrieval(*retrieval)


def test_grades_written_as_floats(retrieval):
    retrieval[2].write_text("query_id\tdoc_id\tscore\n1\t4\t1.0\n1\t4\t1\n")
    assert read_retrieval(*retrieval).relevance == {"1": {"4": 1}}
    retrieval[2].write_text("query_id\tdoc_id\tscore\n1\t4\t1.0\n1\t4\t2\n")
    with pytest.raises(AnybatchError, match=r"Row 2 .*differently"):
        read_retrieval(*retrieval)


def test_ids_that_occur_twice(retrieval):
    retrieval[2].write_text("query_id\tdoc_id\tscore\n1\t4\t1\n")
    for path, line in (
        (retrieval[0], '{"id": "4", "text": "again"}\n'),
        (retrieval[1], '{"id": 2, "text": "again"}\n'),
    ):
        before = path.read_text()
        path.write_text(before + line)
        with pytest.raises(AnybatchError, match=r"Row 3 .*again"):
            read_retrieval(*retrieval)
        path.write_text(before)


def test_several_data_sets_lie_one_after_the_other(tmp_path):
    first = PairData(anchors=["a", "b"], positives=["x", "y"], negatives=(["n", "m"],))
    second = PairData(anchors=["a"], positives=["y"], negatives=(["x"],))
    sets = [
        PairSet(name="one", num_rows=2, anchor_prompt="Q: "),
        PairSet(name="two", num_rows=1, positive_prompt="P: "),
    ]
    joined = join_pairs([first, second], sets)
    assert joined.anchors == ["a", "b", "a"]
    assert joined.anchor_id.tolist() == [0, 1, 0]  # the same text under two instructions is still the same text
    assert joined.positive_id.tolist() == [0, 1, 1]
    assert [list(column) for column in joined.prompted] == [
        ["Q: a", "Q: b", "a"],
        ["x", "y", "P: y"],
        ["n", "m", "P: x"],
    ]
    dataset = joined.to_dataset()
    assert dataset["anchor"][:] == ["Q: a", "Q: b", "a"]
    assert joined.digest == text_digest([dataset[name] for name in dataset.column_names])
    assert joined.digest != join_pairs([first, second], [replace(one, anchor_prompt="") for one in sets]).digest
    with pytest.raises(AnybatchError, match="called 'one'"):
        join_pairs([first, second], [sets[0], replace(sets[1], name="one")])
    without = join_pairs([first, replace(second, negatives=())], sets)
    assert without.negatives == (["n", "m", None],)
    assert without.negative_id.tolist() == [[2], [3], [-1]]
    assert without.digest not in (joined.digest, join_pairs([first, second], sets).digest)


def test_data_sets_of_a_folder(tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("b.jsonl", "a.csv.gz", "notes.txt"):
        (tmp_path / "files" / name).write_text("")
    assert list(find_sets(tmp_path / "files")) == ["a", "b"]
    (tmp_path / "files" / "a.tsv").write_text("")
    with pytest.raises(AnybatchError, match=r"called 'a': a\.csv\.gz and a\.tsv\. Rename one"):
        find_sets(tmp_path / "files")
    pairs = PairData(anchors=["a", "b"], positives=["x", "y"])
    DatasetDict({"train": pairs.to_dataset(), "more": pairs.to_dataset()}).save_to_disk(str(tmp_path / "dict"))
    found = find_sets(tmp_path / "dict")
    assert list(found) == ["train", "more"]
    assert list(read_pairs(found["more"]).anchors) == ["a", "b"]
    assert find_sets(found["more"]) == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnybatchError, match="without data sets"):
        find_sets(tmp_path / "empty")


def test_judgements_without_a_relevant_document_are_refused(tmp_path):
    for name in ("corpus", "queries"):
        (tmp_path / f"{name}.jsonl").write_text('{"_id": "1", "text": "words"}\n')
    for grade, refused in (("0", True), ("-1", True), ("1", False)):
        (tmp_path / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n1\t1\t{grade}\n")
        files = tmp_path / "corpus.jsonl", tmp_path / "queries.jsonl", tmp_path / "qrels.tsv"
        if refused:
            with pytest.raises(AnybatchError, match="no document is relevant"):
                read_retrieval(*files)
        else:
            assert read_retrieval(*files).relevance == {"1": {"1": 1}}


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """Loaded by `datasets`, which is stood in for here; without a connection there is one message."""
    saved = Dataset.from_list(ROWS)
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        if configuration == "away":
            raise ConnectionError("no network")
        return saved

    monkeypatch.setattr("datasets.load_dataset", load)
    data = read_pairs("hf://owner/name/pairs", anchor="q", positive="a", limit=2)
    assert list(data.anchors) == [row["q"] for row in ROWS[:2]]
    assert read_pairs("hf://owner/name", anchor="q", positive="a").digest != data.digest
    read_pairs("hf://owner/name/pairs/more", anchor="q", positive="a")
    read_pairs("hf://owner/name:test", anchor="q", positive="a")
    assert asked == [
        ("owner/name", "pairs", "train"),
        ("owner/name", None, "train"),
        ("owner/name", "pairs", "more"),
        ("owner/name", None, "test"),
    ]  # each once
    assert find_sets("hf://owner/name") == {}
    with pytest.raises(AnybatchError, match=r"Cannot load owner/name .*no network.*hf://OWNER/NAME.*download it"):
        read_pairs("hf://owner/name/away")
    with pytest.raises(AnybatchError, match=r"no file owner/name.* A data set of the hub is named hf://owner/name\."):
        read_pairs("owner/name")


def test_bad_rows_are_left_out_where_asked(tmp_path, caplog):
    """Counted and said; what is left is the data of a file without them: the same ids, negatives and digest."""
    rows = [{"query": f"q{n}", "pos": f"p{n}", "neg": [f"n{n}"] * (n % 3)} for n in range(9)]
    good, mixed = tmp_path / "good.jsonl", tmp_path / "mixed.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = [{"query": "", "pos": "x"}, {"query": "x", "pos": 7}, {"query": "y", "pos": "y", "neg": [3]}]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [bad[0], *rows[:4], bad[1], *rows[4:], bad[2]]))
    with pytest.raises(AnybatchError, match=r"In all 3 rows are refused: 1, 6, 12\."):
        read_pairs(mixed)
    left, whole = read_pairs(mixed, skip_bad=True), read_pairs(good)
    assert "mixed.jsonl: 3 rows left out (data.skip_bad): 1, 6, 12. The first: Row 1 of" in caplog.text
    assert any(said.endswith("'query' is empty.") for said in caplog.messages)  # what to do was done
    assert (left.anchors, left.positives, left.digest) == (whole.anchors, whole.positives, whole.digest)
    assert left.negative_id.tolist() == whole.negative_id.tolist()
    mixed.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(AnybatchError, match="In all 3 rows are refused"):
        read_pairs(mixed, skip_bad=True)


def test_bad_rows_with_images_are_left_out_by_their_numbers_in_the_file(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "cut.png").write_bytes(image(2)[:60])
    rows = [("", "a.png"), ("t1", "a.png"), ("t2", "gone.png"), ("t3", "a.png"), ("t4", "cut.png")]
    path = tmp_path / "pairs.csv"
    path.write_text("query,pos\n" + "".join(f"{text},{name}\n" for text, name in rows))
    left = read_pairs(path, skip_bad=True)
    assert (left.anchors, len(left.positives)) == (["t1", "t3"], 2)
    assert "1 row left out (data.skip_bad): 1. The first: Row 1" in caplog.text
    assert "2 rows left out (data.skip_bad): 3, 5. The first: 'pos' of" in caplog.text
    assert any(said.endswith("gone.png (row 3).") for said in caplog.messages)
    assert len(left.digest) == 32  # which reads the images


def test_a_folder_in_the_layout_of_beir(tmp_path):
    assert find_retrieval(tmp_path) is None
    for name in ("corpus", "queries"):
        (tmp_path / f"{name}.jsonl").write_text('{"_id": "1", "title": "", "text": "words"}\n')
    with pytest.raises(AnybatchError, match=r"no judgements qrels/test\.tsv; there are none"):
        find_retrieval(tmp_path)
    (tmp_path / "qrels").mkdir()
    for split in ("dev", "train"):
        (tmp_path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    with pytest.raises(AnybatchError, match=r"no judgements qrels/test\.tsv; there are dev, train\. Choose one"):
        find_retrieval(tmp_path)
    files = find_retrieval(tmp_path, "dev")
    assert files is not None
    assert [Path(file).name for file in files] == ["corpus.jsonl", "queries.jsonl", "dev.tsv"]
    assert read_retrieval(*files).relevance == {"1": {"1": 1}}


def test_data_sets_of_a_pattern(tmp_path):
    for name in ("b.jsonl", "a.csv.gz", "inner/c.tsv", "notes.txt", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_sets(tmp_path / "*.jsonl") == {"[x]": tmp_path / "[x].jsonl", "b": tmp_path / "b.jsonl"}
    assert list(find_sets(tmp_path / "**" / "*.[ct]sv*")) == ["a", "c"]
    assert find_sets(tmp_path / "[x].jsonl") == {}  # a file
    assert find_sets(tmp_path / "*.parquet") == {}
    with pytest.raises(AnybatchError, match=r"There is no file .*\*\.parquet"):
        read_pairs(tmp_path / "*.parquet")
    (tmp_path / "b_test.jsonl").write_text("")
    with pytest.raises(AnybatchError, match="b_test would be trained on"):
        find_sets(tmp_path / "*.jsonl")
