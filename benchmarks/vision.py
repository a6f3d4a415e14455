"""Images without labels: SimCLR, SogCLR and the cross-batch loss by batch size, at equal epochs and at equal steps.

Usage: python -m benchmarks.vision --data FOLDER [--results FILE]
       python -m benchmarks.vision --report
       python -m benchmarks.vision memory | exactness [...]    # of `vision_memory`, `vision_exactness`

--data holds `images.npz` (encoded pictures one after the other: data, offsets) and `meta.jsonl.gz` (a line a picture:
label, split: train, dev, test or unlabeled). ROWS pictures of train and unlabeled, at 32 x 32, are trained on without
labels: a small residual network of `anybatch.vision`, a projection head, AdamW, a cosine, one thread. All of train,
embedded without the head, is what k-NN and the linear probe learn from; figures are means over the classes. At the end,
or at once with `--report`, docs/benchmarks/vision.md is written of all lines.

The rate of a cell (arm, batch size, budget) is tuned with seed 0, by k-NN + linear on dev: three rates, and on while
the best is at the edge; seeds 1 and 2 run at the best one. Rates grow with the square root of the batch. A finished run
is a line of --results, appended at once, and never run again.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import io
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.evaluation.classes import class_metrics
from anybatch.losses import registry
from anybatch.vision.encoders import ProjectionHead, SmallResNet
from anybatch.vision.views import both_ways, random_views, view_keys
from benchmarks.caching import Lines

RESULTS = Path("docs/benchmarks/vision.jsonl")
PAGE = Path("docs/benchmarks/vision.md")
SIDE, ROWS, WIDTH, EPOCHS = 32, 3072, 16, 50
SEEDS = (0, 1, 2)
TEMPERATURE = 0.1  # published for SogCLR on photographs; SimCLR's best at small batches
FACTORS = (0.25, 0.5, 1.0)  # times CENTRE, and on by 2 while the best is at an edge
CENTRE = 2e-3  # rate at a batch of 64

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "simclr": ("infonce", {}),
    "sogclr": ("sogclr", {"gamma": 0.9, "positive": "exact"}),
    "sogclr batch": ("sogclr", {"gamma": 0.9, "positive": "batch"}),
    "sogclr .3": ("sogclr", {"gamma": 0.3, "positive": "exact"}),
    "cross-batch": ("cross_batch", {"memory_size": 256}),
}
# Arm, batch size, budget: in this order. "epochs": EPOCHS each; "steps": as many steps as 128 makes in EPOCHS.
ORDER: tuple[tuple[str, int, str], ...] = (
    ("sogclr", 64, "epochs"),
    ("simclr", 64, "epochs"),
    ("simclr", 512, "epochs"),
    ("sogclr batch", 64, "epochs"),
    ("sogclr batch", 128, "epochs"),
    ("sogclr", 128, "epochs"),
    ("sogclr .3", 64, "epochs"),
    ("cross-batch", 64, "epochs"),
    ("simclr", 128, "epochs"),
    ("simclr", 32, "epochs"),
    ("sogclr", 32, "epochs"),
    ("simclr", 64, "steps"),
    ("sogclr", 64, "steps"),
    ("simclr", 512, "steps"),
)
PUBLISHED = ("sogclr", "sogclr batch")  # of which the better one on dev is held against the aims
HEAD = f"""# Images without labels

`python -m benchmarks.vision` ([lines](vision.jsonl)). caltech101-64, of whose training and unlabelled pictures {ROWS:,}
at {SIDE} x {SIDE} are trained on without labels, {EPOCHS} epochs, two views a visit: a residual network of 77,000
weights (`SmallResNet(width={WIDTH})`), a head of two layers, AdamW, cosine, temperature {TEMPERATURE}, one thread.

SogCLR has absolute states and gamma .9, as published; "batch": its positive receives minus the sum of what the batch's
negatives receive, else the exact weight; ".3": that gamma. k-NN (20 neighbours, weighted) and logistic regression learn
from the 5,391 labelled pictures of train, whose labels no loss sees. Figures are accuracies on 1,585 test pictures, the
mean of 99 classes, and over seeds, ± standard error. The untrained network: k-NN .126, linear .157. The rate of each
arm and size is tuned with seed 0, on dev.

This is a small setting: {ROWS:,} pictures, of which a batch of 64 holds 2 in 100, seen {EPOCHS} times. Published gains
are on 1.28 million pictures, at 100 to 800 epochs of a ResNet-50."""
TABLE = ("| arm | batch | rate | seeds | k-NN | linear |", "|---|---|---|---|---|---|")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run; its fields are the key under which the result is kept."""

    arm: str
    batch_size: int
    budget: str
    seed: int = 0
    rate: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Pictures at SIDE x SIDE: (N, 3, SIDE, SIDE) uint8; class and split of each; the rows that are trained on."""

    pixels: Tensor
    label: np.ndarray
    split: np.ndarray
    trained: Tensor

    @classmethod
    def read(cls, folder: Path) -> Pictures:
        """All pictures of a folder."""
        from PIL import Image

        with np.load(folder / "images.npz") as stored:
            data, offsets = stored["data"].tobytes(), stored["offsets"].tolist()
        with gzip.open(folder / "meta.jsonl.gz", "rt", encoding="utf-8") as file:
            meta = [json.loads(line) for line in file]
        pixels = np.empty((len(meta), SIDE, SIDE, 3), np.uint8)
        for place, ends in enumerate(pairwise(offsets)):
            picture = Image.open(io.BytesIO(data[slice(*ends)])).convert("RGB")
            pixels[place] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        split = np.array([line["split"] for line in meta])
        (usable,) = np.nonzero((split == "train") | (split == "unlabeled"))
        trained = np.sort(np.random.default_rng(0).choice(usable, min(ROWS, len(usable)), replace=False))
        return cls(
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            label=np.array([line["label"] for line in meta]),
            split=split,
            trained=torch.from_numpy(trained),
        )

    def of(self, rows: Tensor) -> Tensor:
        """(B, 3, SIDE, SIDE) in [0, 1]."""
        return self.pixels[rows].to(torch.float32).contiguous(memory_format=torch.channels_last) / 255


def steps_of(cell: Cell, rows: int) -> int:
    """The steps of a run."""
    size = cell.batch_size if cell.budget == "epochs" else 128
    return EPOCHS * (rows // size)


def train(cell: Cell, pictures: Pictures) -> nn.Module:
    """The encoder after one run, without its head."""
    torch.manual_seed(cell.seed)
    encoder = SmallResNet(WIDTH).layers.to(memory_format=torch.channels_last)
    head = ProjectionHead(4 * WIDTH).layers
    name, options = ARMS[cell.arm]
    rows = len(pictures.trained)
    loss = registry.make_loss(name, rows, temperature=TEMPERATURE, **options)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=cell.rate, weight_decay=1e-4)
    steps, generator = steps_of(cell, rows), np.random.default_rng(cell.seed)
    order = np.empty(0, np.int64)
    for step in range(steps):
        if len(order) < cell.batch_size:
            order = generator.permutation(rows)
        index, order = torch.from_numpy(order[: cell.batch_size]), order[cell.batch_size :]
        pixels = pictures.of(pictures.trained[index])
        views = [random_views(pixels, view_keys(index, seed=cell.seed, step=step, view=view)) for view in (0, 1)]
        first, second = head(encoder(torch.cat(views))).chunk(2)
        value = loss(*both_ways(first, second), index=index.repeat(2))
        for group in optimizer.param_groups:
            group["lr"] = cell.rate * rate_share(step, steps)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return encoder.eval()


def rate_share(step: int, steps: int) -> float:
    """Up over a tenth of the steps, then a cosine down to 0."""
    rising = (step + 1) / max(1, steps // 10)
    return min(rising, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def figures(encoder: nn.Module, pictures: Pictures) -> dict[str, float]:
    """k-NN and linear on dev and test."""
    rows = torch.arange(len(pictures.label))
    embeddings = torch.cat([encoder(pictures.of(part)) for part in rows.split(512)])
    embeddings = nn.functional.normalize(embeddings, dim=1).numpy()
    known = pictures.split == "train"
    results = {}
    for split in ("dev", "test"):
        chosen = pictures.split == split
        values = class_metrics(embeddings[known], pictures.label[known], embeddings[chosen], pictures.label[chosen])
        results.update({f"{split}_{name}": round(value, 4) for name, value in values.items()})
    return results


class Runs:
    """Runs, skipped where they are done."""

    def __init__(self, results: Path) -> None:
        self.lines = Lines(results, {})
        self.done: dict[Cell, dict[str, Any]] = {}
        for line in self.lines.lines:
            self.done[Cell(**{name: line[name] for name in Cell.__annotations__})] = line

    def run(self, cell: Cell, pictures: Pictures) -> dict[str, Any]:
        """The line of one run."""
        if cell not in self.done:
            start = time.perf_counter()
            encoder = train(cell, pictures)
            seconds = round(time.perf_counter() - start, 1)
            self.done[cell] = {**asdict(cell), **figures(encoder, pictures), "seconds": seconds}
            self.lines.add(self.done[cell])
        return self.done[cell]

    def best(self, cell: Cell, pictures: Pictures) -> Cell:
        """The cell at its best rate, of seed 0."""
        centre = CENTRE * math.sqrt(cell.batch_size / 64)
        factors = list(FACTORS)
        while True:
            tried = [replace(cell, rate=round(centre * factor, 6)) for factor in factors]
            scores = [sum(self.run(run, pictures)[f"dev_{name}"] for name in ("knn", "linear")) for run in tried]
            place = int(np.argmax(scores))
            if place == 0:
                factors.insert(0, factors[0] / 2)
            elif place == len(factors) - 1:
                factors.append(factors[-1] * 2)
            else:
                return tried[place]


def cells_of(lines: list[dict[str, Any]]) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """The lines of each arm, size and budget at its best rate, one a seed."""
    cells = {}
    for arm, size, budget in ORDER:
        of_cell = [line for line in lines if (line["arm"], line["batch_size"], line["budget"]) == (arm, size, budget)]
        tuned = [line for line in of_cell if line["seed"] == 0]
        if tuned:
            rate = max(tuned, key=lambda line: line["dev_knn"] + line["dev_linear"])["rate"]
            cells[arm, size, budget] = [line for line in of_cell if line["rate"] == rate]
    return cells


def mean_and_error(lines: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean over seeds and its standard error (nan of one seed)."""
    values = [line[name] for line in lines]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def shown(lines: list[dict[str, Any]], name: str) -> str:
    """Mean ± standard error."""
    mean, error = mean_and_error(lines, name)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def report(lines: list[dict[str, Any]]) -> str:
    """The page."""
    cells, parts = cells_of(lines), [HEAD]
    for budget, title in (("epochs", f"## Equal epochs ({EPOCHS})"), ("steps", "## Equal steps")):
        rows = [
            f"| {arm} | {size} | {found[0]['rate']:g} | {len(found)} | "
            + " | ".join(shown(found, f"test_{name}") for name in ("knn", "linear"))
            + " |"
            for (arm, size, of_budget), found in sorted(
                cells.items(), key=lambda cell: (cell[0][0] != "simclr", cell[0])
            )
            if of_budget == budget
        ]
        if rows:
            parts.append("\n".join([title, "", *TABLE, *rows]))
    parts.append("## The aims\n\n" + "\n".join(verdicts(cells)))
    return "\n\n".join(parts) + "\n"


def verdicts(cells: dict[tuple[str, int, str], list[dict[str, Any]]]) -> list[str]:
    """Whether SogCLR at 128 is as good as SimCLR at 512, and better than SimCLR at 64 by two standard errors."""
    said = []
    aims = ((128, 512, "as good", 0), (64, 64, "more than two standard errors better", 2))
    for budget, (size, other, wanted, errors), name in product(("epochs", "steps"), aims, ("knn", "linear")):
        of_size = "epochs" if size == 128 else budget  # the steps of 128 are those of the second table
        ours = [cells[arm, size, of_size] for arm in PUBLISHED if (arm, size, of_size) in cells]
        theirs = cells.get(("simclr", other, budget))
        if not ours or theirs is None:
            continue
        best = max(ours, key=lambda lines: statistics.mean(line["dev_knn"] + line["dev_linear"] for line in lines))
        (mean, error), (base, of_base) = (mean_and_error(lines, f"test_{name}") for lines in (best, theirs))
        combined = math.hypot(error, of_base)
        holds = "holds" if mean - base > errors * combined or (not errors and mean == base) else "does not hold"
        certain = "one seed" if math.isnan(combined) else f"standard error {combined:.3f}"
        measure = "k-NN" if name == "knn" else "linear"
        said.append(
            f"* Equal {budget}, {measure}: {best[0]['arm']} at {size} {mean - base:+.3f}\n"
            f"  against SimCLR at {other}, {certain}. Aim ({wanted}): {holds}."
        )
    return said


def main() -> None:
    """See the module."""
    if sys.argv[1:2] in (["memory"], ["exactness"]):
        importlib.import_module(f"benchmarks.vision_{sys.argv[1]}").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    runs = Runs(options.results)
    if not options.report:
        torch.set_num_threads(1)
        pictures = Pictures.read(options.data)
        for arm, batch_size, budget in ORDER:
            best = runs.best(Cell(arm=arm, batch_size=batch_size, budget=budget), pictures)
            for seed in SEEDS[1:]:
                runs.run(replace(best, seed=seed), pictures)
    PAGE.write_text(report(runs.lines.lines), encoding="utf-8")


if __name__ == "__main__":
    main()
