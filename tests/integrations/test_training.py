"""`train_model`: what it leaves in its folder, and what it does with what it finds there."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from anybatch.caching.state import untouched
from anybatch.core.errors import AnybatchError
from anybatch.core.files import CARD, CONTENTS, seal_folder
from anybatch.family import FastCLIP
from anybatch.integrations.sentence_transformers import CachedLoss, TrainConfig, last_whole_checkpoint, train_model
from anybatch.integrations.sentence_transformers import callback as callback_module
from anybatch.integrations.sentence_transformers.recorder import Recorder
from anybatch.integrations.sentence_transformers.trainer import Trainer
from anybatch.integrations.sentence_transformers.training import _is_write_failure
from anybatch.losses import InfoNCE, SogCLR
from anybatch.plans.plan import BatchPlan

from ..conftest import sentence

ROWS = 24
PLAN = BatchPlan.random(ROWS, 8, seed=1, data_digest="")
DATA = {
    "anchor": [sentence(row, 2 + row % 5) for row in range(ROWS)],
    "positive": [sentence(row + 50, 3 + row % 7) for row in range(ROWS)],
}


def train(folder, output, *, loss=None, resume=False, evaluate=None, run="", callbacks=(), **settings):
    """Train three steps (or as `settings` say); returns the result, the model and the loss."""
    torch.manual_seed(0)
    model = SentenceTransformer(str(folder), device="cpu")
    cached = CachedLoss(model, SogCLR(ROWS) if loss is None else loss, mini_batch_size=8)
    ours = {name: settings.pop(name) for name in TrainConfig.__dataclass_fields__ if name in settings}
    config = TrainConfig(**{"learning_rate": 1e-3, "save_steps": 2, "args": {"logging_steps": 2, **settings}, **ours})
    result = train_model(
        model,
        cached,
        Dataset.from_dict(DATA),
        PLAN,
        config,
        output=output,
        resume=resume,
        evaluate=evaluate,
        run=run,
        callbacks=callbacks,
    )
    return result, model, cached


def test_a_folder_with_checkpoints_or_a_log_is_left_alone_without_resume(tiny_model_folder, tmp_path):
    train(tiny_model_folder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(AnybatchError, match="already holds checkpoints or a log"):
        train(tiny_model_folder, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert any("checkpoint-2" in str(path) for path in before)


def test_resuming_deletes_only_what_was_cut_short(tiny_model_folder, tmp_path):
    train(tiny_model_folder, tmp_path)
    checkpoints = tmp_path / "checkpoints"
    for name in ("checkpoint-best", "checkpoint-9"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "something").write_text("x")
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    result, _, _ = train(tiny_model_folder, tmp_path, resume=True, epochs=2)
    assert (checkpoints / "checkpoint-best" / "something").read_text() == "x"
    assert not (checkpoints / "checkpoint-9").exists()
    assert [line["step"] for line in result.log] == [2, 3, 4, 6], "the third was the last one of the first session"
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == result.log


class Interrupt(TrainerCallback):
    """Ctrl-C in a step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "settings",
    [{"logging_steps": 4}, {"logging_strategy": "epoch"}, {"load_best_model_at_end": True, "save_total_limit": 1}],
)
def test_a_run_that_was_stopped_has_the_log_of_one_that_was_not(settings, request, tiny_model_folder, tmp_path):
    """A line is a mean over steps before the stop too; the end of the Trainer deletes no checkpoint of the stop."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    settings |= {"epochs": 4, "eval_steps": 4, "save_steps": 100}

    def total(model):  # falls or rises, but is never the same twice
        return {"ndcg@10": sum(values.double().sum().item() for values in model.parameters())}

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, model, _ = train(tiny_model_folder, tmp_path / "whole", evaluate=total, **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model_folder, tmp_path / "stopped", evaluate=total, callbacks=[Interrupt(6)], **settings)
    assert last_whole_checkpoint(tmp_path / "stopped" / "checkpoints").name == "checkpoint-6"
    resumed, again, _ = train(tiny_model_folder, tmp_path / "stopped", evaluate=total, resume=True, **settings)
    assert resumed.log == whole.log
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_another_number_of_ranks_or_threads_is_said_aloud(tiny_model_folder, tmp_path, caplog):
    """Generators of ranks that were not there cannot be brought back: dropout is another than without the break."""
    train(tiny_model_folder, tmp_path)
    assert "was saved" not in caplog.text
    newest = tmp_path / "checkpoints" / "checkpoint-3"
    for rank in range(2):
        shutil.copy(newest / "rng_state.pth", newest / f"rng_state_{rank}.pth")
    (newest / "rng_state.pth").unlink()
    (newest / CONTENTS).unlink()
    seal_folder(newest, run="", threads=torch.get_num_threads() + 1)
    assert "threads" not in caplog.text
    train(tiny_model_folder, tmp_path, resume=True, epochs=2)
    assert "checkpoint-3 was saved by 2 processes, and 1 go on" in caplog.text
    threads = torch.get_num_threads()
    assert f"checkpoint-3 was saved with {threads + 1} threads, and {threads} go on" in caplog.text


def test_only_the_first_rank_writes_the_log_and_its_lines_come_back_from_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "epoch": 0.1 * step, "loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ep')
    before = path.read_text()
    first = Recorder(path)
    first.lines = lines[:2]
    state = SimpleNamespace(global_step=2, max_steps=3, epoch=0.2, is_world_process_zero=False)
    state.stateful_callbacks = {"Recorder": json.loads(json.dumps(first.state()))}
    other = Recorder(path)
    other.on_train_begin(None, state, None)
    other.on_log(None, state, None, logs={"loss": 1.0})
    assert path.read_text() == before
    state.is_world_process_zero = True
    again = Recorder(path)
    again.on_train_begin(None, state, None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2] == again.lines


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flipped": flipped, "cut": content[:-1], "empty": b""}[how])


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "gone"])
def test_any_damaged_file_of_a_checkpoint_is_named_and_the_one_before_is_used(tiny_model_folder, tmp_path, caplog, how):
    _, whole, _ = train(tiny_model_folder, tmp_path)
    checkpoints = tmp_path / "checkpoints"
    kept = tmp_path / "kept"
    shutil.copytree(checkpoints / "checkpoint-3", kept)
    names = [path.relative_to(kept) for path in files_of(kept)]
    wanted = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert wanted | {"anybatch_loss.safetensors", "anybatch_contents.json"} <= {str(name) for name in names}
    damage(checkpoints / "checkpoint-3" / CARD, how)  # a page for readers
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    for name in names:
        if name.name == CARD:
            continue
        caplog.clear()
        damage(checkpoints / "checkpoint-3" / name, how)
        assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
        assert f"{name}" in caplog.text
        assert "from checkpoint-2" in caplog.text
        shutil.copy(kept / name, checkpoints / "checkpoint-3" / name)
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    damage(checkpoints / "checkpoint-3" / "optimizer.pt", how)
    _, again, _ = train(tiny_model_folder, tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    for step in (2, 3):
        damage(checkpoints / f"checkpoint-{step}" / "scheduler.pt", how)
    with pytest.raises(AnybatchError, match=r"No checkpoint in .* is whole: checkpoint-3 .*scheduler.*checkpoint-2"):
        train(tiny_model_folder, tmp_path, resume=True)


def test_a_resume_reads_its_checkpoint_once(tiny_model_folder, tmp_path, monkeypatch):
    train(tiny_model_folder, tmp_path)
    read, flaw_of = [], callback_module.flaw_of
    monkeypatch.setattr(
        callback_module, "flaw_of", lambda path, **given: read.append(path.name) or flaw_of(path, **given)
    )
    train(tiny_model_folder, tmp_path, resume=True, epochs=2)
    assert read == ["checkpoint-3"]


def test_a_checkpoint_of_another_run_is_not_resumed(tiny_model_folder, tmp_path, caplog):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train(tiny_model_folder, tmp_path / name, run=name, learning_rate=1e-3 if name == "one" else 1e-2)
    checkpoints = [tmp_path / name / "checkpoints" for name in ("one", "two")]
    shutil.rmtree(checkpoints[0] / "checkpoint-3")
    shutil.copytree(checkpoints[1] / "checkpoint-3", checkpoints[0] / "checkpoint-3")
    assert last_whole_checkpoint(checkpoints[0], run="one") == checkpoints[0] / "checkpoint-2"
    assert "checkpoint-3 belongs to another run" in caplog.text


def test_saved_weights_have_the_modes_of_other_files(tiny_model_folder, tmp_path):
    before = os.umask(0o027)
    try:
        train(tiny_model_folder, tmp_path)
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode & 0o777) for path in files_of(tmp_path / "checkpoints")}
    assert modes == {"0o640"}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the full device of Linux")
@pytest.mark.parametrize("size", [1, 1000, 10**6])
def test_a_full_disk_in_every_form_of_the_writer(size):
    """By how much of the file is in a buffer when the disk is full."""
    with pytest.raises(RuntimeError) as caught:
        torch.save(torch.zeros(size), "/dev/full")
    assert _is_write_failure(caught.value)


def test_a_file_that_cannot_be_read_is_no_full_disk(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"123456789012345")
    with pytest.raises(SafetensorError) as caught:
        load_file(path)
    assert not _is_write_failure(caught.value)


def test_an_untouched_model_shows_no_trace(tiny_model_folder):
    model = SentenceTransformer(str(tiny_model_folder), device="cpu").eval()
    model.register_buffer("count", torch.zeros(3))

    def state():
        drawn = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
        modes = [module.training for module in model.modules()]
        return [*drawn, modes, model.count.tolist(), [p.grad for p in model.parameters()]]

    before = state()
    first = model.count
    with untouched([model]):
        model.train()
        model.count += 1
        model.count = torch.ones(5)
        model.register_buffer("further", torch.ones(2))
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        model(model.preprocess(["mata"]))["sentence_embedding"].sum().backward()
        assert state() != before
    assert state() == before
    assert model.count is first
    assert "further" not in model.state_dict()


def test_a_checkpoint_is_declared_whole_after_all_ranks_have_written(tiny_model_folder, tmp_path, monkeypatch):
    """Every rank passes the barrier of on_save after its own rng_state; the file that says "whole" must come later."""
    whole = []

    def barrier():
        whole.append(len(list(tmp_path.glob(f"checkpoints/*/{CONTENTS}"))))

    monkeypatch.setattr(callback_module.distributed, "barrier", barrier)
    train(tiny_model_folder, tmp_path)
    assert whole == [0, 0, 1], "the barriers of the start, of checkpoint-2 and of checkpoint-3"


def test_weight_decay_leaves_the_temperature_alone(tiny_model_folder, tmp_path):
    temperatures, weights = [], []
    for decay in (0.0, 50.0):
        output = tmp_path / str(decay)
        output.mkdir()
        loss = InfoNCE(temperature=0.05, learnable_temperature=True)
        _, model, cached = train(
            tiny_model_folder, output, loss=loss, weight_decay=decay, max_steps=1, warmup_steps=0.0
        )
        temperatures.append(cached.loss.temperatures.log_temperature.item())
        weights.append(model[0].model.encoder.layer[0].output.dense.weight.norm().item())
    assert temperatures[0] == temperatures[1] != torch.tensor(0.05).log().item()
    assert weights[1] < 0.97 * weights[0], "the encoder does decay"


class Seen(TrainerCallback):
    """The temperature and its gradient before every step."""

    def __init__(self, loss):
        self.parameter, self.steps = loss.temperatures.log_temperature, []

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.steps.append((self.parameter.item(), self.parameter.grad.clone()))


@pytest.mark.parametrize("temperature", [0.07, 0.02])
def test_fastclips_temperature_has_its_published_rate(temperature, tiny_model_folder, tmp_path):
    """Constant while the encoder's has a schedule, a third of it at .03 and less: the steps of an AdamW of its own."""
    loss = FastCLIP(24, version="v3", temperature=temperature, temperature_range=(0.001, 1.0), temperature_lr=0.006)
    seen = Seen(loss)
    train(tiny_model_folder, tmp_path, loss=loss, callbacks=[seen], epochs=3, warmup_steps=0.5)
    twin = torch.nn.Parameter(torch.tensor(temperature).log())
    optimizer = torch.optim.AdamW([twin], lr=0.006 if temperature > 0.03 else 0.002, weight_decay=0.0)
    for value, gradient in seen.steps:
        assert value == pytest.approx(twin.item(), abs=1e-6)
        twin.grad = gradient
        optimizer.step()
    assert loss.temperatures.log_temperature.item() == pytest.approx(twin.item(), abs=1e-6)
    assert len(seen.steps) > 4
    assert abs(twin.item() - torch.tensor(temperature).log().item()) > 0.001


def trainer_of(folder, output, loss, **options):
    model = SentenceTransformer(str(folder), device="cpu")
    args = SentenceTransformerTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=8, learning_rate=0.5, max_steps=3, report_to="none",
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    return Trainer(model, args, Dataset.from_dict(DATA), loss=loss, **options)


@pytest.mark.parametrize("rate", [None, 0.006])
@pytest.mark.parametrize("kind", [torch.optim.SGD, "lars"])
def test_another_optimiser_trains_the_temperature_too(kind, rate, tiny_model_folder, tmp_path):
    """It had the encoder's parameters alone: a learned temperature stayed as it was, without a word."""
    loss = FastCLIP(24, version="v3", temperature=0.07, temperature_range=(0.001, 1.0), temperature_lr=rate)
    seen = Seen(loss)
    if kind == "lars":
        its = {"optimizer": "lars", "learning_rate": 0.5, "warmup_steps": 0.0}
        train(tiny_model_folder, tmp_path, loss=loss, callbacks=[seen], **its)
    else:
        choice = {"optimizer_cls_and_kwargs": (kind, {"lr": 0.5})}
        trainer_of(tiny_model_folder, tmp_path, loss, callbacks=[seen], **choice).train()
    values = [value for value, _ in seen.steps] + [loss.temperatures.log_temperature.item()]
    steps = [before - after for before, after in pairwise(values)]
    assert len(steps) == 3
    assert all(steps)
    if rate and kind != "lars":  # plain descent, at a constant rate
        assert steps == pytest.approx([rate * gradient.item() for _, gradient in seen.steps], rel=0.05)


def test_an_optimiser_made_without_the_temperature_is_refused(tiny_model_folder, tmp_path):
    for makes, message in (
        (lambda trainer: trainer.model.parameters(), r"does not have the loss's parameter .*log_temperature"),
        (lambda trainer: trainer.loss.parameters(), r"has a learning rate of its own .* a group of its own"),
    ):
        loss = FastCLIP(24, version="v3", temperature=0.07, temperature_lr=0.006)
        trainer = trainer_of(tiny_model_folder, tmp_path, loss)
        trainer.optimizer = torch.optim.SGD(makes(trainer), lr=0.1)
        with pytest.raises(AnybatchError, match=message):
            trainer.train()


def test_steps_of_evaluations_without_an_evaluation_are_refused(tiny_model_folder, tmp_path):
    with pytest.raises(AnybatchError, match=r"train\.eval_steps is 2; give something to evaluate"):
        train(tiny_model_folder, tmp_path, eval_steps=2)
    assert not list(tmp_path.iterdir())


def test_steps_and_seconds_are_those_of_training(tiny_model_folder, tmp_path):
    """Five steps, logged every second, and the last one as well."""

    def evaluate(model):
        time.sleep(0.2)
        return {"figure": 1.0}

    started = time.perf_counter()
    result, _, _ = train(tiny_model_folder, tmp_path, evaluate=evaluate, epochs=2, max_steps=5, eval_steps=2)
    assert result.num_steps == 5
    assert [line["step"] for line in result.log if "loss" in line] == [2, 4, 5]
    assert 0 < result.train_seconds <= time.perf_counter() - started - 0.4  # two evaluations are not training


@pytest.mark.parametrize("limit", [{"max_steps": 2}, {"max_steps": 4, "epochs": 2}, {"epochs": 1}])
def test_a_training_that_is_done_trains_no_more(tiny_model_folder, tmp_path, limit):
    """Resumed from the checkpoint of its last step, in the middle of an epoch (of three steps) or at its end."""
    result, model, cached = train(tiny_model_folder, tmp_path, **limit)
    log, steps = (
        (tmp_path / "log.jsonl").read_text(),
        sorted(path.name for path in (tmp_path / "checkpoints").iterdir()),
    )
    again, resumed, its_loss = train(tiny_model_folder, tmp_path, resume=True, **limit)
    assert (again.num_steps, again.log) == (result.num_steps, result.log)
    assert (tmp_path / "log.jsonl").read_text() == log
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == steps
    for one, other in ((model, resumed), (cached.loss, its_loss.loss)):
        for name, value in one.state_dict().items():
            assert torch.equal(value.nan_to_num(0.5), other.state_dict()[name].nan_to_num(0.5)), name
