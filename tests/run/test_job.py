"""Parts of a run that are no verb of their own. The run's folder: one writer, nothing left by a failed start, nothing
taken on trust from what an earlier command left.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from anybatch.cli.options import resumed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import CONTENTS, SEAL, read_json, write_json
from anybatch.insight.plan_figures import plan_sentence, stored_warnings
from anybatch.integrations.sentence_transformers import last_whole_checkpoint
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig, MiningReport, mine_plan
from anybatch.plans.plan import BatchPlan
from anybatch.run import job
from anybatch.run.config import DataConfig, EvaluationConfig, RunConfig, TeacherConfig, read_config
from anybatch.run.folder import open_run
from anybatch.run.make_plan import decision, existing_plan, make_plan
from anybatch.run.read_data import read_training_pairs
from anybatch.run.recipe import with_recipe
from anybatch.run.teacher import read_embeddings
from tests.ranks import on_ranks

MARK = SEAL.rstrip("0").encode()
MINED = MiningConfig(method="anybatch", cluster_size=4, window=(1, 6))


@pytest.fixture
def config(pairs_file, tiny_model_folder, tmp_path):
    return RunConfig(
        output=str(tmp_path / "out" / "run"),
        data=DataConfig(path=str(pairs_file)),
        model=ModelConfig(name=str(tiny_model_folder), device="cpu"),
        batch_size=8,
        mining=MiningConfig(method="random"),
        train=TrainConfig(save_steps=1, mini_batch_size=4, args={"max_steps": 2, "logging_steps": 1}),
        evaluation=EvaluationConfig(path=str(pairs_file)),
    )


def save_embeddings(folder: Path, seed: int = 0, rows: int = 97) -> TeacherConfig:
    paths = [str(folder / f"{side}.npy") for side in ("anchors", "positives")]
    for number, path in enumerate(paths):
        np.save(path, np.random.default_rng([seed, number]).normal(size=(rows, 8)).astype(np.float32))
    return TeacherConfig(embeddings=(paths[0], paths[1]))


def save_good_embeddings(folder: Path) -> TeacherConfig:
    """Of a teacher that knows the pairs: topics of four rows."""
    random = np.random.default_rng(0)
    anchors = np.repeat(random.normal(size=(25, 16)), 4, axis=0)[:97] + 0.5 * random.normal(size=(97, 16))
    paths = [str(folder / f"{side}.npy") for side in ("anchors", "positives")]
    for path, side in zip(paths, (anchors, anchors + 0.1 * random.normal(size=anchors.shape)), strict=True):
        np.save(path, side.astype(np.float32))
    return TeacherConfig(embeddings=(paths[0], paths[1]))


def mine(config: RunConfig, *, resume: bool = False) -> BatchPlan:
    pairs = read_training_pairs(config)
    plan = existing_plan(config)
    config = with_recipe(config, pairs, plan, pretrained=True)
    with open_run(config, resume=resume):
        return make_plan(config, pairs, plan=plan)


class TestAuto:
    """With a teacher and no method named the mined plan's own figures decide on the batches."""

    AUTO = MiningConfig(cluster_size=4, window=(0, 6))

    def test_random_batches_where_a_figure_is_not_good(self, config, tmp_path, caplog):
        caplog.set_level("INFO", "anybatch")
        auto = replace(config, mining=self.AUTO, teacher=save_embeddings(tmp_path))
        job.train(auto)
        folder = Path(auto.output)
        plan, told = BatchPlan.load(folder / "plan.safetensors"), read_json(folder / "mining.json", "", "plan")
        # 1. One message, which the folder and the model card keep; no warning of batches that are not used.
        why = told["decision"]
        assert "takes random batches" in why
        assert re.search(r"own positive first \d\.\d% \(good: 40% or more\)", why)
        assert caplog.text.count(why) == 1
        assert "Taken: loss.name=count_corrected (recommended), mining.method=random (recommended)." in caplog.text
        assert "Before you train" not in caplog.text
        assert (told["plan"], told["warnings"], plan.meta["decision"]) == (plan.digest, [], why)
        card = (folder / "model" / "README.md").read_text(encoding="utf-8")
        assert "mining.method=random (recommended)" in card
        assert "own positive first" in card
        assert why in plan_sentence(plan)  # of `anybatch inspect plan`
        # 2. The batches and the model are those of a run with random ones.
        random = replace(config, output=str(tmp_path / "random"))
        job.train(random)
        assert BatchPlan.load(tmp_path / "random" / "plan.safetensors").digest == plan.digest
        weights = [load_file(path / "model" / "model.safetensors") for path in (folder, tmp_path / "random")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
        # 3. Resumed before and after the plan was kept, the decision is the same.
        (folder / "metrics.json").unlink()
        job.train(auto, resume=True)
        assert caplog.text.count(why) == 2
        kept = read_config(folder)  # "auto" still
        job.train(replace(kept, output=str(tmp_path / "again")))
        again = BatchPlan.load(tmp_path / "again" / "plan.safetensors")
        assert (again.digest, again.meta["decision"]) == (plan.digest, why)
        # 4. A method that is named is kept, and warned of.
        named = replace(auto, output=str(tmp_path / "named"), mining=replace(self.AUTO, method="anybatch"))
        assert mine(named).cluster_size == 4
        assert "Before you train: The teacher finds the own positive first" in caplog.text

    def test_mined_batches_where_all_are_good(self, config, tmp_path, caplog):
        caplog.set_level("INFO", "anybatch")
        auto = replace(config, mining=self.AUTO, teacher=save_good_embeddings(tmp_path))
        job.train(auto)
        plan = BatchPlan.load(Path(auto.output) / "plan.safetensors")
        assert "takes the mined batches, whose figures are all good" in plan.meta["decision"]
        assert plan.meta["decision"] in caplog.text
        assert "Taken: loss.name=infonce (recommended), mining.method=anybatch (recommended)." in caplog.text
        named = replace(auto, output=str(tmp_path / "named"), mining=replace(self.AUTO, method="anybatch"))
        job.train(named)
        folders = (Path(auto.output), tmp_path / "named")
        weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    @pytest.mark.parametrize("good", [False, True])
    def test_ranks_decide_as_one_process_does(self, config, tmp_path, good):
        auto = replace(config, mining=self.AUTO, teacher=(save_good_embeddings if good else save_embeddings)(tmp_path))
        plan = mine(auto)
        assert (plan.cluster_size > 1) == good
        shared = replace(auto, output=str(tmp_path / "ranks"))
        assert on_ranks(_mined_by_rank, 2, shared) == [(plan.digest, plan.meta["decision"])] * 2


def _mined_by_rank(rank: int, world_size: int, config: RunConfig) -> tuple[str, str]:
    plan = mine(config)
    return plan.digest, plan.meta["decision"]


def test_one_bad_figure_of_one_data_set_is_enough():
    good = {"own_first": 0.4, "suspects": 1.0, "masked": 1 / 3, "gain": 3.0}
    reports = {"": MiningReport(), "a": MiningReport(figures=good), "b": MiningReport(figures=good)}
    assert decision(reports)[0]
    for name, value in {"own_first": 0.39, "suspects": 1.1, "masked": 0.34, "gain": 2.9}.items():
        taken, why = decision({**reports, "b": MiningReport(figures={**good, name: value})})
        assert not taken
        assert re.search(r"not good: b: [^;]*\. Good are: a: own positive first 40\.0%", why)
    assert not decision({"": MiningReport()})[0]


class TestOneWriter:
    @pytest.mark.parametrize("resume", [False, True])
    def test_a_second_one_in_this_process(self, config, resume):
        with open_run(config) as folder:
            with pytest.raises(AnybatchError, match=rf"in use: process {os.getpid()} on .*another output"):
                job.train(config, resume=resume)
            with pytest.raises(AnybatchError, match="in use"):
                mine(config, resume=resume)
            assert {path.name for path in folder.iterdir()} == {"config.yaml", ".lock"}
        mine(config)  # nothing was done in it, so that nothing is lost
        assert not (folder / ".lock").exists()

    def test_a_killed_one_holds_nothing(self, config):
        child = os.fork()
        if child == 0:
            with open_run(config):
                time.sleep(60)
            os._exit(0)
        lock = Path(config.output) / ".lock"
        while not (lock.exists() and lock.read_text()):
            time.sleep(0.01)
        with pytest.raises(AnybatchError, match=f"in use: process {child}"):
            mine(config, resume=True)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        mine(config, resume=True)


class TestFailedStart:
    def bad(self, config, tmp_path):
        """What is wrong, by name, and what the message says."""
        other = BatchPlan.random(97, 8, data_digest="of other data")
        other.save(tmp_path / "other.safetensors")
        BatchPlan.random(97, 16).save(tmp_path / "batch.safetensors")
        (tmp_path / "none.safetensors").write_bytes(b"no plan")
        vectors = tmp_path / "vectors"
        vectors.mkdir()
        nan = save_embeddings(vectors)
        good = nan.embeddings[1]
        broken = np.load(nan.embeddings[0])
        broken[5] = np.nan
        np.save(tmp_path / "nan.npy", broken)
        short = tmp_path / "short"
        short.mkdir()
        return {
            "needs a teacher": {"mining": MINED},
            "'anybatch', and mining.num_negatives 2, which needs a teacher": {"mining": MiningConfig(num_negatives=2)},
            "Cannot load the model": {"mining": MINED, "teacher": TeacherConfig(name=str(tmp_path / "absent"))},
            "expected floats of shape": {"mining": MINED, "teacher": save_embeddings(short, rows=50)},
            "anchor.*5": {"mining": MINED, "teacher": replace(nan, embeddings=(str(tmp_path / "nan.npy"), good))},
            "other data": {"plan": str(tmp_path / "other.safetensors")},
            "batches of 16|other data": {"plan": str(tmp_path / "batch.safetensors")},
            "is damaged": {"plan": str(tmp_path / "none.safetensors")},
            "no plan at": {"plan": str(tmp_path / "absent.safetensors")},
            "absent.jsonl": {"evaluation": EvaluationConfig(path=str(tmp_path / "absent.jsonl"))},
        }

    @pytest.mark.parametrize("verb", ["train", "mine"])
    @pytest.mark.parametrize("folder", ["absent", "empty"])
    def test_leaves_the_folder_to_the_next(self, config, tmp_path, verb, folder):
        out = Path(config.output)
        if folder == "empty":
            out.mkdir(parents=True)
        for match, changes in self.bad(config, tmp_path).items():
            if verb == "mine" and "evaluation" in changes:
                continue
            with pytest.raises(AnybatchError, match=match):
                {"train": job.train, "mine": mine}[verb](replace(config, **changes))
            assert out.exists() == (folder == "empty"), match
            assert out.parent.exists() == (folder == "empty"), "what was made on the way goes as well"
            assert folder == "absent" or not list(out.iterdir())
        {"train": job.train, "mine": mine}[verb](config)

    def test_settings_that_nothing_would_read(self, config):
        with pytest.raises(AnybatchError, match=r"train\.eval_steps is 5, and there is no held-out data"):
            replace(config, evaluation=EvaluationConfig(path=None), train=TrainConfig(eval_steps=5))
        for setting in ({"name": "m"}, {"max_length": 9}, {"anchor_prompt": ""}, {"precision": "float16"}):
            with pytest.raises(AnybatchError, match=rf"teacher\.{next(iter(setting))} .*teacher\.embeddings are given"):
                TeacherConfig(embeddings=("a.npy", "p.npy"), **setting)

    def test_what_caching_refuses_is_refused_before_mining(self, config, tiny_model_folder, tmp_path, monkeypatch):
        model = SentenceTransformer(str(tiny_model_folder), device="cpu")
        model[0].model.embeddings.LayerNorm = torch.nn.Sequential(
            torch.nn.LayerNorm(32), Rows(torch.nn.BatchNorm1d(32))
        )
        monkeypatch.setattr(job, "load_model", lambda config: model)
        monkeypatch.setattr(job, "make_plan", lambda *_: pytest.fail("mined"))
        with pytest.raises(AnybatchError, match="BatchNorm"):
            job.train(config)
        assert not Path(config.output).exists()

    def test_the_trial_leaves_no_trace(self, config, monkeypatch):
        trained = []
        for name in ("tried", "plain"):
            torch.manual_seed(0)
            if name == "plain":
                monkeypatch.setattr(job, "try_step", lambda *_: None)
            settings = replace(config, output=str(Path(config.output) / name), loss=LossConfig(name="sogclr"))
            job.train(settings)
            trained.append((Path(settings.output) / "model" / "model.safetensors").read_bytes())
        assert trained[0] == trained[1]

    def test_a_folder_with_other_things_is_left_alone(self, config):
        out = Path(config.output)
        out.mkdir(parents=True)
        (out / "thesis.txt").write_text("years of work")
        with pytest.raises(AnybatchError, match="not empty"):
            mine(config)
        assert [path.name for path in out.iterdir()] == ["thesis.txt"]


class TestStalePlans:
    def test_changed_embeddings(self, config, tmp_path):
        config = replace(config, mining=MINED, teacher=save_embeddings(tmp_path))
        plan = mine(config)
        assert mine(config, resume=True).digest == plan.digest
        save_embeddings(tmp_path, seed=1)
        for again in (mine, job.train):
            with pytest.raises(AnybatchError, match=r"teacher\.embeddings changed"):
                again(config, resume=True)
        save_embeddings(tmp_path)
        assert mine(config, resume=True).digest == plan.digest

    def test_a_changed_teacher(self, config, tiny_model_folder, tmp_path, caplog):
        teacher = tmp_path / "teacher"
        shutil.copytree(tiny_model_folder, teacher)
        config = replace(config, mining=MINED, teacher=TeacherConfig(name=str(teacher)))
        plan = mine(config)
        model = SentenceTransformer(str(teacher), device="cpu")
        with torch.no_grad():
            model[0].model.embeddings.word_embeddings.weight.add_(1.0)
        model.save_pretrained(str(teacher))
        with pytest.raises(AnybatchError, match=r"teacher\.name changed"):
            mine(config, resume=True)
        shutil.rmtree(teacher)  # what is gone has not changed: a run needs its teacher no more
        assert mine(config, resume=True).digest == plan.digest
        assert "teacher.name is gone" in caplog.text

    @pytest.mark.parametrize("mining", [MINED, MiningConfig(method="random")])
    def test_the_plan_of_another_run(self, config, tmp_path, mining):
        config = replace(config, mining=mining, teacher=save_embeddings(tmp_path))
        mine(config)
        other = replace(config, output=str(tmp_path / "other"), seed=5)
        mine(other)
        shutil.copy(tmp_path / "other" / "plan.safetensors", Path(config.output) / "plan.safetensors")
        with pytest.raises(AnybatchError, match="other inputs than the run has now: the settings"):
            mine(config, resume=True)


class TestStaleFigures:
    @pytest.mark.parametrize("what", ["the weights of model.name", "the held-out data"])
    def test_what_the_run_began_with_was_changed(self, config, tiny_model_folder, pairs_file, tmp_path, what):
        """The figures before training are measured once; they would stand beside those of another model, or of other
        pairs.
        """
        own, held_out = tmp_path / "model", tmp_path / "held out.jsonl"
        shutil.copytree(tiny_model_folder, own)
        held_out.write_text("".join(pairs_file.read_text().splitlines(True)[:20]))
        config = replace(
            config, model=ModelConfig(name=str(own), device="cpu"), evaluation=EvaluationConfig(path=str(held_out))
        )
        job.train(config)
        (Path(config.output) / "metrics.json").unlink()
        if what == "the held-out data":
            held_out.write_text("".join(pairs_file.read_text().splitlines(True)[20:40]))
        else:
            model = SentenceTransformer(str(own), device="cpu")
            with torch.no_grad():
                model[0].model.embeddings.word_embeddings.weight.mul_(2.0)
            model.save_pretrained(str(own))
        with pytest.raises(AnybatchError, match=rf"{what} changed since. Put back"):
            job.train(config, resume=True)

    def test_weights_that_the_files_lack_are_drawn_alike(self, config, tiny_model_folder, tmp_path):
        """A checkpoint without a pooler is no other model at every load."""
        own = tmp_path / "model"
        shutil.copytree(tiny_model_folder, own)
        weights = load_file(own / "model.safetensors")
        save_file(
            {name: tensor for name, tensor in weights.items() if "pooler" not in name},
            own / "model.safetensors",
            metadata={"format": "pt"},
        )
        config = replace(
            config, model=ModelConfig(name=str(own), device="cpu"), mining=MINED, teacher=TeacherConfig(name=str(own))
        )
        job.train(config)
        model = load_model(config.model)
        torch.manual_seed(5)
        torch.testing.assert_close(load_model(config.model).state_dict(), model.state_dict(), rtol=0, atol=0)
        for name in ("metrics.json", "plan.safetensors"):
            (Path(config.output) / name).unlink()
        job.train(config, resume=True)


class TestFiles:
    def test_what_file_managers_leave(self, config):
        out = Path(config.output)
        out.mkdir(parents=True)
        for name in (".DS_Store", "desktop.ini", "Thumbs.db"):
            (out / name).write_text("")
        digest = mine(config).digest
        assert mine(config, resume=True).digest == digest
        with pytest.raises(AnybatchError, match="already holds a run"):
            mine(config)

    def test_checkpoints_without_lists_are_not_deleted(self, config):
        """A kill cuts one short; lists that are gone from several were lost otherwise, and days of work with them."""
        job.train(config)
        out = Path(config.output)
        (out / "metrics.json").unlink()
        checkpoints = sorted((out / "checkpoints").iterdir())
        for path in checkpoints:
            (path / CONTENTS).unlink()
        with pytest.raises(AnybatchError, match=r"checkpoint-2 was cut short.*checkpoint-1 was cut short"):
            job.train(config, resume=True)
        assert sorted((out / "checkpoints").iterdir()) == checkpoints


class TestDamage:
    @pytest.mark.parametrize("name", ["config.yaml", "plan.safetensors", "metrics_untrained.json", "metrics.json"])
    @pytest.mark.parametrize("how", ["flipped", "empty", "of another run"])
    def test_records_of_a_run(self, config, tmp_path, name, how):
        job.train(config)
        folder = Path(config.output)
        if name != "metrics.json":
            (folder / "metrics.json").unlink()
        path = folder / name
        content = path.read_bytes()
        middle = content.index(b"anybatch-digest:") + 20
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if how == "of another run":
            other = replace(config, output=str(tmp_path / "other"), seed=7)
            job.train(other)
            changed = (tmp_path / "other" / name).read_bytes()
        path.write_bytes({"flipped": changed, "empty": b"", "of another run": changed}[how])
        wanted = "damaged" if how != "of another run" else "another run|another configuration|other inputs"
        with pytest.raises(AnybatchError, match=wanted):
            job.train(config, resume=True)
        path.write_bytes(content)
        job.train(config, resume=True)

    def test_a_whole_file_of_another_kind(self, config):
        """Every sealed file of a run in the place of every other."""
        job.train(config)
        folder = Path(config.output)
        write_json(folder / "mining.json", {"plan": "", "figures": {}})
        sealed = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and MARK in path.read_bytes()}
        assert {"metrics.json", "metrics_untrained.json", "config.yaml", "plan.safetensors", CONTENTS} <= {
            path.name for path in sealed
        }
        readers = {
            "metrics.json": lambda: job.train(config, resume=True),
            "metrics_untrained.json": lambda: unfinished(config),
            "plan.safetensors": lambda: BatchPlan.load(folder / "plan.safetensors"),
            "config.yaml": lambda: resumed(config.output),
            "mining.json": lambda: stored_warnings(folder, BatchPlan.load(folder / "plan.safetensors")),
            CONTENTS: lambda: load_model(ModelConfig(name=str(folder / "model"))),
        }

        def unfinished(config: RunConfig) -> None:
            (folder / "metrics.json").unlink()
            job.train(config, resume=True)

        for path in sealed:
            if path.parent.name.startswith("checkpoint-"):
                continue
            for other in {name.name: found for name, found in sealed.items() if name.name != path.name}.values():
                path.write_bytes(other)
                with pytest.raises(AnybatchError):
                    readers[path.name]()
                for name, kept in sealed.items():
                    name.write_bytes(kept)

    def test_a_configuration_changed_by_hand_is_not_resumed(self, config):
        mine(config)
        path = Path(config.output) / "config.yaml"
        path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 3"))
        with pytest.raises(AnybatchError, match="start another run, with --config"):
            resumed(config.output)

    def test_teacher_embeddings(self, config, tiny_model_folder):
        config = replace(config, mining=MINED, teacher=TeacherConfig(name=str(tiny_model_folder)))
        plan = mine(config)
        folder = Path(config.output)
        (folder / "plan.safetensors").unlink()
        path = folder / "teacher_positive.npy"
        content = bytearray(path.read_bytes())
        content[-10] ^= 1
        path.write_bytes(content)
        with pytest.raises(AnybatchError, match=r"teacher_positive\.npy is damaged.*Delete"):
            mine(config, resume=True)
        with pytest.raises(AnybatchError, match=r"teacher_positive\.npy is damaged"):
            read_embeddings(str(path), 97)
        path.unlink()
        assert mine(config, resume=True).digest == plan.digest

    def test_saved_models(self, config):
        job.train(config)
        folder = Path(config.output) / "model"
        model = load_model(ModelConfig(name=str(folder)))
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-10] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(AnybatchError, match=rf"damaged in model\.safetensors.*delete {CONTENTS}"):
            load_model(ModelConfig(name=str(folder)))
        content[-10] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        (folder / "README.md").write_text("What this model is for.")  # its owner's to write
        (folder / "picture.png").write_bytes(b"added")
        load_model(ModelConfig(name=str(folder)))
        model.save_pretrained(str(folder))  # somebody else's change, as the message says
        (folder / CONTENTS).unlink()
        load_model(ModelConfig(name=str(folder)))


class Rows(torch.nn.Module):
    """A layer for (rows, features) on (batch, length, features)."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, 1)).view_as(x)


VECTORS = np.random.default_rng(0).normal(size=(24, 8))


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_embeddings_of_any_float_and_byte_order(tmp_path, kind, order):
    values = np.asarray(VECTORS, dtype=kind, order=order)
    np.save(tmp_path / "e.npy", values)
    got = read_embeddings(str(tmp_path / "e.npy"), 24)
    assert got.dtype.isnative
    assert got.dtype.itemsize <= 8
    np.testing.assert_array_equal(got, values.astype(got.dtype))
    config = MiningConfig(cluster_size=4, window=(1, 6), batch_size=8)
    plan = mine_plan(got, got, config=config, anchor_id=np.arange(24), positive_id=np.arange(24)).plan
    plain = values.astype(np.float32)
    assert (
        plan.digest
        == mine_plan(plain, plain, config=config, anchor_id=np.arange(24), positive_id=np.arange(24)).plan.digest
    )


def _saved(array, **options):
    return lambda path: np.save(path, array, **options)


@pytest.mark.parametrize(
    ("save", "match"),
    [
        (_saved((VECTORS * 20).astype(np.int8)), "int8 array.*expected floats.*Quantised"),
        (_saved(np.packbits(VECTORS > 0, axis=1)), "uint8 array.*Quantised"),
        (_saved(VECTORS > 0), "bool array.*expected floats"),
        (_saved(VECTORS.astype(complex)), "complex128 array.*expected floats"),
        (_saved(VECTORS.astype(object), allow_pickle=True), "Cannot read the embeddings"),
        (
            _saved(VECTORS.astype("f4").view("V2")),
            r"expected floats of shape \(24, dimensions\)",
        ),  # as bfloat16 is saved
        (_saved(VECTORS[:-1]), r"shape \(23, 8\); expected floats of shape \(24, dimensions\)"),
        (_saved(VECTORS[:, 0]), r"shape \(24,\)"),
        (_saved(VECTORS[:, :, None]), r"shape \(24, 8, 1\)"),
        (
            lambda path: (
                path.with_suffix(".npz").rename(path) if np.savez(path.with_suffix(""), VECTORS) is None else None
            ),
            r"several arrays \(\.npz\)",
        ),
        (lambda path: path.write_bytes(b""), "Cannot read the embeddings"),
        (lambda path: path.write_text("no array"), "Cannot read the embeddings"),
        (lambda path: path.mkdir(), "Cannot read the embeddings"),
        (lambda path: None, "Cannot read the embeddings"),
    ],
)
def test_files_that_are_no_embeddings_of_the_data(tmp_path, save, match):
    path = tmp_path / "e.npy"
    save(path)
    with pytest.raises(AnybatchError, match=match):
        read_embeddings(str(path), 24)


def test_what_a_loss_draws_at_its_start_follows_the_seed_of_the_run(config, tmp_path):
    """TempNet's network: the same in two runs, and so on every rank, whatever was drawn before."""
    states = []
    for number in range(2):
        torch.manual_seed(number)
        output = tmp_path / str(number)
        job.train(replace(config, output=str(output), loss=LossConfig(name="tempnet", dimensions=32)))
        checkpoint = last_whole_checkpoint(output / "checkpoints")
        states.append(load_file(checkpoint / "anybatch_loss.safetensors"))
    assert any("net" in name for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name].nan_to_num(-9), states[1][name].nan_to_num(-9)) for name in states[0])
