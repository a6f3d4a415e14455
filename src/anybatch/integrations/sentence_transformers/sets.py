"""Training sets: row numbers as the guest's `label` column, and what their inputs are: equal ones have equal ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.util.dataset import DEFAULT_LABEL_COLUMNS
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.data.images import ImageColumn
from anybatch.data.inputs import NegativeColumn
from anybatch.data.pairs import PairData, PairSet, join_pairs
from anybatch.data.records import has_images, is_image
from anybatch.integrations.sentence_transformers.collating import object_column
from anybatch.losses.rows import RowTable

REPEATS = 100  # rows with a number that another row has: so many are compared with it
NUMBERS = (
    "The column of labels must hold row numbers, one for each row of all training sets together. Remove or rename it, "
    "and call with_index on the data set; on several, once on the dictionary of them."
)
Sets = TypeVar("Sets", bound=Dataset | dict[str, Dataset])


def by_name(value: Any) -> dict[str, Any]:
    """What the guest takes alone or as a dictionary, as a dictionary; "" names what stands alone."""
    return dict(value) if isinstance(value, dict) else {"": value}


def input_columns(dataset: Any) -> list[str]:
    """The anchor, the positive and the negatives, in this order: all but labels."""
    names = getattr(dataset, "column_names", None) or ()
    return [name for name in names if name not in (*DEFAULT_LABEL_COLUMNS, "dataset_name")]


def row_ids(sets: Mapping[str, Dataset]) -> dict[str, Any]:
    """Ids of the inputs of all sets together, by row number (the column `label`): equal ones are no negatives of each
    other. They are `RowTable`'s first arguments.
    """
    # 1. All rows, one set after the other.
    parts = [_pairs_of(name, part) for name, part in sets.items()]
    width = max(len(part.negatives) for part in parts)
    # Of a set with fewer negatives the others are never asked for: any ids will do.
    parts = [
        replace(part, negatives=(*part.negatives, *[part.positives] * (width - len(part.negatives)))) for part in parts
    ]
    named = [PairSet(name=f"set {number}", num_rows=len(part)) for number, part in enumerate(parts)]
    pairs = parts[0] if len(parts) == 1 else join_pairs(parts, named)
    ids = {**pairs.ids, "negative_id": pairs.negative_id}

    # 2. In the order of their numbers, which a user may have given before shuffling or selecting.
    check_numbers(list(sets.values()), None)
    numbers = np.concatenate([np.asarray(part.with_format("numpy")["label"]) for part in sets.values()])
    if np.array_equal(numbers, np.arange(len(numbers))):
        return ids
    ordered = {}
    for name, values in ids.items():
        if values is not None:  # explicit negatives, where there are none
            ordered[name] = np.zeros((numbers.max() + 1, *values.shape[1:]), np.int64)
            ordered[name][numbers] = values
    return ordered


def _pairs_of(name: str, dataset: Dataset) -> PairData:
    """The columns of a data set; what is neither text nor image counts as different in every row."""
    named, names = name or "to train on", input_columns(dataset)
    if len(names) < 2:
        raise AnybatchError(
            f"The data set {named} has the columns {', '.join(dataset.column_names)}; expected an anchor, a positive "
            "and optionally negatives, in this order, besides labels."
        )
    columns: list[Any] = []
    for column in names:
        cells = cells_of(dataset, column)
        columns.append([f"{name} {column} {row}" for row in range(len(dataset))] if cells is None else cells)
    for column, cells in zip(names[:2], columns):
        if isinstance(cells, list) and None in cells:
            raise AnybatchError(
                f"The data set {named} has nothing in column '{column}' in row {cells.index(None) + 1}; expected an "
                "anchor and a positive in every row. Leave such rows out (Dataset.filter)."
            )
    return PairData(anchors=columns[0], positives=columns[1], negatives=tuple(columns[2:]))


def cells_of(dataset: Dataset, column: str) -> NegativeColumn | None:
    """Texts (None for a negative that a row lacks), images as they are stored, or both; None for anything else."""
    feature = dataset.features[column]
    if is_image(feature):
        return ImageColumn.of(dataset, column, "the training set")
    if isinstance(feature, dict) and has_images(feature) and feature.keys() <= {"text", "image"}:
        return object_column(dataset, column)
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return dataset.with_format(None)[column][:]
    return None


def with_index(dataset: Sets, *, first: int = 0) -> Sets:
    """`dataset` with a column `label` that holds each row's number, which is how the row index reaches the loss.

    Of several, a `DatasetDict` or a dictionary, the numbers run through all, from `first`, so that each row has its
    own: one loss is for all of them. Select, shuffle, split or filter after it as you like: a row keeps its number.

    Raises:
        AnybatchError: A label or score column, which these losses would never read; a stream, whose rows have no fixed
            numbers; no data set.

    Example:
        >>> from datasets import Dataset
        >>> with_index(Dataset.from_dict({"anchor": ["a", "b"], "positive": ["A", "B"]}))["label"][:]
        [0, 1]
    """
    if isinstance(dataset, dict):
        numbered = {}
        for name, part in dataset.items():
            if isinstance(part, dict):
                raise AnybatchError(f"'{name}' is a dictionary of data sets itself. Give the splits to train on.")
            numbered[name] = with_index(part, first=first)
            first += len(part)
        return type(dataset)(numbered)  # pyright: ignore[reportReturnType] - DatasetDict and dict alike
    if not isinstance(dataset, Dataset):
        raise AnybatchError(
            f"Got a {type(dataset).__name__}; expected a Dataset of the package datasets, or a dictionary of them. "
            "Rows of a stream have no fixed numbers: read it into a Dataset first, or let it yield a column 'label', "
            "the row's own number from 0 to the loss's num_rows - 1."
        )
    taken = [name for name in DEFAULT_LABEL_COLUMNS if name in dataset.column_names]
    if taken:
        raise AnybatchError(
            f"The data set has the column '{taken[0]}', which contrastive losses do not use. Remove or rename it."
        )
    numbers = np.arange(first, first + len(dataset))
    return dataset.add_column(  # pyright: ignore[reportReturnType]
        "label", numbers, new_fingerprint=f"{dataset._fingerprint}-indexed-{first}"
    )


def check_numbers(sets: Sequence[Dataset], num_rows: int | None) -> None:
    """Refuse, before training, a column of labels, scores or classes in the place of row numbers: of the data sets that
    one loss is for, which has `num_rows` (None: any). Rows are read where numbers repeat, 100 of them.
    """
    # 1. The numbers of all rows.
    columns = []
    for part in sets:
        for name in [name for name in DEFAULT_LABEL_COLUMNS if name in part.column_names][:1]:
            column = np.asarray(part.with_format("numpy")[name])
            if column.dtype.kind not in "iu" or column.ndim != 1:
                raise AnybatchError(f"The column '{name}' holds {column.dtype}. {NUMBERS}")
            columns.append((part, name, column))
    numbers = np.concatenate([column for _, _, column in columns]) if columns else np.zeros(0, np.int64)
    if not len(numbers):
        return
    _check_range(int(numbers.min()), int(numbers.max()), num_rows)

    # 2. Rows with one number must be the same row.
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])[:REPEATS]
    ends = np.cumsum([len(column) for _, _, column in columns])

    def content(place: int) -> dict[str, Any]:
        part, name, _ = columns[int(np.searchsorted(ends, place, side="right"))]
        row = part.with_format(None)[int(place - ends[ends <= place].max(initial=0))]
        return {key: value for key, value in row.items() if key not in (name, "dataset_name")}

    for first, second in zip(order[again], order[again + 1], strict=True):
        if content(first) != content(second):
            raise AnybatchError(f"Two different rows have the number {numbers[first]}. {NUMBERS}")


def _check_range(low: int, high: int, num_rows: int | None) -> None:
    if low < 0 or (num_rows is not None and high >= num_rows):
        expected = "0 or more" if num_rows is None else f"0 to {num_rows - 1}, the rows of the loss or its row table"
        raise AnybatchError(
            f"Row numbers run from {low} to {high}; expected {expected}. Make the loss for all rows of the training "
            "sets, and number these with with_index."
        )


def num_rows_of(loss: nn.Module, rows: RowTable | None) -> int | None:
    """The rows that a loss and its row table are for; None where they take any."""
    sizes = [getattr(module, "num_rows", None) for module in loss.modules()]
    sizes.append(None if rows is None else len(rows.anchor_id))
    return min((size for size in sizes if isinstance(size, int)), default=None)


def row_numbers(labels: Tensor, features: Sequence[dict[str, Any]], num_rows: int | None) -> Tensor:
    """The labels of a batch as row numbers: whole numbers in range, and rows with the same number have the same texts.

    A column of scores or classes would train to nothing without a word. A sort of B numbers, one wait for the device.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        raise AnybatchError(f"The labels are {labels.dtype} of shape {tuple(labels.shape)}. {NUMBERS}")
    numbers, order = labels.long().sort(stable=True)
    same = numbers[1:] == numbers[:-1]
    low, high, repeats = torch.stack([numbers[0], numbers[-1], same.sum()]).tolist() if len(numbers) else (0, 0, 0)
    _check_range(low, high, num_rows)
    for column in features if repeats else ():
        tokens = column.get("input_ids")
        if tokens is not None and len(tokens) == len(labels):
            first, second = order[:-1][same].to(tokens.device), order[1:][same].to(tokens.device)
            if not torch.equal(tokens[first], tokens[second]):
                raise AnybatchError(
                    f"Different rows of a batch have one number, such as {int(numbers[1:][same][0])}. {NUMBERS}"
                )
    return labels.long()
