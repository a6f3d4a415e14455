"""Read training pairs, and refuse what cannot be trained on. Images stay in their files."""

from __future__ import annotations

import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
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
from anybatch.data.images import ImageColumn, find_images
from anybatch.data.inputs import Column, instructed, row_keys
from anybatch.data.records import FORMATS, KINDS, Quoting, column_names, records

if TYPE_CHECKING:
    from datasets import Dataset

_TESTS = "(test|testing|dev|devel|development|val|valid|validation|eval|evaluation)"
# Names of splits not to train on.
HELD_OUT = re.compile(rf"{_TESTS}(?![a-z])|.*(?<![a-z]){_TESTS}(?=$|\.)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """One of several data sets, whose rows lie one after the other in a `PairData`.

    Prompts are instructions put before its texts in training; a teacher reads the texts without them.

    >>> PairSet(name="questions", num_rows=1000, anchor_prompt="Find the answer: ").num_rows
    1000
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

    >>> pairs = PairData(anchors=["a cat", "a dog", "a cat "], positives=["it purrs", "it barks", "it sleeps"])
    >>> pairs.anchor_id.tolist(), pairs.positive_id.tolist()
    ([0, 1, 0], [0, 1, 2])
    """

    anchors: Column
    positives: Column
    negatives: tuple[Column, ...] = ()
    source: str = ""
    sets: tuple[PairSet, ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether either side is images."""
        return any(isinstance(side, ImageColumn) for side in (self.anchors, self.positives))

    def __len__(self) -> int:
        return len(self.anchors)

    @cached_property
    def anchor_id(self) -> np.ndarray:
        """(n,) int64: equal where the anchors are the same text (white space at the ends aside) or image."""
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
        if not any(part.anchor_prompt or part.positive_prompt for part in self.sets):
            return columns
        of_anchors = [part.anchor_prompt for part in self.sets for _ in range(part.num_rows)]
        of_others = [part.positive_prompt for part in self.sets for _ in range(part.num_rows)]
        return [instructed(column, of_others if place else of_anchors) for place, column in enumerate(columns)]

    def to_dataset(self) -> Dataset:
        """A `datasets.Dataset` with the columns anchor, positive, negative_1, ..., instructions included; images are
        decoded as they are read.
        """
        from datasets import Dataset, concatenate_datasets

        names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(self.negatives) + 1))]
        # One by one: the order of the columns says who is the anchor, and `select_columns` changes it for some readers.
        parts = [
            column.decoded(name) if isinstance(column, ImageColumn) else Dataset.from_dict({name: list(column)})
            for name, column in zip(names, self.prompted, strict=True)
        ]
        return concatenate_datasets(parts, axis=1)

    @cached_property
    def _candidate_ids(self) -> list[np.ndarray]:
        return _identify([self.positives, *self.negatives])


def text_digest(columns: Sequence[Column]) -> str:
    """The digest of anchors, positives and negatives, column after column: what binds a plan to its data."""
    return digest_of(chain([str(len(columns)).encode()], (key for column in columns for key in row_keys(column))))


def join_pairs(parts: Sequence[PairData], sets: Sequence[PairSet]) -> PairData:
    """Several data sets, one after the other."""
    names = [part.name for part in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnybatchError(f"Two data sets are called '{twice[0]}'. Give each its own name (data.sets[].name).")
    widths = sorted({len(part.negatives) for part in parts})
    if len(widths) > 1:
        raise AnybatchError(
            f"The data sets have {' and '.join(map(str, widths))} columns of negatives; expected the same number in "
            "each. To train without any: data.negatives=[]."
        )
    for pairs, part in zip(parts, sets, strict=True):
        for side, column in (("anchor", pairs.anchors), ("positive", pairs.positives)):
            if isinstance(column, ImageColumn) and getattr(part, f"{side}_prompt"):
                raise AnybatchError(
                    f"The data set '{part.name}' has an instruction for its {side}s ({side}_prompt), which are images. "
                    "Leave it out."
                )
    return PairData(
        anchors=_join([part.anchors for part in parts], "anchor"),
        positives=_join([part.positives for part in parts], "positive"),
        negatives=tuple(_join([part.negatives[number] for part in parts], "negative") for number in range(widths[0])),
        source=", ".join(part.source for part in parts),
        sets=tuple(sets),
    )


def find_sets(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The data sets that a path names, by their names; empty for one file or one saved data set.

    Of a folder its files and saved data sets, those of its folders (one a task), or the splits of a `DatasetDict`; of a
    pattern such as data/*.jsonl what matches it. Splits that are meant for testing are refused.
    """
    path = Path(path)
    if path.is_dir() and not (path / "state.json").exists():
        sets = list(_sets_of(path))
        if not sets:
            raise AnybatchError(f"{path} is a folder without data sets. Expected files or folders of these: {FORMATS}.")
    else:
        matching = [] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        sets = [(_name_of(file), file) for file in matching]
    held_out = [name for name, file in sets if HELD_OUT.match(file.name)]
    if held_out:
        example = next((f", such as {file}" for _, file in sets if not HELD_OUT.match(file.name)), "")
        raise AnybatchError(
            f"{path} holds {', '.join(name for name, _ in sets)}; {', '.join(held_out)} would be trained on. Give one "
            f"of them{example}, or name those to train on in data.sets."
        )
    found: dict[str, Path] = {}
    for name, file in sets:
        if name in found:
            clash = f"{found[name].name} and {file.name}"
            raise AnybatchError(f"Two data sets are called '{name}': {clash}. Rename one, or name them in data.sets.")
        found[name] = file
    return found


def _sets_of(path: Path) -> Iterator[tuple[str, Path]]:
    """The data sets of a folder that is none itself, with their names."""
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        yield from ((name, path / name) for name in splits)
        return
    yield from _sets_in(path)
    for folder in sorted(path.iterdir()):
        if not folder.is_dir() or (folder / "state.json").exists():
            continue
        inner = list(_sets_in(folder))  # one folder a task
        if not inner and not folder.name.startswith("."):
            found = f"{path} holds the folder {folder.name}, which is no data set"
            raise AnybatchError(f"{found}. Name the data sets in data.sets.")
        yield from ((folder.name if len(inner) == 1 else f"{folder.name}-{name}", file) for name, file in inner)


def _sets_in(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        a_file = path.is_file() and path.name.removesuffix(".gz").lower().endswith(KINDS)
        if a_file or (path / "state.json").exists():
            yield _name_of(path), path


def _name_of(path: Path) -> str:
    return path.name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem


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
    """Read pairs from a file or data set, and say to the log (`anybatch`, INFO) which columns are used for what.

    Args:
        path: JSONL, CSV or TSV (each also `.gz`), Parquet, a folder saved by `datasets`, or a data set of the Hugging
            Face hub: hf://OWNER/NAME, and where needed /CONFIGURATION and /SPLIT ("train" if left out).
        anchor, positive: Names of the columns: texts, or images (the feature `datasets.Image` of Parquet files and data
            sets). None for conventional ones: anchor and positive, query and pos, question and answer, and others
            (`anybatch.data.columns.CONVENTIONS`).
        negatives: Names of columns with explicit negatives. None for those called negative, neg, negative_1 and the
            like; () for none.
        images: Which of these columns hold the paths of images, relative to the file's folder. None for those whose
            texts are all such paths; () for none.
        quoting: Of CSV and TSV. None for the usual rules (RFC 4180), refusing a file that can also be read without;
            "standard" to insist on them, "raw" where quotes are plain characters.
        limit: Read only the first rows; None for all.

    In JSON lines, Parquet and data sets a cell may hold a list of texts. Several positives of a row are pairs of their
    own, several negatives are columns: as many as every row has, with a warning where some have more.

    Raises:
        AnybatchError: No such file, unknown format, no rows, a line that cannot be read, a column that is not there, a
            text that is empty or no text (with its row, counted from 1), paths of images that are not there. A declared
            image that is not there is found when ids or digest are asked for.

    Cost: the texts in memory once; about 3 seconds a million rows of JSON.
    """
    # 1. Which columns are used for what.
    path, where = Path(path), str(path)
    present = column_names(path, quoting)
    if not present:
        raise AnybatchError(f"{path} is empty: it has no rows. Expected pairs of anchor and positive.")
    chosen = choose_columns(present, anchor, positive, negatives, where)
    foreign = [name for name in images or () if name not in chosen.names]
    if foreign:
        raise AnybatchError(f"'{foreign[0]}' shall hold images, but is none of the columns {', '.join(chosen.names)}.")
    if limit is not None and limit < 1:
        raise AnybatchError(f"The limit is {limit}; expected at least 1 row.")
    limit = limit and min(limit, sys.maxsize)

    # 2. Stored images stay where they are; texts are read cell by cell.
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

    # 3. Lists become pairs and columns, paths become images.
    texts, remarks = spread(cells, chosen, where)
    folder = path if path.is_dir() else path.parent
    for name, parts in texts.items():
        declared = images is not None and name in images
        if declared or (images is None and all(are_image_paths(name, part, folder, where) for part in parts)):
            columns[name] = [ImageColumn.of_paths(part, folder, f"'{name}' of {path}") for part in parts]
    found = texts | columns
    pairs = PairData(
        anchors=found[chosen.anchor][0],
        positives=found[chosen.positive][0],
        negatives=tuple(column for name in chosen.negatives for column in found[name]),
        source=where,
    )

    # 4. Say it, and what looks wrong.
    say_columns(where, chosen, list(columns), [name for name in later if name not in chosen.names], len(pairs), remarks)
    warn_of_columns(where, chosen, {name: parts[0] for name, parts in texts.items() if name not in columns})
    return pairs


def _join(columns: Sequence[Column], name: str) -> Column:
    images = [column for column in columns if isinstance(column, ImageColumn)]
    if not images:
        return [text for column in columns for text in column]  # pyright: ignore[reportReturnType]
    if len(images) < len(columns):
        raise AnybatchError(
            f"The {name} is an image in some data sets and a text in others; a batch needs one kind. Train them apart, "
            "or swap anchor and positive in data.sets."
        )
    return ImageColumn.join(images)


def _identify(columns: Sequence[Column]) -> list[np.ndarray]:
    """Number the distinct texts and images of all columns together, in order of first appearance."""
    numbers: dict[bytes, int] = {}

    def number(column: Column) -> np.ndarray:
        keys = row_keys(column, stripped=True)
        return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(column))

    return [number(column) for column in columns]
