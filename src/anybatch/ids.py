"""Which texts are known to match, from the ids of rows alone. Imports nothing."""

from __future__ import annotations

import numpy as np


def known_positives(anchor_id: np.ndarray, positive_id: np.ndarray, width: int) -> np.ndarray:
    """Keys anchor * width + positive of the pairs whose anchor has other rows as well.

    Only such a positive can come beside the anchor without being its own row's: as another row's positive, or as a hard negative.

    Args:
        anchor_id, positive_id: (n,) int64, 0 or more; equal for identical texts.
        width: More than every id that keys are made of.

    Returns:
        (p,) int64, ascending and distinct.
    """
    shared = np.bincount(anchor_id, minlength=1)[anchor_id] > 1
    return np.unique(anchor_id[shared] * width + positive_id[shared]).astype(np.int64)
