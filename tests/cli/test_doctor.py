"""The doctor says yes to a sound run, and names what is wrong with the others."""

from __future__ import annotations

import json
import random

import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from typer.testing import CliRunner

from anybatch.cli import progress
from anybatch.cli.app import app
from anybatch.core.errors import AnybatchError

runner = CliRunner()


def doctor(*arguments: str):
    result = runner.invoke(app, ["doctor", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def run(pairs_file, tiny_model_folder):
    return ["--data", str(pairs_file), "--model", str(tiny_model_folder), "--set", "model.device=cpu"]


@pytest.mark.parametrize(
    "loss",
    [(), ("loss.name=sogclr", "loss.gamma=0.6"), ("loss.learnable_temperature=true",), ("train.mini_batch_size=auto",)],
)
def test_a_sound_run_is_exact(run, loss):
    code, output = doctor(*run, *(item for value in loss for item in ("--set", value)))
    assert code == 0, output
    assert "Exact:" in output
    assert "attention" in output  # parameters by name
    assert "more, at most" in output
    assert "more, at most" not in doctor(*run, "--all")[1]


def test_a_recipe_that_waits_for_the_plan(run, tiny_model_folder):
    code, output = doctor(*run, "--teacher", str(tiny_model_folder))
    assert (code, "Exact:" in output) == (0, True), output


def test_names_of_parameters_are_whole(run, monkeypatch):
    narrow = Console(width=40, record=True, force_terminal=False, stderr=True)
    monkeypatch.setattr(progress, "console", narrow)
    assert doctor(*run, "--all")[0] == 0
    said = narrow.export_text()
    assert "…" not in said
    for layer in range(2):
        assert f"model.encoder.layer.{layer}.attention.output.LayerNorm.weight " in said


def test_half_precision_has_its_own_tolerance(run):
    code, output = doctor(*run, "--set", "train.args.bf16=true")
    assert code == 0, output
    assert "tolerance 1e-01" in output


def test_batch_norm_is_named(run, tiny_model_folder, tmp_path):
    """As a run finds it: in the model folder."""
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")
    model.append(Dense(32, 8))
    model[2].activation_function = torch.nn.BatchNorm1d(8)
    code, output = doctor_of(model, run)
    assert code == 1
    assert "BatchNorm1d" in output
    assert "NOT exact" in output


@pytest.mark.parametrize("source", [random, random.SystemRandom()])
def test_random_numbers_that_cannot_be_drawn_again_are_named(run, tiny_model_folder, source):
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")

    def noisy(module, inputs, output):
        output["sentence_embedding"] = output["sentence_embedding"] * (0.5 + source.random())
        return output

    model.register_forward_hook(noisy)
    code, output = doctor_of(model, run)
    assert code == (0 if source is random else 1)
    assert ("differs from its recording" in output) == (source is not random)


def doctor_of(model, run):
    """The verdict on a model that cannot be saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anybatch.insight.doctor.load_model", lambda config: model)
        return doctor(*run)


def test_a_configuration_file(run, pairs_file, tiny_model_folder, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "output": str(tmp_path / "out"),
                "data": {"path": str(pairs_file)},
                "model": {"name": str(tiny_model_folder), "device": "cpu"},
                "batch_size": 32,
            }
        )
    )
    assert doctor("--config", str(path))[0] == 0
    assert not (tmp_path / "out").exists()


def test_too_few_rows(run):
    with pytest.raises(AnybatchError, match="at least 8"):
        doctor(*run, "--rows", "4")
