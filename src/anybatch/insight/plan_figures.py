"""The few figures that decide whether a plan's batches help: softmax mass, suspected false negatives, the teacher.
All follow from a teacher's embeddings, on a sample of anchors, each data set ranked by itself, beside random batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.core.files import read_json
from anybatch.insight.figures import Figure
from anybatch.insight.gradient_methods import GradientComparison, is_further
from anybatch.mining.audit import LITTLE_GAIN, MANY_SUSPECTS, MUCH_MASKED, WEAK_TEACHER, advice
from anybatch.mining.config import MARGIN
from anybatch.mining.inputs import check_embeddings, compact_ids
from anybatch.plans.plan import BatchPlan

SHOWN = 20  # pairs kept, the nearest first
LOOKED_AT = 200  # pairs of a block of anchors, of which many may have the same anchor or the same two positives
BLOCK = 2**22  # scores held at once


@dataclass(frozen=True, kw_only=True)
class RowPair:
    """A suspected false negative: the positive of `other`, in the batch of `row`, may answer its anchor as well.

    Attributes:
        row, other: Row numbers.
        own, score: Cosines of `row`'s anchor with its own positive and with `other`'s.
    """

    row: int
    other: int
    own: float
    score: float


@dataclass(frozen=True, kw_only=True)
class BatchMass:
    """Where the negatives' softmax mass is, exp(s_ij / tau) over its sum over all rows that are negatives of i.

    Attributes:
        in_batch: Share in the anchor's batch, hard negatives included.
        masked: Share that the plan suspects to be false negatives, wherever it is; `loss.mask_suspects` removes it.
        suspects: Negatives in the batch that the plan suspects; of a plan that did not look for them, those that score
            above `MARGIN` of the own positive.
    """

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
        suspects: Of the suspected false negatives in the plan's batches the nearest, one an anchor, and of the same two
            positives one pair.

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
    sums, pairs, near, above, first = np.zeros(2), [], 0, 0, 0
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
        # 3. Which of them share the batch, and are suspected.
        in_batch = home[rows][:, None] == home[members]
        if plan.negatives is not None:
            for place, row in enumerate(rows):
                brought = plan.negatives[batches[home[row]]]
                in_batch[place] |= np.isin(members, brought[brought >= 0])
        may_be_right = negative & (own > 0) & (scores >= MARGIN * own)
        if suspected is not None:
            may_be_right = suspected[rows][:, ids[1][members]].toarray() & negative
            sums[1] += float(mass[may_be_right].sum())
        sums[0] += float(mass[in_batch].sum())
        first += int((best[:, 0] <= own[:, 0]).sum())
        above += int(may_be_right.sum())
        line, column = np.nonzero(may_be_right & in_batch)
        near += len(line)
        most = np.argsort(-scores[line, column], kind="stable")[:LOOKED_AT]
        line, column = line[most], column[most]
        pairs += zip(rows[line], members[column], own[line, 0], scores[line, column], strict=True)
        progress((start + len(rows)) / len(chosen))
    # 4. That a given row of theirs is in an anchor's random batch: by how many of them such a batch holds.
    sizes = np.bincount(home[placed]).astype(np.float64)
    by_chance = float(np.sum(sizes * (sizes - 1))) / len(placed) / (len(members) - 1)
    in_batch, masked = (sums / len(chosen)).tolist()
    return PlanInspection(
        num_anchors=len(chosen),
        own_first=first / len(chosen),
        planned=BatchMass(in_batch=in_batch, masked=masked, suspects=near / len(chosen)),
        random=BatchMass(in_batch=by_chance, masked=0.0, suspects=above / len(chosen) * by_chance),
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


def _most_suspected(pairs: Sequence[tuple[int, int, float, float]], positive_id: np.ndarray) -> list[RowPair]:
    """The first `SHOWN`, one an anchor, no two with the same two positives: one caption of many images would fill the
    list.
    """
    shown: list[RowPair] = []
    seen: set[object] = set()
    for row, other, own, score in sorted(pairs, key=lambda pair: -pair[3]):
        keys = int(row), frozenset(map(int, positive_id[[row, other]]))
        if len(shown) < SHOWN and not seen.intersection(keys):
            shown.append(RowPair(row=int(row), other=int(other), own=float(own), score=float(score)))
            seen.update(keys)
    return shown


def plan_sentence(plan: BatchPlan) -> str:
    """What an epoch of it is."""
    chosen = f", each of {plan.clusters_per_batch} clusters of {plan.cluster_size}" if plan.cluster_size > 1 else ""
    left_out = plan.stats()["rows_left_out_each_epoch"]
    rest = f"; {left_out:,} rows that do not fill a batch sit out, other ones each epoch" if left_out else ""
    return f"{plan.num_rows:,} rows; an epoch is {plan.num_batches:,} batches of {plan.batch_size}{chosen}{rest}."


def set_figures(seen: PlanInspection, plan: BatchPlan) -> list[Figure]:
    """What was measured of one data set, with the pass marks of `advice`; of random batches the teacher alone."""
    planned, random = seen.planned, seen.random
    of_teacher = Figure(
        name="own positive first",
        value=f"{seen.own_first:.1%}",
        good=f"{WEAK_TEACHER:.0%} or more",
        passed=seen.own_first >= WEAK_TEACHER,
        why="How often the right answer is the teacher's best of all rows: what it ranks high is only hard if it knows "
        "the pairs. It falls as data grow. A question, no verdict: a weak teacher's batches once trained no worse.",
    )
    if plan.cluster_size == 1:
        return [of_teacher]
    return [
        of_teacher,
        Figure(
            name="softmax mass in the batch",
            value=f"{planned.in_batch:.1%}",
            beside=f"random batches: {random.in_batch:.1%}",
            good=f"{LITTLE_GAIN:g} times random or more",
            passed=planned.in_batch >= LITTLE_GAIN * random.in_batch,
            why="Share of the negatives' softmax mass over the whole data set, under the teacher, that an anchor's "
            "batch holds: what mining is for. Good plans had 20 to 60 times.",
        ),
        Figure(
            name="softmax mass masked",
            value=f"{planned.masked:.1%}",
            good=f"{MUCH_MASKED:.0%} or less",
            passed=planned.masked <= MUCH_MASKED,
            why="Share that mining suspects of being right, which loss.mask_suspects removes: of that the model learns "
            "nothing. Teachers that knew their data had 6% and less.",
        ),
        Figure(
            name="suspected false negatives per anchor",
            value=f"{planned.suspects:.2f}",
            beside=f"random batches: {random.suspects:.2f}",
            good=f"{MANY_SUSPECTS:g} or less",
            passed=planned.suspects <= MANY_SUSPECTS,
            why="Negatives in its batch that mining suspects of being right (where it did not look, those that score "
            f"above {MARGIN:g} of the own positive). Read some of them. Plans at the default had .1 to .4.",
        ),
    ]


def plan_warnings(
    plan: BatchPlan,
    seen: PlanInspection | None,
    gradients: GradientComparison | None = None,
    *,
    mask_suspects: bool = False,
) -> list[str]:
    """What these figures advise against, in words.

    Args:
        plan, seen: The plan, and what was measured of it or of one of its data sets.
        gradients: Of the plan's loss, the last of the methods compared.
        mask_suspects: Whether the loss masks suspects already.
    """
    found = []
    loss = "" if gradients is None else gradients.order[-1]
    planned, random = (None if gradients is None else gradients.of(loss, batches) for batches in ("plan", "random"))
    if planned is not None and random is not None and is_further(planned, random):
        found.append(
            f"This plan is not recommended: with loss.name={loss} its batches' parameter gradient is further from the "
            f"full-data gradient than that of random batches of {plan.batch_size} (error of an epoch "
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
    return found + advice(
        own_first=seen.own_first,
        suspects=seen.planned.suspects,
        masked=seen.planned.masked,
        gain=None if plan.cluster_size == 1 else seen.planned.in_batch / max(seen.random.in_batch, 1e-30),
        mask_suspects=mask_suspects,
    )


def stored_warnings(folder: Path, plan: BatchPlan) -> list[str]:
    """What mining warned of, where that lies in the plan's folder."""
    path = folder / "mining.json"
    stored = read_json(path, "Delete it, or bring back the file that mining wrote.", "plan") if path.exists() else {}
    parts = [stored, *(stored.get("sets") or {}).values()] if stored.get("plan") == plan.digest else []
    return [warning for part in parts for warning in part.get("warnings", ())]
