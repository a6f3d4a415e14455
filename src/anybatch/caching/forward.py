"""One call of an encoder on some rows of a batch, with its output checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from anybatch.caching.rows import RowSlicer
from anybatch.core.errors import AnybatchError

Encoder = Callable[[Any], Tensor | tuple[Tensor, ...]]


def encode_rows(
    encode: Encoder, slicer: RowSlicer, rows: Tensor, context: contextlib.AbstractContextManager[None] | None = None
) -> tuple[Tensor, ...]:
    """The encoder's tensors `(b, ...)` for `rows` `(b,)`, computed inside `context`.

    Raises:
        AnybatchError: The output is no Tensor or tuple of Tensors, not floating, or has not one embedding a row.
    """
    with context or contextlib.nullcontext():
        outputs = encode(slicer.take(rows))
    several = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(several, (tuple, list)) or not all(isinstance(output, Tensor) for output in several):
        raise AnybatchError(
            f"The encoder returned {type(outputs).__name__}; a Tensor (b, D) or a tuple of Tensors is expected. Pick "
            'the embedding inside, for instance lambda batch: model(batch)["sentence_embedding"].'
        )
    for output in several:
        if output.ndim == 0 or output.shape[0] != len(rows) or not output.is_floating_point():
            raise AnybatchError(
                f"The encoder returned a {output.dtype} tensor of shape {tuple(output.shape)} for {len(rows)} rows; a "
                "floating tensor with one embedding a row is expected."
            )
    return tuple(several)
