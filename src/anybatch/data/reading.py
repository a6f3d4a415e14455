"""Read training pairs, and refuse what cannot be trained on. Images stay in their files."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.data.columns import (
    LEAVE_OUT,
    NEGATIVE,
    BadRows,
    Cell,
    are_image_paths,
    as_list,
    cell_of,
    choose_columns,
    say_columns,
    spread,
    warn_of_columns,
)
from anybatch.data.images import ImageColumn, find_images
from anybatch.data.inputs import NONE, PLACEHOLDER, Column, MixedColumn
from anybatch.data.pairs import PairData, join_rows
from anybatch.data.records import PEEK, Quoting, column_names, records
from anybatch.data.sets import files_of

LONG = 300  # letters of a path in a message: it may be an image itself, as text (base64)
Names = str | Sequence[str]
Content = tuple[str | None, tuple[int, ...]]  # of one side of one row: its text, and the places of its images


def read_pairs(
    path: str | os.PathLike[str],
    *,
    anchor: Names | None = None,
    positive: Names | None = None,
    negatives: Sequence[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    quoting: Quoting | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> PairData:
    """Read pairs from a file or data set, and say to the log (`anybatch`, INFO) which columns are used for what.

    Args:
        path: JSONL, CSV or TSV (each also `.gz`), Parquet, a folder saved by `datasets`, or a data set of the Hugging
            Face hub: hf://OWNER/NAME, hf://OWNER/NAME:SPLIT ("train" if left out), or
            hf://OWNER/NAME/CONFIGURATION/SPLIT. Several files of one data set: a pattern, or their folder.
        anchor, positive: Names of the columns: a text, or images (the feature `datasets.Image`, or paths of files), or
            several, a text with images. None for conventional ones (`anybatch.data.columns.CONVENTIONS`), with the
            columns of images that belong to them: query_image, pos_image_path and the like.
        negatives: Names of columns with explicit negatives; neg_text and neg_image_path, or the like, are one. None for
            those called negative, neg, negative_1 and the like; () for none.
        images: The folder that paths of images start from; None for that of the file. Columns whose texts are all names
            of image files hold paths. "": none does.
        quoting: Of CSV and TSV. None for the usual rules (RFC 4180), refusing a file that can also be read without;
            "standard" to insist on them, "raw" where quotes are plain characters.
        limit: Read only the first rows; None for all.
        skip_bad: Leave out rows with an empty side, a value that is no text, or an image that is missing or broken, and
            say how many and which. A line that cannot be read at all is refused all the same.

    A cell may hold a list. Several positives of a row are pairs of their own. Several negatives of a row are columns,
    in which rows with fewer have none. Several images of an anchor, or of a positive with one text, are parts of it.

    Raises:
        AnybatchError: No such file, unknown format, no rows, a line that cannot be read, a column that is not there, a
            side that is empty or no text (with its row, counted from 1), paths of images that are not there.

    Cost: the texts in memory once; about 3 seconds a million rows of JSON.
    """
    if limit is not None and limit < 1:
        raise AnybatchError(f"The limit is {limit}; expected at least 1 row.")
    parts: list[PairData] = []
    left = limit and min(limit, sys.maxsize)
    for file in files_of(Path(path)):
        parts.append(_read_file(file, anchor, positive, negatives, images, quoting, left, skip_bad))
        if left is not None and (left := left - len(parts[-1])) <= 0:
            break
    return parts[0] if len(parts) == 1 else join_rows(parts, str(path))


def _read_file(
    path: Path,
    anchor: Names | None,
    positive: Names | None,
    negatives: Sequence[str] | None,
    images: str | os.PathLike[str] | None,
    quoting: Quoting | None,
    limit: int | None,
    skip_bad: bool,
) -> PairData:
    # 1. Which columns are used for what.
    where = str(path)
    present = column_names(path, quoting)
    if not present:
        raise AnybatchError(f"{path} is empty: it has no rows. Expected pairs of anchor and positive.")
    chosen = choose_columns(present, anchor, positive, negatives, where)

    # 2. Stored images stay where they are; all else is read cell by cell.
    stored = find_images(path, chosen.names, limit)
    cells: dict[str, list[Cell]] = {name: [] for name in chosen.names}
    of_negatives = {name for side in chosen.negatives for name in side}
    optional = of_negatives | {name for side in chosen.sides if len(side) > 1 for name in side}
    later, bad = dict.fromkeys(present), BadRows()

    def read(record: Mapping[str, Any], row: int, names: Iterable[str]) -> None:
        for name in names:
            try:
                cell = cell_of(
                    record, name, row, where,
                    optional=name in optional, negative=name in of_negatives, stored=name in stored,
                )  # fmt: skip
            except AnybatchError as error:
                cell = None
                bad.add(row, error)
            cells[name].append(cell)

    for name, (_, found) in stored.items():
        for row, value in enumerate(found, start=1):
            read({name: value}, row, [name])
    others = [name for name in cells if name not in stored]
    for row, record in enumerate(islice(records(path, others, quoting), limit) if others else (), start=1):
        read(record, row, others)
        if not later.keys() >= record.keys():
            later.update(dict.fromkeys(record))
    every: Sequence[int] = range(1, 1 + max(map(len, cells.values())))  # the rows' numbers in the file
    rows = _kept(every, bad, where, skip_bad)
    if bad.errors:
        cells = {name: [column[row - 1] for row in rows] for name, column in cells.items()}
    late = [name for name in later if NEGATIVE.fullmatch(name) and name not in present]
    if late and negatives is None:
        raise AnybatchError(
            f"{path} has '{late[0]}' only in rows behind the first {PEEK}. Move one of them to the front, or set "
            "data.negatives=[]."
        )
    if not all(cells.values()):
        used = "' and '".join([*chosen.anchor, *chosen.positive])
        raise AnybatchError(f"{path} is empty: it has no rows. Expected pairs in the columns '{used}'.")

    # 3. Paths become images; columns that were only supposed to hold some are let go.
    beside = {name for name in cells if any(isinstance(entry, tuple) for entry in _entries_of(cells[name]))}
    asked = [name for name in others if images != "" and name not in beside]
    paths = {name for name in asked if are_image_paths(name, list(_entries_of(cells[name])), where)}
    chosen = chosen.without(chosen.supposed - paths - stored.keys())
    pool = ImagePool(Path(images) if images else path if path.is_dir() else path.parent, where)
    for name, (column, _) in stored.items():
        pool.add(name, column)
    labels = [_label(names) for names in chosen.sides]
    alone = paths | (stored.keys() - beside)
    kinds = ("anchor", "positive", *["negative"] * len(chosen.negatives))
    sides, bad = {}, BadRows()
    for label, names, kind in zip(labels, chosen.sides, kinds, strict=True):
        sides[label] = _side(names, kind, cells, rows, alone, pool, bad)
    _leave_broken(sides.values() if skip_bad else (), rows, pool, bad)
    kept = _kept(rows, bad, where, skip_bad)
    if bad.errors:
        places = np.searchsorted(rows, kept).tolist()
        sides = {label: [side[place] for place in places] for label, side in sides.items()}

    # 4. Lists become pairs and columns.
    spreading, times, remarks = spread(sides, labels[0], labels[1], where)
    rows = np.arange(len(sides[labels[0]])) if times is None else times
    columns = {label: [pool.column(part, rows) for part in parts] for label, parts in spreading.items()}
    pairs = PairData(
        anchors=columns[labels[0]][0],
        positives=columns[labels[1]][0],
        negatives=tuple(column for label in labels[2:] for column in columns[label]),
        source=where,
    )

    # 5. Say it, and what looks wrong.
    unused = [name for name in later if name not in chosen.names]
    said = dict.fromkeys(alone, "images") | dict.fromkeys(beside, "texts and images")
    say_columns(where, chosen, said, unused, len(pairs), [*remarks, *_repeats(pairs)])
    texts = {label: parts[0] for label, parts in columns.items() if parts and isinstance(parts[0], list)}
    warn_of_columns(where, labels[0], labels[1], texts)
    pool.warn_of_placeholders(pairs)
    return pairs


def _repeats(pairs: PairData) -> list[str]:
    """A remark on texts that repeat; for ids of images these would have to be read, which is for later."""
    if not isinstance(pairs.anchors, list) or not isinstance(pairs.positives, list):
        return []
    count = len(pairs) - len(np.unique(pairs.anchor_id * len(pairs) + pairs.positive_id))
    return [f"{count} row{'s repeat' if count > 1 else ' repeats'} another, anchor and positive"] if count else []


def _kept(rows: Sequence[int], bad: BadRows, where: str, skip_bad: bool) -> Sequence[int]:
    """The rows that are not bad, if these may be left out and some are left; else the bad ones are refused."""
    if not bad.errors:
        return rows
    kept = [row for row in rows if row not in bad.errors]
    bad.check(left_out_of=where if skip_bad and kept else "")
    return kept


def _leave_broken(sides: Collection[Sequence[Any]], rows: Sequence[int], pool: ImagePool, bad: BadRows) -> None:
    """Add the rows of `sides` with broken images to the bad ones, and leave these images out of the pool."""
    broken = pool.images.broken if sides and pool.images is not None else {}
    for side in sides if broken else ():
        for number, cell in zip(rows, side, strict=True):
            contents = [content for content in as_list(cell) if isinstance(content, tuple)]
            for place in broken.keys() & {place for _, places in contents for place in places}:
                bad.add(number, broken[place])
    pool.leave_out(broken)


def _label(names: Sequence[str]) -> str:
    return "' with '".join(names)


def _entries_of(cells: Sequence[Cell]) -> Iterator[Any]:
    """What the cells hold, those of lists as well, without empty ones."""
    return (entry for cell in cells if cell for entry in as_list(cell) if entry)


class ImagePool:
    """The images of a file: those stored in it, then the files that it names, each once."""

    def __init__(self, root: Path, where: str) -> None:
        self.root, self.where = root, where
        self.stored: list[ImageColumn] = []
        self.start: dict[str, int] = {}  # of each column, the place of its first stored image
        self.first = 0  # place of the first file
        self.files: dict[str, tuple[int, str]] = {}  # path: row and column in which it was first named
        self.places: dict[str, int] = {}
        self._images: ImageColumn | None = None
        self._moved: np.ndarray | None = None  # where images are now that others were left out

    def add(self, name: str, images: ImageColumn) -> None:
        """The images that are stored in a column; before any file."""
        self.stored.append(images)
        self.start[name] = self.first
        self.first += len(images)

    def place(self, image: str | int, row: int, name: str) -> int:
        """The place of a column's image: of a file, which must exist, or of a stored one by its place in the column."""
        if isinstance(image, int):
            return self.start[name] + image
        path = image.strip()
        if path not in self.places:
            if not os.path.isfile(self.root / path):  # which a text of any length and kind may be asked
                raise AnybatchError(
                    f"'{name}' of {self.where} seems to hold paths of images, and there is no file "
                    f"{self.root / path!s:.{LONG}} (row {row + 1}).",
                    "Put the files there, say which folder the paths start from: data.images (--images), or that these "
                    'are texts: data.images=""',
                )
            self.places[path] = self.first + len(self.places)
            self.files[path] = row, name
        return self.places[path]

    @property
    def images(self) -> ImageColumn | None:
        """All of them, for all sides."""
        if self._images is None:
            parts = list(self.stored)
            if self.files:
                names = list(dict.fromkeys(name for _, name in self.files.values()))
                where = [f"'{name}' of {self.where}" for name in names]
                rows = np.array([row for row, _ in self.files.values()], np.int64)
                source = np.array([names.index(name) for _, name in self.files.values()], np.int32)
                parts.append(ImageColumn.of_paths(list(self.files), self.root, where, rows, source))
            self._images = ImageColumn.join(parts) if parts else None
        return self._images

    def leave_out(self, places: Collection[int]) -> None:
        """Hold images no longer that no row has any more."""
        if self.images is not None and places:
            kept = ~np.isin(np.arange(len(self.images)), list(places))
            self._images, self._moved, self.stored = self.images.select(np.flatnonzero(kept)), kept.cumsum() - 1, []

    def column(self, contents: list[Any], rows: np.ndarray | None = None) -> Column:
        """A column of one content a row: texts as they are, images alone as such, else both. `rows`: of the file, for
        messages; None for those in which an image was first named.
        """
        if not any(isinstance(content, tuple) for content in contents):
            return contents
        pairs: list[Content] = [(None, ()) if content is None else content for content in contents]
        if self._moved is not None:
            pairs = [(text, tuple(self._moved[[*places]])) for text, places in pairs]
        images = self.images
        if images is None or not any(places for _, places in pairs):
            return [text for text, _ in pairs]  # pyright: ignore[reportReturnType] - None for negatives alone
        if all(text is None and len(places) == 1 for text, places in pairs):
            alone = np.array([places[0] for _, places in pairs])
            for column in (images, *self.stored):  # as it is, where it is one whole column
                first = 0 if column is images else sum(map(len, self.stored[: self.stored.index(column)]))
                if len(column) == len(alone) and np.array_equal(alone, np.arange(first, first + len(alone))):
                    return column
            chosen = images.select(alone)
            chosen.rows = chosen.rows if rows is None else rows
            return chosen
        places = np.full((len(pairs), max(len(images) for _, images in pairs)), NONE)
        for row, (_, of_row) in enumerate(pairs):
            places[row, : len(of_row)] = of_row
        return MixedColumn([text for text, _ in pairs], images, places)

    def warn_of_placeholders(self, pairs: PairData) -> None:
        """Warn of texts that speak of an image and have none."""
        from anybatch.data.columns import logger

        for side, column in (("anchor", pairs.anchors), ("positive", pairs.positives)):
            if isinstance(column, MixedColumn):
                rows = [
                    row
                    for row, (text, has) in enumerate(zip(column.texts, column.has_images, strict=True), start=1)
                    if not has and text is not None and PLACEHOLDER.search(text)
                ]
                if rows:
                    logger.warning(
                        "%s: %d %ss have a place for an image (<|image_1|>) and none, such as that of pair %d. They "
                        "are taken as texts.",
                        self.where, len(rows), side, rows[0],
                    )  # fmt: skip


def _side(
    names: Sequence[str],
    kind: str,
    cells: Mapping[str, Sequence[Cell]],
    rows: Sequence[int],
    alone: set[str],
    pool: ImagePool,
    bad: BadRows,
) -> list[Any]:
    """One side in row order: texts or lists of them; or contents, or lists of them; None for those that go to `bad`.

    `rows`: their numbers in the file. `alone`: columns of images.
    """
    mains = [name for name in names if name not in alone]
    if len(mains) > 1:
        raise AnybatchError(f"The {kind} has {len(mains)} columns of texts, {', '.join(mains)}; expected one at most.")
    if len(names) == 1 and mains and not any(isinstance(entry, tuple) for entry in _entries_of(cells[mains[0]])):
        return [cell[0] if isinstance(cell, list) and len(cell) == 1 else cell for cell in cells[mains[0]]]
    side: list[Any] = [None] * len(rows)
    for row, number in enumerate(rows):
        try:
            main = [content_of(entry, number - 1, name, pool) for name in mains for entry in as_list(cells[name][row])]
            several = len(main) > 1
            images: list[int] = []  # parts of each content
            listed: list[int | None] | None = None  # one of each
            for name in (name for name in names if name in alone):
                cell: Any = cells[name][row]
                places = [
                    pool.place(image, number - 1, name) if image not in (None, "") else None for image in as_list(cell)
                ]
                if isinstance(cell, list) and (kind == "negative" or several):
                    listed = places
                else:
                    images += [place for place in places if place is not None]
            found = f"Row {number} of {pool.where}: '{_label(names)}'"
            side[row] = _whole(main, images, listed, found)
            if side[row] is None and kind != "negative":
                raise AnybatchError(
                    f"{found} are empty.", f"Every row needs a text or an image there: fill it or {LEAVE_OUT}."
                )
        except AnybatchError as error:
            bad.add(number, error)
    return side


def content_of(entry: Any, row: int, name: str, pool: ImagePool) -> Content:
    """A text, or a text with images, whose places are looked up."""
    text, images = entry if isinstance(entry, tuple) else (entry or None, ())
    return text, tuple(pool.place(image, row, name) for image in images)


def _whole(
    main: list[Content], images: list[int], listed: list[int | None] | None, found: str
) -> Content | list[Content] | None:
    """What a row's cells hold together: one content, or several where a cell holds a list; None for nothing."""
    main = main or [(None, ())]
    if listed is not None and len(main) == 1 and main[0] == (None, ()):
        main = main * len(listed)
    places = [None] * len(main) if listed is None else listed
    if len(main) != len(places):
        counts = f"{len(main)} texts and {len(places)} images"
        raise AnybatchError(f"{found} hold {counts}; expected as many (empty where one is missing).")
    contents = [
        (text, (*own, *images, *(() if place is None else (place,))))
        for (text, own), place in zip(main, places, strict=True)
    ]
    there = [content for content in contents if content[0] is not None or content[1]]
    return there[0] if len(there) == 1 else there or None
