"""Read training pairs and retrieval sets, and refuse what cannot be trained on. Imports errors, files and pictures.

Cost: the texts in memory once, and one pass for ids and digest (about 2 seconds a million short texts). Pictures stay in their files.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from anybatch.errors import AnybatchError
from anybatch.files import check_name, digest_of
from anybatch.pictures import Column, PictureColumn, find_pictures, row_keys

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = ".jsonl, .jsonl.gz, .csv, .csv.gz, .tsv, .tsv.gz, .parquet, or a folder saved by datasets' save_to_disk"


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """One of several data sets, whose rows lie one after the other in a `PairData`.

    Attributes:
        name: For plans, reports and folders; a plain file name.
        num_rows: Its rows.
        anchor_prompt, positive_prompt: Instructions put before its texts in training; a teacher reads the texts without them.
    """

    name: str
    num_rows: int
    anchor_prompt: str = ""
    positive_prompt: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "data set")


@dataclass(frozen=True, kw_only=True, eq=False)
class PairData:
    """Training pairs in row order. A column is a sequence of texts, or a `PictureColumn`.

    Attributes:
        anchors, positives: n texts or pictures each.
        negatives: One such column of n for each column of explicit negatives.
        source: Where they were read, for messages.
        sets: The data sets that the rows come from, in order; empty for one.
    """

    anchors: Column
    positives: Column
    negatives: tuple[Column, ...] = ()
    source: str = ""
    sets: tuple[PairSet, ...] = ()

    def __len__(self) -> int:
        return len(self.anchors)

    @cached_property
    def anchor_id(self) -> np.ndarray:
        """(n,) int64: equal where the anchors are the same text (white space at the ends aside), or the same picture byte for byte."""
        return _identify([self.anchors])[0]

    @property
    def positive_id(self) -> np.ndarray:
        """(n,) int64: equal where the positives are the same text or picture."""
        return self._candidate_ids[0]

    @property
    def negative_id(self) -> np.ndarray | None:
        """(n, h) int64 in the id space of `positive_id`, or None without explicit negatives."""
        return np.stack(self._candidate_ids[1:], axis=1) if self.negatives else None

    @cached_property
    def digest(self) -> str:
        """Over all texts and pictures in row order; the same for the same rows in any file format."""
        return text_digest(self.prompted)

    @cached_property
    def prompted(self) -> list[Column]:
        """Anchors, positives and negatives as the model reads them: texts with the instructions of their data sets."""
        columns = [self.anchors, self.positives, *self.negatives]
        if not any(one.anchor_prompt or one.positive_prompt for one in self.sets):
            return columns
        anchor, positive = (
            [prompt for one in self.sets for prompt in [getattr(one, f"{side}_prompt")] * one.num_rows]
            for side in ("anchor", "positive")
        )
        sides = [anchor, *[positive] * (len(columns) - 1)]
        return [
            column
            if isinstance(column, PictureColumn)
            else [prompt + text for prompt, text in zip(side, column, strict=True)]
            for side, column in zip(sides, columns, strict=True)
        ]

    def to_dataset(self) -> Dataset:
        """A `datasets.Dataset` with the columns anchor, positive, negative_1, ..., instructions included; pictures are decoded as they are read.

        Raises:
            AnybatchError: Pictures, and Pillow is not installed.
        """
        from datasets import Dataset, concatenate_datasets

        names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(self.negatives) + 1))]
        columns = dict(zip(names, self.prompted, strict=True))
        if not any(isinstance(column, PictureColumn) for column in columns.values()):
            return Dataset.from_dict({name: list(column) for name, column in columns.items()})
        # One by one: the order of the columns says who is the anchor, and `select_columns` changes it for some readers only.
        parts = [
            column.decoded(name) if isinstance(column, PictureColumn) else Dataset.from_dict({name: list(column)})
            for name, column in columns.items()
        ]
        return concatenate_datasets(parts, axis=1)

    @cached_property
    def _candidate_ids(self) -> list[np.ndarray]:
        return _identify([self.positives, *self.negatives])


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalData:
    """Queries, documents and which documents are relevant to which query.

    Attributes:
        query_ids, query_texts: Queries, judged ones only.
        corpus_ids, corpus_texts: Documents (title and text joined by a space).
        relevance: Query id to document id to grade.
    """

    query_ids: Sequence[str]
    query_texts: Sequence[str]
    corpus_ids: Sequence[str]
    corpus_texts: Sequence[str]
    relevance: Mapping[str, Mapping[str, int]]


def text_digest(columns: Sequence[Column]) -> str:
    """The digest of anchors, positives and negatives, column after column in row order: what binds a plan to its data."""
    return digest_of(chain([str(len(columns)).encode()], (key for column in columns for key in row_keys(column))))


def join_pairs(parts: Sequence[PairData], sets: Sequence[PairSet]) -> PairData:
    """Several data sets, one after the other.

    Raises:
        AnybatchError: Names that occur twice; different numbers of negative columns; a column with texts in one and pictures in another;
            an instruction for pictures.
    """
    names = [one.name for one in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnybatchError(f"Two data sets are called '{twice[0]}'. Give each its own name (data.sets[].name).")
    widths = sorted({len(part.negatives) for part in parts})
    if len(widths) > 1:
        raise AnybatchError(
            f"The data sets have {' and '.join(map(str, widths))} columns of negatives; expected the same number in each."
        )
    for part, one in zip(parts, sets, strict=True):
        for side, column in (("anchor", part.anchors), ("positive", part.positives)):
            if isinstance(column, PictureColumn) and getattr(one, f"{side}_prompt"):
                raise AnybatchError(
                    f"The data set '{one.name}' has an instruction for its {side}s ({side}_prompt), which are pictures. Instructions are put before "
                    "texts: leave it out."
                )
    return PairData(
        anchors=_join([part.anchors for part in parts], "anchor"),
        positives=_join([part.positives for part in parts], "positive"),
        negatives=tuple(_join([part.negatives[number] for part in parts], "negative") for number in range(widths[0])),
        source=", ".join(part.source for part in parts),
        sets=tuple(sets),
    )


def find_sets(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The data sets under a folder, by name: its files, or the splits of a `DatasetDict`. Empty for one file or one saved data set.

    Raises:
        AnybatchError: A folder that holds neither, or something else beside; two of one name; splits that are meant for testing.
    """
    path = Path(path)
    if not path.is_dir() or (path / "state.json").exists():
        return {}
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        held_out = [name for name in splits if name.lower().startswith(("test", "dev", "val", "eval"))]
        if held_out:
            raise AnybatchError(
                f"{path} holds the splits {', '.join(splits)}; {', '.join(held_out)} would be trained on. Give the folder of one split, such as "
                f"{path / splits[0]}, or name those to train on in data.sets."
            )
        return {name: path / name for name in splits}
    kinds = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
    files = [file for file in sorted(path.iterdir()) if file.name.removesuffix(".gz").endswith(kinds)]
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    foreign = [folder.name for folder in folders if not (folder / "state.json").exists()]
    if foreign:
        raise AnybatchError(
            f"{path} holds the folder {foreign[0]}, which is no data set. Name the data sets in data.sets."
        )
    if not files and not folders:
        raise AnybatchError(
            f"{path} is a folder without data sets. Expected files or folders of these kinds: {FORMATS}."
        )
    found: dict[str, Path] = {}
    for file in [*files, *folders]:
        name = file.name if file.is_dir() else Path(file.name.removesuffix(".gz")).stem
        if name in found:
            raise AnybatchError(
                f"Two data sets are called '{name}': {found[name].name} and {file.name}. Rename one, or name them in data.sets."
            )
        found[name] = file
    return found


def read_pairs(
    path: str | os.PathLike[str],
    *,
    anchor: str = "anchor",
    positive: str = "positive",
    negatives: Sequence[str] = (),
    pictures: Sequence[str] = (),
    limit: int | None = None,
) -> PairData:
    """Read pairs from a file or folder.

    Args:
        path: JSONL, CSV or TSV (each also `.gz`; a TSV has no quoting), Parquet, or a folder saved by `datasets`.
        anchor, positive: Names of the columns: texts, or pictures (the feature `datasets.Image` of a saved folder or Parquet file).
        negatives: Names of columns with explicit negatives.
        pictures: Which of these columns hold the paths of pictures, relative to the file's folder.
        limit: Read only the first rows; None for all.

    Raises:
        AnybatchError: No such file, unknown format, no rows, a line that cannot be read, a column that is not there (with the
            nearest name), a text that is empty or no text (with its row, counted from 1). A picture that is not there is found when
            ids or digest are asked for.
    """
    path = Path(path)
    names = [anchor, positive, *negatives]
    foreign = [name for name in pictures if name not in names]
    if foreign:
        raise AnybatchError(f"'{foreign[0]}' is said to hold pictures, but is none of the columns {', '.join(names)}.")
    if limit is not None and limit < 1:
        raise AnybatchError(f"The limit is {limit}; expected at least 1 row.")
    if len(set(names)) < len(names):
        raise AnybatchError(
            f"The columns {', '.join(names)} name one column twice; anchor, positive and negatives must differ."
        )
    found = find_pictures(path, names, limit)
    columns: dict[str, Any] = {name: [] for name in names} | found
    texts = {name: column for name, column in columns.items() if name not in found}
    for row, record in enumerate(islice(_records(path, list(texts)), limit) if texts else (), start=1):
        for name, column in texts.items():
            if name not in record:
                raise _no_column(name, list(record), f"row {row} of {path}")
            text = record[name]
            if not isinstance(text, str) or not text.strip():
                what = "empty" if text is None or isinstance(text, str) else f"{text!r:.60}, which is no text"
                raise AnybatchError(
                    f"Row {row} of {path}: '{name}' is {what}. Every row needs a text there: fill it or leave the row out."
                )
            column.append(text)
    if not columns[anchor]:
        raise AnybatchError(
            f"{path} is empty: it has no rows. Expected pairs in the columns '{anchor}' and '{positive}'."
        )
    folder = path if path.is_dir() else path.parent
    for name in set(pictures) & texts.keys():
        columns[name] = PictureColumn.of_paths(columns[name], folder, f"'{name}' of {path}")
    first, second, *others = (columns[name] for name in names)
    return PairData(anchors=first, positives=second, negatives=tuple(others), source=str(path))


def read_retrieval(
    corpus: str | os.PathLike[str],
    queries: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    split: str | None = None,
) -> RetrievalData:
    """Read a retrieval set in BEIR's layout.

    Args:
        corpus: JSONL with `id` (or `_id`), `text` and optionally `title`.
        queries: JSONL with `id` (or `_id`) and `text`, optionally `split`.
        qrels: TSV with a header: query id, document id, grade, optionally `split`.
        split: Keep only this split of `qrels`, which must then have a column `split`.

    Raises:
        AnybatchError: Missing files or columns; an id twice; a grade that is no whole number; judgements of unknown queries or
            documents, or twice with different grades; nothing left.
    """
    documents = {
        identity: f"{record.get('title') or ''} {record['text']}".strip() for identity, record in _by_id(Path(corpus))
    }
    texts = {identity: record["text"] for identity, record in _by_id(Path(queries))}
    relevance: dict[str, dict[str, int]] = {}
    seen_splits = set()
    for row, record in enumerate(_records(Path(qrels), ["score"]), start=1):
        if "split" in record:
            seen_splits.add(record["split"])
            if split is not None and record["split"] != split:
                continue
        query = _first(record, ("query_id", "query-id", "qid"), qrels)
        document = _first(record, ("doc_id", "corpus-id", "corpus_id", "docid"), qrels)
        if query not in texts or document not in documents:
            unknown = f"query {query}" if query not in texts else f"document {document}"
            raise AnybatchError(
                f"Row {row} of {qrels} judges {unknown}, which is not in the set. Give the files of one set."
            )
        grade = _grade(record, row, qrels)
        if relevance.setdefault(query, {}).setdefault(document, grade) != grade:
            raise AnybatchError(
                f"Row {row} of {qrels} grades document {document} for query {query} a second time, and differently. Keep one grade."
            )
    if split is not None and not seen_splits:
        raise AnybatchError(f"Asked for split {split!r}, but {qrels} has no column 'split'. Leave split (--split) out.")
    if split is None and len(seen_splits) > 1:
        raise AnybatchError(
            f"{qrels} has the splits {', '.join(sorted(seen_splits))}. Choose one with split (--split)."
        )
    if not relevance:
        found = f"; it has the splits {', '.join(sorted(seen_splits))}" if seen_splits else ""
        raise AnybatchError(f"{qrels} has no judgements{f' of split {split!r}' if split else ''}{found}.")
    return RetrievalData(
        query_ids=list(relevance),
        query_texts=[texts[query] for query in relevance],
        corpus_ids=list(documents),
        corpus_texts=list(documents.values()),
        relevance=relevance,
    )


def _records(path: Path, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Rows of any supported file as mappings; columns are checked where the format states them up front."""
    if not path.exists():
        raise AnybatchError(f"There is no file {path}. Check the path; expected {FORMATS}.")
    if path.is_dir():
        return _folder_records(path, names)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1].lower() if suffixes else ""
    if path.stat().st_size == 0:
        raise AnybatchError(f"{path} is empty (0 bytes). Expected {FORMATS}.")
    if kind in (".jsonl", ".ndjson", ".json"):
        return _json_records(path)
    if kind in (".csv", ".tsv"):
        return _csv_records(path, names, "\t" if kind == ".tsv" else ",")
    if kind == ".parquet":
        return _parquet_records(path, names)
    raise AnybatchError(f"Cannot tell the format of {path} from its name. Expected {FORMATS}.")


def _open(path: Path, newline: str | None = None) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open("rt", encoding="utf-8-sig", newline=newline)


def _json_records(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if "\\ud" in line.lower():
                    json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
                if not isinstance(record, dict):
                    raise AnybatchError(
                        f"Line {number} of {path} holds a {type(record).__name__}; expected one JSON object a line."
                    )
                yield record
        except json.JSONDecodeError as error:
            raise AnybatchError(
                f"Line {number} of {path} is no JSON ({error.msg}, column {error.colno}). Expected one object a line."
            ) from error
        except UnicodeEncodeError as error:
            raise AnybatchError(
                f"Line {number} of {path} holds half of a surrogate pair ({error.object[error.start]!r}), which is no character. "
                "Write the file anew from its source, or leave the line out."
            ) from error
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise AnybatchError(
                f"Cannot read {path}: {error}. Expected UTF-8 text{' in a whole gzip file' if path.suffix == '.gz' else ''}."
            ) from error


def _csv_records(path: Path, names: Sequence[str], delimiter: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path, newline="") as file:
        # In a TSV a quote is a character like any other (5" disk); read as an opening quote it would swallow whole rows.
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            _check_columns(names, list(reader.fieldnames or []), str(path))
            for record in reader:
                if None in record or None in record.values():
                    remedy = (
                        "A TSV field cannot hold a tab or a line break, and quotes are plain characters there; use CSV or JSONL for such texts."
                        if delimiter == "\t"
                        else "Quote fields that hold the separator or a line break."
                    )
                    raise AnybatchError(
                        f"Line {reader.line_num} of {path} has another number of fields than the header ({len(reader.fieldnames or [])}). {remedy}"
                    )
                yield record
        except (csv.Error, UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise AnybatchError(f"Cannot read line {reader.line_num} of {path}: {error}.") from error


def _parquet_records(path: Path, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(names, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=list(names)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise AnybatchError(f"Cannot read {path} as Parquet: {error}.") from error


def _folder_records(path: Path, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise AnybatchError(f"{path} is no folder saved by datasets' save_to_disk ({error}).") from error
    if isinstance(dataset, DatasetDict):
        splits = [str(name) for name in dataset]
        raise AnybatchError(
            f"{path} holds the splits {', '.join(splits)}; give the folder of one of them, such as {path / splits[0]}."
        )
    _check_columns(names, dataset.column_names, str(path))
    for record in dataset.select_columns(list(names)):
        yield dict(record)


def _check_columns(names: Sequence[str], present: list[str], where: str) -> None:
    twice = next((name for name in present if name and present.count(name) > 1), None)
    if twice is not None:
        raise AnybatchError(f"{where} has the column '{twice}' more than once. Rename or remove all but one.")
    for name in names:
        if name not in present:
            raise _no_column(name, present, where)


def _no_column(name: str, present: list[str], where: str) -> AnybatchError:
    close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return AnybatchError(
        f"There is no column '{name}' in {where}; it has {', '.join(map(repr, present)) or 'none'}.{hint}"
    )


def _join(columns: Sequence[Column], name: str) -> Column:
    """A column of several data sets."""
    pictures = [column for column in columns if isinstance(column, PictureColumn)]
    texts = [column for column in columns if not isinstance(column, PictureColumn)]
    if not pictures:
        return [text for column in texts for text in column]
    if texts:
        raise AnybatchError(
            f"The {name} is a picture in some data sets and a text in others; a batch needs one kind. Train them apart, or swap anchor and "
            "positive in data.sets."
        )
    return PictureColumn.join(pictures)


def _identify(columns: Sequence[Column]) -> list[np.ndarray]:
    """Number the distinct texts and pictures of all columns together, in order of first appearance."""
    numbers: dict[str | bytes, int] = {}

    def number(column: Column) -> np.ndarray:
        keys: Iterable[str | bytes] = (
            row_keys(column) if isinstance(column, PictureColumn) else (text.strip() for text in column)
        )
        return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(column))

    return [number(column) for column in columns]


def _first(record: Mapping[str, Any], names: Sequence[str], where: object) -> str:
    for name in names:
        if record.get(name) is not None:
            return str(record[name])
    raise _no_column(names[0], list(record), str(where))


def _by_id(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Id and record of each document or query; every id once, every text a string."""
    seen: set[str] = set()
    for row, record in enumerate(_records(path, ["text"]), start=1):
        identity = _first(record, ("id", "_id"), path)
        if not isinstance(record.get("text"), str):
            raise _no_column("text", list(record), f"row {row} of {path}")
        if identity in seen:
            raise AnybatchError(
                f"Row {row} of {path} has the id {identity} again. Ids must differ: keep one of the rows."
            )
        seen.add(identity)
        yield identity, record


def _grade(record: Mapping[str, Any], row: int, where: object) -> int:
    """The relevance grade of one judgement: a whole number, also written as 1.0."""
    try:
        grade = float(record["score"])
        if grade.is_integer():
            return int(grade)
    except (TypeError, ValueError, KeyError):
        pass
    raise AnybatchError(
        f"Row {row} of {where} has the grade {record.get('score')!r}; expected a whole number such as 1."
    )
