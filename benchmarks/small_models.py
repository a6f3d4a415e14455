"""Small data sets and encoders that train from scratch in under a minute on one core: word bags for text, four
convolutions for images.

Two tasks, each with training, development and test pairs:

    arxiv   title -> abstract; one encoder for both sides: mean of word embeddings, then a residual MLP, 128 dimensions
    emoji   picture <-> caption, both ways; convolutions for pictures at 24 x 24, word bags for captions

Words are hashed (CRC-32) into a small table, so that there is no vocabulary to keep. Tokenised data are cached in one
file a split.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.core.files import digest_of, write_atomically
from anybatch.evaluation.retrieval import pair_metrics

BUCKETS, WIDTH, WORDS, PIXELS = 2**14, 128, 64, 24
EVALUATION_ROWS = 512  # texts or pictures a forward pass when evaluating


@dataclass(frozen=True, kw_only=True, eq=False)
class Bags:
    """Texts as word numbers: those of row i are `words[starts[i] : starts[i + 1]]`."""

    words: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def select(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The words of these rows, one after the other, and where each row starts: what `nn.EmbeddingBag` takes."""
        lengths = (self.starts[1:] - self.starts[:-1])[rows]
        ends = np.cumsum(lengths)
        offsets = ends - lengths
        places = np.arange(ends[-1]) - np.repeat(offsets - self.starts[rows], lengths)
        return torch.from_numpy(self.words[places]), torch.from_numpy(offsets)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Pairs: inputs of both sides and ids, equal for identical texts. Pictures are uint8 (n, 3, PIXELS, PIXELS)."""

    anchors: Bags | np.ndarray
    positives: Bags
    anchor_id: np.ndarray
    positive_id: np.ndarray

    def __len__(self) -> int:
        return len(self.anchor_id)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A data set with its splits, and which direction it is trained and tested in."""

    name: str
    direction: Literal["one_way", "both"]
    temperature: float
    train: Split
    dev: Split
    test: Split
    make_model: Callable[[], PairModel]


class WordBags(nn.Module):
    """Mean of word embeddings, then a residual MLP: (rows of words) -> (B, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, WIDTH, mode="mean")
        nn.init.normal_(self.table.weight, std=0.1)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, bags: Bags, rows: np.ndarray) -> Tensor:
        """Embed some rows."""
        mean = self.table(*bags.select(rows))
        return mean + self.mlp(mean)


class Pictures(nn.Module):
    """Four convolutions and a linear map: (B, 3, PIXELS, PIXELS) -> (B, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 32, 64, 96, 128), []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4, WIDTH))

    def forward(self, pictures: np.ndarray, rows: np.ndarray) -> Tensor:
        """Embed some rows."""
        return self.layers(torch.from_numpy(pictures[rows]).float() / 127.5 - 1)


class PairModel(nn.Module):
    """Two encoders, which may be one and the same."""

    def __init__(self, anchor: nn.Module, positive: nn.Module) -> None:
        super().__init__()
        self.anchor, self.positive = anchor, positive

    def forward(self, split: Split, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Embeddings of both sides of some pairs, (B, WIDTH) each, not normalised."""
        return self.anchor(split.anchors, rows), self.positive(split.positives, rows)


def tied_word_bags() -> PairModel:
    """One word-bag encoder for both sides."""
    encoder = WordBags()
    return PairModel(encoder, encoder)


def picture_and_words() -> PairModel:
    """Convolutions for the anchors, word bags for the positives."""
    return PairModel(Pictures(), WordBags())


def evaluate(model: PairModel, split: Split, *, direction: str) -> dict[str, float]:
    """nDCG@10 and recall@1 on the pairs of a split among themselves; for "both", the mean of the two directions."""
    model.eval()
    with torch.no_grad():
        blocks = [
            model(split, np.arange(start, min(start + EVALUATION_ROWS, len(split))))
            for start in range(0, len(split), EVALUATION_ROWS)
        ]
    model.train()
    anchors, positives = (nn.functional.normalize(torch.cat(side), dim=1).numpy() for side in zip(*blocks, strict=True))
    there = pair_metrics(anchors, positives, anchor_id=split.anchor_id, positive_id=split.positive_id, ks=(1, 10))
    if direction == "both":
        back = pair_metrics(positives, anchors, anchor_id=split.positive_id, positive_id=split.anchor_id, ks=(1, 10))
        there = {name: (there[name] + back[name]) / 2 for name in there}
    return {name: there[name] for name in ("ndcg@10", "recall@1")}


def load_task(name: str, folder: Path, *, cache: Path, limit: int | None = None) -> Task:
    """Read a task's data.

    Args:
        name: "arxiv" or "emoji".
        folder: Where its data lie: train/dev/test.jsonl.gz with title and abstract; images.npz and meta.jsonl.gz.
        cache: Folder for tokenised data.
        limit: Use only the first training pairs.
    """
    make: dict[str, Callable[[Path, Path, int | None], Task]] = {"arxiv": _arxiv, "emoji": _emoji}
    cache.mkdir(parents=True, exist_ok=True)
    return make[name](folder, cache, limit)


def lsa_teacher(split: Split, *, dimensions: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A weak teacher from the training data alone: tf-idf of the words, truncated SVD. Pictures take the embedding of
    their caption.
    """
    from scipy.sparse import csr_matrix, diags, vstack
    from scipy.sparse.linalg import svds

    sides = [split.positives if isinstance(side, np.ndarray) else side for side in (split.anchors, split.positives)]
    counts = [
        csr_matrix((np.ones(len(bags.words), np.float32), bags.words, bags.starts), shape=(len(bags), BUCKETS))
        for bags in sides
    ]
    for side in counts:
        side.sum_duplicates()  # so that an entry is a word of a document, however often it occurs
    documents = np.bincount(vstack(counts).tocsr().indices, minlength=BUCKETS)
    idf = diags(np.log(2 * len(split) / np.maximum(1, documents)).astype(np.float32))
    for side in counts:
        side.data = np.sqrt(side.data)
    weighted = [csr_matrix(side @ idf) for side in counts]
    start = np.random.default_rng(0).normal(size=min(len(split), BUCKETS))
    _, values, vectors = svds(weighted[1], k=min(dimensions, len(split) - 1), v0=start)
    assert vectors is not None
    projected = [np.asarray(side @ vectors.T) / np.sqrt(values + 1e-6) for side in weighted]
    return tuple(side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9) for side in projected)  # pyright: ignore


def _arxiv(folder: Path, cache: Path, limit: int | None) -> Task:
    splits = {}
    for name in ("train", "dev", "test"):
        rows = _lines(folder / f"{name}.jsonl.gz")[: limit if name == "train" else None]
        titles, abstracts = ([row[column] for row in rows] for column in ("title", "abstract"))
        splits[name] = Split(
            anchors=_bags(titles, cache),
            positives=_bags(abstracts, cache),
            anchor_id=_ids(titles),
            positive_id=_ids(abstracts),
        )
    return Task(name="arxiv", direction="one_way", temperature=0.05, make_model=tied_word_bags, **splits)


def _emoji(folder: Path, cache: Path, limit: int | None) -> Task:
    from PIL import Image

    stored, meta = np.load(folder / "images.npz"), _lines(folder / "meta.jsonl.gz")
    data, offsets = stored["data"], stored["offsets"]
    splits = {}
    for name, wanted in (("train", "train"), ("dev", "dev_concept"), ("test", "test_concept")):
        rows = [row for row in meta if row["split"] == wanted][: limit if name == "train" else None]
        captions = [f"{row['label']}: {', '.join(row['tags'])}" for row in rows]
        pictures = [
            Image.open(io.BytesIO(data[offsets[row["i"]] : offsets[row["i"] + 1]].tobytes()))
            .convert("RGB")
            .resize((PIXELS, PIXELS), Image.Resampling.BOX)
            for row in rows
        ]
        splits[name] = Split(
            anchors=np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]),
            positives=_bags(captions, cache),
            anchor_id=np.arange(len(rows)),
            positive_id=_ids(captions),
        )
    return Task(name="emoji", direction="both", temperature=0.07, make_model=picture_and_words, **splits)


def _bags(texts: Sequence[str], cache: Path) -> Bags:
    """Hash the words of each text, at most WORDS, at least one; kept in `cache` under the digest of the texts."""
    path = cache / f"bags-{BUCKETS}-{WORDS}-{digest_of(text.encode() for text in texts)}.npz"
    if not path.exists():
        rows = [
            [zlib.crc32(word.encode()) % BUCKETS for word in re.findall(r"\w+", text.lower())[:WORDS]] or [0]
            for text in texts
        ]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        words = np.concatenate([np.asarray(row, np.int64) for row in rows])

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, words=words, starts=starts)

        write_atomically(path, write)
    stored = np.load(path)
    return Bags(words=stored["words"], starts=stored["starts"])


def _ids(texts: Sequence[str]) -> np.ndarray:
    return np.unique(np.asarray(texts), return_inverse=True)[1].reshape(-1)


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]
