"""Retrieval figures: recall, MRR and nDCG as trec_eval defines them, ties included: scores are compared in float32, and
among equal ones the document whose id is greater as a string goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from anybatch.core.errors import AnybatchError

KS = (1, 10, 100)
BLOCK_BYTES = 64 * 2**20  # of scores held at once


def rank_embeddings(queries: np.ndarray, corpus: np.ndarray, *, top_k: int = 100) -> np.ndarray:
    """The best documents of each query by inner product, the lower row number first among equal scores.

    Args:
        queries, corpus: (Q, D) and (N, D) float; NaN is refused.
        top_k: Documents a query, at most N.

    Returns:
        Row numbers (Q, top_k) int64, best first.
    """
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise AnybatchError(f"Embeddings have shapes {queries.shape} and {corpus.shape}; expected (rows, D), one D.")
    for name, array in (("query", queries), ("document", corpus)):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise AnybatchError(
                f"{len(bad)} {name} embeddings are NaN or infinite, the first in row {bad[0]}. The model has diverged "
                "or its input is broken."
            )
    top_k = min(top_k, len(corpus))
    rows = np.empty((len(queries), top_k), np.int64)
    block = max(1, BLOCK_BYTES // (4 * max(1, len(corpus))))
    transposed = np.ascontiguousarray(corpus.T, dtype=np.float32)
    for start in range(0, len(queries), block):
        similarity = np.asarray(queries[start : start + block], dtype=np.float32) @ transposed
        # The k-th best score, then all documents at least as good: row numbers, not chance, decide ties at the edge.
        edge = np.partition(similarity, -top_k, axis=1)[:, -top_k]
        for offset, line in enumerate(similarity):
            found = np.flatnonzero(line >= edge[offset])
            rows[start + offset] = found[np.argsort(-line[found], kind="stable")][:top_k]
    return rows


def retrieval_metrics(
    queries: np.ndarray,
    corpus: np.ndarray,
    relevance: Mapping[str, Mapping[str, int]],
    *,
    query_ids: Sequence[str],
    corpus_ids: Sequence[str],
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Figures of embeddings on a retrieval set, documents ranked by inner product.

    Args:
        queries, corpus: (Q, D) and (N, D) float, in the order of `query_ids` and `corpus_ids`.
        relevance: Query id to document id to grade; documents with a grade above 0 are relevant.
        ks: Cut-offs.

    Returns:
        `recall@k`, `mrr@k`, `ndcg@k` for each k, averaged over the queries that have a judgement, and `num_queries`. A
        query without a relevant document counts 0, as in trec_eval.
    """
    # Documents in descending order of id, so that "the lower row first" is trec_eval's order among ties.
    documents = [str(identity) for identity in corpus_ids]  # as in `relevance`, also where they are numbers
    order = np.array(sorted(range(len(documents)), key=lambda row: documents[row], reverse=True), np.int64)
    rows = rank_embeddings(queries, corpus[order], top_k=max(ks))
    totals, judged = np.zeros((3, len(ks))), 0
    for place, ranked in enumerate(order[rows]):
        if grades := relevance.get(str(query_ids[place])):
            found = dict.fromkeys(documents[row] for row in ranked)  # a document in several rows counts once
            gains = [max(grades.get(document, 0), 0) for document in found]
            relevant = [grade for grade in grades.values() if grade > 0]
            totals += _figures(np.array(gains, np.float64), np.array(relevant, np.float64), ks)
            judged += 1
    if not judged:
        raise AnybatchError(
            f"None of the {len(query_ids)} queries is among the {len(relevance)} judged ones. Check the ids."
        )
    figures = zip(("recall", "mrr", "ndcg"), (totals / judged).tolist(), strict=True)
    named = {f"{name}@{k}": value for name, values in figures for k, value in zip(ks, values, strict=True)}
    return {**named, "num_queries": float(judged)}


def pair_metrics(
    anchors: np.ndarray,
    positives: np.ndarray,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Figures of embeddings (n, D) on pairs: each distinct anchor must find its positives among all distinct positives.

    Ids are equal for identical texts. Repeated anchors are one query with several relevant documents; beside
    `num_queries` stands `num_pairs`.
    """
    _, queries = np.unique(anchor_id, return_index=True)
    _, documents = np.unique(positive_id, return_index=True)
    relevance: dict[str, dict[str, int]] = {}
    for anchor, positive in zip(anchor_id, positive_id, strict=True):
        relevance.setdefault(str(anchor), {})[str(positive)] = 1
    figures = retrieval_metrics(
        anchors[queries],
        positives[documents],
        relevance,
        query_ids=[str(number) for number in anchor_id[queries]],
        corpus_ids=[str(number) for number in positive_id[documents]],
        ks=ks,
    )
    return {**figures, "num_pairs": float(len(anchor_id))}


def _figures(gains: np.ndarray, relevant: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """(3, len(ks)): recall, reciprocal rank, nDCG of one query; from grades in ranked order and all relevant ones."""
    figures = np.zeros((3, len(ks)))
    if not len(relevant):
        return figures
    discounts = 1 / np.log2(np.arange(2, 2 + max(len(gains), len(relevant), 1)))
    ideal = np.sort(relevant)[::-1]
    hits = np.flatnonzero(gains > 0)
    for column, k in enumerate(ks):
        figures[0, column] = np.count_nonzero(hits < k) / len(relevant)
        figures[1, column] = 1 / (1 + hits[0]) if len(hits) and hits[0] < k else 0.0
        best = float(np.sum(ideal[:k] * discounts[: len(ideal[:k])]))
        figures[2, column] = float(np.sum(gains[:k] * discounts[: len(gains[:k])])) / best
    return figures
