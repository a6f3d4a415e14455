"""SogCLR: the global contrastive objective, with a running denominator for each example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.base import MIN_TEMPERATURE, Batch, ContrastiveLoss, Direction
from anybatch.losses.engine import TILE_BYTES, Rule, Side, SoftmaxStats
from anybatch.losses.memory import ExampleMemory
from anybatch.losses.per_example import Keys
from anybatch.losses.schedule import GammaSchedule


class SogCLR(ContrastiveLoss):
    """The objective over all data, followed from small batches.

        u_i <- (1 - gamma) u_i + gamma / k * sum over the batch's negatives of exp((s_ij - s_ip) / tau)
        loss = mean_i log(eps + u_i),    p_ij = exp((s_ij - s_ip) / tau) / (k (eps + u_i))

    in the log domain; k are the candidates but the positive, of which masked ones add nothing. With normalised log-weights (mined batches) the mean is the weighted sum. The published loss is tau
    times this; with a fixed temperature that is a factor on the learning rate. With a learnable temperature the derivative is
    that of the batch's own term with u_i held, as for the embeddings.

    gamma = 1 gives, without memory, InfoNCE for eps = 1 / k, decoupled InfoNCE for eps = 0 and count-corrected InfoNCE for
    eps = 1 / (n - 1) (gradients; the values differ by a constant).

    Args:
        num_rows: n, rows of the data set.
        gamma: Weight of the new batch, in (0, 1], or a `GammaSchedule`. Published: .9 constant; FastCLIP lowers it to .2 along a cosine.
        eps: Added to u_i; None for 1 / (n - 1), the full-data InfoNCE; 0 is SogCLR's own objective.
        memory: The memory to use, for one that is sharded, in float16 or keyed; None for a plain one.
        temperature, learnable_temperature, min_temperature, direction, normalize, tile_bytes, ring: See `ContrastiveLoss`.

    A memory with keys (`ExampleMemory.from_keys`) holds the absolute log-mean of s_ij / tau, in which rows of one query agree; each row's
    own positive is taken off when it is used. Keys name anchors, so it has one direction.

    Memory is updated once a call, in training mode with gradients enabled, and is part of `state_dict`.

    Raises:
        AnybatchError: gamma or eps out of range; in a call: `index` missing or out of range, embeddings of another width.

    Cost: 4 bytes a row and direction. Reference: Yuan et al. 2022, "Provable Stochastic Optimization for Global Contrastive
    Learning", arXiv 2202.12387, algorithm 1.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        gamma: float | GammaSchedule = 0.9,
        eps: float | None = None,
        memory: ExampleMemory | None = None,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        min_temperature: float = MIN_TEMPERATURE,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
        ring: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            min_temperature=min_temperature,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
            ring=ring,
        )
        if not isinstance(gamma, GammaSchedule) and not 0 < gamma <= 1:
            raise AnybatchError(f"gamma is {gamma}; expected a number above 0 and at most 1, or a GammaSchedule.")
        if eps is not None and eps < 0:
            raise AnybatchError(f"eps is {eps}; expected 0 or more, or None for 1 / (num_rows - 1).")
        num_directions = 2 if direction == "both" else 1
        self.memory = ExampleMemory(num_rows, num_directions) if memory is None else memory
        if (self.memory.num_rows, len(self.memory.log_mean)) != (num_rows, num_directions):
            raise AnybatchError(
                f"The memory is for {self.memory.num_rows} rows and {len(self.memory.log_mean)} direction(s); expected {num_rows} and {num_directions}."
            )
        self.gamma = gamma
        self._eps_follows_rows = eps is None
        self.eps = 1.0 / (num_rows - 1) if eps is None else eps

    needs_index = over_data = inclusion = fillable = True

    @property
    def _known_rows(self) -> int:
        return self.memory.num_rows

    def grow(self, num_rows: int, *, keys: Keys | None = None) -> None:
        """See `ContrastiveLoss.grow`."""
        if keys is not None and len(keys) != num_rows:
            raise AnybatchError(f"num_rows is {num_rows}, and there are {len(keys)} keys; expected one a row.")
        self.memory.grow(num_rows if keys is None else None, keys=keys)
        if self._eps_follows_rows:
            self.eps = 1.0 / (num_rows - 1)

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        self.memory.check(dimensions)
        assert index is not None
        return Remembering(
            memory=self.memory,
            index=index,
            direction=direction,
            gamma=self.gamma.value if isinstance(self.gamma, GammaSchedule) else self.gamma,
            log_eps=math.log(self.eps) if self.eps > 0 else -math.inf,
            normalised=normalised,
            update=self._updating,
            dimensions=dimensions,
        )

    def _side(self, batch: Batch, *, direction: int) -> Side:
        side = super()._side(batch, direction=direction)
        if not self.memory.keyed:
            return side
        if self.direction == "both":
            raise AnybatchError("A memory with keys, which name anchors, has one direction; use direction='one_way'.")
        assert isinstance(side.rule, Remembering)
        similarity = (batch.anchors * batch.candidates[: len(batch.anchors)]).sum(dim=1)
        return replace(side, rule=replace(side.rule, absolute=(similarity / side.temperature).detach()))

    def _finish(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        if self._updating and isinstance(self.gamma, GammaSchedule):
            self.gamma.advance()
        return super()._finish(batch, sides, stats, loss)


@dataclass(frozen=True, kw_only=True)
class Remembering:
    """The rule of SogCLR: a log-mean that remembers, plus eps. `constant` is added to the objective.

    With `absolute`, (B,) the logits of this rank's positives, the memory holds the absolute log-mean. `dropped`, (B,), are candidates that the method
    takes out of the data set, so that the mean is not over them.
    """

    memory: ExampleMemory
    index: Tensor
    direction: int
    gamma: float | Callable[[Tensor], tuple[Tensor, Tensor]]
    log_eps: float
    normalised: bool
    update: bool
    dimensions: int
    constant: float = 0.0
    absolute: Tensor | None = None
    dropped: Tensor | None = None
    row_wise: bool = False  # a row may occur twice in the batch, and then shares its state

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        log_mean, correction = self.remember(log_sum, num_drawn, rows)
        objective = torch.logaddexp(log_mean, torch.full_like(log_mean, self.log_eps))
        return objective + correction, torch.where(objective.isneginf(), 0.0, objective + self.constant)

    def remember(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The rows' running log-means, and the correction that takes a log-mean to a log-sum over the batch. Both (b,)."""
        drawn = num_drawn if self.dropped is None else num_drawn - self.dropped[rows]
        correction = torch.zeros_like(log_sum) if self.normalised else drawn.clamp(min=1).log()
        base = torch.zeros_like(log_sum) if self.absolute is None else self.absolute[rows]
        log_mean = self.memory.blend(
            self.index[rows],
            log_sum - correction + base,
            said=drawn > 0,
            direction=self.direction,
            gamma=self.gamma,
            update=self.update,
            dimensions=self.dimensions,
        ).sub(base)
        return log_mean, correction
