"""What an independent writer wrote is read back, row by row; what can be read two ways, or not at all, is named with
its line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anybatch.core.errors import AnybatchError
from anybatch.data.reading import read_pairs
from anybatch.data.records import column_names, records

LETTERS = "ab \"',\t\n\r\\[]{}:0é😀\x0b\x0c\x1c\x85\u2028\u2029\ufeff\x00"
TEXT = st.text(st.sampled_from(LETTERS), min_size=1, max_size=8).filter(str.strip)
ROWS = st.lists(st.tuples(TEXT, TEXT, st.text(st.sampled_from(LETTERS), max_size=8)), min_size=1, max_size=6)
FAST = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def pairs_of(path, **options):
    data = read_pairs(path, negatives=(), images="", **options)
    return list(zip(data.anchors, data.positives, strict=True))


@FAST
@given(
    rows=ROWS,
    delimiter=st.sampled_from(["csv", "tsv"]),
    style=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    bom=st.booleans(),
)
def test_what_csv_writes_is_read_back(tmp_path, rows, delimiter, style, bom):
    path = tmp_path / f"p.{delimiter}"
    with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.writer(file, delimiter="," if delimiter == "csv" else "\t", quoting=style)
        writer.writerows([("anchor", "positive", "more"), *rows])
    expected = [(anchor, positive) for anchor, positive, _ in rows]
    assert pairs_of(path, quoting="standard") == expected
    try:
        assert pairs_of(path) == expected
    except AnybatchError:  # only what really can be read both ways
        assert len(pairs_of(path, quoting="raw")) > len(rows)


@FAST
@given(rows=ROWS, line_break=st.sampled_from(["\n", "\r\n"]))
def test_raw_files_are_read_as_they_stand(tmp_path, rows, line_break):
    rows = [[text.translate({9: None, 10: None, 13: None}) for text in row] for row in rows]
    rows = [row for row in rows if row[0].strip() and row[1].strip()] or [["a", "b", ""]]
    path = tmp_path / "p.tsv"
    lines = ["\t".join(row) for row in [["anchor", "positive", "more"], *rows]]
    path.write_bytes(line_break.join([*lines, ""]).encode())
    assert pairs_of(path, quoting="raw") == [tuple(row[:2]) for row in rows]


@FAST
@given(rows=ROWS, ascii=st.booleans())
def test_what_json_writes_is_read_back(tmp_path, rows, ascii):
    path = tmp_path / "p.jsonl.gz"
    lines = [json.dumps(dict(zip(("anchor", "positive", "more"), row)), ensure_ascii=ascii) for row in rows]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert pairs_of(path) == [row[:2] for row in rows]


@FAST
@given(rows=ROWS, kind=st.sampled_from([pyarrow.string(), pyarrow.large_string(), "dictionary", "list"]))
def test_what_pyarrow_writes_is_read_back(tmp_path, rows, kind):
    path = tmp_path / "p.parquet"
    columns = {}
    for name, column in zip(("anchor", "positive"), zip(*(row[:2] for row in rows))):
        values = pyarrow.array([[text] for text in column] if kind == "list" else list(column))
        columns[name] = (
            values if kind == "list" else values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
        )
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert pairs_of(path) == [row[:2] for row in rows]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_ordinary_quotes_are_read_as_pandas_reads_them(tmp_path, ending):
    mark = "," if ending == "csv" else "\t"
    path = tmp_path / f"p.{ending}"
    lines = [
        "anchor|positive",
        'say "hi"|5" disk',
        '"say ""hi"""|"a|b, c"',
        '"two\nlines"|x',
        '"whole"|it\'s',
        "",
        '"x"|"y"',
    ]
    path.write_text("\r\n".join(lines).replace("|", mark) + "\n", newline="")
    expected = [
        ('say "hi"', '5" disk'),
        ('say "hi"', f"a{mark}b, c"),
        ("two\nlines", "x"),
        ("whole", "it's"),
        ("x", "y"),
    ]
    assert pairs_of(path) == expected
    frame = pandas.read_csv(path, sep=mark)
    assert list(zip(frame.anchor, frame.positive, strict=True)) == expected


def refuse(path, content, match, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AnybatchError, match=match):
        pairs_of(path, **options)


@pytest.mark.parametrize("mark", [",", "\t"])
def test_a_field_that_merely_opens_with_a_quote_swallows_no_rows(tmp_path, caplog, mark):
    path = tmp_path / ("p.csv" if mark == "," else "p.tsv")
    plain = [f"a{row}|p{row}" for row in range(40)]

    def written(**changed):
        rows = [changed.get(f"row{row}", line) for row, line in enumerate(plain)]
        return "\n".join(["anchor|positive", *rows]).replace("|", mark) + "\n"

    never = "Line 12 .*opens a quoted field that does not end.*quoting=raw"
    refuse(path, written(row10='"hello|p10'), never)
    refuse(path, written(row10='"hello|p10')[:-1], never)
    behind = "Line 12 .*opens a quoted field that ends in line {} with more text behind it.*quoting=raw"
    refuse(path, written(row10='"hi" he said|p10'), behind.format(12))
    refuse(path, written(row10='"hello|p10', row30='"there|p30'), behind.format(32))
    refuse(path, written(row10='"hello|p10', row30='say "hi"|p30'), behind.format(32))
    both = "Line 12 .*opens a quoted field that ends in line {}.*each of these lines would be a row by itself"
    refuse(path, written(row10='"hello|p10', row30='5"|p30'), both.format(32))
    if mark == "\t":
        refuse(path, written(row10='"hello|p10', row11='5"|p30'), both.format(13))
    else:  # two lines of prose with a comma each are as likely, so that the rules hold, and it is said
        path.write_text(written(row10='"hello|p10', row11='5"|p30'))
        assert len(pairs_of(path)) == 39
        assert re.search(both.format(13) + ".*read as one text", caplog.text)
        caplog.clear()
        assert len(pairs_of(path, quoting="standard")) == 39
        path.write_text(written().replace("anchor,positive", '"anchor","positive"') + '"a, b\nc","d"\n')
        assert pairs_of(path)[-1] == ("a, b\nc", "d")  # who quotes names of columns quotes texts
        assert "opens a quoted field" not in caplog.text
    refuse(path, written(row10='"hello|p10', row39='a39|p39"'), "Lines 12 to 41 .*another number of fields")
    refuse(path, written(row10='a10|"hello', row39='a39|p39"'), both.format(41))
    quoted = '"a, text, with\na comma\tor a tab"|x'  # the file does follow the rules, but so many lines are no chance
    refuse(path, written(row3=quoted, row10='"hello|p10', row30='5"|p30'), "Line 13 .*ends in line 33")
    for content in (written(row10='"hello|p10', row30='5"|p30'), written(row10='"hi" he said|p10')):
        path.write_text(content)
        assert len(pairs_of(path, quoting="raw")) == 40


def test_flaws_of_tables_are_named_with_their_line(tmp_path):
    path = tmp_path / "p.csv"
    head = "anchor,positive\n"
    refuse(path, head + "a,b\na,b,c\n", r"Line 3 .*another number of fields \(3\) than the header \(2\)")
    refuse(path, head + 'a,"b\nc"\n\na\n', r"Line 5 .*another number of fields \(1\)")
    refuse(path, head + "a,b\n ,\n", r"Row 2 .*'anchor' is empty")
    refuse(path, head + "a,b\n \n", r"Line 3 .*another number of fields \(1\)")
    refuse(path, "a,b\nc,d\n", "Cannot tell anchor and positive.*has 'a', 'b'")
    many = head + "a,b\n" * 5000
    latin = (many + 'ä,"b\nö"\n').encode("latin-1")
    anew = r"iconv -f WINDOWS-1252 -t UTF-8{} > \S+/utf8-p\.csv$"
    refuse(path, latin, r"line 5002 of \S+/p\.csv: it is not UTF-8.*byte 0xe4.*Latin-1.*" + anew.format(r" \S+/p\.csv"))
    packed = r"line 5002 of .*gzip -dc \S+/p\.csv\.gz \| " + anew.format("")
    refuse(tmp_path / "p.csv.gz", gzip.compress(latin), packed)
    refuse(path, (head + "a,b\n").encode("utf-16"), "line 1 of .*not UTF-8.*UTF-16")
    refuse(path, "a cat,it purrs\na,b\na,b\n", "Has the file a header line")
    refuse(path, "a cat,a cat\na,b\na,b\n", "'a cat' more than once.*Has the file a header line")
    refuse(path, gzip.compress(head.encode()), "packed with gzip: add .gz")
    refuse(path, head + "a,b\n", "quoting is 'none'; expected one of standard, raw", quoting="none")
    path.write_text("anchor,positive,,\na,b,,\n")  # columns without a name are nobody's
    assert pairs_of(path) == [("a", "b")]
    path.write_text(head + f'a,"{"x" * 300_000}"\n')  # Python's own limit is 131,072
    assert len(pairs_of(path)[0][1]) == 300_000


def test_flaws_of_json_lines_are_named_with_their_line(tmp_path):
    path = tmp_path / "p.jsonl"
    good = '{"anchor": "a", "positive": "b"}\n'
    refuse(
        path, good + '\n{"anchor": "a", "positive": "b", "anchor": "c"}\n', "Line 3 .*key 'anchor' stands a second time"
    )
    refuse(
        path,
        good + '{"anchor": "a", "positive": "b", "m": [{"x": 1, "x": 1}]}\n',
        "Line 2 .*key 'x' stands a second time",
    )
    refuse(path, good + '{"anchor": "a", "positive": "b",}\n', "Line 2 .*no JSON")
    refuse(path, good + '{"anchor": "a", "positive": "b", "id": %s}\n' % ("9" * 5000), "Line 2 .*digits")
    refuse(path, good + '{"anchor": NaN, "positive": "b"}\n', "Row 2 .*'anchor' is nan, which is no text")
    refuse(path, good + '"text"\n', "Line 2 .*holds a str")
    refuse(path, '[{"anchor": "a", "positive": "b"}]', "Line 1 .*holds a list.*one JSON array")
    refuse(path, "[\n" + good + "]", "Line 1 .*no JSON.*one JSON array")
    refuse(path, good + "[" * 100_000 + "\n", "Line 2 .*(recursion|no JSON)")
    path.write_text("\n" + good + "\u2028\n".join([""]) + '{"anchor": "x\u2028y", "positive": "b\x85"}\n')
    assert pairs_of(path) == [("a", "b"), ("x\u2028y", "b\x85")]


def test_broken_texts_and_files_of_arrow(tmp_path):
    import datasets

    broken = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe"))
    pyarrow.parquet.write_table(pyarrow.table({"anchor": broken, "positive": ["b"]}), tmp_path / "p.parquet")
    with pytest.raises(AnybatchError, match=r"Cannot read .*p\.parquet as Parquet"):
        read_pairs(tmp_path / "p.parquet")
    folder = tmp_path / "folder"
    rows = datasets.Dataset.from_dict({"anchor": ["a", "b"], "positive": [["p"], ["q"]]})
    rows.with_format("numpy").save_to_disk(str(folder))
    assert pairs_of(folder) == [("a", "p"), ("b", "q")]
    file = next(folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(AnybatchError, match="folder"):
        read_pairs(folder)


def test_very_many_columns_take_no_time(tmp_path):
    """Checks of the header were quadratic: a minute for 100,000 columns."""
    import time

    path = tmp_path / "p.csv"
    names = ["anchor", "positive", *map(str, range(100_000))]
    path.write_text("\n".join(",".join(row) for row in [names, *[["a", "b", *["0"] * 100_000]] * 3]) + "\n")
    started = time.perf_counter()
    assert pairs_of(path) == [("a", "b")] * 3
    with pytest.raises(AnybatchError, match=r"no column 'quest' .*and 99982 more\.") as refused:
        read_pairs(path, anchor="quest")
    assert len(str(refused.value)) < 1000
    assert time.perf_counter() - started < 10


def test_all_columns_of_all_kinds(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("a,b\n1,2\n")
    assert list(records(path)) == [{"a": "1", "b": "2"}]
    assert column_names(path) == ["a", "b"]
    (tmp_path / "p.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    assert column_names(tmp_path / "p.jsonl") == ["a", "b"]
