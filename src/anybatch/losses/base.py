"""What all losses share: arguments checked, embeddings normalised, ids turned into masks, parts asked. A loss is a
composition of `parts`: a final `SoftmaxLoss` whose constructor puts them together.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, Unpack, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from anybatch.core import distributed
from anybatch.core.configuration import NotNegative, Positive, unknown_key
from anybatch.core.errors import AnybatchError
from anybatch.core.ids import as_integers
from anybatch.losses.engine import TILE_BYTES, Side, SoftmaxStats, differentiable_once, softmax_loss
from anybatch.losses.engine.joint import Kind, check_kinds, joint_softmax_loss
from anybatch.losses.log_weights import LogWeights, as_log_weights, behind, plus, same_content, same_row
from anybatch.losses.parts import MIN_TEMPERATURE, Batch, Denominator, GlobalTemperature, Part, Temperature
from anybatch.losses.state import State
from anybatch.plans.examples import Examples

Direction = Literal["one_way", "both"]
F = TypeVar("F", bound=Callable[..., Any])


def outside_the_graph(method: F) -> F:
    """Under `torch.compile` the method runs as it is, between two graphs: it asks for values, and keeps state."""
    # torch.compiler.disable would import the compiler when a class is made.
    return cast(F, torch._disable_dynamo(method))


class Scoring(TypedDict, total=False):
    """Options that all losses share: keywords of their constructors. `DEFAULTS` has their defaults.

    Attributes:
        direction: "one_way": anchors against candidates. "both": the mean of that and of positives against anchors.
        normalize: L2-normalise the embeddings first, in float32 or better.
        tile_bytes: Memory for scores at a time.
        mask_margin: Candidates that score more than this above the own positive, s_ij > s_ip + margin, are suspected
            false negatives, and no negatives. Published: .1 (Qwen3-Embedding); a negative margin masks more.
    """

    direction: Direction
    normalize: bool
    tile_bytes: int
    mask_margin: float | None


class OneTemperature(Scoring, total=False):
    """And those of a loss with one temperature for all rows.

    Attributes:
        temperature: Similarities are divided by it. Seen: .01 to .07 for text, .07 to .1 for images.
        learnable_temperature: Train it, through its logarithm, so that it stays positive.
        min_temperature: A learned temperature is put back to it at the start of a training step, so that its gradient
            stays alive; what is read is never below it.
        joint: Further kinds of pairs in each anchor's softmax, by the names of sentence-transformers' `directions`:
            "query_to_query", the other anchors; "doc_to_query", the own positive against all anchors; "doc_to_doc",
            the own positive against other rows' texts. Qwen3-Embedding: the first and the last, with `mask_margin` .1.
        positives_by: Column of the examples' records ("anchor_id", "text_id", or one given to `RowTable`) whose equal
            values are positives of each other: the mean of their logits is raised (SupCon). None: the own alone.
        hardness: Weigh each negative by exp(hardness s_ij / tau) over the mean of that over the anchor's negatives; 0
            for all alike. Published: .5 to 2 (Robinson et al. 2021, beta).
    """

    temperature: Positive
    learnable_temperature: bool
    min_temperature: float
    joint: tuple[Kind, ...]
    positives_by: str | None
    hardness: NotNegative


DEFAULTS = OneTemperature(
    direction="one_way",
    normalize=True,
    tile_bytes=TILE_BYTES,
    mask_margin=None,
    temperature=0.05,
    learnable_temperature=False,
    min_temperature=MIN_TEMPERATURE,
    joint=(),
    positives_by=None,
    hardness=0.0,
)


class Known(TypedDict, total=False):
    """What a call may say of its examples, see `ContrastiveLoss.forward`."""

    index: Tensor | None
    log_weight: LogWeights | Tensor | None
    anchor_id: Tensor | None
    candidate_id: Tensor | None


class ContrastiveLoss(State):
    """Abstract base of all losses: one call for all of them. A subclass supplies `_of`.

    A constructor refuses values out of range, and options that the loss does not have, with an AnybatchError. What a
    loss remembers is in `state_dict`; it changes once a call, in training mode with gradients enabled.

    Args:
        tau: The temperature; None for one for all rows, made from `scoring`.
        scoring: See `Scoring`; without `tau` `OneTemperature`.

    Example:
        >>> from anybatch.losses import InfoNCE, SogCLR  # two subclasses, asked what they are
        >>> InfoNCE().over_data, SogCLR(1000).over_data
        (False, True)
    """

    # Shared options whose default is another one here; those that this loss does not have, and why.
    defaults: ClassVar[OneTemperature] = {}
    lacks: ClassVar[Mapping[str, str]] = {}
    weighs_pairs: ClassVar[bool] = False  # over the data though it has no denominator
    # For the rooms that use losses by name: of an option with a few values, the options that each value leaves unused.
    unused: ClassVar[Mapping[str, Mapping[str, tuple[str, ...]]]] = {}

    def __init__(self, tau: Temperature | None = None, **scoring: Unpack[OneTemperature]) -> None:
        super().__init__()
        self._refuse_unknown(scoring, OneTemperature if tau is None else Scoring)
        chosen = self.scoring(scoring)
        if chosen["direction"] not in ("one_way", "both"):
            raise AnybatchError(f"direction is {chosen['direction']!r}; expected 'one_way' or 'both'.")
        margin = chosen["mask_margin"]
        if margin is not None and not math.isfinite(margin):
            raise AnybatchError(f"mask_margin is {margin}; expected a number such as 0.1, or None to mask nothing.")
        check_kinds(chosen["joint"], chosen["direction"])
        _check_one_of(chosen)
        if tau is None:
            limits = (chosen["min_temperature"], math.inf)
            tau = GlobalTemperature(chosen["temperature"], learnable=chosen["learnable_temperature"], limits=limits)
        self.temperatures = tau
        self.direction: Direction = chosen["direction"]
        self.normalize, self.tile_bytes = chosen["normalize"], chosen["tile_bytes"]
        self.mask_margin: float | None = margin
        self.joint: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind in chosen["joint"])
        self.positives_by: str | None = chosen["positives_by"]
        self.hardness: float = chosen["hardness"]

    @classmethod
    def scoring(cls, given: Scoring) -> dict[str, Any]:
        """The shared options: those given, and this loss's defaults of the others."""
        return {**DEFAULTS, **cls.defaults, **given}

    @classmethod
    def num_directions(cls, given: Scoring) -> int:
        """States that a row has."""
        return 2 if cls.scoring(given)["direction"] == "both" else 1

    def _refuse_unknown(self, given: Mapping[str, Any], shared: type) -> None:
        name, known = type(self).__name__, shared.__annotations__.keys() - self.lacks.keys()
        for key in sorted(given.keys() - known):
            if key in self.lacks:
                raise AnybatchError(f"{key} is given, and {name} {self.lacks[key]}. Remove it.")
            own = inspect.signature(type(self)).parameters.values()
            own = {parameter.name for parameter in own if parameter.kind is parameter.KEYWORD_ONLY}
            raise unknown_key(f"{name}.{key}", key, sorted(known | own))

    @property
    def directions(self) -> range:
        """0 for anchors against candidates, and 1 for positives against anchors if it has them."""
        return range(self.num_directions({"direction": self.direction}))

    @property
    def over_data(self) -> bool:
        """Whether the loss stands for the data set, so that inclusion log-weights mean something to it."""
        return self.weighs_pairs or any(isinstance(part, Denominator) and part.over_data for part in self._parts)

    @property
    def temperature(self) -> float:
        """The temperature at this moment; where rows differ a mean."""
        return self.temperatures.value

    @property
    @abstractmethod
    def last_stats(self) -> dict[str, float]:
        """Figures of the last call as plain floats. Empty before it."""

    @abstractmethod
    def _of(self, batch: Batch) -> Tensor:
        """The loss of a batch that is checked and normalised."""

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
            index: (B,) int rows of the data set; needed by losses with memory. Rows of one number have one content, and
                are no negatives.
            log_weight: b_ij: `LogWeights`, or a tensor broadcastable to (B, M); -inf removes a pair.
            anchor_id: (B,) int, 0 or more; equal for identical anchors. Goes with `candidate_id`.
            candidate_id: (M,) int; equal for identical candidates.

        Returns:
            Scalar, float32 (float64 for float64 embeddings), differentiable in the embeddings and the temperature.

        Raises:
            AnybatchError: Shapes, types or devices that do not fit, a negative anchor_id, an index that is missing or
                out of range; in the backward pass: a second derivative.

        Cost and collectives: see `engine`, and with `index` two gathers of it; none in the backward pass.
        """
        known = Known(index=index, log_weight=log_weight, anchor_id=anchor_id, candidate_id=candidate_id)
        return differentiable_once(self._of(self._prepare(anchors, candidates, **known)))

    @property
    def _parts(self) -> list[State]:
        return [part for part in self.children() if isinstance(part, State)]

    def _side(self, denominator: Denominator, batch: Batch, direction: int) -> Side:
        """What the engine is asked in one direction, before other parts change it."""
        weight = batch.log_weight_of(direction)
        rule = denominator.rule(batch, direction, normalised=weight is not None and weight.normalised)
        temperature = self.temperatures.of(batch, direction)
        further = {"mask_margin": self.mask_margin, "hardness": self.hardness}
        return Side(rule=rule, temperature=temperature, log_weight=weight, **further)

    def _prepare(self, anchors: Tensor, candidates: Tensor, **known: Unpack[Known]) -> Batch:
        """The arguments of `forward`, checked, in float32 or better, ids turned into masks."""
        dtype = check_embeddings(anchors, candidates)
        fitting = anchors.ndim == candidates.ndim == 2 and anchors.shape[1] == candidates.shape[1]
        if not fitting or len(candidates) < len(anchors):
            raise AnybatchError(
                f"anchors have shape {tuple(anchors.shape)} and candidates {tuple(candidates.shape)}; expected (B, D) "
                "and (M, D) with M >= B: the positives in the anchors' order, then explicit negatives."
            )
        anchors, candidates = anchors.to(dtype), candidates.to(dtype)
        if self.normalize:
            anchors, candidates = (nn.functional.normalize(side, dim=1) for side in (anchors, candidates))
        index = self._rows_of(known.get("index"), anchors)
        weight = self._weights(anchors, candidates, index, known)
        updating = self.training and torch.is_grad_enabled()
        return Batch(anchors=anchors, candidates=candidates, index=index, log_weight=weight, updating=updating)

    def _rows_of(self, index: Tensor | None, anchors: Tensor) -> Tensor | None:
        """The index, checked, as int64."""
        if index is None:
            if any(part.needs_index for part in self._parts):
                raise AnybatchError("This loss remembers each row: give index=, the batch's row numbers in the data.")
            return None
        known = next((part.num_rows for part in self._parts if part.num_rows is not None), None)
        high = None if known is None else known - 1
        remedy = "Make the loss with the num_rows of this data set." if known else "Give row numbers."
        return as_integers("index", index, length=len(anchors), device=anchors.device, low=0, high=high, remedy=remedy)

    def _weights(self, anchors: Tensor, candidates: Tensor, index: Tensor | None, known: Known) -> LogWeights | None:
        """All log-weights and masks."""
        num_rows, num_columns, device = len(anchors), len(candidates), anchors.device
        anchor_id, candidate_id, log_weight = known.get("anchor_id"), known.get("candidate_id"), known.get("log_weight")
        if (anchor_id is None) != (candidate_id is None):
            raise AnybatchError("anchor_id and candidate_id go together; one of them is missing.")
        weights = None if log_weight is None else as_log_weights(log_weight, num_rows, num_columns)
        if anchor_id is not None and candidate_id is not None:
            remedy = "-1 marks explicit negatives, which have no anchor."
            anchor_id = as_integers("anchor_id", anchor_id, length=num_rows, device=device, low=0, remedy=remedy)
            candidate_id = as_integers("candidate_id", candidate_id, length=num_columns, device=device)
            owner = behind(anchor_id, num_columns)
            weights = plus(weights, num_rows, same_content, anchor_id=owner, text_id=candidate_id)
        if index is not None:
            rows = distributed.gather_rows(index, distributed.gather_sizes(num_rows, device))
            masks = (same_row,) if len(rows.unique()) < len(rows) else ()  # of all ranks, and so the same on each
            if masks or weights is not None:
                weights = plus(weights, num_rows, *masks, row=behind(index, num_columns))
        if self.positives_by is not None:
            weights = weights or LogWeights(queries=Examples(), candidates=Examples())
            _ = weights.candidates[self.positives_by]  # says what is missing
            weights = replace(weights, positives_by=self.positives_by)
        return weights


class SoftmaxLoss(ContrastiveLoss):
    """A softmax with a denominator of one's choice. A method is a final subclass whose constructor gives the parts.

        L_i      = log-sum over the batch's negatives of exp(logit_ij),   logit_ij = (s_ij - s_ip) / tau_i + b_ij
        loss     = mean_i objective_i,    (log_denominator_i, objective_i) = denominator(L_i)
        gradient = exp(logit_ij - log_denominator_i) / tau_i for negative j, the denominator's word for the positive

    Args:
        tau, denominator: The parts that every such loss has; for `tau` see `ContrastiveLoss`.
        others: Parts that change the logits, in their order.
        scoring: See `Scoring`.

    Example:
        >>> import torch
        >>> from anybatch.losses.denominators import WithPositive
        >>> loss = SoftmaxLoss(None, WithPositive(), temperature=0.05)  # InfoNCE
        >>> round(loss(torch.eye(4), torch.eye(4)).item(), 6)
        0.0
    """

    def __init__(
        self, tau: Temperature | None, denominator: Denominator, *others: Part, **scoring: Unpack[OneTemperature]
    ) -> None:
        super().__init__(tau, **scoring)
        self.denominator = denominator
        self.others = nn.ModuleList(others)
        self._last: tuple[Tensor, SoftmaxStats, Tensor] | None = None

    @property
    def last_stats(self) -> dict[str, float]:
        """Figures of the last call: objective, log_denominator, negatives per anchor, temperature. Empty before it."""
        return {} if self._last is None else figures_of(*self._last)

    def _of(self, batch: Batch) -> Tensor:
        # 1. What the engine is asked: each part in turn, in each direction.
        parts = cast(tuple[Part, ...], (self.temperatures, self.denominator, *self.others))
        sides = tuple(self._side(self.denominator, batch, direction) for direction in self.directions)
        for part in parts:
            sides = tuple(part.ask(side, batch, direction) for direction, side in enumerate(sides))
        # 2. The loss and its gradients.
        embeddings = batch.anchors, batch.candidates
        if self.joint:
            how = {"over_data": self.over_data, "repeated": getattr(sides[0].rule, "repeated", None)}
            loss, stats = joint_softmax_loss(*embeddings, sides[0], self.joint, tile_bytes=self.tile_bytes, **how)
        else:
            loss, stats = softmax_loss(*embeddings, *sides, tile_bytes=self.tile_bytes)
        # 3. Each part learns.
        for part in parts:
            loss = part.learn(batch, sides, stats, loss)
        self._last = loss.detach(), stats[0], torch.cat([side.temperature.detach().view(-1) for side in sides])
        return loss


def _check_one_of(chosen: Mapping[str, Any]) -> None:
    """Refuse a negative hardness, and options that have no meaning beside each other."""
    if not 0 <= chosen["hardness"] < math.inf:
        raise AnybatchError(f"hardness is {chosen['hardness']}; expected a number of 0 or more, such as 1.0.")
    given = [name for name in ("joint", "positives_by", "hardness") if chosen[name]]
    if len(given) > 1:
        raise AnybatchError(
            f"{' and '.join(f'{name}={chosen[name]!r}' for name in given)} are given; expected at most one of joint, "
            "positives_by and hardness. Leave out the others; for several positives among both views of a batch see "
            "docs/outlive.md."
        )


def figures_of(loss: Tensor, stats: SoftmaxStats, temperature: Tensor) -> dict[str, float]:
    """Figures of a call for logs; of temperatures that differ by row the batch's mean."""
    seen = stats.log_denominator[(stats.num_negatives > 0) & stats.log_denominator.isfinite()]
    return {
        "objective": loss.item(),
        "log_denominator": seen.mean().item() if len(seen) else 0.0,
        "num_negatives": stats.num_negatives.mean().item(),
        "temperature": round(temperature.mean().item(), 7),  # 0.05, not its float32
    }


def check_embeddings(anchors: Tensor, candidates: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if either side is, else float32. Refuses what no loss can take."""
    wrong = [type(given).__name__ for given in (anchors, candidates) if not isinstance(given, Tensor)]
    if wrong:
        raise AnybatchError(
            f"A loss got {' and '.join(wrong)}; expected embeddings, tensors (B, D) and (M, D). In "
            "sentence-transformers' Trainer give it inside the model's cached step: loss=CachedLoss(model, loss), from "
            "anybatch.integrations.sentence_transformers."
        )
    if not (anchors.is_floating_point() and candidates.is_floating_point()) or anchors.device != candidates.device:
        raise AnybatchError(
            f"anchors are {anchors.dtype} on {anchors.device} and candidates {candidates.dtype} on "
            f"{candidates.device}; expected floats on one device."
        )
    if torch._C._are_functorch_transforms_active() or any(
        unpack_dual(side).tangent is not None for side in (anchors, candidates)
    ):
        raise AnybatchError(
            "A loss of anybatch does not run inside torch.func's transforms (grad, vmap, jvp, ...) or with "
            "forward-mode derivatives: its gradient is computed in closed form for a backward pass. Use "
            "loss.backward() or torch.autograd.grad."
        )
    return torch.float64 if torch.float64 in (anchors.dtype, candidates.dtype) else torch.float32
