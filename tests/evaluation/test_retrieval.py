from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.core.errors import AnybatchError
from anybatch.evaluation.retrieval import pair_metrics, rank_embeddings, retrieval_metrics

KS = (1, 3, 10)


def trec(run, relevance):
    measures = {f"recall.{','.join(map(str, KS))}", f"ndcg_cut.{','.join(map(str, KS))}", "recip_rank"}
    per_query = pytrec_eval.RelevanceEvaluator(relevance, measures).evaluate(run)
    mean = {name: np.mean([figures[name] for figures in per_query.values()]) for name in next(iter(per_query.values()))}
    expected = {f"recall@{k}": mean[f"recall_{k}"] for k in KS} | {f"ndcg@{k}": mean[f"ndcg_cut_{k}"] for k in KS}
    for k in KS:  # trec_eval has no cut-off for the reciprocal rank, so a rank beyond k is told from the value
        expected[f"mrr@{k}"] = np.mean(
            [value if (value := figures["recip_rank"]) >= 1 / k - 1e-12 else 0.0 for figures in per_query.values()]
        )
    return expected


@st.composite
def runs(draw):
    documents = [f"d{number}" for number in draw(st.lists(st.integers(0, 300), min_size=1, max_size=25, unique=True))]
    run, relevance = {}, {}
    for query in range(draw(st.integers(1, 5))):
        # Few distinct values make many ties; some differ only beyond float32.
        values = st.sampled_from([0.1, 0.5, 0.5 + 1e-12, 0.5 + 1e-6, -1.0, 2.0, 3e5])
        run[f"q{query}"] = {document: draw(values) for document in documents}
        judged = draw(st.lists(st.sampled_from(documents), min_size=1, unique=True))
        relevance[f"q{query}"] = {document: draw(st.integers(0, 3)) for document in judged}
    return run, relevance


@settings(deadline=None, max_examples=300)
@given(case=runs())
def test_agrees_with_trec_eval_ties_included(case):
    run, relevance = case
    documents = list(run["q0"])
    scores = np.array([list(values.values()) for values in run.values()])
    ours = retrieval_metrics(np.eye(len(run)), scores.T, relevance, query_ids=list(run), corpus_ids=documents, ks=KS)
    for name, value in trec(run, relevance).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 4))
def test_embeddings_agree_with_trec_eval_ties_included(seed, levels):
    generator = np.random.default_rng(seed)
    queries = generator.integers(-levels, levels + 1, (6, 3)).astype(np.float32)
    corpus = generator.integers(-levels, levels + 1, (30, 3)).astype(np.float32)
    query_ids, corpus_ids = [f"q{n}" for n in range(6)], [str(n) for n in generator.permutation(30)]
    relevance = {
        query: {str(document): int(generator.integers(0, 3)) for document in generator.choice(30, 4, replace=False)}
        for query in query_ids
    }
    run = {
        query: {document: float(score) for document, score in zip(corpus_ids, line)}
        for query, line in zip(query_ids, queries @ corpus.T)
    }
    ours = retrieval_metrics(queries, corpus, relevance, query_ids=query_ids, corpus_ids=corpus_ids, ks=KS)
    for name, value in trec(run, relevance).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name


def test_ranking_is_that_of_a_stable_sort(monkeypatch):
    monkeypatch.setattr("anybatch.evaluation.retrieval.BLOCK_BYTES", 500)  # several blocks
    generator = np.random.default_rng(0)
    queries, corpus = (
        generator.integers(-1, 2, (23, 4)).astype(np.float32),
        generator.integers(-1, 2, (41, 4)).astype(np.float32),
    )
    rows = rank_embeddings(queries, corpus, top_k=7)
    similarity = queries @ corpus.T
    np.testing.assert_array_equal(rows, np.argsort(-similarity, axis=1, kind="stable")[:, :7])
    assert rank_embeddings(queries, corpus[:3], top_k=7).shape == (23, 3)


def test_pairs_with_repeated_texts():
    # Anchors 0 and 2 are one text with two positives; positives 1 and 3 are one text.
    anchors = np.array([[1.0, 0], [0, 1], [1, 0], [0.9, 0.1]], np.float32)
    positives = np.array([[1.0, 0], [0, 1], [0.99, 0.0], [0, 1]], np.float32)
    figures = pair_metrics(
        anchors, positives, anchor_id=np.array([0, 1, 0, 3]), positive_id=np.array([0, 1, 2, 1]), ks=(1, 2)
    )
    assert (figures["num_queries"], figures["num_pairs"]) == (3, 4)
    assert figures["recall@1"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert figures["recall@2"] == pytest.approx((1 + 1 + 0) / 3)


def test_ids_are_texts_and_a_document_in_several_rows_counts_once():
    places, relevance = np.eye(4, dtype=np.float32), {"10": {"7": 1, "8": 1}}
    corpus = places[[0, 0, 1, 3]] + 0.1 * places[[1, 1, 0, 3]]
    given = {"query_ids": [10], "corpus_ids": [7, 7, 8, 9], "ks": (2, 4)}
    found = retrieval_metrics(places[:1], corpus, relevance, **given)
    assert {value for name, value in found.items() if name != "num_queries"} == {1.0}


def test_mistakes():
    good = np.ones((3, 2), np.float32)
    bad = good.copy()
    bad[1, 0] = np.nan
    with pytest.raises(AnybatchError, match="document embeddings are NaN or infinite, the first in row 1"):
        rank_embeddings(good, bad)
    with pytest.raises(AnybatchError, match="one D"):
        rank_embeddings(good, np.ones((3, 4)))
    with pytest.raises(AnybatchError, match="None of the 1 queries"):
        retrieval_metrics(good[:1], good, {"b": {"d": 1}}, query_ids=["a"], corpus_ids=["d", "e", "f"])
