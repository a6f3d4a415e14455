"""The newest pairs of earlier batches: embeddings, denominators, and what log-weights must know of them. Replicated on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.state import State

MAX_FEATURES = 12  # int64 a pair for its log-weights: ids take 2, a list of pairs 1, clusters 3


class RecentPairs(State):
    """S places, of which those of the oldest pairs are filled anew. A pair leaves when its row comes again.

    Args:
        size: S.
        num_rows: n, rows of the data set.

    Attributes:
        embeddings: (2, S, D) float, of anchors and of positives; D is 0 before the first pair.
        log_denominator: (2, S) float, of each as a query.
        rows: (S,) int64 rows of the data set; -1 in empty places.
        features: (2, `MAX_FEATURES`, S) int64, by direction.
        stamps: (S,) int64, the greatest of the newest; -1 in empty places.
        kinds: Of the log-weights that the features are of; -1 before the first pair.

    Cost: 8 D S bytes and some 220 S.
    """

    embeddings: Tensor
    log_denominator: Tensor
    rows: Tensor
    features: Tensor
    stamps: Tensor
    kinds: Tensor

    widths = ("embeddings",)
    needs_index = True

    def __init__(self, size: int, num_rows: int) -> None:
        super().__init__(num_rows)
        self.size = size
        self.register_header()
        self.register_buffer("embeddings", torch.zeros(2, size, 0))
        self.register_buffer("log_denominator", torch.zeros(2, size))
        self.register_buffer("rows", torch.full((size,), -1))
        self.register_buffer("features", torch.zeros(2, MAX_FEATURES, size, dtype=torch.int64))
        self.register_buffer("stamps", torch.full((size,), -1))
        self.register_buffer("kinds", torch.tensor(-1))

    def beside(self, width: int) -> Tensor:
        """The embeddings, of this width also while there are none.

        Raises:
            AnybatchError: They are of another width.
        """
        known = self.embeddings.shape[2]
        if known not in (0, width):
            raise AnybatchError(
                f"The loss remembers embeddings of {known} dimensions, these have {width}. Use one loss a width (anybatch.losses.Matryoshka makes them)."
            )
        return self.embeddings if known else self.embeddings.new_zeros(2, self.size, width)

    def age_groups(self, number: int) -> Tensor:
        """(S,) int64: 0 for the newest S / number places, and so on; empty ones are the oldest."""
        order = torch.argsort(self.stamps, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(self.size, device=order.device))
        return rank * number // self.size

    def put(self, rows: Tensor, embeddings: Tensor, log_denominator: Tensor, features: Tensor, *, kinds: int) -> None:
        """Put pairs in, the last S of them.

        Args:
            rows: (B,) int64.
            embeddings: (2, B, D).
            log_denominator: (2, B).
            features: (2, F, B) int64.
            kinds: Of the log-weights.
        """
        # Of a row that came several times the last pair stays, so that no row is among the negatives twice.
        _, inverse = torch.unique(rows, return_inverse=True)
        last = torch.zeros_like(rows).scatter_reduce_(0, inverse, torch.arange(len(rows), device=rows.device), "amax")
        kept = last[inverse] == torch.arange(len(rows), device=rows.device)
        rows, embeddings, log_denominator, features = (
            rows[kept],
            embeddings[:, kept],
            log_denominator[:, kept],
            features[:, :, kept],
        )
        superseded = torch.isin(self.rows, rows)
        self.rows[superseded], self.stamps[superseded] = -1, -1
        self.embeddings = self.beside(embeddings.shape[2])
        new = slice(max(0, len(rows) - self.size), len(rows))
        place = torch.argsort(self.stamps, stable=True)[: new.stop - new.start]  # empty places, then the oldest
        self.stamps[place] = self.stamps.max() + 1 + torch.arange(len(place), device=place.device)
        self.rows[place] = rows[new]
        self.embeddings[:, place] = embeddings[:, new].to(self.embeddings.dtype)
        self.log_denominator[:, place] = log_denominator[:, new].to(self.log_denominator.dtype)
        self.features[:, : features.shape[1], place] = features[:, :, new]
        self.kinds.fill_(kinds)
