"""Which columns of a file are used for what: conventional names, the cells of a side, doubts about the choice."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.data.records import listed, no_column, no_header

logger = logging.getLogger("anybatch")

# Anchor and positive as sentence-transformers' data sets, FlagEmbedding, BEIR, MS MARCO and MMEB name them, the most
# telling first.
CONVENTIONS = (
    ("anchor", "positive"),
    *(("query", name) for name in ("positive", "pos", "document", "passage", "answer", "response")),
    *(("question", name) for name in ("answer", "positive")),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("qry", "pos"),
    ("title", "abstract"),
)
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?", re.IGNORECASE)
IMAGE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)\s*$", re.IGNORECASE)
NUMBER = re.compile(r"\s*[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?\s*")
NO_TEXTS = frozenset(("None", "none", "nan", "NaN", "null", "NULL", "<NA>", "\\N"))
# Of one side: "qry" and "qry_image_path", "pos_text" and "pos_image_path".
PART = re.compile(r"(?P<side>.+?)((?P<image>_(image|img)s?(_paths?)?)|_text)?", re.IGNORECASE)
TEXT, IMAGES = "text", ("image", "images")  # keys of a cell that holds both
Both = tuple[str | None, tuple[Any, ...]]  # a text and its images: paths, or places
Cell = str | Both | list[str | Both] | None
LEAVE_OUT = "leave the row out (train, mine, recommend: --set data.skip_bad=true)"
FEW = 0.02  # distinct texts per row, below which a column looks like labels


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The columns in use: of each side one or several, a text and images beside it.

    Attributes:
        anchor, positive: Their columns.
        negatives: Those of each explicit negative.
        supposed: Columns that nobody named, which belong to a side if they hold images.

    >>> chosen = choose_columns(["qry", "qry_image_path", "pos_text", "neg"], None, None, None, "pairs.parquet")
    >>> chosen.anchor, chosen.positive, chosen.negatives
    (('qry', 'qry_image_path'), ('pos_text',), (('neg',),))
    """

    anchor: tuple[str, ...]
    positive: tuple[str, ...]
    negatives: tuple[tuple[str, ...], ...]
    supposed: frozenset[str] = frozenset()

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """Anchor, positive, negatives."""
        return (self.anchor, self.positive, *self.negatives)

    @property
    def names(self) -> list[str]:
        """All columns."""
        return [name for side in self.sides for name in side]

    def without(self, names: Collection[str]) -> Chosen:
        """Without these columns."""
        anchor, positive, *negatives = (tuple(name for name in side if name not in names) for side in self.sides)
        return Chosen(anchor=anchor, positive=positive, negatives=tuple(filter(None, negatives)))


def choose_columns(
    present: Sequence[str],
    anchor: Sequence[str] | str | None,
    positive: Sequence[str] | str | None,
    negatives: Sequence[str] | None,
    where: str,
) -> Chosen:
    """The columns of a file that were named, else the first of `CONVENTIONS` that is present, in any case of letters,
    and as negatives all that are called so, by their numbers; beside them the columns of their sides' images.
    """
    given = [(name,) if isinstance(name, str) else tuple(name or ()) for name in (anchor, positive)]
    for name in (*given[0], *given[1], *(negatives or ())):
        if name not in present:
            raise no_column(name, present, where)
    # 1. Anchor and positive.
    grouped = _sides_of([name for name in present if name not in given[0] + given[1]])
    sides = {side.strip().lower(): side for side in reversed(grouped)} | {side: side for side in grouped}
    pairs = [(given[0] or sides.get(first), given[1] or sides.get(second)) for first, second in CONVENTIONS]
    chosen = next((pair for pair in pairs if all(pair) and ((given[0] and given[1]) or pair[0] != pair[1])), None)
    if chosen is None:
        for name, named in zip(CONVENTIONS[0], given, strict=True):  # what a slip of the pen is nearest to
            if not named and name not in sides and (any(given) or set(CONVENTIONS[0]) & set(sides)):
                raise no_column(name, present, where)
        separator = re.search(r"[;|\t,]", present[0]) if len(present) == 1 else None
        hint = f".{no_header(present, where)}"
        if separator is not None:
            hint = f", one column with {separator[0]!r} in its name: .csv wants commas, .tsv tabs."
        raise AnybatchError(
            f"Cannot tell anchor and positive in {where}; it has {listed(present)}{hint} "
            "Name the columns: data.anchor (--anchor) and data.positive (--positive)."
        )
    both = [grouped[side] if isinstance(side, str) else side for side in chosen if side is not None]
    # 2. Explicit negatives.
    if negatives is None:
        others = [side for side in grouped if NEGATIVE.fullmatch(side.strip()) and grouped[side] not in both]
        of_negatives = [grouped[side] for side in sorted(others, key=lambda side: int(re.sub(r"\D", "", side) or 0))]
    else:
        of_negatives = list(_sides_of(negatives).values())
    named = {*given[0], *given[1], *(negatives or ())}
    result = Chosen(
        anchor=both[0],
        positive=both[1],
        negatives=tuple(of_negatives),
        supposed=frozenset(name for side in (*both, *of_negatives) for name in side[1:] if name not in named),
    )
    if len(set(result.names)) < len(result.names):
        raise AnybatchError(f"The columns {', '.join(result.names)} name one column twice; expected different ones.")
    return result


def _sides_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The columns that belong together, a text before images, by the name of their side."""
    texts: dict[str, list[str]] = {}
    images: dict[str, list[str]] = {}
    known = set(names)
    for name in names:
        part = PART.fullmatch(name)
        side = name if part is None or (not part["image"] and part["side"] in known) else part["side"]
        (images if part is not None and part["image"] else texts).setdefault(side, []).append(name)
    return {side: (*texts.get(side, ()), *images.get(side, ())) for side in texts | images}


def cell_of(
    record: Mapping[str, Any],
    name: str,
    row: int,
    where: str,
    *,
    optional: bool = False,
    negative: bool = False,
    stored: bool = False,
) -> Cell:
    """What one cell holds: a text, a text with images (`Both`), or a list of several; anything else is refused.

    `optional`: there may be none, or empty ones in a list, which then are "". Of a list of none comes None. `stored`:
    numbers are the places of images.
    """
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    if name not in record and not optional:
        raise no_column(name, list(record), f"row {row} of {where}")
    given: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    entries, bad = [], []
    for entry in given:
        try:
            entries.append(_entry(entry, stored))
            if entries[-1] == "" and not optional:
                bad.append("empty")
        except ValueError as error:
            bad.append(str(error))
    if not bad and optional and all(entry == "" for entry in entries):
        return None
    if entries and not bad:
        return entries if isinstance(value, (list, tuple)) else entries[0]
    remedy = ", or train without explicit negatives: data.negatives=[]" if negative else ""
    wanted = "a text or an image" if stored or any(isinstance(entry, dict) for entry in given) else "a text"
    raise AnybatchError(
        f"Row {row} of {where}: '{name}' is {bad[0] if bad else 'empty'}.",
        f"Every row needs {wanted} there: fill it or {LEAVE_OUT}{remedy}.",
    )


def _entry(value: Any, stored: bool) -> Any:
    """One content: a text, the place of an image, or both; "" for nothing. ValueError says what else it is."""
    if value is None or isinstance(value, str):
        return value if value and value.strip() else ""
    if stored and isinstance(value, int):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.60}, which is no text")
    held = [image for key in IMAGES for image in as_list(value.get(key)) if image not in (None, "")]
    images = [image.get("path") if isinstance(image, dict) and not image.get("bytes") else image for image in held]
    known = (str, int) if stored else str
    wrong = [f"{image!r:.40} as an image" for image in images if not isinstance(image, known)]
    wrong += [f"the key '{key}'" for key in value if key not in (TEXT, *IMAGES)]
    text = _entry(value.get(TEXT), stored=False)
    if wrong or isinstance(text, tuple):
        raise ValueError(
            f'an object with {wrong[0] if wrong else "an object"}; expected {{"text": ..., "image": ...}}, a text and '
            "the path of an image or a list of them"
        )
    return (text or None, tuple(images)) if text or images else ""


def as_list(value: Any) -> list[Any]:
    """The entries of a cell, one or several."""
    return value if isinstance(value, list) else [value]


class BadRows:
    """Rows of a file that are refused, all at once when everything is read.

    >>> bad = BadRows()
    >>> for row in (3, 3, 8, 9):
    ...     bad.add(row, AnybatchError(f"Row {row} is empty."))
    >>> bad.check()
    Traceback (most recent call last):
    anybatch.core.errors.AnybatchError: Row 3 is empty. In all 3 rows are refused: 3, 8, 9.
    """

    def __init__(self) -> None:
        self.errors: dict[int, AnybatchError] = {}

    def add(self, row: int, error: AnybatchError) -> None:
        """Remember a row, counted from 1, and why it is refused."""
        self.errors.setdefault(row, error)

    def check(self, left_out_of: str = "") -> None:
        """Raise what was said of the first, with all that are refused; or warn, where they are left out of a file."""
        rows = sorted(self.errors)
        if not rows:
            return
        first = self.errors[rows[0]]
        named = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5:,} more" if rows[5:] else "")
        if left_out_of:
            counted = f"{len(rows):,} row{'s' if rows[1:] else ''}"
            of_first = first.reason  # what to do was done
            logger.warning("%s: %s left out (data.skip_bad): %s. The first: %s", left_out_of, counted, named, of_first)
            return
        if not rows[1:]:
            raise first
        said = str(first).removesuffix(".")
        raise AnybatchError(f"{said}. In all {len(rows):,} rows are refused: {named}.") from first


def spread(
    sides: Mapping[str, Sequence[Any]], anchor: str, positive: str, where: str
) -> tuple[dict[str, list[list[Any]]], np.ndarray | None, list[str]]:
    """One content a cell: several positives of a row are pairs of their own, several negatives are columns, in which a
    row that has fewer has None.

    Args:
        sides: The cells of each side in row order: one content, a list of several, or None for no negative.
        anchor, positive: Which of the sides they are.

    Returns:
        The columns of each side; the rows that the pairs are of, None for all, each once; and remarks on lists.
    """
    remarks: list[str] = []
    lists = {
        name: [[] if cell is None else cell if isinstance(cell, list) else [cell] for cell in column]
        for name, column in sides.items()
        if any(cell is None or isinstance(cell, list) for cell in column)
    }
    if anchor in lists:
        raise AnybatchError(f"'{anchor}' of {where} holds lists of several texts. An anchor is one text.")
    positives, rows = lists.pop(positive, None), None
    if positives is not None:
        several = sum(len(texts) > 1 for texts in positives)
        remarks.append(f"{several} rows have several positives, which are pairs of their own")
        times = [row for row, texts in enumerate(positives) for _ in texts]
        sides = {name: [column[row] for row in times] for name, column in sides.items()}
        lists = {name: [of_rows[row] for row in times] for name, of_rows in lists.items()}
        sides[positive] = [text for texts in positives for text in texts]
        rows = np.asarray(times, np.int64)
    columns: dict[str, list[Any]] = {name: [column] for name, column in sides.items()}
    for name, of_rows in lists.items():
        widths = [len(row) for row in of_rows]
        fewest, most = min(widths), max(widths)
        columns[name] = [[row[place] if place < len(row) else None for row in of_rows] for place in range(most)]
        remarks.append(f"'{name}' holds {'' if most == fewest else f'{fewest} to '}{most} texts a row")
    return columns, rows, remarks


def say_columns(
    where: str, chosen: Chosen, kinds: Mapping[str, str], unused: Sequence[str], num_rows: int, remarks: Sequence[str]
) -> None:
    """One line to the log: which columns are used for what, and which are not. `kinds`: of those that hold images."""

    def shown(side: Sequence[str]) -> str:
        return " with ".join(f"'{name}' ({kinds[name]})" if name in kinds else f"'{name}'" for name in side)

    negatives = f"negatives {', '.join(map(shown, chosen.negatives))}" if chosen.negatives else "no negatives"
    others = f"not used: {listed(unused)}" if unused else "no other columns"
    uses = f"anchor {shown(chosen.anchor)}, positive {shown(chosen.positive)}, {negatives}"
    logger.info("%s: %d pairs; %s.", where, num_rows, "; ".join([uses, others, *remarks]))


def warn_of_columns(where: str, anchor: str, positive: str, columns: Mapping[str, Sequence[str | None]]) -> None:
    """Warn of columns of texts that are hardly meant. One pass over the texts, 0.5 seconds a million."""
    for name, cells in columns.items():
        side = {anchor: "anchor", positive: "positive"}.get(name, "negative")
        texts = [text for text in cells if text is not None]
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
    if anchor in columns and positive in columns:
        anchors, positives = columns[anchor], columns[positive]
        equal = sum(anchor == positive for anchor, positive in zip(anchors, positives, strict=True))
        if equal > len(anchors) / 2:
            logger.warning(
                "%s: in %d of %d rows '%s' and '%s' are the same text, from which nothing is learned. Are they the "
                "right columns?",
                where, equal, len(anchors), anchor, positive,
            )  # fmt: skip


def are_image_paths(name: str, texts: Sequence[str], where: str) -> bool:
    """Whether all texts are names of image files. Warns where most are."""
    paths = sum(IMAGE.search(text[-9:]) is not None for text in texts)
    if len(texts) / 2 < paths < len(texts):
        logger.warning(
            "%s, column '%s': %d of %d texts look like paths of images, and all are taken as texts. If they are "
            "images, give the files such names, and leave out the rows without.",
            where, name, paths, len(texts),
        )  # fmt: skip
    return 0 < paths == len(texts)
