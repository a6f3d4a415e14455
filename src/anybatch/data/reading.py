"""Read training pairs, and refuse what cannot be trained on. Images stay in their files."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.data.columns import (
    NEGATIVE,
    BadRows,
    Cell,
    are_image_paths,
    cell_of,
    choose_columns,
    say_columns,
    spread,
    warn_of_columns,
)
from anybatch.data.images import ImageColumn, find_images
from anybatch.data.inputs import PLACEHOLDER, Column, MixedColumn, join_columns, pick
from anybatch.data.pairs import PairData
from anybatch.data.records import PEEK, Quoting, column_names, records
from anybatch.data.sets import files_of

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
) -> PairData:
    """Read pairs from a file or data set, and say to the log (`anybatch`, INFO) which columns are used for what.

    Args:
        path: JSONL, CSV or TSV (each also `.gz`), Parquet, a folder saved by `datasets`, or a data set of the Hugging
            Face hub: hf://OWNER/NAME, and where needed /CONFIGURATION and /SPLIT ("train" if left out). Several files
            of one data set: a pattern, or the folder in which they are all.
        anchor, positive: Names of the columns: a text, or images (the feature `datasets.Image` of Parquet files and
            data sets, or paths of files), or several, a text with images. None for conventional ones: anchor and
            positive, query and pos, question and answer, and others (`anybatch.data.columns.CONVENTIONS`), with the
            columns of images that belong to them: query_image, pos_image_path and the like.
        negatives: Names of columns with explicit negatives; neg_text and neg_image_path, or the like, are one. None for
            those called negative, neg, negative_1 and the like; () for none.
        images: The folder that paths of images start from; None for that of the file. Columns whose texts are all names
            of image files hold paths. "": none does.
        quoting: Of CSV and TSV. None for the usual rules (RFC 4180), refusing a file that can also be read without;
            "standard" to insist on them, "raw" where quotes are plain characters.
        limit: Read only the first rows; None for all.

    In JSON lines, Parquet and data sets a cell may hold a list. Several positives of a row are pairs of their own.
    Several negatives of a row are columns, in which rows with fewer have none. Several images of an anchor, or of a
    positive with one text, are parts of it.

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
        parts.append(_read_file(file, anchor, positive, negatives, images, quoting, left))
        if left is not None and (left := left - len(parts[-1])) <= 0:
            break
    if len(parts) == 1:
        return parts[0]
    columns = [(part.anchors, part.positives, *part.negatives) for part in parts]
    anchors, positives, *others = (
        join_columns([of_part[place] if place < len(of_part) else [None] * len(of_part[0]) for of_part in columns])
        for place in range(max(map(len, columns)))
    )
    return PairData(anchors=anchors, positives=positives, negatives=tuple(others), source=str(path))


def _read_file(
    path: Path,
    anchor: Names | None,
    positive: Names | None,
    negatives: Sequence[str] | None,
    images: str | os.PathLike[str] | None,
    quoting: Quoting | None,
    limit: int | None,
) -> PairData:
    # 1. Which columns are used for what.
    where = str(path)
    present = column_names(path, quoting)
    if not present:
        raise AnybatchError(f"{path} is empty: it has no rows. Expected pairs of anchor and positive.")
    chosen = choose_columns(present, anchor, positive, negatives, where)

    # 2. Stored images stay where they are; texts are read cell by cell.
    stored = find_images(path, chosen.names, limit)
    cells: dict[str, list[Cell]] = {name: [] for name in chosen.names if name not in stored}
    of_negatives = {name for side in chosen.negatives for name in side}
    optional = of_negatives | {name for side in chosen.sides if len(side) > 1 for name in side}
    later, bad = dict.fromkeys(present), BadRows()
    for row, record in enumerate(islice(records(path, list(cells), quoting), limit) if cells else (), start=1):
        for name, column in cells.items():
            try:
                cell = cell_of(record, name, row, where, optional=name in optional, negative=name in of_negatives)
            except AnybatchError as error:
                bad.add(row, error)
            else:
                column.append(cell)
        if not later.keys() >= record.keys():
            later.update(dict.fromkeys(record))
    bad.check()
    late = [name for name in later if NEGATIVE.fullmatch(name) and name not in present]
    if late and negatives is None:
        raise AnybatchError(
            f"{path} has '{late[0]}' only in rows behind the first {PEEK}. Move one of them to the front, or set "
            "data.negatives=[]."
        )
    if not all(cells.values()) or not all(map(len, stored.values())):
        used = "' and '".join([*chosen.anchor, *chosen.positive])
        raise AnybatchError(f"{path} is empty: it has no rows. Expected pairs in the columns '{used}'.")

    # 3. Paths become images; columns that were only supposed to hold some are let go.
    paths = {name for name in cells if images != "" and are_image_paths(name, _texts_of(cells[name]), where)}
    chosen = chosen.without(chosen.supposed - paths - stored.keys())
    root = Path(images) if images else path if path.is_dir() else path.parent
    pool = ImagePool(root, where, stored)
    sides: dict[str, Any] = {}
    for place, names in enumerate(chosen.sides):
        kind = ("anchor", "positive", "negative")[min(place, 2)]
        sides[_label(names)] = _side(names, kind, cells, paths, pool, where)

    # 4. Lists become pairs and columns.
    labels = [_label(names) for names in chosen.sides]
    whole = {label: side for label, side in sides.items() if isinstance(side, ImageColumn)}
    spreading = {label: side for label, side in sides.items() if label not in whole}
    found, times, remarks = spread(spreading, labels[0], labels[1], where)
    of_images = {label: [side if times is None else pick(side, times)] for label, side in whole.items()}
    columns: dict[str, list[Any]] = {label: list(map(pool.column, parts)) for label, parts in found.items()} | of_images
    pairs = PairData(
        anchors=columns[labels[0]][0],
        positives=columns[labels[1]][0],
        negatives=tuple(column for label in labels[2:] for column in columns[label]),
        source=where,
    )

    # 5. Say it, and what looks wrong.
    unused = [name for name in later if name not in chosen.names]
    say_columns(where, chosen, paths | stored.keys(), unused, len(pairs), remarks)
    texts = {label: parts[0] for label, parts in columns.items() if parts and isinstance(parts[0], list)}
    warn_of_columns(where, labels[0], labels[1], texts)
    pool.warn_of_placeholders(pairs)
    return pairs


def _label(names: Sequence[str]) -> str:
    return "' with '".join(names)


def _texts_of(cells: Sequence[Cell]) -> list[str]:
    """The texts of a column, those in lists as well, without empty ones."""
    found = (cell if isinstance(cell, list) else [cell] for cell in cells if cell)
    return [text for texts in found for text in texts if text]


class ImagePool:
    """The images of a file: those stored in it, then the files that it names, each once.

    >>> ImagePool(Path("photos"), "pairs.csv", {}).column([("a cat", ()), None])
    ['a cat', None]
    """

    def __init__(self, root: Path, where: str, stored: Mapping[str, ImageColumn]) -> None:
        self.root, self.where, self.stored = root, where, stored
        self.there: dict[str, np.ndarray] = {}  # place of each stored image; -1 where there is none
        self.first = 0  # place of the first file
        for name, column in stored.items():
            present = ~column.absent
            self.there[name] = np.where(present, self.first + np.cumsum(present) - 1, -1)
            self.first += int(present.sum())
        self.files: dict[str, tuple[int, str]] = {}  # path: row and column in which it was first named
        self.places: dict[str, int] = {}
        self._images: ImageColumn | None = None

    def place(self, path: str, row: int, name: str) -> int:
        """The place of a file, which must exist."""
        path = path.strip()
        if path not in self.places:
            if not (self.root / path).is_file():
                raise AnybatchError(
                    f"'{name}' of {self.where} seems to hold paths of images, and there is no file {self.root / path} "
                    f"(row {row + 1}). Put the files there, say which folder the paths start from: data.images "
                    '(--images), or that these are texts: data.images=""'
                )
            self.places[path] = self.first + len(self.places)
            self.files[path] = row, name
        return self.places[path]

    @property
    def images(self) -> ImageColumn | None:
        """All of them, for all sides."""
        if self._images is None:
            parts = [
                pick(column, np.flatnonzero(self.there[name] >= 0)) if (self.there[name] < 0).any() else column
                for name, column in self.stored.items()
            ]
            if self.files:
                names = list(dict.fromkeys(name for _, name in self.files.values()))
                parts.append(
                    ImageColumn.of_paths(
                        list(self.files),
                        self.root,
                        [f"'{name}' of {self.where}" for name in names],
                        np.array([row for row, _ in self.files.values()], np.int64),
                        np.array([names.index(name) for _, name in self.files.values()], np.int32),
                    )
                )
            self._images = ImageColumn.join(parts) if parts else None
        return self._images

    def column(self, contents: list[Any]) -> Column:
        """A column of one content a row: texts as they are, images alone as such, else both."""
        if not any(isinstance(content, tuple) for content in contents):
            return contents
        pairs: list[Content] = [(None, ()) if content is None else content for content in contents]
        if not any(places for _, places in pairs):
            return [text for text, _ in pairs]  # pyright: ignore[reportReturnType] - None for negatives alone
        alone = [places[0] for text, places in pairs if text is None and len(places) == 1]
        if len(alone) == len(pairs) and min(alone) >= self.first:  # each a file
            files, rows = list(self.files), np.arange(len(pairs))
            name = self.files[files[alone[0] - self.first]][1]
            paths = [files[place - self.first] for place in alone]
            return ImageColumn.of_paths(paths, self.root, f"'{name}' of {self.where}", rows)
        places = np.full((len(pairs), max(len(images) for _, images in pairs)), -1)
        for row, (_, images) in enumerate(pairs):
            places[row, : len(images)] = images
        return MixedColumn([text for text, _ in pairs], self.images, places)

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
    paths: set[str],
    pool: ImagePool,
    where: str,
) -> ImageColumn | list[Any]:
    """One side in row order: texts or lists of them; an `ImageColumn`; or contents, or lists of them."""
    texts = [name for name in names if name in cells and name not in paths]
    if len(names) == 1 and texts:
        return list(cells[texts[0]])
    if len(texts) > 1:
        raise AnybatchError(f"The {kind} has {len(texts)} columns of texts, {', '.join(texts)}; expected one at most.")
    stored = [pool.there[name] for name in names if name in pool.there]
    if len(names) == 1 and stored and (kind != "negative" or stored[0].min(initial=0) >= 0):
        return pool.stored[names[0]]  # of another side than a negative a missing one is refused when it is read
    of_paths = [name for name in names if name in paths]
    num_rows = len(next(iter(cells.values()))) if cells else len(stored[0])
    side: list[Any] = []
    bad = BadRows()
    for row in range(num_rows):
        try:
            text = cells[texts[0]][row] if texts else None
            images = [int(places[row]) for places in stored if places[row] >= 0]
            listed: list[int | None] | None = None  # one image of each text
            for name in of_paths:
                cell = cells[name][row]
                written = cell if isinstance(cell, list) else [cell or ""]
                places = [pool.place(path, row, name) if path else None for path in written]
                if isinstance(cell, list) and (kind == "negative" or isinstance(text, list)):
                    listed = places
                else:
                    images += [place for place in places if place is not None]
            try:
                content = _content(text, images, listed)
            except ValueError as error:
                raise AnybatchError(
                    f"Row {row + 1} of {where}: '{_label(names)}' hold {error}; expected as many (empty where one is "
                    "missing)."
                ) from None
            if content is None and kind != "negative":
                raise AnybatchError(
                    f"Row {row + 1} of {where}: '{_label(names)}' are empty. Every row needs a text or an image there: "
                    "fill it or leave the row out."
                )
            side.append(content)
        except AnybatchError as error:
            bad.add(row + 1, error)
    bad.check()
    return side


def _content(text: Cell, images: list[int], listed: list[int | None] | None) -> Content | list[Content] | None:
    """What a cell with images holds: one content, or several where its text is a list, or there is a list of images
    with one for each; None for nothing. ValueError where the two lists differ.
    """
    if listed is None and not isinstance(text, list):
        return None if text is None and not images else (text, tuple(images))
    texts = text if isinstance(text, list) else [text] * (len(listed or ()) if text is None else 1)
    places = [None] * len(texts) if listed is None else listed
    if len(texts) != len(places):
        raise ValueError(f"{len(texts)} texts and {len(places)} images")
    several = [
        (one or None, (*images, *(() if place is None else (place,)))) for one, place in zip(texts, places, strict=True)
    ]
    return [content for content in several if content[0] is not None or content[1]] or None
