"""Inside sentence-transformers' Trainer: batches of the plan, plain ones in evaluation, two processes equal one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.training_args import MultiDatasetBatchSamplers
from transformers import EarlyStoppingCallback

from anybatch.core.errors import AnybatchError
from anybatch.data.pairs import PairData
from anybatch.family import FastCLIP, SigLIP
from anybatch.integrations.sentence_transformers import (
    CachedLoss,
    LossStateCallback,
    PlanBatches,
    TrainConfig,
    load_grown_loss,
    train_model,
    with_index,
)
from anybatch.losses import CountCorrectedInfoNCE, InfoNCE, Matryoshka, SogCLR
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan, PlanSampler

from ..conftest import sentence

ROWS, BATCH = 40, 8


def dataset(rows=ROWS, offset=0):
    return Dataset.from_dict(
        {
            "anchor": [sentence(row + offset, 2 + row % 5) for row in range(rows)],
            "positive": [sentence(row + 50 + offset, 3 + row % 7) for row in range(rows)],
        }
    )


def arguments(output, **settings):
    return SentenceTransformerTrainingArguments(
        output_dir=str(output),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"per_device_train_batch_size": BATCH, "save_strategy": "no", **settings},
    )


def without_callback(training):
    callbacks = training.callback_handler.callbacks
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, LossStateCallback)]
    return training


def trainer(
    folder, output, *, seen, train=None, evaluation=None, world_size=1, batch_size=BATCH, plan_seed=3, **settings
):
    """A trainer without dropout, so that the number of processes cannot matter; `seen` collects each step's rows."""
    model = SentenceTransformer(str(folder), device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model[0].model.config.attention_probs_dropout_prob = 0.0
    plan = BatchPlan.random(ROWS, BATCH, seed=plan_seed, data_digest="")
    table = RowTable(np.arange(ROWS), np.arange(ROWS) % 30)
    loss = CachedLoss(model, SogCLR(ROWS, gamma=0.5, learnable_temperature=True), rows=table, mini_batch_size=3)
    forward = loss.forward

    def watched(features, labels=None):
        seen.append((torch.is_grad_enabled(), None if labels is None else labels.tolist()))
        return forward(features, labels)

    loss.forward = watched
    used = arguments(
        output,
        per_device_train_batch_size=batch_size // world_size,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-3,
        batch_sampler=PlanBatches(plan),
        ddp_backend="gloo" if world_size > 1 else None,
        **settings,
    )
    return SentenceTransformerTrainer(
        model=model,
        args=used,
        train_dataset=with_index(dataset()) if train is None else train,
        eval_dataset=evaluation,
        loss=loss,
        callbacks=[LossStateCallback(loss)],
    ), loss


def test_plan_is_dealt_and_evaluation_is_left_alone(tiny_model_folder, tmp_path):
    seen: list = []
    # As many rows as the training set, so that only the row numbers tell them apart.
    training, loss = trainer(
        tiny_model_folder, tmp_path, seen=seen, evaluation=dataset(offset=7), eval_strategy="steps", eval_steps=3
    )
    training.train()
    plan = BatchPlan.random(ROWS, BATCH, seed=3, data_digest="")
    expected = [rows.tolist() for epoch in range(2) for rows in plan.epoch_batches(epoch)]
    assert [rows for training_step, rows in seen if training_step] == expected
    evaluations = [rows for training_step, rows in seen if not training_step]
    assert len(evaluations) == 4 * 10  # after steps 3, 6, 9 and at the end, ten batches each
    assert all(rows is None for rows in evaluations)
    assert loss.loss.denominator.visited.all()


def test_a_plan_that_is_not_used_is_an_error(tiny_model_folder, tmp_path):
    unnumbered, _ = trainer(tiny_model_folder, tmp_path, seen=[], train=dataset())
    with pytest.raises(AnybatchError, match="plan was not used"):
        unnumbered.train()
    other_size, _ = trainer(tiny_model_folder, tmp_path, seen=[], batch_size=4)
    with pytest.raises(AnybatchError, match="Set per_device_train_batch_size to 8"):
        other_size.train()
    with pytest.raises(AnybatchError, match="has the column 'label'"):
        with_index(with_index(dataset()))


def test_a_plan_of_other_texts_is_an_error(tiny_model_folder, tmp_path):
    texts = dataset()
    pairs = PairData(anchors=texts["anchor"], positives=texts["positive"])
    batches = PlanBatches(BatchPlan.random(ROWS, BATCH, seed=3, data_digest=pairs.digest))
    settings = {"batch_size": BATCH, "drop_last": True}
    more = texts.add_column("negative_1", texts["anchor"][::-1])  # as mined negatives are added
    for fitting in (texts, more):
        assert isinstance(batches(with_index(fitting), **settings), PlanSampler)
    swapped = texts.select([1, 0, *range(2, ROWS)])
    with pytest.raises(AnybatchError, match="made for other data: the row counts agree"):
        batches(with_index(swapped), **settings)
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")
    loss = CachedLoss(model, SogCLR(ROWS))
    for wrong, match in ((swapped, "texts do not"), (texts.select(range(ROWS - 1)), "40 rows, the data has 39")):
        with pytest.raises(AnybatchError, match=match):
            train_model(model, loss, wrong, batches.plans[0], TrainConfig(), output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_texts_that_cannot_be_compared_are_left_to_the_row_numbers():
    numbers = Dataset.from_dict(
        {"anchor": [[row, row] for row in range(ROWS)], "positive": [[0, row] for row in range(ROWS)]}
    )
    batches = PlanBatches(BatchPlan.random(ROWS, BATCH, seed=3, data_digest="of something"))
    assert isinstance(batches(with_index(numbers), batch_size=BATCH, drop_last=True), PlanSampler)


def test_resuming_with_another_plan_is_an_error(tiny_model_folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "logging_strategy": "no"}
    trainer(tiny_model_folder, tmp_path, seen=[], **settings)[0].train()
    checkpoint = str(tmp_path / "checkpoint-3")
    other, _ = trainer(tiny_model_folder, tmp_path, seen=[], plan_seed=4, **settings)
    with pytest.raises(AnybatchError, match=r"was trained with the plan .*; the plan given now is"):
        other.train(resume_from_checkpoint=checkpoint)
    seen: list = []
    trainer(tiny_model_folder, tmp_path, seen=seen, **settings)[0].train(resume_from_checkpoint=checkpoint)
    assert len(seen) == 2


def test_a_new_run_on_appended_rows_begins_with_the_old_states(tiny_model_folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, "logging_strategy": "no"}
    training, old = trainer(tiny_model_folder, tmp_path / "old", seen=[], **settings)
    training.train()
    checkpoint = tmp_path / "old" / "checkpoint-3"
    new = CachedLoss(old.model, SogCLR(ROWS + 6, gamma=0.5, learnable_temperature=True))
    load_grown_loss(new, checkpoint)
    assert torch.equal(
        new.loss.denominator.log_mean[:, :ROWS].nan_to_num(9), old.loss.denominator.log_mean.nan_to_num(9)
    )
    assert int(new.loss.denominator.visited.sum()) == int(old.loss.denominator.visited.sum()) > 0
    assert torch.equal(new.loss.temperatures.log_temperature, old.loss.temperatures.log_temperature)
    fewer = CachedLoss(old.model, SogCLR(ROWS - 1, gamma=0.5, learnable_temperature=True))
    with pytest.raises(AnybatchError, match="can only grow"):
        load_grown_loss(fewer, checkpoint)
    with pytest.raises(AnybatchError, match=r"has no anybatch_loss\.safetensors"):
        load_grown_loss(new, tmp_path)
    other = CachedLoss(old.model, FastCLIP(ROWS + 6, version="v2", direction="one_way"))
    with pytest.raises(AnybatchError, match="another loss than this FastCLIP"):
        load_grown_loss(other, checkpoint)


def one_trainer(folder, output, train, loss_of, *callbacks, evaluation=None, **settings):
    """A short run on any data sets with any loss; learning rate 0 unless given."""
    model = SentenceTransformer(str(folder), device="cpu")
    loss = loss_of(model)
    args = arguments(output, **{"num_train_epochs": 1, "learning_rate": 0.0, **settings})
    used = [LossStateCallback(loss), *callbacks] if isinstance(loss, CachedLoss) else list(callbacks)
    return SentenceTransformerTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=evaluation, loss=loss, callbacks=used
    ), loss


def sogclr(rows, **settings):
    return lambda model: CachedLoss(model, SogCLR(rows, gamma=0.5, **settings), mini_batch_size=4)


class TestRowNumbers:
    """What comes through the label column is a row number of its own for each row, or it is refused before the first
    step.
    """

    @pytest.mark.parametrize("kind", [dict, DatasetDict])
    @pytest.mark.parametrize("order", ["ROUND_ROBIN", "PROPORTIONAL"])
    def test_several_sets_have_a_state_for_every_row(self, kind, order, tiny_model_folder, tmp_path):
        sets = with_index(kind({"a": dataset(16), "b": dataset(24, offset=60)}))
        assert sets["a"]["label"][:] == list(range(16))
        assert sets["b"]["label"][:] == list(range(16, 40))
        training, loss = one_trainer(
            tiny_model_folder, tmp_path, sets, sogclr(40), multi_dataset_batch_sampler=MultiDatasetBatchSamplers[order]
        )
        training.train()
        expected = 40 if order == "PROPORTIONAL" else 32  # round robin ends with the smaller set
        assert int(loss.loss.denominator.visited.sum()) == expected

    def test_several_sets_with_a_plan_each(self, tiny_model_folder, tmp_path):
        sets = with_index({"a": dataset(16), "b": dataset(24, offset=60)})
        plans = [BatchPlan.random(16, BATCH, seed=1), BatchPlan.random(24, BATCH, seed=2)]
        seen = []

        def watched(model):
            loss = CachedLoss(model, SogCLR(40), mini_batch_size=4)
            forward = loss.forward
            loss.forward = lambda features, labels=None: (seen.append(labels.tolist()), forward(features, labels))[1]
            return loss

        run, _ = one_trainer(
            tiny_model_folder, tmp_path, sets, watched, batch_sampler=PlanBatches(*plans), num_train_epochs=2
        )
        run.train()
        expected = [
            [row + first for row in batch]
            for epoch in range(2)
            for plan, first in zip(plans, (0, 16), strict=True)
            for batch in plan.epoch_batches(epoch).tolist()
        ]
        assert sorted(seen) == sorted(expected)
        assert sorted(seen[:5]) == sorted(expected[:5]), "the first epoch's batches come in the first epoch"
        one_plan, _ = one_trainer(tiny_model_folder, tmp_path, sets, sogclr(40), batch_sampler=PlanBatches(plans[0]))
        with pytest.raises(AnybatchError, match="not used for 1 of 2 training sets"):
            one_plan.train()

    def test_a_row_keeps_its_number(self, tiny_model_folder, tmp_path):
        """Shuffled, split, selected, joined again with repeats: no number is shared by different rows."""
        numbered = with_index(dataset())
        parts = numbered.train_test_split(test_size=8, seed=0)
        changed = concatenate_datasets([parts["train"].shuffle(seed=1), parts["test"], numbered.select(range(8))])
        training, loss = one_trainer(tiny_model_folder, tmp_path, changed, sogclr(ROWS))
        training.train()
        assert loss.loss.denominator.visited.all()

    def test_a_stream_that_brings_its_own_numbers(self, tiny_model_folder, tmp_path):
        rows = with_index(dataset())
        training, loss = one_trainer(tiny_model_folder, tmp_path, rows.to_iterable_dataset(), sogclr(ROWS), max_steps=5)
        training.train()
        assert loss.loss.denominator.visited.all()

    MISTAKES: ClassVar = {
        "scores": ({"score": [1.0] * ROWS}, "holds float64"),
        "zeros and ones": ({"label": [row % 2 for row in range(ROWS)]}, "Two different rows have the number"),
        "all alike": ({"labels": [3] * ROWS}, "Two different rows have the number 3"),
        "bool": ({"label": [row % 2 == 0 for row in range(ROWS)]}, "holds bool"),
        "texts": ({"label": ["a"] * ROWS}, "holds"),
        "lists": ({"scores": [[0.5, 0.5]] * ROWS}, "holds"),
        "from 1": ({"label": list(range(1, ROWS + 1))}, "run from 1 to 40; expected 0 to 39"),
        "negative": ({"label": list(range(-1, ROWS - 1))}, "run from -1 to 38"),
        "ids": ({"label": [10**15 + row for row in range(ROWS)]}, "run from 1000000000000000"),
    }

    @pytest.mark.parametrize("mistake", list(MISTAKES))
    @pytest.mark.parametrize("table", [False, True])
    def test_labels_that_are_no_row_numbers(self, mistake, table, tiny_model_folder, tmp_path):
        columns, match = self.MISTAKES[mistake]
        train = dataset()
        for name, values in columns.items():
            train = train.add_column(name, values)
        known = RowTable(np.arange(ROWS), np.arange(ROWS))
        losses = {
            False: sogclr(ROWS),
            True: lambda model: CachedLoss(model, InfoNCE(), rows=known, mini_batch_size=4),
        }
        training, _ = one_trainer(tiny_model_folder, tmp_path, train, losses[table])
        with pytest.raises(AnybatchError, match=match):
            training.train()

    def test_without_the_callback_the_first_step_refuses(self, tiny_model_folder, tmp_path):
        """Or as soon as the rows that share a number share a batch."""
        for column, match in (
            ({"label": [3] * ROWS}, "Different rows of a batch have one number, such as 3"),
            ({"score": [1.0] * ROWS}, "The labels are torch.float32"),
            ({"label": list(range(1, ROWS + 1))}, "expected 0 to 39"),
        ):
            train = dataset().add_column(*next(iter(column.items())))
            training, _ = one_trainer(tiny_model_folder, tmp_path, train, sogclr(ROWS))
            with pytest.raises(AnybatchError, match=match):
                without_callback(training).train()

    def test_sets_numbered_apart_collide(self, tiny_model_folder, tmp_path):
        sets = {"a": with_index(dataset(16)), "b": with_index(dataset(24, offset=60))}
        training, _ = one_trainer(tiny_model_folder, tmp_path, sets, sogclr(40))
        with pytest.raises(AnybatchError, match=r"Two different rows have the number 0.*once on the dictionary"):
            training.train()

    def test_what_cannot_be_numbered(self):
        for given in (
            dataset().to_iterable_dataset(),
            [1, 2],
            IterableDatasetDict({"a": dataset().to_iterable_dataset()}),
        ):
            with pytest.raises(AnybatchError, match=r"expected a Dataset .* of a stream have no fixed numbers"):
                with_index(given)
        with pytest.raises(
            AnybatchError, match="'a' is a dictionary of data sets itself"
        ):  # its rows would get numbers twice
            with_index({"a": {"b": dataset(), "c": dataset()}, "d": dataset()})

    def test_evaluation_rows_may_have_any_label(self, tiny_model_folder, tmp_path):
        training, _ = one_trainer(tiny_model_folder, tmp_path, with_index(dataset()), sogclr(ROWS))
        scored = dataset(8, offset=3).add_column("score", [0.5] * 8)
        assert np.isfinite(training.evaluate(scored)["eval_loss"])


class TestBestModel:
    """`load_best_model_at_end` gives a model and a loss of one step."""

    @pytest.mark.parametrize("ending", ["all steps", "early stopping", "save best"])
    def test_the_loss_goes_back_with_the_encoder(self, ending, tiny_model_folder, tmp_path):
        best_only = ending == "save best"
        training, loss = one_trainer(
            tiny_model_folder,
            tmp_path,
            with_index(dataset()),
            sogclr(ROWS, learnable_temperature=True),
            *([EarlyStoppingCallback(1)] if ending == "early stopping" else []),
            num_train_epochs=4,
            learning_rate=5e-2,
            eval_strategy="epoch",
            save_strategy="best" if best_only else "epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            evaluation=dataset(16, offset=33),
        )
        training.train()
        best = Path(training.state.best_model_checkpoint)
        assert training.state.best_global_step < training.state.global_step, "else nothing was restored"
        state, saved = loss.loss.state_dict(), load_file(best / "anybatch_loss.safetensors")
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name].nan_to_num(9), value.nan_to_num(9)) for name, value in saved.items())
        encoder = SentenceTransformer(str(best), device="cpu").state_dict()
        assert all(torch.equal(encoder[name], value) for name, value in training.model.state_dict().items())


def test_a_state_that_no_checkpoint_holds_is_said(tiny_model_folder, tmp_path):
    """Of a loss with a state, in a Trainer that saves; and two callbacks would write one file."""

    def run(loss_of, *callbacks, **settings):
        training, loss = one_trainer(
            tiny_model_folder, tmp_path, with_index(dataset()), loss_of, max_steps=1, **settings
        )
        without_callback(training)
        for make in callbacks:
            training.add_callback(make(loss))
        training.train()

    with pytest.warns(UserWarning, match="leave out the state of SogCLR"):
        run(sogclr(ROWS), save_strategy="steps")
    with pytest.raises(AnybatchError, match="has 2 LossStateCallbacks"):
        run(sogclr(ROWS), LossStateCallback, LossStateCallback, save_strategy="steps")
    run(sogclr(ROWS), LossStateCallback, save_strategy="steps")  # warnings are errors here
    run(sogclr(ROWS), save_strategy="no")
    run(lambda model: CachedLoss(model, InfoNCE(), mini_batch_size=4), save_strategy="steps")


def test_several_losses_are_saved_and_restored_together(tiny_model_folder, tmp_path):
    """A loss for each data set, as the Trainer takes them: a resumed run ends with both states of the uninterrupted
    one.
    """
    sets = with_index({"a": dataset(16), "b": dataset(24, offset=60)})

    def run(folder, *, checkpoint=None, callbacks=None, **settings):
        torch.manual_seed(0)
        model = SentenceTransformer(str(tiny_model_folder), device="cpu")
        losses = {
            "a": CachedLoss(model, SogCLR(40, gamma=0.5), mini_batch_size=4),
            "b": CachedLoss(model, InfoNCE(learnable_temperature=True), mini_batch_size=4),
        }
        args = arguments(
            folder,
            max_steps=4,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.ROUND_ROBIN,
        )
        used = [LossStateCallback(losses)] if callbacks is None else callbacks(losses)
        training = SentenceTransformerTrainer(model=model, args=args, train_dataset=sets, loss=losses, callbacks=used)
        training.train(resume_from_checkpoint=checkpoint)
        logged = [line for line in training.state.log_history if "loss" in line]
        return {name: loss.loss.state_dict() for name, loss in losses.items()}, logged

    whole, logged = run(tmp_path)
    assert any(name.startswith("a_") for name in logged[-1])
    resumed, _ = run(tmp_path, checkpoint=str(tmp_path / "checkpoint-2"))
    for name, state in whole.items():
        assert state, "else nothing was compared"
        for key, value in state.items():
            assert torch.equal(resumed[name][key].nan_to_num(9), value.nan_to_num(9)), (name, key)
    model = SentenceTransformer(str(tiny_model_folder), device="cpu")
    grown = {
        "a": CachedLoss(model, SogCLR(44, gamma=0.5)),
        "b": CachedLoss(model, InfoNCE(learnable_temperature=True)),
    }
    load_grown_loss(grown, tmp_path / "checkpoint-4")
    old, new = (states["a"] for states in (whole, {"a": grown["a"].loss.state_dict()}))
    name = next(name for name in old if name.endswith("log_mean"))
    assert torch.equal(new[name][:, :40].nan_to_num(9), old[name].nan_to_num(9))
    with pytest.raises(AnybatchError, match=r"2 LossStateCallbacks.*LossStateCallback\(losses\)"):
        run(tmp_path / "two", callbacks=lambda losses: [LossStateCallback(loss) for loss in losses.values()])


@pytest.mark.parametrize("table", [False, True])
def test_mined_batches_are_no_uniform_sample(table, tiny_model_folder, tmp_path, caplog):
    """Said once, of a loss over the data set without inclusion weights, whether the plan is in the row table or not."""
    cluster = (np.arange(ROWS) // 4).astype(np.int32)
    mined = BatchPlan(num_rows=ROWS, batch_size=BATCH, cluster_size=4, cluster=cluster, seed=0, data_digest="")
    words = "takes the batch's negatives for a uniform sample"

    def run(loss, plan, **settings):
        caplog.clear()
        rows = RowTable(np.arange(ROWS), np.arange(ROWS), plan=plan, **settings) if table or settings else None
        training, _ = one_trainer(
            tiny_model_folder,
            tmp_path,
            with_index(dataset()),
            lambda model: CachedLoss(model, loss, rows=rows, mini_batch_size=4),
            batch_sampler=PlanBatches(plan),
            max_steps=2,
        )
        training.train()
        return caplog.text.count(words)

    assert run(CountCorrectedInfoNCE(ROWS), mined) == 1
    assert run(CountCorrectedInfoNCE(ROWS), mined, weights="inclusion") == 0
    assert run(CountCorrectedInfoNCE(ROWS), BatchPlan.random(ROWS, BATCH, data_digest="")) == 0
    assert run(InfoNCE(), mined) == 0


@pytest.mark.parametrize(
    "make", [InfoNCE, lambda: SogCLR(ROWS), SigLIP, lambda: Matryoshka([InfoNCE(), InfoNCE()], [8, 4])]
)
def test_a_loss_without_the_cached_step_says_what_is_missing(make, tiny_model_folder, tmp_path):
    training, _ = one_trainer(tiny_model_folder, tmp_path, with_index(dataset()), lambda model: make())
    with pytest.raises(
        AnybatchError, match=r"A loss got list; expected embeddings.*loss=CachedLoss\(model, loss\)|A loss got list and"
    ):
        training.train()


SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.integrations.test_trainer import BATCH, arguments, trainer
seen = []
ranks = int(os.environ.get("WORLD_SIZE", 1))
training, loss = trainer(Path(sys.argv[1]), Path(sys.argv[2]), seen=seen, world_size=ranks)
training.train()
rank = os.environ.get("RANK", "0")
from safetensors.torch import save_file

# The one-line Trainer, with all that it adds.
from anybatch import Trainer
from tests.integrations.test_one_line import load, with_duplicates
settings = {"per_device_train_batch_size": BATCH // ranks, "ddp_backend": "gloo" if ranks > 1 else None}
line = Trainer(load(sys.argv[1]), arguments(sys.argv[2], learning_rate=1e-3, **settings), with_duplicates())
line.train()
models = [one.accelerator.unwrap_model(one.model) for one in (training, line)]
parts = ("model", models[0]), ("loss", loss.loss), ("line_model", models[1]), ("line_loss", line.loss.loss)
for name, part in parts:
    state = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    save_file(state, f"{sys.argv[2]}/{name}-{rank}.safetensors")
Path(f"{sys.argv[2]}/seen-{rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.distributed
def test_two_processes_equal_one(tiny_model_folder, tmp_path):
    root = Path(__file__).parent.parent.parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}",
    }
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [*command, str(script), str(tiny_model_folder), str(tmp_path / name)],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / "two" / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((tmp_path / "one" / "seen-0.json").read_text())
    assert [a[1] + b[1] for a, b in zip(*ranks, strict=True)] == [rows for _, rows in alone]
    for part in ("model", "loss", "line_model", "line_loss"):
        expected = load_file(tmp_path / "one" / f"{part}-0.safetensors")
        for rank in (0, 1):
            state = load_file(tmp_path / "two" / f"{part}-{rank}.safetensors")
            for name, value in expected.items():
                torch.testing.assert_close(
                    state[name], value, rtol=2e-4, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
                )
