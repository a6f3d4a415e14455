"""The methods of the core: InfoNCE, its two corrections, and SogCLR. Each a composition."""

from __future__ import annotations

from typing import ClassVar, Unpack, final

from anybatch.core.configuration import NotNegative, Share
from anybatch.losses.base import OneTemperature, SoftmaxLoss
from anybatch.losses.denominators import (
    CountCorrected,
    PositiveWeight,
    Reference,
    RunningDenominator,
    WithoutPositive,
    WithPositive,
)
from anybatch.losses.gamma import Gamma


@final
class InfoNCE(SoftmaxLoss):
    """The batch's own softmax: cross-entropy of the positive among the candidates.

        log_denominator_i = logaddexp(log_sum_i, 0)
        loss = mean_i log(1 + sum_j exp((s_ij - s_ip) / tau + b_ij))

    When: transformers on mined batches: recommended; the baseline; large batches. When not: small random batches, where
    its gradient is biased. Evidence: docs/recipe.md.

    Args:
        scoring: See `OneTemperature`.

    Log-weights are added to the logits as they are.

    Cost: no state. Reference: van den Oord et al. 2018, "Representation Learning with Contrastive
    Predictive Coding", arXiv 1807.03748, equation 4.

    Example:
        >>> import torch
        >>> loss = InfoNCE(temperature=0.1)
        >>> anchors, positives = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss(anchors, positives).backward()
        >>> anchors.grad.shape
        torch.Size([8, 16])
    """

    def __init__(self, **scoring: Unpack[OneTemperature]) -> None:
        super().__init__(None, WithPositive(), **scoring)


@final
class DecoupledInfoNCE(SoftmaxLoss):
    """InfoNCE without the positive in the denominator, which takes away its weight on easy positives in small batches.

        log_denominator_i = log_sum_i

    When: small batches, where the number of rows is not known. Evidence: docs/log.md, what training says.

    Args:
        scoring: See `OneTemperature`.

    An anchor without any negative contributes 0.

    Cost: no state. Reference: Yeh et al. 2022, "Decoupled Contrastive Learning", arXiv 2110.06848, equation 6.

    Example:
        >>> import torch
        >>> round(DecoupledInfoNCE(temperature=0.5)(torch.eye(2), torch.eye(2)).item(), 6)
        -2.0
    """

    lacks: ClassVar = {"positives_by": "has no positive in its denominator, and so no place for several"}

    def __init__(self, **scoring: Unpack[OneTemperature]) -> None:
        super().__init__(None, WithoutPositive(), **scoring)


@final
class CountCorrectedInfoNCE(SoftmaxLoss):
    """InfoNCE over the whole data set, estimated from the batch: each of its k candidates but the positive stands for
    (n - 1) / k rows.

        log_denominator_i = logaddexp(log_mean_i + log(n - 1), 0),   log_mean_i = log_sum_i - log k

    A masked candidate counts in k and adds nothing to the sum, as in the data set. With normalised log-weights (mined
    batches: `RowTable(weights="inclusion")`) log_mean_i is the weighted log-sum itself. No memory is needed.

    When: transformers on random batches, and batches above 256: recommended. When not: mined batches without inclusion
    weights. Evidence: docs/recipe.md.

    Args:
        num_rows: n, rows of the data set.
        scoring: See `OneTemperature`.

    Cost: no state. Reference: SogCLR's estimator with gamma = 1, eps = 1 / (n - 1); Yuan et al. 2022, "Provable
    Stochastic Optimization for Global Contrastive Learning", arXiv 2202.12387.

    Example:
        >>> import torch
        >>> loss = CountCorrectedInfoNCE(1000)
        >>> loss.grow(2000)
        >>> loss(torch.randn(8, 16), torch.randn(8, 16)).ndim
        0
    """

    def __init__(self, num_rows: int, **scoring: Unpack[OneTemperature]) -> None:
        super().__init__(None, CountCorrected(num_rows), **scoring)


@final
class SogCLR(SoftmaxLoss):
    """The objective over all data, followed from small batches.

        v_i <- (1 - gamma) v_i + gamma / k * sum over the batch's negatives of exp(s_ij / tau)
        u_i  = v_i / exp(s_ip / tau)
        loss = mean_i log(eps + u_i)
        gradient weight of negative j, in s_ij / tau:    exp((s_ij - s_ip) / tau) / (k (eps + u_i))
                    and of the positive, in s_ip / tau:  minus their sum, or -u_i / (eps + u_i)

    in the log domain; k are the candidates but the positive, of which masked ones add nothing. With normalised
    log-weights (mined batches) the mean is the weighted sum. The published loss is tau times this. Gradients, that of a
    learnable temperature too, are those with u_i held. gamma = 1 gives, without memory, InfoNCE for eps = 1 / k,
    decoupled InfoNCE for eps = 0 and count-corrected InfoNCE for eps = 1 / (n - 1) (the values differ by a constant).

    When: small batches and many visits of each row. When not: one to three passes, where there is little to average.
    Evidence: at eight visits level with the count correction; docs/log.md, what training says.

    Args:
        num_rows: n, rows of the data set.
        gamma: Weight of the new batch, in (0, 1], or a `GammaSchedule`. Published: .9 constant; FastCLIP lowers it to
            .2 along a cosine.
        eps: Added to u_i; None for 1 / (n - 1), the full-data InfoNCE; 0 is SogCLR's own objective.
        state: "absolute" as above, released for images. "relative", released for two modalities: the moving average is
            of exp((s_ij - s_ip) / tau), which goes stale as the positive moves.
        positive: "batch", released for two modalities: minus the sum of what the batch's negatives receive, balanced
            also where u_i is stale. "exact", released for images: -u_i / (eps + u_i), less noisy where embeddings stand
            still. None for what trained better (docs/log.md): exact beside an absolute state with a learned
            temperature, else of the batch.
        scoring: See `OneTemperature`.

    Calls need `index`. Cost: 4 bytes a row and direction, 8 if the temperature is learned. Reference: Yuan et al. 2022,
    "Provable Stochastic Optimization for Global Contrastive Learning", arXiv 2202.12387, algorithm 1.

    Example:
        >>> import torch
        >>> loss = SogCLR(1000, gamma=0.8)
        >>> value = loss(torch.randn(8, 16), torch.randn(8, 16), index=torch.arange(8))
        >>> int(loss.denominator.visited.sum())
        8

        Images without labels, as released: each view against all others of both views, one state an image.

        >>> images = SogCLR(1000, gamma=0.9, eps=0.0, positive="exact", temperature=0.1)
        >>> first, second = torch.randn(2, 8, 16, requires_grad=True)
        >>> index = torch.arange(8).repeat(2)  # an image's other view is its positive, and no negative
        >>> images(torch.cat([first, second]), torch.cat([second, first]), index=index).backward()
        >>> images.last_stats["num_negatives"]  # 2 B - 2
        14.0
    """

    denominator: RunningDenominator

    def __init__(
        self,
        num_rows: int,
        *,
        gamma: Share | Gamma = 0.9,
        eps: NotNegative | None = None,
        state: Reference = "absolute",
        positive: PositiveWeight | None = None,
        **scoring: Unpack[OneTemperature],
    ) -> None:
        learned = self.scoring(scoring)["learnable_temperature"]
        positive = positive if learned or positive is not None else "batch"
        running = RunningDenominator(
            num_rows, self.num_directions(scoring), gamma=gamma, eps=eps, state=state, positive=positive, moving=learned
        )
        super().__init__(None, running, **scoring)
