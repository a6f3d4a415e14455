"""Cut a batch of inputs by rows, without the padding that the chosen rows do not need.

A batch is a Tensor, a (nested) mapping of Tensors, or a list with one item a row. Cutting copies, so an encoder that
writes into its inputs cannot change what the replay will see.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybatch.errors import AnybatchError

_MASK = "attention_mask"
_SEQUENCES = frozenset(
    (
        *("input_ids", "token_ids", _MASK, "token_type_ids", "mm_token_type_ids", "position_ids"),
        *("special_tokens_mask", "global_attention_mask", "query_expansion_positions"),
    )
)  # (B, T) by their name: their second axis is the sequence
_PIXELS = "pixel_values"  # no sequence, whatever its axes are
_FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


class RowSlicer:
    """Reads the shape of a batch once, then hands out any subset of its rows.

    Trailing columns are cut where no chosen row has a token: in a mapping with a two-dimensional `attention_mask`
    `(B, T)`, the tensors that are sequences by their name (`input_ids`, `token_type_ids`, `position_ids` and the like, all
    `(B, T)`, and `inputs_embeds` `(B, T, D)`) lose the columns past the last one in which the mask, or a boolean tensor
    among them, is set. Leading padding stays, because positions are often counted from the left. A mapping that holds
    another tensor with an axis of length T is left at its full width: whether that axis is the sequence cannot be known. `pixel_values`
    are known not to be one.

    With `pad_to_multiple` the width is that of the longest chosen row rounded up, so that an encoder sees few widths, which is what
    `torch.compile` wants: columns are cut to it, or added behind with a mask of 0, whose rows' embeddings are the same up to rounding.

    Args:
        inputs: A Tensor `(B, ...)`; a mapping whose tensors all have B as their first dimension, nested at will (other
            values and zero-dimensional tensors are passed through); or a list with one item a row.
        pad_to_multiple: Widths are multiples of it; None for that of the longest row. It should divide the encoder's longest input.

    Attributes:
        num_rows: B.
        lengths: `(B,)` int64 on the CPU, the tokens a row needs up to its last one, rounded up (summed over nested mappings),
            or None where nothing tells.
        pictures: Whether the rows are pictures: a mapping with `pixel_values` and without a two-dimensional `attention_mask`, whose rows cost the
            same.

    Raises:
        AnybatchError: A tensor's first dimension is not B; flattened (unpadded) inputs; no tensor at all; `pad_to_multiple` below 1, or for
            inputs, other than pictures, of which nothing tells the lengths.

    Cost: one copy of each attention mask to the host.
    """

    def __init__(self, inputs: Any, *, pad_to_multiple: int | None = None) -> None:
        if pad_to_multiple is not None and pad_to_multiple < 1:
            raise AnybatchError(f"pad_to_multiple is {pad_to_multiple}; expected at least 1, such as 32, or None.")
        self.inputs = inputs
        self.pad_to_multiple = pad_to_multiple
        self.num_rows = _count_rows(inputs)
        self._mask_lengths: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._padding: dict[tuple[str, ...], int] = {}
        self._check(inputs, ())
        parts = [lengths for lengths, _ in self._mask_lengths.values()]
        self.lengths: Tensor | None = torch.stack(parts).sum(dim=0) if parts else None
        self.pictures = (
            self.lengths is None and isinstance(inputs, Mapping) and _PIXELS in inputs and not _has_mask(inputs)
        )
        if pad_to_multiple is not None and self.lengths is None and not self.pictures:
            raise AnybatchError(
                f"pad_to_multiple is {pad_to_multiple}, but nothing tells the lengths of these inputs: they have no two-dimensional attention_mask, or "
                "hold a tensor of unknown meaning with an axis as long as it. Pad in the tokenizer instead."
            )

    def take(self, rows: Tensor) -> Any:
        """The rows `rows` `(b,)` int64 (on the CPU) of the batch, in that order, trimmed."""
        return self._take(self.inputs, rows, (), None)

    def _take(self, value: Any, rows: Tensor, path: tuple[str, ...], trim: tuple[int, int] | None) -> Any:
        if isinstance(value, Tensor):
            if value.ndim == 0:
                return value
            part = value.index_select(0, rows.to(value.device))
            if trim is not None and value.ndim >= 2 and value.shape[1] == trim[0] and path[-1] != _PIXELS:
                part = part[:, : trim[1]]
                missing = trim[1] - part.shape[1]
                if missing > 0:
                    fill = self._padding.get(path, 0)
                    part = torch.cat([part, part.new_full((len(part), missing, *part.shape[2:]), fill)], dim=1)
                elif self.pad_to_multiple is not None:
                    part = (
                        part.contiguous()
                    )  # a view has the strides of the whole batch, and a compiled encoder is compiled anew for them
            return part
        if isinstance(value, Mapping):
            known = self._mask_lengths.get(path)
            here = None
            if known is not None:
                lengths, width = known
                here = (width, max(1, int(lengths[rows].max())))
            taken = {key: self._take(item, rows, (*path, str(key)), here) for key, item in value.items()}
            return _rebuilt(value, taken)
        if not path and isinstance(value, (list, tuple)):
            return [value[row] for row in rows.tolist()]
        return value

    def _check(self, value: Any, path: tuple[str, ...]) -> None:
        name = ".".join(path) or "the input"
        if isinstance(value, Tensor):
            if value.ndim > 0 and value.shape[0] != self.num_rows:
                raise AnybatchError(
                    f"{name} has shape {tuple(value.shape)}, but the batch has {self.num_rows} rows. Caching cuts "
                    "every tensor along its first dimension, so inputs that flatten several rows into one axis "
                    "(image patches of Qwen2-VL and the like, packed sequences) are not supported. Give each tensor "
                    "the batch as its first dimension, or pass one item a row and flatten inside the encoder."
                )
            if value.requires_grad and not value.is_leaf:
                raise AnybatchError(
                    f"{name} requires a gradient and was computed by earlier operations, whose graph a replay would "
                    "run through several times. Move those operations into the encoder, or detach the input."
                )
        elif isinstance(value, Mapping):
            for key in _FLATTENED:
                if value.get(key) is not None:
                    raise AnybatchError(
                        f"{name} holds {key!r}: flattened (unpadded) sequences are not supported by caching, which "
                        "cuts by rows. Use a collator that pads; the padding is trimmed for every micro-batch."
                    )
            known = _lengths_of(value, self.num_rows)
            if known is not None:
                if self.pad_to_multiple is not None:
                    known = -(-known[0].clamp(min=1) // self.pad_to_multiple) * self.pad_to_multiple, known[1]
                    self._note_padding(value, path)
                self._mask_lengths[path] = known
            for key, item in value.items():
                self._check(item, (*path, str(key)))

    def _note_padding(self, value: Mapping[str, Any], path: tuple[str, ...]) -> None:
        """The id that the tokenizer pads with, because some encoders count positions from it; 0 where no row is padded."""
        for key in ("input_ids", "token_ids"):
            ids, mask = value.get(key), value[_MASK]
            if isinstance(ids, Tensor) and ids.shape == mask.shape:
                padded = ids[mask == 0]
                self._padding[*path, key] = int(padded[0]) if len(padded) else 0


def _count_rows(inputs: Any) -> int:
    """B: of the input itself, else of `attention_mask` or `input_ids`, else of the first tensor found."""
    first = _first_tensor(inputs)
    if first is not None:
        return int(first.shape[0])
    if isinstance(inputs, (list, tuple)):
        return len(inputs)
    raise AnybatchError(
        f"The batch ({type(inputs).__name__}) holds no tensor with a first dimension, so it cannot be cut into "
        "micro-batches. Pass a Tensor, a mapping of Tensors, or a list with one item a row."
    )


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.ndim > 0 else None
    if isinstance(value, Mapping):
        preferred = [value[key] for key in (_MASK, "input_ids") if key in value]
        for item in [*preferred, *value.values()]:
            if not isinstance(item, (list, tuple)) and (found := _first_tensor(item)) is not None:
                return found
    return None


def _has_mask(value: Mapping[str, Any]) -> bool:
    mask = value.get(_MASK)
    return isinstance(mask, Tensor) and mask.ndim == 2


def _lengths_of(value: Mapping[str, Any], num_rows: int) -> tuple[Tensor, int] | None:
    """The tokens each row needs and the width T, or None where trimming is not known to be safe."""
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
    return (active * columns).amax(dim=1).cpu(), width


def _rebuilt(value: Mapping[str, Any], taken: dict[str, Any]) -> Any:
    """`taken` in the type of `value` where a copy is known to be one of its own (dict, UserDict, BatchEncoding), else a dict."""
    if type(value) is dict or not isinstance(value, (dict, UserDict)):
        return (
            taken  # copy.copy of any other mapping may share its contents, and writing into it would reach the caller's
        )
    same = copy.copy(value)
    same.update(taken)
    return same
