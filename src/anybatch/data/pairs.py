"""Training pairs: their columns, ids, digest and data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.files import check_name, digest_of
from anybatch.data.images import MODE, ImageColumn, need_pillow
from anybatch.data.inputs import ABSENT, Column, MixedColumn, NegativeColumn, instructed, join_columns, row_keys

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """One of several data sets, whose rows lie one after the other in a `PairData`.

    Prompts are instructions put before its texts in training; a teacher reads the texts without them.
    """

    name: str
    num_rows: int
    anchor_prompt: str = ""
    positive_prompt: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, "data set")


@dataclass(frozen=True, kw_only=True, eq=False)
class PairData:
    """Training pairs in row order. A column is a sequence of texts, an `ImageColumn`, or a `MixedColumn`.

    Attributes:
        anchors, positives: n sides each.
        negatives: One such column of n for each explicit negative, None where a row has fewer.
        source: Where they were read, for messages.
        sets: The data sets that the rows come from, in order; empty for one.

    >>> pairs = PairData(anchors=["a cat", "a dog", "a cat "], positives=["it purrs", "it barks", "it sleeps"])
    >>> pairs.anchor_id.tolist(), pairs.positive_id.tolist()
    ([0, 1, 0], [0, 1, 2])
    """

    anchors: Column
    positives: Column
    negatives: tuple[NegativeColumn, ...] = ()
    source: str = ""
    sets: tuple[PairSet, ...] = ()

    @property
    def has_images(self) -> bool:
        """Whether a row of either side has an image."""
        return any(
            isinstance(side, ImageColumn) or (isinstance(side, MixedColumn) and side.images is not None)
            for side in (self.anchors, self.positives)
        )

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
    def ids(self) -> dict[str, Any]:
        """Both, by name, as mining and its inspection take them."""
        return {"anchor_id": self.anchor_id, "positive_id": self.positive_id}

    @cached_property
    def shared_id(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of anchors and positives in one id space: equal where an anchor is another pair's positive as well."""
        anchors, positives = _identify([self.anchors, self.positives])
        return anchors, positives

    @property
    def negative_id(self) -> np.ndarray | None:
        """(n, h) int64 in the id space of `positive_id`, -1 where a row has fewer; None without explicit negatives."""
        return np.stack(self._candidate_ids[1:], axis=1) if self.negatives else None

    @cached_property
    def digest(self) -> str:
        """Over all texts and images in row order; the same for the same rows in any file format."""
        return text_digest(self.prompted)

    @cached_property
    def prompted(self) -> list[Column]:
        """Anchors, positives and negatives as the model reads them, with the instructions of their data sets."""
        columns: list[Any] = [self.anchors, self.positives, *self.negatives]
        if not any(part.anchor_prompt or part.positive_prompt for part in self.sets):
            return columns
        of_anchors = [part.anchor_prompt for part in self.sets for _ in range(part.num_rows)]
        of_others = [part.positive_prompt for part in self.sets for _ in range(part.num_rows)]
        return [instructed(column, of_others if place else of_anchors) for place, column in enumerate(columns)]

    def to_dataset(self) -> Dataset:
        """A `datasets.Dataset` with the columns anchor, positive, negative_1, ..., instructions included: images are
        decoded as they are read; sides of a text with images are {"text", "image"}, undecoded (`ImageCollator`).

        Cost: what lies in a data set, images too, is copied into memory; files are not read.
        """
        from datasets import Dataset, Features, Image, Value

        cells, features = {}, {}
        names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(self.negatives) + 1))]
        for name, column in zip(names, self.prompted, strict=True):
            if isinstance(column, ImageColumn):
                need_pillow()
                cells[name], features[name] = column.stored(), Image(mode=MODE)
            elif isinstance(column, MixedColumn):
                cells[name] = column.stored()
                features[name] = {"text": Value("string"), "image": [Image(decode=False)]}
            else:
                cells[name], features[name] = list(column), Value("string")
        return Dataset.from_dict(cells, features=Features(features))

    @cached_property
    def _candidate_ids(self) -> list[np.ndarray]:
        return _identify([self.positives, *self.negatives])


def text_digest(columns: Sequence[NegativeColumn]) -> str:
    """The digest of anchors, positives and negatives, column after column: what binds a plan to its data."""
    return digest_of(chain([str(len(columns)).encode()], (key for column in columns for key in row_keys(column))))


def join_pairs(parts: Sequence[PairData], sets: Sequence[PairSet]) -> PairData:
    """Several data sets, one after the other, under different names."""
    names = [part.name for part in sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnybatchError(f"Two data sets are called '{twice[0]}'. Give each its own name (data.sets[].name).")
    return replace(join_rows(parts, ", ".join(part.source for part in parts)), sets=tuple(sets))


def join_rows(parts: Sequence[PairData], source: str) -> PairData:
    """Parts of one data set, one after the other; no negative where a part has fewer columns of them than others."""
    sides = [(part.anchors, part.positives, *part.negatives) for part in parts]
    anchors, positives, *negatives = (
        join_columns([side[place] if place < len(side) else [None] * len(side[0]) for side in sides])
        for place in range(max(map(len, sides)))
    )
    return PairData(anchors=anchors, positives=positives, negatives=tuple(negatives), source=source)


def _identify(columns: Sequence[NegativeColumn]) -> list[np.ndarray]:
    """Number the distinct texts and images of all columns together, in order of first appearance."""
    numbers: dict[bytes, int] = {ABSENT: -1}

    def number(column: NegativeColumn) -> np.ndarray:
        keys = row_keys(column, stripped=True)
        return np.fromiter((numbers.setdefault(key, len(numbers) - 1) for key in keys), np.int64, len(column))

    return [number(column) for column in columns]
