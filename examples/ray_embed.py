"""Embed a corpus on an existing Ray cluster, for `anybatch mine`: past one machine embedding is most of mining's time.

Ray gives rows back in any order: each carries its number, and the shards are joined by it. Queries and documents have
the model's own prompts and routes, as in `anybatch mine --teacher MODEL`. Folders are ones that all nodes see.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray

from anybatch import read_pairs, sample
from anybatch.integrations.sentence_transformers import embed_texts

MODEL = sys.argv[1] if len(sys.argv) > 1 else sample.model()
DATA, ANCHOR, POSITIVE, LIMIT = sample.path("train"), "title", "abstract", 256  # yours
COPIES, GPUS = 1, 0  # of the model; of a copy, 0 for CPUs
SHARDS, OUT = Path("shards").absolute(), Path("teacher").absolute()


class Teacher:
    """One copy of the model, in a process of its own."""

    def __init__(self, side):
        from sentence_transformers import SentenceTransformer

        self.model, self.side = SentenceTransformer(MODEL), side

    def __call__(self, batch):
        """A batch of texts as their embeddings, with their row numbers."""
        return {"row": batch["row"], "embedding": embed_texts(self.model, list(batch["text"]), side=self.side)}


def embed(texts, side, path):
    """Shards of row numbers and embeddings, in no order; then one .npy file in the order of the data."""
    shutil.rmtree(SHARDS / side, ignore_errors=True)
    rows = ray.data.from_items([{"row": row, "text": text} for row, text in enumerate(texts)])
    options = {"fn_constructor_args": (side,), "batch_size": 128, "concurrency": COPIES, "num_gpus": GPUS}
    rows.map_batches(Teacher, **options).write_parquet(str(SHARDS / side))
    vectors, seen = None, np.zeros(len(texts), int)
    for shard in sorted((SHARDS / side).glob("*.parquet")):
        table = pq.read_table(shard)
        row, embedding = table["row"].to_numpy(), np.stack(table["embedding"].to_pylist())
        if vectors is None:
            vectors = np.lib.format.open_memmap(path, "w+", np.float32, (len(texts), embedding.shape[1]))
        vectors[row] = embedding
        np.add.at(seen, row, 1)
    assert (seen == 1).all(), "a row is missing or came twice: embed again"
    vectors.flush()


pairs = read_pairs(DATA, anchor=ANCHOR, positive=POSITIVE, limit=LIMIT)
OUT.mkdir(exist_ok=True)
embed(pairs.anchors, "query", OUT / "anchor.npy")
embed(pairs.positives, "document", OUT / "positive.npy")
print(f"anybatch mine --data {DATA} --anchor {ANCHOR} --positive {POSITIVE} --limit {LIMIT} --output mined \\")
print(f"    --set 'teacher.embeddings=[{OUT}/anchor.npy, {OUT}/positive.npy]'")
