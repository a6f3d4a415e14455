"""Read retrieval sets in BEIR's layout: documents, queries, and which documents are relevant to which query."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anybatch.core.errors import AnybatchError
from anybatch.data.pairs import text_digest
from anybatch.data.records import Quoting, column_names, no_column, records

logger = logging.getLogger("anybatch")


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalData:
    """Judged queries, documents (title and text joined by a space), and grades by query id and document id."""

    query_ids: Sequence[str]
    query_texts: Sequence[str]
    corpus_ids: Sequence[str]
    corpus_texts: Sequence[str]
    relevance: Mapping[str, Mapping[str, int]]

    @cached_property
    def digest(self) -> str:
        """Of all of it."""
        judged = [f"{query} {sorted(grades.items())}" for query, grades in sorted(self.relevance.items())]
        return text_digest((self.query_ids, self.query_texts, self.corpus_ids, self.corpus_texts, judged))


def find_retrieval(path: str | os.PathLike[str], split: str | None = None) -> tuple[str, str, str] | None:
    """The files of a folder in BEIR's layout: corpus.jsonl, queries.jsonl, and of qrels/ that of `split`, by default
    test.tsv or the only one; None for any other path.
    """
    folder = Path(path)
    parts = [next(iter(sorted(folder.glob(f"{name}.jsonl*"))), None) for name in ("corpus", "queries")]
    if None in parts:
        return None
    judgements = {file.stem: file for file in sorted((folder / "qrels").glob("*.tsv"))}
    split = split or (next(iter(judgements)) if len(judgements) == 1 else "test")
    if split not in judgements:
        there = f"there are {', '.join(judgements)}" if judgements else "there are none"
        raise AnybatchError(f"{folder} has no judgements qrels/{split}.tsv; {there}. Choose one with split (--split).")
    return str(parts[0]), str(parts[1]), str(judgements[split])


def read_retrieval(
    corpus: str | os.PathLike[str],
    queries: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    quoting: Quoting | None = None,
) -> RetrievalData:
    """Read a retrieval set in BEIR's layout. Ids are compared as texts; what is not used is said to the log.

    Args:
        corpus: JSONL with `id` (or `_id`), `text` and optionally `title`.
        queries: JSONL with `id` (or `_id`) and `text`.
        qrels: TSV with a header: query id, document id, grade.
        quoting: Of TSV and CSV, see `read_pairs`.
    """
    documents = {
        identity: f"{record.get('title') or ''} {record['text']}".strip()
        for identity, record in _by_id(Path(corpus), quoting)
    }
    texts = {identity: record["text"] for identity, record in _by_id(Path(queries), quoting)}
    relevance: dict[str, dict[str, int]] = {}
    splits: set[str] = set()
    names = column_names(Path(qrels), quoting)
    if "score" not in names:
        raise no_column("score", names, str(qrels))
    for row, record in enumerate(records(Path(qrels), quoting=quoting), start=1):
        splits.add(str(record.get("split")))
        query = _id(record, ("query_id", "query-id", "qid"), row, qrels)
        document = _id(record, ("doc_id", "corpus-id", "corpus_id", "docid"), row, qrels)
        if query not in texts or document not in documents:
            unknown = f"query {query}" if query not in texts else f"document {document}"
            raise AnybatchError(f"Row {row} of {qrels} judges {unknown}, which is not there. Give files of one set.")
        grade = _grade(record, row, qrels)
        if relevance.setdefault(query, {}).setdefault(document, grade) != grade:
            second = f"grades document {document} for query {query} a second time, and differently"
            raise AnybatchError(f"Row {row} of {qrels} {second}. Keep one grade.")
    if len(splits) > 1:
        raise AnybatchError(f"{qrels} has the splits {', '.join(sorted(splits))}. Write one file for each.")
    if not relevance:
        raise AnybatchError(f"{qrels} has no judgements.")
    if not any(grade > 0 for grades in relevance.values() for grade in grades.values()):
        raise AnybatchError(
            f"No judgement in {qrels} has a grade above 0: no document is relevant. Is 'score' the right column?"
        )
    unused = f"{len(texts) - len(relevance)} queries without judgements"
    logger.info("%s: %d judged queries, %d documents; not used: %s.", qrels, len(relevance), len(documents), unused)
    return RetrievalData(
        query_ids=list(relevance),
        query_texts=[texts[query] for query in relevance],
        corpus_ids=list(documents),
        corpus_texts=list(documents.values()),
        relevance=relevance,
    )


def _id(record: Mapping[str, Any], names: Sequence[str], row: int, where: object) -> str:
    """The id in the first of these columns that is there, as a text; of a float digits may be lost already."""
    for name in names:
        value = record.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        raise AnybatchError(
            f"Row {row} of {where} has the {name} {value!r} ({type(value).__name__}); expected a text or a whole "
            "number. Write ids as texts."
        )
    raise no_column(names[0], list(record), f"row {row} of {where}, or it is empty there")


def _by_id(path: Path, quoting: Quoting | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Id and record of each document or query; every id once, every text a string."""
    seen: set[str] = set()
    for row, record in enumerate(records(path, quoting=quoting), start=1):
        identity = _id(record, ("id", "_id"), row, path)
        if "text" not in record:
            raise no_column("text", list(record), f"row {row} of {path}")
        for name in ("text", "title"):
            if not isinstance(record.get(name), str) and not (name == "title" and record.get(name) is None):
                raise AnybatchError(f"Row {row} of {path} has the {name} {record[name]!r:.60}; expected a text.")
        if identity in seen:
            raise AnybatchError(f"Row {row} of {path} has the id {identity} again. Keep one of the rows.")
        seen.add(identity)
        yield identity, record


def _grade(record: Mapping[str, Any], row: int, where: object) -> int:
    """The relevance grade of one judgement: a whole number, also written as 1.0."""
    try:
        grade = float(record["score"])
        if grade.is_integer():
            return int(grade)
    except (TypeError, ValueError, KeyError):
        pass
    raise AnybatchError(f"Row {row} of {where} has the grade {record.get('score')!r}; expected a whole number.")
