"""Cut a batch of inputs by rows, without the padding that the chosen rows do not need.

A batch is a Tensor or array, a (nested) mapping of what has one entry a row, or a list with one item a row. Cutting copies, so an encoder that
writes into its inputs cannot change what the replay will see.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import numbers
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError

_MASK = "attention_mask"
_SEQUENCES = frozenset(
    (
        *("input_ids", "token_ids", _MASK, "token_type_ids", "mm_token_type_ids", "position_ids"),
        *("special_tokens_mask", "global_attention_mask", "query_expansion_positions"),
    )
)  # (B, T) by their name: their second axis is the sequence
_PIXELS = "pixel_values"  # no sequence, whatever its axes are
_FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
_GRIDS = {"image_grid_thw": _PIXELS, "video_grid_thw": "pixel_values_videos"}  # picture by picture, and patch by patch
_COUNTS = {
    "image_grid_thw": ("num_images_per_sample", "images_per_sample"),
    "video_grid_thw": ("num_videos_per_sample", "videos_per_sample"),
}
_BY_PICTURE = (_PIXELS, "image_sizes", "image_position_ids")  # of models that have no grid
_BY_ROW = ("pixel_attention_mask", "aspect_ratio_ids")  # where they are, the pictures of a row are padded to as many
_SHARED_KEYS = ("modality", "task", "prompt_length")  # of sentence-transformers; a modality may be a tuple of words
Trim = Literal["both", "trailing", "none"]
_SIMPLE = (str, bytes, numbers.Number, enum.Enum, np.generic, torch.dtype, torch.device, Path, type(None))


@dataclass(frozen=True)
class Shared:
    """Marks a value of a batch that all rows share: every micro-batch receives `value` whole."""

    value: Any


class RowSlicer:
    """Reads the shape of a batch once, then hands out any subset of its rows.

    In a mapping, tensors, arrays, lists and tuples with B entries are cut; numbers, words, None and zero-dimensional tensors go to every micro-batch, and
    so does what is wrapped in `Shared`. Two forms without one entry a row are known: words one after the other with `offsets` `(B,)`, as an embedding
    bag takes them, and pictures counted by picture (`image_grid_thw` with flattened `pixel_values`, or `pixel_values` alone), with
    `num_images_per_sample` `(B,)`; the same for videos. Anything else is refused by its name.

    Trailing columns are cut where no chosen row has a token: in a mapping with a two-dimensional `attention_mask`
    `(B, T)`, the tensors that are sequences by their name (`input_ids`, `token_type_ids`, `position_ids` and the like, all
    `(B, T)`, and `inputs_embeds` `(B, T, D)`) lose the columns past the last one in which the mask, or a boolean tensor
    among them, is set. Leading padding is cut where `position_ids` are given, or where it was seen to change
    no embedding (`trim_to`, see `row_check`); else it stays, because positions are often counted from the left. A mapping
    that holds another tensor with an axis of length T is left at its full width: whether that axis is the sequence cannot be known. `pixel_values`
    are known not to be one.

    With `pad_to_multiple` the width is that of the longest chosen row rounded up, so that an encoder sees few widths, which is what
    `torch.compile` wants: columns are cut to it, or added behind with a mask of 0, whose rows' embeddings are the same up to rounding.

    Args:
        inputs: A Tensor or array `(B, ...)`; a mapping, named tuple or dataclass as above, nested at will; or a list with one item a row. A tuple (or list) of
            tensors of several dtypes and equal length holds columns.
        pad_to_multiple: Widths are multiples of it; None for that of the longest row. It should divide the encoder's longest input.

    Attributes:
        num_rows: B.
        lengths: `(B,)` int64 on the CPU, the tokens a row needs, rounded up (summed over nested mappings),
            or None where nothing tells.
        pictures: Whether the rows are pictures: a mapping with `pixel_values` and without a two-dimensional `attention_mask`, whose rows cost the
            same.

    Raises:
        AnybatchError: What is neither cut nor shared, by its key; flattened (unpadded) sequences; nothing to cut at all; `pad_to_multiple` below 1, or for
            inputs, other than pictures, of which nothing tells the lengths.

    Cost: one copy of each attention mask to the host.
    """

    def __init__(self, inputs: Any, *, pad_to_multiple: int | None = None) -> None:
        if pad_to_multiple is not None and pad_to_multiple < 1:
            raise AnybatchError(f"pad_to_multiple is {pad_to_multiple}; expected at least 1, such as 32, or None.")
        self.inputs = inputs
        self.pad_to_multiple = pad_to_multiple
        self.num_rows = _count_rows(inputs)
        self._spans: dict[tuple[str, ...], _Spans] = {}
        self._pieces: dict[tuple[str, ...], _Pieces] = {}
        self._padding: dict[tuple[str, ...], int] = {}
        self._check(inputs, ())
        self.lengths: Tensor | None = None
        self.trim: Trim = "trailing"
        self.trim_to("trailing")
        self.pictures = (
            self.lengths is None and isinstance(inputs, Mapping) and _PIXELS in inputs and not _has_mask(inputs)
        )
        if pad_to_multiple is not None and not self._spans and not self.pictures:
            raise AnybatchError(
                f"pad_to_multiple is {pad_to_multiple}, but nothing tells the lengths of these inputs: they have no two-dimensional attention_mask, or "
                "hold a tensor of unknown meaning with an axis as long as it. Pad in the tokenizer instead."
            )

    def trim_to(self, trim: Trim) -> None:
        """Cut the padding of both ends, the trailing one alone (unless positions are given), or none; `lengths` follow."""
        self.trim = trim
        parts = [spans.lengths(trim) for spans in self._spans.values()]
        parts += [pieces.sizes for path, pieces in self._pieces.items() if path[-1] == "offsets"]
        self.lengths = torch.stack(parts).sum(dim=0) if parts else None

    @property
    def padded(self) -> tuple[Tensor, bool] | None:
        """The two rows `(2,)` with the fewest tokens and whether padding leads in them; None where no row is padded."""
        lengths = [spans.lengths("both") for spans in self._spans.values()]
        widths = [spans.lengths("none") for spans in self._spans.values()]
        if not lengths or all(torch.equal(*pair) for pair in zip(lengths, widths)):
            return None
        rows = torch.sort(torch.stack(lengths).sum(dim=0), stable=True).indices[:2]
        return rows, any(bool(spans.first[rows].any()) and not spans.positions for spans in self._spans.values())

    def take(self, rows: Tensor) -> Any:
        """The rows `rows` `(b,)` int64 (on the CPU) of the batch, in that order, trimmed."""
        return self._take(self.inputs, rows, (), None)

    def _take(self, value: Any, rows: Tensor, path: tuple[str, ...], window: tuple[int, int, int] | None) -> Any:
        if isinstance(value, Shared):
            return value.value
        if path in self._pieces:
            return self._pieces[path].take(value, rows)
        if isinstance(value, Tensor):
            return self._take_tensor(value, rows, path, window)
        if isinstance(value, np.ndarray):
            return value[rows.numpy()] if value.ndim > 0 else value
        columns = _columns(value)
        if columns is not None:
            spans = self._spans.get(path)
            here = spans.window(rows, self.trim) if spans is not None else None
            taken = {key: self._take(item, rows, (*path, str(key)), here) for key, item in columns.items()}
            pieces = {key: self._pieces.get((*path, str(key))) for key in columns}
            # A micro-batch without pictures has no keys of theirs, as if its processor had seen none.
            empty = [key for key, part in pieces.items() if part is not None and part.optional and not len(taken[key])]
            return _rebuilt(value, {key: item for key, item in taken.items() if key not in empty}, dropped=empty)
        if _is_list(value) and not _goes_whole(value, path):
            return (
                [value[row] for row in rows.tolist()]
                if not isinstance(value, tuple) or not path
                else tuple(value[row] for row in rows.tolist())
            )
        return value

    def _take_tensor(
        self, value: Tensor, rows: Tensor, path: tuple[str, ...], window: tuple[int, int, int] | None
    ) -> Tensor:
        if value.ndim == 0:
            return value
        part = value.index_select(0, rows.to(value.device))
        if window is not None and value.ndim >= 2 and value.shape[1] == window[0] and path[-1] != _PIXELS:
            _, start, end = window
            part = part[:, start:end]
            missing = end - start - part.shape[1]
            if missing > 0:
                fill = self._padding.get(path, 0)
                part = torch.cat([part, part.new_full((len(part), missing, *part.shape[2:]), fill)], dim=1)
            elif self.pad_to_multiple is not None:
                # A view has the strides of the whole batch, and a compiled encoder is compiled anew for them.
                part = part.contiguous()
        return part

    def _check(self, value: Any, path: tuple[str, ...]) -> None:
        name = ".".join(path) or "the input"
        if isinstance(value, Shared) or path in self._pieces or _goes_whole(value, path):
            return
        if isinstance(value, (Tensor, np.ndarray)):
            if value.ndim > 0 and value.shape[0] != self.num_rows:
                raise self._no_row_each(name, f"has shape {tuple(value.shape)}")
            _refuse_history(value, name)
            return
        columns = _columns(value)
        if columns is not None:
            self._check_columns(columns, path, name)
        elif _is_list(value):
            if len(value) != self.num_rows:
                raise self._no_row_each(name, f"is a {type(value).__name__} of {len(value)} entries")
            for item in value:
                _refuse_history(item, name)
        elif path:
            raise self._no_row_each(name, f"is a {type(value).__name__}, which cannot be cut")

    def _check_columns(self, columns: Mapping[str, Any], path: tuple[str, ...], name: str) -> None:
        for key in _FLATTENED:
            if columns.get(key) is not None:
                raise AnybatchError(
                    f"{name} holds {key!r}: flattened (unpadded) sequences are not supported by caching, which "
                    "cuts by rows. Use a collator that pads; the padding is trimmed for every micro-batch."
                )
        self._pieces.update(
            {(*path, key): pieces for key, pieces in _flat_pieces(columns, self.num_rows, name).items()}
        )
        spans = _spans_of(columns, self.num_rows)
        if spans is not None:
            if self.pad_to_multiple is not None:
                spans.multiple = self.pad_to_multiple
                self._note_padding(columns, path)
            self._spans[path] = spans
        for key, item in columns.items():
            self._check(item, (*path, str(key)))

    def _no_row_each(self, name: str, what: str) -> AnybatchError:
        return AnybatchError(
            f"{name} {what}, but the batch has {self.num_rows} rows. Caching cuts the batch by rows: give one entry a row; for pictures or patches that "
            "are counted by themselves (image_grid_thw and the like) add num_images_per_sample, one number a row; wrap what all rows share in "
            "anybatch.caching.Shared(...)."
        )

    def _note_padding(self, value: Mapping[str, Any], path: tuple[str, ...]) -> None:
        """The id that the tokenizer pads with, because some encoders count positions from it; 0 where no row is padded."""
        for key in ("input_ids", "token_ids"):
            ids, mask = value.get(key), value[_MASK]
            if isinstance(ids, Tensor) and ids.shape == mask.shape:
                padded = ids[mask == 0]
                self._padding[*path, key] = int(padded[0]) if len(padded) else 0


@dataclass
class _Spans:
    """Where the tokens of each row are: from column `first` `(B,)` up to `last` `(B,)`, of `width`."""

    first: Tensor
    last: Tensor
    width: int
    positions: bool = False  # given with the tokens, so that they need not be counted from the first column
    multiple: int = 1

    def lengths(self, trim: Trim) -> Tensor:
        """(B,) columns that a row alone would take."""
        if trim == "none":
            return torch.full_like(self.last, self.width)
        first = self.first if self._cuts_leading(trim) else 0
        return self._up((self.last - first).clamp(min=1 if self.multiple > 1 else 0))

    def window(self, rows: Tensor, trim: Trim) -> tuple[int, int, int]:
        """The width, and the columns that these rows need."""
        if trim == "none":
            return self.width, 0, self.width
        start = int(self.first[rows].min()) if self._cuts_leading(trim) else 0
        return self.width, start, start + self._up(max(1, int(self.last[rows].max()) - start))

    def _cuts_leading(self, trim: Trim) -> bool:
        return trim == "both" or self.positions

    def _up(self, sizes: Any) -> Any:
        return -(-sizes // self.multiple) * self.multiple


@dataclass
class _Pieces:
    """A tensor in which a row has any number of entries, one row after the other."""

    sizes: Tensor  # (B,) int64 on the CPU
    offsets: bool = False  # the tensor holds the starts themselves
    optional: bool = False  # left out where the rows have no entry

    def take(self, value: Any, rows: Tensor) -> Any:
        """The entries of `rows`, or their new starts."""
        sizes = self.sizes[rows]
        starts = sizes.cumsum(0) - sizes
        if self.offsets:
            return starts.to(value.device, value.dtype)
        begins = (self.sizes.cumsum(0) - self.sizes)[rows]
        places = torch.repeat_interleave(begins - starts, sizes) + torch.arange(int(sizes.sum()))
        if isinstance(value, Tensor):
            return value.index_select(0, places.to(value.device))
        return value[places.numpy()] if isinstance(value, np.ndarray) else [value[place] for place in places.tolist()]


def _flat_pieces(columns: Mapping[str, Any], num_rows: int, name: str) -> dict[str, _Pieces]:
    """What in a mapping is not counted by row, where something tells whose it is."""
    found: dict[str, _Pieces] = {}
    if _is_bag(columns):
        ids, starts = columns["input_ids"], columns["offsets"].detach().cpu().to(torch.int64)
        sizes = torch.diff(starts, append=torch.tensor([len(ids)]))
        if len(starts) and (int(starts[0]) != 0 or bool((sizes < 0).any())):
            raise AnybatchError(
                f"{name} holds offsets that do not rise from 0 to at most {len(ids)}, the number of input_ids."
            )
        flat = [key for key, item in columns.items() if isinstance(item, Tensor) and item.shape[:1] == ids.shape[:1]]
        found = {
            key: _Pieces(sizes) for key in flat if key in ("input_ids", "per_sample_weights") or len(ids) != num_rows
        }
        found["offsets"] = _Pieces(sizes, offsets=True)
    for grid_key, pixel_key in _GRIDS.items():
        grid = columns.get(grid_key)
        counts = _counts(columns, grid_key, num_rows, name)
        by_picture = [key for key in _BY_PICTURE if grid_key == "image_grid_thw" and key in columns]
        if grid is not None:
            grid = torch.as_tensor(grid).detach().cpu()
            if counts is None and not _rows_are_pictures(columns):
                raise _whose(grid_key, _COUNTS[grid_key][0], num_rows)
            counts = torch.ones(len(grid), dtype=torch.int64) if counts is None else counts
            _refuse_sum(counts, len(grid), grid_key, name)
            patches = grid.prod(dim=1)
            owner = torch.repeat_interleave(torch.arange(num_rows), counts)
            sizes = torch.zeros(num_rows, dtype=torch.int64).index_add_(0, owner, patches.to(torch.int64))
            if pixel_key in columns:
                _refuse_sum(sizes, len(columns[pixel_key]), pixel_key, name)
                found[pixel_key] = _Pieces(sizes, optional=True)
            by_picture = [grid_key, *(key for key in by_picture if key != pixel_key)]
        padded = any(key in columns for key in _BY_ROW)
        if grid is None and counts is None and len(by_picture) > 1 and not padded and not _rows_are_pictures(columns):
            raise _whose(_PIXELS, _COUNTS[grid_key][0], num_rows)  # sizes beside pixels: a row has any number
        if counts is not None and not padded:
            for key in by_picture:
                _refuse_sum(counts, len(columns[key]), key, name)
                found[key] = _Pieces(counts, optional=True)
    return found


def _is_bag(columns: Mapping[str, Any]) -> bool:
    ids, offsets = columns.get("input_ids"), columns.get("offsets")
    return isinstance(ids, Tensor) and isinstance(offsets, Tensor) and ids.ndim == 1 and offsets.ndim == 1


def _rows_are_pictures(columns: Mapping[str, Any]) -> bool:
    return not any(key in columns for key in (_MASK, "input_ids", "inputs_embeds"))


def _counts(columns: Mapping[str, Any], grid_key: str, num_rows: int, name: str) -> Tensor | None:
    for key in _COUNTS[grid_key]:
        if columns.get(key) is not None:
            counts = torch.as_tensor(columns[key]).detach().cpu().to(torch.int64)
            if counts.shape != (num_rows,) or bool((counts < 0).any()):
                raise AnybatchError(
                    f"{name} holds {key!r} of shape {tuple(counts.shape)}; one count for each of the {num_rows} rows is expected."
                )
            return counts
    return None


def _refuse_sum(sizes: Tensor, total: int, key: str, name: str) -> None:
    if int(sizes.sum()) != total:
        raise AnybatchError(f"{name} holds {total} entries of {key!r}, but the rows count {int(sizes.sum())} of them.")


def _whose(key: str, counts: str, num_rows: int) -> AnybatchError:
    return AnybatchError(
        f"{key!r} is counted by picture, and nothing tells which of the {num_rows} rows a picture belongs to. Add {counts!r}, a tensor with one count a row."
    )


def _columns(value: Any) -> Mapping[str, Any] | None:
    """What a container of columns holds, by name: a mapping, a named tuple, a dataclass, tensors of several dtypes in a tuple; else None."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value))  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple)) and _tensor_columns(value):
        return {str(number): item for number, item in enumerate(value)}
    return None


def _tensor_columns(value: Sequence[Any]) -> bool:
    """Whether a list of tensors holds columns: one item a row would have one dtype."""
    if len(value) < 2 or not all(isinstance(item, Tensor) and item.ndim > 0 for item in value):
        return False
    return len({len(item) for item in value}) == 1 and len({item.dtype for item in value}) > 1


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _goes_whole(value: Any, path: tuple[str, ...]) -> bool:
    """Whether a value inside a mapping has nothing to cut."""
    if not path:
        return False
    empty = _is_list(value) and len(value) == 0
    return (
        empty
        or path[-1] in _SHARED_KEYS
        or isinstance(value, _SIMPLE)
        or (callable(value) and not isinstance(value, (Tensor, Mapping)))
    )


def _refuse_history(value: Any, name: str) -> None:
    if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
        raise AnybatchError(
            f"{name} requires a gradient and was computed by earlier operations, whose graph a replay would "
            "run through several times. Move those operations into the encoder, or detach the input."
        )


def _count_rows(inputs: Any) -> int:
    """B: of the input itself, else of what counts rows by its name, else of the first tensor, array or list found."""
    if _columns(inputs) is None and isinstance(inputs, tuple) and len(inputs) > 1:
        lengths = {len(item) if isinstance(item, Tensor) and item.ndim > 0 else None for item in inputs}
        if len(lengths) == 1 and lengths != {None}:
            raise AnybatchError(
                f"The batch is a tuple of {len(inputs)} tensors of length {lengths.pop()}: columns or rows? Pass columns as a mapping, or one item a row as a list."
            )
    if _columns(inputs) is None and _is_list(inputs):
        return len(inputs)
    for tensors_only in (True, False):
        rows = _rows_of(inputs, tensors_only)
        if rows is not None:
            return rows
    raise AnybatchError(
        f"The batch ({type(inputs).__name__}) holds no tensor with a first dimension, so it cannot be cut into "
        "micro-batches. Pass a Tensor, a mapping of Tensors, or a list with one item a row."
    )


def _rows_of(value: Any, tensors_only: bool) -> int | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return int(value.shape[0]) if value.ndim > 0 else None
    columns = _columns(value)
    if columns is not None:
        names = (
            _MASK,
            *(["offsets"] if _is_bag(columns) else []),
            "input_ids",
            *(n for both in _COUNTS.values() for n in both),
            *_GRIDS,
        )
        preferred = [columns[key] for key in names if columns.get(key) is not None]
        for item in [*preferred, *(item for key, item in columns.items() if key not in _SHARED_KEYS)]:
            if not isinstance(item, Shared) and (found := _rows_of(item, tensors_only)) is not None:
                return found
    elif not tensors_only and _is_list(value) and len(value):
        return len(value)
    return None


def _has_mask(value: Mapping[str, Any]) -> bool:
    mask = value.get(_MASK)
    return isinstance(mask, Tensor) and mask.ndim == 2


def _spans_of(value: Mapping[str, Any], num_rows: int) -> _Spans | None:
    """The columns that each row needs, or None where trimming is not known to be safe."""
    if not _has_mask(value) or len(value[_MASK]) != num_rows or value[_MASK].shape[1] == 0:
        return None
    mask: Tensor = value[_MASK]
    width = mask.shape[1]
    active: Tensor = mask.bool()
    for key, item in value.items():
        if not isinstance(item, Tensor) or key in (_MASK, _PIXELS) or width not in item.shape[1:]:
            continue
        tokens = key in _SEQUENCES and item.ndim == 2
        embedded = key == "inputs_embeds" and item.ndim == 3 and item.shape[1] == width
        if not (tokens or embedded):
            return None
        if (
            item.dtype == torch.bool and item.shape == mask.shape
        ):  # expansion tokens are masked for attention and scored all the same
            active = active | item
    columns = torch.arange(1, width + 1, device=mask.device)
    last = (active * columns).amax(dim=1).cpu()
    first = torch.minimum(torch.where(active, columns - 1, width).amin(dim=1).cpu(), last)
    positions = value.get("position_ids")
    return _Spans(first, last, width, positions=isinstance(positions, Tensor) and positions.shape == mask.shape)


def _rebuilt(value: Any, taken: dict[str, Any], *, dropped: Sequence[str] = ()) -> Any:
    """`taken` in the type of `value` where a copy is known to be one of its own (dict, UserDict, BatchEncoding, tuple, dataclass), else a dict."""
    if isinstance(value, Mapping):
        if type(value) is dict or not isinstance(value, (dict, UserDict)):
            return taken  # copy.copy of any other mapping may share its contents, and writing into it would reach the caller's
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
