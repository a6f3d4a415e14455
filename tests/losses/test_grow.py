"""Growing with the data: a grown loss is one made for the larger number of rows whose old rows know what they knew."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from anybatch.core.errors import AnybatchError
from anybatch.family import SCENT, FastCLIP, SigLIP
from anybatch.losses import Matryoshka, RunningDenominator, SoftmaxLoss, SogCLR
from anybatch.losses.state import grown_state
from tests.ranks import on_ranks

from . import methods
from .methods import TABLE

OLD, NEW, WIDTH = 13, 20, 4
# Settings that follow from the number of rows, and a quarter, which is one number in float32 and float64.
SETTINGS = {
    **{name: {"eps": None} for name in ("fastclip v0", "fastclip v3", "isogclr", "tempnet")},
    **{name: {"temperature_lr": 0.1, "eps": None} for name in ("fastclip v2", "isogclr")},
    "nuclr": {"margin": 0.25},
    "cross batch": {"memory_size": 9},
    "glofnd": {"learn_from": 0},
    "scent": {"alpha": None},
}
PREFIXES = {"matryoshka": ("isogclr", 2), "matryoshka nuclr": ("nuclr", 3)}
NAMES = [*TABLE, *PREFIXES]
# The buffers with an entry a row, named here a second time so that one forgotten by the library shows.
PER_ROW = {"log_mean", "made_at", "log_weight", "values", "velocity"}


def of_the_size(loss):
    """What a constructor may take from the number of rows."""
    return [
        (path, name, getattr(part, name, None))
        for path, part in loss.named_modules()
        for name in ("eps", "alpha", "num_rows")
    ]


def make(name, num_rows, direction="both"):
    torch.manual_seed(0)  # networks begin at random
    method, narrow = PREFIXES.get(name, (name, None))
    options = {"temperature": 0.25, "direction": direction, **SETTINGS.get(method, {})}
    loss = methods.make(method, num_rows, WIDTH, **options)
    return (loss if narrow is None else Matryoshka(loss, [WIDTH, narrow])).double()


def step(loss, seed, high, *, train=True):
    """One batch of 7 of the first `high` rows, one of them twice: value, gradients of embeddings and of the loss's own
    parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    anchors, positives = (torch.randn(7, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    index = torch.randint(high, (7,), generator=generator)
    index[-2:] = torch.tensor([index[0], high - 1])
    loss.zero_grad()
    leaves = [side.requires_grad_() for side in (anchors, positives)]
    value = loss(*leaves, index=index)
    value.backward()
    own = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
    return [value.detach(), *(leaf.grad for leaf in leaves), *own]


def trained(name, num_rows, direction="both"):
    loss = make(name, num_rows, direction)
    for seed in range(4):
        step(loss, seed, OLD)
    with torch.no_grad():
        for number, parameter in enumerate(loss.parameters()):
            parameter += 0.01 * (number + 1)  # an optimizer was at work
    return loss


def copied_by_hand(old, name, direction):
    """A loss made for NEW rows; of the old one everything with an entry a row goes into the first rows, the rest as it
    is.
    """
    twin = make(name, NEW, direction)
    theirs = old.state_dict()
    state = twin.state_dict()
    for key, value in state.items():
        if key.rsplit(".", 1)[-1] in PER_ROW:
            assert value.shape[1] == NEW
            value[:, :OLD] = theirs[key]
        elif not key.endswith(("data_rows", "version")):
            state[key] = theirs[key].clone()
    twin.load_state_dict(state)
    return twin


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value.double().nan_to_num(-99.0), theirs[key].double().nan_to_num(-99.0)), key


@pytest.mark.parametrize("direction", ["one_way", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_a_grown_loss_equals_one_made_at_the_larger_size(name, direction):
    grown = trained(name, OLD, direction)
    parameters = list(grown.parameters())
    twin = copied_by_hand(grown, name, direction)
    saved = copy.deepcopy(grown.state_dict())
    grown.grow(NEW)
    assert all(ours is before for ours, before in zip(grown.parameters(), parameters, strict=True))
    loaded = make(name, NEW, direction)
    loaded.load_state_dict(grown_state(saved, loaded))
    for other in (grown, loaded):
        assert_same(other, twin)
        assert of_the_size(other) == of_the_size(twin)
    # Saved after growing, and loaded into a loss that was grown as well: the order of the two does not matter.
    again = make(name, OLD, direction)
    again.grow(NEW)
    again.load_state_dict(grown.state_dict())
    for seed in (7, 8):
        expected = step(twin, seed, NEW)
        for other in (grown, loaded, again):
            for ours, theirs in zip(step(other, seed, NEW), expected, strict=True):
                assert torch.equal(ours, theirs)
            assert_same(other, twin)


@pytest.mark.parametrize("name", NAMES)
def test_saved_grown_loaded_through_a_file(name, tmp_path):
    old = trained(name, OLD)
    save_file({key: value.clone() for key, value in old.state_dict().items()}, tmp_path / "old.safetensors")
    grown = make(name, OLD)
    grown.load_state_dict(load_file(tmp_path / "old.safetensors"))
    grown.grow(NEW)
    save_file({key: value.clone() for key, value in grown.state_dict().items()}, tmp_path / "new.safetensors")
    resumed = make(name, NEW)
    resumed.load_state_dict(load_file(tmp_path / "new.safetensors"))
    for ours, theirs in zip(step(grown, 9, NEW), step(resumed, 9, NEW), strict=True):
        assert torch.equal(ours, theirs)
    assert_same(grown, resumed)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("infonce", "decoupled")])
def test_it_only_grows(name):
    loss = trained(name, OLD)
    before = copy.deepcopy(loss)
    with pytest.raises(AnybatchError, match="can only grow"):
        loss.grow(OLD - 1)
    loss.grow(OLD)  # nothing to do
    assert_same(loss, before)
    if name not in ("count corrected", "cross batch"):  # which have no entry a row
        small = make(name, OLD - 1)
        with pytest.raises(AnybatchError, match="can only grow"):
            grown_state(loss.state_dict(), small)
        with pytest.raises(AnybatchError, match=r"grown_state\(state, loss\)"):
            make(name, NEW).load_state_dict(loss.state_dict())  # not without being asked


def test_settings_that_were_given_stay():
    scent = SCENT(OLD, alpha=3.0)
    for loss, eps in (
        (SogCLR(OLD, eps=0.25), 0.25),
        (SogCLR(OLD), 1 / (NEW - 1)),
        (FastCLIP(OLD), 1e-14),
        (scent, 1 / (NEW - 1)),
    ):
        loss.grow(NEW)
        assert loss.denominator.eps == eps
    assert scent.denominator.gamma.alpha == 3.0
    SigLIP(temperature=0.1).grow(NEW)  # nothing that depends on the rows


def test_one_denominator_under_two_names():
    """A state holds it twice, and both grow."""

    def two(num_rows):
        running = RunningDenominator(num_rows)
        return torch.nn.ModuleList(SoftmaxLoss(None, running, temperature=0.3) for _ in range(2))

    old, new = two(OLD), two(NEW)
    step(old[0].double(), 0, OLD)
    new.double().load_state_dict(grown_state(old.state_dict(), new))
    assert torch.equal(new[1].denominator.log_mean[:, :OLD].nan_to_num(9), old[1].denominator.log_mean.nan_to_num(9))
    assert new[1].denominator.log_mean[:, OLD:].isnan().all()
    assert new[1].denominator.visited.any()


RANKED = ("sogclr", "fastclip v2", "isogclr", "tempnet", "nuclr", "glofnd", "scent")


def share(loss, seed, high, rank):
    """This rank's part of `step`'s batch: 4 and 3 rows."""
    rows = slice(0, 4) if rank == 0 else slice(4, 7)
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(7, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    index = torch.randint(high, (7,), generator=generator)
    index[-2:] = torch.tensor([index[0], high - 1])
    loss.zero_grad()
    value = loss(*(side[rows].requires_grad_() for side in sides), index=index[rows])
    value.backward()
    return value.detach()


def worker(rank, world_size):
    states = {}
    for name in RANKED:
        loss = make(name, OLD)
        for seed in range(3):
            share(loss, seed, OLD, rank)
        loss.grow(NEW)
        states[name, "values"] = [share(loss, seed, NEW, rank) for seed in (3, 4)]
        states[name, "state"] = copy.deepcopy(loss.state_dict())
    return states


@pytest.mark.distributed
def test_growing_on_two_ranks_equals_one_process():
    ranks = on_ranks(worker, 2)
    for name in RANKED:
        alone = make(name, OLD)
        for seed in range(3):
            step(alone, seed, OLD)
        alone.grow(NEW)
        values = [step(alone, seed, NEW)[0] for seed in (3, 4)]
        for rank in ranks:
            torch.testing.assert_close(rank[name, "values"], values, rtol=1e-10, atol=1e-12)
            for key, value in alone.state_dict().items():
                torch.testing.assert_close(rank[name, "state"][key], value, rtol=1e-9, atol=1e-12, equal_nan=True)
