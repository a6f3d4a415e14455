"""`anybatch train` under torchrun: two processes end where one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from anybatch.cli.app import app

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "anybatch"]


def launch(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCH, *arguments],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.distributed
def test_two_processes_equal_one(pairs_file, tiny_model_folder, tmp_path):
    """Without dropout, whose masks depend on how the rows are shared out. Six steps; the second run of two goes on
    after four.
    """
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    values = ["mining.method=random", "loss.name=sogclr", "loss.gamma=0.6", "loss.learnable_temperature=true"]
    values += ["train.args.max_steps=6", "train.save_steps=4", "train.args.logging_steps=1", "train.mini_batch_size=3"]
    values += ["train.learning_rate=1e-3", "model.device=cpu", f"evaluation.path={pairs_file}"]
    given = ["--data", str(pairs_file), "--model", str(model), "--batch-size", "8"]
    given += [item for value in values for item in ("--set", value)]
    one, two = tmp_path / "one", tmp_path / "two"
    assert CliRunner().invoke(app, ["train", *given, "--output", str(one)]).exception is None
    said = launch("train", *given, "--output", str(two))
    assert said.count("Use the model: ") == 1, "one of the ranks speaks"
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert figures[1]["num_steps"] == 6
    assert figures[1]["metrics_untrained"] == figures[0]["metrics_untrained"]
    assert figures[1]["metrics"]["ndcg@10"] == pytest.approx(figures[0]["metrics"]["ndcg@10"], abs=0.02)
    assert [line["loss"] for line in figures[1]["log"]] == pytest.approx(
        [line["loss"] for line in figures[0]["log"]], rel=1e-3
    )

    def same():
        ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (two, one))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=2e-5)

    same()
    of_two, of_one = (
        load_file(folder / "checkpoints" / "checkpoint-6" / "anybatch_loss.safetensors") for folder in (two, one)
    )
    for name, value in of_one.items():
        torch.testing.assert_close(of_two[name], value, rtol=1e-3, atol=1e-3, equal_nan=True)
    for path in (two / "metrics.json", two / "checkpoints" / "checkpoint-6" / "anybatch_loss.safetensors"):
        path.unlink()  # as if it had been killed while it wrote the last checkpoint
    shutil.rmtree(two / "model")
    launch("train", "--resume", "--output", str(two))
    same()
    assert len((two / "log.jsonl").read_text().splitlines()) == 6
