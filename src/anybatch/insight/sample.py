"""A sample of a run's pairs, embedded by student and teacher in a given time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anybatch.core.progress import Progress, counter, no_progress
from anybatch.data.held_out import select_pairs
from anybatch.data.inputs import kind_of
from anybatch.data.pairs import PairData
from anybatch.integrations.sentence_transformers.embed import embed_texts
from anybatch.run.config import RunConfig
from anybatch.run.teacher import load_teacher, read_embeddings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCHES = 8  # of an epoch at least: where a batch is more of the data, there is little to correct (docs/recipe.md)
MOST_ROWS = 2048  # looked at, or as many batches as above: their gradients take seconds
LEAST = 2  # batches, of which fewer say nothing; for them the time may double
FIRST_ROWS = 16  # embedded to see how many there is time for
SHORT = (128, 64, 32)  # tokens at which texts are cut where there is no time for enough whole ones
HELPS = 0.8  # of the time: where texts are short, a cut saves less, and is left
SHARE = 0.8  # of the time that steps leave is for embedding; the rest is for gradients


class Looked(NamedTuple):
    """A sample of rows, ascending, embedded."""

    rows: np.ndarray
    vectors: tuple[np.ndarray, ...]  # both sides by the student
    ranked: tuple[np.ndarray, ...] | None  # by the teacher, where mining asks one
    rates: list[float]  # sides per second of each model, of whole texts
    cut: int | None  # tokens at which the texts were cut; None of whole ones
    wanted: int  # rows from which figures tell much
    most: int  # rows that are looked at at most
    seconds_needed: int  # to ask for, for the wanted rows
    seconds_whole: int  # for whole texts of them
    seconds_most: int  # for whole texts of the most rows


def look_at(
    config: RunConfig, pairs: PairData, student: SentenceTransformer, seconds: float, progress: Progress
) -> Looked:
    """A sample seen by the student, and by the teacher where mining asks one, in about these seconds. Where they are
    too few for `BATCHES` batches of whole texts, the texts are cut (`SHORT`).
    """
    random = np.random.default_rng(config.seed)
    mines, files = config.mining.method != "random", config.teacher.embeddings
    models = {"student": student} | ({"teacher": load_teacher(config)} if mines and files is None else {})
    begun, seconds = time.perf_counter(), SHARE * seconds

    def embed(name: str, part: PairData, report: Progress) -> tuple[np.ndarray, ...]:
        sides = part.prompted[:2] if name == "student" else [part.anchors, part.positives]
        count = counter(report, f"embedding: {name}", 2 * len(part))
        return tuple(
            embed_texts(models[name].eval(), side, side=kind, batch_size=128, progress=count)
            for kind, side in zip(("query", "document"), sides, strict=True)
        )

    def measured() -> list[float]:
        rates = []
        for name in models:
            start = time.perf_counter()
            embed(name, few, no_progress)
            rates.append(2 * len(few) / (time.perf_counter() - start))
        return rates

    # 1. How many there is time for, of whole texts or of texts cut short.
    few = select_pairs(pairs, np.sort(random.permutation(len(pairs))[:FIRST_ROWS]))
    most = min(max(MOST_ROWS, BATCHES * config.batch_size), len(pairs))
    wanted, rates, cut = min(BATCHES * config.batch_size, len(pairs)), measured(), None
    cost = whole = sum(2 / rate for rate in rates)  # seconds per row
    limits = {name: getattr(model, "max_seq_length", None) for name, model in models.items()}
    limits = {name: limit for name, limit in limits.items() if isinstance(limit, int)}  # of word vectors: infinity
    cuts = SHORT if {kind_of(pairs.anchors), kind_of(pairs.positives)} == {"text"} else ()

    def limit(tokens: float) -> None:
        for name, own in limits.items():
            models[name].max_seq_length = own if tokens > own else int(tokens)

    def fitting() -> int:
        return int((seconds - (time.perf_counter() - begun)) / cost)

    def to_ask(rows: int, cost: float) -> int:
        """Steps take a third of what is asked for."""
        return 10 * math.ceil((time.perf_counter() - begun + rows * cost) / (SHARE * 2 / 3) / 10)

    try:
        for tokens in cuts:
            if fitting() < wanted and max(limits.values(), default=0) > tokens:
                limit(tokens)
                shorter = sum(2 / rate for rate in measured())
                if shorter < HELPS * cost:
                    cut, cost = tokens, shorter
                else:
                    limit(cut or math.inf)
        asked = to_ask(wanted, cost), to_ask(wanted, whole), to_ask(most, whole)
        # 2. These.
        least, count = min(LEAST * config.batch_size, len(pairs)), max(fitting(), FIRST_ROWS)
        if count < least and least * cost < 2 * seconds:
            count = least
        rows = np.sort(random.permutation(len(pairs))[: min(most, count)])
        sample, ranked = select_pairs(pairs, rows), None
        vectors = embed("student", sample, progress)
        if "teacher" in models:
            ranked = embed("teacher", sample, progress)
        elif mines and files is not None:
            ranked = tuple(np.asarray(read_embeddings(path, len(pairs))[rows]) for path in files)
    finally:
        limit(math.inf)
    return Looked(rows, vectors, ranked, rates, cut, wanted, most, *asked)
