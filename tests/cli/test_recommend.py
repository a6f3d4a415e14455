"""`anybatch recommend`: its recipe is that of `anybatch train`, its command runs, what speaks against it is said."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from anybatch.core.errors import AnybatchError
from anybatch.core.yaml_files import load_config
from anybatch.data.pairs import PairData
from anybatch.insight import recommend, sample
from anybatch.insight.cost import StepCost
from anybatch.mining import MiningConfig
from anybatch.run.config import DataConfig, ModelConfig, RunConfig
from anybatch.run.recipe import recipe
from tests.images import save_clip, save_pairs

from .test_cli import run


def recommended(tmp_path, *arguments):
    """What is written for programs."""
    file = tmp_path / "found.json"
    run("recommend", *map(str, arguments), "--seconds", "4", "--json", str(file))
    return json.loads(file.read_text())


def test_the_command_runs_with_the_recommended_recipe(pairs_file, tiny_model_folder, tmp_path, heard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["--data", pairs_file, "--model", tiny_model_folder, "--device", "cpu", "--set", "train.save_steps=90"]
    found = recommended(tmp_path, *asked)
    words = shlex.split(found["command"])
    assert words[:2] == ["anybatch", "train"]
    assert found["command"] in heard()
    assert not (tmp_path / "unused").exists()  # nothing is kept
    run(*words[1:])
    config = load_config(RunConfig, tmp_path / "runs" / pairs_file.stem / "config.yaml")
    chosen = {choice["name"]: choice["value"] for choice in found["choices"]}
    assert chosen == {
        "batch_size": "8",  # an eighth of 97 rows at most
        "mining.method": "random",
        "loss.name": "count_corrected",
        "loss.temperature": "0.05",
        "train.learning_rate": "5e-05",
    }
    assert "--learning-rate 5e-05" in found["command"]
    settled, _ = recipe(config, PairData(anchors=["a"], positives=["b"]), pretrained=True)
    assert (settled.batch_size, settled.loss.name, settled.mining.method) == (8, "count_corrected", "random")
    steps = json.loads((tmp_path / "runs" / pairs_file.stem / "metrics.json").read_text())["num_steps"]
    assert found["num_steps"] == steps == 97 // 8
    assert found["run_seconds"] >= steps * found["step_seconds"] > 0
    names = {figure["name"] for figure in found["figures"]}
    assert {"negatives that are equal texts", "memory of a step", "gradient, direction: this recipe"} <= names
    assert all(figure["good"] and figure["why"] for figure in found["figures"])


def test_a_teacher_is_looked_at_too(pairs_file, tiny_model_folder, tmp_path, monkeypatch):
    asked = ["--data", pairs_file, "--model", tiny_model_folder, "--teacher", tiny_model_folder, "--batch-size", 16]
    found = recommended(tmp_path, *asked)
    chosen = {choice["name"]: choice for choice in found["choices"]}
    assert chosen["mining.method"]["value"] == "auto"
    assert chosen["mining.method"]["reason"].startswith("a teacher is named: mined batches if all their figures")
    assert any("the run takes random batches (mining.method=auto)" in note for note in found["notes"])
    assert "Looked at all 97 pairs." in found["notes"]
    assert (chosen["batch_size"]["value"], chosen["batch_size"]["reason"]) == ("16", "given")
    assert {"own positive first", "softmax mass in the batch"} <= {figure["name"] for figure in found["figures"]}
    # Of a sample that is much smaller than the data the teacher is judged, not what mining would do.
    (tmp_path / "found.json").unlink()
    monkeypatch.setattr(sample, "MOST_ROWS", 40)
    found = recommended(tmp_path, *asked[:-1], 4)
    names = {figure["name"] for figure in found["figures"]}
    assert "own positive first" in names
    assert "softmax mass in the batch" not in names
    assert any("anybatch inspect plan" in note for note in found["notes"])
    assert any("among all of them the own positive comes first less often" in note for note in found["notes"])


def test_what_speaks_against_the_rule_is_said(pairs_file, tiny_model_folder, tmp_path, heard):
    """At a high temperature all negatives weigh alike, and a batch points where all data do."""
    asked = ["--data", pairs_file, "--model", tiny_model_folder, "--set", "loss.temperature=5", "--batch-size", 32]
    found = recommended(tmp_path, *asked, "--set", "train.learning_rate=1e-3")
    assert {choice["name"]: choice["reason"] for choice in found["choices"]}["train.learning_rate"] == "given"
    assert "--learning-rate" not in found["command"]
    assert {choice["name"]: choice["value"] for choice in found["choices"]}["loss.name"] == "count_corrected"
    assert any("Small batches hardly change" in line for line in found["against"])
    assert "Speaks against it: Small batches hardly change" in heard()


RANDOM = RunConfig(output="x", data=DataConfig(path="x"), mining=MiningConfig(method="random"))


class Slow:
    """A model that takes a virtual second for so many tokens; its texts have 400."""

    def __init__(self, tokens_per_second, longest=400):
        self.max_seq_length, self.speed, self.longest = 512, tokens_per_second, longest

    def eval(self):
        return self


@pytest.fixture
def clock(monkeypatch):
    """Virtual seconds, which embedding alone takes."""
    now = [0.0]

    def embed_texts(model, texts, *, side, batch_size, progress):
        now[0] += len(texts) * min(model.max_seq_length, model.longest) / model.speed
        return np.random.default_rng(len(texts)).normal(size=(len(texts), 4)).astype(np.float32)

    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sample, "embed_texts", embed_texts)
    return now


@pytest.mark.parametrize(
    ("tokens_per_second", "seconds", "cut", "fewest"),
    [
        (1e6, 40, None, 2048),  # all that is ever looked at
        (2e4, 40, None, 512),
        (1e4, 40, 128, 512),
        (4e3, 40, 64, 512),
        (2e3, 40, 32, 512),
        (4e2, 40, 32, 128),  # in more time: fewer would say nothing
        (4e1, 40, 32, 16),
    ],
)
def test_a_sample_uses_its_time_and_cuts_texts_where_it_is_short(tokens_per_second, seconds, cut, fewest, clock):
    rows = [str(row) for row in range(2500)]
    pairs = PairData(anchors=rows, positives=rows)

    def look(seconds):
        clock[0], student = 0.0, Slow(tokens_per_second)
        looked = sample.look_at(RANDOM, pairs, student, seconds, lambda *_: None)
        assert student.max_seq_length == 512
        assert len(looked.rows) == len(looked.vectors[0]) == len(np.unique(looked.rows))
        return looked

    looked = look(seconds)
    assert looked.cut == cut
    assert fewest <= len(looked.rows)
    assert looked.wanted == 512
    if 512 <= len(looked.rows) < looked.most:
        assert 0.7 * seconds < clock[0] < 0.9 * seconds  # what is left is for the gradients
    # The seconds that it says are enough, of which steps take a third.
    for asked, count in ((looked.seconds_needed, looked.wanted), (looked.seconds_most, looked.most)):
        assert len(look(asked * 2 / 3).rows) >= count
    whole = look(looked.seconds_whole * 2 / 3)
    assert (whole.cut, len(whole.rows) >= 512) == (None, True)


def test_short_texts_are_not_cut(clock):
    rows = [str(row) for row in range(2500)]
    pairs, student = PairData(anchors=rows, positives=rows), Slow(1e3, longest=20)
    assert sample.look_at(RANDOM, pairs, student, 20, lambda *_: None).cut is None
    assert student.max_seq_length == 512


def test_where_the_time_is_too_short_the_seconds_needed_are_said(pairs_file, tiny_model_folder, tmp_path, monkeypatch):
    look_at = recommend.look_at

    def few(config, pairs, *rest):
        looked = look_at(config, pairs, *rest)
        return looked._replace(rows=looked.rows[:9], vectors=tuple(side[:9] for side in looked.vectors), cut=64)

    monkeypatch.setattr(recommend, "look_at", few)
    asked = ["--data", pairs_file, "--model", tiny_model_folder, "--batch-size", 8]
    notes = recommended(tmp_path, *asked)["notes"]
    assert any("they need 64 pairs, about --seconds " in note for note in notes)
    assert any("their texts were cut at 64 tokens here; the run reads" in note for note in notes)


def test_pairs_of_images(tmp_path):
    saved, clip = save_pairs(tmp_path / "pairs", range(40)), save_clip(tmp_path / "clip")
    asked = ["--data", saved, "--anchor", "image", "--positive", "caption", "--model", clip]
    found = recommended(tmp_path, *asked, "--device", "cpu")
    assert {choice["name"]: choice["value"] for choice in found["choices"]}["batch_size"] == "4"
    assert any("knows nothing of such pairs yet" in note for note in found["notes"])  # random weights
    run(*shlex.split(found["command"])[1:], "--output", str(tmp_path / "run"))


def test_a_larger_batch_where_it_is_faster_by_far(monkeypatch):
    seconds = {64: 0.1, 256: 0.01, 1024: 0.009}
    seen = []

    def step_cost(config, pairs, model, *, seconds: float):
        seen.append((config.batch_size, config.train.mini_batch_size))
        return StepCost(rows=64, seconds_per_row=rates[config.batch_size], peak_bytes=1, total_bytes=9)

    monkeypatch.setattr(recommend, "step_cost", step_cost)
    pairs = PairData(anchors=[str(row) for row in range(9000)], positives=[str(row) for row in range(9000)])
    config = RunConfig(output="x", data=DataConfig(path="x"), model=ModelConfig(name="x"), batch_size=64)
    rates, model = seconds, SentenceTransformer(modules=[torch.nn.Identity()])
    chosen, cost, why = recommend._sized(config, pairs, model, False, 1e4, lambda *_: None)
    assert (chosen.batch_size, chosen.train.mini_batch_size, cost.seconds_per_row) == (256, "auto", 0.01)
    assert why.startswith("on this machine 10.0 times as fast per row")
    assert seen == [(64, 32), (256, "auto"), (1024, "auto")]
    rates = dict.fromkeys(seconds, 0.1)
    chosen, _, why = recommend._sized(config, pairs, model, False, 1e4, lambda *_: None)
    assert (chosen, "64 was as good" in why) == (config, True)
    rates, few = seconds, replace(pairs, anchors=pairs.anchors[:900], positives=pairs.positives[:900])
    assert recommend._sized(config, few, model, False, 1e4, lambda *_: None)[0] == config


def test_equal_texts_are_counted():
    pairs = PairData(anchors=["a", "a", "b", "c"], positives=["p", "q", "q", "r"])
    figure = recommend._equal_texts(pairs, 64)
    assert (figure.value, figure.passed) == ("33.33%", False)  # 2 of the 6 pairs of rows


def test_refusals(pairs_file, tiny_model_folder, tmp_path):
    given = ("--data", str(pairs_file), "--model", str(tiny_model_folder))
    with pytest.raises(AnybatchError, match="anybatch inspect plan"):
        run("recommend", *given, "--plan", "plan.safetensors")
    with pytest.raises(AnybatchError, match=r"mining.method is 'kmeans', which needs a teacher"):
        run("recommend", *given, "--set", "mining.method=kmeans", "--seconds", "1")
    with pytest.raises(AnybatchError, match=r"at least 32.*a batch size of at most 20 with --batch-size"):
        run("recommend", *given, "--limit", "20")
    with pytest.raises(AnybatchError, match=r"20 rows, fewer than one batch of 1024.*--batch-size. to 20 or less"):
        run("recommend", *given, "--limit", "20", "--batch-size", "1024")
    run("recommend", *given, "--limit", "20", "--batch-size", "20", "--seconds", "1")
    (tmp_path / "found.json").write_text("")
    with pytest.raises(AnybatchError, match=r"found\.json exists"):
        run("recommend", *given, "--json", str(tmp_path / "found.json"))
