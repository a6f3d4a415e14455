"""`anybatch.Trainer`: one line in place of the guest's Trainer and all that a loss of ours needs beside it."""

from __future__ import annotations

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    CoSENTLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers.trainer_utils import HPSearchBackend

from anybatch import BatchPlan, CachedLoss, CrossBatchInfoNCE, InfoNCE, SogCLR, Trainer
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import LossStateCallback, PlanBatches, with_index
from anybatch.losses import Matryoshka
from anybatch.losses.methods import CountCorrectedInfoNCE
from anybatch.losses.rows import RowTable

from .test_trainer import BATCH, ROWS, arguments, dataset


def load(folder):
    model = SentenceTransformer(str(folder), device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def mined(rows=ROWS, batch_size=BATCH):
    cluster = np.repeat(np.arange(rows // 4), 4).astype(np.int32)
    suspects = np.array([[0, 1], [4, 6]], np.int32)
    return BatchPlan(
        num_rows=rows, batch_size=batch_size, cluster_size=4, cluster=cluster, seed=3, data_digest="", suspects=suspects
    )


def with_duplicates():
    return dataset().map(lambda row, place: {"positive": "one answer"} if place < 3 else row, with_indices=True)


def test_with_nothing_named_it_is_the_recommended_loss_assembled_by_hand(tiny_model_folder, tmp_path, caplog):
    data = with_duplicates()
    with caplog.at_level(logging.INFO, logger="anybatch"):
        ours = Trainer(load(tiny_model_folder), arguments(tmp_path / "a"), data)
    assert "Recommended: count_corrected, temperature 0.05 (batches of 8" in caplog.text
    ours.train()
    model = load(tiny_model_folder)
    ids = np.arange(ROWS)
    positive_id = np.where(ids < 3, 0, ids)
    loss = CachedLoss(model, CountCorrectedInfoNCE(ROWS, temperature=0.05), rows=RowTable(ids, positive_id))
    hand = SentenceTransformerTrainer(
        model, arguments(tmp_path / "b"), with_index(data), loss=loss, callbacks=[LossStateCallback(loss)]
    )
    hand.train()
    assert same(weights(ours.model), weights(model))
    assert "anybatch" in ours.model.model_card_data.tags
    plain = Trainer(load(tiny_model_folder), arguments(tmp_path / "c"), data, loss=InfoNCE(temperature=0.05))
    plain.train()
    assert not same(weights(plain.model), weights(model))


def remembering():
    return CrossBatchInfoNCE(ROWS, temperature=0.05)


@pytest.mark.parametrize(
    ("batch_size", "num_rows", "kind"),
    [(8, 2_640, CrossBatchInfoNCE), (8, 600, CountCorrectedInfoNCE), (512, 600, CountCorrectedInfoNCE)],
)
def test_word_vectors_remember_earlier_batches_if_these_are_small(
    batch_size, num_rows, kind, tiny_model_folder, tmp_path
):
    words = StaticEmbedding(load(tiny_model_folder).tokenizer, embedding_dim=4)
    model = SentenceTransformer(modules=[words], device="cpu")
    training = Trainer(model, arguments(tmp_path, per_device_train_batch_size=batch_size), dataset(num_rows))
    assert isinstance(training.loss.loss, kind)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_guests_losses_are_left_as_they_are(tiny_model_folder, tmp_path, wrapped):
    def loss(model):
        plain = MultipleNegativesRankingLoss(model)
        return MatryoshkaLoss(model, plain, [8, 4]) if wrapped else plain

    found = []
    for kind, name in ((Trainer, "a"), (SentenceTransformerTrainer, "b")):
        model = load(tiny_model_folder)
        training = kind(model, arguments(tmp_path / name), dataset(), loss=loss(model))
        assert training.train_dataset.column_names == ["anchor", "positive"]
        assert not any(isinstance(one, LossStateCallback) for one in training.callback_handler.callbacks)
        training.train()
        found.append(weights(model))
    assert same(*found)


def test_a_wrapper_of_the_guest_round_a_loss_of_ours_knows_which_rows_are_equal(tiny_model_folder, tmp_path):
    data, dims, model = with_duplicates(), [8, 4], load(tiny_model_folder).double()
    inner = CachedLoss(model, InfoNCE(temperature=0.05), mini_batch_size=3)
    training = Trainer(model, arguments(tmp_path), data, loss=MatryoshkaLoss(model, inner, dims, [1.0, 0.5]))
    training.train()
    assert sum(isinstance(one, LossStateCallback) for one in training.callback_handler.callbacks) == 1
    index = torch.arange(BATCH)
    sides = [model.preprocess(data[name][:BATCH]) for name in ("anchor", "positive")]
    found = []
    for plain in (False, True):
        model.zero_grad()
        if plain:
            anchors, positives = (model(dict(side))["sentence_embedding"] for side in sides)
            known = inner.rows.arguments(index)
            wide, narrow = (InfoNCE(temperature=0.05)(anchors[:, :d], positives[:, :d], **known) for d in dims)
            (wide + 0.5 * narrow).backward()
        else:
            training.loss(sides, index).backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    ours, theirs = found
    scale = max(gradient.abs().max() for gradient in theirs.values())
    assert all((ours[name] - theirs[name]).abs().max() < 1e-12 * scale for name in theirs)
    assert inner.rows.positive_id[:4].unique().numel() == 2


@pytest.mark.parametrize(
    ("wrapper", "inner", "match"),
    [
        (AdaptiveLayerLoss, lambda _: InfoNCE(), "AdaptiveLayerLoss round InfoNCE. It calls parts of the encoder"),
        (
            lambda *two: MatryoshkaLoss(*two, [8]),
            lambda _: InfoNCE(),
            r"expected MatryoshkaLoss\(model, Cached",
        ),
        (
            lambda *two: MatryoshkaLoss(*two, [8, 4]),
            lambda model: CachedLoss(model, SogCLR(ROWS)),
            r"would mix what it learns of all. Give anybatch.losses.Matryoshka\(SogCLR\(...\), \[8, 4\]\)",
        ),
        (lambda *two: Matryoshka2dLoss(*two, [8]), lambda _: InfoNCE(), "Matryoshka2dLoss round"),
    ],
)
def test_a_wrapper_that_would_compute_wrongly_is_refused(tiny_model_folder, tmp_path, wrapper, inner, match):
    model = load(tiny_model_folder)
    with pytest.raises(AnybatchError, match=match):
        Trainer(model, arguments(tmp_path), dataset(), loss=wrapper(model, inner(model)))


def test_prefixes_of_ours_have_a_state_each(tiny_model_folder, tmp_path):
    loss = Matryoshka(SogCLR(ROWS), [8, 4])
    training = Trainer(load(tiny_model_folder), arguments(tmp_path), dataset(), loss=loss)
    training.train()
    assert all(bool(part.denominator.visited.all()) for part in training.loss.loss.losses)


def test_a_plan_brings_its_batches_weights_and_masks(tiny_model_folder, tmp_path):
    plan, file = mined(), tmp_path / "plan.safetensors"
    plan.save(file)
    for given in (plan, file, str(file)):
        args = arguments(tmp_path / "out", per_device_train_batch_size=8)
        training = Trainer(load(tiny_model_folder), args, dataset(), plan=given)
        assert isinstance(training.args.batch_sampler, PlanBatches)
        assert not isinstance(args.batch_sampler, PlanBatches)  # the user's stay as they are
        assert isinstance(training.loss.loss, InfoNCE)  # recommended for a transformer on mined batches
        assert training.loss.rows.weights == "none"
        assert training.loss.rows.suspects is not None
    training.train()
    corrected = Trainer(
        load(tiny_model_folder), arguments(tmp_path / "b"), dataset(), loss=CountCorrectedInfoNCE(ROWS), plan=plan
    )
    assert corrected.loss.rows.weights == "inclusion"
    args = arguments(tmp_path / "c")
    args.per_device_train_batch_size = 16
    wrong = Trainer(load(tiny_model_folder), args, dataset(), plan=plan)
    with pytest.raises(AnybatchError, match="Set per_device_train_batch_size to 8"):
        wrong.train()


def test_the_batch_size_of_the_plan_is_taken_where_none_was_given(tiny_model_folder, tmp_path):
    training = Trainer(load(tiny_model_folder), arguments(tmp_path), dataset(), plan=mined(batch_size=16))
    assert training.args.per_device_train_batch_size == 16
    training.train()


def test_several_data_sets(tiny_model_folder, tmp_path):
    sets = {"a": dataset(), "b": dataset(24, offset=100).add_column("negative", ["no answer"] * 24)}
    one = Trainer(load(tiny_model_folder), arguments(tmp_path / "a"), sets)
    one.train()
    assert len(one.loss.rows.anchor_id) == ROWS + 24
    model = load(tiny_model_folder)
    losses = {"a": SogCLR(ROWS + 24, temperature=0.05), "b": MultipleNegativesRankingLoss(model)}
    mixed = Trainer(model, arguments(tmp_path / "b", save_strategy="steps", save_steps=4), sets, loss=losses)
    mixed.train()
    state = load_file(tmp_path / "b" / f"checkpoint-{mixed.state.global_step}" / "anybatch_loss.safetensors")
    assert any(name.startswith("a.") for name in state)
    planned = Trainer(load(tiny_model_folder), arguments(tmp_path / "c"), sets, plan=[mined(), mined(24)])
    assert isinstance(planned.loss.loss, InfoNCE)
    planned.train()
    with pytest.raises(AnybatchError, match="Got 1 plans for 2 data sets"):
        Trainer(load(tiny_model_folder), arguments(tmp_path / "d"), sets, plan=mined())


def test_a_data_set_with_scores_for_a_loss_of_the_guest_beside_pairs_for_one_of_ours(tiny_model_folder, tmp_path):
    model = load(tiny_model_folder)
    sets = {"pairs": dataset(), "scored": dataset(24, offset=100).add_column("score", [row / 24 for row in range(24)])}
    losses = {"pairs": CrossBatchInfoNCE(ROWS, temperature=0.05), "scored": CoSENTLoss(model)}
    training = Trainer(model, arguments(tmp_path), sets, loss=losses)
    assert len(training.loss["pairs"].rows.anchor_id) == ROWS
    assert "label" not in training.train_dataset["scored"].column_names
    training.train()


def test_rows_that_were_numbered_and_shuffled_keep_their_numbers(tiny_model_folder, tmp_path):
    numbered = with_index(with_duplicates()).shuffle(seed=1).select(range(20))
    training = Trainer(load(tiny_model_folder), arguments(tmp_path), numbered, loss=InfoNCE(temperature=0.05))
    ids = training.loss.rows.positive_id
    same = [number for number, text in zip(numbered["label"], numbered["positive"]) if text == "one answer"]
    others = [number for number in numbered["label"] if number not in same]
    assert len(same) > 1
    assert ids[same].unique().numel() == 1
    assert ids[others].unique().numel() == len(others)
    training.train()


def test_the_best_model_comes_back_with_the_loss_of_its_step(tiny_model_folder, tmp_path):
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    args = arguments(
        tmp_path, **settings, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True
    )
    training = Trainer(
        load(tiny_model_folder), args, dataset(), evaluator=SequentialEvaluator([lambda *_: {"score": next(scores)}])
    )
    training.train()
    assert training.state.best_model_checkpoint.endswith("checkpoint-4")
    best = tmp_path / "checkpoint-4"
    assert same(load_file(best / "anybatch_loss.safetensors"), training.loss.loss.state_dict())
    assert same(weights(SentenceTransformer(str(best), device="cpu")), weights(training.model))


def test_a_stream_has_a_loss_without_state(tiny_model_folder, tmp_path):
    stream = dataset().to_iterable_dataset()
    training = Trainer(load(tiny_model_folder), arguments(tmp_path / "a", max_steps=3), stream)
    assert isinstance(training.loss.loss, InfoNCE)
    training.train()
    with pytest.raises(AnybatchError, match="a stream, whose rows have no numbers"):
        Trainer(load(tiny_model_folder), arguments(tmp_path / "b", max_steps=3), stream, plan=mined())


@pytest.mark.parametrize("damaged", [False, True])
def test_resuming_goes_on_with_model_and_loss(tiny_model_folder, tmp_path, damaged):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = Trainer(load(tiny_model_folder), arguments(tmp_path / "a", **settings), dataset(), loss=remembering())
    whole.train()
    shutil.copytree(
        tmp_path / "a", tmp_path / "b", ignore=lambda _, names: {"checkpoint-8", "checkpoint-10"} & set(names)
    )
    if damaged:
        (tmp_path / "b" / "checkpoint-6" / "anybatch_loss.safetensors").write_bytes(b"cut")
    again = Trainer(load(tiny_model_folder), arguments(tmp_path / "b", **settings), dataset(), loss=remembering())
    again.train(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(again.model))
    states = [training.loss.loss.state_dict() for training in (whole, again)]
    assert states[0]
    assert same(*states)
    elsewhere = Trainer(load(tiny_model_folder), arguments(tmp_path / "c", **settings), dataset(), loss=remembering())
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert same(weights(whole.model), weights(elsewhere.model))


def test_the_models_prompts_are_used_unless_others_are_given(tiny_model_folder, tmp_path):
    model = load(tiny_model_folder)
    model.prompts = {"query": "find: ", "document": "text: "}
    training = Trainer(model, arguments(tmp_path), dataset())
    assert training.args.prompts == {"anchor": "find: ", "positive": "text: "}
    given = Trainer(model, arguments(tmp_path, prompts={"anchor": "other: "}), dataset())
    assert given.args.prompts == {"anchor": "other: "}
    sets = Trainer(model, arguments(tmp_path), {"a": dataset(), "b": dataset()})
    assert sets.args.prompts == {name: {"anchor": "find: ", "positive": "text: "} for name in "ab"}


def test_data_that_cannot_be_used(tiny_model_folder, tmp_path):
    one = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(AnybatchError, match="has the columns text, label; expected an anchor"):
        Trainer(load(tiny_model_folder), arguments(tmp_path), one)
    holes = dataset().map(lambda row, place: {"neg": None if place == 2 else f"no {place}"}, with_indices=True)
    with pytest.raises(AnybatchError, match="nothing in column 'neg' in row 3"):
        Trainer(load(tiny_model_folder), arguments(tmp_path), holes.select_columns(["anchor", "neg"]))
    scores = dataset().add_column("score", [0.5] * ROWS)
    with pytest.raises(AnybatchError, match="the column 'score'"):
        Trainer(load(tiny_model_folder), arguments(tmp_path), scores)


def test_the_guests_arguments_by_place(tiny_model_folder, tmp_path):
    found = []

    def evaluator(model, *_):
        found.append(model)
        return {"score": 1.0}

    sequence = SequentialEvaluator([evaluator])
    training = Trainer(load(tiny_model_folder), arguments(tmp_path), dataset(), dataset(8), None, sequence)
    assert training.evaluate()["eval_score"] == 1.0
    assert found == [training.model]


def test_the_recommended_loss_is_said_to_whoever_set_no_level_of_logging(tiny_model_folder, tmp_path, caplog):
    Trainer(load(tiny_model_folder), arguments(tmp_path), dataset())
    stream = dataset().add_column("label", range(ROWS)).to_iterable_dataset()  # which numbers its rows
    Trainer(load(tiny_model_folder), arguments(tmp_path, max_steps=3), stream)
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage().split(",")[0] for record in said] == [
        "Recommended: count_corrected",
        "Recommended: InfoNCE",
    ]
    assert "how many rows a stream has is not known" in said[1].getMessage()


def test_a_function_that_makes_the_loss(tiny_model_folder, tmp_path):
    data = with_duplicates()
    found = []
    for name, loss in (("a", InfoNCE(temperature=0.05)), ("b", lambda _: InfoNCE(temperature=0.05))):
        training = Trainer(load(tiny_model_folder), arguments(tmp_path / name), data, loss=loss)
        training.train()
        found.append(weights(training.model))
    assert same(*found)
    with pytest.raises(AnybatchError, match="expected the loss itself"):
        Trainer(None, arguments(tmp_path), data, loss=lambda _: InfoNCE(), model_init=lambda: load(tiny_model_folder))


def test_the_loss_begins_anew_with_each_model(tiny_model_folder, tmp_path):
    def model():
        made = load(tiny_model_folder)
        made.prompts = {"query": "find: ", "document": "text: "}
        return made

    options = {"train_dataset": dataset(), "model_init": model, "loss": remembering()}
    training = Trainer(args=arguments(tmp_path), **options)
    assert training.args.prompts == {"anchor": "find: ", "positive": "text: "}
    found = []
    for _ in range(2):
        training.train()
        found.append((weights(training.model), training.loss.loss.state_dict()))
    (first, state), (second, again) = found
    assert same(first, second)
    assert state
    assert same(state, again)


def test_a_trial_of_a_search_keeps_the_loss_in_its_own_checkpoints(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # optuna's is one
    args = arguments(tmp_path, save_strategy="epoch")
    training = Trainer(args=args, train_dataset=dataset(), model_init=lambda: load(tiny_model_folder))
    training.hp_search_backend, training.hp_space = HPSearchBackend.OPTUNA, lambda _: {"learning_rate": 1e-3}
    training.hp_name = None
    training.train(trial=SimpleNamespace(number=3, params={}))
    folders = list(tmp_path.glob("run-3/checkpoint-*"))
    assert folders
    for folder in folders:
        assert (folder / "anybatch_loss.safetensors").exists()
        assert (folder / "model.safetensors").exists()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_rows_that_lack_something(tiny_model_folder, tmp_path):
    negatives = [None if row % 3 else f"no answer {row}" for row in range(ROWS)]
    data = dataset().add_column("negative", negatives)
    training = Trainer(load(tiny_model_folder), arguments(tmp_path / "a"), data, data)
    ids = training.loss.rows.negative_id[:, 0]
    assert (ids < 0).tolist() == [text is None for text in negatives]
    training.train()
    assert np.isfinite(training.evaluate()["eval_loss"])
    for column in ("anchor", "positive"):
        rows = dataset().to_dict()
        rows[column][5] = None
        with pytest.raises(AnybatchError, match=f"nothing in column '{column}' in row 6"):
            Trainer(load(tiny_model_folder), arguments(tmp_path / "b"), Dataset.from_dict(rows))


def test_a_stream_and_a_loss_that_remembers_rows(tiny_model_folder, tmp_path):
    args = arguments(tmp_path, max_steps=3)
    with pytest.raises(AnybatchError, match="a stream has none"):
        Trainer(load(tiny_model_folder), args, dataset().to_iterable_dataset(), loss=CrossBatchInfoNCE(ROWS))
    numbered = with_index(dataset()).to_iterable_dataset()
    Trainer(load(tiny_model_folder), args, numbered, loss=CrossBatchInfoNCE(ROWS)).train()
