"""Log-weights of pairs, b_ij: masks and weights as functions of two records, never all of them at once.

A log-weight is added to the logit of a pair; -inf removes it. Gathering over ranks, the other direction, tiles and a
memory beside the batch are written once, here and in the record (`Examples`), and no term knows of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.ids import as_integers
from anybatch.plans.examples import Examples


class Term(Protocol):
    """A mask or a weight.

    One that makes `sum_j exp(b_ij) x_j` an estimate of the mean of x over the data set, so that a loss adds no
    correction for their number, has an attribute `normalised` that is True. A mask needs none.
    """

    def __call__(self, queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
        """Log-weights, broadcastable to (q, c).

        Args:
            queries, candidates: q and c examples.
            back: Queries are positives and candidates anchors; False: queries are anchors, candidates positives and
                explicit negatives.
        """
        ...


def removed(where: Tensor) -> Tensor:
    """-inf where True, 0 elsewhere: a mask from (q, c) bool."""
    return torch.zeros(where.shape, device=where.device).masked_fill_(where, -torch.inf)


def same_content(queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
    """Identical anchors, or identical texts: the candidate is a positive of the query under another row."""
    same = queries["text_id"][:, None] == candidates["text_id"]
    same |= queries["anchor_id"][:, None] == candidates["anchor_id"]
    return removed(same)


def same_row(queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
    """The query's own row, which came a second time."""
    return removed(queries["row"][:, None] == candidates["row"])


def remembered_of_other_tasks(queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
    """Remembered examples of other data sets; those of the batch itself stay, wherever they come from."""
    remembered = candidates.get("remembered")
    if remembered is None:
        return torch.zeros(1, 1, device=queries["task"].device)
    return removed(_of_other_tasks(queries, candidates) & remembered.bool())


def _of_other_tasks(queries: Examples, candidates: Examples) -> Tensor:
    return queries["task"][:, None] != candidates["task"]


@dataclass(frozen=True, eq=False)
class ListedPairs:
    """Pairs on a list: suspected false negatives, or positives that are known from other rows.

    Args:
        keys: (p,) int64, ascending; the same on every rank. A pair is on it if `key of the anchor * width + text_id`
            is.
        width: More than every `text_id`.
        key: Column of the anchor that its key is.

    Cost: a binary search a pair, in a list of p.
    """

    keys: Tensor
    width: int
    key: str = "row"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", as_integers("keys", self.keys))

    def __call__(self, queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
        """See `Term`. The pair of anchor i and text j is the same pair in the candidate-to-anchor direction."""
        if not len(self.keys):
            return torch.zeros(1, 1, device=self.keys.device)
        anchors, texts = (candidates, queries) if back else (queries, candidates)
        own, text = anchors[self.key] * self.width, texts["text_id"]
        wanted = text[:, None] + own if back else own[:, None] + text
        place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        return removed(self.keys[place] == wanted)


@dataclass(frozen=True, eq=False)
class Values:
    """Log-weights that are a column of the examples: by anchor, or by text (positive or explicit negative)."""

    name: str
    of: Literal["anchor", "text"]
    normalised: bool = False

    def __call__(self, queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
        """See `Term`."""
        by_query = (self.of == "anchor") != back
        return queries[self.name][:, None] if by_query else candidates[self.name][None]


@dataclass(frozen=True, eq=False)
class Inclusion:
    """One over the chance that a candidate was put beside the query, for mined batches: `RowTable` makes it.

    Args:
        table: (data sets, 2, 6) float64 log-weights for a query in a cluster, and for one in none: of a candidate of
            the same cluster, of another, of none; of the latter two beside a memory; and the log of n - 1 over the
            rows that a candidate of another cluster stands for (of the query's data set, outside its cluster).

    Beside a memory a row of another cluster comes in the batch with chance q by each of its ways, and is one of the m
    remembered of N: it stands for 1 / (ways q + m / N) rows. A remembered row is never one of the own cluster's.
    """

    table: Tensor
    normalised: bool = True

    def __call__(self, queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
        """See `Term`. Candidates of another data set are removed. Anchors have one way into a batch."""
        # 1. Look up what concerns the query.
        query_task, query_cluster, cluster = queries.get("task"), queries["cluster"], candidates["cluster"]
        table = self.table[0 if query_task is None else query_task, (query_cluster < 0).long()]
        same, other, loose, exact_other, exact_loose, log_spread = (column[:, None] for column in table.unbind(dim=1))
        remembered, log_ways = candidates.get("remembered"), None if back else candidates.get("log_ways")
        if remembered is not None:
            other, loose = exact_other, exact_loose

        # 2. Candidates outside the query's cluster, each once, however many ways it has.
        elsewhere = torch.where(cluster < 0, loose, other)
        if log_ways is not None:
            elsewhere, same = elsewhere - log_ways, same - log_ways
        if remembered is not None:
            among = queries["num_remembered"][:, None].double() * log_spread.exp()
            elsewhere = -((-elsewhere).exp() + among).log().clamp(min=0)  # no row stands for more than all

        # 3. Those inside it, and those of other data sets.
        together = query_cluster[:, None] == cluster
        if remembered is not None:
            together &= ~remembered.bool()
        weights = torch.where(together, same, elsewhere)
        return weights if query_task is None else weights.masked_fill_(_of_other_tasks(queries, candidates), -torch.inf)


@dataclass(frozen=True, kw_only=True, eq=False)
class LogWeights:
    """b_ij for tiles of pairs: the records of queries and candidates, and the terms over them, which are summed.

    Attributes:
        queries: (B,) examples.
        candidates: (M,) examples: the queries' positives in their order, then explicit negatives.
        terms: See `Term`.
        pairs: (B, M) further values, one a pair, which mean nothing for other candidates; None for none.
        pairs_normalised: See `Term`, for `pairs`.
        back: Queries are positives and candidates anchors.
        positives_by: Column whose equal values, 0 or more, make a candidate a further positive of the query, not the
            query's own row again. No mask removes it; weights that stand for the data hold. None for the own alone.

    Example:
        >>> import torch
        >>> def same_author(queries, candidates, *, back):
        ...     return removed(queries["author"][:, None] == candidates["author"])
        >>> weights = LogWeights.of(Examples(author=torch.tensor([0, 1, 0])), 2, same_author)  # the third is explicit
        >>> weights.tile(slice(0, 2), slice(0, 3)).tolist()  # losses keep the own positive all the same
        [[-inf, 0.0, -inf], [0.0, -inf, 0.0]]
    """

    queries: Examples
    candidates: Examples
    terms: tuple[Term, ...] = ()
    pairs: Tensor | None = None
    pairs_normalised: bool = False
    back: bool = False
    positives_by: str | None = None

    @classmethod
    def of(cls, candidates: Examples, num_rows: int, *terms: Term) -> LogWeights:
        """Anchors against candidates, of which the first `num_rows` are the anchors' own pairs."""
        return cls(queries=candidates.take(slice(0, num_rows)), candidates=candidates, terms=terms)

    @property
    def empty(self) -> bool:
        """Whether all of them are 0."""
        return not self.terms and self.pairs is None and self.positives_by is None

    @property
    def normalised(self) -> bool:
        """Whether they estimate a mean over the data, see `Term`: one such term is enough, masks only remove."""
        return self.pairs_normalised or any(getattr(term, "normalised", False) for term in self.terms)

    def tile(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """The log-weights of these queries and candidates, broadcastable to (rows, columns)."""
        known = self._parts(rows, columns)
        parts = [part for part, _ in known]
        if self.positives_by is not None:
            kept = self.further_positives(rows, columns)
            parts = [part if fixed else torch.where(kept & part.isneginf(), 0.0, part) for part, fixed in known]
        return sum(parts[1:], parts[0]) if parts else torch.zeros(())

    def further_positives(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """(rows, columns) bool, see `positives_by`."""
        assert self.positives_by is not None
        queries, candidates = self.queries.take(rows), self.candidates.take(columns)
        ids = queries[self.positives_by][:, None]
        further = (ids >= 0) & (ids == candidates[self.positives_by])
        if "row" in queries:
            further &= queries["row"][:, None] != candidates["row"]
        for part, normalised in self._parts(rows, columns):
            if normalised:
                further &= ~part.isneginf()
        return further

    def _parts(self, rows: slice | Tensor, columns: slice) -> list[tuple[Tensor, bool]]:
        """What is summed, broadcastable to (rows, columns), and whether each is normalised."""
        queries, candidates = self.queries.take(rows), self.candidates.take(columns)
        parts = [] if self.pairs is None else [(self.pairs[rows, columns], self.pairs_normalised)]
        for term in self.terms:
            parts.append((self._asked(term, queries, candidates), getattr(term, "normalised", False)))
        return parts

    def _asked(self, term: Term, queries: Examples, candidates: Examples) -> Tensor:
        weights = term(queries, candidates, back=self.back)
        if isinstance(weights, Tensor) and weights.is_floating_point() and weights.ndim <= 2:
            sizes = zip(weights.shape[::-1], (len(candidates), len(queries)), strict=False)
            if all(size in (1, expected) for size, expected in sizes):
                return weights
        given = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise AnybatchError(
            f"The term {getattr(term, '__name__', type(term).__name__)} gave {given}; expected floats broadcastable to "
            f"({len(queries)}, {len(candidates)}), queries by candidates. Of a mask of bools give `removed(mask)`."
        )

    def gathered(self, row_sizes: list[int], column_sizes: list[int]) -> LogWeights:
        """The same over the queries and candidates of all ranks. Two collectives, whatever the terms."""
        self.refuse_pairs("the other ranks")
        queries, candidates = self.queries.gathered(row_sizes), self.candidates.gathered(column_sizes)
        return replace(self, queries=queries, candidates=candidates)

    def reversed(self, num_rows: int) -> LogWeights:
        """The same from the first `num_rows` candidates, the positives, to the anchors."""
        return replace(
            self,
            queries=self.candidates.take(slice(0, num_rows)),
            candidates=self.queries,
            pairs=None if self.pairs is None else self.pairs[:, :num_rows].T,
            back=not self.back,
        )

    def beside(self, memory: Examples, share: slice) -> LogWeights:
        """With remembered examples behind the candidates; the record then says which ones they are.

        Of all that is remembered, `memory` (S,), this rank's candidates are its `share`.
        """
        self.refuse_pairs("earlier batches")
        task, device = self.queries.get("task"), memory["row"].device
        num_remembered = torch.full((len(self.queries),), len(memory), device=device)
        if task is not None:
            num_remembered = (task[:, None] == memory["task"]).sum(dim=1)
        shared = memory.take(share)
        fresh, old = (
            examples.with_columns(remembered=torch.full((len(examples),), number, device=device))
            for number, examples in enumerate((self.candidates, shared))
        )
        queries = self.queries.with_columns(num_remembered=num_remembered)
        return replace(self, queries=queries, candidates=fresh.followed_by(old))

    def refuse_pairs(self, elsewhere: str) -> None:
        """Refuse a tensor with a value a pair."""
        if self.pairs is not None:
            raise AnybatchError(
                f"log_weight is a tensor of shape {tuple(self.pairs.shape)}, which does not cover the candidates of "
                f"{elsewhere}. Give ids (anchor_id, candidate_id), LogWeights over records of the examples (RowTable "
                "makes them), or a tensor of shape (1, M) or (B, 1)."
            )


def plus(
    log_weight: LogWeights | None, num_rows: int, *terms: Term, back: bool = False, **columns: Tensor
) -> LogWeights:
    """Further terms, and the columns (M,) that the candidates' records must have for them.

    The first `num_rows` candidates are the queries' own pairs; `back` says where `log_weight` is None what it is of.
    """
    known = log_weight or LogWeights(queries=Examples(), candidates=Examples(), back=back)
    for name, column in columns.items():
        there = known.candidates.get(name)
        if there is not None and there is not column and not torch.equal(there, column):
            raise AnybatchError(
                f"The examples of log_weight have a column {name!r} with other values than those given beside it. Give "
                "both from one source (RowTable.arguments makes all), or leave one out."
            )
    return replace(
        known,
        queries=known.queries.with_columns(**{name: column[:num_rows] for name, column in columns.items()}),
        candidates=known.candidates.with_columns(**columns),
        terms=(*known.terms, *terms),
    )


def behind(values: Tensor, num_columns: int) -> Tensor:
    """(M,) a column of candidates from the (B,) of their pairs: -1 for the explicit negatives behind them."""
    column = values.new_full((num_columns,), -1)
    column[: len(values)] = values
    return column


def as_log_weights(log_weight: LogWeights | Tensor, num_rows: int, num_columns: int) -> LogWeights:
    """A tensor in place of `LogWeights`: one that holds only 0 and -inf is a mask, any other is taken as normalised.

    One by row or by column holds under several ranks and beside a memory too. `LogWeights` stay as they are.
    """
    if isinstance(log_weight, LogWeights):
        for name, examples, expected in (
            ("queries", log_weight.queries, num_rows),
            ("candidates", log_weight.candidates, num_columns),
        ):
            if examples.columns and len(examples) != expected:
                raise AnybatchError(f"log_weight has {len(examples)} {name}; the batch has {expected}. Give one a row.")
        return log_weight
    if not isinstance(log_weight, Tensor):
        raise AnybatchError(
            f"log_weight is a {type(log_weight).__name__}; expected LogWeights, or a tensor broadcastable to "
            f"({num_rows}, {num_columns})."
        )
    if not log_weight.is_floating_point():
        raise AnybatchError(
            f"log_weight is {log_weight.dtype}; expected floats: 0 keeps a pair, -inf removes it, log(2) counts it "
            "twice."
        )
    values = log_weight.detach()
    while values.ndim < 2:
        values = values[None]
    if values.ndim != 2 or values.shape[0] not in (1, num_rows) or values.shape[1] not in (1, num_columns):
        raise AnybatchError(
            f"log_weight has shape {tuple(log_weight.shape)}; expected something broadcastable to ({num_rows}, "
            f"{num_columns})."
        )
    if log_weight.requires_grad:
        raise AnybatchError(
            "log_weight requires a gradient, and the losses give it none. Detach it; for learned margins there is "
            "NUCLR."
        )
    if bool((values.isnan() | (values == torch.inf)).any()):
        raise AnybatchError("log_weight holds NaN or +inf; expected finite numbers, or -inf to remove a pair.")
    # Every rank must take the tensors for the same thing, whatever its own share happens to hold.
    weighs = (~((values == 0) | values.isneginf())).any().float()
    varies = [torch.tensor(float(size > 1), device=values.device) for size in values.shape]
    normalised, by_row, by_column = (distributed.sum_over_ranks(torch.stack([weighs, *varies])) > 0).tolist()
    if by_row and by_column:
        pairs = values.expand(num_rows, num_columns)
        return LogWeights(queries=Examples(), candidates=Examples(), pairs=pairs, pairs_normalised=normalised)
    if by_column:
        column = values.expand(1, num_columns)[0]
        return plus(None, num_rows, Values("given_by_text", "text", normalised), given_by_text=column)
    column = behind(values.expand(num_rows, 1)[:, 0], num_columns)  # an explicit negative is nobody's anchor
    return plus(None, num_rows, Values("given_by_anchor", "anchor", normalised), given_by_anchor=column)
