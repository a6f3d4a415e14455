"""The few figures that decide whether a plan's batches help: softmax mass, suspected false negatives, gradient error.

A plan stores clusters and suspected pairs, not scores: all figures follow from a teacher's embeddings again, on a
sample of anchors, each data set ranked by itself as in mining, and beside random batches of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.insight.gradient_error import NUM_BATCHES, FrozenPairs, GradientError
from anybatch.insight.gradient_methods import ERRORS, error_cells, method_error, name_of, on_random_batches
from anybatch.losses.registry import LossConfig
from anybatch.mining.audit import advice
from anybatch.mining.config import MARGIN
from anybatch.mining.inputs import check_embeddings, compact_ids
from anybatch.plans.plan import BatchPlan

SHOWN = 20  # pairs kept, the most suspected first
LOOKED_AT = 200  # pairs of a block of anchors, of which many may have the same two positives
BLOCK = 2**22  # scores held at once


@dataclass(frozen=True, kw_only=True)
class RowPair:
    """A negative in the batch of `row`, which may be right as well.

    Attributes:
        row, other: Row numbers.
        score: The cosine of `row`'s anchor with `other`'s positive over that with its own.
    """

    row: int
    other: int
    score: float


@dataclass(frozen=True, kw_only=True)
class BatchMass:
    """Where the negatives' softmax mass is, exp(s_ij / tau) over its sum over all rows that are negatives of i.

    Attributes:
        in_cluster, in_batch: Share in the anchor's own cluster, and in its batch, hard negatives included.
        masked: Share that the plan suspects to be false negatives, wherever it is; `loss.mask_suspects` removes it.
        suspects: Negatives in the batch that the plan suspects; of a plan that did not look for them, those that score
            above `MARGIN` of the own positive.
    """

    in_cluster: float
    in_batch: float
    masked: float
    suspects: float


@dataclass(frozen=True, kw_only=True)
class PlanInspection:
    """What `inspect_plan` measured of one data set.

    Attributes:
        num_anchors: Anchors looked at, drawn at random from those in the batches of epoch 0.
        own_first: Share of anchors whose own positive the teacher scores above every negative of the data set.
        planned, random: In the plan's batches, and expected of random ones of the same size.
        suspects: The negatives in the plan's batches that score highest against the own positive (of the same two
            positives one pair), above `MARGIN` or not.

    Example:
        >>> embeddings = np.random.default_rng(0).normal(size=(2, 64, 8))
        >>> seen = inspect_plan(BatchPlan.random(64, 8), *embeddings)[""]
        >>> seen.num_anchors, round(seen.random.in_batch, 3)  # 7 of 63 others
        (64, 0.111)
    """

    num_anchors: int
    own_first: float
    planned: BatchMass
    random: BatchMass
    suspects: list[RowPair]


@dataclass(frozen=True, kw_only=True)
class PlanGradients:
    """The parameter-gradient error of one loss on the plan's batches and on random ones of the same size.

    Attributes:
        loss: The method, in the words of the configuration.
        planned, random: See `GradientError`.

    Example:
        >>> pairs = FrozenPairs.prepare(*np.random.default_rng(0).normal(size=(2, 32, 8)))
        >>> clusters = np.repeat(np.arange(8), 4).astype(np.int32)
        >>> plan = BatchPlan(
        ...     num_rows=32, batch_size=8, cluster_size=4, cluster=clusters, seed=0, data_digest=""
        ... )
        >>> PlanGradients.measure(pairs, plan, LossConfig(name="infonce")).loss
        'infonce'
    """

    loss: str
    planned: GradientError
    random: GradientError

    @classmethod
    def measure(
        cls, pairs: FrozenPairs, plan: BatchPlan, loss: LossConfig, *, num_batches: int = NUM_BATCHES
    ) -> PlanGradients:
        """See `method_error`; where the loss masks suspects, `pairs` were prepared without them too.

        Raises:
            AnybatchError: They were not.
        """
        masks = loss.mask_suspects is True and plan.suspects is not None
        if masks != (pairs.suspects is not None):
            raise AnybatchError(
                f"The loss has mask_suspects={loss.mask_suspects}, and the full-data gradient is "
                f"{'with' if masks else 'without'} the suspects. Make both alike: FrozenPairs.prepare(..., "
                f"suspects={'plan.suspects' if masks else None})."
            )
        random = on_random_batches(pairs, plan, loss, num_batches=num_batches)
        chosen = plan.cluster_size > 1 or plan.negatives_per_row
        planned = method_error(pairs, plan, loss, num_batches=num_batches) if chosen else random
        return cls(loss=name_of(loss), planned=planned, random=random)

    @property
    def loses(self) -> bool:
        """Whether an epoch's error is higher than on random batches, by two standard errors."""
        spread = math.hypot(self.planned.epoch_error_se, self.random.epoch_error_se)
        return self.planned.epoch_error - self.random.epoch_error > 2 * spread


def inspect_plan(
    plan: BatchPlan,
    anchor_embeddings: np.ndarray,
    positive_embeddings: np.ndarray,
    *,
    anchor_id: np.ndarray | None = None,
    positive_id: np.ndarray | None = None,
    temperature: float = 0.05,
    num_anchors: int = 2000,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, PlanInspection]:
    """Where the negatives' softmax mass is under a teacher's scores, and how many may be false.

    Args:
        plan: Mined or random.
        anchor_embeddings, positive_embeddings: (n, D) float, the teacher's; may be memory-mapped.
        anchor_id, positive_id: (n,) int; equal for identical texts, which are no negatives of each other. None: all
            differ.
        temperature: Of the softmax.
        num_anchors: Anchors looked at in each set; a share measured on 2,000 of them has a standard error of at most
            1.1 points.
        seed: Of the draw.
        progress: Called with the fraction done.

    Returns:
        What was measured, by the data set's name, "" where the plan has one. Sets of which no row is in a batch are
        left out.

    Raises:
        AnybatchError: Embeddings of another number of rows, or that cannot be ranked; a temperature or number of
            anchors below 1.

    Cost, summed over sets of n rows: num_anchors * n * D multiplications.
    """
    check_embeddings("anchor", anchor_embeddings, plan.num_rows)
    check_embeddings("positive", positive_embeddings, plan.num_rows)
    if not 0 < temperature < np.inf or num_anchors < 1:
        raise AnybatchError(
            f"The temperature is {temperature} and the number of anchors {num_anchors}; expected above 0, and at least "
            "1."
        )
    ids = compact_ids(plan.num_rows, anchor_id=anchor_id, positive_id=positive_id)
    batches = plan.epoch_batches(0)
    home = np.full(plan.num_rows, -1)
    home[batches] = np.arange(len(batches))[:, None]
    shown = {name: rows for name, rows in plan.set_rows.items() if (home[rows] >= 0).any() and len(rows) > 1}
    return {
        name: _inspect_set(
            plan, batches, home, members, (anchor_embeddings, positive_embeddings), ids, temperature, num_anchors, seed,
            lambda done, place=place: progress((place + done) / len(shown)) if progress else None,
        )
        for place, (name, members) in enumerate(shown.items())
    }  # fmt: skip


def _inspect_set(
    plan: BatchPlan,
    batches: np.ndarray,
    home: np.ndarray,
    members: np.ndarray,
    sides: tuple[np.ndarray, np.ndarray],
    ids: tuple[np.ndarray, ...],
    temperature: float,
    num_anchors: int,
    seed: int,
    progress: Callable[[float], None],
) -> PlanInspection:
    """`members`: the rows that are ranked among each other, ascending; `home`: each row's batch, -1 for none."""
    # 1. Some anchors, and what the plan says of their rows.
    placed = members[home[members] >= 0]
    chosen = np.sort(np.random.default_rng(seed).choice(placed, min(num_anchors, len(placed)), replace=False))
    positives = _unit(sides[1][members])
    suspected = _suspected(plan, ids[1])
    sums, pairs, near, above, first = np.zeros(3), [], 0, 0, 0
    height = max(1, BLOCK // len(members))
    for start in range(0, len(chosen), height):
        # 2. The softmax over each anchor's negatives.
        rows = chosen[start : start + height]
        scores = _unit(sides[0][rows]) @ positives.T
        own = scores[np.arange(len(rows)), np.searchsorted(members, rows)][:, None]
        negative = np.logical_and.reduce([side[rows][:, None] != side[members] for side in ids])
        best = np.where(negative, scores, -np.inf).max(axis=1, keepdims=True)
        mass = np.exp(np.where(negative, (scores - np.maximum(best, -2)) / temperature, -np.inf))
        mass /= np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)  # 0 where an anchor has no negative
        # 3. Which of them share the cluster, the batch, and are suspected.
        in_cluster = (plan.cluster[rows][:, None] == plan.cluster[members]) & (plan.cluster[rows] >= 0)[:, None]
        in_batch = home[rows][:, None] == home[members]
        if plan.negatives is not None:
            for place, row in enumerate(rows):
                brought = plan.negatives[batches[home[row]]]
                in_batch[place] |= np.isin(members, brought[brought >= 0])
        ratio = np.where(negative & (own > 0), scores / own, -np.inf)
        may_be_right = ratio >= MARGIN
        if suspected is not None:
            may_be_right = suspected[rows][:, ids[1][members]].toarray() & negative
            sums[2] += float(mass[may_be_right].sum())
        sums[:2] += float(mass[in_cluster].sum()), float(mass[in_batch].sum())
        first += int((best[:, 0] <= own[:, 0]).sum())
        above += int(may_be_right.sum())
        near += int((may_be_right & in_batch).sum())
        line, column = np.nonzero(in_batch & np.isfinite(ratio))
        beside = ratio[line, column]
        most = np.argsort(-beside, kind="stable")[:LOOKED_AT]
        pairs += zip(rows[line[most]], members[column[most]], beside[most], strict=True)
        progress((start + len(rows)) / len(chosen))
    # 4. That a given row of theirs is in an anchor's random batch: by how many of them such a batch holds.
    sizes = np.bincount(home[placed]).astype(np.float64)
    by_chance = float(np.sum(sizes * (sizes - 1))) / len(placed) / (len(members) - 1)
    in_cluster, in_batch, masked = sums / len(chosen)
    return PlanInspection(
        num_anchors=len(chosen),
        own_first=first / len(chosen),
        planned=BatchMass(in_cluster=in_cluster, in_batch=in_batch, masked=masked, suspects=near / len(chosen)),
        random=BatchMass(
            in_cluster=(plan.cluster_size - 1) / (len(members) - 1),
            in_batch=by_chance,
            masked=0.0,
            suspects=above / len(chosen) * by_chance,
        ),
        suspects=_most_suspected(pairs, ids[1]),
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _suspected(plan: BatchPlan, positive_id: np.ndarray) -> sparse.csr_matrix | None:
    """(n, n) by row and text, whoever brings it: what `RowTable` masks. None: the plan did not look for suspects."""
    if plan.suspects is None:
        return None
    rows, others = plan.suspects.T
    entries = np.ones(len(rows), bool), (rows, positive_id[others])
    return sparse.csr_matrix(entries, shape=(plan.num_rows, plan.num_rows))


def _most_suspected(pairs: Sequence[tuple[int, int, float]], positive_id: np.ndarray) -> list[RowPair]:
    """The first `SHOWN`, no two with the same two positives: one caption of many images would fill the list."""
    kinds: dict[frozenset[int], RowPair] = {}
    for row, other, score in sorted(pairs, key=lambda pair: -pair[2]):
        kind = frozenset(map(int, positive_id[[row, other]]))
        kinds.setdefault(kind, RowPair(row=int(row), other=int(other), score=float(score)))
        if len(kinds) == SHOWN:
            break
    return list(kinds.values())


Figure = tuple[str, str, str, str]  # name, its value in the plan, in random batches, what it is in a sentence


def plan_sizes(plan: BatchPlan) -> list[Figure]:
    """What the plan itself says."""
    stats = plan.stats()
    sizes = {
        "batches an epoch": (f"{plan.num_batches:,} of {plan.batch_size}", "Each row is in one of them at most."),
        "clusters": (
            f"{plan.num_clusters:,} of {plan.cluster_size}",
            f"Rows that always sit together; a batch is {plan.clusters_per_batch} of them, drawn anew every epoch.",
        ),
        "rows that sit out an epoch": (
            f"{stats['rows_left_out_each_epoch']:,}",
            "What does not fill a whole batch; other rows the next epoch.",
        ),
        "suspected pairs": (
            f"{stats['suspect_pairs']:,}",
            "Anchors with a text that mining suspects of being right for them, which loss.mask_suspects removes.",
        ),
    }
    return [(name, value, "", meaning) for name, (value, meaning) in sizes.items()]


def set_figures(seen: PlanInspection) -> list[Figure]:
    """What was measured of one data set."""
    plan, random = seen.planned, seen.random

    def share(name: str, field: str, meaning: str) -> Figure:
        return name, f"{getattr(plan, field):.1%}", f"{getattr(random, field):.1%}", meaning

    mass = "of the negatives' softmax mass over the whole data set under the teacher"
    return [
        share(
            "mass in the cluster", "in_cluster", f"Share {mass} that is in the anchor's own cluster, in every epoch."
        ),
        share("mass in the batch", "in_batch", f"Share {mass} that its batch holds: what mining is for."),
        share("mass masked", "masked", "Share that mining suspects of being right, which loss.mask_suspects removes."),
        (
            "suspected false negatives an anchor",
            f"{plan.suspects:.2f}",
            f"{random.suspects:.2f}",
            f"Negatives in its batch that mining suspects of being right; where it did not look, those that score "
            f"above {MARGIN:g} of the own positive.",
        ),
        (
            "own positive first",
            f"{seen.own_first:.1%}",
            "",
            "How well the teacher knows the pairs: how often the right answer is its best of all rows.",
        ),
    ]


def gradient_figures(gradients: PlanGradients) -> list[Figure]:
    """The parameter-gradient error, against the gradient over all data."""
    cells = zip(ERRORS.items(), error_cells(gradients.planned), error_cells(gradients.random), strict=True)
    of = f"gradient of {gradients.loss}: "
    return [(of + name, plan, random, meaning) for (name, meaning), plan, random in cells]


def plan_warnings(
    plan: BatchPlan,
    seen: PlanInspection | None,
    gradients: PlanGradients | None,
    *,
    mask_suspects: bool = False,
) -> list[str]:
    """What these figures advise against, in words; `mask_suspects`: whether the loss masks suspects already."""
    found = []
    if gradients is not None and gradients.loses:
        planned, random = gradients.planned, gradients.random
        found.append(
            f"This plan is not recommended: with loss.name={gradients.loss} its batches' parameter gradient is further "
            f"from the full-data gradient than that of random batches of {plan.batch_size} (error of an epoch "
            f"{planned.epoch_error:.2f} against {random.epoch_error:.2f}). The anchors of a cluster are alike, so a "
            "batch of few clusters says little of the data. Mine smaller clusters (mining.cluster_size), or use "
            "mining.method=random."
        )
        if planned.bias + planned.bias_se < random.bias - random.bias_se:
            found.append(
                f"Its bias is the smaller one ({planned.bias:.2f} against {random.bias:.2f}), its noise decides "
                f"({planned.noise:.2f} against {random.noise:.2f}): larger batches lower the noise alone."
            )
    if seen is None:
        return found
    planned, random = seen.planned, seen.random
    return found + advice(
        own_first=seen.own_first,
        suspects=planned.suspects,
        masked=planned.masked,
        gain=None if plan.cluster_size == 1 else planned.in_batch / max(random.in_batch, 1e-30),
        mask_suspects=mask_suspects,
    )
