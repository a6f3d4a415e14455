"""Row numbers and ids: one check for all, and which texts are known to match."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError


def as_integers(
    name: str,
    values: Tensor,
    *,
    length: int | None = None,
    device: torch.device | None = None,
    low: int | None = None,
    high: int | None = None,
    remedy: str = "",
) -> Tensor:
    """Row numbers, ids or the like as int64, so that none of another type acts as a mask; else an AnybatchError.

    `length`, `device`, `low` and `high` are what is allowed, None for any; to look at numbers costs a wait for the
    device. `remedy` says in the message what to do about a number out of range.
    """
    wanted = "integers" if length is None else f"integers of shape ({length},)"
    if not isinstance(values, Tensor):
        raise AnybatchError(f"{name} is a {type(values).__name__}; expected a tensor of {wanted}.")
    integral = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if not integral or (length is not None and values.shape != (length,)):
        raise AnybatchError(f"{name} is {values.dtype} of shape {tuple(values.shape)}; expected {wanted}.")
    if device is not None and values.device != device:
        raise AnybatchError(
            f"{name} is on {values.device}; expected {device}, as the embeddings. Move it: {name}.to({str(device)!r})."
        )
    values = values.long()
    if (low is not None or high is not None) and values.numel():
        least, most = torch.stack(values.aminmax()).tolist()
        if (low is not None and least < low) or (high is not None and most > high):
            allowed = f"{low} or more" if high is None else f"rows {low} to {high}"
            raise AnybatchError(f"{name} runs from {least} to {most}; expected {allowed}. {remedy}".rstrip())
    return values


def as_ids(name: str, values: np.ndarray | Tensor, *, low: int = 0) -> np.ndarray:
    """Ids of rows as int64, `low` or more; else an AnybatchError."""
    ids = np.asarray(values)
    if ids.dtype.kind not in "iu":
        raise AnybatchError(f"{name} is {ids.dtype} of shape {ids.shape}; expected integers, equal for equal texts.")
    ids = ids.astype(np.int64)
    if ids.size and int(ids.min()) < low:
        raise AnybatchError(f"{name} goes down to {int(ids.min())}; expected {low} or more.")
    return ids


def renumbered(ids: np.ndarray) -> np.ndarray:
    """The same ids as numbers 0, 1, ...: products of two of them must stay within 63 bits."""
    return np.unique(ids, return_inverse=True)[1].reshape(ids.shape)


def known_positives(anchor_id: np.ndarray, positive_id: np.ndarray, width: int) -> np.ndarray:
    """Keys anchor * width + positive, ascending and distinct, of the pairs whose anchor has other rows as well.

    Only such a positive can come beside the anchor without being its own row's. `width` is more than every id that keys
    are made of; ids (n,) int64, 0 or more, are equal for identical texts.
    """
    _, inverse, count = np.unique(anchor_id, return_inverse=True, return_counts=True)
    shared = count[inverse] > 1
    return np.unique(anchor_id[shared] * width + positive_id[shared]).astype(np.int64)
