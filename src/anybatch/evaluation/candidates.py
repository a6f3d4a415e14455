"""hit@1: how often a query finds the right one among candidates of its own, MMEB's figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hit_at_1(queries: np.ndarray, candidates: np.ndarray, *, query: np.ndarray, of_row: Sequence[np.ndarray]) -> float:
    """The share of rows whose right candidate scores above all their other ones; a tie is a miss.

    Args:
        queries, candidates: (Q, D) and (C, D) L2-normalised.
        query: (R,) which query each row asks.
        of_row: For each row its candidates, numbers below C, the right one first.

    Reference: VLM2Vec, arXiv 2410.05160, section 3.2 (Precision@1).

    >>> places = np.eye(3)
    >>> hit_at_1(places, places, query=np.array([0, 1]), of_row=[np.array([0, 1, 2]), np.array([2, 1])])
    0.5
    """
    hits = 0
    for asked, (right, *others) in zip(query, of_row, strict=True):
        scores = candidates[[right, *others]] @ queries[asked]
        hits += bool((scores[0] > scores[1:]).all())
    return hits / len(of_row)
