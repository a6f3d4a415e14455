"""The benchmark of gradients runs on small data, resumes, and writes its table."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import global_loss

from ..insight.test_gradient_error import embeddings


@pytest.fixture
def folder(tmp_path):
    """Embeddings of pairs."""
    for name, side in zip(("anchor", "positive"), embeddings(64, 8), strict=True):
        np.save(tmp_path / f"some_{name}.npy", side.astype(np.float32))
    return tmp_path


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_gradient_benchmark_resumes(folder, monkeypatch):
    out = folder / "loss.jsonl"
    methods = [m for m in global_loss.METHODS if m.name in ("InfoNCE", "count-corrected, weights")]
    monkeypatch.setattr(global_loss, "METHODS", [replace(m, batches=m.batches[:1]) for m in methods])
    arguments = ["--data", folder, "--num-batches", 8, "--batch-sizes", 8, "--out", out]
    with pytest.warns(UserWarning, match="rank window"):
        call(monkeypatch, global_loss, *arguments)
    before = out.read_bytes()
    call(monkeypatch, global_loss, *arguments)
    assert out.read_bytes() == before
    lines = [json.loads(line) for line in before.decode().splitlines()]
    assert [line["batch_size"] for line in lines if line["batches"] == "curve"] == [8, 16, 32]
    assert [(line["method"], line["batches"]) for line in lines[3:]] == [
        ("InfoNCE", "random"),
        ("count-corrected, weights", "mined"),
    ]
    assert "## Batches of 8, best first" in out.with_suffix(".md").read_text()
    # The other direction in the same file: lines and a table of its own.
    with pytest.warns(UserWarning, match="rank window"):
        call(monkeypatch, global_loss, *arguments, "--direction", "both")
    added = [json.loads(line) for line in out.read_text().splitlines()][len(lines) :]
    assert [(line["method"], line["batches"], line["direction"]) for line in added[3:]] == [
        ("InfoNCE", "random", "both"),
        ("count-corrected, weights", "mined", "both"),
    ]
    assert "both directions" in out.with_suffix(".md").read_text()
