"""Cross-batch memory: embeddings of recent batches stay as negatives, and as anchors with the denominator they had."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Unpack, cast, final

import torch
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.configuration import Count
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss, OneTemperature, figures_of
from anybatch.losses.denominators import CountCorrected
from anybatch.losses.embedding_queue import EmbeddingQueue
from anybatch.losses.engine import Side, SoftmaxStats, softmax_loss
from anybatch.losses.engine.candidates import Layout
from anybatch.losses.log_weights import LogWeights, behind, plus
from anybatch.losses.parts import Batch, Denominator
from anybatch.plans.examples import Examples


@final
class CrossBatchInfoNCE(ContrastiveLoss):
    """InfoNCE over the batch and the S pairs before it, whose embeddings are remembered as they were.

        candidates of anchor i:   the batch's, and the remembered positives c~_j
        weight of candidate j:    p_ij from the batch's anchors, and from the remembered anchors a~_i
                                  p_ij = (n - 1) / k exp(a~_i . c_j / tau) / D_i,     k candidates but the positive,
                                  D_i the denominator that a~_i had in its own batch

    Both parts are needed: with the remembered positives alone the two sides' gradients no longer balance, and training
    goes wrong (docs/log.md). The value of the second part is 0; its gradient goes to the batch's candidates.

    Embeddings drift, and a remembered batch stays behind, which feeds on itself. With `centred` an embedding is
    remembered relative to the mean of its batch and used relative to the mean of this one: unit(x~ - mean(its batch) +
    mean(this batch)). Without, training from scratch loses what the memory gains, or collapses (docs/log.md).

    When: models that are no transformers, in batches of up to 256: recommended. When not: steps that move embeddings
    far (pretrained layers, batches of 1,024 from scratch), or batches of an eighth of the data. Evidence:
    docs/recipe.md; each part alone: docs/log.md.

    Args:
        num_rows: n, rows of the data set.
        memory_size: S, pairs remembered: the newest. A row's older pair leaves when the row comes again. More than some
            1,024 are too old: what moved on its own is near no longer, and nothing takes that away.
        centred: Take away the common drift; False for the plain memory of the publications.
        mean_rows: The mean is a running one over about so many rows, or of the batch where that is larger: 64 was best
            from scratch, 256 on embeddings that stand still (docs/log.md).
        scoring: See `OneTemperature`.

    Calls need `index`. Explicit negatives count for their batch's anchors only. Masks and inclusion weights hold for
    remembered pairs too; a tensor with a value a pair is refused. A step that is not finite is not remembered. Each
    rank has the whole memory, and shares the work by rows. A learned temperature has the derivative of the batch's own
    terms. The mean stands for the data's: batches of few clusters shift it by what they have in common.

    Example:
        >>> import torch
        >>> loss = CrossBatchInfoNCE(1000, memory_size=64)
        >>> anchors, positives = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
        >>> for step in range(2):
        ...     loss(anchors, positives, index=torch.arange(8) + 8 * step).backward()
        >>> loss.last_stats["remembered"]
        8.0

    Cost: 8 D S bytes and some 100 S; 3 products of B x (B + S) x D and two of B x S x D, twice for "both"; under ranks
    three gathers and a small sum besides the engine's collectives. Reference: Wang et al. 2020, "Cross-Batch Memory for
    Embedding Learning", arXiv 1912.06798; a memory of both sides: Kim et al. 2024, "A Gradient Accumulation Method for
    Dense Retriever under Memory Constraint", arXiv 2406.12356; moments of remembered embeddings fitted to the batch's:
    Ajanthan et al. 2023, "Adaptive Cross Batch Normalization for Metric Learning", arXiv 2303.17127. Remembered
    denominators and the count correction are this library's.
    """

    lacks: ClassVar = {
        "joint": "remembers pairs for anchors against candidates",
        "positives_by": "remembers one positive an anchor",
    }

    def __init__(
        self,
        num_rows: int,
        *,
        memory_size: Count = 256,
        centred: bool = True,
        mean_rows: int = 64,
        **scoring: Unpack[OneTemperature],
    ) -> None:
        super().__init__(**scoring)
        if memory_size < 1:
            raise AnybatchError(
                f"memory_size is {memory_size}; expected the number of pairs to remember, at least 1. Without "
                "memory use CountCorrectedInfoNCE."
            )
        if mean_rows < 1:
            raise AnybatchError(f"mean_rows is {mean_rows}; expected the number of rows of the mean, at least 1.")
        self.memory_size, self.centred, self.mean_rows = memory_size, centred, mean_rows
        self._last: tuple[Tensor, SoftmaxStats, Tensor] | None = None
        self._num_used = 0
        self.denominator: Denominator = CountCorrected(num_rows)
        self.queue = EmbeddingQueue(memory_size, num_rows)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(2, 0))  # running, of anchors and positives

    widths = ("mean",)

    @property
    def last_stats(self) -> dict[str, float]:
        """See `SoftmaxLoss.last_stats`; and `remembered`, the pairs of the memory that were used."""
        if self._last is None:
            return {}
        return {**figures_of(*self._last), "remembered": float(self._num_used)}

    def _of(self, batch: Batch) -> Tensor:
        with torch.autocast(batch.anchors.device.type, enabled=False):
            return self._beside(batch, self._recall(batch))

    def _beside(self, batch: Batch, recalled: _Recalled) -> Tensor:
        """The loss of the batch beside what is remembered."""
        losses, stats = [], []
        for direction in self.directions:
            queries = batch.queries(direction)
            others = batch.candidates if direction == 0 else batch.anchors
            sizes = recalled.layout.row_sizes if direction else recalled.layout.column_sizes
            num_drawn = torch.full((len(queries),), sum(sizes) - 1 + len(recalled.memory), device=queries.device)
            side = replace(self._side(self.denominator, batch, direction), num_drawn=num_drawn)
            weight = recalled.log_weights[direction].beside(recalled.memory, recalled.share)
            columns = torch.cat([others, recalled.used[1 - direction, recalled.share]])
            loss, (one,) = softmax_loss(queries, columns, replace(side, log_weight=weight), tile_bytes=self.tile_bytes)
            losses.append(loss + self._term_of_remembered_queries(batch, recalled, direction, side))
            stats.append((one, side))
        loss = torch.stack(losses).mean()
        self._last = loss.detach(), stats[0][0], stats[0][1].temperature.detach()
        self._num_used = len(recalled.memory)
        if batch.updating:
            self._remember(batch, recalled, stats)
        return loss

    @torch.no_grad()
    def _recall(self, batch: Batch) -> _Recalled:
        """What is remembered, as it is used beside this batch."""
        anchors, positives, index = batch.anchors, batch.queries(1), batch.index
        assert index is not None
        queue, embeddings = self.queue, self.queue.beside(anchors.shape[1])

        # 1. The batch: its records, those of all ranks' pairs, where its embeddings are.
        weights = plus(batch.log_weight, len(anchors), row=behind(index, len(batch.candidates)))
        both = (weights, weights.reversed(len(anchors)))
        layout = Layout.of(len(anchors), len(batch.candidates), anchors.device)
        pairs = weights.queries.gathered(layout.row_sizes)
        mean = self._mean(anchors, positives, len(pairs))

        # 2. What is remembered and not in the batch.
        places = torch.nonzero((queue.rows >= 0) & ~torch.isin(queue.rows, pairs["row"]))[:, 0]
        memory = queue.examples(pairs, places)
        used = embeddings[:, places].to(anchors.dtype) + mean[:, None]
        if self.normalize:
            used = nn.functional.normalize(used, dim=2)

        # 3. Which of it are candidates on this rank.
        return _Recalled(
            layout=layout,
            log_weights=both,
            pairs=pairs,
            mean=mean,
            places=places,
            memory=memory,
            used=used,
            share=distributed.own_part(distributed.shares(len(places))),
        )

    def _mean(self, anchors: Tensor, positives: Tensor, num_rows: int) -> Tensor:
        """(2, D) where anchors and positives are now; zeros where they are not centred. One sum over ranks."""
        if not self.centred:
            return anchors.new_zeros(2, anchors.shape[1])
        sums = torch.stack([anchors.sum(dim=0), positives.sum(dim=0)])
        mean = distributed.sum_over_ranks(sums) / num_rows
        if not self.mean.shape[1]:
            return mean
        before = self.mean.to(mean.dtype)
        return before + min(1.0, num_rows / self.mean_rows) * (mean - before)

    def _term_of_remembered_queries(self, batch: Batch, recalled: _Recalled, direction: int, side: Side) -> Tensor:
        """A term of value 0; its derivative is what remembered queries give the batch's positives (back: anchors)."""
        if not torch.is_grad_enabled():
            return batch.anchors.new_zeros(())
        own, layout = batch.queries(1 - direction), recalled.layout
        with torch.no_grad():
            gradient = self._gradient_of_queries(batch, recalled, direction, side)
            gradient *= distributed.world_size() / sum(layout.row_sizes)
        term = (gradient * own).sum()
        return term - term.detach()

    def _gradient_of_queries(self, batch: Batch, recalled: _Recalled, direction: int, side: Side) -> Tensor:
        """(B, D) sum over remembered queries i of p_ij a~_i / tau for each row j here; k as for the batch's queries."""
        own, queries = batch.queries(1 - direction), recalled.used[direction]
        temperature = side.temperature.detach()
        reverse = recalled.log_weights[1 - direction]
        num_columns, num_queries = len(reverse.candidates), len(queries)
        weight = reverse.beside(recalled.memory, slice(0, num_queries))
        columns = slice(num_columns, num_columns + num_queries)
        assert side.num_drawn is not None
        correction = own.new_full((len(own),), math.log((self.queue.num_rows or 0) - 1))
        if not reverse.normalised:
            correction -= side.num_drawn.to(own.dtype).clamp(min=1).log()
        log_denominator = self.queue.log_denominator[direction, recalled.places].to(own.dtype)
        highest = (queries * recalled.used[1 - direction]).sum(dim=1) + (self.mask_margin or 0.0)
        gradient = torch.zeros_like(own)
        height = max(1, self.tile_bytes // max(1, num_queries * own.element_size()))
        for start in range(0, len(own), height):
            rows = slice(start, min(start + height, len(own)))
            scores = own[rows] @ queries.T
            if self.mask_margin is not None:
                scores.masked_fill_(scores > highest, -torch.inf)
            logits = scores.mul_(1 + self.hardness).div_(temperature).sub_(log_denominator).add_(correction[rows, None])
            logits += weight.tile(rows, columns).to(logits.dtype)
            gradient[rows] = logits.clamp_(max=0).exp_() @ queries  # a share is at most 1, whatever moved since
        return gradient / temperature

    @torch.no_grad()
    def _remember(self, batch: Batch, recalled: _Recalled, stats: list[tuple[SoftmaxStats, Side]]) -> None:
        """Keep all ranks' pairs. One gather."""
        sizes, width = recalled.layout.row_sizes, batch.anchors.shape[1]
        anchors, positives = batch.anchors, batch.queries(1)
        similarity = (anchors * positives).sum(dim=1)
        absolute = [one.objective + (1 + self.hardness) * similarity / side.temperature for one, side in stats]
        if self.hardness:  # and what a negative's exp((1 + hardness) s_ij / tau) is divided by besides
            absolute = [total + cast(Tensor, one.log_hardness) for total, (one, _) in zip(absolute, stats, strict=True)]
        absolute = [absolute[0], absolute[-1]]  # one way the second is never used
        centred = [anchors - recalled.mean[0], positives - recalled.mean[1]]
        figures = distributed.gather_rows(torch.cat([*centred, torch.stack(absolute, dim=1)], dim=1), sizes)
        if not bool(figures.isfinite().all()):  # a step that a scaler skips; remembered, it would spoil the next ones
            return
        self.queue.put(
            recalled.pairs["row"],
            figures[:, : 2 * width].unflatten(1, (2, width)).transpose(0, 1),
            figures[:, 2 * width :].T,
            recalled.pairs,
        )
        self.mean = recalled.mean.to(self.mean.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recalled:
    """The memory beside one batch: the K remembered pairs that are not in it."""

    layout: Layout  # of the batch alone, over all ranks
    log_weights: tuple[LogWeights, LogWeights]  # of the batch alone, by direction
    pairs: Examples  # (B_all,) records of all ranks' pairs
    mean: Tensor  # (2, D) of all ranks' anchors and positives; zeros where embeddings are not centred
    places: Tensor  # (K,)
    memory: Examples  # (K,) their records
    used: Tensor  # (2, K, D) their anchors and positives, moved to this batch's mean
    share: slice  # which of the K are candidates on this rank
