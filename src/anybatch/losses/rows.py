"""What a loss may know of a data-set row: identical texts, clusters. Turns row numbers into arguments of a loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.core.ids import as_ids, as_integers, known_positives, renumbered
from anybatch.losses.base import outside_the_graph
from anybatch.losses.log_weights import Inclusion, ListedPairs, LogWeights, Term, behind, remembered_of_other_tasks
from anybatch.plans.examples import Examples
from anybatch.plans.plan import BatchPlan

Weights = Literal["none", "inclusion"]
RESERVED = (
    *("anchor_id", "text_id", "row", "cluster", "task", "log_ways", "owner"),
    *("remembered", "num_remembered", "pair_number", "pair_side"),
)
NEVER = 1e-300  # a chance whose inverse is still a number


class RowTable(nn.Module):
    """Look-up from row numbers to the arguments `index`, `anchor_id`, `candidate_id` and `log_weight` of a loss.

    Identical texts are never each other's negatives, nor is a text that another row pairs with the same anchor. Rows of
    a mined plan are not a uniform sample of the data, and `weights="inclusion"` corrects for that.

    Args:
        anchor_id, positive_id: (n,) int, 0 or more; equal where these are the same text.
        negative_id: (n, h) int in the id space of `positive_id`, explicit negatives, -1 where a row has fewer; None for
            none.
        plan: Of these rows; needed by `weights="inclusion"` and `mask_suspects`.
        weights: "none", or "inclusion" for one over the chance that a row was put beside the anchor.
        mask_suspects: Pairs that the plan suspects of being false negatives are no negatives. With inclusion weights
            the mean is over the rows that are not suspected.
        columns: (n,) int each: further facts on the rows, by name, for terms of your own. An explicit negative has -1.
        terms: Further masks and weights (`anybatch.losses.log_weights`), functions of the records.

    Raises:
        AnybatchError: Ids that are no integers from 0 on, or of different lengths; a plan that is needed and missing,
            or that is of another number of rows.

    Example:
        >>> import numpy as np, torch
        >>> from anybatch.losses import InfoNCE
        >>> table = RowTable(np.array([0, 0, 1]), np.array([0, 1, 2]))  # rows 0 and 1 share their anchor
        >>> embeddings = torch.eye(3)
        >>> loss = InfoNCE(temperature=1.0)
        >>> value = loss(embeddings, embeddings, **table.arguments(torch.arange(3)))
        >>> round(loss.last_stats["num_negatives"], 3)  # 1, 1 and 2
        1.333

    Cost: 8 bytes a row and id, 16 a suspect pair; a look-up a step, and a binary search a pair of suspects.
    """

    # Buffers, and not persistent: the table is made from data and plan, which have their own files and digests.
    anchor_id: Tensor
    positive_id: Tensor
    negative_id: Tensor
    known: Tensor  # keys of pairs that are positives, of anchors with several
    cluster: Tensor | None
    task: Tensor | None
    log_weights: Tensor | None
    ways: Tensor | None
    way_keys: Tensor | None
    suspects: Tensor | None  # keys of pairs

    def __init__(
        self,
        anchor_id: np.ndarray,
        positive_id: np.ndarray,
        *,
        negative_id: np.ndarray | None = None,
        plan: BatchPlan | None = None,
        weights: Weights = "none",
        mask_suspects: bool = False,
        columns: Mapping[str, np.ndarray] | None = None,
        terms: Sequence[Term] = (),
    ) -> None:
        super().__init__()
        anchors, positives, negatives = _checked_ids(anchor_id, positive_id, negative_id)
        if weights not in get_args(Weights):
            raise AnybatchError(f"weights is {weights!r}; expected one of {', '.join(get_args(Weights))}.")
        if plan is None and (weights == "inclusion" or mask_suspects):
            needing = "weights='inclusion'" if weights == "inclusion" else "mask_suspects"
            raise AnybatchError(f"{needing} needs the plan that made the batches.")
        if plan is not None and plan.num_rows != len(anchor_id):
            raise AnybatchError(
                f"The plan is of {plan.num_rows} rows, the ids of {len(anchor_id)}. Give the plan that was made for "
                "these data."
            )
        if weights == "inclusion" and plan is not None and plan.clusters_per_batch == 1:
            warnings.warn(
                f"A batch of {plan.batch_size} is a single cluster, so rows of other clusters never come and no "
                "weight can stand for them: the loss will follow the clusters, not the data. Use a batch of at least "
                "two clusters.",
                stacklevel=2,
            )
        # 1. Ids and further facts.
        self.plan, self.weights, self.mask_suspects = plan, weights, mask_suspects
        self.columns, self.terms = tuple(columns or ()), tuple(terms)
        self.ragged = bool(negatives.min(initial=0) < 0)  # some rows have fewer explicit negatives than others
        self.width = 1 + int(max(side.max(initial=0) for side in (positives, negatives)))
        known = known_positives(anchors, positives, self.width)
        ids = {"anchor_id": anchors, "positive_id": positives, "negative_id": negatives, "known": known}
        for name, values in ids.items():
            self.register_buffer(name, torch.from_numpy(values), persistent=False)
        for name, values in (columns or {}).items():
            if name in RESERVED or not name.isidentifier():
                raise AnybatchError(
                    f"columns has a column {name!r}; expected a name of letters, digits and underscores that the table "
                    f"does not use itself ({', '.join(RESERVED)}). Choose another."
                )
            facts = torch.from_numpy(as_ids(name, values))
            if facts.shape != self.anchor_id.shape:
                raise AnybatchError(
                    f"columns[{name!r}] has shape {tuple(facts.shape)}; expected one a row, ({len(anchors)},)."
                )
            self.register_buffer(f"column_{name}", facts, persistent=False)
        # 2. Clusters, weights and suspected pairs of the plan.
        for name in ("cluster", "task", "log_weights", "ways", "way_keys", "suspects"):
            self.register_buffer(name, None, persistent=False)
        if plan is None:
            return
        self.cluster = torch.from_numpy(plan.cluster.astype(np.int64))
        self.task = None if plan.task is None else torch.from_numpy(plan.task.astype(np.int64))
        if weights == "inclusion":
            self.log_weights = inclusion_log_weights(plan)
            if negatives.shape[1]:
                self.way_keys, self.ways = _ways(positives, negatives, plan.task, self.width)
        if mask_suspects and plan.suspects is not None:
            self.suspects = suspect_keys(plan.suspects, positives, self.width)
        elif mask_suspects:
            warnings.warn("The plan has no suspects, so there is nothing to mask (mask_suspects).", stacklevel=2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowTable:
        """Casts of a whole model leave the table in the precision of the plan's arithmetic; it only moves."""

        def moved(values: Tensor) -> Tensor:
            changed = fn(values)
            return changed if changed.dtype == values.dtype else values.to(changed.device)

        super()._apply(moved, recurse)
        return self

    @outside_the_graph
    def arguments(self, index: Tensor, *, num_negatives: int = 0, num_candidates: int | None = None) -> dict[str, Any]:
        """Arguments for a batch.

        Args:
            index: (B,) int row numbers.
            num_negatives: Explicit negatives a row in this batch; their columns come one after the other behind the
                positives, each without the rows that lack it.
            num_candidates: M, positives and explicit negatives of the batch, instead of `num_negatives`.
        """
        length, device = index.numel() if isinstance(index, Tensor) else None, self.anchor_id.device
        limits = {"low": 0, "high": len(self.anchor_id) - 1}
        remedy = "Give the rows of the data set that the table was made of."
        index = as_integers("index", index, length=length, device=device, remedy=remedy, **limits)
        if num_candidates is not None:
            num_negatives = self._num_negatives(index, num_candidates)
        elif num_negatives > self.negative_id.shape[1]:
            raise AnybatchError(
                f"The batch has {num_negatives} negatives a row; the table was made for {self.negative_id.shape[1]}."
            )
        negatives = self.negative_id[index, :num_negatives].T.reshape(-1)
        place = torch.arange(len(index), device=index.device).repeat(1 + num_negatives)
        if self.ragged:
            present = negatives >= 0
            negatives, place = negatives[present], torch.cat([place[: len(index)], place[len(index) :][present]])
        arguments: dict[str, Any] = {
            "index": index,
            "anchor_id": self.anchor_id[index],
            "candidate_id": torch.cat([self.positive_id[index], negatives]),
        }
        terms = self._terms()
        if terms or self.ragged:
            examples = self._examples(index, place, arguments["candidate_id"])
            arguments["log_weight"] = LogWeights.of(examples, len(index), *terms)
        return arguments

    def _num_negatives(self, index: Tensor, num_candidates: int) -> int:
        """How many of the table's columns of negatives make up so many candidates."""
        if not self.ragged:
            num_negatives, left = divmod(num_candidates - len(index), max(1, len(index)))
            if not left and num_negatives <= self.negative_id.shape[1]:
                return num_negatives
            known = f"{self.negative_id.shape[1]} a row"
        else:
            totals = len(index) + (self.negative_id[index] >= 0).sum(dim=0).cumsum(dim=0)
            found = (torch.cat([totals.new_tensor([len(index)]), totals]) == num_candidates).nonzero()
            if len(found):
                return int(found[0])
            known = f"{int(totals[-1]) - len(index)} of these rows"
        raise AnybatchError(
            f"The batch has {num_candidates - len(index)} explicit negatives of {len(index)} rows; the table was made "
            f"for {known}. Give a column's rows in the batch's order, without those that lack it."
        )

    def _terms(self) -> list[Term]:
        """What this table knows of negatives, besides identical texts and rows."""
        terms = list(self.terms)
        if self.suspects is not None:
            terms.append(ListedPairs(self.suspects, self.width))
        if len(self.known):
            terms.append(ListedPairs(self.known, self.width, key="anchor_id"))
        if self.log_weights is not None:
            terms.append(Inclusion(self.log_weights))
        elif self.task is not None and self.plan is not None and self.plan.mixing == "within":
            # Says nothing of the batch itself: for a loss that remembers earlier ones, of other data sets.
            terms.append(remembered_of_other_tasks)
        return terms

    def _examples(self, index: Tensor, place: Tensor, candidate_id: Tensor) -> Examples:
        """The record of each pair, and behind them of the explicit negatives that they bring; `place` says which pair
        each candidate is of.

        An explicit negative has the cluster and the data set of its row, as it is certain to be there beside it.
        """
        cluster, task, log_ways = None, None, None
        if self.task is not None:
            task = self.task[index][place]
        if self.log_weights is not None and self.cluster is not None:
            cluster = self.cluster[index]
            cluster = torch.where(cluster < 0, -2 - index, cluster)[place]  # a remainder row belongs to itself
            if self.ways is not None and self.way_keys is not None:
                keys = candidate_id if task is None else task * self.width + candidate_id
                log_ways = self.ways[torch.searchsorted(self.way_keys, keys)].log()
                if len(place) == len(index):  # no row brings another's text here
                    log_ways.zero_()
        further = {name: self.get_buffer(f"column_{name}")[index] for name in self.columns}
        of_pairs = {**further, "anchor_id": self.anchor_id[index], "row": index}
        others = {name: behind(values, len(candidate_id)) for name, values in of_pairs.items()}
        if self.ragged:
            others["owner"] = place.masked_fill(torch.arange(len(place), device=place.device) < len(index), -1)
        return Examples(text_id=candidate_id, cluster=cluster, task=task, log_ways=log_ways, **others)


def _checked_ids(
    anchor_id: np.ndarray, positive_id: np.ndarray, negative_id: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,), (n,) and (n, h) int64; renumbered where products of them would not fit."""
    if negative_id is None:
        negative_id = np.empty((len(anchor_id), 0), np.int64)
    given = {"anchor_id": anchor_id, "positive_id": positive_id, "negative_id": negative_id}
    lowest = {"negative_id": -1}
    anchors, positives, negatives = (as_ids(name, values, low=lowest.get(name, 0)) for name, values in given.items())
    if not anchors.shape == positives.shape == negatives.shape[:1] or negatives.ndim != 2:
        raise AnybatchError(
            f"The ids have shapes {anchors.shape} (anchors), {positives.shape} (positives) and {negatives.shape} "
            "(negatives); expected (n,), (n,) and (n, h): one anchor, one positive and h negatives a row."
        )
    if max(int(side.max(initial=0)) for side in (anchors, positives, negatives)) >= 2**31:
        texts = renumbered(np.concatenate([positives[:, None], negatives], axis=1)) + int(
            min(0, negatives.min(initial=0))
        )
        anchors, positives, negatives = renumbered(anchors), texts[:, 0], texts[:, 1:]
    return anchors, positives, negatives


def inclusion_log_weights(plan: BatchPlan) -> Tensor:
    """Log of one over the chance of sharing a batch, divided by n - 1, for each data set: what `Inclusion` asks for.

        same cluster:   -log(n - 1) - log(chance_same)
        elsewhere:      -log(n - 1) - log(chance_beside)

    With them `sum_j exp(b_ij) x_j` over the batch is an unbiased estimate of the mean of x over the n - 1 other rows,
    to which those of other data sets add nothing: a loss that multiplies it by n - 1 has the sum over the anchor's
    data set. Rows that never come (chance 0) weigh as the same cluster's, as no weight can stand for them.
    Returns (data sets, 2, 6) float64.
    """
    table = []
    log_others = math.log(max(2, plan.num_rows) - 1)
    for number in range(max(1, len(plan.task_names))):
        chances = plan.sampling.chances(number)
        of_set = plan.num_rows if plan.task is None else int((plan.task == number).sum())
        lines = []
        for chance_same, elsewhere, own in (
            (chances.same or 1.0, (chances.other, chances.remainder), plan.cluster_size),  # 0 without clusters
            (1.0, (chances.from_remainder, chances.between_remainders), 1),
        ):
            same = -log_others - math.log(chance_same)
            ratios = [chance_same / chance if chance > 0 else 1.0 for chance in elsewhere]
            coming = [same + math.log(ratio) for ratio in ratios]
            beside_memory = [-log_others - math.log(max(chance, NEVER)) for chance in elsewhere]
            spread = math.log((max(2, plan.num_rows) - 1) / max(1, of_set - own))
            lines.append([same, *coming, *beside_memory, spread])
        table.append(lines)
    return torch.tensor(table, dtype=torch.float64)


def _ways(
    positive_id: np.ndarray, negative_id: np.ndarray, task: np.ndarray | None, width: int
) -> tuple[Tensor, Tensor]:
    """The ways of each candidate into a batch (rows that bring it) over the rows that it stands for, in its data set.

    By keys data set * width + id, (k,) int64 ascending: (k,) float64.
    """
    first = np.zeros(len(positive_id), np.int64) if task is None else task.astype(np.int64) * width
    own, explicit = first + positive_id, (first[:, None] + negative_id)[negative_id >= 0]
    keys = np.unique(np.concatenate([own, explicit]))
    counts = [np.bincount(np.searchsorted(keys, some), minlength=len(keys)) for some in (own, explicit)]
    return torch.from_numpy(keys), torch.from_numpy((counts[0] + counts[1]) / np.maximum(counts[0], 1))


def suspect_keys(pairs: np.ndarray, positive_id: np.ndarray, width: int) -> Tensor:
    """Keys row * width + text of these pairs, ascending: the other's positive, whoever brings it."""
    return torch.from_numpy(np.unique(pairs[:, 0].astype(np.int64) * width + positive_id[pairs[:, 1]]))
