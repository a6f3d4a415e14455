"""What a side of a pair is: a text, an image, or both; and what a sentence-transformers model takes for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from anybatch.data.images import KEY, EncodedImage, ImageColumn, Rows

if TYPE_CHECKING:
    from PIL.Image import Image

PLACEHOLDER = re.compile(r"<\|image_\d+\|>\s*")  # where an image stands in a text of MMEB
NONE = -1  # in `MixedColumn.places`
ABSENT = b"\xff"  # key of an explicit negative that is not there; no text has it, it is not UTF-8


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedInput:
    """One side of a pair: a text, images, or both; at least one of them."""

    text: str | None
    images: tuple[EncodedImage, ...] = ()


class MixedColumn(Rows[MixedInput]):
    """Sides in row order, each with a text, images, or both. Images stay in their files.

    Of explicit negatives a row may have neither; None is there then.

    Args:
        texts: One a row; None for none.
        images: The images of all rows, each once, in any order; None for none at all.
        places: (n, k) int: which of them a row has, in its order; -1 for none.

    >>> from pathlib import Path
    >>> photos = ImageColumn.of_paths(["a.png", "b.png"], Path("photos"), "'photo' of pairs.csv")
    >>> column = MixedColumn(["both", "text alone", "two images"], photos, np.array([[1, -1], [-1, -1], [0, 1]]))
    >>> len(column[1:]), column[1].text, len(column[1].images)
    (2, 'text alone', 0)
    """

    def __init__(self, texts: Sequence[str | None], images: ImageColumn | None, places: np.ndarray) -> None:
        self.texts, self.images, self.places = texts, images, places

    @classmethod
    def of(cls, column: NegativeColumn) -> MixedColumn:
        """Any column as a mixed one."""
        if isinstance(column, MixedColumn):
            return column
        if isinstance(column, ImageColumn):
            return cls([None] * len(column), column, np.arange(len(column))[:, None])
        return cls(column, None, np.empty((len(column), 0), np.int64))

    @classmethod
    def join(cls, columns: Sequence[MixedColumn]) -> MixedColumn:
        """Several columns, one after the other. Columns of one collection of images share it afterwards as well."""
        collections = list({id(column.images): column.images for column in columns if column.images}.values())
        first = np.cumsum([0, *map(len, collections)])
        start = {id(images): int(place) for images, place in zip(collections, first, strict=False)}
        width = max((column.places.shape[1] for column in columns), default=0)
        places = []
        for column in columns:
            moved = np.where(column.places == NONE, NONE, column.places + start.get(id(column.images), 0))
            places.append(np.pad(moved, ((0, 0), (0, width - moved.shape[1])), constant_values=NONE))
        texts = [text for column in columns for text in column.texts]
        return cls(texts, ImageColumn.join(collections) if collections else None, np.concatenate(places))

    @cached_property
    def has_images(self) -> np.ndarray:
        """(n,) bool."""
        return (self.places != NONE).any(axis=1)

    @cached_property
    def has_text(self) -> np.ndarray:
        """(n,) bool."""
        return np.fromiter((text is not None for text in self.texts), bool, len(self))

    def __len__(self) -> int:
        return len(self.texts)

    def _at(self, row: int) -> MixedInput:
        places = [int(place) for place in self.places[row] if place != NONE]
        images = tuple(self.images[place] for place in places) if self.images is not None else ()
        if self.texts[row] is None and not images:
            return None  # pyright: ignore[reportReturnType] - of negatives alone, which say so by their type
        return MixedInput(text=self.texts[row], images=images)

    def select(self, rows: np.ndarray) -> MixedColumn:
        """These rows, in this order; nothing in the place of a row -1."""
        texts = [self.texts[row] if row >= 0 else None for row in rows.tolist()]
        return MixedColumn(texts, self.images, np.where(rows[:, None] < 0, NONE, self.places[rows]))

    def stored(self) -> list[dict[str, Any] | None]:
        """Each row as {"text", "image"}, the second a list of what is stored; None for nothing."""
        images = [] if self.images is None else self.images.stored()
        return [
            {"text": text, "image": [images[place] for place in places if place != NONE]} if has else None
            for text, places, has in zip(self.texts, self.places.tolist(), self.has_text | self.has_images, strict=True)
        ]

    def instructed(self, prompts: Sequence[str]) -> MixedColumn:
        """See the function of this name."""
        texts = [
            prompt + text if text is not None else (prompt.strip() or None if has_images else None)
            for prompt, text, has_images in zip(prompts, self.texts, self.has_images, strict=True)
        ]
        return MixedColumn(texts, self.images, self.places)

    def row_keys(self, *, stripped: bool = False) -> Iterator[bytes]:
        """See the function of this name; images are read once, whatever columns have them in common."""
        for text, places in zip(self.texts, self.places, strict=True):
            keys = b"" if self.images is None else self.images.keys[places[places != NONE]].tobytes()
            written = None if text is None else (text.strip() if stripped else text).encode()
            if not keys:
                yield ABSENT if written is None else written
            elif written is None and len(keys) == KEY:
                yield b"image " + keys
            else:
                yield b"%d images " % (len(keys) // KEY) + keys + (b"" if written is None else b" " + written)


Column = Sequence[str] | ImageColumn | MixedColumn  # of a `PairData`
NegativeColumn = Column | Sequence[str | None]  # None, or a mixed row without content: no negative


def row_keys(column: Column | NegativeColumn, *, stripped: bool = False) -> Iterator[bytes]:
    """What stands for each row in a digest of the data: the text, the digests of the images' bytes, or both.

    `stripped`: for ids, of which those of texts that differ in the white space at their ends are the same.
    """
    if isinstance(column, MixedColumn):
        return column.row_keys(stripped=stripped)
    if isinstance(column, ImageColumn):
        return (b"image " + key.tobytes() for key in column.keys)
    return (ABSENT if text is None else (text.strip() if stripped else text).encode() for text in column)


def check_images(column: Column | NegativeColumn) -> None:
    """Refuse images that are missing or broken, all rows of a file at once. Cost: one pass over their bytes, once."""
    images = column.images if isinstance(column, MixedColumn) else column
    if isinstance(images, ImageColumn):
        _ = images.keys


def pick(column: NegativeColumn, rows: np.ndarray) -> Any:
    """These rows of a column, in this order, nothing in the place of a row -1; of images without reading them."""
    if isinstance(column, ImageColumn) and rows.min(initial=0) < 0:
        return MixedColumn.of(column).select(rows)
    if isinstance(column, (ImageColumn, MixedColumn)):
        return column.select(rows)
    return [column[row] if row >= 0 else None for row in rows.tolist()]


def join_columns(columns: Sequence[NegativeColumn]) -> Any:
    """Several columns, one after the other: a mixed one where they are of different kinds."""
    if all(isinstance(column, ImageColumn) for column in columns):
        return ImageColumn.join(columns)  # pyright: ignore[reportArgumentType]
    if any(isinstance(column, (ImageColumn, MixedColumn)) for column in columns):
        return MixedColumn.join([MixedColumn.of(column) for column in columns])
    return [text for column in columns for text in column]


def instructed(column: NegativeColumn, prompts: Sequence[str]) -> Any:
    """A column with a text before each row's own; where there is an image alone it is the text."""
    if isinstance(column, (ImageColumn, MixedColumn)):
        return MixedColumn.of(column).instructed(prompts) if any(prompts) else column
    return [text and prompt + text for prompt, text in zip(prompts, column, strict=True)]


def kind_of(column: Column) -> Literal["text", "image", "both"]:
    """What its rows hold: all a text, all an image alone, or else."""
    if not isinstance(column, MixedColumn):
        return "image" if isinstance(column, ImageColumn) else "text"
    if not column.has_images.any():
        return "text"
    return "both" if column.has_text.any() else "image"


def kinds_of_rows(column: NegativeColumn) -> np.ndarray:
    """(n,) int: 1 a text, 2 images, 3 both, 0 nothing."""
    if isinstance(column, ImageColumn):
        return np.full(len(column), 2)
    if isinstance(column, MixedColumn):
        return 2 * column.has_images + column.has_text
    return np.fromiter((text is not None for text in column), np.int64, len(column))


def describe(value: str | EncodedImage | MixedInput, row: int) -> str:
    """One line for the terminal: the text with its white space tamed, or such as "[image 48x48, row 17]", or both.

    >>> describe(EncodedImage(encoded=b"no image", where="row 3, 'photo' of pairs.csv"), row=2)
    '[image, row 2]'
    """
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, EncodedImage):
        size = value.size
        return f"[image, row {row}]" if size is None else f"[image {size[0]}x{size[1]}, row {row}]"
    shown = [describe(image, row) for image in value.images]
    return " ".join([*shown, *([] if value.text is None else [describe(value.text, row)])])


def guest_input(value: str | EncodedImage | MixedInput) -> str | Image | dict[str, Any]:
    """What a sentence-transformers model takes for a row: the text, the image (RGB), or {"image": ..., "text": ...}.

    A model with a chat template makes one user message of such a dictionary, whose parts are in its order; one without
    takes it if it has the modality ("image", "text"), else it refuses it by name. Rows of several kinds share a forward
    pass in a model with a chat template alone (sentence-transformers 6.2, `base/modality.py`).

    The placeholders `<|image_1|>` of MMEB's texts are left out, with the white space behind them: the images come
    before the text, or behind one that ends with a placeholder. A text without images stays as it is.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, EncodedImage):
        return value.decode()
    if not value.images:
        assert value.text is not None
        return value.text
    images: Any = [image.decode() for image in value.images]
    images = images[0] if len(images) == 1 else images
    text = None if value.text is None else PLACEHOLDER.sub("", value.text)
    if not text or value.text is None:
        return {"image": images} if isinstance(images, list) else images
    first = PLACEHOLDER.search(value.text)
    behind = first is not None and first.start() > 0 and not PLACEHOLDER.sub("", value.text[first.start() :])
    return {"text": text, "image": images} if behind else {"image": images, "text": text}
