"""The learning rates of `anybatch demo`: for each method and batch size the best of a few on development pairs.

Usage: python -m benchmarks.demo_rates [--work FOLDER] [--sizes 16 64 256 1024]

Trains the demo's models on the demo's pairs, three seeds for each rate, and measures nDCG@10 on the sample's rows
behind those pairs, which the demo does not use. Prints a table; the best rate of each line goes into `RATES` of
`anybatch/cli/demo.py`. Some 20 minutes of one core.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from itertools import product
from pathlib import Path
from statistics import fmean

from anybatch.cli import demo
from anybatch.core.configuration import from_mapping
from anybatch.data import sample
from anybatch.insight import markdown_table
from anybatch.run.config import RunConfig
from anybatch.run.side_by_side import train_all

DEVELOPMENT = 1_024  # rows
TRIED = {
    16: (0.0025, 0.005, 0.01, 0.02),
    64: (0.005, 0.01, 0.02, 0.04),
    256: (0.01, 0.02, 0.04, 0.08),
    1_024: (0.02, 0.05, 0.1, 0.2),
}


def main(arguments: list[str] | None = None) -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a new folder for the runs; a temporary one without")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(TRIED))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        print(rate_table(options.work or Path(temporary) / "runs", options.sizes))


def rate_table(folder: Path, sizes: list[int]) -> str:
    """The mean nDCG@10 of every method, size and rate."""
    # 1. The untrained models, and the development pairs.
    demo.save_students(folder / "students")
    development = folder / "development.jsonl"
    with gzip.open(sample.path("train"), "rt", encoding="utf-8") as file:
        development.write_text("".join(list(file)[demo.PAIRS :][:DEVELOPMENT]), encoding="utf-8")

    # 2. Runs as the demo's, at other rates and measured on other pairs.
    runs = {}
    for name, size, seed in product(demo.LOSSES, sizes, demo.SEEDS):
        for rate in TRIED[size]:
            settings = demo.settings(folder, name, size, seed)
            settings["output"] = folder / f"{name}-{size}-{seed}-{rate}"
            settings["evaluation"] = {"path": development}
            settings["train"]["learning_rate"] = rate
            runs[name, size, rate, seed] = from_mapping(RunConfig, settings)
    results = train_all(runs, stage="rates")

    # 3. A line for each method and size.
    lines = []
    for name, size in product(demo.LOSSES, sizes):
        figures = {
            rate: fmean(results[name, size, rate, seed].metrics["ndcg@10"] for seed in demo.SEEDS)
            for rate in TRIED[size]
        }
        best = max(figures, key=lambda rate: figures[rate])
        shown = ", ".join(f"{rate:g}: {figure:.4f}" for rate, figure in figures.items())
        lines.append([name, f"{size:,}", shown, f"{best:g}"])
    return markdown_table(["method", "batch size", "nDCG@10 at each rate", "best"], lines)


if __name__ == "__main__":
    main()
