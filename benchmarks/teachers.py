"""What batch statistics and `inspect plan` say of good and bad teachers on the same pairs.

Usage: python -m benchmarks.teachers --data train.jsonl.gz --anchor-embeddings A.npy --positive-embeddings P.npy

The embeddings are the good teacher's, of the first rows of the data at least; the bad ones are LSA (TF-IDF and a
truncated SVD of the same texts). Writes docs/benchmarks/statistics.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from anybatch.data.pairs import PairData
from anybatch.data.reading import read_pairs
from anybatch.insight import markdown_table
from anybatch.insight.plan_figures import inspect_plan
from anybatch.mining import MiningConfig, mine_plan

WINDOWS = ((30, 64), (5, 40))
WIDTHS = (128, 16)
TEMPERATURE = 0.05
SHOWN = ("own_first", "own_behind_skip", "negatives_above_own", "relative_score", "suspects_per_anchor", "isolated")


def main() -> None:
    """Mine and inspect with each teacher and window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--anchor", default="title")
    parser.add_argument("--positive", default="abstract")
    parser.add_argument("--anchor-embeddings", required=True)
    parser.add_argument("--positive-embeddings", required=True)
    parser.add_argument("--teacher", default="MiniLM", help="Name of the good teacher in the table.")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/statistics.md"))
    options = parser.parse_args()
    pairs = read_pairs(options.data, anchor=options.anchor, positive=options.positive, limit=options.rows)
    files = (options.anchor_embeddings, options.positive_embeddings)
    good = [np.asarray(np.load(path, mmap_mode="r")[: len(pairs)]) for path in files]
    teachers = {options.teacher: good, **{f"LSA, {width} dimensions": lsa(pairs, width) for width in WIDTHS}}
    lines: list[list[str]] = []
    for name, (anchors, positives) in teachers.items():
        for skip, take in WINDOWS:
            lines.append([name, f"{skip}, {take}", *figures(pairs, anchors, positives, skip, take)])
            print(lines[-1], flush=True)
    header = ["teacher", "skip, take", *SHOWN, "window_gain", "mass in the batch", "suspects", "warnings"]
    options.out.write_text(
        "# What batch statistics under the teacher say of good and bad teachers\n\n`python -m benchmarks.teachers "
        f"--data train.jsonl.gz --anchor-embeddings A.npy --positive-embeddings P.npy` on the first {len(pairs):,} "
        f"training pairs of arxiv-title-abstract; {options.teacher} embeddings of 64 tokens, LSA of the same texts; "
        "clusters of 32, batches of 64, other settings at their defaults; softmax mass at temperature "
        f"{TEMPERATURE:g}. The columns are explained in "
        "[look before you train](../inspect.md).\n\n" + markdown_table(header, lines),
        encoding="utf-8",
    )


def lsa(pairs: PairData, width: int) -> list[np.ndarray]:
    """Anchors and positives embedded by TF-IDF and a truncated SVD: topics without meaning."""
    texts = [*pairs.anchors, *pairs.positives]
    counts = TfidfVectorizer(min_df=3, max_features=30_000, sublinear_tf=True).fit_transform(texts)
    vectors = TruncatedSVD(width, n_iter=3, random_state=0).fit_transform(counts).astype(np.float32)
    vectors += 1e-6  # a text of unknown words alone is all zero, which cannot be ranked
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [vectors[: len(pairs)], vectors[len(pairs) :]]


def figures(pairs: PairData, anchors: np.ndarray, positives: np.ndarray, skip: int, take: int) -> list[str]:
    """One line of the table."""
    same = {"anchor_id": pairs.anchor_id, "positive_id": pairs.positive_id}
    config = MiningConfig(cluster_size=32, window=(skip, take), margin=None, conflict_weight=3.0)
    result = mine_plan(anchors, positives, config=config, **same)
    seen = inspect_plan(result.plan, anchors, positives, temperature=TEMPERATURE, num_anchors=len(pairs), **same)[""]
    statistics = result.report.as_dict()["statistics"]
    return [
        *(f"{statistics[name]:.3f}" for name in SHOWN),
        f"{statistics['window_gain']:.0f}",
        f"{seen.planned.in_batch:.3f}",
        f"{seen.planned.suspects:.3f}",
        str(len(statistics["warnings"])),
    ]


if __name__ == "__main__":
    main()
