"""The benchmarks of gradients and training run on small data, resume, and write their tables."""

import gzip
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from anybatch.losses import InfoNCE
from benchmarks import cluster_centres, global_loss, global_training, small_models

from ..conftest import sentence
from ..insight.test_gradient_error import embeddings


@pytest.fixture
def folder(tmp_path):
    """Data in the layout of arxiv-title-abstract, and embeddings of the training pairs."""
    for split, count in (("train", 64), ("dev", 12), ("test", 12)):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt", encoding="utf8") as file:
            for row in range(count):
                number = row + 100 * len(split)
                file.write(json.dumps({"title": sentence(number, 4), "abstract": sentence(number, 9)}) + "\n")
    for name, side in zip(("anchor", "positive"), embeddings(64, 8), strict=True):
        np.save(tmp_path / f"some_{name}.npy", side.astype(np.float32))
    return tmp_path


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.filterwarnings("ignore:The rank window")
def test_training_study_tunes_repeats_and_resumes(folder, monkeypatch):
    results = folder / "results.jsonl"
    arguments = ["--data", folder, "--cache", folder / "cache", "--results", results, "--batch-sizes", 8, "--steps", 3]
    methods = ["--methods", "random/infonce", "mined/count_corrected/inclusion"]
    call(monkeypatch, global_training, *arguments, *methods)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for method in methods[1:]:
        chosen = [line for line in lines if line["method"] == method]
        tuned = {line["learning_rate"]: line["dev"]["ndcg@10"] for line in chosen if line["seed"] == 0}
        assert 3 <= len(tuned) <= 5
        best = max(tuned, key=lambda rate: tuned[rate])
        assert {line["learning_rate"] for line in chosen if line["seed"] > 0} == {best}
        assert {line["seed"] for line in chosen} == {0, 1, 2}
        assert all((line["num_steps"], line["pairs_seen"]) == (3, 24) for line in chosen)
    before = results.read_bytes()
    call(monkeypatch, global_training, *arguments, *methods)
    assert results.read_bytes() == before
    table = results.with_suffix(".md").read_text()
    assert "B=8 (3 steps)" in table
    assert "| mined/count_corrected/inclusion | 0." in table


def test_gradient_benchmark_resumes(folder, monkeypatch):
    out = folder / "loss.jsonl"
    methods = [
        method
        for method in global_loss.METHODS
        if method.name in ("InfoNCE", "count-corrected, weights", "cluster centres")
    ]
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
        ("cluster centres", "mined"),
    ]
    assert "## Batches of 8, best first" in out.with_suffix(".md").read_text()
    # The other direction in the same file: lines and a table of its own, without what has one direction only.
    with pytest.warns(UserWarning, match="rank window"):
        call(monkeypatch, global_loss, *arguments, "--direction", "both")
    added = [json.loads(line) for line in out.read_text().splitlines()][len(lines) :]
    assert [(line["method"], line["batches"], line["direction"]) for line in added[3:]] == [
        ("InfoNCE", "random", "both"),
        ("count-corrected, weights", "mined", "both"),
    ]
    assert "both directions" in out.with_suffix(".md").read_text()


def test_bags():
    bags = small_models.Bags(words=np.array([5, 6, 7, 8, 9, 4]), starts=np.array([0, 2, 3, 6]))
    words, starts = bags.select(np.array([2, 0]))
    assert words.tolist() == [8, 9, 4, 5, 6]
    assert starts.tolist() == [0, 3]


def test_centres_are_exact_where_clusters_have_no_spread():
    generator = torch.Generator().manual_seed(0)
    positives = torch.randn(4, 6, generator=generator).repeat_interleave(5, 0)
    anchors = torch.randn(20, 6, generator=generator)
    loss = cluster_centres.ClusterCentres(np.arange(20) // 5, dimensions=6, temperature=0.2)
    for rows in torch.arange(20).split(10):
        loss(anchors[rows].clone().requires_grad_(), positives[rows], index=rows)
    assert loss.offset == pytest.approx(0, abs=1e-5)
    whole, part = (anchors.clone().requires_grad_() for _ in range(2))
    InfoNCE(temperature=0.2)(whole, positives).backward()
    rows = torch.arange(10)
    loss(part[rows], positives[rows], index=rows).backward()
    torch.testing.assert_close(part.grad[rows] * 10, whole.grad[rows] * 20, rtol=1e-4, atol=1e-5)


def test_centres_measure_what_their_spread_hides():
    positives = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    loss = cluster_centres.ClusterCentres(np.arange(40) // 5, dimensions=6, temperature=0.2)
    for rows in torch.arange(40).split(20):
        loss(positives[rows], positives[rows], index=rows)
    assert loss.offset > 0.1  # Jensen: a centre's exponential is less than its members' mean
