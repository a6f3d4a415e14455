"""The cached step equals the plain step in float64, whatever the towers and the loss."""

import pytest
import torch
from torch import nn

from anybatch.caching import cached_step, plan_mini_batches
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import (
    Mlp,
    Softmax,
    TextEncoder,
    clone,
    cut_and_trim,
    gradients,
    plain_step,
    plain_step_in_pieces,
    relative_error,
    texts,
    vectors,
)

EXACT = 1e-12


pytestmark = pytest.mark.usefixtures("float64")


def both_ways(loss, encoders, inputs, *, plain_kwargs=None, **options):
    """Relative error of the gradients and of the loss, cached against plain, on copies of everything."""
    distinct = list(dict.fromkeys(encoders))
    copies = {encode: clone(encode) for encode in distinct}
    loss_copy = clone(loss)
    wanted_value = plain_step(
        loss_copy,
        [copies[encode] for encode in encoders],
        inputs,
        loss_kwargs=options.get("loss_kwargs"),
        scale=options.get("scale", 1.0),
    )
    value = cached_step(loss, list(encoders), inputs, **options)
    wanted = gradients(*[copies[encode] for encode in distinct], loss_copy)
    error = relative_error(gradients(*distinct, loss), wanted)
    torch.testing.assert_close(value, wanted_value, rtol=EXACT, atol=0)
    return error


@pytest.mark.parametrize("rows", [2, 8, 13])
@pytest.mark.parametrize("keep", [0, 1, 0.25, 0.5, 1.0, "auto"])
def test_tied_text_towers(rows, keep):
    encoder = TextEncoder()
    inputs = [texts(rows, 7, 1), texts(rows, 15, 2)]
    assert both_ways(Softmax(), [encoder, encoder], inputs, mini_batch_size=4, keep_graphs=keep) < EXACT


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("options", [{"mini_batch_size": 5}, {"mini_batch_size": None, "max_tokens": 40}])
def test_untied_towers(sort, options):
    encoders = [TextEncoder(seed=1), TextEncoder(seed=2, layers=1)]
    inputs = [texts(12, 9, 1), texts(12, 16, 2)]
    assert both_ways(Softmax(), encoders, inputs, sort_by_length=sort, **options) < EXACT


@pytest.mark.parametrize("towers", [2, 3, 4])
def test_explicit_negatives_with_a_tail(towers):
    encoder = Mlp()
    inputs = [vectors(11, seed=0), vectors(11, seed=1), *[vectors(7 + k, seed=2 + k) for k in range(towers - 2)]]
    assert both_ways(Softmax(), [encoder] * towers, inputs, mini_batch_size=4) < EXACT


def test_one_tower():
    class Spread(nn.Module):
        def forward(self, embeddings):
            return nn.functional.pdist(embeddings).neg().exp().mean()

    assert both_ways(Spread(), [Mlp()], [vectors(9)], mini_batch_size=2) < EXACT


def test_a_mask_and_the_outer_scale():
    """luyug/GradCache: keyword arguments to the loss raise."""
    encoder = Mlp()
    log_weight = torch.zeros(10, 10)
    log_weight[0, 1] = log_weight[3, 7] = -torch.inf
    options = {"loss_kwargs": {"log_weight": log_weight}, "scale": 1024.0, "mini_batch_size": 3}
    assert both_ways(Softmax(), [encoder, encoder], [vectors(10), vectors(10, seed=1)], **options) < EXACT


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("keep", [0, 1.0])
def test_a_frozen_tower_runs_once(frozen, keep):
    encoders = [Mlp(seed=1), Mlp(seed=2)]
    encoders[frozen].requires_grad_(False)
    calls = [0, 0]
    for number, encoder in enumerate(encoders):
        encoder.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    inputs = [vectors(9), vectors(9, seed=1)]
    reference = [clone(encoder) for encoder in encoders]
    plain_step(Softmax(), reference, inputs)
    cached_step(
        Softmax(), encoders, inputs, mini_batch_size=3
    )  # the first step also looks at half of a mini-batch alone
    calls[:] = [0, 0]
    for encoder in encoders:
        encoder.zero_grad()
    cached_step(Softmax(), encoders, inputs, mini_batch_size=3, keep_graphs=keep)
    assert relative_error(gradients(*encoders), gradients(*reference)) < EXACT
    assert calls[frozen] == 3
    assert calls[1 - frozen] == (3 if keep == 1.0 else 6)


def test_lora():
    from peft import LoraConfig, get_peft_model

    encoder = TextEncoder()
    encoder.bert = get_peft_model(encoder.bert, LoraConfig(r=2, target_modules=["query", "value"]))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    inputs = [texts(10, 7, 1), texts(10, 12, 2)]
    assert both_ways(Softmax(), [encoder, encoder], inputs, mini_batch_size=4) < EXACT
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of the recording, which needs none
@pytest.mark.parametrize("keep", [0, 0.5, "auto"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside_the_encoder(keep, reentrant):
    """Recomputed layers draw their dropout masks a third time: as without checkpointing, to the last bit."""
    inputs, found = [texts(10, 7, 1), texts(10, 12, 2)], []
    for checkpointing in (False, True):
        encoder, calls = TextEncoder(dropout=0.3).train(), []
        if checkpointing:
            encoder.bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        encoder.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_, calls=calls: calls.append(True))
        torch.manual_seed(4)
        cached_step(Softmax(), encoder, inputs, mini_batch_size=4, keep_graphs=keep)
        found.append((gradients(encoder), len(calls)))
    (plain, passes), (checkpointed, more) = found
    assert more > passes  # layers were recomputed
    assert relative_error(checkpointed, plain) == 0.0


@pytest.mark.parametrize("keep", [0, 2, 0.5, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_dropout_is_replayed(keep, tied):
    first = TextEncoder(dropout=0.3, seed=1)
    encoders = [first, first if tied else TextEncoder(dropout=0.2, seed=2)]
    reference = [clone(first)]
    reference.append(reference[0] if tied else clone(encoders[1]))
    inputs = [texts(11, 6, 1), texts(11, 14, 2)]
    plans = [plan_mini_batches(batch, mini_batch_size=4) for batch in inputs]
    torch.manual_seed(3)
    wanted = plain_step_in_pieces(Softmax(), reference, inputs, plans, cut_and_trim)
    after = torch.rand(4)
    torch.manual_seed(3)
    value = cached_step(Softmax(), encoders, inputs, mini_batch_size=4, keep_graphs=keep)
    torch.testing.assert_close(torch.rand(4), after, rtol=0, atol=0)  # the generator ends where a plain step ends
    torch.testing.assert_close(value, wanted, rtol=EXACT, atol=0)
    assert relative_error(gradients(*dict.fromkeys(encoders)), gradients(*dict.fromkeys(reference))) < EXACT
    # The comparison sees the masks: another seed gives other gradients.
    other = [clone(reference[0])] * 2 if tied else [clone(module) for module in reference]
    plain_step_in_pieces(Softmax(), other, inputs, plans, cut_and_trim)
    assert relative_error(gradients(*dict.fromkeys(other)), gradients(*dict.fromkeys(reference))) > 1e-3


def test_temperature_gradient_comes_once():
    """open_clip with --accum-freq k: the temperature's gradient is k times too large."""
    encoder, loss = Mlp(), Softmax()
    inputs = [vectors(12), vectors(12, seed=1)]
    reference = clone(loss)
    plain_step(reference, [clone(encoder)] * 2, inputs)
    cached_step(loss, encoder, inputs, mini_batch_size=3)
    torch.testing.assert_close(loss.log_temperature.grad, reference.log_temperature.grad, rtol=EXACT, atol=0)
    assert loss.calls == 1  # sentence-transformers: once for every chunk of every column


def test_gradient_is_not_multiplied_by_the_batch_size():
    """PyLate 1.6: B times too large."""
    encoder = Mlp()
    ratios = []
    for rows in (4, 16):
        inputs = [vectors(rows), vectors(rows, seed=1)]
        reference = clone(encoder)
        plain_step(Softmax(), [reference] * 2, inputs)
        encoder.zero_grad()
        cached_step(Softmax(), encoder, inputs, mini_batch_size=4)
        norm = torch.cat([p.grad.flatten() for p in encoder.parameters()]).norm()
        ratios.append(norm / torch.cat([p.grad.flatten() for p in reference.parameters()]).norm())
    torch.testing.assert_close(torch.stack(ratios), torch.ones(2), rtol=EXACT, atol=0)


def test_gradients_accumulate_like_backward():
    encoder = Mlp()
    inputs = [vectors(6), vectors(6, seed=1)]
    reference = clone(encoder)
    for _ in range(2):
        plain_step(Softmax(), [reference] * 2, inputs)
        cached_step(Softmax(), encoder, inputs, mini_batch_size=4, keep_graphs=1)
    assert relative_error(gradients(encoder), gradients(reference)) < EXACT


def test_batch_norm_is_refused_by_name():
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    inputs = [vectors(6), vectors(6, seed=1)]
    with pytest.raises(AnybatchError, match=r"1 is a BatchNorm1d.*eval.*LayerNorm"):
        cached_step(Softmax(), encoder, inputs, mini_batch_size=2)
    with pytest.raises(AnybatchError, match="BatchNorm1d"):
        cached_step(Softmax(), lambda batch: encoder(batch), inputs, mini_batch_size=2)
    assert encoder[1].num_batches_tracked == 0
    encoder[1].eval()
    assert both_ways(Softmax(), [encoder, encoder], inputs, mini_batch_size=2) < EXACT


@pytest.mark.parametrize(
    ("loss", "encoders", "towers", "match"),
    [
        (lambda a, c: a.sum(), Mlp(), 2, r"tower\(s\) 1"),
        (Softmax().requires_grad_(False), Mlp().requires_grad_(False), 2, "frozen"),
        (lambda a, c: (a * c).sum(1), Mlp(), 2, r"shape \(4,\)"),
        (Softmax(), [Mlp(), Mlp()], 3, "2 encoders for 3 towers"),
    ],
)
def test_what_makes_no_step(loss, encoders, towers, match):
    with pytest.raises(AnybatchError, match=match):
        cached_step(loss, encoders, [vectors(4).float()] * towers, mini_batch_size=2)


def test_inputs_that_need_a_gradient():
    """A frozen encoder with learned inputs is replayed: the inputs train."""
    encoder = Mlp().requires_grad_(False)
    learned, fixed = vectors(7).requires_grad_(), vectors(7, seed=1)
    plain_step(Softmax(), [encoder, encoder], [learned, fixed])
    wanted, learned.grad = learned.grad, None
    cached_step(Softmax(), encoder, [learned, fixed], mini_batch_size=3)
    torch.testing.assert_close(learned.grad, wanted, rtol=EXACT, atol=1e-16)
