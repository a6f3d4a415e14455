"""`anybatch demo`: what a small batch costs plain InfoNCE and not the recommended recipe, on real pairs, offline.
`settings` is what all runs share; `LOSSES` and `RATES` say how they differ.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybatch.cli.options import free_name
from anybatch.cli.progress import Bars, say, show
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.config import RunConfig, RunResult

SIZES: tuple[int, ...] = (16, 64, 256, 1_024)
SEEDS: tuple[int, ...] = (0, 1, 2)
PAIRS, PASSES = 9_216, 3  # nine of the largest batches, so that every size sees the same pairs as often
# Nothing is set of "recommended": it is what `anybatch train` takes by itself.
LOSSES: dict[str, dict[str, Any]] = {"InfoNCE": {"name": "infonce"}, "recommended": {}}
MINING: dict[str, dict[str, Any]] = {"InfoNCE": {"method": "random"}, "recommended": {}}
# Learning rates by batch size: of a few, the best for the mean of these seeds on the sample's 1,024 rows behind `PAIRS`
# (python -m benchmarks.demo_rates).
RATES = {
    "InfoNCE": {16: 0.005, 64: 0.01, 256: 0.02, 1_024: 0.05},
    "recommended": {16: 0.01, 64: 0.04, 256: 0.04, 1_024: 0.05},
}
WORDS, WIDTH = 8_192, 128  # of the students: their vocabulary and the numbers of an embedding
MINED = 1_024  # pairs whose batches are mined, to be looked at


def command(
    output: Annotated[
        Path | None, typer.Option("--output", help="A new folder; by default demo-run, or the next free name.")
    ] = None,
) -> None:
    """Train small models in batches of 16 to 1,024, plainly and as recommended, and draw quality against batch size.

    Offline, minutes on two cores: a figure, an HTML page, the models.
    """
    from anybatch.core.configuration import from_mapping
    from anybatch.data import sample
    from anybatch.run.config import RunConfig
    from anybatch.run.side_by_side import train_all

    # 1. A folder, the data, and a model that serves as teacher and shows what a large batch needs.
    started = time.perf_counter()
    folder = output or free_name(Path("demo-run"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AnybatchError(f"{folder} exists. Choose another folder for --output.")
    transformer = sample.model()
    cells = list(product(LOSSES, SIZES, SEEDS))
    say(f"anybatch demo: {len(cells)} runs on {PAIRS:,} title/abstract pairs, everything in {folder}/")
    with Bars() as bars:
        # 2. Mine batches, and look at them.
        mined = _mine(folder / "mined", transformer, bars)

        # 3. One step on a large batch, plainly and cached, each in a new process: memory that is free is kept there.
        large = _memory_runs(folder / "memory", transformer)
        memory = train_all(large, stage="runs of one large batch", progress=bars, new_processes=True)
        shutil.rmtree(folder / "memory")

        # 4. Train.
        save_students(folder / "students")
        runs = {cell: from_mapping(RunConfig, settings(folder, *cell)) for cell in cells}
        results = train_all(runs, stage="training runs", progress=bars)
        for checkpoints in (folder / "runs").glob("*/checkpoints"):  # three times as large as the models
            shutil.rmtree(checkpoints)

    # 5. Compare.
    _report(folder, results, memory, mined, started)


def settings(folder: Path, name: str, size: int, seed: int) -> dict[str, Any]:
    """One run, as a configuration file would say it."""
    from anybatch.data import sample

    return {
        "output": folder / "runs" / f"{name}-{size}-{seed}",
        "batch_size": size,
        "seed": seed,
        "data": _data(PAIRS),
        "evaluation": {"path": sample.path("test")},
        "model": {"name": folder / "students" / str(seed), "device": "cpu"},
        "mining": MINING[name],
        "loss": LOSSES[name],
        # What fits is trained plainly: all graphs are kept.
        "train": {
            "epochs": PASSES,
            "learning_rate": RATES[name][size],
            "mini_batch_size": size,
            "keep_graphs": 1.0,
            "save_steps": 10_000,
        },
    }


def _data(limit: int) -> dict[str, Any]:
    from anybatch.data import sample

    return {"path": sample.path("train"), "anchor": "title", "positive": "abstract", "limit": limit}


def _memory_runs(folder: Path, transformer: str) -> dict[str, RunConfig]:
    """One step of the transformer's first layer on one large batch: all at once, and a few rows at a time."""
    from anybatch.core.configuration import from_mapping
    from anybatch.run.config import RunConfig

    size = SIZES[-1]
    shared = settings(folder, "InfoNCE", size, SEEDS[0]) | {"data": _data(size), "evaluation": {"path": None}}
    shared["model"] = {"name": transformer, "num_layers": 1, "max_length": 32, "device": "cpu"}
    ways = {"without caching": {}, "with caching": {"mini_batch_size": 32, "keep_graphs": 0.0}}
    runs = {}
    for way, changes in ways.items():
        train = shared["train"] | {"args": {"max_steps": 1}} | changes
        runs[way] = from_mapping(RunConfig, shared | {"output": folder / way.replace(" ", "-"), "train": train})
    return runs


def save_students(folder: Path) -> None:
    """Save untrained models, one for each seed: the mean of the vectors of a text's words, drawn at random."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    from anybatch.data import sample

    pairs = sample.load("train", limit=PAIRS)
    tokenizer: Any = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([*pairs.anchors, *pairs.positives], trainer)
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)
        vectors = 0.1 * torch.randn(tokenizer.get_vocab_size(), WIDTH, generator=random)
        words = StaticEmbedding(tokenizer, embedding_weights=vectors)
        SentenceTransformer(modules=[words], device="cpu").save_pretrained(str(folder / str(seed)))


def _mine(folder: Path, teacher: str, bars: Bars) -> dict[str, Any]:
    """Mine the batches of some pairs as `anybatch mine` does: the plan, what the teacher says of it, the pairs."""
    from anybatch.core.configuration import from_mapping
    from anybatch.mining.inspection import inspect_plan
    from anybatch.run.config import RunConfig
    from anybatch.run.folder import open_run
    from anybatch.run.make_plan import make_plan
    from anybatch.run.read_data import read_training_pairs
    from anybatch.run.teacher import teacher_embeddings

    settings = {"output": folder, "data": _data(MINED), "teacher": {"name": teacher, "max_length": 32}}
    config = from_mapping(RunConfig, settings | {"model": {"device": "cpu"}, "mining": {"method": "anybatch"}})
    pairs = read_training_pairs(config)
    with open_run(config):
        plan = make_plan(config, pairs, bars)
        vectors = teacher_embeddings(config, pairs, bars)
    seen = inspect_plan(plan, *vectors, **pairs.ids)
    return {"plan": plan, "seen": seen[""], "pairs": pairs}


def _report(
    folder: Path,
    results: Mapping[tuple[str, int, int], RunResult],
    memory: Mapping[str, RunResult],
    mined: dict[str, Any],
    started: float,
) -> None:
    """A table and sentences on the terminal; quality.svg, report.html, results.json."""
    from anybatch.core.files import write_text
    from anybatch.insight import Curves
    from anybatch.insight.charts import as_file
    from anybatch.insight.demo_page import BASELINE, METHOD, quality_chart, render_demo_page
    from anybatch.insight.tables import rich_table

    curves = Curves(
        figures={
            name: {size: [results[name, size, seed].metrics["ndcg@10"] for seed in SEEDS] for size in SIZES}
            for name in LOSSES
        }
    )
    steps = [results["InfoNCE", size, SEEDS[0]].num_steps for size in SIZES]
    untrained = [results["InfoNCE", SIZES[0], seed].metrics_untrained["ndcg@10"] for seed in SEEDS]
    seconds, used = time.perf_counter() - started, sum(os.times()[:4])
    intro = [
        f"A model that is the mean of word vectors, from scratch, on {PAIRS:,} titles and abstracts of arXiv papers; "
        "measured on held-out pairs of later years, where each title must find its abstract (nDCG@10; untrained: "
        f"{sum(untrained) / len(untrained):.3f}). InfoNCE: plain, the negatives are the batch. recommended: what "
        f"anybatch train takes by itself, cross-batch memory up to batches of 256, count-corrected InfoNCE above.",
        f"Every run sees the same pairs {PASSES} times, in {steps[0]:,} steps at {SIZES[0]:,} and {steps[-1]:,} at "
        f"{SIZES[-1]:,}. {len(SEEDS)} seeds; learning rates were tuned beforehand for each method and size, on other "
        f"pairs. All of this took {seconds:.0f} seconds here, and {used:.0f} of processor time.",
    ]
    write_text(folder / "quality.svg", as_file(quality_chart(curves)))
    write_text(folder / "report.html", render_demo_page(curves, intro=intro, memory=memory, **mined))
    figures = {
        "ndcg@10": curves.figures,
        "standard error": curves.error,
        "memory": {
            way: {"peak_bytes": result.train_peak_bytes, "seconds": result.train_seconds}
            for way, result in memory.items()
        },
        "seconds": seconds,
        "processor seconds": used,
    }
    write_text(folder / "results.json", json.dumps(figures, indent=2))
    header, lines = curves.rows(METHOD, BASELINE)
    show(rich_table(header, lines, left=()), whole=True)
    for sentence in curves.sentences(METHOD, BASELINE):
        say(sentence)
    for way, result in memory.items():
        gibibytes = result.train_peak_bytes / 2**30
        say(f"A batch of {SIZES[-1]:,} pairs through a transformer layer {way}: {gibibytes:.2f} GiB.")
    say(f"Page: {folder / 'report.html'}   figure: {folder / 'quality.svg'}   ({seconds:.0f} s)")
    say("Your data: anybatch train --data pairs.csv --model MODEL --output runs/first")
