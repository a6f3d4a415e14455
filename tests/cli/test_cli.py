"""The command line end to end on a tiny real transformer, in its own process where exit codes and kills matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from anybatch.cli import progress
from anybatch.cli.app import app
from anybatch.core.errors import AnybatchError
from anybatch.core.yaml_files import load_config
from anybatch.run.config import RunConfig

runner = CliRunner()


def run(*arguments: str) -> None:
    """Run a verb in this process; the exception of a refused input comes through."""
    result = runner.invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception


def settings(pairs: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--data", str(pairs), "--model", str(model), "--output", str(output), "--batch-size", "8"),
        *(
            "--set",
            "train.save_steps=3",
            "--set",
            "train.args.logging_steps=1",
            "--set",
            "model.device=cpu",
            "--set",
            "train.mini_batch_size=3",
        ),
        *("--set", "train.epochs=2", "--set", "train.learning_rate=1e-3", "--set", f"evaluation.path={pairs}"),
        *(item for value in more for item in ("--set", value)),
    ]


METHODS = {
    "random infonce": ("mining.method=random",),
    "mined infonce": ("mining.cluster_size=4", "mining.window=[1, 6]"),
    "mined negatives": ("mining.cluster_size=4", "mining.window=[1, 6]", "mining.num_negatives=2"),
    "random sogclr": ("mining.method=random", "loss.name=sogclr", "loss.gamma=0.6", "loss.learnable_temperature=false"),
    "prefixes with memory": ("mining.method=random", "loss.name=sogclr", "loss.matryoshka=[32, 8]"),
    "mined sogclr weights": (
        "mining.cluster_size=4",
        "mining.window=[1, 6]",
        "loss.name=sogclr",
        "loss.weights=inclusion",
    ),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_train_then_evaluate(method, pairs_file, tiny_model_folder, tmp_path):
    out = tmp_path / "run"
    teacher = [] if "random" in method else ["--teacher", str(tiny_model_folder)]
    run("train", *settings(pairs_file, tiny_model_folder, out, *METHODS[method]), *teacher)
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "plan.safetensors", "log.jsonl", "metrics.json", "model"} <= names
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == sorted(line["step"] for line in log)
    assert all(np.isfinite(line["loss"]) for line in log if "loss" in line)
    run("evaluate", str(out / "model"), "--data", str(pairs_file), "--output", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    trained = json.loads((out / "metrics.json").read_text())["metrics"]
    assert figures["ndcg@10"] == pytest.approx(trained["ndcg@10"], abs=1e-6)


def test_evaluate_shows_progress(pairs_file, tiny_model_folder, heard):
    run("evaluate", str(tiny_model_folder), "--data", str(pairs_file))
    said = heard()
    assert "embedding: anchors: 97/97" in said
    assert "embedding: positives: 97/97" in said


def test_the_folder_is_named_whole(pairs_file, tiny_model_folder, tmp_path, monkeypatch):
    """Square brackets are no markup, and a long path is one line, to be copied."""
    folder = tmp_path / ("long" * 20) / "[bold]"
    heard = Console(width=80, record=True, force_terminal=False, stderr=True)
    monkeypatch.setattr(progress, "console", heard)
    for verb, model in (("mine", []), ("train", ["--model", str(tiny_model_folder)])):
        run(
            verb, "--data", str(pairs_file), *model, "--output", str(folder / verb), "--batch-size", "16",
            "--set", "mining.method=random", "--set", "train.args.max_steps=1",
        )  # fmt: skip
        assert f"{folder / verb}/" in heard.export_text()


def test_help_imports_nothing_of_the_library():
    """Torch and its like take seconds; who asks for help has not chosen a verb yet."""
    given = [sys.executable, "-X", "importtime", "-m", "anybatch", "--help"]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert "evaluate" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "anybatch.cli.evaluate" in imported
    assert not imported & {"torch", "numpy", "numba", "datasets", "transformers"}


def test_the_defaults_are_shown_without_any_other_option():
    shown = yaml.safe_load(runner.invoke(app, ["train", "--show-config"]).stdout)
    assert shown["output"] == "OUTPUT"
    assert shown["mining"]["batch_size"] == shown["batch_size"] == 64
    sets = runner.invoke(app, ["train", "--show-config", "--set", "data.sets=[{path: a}]", "--set", "seed=3"])
    shown = yaml.safe_load(sets.stdout)
    assert shown["data"]["sets"][0]["path"] == "a"
    assert shown["seed"] == 3


def test_a_short_run_leaves_a_line_in_its_log(pairs_file, tiny_model_folder, tmp_path):
    more = ("mining.method=random", "train.args.max_steps=2", "train.args.logging_steps=50")
    run("train", *settings(pairs_file, tiny_model_folder, tmp_path / "run", *more))
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2


def command(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "anybatch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, messages = process.communicate()
    assert process.returncode == 0, messages


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(pairs_file, tiny_model_folder, tmp_path):
    """Kill -9 in mid-epoch after a checkpoint; the memory of SogCLR, the optimiser, the dropout and the batches must
    all come back.
    """
    more = (
        "mining.cluster_size=4",
        "mining.window=[1, 6]",
        "loss.name=sogclr",
        "loss.gamma=0.6",
        "train.epochs=4",
    )
    teacher = ["--teacher", str(tiny_model_folder)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command("train", *settings(pairs_file, tiny_model_folder, whole, *more), *teacher))
    process = command("train", *settings(pairs_file, tiny_model_folder, killed, *more), *teacher)
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/checkpoint-*/anybatch_loss.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "metrics.json").exists(), "the run ended before it could be killed: make it longer"

    finish(command("train", "--resume", "--output", str(killed)))
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, killed)
    ]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert [line["loss"] for line in lines[0] if "loss" in line] == [
        line["loss"] for line in lines[1] if "loss" in line
    ]


@pytest.mark.slow
def test_disk_full_while_training(pairs_file, tiny_model_folder, tmp_path):
    """Files may not grow past 60 kB, as on a full disk: the first checkpoint fails, what was there stays, and the run
    resumes.
    """
    out = tmp_path / "run"
    arguments = settings(pairs_file, tiny_model_folder, out, "mining.method=random", "train.epochs=1")
    limit = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv[0] = 'anybatch'; "
    )
    process = subprocess.Popen(
        [sys.executable, "-c", limit + "from anybatch.cli import main; main()", "train", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    _, messages = process.communicate()
    assert process.returncode == 2, messages
    assert "go on with --resume" in messages
    assert "Traceback" not in messages
    plan = (out / "plan.safetensors").read_bytes()
    run("train", "--resume", "--output", str(out))
    assert (out / "plan.safetensors").read_bytes() == plan
    assert (out / "metrics.json").exists()


def test_figures_of_a_run(pairs_file, tiny_model_folder, tmp_path, monkeypatch):
    """Five steps, logged every fourth; two evaluations while training, and one before and one after it."""
    from anybatch.run import job

    def slow(*arguments, **settings):
        time.sleep(0.5)
        return {"ndcg@10": 0.5}

    monkeypatch.setattr(job, "evaluate_model", slow)
    more = ("mining.method=random", "train.args.max_steps=5", "train.args.logging_steps=4", "train.eval_steps=2")
    started = time.monotonic()
    run("train", *settings(pairs_file, tiny_model_folder, tmp_path / "run", *more))
    seconds = time.monotonic() - started
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert figures["num_steps"] == 5
    assert figures["train_seconds"] < seconds - 2.0


def test_resume_after_the_end_only_reads(pairs_file, tiny_model_folder, tmp_path):
    out = tmp_path / "run"
    run("train", *settings(pairs_file, tiny_model_folder, out, "mining.method=random", "train.epochs=1"))
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    run("train", "--resume", "--output", str(out))
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_explicit_negatives(pairs_file, tiny_model_folder, tmp_path):
    """A negative column reaches the loss, one that is the positive's own text is no negative, and rows may lack one."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    losses = []
    for name, offset, every in (("own", 0, 1), ("other", 5, 1), ("some", 5, 3)):
        path = tmp_path / f"{name}.jsonl"
        wrong = [rows[(n + offset) % 97]["positive"] if n % every == 0 else None for n in range(len(rows))]
        path.write_text(
            "".join(json.dumps({**row, "wrong": text}) + "\n" for row, text in zip(rows, wrong, strict=True))
        )
        more = ("mining.method=random", "train.args.max_steps=1", "train.args.warmup_steps=0")
        run("train", *settings(path, tiny_model_folder, tmp_path / name, *more), "--negative", "wrong")
        losses.append(json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["num_negatives"])
    assert losses[1] > losses[0] >= 7
    assert losses[1] > losses[2] > 7


def test_mine_from_a_file_without_a_model_and_with_the_plan_of_another_folder(pairs_file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{path: {pairs_file}}}\nbatch_size: 8\nmining: {{method: random}}\n")
    run("mine", "--config", str(config), "--output", str(tmp_path / "one"))
    written = load_config(RunConfig, tmp_path / "one" / "config.yaml")
    assert written.model.name is None
    assert written.mining.batch_size == 8, "what is written is what was used"
    plan = tmp_path / "one" / "plan.safetensors"
    run("mine", "--config", str(config), "--output", str(tmp_path / "two"), "--set", f"plan={plan}")
    assert (tmp_path / "two" / "plan.safetensors").read_bytes() == plan.read_bytes(), "the file that was announced"


class TestMistakes:
    """Each is refused with a message that says what to do, and leaves nothing behind."""

    @pytest.fixture
    def out(self, tmp_path):
        return tmp_path / "out"

    def refuse(self, match, *arguments):
        with pytest.raises(AnybatchError, match=match):
            run(*arguments)

    def test_exit_code(self, tmp_path, tiny_model_folder):
        process = command("train", *settings(tmp_path / "absent.jsonl", tiny_model_folder, tmp_path / "out"))
        _, message = process.communicate()
        assert process.returncode == 2
        assert "absent.jsonl" in message
        assert "Traceback" not in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("match", "more"),
        [
            ("empty.jsonl.* empty", "--data {tmp}/empty.jsonl"),
            ("positive", "--positive positve"),
            ("Row 2 of .*blank.jsonl", "--data {tmp}/blank.jsonl"),
            ("97 rows, fewer than one batch of 128", "--batch-size 128"),
            ("needs a teacher", "--set mining.method=anybatch --set mining.cluster_size=4"),
            (r"model\.name", "--set model.name=null"),
            ("Cannot load the model", "--model {tmp}/no-model"),
            ("did you mean 'temperature'", "--set loss.temprature=0.1"),
            ("set batch_size alone", "--set mining.batch_size=16"),
            (r"evaluation\.split is for", "--set evaluation.split=test"),
            (r"teacher\.embeddings is .*two texts", "--set teacher.embeddings=[a.npy]"),
            ("does not define", "--set loss.name=infonce --set loss.weights=inclusion"),
        ],
    )
    def test_nothing_is_written(self, match, more, pairs_file, tiny_model_folder, tmp_path, out):
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "blank.jsonl").write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "a", "positive": " "}\n')
        given = settings(pairs_file, tiny_model_folder, out, "mining.method=random")
        if "model.name" in more:
            given = [value for value in given if value not in ("--model", str(tiny_model_folder))]
        self.refuse(match, "train", *given, *more.format(tmp=tmp_path).split())
        assert not out.exists()

    @pytest.mark.parametrize("flaw", ["nan", "inf", "zero", "rows", "shape", "not numpy"])
    def test_bad_teacher_embeddings(self, flaw, pairs_file, tiny_model_folder, tmp_path, out):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(97 - (flaw == "rows"), 8)).astype(np.float32)
        if flaw in ("nan", "inf", "zero"):
            rows[13] = {"nan": np.nan, "inf": np.inf, "zero": 0.0}[flaw]
        if flaw == "shape":
            rows = rows.reshape(-1)
        path = tmp_path / "vectors.npy"
        np.save(path, rows)
        if flaw == "not numpy":
            path.write_text("no array")
        match = {"nan": "13", "inf": "13", "zero": "13", "rows": "97", "shape": "shape", "not numpy": "Cannot read"}[
            flaw
        ]
        vectors = (f"teacher.embeddings=[{path}, {path}]", "mining.cluster_size=4")
        self.refuse(match, "mine", *settings(pairs_file, tiny_model_folder, out, *vectors))
        assert not (out / "plan.safetensors").exists()

    def test_plan_of_other_data_and_truncated_plan(self, pairs_file, tiny_model_folder, tmp_path, out):
        run("mine", *settings(pairs_file, tiny_model_folder, tmp_path / "mined", "mining.method=random"))
        plan = tmp_path / "mined" / "plan.safetensors"
        other = tmp_path / "other.jsonl"
        other.write_text(pairs_file.read_text().replace("mata", "mato"))
        self.refuse("other data|another data", "train", *settings(other, tiny_model_folder, out), "--plan", str(plan))
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(plan.read_bytes()[:-40])
        self.refuse(
            "cut.safetensors", "train", *settings(pairs_file, tiny_model_folder, tmp_path / "out2"), "--plan", str(cut)
        )

    def test_evaluate_refuses_what_it_would_ignore(self, pairs_file, tiny_model_folder, tmp_path):
        model = str(tiny_model_folder)
        given = ("evaluate", model, "--data", str(pairs_file))
        for option in ("--split", "--positive", "--images"):
            self.refuse(f"Got {option} and --labelled", *given, "--labelled", str(pairs_file), option, "x")
        self.refuse(r"Got --split and --data \(pairs\)", *given, "--split", "x")
        output = tmp_path / "nowhere" / "figures.json"
        self.refuse("There is no folder", "evaluate", "no-model", "--data", str(pairs_file), "--output", str(output))

    def test_another_plan_on_resume(self, pairs_file, tiny_model_folder, tmp_path, out):
        """The plan lies outside the run's folder and is made anew, with another seed, between the run and its
        resumption.
        """
        from anybatch.plans.plan import BatchPlan

        run("mine", *settings(pairs_file, tiny_model_folder, tmp_path / "mined", "mining.method=random"))
        path = tmp_path / "mined" / "plan.safetensors"
        first = BatchPlan.load(path)
        run("train", *settings(pairs_file, tiny_model_folder, out, "train.args.max_steps=3"), "--plan", str(path))
        assert BatchPlan.load(out / "plan.safetensors").digest == first.digest
        (out / "metrics.json").unlink()  # as if the run had been cut short
        BatchPlan.random(first.num_rows, first.batch_size, seed=5, data_digest=first.data_digest).save(path)
        self.refuse("another plan than the one this run was started with", "train", "--resume", "--output", str(out))
        first.save(path)
        run("train", "--resume", "--output", str(out))

    def test_folder_that_holds_a_run(self, pairs_file, tiny_model_folder, out):
        run("mine", *settings(pairs_file, tiny_model_folder, out, "mining.method=random"))
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        self.refuse(
            "already holds a run", "mine", *settings(pairs_file, tiny_model_folder, out, "mining.method=random")
        )
        self.refuse(
            "another configuration.*loss.temperature.*, or choose another output folder.$",  # there is no model yet
            "train",
            "--resume",
            *settings(pairs_file, tiny_model_folder, out, "mining.method=random", "loss.temperature=0.3"),
        )
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        (out / "model").mkdir()
        further = "another configuration.*train.epochs.*start a new run from it: --model .*/model"
        self.refuse(further, "train", "--resume", "--output", str(out), "--epochs", "7")

    def test_folder_with_other_things(self, pairs_file, tiny_model_folder, out):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        self.refuse("not empty", "train", *settings(pairs_file, tiny_model_folder, out, "mining.method=random"))
        assert os.listdir(out) == ["thesis.txt"]
