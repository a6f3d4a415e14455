"""Cut a batch of inputs by rows, without the padding that the chosen rows do not need. Cutting copies, so an encoder
that writes into its inputs cannot change what the replay will see.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import numbers
from abc import abstractmethod
from collections import UserDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.caching.pieces import COUNTS, GRIDS, PIXELS, Pieces, is_bag, pieces_of
from anybatch.caching.spans import MASK, Spans, Trim, has_mask, spans_of
from anybatch.core.errors import AnybatchError

_FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
_SHARED_KEYS = ("modality", "task", "prompt_length")  # of sentence-transformers; a modality may be a tuple of words
_SIMPLE = (str, bytes, numbers.Number, enum.Enum, np.generic, torch.dtype, torch.device, Path, type(None))
_COUNTING = (*(key for keys in COUNTS.values() for key in keys), *GRIDS)  # what counts rows by its name
_Path = tuple[str, ...]  # of keys, from the batch inwards
NO_LENGTHS = (
    "nothing tells the lengths of these inputs: they have no two-dimensional attention_mask, or hold a tensor of "
    "unknown meaning with an axis as long as it"
)


@dataclass(frozen=True)
class Shared:
    """Marks a value of a batch that all rows share: every mini-batch receives `value` whole.

    Example:
        >>> RowSlicer({"ids": torch.arange(3), "bias": Shared([0.5])}).take(torch.tensor([2]))
        {'ids': tensor([2]), 'bias': [0.5]}
    """

    value: Any


class Rows:
    """Abstract: a batch of which any subset of rows can be taken.

    Attributes:
        inputs: What its form is known from.
        num_rows: B.
        lengths: `(B,)` int64 on the CPU, the tokens a row needs (summed over nested mappings), or None
            where nothing tells.
        patches: `(B,)` int64, what the row's images cost beside its tokens, in tokens: patches of a grid, else one per
            256 pixels. None without images, or without lengths.
        images: Whether the rows are images, which cost the same each.
        trim: Which padding is cut.
    """

    inputs: Any
    num_rows: int
    lengths: Tensor | None
    patches: Tensor | None
    images: bool
    trim: Trim
    untested_trim: Trim = "trailing"  # where no passes can tell what an encoder depends on
    image_tokens: Collection[int] = ()

    @abstractmethod
    def take(self, rows: Tensor) -> Any:
        """The rows `rows` `(b,)` int64 (on the CPU) of the batch, in that order, trimmed."""

    @abstractmethod
    def trim_to(self, trim: Trim) -> None:
        """Cut the padding of both ends, the trailing one (and the leading where positions are given), or none."""

    @property
    @abstractmethod
    def padded(self) -> tuple[Tensor, bool] | None:
        """The two rows `(2,)` with the fewest tokens and whether padding leads in them; None where no row is padded."""

    def prepare(self, rows: Tensor) -> None:
        """These rows are taken next."""

    def settled(self) -> Rows:
        """The rows, now that it is known which padding is cut."""
        return self

    @property
    def costs(self) -> Tensor | None:
        """(B,) tokens and patches of each row; None where there are no lengths."""
        return self.lengths if self.patches is None or self.lengths is None else self.lengths + self.patches

    def padded_tokens(self, rows: Tensor) -> int:
        """Of a mini-batch, patches of its images included; rows, where there are no lengths."""
        padded = len(rows) * (1 if self.lengths is None else max(1, int(self.lengths[rows].max())))
        return padded if self.patches is None else padded + int(self.patches[rows].sum())


class RowSlicer(Rows):
    """Reads the shape of a batch once, then hands out any subset of its rows.

    In a mapping, tensors, arrays, lists and tuples with B entries are cut; numbers, words, None and zero-dimensional
    tensors go to every mini-batch, and so does what is wrapped in `Shared`. Two forms without one entry per row are
    known: words one after the other with `offsets` `(B,)`, as an embedding bag takes them, and images or videos counted
    by image (`image_grid_thw` with flattened `pixel_values`, or `pixel_values` alone), where `num_images_per_sample`
    `(B,)` or the tokens of images say whose they are. Anything else is refused by its name.

    Trailing columns are cut where no chosen row has a token: with a two-dimensional `attention_mask` `(B, T)`,
    sequences known by their name lose the columns past the last one in which the mask, or a boolean tensor among them,
    is set. Leading padding is cut where `position_ids` are given, or where it was seen to change no embedding
    (`row_check`). A mapping that holds another tensor (but `pixel_values`) with an axis of length T keeps its full
    width.

    Args:
        inputs: A Tensor or array `(B, ...)`; a mapping, named tuple or dataclass as above, nested at will; or a list
            with one item per row. A tuple (or list) of tensors of several dtypes and equal length holds columns.
        image_tokens: Ids that stand for images, where no count per row is given.

    Raises:
        AnybatchError: What is neither cut nor shared, by its key; flattened (unpadded) sequences; nothing to cut at
            all.

    Example:
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> RowSlicer({"input_ids": mask * 7, "attention_mask": mask}).take(torch.tensor([1]))["input_ids"]
        tensor([[7]])
    """

    def __init__(self, inputs: Any, *, image_tokens: Collection[int] = ()) -> None:
        self.inputs = inputs
        self.image_tokens = image_tokens
        self.num_rows = _count_rows(inputs)
        self._spans: dict[_Path, Spans] = {}
        self._pieces: dict[_Path, Pieces] = {}
        self._check(inputs, ())
        self.trim_to("trailing")
        pixels = isinstance(inputs, Mapping) and PIXELS in inputs and not has_mask(inputs)
        self.images = pixels and self.lengths is None

    def trim_to(self, trim: Trim) -> None:
        """See `Rows.trim_to`."""
        self.trim = trim
        parts = [spans.lengths(trim) for spans in self._spans.values()]
        parts += [pieces.sizes for path, pieces in self._pieces.items() if path[-1] == "offsets"]
        grids = [pieces for path, pieces in self._pieces.items() if path[-1] in GRIDS]
        parts += [torch.zeros_like(pieces.sizes) for pieces in grids]  # their patches have a number all the same
        self.lengths = torch.stack(parts).sum(dim=0) if parts else None
        costs = [(pieces.sizes * pieces.cost).ceil().long() for pieces in self._pieces.values() if pieces.cost]
        self.patches = torch.stack(costs).sum(dim=0) if parts and costs else None

    @property
    def padded(self) -> tuple[Tensor, bool] | None:
        """See `Rows.padded`."""
        lengths = [spans.lengths("both") for spans in self._spans.values()]
        widths = [spans.lengths("none") for spans in self._spans.values()]
        if not lengths or all(map(torch.equal, lengths, widths)):
            return None
        rows = torch.sort(torch.stack(lengths).sum(dim=0), stable=True).indices[:2]
        return rows, any(bool(spans.first[rows].any()) and not spans.positions for spans in self._spans.values())

    def take(self, rows: Tensor) -> Any:
        """See `Rows.take`."""
        return self._take(self.inputs, rows, (), None)

    def _take(self, value: Any, rows: Tensor, path: _Path, window: tuple[int, int, int] | None) -> Any:
        if isinstance(value, Shared):
            return value.value
        if path in self._pieces:
            return self._pieces[path].take(value, rows)
        if isinstance(value, Tensor):
            if window is not None and value.ndim >= 2 and value.shape[1] == window[0] and path[-1] != PIXELS:
                value = value[:, window[1] : window[2]]
            return value if value.ndim == 0 else value.index_select(0, rows.to(value.device))
        if isinstance(value, np.ndarray):
            return value[rows.numpy()] if value.ndim > 0 else value
        columns = _columns(value)
        if columns is not None:
            spans = self._spans.get(path)
            here = spans.window(rows, self.trim) if spans is not None else None
            taken = {key: self._take(item, rows, (*path, str(key)), here) for key, item in columns.items()}
            # A mini-batch without images has no keys of theirs, as if its processor had seen none.
            pieces = {key: self._pieces.get((*path, str(key))) for key in columns} if self._pieces else {}
            empty = [key for key, part in pieces.items() if part is not None and part.absent(rows)]
            return _rebuilt(value, {key: item for key, item in taken.items() if key not in empty}, dropped=empty)
        if _is_list(value) and not _goes_whole(value, path):
            items = [value[row] for row in rows.tolist()]
            return tuple(items) if isinstance(value, tuple) and path else items
        return value

    def _check(self, value: Any, path: _Path) -> None:
        """Refuse what can be neither cut nor shared, and note the spans and pieces of what can."""
        name = ".".join(path) or "the input"
        if isinstance(value, Shared) or path in self._pieces or _goes_whole(value, path):
            return
        columns, problem = _columns(value), None
        if isinstance(value, (Tensor, np.ndarray)):
            if value.ndim > 0 and value.shape[0] != self.num_rows:
                problem = f"has shape {tuple(value.shape)}"
            _refuse_history(value, name)
        elif columns is not None:
            self._check_columns(columns, path, name)
        elif _is_list(value):
            if len(value) != self.num_rows:
                problem = f"is a {type(value).__name__} of {len(value)} entries"
            for item in value:
                _refuse_history(item, name)
        elif path:
            problem = f"is a {type(value).__name__}, which cannot be cut"
        if problem is not None:
            raise AnybatchError(
                f"{name} {problem}, but the batch has {self.num_rows} rows. Caching cuts by rows: give one entry per "
                "row; for images or patches that are counted by themselves (image_grid_thw and the like) add "
                "num_images_per_sample, one number per row; wrap what all rows share in anybatch.caching.Shared(...)."
            )

    def _check_columns(self, columns: Mapping[str, Any], path: _Path, name: str) -> None:
        for key in _FLATTENED:
            if columns.get(key) is not None:
                raise AnybatchError(
                    f"{name} holds {key!r}: caching cuts by rows, and cannot cut flattened (unpadded) sequences. Use a "
                    "collator that pads; the padding is trimmed for every mini-batch."
                )
        positions = columns.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim > 2:
            raise AnybatchError(
                f"{name} holds position_ids of shape {tuple(positions.shape)}; positions of several axes are not cut "
                "by rows. Leave them out; the model computes them from input_ids, masks and grids."
            )
        pieces = pieces_of(columns, self.num_rows, name, self.image_tokens)
        self._pieces |= {(*path, key): part for key, part in pieces.items()}
        spans = spans_of(columns, self.num_rows, pieces)
        if spans is not None:
            self._spans[path] = spans
        for key, item in columns.items():
            self._check(item, (*path, str(key)))


def rows_of(inputs: Any, *, image_tokens: Collection[int] = ()) -> Rows:
    """A batch as rows; what is one already is told the settings it still lacks."""
    if isinstance(inputs, RowSlicer):
        return inputs
    if isinstance(inputs, Rows):
        inputs.image_tokens = image_tokens
        return inputs
    return RowSlicer(inputs, image_tokens=image_tokens)


def _columns(value: Any) -> Mapping[str, Any] | None:
    """What a mapping, named tuple, dataclass or tuple of tensors of several dtypes holds, by name; else None."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value))  # type: ignore[attr-defined]
    items = value if isinstance(value, (list, tuple)) else ()
    tensors = all(isinstance(item, Tensor) and item.ndim > 0 for item in items)
    if tensors and len({item.dtype for item in items}) > 1 and len({len(item) for item in items}) == 1:
        return {str(number): item for number, item in enumerate(items)}  # one item per row would have one dtype
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _goes_whole(value: Any, path: _Path) -> bool:
    """Whether a value inside a mapping has nothing to cut."""
    if not path:
        return False
    empty = _is_list(value) and not len(value)
    function = callable(value) and not isinstance(value, (Tensor, Mapping))
    return empty or function or path[-1] in _SHARED_KEYS or isinstance(value, _SIMPLE)


def _refuse_history(value: Any, name: str) -> None:
    if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
        raise AnybatchError(
            f"{name} requires a gradient and was computed by earlier operations, whose graph would be run through "
            "several times. Move those operations into the encoder, or detach the input."
        )


def _count_rows(inputs: Any) -> int:
    """B: of the input itself, else of what counts rows by its name, else of the first tensor, array or list found."""
    if _columns(inputs) is None and _is_list(inputs):
        lengths = {len(item) if isinstance(item, Tensor) and item.ndim > 0 else None for item in inputs}
        if isinstance(inputs, tuple) and len(inputs) > 1 and len(lengths) == 1 and None not in lengths:
            raise AnybatchError(
                f"The batch is a tuple of {len(inputs)} tensors of length {lengths.pop()}: columns or rows? Pass "
                "columns as a mapping, or one item per row as a list."
            )
        return len(inputs)
    for tensors_only in (True, False):
        rows = _rows_of(inputs, tensors_only)
        if rows is not None:
            return rows
    raise AnybatchError(
        f"The batch ({type(inputs).__name__}) holds no tensor with a first dimension, so it cannot be cut into "
        "mini-batches. Pass a Tensor, a mapping of Tensors, or a list with one item per row."
    )


def _rows_of(value: Any, tensors_only: bool) -> int | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return int(value.shape[0]) if value.ndim > 0 else None
    columns = _columns(value)
    if columns is not None:
        names = (MASK, *(("offsets",) if is_bag(columns) else ()), "input_ids", *_COUNTING)
        preferred = [columns[key] for key in names if columns.get(key) is not None]
        for item in [*preferred, *(item for key, item in columns.items() if key not in _SHARED_KEYS)]:
            if not isinstance(item, Shared) and (found := _rows_of(item, tensors_only)) is not None:
                return found
    elif not tensors_only and _is_list(value) and len(value):
        return len(value)
    return None


def _rebuilt(value: Any, taken: dict[str, Any], *, dropped: Sequence[str] = ()) -> Any:
    """`taken` in the type of `value`, where a copy of it is known to be one of its own, else a dict."""
    if isinstance(value, Mapping):
        if type(value) is dict or not isinstance(value, (dict, UserDict)):
            return taken  # copy.copy of any other mapping may share its contents: writing would reach the caller's
        same = copy.copy(value)
        same.update(taken)
        for key in dropped:
            del same[key]
        return same
    if isinstance(value, (list, tuple)):
        return type(value)(*taken.values()) if hasattr(value, "_fields") else type(value)(taken.values())
    same = copy.copy(value)
    for key, item in taken.items():
        object.__setattr__(same, key, item)
    return same
