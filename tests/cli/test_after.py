"""After a run: what is said of it, its evaluation by its folder, BEIR's folders, MTEB's tasks, the hub."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from anybatch.core.errors import AnybatchError
from tests.cli.test_cli import run, settings
from tests.conftest import sentence


@pytest.fixture
def flag_file(tmp_path, monkeypatch):
    """320 rows of FlagEmbedding: lists of positives and negatives, some without negatives."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "query": f"{sentence(n, 3)} {n}",
            "pos": [f"{sentence(n + 5, 6)} {n}"],
            "neg": [f"{sentence(n + 9, 6)} no {n} {k}" for k in range(n % 3)],
        }
        for n in range(320)
    ]
    (tmp_path / "flag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "flag.jsonl"


def test_a_run_on_a_file_of_flagembedding_and_what_comes_after(flag_file, tiny_model_folder, tmp_path, heard, caplog):
    """Two names alone; the report says what to do next, and that works."""
    caplog.set_level("INFO", logger="anybatch")
    run("train", "--data", flag_file, "--model", str(tiny_model_folder))
    said = caplog.text + heard()
    assert "anchor 'query', positive 'pos', negatives 'neg'" in said
    assert "'neg' holds 0 to 2 texts a row" in said
    assert "Held out for evaluation: 50 of 320 pairs" in said
    for line in (
        'Use the model: SentenceTransformer("runs/flag/model")',
        "anybatch evaluate runs/flag",
        "figures: runs/flag/metrics.json",
    ):
        assert line in said
    assert "untrained" in said
    kept = json.loads((tmp_path / "runs" / "flag" / "metrics.json").read_text())
    (tmp_path / "runs" / "flag").rename(tmp_path / "moved")
    run("evaluate", "moved", "--output", "figures.json")  # on what the run held out, in whichever folder it lies
    assert json.loads((tmp_path / "figures.json").read_text()) == pytest.approx(kept["metrics"])
    assert "On 50 held-out pairs of moved:" in heard()
    run("evaluate", "moved/", "--data", flag_file, "--limit", "20", "--output", "others.json")
    assert "On 20 pairs of flag.jsonl:" in (said := heard())
    assert "│ moved/ │" in said  # the model's row is named as it was given
    (tmp_path / "moved" / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(
        AnybatchError, match=r"has no model yet\. Go on with it: anybatch train --resume --output moved"
    ):
        run("evaluate", "moved")


def test_the_columns_and_the_length_of_a_run(tiny_model_folder, tmp_path, heard, caplog):
    """Other data have the run's columns where they can; a lower limit of tokens stays in the model, which is said."""
    caplog.set_level("INFO", logger="anybatch")
    rows = [
        {"summary": f"{sentence(n, 3)} {n}", "details": sentence(n + 5, 6), "text1": "a", "text2": n} for n in range(60)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "usual.csv").write_text("anchor,positive\na,b\nc,d\n")
    run_folder = str(tmp_path / "run")
    own = ("--data", str(tmp_path / "own.jsonl"), "--anchor", "summary", "--positive", "details")
    more = ("--batch-size", "8", "--set", "train.args.max_steps=1", "--set", "model.max_length=6")
    run("train", *own, *more, "--model", str(tiny_model_folder), "--output", run_folder)
    assert "texts are cut at 6 tokens, not at its own 24" in caplog.text
    assert "a softmax over all 60 rows, so higher than over a batch" in caplog.text
    for file, num_queries in (("own.jsonl", 60), ("usual.csv", 2)):
        run("evaluate", run_folder, "--data", str(tmp_path / file), "--output", str(tmp_path / f"{file}.json"))
        assert json.loads((tmp_path / f"{file}.json").read_text())["num_queries"] == num_queries
    assert "60 queries; the standard error of a figure is at most 0.0" in heard()
    (tmp_path / "equal.csv").write_text("anchor,positive\na,b\nc,d\na,e\n")
    run("evaluate", run_folder, "--data", str(tmp_path / "equal.csv"))
    assert "2 queries of 3 pairs (equal anchors are one query); the standard error" in heard()
    run("train", *own, *more, "--model", str(tiny_model_folder), "--output", f"{run_folder}-2", "--eval", own[1])
    assert "60 of 60 held-out pairs are training pairs as well" in caplog.text
    with pytest.raises(AnybatchError, match="already holds a run"):  # before the data are read
        run("train", "--data", "gone.csv", "--model", str(tiny_model_folder), "--output", run_folder)
    with pytest.raises(AnybatchError, match="there is no such folder"):
        run("train", "--data", "gone.csv", "--model", "./no/model", "--output", str(tmp_path / "new"))


def test_a_run_that_held_out_nothing(pairs_file, tiny_model_folder, tmp_path):
    more = ("mining.method=random", "train.args.max_steps=1", "evaluation.path=null")
    run("train", *settings(pairs_file, tiny_model_folder, tmp_path / "run", *more))
    with pytest.raises(AnybatchError, match="held out nothing to measure on"):
        run("evaluate", str(tmp_path / "run"))


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, length in (("corpus", 6), ("queries", 3)):
        rows = [{"_id": str(n), "title": "", "text": sentence(n, length)} for n in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"{n}\t{n}\t1" for n in range(20))]
    for split, count in (("test", 21), ("dev", 6)):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines[:count]) + "\n")
    return folder


def test_a_folder_of_beir(beir, pairs_file, tiny_model_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="anybatch")
    run("evaluate", str(tiny_model_folder), "--data", str(beir), "--output", str(tmp_path / "test.json"))
    assert "20 judged queries, 20 documents" in caplog.text
    run("evaluate", str(tiny_model_folder), "--data", str(beir), "--split", "dev")
    assert "5 judged queries, 20 documents" in caplog.text
    with pytest.raises(AnybatchError, match=r"Got --anchor and --data \(a folder in BEIR's layout\)"):
        run("evaluate", str(tiny_model_folder), "--data", str(beir), "--anchor", "text")
    caplog.clear()
    more = ("mining.method=random", "train.args.max_steps=1", f"evaluation.path={beir}", "evaluation.split=dev")
    run("train", *settings(pairs_file, tiny_model_folder, tmp_path / "run", *more))
    assert "5 judged queries, 20 documents" in caplog.text
    given = settings(pairs_file, tiny_model_folder, tmp_path / "other", "mining.method=random", "evaluation.split=dev")
    with pytest.raises(AnybatchError, match=r"evaluation\.split is for a retrieval set"):
        run("train", *given)


def test_tasks_of_mteb(pairs_file, tiny_model_folder, tmp_path, monkeypatch, heard):
    """The library is stood in for; without it one line says what to install."""
    model = str(tiny_model_folder)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ModuleNotFoundError) as failed:
        run("evaluate", model, "--mteb", "Small")
    from anybatch.cli import outcome

    assert outcome(failed.value) == (
        2,
        "anybatch: This needs the package mteb, which is not installed. Install it with: pip install 'anybatch[mteb]'",
    )
    mteb = ModuleType("mteb")
    mteb.__spec__ = SimpleNamespace(name="mteb")
    asked = []

    def get_task(name):
        if name == "Smal":
            raise KeyError("'Smal' not found. Did you mean: 'Small'?")
        return SimpleNamespace(name=name, metadata=SimpleNamespace(main_score="ndcg_at_10"))

    def evaluate(model, task, **options):
        assert options["cache"] is None
        if task.name == "Away":
            raise ConnectionError("no network")
        asked.append((type(model).__name__, task.name))
        return SimpleNamespace(task_results=[SimpleNamespace(get_score=lambda: 0.25)])

    mteb.get_task, mteb.evaluate = get_task, evaluate
    monkeypatch.setitem(sys.modules, "mteb", mteb)
    run("evaluate", model, "--mteb", "Small", "--mteb", "Other", "--output", str(tmp_path / "figures.json"))
    assert asked == [("SentenceTransformer", "Small"), ("SentenceTransformer", "Other")]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == {"Small": {"ndcg_at_10": 0.25}, "Other": {"ndcg_at_10": 0.25}}
    assert "0.2500" in heard()
    with pytest.raises(AnybatchError, match=r"no such task: 'Smal' not found. Did you mean: 'Small'"):
        run("evaluate", model, "--mteb", "Smal")
    with pytest.raises(AnybatchError, match=r"Cannot measure the task Away of MTEB: no network .*connection"):
        run("evaluate", model, "--mteb", "Away")
    with pytest.raises(AnybatchError, match=r"Got --data and --mteb \(tasks of MTEB\)"):
        run("evaluate", model, "--mteb", "Small", "--data", str(pairs_file))


def test_pushing(pairs_file, tiny_model_folder, tmp_path, monkeypatch, heard):
    """What cannot work is refused before the run; a failure at the end loses nothing, and its command tries again."""
    more = ("mining.method=random", "train.args.max_steps=1", "train.args.hub_private_repo=true")
    given = settings(pairs_file, tiny_model_folder, tmp_path / "run", *more)
    pushed, network = [], [False]

    def push(self, name, **options):
        if not network[0]:
            raise ConnectionError("no network")
        pushed.append((name, options, (tmp_path / "run" / "model" / "README.md").exists()))
        return "https://hub/of/models"

    monkeypatch.setattr("sentence_transformers.SentenceTransformer.push_to_hub", push)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(AnybatchError, match=r"needs an account .* Log in with `hf auth login`"):
        run("train", *given, "--push", "me/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    with pytest.raises(AnybatchError, match="no name of a model on the hub"):
        run("train", *given, "--push", "me/my model/2")
    assert not (tmp_path / "run").exists()
    again = rf"anybatch train --resume --output {tmp_path / 'run'} --push me/model"
    with pytest.raises(AnybatchError, match=rf"The run is finished, its model .*no network.*try again: {again}"):
        run("train", *given, "--push", "me/model")
    assert (tmp_path / "run" / "metrics.json").exists()
    network[0] = True
    run(*again.split()[1:])
    [(name, options, card)] = pushed
    assert (name, options["private"], options["exist_ok"], card) == ("me/model", True, True, True)
    assert "Pushed: https://hub/of/models" in heard()
