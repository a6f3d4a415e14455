"""Two random views under the cached step: the plain step's gradient, explicit negatives, BatchNorm, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers import TwoViewLoss
from anybatch.integrations.sentence_transformers.two_views import pixel_scale
from anybatch.losses import InfoNCE, SogCLR
from anybatch.losses.rows import RowTable
from anybatch.vision.views import both_ways, view_keys, views_of

ROWS = torch.tensor([7, 3, 11, 0, 5])
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])


class Processor:
    do_normalize, image_mean, image_std = True, MEAN.tolist(), STD.tolist()


class Model(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), norm or nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten())
        self.head = nn.LazyLinear(6)
        self.processor = Processor()
        self(features(2))
        self.double()

    def forward(self, inputs):
        return {"sentence_embedding": self.head(self.layers(inputs["pixel_values"]))}


def features(num_rows, seed=0, dtype=torch.float32):
    return {"pixel_values": torch.rand(num_rows, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)}


def make(loss, seed=4, **options):
    torch.manual_seed(0)
    model = Model(options.pop("norm", None))
    two_views = TwoViewLoss(model, loss.double(), seed=seed, **options)
    two_views.step = 9
    return two_views


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("keep_graphs", [0.0, 1.0])
@pytest.mark.parametrize("num_negatives", [0, 1])
def test_equals_the_plain_step(keep_graphs, num_negatives):
    columns = [features(5, seed, torch.float64) for seed in range(1 + num_negatives)]
    ids = torch.arange(12).numpy()
    table = RowTable(ids, ids, negative_id=20 + ids[:, None] if num_negatives else None)
    for make_loss in (lambda: InfoNCE(temperature=0.1), lambda: SogCLR(12, temperature=0.1)):
        cached = make(make_loss(), rows=table, mini_batch_size=2, keep_graphs=keep_graphs)
        cached(columns, ROWS).backward()
        plain = make(make_loss())
        embedded = []
        for view in range(2 * len(columns)):
            keys = view_keys(ROWS, seed=4, step=9, view=view)[:, None]
            [pixels] = views_of(columns[view // 2]["pixel_values"], keys, MEAN, STD)
            embedded.append(plain.model({"pixel_values": pixels})["sentence_embedding"])
        anchors, candidates = both_ways(*embedded[:2])
        known = table.arguments(ROWS.repeat(2), num_candidates=10 * (1 + num_negatives))
        plain.loss(anchors, torch.cat([candidates, *embedded[2:]]), **known).backward()
        for ours, theirs in zip(gradients(cached.model), gradients(plain.model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_views_follow_row_step_and_seed():
    def gradient(rows=ROWS, step=9, seed=4):
        loss = make(InfoNCE(temperature=0.1), seed=seed, mini_batch_size=5)
        loss.step = step
        loss([features(5, dtype=torch.float64)], rows).backward()
        return gradients(loss.model)[0]

    assert torch.equal(gradient(), gradient())
    for other in (gradient(rows=ROWS + 1), gradient(step=10), gradient(seed=5)):
        assert not torch.allclose(other, gradient())


def test_batch_norm_is_frozen(caplog):
    caplog.set_level("INFO", "anybatch")
    loss = make(InfoNCE(temperature=0.1), norm=nn.BatchNorm2d(4), mini_batch_size=2)
    assert "1 BatchNorm layers keep the statistics" in caplog.text
    norm = loss.model.layers[1]
    before = norm.running_mean.clone()
    loss.train()([features(5, dtype=torch.float64)], ROWS).backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.grad.abs().sum() > 0


def test_a_model_without_a_processor_takes_pixels_as_they_are():
    mean, std = pixel_scale(nn.Linear(1, 1))
    assert (mean.tolist(), std.tolist()) == ([0] * 3, [1] * 3)


def test_messages():
    loss = make(InfoNCE(temperature=0.1), mini_batch_size=2)
    with pytest.raises(AnybatchError, match=r"row numbers \(with_index\) did not arrive"):
        loss([features(5)])
    with pytest.raises(AnybatchError, match="a column holds 'input_ids'; expected 'pixel_values'"):
        loss([{"input_ids": torch.ones(5, 2)}], ROWS)
    loss.step = None
    with pytest.raises(AnybatchError, match=r"the step \(LossStateCallback\) did not arrive"):
        loss([features(5)], ROWS)
