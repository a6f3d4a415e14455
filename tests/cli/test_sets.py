"""Several data sets in one run: mined apart, one plan, instructions of their own."""

from __future__ import annotations

import json

import yaml

from anybatch.plans.plan import BatchPlan
from tests.cli.test_cli import run
from tests.conftest import sentence


def write(path, numbers):
    rows = [{"anchor": sentence(n, 5), "positive": sentence(n + 3, 9)} for n in numbers]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def test_a_folder_is_mined_into_one_plan(tiny_model_folder, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    write(folder / "first.jsonl", range(21))
    write(folder / "second.jsonl", range(100, 130))
    chosen = ["mining.cluster_size=4", "mining.window=[1, 6]", "data.limit=25", "model.device=cpu"]
    run(
        *("mine", "--data", str(folder), "--teacher", str(tiny_model_folder), "--output", str(tmp_path / "run")),
        *("--batch-size", "8"),
        *(item for value in chosen for item in ("--set", value)),
    )
    plan = BatchPlan.load(tmp_path / "run" / "plan.safetensors")
    assert plan.task_names == ("first", "second")
    assert [int((plan.task == number).sum()) for number in (0, 1)] == [21, 25]
    assert set(json.loads((tmp_path / "run" / "mining.json").read_text())["sets"]) == {"first", "second"}


def test_sets_train_with_their_own_instructions(tiny_model_folder, tmp_path):
    write(tmp_path / "a.jsonl", range(16))
    write(tmp_path / "b.jsonl", range(50, 74))
    config = {
        "output": str(tmp_path / "run"),
        "data": {
            "sets": [
                {"path": str(tmp_path / "a.jsonl"), "name": "alpha", "anchor_prompt": "find: "},
                {"path": str(tmp_path / "b.jsonl"), "window": [2, 6]},
            ]
        },
        "model": {"name": str(tiny_model_folder), "device": "cpu"},
        "teacher": {"name": str(tiny_model_folder)},
        "batch_size": 8,
        "mining": {"method": "anybatch", "cluster_size": 4, "window": [1, 6]},
        "loss": {"name": "count_corrected", "mask_suspects": True},
        "train": {"epochs": 2, "args": {"logging_steps": 1}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run("train", "--config", str(tmp_path / "run.yaml"))
    plan = BatchPlan.load(tmp_path / "run" / "plan.safetensors")
    assert plan.task_names == ("alpha", "b")
    assert plan.num_batches == (4 + 6) // 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_steps"] == 2 * plan.num_batches
