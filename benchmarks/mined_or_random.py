"""Do a mined plan's figures tell whether its batches train better than random ones? They, beside the study's results.

Usage: python -m benchmarks.mined_or_random --data FOLDER --model FOLDER [--work FOLDER] [--results FILE]

Options as those of `benchmarks.study`, whose lines are read. Of each task alone, batches of 64: the figures of
`inspect_plan` that have a pass mark, the error of an epoch's gradient of cross-batch InfoNCE (as `anybatch inspect
plan` has it) on the plan's batches less that on random ones with its standard error, and what cross-batch InfoNCE
gained in nDCG@10 by mining, each arm at its best rate on development queries, for each student that ran both.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from anybatch.insight import markdown_table
from anybatch.insight.gradient_error import FrozenPairs
from anybatch.insight.gradient_methods import compare_methods
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig, mine_plan
from benchmarks.study import RESULTS
from benchmarks.study_tasks import TEXTS, load_task, teacher_embeddings

HEADER = ["task", "rows", "own first", "mass, times random", "masked", "suspects", "gradient error", "nDCG@10"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, default=Path("teacher"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", default=[*TEXTS, "emoji"])
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    rows = [line_of(name, options, gained(lines, name)) for name in options.tasks]
    print(markdown_table(HEADER, rows))


def gained(lines: list[dict], task: str) -> str:
    """Mined less random batches, by student."""
    at_rate: dict[tuple[str, str], dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if (line["task"], line["batch_size"], line["budget"]) == (task, 64, "pairs"):
            at_rate[line["student"], line["arm"]][line["rate"]].append(line)
    best = {
        cell: max(rates.values(), key=lambda runs: (len(runs), np.mean([run["dev"] for run in runs])))
        for cell, rates in at_rate.items()
    }
    figures = {cell: float(np.mean([run["test"] for run in runs])) for cell, runs in best.items()}
    arms = [f"{batches}/cross_batch" for batches in ("ours", "random")]
    return ", ".join(
        f"{student} {figures[student, arms[0]] - figures[student, arms[1]]:+.3f}"
        for student in ("small", "layers1")
        if all((student, arm) in figures for arm in arms)
    )


def line_of(name: str, options: argparse.Namespace, gain: str) -> list[str]:
    """Mine the task and measure."""
    task = load_task(name, options.data)
    ids: dict[str, Any] = task.ids
    sides = teacher_embeddings(task, options.model, options.work)
    mined = mine_plan(*sides, config=MiningConfig(batch_size=64), temperature=task.temperature, **ids)
    pairs = FrozenPairs.prepare(
        *sides,
        temperature=task.temperature,
        direction=task.direction,
        tied=name != "emoji",
        suspects=mined.plan.suspects,
        **ids,
    )
    loss = LossConfig(name="cross_batch", weights="inclusion", mask_suspects=True)
    compared = compare_methods(pairs, mined.plan, methods=[loss])
    planned, random = (compared.of(compared.order[0], batches) for batches in ("plan", "random"))
    assert planned is not None
    assert random is not None
    figures, noise = mined.report.figures, math.hypot(planned.epoch_error_se, random.epoch_error_se)
    return [
        name,
        f"{len(task):,}",
        f"{figures['own_first']:.0%}",
        f"{figures['gain']:.1f}",
        f"{figures['masked']:.0%}",
        f"{figures['suspects']:.2f}",
        f"{planned.epoch_error - random.epoch_error:+.3f} ± {noise:.3f}",
        gain,
    ]


if __name__ == "__main__":
    main()
