"""Which columns are used for what is chosen by convention, said, and doubted where it is hardly meant."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from anybatch.core.errors import AnybatchError
from anybatch.data.columns import choose_columns
from anybatch.data.images import ImageColumn
from anybatch.data.reading import read_pairs
from anybatch.data.retrieval import read_retrieval
from anybatch.data.sets import find_sets
from tests.images import image


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def said(caplog):
    """What was said since the last call, information and warnings apart."""
    caplog.set_level(logging.INFO, "anybatch")

    def lines():
        found = {"INFO": [], "WARNING": []}
        for record in caplog.records:
            found[record.levelname].append(record.getMessage())
        caplog.clear()
        return " ".join(found["INFO"]), " ".join(found["WARNING"])

    return lines


@pytest.mark.parametrize(
    ("present", "given", "chosen"),
    [
        (["anchor", "positive"], {}, ["anchor", "positive"]),
        (["positive", "id", "anchor", "query"], {}, ["anchor", "positive"]),
        (["query", "pos", "neg"], {}, ["query", "pos", "neg"]),
        (["query", "answer", "document"], {}, ["query", "document"]),
        (["question", "answer", "label"], {}, ["question", "answer"]),
        (["sentence2", "sentence1", "score"], {}, ["sentence1", "sentence2"]),
        (["id", "title", "abstract"], {}, ["title", "abstract"]),
        (["a", "positive"], {"anchor": "a"}, ["a", "positive"]),
        (["query", "b"], {"positive": "b"}, ["query", "b"]),
        (["query", "answer"], {"anchor": "answer", "positive": "query"}, ["answer", "query"]),
        (
            ["anchor", "positive", "negative_10", "negative_2", "negative"],
            {},
            ["anchor", "positive", "negative", "negative_2", "negative_10"],
        ),
        (["anchor", "positive", "negative", "hard"], {"negatives": ["hard"]}, ["anchor", "positive", "hard"]),
        (["anchor", "positive", "negative"], {"negatives": []}, ["anchor", "positive"]),
        (["anchor", "negative"], {"positive": "negative"}, ["anchor", "negative"]),
        (["anchor", "positive", "negation", "neg_score"], {}, ["anchor", "positive"]),
        (["ID", "Query", "Positive", "Hard_Negative_1"], {}, ["Query", "Positive", "Hard_Negative_1"]),
        (
            ["anchor", " positive", " negative"],
            {},
            ["anchor", " positive", " negative"],
        ),  # "anchor, positive, negative"
        (["Anchor", "anchor", "positive"], {}, ["anchor", "positive"]),
        (["Anchor", "b"], {"positive": "b"}, ["Anchor", "b"]),
    ],
)
def test_conventional_columns(present, given, chosen):
    settings = {"anchor": None, "positive": None, "negatives": None, **given}
    assert choose_columns(present, *settings.values(), "x.csv").names == chosen


@pytest.mark.parametrize(
    ("present", "given", "match"),
    [
        (["text", "label"], {}, "Cannot tell anchor and positive in x.csv; it has 'text', 'label'"),
        (["a cat", "it purrs"], {}, r"has 'a cat', 'it purrs'\. Has the file a header line\?.* Name the columns"),
        (["x" * 99, "17"], {}, r"has 'x{40}\.\.\.', '17'\. Has the file a header line\?"),
        (["a cat", "it purrs"], {"anchor": "query"}, r"no column 'query' .*'it purrs'\. Has the file a header line\?"),
        (["a", "b"], {}, r"has 'a', 'b'\. Name the columns"),
        (["the query", "Anchor"], {"anchor": "anchor"}, r"no column 'anchor'.*\. Did you mean 'Anchor'\?$"),
        (["anchor", "postive"], {}, "no column 'positive'.*Did you mean 'postive'"),
        (["anchor;positive"], {}, "one column with ';' in its name: .csv wants commas"),
        (["anchor", "positive"], {"negatives": ["negatve"]}, "no column 'negatve'"),
        (["query", "answer"], {"anchor": "answer"}, "Cannot tell|no column 'positive'"),
        (["anchor", "positive"], {"anchor": "anchor", "positive": "anchor"}, "name one column twice"),
        (["anchor", "positive"], {"negatives": ["positive"]}, "name one column twice"),
    ],
)
def test_columns_that_are_not_there(present, given, match):
    settings = {"anchor": None, "positive": None, "negatives": None, **given}
    with pytest.raises(AnybatchError, match=match):
        choose_columns(present, *settings.values(), "x.csv")


def test_use_is_said_in_one_line(tmp_path, said):
    path = write(
        tmp_path / "p.jsonl",
        [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}", f"m{n}"], "id": n} for n in range(3)],
    )
    data = read_pairs(path)
    assert (data.anchors, data.positives) == (["q0", "q1", "q2"], ["p0", "p1", "p2"])
    assert data.negatives == (["n0", "n1", "n2"], ["m0", "m1", "m2"])
    info, warning = said()
    assert (
        "3 pairs; anchor 'query', positive 'pos', negatives 'neg'; not used: 'id'; 'neg' holds 2 texts a row." in info
    )
    assert warning == ""
    assert read_pairs(path, negatives=()).negatives == ()
    assert "no negatives; not used: 'neg', 'id'." in said()[0]


def test_equal_rows_are_counted(tmp_path, said):
    rows = [("a", "p"), ("a", "q"), ("b", "p"), ("a ", "p"), ("b", "p"), ("a", "p")]
    read_pairs(write(tmp_path / "p.jsonl", [{"anchor": anchor, "positive": positive} for anchor, positive in rows]))
    assert "6 pairs; anchor 'anchor'" in (info := said()[0])
    assert "no other columns; 3 rows repeat another, anchor and positive." in info
    read_pairs(write(tmp_path / "p.jsonl", [{"anchor": anchor, "positive": positive} for anchor, positive in rows[:3]]))
    assert "repeat" not in said()[0]


def test_lists_of_several_positives_and_of_varying_negatives(tmp_path, said):
    rows = [
        {"query": "a", "pos": ["p", "q"], "neg": ["n1", "n2", "n3"]},
        {"query": "b", "pos": "r", "neg": ["m1", "m2"]},
    ]
    data = read_pairs(write(tmp_path / "p.jsonl", rows))
    assert (data.anchors, data.positives) == (["a", "a", "b"], ["p", "q", "r"])
    assert data.anchor_id.tolist() == [0, 0, 1]  # so that they are no negatives of each other
    assert data.negatives == (["n1", "n1", "m1"], ["n2", "n2", "m2"], ["n3", "n3", None])
    assert data.negative_id[:, 2].tolist() == [data.negative_id[0, 2], data.negative_id[0, 2], -1]
    info, warning = said()
    assert "1 rows have several positives, which are pairs of their own" in info
    assert "'neg' holds 2 to 3 texts a row" in info
    assert warning == ""
    with pytest.raises(AnybatchError, match="holds lists of several texts"):
        read_pairs(write(tmp_path / "q.jsonl", [{"anchor": ["a", "b"], "positive": "p"}]))


@pytest.mark.parametrize("cell", [None, "", "  ", [], [""], [None], ["a", None], ["a", 3], 7, {"id": "a"}])
@pytest.mark.parametrize("name", ["anchor", "positive", "negative"])
def test_cells_without_a_text_are_never_trained_on(tmp_path, name, cell):
    rows = [{"anchor": f"a{n}", "positive": f"p{n}", "negative": f"n{n}"} for n in range(4)]
    rows[2][name] = cell
    path = write(tmp_path / "p.jsonl", rows)
    if name == "negative" and cell not in (["a", 3], 7, {"id": "a"}):  # the row has fewer, or none
        negative = read_pairs(path).negatives[0][2]
        assert negative == ("a" if cell == ["a", None] else None)
        return
    remedy = r"data\.negatives=\[\]" if name == "negative" else "leave the row out"
    with pytest.raises(
        AnybatchError, match=f"Row 3 .*'{name}' is (empty|.*no text|an object with the key 'id').*{remedy}"
    ):
        read_pairs(path)


def test_negatives_in_some_rows_only(tmp_path):
    def rows(first):
        return [
            {"anchor": f"a{n}", "positive": f"p{n}", **({"negative": "x"} if n >= first else {})}
            for n in range(first + 2)
        ]

    assert read_pairs(write(tmp_path / "p.jsonl", rows(1))).negatives == ([None, "x", "x"],)
    path = write(tmp_path / "p.jsonl", rows(3000))
    with pytest.raises(AnybatchError, match=r"'negative' only in rows behind .*data\.negatives=\[\]"):
        read_pairs(path)
    assert len(read_pairs(path, negatives=())) == 3002


def column(name, values):
    return [
        {"anchor": f"a text {n}", "positive": f"another {n}", "negative": f"a third {n}", name: value}
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (column("positive", ["yes"] * 20), "all 20 positives are one text"),
        (column("anchor", ["yes"] * 20), "all 20 anchors are one text"),
        (column("positive", [f"label {n % 3}" for n in range(400)]), "400 positives are 3 distinct texts"),
        (column("positive", [str(n / 7) for n in range(20)]), "all positives are numbers"),
        (
            column("negative", ["None" if n % 3 else "x" for n in range(20)]),
            "13 of 20 negatives are words such as None",
        ),
        (column("positive", [f"['a {n}', 'b']" for n in range(20)]), "all positives are written lists"),
        (
            column("positive", [f"a text {n}" for n in range(20)]),
            "in 20 of 20 rows 'anchor' and 'positive' are the same text",
        ),
        (column("positive", [f"fine {n}" for n in range(20)]), None),
        (column("positive", [f"class {n % 20}" for n in range(200)]), None),
    ],
)
def test_doubts_about_a_choice(tmp_path, said, rows, match):
    read_pairs(write(tmp_path / "p.jsonl", rows))
    warning = said()[1]
    assert match in warning if match else warning == ""


def test_paths_of_images(tmp_path, said):
    for n in range(3):
        (tmp_path / f"{n}.PNG").write_bytes(image(n))
    rows = [{"anchor": f"{n}.PNG", "positive": f"a dot {n}"} for n in range(3)]
    assert isinstance(read_pairs(write(tmp_path / "p.jsonl", rows)).anchors, ImageColumn)
    assert "anchor 'anchor' (images)" in said()[0]
    rows[1]["anchor"] = "an image called 1.PNG, and more"
    assert isinstance(read_pairs(write(tmp_path / "p.jsonl", rows)).anchors, list)
    rows[1]["anchor"] = "absent.jpeg"
    with pytest.raises(AnybatchError, match=r"'anchor' .*seems to hold paths of images.*absent\.jpeg \(row 2\)"):
        read_pairs(write(tmp_path / "p.jsonl", rows))
    assert read_pairs(tmp_path / "p.jsonl", images="").anchors[1] == "absent.jpeg"


def test_lists_of_images_are_all_used(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(image(n))
    rows = [{"query": f"a{n}", "pos": "p", "neg": [f"{(n + k) % 4}.png" for k in range(3)]} for n in range(4)]
    data = read_pairs(write(tmp_path / "p.jsonl", rows))
    assert [[column[row].encoded for row in range(4)] for column in data.negatives] == [
        [image((row + k) % 4) for row in range(4)] for k in range(3)
    ]


@pytest.mark.parametrize("images", [None, ""])
def test_a_few_words_among_paths_of_images_are_doubted(tmp_path, said, images):
    (tmp_path / "0.png").write_bytes(image(0))
    rows = [{"anchor": "no image" if n == 2 else "0.png ", "positive": f"p{n}"} for n in range(5)]
    assert read_pairs(write(tmp_path / "p.jsonl", rows), images=images).anchors[2] == "no image"
    assert ("4 of 5 texts look like paths of images" in said()[1]) == (images is None)


def test_one_folder_a_task(tmp_path):
    for name in ("alpha/train.jsonl", "beta/one.csv", "beta/two.tsv", "gamma.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(find_sets(tmp_path)) == ["gamma", "alpha", "beta-one", "beta-two"]
    (tmp_path / "delta").mkdir()
    with pytest.raises(AnybatchError, match="the folder delta, which is no data set"):
        find_sets(tmp_path)
    (tmp_path / "delta" / "dev.jsonl").write_text("x")
    with pytest.raises(AnybatchError, match="delta would be trained on"):
        find_sets(tmp_path)


@pytest.mark.parametrize(
    "names", [("train", name) for name in ("test", "validation-00000", "dev", "eval_2", "pairs-test", "Test")]
)
def test_files_meant_for_testing_are_not_trained_on(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text("x")
    with pytest.raises(AnybatchError, match=rf"{names[1]} would be trained on.*such as .*{names[0]}\.jsonl"):
        find_sets(tmp_path)


def test_names_that_only_begin_alike_are_trained_on(tmp_path):
    for name in ("developers", "values", "contest", "testimony", "retest_questions"):
        (tmp_path / f"{name}.jsonl").write_text("x")
    assert len(find_sets(tmp_path)) == 5


@pytest.mark.parametrize("identity", [10**15, 10**16 + 1, 2**63 - 1, "007", "0010", "1e3", "1.0", "é", "9" * 30])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_ids_are_compared_digit_by_digit(tmp_path, said, identity, ending):
    near = identity + 1 if isinstance(identity, int) and identity < 2**63 - 1 else f"{identity}0"
    if ending == "parquet" and isinstance(identity, int) and not isinstance(near, int):
        near = identity - 1
    files = {}
    for name in ("corpus", "queries"):
        rows = [{"_id": one, "text": f"{name} {one}"} for one in (identity, near)]
        if ending == "parquet":
            import pandas

            files[name] = tmp_path / f"{name}.parquet"
            pandas.DataFrame(rows).to_parquet(files[name])
        else:
            files[name] = write(tmp_path / f"{name}.jsonl", rows)
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text(f"query-id\tcorpus-id\tscore\n{identity}\t{near}\t1\n")
    data = read_retrieval(files["corpus"], files["queries"], qrels)
    assert data.relevance == {str(identity): {str(near): 1}}
    assert data.query_texts == [f"queries {identity}"]
    assert "1 judged queries, 2 documents; not used: 1 queries without judgements." in said()[0]


@pytest.mark.parametrize("identity", [1e16, 4.0, True, None, "", [1], {"a": 1}])
def test_ids_that_are_none(tmp_path, identity):
    corpus = write(tmp_path / "corpus.jsonl", [{"_id": identity, "text": "a"}])
    queries = write(tmp_path / "queries.jsonl", [{"_id": "1", "text": "a"}])
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    with pytest.raises(AnybatchError, match=r"[Rr]ow 1 of .*corpus\.jsonl"):
        read_retrieval(corpus, queries, tmp_path / "qrels.tsv")


@pytest.mark.parametrize(
    ("bad", "ending"),
    [
        ([3], "fill it or leave the row out (train, mine, recommend: --set data.skip_bad=true)."),
        ([3, 7], " In all 2 rows are refused: 3, 7."),
        ([3, *range(40, 50)], " In all 11 rows are refused: 3, 40, 41, 42, 43 and 6 more."),
    ],
)
def test_all_bad_rows_are_counted_and_the_first_named(bad, ending, tmp_path):
    """Empty, of another type, and without the key at all."""
    flaws = [{"anchor": "a", "positive": " "}, {"anchor": 3, "positive": None}, {"anchor": "a"}]
    rows = [flaws[n % 3] if n in bad else {"anchor": f"a {n}", "positive": "p"} for n in range(1, 101)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(AnybatchError) as refused:
        read_pairs(path)
    assert str(refused.value).startswith(f"Row 3 of {path}: 'positive' is empty.")
    assert str(refused.value).endswith(ending)


def test_all_rows_without_their_images_are_counted(tmp_path):
    names = [f"{n}.png" for n in range(8)]
    for name in names[:5]:
        (tmp_path / name).write_bytes(image(3))
    path = tmp_path / "pairs.csv"
    path.write_text("anchor,positive\n" + "".join(f"number {name[0]},{name}\n" for name in names))
    with pytest.raises(AnybatchError, match=r"there is no file .*5\.png.*\. In all 3 rows are refused: 6, 7, 8\.$"):
        read_pairs(path)
