"""One column of images, with their classes where there are any: a folder of files, Parquet, or a saved data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of
from anybatch.data.columns import IMAGE, BadRows
from anybatch.data.images import ImageColumn
from anybatch.data.inputs import row_keys
from anybatch.data.records import column_names, image_dataset, is_image, listed, no_column
from anybatch.data.sets import files_of

logger = logging.getLogger("anybatch")
LABELS = ("label", "labels", "class", "category")  # columns that hold the classes, the most telling first
NO_CLASS = ""  # of an image without


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """n images in row order, and their classes (n,), words, `NO_CLASS` where one has none; None without."""

    images: ImageColumn
    classes: np.ndarray | None
    source: str

    @property
    def labels(self) -> np.ndarray:
        """The classes, which must be there."""
        missing = [] if self.classes is None else np.flatnonzero(self.classes == NO_CLASS).tolist()
        if self.classes is None or missing:
            which = f"{len(missing)} of the" if missing else "The"
            raise AnybatchError(
                f"{which} images of {self.source} have no classes, by which a model is measured. Put the files into a "
                f"folder for each class, or the classes into a column '{LABELS[0]}'."
            )
        return self.classes


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """Images to learn classes from, and images to tell apart."""

    known: Images
    test: Images

    def __post_init__(self) -> None:
        for part in (self.known, self.test):
            if len(part.labels) == 0:
                raise AnybatchError(f"{part.source} holds no images.")
        known, test = ({*part.labels.tolist()} for part in (self.known, self.test))
        if len(known) < 2:
            raise AnybatchError(f"The images of {self.known.source} are of one class; expected 2 or more.")
        if unknown := sorted(test - known):
            logger.warning(
                "%d of %d classes of %s are not among those of %s, such as '%s': their images count as wrong.",
                len(unknown), len(test), self.test.source, self.known.source, unknown[0],
            )  # fmt: skip

    @property
    def digest(self) -> str:
        """Over all images and classes."""
        parts = (self.known, self.test)
        words = ["\n".join(part.labels.tolist()).encode() for part in parts]
        return digest_of([*words, *(key for part in parts for key in row_keys(part.images))])


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedClasses:
    """Images with classes, and for each class its name in templates, by which it is to be told.

    >>> prompts_of(["sea_lion"], ["a photo of a {}.", "a drawing of a {}."])
    {'sea_lion': ['a photo of a sea lion.', 'a drawing of a sea lion.']}
    """

    images: Images
    prompts: dict[str, list[str]]

    @property
    def digest(self) -> str:
        """Over images, classes and prompts."""
        texts = [text.encode() for of_class in self.prompts.values() for text in of_class]
        return digest_of([*texts, *(label.encode() for label in self.images.labels), *row_keys(self.images.images)])


def prompts_of(
    classes: Sequence[str], templates: Sequence[str], names: Mapping[Any, Any] | None = None
) -> dict[str, list[str]]:
    """Each class's name in each template, in place of its "{}". `names` are those of labels that are none themselves
    (n02077923); None: a label is the name, its underscores are spaces.

    Raises:
        AnybatchError: No templates, or one without "{}"; a class without a name.
    """
    wrong = next((template for template in templates if "{}" not in template), None)
    if wrong is not None or not templates:
        found = "There are none" if wrong is None else f"One is {wrong!r}"
        raise AnybatchError(f'Templates hold "{{}}" where the class goes, such as "a photo of a {{}}.". {found}.')
    names = None if names is None else {str(label): str(name) for label, name in names.items()}
    missing = [label for label in classes if names is not None and label not in names]
    if missing:
        raise AnybatchError(f"{len(missing)} of {len(classes)} classes have no name, such as '{missing[0]}'. Add them.")
    named = {label: label.replace("_", " ") for label in classes} if names is None else {x: names[x] for x in classes}
    return {label: [text.replace("{}", name) for text in templates] for label, name in named.items()}


def read_images(
    path: str, *, column: str | Sequence[str] | None = None, limit: int | None = None, skip_bad: bool = False
) -> Images:
    """The images of a folder of files, of Parquet files, of tars, or of a data set saved by `datasets` (or on the hub).

    Args:
        path: Of a folder, all files that are named as images, at any depth, by their names; where each lies in a folder
            of the folder, that is its class. Several files of one data set: a pattern, or the folder of them.
        column: Of Parquet and data sets; None for the only one that holds images.
        limit: The first images only.
        skip_bad: Leave out images that are missing or broken, and say which.

    Raises:
        AnybatchError: No images; several columns of them, and none is named.
    """
    if column is not None and not isinstance(column, str):
        if len(column) > 1:
            raise AnybatchError(f"The columns {', '.join(column)} are named; expected one, of images.")
        column = column[0]
    folder = Path(path)
    files: list[Path] = []
    if folder.is_dir() and not (folder / "state.json").exists():
        files = sorted(file.relative_to(folder) for file in folder.rglob("*") if IMAGE.search(file.name))[:limit]
    if files and column is None:
        images = ImageColumn.of_paths([str(file) for file in files], folder, path)
        in_folders = all(len(file.parts) > 1 for file in files)
        classes = np.array([file.parts[0] for file in files]) if in_folders else None
    elif files or (folder.is_dir() and files_of(folder) == [folder] and not (folder / "state.json").exists()):
        found = "no file named as an image (.jpg, .png, .webp ...)" if column is None else f"no column '{column}'"
        raise AnybatchError(f"{path} is a folder with {found} in it. Expected images, in a folder a class or flat.")
    else:
        parts = [_stored(file, column) for file in files_of(folder)]
        images = ImageColumn.join([images for images, _ in parts])
        known = [classes for _, classes in parts if classes is not None]
        classes = np.concatenate(known) if len(known) == len(parts) else None
    rows = np.arange(len(images))[:limit]
    if skip_bad:
        bad = BadRows()
        for place, error in images.broken.items():
            bad.add(place + 1, error)
        rows = np.setdiff1d(rows, list(images.broken))
        bad.check(left_out_of=path if len(rows) else "")
    if len(rows) < len(images):
        images, classes = images.select(rows), None if classes is None else classes[rows]
    count = "no classes" if classes is None else f"{len({*classes.tolist()} - {NO_CLASS})} classes"
    logger.info("%s: %d images, %s.", path, len(images), count)
    return Images(images=images, classes=classes, source=path)


def _stored(file: Path, column: str | None) -> tuple[ImageColumn, np.ndarray | None]:
    """The images of one file or data set, and their classes."""
    present = column_names(file)
    if column is not None and column not in present:
        raise no_column(column, present, str(file))
    dataset = image_dataset(file, present)
    holding = [] if dataset is None else [name for name in present if is_image(dataset.features.get(name))]
    chosen = [column] if column is not None else holding
    if dataset is None or len(chosen) != 1 or chosen[0] not in holding:
        raise AnybatchError(
            f"Cannot tell the images of {file}: its columns of images are {listed(holding)}. Expected one (the feature "
            "datasets.Image), or its name in data.anchor (--anchor); or a folder of image files."
        )
    label = next((name for name in LABELS if name in present), None)
    classes = None
    if label is not None:
        names, values = getattr(dataset.features[label], "names", None), dataset.with_format(None)[label][:]
        if names is not None:  # numbers of classes; -1 is the hub's way to say that there is none
            values = [None if value is None or value < 0 else names[value] for value in values]
        classes = np.array([NO_CLASS if value is None else str(value) for value in values])
    return ImageColumn.of(dataset, chosen[0], str(file)), classes
