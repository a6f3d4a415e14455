"""EMC2: negatives drawn from the anchor's own softmax by a Markov chain that goes on from visit to visit."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Unpack, final

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import OneTemperature, SoftmaxLoss
from anybatch.losses.engine import Answer, Rule, Side, SoftmaxStats
from anybatch.losses.engine.candidates import Layout
from anybatch.losses.parts import Batch, Denominator
from anybatch.losses.state import last_places


@final
class EMC2(SoftmaxLoss):
    """The gradient of the global objective from a Metropolis-Hastings chain, with no estimate of any denominator.

        state Z_i with log-weight l_i = s_{i, Z_i} / tau + b, kept from the last visit
        for each negative j of the batch, in random order:
            Z_i <- j, l_i <- s_ij / tau + b_ij    with probability min(1, exp(s_ij / tau + b_ij - l_i))
        p_ij = share of the steps after the burn-in at which Z_i = j

    whose stationary distribution over visits is the softmax over all the data, so the gradient's bias goes with the
    drift of the encoder and not with the batch size. A state of an earlier batch has no embedding in this one: the
    anchor has no negative while the chain stays there, which costs most of the gradient when the temperature is low
    (docs/log.md). The value of the loss is the batch's own `mean_i log_sum_i`, of which the gradient is not one.

    When: to study it. When not: low temperatures, where its gradient is too short. Evidence:
    docs/benchmarks/global_loss.md.

    Args:
        num_rows: n, rows of the data set.
        burn_in: Share of a visit's steps that do not count, in [0, 1). Published: half the batch.
        seed: Of the chains. They follow from (seed, number of steps, place in the batch): a resumed run goes on as if
            uninterrupted, and several ranks draw what one process would, but with explicit negatives.
        scoring: See `OneTemperature`.

    Cost: 4 bytes a row and direction; M steps one after the other for all rows of a tile at once; "both" directions
    cost two runs of the engine. Reference: Yau et al. 2024, "EMC2: Efficient MCMC Negative Sampling for Contrastive
    Learning with Global Convergence", arXiv 2404.10575, algorithm 1.

    Example:
        >>> import torch
        >>> loss = EMC2(1000)
        >>> value = loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), index=torch.arange(8))
        >>> int((~loss.denominator.log_weight.isnan()).sum())
        8
    """

    lacks: ClassVar = {
        "joint": "looks at whole rows of scores",
        "positives_by": "takes every candidate but one for a negative",
        "hardness": "chooses its negatives by their scores already",
    }
    denominator: Chains

    def __init__(
        self, num_rows: int, *, burn_in: float = 0.5, seed: int = 0, **scoring: Unpack[OneTemperature]
    ) -> None:
        chains = Chains(num_rows, self.num_directions(scoring), burn_in=burn_in, seed=seed)
        super().__init__(None, chains, **scoring)


class Chains(Denominator):
    """A chain per row and direction, in place of a denominator; see `EMC2`."""

    needs_index = True
    log_weight: Tensor  # l_i, of the chain's state; NaN for a chain that was never started
    num_steps: Tensor

    def __init__(self, num_rows: int, directions: int, *, burn_in: float, seed: int) -> None:
        super().__init__(num_rows)
        if not 0 <= burn_in < 1:
            raise AnybatchError(f"burn_in is {burn_in}; expected a share of the steps, at least 0 and below 1.")
        self.burn_in, self.seed = burn_in, seed
        self.register_rows("log_weight", fresh=torch.nan, directions=directions)
        self.register_buffer("num_steps", torch.tensor(0))

    def rule(self, batch: Batch, direction: int, *, normalised: bool) -> Rule:
        """See `Denominator.rule`."""
        self.check_width(batch.anchors.shape[1])
        return _Visit(
            start=self.log_weight[direction, batch.rows].to(batch.anchors.dtype),
            positive=batch.similarity(direction),
            layout=Layout.of(len(batch.anchors), len(batch.others(direction)), batch.anchors.device),
            burn_in=self.burn_in,
            seed=(self.seed * 2 + direction) * 1_000_003 + int(self.num_steps),
        )

    def ask(self, side: Side, batch: Batch, direction: int) -> Side:
        """See `Part.ask`."""
        assert isinstance(side.rule, _Visit)
        side.rule.temperature = side.temperature.detach()
        return replace(side, adjust=side.rule.run)

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """See `Part.learn`."""
        if not batch.updating:
            return loss
        self.num_steps += 1
        self.embedding_width.fill_(batch.anchors.shape[1])
        for direction, side in enumerate(sides):
            assert isinstance(side.rule, _Visit)
            self._keep(batch, side.rule, direction)
        return loss

    def _keep(self, batch: Batch, visit: _Visit, direction: int) -> None:
        """Store where the chains of all ranks' rows ended."""
        sizes = visit.layout.row_sizes
        rows = distributed.gather_rows(batch.rows, sizes)
        ends = distributed.gather_rows(visit.state, sizes).to(self.log_weight.dtype)
        last = last_places(rows)  # of several chains of a row the last one goes on
        rows, ends = rows[last], ends[last]
        # A step that has diverged leaves no state that nothing could replace.
        self.log_weight[direction, rows] = torch.where(ends.isfinite(), ends, self.log_weight[direction, rows])


class _Visit:
    """Runs the chains of a tile's rows, each once: the weights of negatives are then shares of its steps. The objective
    is what the batch said before. `state` (B,) is where the chains are, NaN if not started.
    """

    row_wise = True
    temperature: Tensor

    def __init__(self, *, start: Tensor, positive: Tensor, layout: Layout, burn_in: float, seed: int) -> None:
        self.state, self.positive, self.layout, self.burn_in = start.clone(), positive, layout, burn_in
        self.batch_log_sum = torch.full_like(start, -torch.inf)
        # Columns in an order that does not depend on how they are spread over ranks: positives, then explicit
        # negatives.
        num_columns = sum(layout.column_sizes)
        places = torch.full((num_columns,), -1, device=start.device)
        num_positives = sum(layout.row_sizes)
        places[layout.positive_columns] = torch.arange(num_positives, device=start.device)
        places[places < 0] = torch.arange(num_positives, num_columns, device=start.device)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(num_columns, generator=generator).to(start.device)
        self.order = torch.argsort(places)[order]
        self.columns = self.order.tolist()
        self.draws = torch.randint(2**62, (2,), generator=generator).tolist()

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        objective = self.batch_log_sum[rows]
        return Answer(torch.zeros_like(log_sum), torch.where(objective.isneginf(), 0.0, objective))

    def run(self, rows: slice, scores: Tensor, logits: Tensor) -> Tensor:
        """See `Adjust`."""
        self.batch_log_sum[rows] = logits.logsumexp(dim=1)
        # Logits are relative to this visit's positive, the state is not: it was left behind by an earlier one.
        proposals = (logits + (self.positive[rows] / self.temperature)[:, None])[:, self.order].T.contiguous()
        offered = ~proposals.isneginf()
        log_uniform = self._uniform(rows, len(self.order), scores.device).to(scores.dtype).log_().T
        enough = torch.where(offered, proposals - log_uniform, torch.nan)  # no comparison with NaN is true
        state = self.state[rows].nan_to_num(-torch.inf)  # a chain that has not started accepts what comes first
        place = torch.full((len(state),), -1, device=state.device)
        places = place.new_empty(proposals.shape)
        for step, column in enumerate(self.columns):
            accepted = enough[step] >= state
            state = torch.where(accepted, proposals[step], state)
            place = torch.where(accepted, column, place)
            places[step] = place
        self.state[rows] = torch.where(state.isneginf(), torch.nan, state)
        count = offered.sum(dim=0)
        counted = offered & (offered.cumsum(dim=0) > self.burn_in * count)
        total = counted.sum(dim=0).clamp(min=1)
        shares = (counted & (places >= 0)).to(logits.dtype) / total
        visits = torch.zeros_like(logits).scatter_add_(1, places.clamp(min=0).T, shares.T)
        return visits.log_()

    def _uniform(self, rows: slice, num_steps: int, device: torch.device) -> Tensor:
        """(b, num_steps) numbers in (0, 1) by the row's place among all ranks' rows, whatever rank and tile."""
        row = torch.arange(rows.start, rows.stop, device=device) + self.layout.own_rows.start
        step = torch.arange(num_steps, device=device)
        mixed = (row[:, None] * 0x9E3779B97F4A7C1 + self.draws[0]) ^ (step[None] * 0x2545F4914F6CDD1D + self.draws[1])
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB), (31, 1)):
            mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor  # wraps around, as hashes do
        return ((mixed & ((1 << 23) - 1)).float() + 0.5) / 2**23
