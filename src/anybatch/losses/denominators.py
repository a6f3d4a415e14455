"""Denominators: what a method takes for the log-sum over all negatives of a row, given that over the batch's.

WithPositive      logaddexp(L_i, 0)                           InfoNCE: the batch and its positive
WithoutPositive   L_i                                         decoupled
CountCorrected    logaddexp(L_i - log k + log(n - 1), 0)      each of the k candidates stands for (n - 1) / k rows
Running           log(eps + u_i), u_i the mean over visits    SogCLR and its family
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.engine import Answer, Rule, Side, SoftmaxStats
from anybatch.losses.gamma import Gamma, log_shares
from anybatch.losses.parts import Batch, Denominator
from anybatch.losses.state import occurrences

Reference = Literal["absolute", "relative"]
PositiveWeight = Literal["exact", "batch"]


class WithPositive(Denominator):
    """The softmax over what is there."""

    over_data = False

    def rule(self, batch: Batch, direction: int, *, normalised: bool) -> Rule:
        """See `Denominator.rule`."""
        return _BatchRule(with_positive=True)


class WithoutPositive(Denominator):
    """The positive is not in the denominator. A row without any negative contributes 0."""

    over_data = False

    def rule(self, batch: Batch, direction: int, *, normalised: bool) -> Rule:
        """See `Denominator.rule`."""
        return _BatchRule(with_positive=False)


class CountCorrected(Denominator):
    """The softmax over the n - 1 other rows, for which the batch's candidates stand."""

    def rule(self, batch: Batch, direction: int, *, normalised: bool) -> Rule:
        """See `Denominator.rule`."""
        assert self.num_rows is not None
        return _CountCorrectedRule(
            log_num_others=math.log(self.num_rows - 1),
            normalised=normalised,
            repeated=None if batch.index is None else Visits.of(batch.index).repeated,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Visits:
    """Which rows the batches of all ranks visit. `of` costs a gather of sizes and one of the rows."""

    rows: Tensor  # (R,) int64, distinct and ascending; the same on every rank
    inverse: Tensor  # (B_all,) which of them each place of the batch holds
    sizes: list[int]  # places by rank
    own: slice  # this rank's places

    @classmethod
    def of(cls, index: Tensor) -> Visits:
        """Of this rank's rows, (B,) int64."""
        sizes = distributed.gather_sizes(len(index), index.device)
        rows, inverse = torch.unique(distributed.gather_rows(index, sizes), return_inverse=True)
        return cls(rows=rows, inverse=inverse, sizes=sizes, own=distributed.own_part(sizes))

    @property
    def repeated(self) -> Tensor:
        """(B,) how often the row of each of this rank's places comes at others."""
        return torch.bincount(self.inverse, minlength=len(self.rows))[self.inverse[self.own]] - 1


class RunningDenominator(Denominator):
    """A moving average of exp(x) for each row and direction, kept as its logarithm, in `log_mean`.

        u_i <- (1 - gamma) u_i + gamma * mean over the row's occurrences in the batch of exp(x)
        denominator = log(eps + u_i),   u_i divided by exp(s_ip / tau) if the state is absolute

    Rows never visited are NaN and take the batch's value whole. Each occurrence of a row in a batch, such as a view of
    an image, uses its own moving average; what is stored is their mean, added in their order.

    Args:
        num_rows: n.
        directions: Independent states per row.
        gamma: Weight of the new batch, in (0, 1], or a module that says it, such as a `GammaSchedule`.
        eps: Added to u_i; None for 1 / (n - 1).
        state: "absolute" or "relative", see `SogCLR`.
        positive: Gradient weight of the positive's logit, see `SogCLR`. None: exact beside an absolute state, as
            released for images; of the batch beside a relative one, as released for two modalities.
        moving: The temperature changes, or differs between rows: beside an absolute state that at which it was made is
            kept, in `made_at`, and the state used as log_mean * made_at / tau. That keeps tau * log_mean, a similarity,
            as it was, which moves by no more than log n per unit of tau.

    Cost: 4 bytes a row and direction, 8 if moving; an update touches B of them. Collectives a call: one of sizes, two
    gathers of B numbers.

    Example:
        >>> import torch
        >>> from anybatch.losses import SoftmaxLoss
        >>> loss = SoftmaxLoss(None, RunningDenominator(4, gamma=0.5), temperature=1.0)
        >>> value = loss(torch.eye(2), torch.eye(2), index=torch.tensor([0, 3]))
        >>> loss.denominator.visited.tolist()
        [[True, False, False, True]]
    """

    log_mean: Tensor
    made_at: Tensor
    needs_index = True

    def __init__(
        self,
        num_rows: int,
        directions: int = 1,
        *,
        gamma: float | Gamma = 0.9,
        eps: float | None = None,
        state: Reference = "absolute",
        positive: PositiveWeight | None = None,
        moving: bool = False,
    ) -> None:
        super().__init__(num_rows)
        if not isinstance(gamma, Gamma) and not 0 < gamma <= 1:
            raise AnybatchError(f"gamma is {gamma}; expected a number above 0 and at most 1, or a GammaSchedule.")
        if eps is not None and eps < 0:
            raise AnybatchError(f"eps is {eps}; expected 0 or more, or None for 1 / (num_rows - 1).")
        if state not in get_args(Reference):
            raise AnybatchError(f"state is {state!r}; expected 'absolute' or 'relative'.")
        if positive is not None and positive not in get_args(PositiveWeight):
            raise AnybatchError(f"positive is {positive!r}; expected 'exact' or 'batch', or None to follow the state.")
        self.gamma, self._eps = gamma, eps
        self.absolute = state == "absolute"
        self.exact_positive = self.absolute if positive is None else positive == "exact"
        self.register_rows("log_mean", fresh=torch.nan, directions=directions)
        self.register_buffer("relative", torch.tensor(int(not self.absolute)))  # goes with the saved state
        self.moving = moving and self.absolute
        if self.moving:
            self.register_rows("made_at", fresh=torch.nan, directions=directions)

    @property
    def eps(self) -> float:
        """What is added to u_i, relative to the positive."""
        assert self.num_rows is not None
        return 1.0 / (self.num_rows - 1) if self._eps is None else self._eps

    @property
    def visited(self) -> Tensor:
        """(directions, n) bool."""
        return ~self.log_mean.isnan()

    def rule(self, batch: Batch, direction: int, *, normalised: bool) -> RunningRule:
        """See `Denominator.rule`."""
        self.check_width(batch.anchors.shape[1])
        return RunningRule(
            denominator=self,
            visits=Visits.of(batch.rows),
            direction=direction,
            log_eps=math.log(self.eps) if self.eps > 0 else -math.inf,
            normalised=normalised,
            update=batch.updating,
        )

    def ask(self, side: Side, batch: Batch, direction: int) -> Side:
        """See `Part.ask`: an absolute state needs the positives' logits."""
        if not self.absolute:
            return side
        assert isinstance(side.rule, RunningRule)
        temperature = side.temperature.detach().expand(len(batch.anchors))
        level = batch.similarity(direction) / temperature
        rule = replace(side.rule, level=level, temperature=temperature if self.moving else None)
        return replace(side, rule=rule)

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """See `Part.learn`."""
        if batch.updating:
            self.embedding_width.fill_(batch.anchors.shape[1])
            if isinstance(self.gamma, Gamma):
                self.gamma.advance()
        return loss

    def refuse_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """See `State.refuse_state`: one of the other reference."""
        saved = state.get(prefix + "relative")
        if saved is not None and bool(saved) == self.absolute:
            given, own = ("relative", "absolute") if self.absolute else ("absolute", "relative")
            raise AnybatchError(
                f"The saved state is {given} ({prefix}relative), this loss's {own}: each would be wrong by the "
                f"positive's logit. Make the loss with state={given!r}, or begin with a new state."
            )


@dataclass(frozen=True, kw_only=True)
class RunningRule:
    """A running log-mean, plus eps."""

    denominator: RunningDenominator
    visits: Visits
    direction: int
    log_eps: float
    normalised: bool
    update: bool
    level: Tensor | None = None  # (B,) logits of the positives, s_ip / tau, of an absolute state
    temperature: Tensor | None = None  # (B,) of an absolute state whose temperature moves
    constant: float = 0.0  # added to the objective
    dropped: Tensor | None = None  # (B,) candidates that are taken out of the data set: the mean is not over them
    row_wise: bool = False  # asked for all rows of the batch at once, among which a row may occur twice

    @property
    def repeated(self) -> Tensor:
        """(B,) see `Visits.repeated`."""
        return self.visits.repeated

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        """See `Rule`."""
        return self.remember(log_sum, num_drawn)[0]

    def remember(self, log_sum: Tensor, num_drawn: Tensor) -> tuple[Answer, Tensor]:
        """The answer for all rows of the batch, and their running log-means, relative to the positive, (B,)."""
        drawn = num_drawn - self.repeated  # the row itself is none of the n - 1 others
        if self.dropped is not None:
            drawn = drawn - self.dropped
        # What takes a log-mean to a log-sum over the batch.
        correction = torch.zeros_like(log_sum) if self.normalised else drawn.clamp(min=1).log()
        log_mean = self.blend(log_sum - correction, drawn > 0)
        objective = torch.logaddexp(log_mean, torch.full_like(log_mean, self.log_eps))
        weight = None
        if self.denominator.exact_positive:
            weight = torch.where((drawn > 0) & ~log_mean.isneginf(), -(log_mean - objective).exp(), 0.0)
        value = torch.where(objective.isneginf(), 0.0, objective + self.constant)
        return Answer(objective + correction, value, weight), log_mean

    def blend(self, batch: Tensor, heard: Tensor) -> Tensor:
        """The moving average at each of the batch's rows, (B,); their mean per row is stored if `update`.

        `batch` (B,) is what this batch says, the log of a mean relative to the positive, -inf where all of its terms
        are masked; `heard` (B,) is False where the mean is over nothing. Rows never visited of which the batch says
        nothing are -inf; they, and those whose mean is 0, stay unvisited. Rows of which the batch says NaN or +inf keep
        what they knew, in the memory but not in what is returned.
        """
        # 1. What the batches of all ranks say.
        running, visits = self.denominator, self.visits
        level = torch.zeros_like(batch) if self.level is None else self.level.to(batch.dtype)
        temperature = torch.ones_like(batch) if self.temperature is None else self.temperature.to(batch.dtype)
        figures = torch.stack([batch, level, heard.to(batch.dtype), temperature], dim=1)
        batch, level, heard, temperature = distributed.gather_rows(figures, visits.sizes).unbind(dim=1)
        # 2. With what is known, in the batch's precision: a first visit is its value exactly.
        place = self.direction, visits.rows
        stored = running.log_mean[place].to(batch.dtype)
        made_at = running.made_at[place].to(batch.dtype) if running.moving else torch.ones_like(stored)
        old = (stored * made_at)[visits.inverse] / temperature - level
        gamma = running.gamma
        log_gamma, log_stay = gamma.log_shares(old) if isinstance(gamma, Gamma) else log_shares(gamma)
        new = torch.where(old.isnan(), batch, torch.logaddexp(old + log_stay, batch + log_gamma))
        new = torch.where(heard > 0, new, torch.where(old.isnan(), -torch.inf, old))
        # 3. The mean of a row's visits, at one temperature; nothing of a step that has diverged (NaN, +inf).
        if self.update:
            now = torch.zeros_like(stored).scatter_reduce(0, visits.inverse, temperature, "amax")
            at_one = (new + level) * (temperature / now[visits.inverse])
            mean, some = _combine(at_one, heard, visits.inverse, len(visits.rows))
            some &= mean.isfinite() | mean.isneginf()
            mean = torch.where(some, torch.where(mean.isneginf(), torch.nan, mean), stored)
            limits = torch.finfo(running.log_mean.dtype)  # beyond them: the largest number, not infinity
            running.log_mean[place] = mean.to(running.log_mean.dtype).clamp(limits.min, limits.max)
            if running.moving:
                running.made_at[place] = torch.where(some, now, made_at).to(running.made_at.dtype)
        return new[visits.own]


@dataclass(frozen=True, kw_only=True)
class _BatchRule:
    with_positive: bool
    row_wise: bool = True

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        if self.with_positive:
            log_denominator = torch.logaddexp(log_sum, torch.zeros_like(log_sum))
            return Answer(log_denominator, log_denominator)
        return Answer(log_sum, torch.where(log_sum.isneginf(), 0.0, log_sum))


@dataclass(frozen=True, kw_only=True)
class _CountCorrectedRule:
    log_num_others: float
    normalised: bool
    repeated: Tensor | None
    row_wise: bool = True

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        # A masked candidate counts in k and adds nothing to the sum, as it adds nothing to that over the data set.
        if self.normalised:
            correction = torch.full_like(log_sum, self.log_num_others)
        else:
            if self.repeated is not None:
                num_drawn = num_drawn - self.repeated[rows]  # the row itself is none of the n - 1 others
            correction = self.log_num_others - num_drawn.clamp(min=1).log()
        objective = torch.logaddexp(log_sum + correction, torch.zeros_like(log_sum))
        return Answer(objective - correction, objective)


def _combine(values: Tensor, heard: Tensor, inverse: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Log of the mean of exp(values) over the `heard` of each group; (groups,) bool whether there are any."""
    total, count = values.new_full((num_groups,), -torch.inf), heard.new_zeros(num_groups).index_add_(0, inverse, heard)
    if len(inverse) == num_groups:
        total[inverse] = values
        return total, count > 0
    values = torch.where(heard > 0, values, -torch.inf)
    for chosen in occurrences(inverse, num_groups):
        groups = inverse[chosen]
        total[groups] = torch.logaddexp(total[groups], values[chosen])
    return total - count.clamp(min=1).log(), count > 0
