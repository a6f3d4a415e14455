"""How far each method's gradient is from the exact one over all data, on embeddings that stand still.

Usage: python -m benchmarks.global_loss --data FOLDER [--direction both]

FOLDER holds `*anchor.npy` and `*positive.npy`, (n, D) float each, such as `anybatch mine` leaves in its output folder.
What is measured is defined in anybatch/insight/gradient_error.py. Finished lines are appended to
docs/benchmarks/global_loss.jsonl and skipped when run again; the table in global_loss.md is made of that file
(`--direction both`: global_loss_both). Adding a method is one line of `METHODS`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from anybatch.insight import markdown_table
from anybatch.insight.gradient_error import NUM_BATCHES, FrozenPairs, gradient_error
from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from anybatch.losses.base import Direction
from anybatch.losses.registry import LossConfig, build_loss
from anybatch.mining import MiningConfig, mine_plan
from anybatch.plans.plan import BatchPlan

FOLDER = Path("docs/benchmarks")
ERRORS = {"error of an epoch": "epoch_error", "direction": "cosine", "bias": "bias", "noise": "noise"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method is made for."""

    num_rows: int
    temperature: float
    direction: Direction


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table: a loss, the batches it is for, its log-weights, the epochs its memory takes to settle, its
    batch sizes.
    """

    name: str
    make: Callable[[Setting], nn.Module]
    batches: tuple[str, ...] = ("random", "mined")
    weights: Literal["none", "inclusion"] = "none"
    run_in: int = 0
    batch_sizes: tuple[int, ...] = (8, 32, 64, 128)


def sogclr(gamma: float, **settings: Any) -> Callable[[Setting], nn.Module]:
    """The full-data InfoNCE with memory."""
    return lambda s: SogCLR(
        s.num_rows, gamma=gamma, temperature=s.temperature, direction=s.direction, **{"positive": "exact", **settings}
    )


def count_corrected(s: Setting) -> nn.Module:
    """No memory."""
    return CountCorrectedInfoNCE(s.num_rows, temperature=s.temperature, direction=s.direction)


def cross_batch(memory_size: int, mean_rows: int = 64) -> Callable[[Setting], nn.Module]:
    """Recent batches remembered."""
    return lambda s: CrossBatchInfoNCE(
        s.num_rows, memory_size=memory_size, mean_rows=mean_rows, temperature=s.temperature, direction=s.direction
    )


def named(name: Literal["scent", "emc2", "glofnd", "nuclr", "isogclr"]) -> Callable[[Setting], nn.Module]:
    """A method of the library with its own defaults."""
    return lambda s: build_loss(
        LossConfig(name=name, temperature=s.temperature, direction=s.direction), num_rows=s.num_rows
    )


SLOW = (64,)  # a memory that forgets slowly takes many epochs to settle: measured at one size
CLUSTERED = ("mined", "mined, skip 30", "mined, clusters of 4", "mined, weak teacher")
METHODS = (
    Method(
        name="InfoNCE",
        make=lambda s: InfoNCE(temperature=s.temperature, direction=s.direction),
        batches=("random", *CLUSTERED),
    ),
    Method(name="decoupled", make=lambda s: DecoupledInfoNCE(temperature=s.temperature, direction=s.direction)),
    Method(name="count-corrected", make=count_corrected),
    Method(name="SogCLR .9", make=sogclr(0.9), run_in=3),
    *(
        Method(name=name, make=make, run_in=run_in, batches=("random",), batch_sizes=SLOW)
        for name, make, run_in in (
            ("SogCLR .9, positive as minus the sum", sogclr(0.9, positive="batch"), 3),
            ("SogCLR .5, positive as minus the sum", sogclr(0.5, positive="batch"), 5),
            ("SogCLR .5, relative state", sogclr(0.5, state="relative"), 5),
            ("SogCLR .5", sogclr(0.5), 5),
        )
    ),
    Method(name="SogCLR .2", make=sogclr(0.2), run_in=10, batch_sizes=SLOW),
    Method(name="count-corrected, weights", make=count_corrected, weights="inclusion", batches=CLUSTERED),
    Method(name="SogCLR .9, weights", make=sogclr(0.9), weights="inclusion", run_in=3, batches=("mined",)),
    Method(
        name="SogCLR .2, weights",
        make=sogclr(0.2),
        weights="inclusion",
        run_in=10,
        batches=("mined",),
        batch_sizes=SLOW,
    ),
    Method(name="cross-batch 1,024", make=cross_batch(1024), run_in=1, batches=("random",)),
    Method(name="cross-batch 4,096", make=cross_batch(4096), run_in=1, batches=("random",), batch_sizes=(64,)),
    Method(name="cross-batch 1,024, weights", make=cross_batch(1024), weights="inclusion", run_in=1, batches=CLUSTERED),
    Method(
        name="cross-batch 1,024, mean of 256, weights",
        make=cross_batch(1024, 256),
        weights="inclusion",
        run_in=1,
        batches=("mined", "mined, skip 30"),
    ),
    Method(name="SCENT", make=named("scent"), run_in=5, batch_sizes=SLOW),
    Method(name="EMC2", make=named("emc2"), run_in=5, batch_sizes=SLOW, batches=("random",)),
    Method(name="GloFND", make=named("glofnd"), run_in=5, batch_sizes=SLOW, batches=("random",)),
    Method(name="NUCLR", make=named("nuclr"), run_in=5, batch_sizes=SLOW, batches=("random",)),
    Method(name="iSogCLR", make=named("isogclr"), run_in=5, batch_sizes=SLOW, batches=("random",)),
)


def make_plan(batches: str, sides: tuple[np.ndarray, np.ndarray], batch_size: int) -> BatchPlan:
    """The batches by name; clusters of 32, or of half a batch where that is less."""
    num_rows = len(sides[0])
    size = 4 if batches == "mined, clusters of 4" else min(32, batch_size // 2)
    if batches == "random":
        return BatchPlan.random(num_rows, batch_size)
    if batches == "mined, weak teacher":  # sixteen random directions of the embeddings
        directions = np.random.default_rng(0).normal(size=(sides[0].shape[1], 16)).astype(np.float32)
        sides = (sides[0] @ directions, sides[1] @ directions)
    window = (30 if batches == "mined, skip 30" else 0, 64)
    settings = {"window": window, "margin": None, "conflict_weight": 3.0}
    return mine_plan(*sides, config=MiningConfig(batch_size=batch_size, cluster_size=size, **settings)).plan


def main() -> None:
    """Measure what is not measured yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000, help="use the first rows")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--num-batches", type=int, default=NUM_BATCHES, help="measured in each of two halves")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[64, 32, 8, 128])
    parser.add_argument("--direction", choices=["one_way", "both"], default="one_way")
    parser.add_argument(
        "--out", type=Path, help="by default docs/benchmarks/global_loss.jsonl, or global_loss_both.jsonl"
    )
    options = parser.parse_args()
    if options.out is None:
        options.out = FOLDER / ("global_loss.jsonl" if options.direction == "one_way" else "global_loss_both.jsonl")
    torch.set_num_threads(1)
    sides = tuple(
        np.array(np.load(next(iter(sorted(options.data.glob(f"*{side}.npy")))), mmap_mode="r")[: options.rows])
        for side in ("anchor", "positive")
    )
    assert len(sides) == 2
    begun = time.perf_counter()
    pairs = FrozenPairs.prepare(*sides, temperature=options.temperature, direction=options.direction)
    print(f"full-data gradient: {time.perf_counter() - begun:.0f} s", flush=True)
    common = {
        "rows": len(pairs),
        "temperature": options.temperature,
        "draws": options.num_batches,
        "direction": options.direction,
    }
    done = {key_of(line) for line in read_lines(options.out)}

    def record(line: dict[str, Any]) -> None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**common, **line}) + "\n")

    infonce = InfoNCE(temperature=options.temperature, direction=options.direction)
    for size in (2**power for power in range(3, len(pairs).bit_length()) if 2 ** (power + 1) <= len(pairs)):
        if (*common.values(), "InfoNCE", "curve", size) not in done:
            plan = BatchPlan.random(len(pairs), size)
            error = gradient_error(
                pairs, infonce, plan=plan, num_batches=min(options.num_batches, 4 * plan.num_batches)
            )
            record({"method": "InfoNCE", "batches": "curve", "batch_size": size, **asdict(error)})
    for batch_size in options.batch_sizes:
        plans: dict[str, BatchPlan] = {}
        for method in METHODS:
            for batches in method.batches if batch_size in method.batch_sizes else ():
                key = (*common.values(), method.name, batches, batch_size)
                if key in done:
                    continue
                if batches not in plans:
                    plans[batches] = make_plan(batches, sides, batch_size)
                plan, begun = plans[batches], time.perf_counter()
                setting = Setting(
                    num_rows=len(pairs),
                    temperature=options.temperature,
                    direction=options.direction,
                )
                error = gradient_error(
                    pairs,
                    method.make(setting),
                    plan=plan,
                    weights=method.weights,
                    run_in=method.run_in,
                    num_batches=options.num_batches,
                )
                seconds = time.perf_counter() - begun
                record(
                    {
                        "method": method.name,
                        "batches": batches,
                        "batch_size": batch_size,
                        "cluster_size": plan.cluster_size,
                        **asdict(error),
                        "seconds": seconds,
                    }
                )
                print(
                    f"B={batch_size} {batches}: {method.name}: {', '.join(_cells(asdict(error)))} ({seconds:.0f} s)",
                    flush=True,
                )
    write_table(options.out, tuple(common.values()))


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a line."""
    names = ("rows", "temperature", "draws", "direction", "method", "batches", "batch_size")
    return tuple(line[name] for name in names)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_table(results: Path, common: tuple[Any, ...]) -> None:
    """The lines of one setting as tables, one a batch size."""
    lines = [line for line in read_lines(results) if key_of(line)[:4] == common]
    rows, temperature, num_batches, direction = common
    both, option = ("both directions", " --direction both") if direction == "both" else ("one direction", "")
    parts = [
        f"# Distance to the full-data gradient\n\n`python -m benchmarks.global_loss --data FOLDER{option}`: the "
        f"first {rows:,} pairs of arxiv-title-abstract, embedded by all-MiniLM-L6-v2 (which also mined); temperature "
        f"{temperature:g}, {both}; {2 * num_batches:,} batches a line or more, in two halves. 2-core x86 CPU.\n\n"
        "The gradient is that of a linear map that all rows share ([inspect](../inspect.md)); errors relative to its "
        "length over all data, ± one standard error. Mined: clusters of 32, or as named. All embeddings stand still, "
        "so no memory is ever stale here.\n\n## Random InfoNCE by batch size\n\n"
    ]
    curve = sorted((line for line in lines if line["batches"] == "curve"), key=lambda line: line["batch_size"])
    parts.append(markdown_table(["batch", *ERRORS], [[f"{line['batch_size']:,}", *_cells(line)] for line in curve]))
    measured = [line for line in lines if line["batches"] != "curve"]
    for size in sorted({line["batch_size"] for line in measured}):
        of_size = sorted((x for x in measured if x["batch_size"] == size), key=lambda line: line["epoch_error"])
        body = [[line["method"], line["batches"], *_cells(line)] for line in of_size]
        parts += [f"\n## Batches of {size}, best first\n\n", markdown_table(["method", "batches", *ERRORS], body)]
    results.with_suffix(".md").write_text("".join(parts), encoding="utf-8")


def _cells(line: dict[str, Any]) -> list[str]:
    figures = [(line[name], line[f"{name}_se"]) for name in ERRORS.values()]
    return [f"{value:.2f} ± {se:.2f}" if math.isfinite(value + se) else "hidden by noise" for value, se in figures]


if __name__ == "__main__":
    main()
