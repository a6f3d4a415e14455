"""A small sample of real pairs: titles and abstracts of arXiv papers (CC0). Imports data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from anybatch.data.pairs import PairData
from anybatch.data.reading import read_pairs

Split = Literal["train", "test"]


def path(split: Split) -> Path:
    """The file of a split: JSON lines, gzip, columns title, abstract, category, id."""
    return Path(__file__).parent / f"{split}.jsonl.gz"


def load(split: Split, *, limit: int | None = None) -> PairData:
    """The pairs of a split, title to abstract; `limit` keeps the first rows."""
    return read_pairs(path(split), anchor="title", positive="abstract", limit=limit)
