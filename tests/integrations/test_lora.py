"""Settings that are passed to the library that owns them: adapters, the loader's, the processor's, checkpointing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.lora import add_lora, merge_lora
from anybatch.integrations.sentence_transformers.model import ModelConfig, checkpoint_layers, load_model
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses.registry import LossConfig
from anybatch.run import job
from anybatch.run.config import DataConfig, RunConfig

from .. import vision_models
from ..conftest import sentence

TEXTS = [sentence(number, 2 + number % 5) for number in range(8)]


class Killed(Exception):
    pass


def train_whole_and_killed(config, folder):
    """Train as configured, and once more in `folder`/killed: killed in the third step, then resumed."""
    job.train(config)

    def kill(stage, done, total, figures=None):
        if stage == "training" and done == 3:
            raise Killed

    killed = replace(config, output=str(folder / "killed"))
    with pytest.raises(Killed):
        job.train(killed, progress=kill)
    job.train(killed, resume=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_with_adapters_ends_as_if_nothing_had_happened(pairs_file, tiny_model_folder, tmp_path, dtype):
    """Dropout in model and adapters, layers computed again; what is saved is a plain model."""
    config = RunConfig(
        output=str(tmp_path / "whole"),
        data=DataConfig(path=str(pairs_file)),
        model=ModelConfig(
            name=str(tiny_model_folder), device="cpu", lora={"r": 2, "lora_dropout": 0.1}, kwargs={"dtype": dtype}
        ),
        batch_size=16,
        loss=LossConfig(name="infonce"),
        train=TrainConfig(
            save_steps=2,
            learning_rate=0.01,
            mini_batch_size=4,
            keep_graphs=0.5,
            gradient_checkpointing=True,
            args={"max_steps": 4},
        ),
    )
    train_whole_and_killed(config, tmp_path)
    names = ("model/model.safetensors", "checkpoints/checkpoint-4/adapter_model.safetensors")
    for name in names:
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert {value.dtype for value in whole.values()} == {torch.float32}, "small steps count in adapters"

    base, trained = (
        SentenceTransformer(str(path), device="cpu") for path in (tiny_model_folder, tmp_path / "whole/model")
    )
    assert trained.state_dict().keys() == base.state_dict().keys()
    assert trained.dtype == getattr(torch, dtype)
    base = base.to(trained.dtype).state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, base[name])}
    layers = [
        f"0.model.encoder.layer.{layer}.attention.self.{part}.weight" for layer in (0, 1) for part in ("query", "value")
    ]
    assert changed == set(layers)


def test_merged_adapters_compute_what_they_did_beside_the_weights(tiny_model_folder):
    plain = load_model(ModelConfig(name=str(tiny_model_folder), device="cpu"))
    settings = {"r": 4, "target_modules": ["dense"], "init_lora_weights": False}
    model, again = (load_model(ModelConfig(name=str(tiny_model_folder), device="cpu", lora=settings)) for _ in range(2))
    beside = model.encode(TEXTS)
    assert np.array_equal(again.encode(TEXTS), beside), "the same weights at every load"
    assert {name.split(".")[-3] for name, value in model.named_parameters() if value.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    merge_lora(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert np.allclose(model.encode(TEXTS), beside, atol=1e-6)
    assert not np.allclose(plain.encode(TEXTS), beside, atol=1e-3)
    merge_lora(plain)  # nothing to merge
    add_lora(model, settings)  # and it can have others


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lora": {"rank": 8}}, r"model.lora is \{'rank': 8\}, and peft says: .*'rank'.*such as \{r: 8"),
        ({"lora": {"r": 0}}, "peft says: .*positive"),
        ({"lora": {"target_modules": ["nothing"]}}, "peft says: .*not found"),
        ({"lora": {"r": 8}, "num_layers": 1}, "model.lora and model.num_layers"),
        ({"kwargs": {"dtype": "float33"}}, "with the kwargs {'dtype': 'float33'}, which transformers"),
        ({"kwargs": {"heads": 3}}, "with the kwargs {'heads': 3}.*'heads'"),
        ({"kwargs": {"processor": {"padding_side": "up"}}}, "with the kwargs {'processor': {'padding_side': 'up'}}"),
        ({"kwargs": {"processor": 3}}, r"model\.kwargs\.processor is 3; expected a mapping"),
        ({"lora": 8}, "model.lora is 8; expected a mapping such as {key: value}, or nothing"),
        ({"kwargs": {"dtype": torch.float16}}, "model.kwargs is .*; expected a mapping"),
    ],
)
def test_what_the_library_refuses_is_one_message(tiny_model_folder, settings, match):
    with pytest.raises(AnybatchError, match=match):
        load_model(ModelConfig(name=str(tiny_model_folder), device="cpu", **settings))


def test_settings_reach_loader_and_processor(tiny_model_folder):
    given = {"attn_implementation": "eager", "processor": {"model_max_length": 9}}
    model = load_model(ModelConfig(name=str(tiny_model_folder), device="cpu", kwargs=given))
    assert model[0].model.config._attn_implementation == "eager"
    assert model.preprocess([sentence(1, 20)])["input_ids"].shape == (1, 9)
    assert given["processor"] == {"model_max_length": 9}, "the library writes into what it is given"


def test_checkpointing_of_a_model_without_layers_is_refused(tiny_model_folder):
    model = load_model(ModelConfig(name=str(tiny_model_folder), device="cpu"))
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=4)], device="cpu")
    with pytest.raises(AnybatchError, match=r"train.gradient_checkpointing is on, and this model has no layers"):
        checkpoint_layers(static)
    model[0].model.supports_gradient_checkpointing = False
    with pytest.raises(AnybatchError, match=r"train.gradient_checkpointing is on"):
        checkpoint_layers(model)


@pytest.mark.parametrize(
    "beside",
    [{"modules_to_save": ["LayerNorm"]}, {"bias": "all"}, {"trainable_token_indices": {"word_embeddings": [5, 6, 7]}}],
)
def test_what_is_trained_beside_the_adapters_is_saved_as_well(pairs_file, tiny_model_folder, tmp_path, beside):
    config = RunConfig(
        output=str(tmp_path / "whole"),
        data=DataConfig(path=str(pairs_file)),
        model=ModelConfig(name=str(tiny_model_folder), device="cpu", lora={"r": 2, **beside}),
        batch_size=16,
        loss=LossConfig(name="infonce"),
        train=TrainConfig(save_steps=2, learning_rate=0.01, mini_batch_size=4, args={"max_steps": 3}),
    )
    train_whole_and_killed(config, tmp_path)
    folders = (tiny_model_folder, tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    before, after, resumed = (load_file(folder / "model.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    part = {"modules_to_save": "LayerNorm", "bias": "LayerNorm.bias"}.get(next(iter(beside)), "word_embeddings")
    assert any(part in name and not torch.equal(value, after[name]) for name, value in before.items())
    assert all(torch.equal(value, resumed[name]) for name, value in after.items())


def test_a_setting_that_the_processor_does_not_have_is_said(caplog):
    folder = str(vision_models.folder_of("vit"))
    load_model(
        ModelConfig(
            name=folder, device="cpu", kwargs={"processor": {"do_resize": True, "size": {"height": 16, "width": 16}}}
        )
    )
    assert "kwargs.processor" not in caplog.text
    load_model(ModelConfig(name=folder, device="cpu", kwargs={"processor": {"max_pixel": 256}}))
    assert "kwargs.processor has 'max_pixel', which is no attribute of the model's ViTImageProcessorPil" in caplog.text
