"""The best columns of each row of a score matrix that is made tile by tile and never held whole.

A row's candidates gather in a reservoir of twice the wanted number; when it is full, a quickselect keeps the better
half, and the worst kept score becomes the bar that a score must pass (a heap per row cost a third of the
multiplications' time). Each call runs on one thread, without Python's lock. On an accelerator torch.topk does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from anybatch.mining.compiled import compiled

TILE_ROWS = 512  # x TILE_COLUMNS scores: 4 MB, which stay in the cache between the product and the selection
TILE_COLUMNS = 2048
SEGMENT = 64

Unit = TypeVar("Unit")


class Piece(NamedTuple):
    """Some columns, and the rows of the block that they are compared with."""

    columns: np.ndarray  # (w,) int32 column numbers
    documents: Tensor  # (w, D) float32 on the block's device
    lines: np.ndarray | None = None  # (b,) int64 places in the block; None for all


def best_columns(
    block: Tensor,
    rows: np.ndarray,
    pieces: Iterable[Piece],
    num_kept: int,
    *,
    ids: tuple[np.ndarray, ...],
    by_loop: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The best of all pieces for each query, without those that share an anchor or positive with it.

        ids[i] = argsort_j(-block[i] . documents[j])[:num_kept]   over j with other ids than row i; equal scores: lower
        j

    Args:
        block: (B, D) float32 queries, on the device to compute on.
        rows: (B,) int, the row number of each query.
        pieces: What to compare with; no column twice for a row.
        num_kept: k.
        ids: Anchor and positive ids, (n,) int64 each, of all rows.
        by_loop: By the compiled loop, for a block on the CPU; else by torch operations alone.

    Returns:
        ids (B, k) int32, -1 where there are fewer; scores (B, k) float32, -inf there. On an accelerator, which of
        several equal scores at the very end of the list are kept is left to torch.topk.

    Cost: B * D multiplications a column; B * max(2k, k + 64) * 8 bytes and one tile.
    """
    kept = (_Compiled if by_loop else _OnDevice)(rows, num_kept, ids, block.device)
    height, width = kept.tile
    workspace = torch.empty(height * width, device=block.device)
    every = np.arange(len(block))
    for columns, documents, some in pieces:
        lines = every if some is None else some
        for top in range(0, len(lines), height):
            few = lines[top : top + height]
            if some is None:
                queries = block[top : top + height]
            else:
                queries = block.index_select(0, torch.from_numpy(few).to(block.device))
            for left in range(0, len(columns), width):
                part = documents[left : left + width]
                tile = workspace[: len(few) * len(part)].view(len(few), len(part))
                torch.mm(queries, part.T, out=tile)
                kept.add(tile, few, columns[left : left + width])
    return kept.result()


class _Reservoirs(NamedTuple):
    """What is kept of each row of a block.

    A key is a score's bits, made monotone, above the complement of the column number: comparing keys compares scores,
    and column numbers where scores are equal, so that the order of pieces is no matter.
    """

    keys: np.ndarray  # (B, capacity) uint64
    counts: np.ndarray  # (B,) keys in use
    bars: np.ndarray  # (B,) the score that a column must reach
    rows: np.ndarray  # (B,) row numbers
    anchor_id: np.ndarray  # of all rows
    positive_id: np.ndarray
    num_kept: int


class _Compiled:
    """Reservoirs in memory, filled by a compiled loop."""

    tile = (TILE_ROWS, TILE_COLUMNS)

    def __init__(self, rows: np.ndarray, num_kept: int, ids: tuple[np.ndarray, ...], device: torch.device) -> None:
        keys = np.empty((len(rows), max(2 * num_kept, num_kept + 64)), np.uint64)
        counts, bars = np.zeros(len(rows), np.int64), np.full(len(rows), -np.inf, np.float32)
        self.kept = _Reservoirs(keys, counts, bars, rows, ids[0], ids[1], num_kept)

    def add(self, tile: Tensor, lines: np.ndarray, columns: np.ndarray) -> None:
        scores = tile.numpy()
        _gather(self.kept, scores, scores.view(np.uint32), columns, lines)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(self.kept.rows), self.kept.num_kept)
        ids, scores = np.empty(shape, np.int32), np.empty(shape, np.float32)
        _decode(self.kept.keys, self.kept.counts, ids, scores.view(np.uint32))
        scores[ids < 0] = -np.inf
        return ids, scores


class _OnDevice:
    """The kept scores and columns as tensors; each tile's best are merged into them."""

    tile = (4096, 16384)

    def __init__(self, rows: np.ndarray, num_kept: int, ids: tuple[np.ndarray, ...], device: torch.device) -> None:
        self.device = device
        self.sides = [torch.from_numpy(np.asarray(side, np.int64)).to(device) for side in ids]
        self.rows = torch.from_numpy(np.asarray(rows, np.int64)).to(device)
        self.scores = torch.full((len(rows), num_kept), -torch.inf, device=device)
        self.ids = torch.full((len(rows), num_kept), -1, dtype=torch.int64, device=device)

    def add(self, tile: Tensor, lines: np.ndarray, columns: np.ndarray) -> None:
        columns_here = torch.from_numpy(columns.astype(np.int64)).to(self.device)
        places_here = torch.from_numpy(lines).to(self.device)
        rows = self.rows[places_here]
        for ids in self.sides:
            tile.masked_fill_(ids[rows][:, None] == ids[columns_here][None], -torch.inf)
        tile.masked_fill_(rows[:, None] == columns_here[None], -torch.inf)
        scores, places = tile.topk(min(self.scores.shape[1], tile.shape[1]), dim=1)
        ids = torch.where(scores > -torch.inf, columns_here[places], -1)
        scores, ids = torch.cat([self.scores[places_here], scores], 1), torch.cat([self.ids[places_here], ids], 1)
        by_id = ids.argsort(dim=1)
        order = by_id.gather(1, scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True))
        best = order[:, : self.scores.shape[1]]
        self.scores[places_here], self.ids[places_here] = scores.gather(1, best), ids.gather(1, best)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return self.ids.to(torch.int32).cpu().numpy(), self.scores.cpu().numpy()


@contextmanager
def workers() -> Iterator[Callable[[Callable[[Unit], None], Iterable[Unit]], Iterable[None]]]:
    """A `map` over as many threads as torch uses, each of one; torch's number is afterwards what it was."""
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)


@compiled(nogil=True)
def _gather(kept, scores, bits, columns, lines):  # pragma: no cover - compiled
    """Read a tile: what passes a row's bar goes into its reservoir."""
    keys, anchor_id, positive_id = kept.keys, kept.anchor_id, kept.positive_id
    for tile_line in range(scores.shape[0]):
        line = lines[tile_line]
        row, bar, count = kept.rows[line], kept.bars[line], kept.counts[line]
        own_anchor, own_positive = anchor_id[row], positive_id[row]
        for first in range(0, scores.shape[1], SEGMENT):
            last = min(first + SEGMENT, scores.shape[1])
            segment = scores[tile_line, first:last]
            passing = np.int32(0)  # a sum of 32-bit numbers, not a branch: this is what becomes vector code
            for place in range(len(segment)):
                passing += np.int32(segment[place] >= bar)
            if passing == 0:
                continue
            for place in range(first, last):
                if scores[tile_line, place] >= bar:
                    other = columns[place]
                    if other == row or anchor_id[other] == own_anchor or positive_id[other] == own_positive:
                        continue
                    keys[line, count] = _key(bits[tile_line, place], other)
                    count += 1
                    if count == keys.shape[1]:
                        bar = _score(_select(keys[line], kept.num_kept))
                        count = kept.num_kept
        kept.bars[line], kept.counts[line] = bar, count


@compiled(inline="always")
def _key(bits, column):  # pragma: no cover - compiled
    """Larger for a larger score; at equal scores larger for the smaller column."""
    if bits == np.uint32(0x80000000):  # minus zero equals zero
        bits = np.uint32(0)
    ordered = ~bits if bits & np.uint32(0x80000000) else bits | np.uint32(0x80000000)
    return (np.uint64(np.uint32(ordered)) << np.uint64(32)) | np.uint64(np.uint32(0xFFFFFFFF) - np.uint32(column))


@compiled(inline="always")
def _bits(key):  # pragma: no cover - compiled
    ordered = np.uint32(key >> np.uint64(32))
    return np.uint32(ordered ^ np.uint32(0x80000000) if ordered & np.uint32(0x80000000) else ~ordered)


@compiled
def _score(key):  # pragma: no cover - compiled
    one = np.empty(1, np.uint32)
    one[0] = _bits(key)
    return one.view(np.float32)[0]


@compiled
def _select(keys, num_kept):  # pragma: no cover - compiled
    """Bring the `num_kept` largest to the front (Hoare's quickselect) and return the least of them."""
    low, high, wanted = 0, len(keys) - 1, num_kept - 1
    while low < high:
        middle = (low + high) // 2
        a, b, c = keys[low], keys[middle], keys[high]
        pivot = max(min(a, b), min(max(a, b), c))
        left, right = low, high
        while left <= right:
            while keys[left] > pivot:
                left += 1
            while keys[right] < pivot:
                right -= 1
            if left <= right:
                keys[left], keys[right] = keys[right], keys[left]
                left += 1
                right -= 1
        if wanted <= right:
            high = right
        elif wanted >= left:
            low = left
        else:
            break
    return keys[wanted]


@compiled(nogil=True)
def _decode(keys, counts, ids, bits):  # pragma: no cover - compiled
    """The best of each reservoir, best first."""
    for line in range(len(keys)):
        best = np.sort(keys[line, : counts[line]])[::-1]
        for place in range(ids.shape[1]):
            if place < len(best):
                ids[line, place] = np.int32(np.uint32(0xFFFFFFFF) - np.uint32(best[place] & np.uint64(0xFFFFFFFF)))
                bits[line, place] = _bits(best[place])
            else:
                ids[line, place] = -1
                bits[line, place] = 0
