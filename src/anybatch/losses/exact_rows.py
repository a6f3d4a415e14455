"""The softmax of a row over the data set, exactly, from embeddings in tiles: to fill and check what a loss remembers.

    log_sum_i    = logsumexp_{j allowed} (s_ij - s_ip(i)) / tau
    mean_logit_i = sum_j p_ij (s_ij - s_ip(i)) / tau,     p_ij = exp((s_ij - s_ip(i)) / tau - log_sum_i)
    purity_i     = sum_j p_ij^2

Cost: one matrix product of R x M x D, one exponential a pair and four passes over the tile; `tile_bytes` of scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.parts import Batch

Embeddings: TypeAlias = "np.ndarray | Tensor"
Ids: TypeAlias = "np.ndarray | Tensor | None"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Figures of R rows over all their negatives. All (R,), float64.

    Attributes:
        log_sum: Relative to the positive; -inf without negatives.
        positive: Logit of the row's own positive.
        num_negatives: Targets that are negatives.
        num_drawn: k, targets but the row's own, negatives or not: what the mean is over; the same for all rows.
        mean_logit: Mean logit under the softmax, relative to the positive; 0 without negatives.
        purity: Sum of p_ij^2: one over the number of negatives that share the gradient, in the strict sense.
    """

    log_sum: Tensor
    positive: Tensor
    num_negatives: Tensor
    num_drawn: int
    mean_logit: Tensor
    purity: Tensor

    @property
    def log_mean(self) -> Tensor:
        """Log of the mean of exp(relative logit) over the targets, of which those that are no negatives add 0."""
        return self.log_sum - math.log(max(1, self.num_drawn))

    @property
    def entropy(self) -> Tensor:
        """Entropy of p_i in nats; exp of it is the effective number of negatives."""
        return torch.where(self.num_negatives > 0, self.log_sum - self.mean_logit, -torch.inf)

    def standard_error(self, population: int) -> Tensor:
        """Of `log_mean` as an estimate from k targets drawn from `population` without replacement (delta method)."""
        k = max(1, self.num_drawn)
        return ((k * self.purity - 1).clamp(min=0) / k * max(0.0, 1 - k / max(1, population))).sqrt()


@dataclass(frozen=True, kw_only=True)
class Table:
    """The two sides of a data set, from one direction's point of view; `make_table` checks them.

    Attributes:
        queries, targets: (n, D) arrays, memory maps or tensors; row i of the one belongs to row i of the other.
        query_id, target_id: (n,) int64; equal for equal content. None if all differ.
        normalize: L2-normalise rows when they are read.
        device: Where to compute.
    """

    queries: Embeddings
    targets: Embeddings
    query_id: Tensor | None
    target_id: Tensor | None
    normalize: bool
    device: torch.device

    def reversed(self) -> Table:
        """The candidate-to-anchor direction."""
        sides = {"queries": self.targets, "targets": self.queries}
        return replace(self, **sides, query_id=self.target_id, target_id=self.query_id)

    def take(self, side: Embeddings, rows: slice | np.ndarray) -> Tensor:
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
    """A table of anchors against positives.

    Raises:
        AnybatchError: Shapes that do not fit, or one kind of id without the other.
    """
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


def exact_rows_of(
    loss: ContrastiveLoss,
    table: Table,
    rows: slice | np.ndarray,
    index: Tensor,
    *,
    direction: int,
    moments: bool = True,
    tile_bytes: int | None = None,
) -> tuple[Rows, Tensor]:
    """`exact_rows` at the temperature at which the loss would score these rows at this moment, and that temperature.

    Args:
        loss: The loss, asked in evaluation mode; its temperatures may be those of rows, or follow from embeddings.
        table: Anchors against positives, whatever the direction.
        rows: Which of the table's rows.
        index: (R,) int64 their numbers in the data set.
        direction: 0 for anchors against positives, 1 for the other way.
        moments, tile_bytes: See `exact_rows`.

    Returns:
        The figures, and a scalar or (R,).
    """
    sides = (table.take(side, rows) for side in (table.queries, table.targets))
    batch = Batch(**dict(zip(("anchors", "candidates"), sides, strict=True)), index=index, log_weight=None)
    with torch.no_grad(), _evaluating(loss, table.device):
        temperature = loss.temperatures.of(batch, direction)
    side = table.reversed() if direction else table
    figures = exact_rows(side, rows, temperature=temperature, moments=moments, tile_bytes=tile_bytes)
    return figures, temperature


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


def exact_rows(
    table: Table,
    rows: slice | np.ndarray,
    *,
    temperature: Tensor | float,
    moments: bool = True,
    tile_bytes: int | None = None,
) -> Rows:
    """The figures of some rows against all targets.

    A target is not a negative of a row if it is the row's own, has the content of the row's own, or belongs to a row
    with the same query.

    Args:
        table: The data set.
        rows: Which rows; few enough that (rows, D) and a column or so of scores fit.
        temperature: Similarities are divided by it: a number, or (R,) one a row.
        moments: Also find `mean_logit` and `purity`, at about the cost of the exponential; else they are NaN.
        tile_bytes: Memory for scores; None for 8 MiB on a CPU (what its caches like), 256 MiB elsewhere.
    """
    # 1. The rows, their own targets, and sums relative to the greatest logit so far.
    total = len(table.targets)
    queries, positives = table.take(table.queries, rows), table.take(table.targets, rows)
    numbers = np.arange(len(table.queries))[rows] if isinstance(rows, slice) else rows
    temperature = torch.as_tensor(temperature, dtype=queries.dtype, device=table.device)
    scaled = queries / temperature.expand(len(queries))[:, None]
    positive = (scaled * positives).sum(dim=1)
    remove = _Remover(table, torch.as_tensor(numbers, device=table.device))
    height = len(queries)
    if tile_bytes is None:
        tile_bytes = 2**23 if table.device.type == "cpu" else 2**28
    width = max(1, tile_bytes // max(1, height * queries.element_size()))
    peak, sums, counts, firsts, squares = (
        torch.full((height,), value, dtype=torch.float64, device=table.device)
        for value in (-torch.inf, 0.0, 0.0, *(2 * [0.0 if moments else torch.nan]))
    )
    # 2. A tile of targets at a time.
    for start in range(0, total, width):
        chosen = slice(start, min(start + width, total))
        logits = torch.addmm(-positive[:, None], scaled, table.take(table.targets, chosen).T)
        removed = remove(logits, chosen)
        counts += logits.shape[1] - (logits.isneginf().sum(dim=1) if removed else 0)
        top = logits.amax(dim=1)
        share = (logits - _finite(top)[:, None] if moments else logits.sub_(_finite(top)[:, None])).exp_()
        rise = torch.maximum(peak, top.double())
        before, now = (peak - _finite(rise)).exp(), (top.double() - _finite(rise)).exp()
        sums = sums * before + share.sum(dim=1).double() * now
        if moments:
            firsts = firsts * before + (share * logits.clamp_(min=-1e30)).sum(dim=1).double() * now
            squares = squares * before**2 + share.square_().sum(dim=1).double() * now**2
        peak = rise
    # 3. Rows without a negative have neither.
    some = counts > 0
    safe = torch.where(some, sums, 1.0)
    return Rows(
        log_sum=torch.where(some, peak + safe.log(), -torch.inf),
        positive=positive.double(),
        num_negatives=counts,
        num_drawn=total - 1,
        mean_logit=torch.where(some, firsts / safe, 0.0),
        purity=torch.where(some, squares / safe**2, 0.0),
    )


def _finite(values: Tensor) -> Tensor:
    """0 in place of -inf, the greatest logit of a row that had no negative so far."""
    return torch.where(values.isneginf(), 0.0, values)


class _Remover:
    """Sets logits of pairs that are no negatives to -inf, comparing ids only in columns that any of the rows shares."""

    def __init__(self, table: Table, rows: Tensor) -> None:
        self.rows = rows
        given = [ids for ids in (table.query_id, table.target_id) if ids is not None]
        self.ids = [(ids[rows], ids, torch.isin(ids, ids[rows])) for ids in given]

    def __call__(self, logits: Tensor, columns: slice) -> bool:
        """Whether anything may have been removed."""
        own = ((self.rows >= columns.start) & (self.rows < columns.stop)).nonzero()[:, 0]
        logits[own, self.rows[own] - columns.start] = -torch.inf
        removed = len(own) > 0
        for of_rows, of_all, met in self.ids:
            watched = met[columns].nonzero()[:, 0]
            if len(watched):
                same = of_rows[:, None] == of_all[columns][watched][None]
                logits[:, watched] = logits[:, watched].masked_fill_(same, -torch.inf)
                removed = True
        return removed
