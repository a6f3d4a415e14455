"""Further kinds of negatives in one softmax: anchors against anchors, texts against texts and against anchors.

The engine knows rows and candidates. A pair whose positive asks as well takes two rows, which share one denominator:

    rows         anchor_1 .. anchor_B, text_1 .. text_B
    candidates   text_1 .. text_B, anchor_1 .. anchor_B, explicit negatives

So tiles, ranks, records and gradients are the engine's; what is here is which of the pairs count (`Kinds`), and the
denominator that two rows share (`JointRule`). Cost: 2 B x (B + M) scores, or B x (B + M) for "query_to_query" alone;
two gathers of sizes more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.engine import Answer, Rule, Side, SoftmaxStats, softmax_loss
from anybatch.losses.log_weights import LogWeights, Term, behind
from anybatch.plans.examples import Examples

Kind = Literal["query_to_query", "doc_to_query", "doc_to_doc"]
ANCHOR, TEXT = 0, 1  # in the record: what an embedding is of its pair


def check_kinds(kinds: tuple[str, ...], direction: str) -> None:
    """Refuse what is no kind, and a second softmax beside the joint one."""
    unknown = [kind for kind in kinds if kind not in get_args(Kind)]
    if unknown:
        raise AnybatchError(
            f"joint has {unknown[0]!r}; expected some of {', '.join(get_args(Kind))}, beside the candidates "
            "(query_to_doc), which are always there."
        )
    if kinds and direction == "both":
        raise AnybatchError(
            f"joint is {', '.join(kinds)} and direction 'both': the one is one softmax for all kinds, the other the "
            "mean of two. Use direction='one_way', with 'doc_to_query' in joint for the other direction's pairs."
        )


def joint_softmax_loss(
    anchors: Tensor,
    candidates: Tensor,
    side: Side,
    kinds: tuple[Kind, ...],
    *,
    over_data: bool,
    repeated: Tensor | None = None,
    tile_bytes: int,
) -> tuple[Tensor, tuple[SoftmaxStats, ...]]:
    """`softmax_loss` in one direction, with further kinds of negatives in each anchor's softmax.

    Args:
        anchors, candidates, tile_bytes: See `softmax_loss`.
        side: Anchors against candidates alone.
        kinds: Which pairs are negatives besides.
        over_data: The rule takes the candidates for a sample of all rows. Then each kind is one of its own: its
            k negatives stand for as many rows as the candidates do.
        repeated: (B,) how often a row comes at other places, which the rule leaves out of k; None for never.
    """
    if side.adjust is not None or side.column_weight is not None:
        raise AnybatchError(
            "joint is for losses that do not look at whole rows of scores. Leave it out, or use InfoNCE."
        )
    num_rows, num_columns, device = len(anchors), len(candidates), anchors.device
    # 1. The records of rows and candidates.
    row_sizes = distributed.gather_sizes(num_rows, device)
    num_drawn = sum(distributed.gather_sizes(num_columns, device)) - 1
    known = side.log_weight or LogWeights(queries=Examples(), candidates=Examples())
    known.refuse_pairs("other kinds of pairs (joint)")
    owner = _owners(known.candidates, num_rows, num_columns, kinds, device)
    first = distributed.own_part(row_sizes).start
    # Weights count every way by which a text comes to a row, its own explicit negatives too: none may be left out.
    number = behind(owner[:num_rows] + first, num_columns) if known.normalised else owner + first
    sides = (torch.full_like(number, kind) for kind in (ANCHOR, TEXT))
    of_anchors, of_texts = ({"pair_number": number, "pair_side": column} for column in sides)
    as_anchor = known.queries.with_columns(**{name: column[:num_rows] for name, column in of_anchors.items()})
    as_text = known.candidates.with_columns(**of_texts)
    positives, negatives = as_text.take(slice(0, num_rows)), as_text.take(slice(num_rows, num_columns))
    # 2. Which kinds count. Over the data each stands for as many rows as the candidates do, by their numbers.
    again = torch.zeros(num_rows, dtype=torch.int64, device=device) if repeated is None else repeated
    other_anchors = again.new_full((num_rows,), sum(row_sizes) - 1)
    other_texts = num_drawn + 1 - torch.bincount(owner, minlength=num_rows)
    weights = torch.full((num_rows, 2, 2), -torch.inf, dtype=torch.float64, device=device)
    weights[:, ANCHOR, TEXT] = 0.0
    for kind, place, count in (
        ("query_to_query", (ANCHOR, ANCHOR), other_anchors),
        ("doc_to_query", (TEXT, ANCHOR), other_anchors),
        ("doc_to_doc", (TEXT, TEXT), other_texts),
    ):
        if kind in kinds:
            ratio = (num_drawn - again).clamp(min=1) / (count - again).clamp(min=1).double()
            weights[:, *place] = ratio.log() if over_data and not known.normalised else 0.0
    twice = kinds != ("query_to_query",)
    log_weight = LogWeights(
        queries=as_anchor.followed_by(positives) if twice else as_anchor,
        candidates=positives.followed_by(as_anchor).followed_by(negatives),
        terms=(Kinds(weights, first, known.terms, known.normalised),),
    )
    # 3. The engine.
    texts = candidates[:num_rows]
    rows = torch.cat([anchors, texts]) if twice else anchors
    columns = torch.cat([texts, anchors, candidates[num_rows:]])
    side = replace(side, log_weight=log_weight, num_drawn=torch.full((len(rows),), num_drawn, device=device))
    if twice:
        weight = rows.new_ones(num_rows) if side.row_weight is None else side.row_weight
        rule = JointRule(side.rule, num_positives=2 if "doc_to_query" in kinds else 1)
        side = replace(side, rule=rule, row_weight=2 * weight.repeat(2))
    loss, (stats,) = softmax_loss(rows, columns, side, tile_bytes=tile_bytes)
    return loss, (_by_pair(stats, num_rows) if twice else stats,)


def _owners(
    candidates: Examples, num_rows: int, num_columns: int, kinds: tuple[Kind, ...], device: torch.device
) -> Tensor:
    """(M,) whose each candidate is, by the place of its pair: as the records say, else as many for each anchor."""
    own, owner = torch.arange(num_rows, device=device), candidates.get("owner")
    if owner is not None:
        return torch.cat([own, owner[num_rows:]])
    own_negatives, rest = divmod(num_columns - num_rows, max(1, num_rows))
    if rest and "doc_to_doc" in kinds:
        raise AnybatchError(
            f"joint has doc_to_doc, and the batch {num_columns - num_rows} explicit negatives for {num_rows} anchors, "
            "without a word on whose each is: a text's own are not its negatives. Expected the same number for each, "
            "or the arguments that RowTable makes."
        )
    return own.repeat(1 + own_negatives + (rest > 0))[:num_columns]


@dataclass(frozen=True, eq=False)
class Kinds:
    """Which pairs count, by what the two are of their pairs; the other terms, as each kind of pair needs them.

    Args:
        weights: (B, 2, 2) log-weights by the query's pair, of this rank, its side and the candidate's; -inf for kinds
            that do not count.
        first: Number of this rank's first pair.
        terms: Those of the anchors and their candidates. Candidates that are anchors are asked about as in the
            candidate-to-anchor direction. Of two anchors or two texts what is masked in either order is masked.
        normalised: See `Term`.

    What has the same side and number is no negative: an anchor of itself, a text of itself and, but with normalised
    weights, of its row's explicit negatives.
    """

    weights: Tensor
    first: int
    terms: tuple[Term, ...]
    normalised: bool

    def __call__(self, queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
        """See `Term`."""
        weights = self.weights[queries["pair_number"] - self.first, queries["pair_side"]][:, candidates["pair_side"]]
        same_side = queries["pair_side"][:, None] == candidates["pair_side"]
        weights.masked_fill_(same_side & (queries["pair_number"][:, None] == candidates["pair_number"]), -torch.inf)
        for term in self.terms:
            of_texts, of_anchors = (term(queries, candidates, back=anchors) for anchors in (False, True))
            masked = same_side & (of_texts.isneginf() | of_anchors.isneginf())
            weights += torch.where(candidates["pair_side"] == ANCHOR, of_anchors, of_texts).masked_fill(
                masked, -torch.inf
            )
        return weights


@dataclass(frozen=True)
class JointRule:
    """One denominator for the two rows of a pair, of which the first states the objective.

    Each row's factor is 2: the mean is over twice as many rows as there are pairs.
    """

    rule: Rule  # of the pairs
    num_positives: int  # terms of the own positive in the denominator: "doc_to_query" has it a second time
    row_wise: bool = False

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        """See `Rule`."""
        num_pairs = len(log_sum) // 2
        log_sum = log_sum.view(2, num_pairs).logsumexp(dim=0)
        # A rule knows of one term of the positive, so it is asked for the denominator over their number.
        shift = math.log(self.num_positives)
        answer = self.rule(log_sum - shift, num_drawn[:num_pairs], slice(0, num_pairs))
        empty = answer.log_denominator.isneginf()  # without the positive, and without a negative
        objective = torch.where(empty, answer.objective, answer.objective + shift)
        objective = torch.cat([objective, torch.zeros_like(log_sum)])
        weight = None if answer.positive_weight is None else (answer.positive_weight / 2).repeat(2)
        return Answer((answer.log_denominator + shift).repeat(2), objective, weight)


def _by_pair(stats: SoftmaxStats, num_rows: int) -> SoftmaxStats:
    """The figures of pairs, from those of twice as many rows."""
    gradient = stats.temperature_gradient
    return SoftmaxStats(
        log_sum=stats.log_sum.view(2, num_rows).logsumexp(dim=0),
        log_denominator=stats.log_denominator[:num_rows],
        objective=stats.objective[:num_rows],
        num_negatives=stats.num_negatives.view(2, num_rows).sum(dim=0),
        temperature_gradient=None if gradient is None else gradient.view(2, num_rows).mean(dim=0),
    )
