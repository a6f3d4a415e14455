"""What the engine is asked and what it answers: a rule, one direction of a loss, figures of the last call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from anybatch.losses.log_weights import LogWeights

TILE_BYTES = 32 * 2**20


class Answer(NamedTuple):
    """What a rule says of some rows, all (b,)."""

    # The denominator estimate, relative to the positive's logit: the gradient weight of negative j is
    # exp(logit_ij - log_denominator_i).
    log_denominator: Tensor
    objective: Tensor  # the value of the row
    # Gradient weight of the positive's logit s_ip / tau_i, negative where it is drawn near; None for minus the sum of
    # the negatives', as where the objective depends on differences to the positive alone.
    positive_weight: Tensor | None = None


class Rule(Protocol):
    """The denominator estimate of a method, given what this batch says.

    Attributes:
        row_wise: Whether a row's answer depends on that row alone, so that rows can be answered tile by tile.
    """

    @property
    def row_wise(self) -> bool:
        """See the class."""
        ...

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        """Answer for some of this rank's rows.

        `log_sum` (b,) is over the negatives, relative to the positive's logit; -inf without negatives. `num_drawn` (b,)
        counts the candidates but for the positive, masked or not, in the dtype of `log_sum`: what a mean is over. A
        masked one is a draw that adds nothing, in the batch as in the data set.
        """
        ...


class Adjust(Protocol):
    """Rewrites the logits of whole rows before anything is summed: what depends on the scores themselves.

    It must give the same answer when asked twice for the same rows, unless the rule is row-wise (then it is asked
    once).
    """

    def __call__(self, rows: slice, scores: Tensor, logits: Tensor) -> Tensor:
        """New logits (b, M) of some of this rank's rows against the candidates of all ranks, -inf wherever `logits` is.

        `scores` are not to be changed, `logits` (relative to the positive's) may be, in place. What is new of them
        counts as a constant in the derivative.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One direction of a loss."""

    rule: Rule  # the method
    temperature: Tensor  # scalar, or (B,) one for each row of this rank; receives a gradient if it requires one
    log_weight: LogWeights | None = None  # b_ij for this rank's rows and columns; None for 0
    # Pairs whose score is above the own positive's by more than this are no negatives, a constant of the derivative.
    mask_margin: float | None = None
    # Negatives are weighed by exp(hardness (s_ij - s_ip) / tau_i) over its mean, which are constants of the derivative.
    hardness: float = 0.0
    row_weight: Tensor | None = None  # (B,) factor of each row's objective, a constant; None for 1
    adjust: Adjust | None = None  # rewrites logits
    # Weight (b,) of some rows in `SoftmaxStats.column_gradient`, asked after the rule has answered for them.
    column_weight: Callable[[slice], Tensor] | None = None
    num_drawn: Tensor | None = None  # (B,) candidates but for the positive, see `Rule`; None for all columns but one

    @property
    def rereads_scores(self) -> bool:
        """Whether a tile's scores are needed beside its logits."""
        several = self.log_weight is not None and self.log_weight.positives_by is not None
        return self.adjust is not None or several or self.hardness > 0

    @property
    def needs_rows(self) -> bool:
        """Whether the columns of the other direction's scores do not do."""
        return self.rereads_scores or self.column_weight is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftmaxStats:
    """What the loss did in its last call, for logs and for methods that learn from it. Detached."""

    log_sum: Tensor  # (B,) relative to the positive's logit; -inf without negatives
    log_denominator: Tensor  # (B,) the rule's answer
    objective: Tensor  # (B,) the rule's answer, before the row weight
    num_negatives: Tensor  # (B,) negatives not removed
    log_hardness: Tensor | None = None  # (B,) log of the mean factor of the negatives, see `Side.hardness`
    # (B,) -row_weight_i sum_j p_ij (s_ij - s_ip) / tau_i^2, by tau_i through the logits; None when no gradient was
    # wanted, or the temperature is a scalar that needs none.
    temperature_gradient: Tensor | None = None
    # (M,) sum_i column_weight_i p_ij over the rows of all ranks for each candidate of this rank; None unless asked for.
    column_gradient: Tensor | None = None
