"""Rows that see their neighbours are refused; what only looks like it runs; padding that counts stays."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from anybatch.caching import cached_step
from anybatch.caching.row_check import MOST_ANSWERS
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import (
    Mlp,
    Softmax,
    TextEncoder,
    clone,
    gradients,
    plain_step,
    relative_error,
    texts,
    vectors,
)

pytestmark = pytest.mark.usefixtures("float64")


class Around(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between, *, dropout=0.0):
        super().__init__()
        self.first, self.second, self.between = Mlp(6, 8, dropout=dropout), Mlp(8, 5, seed=1), between

    def forward(self, x):
        return self.second(self.between(self.first(x), self.training))


def with_capacity(h, training):
    """The first rows of each expert are served, the others pass by."""
    expert = (h[:, 0] > 0).long()
    place = functional.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None])
    return torch.where(place <= len(h) // 4, h * 2, h)


SEEING = {
    "centred": lambda h, training: h - h.mean(0),
    "functional batch norm": lambda h, training: functional.batch_norm(h, None, None, training=True),
    "functional batch norm in training": lambda h, training: functional.batch_norm(
        h, torch.zeros(8), torch.ones(8), training=training
    ),
    "instance norm over rows": lambda h, training: functional.instance_norm(h.T[None])[0].T,
    "attention over rows": lambda h, training: (h @ h.T).softmax(1) @ h,
    "largest of the batch": lambda h, training: h / h.abs().max(),
    "in training alone": lambda h, training: h - h.mean(0) if training else h,
    "expert capacity": with_capacity,
    "mixed with a shuffled row": lambda h, training: 0.7 * h + 0.3 * h[torch.randperm(len(h))],
    "scaled by the number of rows": lambda h, training: h + len(h),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mini_batch_size", [1, 4])
@pytest.mark.parametrize("kind", SEEING)
def test_rows_that_see_each_other_are_refused(kind, mini_batch_size, dropout):
    if kind == "expert capacity" and mini_batch_size == 1:
        pytest.skip("a capacity of no rows")
    encoder = Around(SEEING[kind], dropout=dropout).train()
    inputs = [vectors(12), vectors(12, seed=1)]
    for _ in range(2):  # it is not forgotten
        with pytest.raises(AnybatchError, match="depends on the rows"):
            cached_step(Softmax(), encoder, inputs, mini_batch_size=mini_batch_size)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    cached_step(Softmax(), encoder, inputs, mini_batch_size=12)  # the whole batch in one pass is the plain step


def top_one(h, training):
    """Each row goes to its own expert, whatever the others do."""
    out = torch.zeros_like(h)
    for expert in range(3):
        chosen = h[:, :3].argmax(1) == expert
        if chosen.any():
            out[chosen] = h[chosen] * (expert + 1)
    return out


GENERATOR = torch.Generator()
ALONE = {
    "top-1 experts": top_one,
    "dropout": lambda h, training: functional.dropout(h, 0.3, training),
    "stochastic depth": lambda h, training: h * torch.empty(len(h), 1).bernoulli_(0.7),
    "noise": lambda h, training: h + torch.randn_like(h),
    "layer norm": lambda h, training: functional.layer_norm(h, (8,)),
    "own generator": lambda h, training: h * torch.rand(h.shape, generator=GENERATOR),
    "attention with dropout": lambda h, training: functional.scaled_dot_product_attention(
        h[:, None], h[:, None], h[:, None], dropout_p=0.2
    )[:, 0],
    "batch norm with running statistics": lambda h, training: functional.batch_norm(h, torch.zeros(8), torch.ones(8)),
}


@pytest.mark.parametrize("kind", ALONE)
def test_rows_by_themselves_run(kind):
    encoder = Around(ALONE[kind], dropout=0.2).train()
    before = torch.get_rng_state()
    cached_step(Softmax(), encoder, [vectors(12), vectors(12, seed=1)], mini_batch_size=4)
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_half_precision_is_no_dependence(dtype):
    encoder = TextEncoder(dropout=0.1, layers=4).float().train()
    with torch.autocast("cpu", dtype=dtype):
        cached_step(Softmax().float(), encoder, [texts(16, 20, 1), texts(16, 30, 2)], mini_batch_size=4)


class TwoSided(nn.Module):
    """One of its towers sees the neighbours; which one runs is told in many ways."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([Around(lambda h, training: h), Around(SEEING["centred"])])

    def forward(self, batch, number=None):
        return self.towers[int(batch["number"] if number is None else number)](batch["x"])


class OneSide:
    def __init__(self, model, number):
        self.model, self.number = model, number

    def __call__(self, batch):
        return self.model(batch, self.number)


@pytest.mark.parametrize("options", [{}, {"modules": True}])
@pytest.mark.parametrize("told", ["variable", "attribute", "argument", "number", "tensor", "word", "module"])
def test_each_tower_of_one_model_is_looked_at(told, options):
    model = TwoSided()
    options = {key: [model] for key in options}
    encoders = {
        "variable": [lambda batch, k=k: model(batch, k) for k in (0, 1)],
        "attribute": [OneSide(model, k) for k in (0, 1)],
        "argument": [functools.partial(model, number=k) for k in (0, 1)],
        "module": [nn.Sequential(Picking(), tower) for tower in model.towers],
    }.get(told, [model, model])
    mark = {"tensor": torch.tensor, "word": str}.get(told, int)
    inputs = [{"x": vectors(9, seed=k), "number": mark(k)} for k in (0, 1)]
    cached_step(
        Softmax(), encoders[0], [{**inputs[0], "x": vectors(9, seed=k)} for k in (0, 1)], mini_batch_size=3, **options
    )
    with pytest.raises(AnybatchError, match="depends on the rows"):
        cached_step(Softmax(), encoders, inputs, mini_batch_size=3, **options)


class Picking(nn.Module):
    def forward(self, batch):
        return batch["x"]


def test_a_number_that_changes_every_step_does_not_cost_a_look_each():
    model, passes = TwoSided(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    for step in range(MOST_ANSWERS + 2):
        passes.clear()
        inputs = [{"x": vectors(4, seed=k), "number": 0, "step": step} for k in (0, 1)]
        cached_step(Softmax(), model, inputs, mini_batch_size=2)
    assert len(passes) == 8  # two towers, two mini-batches, recorded and replayed


class Convolving(TextEncoder):
    """Sees the padding beside the last word, as a convolution over words does."""

    def forward(self, batch):
        hidden = self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        hidden = hidden + 0.5 * functional.pad(hidden, (0, 0, 0, 1))[:, 1:]
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def left_padded(batch):
    """The same rows with their padding in front."""
    moved = {key: torch.zeros_like(value) for key, value in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for key, value in batch.items():
            moved[key][row, value.shape[1] - length :] = value[row, :length]
    return moved


class Relative(nn.Module):
    """Positions count from the first word, so leading padding has no effect."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.widths = nn.Embedding(60, 8), nn.Embedding(40, 8), []

    def forward(self, batch):
        mask = batch["attention_mask"]
        self.widths.append(mask.shape[1])
        hidden = torch.tanh(self.words(batch["input_ids"]) + self.places((mask.cumsum(1) - 1).clamp(min=0)))
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("keep", [0, 1.0])
@pytest.mark.parametrize("padding", ["trailing", "leading"])
@pytest.mark.parametrize("kind", [TextEncoder, Convolving, Relative])
def test_padding_is_cut_where_it_has_no_effect(kind, padding, keep):
    encoder, loss = kind(), Softmax()
    inputs = [texts(14, 9, 1), texts(14, 21, 2)]
    if padding == "leading":
        inputs = [left_padded(batch) for batch in inputs]
    reference = clone(encoder)
    plain_step(clone(loss), [reference] * 2, inputs)
    for _ in range(2):
        encoder.zero_grad()
        cached_step(loss, encoder, inputs, mini_batch_size=4, keep_graphs=keep)
        assert relative_error(gradients(encoder), gradients(reference)) < 1e-12
    if kind is Relative:
        encoder.widths.clear()
        cached_step(loss, encoder, inputs, mini_batch_size=4, keep_graphs=1.0)
        assert len(set(encoder.widths)) > 4  # sorted by length, and cut
        assert max(encoder.widths) == 21


def test_given_positions_let_leading_padding_go():
    encoder = TextEncoder()

    def encode(batch):
        hidden = encoder.bert(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    inputs = [left_padded(texts(14, 9, seed)) for seed in (1, 2)]
    for batch in inputs:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    loss = Softmax()
    plain_step(clone(loss), [encode] * 2, inputs)
    wanted = gradients(encoder)
    encoder.zero_grad()
    widths = []
    cached_step(
        loss,
        lambda b: widths.append(b["input_ids"].shape[1]) or encode(b),
        inputs,
        mini_batch_size=4,
        modules=[encoder],
    )
    assert relative_error(gradients(encoder), wanted) < 1e-12
    assert min(widths) < 5
