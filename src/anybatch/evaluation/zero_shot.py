"""Figures of models for images and texts: classes told by their names, captions and images that find each other, and
hit@1 among candidates of a query's own, MMEB's figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.evaluation.classes import mean_per_class
from anybatch.evaluation.retrieval import rank_embeddings

TOPS = (1, 5)
CUTOFFS = (1, 5, 10)


def zero_shot_metrics(images: np.ndarray, labels: np.ndarray, prompts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Accuracy of classes that are known by their names alone, `top1` and `top5`, each the mean of the classes.

    A class is the mean of its prompts' embeddings, normalised.

    Args:
        images: (N, D) L2-normalised.
        labels: (N,) classes.
        prompts: Of each class (T, D), L2-normalised: its name in T templates.

    Raises:
        AnybatchError: A label without prompts.

    Reference: CLIP, arXiv 2103.00020, section 3.1.4 (ensembles over templates).

    >>> places = np.eye(3)
    >>> prompts = {name: places[[row]] for row, name in enumerate(("cat", "owl", "fox"))}
    >>> zero_shot_metrics(places, np.array(["cat", "owl", "owl"]), prompts)["top1"]
    0.75
    """
    classes = np.array(list(prompts))
    unknown = sorted({*labels.tolist()} - {*prompts})
    if unknown:
        raise AnybatchError(f"The class '{unknown[0]}' has no name to be told by. Give a name for each class.")
    means = np.stack([of_class.mean(axis=0) for of_class in prompts.values()])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    rows = rank_embeddings(images, means, top_k=max(TOPS))
    correct = classes[rows] == labels[:, None]
    return {f"top{k}": mean_per_class(correct[:, :k].any(axis=1), labels) for k in TOPS}


def two_way_recall(
    images: np.ndarray, texts: np.ndarray, *, image_id: np.ndarray, text_id: np.ndarray
) -> dict[str, float]:
    """The share of images that find one of their captions (`i2t@k`), of captions that find their image (`t2i@k`).

    An image with several captions is as many pairs; it has found them with the first of them in the best k.

    Args:
        images, texts: (n, D) each, pair by pair.
        image_id, text_id: (n,) equal for equal ones.

    Reference: Karpathy and Fei-Fei, arXiv 1412.2306, section 4.1, as is usual for COCO and Flickr30k.
    """
    sides = (images, image_id), (texts, text_id)
    return {
        f"{name}@{k}": share
        for name, (anchors, found) in {"i2t": sides, "t2i": sides[::-1]}.items()
        for k, share in _recall(*anchors, *found).items()
    }


def _recall(anchors: np.ndarray, anchor_id: np.ndarray, found: np.ndarray, found_id: np.ndarray) -> dict[int, float]:
    ids, queries, of_pair = np.unique(anchor_id, return_index=True, return_inverse=True)
    found_ids, documents, document_of_pair = np.unique(found_id, return_index=True, return_inverse=True)
    rows = rank_embeddings(anchors[queries], found[documents], top_k=max(CUTOFFS))
    pairs = np.unique(of_pair * len(found_ids) + document_of_pair)
    hits = np.isin(np.arange(len(ids))[:, None] * len(found_ids) + rows, pairs)
    return {k: float(hits[:, :k].any(axis=1).mean()) for k in CUTOFFS}


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
