"""The README.md that a training leaves: what it says, and nothing that the run did not do."""

from __future__ import annotations

import re

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

import anybatch
from anybatch import InfoNCE, SogCLR, Trainer
from anybatch.integrations.sentence_transformers import ModelConfig, TrainConfig
from anybatch.integrations.sentence_transformers.card import bibtex, describe
from anybatch.losses.registry import METHODS, LossConfig, method_of
from anybatch.mining import MiningConfig
from anybatch.run import job
from anybatch.run.config import DataConfig, EvaluationConfig, RunConfig, TeacherConfig

from .test_one_line import load, mined, with_duplicates
from .test_trainer import ROWS, arguments, dataset


def card(model, folder):
    model.save_pretrained(str(folder))
    return (folder / "README.md").read_text(encoding="utf-8")


def table(text):
    """The rows of all two-column tables."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, flags=re.MULTILINE))


def test_what_was_trained_how_and_at_what_cost(tiny_model_folder, tmp_path):
    negatives = [None if row % 3 else f"no answer {row}" for row in range(ROWS)]
    data = with_duplicates().add_column("negative", negatives)
    training = Trainer(load(tiny_model_folder), arguments(tmp_path / "a"), data, mini_batch_size=4)
    training.train()
    text = card(training.model, tmp_path / "model")
    for tag in ("anybatch", f"anybatch:{anybatch.__version__}", "generated_from_trainer"):
        assert f"- {tag}\n" in text
    rows = table(text)
    why = "(recommended: batches of 8: a transformer: the batch's negatives stand for all rows, none is remembered)"
    assert rows["Loss"] == f"CountCorrectedInfoNCE, temperature 0.05 {why}"
    assert rows["Batch"].startswith("8 pairs, encoded 4 at a time")
    assert rows["Batches"] == "random"
    assert rows["Schedule"] == "epochs: 3.0, learning rate 5e-05 (linear), seed 42"
    assert rows["Not negatives"] == "rows with equal inputs"
    assert re.fullmatch(r"15 steps; [\d.]+ seconds; peak memory of the process [\d.]+ GiB", rows["Cost"])
    assert "<code>label</code>" not in text
    assert "<code>negative</code>" in text
    assert "None" not in text
    numbers = set(re.findall(r"eprint=\{([\d.]+)\}", text))
    assert numbers == {"2101.06983", "2202.12387"}  # the cached step; SogCLR, whose sum over the data is estimated
    assert "Before training" not in text
    assert f"anybatch {anybatch.__version__}, sentence-transformers" in text
    assert not re.search(r"\{\{|\}\}|\{%|\n\n\n\n", text)
    assert SentenceTransformer(str(tmp_path / "model"), device="cpu").encode("x").shape == (32,)


def test_mined_batches_and_their_teacher(tiny_model_folder, tmp_path):
    plan = mined()
    plan.meta["teacher"] = "a-teacher"
    loss = SogCLR(ROWS, temperature=0.05, learnable_temperature=True)
    training = Trainer(
        load(tiny_model_folder), arguments(tmp_path / "a", learning_rate=0.1), dataset(), None, loss, plan=plan
    )
    training.train()
    text = card(training.model, tmp_path / "model")
    rows = table(text)
    assert rows["Batches"] == f"mined: clusters of 4 similar rows (plan {plan.digest[:12]})"
    assert rows["Teacher"] == "`a-teacher`, which says what is similar"
    assert rows["Not negatives"] == "rows with equal inputs and 2 pairs suspected by mining"
    assert rows["Weights"].startswith("by the inverse chance")
    assert rows["Loss"] == f"SogCLR, temperature {training.loss.loss.temperature:.4g}, learned"
    assert "Breaking the Batch Barrier" in text
    assert training.loss.loss.temperature != pytest.approx(0.05, rel=1e-3)


def test_figures_before_and_after(tiny_model_folder, tmp_path):
    model = load(tiny_model_folder)
    model.model_card_data.add_tags("generated_from_trainer")  # else the guest keeps the card that was loaded
    describe(
        model,
        {"Loss": "InfoNCE"},
        before={"recall@1": 0.25, "num_queries": 50.0, "num_pairs": 52.0},
        after={"recall@1": 0.75, "num_queries": 50.0, "num_pairs": 52.0},
    )
    text = card(model, tmp_path)
    assert "| recall@1 | 0.2500 | 0.7500 |" in text
    assert "On 50 held-out queries:" in text
    assert "num_" not in text


def test_cards_that_are_not_ours_stay(tiny_model_folder, tmp_path):
    class Own(SentenceTransformerModelCardData):
        pass

    model = SentenceTransformer(str(tiny_model_folder), device="cpu", model_card_data=Own())
    Trainer(model, arguments(tmp_path), dataset(), loss=InfoNCE()).train()
    text = card(model, tmp_path / "own")
    assert "- anybatch\n" in text
    assert "Bias, Risks and Limitations" in text  # the guest's template
    assert "2101.06983" in text
    assert "<code>label</code>" not in text
    model = load(tiny_model_folder)
    Trainer(model, arguments(tmp_path), dataset(), loss=MultipleNegativesRankingLoss(model)).train()
    text = card(model, tmp_path / "guest")
    assert "anybatch" not in text
    assert "Bias, Risks and Limitations" in text


def test_a_new_model_of_model_init_has_the_card(tiny_model_folder, tmp_path):
    training = Trainer(args=arguments(tmp_path), train_dataset=dataset(), model_init=lambda: load(tiny_model_folder))
    training.train()
    training.train()
    text = card(training.model, tmp_path / "model")
    assert table(text)["Cost"].startswith("15 steps")
    assert f"{ROWS} rows with the columns" in text


WITHOUT_PAPER = {"scent", "auc_cl"}  # without an arXiv number, or without authors, in their docstrings


@pytest.mark.parametrize("name", METHODS)
def test_every_method_cites_its_paper(name):
    entry = bibtex(method_of(name))
    assert bool(entry) == (name not in WITHOUT_PAPER)
    if entry:
        assert re.search(r"title=\{.{8,}\},\n    author=\{[A-Za-z ]+\},\n    year=\{20\d\d\}", entry)


def test_a_run_tells_its_recipe_its_teacher_and_its_figures(tiny_model_folder, pairs_file, tmp_path):
    folder = str(tiny_model_folder)
    result = job.train(
        RunConfig(
            output=str(tmp_path / "run"),
            data=DataConfig(path=str(pairs_file)),
            model=ModelConfig(name=folder, device="cpu"),
            teacher=TeacherConfig(name=folder),
            batch_size=8,
            mining=MiningConfig(method="anybatch", cluster_size=2, window=(1, 6)),
            loss=LossConfig(name="sogclr", gamma=0.5),
            train=TrainConfig(save_steps=2, mini_batch_size=4, args={"max_steps": 2}),
            evaluation=EvaluationConfig(path=str(pairs_file)),
        )
    )
    text = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    rows = table(text)
    assert rows["Recipe"] == "loss.name=sogclr (given), loss.gamma=0.5, mining.method=anybatch (given)"
    assert rows["Teacher"] == f"`{tiny_model_folder.name}`, which says what is similar"
    assert str(tiny_model_folder.parent) not in text
    before, after = (f"{figures['ndcg@10']:.4f}" for figures in (result.metrics_untrained, result.metrics))
    assert f"| ndcg@10 | {before} | {after} |" in text
    assert f"On {result.metrics['num_queries']:.0f} held-out queries" in text
