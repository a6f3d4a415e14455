"""Few shapes for a compiled encoder: widths rounded up, the same gradients, fewer compilations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.caching import RowSlicer, cached_step
from anybatch.caching.schedule import plan_micro_batches
from anybatch.core.errors import AnybatchError
from tests.caching import helpers
from tests.caching.helpers import Softmax, TextEncoder


def padded(lengths, width, **more):
    batch = helpers.padded(lengths, width, **more)
    ids, mask = batch["input_ids"] * 7 % 50, batch["attention_mask"]
    return {**batch, "input_ids": ids * mask + 59 * (1 - mask)}


def test_widths_are_multiples_and_padding_is_the_tokenizers():
    slicer = RowSlicer(padded([3, 1, 5, 0], 5, token_type_ids=torch.ones(4, 5).long()), pad_to_multiple=4)
    assert slicer.lengths.tolist() == [4, 4, 8, 4]
    short, long = slicer.take(torch.tensor([1, 0])), slicer.take(torch.tensor([2]))
    assert [tuple(value.shape) for value in short.values()] == [(2, 4)] * 3
    assert [tuple(value.shape) for value in long.values()] == [(1, 8)] * 3
    assert long["input_ids"][0, 5:].tolist() == [59] * 3
    assert long["attention_mask"][0].tolist() == [1] * 5 + [0] * 3
    assert long["token_type_ids"][0, 5:].tolist() == [0] * 3
    assert (
        RowSlicer(padded([5, 5], 5), pad_to_multiple=4).take(torch.tensor([0]))["input_ids"][0, 5:].tolist() == [0] * 3
    )


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=12), multiple=st.integers(1, 9), extra=st.integers(0, 3)
)
def test_nothing_real_is_lost_or_added(lengths, multiple, extra):
    batch = padded(lengths, max(1, *lengths) + extra)
    slicer = RowSlicer(batch, pad_to_multiple=multiple)
    rows = plan_micro_batches(slicer, max_tokens=20)
    assert sorted(torch.cat(rows).tolist()) == list(range(len(lengths)))
    for some in rows:
        part = slicer.take(some)
        assert part["input_ids"].shape[1] % multiple == 0
        for place, row in enumerate(some.tolist()):
            real = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            assert part["input_ids"][place][part["attention_mask"][place].bool()].tolist() == real.tolist()


@pytest.mark.parametrize("multiple", [0, -3])
def test_refused(multiple):
    with pytest.raises(AnybatchError, match="at least 1"):
        RowSlicer(padded([2], 2), pad_to_multiple=multiple)
    with pytest.raises(AnybatchError, match="Pad in the tokenizer"):
        RowSlicer(torch.zeros(3, 4), pad_to_multiple=8)
    with pytest.raises(AnybatchError, match="Pad in the tokenizer"):
        RowSlicer(padded([2, 3], 4, strange=torch.zeros(2, 4)), pad_to_multiple=8)


def steps(encode, parameters, *, multiple, num_steps=5):
    """Batches of another width each, as a tokenizer gives them; the gradients of all steps together."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.grad = None
    for _ in range(num_steps):
        inputs = []
        for _ in range(2):
            lengths = torch.randint(1, 31, (12,), generator=generator).tolist()
            inputs.append(padded(lengths, max(lengths)))
        cached_step(Softmax().double(), encode, inputs, micro_batch=4, keep_graphs=0, pad_to_multiple=multiple)
    return [parameter.grad.clone() for parameter in parameters]


def test_few_shapes_and_the_same_gradients():
    encoder = TextEncoder().double()
    parameters, shapes = list(encoder.parameters()), set()

    def encode(batch):
        shapes.add(tuple(batch["input_ids"].shape))
        return encoder(batch)

    expected = steps(encode, parameters, multiple=None)
    many = len(shapes)
    shapes.clear()
    got = steps(encode, parameters, multiple=16)
    assert shapes == {(4, 16), (4, 32)}
    assert many > 10
    scale = max(gradient.norm() for gradient in expected)
    assert all((mine - theirs).norm() < 1e-12 * scale for mine, theirs in zip(got, expected, strict=True))


def test_a_compiled_encoder_is_compiled_for_few_shapes():
    """A backend that counts: with and without a graph, for each of two widths."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    table = torch.nn.Embedding(60, 8, dtype=torch.float64)

    def mean(ids, mask):
        return (table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    fast = torch.compile(mean, backend=backend, dynamic=False)
    got = steps(lambda batch: fast(batch["input_ids"], batch["attention_mask"]), [table.weight], multiple=16)
    assert len(compiled) == 4
    expected = steps(lambda batch: mean(batch["input_ids"], batch["attention_mask"]), [table.weight], multiple=None)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
