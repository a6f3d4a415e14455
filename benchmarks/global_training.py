"""Does a better gradient make a better model? Small encoders from scratch, every method at every batch size.

Usage:
    python -m benchmarks.global_training --task arxiv --data FOLDER
        [--anchor-embeddings A.npy --positive-embeddings P.npy]
    python -m benchmarks.global_training --task emoji --data FOLDER
    python -m benchmarks.global_training --table-only

A method is written BATCHES/LOSS[/WEIGHTS]: "random", "mined" (clusters of 32, or half a batch), or "mined8" for
clusters of 8 and so on; a name of `anybatch.losses.registry`, or "cluster_centres" (an experiment, one way only);
"inclusion" for the inclusion weights. A name may go on with settings, such as "cross_batch,memory_size=256" or
"cross_batch,centred=false"; "cross_batch_one_sided" remembers candidates only. Each (task, method, batch size, budget)
is a family: at least three learning rates with seed 0, judged on the development split and extended while the best is
at the edge; then the best rate with two more seeds. Each finished run is one line of
docs/benchmarks/global_training.jsonl; runs that are there are skipped, so the command can be stopped and started at
will. The table is made of that file.

Budgets: `--pairs N` trains every batch size on as many pairs, `--steps N` for as many optimiser steps; give both to run
both. At equal pairs a small batch takes more steps, and may win for that reason alone: read the two tables together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.insight import markdown_table
from anybatch.losses import CrossBatchInfoNCE, registry
from anybatch.losses.engine import Side
from anybatch.losses.parts import Batch
from anybatch.losses.rows import RowTable
from anybatch.mining import MiningConfig, mine_plan
from anybatch.plans.plan import BatchPlan
from benchmarks.cluster_centres import ClusterCentres
from benchmarks.small_models import WIDTH, Task, evaluate, load_task, lsa_teacher

FOLDER = Path("docs/benchmarks")
METHODS = (
    "random/infonce",
    "random/count_corrected",
    "random/sogclr",
    "mined/infonce",
    "mined/count_corrected/inclusion",
    "mined/sogclr/inclusion",
)
# The rest of the family, for `--methods family`: which of them to run at every batch size is asked at one.
FAMILY = ("decoupled", "scent", "nuclr", "glofnd", "isogclr", "tempnet", "fastclip", "emc2", "siglip")
BATCH_SIZES = (16, 64, 256, 1024)
SEEDS = (0, 1, 2)
# Adam's rate at a batch of 64, the middle of the first three tried; it grows with the square root of the batch.
CENTRE = {"arxiv": 3e-3, "emoji": 3e-3}
SKIP = {"arxiv": 10, "emoji": 5}  # ranks taken for false negatives
POINTS = 6  # evaluations on the development split along the way


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run; its fields are the key under which the result is kept."""

    task: str
    method: str
    batch_size: int
    budget: Literal["pairs", "steps"]
    amount: int
    rows: int
    teacher: str
    seed: int
    learning_rate: float

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return self.amount if self.budget == "steps" else max(1, self.amount // self.batch_size)


class Study:
    """Tasks, teachers and plans, made once; runs, skipped where they are done."""

    def __init__(self, task: Task, results: Path, cache: Path, teacher: tuple[np.ndarray, np.ndarray] | None) -> None:
        self.task, self.results, self.cache = task, results, cache
        self.given = teacher
        self.done = {key_of(line): line for line in read_lines(results)}

    def run(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell: from the file, or by training, which appends it."""
        key = json.dumps(asdict(cell), sort_keys=True)
        if key not in self.done:
            line = {**asdict(cell), **self._train(cell)}
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.done[key] = line
            print(
                f"{cell.task} {cell.method} B={cell.batch_size} {cell.budget} lr={cell.learning_rate:.1e} "
                f"seed={cell.seed}: dev {line['dev']['ndcg@10']:.4f} test {line['test']['ndcg@10']:.4f} in "
                f"{line['seconds']:.0f} s",
                flush=True,
            )
        return self.done[key]

    def family(self, cell: Cell) -> None:
        """Tune the rate around `cell.learning_rate` with seed 0, then run the other seeds."""
        rates = [cell.learning_rate / 3, cell.learning_rate, cell.learning_rate * 3]
        figures = {rate: self._dev(cell, rate) for rate in rates}
        for _ in range(2):
            best = max(figures, key=lambda rate: figures[rate])
            if best == min(figures):
                figures[best / 3] = self._dev(cell, best / 3)
            elif best == max(figures):
                figures[best * 3] = self._dev(cell, best * 3)
        best = max(figures, key=lambda rate: figures[rate])
        for seed in SEEDS[1:]:
            self.run(replace(cell, seed=seed, learning_rate=rounded(best)))

    def _dev(self, cell: Cell, rate: float) -> float:
        return self.run(replace(cell, learning_rate=rounded(rate)))["dev"]["ndcg@10"]

    def _train(self, cell: Cell) -> dict[str, Any]:
        torch.manual_seed(cell.seed)
        task, parts = self.task, cell.method.split("/")
        plan = replace(self._plan(cell, parts[0]), seed=cell.seed)
        weights = "inclusion" if "inclusion" in parts[2:] else "none"
        loss = make_loss(parts[1], task, plan)
        table = RowTable(task.train.anchor_id, task.train.positive_id, plan=plan, weights=weights)
        model = task.make_model()
        optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=cell.learning_rate, fused=True)
        warm = max(1, cell.num_steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (cell.num_steps - step) / max(1, cell.num_steps - warm))
        )
        evaluated = {round(cell.num_steps * point / POINTS) for point in range(1, POINTS + 1)}
        curve, losses, begun = [], [], time.perf_counter()
        for step, batch in enumerate(batches(plan, cell.num_steps), start=1):
            anchors, positives = model(task.train, batch)
            value = loss(anchors, positives, **table.arguments(torch.from_numpy(batch)))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
            if step in evaluated:
                dev = evaluate(model, task.dev, direction=task.direction)
                last = statistics.fmean(losses[-max(1, cell.num_steps // POINTS) :])
                curve.append({"step": step, "pairs": step * cell.batch_size, "loss": last, **dev})
        return {
            "dev": evaluate(model, task.dev, direction=task.direction),
            "test": evaluate(model, task.test, direction=task.direction),
            "num_steps": cell.num_steps,
            "pairs_seen": cell.num_steps * cell.batch_size,
            "curve": curve,
            "seconds": time.perf_counter() - begun,
        }

    def _plan(self, cell: Cell, batches_by: str) -> BatchPlan:
        train, batch_size = self.task.train, cell.batch_size
        if batches_by == "random":
            return BatchPlan.random(len(train), batch_size)
        # At least two clusters a batch, or no weight can stand for the other clusters.
        size = min(int(batches_by.removeprefix("mined") or 32), batch_size // 2)
        path = self.cache / f"plan-{cell.task}-{cell.rows}-{cell.teacher}-{batch_size}-{size}.safetensors"
        if not path.exists():
            anchors, positives = lsa_teacher(train) if self.given is None else self.given
            window = (SKIP[self.task.name], 64)
            config = MiningConfig(
                batch_size=batch_size, cluster_size=size, window=window, margin=None, conflict_weight=3.0
            )
            result = mine_plan(
                anchors, positives, config=config, anchor_id=train.anchor_id, positive_id=train.positive_id
            )
            result.plan.save(path)
        return BatchPlan.load(path)


class OneSided(CrossBatchInfoNCE):
    """The memory of candidates alone, as first published: for the measurement that both sides are needed."""

    def _term_of_remembered_queries(self, batch: Batch, recalled: Any, direction: int, side: Side) -> Tensor:
        return batch.anchors.new_zeros(())


def make_loss(name: str, task: Task, plan: BatchPlan) -> nn.Module:
    """A loss by name, with the task's temperature and direction."""
    if name == "cluster_centres":
        return ClusterCentres(plan.cluster, dimensions=WIDTH, temperature=task.temperature)
    if name == "cross_batch_one_sided":
        return OneSided(len(task.train), temperature=task.temperature, direction=task.direction, corrected=False)
    name, *settings = name.split(",")
    arguments = {key: json.loads(value) for key, value in (setting.split("=") for setting in settings)}
    arguments |= {"temperature": task.temperature, "direction": task.direction}
    if name == "tempnet":
        arguments["dimensions"] = WIDTH
    return registry.make_loss(name, len(task.train), **arguments)


def batches(plan: BatchPlan, num_steps: int) -> Iterator[np.ndarray]:
    """The plan's batches, epoch after epoch."""
    epoch = 0
    while num_steps > 0:
        yield from plan.epoch_batches(epoch)[:num_steps]
        num_steps -= plan.num_batches
        epoch += 1


def rounded(rate: float) -> float:
    """Two digits, so that a rate reached by different products is the same key."""
    return float(f"{rate:.1e}")


def key_of(line: dict[str, Any]) -> str:
    """The cell of a stored line, as text."""
    return json.dumps({name: line[name] for name in Cell.__dataclass_fields__}, sort_keys=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_table(results: Path, out: Path) -> None:
    """One table a task and budget: methods down, batch sizes across, nDCG@10 on test as mean and spread over the seeds
    of the best rate.
    """
    lines = {key_of(line): line for line in read_lines(results)}.values()
    parts = [
        "# Training with the methods of this library\n\n"
        "`python -m benchmarks.global_training` (see its first lines for the options); every run is a line of "
        "`global_training.jsonl`. Machine: 2-core x86 CPU, one thread a run. Encoders from scratch, 128 dimensions: "
        "word bags for text, four convolutions for pictures at 24 x 24. arxiv: title to abstract among 5,000; emoji: "
        "pictures and captions of concepts never seen in training, mean of both directions. Adam, warm-up and linear "
        "decay; learning rate tuned for every cell on the development split (seed 0), then three seeds on the test "
        "split.\n\n"
        "Cells: nDCG@10 mean ± standard deviation over the seeds (number of seeds where it is not three) at the best "
        "rate.\n"
    ]
    groups = sorted({(x["task"], x["budget"], x["amount"], x["rows"], x["teacher"]) for x in lines})
    for task, budget, amount, rows, teacher in groups:
        chosen = [
            x
            for x in lines
            if (x["task"], x["budget"], x["amount"], x["rows"], x["teacher"]) == (task, budget, amount, rows, teacher)
        ]
        sizes = sorted({x["batch_size"] for x in chosen})
        methods = list(dict.fromkeys(x["method"] for x in chosen))
        body = [
            [
                method,
                *(_cell([x for x in chosen if (x["method"], x["batch_size"]) == (method, size)]) for size in sizes),
            ]
            for method in methods
        ]
        steps = {size: next(x["num_steps"] for x in chosen if x["batch_size"] == size) for size in sizes}
        header = ["method", *(f"B={size} ({steps[size]:,} steps)" for size in sizes)]
        parts.append(
            f"\n## {task}: {rows:,} training pairs, {amount:,} {budget} for every batch size, teacher for mining: "
            f"{teacher}\n\n" + markdown_table(header, body)
        )
    out.write_text("".join(parts), encoding="utf-8")


def _cell(lines: list[dict[str, Any]]) -> str:
    tuned = [line for line in lines if line["seed"] == SEEDS[0]]
    if not tuned:
        return ""
    best = max(tuned, key=lambda line: line["dev"]["ndcg@10"])["learning_rate"]
    figures = [line["test"]["ndcg@10"] for line in lines if line["learning_rate"] == best]
    rates = [line["learning_rate"] for line in tuned]
    edge = " rate at the edge" if best in (min(rates), max(rates)) else ""
    spread = f" ± {statistics.stdev(figures):.4f}" if len(figures) > 1 else ""
    count = "" if len(figures) == len(SEEDS) else f" ({len(figures)} seed)"
    return f"{statistics.fmean(figures):.4f}{spread}{count}, lr {best:g}{edge}"


def main() -> None:
    """Run what is asked for and not done, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("arxiv", "emoji"), default="arxiv")
    parser.add_argument("--data", type=Path, help="folder of the task's data")
    parser.add_argument("--cache", type=Path, default=Path("runs/small"), help="folder for tokens and plans")
    parser.add_argument("--anchor-embeddings", help="a teacher's, for mining; without them, LSA of the training texts")
    parser.add_argument("--positive-embeddings")
    parser.add_argument("--teacher-name", default="given", help="name of the given embeddings' model, for the table")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="or the word family")
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--pairs", type=int, help="budget in pairs; 240,000 if neither is given")
    parser.add_argument("--steps", type=int, help="budget in steps")
    parser.add_argument("--limit", type=int, help="use only the first training pairs")
    parser.add_argument("--results", type=Path, default=FOLDER / "global_training.jsonl")
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    table = options.results.with_suffix(".md")
    if options.table_only:
        write_table(options.results, table)
        return
    if options.data is None:
        parser.error("--data is needed, the folder of the task's data")
    if options.methods == ["family"]:
        options.methods = [f"random/{name}" for name in FAMILY if (options.task, name) != ("emoji", "siglip")]
    torch.set_num_threads(1)
    task = load_task(options.task, options.data, cache=options.cache, limit=options.limit)
    files = (options.anchor_embeddings, options.positive_embeddings)
    teacher = tuple(np.load(path, mmap_mode="r")[: len(task.train)] for path in files) if all(files) else None
    study = Study(task, options.results, options.cache, teacher)  # pyright: ignore[reportArgumentType]
    if options.pairs is None and options.steps is None:
        options.pairs = 240_000
    budgets: list[tuple[Literal["pairs", "steps"], int | None]] = [("pairs", options.pairs), ("steps", options.steps)]
    for budget, amount in budgets:
        if amount is None:
            continue
        for batch_size in options.batch_sizes:
            for method in options.methods:
                study.family(
                    Cell(
                        task=task.name,
                        method=method,
                        batch_size=batch_size,
                        budget=budget,
                        amount=amount,
                        rows=len(task.train),
                        teacher=options.teacher_name if all(files) else "lsa",
                        seed=SEEDS[0],
                        learning_rate=rounded(CENTRE[task.name] * (batch_size / 64) ** 0.5),
                    )
                )
                write_table(options.results, table)


if __name__ == "__main__":
    main()
