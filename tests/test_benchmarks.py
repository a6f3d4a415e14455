"""What a stopped benchmark leaves behind is found again, and only under the settings it was measured with."""

from __future__ import annotations

import argparse

from benchmarks import loss_stage
from benchmarks.caching import Lines, measure_loss


def test_lines_survive_a_kill(tmp_path):
    path = tmp_path / "out.jsonl"
    Lines(path, {"batch": 8}).add({"seconds": 1.5}, stage="step", name="a", round=0)
    with path.open("a") as file:
        file.write('{"batch": 8, "stage": "st')  # the kill
    again = Lines(path, {"batch": 8})
    again.add({"seconds": 2.5}, stage="step", name="a", round=1)
    found = Lines(path, {"batch": 8}).find(stage="step", name="a")
    assert [line["seconds"] for line in found] == [1.5, 2.5]
    assert Lines(path, {"batch": 16}).find(stage="step", name="a") == []


def test_the_loss_stage_measures_each_contender_once(tmp_path):
    args = argparse.Namespace(loss=[64], dimensions=8, peer_rows=64)
    lines = Lines(tmp_path / "out.jsonl", {})
    measure_loss(args, lines)
    measure_loss(args, lines)
    assert [line["name"] for line in lines.lines] == list(loss_stage.CONTENDERS)
    assert all(line["seconds"] > 0 for line in lines.lines)
