"""Running denominators filled before training: exactly, from embeddings of the whole data set, in tiles.

A moving average over few epochs has little to average, so `warm_start` computes every row's log-mean.

Cost: encoding the data once (not done here), then n x n x D multiply-adds and as many exponentials a direction. With W
ranks each takes its share of the rows. docs/benchmarks/memory.md has measured figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.denominators import RunningDenominator
from anybatch.losses.parts import Batch

Embeddings: TypeAlias = "np.ndarray | Tensor"
Ids: TypeAlias = "np.ndarray | Tensor | None"
BLOCK_ROWS = 4096  # rows a rank answers between two gathers


def running_denominator_of(loss: nn.Module) -> RunningDenominator:
    """The running denominator of a loss; refuses one that holds something else than the log-mean over all negatives."""
    running = loss.running_without_options if isinstance(loss, ContrastiveLoss) else None
    if isinstance(loss, ContrastiveLoss) and isinstance(running, RunningDenominator) and loss.changing:
        raise AnybatchError(
            f"{type(loss).__name__} has {' and '.join(loss.changing)}, by which its denominators are not the means "
            "over all negatives that are computed here. Leave that out."
        )
    if not isinstance(running, RunningDenominator):
        raise AnybatchError(
            f"{type(loss).__name__} has no memory of plain denominators; this is for losses that have one, such as "
            "SogCLR."
        )
    return running


def warm_start(
    loss: ContrastiveLoss,
    anchors: Embeddings,
    positives: Embeddings,
    *,
    anchor_id: Ids = None,
    positive_id: Ids = None,
    tile_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Replace every running denominator of the loss by the log-mean over the data set, at the present temperature.

        log u_i <- log mean_{j != i} exp(s_ij / tau_i)      a relative state: of exp((s_ij - s_ip(i)) / tau_i)

    in each direction that the loss has (1: positives against anchors). Pairs of equal content add 0 to the mean, as in
    training. Explicit negatives are not counted: they are not a sample of the data set.

    Args:
        loss: A loss with a running denominator.
        anchors: (n, D) array, memory map or tensor in row order, from the model as it is now. float32, or float64 for
            checks.
        positives: (n, D), row i the positive of row i.
        anchor_id, positive_id: (n,) int; equal for equal content, which is never a negative. Without them only the
            row's own positive is left out.
        tile_bytes: Memory for scores; None for 8 MiB on a CPU (what its caches like), 256 MiB elsewhere.
        progress: Called with (rows done, rows in all), all directions together.

    Raises:
        AnybatchError: A loss without running denominators, embeddings that do not fit it; on every rank, whichever
            found it.

    Cost: see the module. Collectives: an agreement, and one gather of two numbers a row; every rank needs all
    embeddings.

    Example:
        >>> import torch
        >>> from anybatch.losses import SogCLR
        >>> loss, embeddings = SogCLR(100), torch.randn(2, 100, 8)
        >>> warm_start(loss, *embeddings)
        >>> int(loss.denominator.visited.sum())
        100
    """
    with distributed.agreed():
        running = running_denominator_of(loss)
        device, num_directions, num_rows = running.log_mean.device, len(running.log_mean), len(anchors)
        table = make_table(
            anchors, positives, anchor_id=anchor_id, positive_id=positive_id, normalize=loss.normalize, device=device
        )
        if num_rows != running.num_rows:
            raise AnybatchError(f"Got embeddings of {num_rows} rows; the memory was made for {running.num_rows}.")
    height = BLOCK_ROWS * distributed.world_size()
    for direction in range(num_directions):
        for start in range(0, num_rows, height):
            # 1. This rank's share of a block of rows.
            stop = min(start + height, num_rows)
            sizes = distributed.shares(stop - start)
            own = distributed.own_part(sizes)
            rows = slice(start + own.start, start + own.stop)
            temperature = _temperature(loss, table, rows, direction).double()
            log_mean, positive = exact_log_mean(
                table.reversed() if direction else table, rows, temperature=temperature, tile_bytes=tile_bytes
            )
            # 2. Into the loss; a row without a negative is as if never visited.
            state = torch.where(log_mean.isneginf(), torch.nan, log_mean + positive * running.absolute)
            figures = torch.stack([state, temperature.expand(len(state))], dim=1)
            state, temperature = distributed.gather_rows(figures, sizes).unbind(dim=1)
            numbers, width = torch.arange(start, stop, device=device), anchors.shape[1]
            running.fill(numbers, state, temperature=temperature, direction=direction, dimensions=width)
            if progress is not None:
                progress(direction * num_rows + stop, num_directions * num_rows)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The two sides of a data set, from one direction's point of view; `make_table` checks them."""

    queries: Embeddings  # (n, D) array, memory map or tensor
    targets: Embeddings  # (n, D), row i belongs to row i of the queries
    query_id: Tensor | None  # (n,) int64; equal for equal content; None if all differ
    target_id: Tensor | None
    normalize: bool  # L2-normalise rows when they are read
    device: torch.device  # where to compute

    def reversed(self) -> Table:
        """The candidate-to-anchor direction."""
        sides = {"queries": self.targets, "targets": self.queries}
        return replace(self, **sides, query_id=self.target_id, target_id=self.query_id)

    def take(self, side: Embeddings, rows: slice) -> Tensor:
        """Rows of `side` on the device, in float32 (float64 if it is), normalised if wanted."""
        part = side[rows]
        block = torch.as_tensor(np.array(part)) if isinstance(part, np.ndarray) else part.detach()  # a map is read-only
        block = block.to(self.device, torch.float64 if block.dtype == torch.float64 else torch.float32)
        return nn.functional.normalize(block, dim=1) if self.normalize else block


def make_table(
    anchors: Embeddings,
    positives: Embeddings,
    *,
    anchor_id: Ids,
    positive_id: Ids,
    normalize: bool,
    device: torch.device,
) -> Table:
    """A table of anchors against positives."""
    if anchors.ndim != 2 or tuple(anchors.shape) != tuple(positives.shape):
        raise AnybatchError(
            f"anchors have shape {tuple(anchors.shape)} and positives {tuple(positives.shape)}; "
            "expected two equal shapes (rows, dimensions)."
        )
    if (anchor_id is None) != (positive_id is None):
        raise AnybatchError("anchor_id and positive_id go together; one of them is missing.")
    ids = []
    for name, given in (("anchor_id", anchor_id), ("positive_id", positive_id)):
        values = None if given is None else torch.as_tensor(given).to(device, torch.int64)
        if values is not None and values.shape != (len(anchors),):
            raise AnybatchError(f"{name} has shape {tuple(values.shape)}; expected ({len(anchors)},), one a row.")
        ids.append(values if values is not None and len(values.unique()) < len(values) else None)
    return Table(
        queries=anchors, targets=positives, query_id=ids[0], target_id=ids[1], normalize=normalize, device=device
    )


def exact_log_mean(
    table: Table, rows: slice, *, temperature: Tensor | float, tile_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log of the mean of exp(relative logit) over all other rows' targets, of which those of equal content add 0.

    For R `rows`, few enough that (R, D) and a column or so of scores fit, at a temperature or (R,) one a row.

    Returns:
        (R,) float64, -inf without negatives; and the logits of the rows' own targets, that it is relative to.
    """
    queries, own = table.take(table.queries, rows), table.take(table.targets, rows)
    temperature = torch.as_tensor(temperature, dtype=queries.dtype, device=table.device).expand(len(queries))
    scaled = queries / temperature[:, None]
    positive = (scaled * own).sum(dim=1)
    numbers = torch.arange(len(table.queries), device=table.device)[rows]
    remove = _Remover(table, numbers)
    if tile_bytes is None:
        tile_bytes = 2**23 if table.device.type == "cpu" else 2**28
    total, width = len(table.targets), max(1, tile_bytes // max(1, len(queries) * queries.element_size()))
    log_sum = positive.new_full((len(queries),), -torch.inf, dtype=torch.float64)
    for start in range(0, total, width):
        chosen = slice(start, min(start + width, total))
        logits = torch.addmm(-positive[:, None], scaled, table.take(table.targets, chosen).T)
        remove(logits, chosen)
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(dim=1).double())
    return log_sum - math.log(max(1, total - 1)), positive.double()


class _Remover:
    """Sets logits of pairs that are no negatives to -inf, comparing ids only in columns that any of the rows shares."""

    def __init__(self, table: Table, rows: Tensor) -> None:
        self.rows = rows
        given = [ids for ids in (table.query_id, table.target_id) if ids is not None]
        self.ids = [(ids[rows], ids, torch.isin(ids, ids[rows])) for ids in given]

    def __call__(self, logits: Tensor, columns: slice) -> None:
        own = ((self.rows >= columns.start) & (self.rows < columns.stop)).nonzero()[:, 0]
        logits[own, self.rows[own] - columns.start] = -torch.inf
        for of_rows, of_all, met in self.ids:
            watched = met[columns].nonzero()[:, 0]
            same = of_rows[:, None] == of_all[columns][watched][None]
            logits[:, watched] = logits[:, watched].masked_fill_(same, -torch.inf)


def _temperature(loss: ContrastiveLoss, table: Table, rows: slice, direction: int) -> Tensor:
    """A scalar or (R,): at which the loss would score these rows at this moment."""
    sides = (table.take(side, rows) for side in (table.queries, table.targets))
    index = torch.arange(len(table.queries), device=table.device)[rows]
    batch = Batch(**dict(zip(("anchors", "candidates"), sides, strict=True)), index=index, log_weight=None)
    with torch.no_grad(), _evaluating(loss, table.device):
        return loss.temperatures.of(batch, direction)


@contextmanager
def _evaluating(loss: nn.Module, device: torch.device) -> Iterator[None]:
    """The loss in evaluation mode, in which a network draws no dropout; modes and random generators are put back."""
    modes = [(module, module.training) for module in loss.modules()]
    loss.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
