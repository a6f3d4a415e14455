"""`train.args`: what goes to the Trainer, what a run decides itself, the best model and an early end."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import CachedLoss, TrainConfig, train_model
from anybatch.integrations.sentence_transformers.arguments import (
    DECIDED,
    check_arguments,
    check_best,
    training_arguments,
)
from anybatch.losses import SogCLR
from tests.integrations.test_training import DATA, PLAN, ROWS


def made(**args):
    return training_arguments(TrainConfig(args=args), "unused", on_cpu=True)


def test_what_is_given_reaches_the_trainer_over_our_defaults():
    ours = made()
    assert (ours.warmup_steps, ours.lr_scheduler_type, ours.logging_steps, ours.max_steps) == (0.1, "linear", 10, -1)
    given = made(warmup_steps=5, lr_scheduler_type="cosine", max_grad_norm="5e-1", weight_decay=1, bf16=True)
    assert (given.warmup_steps, given.lr_scheduler_type, given.max_grad_norm, given.bf16) == (5, "cosine", 0.5, True)
    assert given.weight_decay == 1.0
    assert made(warmup_ratio=0.3).warmup_steps == 0.3


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"max_step": 3}, r"Unknown configuration key 'train\.args\.max_step': did you mean 'max_steps'"),
        ({"early_stoping_patience": 3}, "did you mean 'early_stopping_patience'"),
        ({"gradient_accumulation_steps": 4}, r"decided by the run\. Set batch_size: .*exact gradient"),
        ({"fp16": True}, r"train\.args\.fp16 .*bf16=true"),
        ({"output_dir": "x"}, r"Set output \(--output\)"),
        ({"eval_steps": 3}, r"Set train\.eval_steps"),
        ({"weight_decay": -5}, r"train\.args\.weight_decay is -5; expected a finite number of at least 0"),
        ({"weight_decay": "nan"}, r"train\.args\.weight_decay is 'nan'"),
        ({"bf16": "yes"}, r"train\.args\.bf16 is 'yes'; expected true or false"),
        ({"max_steps": 1.5}, r"train\.args\.max_steps is 1\.5; expected a whole number"),
        ({"lr_scheduler_type": "steep"}, r"train\.args cannot be used as given: .*steep"),
        ({"report_to": "nobody"}, r"train\.args\.report_to is 'nobody': nobody is not supported"),
        ({"load_best_model_at_end": True}, r"load_best_model_at_end is given, and nothing is evaluated .*eval_steps"),
        ({"early_stopping_patience": 2}, r"early_stopping_patience is given, and nothing is evaluated"),
        ({"early_stopping_patience": 0}, r"early_stopping_patience is 0; expected a whole number of at least 1"),
    ],
)
def test_what_would_not_do_what_it_says_is_refused(args, match):
    with pytest.raises(AnybatchError, match=match):
        check_arguments(TrainConfig(args=args), on_cpu=True)


def test_every_name_that_a_run_decides_is_one_of_the_trainer():
    assert DECIDED.keys() <= {field.name for field in fields(SentenceTransformerTrainingArguments)}


def test_the_figure_of_the_best_model_is_one_of_the_evaluation():
    best = TrainConfig(eval_steps=2, args={"load_best_model_at_end": True})
    check_best(best, {"ndcg@10": 0.1})
    check_best(TrainConfig(), {})
    with pytest.raises(
        AnybatchError, match=r"metric_for_best_model is 'ndcg@10', and the figures .* hit@1, knn\. Name"
    ):
        check_best(best, {"hit@1": 0.1, "knn": 0.2})


FIGURES = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.9, 12: 0.2}  # by step: the best comes after the patience has ended


def stopped(folder, output, *, resume=False, epochs=4, **args):
    """Steps of batches of 8 of 24 rows; an evaluation every second; the figures of `FIGURES`."""
    torch.manual_seed(0)
    model = SentenceTransformer(str(folder), device="cpu")
    cached = CachedLoss(model, SogCLR(ROWS), mini_batch_size=8)
    given = {"logging_steps": 2, "metric_for_best_model": "figure", **args}
    config = TrainConfig(learning_rate=1e-3, epochs=epochs, eval_steps=2, save_steps=3, args=given)
    steps = []

    def evaluate(model):
        assert not model.training
        steps.append(None)
        return {"figure": FIGURES[int(cached.step) + 1]}

    result = train_model(
        model, cached, Dataset.from_dict(DATA), PLAN, config, output=output, resume=resume, evaluate=evaluate
    )
    return result, model, cached, len(steps)


def same(one, other):
    return all(torch.equal(value.nan_to_num(0.5), other[name].nan_to_num(0.5)) for name, value in one.items())


def test_training_stops_early_and_goes_back_to_the_best(tiny_model_folder, tmp_path):
    """Two evaluations without a better one; the model and the loss of the best step; a run that is killed is the same,
    wherever it was, at the step where it stopped as well.
    """
    for name in ("plain", "killed", "at the end"):
        (tmp_path / name).mkdir()
    best = {"early_stopping_patience": 2, "load_best_model_at_end": True}
    result, model, cached, _ = stopped(tiny_model_folder, tmp_path / "plain", **best)
    lines = [(line["step"], line["eval_figure"]) for line in result.log if "eval_figure" in line]
    assert (result.num_steps, lines) == (8, [(2, 0.3), (4, 0.5), (6, 0.4), (8, 0.5)])
    saved = tmp_path / "plain" / "checkpoints" / "checkpoint-4"
    assert same(load_file(saved / "model.safetensors"), dict(model[0].model.state_dict()))
    assert same(load_file(saved / "anybatch_loss.safetensors"), cached.loss.state_dict())
    for name, kept in (("killed", (2, 4, 6)), ("at the end", (2, 4, 6, 8))):
        shutil.copytree(tmp_path / "plain", tmp_path / name, dirs_exist_ok=True)
        for checkpoint in (tmp_path / name / "checkpoints").glob("checkpoint-*"):
            if int(checkpoint.name.rpartition("-")[2]) not in kept:
                shutil.rmtree(checkpoint)
        for state in (tmp_path / name / "checkpoints").rglob("trainer_state.json"):
            assert json.loads(state.read_text())["best_global_step"] in (2, 4)
        again, resumed, its_loss, evaluations = stopped(tiny_model_folder, tmp_path / name, resume=True, **best)
        assert (again.num_steps, again.log, evaluations) == (8, result.log, int(name == "killed"))
        assert same(model.state_dict(), resumed.state_dict())
        assert same(cached.loss.state_dict(), its_loss.loss.state_dict())


def test_without_a_word_on_the_best_the_last_model_stays(tiny_model_folder, tmp_path):
    result, model, _, evaluations = stopped(tiny_model_folder, tmp_path, epochs=2)
    assert (result.num_steps, evaluations) == (6, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    saved = load_file(tmp_path / "checkpoints" / "checkpoint-6" / "model.safetensors")
    assert same(saved, dict(model[0].model.state_dict()))
