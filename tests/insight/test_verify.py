"""verify says yes to sound encoders and names what is wrong with the others."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from anybatch.core.errors import AnybatchError
from anybatch.insight.verify import verify
from anybatch.losses import CrossBatchInfoNCE
from tests.caching.helpers import Mlp, Softmax, TextEncoder, texts


def rows(count: int = 10, seed: int = 0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("keep", [0, 1.0])
def test_a_sound_model_is_exact(dropout, keep):
    result = verify(
        TextEncoder(dropout=dropout).train(), [texts(9, 6, 1), texts(9, 12, 2)], Softmax(), keep_graphs=keep
    )
    assert result.exact, str(result)
    assert result.error < 1e-5
    assert any("word_embeddings" in name for name in result.errors)


def test_nothing_is_left_behind():
    encoder, loss = Mlp(dropout=0.5).train(), Softmax()
    encoder.layers[0].weight.grad = torch.ones_like(encoder.layers[0].weight)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    verify(encoder, [rows(), rows(seed=1)], loss)
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
    assert torch.equal(encoder.layers[0].weight.grad, torch.ones_like(encoder.layers[0].weight))
    assert loss.log_temperature.grad is None
    assert encoder.training


@pytest.mark.parametrize("start", [0, 1])
def test_a_memory_that_grows_is_put_back(start):
    """The first batch replaces its buffers of no width: the mean stayed, and later batches were measured by it."""
    loss = CrossBatchInfoNCE(50, memory_size=16)
    for _ in range(start):
        loss(rows().requires_grad_(), rows(seed=1), index=torch.arange(10, 20)).backward()
    before = {name: values.clone() for name, values in loss.state_dict().items()}
    assert verify(Mlp(dim=6), [rows(), rows(seed=1)], loss, loss_kwargs={"index": torch.arange(10)}).exact
    after = loss.state_dict()
    for name, values in before.items():
        assert torch.equal(after[name], values), name


@pytest.mark.parametrize("source", ["python", "numpy", "own", "counter"])
def test_what_a_replay_brings_back_is_exact(source):
    generator = torch.Generator().manual_seed(3)

    class Noisy(Mlp):
        calls = 0

        def forward(self, x):
            if source == "counter":
                self.calls += 1
                return super().forward(x) * (1 + 0.1 * self.calls)
            draws = {
                "python": random.random,
                "numpy": np.random.rand,
                "own": lambda: torch.rand((), generator=generator),
            }
            return super().forward(x) * (0.5 + draws[source]())

    encoder = Noisy()
    encoder.calls = 0
    result = verify(encoder, [rows(), rows(seed=1)], Softmax())
    assert result.exact, str(result)
    assert encoder.calls == 0


def test_a_source_of_randomness_out_of_reach_is_a_finding():
    encoder, system = Mlp(), random.SystemRandom()
    result = verify(lambda x: encoder(x) * (0.5 + system.random()), [rows(), rows(seed=1)], Softmax())
    assert not result.exact
    assert any("differs from its recording" in finding for finding in result.findings)


def test_rows_that_see_each_other_are_refused():
    encoder = Mlp()
    result = verify(lambda x: encoder(x - x.mean(0)), [rows(), rows(seed=1)], Softmax())
    assert not result.exact
    assert any("depends on the rows" in finding for finding in result.findings)


def test_power_iterations_of_the_forward_pass_are_exact():
    encoder = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.GELU(), nn.Linear(5, 4)
    ).train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    result = verify(encoder, [rows(), rows(seed=1)], Softmax())
    assert result.exact, str(result)
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


def test_dtype_mismatch_is_named():
    """The fault of a replay outside autocast: half precision once, full precision the other time."""
    encoder = Mlp()

    def split(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not torch.is_grad_enabled()):
            return encoder(x)

    result = verify(split, [rows(), rows(seed=1)], Softmax())
    assert any("bfloat16" in finding and "float32" in finding for finding in result.findings)


def test_a_wrong_scale_is_named():
    encoder = Mlp()

    class Scaled(nn.Module):
        """Its gradient is twice as large wherever an input has no history, as under a faulty cached loss."""

        def forward(self, anchors, candidates):
            leaf = anchors.grad_fn is None
            return Softmax()(anchors, candidates) * (2.0 if leaf else 1.0)

    result = verify(encoder, [rows(), rows(seed=1)], Scaled())
    assert any("2 times the right size" in finding for finding in result.findings)


def test_batch_norm_is_refused():
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    with pytest.raises(AnybatchError, match="BatchNorm1d"):
        verify(encoder, [rows(), rows(seed=1)], Softmax())


def test_a_batch_of_one_mini_batch_proves_nothing():
    with pytest.raises(AnybatchError, match="nothing to compare"):
        verify(Mlp(), [rows(4), rows(4, seed=1)], Softmax(), mini_batch_size=4)


def test_a_wrong_temperature_gradient_is_named():
    """Too small beside the gradient of the encoder to be seen in the whole: half of the temperature's is lost."""
    encoder = Mlp()

    class Lossy(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_temperature = nn.Parameter(torch.tensor(-2.0))

        def forward(self, anchors, candidates):
            kept = 1.0 if anchors.grad_fn is not None else 0.5
            log_temperature = kept * self.log_temperature + (1 - kept) * self.log_temperature.detach()
            a, c = (nn.functional.normalize(side, dim=1) for side in (anchors, candidates))
            return nn.functional.cross_entropy(a @ c.T / log_temperature.exp(), torch.arange(len(a)))

    result = verify(encoder, [rows(), rows(seed=1)], Lossy())
    assert not result.exact
    assert any("log_temperature gets 0.5 times" in finding for finding in result.findings), str(result)
