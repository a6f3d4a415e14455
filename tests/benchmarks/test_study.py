"""The study runs on small data, resumes, tunes each cell on all seeds, and says of its aims what its lines say."""

import gzip
import io
import json
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from anybatch.evaluation.retrieval import pair_metrics
from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan
from benchmarks import small_models, study, study_report, study_tasks

from ..conftest import sentence


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


EMOJI = (*("train",) * 4, "dev_concept", "test_concept", "test_style", "test_both")  # of ten pictures each


def emoji(number, split):
    drawn = io.BytesIO()
    Image.new("RGB", (20, 20), (number % 250, 7 * number % 250, 90)).save(drawn, "PNG")
    name = sentence(number // 2, 2)
    return drawn.getvalue(), {"i": number, "label": name, "tags": [sentence(number // 2, 3)], "split": split}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """All tasks, tiny, and a teacher that knows words."""
    for start, split, count in ((0, "train", 64), (100, "dev", 12), (200, "test", 12)):
        rows = [{"title": sentence(n, 4), "abstract": sentence(n, 9)} for n in range(start, start + count)]
        write_lines(tmp_path / "arxiv-title-abstract" / f"{split}.jsonl.gz", rows)
        rows = [
            {"premise": sentence(n // 2, 6), "hypothesis": sentence(n, 5), "label": label}
            for n in range(start, start + count)
            for label in ("entailment", "neutral")
        ]
        write_lines(tmp_path / "snli-devtest" / f"{split}.jsonl.gz", rows * (3 if split == "dev" else 1))
    documents = [{"id": str(n), "title": sentence(n, 4), "text": sentence(n, 12)} for n in range(40)]
    write_lines(tmp_path / "scifact" / "corpus.jsonl.gz", documents)
    write_lines(tmp_path / "scifact" / "queries.jsonl.gz", [{"id": str(n), "text": sentence(n, 3)} for n in range(20)])
    judged = [f"{n}\t{n}\t1\t{'train' if n < 12 else 'test'}" for n in range(20)]
    (tmp_path / "scifact" / "qrels.tsv").write_text("\n".join(["query_id\tdoc_id\tscore\tsplit", *judged]))
    pictures, meta = zip(*(emoji(10 * n + m, split) for n, split in enumerate(EMOJI) for m in range(10)), strict=True)
    write_lines(tmp_path / "emoji-captions" / "meta.jsonl.gz", meta)
    offsets = np.cumsum([0, *map(len, pictures)])
    stored = np.frombuffer(b"".join(pictures), np.uint8)
    np.savez(tmp_path / "emoji-captions" / "images.npz", data=stored, offsets=offsets)
    functions = [
        f'def f{n}():\n    """{sentence(n, 6)}.\n\n    More.\n    """\n    return "{sentence(n, 8)}"\n'
        for n in range(150)
    ]
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "functions.py").write_text("\n\n".join(functions))
    (tmp_path / "library" / "broken.py").write_text("def f(:")
    monkeypatch.setattr(study_tasks.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    monkeypatch.setattr(study_tasks, "_teacher", lambda model: Teacher())
    return tmp_path


class Teacher:
    """A mean of random vectors of words."""

    def encode(self, texts, **options):
        vectors = [
            np.mean([np.random.default_rng(zlib.crc32(word.encode())).normal(size=8) for word in text.split()], axis=0)
            for text in texts
        ]
        return np.array([vector / np.linalg.norm(vector) for vector in vectors], np.float32)


def call(monkeypatch, folder, *arguments):
    given = ["--data", folder, "--work", folder / "teacher", "--results", folder / "study.jsonl", "--out", folder]
    monkeypatch.setattr(sys, "argv", ["study", *map(str, [*given, *arguments])])
    study.main()
    whole = [line for line in (folder / "study.jsonl").read_text().splitlines() if line.endswith("}")]
    return [json.loads(line) for line in whole]


def test_every_task_and_arm_runs_and_resumes(data, monkeypatch):
    small = ["--students", "small", "--sizes", "16", "--budgets", "pairs", "--steps", "1"]
    lines = call(monkeypatch, data, *small, "--arms", "random/infonce", "ours/corrected", "within/cross_batch")
    tasks = [task for task in study.TASKS if task != "arxiv60k"]  # which is run at 64
    assert [len(study_tasks.load_task(task, data)) for task in ("arxiv", "arxiv60k")] == [64, 64]
    assert {line["task"] for line in lines} == set(tasks)
    for task in tasks:
        for arm in ("random/infonce", "ours/corrected"):
            runs = [line for line in lines if (line["task"], line["arm"]) == (task, arm)]
            rates = {line["rate"] for line in runs}
            assert 3 <= len(rates) <= 5
            assert {(line["rate"], line["seed"]) for line in runs} == {(r, s) for r in rates for s in study.SEEDS}
    assert {line["task"] for line in lines if line["arm"] == "within/cross_batch"} == {"mixture"}
    of_styles = [[line[name] for name in ("style", "both")] for line in lines if line["task"] == "emoji"]
    assert of_styles
    assert all(0 < figure <= 1 for figures in of_styles for figure in figures)
    assert not any("style" in line for line in lines if line["task"] != "emoji")
    before = (data / "study.jsonl").read_bytes()
    (data / "study.jsonl").write_bytes(before[:-30])  # a kill in the middle of a line loses one run
    again = call(monkeypatch, data, *small, "--arms", "random/infonce", "ours/corrected", "within/cross_batch")
    drop = ("seconds", "train_seconds")
    kept = [{key: value for key, value in line.items() if key not in drop} for line in lines]
    assert len(again) == len(lines)
    assert all({key: value for key, value in line.items() if key not in drop} in kept for line in again)
    assert "## arxiv, small, equal pairs" in (data / "study.md").read_text()
    assert (data / "quality.svg").read_text().count("<polyline") == 5 * len(tasks)


@pytest.mark.parametrize("arm", [arm for arm in study.REST if arm != "published/infonce"])
def test_the_other_arms_train(arm, data, monkeypatch):
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    lines = call(
        monkeypatch, data, "--students", "small", "--sizes", 64, "--steps", 2, "--tasks", "arxiv", "--arms", arm
    )
    assert len(lines) >= 6
    assert all(0 <= line["test"] <= 1 and line["steps"] <= 2 for line in lines)


def test_further_rates_of_a_tuned_cell(data, monkeypatch):
    one = ["--students", "small", "--sizes", 64, "--steps", 1, "--tasks", "arxiv", "--arms", "random/infonce"]
    tuned = call(monkeypatch, data, *one, "--budgets", "pairs")
    lines = call(monkeypatch, data, *one, "--budgets", "pairs", "--rates", "0.5")
    assert lines[: len(tuned)] == tuned
    assert [(line["rate"], line["seed"]) for line in lines[len(tuned) :]] == [(0.5, seed) for seed in study.SEEDS]


def test_halves_are_weighed_exactly():
    num_rows = 60
    plan = BatchPlan(
        num_rows=num_rows,
        batch_size=8,
        cluster_size=4,
        cluster=np.arange(num_rows, dtype=np.int32) // 4,
        seed=0,
        data_digest="",
    )
    halves, random = study.Halves(plan), np.random.default_rng(0)
    values = random.random((num_rows, num_rows))
    np.fill_diagonal(values, 0)
    total, visits = np.zeros(num_rows), np.zeros(num_rows)
    for batch in study.sampled(plan, 4_000, halves, random):
        assert len(set(batch)) == 16
        weights = halves.weights(batch, None).tile(slice(0, 16), slice(0, 16)).exp().numpy()
        total[batch] += (weights * values[np.ix_(batch, batch)]).sum(axis=1)
        visits[batch] += 1
    exact = values.sum(axis=1) / (num_rows - 1)
    # A thousand visits a row leave some 2%; a weight of either half that is off shows in the mean over rows.
    np.testing.assert_allclose(total / visits, exact, rtol=0.1)
    assert np.mean(total / visits) == pytest.approx(exact.mean(), rel=4e-3)


def test_a_fresh_memory_of_all_rows_is_the_full_gradient():
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(20, 6, generator=generator) for _ in range(2)]
    table = RowTable(np.arange(20), np.arange(20))
    loss = CrossBatchInfoNCE(20, memory_size=20, centred=False, temperature=0.2)
    whole, part = ([side.clone().requires_grad_() for side in sides] for _ in range(2))
    CountCorrectedInfoNCE(20, temperature=0.2)(*whole, **table.arguments(torch.arange(20))).backward()
    rows = torch.arange(5)
    for _ in range(2):  # the second time nothing is left of the first
        study.remember(loss, np.arange(20), lambda chosen: [side[chosen] for side in sides], table)
    loss(*(side[rows] for side in part), **table.arguments(rows)).backward()
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(other.grad[rows] * 5, one.grad[rows] * 20, rtol=1e-4, atol=1e-5)


def test_bags_and_score():
    bags = small_models.Bags.of([[5, 6], [7], [8, 9, 4], []])
    words, starts = bags.select(np.array([2, 3, 0]))
    assert (words.tolist(), starts.tolist()) == ([8, 9, 4, 0, 5, 6], [0, 3, 4])
    texts, found = [sentence(n, 5) for n in range(30)], [sentence(n % 20, 3) for n in range(30)]
    student = small_models.Student("small", pictures=False, model=None)
    distinct = list(dict.fromkeys(found))
    search = study_tasks.Search(queries=texts, corpus=distinct, relevant=[{distinct.index(text)} for text in found])
    sides = [student.embed(side, back=False).numpy() for side in (texts, found)]
    ids = {"anchor_id": np.arange(30), "positive_id": np.array([distinct.index(text) for text in found])}
    assert small_models.score(student, [search]) == pytest.approx(pair_metrics(*sides, **ids)["ndcg@10"])


def lines_of(**figures):
    """Three rates and seeds an arm, of which the middle rate is best."""
    return [
        {
            **{
                "student": "small",
                "budget": "pairs",
                "task": task,
                "batch_size": 64,
                "arm": arm,
                "rate": rate,
                "rows": 10_000,
            },
            **{"seed": seed, "dev": 0.5 - abs(rate - 2), "test": figure + seed / 1000 - (rate != 2)},
        }
        for task in ("arxiv", "snli", "emoji")
        for arm, figure in figures.items()
        for rate in (1, 2, 3)
        for seed in range(3)
    ]


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "held"), (0.0005, "not held"), (-0.1, "not held")])
def test_aims_are_read_off_the_lines(gain, verdict, tmp_path):
    lines = lines_of(**{"random/infonce": 0.3, "ours/infonce": 0.3 + gain})
    tasks = ("arxiv", "snli", "emoji")
    asked = [("small", "pairs", task, "random/infonce", 64) for task in tasks]
    study_report.write(lines, seeds=(0, 1, 2), tasks=tasks, asked=asked, out=tmp_path)
    text = (tmp_path / "study.md").read_text()
    row = next(line for line in text.splitlines() if "mined > random within task, infonce" in line)
    assert f"| {verdict} |" in row
    assert "| random/infonce | .301 ± .001 |" in text
    other = next(line for line in text.splitlines() if "mined > random within task, corrected" in line)
    assert "| not run |" in other
