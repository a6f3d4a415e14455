"""Exact and approximate search: precision, devices, and going on after a kill."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from anybatch.mining import exact_neighbors, ivf_neighbors
from anybatch.mining import neighbors as neighbors_module
from anybatch.mining import top as top_module

from .test_mining import embeddings, ids, naive_neighbors


class Killed(Exception):
    pass


def plain(num_rows):
    return {"anchor_id": np.arange(num_rows), "positive_id": np.arange(num_rows)}


@pytest.mark.parametrize("distinct", [None, 20])
@pytest.mark.parametrize(("num_rows", "k", "tile"), [(37, 5, (8, 16)), (150, 149, (150, 150)), (203, 17, (64, 100))])
def test_torch_search_equals_the_compiled_one(num_rows, k, tile, distinct, monkeypatch):
    monkeypatch.setattr(top_module._OnDevice, "tile", tile)
    monkeypatch.setattr(top_module._Compiled, "tile", tile)
    anchors, positives = embeddings(num_rows)
    anchor_id, positive_id = ids(num_rows, distinct=distinct) if distinct else (np.arange(num_rows),) * 2
    known = {"anchor_id": anchor_id, "positive_id": positive_id}
    compiled = exact_neighbors(anchors, positives, k, unit_rows=50, **known)
    on_device = exact_neighbors(anchors, positives, k, device="cpu", unit_rows=50, **known)
    expected = naive_neighbors(anchors, positives, k, anchor_id, positive_id)
    for found in (compiled, on_device):
        assert [[i for i in line if i >= 0] for line in found.ids.tolist()] == expected
        assert ((found.ids < 0) == np.isneginf(found.scores)).all()
        scores = np.take_along_axis(anchors @ positives.T, np.maximum(found.ids, 0), axis=1)
        np.testing.assert_allclose(found.scores[found.ids >= 0], scores[found.ids >= 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [[0.0, -0.0, 1.0, -1.0, 0.5], [-3.0, -3.0, -2.0, -1e-30, -5.0]])
def test_keys_order_signs_zeros_and_ties_as_numbers_do(values):
    generator = np.random.default_rng(0)
    tile = np.asarray(generator.choice(values, size=(7, 501)), np.float32)
    kept = top_module._Compiled(np.full(7, 600), 20, (np.arange(601), np.arange(601)), torch.device("cpu"))
    columns = generator.permutation(501).astype(np.int32)
    for start in range(0, 501, 83):
        part = np.ascontiguousarray(tile[:, columns[start : start + 83]])
        kept.add(torch.from_numpy(part), np.arange(7), columns[start : start + 83])
    found, scores = kept.result()
    for line, row in enumerate(found):
        assert row.tolist() == sorted(range(501), key=lambda other: (-tile[line, other], other))[:20]
        np.testing.assert_array_equal(scores[line], tile[line, row] + 0.0)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_documents_in_several_pieces(device):
    """2,048 are read at a time. Of whole numbers, whose scores are exact and often equal: the lower row is first."""
    generator = np.random.default_rng(0)
    anchors, positives = (generator.integers(-9, 10, (4200, 5)).astype(np.float32) for _ in range(2))
    anchors[:, 0] = positives[:, 0] = 1.0
    rows = np.array([0, 2047, 2048, 4199])
    found = exact_neighbors(anchors, positives, 30, rows=rows, device=device, **plain(4200))
    scores = anchors[rows] @ positives.T
    scores[np.arange(4), rows] = -np.inf
    np.testing.assert_array_equal(found.scores, -np.sort(-scores, axis=1)[:, :30])
    if device is None:
        np.testing.assert_array_equal(found.ids, np.argsort(-scores, axis=1, kind="stable")[:, :30])


@pytest.mark.parametrize("search", [exact_neighbors, ivf_neighbors])
def test_a_killed_search_goes_on(search, tmp_path, monkeypatch):
    search = functools.partial(search, unit_rows=7)  # blocks of 56
    anchors, positives = (side.astype(np.float16) for side in embeddings(300, topics=30))
    np.save(tmp_path / "a.npy", anchors)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    whole = search(anchors, positives, 10, **plain(300))
    seen = []

    def kill_at_half(done):
        seen.append(done)
        if done >= 0.5:
            raise Killed

    with pytest.raises(Killed):
        search(mapped, positives, 10, folder=tmp_path / "work", progress=kill_at_half, **plain(300))
    half = len(seen)
    searched = []
    best = neighbors_module.best_columns
    monkeypatch.setattr(
        neighbors_module, "best_columns", lambda *given, **known: (searched.extend(given[1]), best(*given, **known))[1]
    )
    seen.clear()
    again = search(mapped, positives, 10, folder=tmp_path / "work", progress=seen.append, **plain(300))
    assert 0 < len(searched) < 300
    assert seen[0] > 0.5
    assert seen[-1] == 1.0
    assert half >= 2
    for name in ("ids", "scores", "own_score"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    assert again.recall == whole.recall
    assert isinstance(again.ids, np.memmap)
    searched.clear()
    search(mapped, positives, 10, folder=tmp_path / "work", **plain(300))
    assert not searched, "a finished search is read, not repeated"
    changed = positives.copy()
    changed[7] = changed[8]
    with pytest.warns(UserWarning, match="other inputs"):
        fresh = search(mapped, changed, 10, folder=tmp_path / "work", **plain(300))
    np.testing.assert_array_equal(fresh.ids, search(anchors, changed, 10, **plain(300)).ids)


def test_recall_of_any_number_of_cells_is_known_without_searching():
    anchors, positives = embeddings(4000, topics=60, width=16)
    exact = exact_neighbors(anchors, positives, 20, **plain(4000))
    visited = []
    for target in (0.5, 0.8, 0.97):
        found = ivf_neighbors(anchors, positives, 20, target_recall=target, **plain(4000))
        recall = np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(found.ids, exact.ids, strict=True)])
        assert found.recall >= target
        assert recall == pytest.approx(found.recall, abs=0.04)
        visited.append(found.num_probes)
    assert visited == sorted(set(visited))
    everything = ivf_neighbors(anchors, positives, 20, target_recall=1.0, **plain(4000))
    np.testing.assert_array_equal(everything.ids[:5], exact.ids[:5])
