"""The data of the study: five tasks and a mixture, each with training pairs and searches to be tuned and tested on.

arxiv        title -> abstract; searched among the abstracts of all splits
arxiv60k     the same searches, with six times the training pairs
scifact      title or claim -> abstract; the claims are searched for among all abstracts (without their titles)
snli         premise -> what it entails, of dev; those of test are searched among the hypotheses of both
docstrings   first paragraph of a docstring -> body of the function, from the library of the running CPython
emoji        picture <-> caption, both ways; concepts never seen, among those of their split; and, told beside it, a
             style never seen, of known concepts ("style") and of unseen ones ("both")
mixture      the four text tasks, at most MIXED pairs of each; the figure is the mean over the four
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anybatch.core.files import digest_of
from anybatch.data.retrieval import RetrievalData, read_retrieval

TEXTS = ("arxiv", "scifact", "snli", "docstrings")
ARXIV = {"train": 10_000, "dev": 1_000, "test": 2_000}  # rows that are searched
ARXIV_PAIRS = {"arxiv": 10_000, "arxiv60k": 60_000}
MIXED, PIXELS, TEACHER_TOKENS = 5_000, 16, 64
Inputs = Sequence[str] | np.ndarray  # texts, or uint8 pictures (n, 3, PIXELS, PIXELS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """Queries, what is searched, and for each query the numbers of what it should find; `back`: from positives."""

    queries: Inputs
    corpus: Inputs
    relevant: Sequence[set[int]]
    back: bool = False

    def first(self, queries: int, others: int) -> Search:
        """The first queries, among what they should find and the first of the others. Of texts."""
        wanted = set().union(*self.relevant[:queries])
        kept = [*sorted(wanted), *[n for n in range(len(self.corpus)) if n not in wanted][:others]]
        place = {number: position for position, number in enumerate(kept)}
        relevant = [{place[number] for number in numbers} for numbers in self.relevant[:queries]]
        return replace(self, queries=self.queries[:queries], corpus=[self.corpus[n] for n in kept], relevant=relevant)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Training pairs with ids, equal for identical texts, and searches; `labels` are what the teacher reads in place of
    pictures, `others` further searches to report. A mixture has one task number a row.
    """

    name: str
    anchors: Inputs
    positives: Sequence[str]
    dev: Sequence[Search]
    test: Sequence[Search]
    direction: Literal["one_way", "both"] = "one_way"
    temperature: float = 0.05
    labels: Sequence[str] | None = None
    parts: tuple[tuple[str, int], ...] = ()
    others: Mapping[str, Sequence[Search]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positives)

    @cached_property
    def ids(self) -> dict[str, np.ndarray]:
        """Numbers of the anchors and positives."""
        pictures = isinstance(self.anchors, np.ndarray)
        anchors = np.arange(len(self)) if pictures else _numbers(self.anchors)  # pyright: ignore
        return {"anchor_id": anchors, "positive_id": _numbers(self.positives)}


def load_task(name: str, data: Path, *, limit: int | None = None) -> Task:
    """A task of `data`, the folder that holds the sets; `limit`: of arxiv's training pairs."""
    if name == "mixture":
        return _mixture([load_task(part, data, limit=limit) for part in TEXTS])
    if name == "docstrings":
        return _docstrings()
    if name in ARXIV_PAIRS:
        return _arxiv(name, data / "arxiv-title-abstract", limit or ARXIV_PAIRS[name])
    others: dict[str, Callable[[Path], Task]] = {"scifact": _scifact, "snli": _snli, "emoji": _emoji}
    return others[name](data / {"scifact": "scifact", "snli": "snli-devtest", "emoji": "emoji-captions"}[name])


def teacher_embeddings(task: Task, model: Any, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) float32 of unit length for both sides, kept in `folder`; `model` is a path of a sentence-transformers
    model, loaded when something is missing.
    """
    if task.parts:
        starts = np.cumsum([0, *(size for _, size in task.parts)])
        sides = [
            teacher_embeddings(
                replace(task, anchors=task.anchors[a:b], positives=task.positives[a:b], parts=()), model, folder
            )
            for a, b in pairwise(starts)
        ]
        return np.concatenate([a for a, _ in sides]), np.concatenate([p for _, p in sides])
    anchors = task.labels if task.labels is not None else task.anchors
    return _embedded(anchors, model, folder), _embedded(task.positives, model, folder)  # pyright: ignore


def _embedded(texts: Sequence[str], model: str, folder: Path) -> np.ndarray:
    """Blocks of MIXED texts, a file each, so that the mixture finds what its parts have left."""
    blocks = []
    for start in range(0, len(texts), MIXED):
        block = texts[start : start + MIXED]
        path = folder / f"{digest_of(text.encode() for text in block)[:16]}.npy"
        if not path.exists():
            distinct, places = np.unique(np.asarray(block, dtype=object), return_inverse=True)
            folder.mkdir(parents=True, exist_ok=True)
            teacher = _teacher(model)
            np.save(path, teacher.encode(list(distinct), batch_size=64, normalize_embeddings=True)[places.reshape(-1)])
        blocks.append(np.load(path))
    return np.concatenate(blocks)


@cache
def _teacher(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    teacher = SentenceTransformer(model, device="cpu")
    teacher.max_seq_length = TEACHER_TOKENS
    return teacher


def _arxiv(name: str, folder: Path, limit: int) -> Task:
    rows = {split: _lines(folder / f"{split}.jsonl.gz") for split in ARXIV}
    corpus = [row["abstract"] for split, size in ARXIV.items() for row in rows[split][:size]]
    place = {text: number for number, text in enumerate(corpus)}
    train, dev, test = rows["train"][:limit], rows["dev"][: ARXIV["dev"]], rows["test"][: ARXIV["test"]]
    searches = [
        Search(
            queries=[row["title"] for row in some],
            corpus=corpus,
            relevant=[{place[row["abstract"]]} for row in some],
        )
        for some in (dev, test)
    ]
    return Task(
        name=name,
        anchors=[row["title"] for row in train],
        positives=[row["abstract"] for row in train],
        dev=searches[:1],
        test=searches[1:],
    )


def _scifact(folder: Path) -> Task:
    files = [folder / name for name in ("corpus.jsonl.gz", "queries.jsonl.gz", "qrels.tsv")]
    header, *lines = files[2].read_text(encoding="utf-8").splitlines()
    split_at = header.split("\t").index("split")
    judged, test = (
        _judgements(files[:2], [header, *(line for line in lines if line.split("\t")[split_at] == split)])
        for split in ("train", "test")
    )
    documents = _lines(files[0])
    corpus, place = [row["text"] for row in documents], {row["id"]: n for n, row in enumerate(documents)}
    claims = [
        [
            (text, {place[document] for document in data.relevance[number]})
            for number, text in zip(data.query_ids, data.query_texts, strict=True)
        ]
        for data in (judged, test)
    ]
    cut = len(claims[0]) * 3 // 4
    pairs = [(row["title"], row["text"]) for row in documents]
    pairs += [(claim, corpus[document]) for claim, found in claims[0][:cut] for document in sorted(found)]
    searches = [
        Search(queries=[claim for claim, _ in some], corpus=corpus, relevant=[found for _, found in some])
        for some in (claims[0][cut:], claims[1])
    ]
    anchors, positives = zip(*pairs, strict=True)
    return Task(name="scifact", anchors=anchors, positives=positives, dev=searches[:1], test=searches[1:])


def _judgements(files: list[Path], lines: list[str]) -> RetrievalData:
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as file:
        file.write("\n".join(lines))
        file.flush()
        return read_retrieval(*files, file.name)


def _snli(folder: Path) -> Task:
    train, held = (
        [row for row in _lines(folder / f"{split}.jsonl.gz") if row["label"] == "entailment"]
        for split in ("dev", "test")
    )
    corpus = list(dict.fromkeys(row["hypothesis"] for row in train + held))
    place = {text: number for number, text in enumerate(corpus)}
    found: dict[str, set[int]] = {}
    for row in held:
        found.setdefault(row["premise"], set()).add(place[row["hypothesis"]])
    searches = [
        Search(queries=some, corpus=corpus, relevant=[found[query] for query in some])
        for some in (list(found)[: len(found) // 3], list(found)[len(found) // 3 :])
    ]
    return Task(
        name="snli",
        anchors=[row["premise"] for row in train],
        positives=[row["hypothesis"] for row in train],
        dev=searches[:1],
        test=searches[1:],
    )


def _docstrings() -> Task:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.rglob("*.py"))
    left_out = {"site-packages", "test", "tests", "__pycache__"}
    pairs: dict[str, str] = {}
    for file in files:
        if not left_out & set(file.relative_to(library).parts):
            pairs |= {text: body for text, body in _functions(file) if text not in pairs}
    splits: list[list[tuple[str, str]]] = [[], [], []]
    for text, body in pairs.items():
        chosen = zlib.crc32(text.encode()) % 20
        splits[1 if chosen < 2 else 2 if chosen < 5 else 0].append((text, body))
    corpus = [body for split in splits for _, body in split]
    starts = np.cumsum([len(split) for split in splits])
    searches = [
        Search(
            queries=[text for text, _ in split],
            corpus=corpus,
            relevant=[{int(start) + number} for number in range(len(split))],
        )
        for start, split in zip(starts, splits[1:], strict=False)
    ]
    anchors, positives = zip(*splits[0], strict=True)
    return Task(name="docstrings", anchors=anchors, positives=positives, dev=searches[:1], test=searches[1:])


def _functions(file: Path) -> Iterator[tuple[str, str]]:
    """First paragraphs of docstrings of at least four words, and the bodies after them."""
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # the library's own samples of what cannot be read
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(text.split()) >= 4:
                yield text, "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])


def _emoji(folder: Path) -> Task:
    from PIL import Image

    stored, meta = np.load(folder / "images.npz"), _lines(folder / "meta.jsonl.gz")
    data, offsets = stored["data"], stored["offsets"]

    def read(split: str) -> tuple[np.ndarray, list[str], list[str]]:
        rows = [row for row in meta if row["split"] == split]
        pictures = [
            Image.open(io.BytesIO(data[offsets[row["i"]] : offsets[row["i"] + 1]].tobytes()))
            .convert("RGB")
            .resize((PIXELS, PIXELS), Image.Resampling.BOX)
            for row in rows
        ]
        captions = [f"{row['label']}: {', '.join(row['tags'])}" for row in rows]
        return (
            np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]),
            captions,
            [row["label"] for row in rows],
        )

    def searches(split: str) -> list[Search]:
        pictures, captions, _ = read(split)
        distinct = list(dict.fromkeys(captions))
        with_caption = [{n for n, caption in enumerate(captions) if caption == wanted} for wanted in distinct]
        there = Search(queries=pictures, corpus=distinct, relevant=[{distinct.index(caption)} for caption in captions])
        return [there, Search(queries=distinct, corpus=pictures, relevant=with_caption, back=True)]

    anchors, positives, labels = read("train")
    return Task(
        name="emoji",
        anchors=anchors,
        positives=positives,
        labels=labels,
        dev=searches("dev_concept"),
        test=searches("test_concept"),
        direction="both",
        temperature=0.07,
        others={"style": searches("test_style"), "both": searches("test_both")},
    )


def _mixture(tasks: Sequence[Task]) -> Task:
    return Task(
        name="mixture",
        anchors=[text for task in tasks for text in task.anchors[:MIXED]],
        positives=[text for task in tasks for text in task.positives[:MIXED]],
        dev=[search for task in tasks for search in task.dev],
        test=[search for task in tasks for search in task.test],
        parts=tuple((task.name, min(MIXED, len(task))) for task in tasks),
    )


def _numbers(texts: Sequence[str]) -> np.ndarray:
    return np.unique(np.asarray(texts, dtype=object), return_inverse=True)[1].reshape(-1)


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]
