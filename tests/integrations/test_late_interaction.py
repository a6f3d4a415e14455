"""The cached step over a tiny multi-vector model against sentence-transformers' own losses, in float64."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import CachedLateInteraction
from anybatch.losses.late_interaction import LateInteraction

from ..conftest import sentence


@pytest.fixture
def model(tiny_model_folder):
    """Token embeddings of width 16, normalised."""
    torch.manual_seed(0)
    return MultiVectorEncoder(str(tiny_model_folder.parent / "bert"), device="cpu").double()


def columns(model, rows=9, negatives=1):
    found = []
    for column in range(2 + negatives):
        texts = [sentence(row + 40 * column, 2 + (row * (column + 2)) % 9) for row in range(rows)]
        task = "query" if column == 0 else "document"
        found.append({**model.preprocess(texts, task=task), "task": task})
    return found


def gradients(loss, features, outer=1.0):
    loss.zero_grad()
    torch.manual_seed(5)
    value = loss([dict(column) for column in features])
    (value * outer).backward()
    return value.item(), {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def worst(ours, theirs):
    scale = max(gradient.norm() for gradient in theirs.values())
    assert set(ours) == set(theirs)
    return max(((ours[name] - theirs[name]).norm() / scale).item() for name in theirs)


@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"mini_batch_size": 2, "keep_graphs": 0.0},
        {"mini_batch_size": 4, "keep_graphs": 0.5},
        {"mini_batch_size": "auto"},
    ],
)
def test_equals_the_plain_loss(model, negatives, options):
    model.eval()
    features = columns(model, negatives=negatives)
    value, ours = gradients(CachedLateInteraction(model, LateInteraction(normalize=False), **options), features)
    expected, theirs = gradients(MultiVectorMultipleNegativesRankingLoss(model), features)
    assert value == pytest.approx(expected, rel=1e-6)  # their scores are float32
    assert worst(ours, theirs) < 1e-5


def test_equals_the_cached_loss_it_replaces(model):
    model.eval()
    features = columns(model)
    _, ours = gradients(
        CachedLateInteraction(model, LateInteraction(normalize=False), mini_batch_size=3), features, outer=0.25
    )
    _, theirs = gradients(CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=3), features, outer=0.25)
    assert worst(ours, theirs) < 1e-5


def test_dropout_is_replayed_and_the_temperature_waits(model):
    """Replayed, kept or half kept: the same, with dropout on; half of the outer gradient is half of everything."""
    model.train()
    features = columns(model)
    found = {}
    for keep, outer in ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.0, 0.5)):
        loss = CachedLateInteraction(
            model, LateInteraction(learnable_temperature=True), mini_batch_size=4, keep_graphs=keep
        )
        found[keep, outer] = gradients(loss, features, outer)[1]
    for keep in (0.5, 1.0):
        assert worst(found[keep, 1.0], found[0.0, 1.0]) < 1e-12
    half = {name: 2 * gradient for name, gradient in found[0.0, 0.5].items()}
    assert "loss.temperatures.log_temperature" in half
    assert worst(half, found[0.0, 1.0]) < 1e-12


def test_evaluation_and_mistakes(model):
    loss = CachedLateInteraction(model.eval(), LateInteraction(), mini_batch_size=4)
    with torch.no_grad():
        assert torch.isfinite(loss(columns(model)))
    with pytest.raises(AnybatchError, match="1 input column"):
        loss(columns(model)[:1])
