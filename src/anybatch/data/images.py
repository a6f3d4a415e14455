"""Columns of images: lazy, undecoded, told apart by their encoded bytes, which ids and digest read once."""

from __future__ import annotations

import base64
import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.data.columns import BadRows
from anybatch.data.records import has_images, image_dataset, is_image
from anybatch.data.shards import read_part

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Content = TypeVar("Content", covariant=True)
BLOCK = 64  # rows read at once: a third of a gigabyte of large photographs
KEY = 16  # bytes of an image's digest
NAME = "image"  # the one column of the data set inside an `ImageColumn`
MODE = "RGB"  # of decoded images: most processors refuse batches of several modes
UNBOUNDED = ("I", "F")  # modes that Pillow would clip at 255
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what a whole file has among its last bytes
TAIL = 64
THUMBNAIL = 64  # pixels of the longer side


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """One image as it was stored: the bytes of its file, and row and column for messages."""

    encoded: bytes = field(repr=False)
    where: str

    def decode(self) -> Image:
        """The image in RGB, turned upright; of 16 bits a grey value its upper 8."""
        need_pillow()
        try:
            image = _opened(self.encoded)
        except Exception as error:  # a broken file fails in Pillow's decoders with nearly anything
            reason = "it is none that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else error
            raise AnybatchError(
                f"The image in {self.where} cannot be decoded ({reason}).", "Replace it, or leave the row out."
            ) from error
        if image.mode in UNBOUNDED:
            raise AnybatchError(
                f"The image in {self.where} has numbers of 32 bits as pixels, of which nothing tells what is white.",
                "Save it with 8 or 16 bits a channel, or leave the row out.",
            )
        return image if image.mode == MODE else image.convert(MODE)

    def check(self) -> None:
        """Refuse what `decode` would, by the head and the end of the file; a file without its end is decoded. Damage
        within it is not seen. Nothing without Pillow. Cost: 0.03 ms.
        """
        try:
            from PIL import Image
        except ImportError:
            return
        try:
            with Image.open(BytesIO(self.encoded)) as image:
                kind, fine = str(image.format), image.mode not in UNBOUNDED
        except Exception:  # which `decode` meets as well, and says
            kind, fine = "", False
        if kind == "WEBP":
            fine &= len(self.encoded) >= 8 + int.from_bytes(self.encoded[4:8], "little")
        elif fine:
            fine = kind in ENDS and ENDS[kind] in self.encoded[-TAIL:]
        if not fine:
            self.decode()

    @property
    def key(self) -> bytes:
        """Digest of the bytes; equal bytes are the same image."""
        return hashlib.blake2b(self.encoded, digest_size=KEY).digest()

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height, without decoding; None without Pillow or where it is no image."""
        try:
            from PIL import Image

            with Image.open(BytesIO(self.encoded)) as image:
                return image.size
        except Exception:
            return None

    def thumbnail(self) -> str | None:
        """A small JPEG on white as a data: URI, some 2 kB; None without Pillow or where it is no image."""
        try:
            from PIL import Image

            small = _opened(self.encoded, draft=True).convert("RGBA")
        except Exception:
            return None
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        file = BytesIO()
        white = Image.new("RGBA", small.size, "white")
        Image.alpha_composite(white, small).convert("RGB").save(file, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class Rows(Sequence[Content]):
    """Abstract: a column that reads its rows when asked; slices and selections are columns again."""

    @abstractmethod
    def select(self, rows: np.ndarray) -> Self:
        """These rows, in this order."""

    @abstractmethod
    def _at(self, row: int) -> Content:
        """What is in a row, counted from 0."""

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        return self._at(range(len(self))[index])


class ImageColumn(Rows[EncodedImage]):
    """Images in row order that stay in their files. Nothing is decoded.

    Args:
        dataset: One column, `image`, of the feature `Image(decode=False)`.
        where: File and column, for messages; several, of columns that were joined.
        rows: Row number of each in its file; None for one file, all of it.
        source: Which of the files each is from; None for one file.

    >>> column = ImageColumn.of_paths(["a.png", "b.png", "c.png"], Path("photos"), "'photo' of pairs.csv")
    >>> len(column), len(column[1:])
    (3, 2)
    """

    def __init__(
        self,
        dataset: Dataset,
        where: str | Sequence[str],
        rows: np.ndarray | None = None,
        source: np.ndarray | None = None,
    ) -> None:
        self.dataset = dataset
        self.files = (where,) if isinstance(where, str) else tuple(where)
        self.rows = np.arange(len(dataset)) if rows is None else rows
        self.source = np.zeros(len(dataset), np.int32) if source is None else source
        self._parts: Sequence[ImageColumn] = ()  # joined here: what was read of them is not read again

    @classmethod
    def of(cls, dataset: Dataset, name: str, where: str, *, shown: str | None = None) -> ImageColumn:
        """The column `name` of a data set, which holds images; `shown`: what messages call it."""
        from datasets import Image as Feature

        column = dataset.with_format(None).select_columns([name]).rename_columns({name: NAME})
        return cls(column.cast_column(NAME, Feature(decode=False)), f"'{shown or name}' of {where}")

    @classmethod
    def of_paths(
        cls,
        paths: Sequence[str],
        folder: Path,
        where: str | Sequence[str],
        rows: np.ndarray | None = None,
        source: np.ndarray | None = None,
    ) -> ImageColumn:
        """Files; a relative path starts at `folder`. The other arguments as of the class."""
        from datasets import Dataset, Features, Value
        from datasets import Image as Feature

        files = [{"bytes": None, "path": str(folder / path)} for path in paths]
        stored = {"bytes": Value("binary"), "path": Value("string")}  # made as an Image, it would need Pillow
        dataset = Dataset.from_dict({NAME: files}, features=Features({NAME: stored}))
        return cls(dataset.cast_column(NAME, Feature(decode=False)), where, rows, source)

    @classmethod
    def of_keys(cls, keys: Sequence[bytes]) -> ImageColumn:
        """Images of which the digests alone are at hand, for ids."""
        column = cls.of_paths([""] * len(keys), Path(), "")
        vars(column)["_read"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY), {}
        return column

    @classmethod
    def join(cls, columns: Sequence[ImageColumn]) -> ImageColumn:
        """Several columns, one after the other."""
        from datasets import concatenate_datasets

        if len(columns) == 1:
            return columns[0]
        first = np.cumsum([0, *(len(column.files) for column in columns)])
        joined = cls(
            concatenate_datasets([column.dataset for column in columns]),
            [where for column in columns for where in column.files],
            np.concatenate([column.rows for column in columns]),
            np.concatenate([column.source + start for column, start in zip(columns, first[:-1], strict=True)]),
        )
        joined._parts = tuple(columns)
        return joined

    @property
    def where(self) -> str:
        """File and column; of several all of them."""
        return ", ".join(self.files)

    def __len__(self) -> int:
        return len(self.dataset)

    def _at(self, row: int) -> EncodedImage:
        return self._image(self.dataset[row][NAME], row)

    def __iter__(self) -> Iterator[EncodedImage]:
        return (self._image(value, place) for place, value in self._values())

    def select(self, rows: np.ndarray) -> ImageColumn:
        """These places of the column, in this order."""
        chosen = ImageColumn(self.dataset.select(rows), self.files, self.rows[rows], self.source[rows])
        if "_read" in vars(self) or "keys" in vars(self):
            keys, broken = self._read
            of_rows = enumerate(rows.tolist()) if broken else ()
            vars(chosen)["_read"] = keys[rows], {new: broken[old] for new, old in of_rows if old in broken}
        return chosen

    @cached_property
    def keys(self) -> np.ndarray:
        """(n, 16) uint8: `EncodedImage.key` of each.

        Raises:
            AnybatchError: Images that are missing or broken, all rows at once (`EncodedImage.check`).
        """
        if self._parts:
            return np.concatenate([part.keys for part in self._parts])
        keys, broken = self._read
        bad = BadRows()
        for place, error in broken.items():
            bad.add(int(self.rows[place]) + 1, error)
        bad.check()
        return keys

    @property
    def broken(self) -> dict[int, AnybatchError]:
        """The places of images that are missing or broken, and why."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[np.ndarray, dict[int, AnybatchError]]:
        """`keys` and `broken`, by one pass over the files."""
        keys, broken = np.empty((len(self), KEY), np.uint8), {}
        if self._parts:
            first = np.cumsum([0, *map(len, self._parts)]).tolist()
            for start, part in zip(first, self._parts, strict=False):
                keys[start : start + len(part)] = part._read[0]
                broken |= {start + place: error for place, error in part.broken.items()}
            return keys, broken
        known: dict[str, bytes | AnybatchError] = {}  # of files; one that many rows name is read once
        for place, value in self._values():
            file = value["path"] if value is not None and value["bytes"] is None else None
            found = known.get(file) if file is not None else None
            if found is None:
                try:
                    image = self._image(value, place)
                    image.check()
                    found = image.key
                except AnybatchError as error:
                    found = error
                if file is not None:
                    known[file] = found
            if isinstance(found, AnybatchError):
                broken[place] = found
            else:
                keys[place] = np.frombuffer(found, np.uint8)
        return keys, broken

    def stored(self) -> list[dict[str, Any] | None]:
        """What is stored of each: bytes, or a path."""
        return [value for _, value in self._values()]

    def _values(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Each place with what is stored there."""
        for start in range(0, len(self), BLOCK):
            yield from enumerate(self.dataset[start : start + BLOCK][NAME], start=start)

    def _image(self, value: dict[str, Any] | None, place: int) -> EncodedImage:
        where = f"row {int(self.rows[place]) + 1}, {self.files[int(self.source[place])]}"
        encoded, path = (value or {}).get("bytes"), (value or {}).get("path")
        named = f"{where} ({path})" if encoded is None and path else where
        if encoded is None and path:
            try:
                encoded = read_part(path)
            except OSError as error:
                raise AnybatchError(
                    f"Cannot read the image {path} ({where}): {error.strerror or error}.",
                    "Put it back, or leave the row out.",
                ) from error
        if not encoded:
            raise AnybatchError(f"There is no image in {named}.", "Every row needs one: fill it or leave the row out.")
        return EncodedImage(encoded=encoded, where=named)


def _opened(encoded: bytes, *, draft: bool = False) -> Image:
    """Decoded and turned upright, 16 bits as 8, in any mode; `draft`: of a JPEG no more than a thumbnail shows."""
    from PIL import Image, ImageOps

    with Image.open(BytesIO(encoded)) as image:
        if draft:
            image.draft(MODE, (THUMBNAIL, THUMBNAIL))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image


def find_images(path: Path, names: Sequence[str], limit: int | None = None) -> dict[str, tuple[ImageColumn, list[Any]]]:
    """The columns among `names` that hold images, alone, in lists or beside texts, in Parquet or a data set: their
    images, each once, and their cells, in which the place of an image among them stands instead of it.
    """
    dataset = image_dataset(path, names)
    if dataset is None:
        return {}
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return {name: _apart(dataset, name, str(path)) for name in names if has_images(dataset.features[name])}


def _apart(dataset: Dataset, name: str, where: str) -> tuple[ImageColumn, list[Any]]:
    """The images of a column, and its cells with places. No image is read."""
    import pyarrow as pa
    from datasets import Dataset

    found: list[tuple[Any, np.ndarray, np.ndarray]] = []  # images, their rows, which of them are there
    row, cells = 0, []
    for chunk in dataset.with_format(None).data.column(name).chunks:
        cells += _with_places(dataset.features[name], chunk, np.arange(row, row + len(chunk)), found).to_pylist()
        row += len(chunk)
    arrays, rows, there = (list(parts) for parts in zip(*found, strict=True))
    there = np.concatenate(there)
    if is_image(dataset.features[name]):
        images = ImageColumn.of(dataset, name, where)
    else:
        images = ImageColumn.of(Dataset(pa.table({NAME: pa.chunked_array(arrays)})), NAME, where, shown=name)
        images.rows = np.concatenate(rows)
    return images if there.all() else images.select(np.flatnonzero(there)), cells


def _with_places(feature: Any, array: Any, rows: np.ndarray, found: list[tuple[Any, np.ndarray, np.ndarray]]) -> Any:
    """An array of `rows` with the places of images instead of them; the images are added to `found`."""
    import pyarrow as pa

    if is_image(feature):
        there = np.asarray(array.is_valid())
        places = sum(int(part.sum()) for _, _, part in found) + np.cumsum(there) - 1
        found.append((array, rows, there))
        return pa.array(places, mask=~there)
    if isinstance(feature, dict):
        names = [field.name for field in array.type]
        parts = [
            _with_places(feature[name], part, rows, found) for name, part in zip(names, array.flatten(), strict=True)
        ]
        return pa.StructArray.from_arrays(parts, names, mask=array.is_null())
    if not pa.types.is_nested(array.type):
        return array
    lengths = np.asarray(array.value_lengths().fill_null(0))
    inner = _with_places(feature.feature, array.flatten(), np.repeat(rows, lengths), found)
    return pa.LargeListArray.from_arrays(pa.array(np.cumsum([0, *lengths])), inner)


def need_pillow() -> None:
    """Refuse to go on without it."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise AnybatchError(
            "Images have to be decoded here, which needs Pillow. Install it with: pip install 'anybatch[vision]'"
        ) from error
