"""Classes by their names, recall both ways, hit@1: each against a loop over its definition."""

from __future__ import annotations

import numpy as np
import pytest

from anybatch.core.errors import AnybatchError
from anybatch.evaluation.zero_shot import hit_at_1, two_way_recall, zero_shot_metrics


def unit(seed: int, *shape: int) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def test_zero_shot_is_the_mean_over_classes_of_what_the_mean_prompt_finds():
    """Classes of unequal sizes, seven of them, so that the best five are not all."""
    names = [f"class {number}" for number in range(7)]
    prompts = {name: unit(number, 3, 6) for number, name in enumerate(names)}
    labels = np.array([names[number] for number in [0] * 9 + [1, 2, 3, 4, 5, 6, 6, 6]])
    images = unit(99, len(labels), 6)
    figures = zero_shot_metrics(images, labels, prompts)
    means = {name: part.mean(axis=0) / np.linalg.norm(part.mean(axis=0)) for name, part in prompts.items()}
    for k in (1, 5):
        of_class = {name: [] for name in names}
        for image, label in zip(images, labels, strict=True):
            best = sorted(names, key=lambda name: -image @ means[name])[:k]
            of_class[label].append(label in best)
        assert figures[f"top{k}"] == pytest.approx(np.mean([np.mean(hits) for hits in of_class.values()]))
    assert 0 < figures["top1"] < figures["top5"] < 1
    with pytest.raises(AnybatchError, match="class 6' has no name"):
        zero_shot_metrics(images, labels, {name: prompts[name] for name in names[:6]})


def test_recall_both_ways_counts_an_image_once_whichever_caption_it_finds():
    """Twelve images, some with several captions, one caption of two images."""
    image_id = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    text_id = np.array([0, 1, 2, 3, 4, 5, 6, 6, *range(7, 14)])
    all_images, all_texts = unit(1, 12, 4), unit(2, 14, 4)
    all_texts[:4] = all_images[[0, 2, 1, 3]]  # some are found first
    images, texts = all_images[image_id], all_texts[text_id]
    figures = two_way_recall(images, texts, image_id=image_id, text_id=text_id)
    for way, (own, anchors, other, found) in {
        "i2t": (image_id, all_images, text_id, all_texts),
        "t2i": (text_id, all_texts, image_id, all_images),
    }.items():
        for k in (1, 5, 10):
            hits = []
            for number, anchor in enumerate(anchors):
                best = np.argsort(-(found @ anchor), kind="stable")[:k]
                hits.append(bool({*best.tolist()} & {*other[own == number].tolist()}))
            assert figures[f"{way}@{k}"] == pytest.approx(np.mean(hits))
    assert 0 < figures["i2t@1"] < figures["i2t@10"]


def test_hit_at_1_is_a_win_over_the_own_candidates_alone():
    """Any number of candidates; one that ties is no hit, so that a model without content does not score."""
    queries, candidates = unit(3, 5, 4), unit(4, 9, 4)
    query = np.array([0, 1, 2, 3, 4, 0])
    of_row = [np.array(row) for row in ([0, 1], [2, 3, 4, 5], [8], [6, 7, 1], [5, 4], [3, 0, 2])]
    expected = [
        all(candidates[row[0]] @ queries[asked] > candidates[j] @ queries[asked] for j in row[1:])
        for asked, row in zip(query, of_row, strict=True)
    ]
    assert hit_at_1(queries, candidates, query=query, of_row=of_row) == pytest.approx(np.mean(expected))
    assert 0 < np.mean(expected) < 1
    same = np.ones((9, 4), np.float32)
    assert hit_at_1(queries, same, query=query[:2], of_row=of_row[:2]) == 0
