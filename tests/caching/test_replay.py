"""Recordings: what is kept, what is replayed, and under which random state, autocast and mode."""

import gc
import weakref

import pytest
import torch
from torch import nn

from anybatch.caching import record_towers, replay
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import (
    Mlp,
    TextEncoder,
    clone,
    gradients,
    num_kept,
    recorded,
    relative_error,
    send_back,
    texts,
)


def rows(count: int = 10, seed: int = 0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_embeddings_are_one_leaf_in_the_order_of_the_batch():
    encoder, batch = TextEncoder().eval(), texts(10, 9, 1)
    recording = recorded(encoder, batch)
    assert recording.embeddings.is_leaf
    assert recording.embeddings.requires_grad
    assert recording.embeddings.dtype == torch.float32
    torch.testing.assert_close(recording.embeddings.detach(), encoder(batch).detach())


@pytest.mark.parametrize("keep", [0, 1.0])
def test_several_tensors_from_one_forward_pass(keep):
    encoder, batch = Mlp().double(), rows().double()

    def two(x):
        out = encoder(x)
        return out, (out**2).sum(1), x

    recording = recorded(two, batch, keep_graphs=keep)
    first, second, third = recording.leaves
    assert [leaf.requires_grad for leaf in recording.leaves] == [True, True, False]
    assert second.shape == (10,)
    with pytest.raises(AnybatchError, match="leaves"):
        _ = recording.embeddings
    (first.sin().sum() * second.mean() + third.sum()).backward()
    send_back(recording, first.grad, second.grad, None)
    reference = clone(encoder)
    out = reference(batch)
    (out.sin().sum() * (out**2).sum(1).mean()).backward()
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-12


def test_a_gradient_that_is_not_used_may_be_left_out():
    encoder = Mlp()
    recording = recorded(lambda x: (encoder(x), encoder(x) * 2), rows())
    send_back(recording, torch.ones(10, 5), None)
    reference = clone(encoder)
    reference(rows()).sum().backward()
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-5


@pytest.mark.parametrize("cached_casts_of_the_caller", [True, False])
@pytest.mark.parametrize("keep", [0, 2, 1.0])
def test_replay_runs_in_the_autocast_of_the_recording(keep, cached_casts_of_the_caller):
    """sentence-transformers: the second pass runs outside autocast, bf16 first and fp32 then."""
    encoder, seen = Mlp(), []
    encoder.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    reference = clone(encoder)
    batch = rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if cached_casts_of_the_caller:
            with torch.no_grad():
                encoder(batch)  # leaves casts without a graph in the cache, which must not reach the recording
        recording = recorded(encoder, batch, keep_graphs=keep)
    assert recording.embeddings.dtype == torch.float32
    recording.embeddings.sin().sum().backward()
    send_back(recording, recording.embeddings.grad)
    assert set(seen) == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.cat([reference(part) for part in batch.split(3)])
    out.float().sin().sum().backward()
    torch.testing.assert_close(recording.embeddings.detach(), out.float().detach(), rtol=0, atol=0)
    # Same mini-batches, same casts: only the order of float32 additions differs.
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-2
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_gradients_equal_those_of_one_graph_over_the_same_mini_batches():
    encoder = Mlp()
    reference = clone(encoder)
    batch = rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recording = recorded(encoder, batch)
    recording.embeddings.sin().sum().backward()
    send_back(recording, recording.embeddings.grad)
    for part in batch.split(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = reference(part)
        out.float().sin().sum().backward()
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-6


def test_replay_inside_the_callers_autocast():
    encoder = Mlp()
    outside, inside = clone(encoder), clone(encoder)
    for module, context in ((outside, torch.autocast("cpu", enabled=False)), (inside, None)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            recording = recorded(module, rows())
            grad = torch.ones_like(recording.embeddings)
            if context is None:
                send_back(recording, grad)
        if context is not None:
            send_back(recording, grad)
    assert relative_error(gradients(inside), gradients(outside)) == 0


def test_what_happens_between_recording_and_replay_does_no_harm():
    """Another mode, numbers drawn. luyug/GradCache, functional form: random states are not put back."""
    encoder = Mlp(dropout=0.5).train()
    reference = clone(encoder)
    torch.manual_seed(1)
    recording = recorded(encoder, rows())
    encoder.eval()
    torch.rand(100)
    state = torch.get_rng_state()
    send_back(recording, torch.ones(10, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in encoder.modules())
    torch.manual_seed(1)
    torch.cat([reference(part) for part in rows().split(3)]).sum().backward()
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-5


def test_the_outer_gradient_scales_before_half_precision():
    """A loss scale must reach the gradient before it is rounded to the dtype of the embeddings."""
    encoder = Mlp().half()
    tiny = torch.full((10, 5), 1e-9)
    recording = recorded(encoder, rows().half())
    send_back(recording, tiny, scale=torch.tensor(2.0**16))
    assert encoder.layers[-1].bias.grad.abs().min() > 0
    torch.testing.assert_close(
        encoder.layers[-1].bias.grad.float(), torch.full((5,), 10 * 1e-9 * 2.0**16), rtol=1e-2, atol=0
    )


def test_kept_graphs_only_while_needed():
    encoder = Mlp()
    graphs = []

    def watched(x):
        out = encoder(x)
        if out.requires_grad:
            graphs.append(weakref.ref(out))
        return out

    for _ in range(2):
        graphs.clear()
        recording = recorded(watched, rows(12), keep_graphs=0)
        gc.collect()
        assert not any(graph() is not None for graph in graphs)
        assert num_kept(recording) == 0
    assert len(graphs) == 1  # after the first step one graph tells that the encoder trains
    graphs.clear()
    recording = recorded(watched, rows(12), keep_graphs=2)
    assert num_kept(recording) == 2
    send_back(recording, torch.ones(12, 5))
    gc.collect()
    assert num_kept(recording) == 0
    assert all(graph() is None for graph in graphs)


def test_frozen_encoders_are_not_replayed():
    """luyug/GradCache: a frozen tower crashes."""
    encoder = Mlp().requires_grad_(False)
    recording = recorded(encoder, rows())
    assert not any(piece.trains for piece in recording.pieces)
    assert not recording.embeddings.requires_grad
    send_back(recording, None)


def test_a_tower_that_trains_only_on_some_rows():
    """The first mini-batch needs no gradient, a later one does: found out, not assumed."""
    encoder = Mlp().double()
    batch = rows(9).double()
    batch[:, 0] = torch.arange(9)

    def routed(x):
        return encoder(x) if x[0, 0] >= 3 else encoder(x).detach()

    recording = recorded(routed, batch)
    send_back(recording, torch.ones(9, 5, dtype=torch.float64))
    reference = clone(encoder)
    reference(batch[3:]).sum().backward()
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-12


def test_no_gradients_no_replay():
    with torch.no_grad():
        recording = recorded(Mlp(), rows())
    assert not any(piece.trains for piece in recording.pieces)
    assert not recording.embeddings.requires_grad


def test_misuse():
    recording = recorded(Mlp(), rows())
    with pytest.raises(AnybatchError, match="2 gradients for 1"):
        send_back(recording, torch.ones(10, 5), None)
    with pytest.raises(AnybatchError, match=r"\(5, 5\) for a leaf of shape \(10, 5\)"):
        send_back(recording, torch.ones(5, 5))
    send_back(recording, torch.ones(10, 5))
    with pytest.raises(AnybatchError, match="already"):
        send_back(recording, torch.ones(10, 5))
    with pytest.raises(AnybatchError, match="no rows"):
        recorded(Mlp(), torch.zeros(0, 6))
    with pytest.raises(AnybatchError, match="returned dict"):
        recorded(lambda x: {"sentence_embedding": x}, rows())
    with pytest.raises(AnybatchError, match="for 3 rows"):
        recorded(lambda x: x[:1], rows())
    with pytest.raises(AnybatchError, match="same shape"):
        recorded(lambda x: x[:, : len(x)], rows(10), mini_batch_size=4)


@pytest.mark.parametrize("keep", [0, 1])
def test_several_recordings_share_one_encoder(keep):
    encoder = Mlp(dropout=0.3).double().train()
    reference = clone(encoder)
    batches = [rows(7).double(), rows(5, seed=1).double()]
    torch.manual_seed(2)
    recordings = record_towers([encoder] * 2, batches, mini_batch_size=3, keep_graphs=keep)
    loss = nn.functional.cosine_similarity(recordings[0].embeddings[:5], recordings[1].embeddings).sum()
    loss.backward()
    replay(recordings, [[r.embeddings.grad] for r in recordings])
    torch.manual_seed(2)
    outs = [torch.cat([reference(part) for part in batch.split(3)]) for batch in batches]
    nn.functional.cosine_similarity(outs[0][:5], outs[1]).sum().backward()
    assert relative_error(gradients(encoder), gradients(reference)) < 1e-12
