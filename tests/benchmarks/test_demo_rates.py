from __future__ import annotations

import pytest

from anybatch.cli import demo
from anybatch.run import job
from benchmarks import demo_rates


@pytest.mark.slow
def test_every_rate_is_tried_on_pairs_that_the_demo_does_not_use(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr(demo, "PAIRS", 64)
    monkeypatch.setattr(demo, "PASSES", 1)
    monkeypatch.setattr(demo_rates, "DEVELOPMENT", 32)
    monkeypatch.setattr(demo_rates, "TRIED", {16: (0.01, 0.02)})
    monkeypatch.setattr(
        demo_rates, "train_all", lambda runs, **_: {key: job.train(config) for key, config in runs.items()}
    )
    table = demo_rates.rate_table(tmp_path, [16])
    lines = table.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| InfoNCE", "| recommended"]
    assert all("0.01: 0." in line and "0.02: 0." in line for line in lines)
    rows = (tmp_path / "development.jsonl").read_text().splitlines()
    assert len(rows) == 32
    assert len(list(tmp_path.glob("*-16-*"))) == 8  # two methods, rates and seeds
