"""Runs in processes of their own: results in order, refusals and Ctrl-C come through, and no process stays."""

from __future__ import annotations

import multiprocessing
import signal
from dataclasses import replace

import pytest

from anybatch.core.errors import AnybatchError
from anybatch.data import sample
from anybatch.integrations.sentence_transformers.model import ModelConfig
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.run import job
from anybatch.run.config import DataConfig, RunConfig
from anybatch.run.side_by_side import train_all


@pytest.fixture
def runs(tmp_path, tiny_model_folder):
    first = RunConfig(
        output=str(tmp_path / "first"),
        data=DataConfig(path=str(sample.path("train")), anchor="title", positive="abstract", limit=32),
        model=ModelConfig(name=str(tiny_model_folder), device="cpu"),
        train=TrainConfig(mini_batch_size=8),
        batch_size=8,
    )
    return {"first": first, "second": replace(first, output=str(tmp_path / "second"), batch_size=32)}


@pytest.mark.slow
def test_results_are_those_of_single_runs(runs, tmp_path):
    told = []
    results = train_all(runs, stage="runs", progress=lambda *news: told.append(news), new_processes=True)
    assert list(results) == ["first", "second"]
    assert [result.num_steps for result in results.values()] == [4, 1]
    assert told == [("runs", done, 2) for done in range(3)]
    alone = job.train(replace(runs["first"], output=str(tmp_path / "alone")))
    assert [line["loss"] for line in alone.log] == [line["loss"] for line in results["first"].log]
    assert multiprocessing.active_children() == []


def test_a_refusal_comes_through(runs):
    wrong = replace(runs["first"], model=ModelConfig(name="no/such/model"))
    with pytest.raises(AnybatchError, match="no/such/model"):
        train_all({"wrong": wrong}, stage="runs")
    assert multiprocessing.active_children() == []


def test_a_stop_ends_the_processes(runs):
    class Stopped(BaseException):
        pass

    def stop(number, frame):
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(1)
    try:
        with pytest.raises(Stopped):
            train_all(runs, stage="runs")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []
