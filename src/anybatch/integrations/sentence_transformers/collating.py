"""Images that stay undecoded until the cached step takes their mini-batch: the Trainer's collator, and their lengths.

A batch of 8,192 images of 224 x 224 is 5 GB of pixels, and a few hundred megabytes or (where they are read from files)
nothing at all before it is decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.caching.on_demand import RowsOnDemand
from anybatch.caching.pieces import PIXELS
from anybatch.caching.rows import RowSlicer
from anybatch.caching.spans import MASK
from anybatch.core.errors import AnybatchError
from anybatch.data.images import EncodedImage, ImageColumn
from anybatch.data.inputs import NONE, Column, MixedColumn, MixedInput, guest_input, pick
from anybatch.data.records import has_images

if TYPE_CHECKING:
    from datasets import Dataset

    from anybatch.data.pairs import PairData

Preprocess = Callable[..., Any]


class ImageCollator:
    """A collator of sentence-transformers that leaves images to `CachedLoss`, which decodes each mini-batch by itself.

    Columns of texts go through it as before. Images may be anything that the model takes, and what is not decoded yet:
    cells of the feature `datasets.Image(decode=False)` (see `undecoded`), `EncodedImage`, `MixedInput`.

    Args:
        collator: The collator of the Trainer.
        columns: By name; a cell of such a column is the number of a row of it.

    Example:
        >>> from sentence_transformers.base.data_collator import BaseDataCollator
        >>> collate = ImageCollator(BaseDataCollator(preprocess_fn=lambda texts, **_: {"input_ids": texts}))
        >>> image = {"bytes": b"...", "path": None}
        >>> batch = collate([{"photo": image, "caption": "a cat"}, {"photo": image, "caption": "a dog"}])
        >>> batch["caption_input_ids"], len(batch["photo_pixel_values"].values)
        (['a cat', 'a dog'], 2)
    """

    def __init__(self, collator: Any, columns: Mapping[str, Column] | None = None) -> None:
        self.collator = copy.copy(collator)
        self.columns = dict(columns or {})
        self.preprocess: Preprocess = collator.preprocess_fn
        self.collator.preprocess_fn = self._preprocess

    @property
    def valid_label_columns(self) -> list[str]:
        """What the Trainer asks its collator for."""
        return self.collator.valid_label_columns

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as the Trainer takes it."""
        cells = [
            {name: _Place(name, value) if name in self.columns else value for name, value in row.items()}
            for row in rows
        ]
        return self.collator(cells)

    def _preprocess(self, values: list[Any], **settings: Any) -> Any:
        """Of one column; explicit negatives that are not there are left out."""
        column: Sequence[Any] = [value for value in values if value is not None]
        if values and isinstance(values[0], _Place):
            column = _there(self.columns[values[0].column], np.array([place.row for place in values], np.int64))
        if not len(column):
            return {}
        if _have_images(column):
            return {PIXELS: UndecodedRows(column, settings)}
        return self.preprocess([_decoded(value) for value in column], **settings)


class _Place(NamedTuple):
    """A cell that stands for a row of a column."""

    column: str
    row: int


@dataclass
class UndecodedRows:
    """The rows of one column of a batch, and how they are preprocessed: what the Trainer moves about.

    Example:
        >>> UndecodedRows(["a.png", "b.png"], {"prompt": None}).to("cpu").device
        device(type='cpu')
    """

    values: Sequence[Any]
    settings: dict[str, Any] = field(default_factory=dict)
    device: torch.device | None = None

    def to(self, device: Any, **_: Any) -> UndecodedRows:
        """Remember where the pixels go."""
        self.device = torch.device(device)
        return self

    def on_demand(self, model: Any, form: Mapping[str, Any]) -> RowsOnDemand:
        """The rows as the cached step takes them; `form` goes with them, see `RowsOnDemand`."""

        def make(values: list[Any]) -> dict[str, Any]:
            return preprocess_rows(model, values, **self.settings)

        lengths, patches = lengths_of_rows(model, self.values, self.settings)
        device = self.device or next((parameter.device for parameter in model.parameters()), None)
        return RowsOnDemand(self.values, make, lengths=lengths, patches=patches, form=form, device=device)


def preprocess_rows(model: Any, values: Sequence[Any], **settings: Any) -> dict[str, Any]:
    """The model's features of rows; what its processor refuses (a line of 1 x 600 pixels, say) is named by its row."""
    try:
        return dict(model.preprocess([_decoded(value) for value in values], **settings))
    except ValueError:
        for value in values:
            (_, images), decoded = _parts(value), _decoded(value)
            try:
                model.preprocess([decoded], **settings)
            except ValueError as error:
                if not images:
                    raise
                where = f" in {images[0].where}" if isinstance(images[0], EncodedImage) else ""
                raise AnybatchError(
                    f"The model's processor refuses the image{where}: {error}. Replace it, or leave the row out."
                ) from error
        raise


def undecoded(dataset: Dataset) -> Dataset:
    """The data set with its images, those in objects and lists too, as they are stored, for `ImageCollator`.

    Example:
        >>> from datasets import Dataset
        >>> undecoded(Dataset.from_dict({"caption": ["a cat"]})).column_names
        ['caption']
    """
    for name, feature in dataset.features.items():
        if has_images(feature):
            dataset = dataset.cast_column(name, _undecoded(feature))
    return dataset


def _undecoded(feature: Any) -> Any:
    from datasets import Image

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return replace(feature, feature=_undecoded(feature.feature)) if has_images(feature) else feature


def object_column(dataset: Dataset, name: str) -> MixedColumn:
    """A column of objects {"text", "image"} for ids and digest; its images are read here, once, and not kept."""
    texts, keys, counts = [], [], []
    for row in undecoded(dataset.with_format(None).select_columns([name])):
        value: Any = row[name]  # pyright: ignore[reportArgumentType, reportCallIssue]
        text, images = _parts(value)
        texts.append(text or None)
        keys += [_encoded(image).key for image in images]
        counts.append(len(images))
    places = np.full((len(counts), max(counts, default=0)), NONE)
    for row, last in enumerate(np.cumsum(counts)):
        places[row, : counts[row]] = np.arange(last - counts[row], last)
    return MixedColumn(texts, ImageColumn.of_keys(keys), places)


def as_columns(pairs: PairData) -> tuple[Dataset, Mapping[str, Column]]:
    """A data set for the Trainer, with texts as they are and row numbers for all else; and the columns of those.

    Negatives that some rows lack are numbers as well: the guest's Trainer takes no None among texts.
    """
    from datasets import Dataset

    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(pairs.negatives) + 1))]
    by_name = dict(zip(names, pairs.prompted, strict=True))
    columns: dict[str, Column] = {
        name: column if isinstance(column, ImageColumn) else MixedColumn.of(column)
        for name, column in by_name.items()
        if isinstance(column, (ImageColumn, MixedColumn)) or None in column
    }
    cells = {name: np.arange(len(pairs)) if name in columns else list(column) for name, column in by_name.items()}
    return Dataset.from_dict(cells), columns


def _there(column: Column, rows: np.ndarray) -> Column:
    """These rows of a column, without those that hold nothing."""
    if isinstance(column, MixedColumn):
        rows = rows[column.has_text[rows] | column.has_images[rows]]
    return pick(column, rows)


def _have_images(column: Sequence[Any]) -> bool:
    if isinstance(column, ImageColumn):
        return True
    if isinstance(column, MixedColumn):
        return bool(column.has_images.any())
    return any(_parts(value)[1] for value in column)


def _parts(value: Any) -> tuple[str, list[Any]]:
    """The text of a row's value, and its images, decoded or not."""
    if isinstance(value, MixedInput):
        return value.text or "", list(value.images)
    if isinstance(value, dict) and not _stored(value):
        held = value.get("image")
        return value.get("text") or "", [*held] if isinstance(held, (list, tuple)) else [] if held is None else [held]
    text = value if isinstance(value, str) else ""
    is_image = isinstance(value, (EncodedImage, dict)) or (hasattr(value, "size") and hasattr(value, "mode"))
    return text, [value] if is_image else []


def _stored(value: Any) -> bool:
    """Whether it is a cell of the feature `datasets.Image(decode=False)`."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def _decoded(value: Any) -> Any:
    """A row's value as the model takes it."""
    if isinstance(value, (EncodedImage, MixedInput)):
        return guest_input(value)
    if _stored(value):
        return _encoded(value).decode()
    if isinstance(value, dict) and "image" in value:
        images = value["image"]
        images = [_decoded(one) for one in images] if isinstance(images, (list, tuple)) else _decoded(images)
        return {key: images if key == "image" else part for key, part in value.items() if part is not None}
    return value


def _encoded(image: dict[str, Any]) -> EncodedImage:
    path = image["path"]
    try:
        encoded = image["bytes"] if image["bytes"] is not None else Path(path).read_bytes()
    except (OSError, TypeError) as error:
        raise AnybatchError(f"Cannot read the image {path}: {error}. Put it back, or leave the row out.") from error
    return EncodedImage(encoded=encoded, where=f"the training set{'' if path is None else f' ({path})'}")


# By processor: tokens beside those that it counts for an image, and tokens that one of its patches costs.
_figures: WeakKeyDictionary[Any, tuple[float, float]] = WeakKeyDictionary()


def lengths_of_rows(
    model: Any, values: Sequence[Any], settings: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Tokens and patches `(B,)` of rows with images, without decoding them; None where rows cost the same each.

    Of models that read images as tokens: the tokens of the texts, and for each image what the processor counts for its
    size, which is in the head of its file, or one figure; measured once, on the row with the most images.
    """
    # 1. Whether images become tokens.
    module: Any = next((part for part in model.modules() if "message" in getattr(part, "modality_config", ())), None)
    if module is None:
        return None, None
    # 2. Each row read once: its text, and how large its images are.
    texts, sizes = [], []
    for value in values:
        text, images = _parts(value)
        texts.append(text)
        sizes.append([_size(image) for image in images])
    lengths = model.preprocess(texts, **settings)[MASK].sum(dim=1).cpu()
    # 3. Tokens and patches of the images.
    counted = _counted(module, [size for of_row in sizes for size in of_row])
    number = torch.tensor([len(of_row) for of_row in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), number)
    tokens, patches = (torch.zeros(len(sizes)).index_add_(0, owner, part) for part in counted)
    if module not in _figures:
        first = int(number.argmax())
        features = model.preprocess([_decoded(values[first])], **settings)
        beside = int(features[MASK].sum()) - int(lengths[first]) - float(tokens[first])
        seen = RowSlicer(features).patches
        per_patch = 0.0 if seen is None else float(seen[0]) / float(patches[first])
        _figures[module] = beside / int(number[first]), per_patch
    of_image, of_patch = _figures[module]
    return (lengths + tokens + number * of_image).round().long(), (patches * of_patch).ceil().long()


def _counted(module: nn.Module, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Tokens and patches of each image as the processor counts them by its size; 0 and 1 where it does not."""
    processor: Any = module.processor
    try:
        options = (getattr(module, "processing_kwargs", None) or {}).get("image") or {}
        found = processor._get_num_multimodal_tokens(image_sizes=sizes, **options)
        return torch.tensor(found["num_image_tokens"]).float(), torch.tensor(found["num_image_patches"]).float()
    except Exception:  # not part of transformers' promises; lengths only sort rows and fill mini-batches
        return torch.zeros(len(sizes)), torch.ones(len(sizes))


def _size(image: Any) -> tuple[int, int]:
    """Height and width."""
    width, height = (_encoded(image) if _stored(image) else image).size or (1, 1)  # what is none is named when decoded
    return height, width
