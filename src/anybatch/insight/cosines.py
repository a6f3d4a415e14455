"""The teacher's scores in batches of a plan: expected loss and how hard negatives are, a block of anchors at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = np.linspace(-2.0, 2.0, 81)  # of differences of cosines


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchScores:
    """The teacher's own scores (cosines) in some batches.

    Attributes:
        loss: Mean InfoNCE of the scores, anchor to positives, in nats.
        own_first: Share of anchors whose own positive scores above every other candidate of the batch.
        above_own: Share of all negatives that score above the own positive.
        histogram: (80,) share of all negatives whose score minus the own positive's lies in each bin of `BINS`.
    """

    loss: float
    own_first: float
    above_own: float
    histogram: np.ndarray


class Cosines:
    """Cosines of anchors and positives, of `block_rows` anchors at a time; the embeddings stay in their files.

    Example:
        >>> cosines = Cosines(np.eye(3), np.eye(3), np.arange(3), np.arange(3))
        >>> cosines.matrix(np.array([0, 2])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(
        self,
        anchors: np.ndarray,
        positives: np.ndarray,
        anchor_id: np.ndarray,
        positive_id: np.ndarray,
        *,
        block_rows: int = 256,
    ) -> None:
        self.anchors, self.positives = anchors, positives
        self.anchor_id, self.positive_id = anchor_id, positive_id
        self.block_rows = block_rows

    def matrix(self, rows: np.ndarray) -> np.ndarray:
        """(B, B): anchors down, positives across."""
        return unit(self.anchors[rows]) @ unit(self.positives[rows]).T

    def batch_scores(
        self, batches: np.ndarray, num_anchors: int, temperature: float, *, among: np.ndarray | None = None
    ) -> BatchScores:
        """Scores in the first batches, as many as hold `num_anchors` anchors.

        InfoNCE = log(1 + sum_j exp((s_ij - s_ii) / temperature)).

        `among` (n,) bool: only these rows are anchors, and all of the batch are their candidates. NaN where no batch
        holds one.
        """
        losses, own_first, above, total = [], 0, 0, 0
        histogram = np.zeros(len(BINS) - 1)
        for rows in batches:
            places = np.arange(len(rows)) if among is None else np.flatnonzero(among[rows])
            places = places[:num_anchors]
            if not len(places):
                continue
            positives = unit(self.positives[rows])
            for start in range(0, len(places), self.block_rows):
                block = places[start : start + self.block_rows]
                part = rows[block]
                scores = unit(self.anchors[part]) @ positives.T
                own = scores[np.arange(len(part)), block]
                negative = (self.anchor_id[part][:, None] != self.anchor_id[rows][None]) & (
                    self.positive_id[part][:, None] != self.positive_id[rows][None]
                )
                difference = np.where(negative, scores - own[:, None], -np.inf).astype(np.float64)
                # The 0 is the positive itself, and the largest term's scale where no negative passes it.
                top = np.maximum(difference.max(axis=1), 0.0) / temperature
                terms = np.exp(difference / temperature - top[:, None]).sum(axis=1)
                losses.append(top + np.log(np.exp(-top) + terms))
                own_first += int((difference.max(axis=1) <= 0).sum())
                above += int((difference > 0).sum())
                total += int(negative.sum())
                histogram += np.histogram(difference[negative], BINS)[0]
            num_anchors -= len(places)
            if num_anchors <= 0:
                break
        every = np.concatenate(losses) if losses else np.full(1, np.nan)
        return BatchScores(
            loss=float(every.mean()),
            own_first=own_first / len(every) if losses else float("nan"),
            above_own=above / max(1, total),
            histogram=histogram / max(1, total),
        )

    def between(self, rows: np.ndarray, others: np.ndarray, *, positives: bool = False) -> np.ndarray:
        """(p,): cosine of each row's anchor (or positive) with the other's positive, a block of pairs at a time."""
        own = self.positives if positives else self.anchors
        found = [np.zeros(0)]
        for start in range(0, len(rows), 8192):
            part = slice(start, start + 8192)
            found.append(np.einsum("pd,pd->p", unit(own[rows[part]]), unit(self.positives[others[part]])))
        return np.concatenate(found)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
