"""The study: every lever at every batch size, on five tasks and a mixture, by students from scratch and pretrained.

Usage: python -m benchmarks.study --data FOLDER --model FOLDER [--work FOLDER] [--results FILE] [--students ...]
           [--tasks ...] [--arms ...] [--sizes ...] [--budgets ...] [--rates ...]
       python -m benchmarks.study --report

--data holds the sets of `benchmarks.study_tasks`; --model is the teacher, all-MiniLM-L6-v2, from which the pretrained
students are cut too (`benchmarks.small_models`). A cell is a task, student, arm, batch size and budget. Its rate is
tuned: three rates, and on while the best is at the edge, each with three seeds, by the mean nDCG@10 on development
queries; the figure is the mean on test queries at the best rate. A finished run is a line of --results, appended at
once, and never run again: the command can be killed at any time and given again. Further --rates are run once a cell
is tuned, and count like the others. The default order is `ORDER`. At the end, or at once with `--report`, study.md and
quality.svg are written of all lines.

Budgets: "pairs", as many training pairs for every batch size (`PASSES`); "steps", as many steps as `pairs` gives 64.
Transformers see LARGE pairs of 32 tokens once, and search 500 queries in some 2,000 documents.

An arm is BATCHES/LOSS, see `BATCHES` and `LOSSES`. Mined batches have inclusion weights under every loss that is
corrected, and ours have suspected pairs masked; "+half": large clusters, and as many independent rows beside them;
"+negatives": two mined hard negatives a row, "+unpenalised": drawn without the penalty of members that suspect them.
`fresh` is no method but a ceiling: a memory of 1,024 random rows, embedded anew at every step. Temperatures are the
task's (.05, emoji .07); "-cold": .02, as B3 has it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from anybatch.losses import CrossBatchInfoNCE, Examples, registry
from anybatch.losses.log_weights import plus
from anybatch.losses.rows import RowTable
from anybatch.mining import MiningConfig, MiningSet, mine_plan
from anybatch.mining.negatives import sample_negatives
from anybatch.plans.plan import BatchPlan
from benchmarks.caching import Lines
from benchmarks.small_models import Student, score
from benchmarks.study_report import write
from benchmarks.study_tasks import Search, Task, load_task, teacher_embeddings

RESULTS = Path("docs/benchmarks/study.jsonl")
SEEDS = (0, 1, 2)
PASSES = {"arxiv": 4, "arxiv60k": 1, "docstrings": 8, "snli": 8, "scifact": 6, "emoji": 5, "mixture": 2}
CENTRE = {"small": 3e-3, "words": 1.1e-4, "layers1": 9e-4, "layers2": 9e-4}  # rate at 64; it grows with sqrt(B)
FRESH = 1_024  # rows of the ceiling's memory
LARGE = 6_000  # pairs that a transformer is trained on

# How batches are made: settings of mining. "random" mixes the tasks of a mixture, all others stay within one.
BATCHES: dict[str, dict[str, Any]] = {
    "random": {"method": "random", "mixing": "mixed"},
    "within": {"method": "random"},
    "published": {"method": "published"},
    "published+negatives": {"method": "published", "num_negatives": 2},
    "saha": {"method": "saha"},
    "ours": {},
    "ours+half": {},
    "ours+negatives": {"num_negatives": 2},
    "ours+unpenalised": {},
}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "infonce": ("infonce", {}),
    "infonce-cold": ("infonce", {"temperature": 0.02}),
    "corrected": ("count_corrected", {}),
    "corrected-cold": ("count_corrected", {"temperature": 0.02}),
    "cross_batch": ("cross_batch", {"memory_size": 256}),
    "sogclr": ("sogclr", {"positive": "exact"}),
    "sogclr-batch": ("sogclr", {"positive": "batch"}),  # the positive as minus the sum
    "sogclr-relative": ("sogclr", {"state": "relative"}),  # as it was: and the positive as minus the sum
    "fresh": ("cross_batch", {"memory_size": FRESH, "centred": False}),
}
MAIN = (
    *("random/infonce", "random/corrected", "random/cross_batch"),
    *("ours/infonce", "ours/corrected", "ours/cross_batch"),
)
REST = (
    *("published/infonce", "published/corrected", "random/sogclr", "random/sogclr-batch"),
    "random/sogclr-relative",
    *("ours+negatives/infonce", "ours+negatives/corrected", "ours+negatives/cross_batch"),
    *("ours+half/infonce", "ours+half/corrected", "published+negatives/infonce", "random/fresh"),
    "saha/infonce",
    *("ours+unpenalised/infonce", "ours+unpenalised/corrected"),
)
COLD = (
    *("random/infonce-cold", "ours/infonce-cold", "published/infonce-cold"),
    *("random/corrected-cold", "ours/corrected-cold"),
)
WITHIN = ("within/infonce", "within/corrected", "within/cross_batch")  # of the mixture: elsewhere it is "random"
TASKS = ("arxiv", "arxiv60k", "docstrings", "snli", "scifact", "emoji", "mixture")
SMALL_TASKS = ("scifact", "snli")  # at 16 and 64 only
# Students, sizes, arms, budget: in this order.
ORDER: tuple[tuple[str, tuple[int, ...], tuple[str, ...], str], ...] = (
    ("small", (64,), MAIN, "pairs"),
    ("small", (1024, 256, 16), MAIN, "pairs"),
    ("small", (64,), (*REST, *COLD), "pairs"),
    ("words", (64,), MAIN, "pairs"),
    ("words", (1024, 256, 16), MAIN, "pairs"),
    ("words", (64,), (*REST, *COLD), "pairs"),
    ("small", (256, 1024), MAIN, "steps"),
    ("layers1", (64,), (*MAIN, *REST, *COLD), "pairs"),
    ("small", (32,), MAIN, "pairs"),  # of emoji alone
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run; its fields are the key under which the result is kept."""

    task: str
    student: str
    arm: str
    batch_size: int
    budget: Literal["pairs", "steps"] = "pairs"
    seed: int = 0
    rate: float = 0.0


class Study:
    """Tasks, teachers and plans, made once; runs, skipped where they are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lines = Lines(options.results, {})
        self.done = {key_of(line): line for line in self.lines.lines}

    @cache  # noqa: B019 - one study a process
    def task(self, name: str) -> Task:
        """A task, once for all runs."""
        return load_task(name, self.options.data, limit=self.options.limit)

    @cache  # noqa: B019
    def plan(self, name: str, batches: str, batch_size: int) -> BatchPlan:
        """The batches of an arm; of one with independent rows, the mined half of them."""
        task, settings = self.task(name), dict(BATCHES[batches])
        half = batches.endswith("+half")
        if half or settings.get("method") == "published":
            settings["cluster_size"] = min(32, batch_size // 2)
        if half:
            batch_size //= 2
        config = MiningConfig(batch_size=batch_size, **settings)
        sets = [MiningSet(name=part, num_rows=size) for part, size in task.parts]
        teacher = (np.ones((len(task), 1), np.float32),) * 2  # of random batches, not looked at
        if config.method != "random":
            teacher = teacher_embeddings(task, self.options.model, self.options.work)
        mined = mine_plan(*teacher, config=config, sets=sets, **task.ids)
        if not batches.endswith("+unpenalised") or mined.graph is None:
            return mined.plan
        graph = replace(mined.graph, conflict=sparse.csr_matrix(mined.graph.conflict.shape, dtype=np.float32))
        return replace(mined.plan, negatives=sample_negatives(graph, mined.plan.cluster, 2, **task.ids))

    @cache  # noqa: B019
    def searches(self, name: str, split: str, shorter: bool) -> list[Search]:
        """Those of a task's split."""
        searches = list(getattr(self.task(name), split))
        return [search.first(500, 1_500) for search in searches] if shorter else searches

    def tune(self, cell: Cell) -> None:
        """All runs of a cell: rates round the usual one, and on while the best is at the edge."""
        centre = CENTRE[cell.student] * (cell.batch_size / 64) ** 0.5
        figures = {rate: self.figure(cell, rate) for rate in (centre / 3, centre, centre * 3)}
        for _ in range(2):
            best = max(figures, key=lambda rate: figures[rate])
            if best in (min(figures), max(figures)):
                further = best / 3 if best == min(figures) else best * 3
                figures[further] = self.figure(cell, further)

    def figure(self, cell: Cell, rate: float) -> float:
        """Mean over the seeds of a rate, on development queries."""
        rate = float(f"{rate:.1e}")  # the same key, by whatever products it was reached
        return float(np.mean([self.run(replace(cell, seed=seed, rate=rate))["dev"] for seed in SEEDS]))

    def run(self, cell: Cell) -> dict[str, Any]:
        """The result of a run: from the file, or by training, which appends it."""
        key = key_of(asdict(cell))
        if key not in self.done:
            self.lines.add(self.train(cell), **asdict(cell))
            self.done[key] = line = self.lines.lines[-1]
            print(*asdict(cell).values(), *(f"{line[name]:.4f}" for name in ("dev", "test", "seconds")), flush=True)
        return self.done[key]

    def train(self, cell: Cell) -> dict[str, Any]:
        """Train a student, and search with it."""
        # 1. The data, the batches, what the loss knows of rows.
        begun = time.perf_counter()
        torch.manual_seed(cell.seed)
        task, (batches, loss_name) = self.task(cell.task), cell.arm.split("/")
        plan = replace(self.plan(cell.task, batches, cell.batch_size), seed=cell.seed)
        method, settings = LOSSES[loss_name]
        half = batches.endswith("+half")
        corrected = method != "infonce" and batches != "random"
        negatives = np.zeros((len(task), 0), np.int64)
        if plan.negatives is not None:
            negatives = np.where(plan.negatives >= 0, plan.negatives, (np.arange(len(task))[:, None] + 1) % len(task))
        rows = RowTable(
            **task.ids,
            negative_id=task.ids["positive_id"][negatives],
            plan=plan,
            weights="inclusion" if corrected and not half else "none",
            mask_suspects=batches.startswith("ours"),
        )
        halves = Halves(plan) if half else None
        loss = registry.make_loss(
            method, len(task), **{"temperature": task.temperature, "direction": task.direction, **settings}
        )

        # 2. The student.
        student = Student(cell.student, pictures=isinstance(task.anchors, np.ndarray), model=self.options.model)
        optimizers = student.optimizers(cell.rate)
        large = cell.student.startswith("layers")
        pairs = min(len(task), LARGE) if large else len(task) * PASSES[cell.task]
        steps = max(1, pairs // (64 if cell.budget == "steps" else cell.batch_size))
        steps = min(steps, self.options.steps or steps)
        warm = max(1, steps // 10)
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
            )
            for optimizer in optimizers
        ]

        # 3. Train.
        def embed(batch: np.ndarray) -> tuple[Tensor, Tensor]:
            texts = np.concatenate([batch, negatives[batch].T.reshape(-1)])
            return student(task.anchors, batch, back=False), student(task.positives, texts, back=True)

        random = np.random.default_rng(cell.seed)
        for batch in sampled(plan, steps, halves, random):
            if loss_name == "fresh" and isinstance(loss, CrossBatchInfoNCE):
                remember(loss, random.choice(len(task), min(FRESH, len(task)), replace=False), embed, rows)
            arguments = rows.arguments(torch.from_numpy(batch), num_negatives=negatives.shape[1])
            if halves is not None and corrected:
                arguments["log_weight"] = halves.weights(batch, arguments.get("log_weight"))
            loss(*embed(batch), **arguments).backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

        # 4. Search.
        trained = time.perf_counter() - begun
        searches = {split: self.searches(cell.task, split, large) for split in ("dev", "test")} | dict(task.others)
        figures = {split: score(student, of_split) for split, of_split in searches.items()}
        return {
            **{split: round(figure, 5) for split, figure in figures.items()},
            "steps": steps,
            "cluster_size": plan.cluster_size,
            "windows": plan.meta.get("windows"),
            "rows": len(task),
            "train_seconds": round(trained, 2),
            "seconds": round(time.perf_counter() - begun, 2),
        }


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a run from others."""
    return tuple(line[name] for name in Cell.__dataclass_fields__)


def sampled(plan: BatchPlan, steps: int, halves: Halves | None, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The plan's batches, epoch after epoch, with independent rows behind them where they are half of a batch."""
    epoch = 0
    while steps > 0:
        for batch in plan.epoch_batches(epoch)[:steps]:
            yield batch if halves is None else halves.filled(batch, random)
        steps -= plan.num_batches
        epoch += 1


def remember(loss: CrossBatchInfoNCE, rows: np.ndarray, embed: Any, table: RowTable) -> None:
    """Forget everything, and remember these rows as they are embedded now, with the denominators they have."""
    loss.queue.rows.fill_(-1)
    loss.queue.stamps.fill_(-1)
    with torch.no_grad():
        sides = embed(rows)
    loss(*sides, **table.arguments(torch.from_numpy(rows)))


class Halves:
    """Batches of which one half is mined and the other independent rows; and the exact weights of such batches.

    A row j stands beside row i with the chance that j's cluster is in the mined half, or else that j is among the
    independent rows. It depends on where i is itself. Rows in no cluster, fewer than a cluster, count as one of their
    own.
    """

    normalised = True

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.size, n = plan, plan.batch_size, plan.num_rows
        mined, clusters = plan.clusters_per_batch, plan.num_clusters
        beside_mined = self.size / (n - self.size)
        beside_own = (self.size - 1) / (n - self.size - 1)

        def either(in_mined: float, among_rows: float) -> float:
            return in_mined + (1 - in_mined) * among_rows

        # Query independent or mined, candidate of another cluster or of the same.
        chances = [
            [either(mined / (clusters - 1), beside_own), beside_own],
            [either((mined - 1) / (clusters - 1), beside_mined), 1.0],
        ]
        self.table = -torch.tensor(chances, dtype=torch.float64).log() - np.log(n - 1)

    def filled(self, batch: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The mined rows, and as many others."""
        others = random.choice(self.plan.num_rows, 2 * self.size, replace=False)
        return np.concatenate([batch, others[~np.isin(others, batch)][: self.size]])

    def weights(self, batch: np.ndarray, known: Any) -> Any:
        """Log-weights of a batch, with what was known."""
        cluster = np.where(self.plan.cluster[batch] < 0, -2 - batch, self.plan.cluster[batch])
        mined = np.arange(len(batch)) < self.size
        columns = {"half_cluster": torch.from_numpy(cluster), "mined": torch.from_numpy(mined.astype(np.int64))}
        return plus(known, len(batch), self, **columns)

    def __call__(self, queries: Examples, candidates: Examples, *, back: bool) -> Tensor:
        """See `Term`."""
        same = queries["half_cluster"][:, None] == candidates["half_cluster"]
        return self.table[queries["mined"]].gather(1, same.long())


def cells(options: argparse.Namespace | None) -> Iterator[Cell]:
    """What was asked for, or all, in the order of `ORDER`."""
    for student, sizes, arms, budget in ORDER:
        for size in sizes:
            for task in TASKS:
                if (task in SMALL_TASKS and size > 64) or (task == "emoji" and student != "small"):
                    continue
                if (size == 32 and task != "emoji") or (task == "arxiv60k" and size != 64):
                    continue
                of_task = (*(WITHIN if task == "mixture" else ()), *arms)
                for arm in of_task:
                    if task == "arxiv60k" and arm not in (*MAIN, "published/infonce"):
                        continue
                    if task == "mixture" and ("+half" in arm or "+unpenalised" in arm):  # written for one task
                        continue
                    cell = Cell(task=task, student=student, arm=arm, batch_size=size, budget=budget)  # pyright: ignore
                    if options is None or all(
                        not chosen or value in chosen
                        for chosen, value in (
                            (options.students, student),
                            (options.tasks, task),
                            (options.arms, arm),
                            (options.sizes, size),
                            (options.budgets, budget),
                        )
                    ):
                        yield cell


def main() -> None:
    """Run what is asked for and not done, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2: the teacher")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where the teacher's embeddings are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    for name, kind in (("students", str), ("tasks", str), ("arms", str), ("sizes", int), ("budgets", str)):
        parser.add_argument(f"--{name}", nargs="*", type=kind, default=[], help="of the default order, only these")
    parser.add_argument("--rates", nargs="*", type=float, default=[], help="tried too, once a cell is tuned")
    parser.add_argument("--limit", type=int, help="only the first training pairs of arxiv")
    parser.add_argument("--steps", type=int, help="at most so many steps, to try it")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="where table and figure go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The rank window")
    study = Study(options)
    if not options.report:
        for cell in cells(options):
            study.tune(cell)
            for rate in options.rates:
                study.figure(cell, rate)
    asked = [(cell.student, cell.budget, cell.task, cell.arm, cell.batch_size) for cell in cells(None)]
    write(study.lines.lines, seeds=SEEDS, tasks=TASKS, asked=list(dict.fromkeys(asked)), out=options.out)


if __name__ == "__main__":
    main()
