"""How far each method's gradient is from the exact one over all data, on embeddings that stand still.

Usage: python -m benchmarks.global_loss --data FOLDER [--direction both]

FOLDER holds `*anchor.npy` and `*positive.npy`, (n, D) float each, such as `anybatch mine` leaves in its output folder.
What is measured is defined in anybatch/evaluation/gradient_error.py. Finished lines are appended to
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
from anybatch.insight.gradient_error import FrozenPairs, effective_batch_size, gradient_error, infonce_curve
from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from anybatch.losses.base import Direction
from anybatch.losses.registry import LossConfig, build_loss
from anybatch.losses.rows import RowTable
from anybatch.mining import MiningConfig, mine_plan
from anybatch.plans.plan import BatchPlan
from benchmarks.cluster_centres import ClusterCentres

FOLDER = Path("docs/benchmarks")
AIM = (64, 2048)  # mined and corrected at 64 with the error of random InfoNCE at 2,048
ERRORS = ("rmse", "bias", "scaled_rmse")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method is made for."""

    num_rows: int
    dimensions: int
    temperature: float
    direction: Direction
    plan: BatchPlan


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table: a loss, the batches it is for, its log-weights, the epochs its memory takes to settle, its
    batch sizes and directions.
    """

    name: str
    make: Callable[[Setting], nn.Module]
    batches: tuple[str, ...] = ("random", "mined")
    weights: Literal["none", "inclusion"] = "none"
    cap: float | None = None
    run_in: int = 0
    batch_sizes: tuple[int, ...] = (8, 32, 64, 128)
    directions: tuple[Direction, ...] = ("one_way", "both")


def sogclr(gamma: float) -> Callable[[Setting], nn.Module]:
    """The full-data InfoNCE with memory."""
    return lambda s: SogCLR(s.num_rows, gamma=gamma, temperature=s.temperature, direction=s.direction)


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


def centres(s: Setting) -> nn.Module:
    """One vector a cluster."""
    return ClusterCentres(s.plan.cluster, dimensions=s.dimensions, temperature=s.temperature)


SLOW = (64,)  # a memory that forgets slowly takes many epochs to settle: measured at one size
CLUSTERED = ("mined", "mined, skip 30", "mined, weak teacher")
METHODS = (
    Method(
        name="InfoNCE",
        make=lambda s: InfoNCE(temperature=s.temperature, direction=s.direction),
        batches=("random", *CLUSTERED),
    ),
    Method(name="decoupled", make=lambda s: DecoupledInfoNCE(temperature=s.temperature, direction=s.direction)),
    Method(name="count-corrected", make=count_corrected),
    Method(name="SogCLR .9", make=sogclr(0.9), run_in=3),
    Method(name="SogCLR .5", make=sogclr(0.5), run_in=5, batches=("random",), batch_sizes=SLOW),
    Method(name="SogCLR .2", make=sogclr(0.2), run_in=10, batch_sizes=SLOW),
    Method(name="count-corrected, weights", make=count_corrected, weights="inclusion", batches=CLUSTERED),
    Method(
        name="count-corrected, weights <= 30", make=count_corrected, weights="inclusion", cap=30, batches=("mined",)
    ),
    Method(name="count-corrected, weights <= 5", make=count_corrected, weights="inclusion", cap=5, batches=("mined",)),
    Method(name="SogCLR .9, weights", make=sogclr(0.9), weights="inclusion", run_in=3, batches=("mined",)),
    Method(
        name="SogCLR .2, weights",
        make=sogclr(0.2),
        weights="inclusion",
        run_in=10,
        batches=("mined",),
        batch_sizes=SLOW,
    ),
    Method(
        name="SogCLR .2, weights <= 30",
        make=sogclr(0.2),
        weights="inclusion",
        cap=30,
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
    Method(
        name="cluster centres",
        make=centres,
        run_in=1,
        batches=(*CLUSTERED, "random clusters"),
        directions=("one_way",),
    ),
)


def make_plan(batches: str, sides: tuple[np.ndarray, np.ndarray], batch_size: int) -> BatchPlan:
    """The batches by name; clusters of 32, or of half a batch where that is less."""
    num_rows, size = len(sides[0]), min(32, batch_size // 2)
    if batches == "random":
        return BatchPlan.random(num_rows, batch_size)
    if batches == "random clusters":
        cluster = np.full(num_rows, -1, np.int32)
        placed = np.random.default_rng(0).permutation(num_rows)[: num_rows // size * size]
        cluster[placed] = np.arange(len(placed)) // size
        return BatchPlan(
            num_rows=num_rows, batch_size=batch_size, cluster_size=size, cluster=cluster, seed=0, data_digest=""
        )
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
    parser.add_argument("--probes", type=int, default=2_000, help="anchors measured")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=2, help="measured epochs in each of two halves")
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
    pairs = FrozenPairs.prepare(
        *sides, temperature=options.temperature, direction=options.direction, num_probes=options.probes
    )
    print(f"exact gradient of {options.probes} anchors: {time.perf_counter() - begun:.0f} s", flush=True)
    common = {
        "rows": len(pairs),
        "temperature": options.temperature,
        "probes": len(pairs.probes),
        "epochs": options.epochs,
        "direction": options.direction,
    }
    done = {key_of(line) for line in read_lines(options.out)}

    def record(line: dict[str, Any]) -> None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**common, **line}) + "\n")

    if not any(
        line["batches"] == "curve" for line in read_lines(options.out) if key_of(line)[:5] == tuple(common.values())
    ):
        for size, error in infonce_curve(pairs).items():
            record({"method": "InfoNCE", "batches": "curve", "batch_size": size, **asdict(error)})
    for batch_size in options.batch_sizes:
        plans: dict[str, BatchPlan] = {}
        for method in (method for method in METHODS if options.direction in method.directions):
            for batches in method.batches if batch_size in method.batch_sizes else ():
                key = (*common.values(), method.name, batches, batch_size)
                if key in done:
                    continue
                if batches not in plans:
                    plans[batches] = make_plan(batches, sides, batch_size)
                plan, begun = plans[batches], time.perf_counter()
                setting = Setting(
                    num_rows=len(pairs),
                    dimensions=sides[0].shape[1],
                    temperature=options.temperature,
                    direction=options.direction,
                    plan=plan,
                )
                ids = np.arange(len(pairs))
                error = gradient_error(
                    pairs,
                    method.make(setting),
                    plan=plan,
                    table=RowTable(ids, ids, plan=plan, weights=method.weights, weight_cap=method.cap),
                    run_in=method.run_in,
                    epochs=options.epochs,
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
                    f"B={batch_size} {batches}: {method.name}: bias {error.bias:.3f} rmse {error.rmse:.3f} "
                    f"({seconds:.0f} s)",
                    flush=True,
                )
    write_table(options.out, tuple(common.values()))


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a line; those of before there were directions are one-way."""
    names = ("rows", "temperature", "probes", "epochs", "direction", "method", "batches", "batch_size")
    return tuple({"direction": "one_way", **line}[name] for name in names)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_table(results: Path, common: tuple[Any, ...]) -> None:
    """The lines of one setting as tables, one a batch size, with the aim's answer first."""
    lines = [line for line in read_lines(results) if key_of(line)[:5] == common]
    curves = {name: {line["batch_size"]: line[name] for line in lines if line["batches"] == "curve"} for name in ERRORS}
    measured = sorted(
        (line for line in lines if line["batches"] != "curve"),
        key=lambda line: (line["batch_size"], -line["shared_cosine"]),
    )
    by_rmse = sorted(measured, key=lambda line: line["rmse"])
    at_aim = [line for line in by_rmse if line["batch_size"] == AIM[0]]
    reached = [line for line in at_aim if effective_batch_size(line["rmse"], curves["rmse"]) >= AIM[1]]
    rows, temperature, probes, epochs, direction = common
    both = direction == "both"
    alone = "" if both else ", and only the anchors' gradient is compared"
    option, measured_in = (" --direction both", "anchors and positives, both directions") if both else ("", "anchors")
    names = "; ".join(f"{x['method']} ({x['batches']}) {_size(x['rmse'], curves['rmse'])}" for x in reached)
    missed = [x for x in at_aim if x not in reached and x["batches"] != "random"]
    best = "; ".join(f"{x['method']} ({x['batches']}) {_size(x['rmse'], curves['rmse'])}" for x in missed[:3])
    shared = "; ".join(
        f"{x['method']} ({x['batches']}) {x['shared_cosine']:.2f} ± {x['shared_cosine_se']:.2f}"
        for x in [*reached, *sorted(at_aim, key=lambda line: -line["shared_cosine"])[:3]]
    )
    parts = [
        f"# Distance to the full-data gradient\n\n`python -m benchmarks.global_loss --data FOLDER{option}` on the "
        f"first {rows:,} pairs of arxiv-title-abstract, embedded by all-MiniLM-L6-v2 (384 dimensions, standing still), "
        f"which is also the teacher of the mined batches. Temperature {temperature:g}; {probes:,} anchors, "
        f"{2 * epochs} batches each, in two independent halves. Machine: 2-core x86 CPU, one thread.\n\n"
        "All errors are relative to the exact gradient's root mean square, with respect to the embeddings of the "
        f"{measured_in} (`anybatch.insight.gradient_error`); ± is one standard error over anchors. Effective: the "
        "random InfoNCE batch with the same error, by RMSE / bias / RMSE after the best common factor; the factor is "
        f"in the column before. The largest size on the curve is {max(curves['rmse']):,}.\n\n"
        f"**The aim**, RMSE at a mined batch of {AIM[0]} no larger than that of random InfoNCE at {AIM[1]:,}: "
        + (f"reached by {names}. " if reached else "not reached. ")
        + f"The best that miss it: {best}. Beside it, the shared cosines at {AIM[0]}: {shared}.\n\n"
        "Mined: clusters of 32 (half a batch where that is less), no ranks skipped, so that the hardest rows sit "
        "together; skip 30 keeps the thirty nearest apart as probable false negatives, though they weigh most in the "
        "exact gradient; the weak teacher sees sixteen random directions of the embeddings. Cross-batch: the last "
        "1,024 or 4,096 pairs remembered, which is easy while they stand still (what is left is the noise of the mean "
        "that would take a drift away); what it does in training is in [another table](global_training.md). Cluster "
        "centres: the experiment in `benchmarks/cluster_centres.py`, the batch exactly and all other clusters by "
        f"their mean embedding. All embeddings stand still, so no memory is ever stale here{alone}. In training that "
        "experiment fails: [shared direction and training](shared_direction.md).\n\n## Random InfoNCE, the measure\n\n",
        markdown_table(
            ["batch", "RMSE", "bias", "RMSE, scaled"],
            [[f"{size:,}", *(f"{curves[name][size]:.3f}" for name in ERRORS)] for size in sorted(curves["rmse"])],
        ),
    ]
    header = [
        "method",
        "batches",
        "shared cosine",
        "shared bias",
        "RMSE",
        "bias",
        "RMSE, scaled",
        "factor",
        "effective: RMSE / bias / scaled",
    ]
    for size in sorted({line["batch_size"] for line in measured}):
        body = [
            [
                line["method"],
                line["batches"],
                *(f"{line[name]:.2f} ± {line[name + '_se']:.2f}" for name in ("shared_cosine", "shared_bias")),
                *(f"{line[name]:.3f} ± {line[name + '_se']:.3f}" for name in ERRORS),
                f"{line['scale']:.2f}",
                " / ".join(_size(line[name], curves[name]) for name in ERRORS),
            ]
            for line in measured
            if line["batch_size"] == size
        ]
        parts.append(f"\n## Batches of {size}, best first\n\n" + markdown_table(header, body))
    results.with_suffix(".md").write_text("".join(parts), encoding="utf-8")


def _size(error: float, curve: dict[int, float]) -> str:
    size = effective_batch_size(error, curve)
    if math.isinf(size):
        return f"> {max(curve):,}"
    return f"{size:,.0f}" if size else f"< {min(curve)}"


if __name__ == "__main__":
    main()
