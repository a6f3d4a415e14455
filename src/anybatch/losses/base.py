"""What all losses share: arguments checked, embeddings normalised, ids turned into masks, one or two directions, figures for logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.ids import as_integers
from anybatch.losses.engine import (
    TILE_BYTES,
    Rule,
    Side,
    SoftmaxStats,
    differentiable_once,
    softmax_loss,
    symmetric_softmax_loss,
)
from anybatch.losses.log_weights import LogWeights, as_log_weights, behind, plus, same_content, same_row
from anybatch.losses.per_example import Keys, PerExample

Direction = Literal["one_way", "both"]
MIN_TEMPERATURE = 0.01  # of a learned one: below, a cosine's float32 error is seen in the loss, and a step of the logarithm doubles the gradient
F = TypeVar("F", bound=Callable[..., Any])


def outside_the_graph(method: F) -> F:
    """Under `torch.compile` the method runs as it is, between two graphs: it asks for values, and keeps state."""
    return cast(
        F, torch._disable_dynamo(method)
    )  # not torch.compiler.disable, which imports the compiler when a class is made


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The arguments of one call, checked and normalised.

    Attributes:
        anchors: (B, D) float32 or float64.
        candidates: (M, D).
        index: (B,) int64 rows of the data set, or None.
        log_weight: Log-weights and masks from the anchors to the candidates; None for 0.
        kept: By direction, what a method made at the start of the call and needs at its end.
    """

    anchors: Tensor
    candidates: Tensor
    index: Tensor | None
    log_weight: LogWeights | None
    kept: dict[int, Tensor] = field(default_factory=dict)

    def queries(self, direction: int) -> Tensor:
        """(B, D) what is scored against the others: the anchors (direction 0), or the positives (1)."""
        return self.anchors if direction == 0 else self.candidates[: len(self.anchors)]

    def log_weight_of(self, direction: int) -> LogWeights | None:
        """The log-weights as this direction sees them."""
        if direction == 0 or self.log_weight is None:
            return self.log_weight
        return self.log_weight.reversed(len(self.anchors))


class ContrastiveLoss(PerExample):
    """Base of the losses; a method supplies `_rule`, or a whole `_side`, and learns in `_finish`.

    Args:
        temperature: Similarities are divided by it.
        learnable_temperature: Train it, through its logarithm, so that it stays positive.
        min_temperature: A learned temperature is put back to it at the start of a training step, so that its gradient stays alive; what is read is
            never below it. Temperatures of single examples (FastCLIP v2, ISogCLR, TempNet) have their published ranges, FastCLIP's learned one too.
        direction: "one_way": anchors against candidates. "both": the mean of that and of positives against anchors.
        normalize: L2-normalise the embeddings first, in float32 or better.
        tile_bytes: Memory for scores at a time.
        ring: Under several ranks hold two ranks' candidates (and their gradients) at a time instead of all: they travel from rank to rank
            instead of being gathered. The same loss, with one matrix product and one tour more. Not for losses that look at whole rows of scores
            (hardness, GloFND, EMC2).
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        min_temperature: float = MIN_TEMPERATURE,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
        ring: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < min_temperature < math.inf or (learnable_temperature and temperature < min_temperature):
            raise AnybatchError(
                f"min_temperature is {min_temperature} and the first temperature {temperature}; expected a positive floor, and a learned temperature "
                "above it. Set min_temperature lower, or begin higher."
            )
        if not temperature > 0:
            raise AnybatchError(f"temperature is {temperature}; expected a positive number such as 0.05.")
        if direction not in ("one_way", "both"):
            raise AnybatchError(f"direction is {direction!r}; expected 'one_way' or 'both'.")
        self.direction = direction
        self.normalize = normalize
        self.tile_bytes = tile_bytes
        self.ring = ring
        self._temperature = temperature
        self.temperature_range = (min_temperature, math.inf)  # of a learned temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learnable_temperature else None
        self._stats: tuple[Tensor, SoftmaxStats] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContrastiveLoss:
        """Casts of a whole model leave what the loss learns itself in float32: a small step would not move it any more."""

        def careful(values: Tensor) -> Tensor:  # parameters, their gradients, buffers; a network's as well
            changed = fn(values)
            shortened = changed.dtype != values.dtype and changed.dtype in (torch.float16, torch.bfloat16)
            return values.detach().to(changed.device) if shortened else changed

        super()._apply(careful, recurse)
        return self

    def grow(self, num_rows: int, *, keys: Keys | None = None) -> None:
        """Make room for rows appended to the data set: the loss becomes that for `num_rows` rows, and the old ones keep their states.

        Memory, learned values with their velocities and kept embeddings get entries behind the old ones, as in a loss just made; what the
        constructor takes from the number of rows (`eps=None`, ...) is taken anew. Nothing to do for a loss that depends on no number of rows.

        Args:
            num_rows: n, of all rows, old and new.
            keys: (n,) the keys of all rows, where the memory has keys.

        Parameters, which an optimizer may hold, are neither replaced nor resized: none of the library's has an entry a row. Buffers are replaced; grow
        before the loss is wrapped in DDP, on every rank.

        Raises:
            AnybatchError: Fewer rows than before; keys for a memory without them or the other way round; other keys for the old rows.
        """
        if keys is not None:
            raise AnybatchError(
                f"keys were given; {type(self).__name__} has no memory that rows could share. Leave them out."
            )

    @property
    def temperature(self) -> float:
        """The temperature at this moment."""
        if self.log_temperature is None:
            return self._temperature
        low, high = self.temperature_range
        return min(max(math.exp(self.log_temperature.item()), low), high)

    @property
    def last_stats(self) -> dict[str, float]:
        """Figures of the last call as plain floats: objective, log_denominator, negatives an anchor, temperature. Empty before it."""
        if self._stats is None:
            return {}
        loss, stats = self._stats
        seen = stats.log_denominator[stats.num_negatives > 0]
        return {
            "objective": loss.item(),
            "log_denominator": seen.mean().item() if len(seen) else 0.0,
            "num_negatives": stats.num_negatives.mean().item(),
            "temperature": self.temperature,
        }

    @outside_the_graph
    def forward(
        self,
        anchors: Tensor,
        candidates: Tensor,
        *,
        index: Tensor | None = None,
        log_weight: LogWeights | Tensor | None = None,
        anchor_id: Tensor | None = None,
        candidate_id: Tensor | None = None,
    ) -> Tensor:
        """The mean objective over the batch of all ranks.

        Args:
            anchors: (B, D) float.
            candidates: (M, D) float, M >= B: the positives in the anchors' order, then explicit negatives.
            index: (B,) int rows of the data set; needed by losses with memory. Rows of one number have one content, and are no negatives.
            log_weight: b_ij: `LogWeights`, or a tensor broadcastable to (B, M); -inf removes a pair.
            anchor_id: (B,) int, 0 or more; equal for identical anchors. Goes with `candidate_id`.
            candidate_id: (M,) int; equal for identical candidates.

        Returns:
            Scalar, float32 (float64 for float64 embeddings), differentiable in the embeddings and the temperature.

        Raises:
            AnybatchError: Shapes, types or devices that do not fit, a negative anchor_id, an index that is missing or out of range; in the backward
                pass: a second derivative.

        Cost and collectives: see `engine`, and with `index` two gathers of it; nothing is communicated in the backward pass.
        """
        return differentiable_once(
            self._of(self._prepare(anchors, candidates, index, log_weight, anchor_id, candidate_id))
        )

    def _of(self, batch: Batch) -> Tensor:
        """The loss of a batch that is checked and normalised."""
        anchors, candidates = batch.anchors, batch.candidates
        forward = self._side(batch, direction=0)
        if self.direction == "both":
            sides = (forward, self._side(batch, direction=1))
            loss, stats = symmetric_softmax_loss(
                anchors, candidates, forward=sides[0], back=sides[1], tile_bytes=self.tile_bytes, ring=self.ring
            )
        else:
            sides = (forward,)
            loss, one = softmax_loss(
                anchors,
                candidates,
                rule=forward.rule,
                temperature=forward.temperature,
                log_weight=forward.log_weight,
                row_weight=forward.row_weight,
                adjust=forward.adjust,
                column_weight=forward.column_weight,
                tile_bytes=self.tile_bytes,
                ring=self.ring,
            )
            stats = (one,)
        loss = self._finish(batch, sides, stats, loss)
        self._stats = loss.detach(), stats[0]
        return loss

    def _prepare(
        self,
        anchors: Tensor,
        candidates: Tensor,
        index: Tensor | None,
        log_weight: LogWeights | Tensor | None,
        anchor_id: Tensor | None,
        candidate_id: Tensor | None,
    ) -> Batch:
        """The arguments of `forward`, checked, in float32 or better, normalised if wanted, with ids turned into masks."""
        dtype = check_embeddings(anchors, candidates)
        if (
            anchors.ndim != 2
            or candidates.ndim != 2
            or anchors.shape[1] != candidates.shape[1]
            or len(candidates) < len(anchors)
        ):
            raise AnybatchError(
                f"anchors have shape {tuple(anchors.shape)} and candidates {tuple(candidates.shape)}; expected (B, D) and (M, D) with M >= B: "
                "the positives in the anchors' order, then explicit negatives."
            )
        anchors, candidates = anchors.to(dtype), candidates.to(dtype)
        if self.normalize:
            anchors, candidates = (nn.functional.normalize(side, dim=1) for side in (anchors, candidates))
        index, weight = self._weight(anchors, candidates, index, log_weight, anchor_id, candidate_id)
        return Batch(anchors=anchors, candidates=candidates, index=index, log_weight=weight)

    @property
    def _updating(self) -> bool:
        """Whether this call may change state."""
        return self.training and torch.is_grad_enabled()

    def _side(self, batch: Batch, *, direction: int) -> Side:
        """What the engine is asked in one direction (0: anchors against candidates, 1: the way back)."""
        weight = batch.log_weight_of(direction)
        rule = self._rule(
            batch.index,
            direction=direction,
            normalised=weight is not None and weight.normalised,
            dimensions=batch.anchors.shape[1],
        )
        return Side(rule=rule, temperature=self._temperatures(batch, direction=direction), log_weight=weight)

    def _temperatures(self, batch: Batch, *, direction: int) -> Tensor:
        """The temperature as a scalar tensor, or (B,) one a row."""
        return self._global_temperature(batch.anchors)

    def _global_temperature(self, like: Tensor) -> Tensor:
        """The temperature as a scalar in the dtype and on the device of `like`, attached to autograd where it is learned."""
        if self.log_temperature is None:
            return like.new_tensor(self._temperature)
        low, high = self.temperature_range
        limited = self.log_temperature.detach().clamp(math.log(low), math.log(high))
        if (
            self._updating
        ):  # a projection, where the optimizer finds it: it need not come back from where its momentum had carried it
            self.log_temperature.data.copy_(limited)
        # The value of the projected one, and a derivative at the edge as well.
        log_temperature = self.log_temperature + (limited - self.log_temperature.detach())
        return log_temperature.to(like).exp()

    needs_index = False

    @property
    def _known_rows(self) -> int | None:
        """n, where the loss is for a data set of so many rows."""
        return None

    def _finish(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """The loss that the call returns; the place where a method updates what it learns from the engine's figures."""
        return loss

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        """The method's rule for one call.

        Args:
            index: Rows of the data set.
            direction: 0 for anchors against candidates, 1 for the way back.
            normalised: Whether the log-weights already make the log-sum an estimate of the log-mean over the data.
            dimensions: Width of the embeddings.
        """
        raise NotImplementedError

    def _weight(
        self,
        anchors: Tensor,
        candidates: Tensor,
        index: Tensor | None,
        log_weight: LogWeights | Tensor | None,
        anchor_id: Tensor | None,
        candidate_id: Tensor | None,
    ) -> tuple[Tensor | None, LogWeights | None]:
        """The index as int64, and all log-weights and masks."""
        num_rows, num_columns, device = len(anchors), len(candidates), anchors.device
        if (anchor_id is None) != (candidate_id is None):
            raise AnybatchError("anchor_id and candidate_id go together; one of them is missing.")
        if index is None and self.needs_index:
            raise AnybatchError(
                "This loss remembers each row: give index=, the row numbers of the batch in the data set."
            )
        weights = None if log_weight is None else as_log_weights(log_weight, num_rows, num_columns)
        if anchor_id is not None and candidate_id is not None:
            anchor_id = as_integers(
                "anchor_id",
                anchor_id,
                length=num_rows,
                device=device,
                low=0,
                remedy="-1 marks explicit negatives, which have no anchor.",
            )
            candidate_id = as_integers("candidate_id", candidate_id, length=num_columns, device=device)
            owner = behind(anchor_id, num_columns)
            weights = plus(weights, num_rows, same_content, anchor_id=owner, text_id=candidate_id)
        if index is not None:
            known = self._known_rows
            index = as_integers(
                "index",
                index,
                length=num_rows,
                device=device,
                low=0,
                high=None if known is None else known - 1,
                remedy="Make the loss with the num_rows of this data set." if known else "Give row numbers.",
            )
            rows = distributed.gather_rows(index, distributed.gather_sizes(num_rows, device))
            masks = (same_row,) if len(rows.unique()) < len(rows) else ()  # of all ranks, and so the same on each
            if masks or weights is not None:
                weights = plus(weights, num_rows, *masks, row=behind(index, num_columns))
        return index, weights


def check_embeddings(anchors: Tensor, candidates: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if either side is, else float32.

    Raises:
        AnybatchError: No tensors, but what sentence-transformers' Trainer hands to a loss; other numbers than floats, two devices, a transform that a loss does not know.
    """
    wrong = [type(given).__name__ for given in (anchors, candidates) if not isinstance(given, Tensor)]
    if wrong:
        raise AnybatchError(
            f"A loss got {' and '.join(wrong)}; expected embeddings, tensors (B, D) and (M, D). In sentence-transformers' Trainer give it inside the model's "
            "cached step: loss=CachedLoss(model, loss), from anybatch.integrations.sentence_transformers."
        )
    if not (anchors.is_floating_point() and candidates.is_floating_point()) or anchors.device != candidates.device:
        raise AnybatchError(
            f"anchors are {anchors.dtype} on {anchors.device} and candidates {candidates.dtype} on {candidates.device}; expected floats on one device."
        )
    if torch._C._are_functorch_transforms_active() or any(
        unpack_dual(side).tangent is not None for side in (anchors, candidates)
    ):
        raise AnybatchError(
            "A loss of anybatch does not run inside torch.func's transforms (grad, vmap, jvp, ...) or with forward-mode derivatives: its gradient is computed "
            "in closed form for a backward pass. Use loss.backward() or torch.autograd.grad."
        )
    return torch.float64 if torch.float64 in (anchors.dtype, candidates.dtype) else torch.float32
