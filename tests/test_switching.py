"""The code of docs/switching.md is executed: every "after", keys to rows, what stands in for open_clip's loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.data.shards import KeyMap
from anybatch.family import FastCLIP
from anybatch.losses import InfoNCE

from .data.test_shards import write_shard

PAGE = Path(__file__).parents[1] / "docs" / "switching.md"


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in section("open_clip"):
        exec(block, names)
    return names


def section(title: str) -> list[str]:
    """The Python code of a section."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_from_sentence_transformers(tiny_model_folder, tmp_path):
    """Both ways train: with our Trainer, and with theirs and our parts, which keep the memory."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

    texts = [f"a{number} b{number}" for number in range(16)]
    ours, parts = section("sentence-transformers")
    for name, code in (("ours", ours), ("parts", parts)):
        names: dict[str, Any] = {
            "model": SentenceTransformer(str(tiny_model_folder), device="cpu"),
            "dataset": Dataset.from_dict({"anchor": texts, "positive": texts[::-1]}),
            "args": SentenceTransformerTrainingArguments(
                str(tmp_path / name), per_device_train_batch_size=8, num_train_epochs=1, report_to="none", use_cpu=True
            ),
        }
        exec(code, names)
        names["trainer"].train()
        assert names["trainer"].state.global_step == 2
    assert list((tmp_path / "parts").glob("checkpoint-2/anybatch_loss*"))


def test_from_gradcache():
    """The gradient of `SimpleContrastiveLoss`: cross-entropy of raw dot products."""
    encoder = torch.nn.Linear(6, 4)
    queries, passages = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(0))
    (code,) = section("GradCache")
    exec(code, {"encoder": encoder, "queries": queries, "passages": passages})
    scores = encoder(queries) @ encoder(passages).T
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, torch.arange(64)), [encoder.weight])
    torch.testing.assert_close(encoder.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_from_libauc():
    """The three losses take a batch; that they agree is tests/benchmarks/test_libauc_parity.py's."""
    (code,) = section("LibAUC")
    names: dict[str, Any] = {"num_images": 40, "num_pairs": 40, "index": torch.arange(12)}
    names["first"], names["second"] = features(0)
    exec(code, names)
    (gradient,) = torch.autograd.grad(names["loss"], [names["first"]])
    assert gradient.abs().sum() > 0
    assert names["loss_fn"].denominator.visited.sum() == 2 * 12


def test_map_from_keys(recipe, tmp_path):
    """Keys of two shards have the rows in which the command line reads their samples."""
    for shard, keys in {"a": ["0003", "0001"], "b": ["0002"]}.items():
        write_shard(tmp_path / f"{shard}.tar", {key: {"txt": f"caption {key}".encode()} for key in keys})
    made = recipe["key_map"](str(tmp_path / "*.tar"))
    assert [made.row_of(key) for key in ("0003", "0001", "0002")] == [0, 1, 2]
    with pytest.raises(AnybatchError, match="no sample '0009'"):
        made.row_of("0009")
    with pytest.raises(AnybatchError, match="'0001' occurs twice"):
        KeyMap(["0001", "0002", "0001"])


def features(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randn(2, 12, 8, generator=generator, dtype=torch.float64)
    return [torch.nn.functional.normalize(side, dim=1).requires_grad_() for side in sides]


def test_stand_in_is_cliploss_without_memory(recipe):
    """The mean of the two cross-entropies, and its gradient through normalised features."""
    scale, index = torch.tensor(20.0), torch.arange(12)
    images, texts = features(0)
    loss = recipe["RememberingClipLoss"](InfoNCE(temperature=1 / 20, direction="both", normalize=False))
    given = {"image_features": images, "text_features": texts, "logit_scale": scale}
    value = loss(**given, index=index, output_dict=True)["contrastive_loss"]
    gradients = torch.autograd.grad(value, [images, texts])
    logits = scale * images @ texts.T
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, index) + cross_entropy(logits.T, index)) / 2
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [images, texts]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_stand_in_saves_the_memory(recipe):
    loss = recipe["RememberingClipLoss"](FastCLIP(40, version="v3", gamma=0.5))
    images, texts = features(1)
    for index in (torch.arange(12), torch.arange(20, 32)):
        loss(images, texts, index=index).backward()
    again = recipe["RememberingClipLoss"](FastCLIP(40, version="v3", gamma=0.5))
    again.load_state_dict(loss.state_dict())
    assert again.loss.denominator.visited.sum() == 2 * 24
    assert loss(images, texts, index=torch.arange(12)) == again(images, texts, index=torch.arange(12))


def test_calling_the_loss_k_times_is_not_one_call(recipe):
    """Why accum-freq must stay 1: the old state keeps (1 - gamma)^k of its weight."""
    states = []
    for calls in (1, 3):
        loss = recipe["RememberingClipLoss"](FastCLIP(40, version="v1", gamma=0.5))
        for seed, count in ((2, 1), (3, calls)):
            for _ in range(count):
                loss(*features(seed), index=torch.arange(12))
        states.append(loss.loss.denominator.log_mean[:, :12].exp())
    first = FastCLIP(40, version="v1", gamma=1.0)
    singles = []
    for seed in (2, 3):
        first(*features(seed), index=torch.arange(12))
        singles.append(first.denominator.log_mean[:, :12].exp())
    for state, kept in zip(states, (0.5, 0.125), strict=True):
        torch.testing.assert_close(state, kept * singles[0] + (1 - kept) * singles[1], rtol=1e-5, atol=0)
