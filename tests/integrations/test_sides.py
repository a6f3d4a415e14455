"""What a model knows of queries and documents (prompts, towers) holds wherever anybatch embeds or trains: compared with
encode_query, encode_document.
"""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Router, StaticEmbedding

from anybatch.core.errors import AnybatchError
from anybatch.data.pairs import PairSet
from anybatch.data.reading import read_pairs
from anybatch.integrations.sentence_transformers import CachedLoss, ModelConfig, embed_texts, load_model
from anybatch.integrations.sentence_transformers.model import side_inputs, side_prompt, side_task, warn_of_instructions
from anybatch.mining import MiningConfig
from anybatch.run import job
from anybatch.run.config import DataConfig, RunConfig, TeacherConfig
from anybatch.run.teacher import teacher_embeddings
from tests.cli.test_cli import run, settings

from ..conftest import sentence

TEXTS = [sentence(number, 2 + number % 7) for number in range(11)]
QUERY, DOCUMENT = "mata nodis ", "grao sofer batis "


def towers(folder, *, names=("query", "document"), prompts=False):
    """Two towers of different weights."""
    torch.manual_seed(3)
    parts = [SentenceTransformer(str(folder), device="cpu") for _ in names]
    with torch.no_grad():
        for parameter in parts[0].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    router = Router(dict(zip(names, (list(part.children()) for part in parts), strict=True)), default_route=names[-1])
    model = SentenceTransformer(modules=[router], device="cpu")
    if prompts:
        model.prompts |= {"query": QUERY, "document": DOCUMENT}
    return model


def headed(model):
    torch.manual_seed(4)
    heads = {side: [Dense(32, 16)] for side in ("query", "document")}
    return SentenceTransformer(modules=[*model.children(), Router(heads)], device="cpu")


def static(model):
    model = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=16)], device="cpu")
    return prompted(model, {**model.prompts, "query": QUERY})


def prompted(model, prompts, default=None):
    model.prompts, model.default_prompt_name = prompts, default
    return model


def not_pooled(model):
    model.set_pooling_include_prompt(False)
    return prompted(model, {"query": QUERY, "document": DOCUMENT})


VARIANTS = {
    "plain": lambda model: model,
    "prompts": lambda model: prompted(model, {"query": QUERY, "document": DOCUMENT}),
    "a prompt for passages": lambda model: prompted(model, {"query": QUERY, "passage": DOCUMENT}),
    "a default prompt": lambda model: prompted(model, {"any": QUERY}, "any"),
    "a default prompt beside an empty one": lambda model: prompted(model, {"any": QUERY, "query": ""}, "any"),
    "prompts that are not pooled": not_pooled,
    "router behind the transformer": headed,
    "static": static,
    "router": None,
    "router with prompts": None,
}


def variant(folder, name):
    """A model of the kind `name`."""
    make = VARIANTS[name]
    if make is None:
        return towers(folder, prompts="prompts" in name)
    return make(SentenceTransformer(str(folder), device="cpu"))


def truth(model, texts):
    """As sentence-transformers embeds queries and documents."""
    return [
        encode(list(texts), normalize_embeddings=True, convert_to_numpy=True)
        for encode in (model.encode_query, model.encode_document)
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_side_is_embedded_as_the_model_itself_embeds_it(tiny_model_folder, name):
    model = variant(tiny_model_folder, name).eval()
    expected = truth(model, TEXTS)
    for side, vectors in zip(("query", "document"), expected, strict=True):
        np.testing.assert_allclose(embed_texts(model, TEXTS, side=side), vectors, atol=1e-6)
        with torch.no_grad():
            output = model(side_inputs(model, TEXTS, side))["sentence_embedding"]
        np.testing.assert_allclose(torch.nn.functional.normalize(output).numpy(), vectors, atol=1e-5)
    differ = name not in ("plain", "a default prompt")
    assert np.allclose(*expected, atol=1e-3) != differ  # else the comparison would find nothing
    bare = model.encode(TEXTS, prompt="", normalize_embeddings=True, **({"task": "query"} if "router" in name else {}))
    model.prompts = {"query": ""}
    np.testing.assert_allclose(embed_texts(model, TEXTS, side="query"), bare, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "static"])
def test_training_reads_what_evaluation_reads(tiny_model_folder, pairs_file, tmp_path, monkeypatch, name):
    folder = tmp_path / "start"
    variant(tiny_model_folder, name).save_pretrained(str(folder))
    pairs = read_pairs(pairs_file)
    start = SentenceTransformer(str(folder), device="cpu")
    expected = [truth(start, column)[side] for side, column in enumerate((pairs.anchors, pairs.positives))]
    forward, seen = CachedLoss.forward, []

    def compared(self, features, labels=None):
        features = list(features)
        if not seen:  # nothing is learned yet
            self.model.eval()
            with torch.no_grad():
                for column, vectors in zip(features, expected, strict=True):
                    output = self.model(dict(column))["sentence_embedding"]
                    seen.append(np.abs(torch.nn.functional.normalize(output).numpy() - vectors[labels.numpy()]).max())
            self.model.train()
        return forward(self, features, labels)

    monkeypatch.setattr(CachedLoss, "forward", compared)
    given = settings(pairs_file, folder, tmp_path / "run", "mining.method=random", "train.args.max_steps=2")
    run("train", *given)
    assert len(seen) == 2
    assert max(seen) < 1e-5
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["metrics_untrained"] == job.evaluate_model(start, pairs)
    run(
        "evaluate", str(tmp_path / "run" / "model"), "--data", str(pairs_file), "--output", str(tmp_path / "again.json")
    )
    assert json.loads((tmp_path / "again.json").read_text()) == pytest.approx(result["metrics"])


def test_two_towers_are_mined_through_their_own(tiny_model_folder, pairs_file, tmp_path):
    folder = tmp_path / "towers"
    towers(tiny_model_folder, prompts=True).save_pretrained(str(folder))
    model = SentenceTransformer(str(folder), device="cpu")
    pairs = read_pairs(pairs_file)
    anchors, positives = truth(model, pairs.anchors)[0], truth(model, pairs.positives)[1]
    (tmp_path / "run").mkdir()
    config = RunConfig(
        output=str(tmp_path / "run"),
        data=DataConfig(path=str(pairs_file)),
        teacher=TeacherConfig(name=str(folder)),
        mining=MiningConfig(cluster_size=4, window=(1, 6)),
        batch_size=8,
    )
    np.testing.assert_allclose(teacher_embeddings(config, pairs)[0], anchors, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "run" / "teacher_positive.npy"), positives, atol=1e-6)


def test_prompts_of_the_configuration_are_saved_with_the_model_and_said(
    tiny_model_folder, pairs_file, tmp_path, caplog
):
    folder = tmp_path / "start"
    variant(tiny_model_folder, "prompts").save_pretrained(str(folder))
    caplog.set_level(logging.INFO, "anybatch")
    more = ("mining.method=random", "train.args.max_steps=1", 'model.anchor_prompt="gra "', "model.positive_prompt=''")
    run("train", *settings(pairs_file, folder, tmp_path / "run", *more))
    assert f"queries with the prompt 'gra ' (given; its own is {QUERY!r})" in caplog.text
    assert f"documents without a prompt (given; its own is {DOCUMENT!r})" in caplog.text
    saved = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert (saved.prompts["query"], saved.prompts["document"]) == ("gra ", "")
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    assert SentenceTransformer(str(checkpoint), device="cpu").prompts["query"] == "gra "
    caplog.clear()
    figures = {}
    for name, options in {"own": (), "same": ("--anchor-prompt", "gra "), "none": ("--anchor-prompt", "")}.items():
        output = tmp_path / f"{name}.json"
        run("evaluate", str(tmp_path / "run" / "model"), "--data", str(pairs_file), *options, "--output", str(output))
        figures[name] = json.loads(output.read_text())
    assert "queries with the prompt 'gra '" in caplog.text
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert figures["own"] == figures["same"] == pytest.approx(trained)
    assert figures["none"] != figures["own"]


def test_names_of_routes(tiny_model_folder, tmp_path):
    assert side_task(towers(tiny_model_folder, names=("query", "doc")), "document") == "doc"
    assert (
        side_task(towers(tiny_model_folder, names=("image", "text")), "query") == "query"
    )  # by modality, as it resolves itself
    towers(tiny_model_folder, names=("left", "right")).save_pretrained(str(tmp_path / "odd"))
    with pytest.raises(AnybatchError, match=r"routes left, right, and none for a query.*'query' and 'document'"):
        load_model(ModelConfig(name=str(tmp_path / "odd"), device="cpu"))
    plain = SentenceTransformer(str(tiny_model_folder), device="cpu")
    assert side_task(plain, "query") is None
    assert side_prompt(plain, "document") == ""


def test_a_length_is_set_in_every_tower_or_refused(tiny_model_folder, tmp_path):
    towers(tiny_model_folder).save_pretrained(str(tmp_path / "towers"))
    model = load_model(ModelConfig(name=str(tmp_path / "towers"), max_length=5, device="cpu"))
    for side in ("query", "document"):
        assert side_inputs(model, [sentence(1, 20)], side)["input_ids"].shape == (1, 5)
    static = variant(tiny_model_folder, "static")
    assert static.max_seq_length == math.inf
    static.save_pretrained(str(tmp_path / "static"))
    with pytest.raises(AnybatchError, match="StaticEmbedding does not cut its texts"):
        load_model(ModelConfig(name=str(tmp_path / "static"), max_length=5, device="cpu"))


def _cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def _pickled(path):
    import pickle

    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(pickle.dumps({"a": open}, protocol=2))


@pytest.mark.parametrize(
    ("damage", "match"),
    [(_cut, "SafetensorError"), (lambda path: path.unlink(), "no file named"), (_pickled, "saved as safetensors")],
)
def test_broken_weights_are_one_message(tiny_model_folder, tmp_path, damage, match):
    SentenceTransformer(str(tiny_model_folder), device="cpu").save_pretrained(str(tmp_path / "model"))
    damage(tmp_path / "model" / "model.safetensors")
    with pytest.raises(AnybatchError, match=f"Cannot load the model .*{match}"):
        load_model(ModelConfig(name=str(tmp_path / "model"), device="cpu"))


def test_instructions_that_are_pooled_all_the_same_are_warned_of(tiny_model_folder, caplog):
    model = variant(tiny_model_folder, "prompts that are not pooled")
    sets = [PairSet(name="one", num_rows=2), PairSet(name="two", num_rows=2, anchor_prompt="find: ")]
    warn_of_instructions(model, sets[:1])
    warn_of_instructions(variant(tiny_model_folder, "prompts"), sets)
    assert caplog.text == ""
    warn_of_instructions(model, sets)
    assert "'two' are part of its texts" in caplog.text
