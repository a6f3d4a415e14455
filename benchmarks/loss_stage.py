"""The loss alone, on embeddings that are already there: time over the time of its matrix products. Part of
`benchmarks.caching`.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from anybatch.losses import InfoNCE
from anybatch.losses.engine import TILE_BYTES

OURS, PRODUCTS, PEER = "anybatch InfoNCE", "its three matrix products", "sentence-transformers, cached, 32"
CONTENDERS = (PRODUCTS, OURS, PEER)


def measure(name: str, rows: int, dimensions: int) -> dict[str, float]:
    """Wall and processor seconds of one forward and backward pass of the loss of `rows` pairs."""
    generator = torch.Generator().manual_seed(0)
    anchors, candidates = (
        torch.nn.functional.normalize(torch.randn(rows, dimensions, generator=generator)) for _ in range(2)
    )
    run = {PRODUCTS: _products, OURS: _ours, PEER: _peer}[name]
    run(anchors[:256], candidates[:256])  # warms up
    wall, processor = time.perf_counter(), time.process_time()
    run(anchors, candidates)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}


def _ours(anchors: Tensor, candidates: Tensor) -> None:
    leaves = [side.clone().requires_grad_() for side in (anchors, candidates)]
    InfoNCE(temperature=0.05)(*leaves).backward()


def _products(anchors: Tensor, candidates: Tensor) -> None:
    """What no method can do without: scores, and the gradient of either side, in tiles of the same height."""
    height = max(1, TILE_BYTES // (4 * len(candidates)))
    d_candidates = torch.zeros_like(candidates)
    for rows in anchors.split(height):
        scores = rows @ candidates.T
        _ = scores @ candidates
        d_candidates.addmm_(scores.T, rows)


def _peer(anchors: Tensor, candidates: Tensor) -> None:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(torch.nn.Sequential(torch.nn.Identity()), scale=20.0, mini_batch_size=32)  # pyright: ignore[reportArgumentType]
    chunks = [[part.clone().requires_grad_() for part in side.split(32)] for side in (anchors, candidates)]
    loss.calculate_loss(chunks, None, with_backward=True)
