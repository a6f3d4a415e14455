"""Which columns of a file are used for what: conventional names, the texts of a cell, doubts about the choice."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybatch.core.errors import AnybatchError
from anybatch.data.records import listed, no_column

logger = logging.getLogger("anybatch")

# Anchor and positive as sentence-transformers' data sets, FlagEmbedding, BEIR and MS MARCO name them, the most telling
# first.
CONVENTIONS = (
    ("anchor", "positive"),
    *(("query", name) for name in ("positive", "pos", "document", "passage", "answer", "response")),
    *(("question", name) for name in ("answer", "positive")),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
)
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?", re.IGNORECASE)
IMAGE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)\s*$", re.IGNORECASE)
NUMBER = re.compile(r"\s*[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?\s*")
NO_TEXTS = frozenset(("None", "none", "nan", "NaN", "null", "NULL", "<NA>", "\\N"))
Cell = str | list[str]
FEW = 0.02  # distinct texts per row, below which a column looks like labels


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The columns in use.

    >>> choose_columns(["id", "query", "pos", "neg"], None, None, None, "pairs.jsonl").names
    ['query', 'pos', 'neg']
    """

    anchor: str
    positive: str
    negatives: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [self.anchor, self.positive, *self.negatives]


def choose_columns(
    present: Sequence[str], anchor: str | None, positive: str | None, negatives: Sequence[str] | None, where: str
) -> Chosen:
    """The columns of a file that were named; where none was, the first of `CONVENTIONS` that is present, in small
    letters or others, and as negatives all that are called negative, neg_1, hard_negative_2 and the like, by their
    numbers.
    """
    for name in (anchor, positive, *(negatives or ())):
        if name is not None and name not in present:
            raise no_column(name, present, where)
    written = {name.strip().lower(): name for name in present} | {name: name for name in present}  # "Query" is a query
    pairs = [
        (anchor or written.get(first, first), positive or written.get(second, second)) for first, second in CONVENTIONS
    ]
    usable = (pair for pair in pairs if set(pair) <= set(present) and ((anchor and positive) or pair[0] != pair[1]))
    chosen = next(usable, None)
    if chosen is None:
        for name in dict.fromkeys(pairs[0]):  # what a slip of the pen is nearest to
            if name not in present and (anchor or positive or {"anchor", "positive"} & set(written)):
                raise no_column(name, present, where)
        separator = re.search(r"[;|\t,]", present[0]) if len(present) == 1 else None
        hint = separator and f", one column with {separator[0]!r} in its name: .csv wants commas, .tsv tabs"
        raise AnybatchError(
            f"Cannot tell anchor and positive in {where}; it has {listed(present)}{hint or ''}. "
            "Name the columns: data.anchor (--anchor) and data.positive (--positive)."
        )
    if negatives is None:
        named = [name for name in present if NEGATIVE.fullmatch(name.strip()) and name not in chosen]
        negatives = sorted(named, key=lambda name: int(re.sub(r"\D", "", name) or 0))
    result = Chosen(anchor=chosen[0], positive=chosen[1], negatives=tuple(negatives))
    if len(set(result.names)) < len(result.names):
        raise AnybatchError(f"The columns {', '.join(result.names)} name one column twice; expected different ones.")
    return result


def cell_of(record: Mapping[str, Any], name: str, row: int, where: str, *, negative: bool = False) -> Cell:
    """The text of one cell, or its texts if it holds a list of several; anything else is refused."""
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    if name not in record and not negative:
        raise no_column(name, list(record), f"row {row} of {where}")
    texts: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    bad = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if texts and not bad:
        return texts[0] if len(texts) == 1 else texts
    empty = not bad or bad[0] is None or isinstance(bad[0], str)
    what = "empty" if empty else f"{bad[0]!r:.60}, which is no text"
    remedy = ", or train without explicit negatives: data.negatives=[]" if negative else ""
    raise AnybatchError(
        f"Row {row} of {where}: '{name}' is {what}. Every row needs a text there: fill it or leave the row out{remedy}."
    )


def spread(
    cells: Mapping[str, Sequence[Cell]], chosen: Chosen, where: str
) -> tuple[dict[str, list[list[str]]], list[str]]:
    """One text a cell: several positives of a row are pairs of their own, several negatives are columns.

    Returns the columns of texts of each name, one or (of negatives) several; and remarks on what was made of lists.
    """
    remarks: list[str] = []
    lists = {
        name: [[cell] if isinstance(cell, str) else cell for cell in column]
        for name, column in cells.items()
        if any(isinstance(cell, list) for cell in column)
    }
    if chosen.anchor in lists:
        raise AnybatchError(f"'{chosen.anchor}' of {where} holds lists of several texts. An anchor is one text.")
    positives = lists.pop(chosen.positive, None)
    if positives is not None:
        if len(cells) < len(chosen.names):
            raise AnybatchError(f"{where}: lists of positives cannot stand beside images. Write one pair a row.")
        several = sum(len(texts) > 1 for texts in positives)
        remarks.append(f"{several} rows have several positives, which are pairs of their own")
        times = [row for row, texts in enumerate(positives) for _ in texts]
        cells = {name: [column[row] for row in times] for name, column in cells.items()}
        lists = {name: [rows[row] for row in times] for name, rows in lists.items()}
        cells[chosen.positive] = [text for texts in positives for text in texts]
    columns: dict[str, list[Any]] = {name: [column] for name, column in cells.items()}
    for name, rows in lists.items():
        widths = [len(row) for row in rows]
        fewest, most, total = min(widths), max(widths), sum(widths)
        columns[name] = [[row[place] for row in rows] for place in range(fewest)]
        remarks.append(f"'{name}' holds {'' if most == fewest else f'{fewest} to '}{most} texts a row")
        if most > fewest:
            logger.warning(
                "%s: '%s' has %d to %d texts a row, and a batch needs as many of each row: the first %d, so that "
                "%d of %d texts are not used. Give each row the same number to use all.",
                where, name, fewest, most, fewest, total - fewest * len(widths), total,
            )  # fmt: skip
    return columns, remarks


def say_columns(
    where: str, chosen: Chosen, images: Sequence[str], unused: Sequence[str], num_rows: int, remarks: Sequence[str]
) -> None:
    """One line to the log: which columns are used for what, and which are not."""

    def shown(name: str) -> str:
        return f"'{name}' (images)" if name in images else f"'{name}'"

    negatives = f"negatives {', '.join(map(shown, chosen.negatives))}" if chosen.negatives else "no negatives"
    others = f"not used: {listed(unused)}" if unused else "no other columns"
    uses = f"anchor {shown(chosen.anchor)}, positive {shown(chosen.positive)}, {negatives}"
    logger.info("%s: %d pairs; %s.", where, num_rows, "; ".join([uses, others, *remarks]))


def warn_of_columns(where: str, chosen: Chosen, columns: Mapping[str, Sequence[str]]) -> None:
    """Warn of columns of texts that are hardly meant. One pass over the texts, 0.5 seconds a million."""
    for name, texts in columns.items():
        side = {chosen.anchor: "anchor", chosen.positive: "positive"}.get(name, "negative")
        distinct = len(set(texts))
        doubt = None
        if distinct == 1 < len(texts):
            doubt = f"all {len(texts)} {side}s are one text ({texts[0]!r:.40})"
        elif distinct < FEW * len(texts):
            doubt = f"its {len(texts)} {side}s are {distinct} distinct texts; equal ones are no negatives of each other"
        elif all(NUMBER.fullmatch(text) for text in texts):
            doubt = f"all {side}s are numbers, such as {texts[0]!r:.40}"
        elif all(text[0] == "[" and text[-1] == "]" for text in texts):
            doubt = (
                f"all {side}s are written lists, such as {texts[0]!r:.40}, taken as they stand (JSON lines hold lists)"
            )
        elif words := sum(text in NO_TEXTS for text in texts):
            doubt = f"{words} of {len(texts)} {side}s are words such as None or nan, and are taken as texts"
        if doubt is not None:
            logger.warning("%s, column '%s': %s. Is it the right column, and is it filled?", where, name, doubt)
    if chosen.anchor in columns and chosen.positive in columns:
        anchors, positives = columns[chosen.anchor], columns[chosen.positive]
        equal = sum(anchor == positive for anchor, positive in zip(anchors, positives, strict=True))
        if equal > len(anchors) / 2:
            logger.warning(
                "%s: in %d of %d rows '%s' and '%s' are the same text, from which nothing is learned. Are they the "
                "right columns?",
                where, equal, len(anchors), chosen.anchor, chosen.positive,
            )  # fmt: skip


def are_image_paths(name: str, texts: Sequence[str], folder: Path, where: str) -> bool:
    """Whether all texts are names of image files, which then must exist. Warns where most are."""
    paths = sum(IMAGE.search(text[-9:]) is not None for text in texts)
    if paths < len(texts):
        if paths > len(texts) / 2:
            logger.warning(
                "%s, column '%s': %d of %d texts look like paths of images, and all are taken as texts. If they are "
                "images: data.images=[%s], and leave out the rows without.",
                where, name, paths, len(texts), name,
            )  # fmt: skip
        return False
    for row, text in enumerate(texts, start=1):
        if not (folder / text).is_file():
            raise AnybatchError(
                f"'{name}' of {where} seems to hold paths of images, and there is no file {folder / text} (row {row}). "
                "Put the files there, or say that these are texts: data.images=[]"
            )
    return True
