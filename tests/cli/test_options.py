"""Flags for what everybody sets, texts as they are written, and a run from two names alone."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from typer.testing import CliRunner

from anybatch import __version__
from anybatch.cli.app import app
from anybatch.core.errors import AnybatchError
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import read_config
from anybatch.run.settings import settings_of
from tests.cli.test_cli import run, settings
from tests.conftest import sentence

runner = CliRunner()


def shown(*arguments: str, key: str):
    """A value of the configuration that `train` would take."""
    result = runner.invoke(app, ["train", "--show-config", "--data", "pairs.csv", *arguments])
    if result.exception is not None:
        raise result.exception
    value = yaml.safe_load(result.stdout)
    for name in key.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize(
    ("flag", "written", "key", "value"),
    [
        ("--epochs", "3", "train.epochs", 3),
        ("--learning-rate", "1e-4", "train.learning_rate", 1e-4),
        ("--loss", "sogclr", "loss.name", "sogclr"),
        ("--eval", "held out: 1.csv", "evaluation.path", "held out: 1.csv"),
        ("--limit", "500", "data.limit", 500),
        ("--seed", "0", "seed", 0),
        ("--device", "cpu", "model.device", "cpu"),
        ("--model", "1.0", "model.name", "1.0"),
    ],
)
def test_flags_are_settings_and_win(flag, written, key, value):
    assert shown(flag, written, key=key) == value
    assert shown("--set", f"{key}=7", flag, written, key=key) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("model.anchor_prompt=query: ", "query: "),
        ("model.anchor_prompt= a = b: c ", " a = b: c "),
        ("model.anchor_prompt=yes", "yes"),
        ("model.anchor_prompt=1.0", "1.0"),
        ("model.anchor_prompt=[INST] ", "[INST] "),
        ("model.anchor_prompt={x", "{x"),
        ("model.anchor_prompt=#1", "#1"),
        ("model.anchor_prompt=", ""),
        ("model.anchor_prompt=null", None),
        ("model.anchor_prompt='null'", "null"),
        ('model.anchor_prompt="query:\\n"', "query:\n"),
        ('model.anchor_prompt="a" and "b"', '"a" and "b"'),
        ("output=2024", "2024"),
        ("data.anchor=yes", "yes"),
        ("data.anchor=[yes it is, photo]", ["yes it is", "photo"]),
        ("data.negatives=no", ["no"]),
        ("data.negatives=[]", []),
        ("train.memory=1000", 1000),
        ("train.mini_batch_size=auto", "auto"),
        ("model.kwargs.trust=yes", True),
    ],
)
def test_texts_are_taken_as_they_are_written(written, value):
    assert shown("--set", written, key=written.partition("=")[0]) == value


def test_version_and_help():
    assert runner.invoke(app, ["--version"]).stdout == f"anybatch {__version__}\n"
    verbs = ["demo", "recommend", "mine", "train", "evaluate", "doctor", "config", "inspect"]
    assert all(verb in runner.invoke(app, ["-h"]).stdout for verb in verbs)
    for verb in [[verb] for verb in verbs] + [["inspect", "plan"], ["inspect", "gradient"]]:
        short, long = (runner.invoke(app, [*verb, option]) for option in ("-h", "--help"))
        assert short.exit_code == long.exit_code == 0
        assert short.stdout == long.stdout
        assert "Usage:" in short.stdout


def test_help_takes_less_than_a_second_of_the_processor():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "anybatch", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_shell_completes():
    asked = {"_ANYBATCH_COMPLETE": "complete_bash", "COMP_WORDS": "anybatch train --learn", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "anybatch"], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["--learning-rate"]


def test_config_prints_every_setting():
    printed = runner.invoke(app, ["config"]).stdout
    lines = [line for line in printed.splitlines() if line.startswith("* `")]
    assert [line.split("`")[1] for line in lines] == [setting.key for setting in settings_of()]
    part = runner.invoke(app, ["config", "train"]).stdout
    assert "* `train.learning_rate` (a finite number above 0; default 5e-05): Peak learning rate" in part
    assert "loss." not in part.replace("loss.name", "")
    with pytest.raises(AnybatchError, match="No setting has 'trian'"):
        run("config", "trian")


@pytest.fixture
def csv(tmp_path, monkeypatch):
    """300 pairs, in the folder in which one works."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my pairs.v1.csv"
    rows = [f"{sentence(n, 3)} {n},{sentence(n + 5, 6)} {n}" for n in range(300)]
    path.write_text("\n".join(["query,answer", *rows]) + "\n")
    return path


def test_who_asks_for_mining_gets_it(csv, tiny_model_folder, tmp_path, caplog):
    """And the recipe of the model that is to be trained, which `train --resume` goes on with."""
    caplog.set_level("INFO", logger="anybatch")
    words = StaticEmbedding(SentenceTransformer(str(tiny_model_folder), device="cpu").tokenizer, embedding_dim=4)
    SentenceTransformer(modules=[words], device="cpu").save(str(tmp_path / "words"))
    teacher = ("--teacher", str(tiny_model_folder), "--batch-size", "32")
    for model, name, weights in ((tiny_model_folder, "infonce", "none"), ("words", "count_corrected", "inclusion")):
        folder = tmp_path / f"mined-{name}"
        run("mine", "--data", csv.name, "--model", str(model), *teacher, "--output", str(folder))
        kept = read_config(folder)
        assert (kept.mining.method, kept.loss.name, kept.loss.weights) == ("anybatch", name, weights)
    assert "if all their figures are good" not in caplog.text


def test_a_run_from_two_names_alone(csv, tiny_model_folder, tmp_path, heard, caplog):
    caplog.set_level("INFO", logger="anybatch")
    run("train", "--data", csv.name, "--model", str(tiny_model_folder))
    folder = tmp_path / "runs" / "my-pairs"
    assert "Everything goes into runs/my-pairs." in caplog.text
    assert BatchPlan.load(folder / "plan.safetensors").num_rows == 250
    kept = json.loads((folder / "metrics.json").read_text())
    assert 0 < kept["metrics"]["ndcg@10"] <= 1
    assert kept["metrics_untrained"].keys() == kept["metrics"].keys()
    # The next goes elsewhere, and what was held out of the first is held out again where it goes on or is looked at.
    run("mine", "--data", csv.name, "--batch-size", "32")
    assert BatchPlan.load(tmp_path / "runs" / "my-pairs-2" / "plan.safetensors").num_rows == 300
    assert "Everything goes into runs/my-pairs-2." in heard()
    (folder / "metrics.json").unlink()
    for verb in ("train", "mine"):
        with pytest.raises(AnybatchError, match=r"--resume needs --output.* here: runs/my-pairs, runs/my-pairs-2\.$"):
            run(verb, "--resume")
    run("train", "--resume", "--set", f"output={folder}")
    again = json.loads((folder / "metrics.json").read_text())
    assert again["metrics"] == kept["metrics"]
    run("inspect", "plan", str(folder))
    assert "Texts: " not in heard()


def test_the_folder_is_named_once_the_data_were_found(csv, tiny_model_folder, tmp_path, heard, caplog):
    caplog.set_level("INFO", logger="anybatch")
    for verb in ("train", "mine"):
        with pytest.raises(AnybatchError, match=r"There is no file trian\.csv"):
            run(verb, "--data", "trian.csv", "--model", str(tiny_model_folder))
    (tmp_path / "a.yaml").write_text(f"data: {{path: {csv.name}}}\n")
    run("train", "--config", "a.yaml", "--show-config")
    assert "goes into" not in heard() + caplog.text
    with pytest.raises(AnybatchError, match=r"--resume needs --output FOLDER, the folder of the run to go on with\.$"):
        run("train", "--resume", "--config", "a.yaml")


def test_a_given_plan_says_what_is_held_out(csv, tiny_model_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="anybatch")
    few = [
        "--data",
        csv.name,
        "--model",
        str(tiny_model_folder),
        "--batch-size",
        "32",
        "--set",
        "train.args.max_steps=1",
    ]
    run("mine", *few, "--output", "mined")
    run("train", *few, "--plan", "mined/plan.safetensors", "--output", "all")
    assert "Nothing is held out for evaluation: the plan is of all pairs." in caplog.text
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())["metrics"] == {}
    run("train", "--resume", "--output", "mined")  # the same, of the folder's own plan
    assert json.loads((tmp_path / "mined" / "metrics.json").read_text())["metrics"] == {}
    run("train", *few, "--output", "part")
    assert "Held out for evaluation: 50 of 300 pairs" in caplog.text
    run("train", *few, "--plan", "part/plan.safetensors", "--output", "again")
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("again", "part"))
    assert ours["metrics"] == theirs["metrics"] != {}


def test_nothing_is_held_out(csv, pairs_file, tiny_model_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="anybatch")
    more = ["--model", str(tiny_model_folder), "--batch-size", "32", "--set", "train.args.max_steps=1"]
    run("train", "--data", csv.name, *more, "--output", "off", "--set", "evaluation.path=null")
    assert "held out" not in caplog.text
    run("train", "--data", str(pairs_file), *more, "--output", "few")
    assert "Nothing is held out for evaluation: there are 97 pairs, it takes 250" in caplog.text
    with pytest.raises(AnybatchError, match="nothing is held out to evaluate on"):
        run("train", "--data", str(pairs_file), *more, "--output", "steps", "--set", "train.eval_steps=1")
    assert not (tmp_path / "steps").exists()


def test_several_processes_need_a_folder(pairs_file, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = settings(pairs_file, tiny_model_folder, tmp_path / "run")
    place = given.index("--output")
    with pytest.raises(AnybatchError, match="Missing configuration value: output"):
        run("train", *given[:place], *given[place + 2 :])
