"""The benchmark of images without labels on a few pictures: runs once, and says what the lines say."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import vision


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    files, meta = [], []
    for number in range(60):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
        meta.append(
            {"label": f"class {number % 3}", "split": ("train", "train", "dev", "test", "unlabeled")[number % 5]}
        )
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "images.npz", data=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
    with gzip.open(tmp_path / "meta.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in meta)
    return vision.Pictures.read(tmp_path)


def test_runs_once_and_tunes(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "EPOCHS", 1)
    assert len(pictures.trained) == 36
    assert set(pictures.split[pictures.trained]) == {"train", "unlabeled"}
    results = tmp_path / "out" / "vision.jsonl"
    cell = vision.Cell(arm="sogclr", batch_size=8, budget="epochs")
    best = vision.Runs(results).best(cell, pictures)
    lines = results.read_text().splitlines()
    assert len(lines) >= 2
    monkeypatch.setattr(vision, "train", lambda *_: pytest.fail("trained again"))
    assert vision.Runs(results).best(cell, pictures) == best
    assert results.read_text().splitlines() == lines


def line(arm, batch_size, seed, value, rate=1.0, dev=0.5):
    figures = {"dev_knn": dev, "dev_linear": dev, "test_knn": value, "test_linear": value}
    return {"arm": arm, "batch_size": batch_size, "budget": "epochs", "seed": seed, "rate": rate, **figures}


def test_the_report_takes_the_best_rate_and_says_which_aims_hold():
    lines = [line("simclr", 64, seed, value) for seed, value in enumerate((0.20, 0.22, 0.24))]
    lines += [line("sogclr", 64, seed, value) for seed, value in enumerate((0.30, 0.32, 0.34))]
    lines += [line("sogclr", 64, 0, 0.9, rate=2.0, dev=0.4)]  # better on test, and not chosen
    lines += [line("sogclr", 128, 0, 0.9, dev=0.4), line("sogclr batch", 128, 0, 0.3), line("simclr", 512, 0, 0.31)]
    page = vision.report(lines)
    assert "| simclr | 64 | 1 | 3 | 0.220 ± 0.012 | 0.220 ± 0.012 |" in page
    assert "| sogclr | 64 | 1 | 3 | 0.320 ± 0.012 | 0.320 ± 0.012 |" in page
    assert (
        "k-NN: sogclr at 64 +0.100\n  against SimCLR at 64, standard error 0.016. Aim (more than two standard errors"
        in page
    )
    assert "better): holds." in page
    assert "sogclr batch at 128 -0.010\n  against SimCLR at 512, one seed. Aim (as good): does not hold." in page
