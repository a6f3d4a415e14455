"""The newest pairs of earlier batches: embeddings, denominators, and their records. Replicated on every rank."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.state import State, last_places
from anybatch.plans.examples import Examples


class EmbeddingQueue(State):
    """S places (`size`), of which those of the oldest pairs are filled anew. A pair leaves when its row comes again.

    Attributes:
        embeddings: (2, S, D) float, of anchors and of positives; D is 0 before the first pair.
        log_denominator: (2, S) float, of each as a query.
        rows: (S,) int64 rows of the data set; -1 in empty places.
        records: (S, F) int64, what is known of each (`Examples.packed`); F is 0 before the first pair.
        stamps: (S,) int64, the greatest of the newest; -1 in empty places.
        kinds: A number for the names of what is known; -1 before the first pair.

    Cost: 8 D S bytes and some 30 + 8 F S.
    """

    embeddings: Tensor
    log_denominator: Tensor
    rows: Tensor
    records: Tensor
    stamps: Tensor
    kinds: Tensor

    widths = ("embeddings", "records")
    needs_index = True

    def __init__(self, size: int, num_rows: int) -> None:
        super().__init__(num_rows)
        self.size = size
        self.register_header()
        self.register_buffer("embeddings", torch.zeros(2, size, 0))
        self.register_buffer("log_denominator", torch.zeros(2, size))
        self.register_buffer("rows", torch.full((size,), -1))
        self.register_buffer("records", torch.zeros(size, 0, dtype=torch.int64))
        self.register_buffer("stamps", torch.full((size,), -1))
        self.register_buffer("kinds", torch.tensor(-1))

    def beside(self, width: int) -> Tensor:
        """The embeddings, which must be of this width, also while there are none."""
        known = self.embeddings.shape[2]
        if known not in (0, width):
            raise AnybatchError(
                f"The loss remembers embeddings of {known} dimensions, these have {width}. Use one loss a width "
                "(anybatch.losses.Matryoshka makes them)."
            )
        return self.embeddings if known else self.embeddings.new_zeros(2, self.size, width)

    def examples(self, like: Examples, places: Tensor) -> Examples:
        """(K,) what is known of the pairs in `places` (K,); of this batch, `like`, the same must be known."""
        if int(self.kinds) not in (-1, _kinds(like)):
            raise AnybatchError(
                "The ids, masks or weights of this batch are of other kinds than those of the remembered batches. Give "
                "the same kinds with every batch, or begin with a new loss."
            )
        records = self.records if self.records.shape[1] else self.records.new_zeros(self.size, len(like.columns))
        return like.unpacked(records[places])

    def put(self, rows: Tensor, embeddings: Tensor, log_denominator: Tensor, examples: Examples) -> None:
        """Put pairs in, the last S of them: `embeddings` (2, B, D), `log_denominator` (2, B), `examples` (B,)."""
        # 1. Of a row that came several times the last pair stays, so that no row is among the negatives twice.
        superseded = torch.isin(self.rows, rows)
        self.rows[superseded], self.stamps[superseded] = -1, -1
        new = last_places(rows)[-self.size :]

        # 2. Their places: empty ones, then those of the oldest.
        place = torch.argsort(self.stamps, stable=True)[: len(new)]
        self.stamps[place] = self.stamps.max() + 1 + torch.arange(len(place), device=place.device)

        # 3. Write.
        self.embeddings = self.beside(embeddings.shape[2])
        packed = examples.packed()
        if not self.records.shape[1]:
            self.records = packed.new_zeros(self.size, packed.shape[1])
        self.rows[place] = rows[new]
        self.embeddings[:, place] = embeddings[:, new].to(self.embeddings.dtype)
        self.log_denominator[:, place] = log_denominator[:, new].to(self.log_denominator.dtype)
        self.records[place] = packed[new]
        self.kinds.fill_(_kinds(examples))


def _kinds(examples: Examples) -> int:
    return zlib.crc32(",".join(examples.columns).encode())
