"""Do gradients measured before training tell which method trains best? One student, measured where it stands, then
trained on with each method.

Usage: python -m benchmarks.shared_direction --data FOLDER --anchor-embeddings A.npy --positive-embeddings P.npy

A word-bag student is trained on 6,000 pairs with InfoNCE; the gradient error of each method is measured on its
embeddings; then a copy is trained on with each method, at one learning rate and two seeds. Writes
docs/benchmarks/shared_direction.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from anybatch.insight import markdown_table
from anybatch.insight.gradient_error import FrozenPairs, gradient_error
from anybatch.losses.rows import RowTable
from anybatch.mining import MiningConfig, mine_plan
from anybatch.plans.plan import BatchPlan
from benchmarks.global_training import batches, make_loss
from benchmarks.small_models import PairModel, Task, evaluate, load_task

ROWS, BATCH, SEEDS = 6_000, 64, (0, 1)
FIRST, THEN = (24_000, 3e-3), (12_000, 3e-4)  # pairs and rate
METHODS = (
    "random/infonce",
    "random/count_corrected",
    "mined/infonce",
    "mined/count_corrected/inclusion",
    "mined/cluster_centres",
)


def main() -> None:
    """Train the student, measure, train on, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of arxiv-title-abstract")
    parser.add_argument("--cache", type=Path, default=Path("runs/small"))
    parser.add_argument("--anchor-embeddings", required=True, help="the mining teacher's")
    parser.add_argument("--positive-embeddings", required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/shared_direction.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task("arxiv", options.data, cache=options.cache, limit=ROWS)
    teacher = [np.load(path, mmap_mode="r")[:ROWS] for path in (options.anchor_embeddings, options.positive_embeddings)]
    config = MiningConfig(batch_size=BATCH, cluster_size=32, window=(10, 64), margin=None, conflict_weight=3.0)
    ids = {"anchor_id": task.train.anchor_id, "positive_id": task.train.positive_id}
    plans = {
        "random": BatchPlan.random(ROWS, BATCH),
        "mined": mine_plan(*teacher, config=config, anchor_id=ids["anchor_id"], positive_id=ids["positive_id"]).plan,
    }
    torch.manual_seed(0)
    student = task.make_model()
    train(student, "random/infonce", task, replace(plans["random"], seed=5), *FIRST)
    begun = evaluate(student, task.dev, direction="one_way")["ndcg@10"]
    student.eval()
    with torch.no_grad():
        blocks = [student(task.train, rows) for rows in np.array_split(np.arange(ROWS), 12)]
    student.train()
    sides = [torch.cat(side).numpy() for side in zip(*blocks, strict=True)]
    pairs = FrozenPairs.prepare(
        sides[0],
        sides[1],
        temperature=task.temperature,
        anchor_id=ids["anchor_id"],
        positive_id=ids["positive_id"],
    )
    rows = []
    for method in METHODS:
        plan = plans[method.split("/")[0]]
        loss, table = loss_and_table(method, task, plan)
        run_in = 2 if "centres" in method else 0
        error = gradient_error(pairs, loss, plan=plan, table=table, run_in=run_in, epochs=2)
        after = []
        for seed in SEEDS:
            copied = copy.deepcopy(student)
            train(copied, method, task, replace(plan, seed=seed), *THEN)
            after.append(evaluate(copied, task.dev, direction="one_way")["ndcg@10"])
        rows.append((statistics.fmean(after), method, error, after))
        print(method, error, after, flush=True)
    rows.sort(key=lambda row: -row[0])
    body = [
        [
            method,
            f"{mean:.4f} ({', '.join(f'{value:.4f}' for value in after)})",
            f"{error.shared_cosine:.2f} ± {error.shared_cosine_se:.2f}",
            f"{error.shared_bias:.2f} ± {error.shared_bias_se:.2f}",
            f"{error.rmse:.3f}",
            f"{error.scaled_rmse:.3f}",
            f"{error.bias:.3f}",
        ]
        for mean, method, error, after in rows
    ]
    header = ["method", "nDCG@10 (seeds)", "shared cosine", "shared bias", "RMSE", "RMSE, scaled", "bias"]
    options.out.write_text(
        "# Which gradient figure tells how training goes?\n\n`python -m benchmarks.shared_direction --data FOLDER "
        f"--anchor-embeddings A.npy --positive-embeddings P.npy`: a word-bag student, {ROWS:,} pairs of "
        f"arxiv-title-abstract, batches of {BATCH}, trained on {FIRST[0]:,} pairs with InfoNCE (nDCG@10 {begun:.4f} on "
        f"the development pairs); gradients measured on its embeddings there; then {THEN[0]:,} pairs more with each "
        f"method at one rate ({THEN[1]:g}). Teacher of the mined batches: all-MiniLM-L6-v2, skip 10. Machine: 2-core "
        "x86 CPU, one thread. Best in training first.\n\n"
        + markdown_table(header, body)
        + "\nOne student, one rate, two seeds: an example, not a law.\n",
        encoding="utf-8",
    )


def loss_and_table(method: str, task: Task, plan: BatchPlan) -> tuple[nn.Module, RowTable]:
    """A method's loss and its log-weights and masks."""
    parts = method.split("/")
    weights = "inclusion" if "inclusion" in parts[2:] else "none"
    table = RowTable(task.train.anchor_id, task.train.positive_id, plan=plan, weights=weights)
    return make_loss(parts[1], weights, task, plan), table


def train(model: PairModel, method: str, task: Task, plan: BatchPlan, num_pairs: int, rate: float) -> None:
    """Train in place; a memory of centres is filled first, by one epoch that changes nothing."""
    loss, table = loss_and_table(method, task, plan)
    if "centres" in method:
        for batch in plan.epoch_batches(99):
            loss(*model(task.train, batch), **table.arguments(torch.from_numpy(batch)))
    num_steps = num_pairs // plan.batch_size
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / num_steps))
    for batch in batches(plan, num_steps):
        value = loss(*model(task.train, batch), **table.arguments(torch.from_numpy(batch)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main()
