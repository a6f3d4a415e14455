"""Columns of images: lazy, undecoded, told apart by their encoded bytes, which ids and digest read once."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.data.records import has_images, image_dataset, is_image
from anybatch.data.shards import read_part

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

BLOCK = 64  # rows read at once: a third of a gigabyte of large photographs
KEY = 16  # bytes of an image's digest
NAME = "image"  # the one column of the data set inside an `ImageColumn`
MODE = "RGB"  # of decoded images: most processors refuse batches of several modes
UNBOUNDED = ("I", "F")  # modes that Pillow would clip at 255
THUMBNAIL = 64  # pixels of the longer side


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """One image as it was stored: the bytes of its file, and row and column for messages.

    >>> EncodedImage(encoded=b"no image", where="row 3, 'photo' of pairs.csv").size  # None where it is no image
    """

    encoded: bytes = field(repr=False)
    where: str

    def decode(self) -> Image:
        """The image in RGB, turned upright, as `datasets` gives it to the Trainer; of 16 bits a grey value its upper 8,
        where `datasets` has white for nearly all.
        """
        _need_pillow()
        from datasets import Image as Feature

        try:
            image = Feature().decode_example({"bytes": self.encoded, "path": None})
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value / 256, "L")
        except Exception as error:  # a broken file fails in Pillow's decoders with nearly anything
            reason = "it is none that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else error
            raise AnybatchError(
                f"The image in {self.where} cannot be decoded ({reason}). Replace it, or leave the row out."
            ) from error
        if image.mode in UNBOUNDED:
            raise AnybatchError(
                f"The image in {self.where} has numbers of 32 bits as pixels, of which nothing tells what is white. "
                "Save it with 8 or 16 bits a channel, or leave the row out."
            )
        return image if image.mode == MODE else image.convert(MODE)

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
            from PIL import Image, ImageOps

            with Image.open(BytesIO(self.encoded)) as image:
                image.draft("RGB", (THUMBNAIL, THUMBNAIL))  # of a JPEG, no more is decoded than is shown
                small = ImageOps.exif_transpose(image).convert("RGBA")
        except Exception:
            return None
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        file = BytesIO()
        white = Image.new("RGBA", small.size, "white")
        Image.alpha_composite(white, small).convert("RGB").save(file, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class ImageColumn(Sequence[EncodedImage]):
    """Images in row order that stay in their files. Slices and selections are columns again; nothing is decoded.

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

    @overload
    def __getitem__(self, index: int) -> EncodedImage: ...

    @overload
    def __getitem__(self, index: slice) -> ImageColumn: ...

    def __getitem__(self, index: int | slice) -> EncodedImage | ImageColumn:
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        place = range(len(self))[index]
        return self._image(self.dataset[place][NAME], place)

    def __iter__(self) -> Iterator[EncodedImage]:
        return (self._image(value, place) for place, value in self._values())

    def select(self, rows: np.ndarray) -> ImageColumn:
        """These places of the column, in this order."""
        chosen = ImageColumn(self.dataset.select(rows), self.files, self.rows[rows], self.source[rows])
        if "keys" in vars(self):
            vars(chosen)["keys"] = self.keys[rows]
        return chosen

    @cached_property
    def keys(self) -> np.ndarray:
        """(n, 16) uint8: digest of each image's encoded bytes; equal bytes are the same image."""
        if self._parts:
            return np.concatenate([part.keys for part in self._parts])
        keys = np.empty((len(self), KEY), np.uint8)
        places: dict[str, int] = {}  # of files; one that many rows name is read once
        for place, value in self._values():
            file = value["path"] if value is not None and value["bytes"] is None else None
            first = place if file is None else places.setdefault(file, place)
            keys[place] = keys[first] if first < place else _key(self._image(value, place))
        return keys

    def decoded(self, name: str) -> Dataset:
        """A data set with the column `name`, decoded as it is read. A selection goes into a temporary file."""
        from datasets import Image as Feature
        from datasets.fingerprint import get_temporary_cache_files_directory

        _need_pillow()
        dataset = self.dataset
        if dataset._indices is not None:  # left to itself, `datasets` would write beside the user's data
            file = Path(get_temporary_cache_files_directory()) / f"{dataset._fingerprint}.arrow"
            dataset = dataset.flatten_indices(cache_file_name=str(file))
        return dataset.rename_columns({NAME: name}).cast_column(name, Feature(mode=MODE))

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
                    f"Cannot read the image {path} ({where}): {error.strerror or error}. Put it back, or leave the row "
                    "out."
                ) from error
        if not encoded:
            raise AnybatchError(f"There is no image in {named}. Every row needs one: fill it or leave the row out.")
        return EncodedImage(encoded=encoded, where=named)


def _key(image: EncodedImage) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(image.encoded, digest_size=KEY).digest(), np.uint8)


def find_images(
    path: Path, names: Sequence[str], limit: int | None = None
) -> dict[str, tuple[ImageColumn, list[Any]]]:
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
    import pyarrow.compute as compute

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
    lengths = np.asarray(compute.fill_null(compute.list_value_length(array), 0))
    inner = _with_places(feature.feature, array.flatten(), np.repeat(rows, lengths), found)
    return pa.LargeListArray.from_arrays(pa.array(np.cumsum([0, *lengths])), inner)


def holds_images(dataset: Dataset, name: str) -> bool:
    """Whether the column has the feature `datasets.Image`."""
    from datasets import Image as Feature

    return isinstance(dataset.features.get(name), Feature)


def _need_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise AnybatchError(
            "Images have to be decoded here, which needs Pillow. Install it with: pip install 'anybatch[vision]'"
        ) from error
