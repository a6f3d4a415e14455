"""What every loss promises, whatever its method."""

from __future__ import annotations

import io
import math

import pytest
import torch

from anybatch.caching import cached_step
from anybatch.core.errors import AnybatchError
from anybatch.family import AUCCL, SigLIP
from anybatch.losses import Examples, LogWeights, removed

from .methods import ALL, ROWS, STATEFUL, WIDTH, floor

DIRECTIONS = ["one_way", "both"]


def draw(seed, rows=6, extra=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    candidates = torch.randn(rows + extra, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.randint(ROWS, (rows,), generator=generator)
    index[-1] = index[0]  # a row twice in the batch
    return anchors.requires_grad_(), candidates.requires_grad_(), index


def state(loss):
    return {name: value.clone() for name, value in loss.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.double().nan_to_num(-99.0), theirs[name].double().nan_to_num(-99.0)), name


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ALL)
def test_tiles_do_not_matter(name, direction):
    results = []
    for tile in (1, 200, 10**7):
        torch.manual_seed(0)
        loss = ALL[name](temperature=0.3, direction=direction, tile_bytes=tile).double()
        for step in range(3):
            anchors, candidates, index = draw(step)
            loss.zero_grad()
            value = loss(anchors, candidates, index=index)
            value.backward()
        parameters = [parameter.grad for parameter in loss.parameters()]
        results.append([value.detach(), anchors.grad, candidates.grad, *parameters, *state(loss).values()])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ALL)
def test_only_training_with_gradients_changes_state(name, direction):
    loss = ALL[name](temperature=0.3, direction=direction)
    anchors, candidates, index = draw(0, dtype=torch.float32)
    for _ in range(2):
        loss(anchors, candidates, index=index)
    before = state(loss)
    with torch.no_grad():
        quiet = loss(*draw(1, dtype=torch.float32)[:2], index=index)
    loss.eval()
    loss(*draw(2, dtype=torch.float32)[:2], index=index).backward()
    assert_same(state(loss), before)
    assert quiet.isfinite()
    loss.train()
    loss(*draw(3, dtype=torch.float32)[:2], index=index)
    if name in STATEFUL:
        assert any(
            not torch.equal(value.nan_to_num(0), before[key].nan_to_num(0)) for key, value in state(loss).items()
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", STATEFUL)
def test_resume_equals_uninterrupted_bit_for_bit(name, direction):
    def train(loss, optimizer, steps):
        for step in steps:
            anchors, candidates, index = draw(step, dtype=torch.float32)
            loss.zero_grad()
            loss(anchors, candidates, index=index).backward()
            if optimizer is not None:
                optimizer.step()

    def make():
        torch.manual_seed(0)
        loss = STATEFUL[name](temperature=0.3, direction=direction)
        parameters = list(loss.parameters())
        return loss, torch.optim.SGD(parameters, lr=0.01) if parameters else None

    whole, whole_optimizer = make()
    train(whole, whole_optimizer, range(6))
    first, first_optimizer = make()
    train(first, first_optimizer, range(3))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second, second_optimizer = make()
    second.load_state_dict(torch.load(buffer))
    train(second, second_optimizer, range(3, 6))
    assert_same(state(whole), state(second))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("signs", [(1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (1.0, -1.0, 1.0)])
def test_hostile_similarities_stay_finite(name, direction, signs):
    """tau = .005: logits of +-200, where exp overflows float32."""
    loss = ALL[name](temperature=0.005, direction=direction, **floor(name, 0.001))
    anchors = torch.eye(WIDTH).requires_grad_()
    for sign in signs:
        candidates = (sign * torch.eye(WIDTH)).roll(1, 0).requires_grad_()
        loss.zero_grad()
        value = loss(anchors, candidates, index=torch.arange(WIDTH))
        value.backward()
    assert math.isfinite(value.item())
    for tensor in (anchors, candidates, *loss.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert math.isfinite(loss.temperature)
    for name_of, values in state(loss).items():
        assert not values.double().isinf().any(), name_of


def any_lone(queries, candidates, *, back):
    return removed((queries["lone"][:, None] + candidates["lone"]) > 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ALL)
def test_rows_without_negatives_and_batches_of_one(name, direction):
    loss = ALL[name](temperature=0.3, direction=direction)
    mask = torch.zeros(6, 6)
    mask[1], mask[:, 1] = -torch.inf, -torch.inf
    lone = torch.arange(6) == 1
    listed = lambda k: LogWeights.of(Examples(lone=lone[:k].long()), k, any_lone)  # noqa: E731
    for step in range(3):
        anchors, candidates, index = draw(step, extra=0, dtype=torch.float32)
        value = loss(anchors, candidates, index=index, log_weight=listed(6) if name == "cross batch" else mask)
        value.backward()
        assert value.isfinite()
        assert anchors.grad[1].abs().max() == 0
        assert candidates.grad[1].abs().max() == 0
        assert anchors.grad.abs().max() > 0
    lonely = loss(anchors[:1], candidates[:1], index=index[:1], log_weight=listed(1) if name == "cross batch" else None)
    lonely.backward()
    assert lonely.isfinite()
    for values in state(loss).values():
        assert not values.double().isinf().any()


@pytest.mark.parametrize("name", [name for name in STATEFUL if name != "cross batch"])  # it has no running denominators
def test_memory_is_updated_once_a_call(name):
    """Both directions, many tiles: the state after one call does not depend on how often the rule is asked."""
    states = []
    for tile_bytes in (1, 2**20):
        torch.manual_seed(0)
        loss = STATEFUL[name](temperature=0.3, direction="both", tile_bytes=tile_bytes)
        fresh = {key: value.clone() for key, value in loss.state_dict().items()}
        anchors, candidates, index = draw(0, dtype=torch.float32)
        loss(anchors, candidates, index=index).backward()
        states.append(loss.state_dict())
    assert any(not torch.equal(value, fresh[key]) for key, value in states[0].items())
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], equal_nan=True, msg=key)
    counters = [count for key, count in states[0].items() if key.endswith(("num_steps", "position"))]
    assert all(int(count) == 1 for count in counters)
    assert len(counters) == name.startswith(("nuclr", "glofnd", "emc2", "sogclr scheduled", "fastclip v1"))


@pytest.mark.parametrize("name", ALL)
def test_the_cached_step_equals_the_plain_one(name):
    """Gradients of the encoder and of the loss's own parameters, and the state, over several steps."""

    def train(mini_batch_size):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(7, WIDTH).double()
        loss = ALL[name](temperature=0.3, direction="both").double()
        for step in range(3):
            index = draw(step)[2]
            generator = torch.Generator().manual_seed(step)
            texts = [torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
            encoder.zero_grad()
            loss.zero_grad()
            if mini_batch_size is None:
                loss(encoder(texts[0]), encoder(texts[1]), index=index).backward()
            else:
                cached_step(
                    loss, [encoder, encoder], texts, mini_batch_size=mini_batch_size, loss_kwargs={"index": index}
                )
        return [p.grad for p in (*encoder.parameters(), *loss.parameters())], state(loss)

    (plain, plain_state), (cached, cached_state) = train(None), train(2)
    for mine, theirs in zip(cached, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    for key, value in cached_state.items():
        torch.testing.assert_close(value, plain_state[key], rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name):
    """Logits, sums and state are float32 or better, whatever runs around the loss."""
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        loss = ALL[name](temperature=0.05, direction="both")
        for step in range(2):
            anchors, candidates, index = draw(step, dtype=torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                value = loss(anchors, candidates, index=index)
            value.backward()
        results.append([value.detach(), anchors.grad, candidates.grad, *state(loss).values()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", STATEFUL)
def test_index_is_required_and_checked(name):
    from anybatch.core.errors import AnybatchError

    loss = STATEFUL[name](temperature=0.3)
    anchors, candidates, index = draw(0)
    with pytest.raises(AnybatchError, match="give index="):
        loss(anchors, candidates)
    with pytest.raises(AnybatchError, match="expected rows 0 to 39"):
        loss(anchors, candidates, index=index + ROWS)


@pytest.mark.parametrize("name", ALL)
def test_figures_are_plain_floats(name):
    loss = ALL[name](temperature=0.3)
    assert loss.last_stats == {}
    anchors, candidates, index = draw(0)
    loss(anchors, candidates, index=index)
    assert all(type(value) is float and math.isfinite(value) for value in loss.last_stats.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [*ALL, "siglip", "auc_cl"])
def test_an_empty_batch_is_refused_in_one_way(name, direction):
    others = {"siglip": SigLIP, "auc_cl": AUCCL}
    loss = others[name]() if name in others else ALL[name](temperature=0.3, direction=direction)
    before = state(loss)
    for negatives in (0, 2):
        anchors = torch.zeros(0, WIDTH, requires_grad=True)
        with pytest.raises(AnybatchError, match="The batch has no rows"):
            loss(anchors, torch.ones(negatives, WIDTH), index=torch.zeros(0, dtype=torch.int64))
    assert_same(state(loss), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_a_cast_leaves_what_is_learned_in_float32(name, dtype):
    """Numbers, gradients and a network's buffers: bit for bit, and a step of the optimizer afterwards moves them."""
    torch.manual_seed(0)
    loss = ALL[name](temperature=0.3)
    anchors, candidates, index = draw(0, dtype=torch.float32)
    loss(anchors, candidates, index=index).backward()
    before = state(loss)
    gradients = {key: value.grad.clone() for key, value in loss.named_parameters() if value.grad is not None}
    loss.to(dtype)
    assert_same(state(loss), before)
    for key, value in loss.named_parameters():
        assert value.dtype == torch.float32
        if key in gradients:
            assert value.grad.dtype == torch.float32
            assert torch.equal(value.grad, gradients[key])
    loss(anchors, candidates, index=index).backward()  # adds to the gradients that were there
    if gradients:
        torch.optim.SGD(loss.parameters(), lr=1e-5).step()
        moved = state(loss)
        assert all(not torch.equal(moved[key], before[key]) for key, value in gradients.items() if value.any())


@pytest.mark.parametrize("tile", [1, 10**7])
@pytest.mark.parametrize("name", [name for name in ALL if name != "cross batch"])  # which has a test of its own
def test_the_margin_is_a_mask(name, tile):
    """The same step, state included, as with the pairs given by hand, whatever the method does with what is left."""
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        loss = ALL[name](temperature=0.3, direction="one_way", tile_bytes=tile, mask_margin=None if by_hand else 0.2)
        loss = loss.double()
        for step in range(3):
            anchors, candidates, index = draw(step)
            scores = torch.cosine_similarity(anchors[:, None], candidates[None], dim=2).detach()
            mask = torch.zeros_like(scores).masked_fill_(scores > scores.diagonal()[:, None] + 0.2, -torch.inf)
            assert mask.isneginf().any()
            value = loss(anchors, candidates, index=index, log_weight=mask if by_hand else None)
            value.backward()
        results.append([value.detach(), anchors.grad, candidates.grad, *state(loss).values()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11, equal_nan=True)
