"""Read training pairs and retrieval sets, and refuse what cannot be trained on. Imports errors, files and images.

Cost: the texts in memory once, and one pass for ids and digest (about 2 seconds a million short texts). Images stay in their files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.files import check_name, digest_of
from anybatch.data.columns import (
    NEGATIVE,
    Cell,
    are_image_paths,
    cell_of,
    choose_columns,
    say_columns,
    spread,
    warn_of_columns,
)
from anybatch.data.images import Column, ImageColumn, find_images, row_keys
from anybatch.data.records import FORMATS, KINDS, Quoting, column_names, no_column, records

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("anybatch")
_TESTS = "(test|testing|dev|devel|development|val|valid|validation|eval|evaluation)"
HELD_OUT = re.compile(
    rf"{_TESTS}(?![a-z])|.*(?<![a-z]){_TESTS}(?=$|\.)", re.IGNORECASE
)  # names of splits not to train on


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
    """Training pairs in row order. A column is a sequence of texts, or an `ImageColumn`.

    Attributes:
        anchors, positives: n texts or images each.
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
        """(n,) int64: equal where the anchors are the same text (white space at the ends aside), or the same image byte for byte."""
        return _identify([self.anchors])[0]

    @property
    def positive_id(self) -> np.ndarray:
        """(n,) int64: equal where the positives are the same text or image."""
        return self._candidate_ids[0]

    @property
    def negative_id(self) -> np.ndarray | None:
        """(n, h) int64 in the id space of `positive_id`, or None without explicit negatives."""
        return np.stack(self._candidate_ids[1:], axis=1) if self.negatives else None

    @cached_property
    def digest(self) -> str:
        """Over all texts and images in row order; the same for the same rows in any file format."""
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
            if isinstance(column, ImageColumn)
            else [prompt + text for prompt, text in zip(side, column, strict=True)]
            for side, column in zip(sides, columns, strict=True)
        ]

    def to_dataset(self) -> Dataset:
        """A `datasets.Dataset` with the columns anchor, positive, negative_1, ..., instructions included; images are decoded as they are read.

        Raises:
            AnybatchError: Images, and Pillow is not installed.
        """
        from datasets import Dataset, concatenate_datasets

        names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(self.negatives) + 1))]
        columns = dict(zip(names, self.prompted, strict=True))
        if not any(isinstance(column, ImageColumn) for column in columns.values()):
            return Dataset.from_dict({name: list(column) for name, column in columns.items()})
        # One by one: the order of the columns says who is the anchor, and `select_columns` changes it for some readers only.
        parts = [
            column.decoded(name) if isinstance(column, ImageColumn) else Dataset.from_dict({name: list(column)})
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

    @cached_property
    def digest(self) -> str:
        """Of all of it."""
        judged = [f"{query} {sorted(grades.items())}" for query, grades in sorted(self.relevance.items())]
        columns = (self.query_ids, self.query_texts, self.corpus_ids, self.corpus_texts, judged)
        return text_digest(columns)


def text_digest(columns: Sequence[Column]) -> str:
    """The digest of anchors, positives and negatives, column after column in row order: what binds a plan to its data."""
    return digest_of(chain([str(len(columns)).encode()], (key for column in columns for key in row_keys(column))))


def join_pairs(parts: Sequence[PairData], sets: Sequence[PairSet]) -> PairData:
    """Several data sets, one after the other.

    Raises:
        AnybatchError: Names that occur twice; different numbers of negative columns; a column with texts in one and images in another;
            an instruction for images.
    """
    names = [one.name for one in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnybatchError(f"Two data sets are called '{twice[0]}'. Give each its own name (data.sets[].name).")
    widths = sorted({len(part.negatives) for part in parts})
    if len(widths) > 1:
        raise AnybatchError(
            f"The data sets have {' and '.join(map(str, widths))} columns of negatives; expected the same number in each. "
            "To train without any: data.negatives=[]."
        )
    for part, one in zip(parts, sets, strict=True):
        for side, column in (("anchor", part.anchors), ("positive", part.positives)):
            if isinstance(column, ImageColumn) and getattr(one, f"{side}_prompt"):
                raise AnybatchError(
                    f"The data set '{one.name}' has an instruction for its {side}s ({side}_prompt), which are images. Instructions are put before "
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
    """The data sets under a folder, by name: its files and saved data sets, those of its folders (one a task), or the splits of a `DatasetDict`.

    Empty for one file or one saved data set.

    Raises:
        AnybatchError: A folder that holds neither, or something else beside; two of one name; splits that are meant for testing.
    """
    path = Path(path)
    if not path.is_dir() or (path / "state.json").exists():
        return {}
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        sets = [(name, path / name) for name in splits]
    else:
        sets = list(_sets_in(path))
        for folder in sorted(path.iterdir()):
            if not folder.is_dir() or (folder / "state.json").exists():
                continue
            inner = list(_sets_in(folder))  # one folder a task
            if not inner and not folder.name.startswith("."):
                raise AnybatchError(
                    f"{path} holds the folder {folder.name}, which is no data set. Name the data sets in data.sets."
                )
            sets += [(folder.name if len(inner) == 1 else f"{folder.name}-{name}", file) for name, file in inner]
    if not sets:
        raise AnybatchError(
            f"{path} is a folder without data sets. Expected files or folders of these kinds: {FORMATS}."
        )
    held_out = [name for name, file in sets if HELD_OUT.match(file.name)]
    if held_out:
        example = next((f", such as {file}" for _, file in sets if not HELD_OUT.match(file.name)), "")
        raise AnybatchError(
            f"{path} holds {', '.join(name for name, _ in sets)}; {', '.join(held_out)} would be trained on. Give one of them{example}, or name those to "
            "train on in data.sets."
        )
    found: dict[str, Path] = {}
    for name, file in sets:
        if name in found:
            raise AnybatchError(
                f"Two data sets are called '{name}': {found[name].name} and {file.name}. Rename one, or name them in data.sets."
            )
        found[name] = file
    return found


def _sets_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of pairs and saved data sets right in a folder, with their names."""
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".gz")
        if path.is_file() and name.lower().endswith(KINDS):
            yield Path(name).stem, path
        elif (path / "state.json").exists():
            yield path.name, path


def read_pairs(
    path: str | os.PathLike[str],
    *,
    anchor: str | None = None,
    positive: str | None = None,
    negatives: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    quoting: Quoting | None = None,
    limit: int | None = None,
) -> PairData:
    """Read pairs from a file or folder, and say to the log (`anybatch`, INFO) which columns are used for what and which are not.

    Args:
        path: JSONL, CSV or TSV (each also `.gz`), Parquet, or a folder saved by `datasets`.
        anchor, positive: Names of the columns: texts, or images (the feature `datasets.Image` of a saved folder or Parquet file). None for
            conventional ones: anchor and positive, query and pos, question and answer, and others (`anybatch.data.columns.CONVENTIONS`).
        negatives: Names of columns with explicit negatives. None for those called negative, neg, negative_1 and the like; () for none.
        images: Which of these columns hold the paths of images, relative to the file's folder. None for those whose texts are all such
            paths; () for none.
        quoting: Of CSV and TSV. None for the usual rules (RFC 4180), refusing a file that can also be read without; "standard" to insist on
            them, "raw" where quotes are plain characters.
        limit: Read only the first rows; None for all.

    In JSON lines, Parquet and saved folders a cell may hold a list of texts. Several positives of a row are pairs of their own, several
    negatives are columns: as many as every row has, with a warning where some have more.

    Raises:
        AnybatchError: No such file, unknown format, no rows, a line that cannot be read, a column that is not there (with the
            nearest name), a text that is empty or no text (with its row, counted from 1), negatives in some rows only, paths of images
            that are not there. A declared image that is not there is found when ids or digest are asked for.

    Cost: the texts in memory once; about 3 seconds a million rows of JSON.
    """
    path = Path(path)
    where = str(path)
    present = column_names(path, quoting)
    if not present:
        raise AnybatchError(f"{path} is empty: it has no rows. Expected pairs of anchor and positive.")
    chosen = choose_columns(present, anchor, positive, negatives, where)
    foreign = [name for name in images or () if name not in chosen.names]
    if foreign:
        raise AnybatchError(
            f"'{foreign[0]}' is said to hold images, but is none of the columns {', '.join(chosen.names)}."
        )
    if limit is not None and limit < 1:
        raise AnybatchError(f"The limit is {limit}; expected at least 1 row.")
    limit = limit and min(limit, sys.maxsize)
    columns: dict[str, list[Any]] = {name: [column] for name, column in find_images(path, chosen.names, limit).items()}
    cells: dict[str, list[Cell]] = {name: [] for name in chosen.names if name not in columns}
    later = dict.fromkeys(present)
    for row, record in enumerate(islice(records(path, list(cells), quoting), limit) if cells else (), start=1):
        for name, column in cells.items():
            column.append(cell_of(record, name, row, where, negative=name in chosen.negatives))
        if not later.keys() >= record.keys():
            later.update(dict.fromkeys(record))
    late = [name for name in later if NEGATIVE.fullmatch(name) and name not in present]
    if late and negatives is None:
        raise AnybatchError(f"{path} has '{late[0]}' in some rows only. Fill it in all rows, or set data.negatives=[].")
    if not all(cells.values()) or not all(len(column) for [column] in columns.values()):
        raise AnybatchError(
            f"{path} is empty: it has no rows. Expected pairs in the columns '{chosen.anchor}' and '{chosen.positive}'."
        )
    texts, remarks = spread(cells, chosen, where)
    folder = path if path.is_dir() else path.parent
    for name, parts in texts.items():
        declared = name in images if images is not None else None
        if declared or (declared is None and all(are_image_paths(name, part, folder, where) for part in parts)):
            columns[name] = [ImageColumn.of_paths(part, folder, f"'{name}' of {path}") for part in parts]
    found = texts | columns
    pairs = PairData(
        anchors=found[chosen.anchor][0],
        positives=found[chosen.positive][0],
        negatives=tuple(column for name in chosen.negatives for column in found[name]),
        source=where,
    )
    say_columns(where, chosen, list(columns), [name for name in later if name not in chosen.names], len(pairs), remarks)
    warn_of_columns(where, chosen, {name: parts[0] for name, parts in texts.items() if name not in columns})
    return pairs


def read_retrieval(
    corpus: str | os.PathLike[str],
    queries: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    split: str | None = None,
    quoting: Quoting | None = None,
) -> RetrievalData:
    """Read a retrieval set in BEIR's layout.

    Args:
        corpus: JSONL with `id` (or `_id`), `text` and optionally `title`.
        queries: JSONL with `id` (or `_id`) and `text`, optionally `split`.
        qrels: TSV with a header: query id, document id, grade, optionally `split`.
        split: Keep only this split of `qrels`, which must then have a column `split`.
        quoting: Of TSV and CSV, see `read_pairs`.

    Ids are compared as texts, digit by digit. What is not used (queries without judgements, other splits) is said to the log.

    Raises:
        AnybatchError: Missing files or columns; an id twice, or one that is neither a text nor a whole number; a grade that is no whole number; judgements of unknown queries or
            documents, or twice with different grades; nothing left.
    """
    documents = {
        identity: f"{record.get('title') or ''} {record['text']}".strip()
        for identity, record in _by_id(Path(corpus), quoting)
    }
    texts = {identity: record["text"] for identity, record in _by_id(Path(queries), quoting)}
    relevance: dict[str, dict[str, int]] = {}
    seen_splits: Counter[str] = Counter()
    names = column_names(Path(qrels), quoting)
    if "score" not in names:
        raise no_column("score", names, str(qrels))
    for row, record in enumerate(records(Path(qrels), quoting=quoting), start=1):
        if "split" in record:
            seen_splits[str(record["split"])] += 1
            if split is not None and record["split"] != split:
                continue
        query = _id(record, ("query_id", "query-id", "qid"), row, qrels)
        document = _id(record, ("doc_id", "corpus-id", "corpus_id", "docid"), row, qrels)
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
    if not any(grade > 0 for grades in relevance.values() for grade in grades.values()):
        raise AnybatchError(
            f"No judgement in {qrels} has a grade above 0, so that no document is relevant. Is 'score' the right column?"
        )
    others = ", ".join(f"{name!r} ({count} judgements)" for name, count in seen_splits.items() if name != split)
    logger.info(
        "%s: %d judged queries, %d documents; not used: %d queries without judgements%s.",
        qrels,
        len(relevance),
        len(documents),
        len(texts) - len(relevance),
        f", split {others}" if split is not None and others else "",
    )
    return RetrievalData(
        query_ids=list(relevance),
        query_texts=[texts[query] for query in relevance],
        corpus_ids=list(documents),
        corpus_texts=list(documents.values()),
        relevance=relevance,
    )


def _join(columns: Sequence[Column], name: str) -> Column:
    """A column of several data sets."""
    images = [column for column in columns if isinstance(column, ImageColumn)]
    texts = [column for column in columns if not isinstance(column, ImageColumn)]
    if not images:
        return [text for column in texts for text in column]
    if texts:
        raise AnybatchError(
            f"The {name} is an image in some data sets and a text in others; a batch needs one kind. Train them apart, or swap anchor and "
            "positive in data.sets."
        )
    return ImageColumn.join(images)


def _identify(columns: Sequence[Column]) -> list[np.ndarray]:
    """Number the distinct texts and images of all columns together, in order of first appearance."""
    numbers: dict[str | bytes, int] = {}

    def number(column: Column) -> np.ndarray:
        keys: Iterable[str | bytes] = (
            row_keys(column) if isinstance(column, ImageColumn) else (text.strip() for text in column)
        )
        return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(column))

    return [number(column) for column in columns]


def _id(record: Mapping[str, Any], names: Sequence[str], row: int, where: object) -> str:
    """The id in the first of these columns that is there, as a text; of a float digits may be lost already."""
    for name in names:
        value = record.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        raise AnybatchError(
            f"Row {row} of {where} has the {name} {value!r} ({type(value).__name__}); expected a text or a whole number. Write ids as texts."
        )
    raise no_column(names[0], list(record), f"row {row} of {where}, or it is empty there")


def _by_id(path: Path, quoting: Quoting | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Id and record of each document or query; every id once, every text a string."""
    seen: set[str] = set()
    for row, record in enumerate(records(path, quoting=quoting), start=1):
        identity = _id(record, ("id", "_id"), row, path)
        if "text" not in record:
            raise no_column("text", list(record), f"row {row} of {path}")
        for name in ("text", "title"):
            if not isinstance(record.get(name), str) and not (name == "title" and record.get(name) is None):
                raise AnybatchError(f"Row {row} of {path} has the {name} {record[name]!r:.60}; expected a text.")
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
