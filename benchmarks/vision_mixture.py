"""A mixture of six tasks in MMEB's layout, a tiny vision-language model: B3's batches beside random ones, by hit@1.

    python -m benchmarks.vision_mixture FOLDER [--seeds 3] [--output docs/benchmarks/vision_mixture.md]

Resumable: each run keeps its folder. Every arm sees the same rows as often, from the same untrained model; the teacher
is that model, trained on random batches of other drawings. Rates are tuned for each arm on seeds of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from anybatch.integrations.sentence_transformers.model import ModelConfig
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig
from anybatch.run import job
from anybatch.run.config import DataConfig, EvaluationConfig, RunConfig, TeacherConfig

BATCH, EPOCHS, ROWS, RATES = 32, 4, 192, (1e-3, 2e-3)
ARMS = {
    "random, all tasks mixed": MiningConfig(method="random", mixing="mixed"),
    "random, within a task": MiningConfig(method="random", mixing="within"),
    "B3 as published, clusters of 8": MiningConfig(method="published", cluster_size=8, mixing="within"),
    "anybatch's mining, within a task": MiningConfig(method="anybatch", mixing="within"),
}


def train(
    folder: Path, name: str, data: str, seed: int, rate: float, mining: MiningConfig, teacher: str | None
) -> float:
    """hit@1, the mean of the tasks, of one run, which is made if its folder holds none."""
    output = folder / "runs" / f"{name}-{seed}-{rate:g}".replace(" ", "_").replace("'", "")
    config = RunConfig(
        output=str(output),
        data=DataConfig(path=str(folder / data / "train"), images=str(folder / data / "images"), negatives=()),
        model=ModelConfig(name=str(folder / "model"), device="cpu"),
        batch_size=BATCH,
        seed=seed,
        teacher=TeacherConfig(name=teacher),
        mining=mining,
        loss=LossConfig(name="infonce", temperature=0.05, weights="none", mask_suspects=False),
        train=TrainConfig(epochs=EPOCHS, learning_rate=rate, save_steps=10_000, mini_batch_size=BATCH),
        evaluation=EvaluationConfig(path=str(folder / data / "eval")),
    )
    return job.train(config, resume=output.exists()).metrics["hit@1"]


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder

    # 1. Drawings to train on and to evaluate, other drawings for the teacher, the untrained model.
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from mmeb_b3 import make_model
    from synthetic_mmeb import write_mmeb

    for name, seed in (("tasks", 0), ("others", 1)):
        if not (folder / name).exists():
            write_mmeb(folder / name, ROWS, seed)
    if not (folder / "model").exists():
        make_model(folder)

    # 2. The teacher, then the arms: a rate each, chosen on a seed that is not counted.
    mixed = ARMS["random, all tasks mixed"]
    taught = train(folder, "teacher", "others", 100, RATES[1], mixed, None)
    teacher = str(next((folder / "runs").glob("teacher-*")) / "model")
    lines = []
    for name, mining in ARMS.items():
        needs = None if mining.method == "random" else teacher
        tuned = {rate: train(folder, name, "tasks", 99, rate, mining, needs) for rate in RATES}
        rate = max(tuned, key=lambda rate: tuned[rate])
        hits = [train(folder, name, "tasks", seed, rate, mining, needs) for seed in range(arguments.seeds)]
        error = np.std(hits, ddof=1) / np.sqrt(len(hits)) if len(hits) > 1 else float("nan")
        lines.append(f"| {name} | {rate:g} | {np.mean(hits):.3f} | {error:.3f} |")
        print(lines[-1], flush=True)

    # 3. The page.
    text = [
        "# A mixture in MMEB's layout",
        "",
        f"`python -m benchmarks.vision_mixture`: six drawn tasks of {ROWS} rows, {ROWS // 3} queries each to evaluate",
        f"with candidates of their own, a LLaVA of two layers from scratch, batches of {BATCH}, {EPOCHS} epochs,",
        f"InfoNCE, {arguments.seeds} seeds, rates tuned for each arm on a seed of its own. Steps are equal. The",
        f"teacher's hit@1 is {taught:.3f}.",
        "",
        "| batches | rate | hit@1, mean of the tasks | standard error |",
        "|---|---|---|---|",
        *lines,
    ]
    if arguments.output is not None:
        arguments.output.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
