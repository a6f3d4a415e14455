"""Retrieval figures: recall, MRR and nDCG as trec_eval defines them, ties included: scores are compared in float32, and
among equal ones the document whose id is greater as a string goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from anybatch.core.errors import AnybatchError

KS = (1, 10, 100)
BLOCK_BYTES = 64 * 2**20  # of scores held at once


def evaluate_run(
    run: Mapping[str, Mapping[str, float]], relevance: Mapping[str, Mapping[str, int]], *, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Figures of a run: for each query some documents with scores.

    Args:
        run: Query id to document id to score.
        relevance: Query id to document id to grade; documents with a grade above 0 are relevant.
        ks: Cut-offs.

    Returns:
        `recall@k`, `mrr@k`, `ndcg@k` for each k, averaged over the queries that are in both and have a judgement, and
        `num_queries`. A query without a relevant document counts 0, as in trec_eval.
    """
    queries = [query for query in run if relevance.get(query)]
    if not queries:
        raise AnybatchError(
            f"None of the {len(run)} queries of the run is among the {len(relevance)} judged ones. Check the ids."
        )
    depth = max(ks)
    totals = np.zeros((3, len(ks)))
    for query in queries:
        # Python sorts stably, so sort by id first, then by score.
        ranking = sorted(run[query].items(), key=lambda item: item[0], reverse=True)
        ranking.sort(key=lambda item: np.float32(item[1]), reverse=True)
        grades = relevance[query]
        gains = np.array([max(grades.get(document, 0), 0) for document, _ in ranking[:depth]], dtype=np.float64)
        totals += _figures(gains, np.array([grade for grade in grades.values() if grade > 0], dtype=np.float64), ks)
    return _named(totals / len(queries), ks, len(queries))


def rank_embeddings(queries: np.ndarray, corpus: np.ndarray, *, top_k: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """The best documents of each query by inner product, the lower row number first among equal scores.

    Args:
        queries, corpus: (Q, D) and (N, D) float; NaN is refused.
        top_k: Documents a query, at most N.

    Returns:
        Row numbers (Q, top_k) int64 and scores (Q, top_k) float32, best first.
    """
    _check_embeddings(queries, corpus)
    top_k = min(top_k, len(corpus))
    rows = np.empty((len(queries), top_k), np.int64)
    scores = np.empty((len(queries), top_k), np.float32)
    block = max(1, BLOCK_BYTES // (4 * max(1, len(corpus))))
    transposed = np.ascontiguousarray(corpus.T, dtype=np.float32)
    for start in range(0, len(queries), block):
        similarity = np.asarray(queries[start : start + block], dtype=np.float32) @ transposed
        # The k-th best score, then all documents at least as good: row numbers, not chance, decide ties at the edge.
        edge = np.partition(similarity, -top_k, axis=1)[:, -top_k]
        for offset, line in enumerate(similarity):
            found = np.flatnonzero(line >= edge[offset])
            order = found[np.argsort(-line[found], kind="stable")][:top_k]
            rows[start + offset], scores[start + offset] = order, line[order]
    return rows, scores


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
        relevance: Query id to document id to grade.
        ks: Cut-offs.
    """
    # Documents in descending order of id, so that "the lower row first" is trec_eval's order among ties.
    order = sorted(range(len(corpus_ids)), key=lambda row: corpus_ids[row], reverse=True)
    rows, scores = rank_embeddings(queries, corpus[np.asarray(order, dtype=np.int64)], top_k=max(ks))
    run: dict[str, dict[str, float]] = {
        str(query): {str(corpus_ids[order[int(row)]]): float(score) for row, score in zip(line, values, strict=True)}
        for query, line, values in zip(query_ids, rows, scores, strict=True)
    }
    return evaluate_run(run, relevance, ks=ks)


def pair_metrics(
    anchors: np.ndarray,
    positives: np.ndarray,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Figures of embeddings (n, D) on pairs: each distinct anchor must find its positives among all distinct positives.

    Ids are equal for identical texts. Repeated anchors have several relevant documents.
    """
    _, queries = np.unique(anchor_id, return_index=True)
    _, documents = np.unique(positive_id, return_index=True)
    relevance: dict[str, dict[str, int]] = {}
    for anchor, positive in zip(anchor_id, positive_id, strict=True):
        relevance.setdefault(str(anchor), {})[str(positive)] = 1
    return retrieval_metrics(
        anchors[queries],
        positives[documents],
        relevance,
        query_ids=[str(number) for number in anchor_id[queries]],
        corpus_ids=[str(number) for number in positive_id[documents]],
        ks=ks,
    )


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


def _named(figures: np.ndarray, ks: Sequence[int], num_queries: int) -> dict[str, float]:
    named = {
        f"{name}@{k}": float(figures[row, column])
        for row, name in enumerate(("recall", "mrr", "ndcg"))
        for column, k in enumerate(ks)
    }
    return {**named, "num_queries": float(num_queries)}


def _check_embeddings(queries: np.ndarray, corpus: np.ndarray) -> None:
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise AnybatchError(
            f"Embeddings have shapes {queries.shape} and {corpus.shape}; expected (rows, D) with one D."
        )
    for name, array in (("query", queries), ("document", corpus)):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise AnybatchError(
                f"{len(bad)} {name} embeddings are NaN or infinite, the first in row {bad[0]}. The model has diverged "
                "or its input is broken."
            )
