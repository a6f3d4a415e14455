"""Read evaluation sets in which each query has candidates of its own, as MMEB's lie on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of
from anybatch.data.columns import cell_of
from anybatch.data.inputs import Column, row_keys
from anybatch.data.reading import ImagePool, content_of
from anybatch.data.records import column_names, no_column, records
from anybatch.data.sets import files_of, is_plain_folder

logger = logging.getLogger("anybatch")
LISTS = (".parquet", ".jsonl", ".jsonl.gz", ".json")  # files whose cells may be lists
QUERY, TARGET = ("qry_text", "qry_img_path"), ("tgt_text", "tgt_img_path")


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateData:
    """Queries, and for each its candidates, of which the first is the right one.

    Attributes:
        queries: Q sides, each distinct one once.
        candidates: C sides, each distinct one once.
        query: (R,) int64: which query each row asks.
        of_row: R arrays of candidates, the right one first.
        source: Where they were read, for messages.
    """

    queries: Column
    candidates: Column
    query: np.ndarray
    of_row: list[np.ndarray]
    source: str = ""

    @cached_property
    def digest(self) -> str:
        """Of all of it."""
        sides = [*row_keys(self.queries), b"", *row_keys(self.candidates), b"", self.query.tobytes()]
        return digest_of([*sides, *(row.tobytes() for row in self.of_row)])


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateSets:
    """Several sets by their names."""

    sets: dict[str, CandidateData]

    @property
    def digest(self) -> str:
        """Of all of them."""
        return digest_of(f"{name} {data.digest}".encode() for name, data in self.sets.items())


def find_candidates(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The evaluation sets in MMEB's layout that a path names, by their names: a folder a task, or one; else none."""
    folder = Path(path)
    if not is_plain_folder(folder):
        return {folder.name.split(".")[0]: folder} if folder.exists() and _has_targets(folder) else {}
    if _has_targets(folder):
        return {folder.name: folder}
    return {task.name: task for task in sorted(folder.iterdir()) if task.is_dir() and _has_targets(task)}


def _has_targets(path: Path) -> bool:
    """Whether a file, or the first of a folder, has the columns of such a set."""
    if is_plain_folder(path):
        files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name.lower().endswith(LISTS)]
        return bool(files) and _has_targets(files[0])
    return path.name.lower().endswith(LISTS) and {QUERY[0], TARGET[0]} <= set(column_names(path))


def read_candidates(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> CandidateData:
    """Read one evaluation set in MMEB's layout: `qry_text`, `qry_img_path`, and lists `tgt_text`, `tgt_img_path`.

    A column of images may be missing, or empty. Equal sides (the same text and the same path) are one query, or one
    candidate, so that each is embedded once.

    Args:
        path: A Parquet or JSONL file, a folder saved by `datasets`, or a task's folder with one of these.
        images: The folder that paths of images start from; None for that of the file.

    Raises:
        AnybatchError: No such file or column; a row without a query or without candidates, lists of different lengths,
            an image that is not there, each with its row.
    """
    pool: ImagePool | None = None
    queries: dict[Any, int] = {}
    candidates: dict[Any, int] = {}
    asked: list[int] = []
    of_row: list[np.ndarray] = []
    for file in files_of(Path(path)):
        where, present = str(file), column_names(file)
        missing = [name for name in (QUERY[0], TARGET[0]) if name not in present]
        if missing:
            raise no_column(missing[0], present, where)
        folder = file if file.is_dir() else file.parent
        pool = pool or ImagePool(Path(images) if images else folder, where)
        names = [name for name in (*QUERY, *TARGET) if name in present]
        for row, record in enumerate(records(file, names), start=1):
            query = _sides(record, QUERY, row, where, pool)
            targets = _sides(record, TARGET, row, where, pool)
            if len(query) != 1:
                raise AnybatchError(f"Row {row} of {where} has {len(query)} queries; expected one, a text or an image.")
            if not targets:
                raise AnybatchError(f"Row {row} of {where} has no candidates ('{TARGET[0]}'). Leave it out.")
            asked.append(queries.setdefault(query[0], len(queries)))
            numbers = dict.fromkeys(candidates.setdefault(target, len(candidates)) for target in targets)
            of_row.append(np.fromiter(numbers, np.int64))
    if pool is None or not of_row:
        raise AnybatchError(f"{path} has no rows. Expected queries with candidates.")
    alone = sum(len(row) == 1 for row in of_row)
    if alone:
        logger.warning(
            "%s: %d of %d rows have the right candidate alone, which is always a hit. Is it the right folder?",
            path, alone, len(of_row),
        )  # fmt: skip
    return CandidateData(
        queries=pool.column(list(queries)),
        candidates=pool.column(list(candidates)),
        query=np.array(asked, np.int64),
        of_row=of_row,
        source=str(path),
    )


def _sides(record: Mapping[str, Any], names: tuple[str, str], row: int, where: str, pool: ImagePool) -> list[Any]:
    """What a row has in two columns: for each entry its text, or text and images."""
    texts, paths = (cell_of(record, name, row, where, optional=True) for name in names)
    listed = [cell if isinstance(cell, list) else [cell or ""] for cell in (texts, paths)]
    num = max(map(len, listed))
    if any(len(cells) not in (num, 1) or (len(cells) < num and cells[0]) for cells in listed):
        given = f"'{names[0]}' and '{names[1]}' hold {len(listed[0])} and {len(listed[1])}"
        raise AnybatchError(f"Row {row} of {where}: {given}; expected as many (empty where one is missing).")
    texts_of, paths_of = ((cells if len(cells) == num else [""] * num) for cells in listed)
    sides = []
    for text, image in zip(texts_of, paths_of, strict=True):
        words, places = content_of(text, row - 1, names[0], pool)
        if not isinstance(image, str):
            raise AnybatchError(f"Row {row} of {where}: '{names[1]}' holds an object; expected the path of an image.")
        if image:
            places = (*places, pool.place(image, row - 1, names[1]))
        if words is None and not places:
            raise AnybatchError(f"Row {row} of {where}: an entry of '{names[0]}' is empty, and has no image. Fill it.")
        sides.append((words, places))
    return sides
