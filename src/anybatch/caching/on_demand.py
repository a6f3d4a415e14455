"""A batch whose rows are made when they are taken: images are decoded mini-batch by mini-batch."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from anybatch.caching.rows import Rows, RowSlicer
from anybatch.caching.spans import Trim
from anybatch.core.errors import AnybatchError

_making = threading.Lock()  # tokenizers cannot be used by two threads
_ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="anybatch-rows")


class RowsOnDemand(Rows):
    """A batch in which `make` turns the values of some rows into the inputs of the encoder, for each mini-batch anew.

    In memory are the inputs of one mini-batch and of the next one, which a thread makes ahead; a replay makes them
    again. Each is padded by itself, and trimmed like any other batch; an encoder whose embeddings depend on padding is
    given all rows at once, with a warning.

    Args:
        make: From a list of values, such as encoded images, to what an encoder takes. It must give the same inputs for
            the same values, and may run in another thread.
        lengths: `(B,)` int64, the tokens of each row; None where rows cost the same each.
        patches: `(B,)` int64, what its images cost beside them.
        form: Further inputs: of tensors `(B, ...)` each mini-batch has its rows; all else, such as a task, goes into
            each.
        device: Where the inputs go.

    Example:
        >>> rows = RowsOnDemand(["a", "bb"], lambda words: torch.tensor([[len(word)] for word in words]))
        >>> rows.take(torch.tensor([1]))
        tensor([[2]])
    """

    untested_trim: Trim = "both"

    def __init__(
        self,
        values: Sequence[Any],
        make: Callable[[list[Any]], Any],
        *,
        lengths: Tensor | None = None,
        patches: Tensor | None = None,
        form: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.values, self.make, self.device = values, make, device
        self.inputs: Any = dict(form or {})
        self.num_rows = len(values)
        self.lengths, self.patches = lengths, patches
        self.images = lengths is None
        self.trim: Trim = "both"
        # The mini-batch that is taken now, and the next one; what is never taken drops out.
        self._prepared: deque[tuple[Tensor, Future[Any]]] = deque(maxlen=2)

    def trim_to(self, trim: Trim) -> None:
        """See `RowSlicer.trim_to`. Whatever is kept, a mini-batch is first padded by itself."""
        self.trim = trim

    @property
    def padded(self) -> tuple[Tensor, bool] | None:
        """See `RowSlicer.padded`."""
        if self.lengths is None or len(self.lengths.unique()) < 2:
            return None
        return torch.sort(self.lengths, stable=True).indices[:2], True

    def prepare(self, rows: Tensor) -> None:
        """Make the inputs of `rows` in a thread, for the next `take` of the same rows."""
        if not any(torch.equal(prepared, rows) for prepared, _ in self._prepared):
            self._prepared.append((rows, _ahead.submit(self._make, rows)))

    def take(self, rows: Tensor) -> Any:
        """The inputs of `rows` `(b,)`, trimmed."""
        places = torch.arange(len(rows))
        if self.trim == "both" or self.lengths is None:
            return self._slicer(self._made(rows), rows).take(places)
        rows = torch.cat([rows, self.lengths.argmax()[None]])  # as wide as the whole batch
        return self._slicer(self._make(rows), rows).take(places)

    def settled(self) -> Rows:
        """All rows at once, where the encoder depends on the padding of the whole batch."""
        if self.trim == "both" or self.lengths is None:
            return self
        warnings.warn(
            "The encoder's embeddings depend on the padding of their batch, so the images of a batch are decoded all "
            "at once. Pad on the other side (processor.tokenizer.padding_side), or to a fixed length.",
            stacklevel=2,
        )
        rows = torch.arange(self.num_rows)
        return self._slicer(self._make(rows), rows)

    def _slicer(self, inputs: Any, rows: Tensor) -> RowSlicer:
        """What was made of `rows`, on the device, with what goes beside it."""
        if self.inputs:
            inputs = dict(inputs)
            for key, value in self.inputs.items():
                of_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.num_rows
                inputs[key] = value.index_select(0, rows.to(value.device)) if of_rows else value
        inputs = _on(self.device, inputs)
        slicer = RowSlicer(inputs, image_tokens=self.image_tokens)
        slicer.trim_to(self.trim)
        return slicer

    def _made(self, rows: Tensor) -> Any:
        for place, (prepared, made) in enumerate(self._prepared):
            if torch.equal(prepared, rows):
                del self._prepared[place]
                return made.result()
        return self._make(rows)

    def _make(self, rows: Tensor) -> Any:
        with _making:
            inputs = self.make([self.values[row] for row in rows.tolist()])
        if not inputs:
            raise AnybatchError(f"Nothing was made of {len(rows)} rows.")
        return inputs


def _on(device: torch.device | None, value: Any) -> Any:
    """The tensors of a mapping on a device."""
    if device is None:
        return value
    if isinstance(value, Mapping):
        return {key: _on(device, item) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
