"""Does gradient accumulation replace a large batch? Four ways to train on the demo's pairs with the demo's models.

Usage: python -m benchmarks.accumulation [--output docs/benchmarks]

    batches of 64           a step of the optimiser after each batch; 63 negatives per row
    16 batches, one step    the gradients of 16 batches of 64 are added up before a step; still 63 negatives per row
    batches of 1,024        by the cached step, 64 rows in memory at a time; 1,023 negatives per row
    64 with memory          batches of 64 with cross-batch memory of 256 pairs, a step after each batch

InfoNCE at temperature .05 but for the last. Every run sees the same 9,216 pairs three times; AdamW, a tenth of the
steps as warm-up, then linear decay. The learning rate of each way is the best of `RATES` on development pairs (mean
of three seeds); the figure is nDCG@10 on the sample's held-out pairs. Writes accumulation.md and accumulation.svg.
Minutes of one core.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from anybatch.caching import cached_step
from anybatch.cli import demo
from anybatch.data import sample
from anybatch.data.pairs import PairData
from anybatch.evaluation.retrieval import pair_metrics
from anybatch.insight import markdown_table
from anybatch.insight.charts import as_file, bar_chart
from anybatch.losses import ContrastiveLoss, CrossBatchInfoNCE, InfoNCE

DEVELOPMENT = 1_024  # rows of the sample behind the demo's
TEMPERATURE = 0.05
SMALL, LARGE = 64, 1_024
# Rows that share a softmax, such batches in a step of the optimiser, the loss for so many rows of data.
WAYS: dict[str, tuple[int, int, Callable[[int], ContrastiveLoss]]] = {
    "batches of 64": (SMALL, 1, lambda rows: InfoNCE(temperature=TEMPERATURE)),
    "16 batches of 64, one step": (SMALL, LARGE // SMALL, lambda rows: InfoNCE(temperature=TEMPERATURE)),
    "batches of 1,024 (cached step)": (LARGE, 1, lambda rows: InfoNCE(temperature=TEMPERATURE)),
    "batches of 64 with memory": (SMALL, 1, lambda rows: CrossBatchInfoNCE(rows, temperature=TEMPERATURE)),
}
RATES = {SMALL: (0.005, 0.01, 0.02, 0.04, 0.08), LARGE: (0.02, 0.05, 0.1, 0.2)}  # by the rows of a step


def train(model: SentenceTransformer, pairs: PairData, way: str, rate: float, *, seed: int, passes: int) -> None:
    """Train `model` in place."""
    # 1. The rows of every batch, and a schedule over the steps.
    size, batches_per_step, make_loss = WAYS[way]
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(pairs) // (size * batches_per_step) * size * batches_per_step
    orders = [torch.randperm(len(pairs), generator=generator)[:num_rows] for _ in range(passes)]
    batches = [rows for order in orders for rows in order.split(size)]
    steps = len(batches) // batches_per_step
    loss = make_loss(len(pairs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warmup = math.ceil(0.1 * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )

    # 2. One step of the optimiser after `batches_per_step` batches, whose mean is its loss.
    for number, rows in enumerate(batches, 1):
        inputs = [[texts[row] for row in rows.tolist()] for texts in (pairs.anchors, pairs.positives)]
        cached_step(
            loss,
            lambda features: model(features)["sentence_embedding"],
            [model.preprocess(texts) for texts in inputs],
            mini_batch_size=SMALL,
            keep_graphs=1.0 if size == SMALL else 0.0,
            loss_kwargs={"index": rows},
            scale=1 / batches_per_step,
            modules=[model],
        )
        if number % batches_per_step == 0:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def quality(model: SentenceTransformer, pairs: PairData) -> float:
    """nDCG@10 of held-out pairs."""
    sides: list[Any] = [
        model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        for texts in (pairs.anchors, pairs.positives)
    ]
    return pair_metrics(*sides, anchor_id=pairs.anchor_id, positive_id=pairs.positive_id)["ndcg@10"]


def measure(folder: Path, *, num_pairs: int, passes: int, seeds: Sequence[int]) -> dict[tuple[str, float], list[Any]]:
    """(development, test) nDCG@10 of every seed, for every way and rate."""
    pairs = sample.load("train", limit=num_pairs)
    later = sample.load("train", limit=num_pairs + DEVELOPMENT)
    development = PairData(anchors=later.anchors[num_pairs:], positives=later.positives[num_pairs:])
    test = sample.load("test")
    figures: dict[tuple[str, float], list[Any]] = {}
    for way, (size, batches_per_step, _) in WAYS.items():
        for rate, seed in product(RATES[size * batches_per_step], seeds):
            model = SentenceTransformer(str(folder / str(seed)), device="cpu")
            train(model, pairs, way, rate, seed=seed, passes=passes)
            figures.setdefault((way, rate), []).append((quality(model, development), quality(model, test)))
        print(way, {rate: figure for (name, rate), figure in figures.items() if name == way}, flush=True)
    return figures


def report(figures: dict[tuple[str, float], list[Any]], *, num_pairs: int, passes: int) -> tuple[str, str]:
    """The page and its chart."""
    # 1. The best rate of each way on development pairs, and the test figures there.
    best = {
        way: max(
            (rate for name, rate in figures if name == way),
            key=lambda rate: statistics.fmean(seed[0] for seed in figures[way, rate]),
        )
        for way in WAYS
    }
    tests = {way: [seed[1] for seed in figures[way, best[way]]] for way in WAYS}
    spread = math.sqrt(statistics.fmean(statistics.variance(values) for values in tests.values()))
    error = spread / math.sqrt(len(tests[next(iter(WAYS))]))

    # 2. A table and bars.
    lines = []
    for way, (size, batches_per_step, _) in WAYS.items():
        steps = num_pairs // (size * batches_per_step) * passes
        tried = ", ".join(
            f"{rate:g}: {statistics.fmean(seed[0] for seed in values):.4f}"
            for (name, rate), values in figures.items()
            if name == way
        )
        mean = f"{statistics.fmean(tests[way]):.3f} ± {error:.3f}"
        lines.append([way, f"{size * batches_per_step:,}", f"{steps:,}", mean, f"{best[way]:g}", tried])
    header = ["way", "rows of a step", "steps", "nDCG@10", "rate", "nDCG@10 on development pairs at each rate"]
    bars = [
        (way, "cross-batch" if "memory" in way else "InfoNCE", round(statistics.fmean(tests[way]), 3)) for way in WAYS
    ]
    text = (
        f"`python -m benchmarks.accumulation`, 2-core x86 CPU, one thread. {num_pairs:,} titles and abstracts, "
        f"{passes} passes, word vectors from scratch, InfoNCE at temperature {TEMPERATURE:g} (the last line: "
        "cross-batch memory). nDCG@10 on 1,000 held-out pairs, mean of "
        f"{len(tests[next(iter(WAYS))])} seeds; ±: one standard error, pooled. The rate is the best on development "
        "pairs."
    )
    parts = ["# Gradient accumulation against a large batch", textwrap.fill(text, 120), markdown_table(header, lines)]
    page = "\n\n".join([*parts, "![The same as bars](accumulation.svg)\n"])
    return page, as_file(bar_chart("nDCG@10 of four ways to train on the same pairs", bars))


def main(arguments: list[str] | None = None) -> None:
    """Train, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo.save_students(Path(folder))
        figures = measure(Path(folder), num_pairs=demo.PAIRS, passes=demo.PASSES, seeds=demo.SEEDS)
    page, chart = report(figures, num_pairs=demo.PAIRS, passes=demo.PASSES)
    (options.output / "accumulation.md").write_text(page, encoding="utf-8")
    (options.output / "accumulation.svg").write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
