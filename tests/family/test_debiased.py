"""The debiased loss against its formula (equations 7 and 8 of arXiv 2007.00224), with the clamp and without."""

from __future__ import annotations

import math

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.family.debiased import DebiasedInfoNCE
from anybatch.losses import InfoNCE
from anybatch.losses.registry import LossConfig, build_loss
from tests import twin


def formula(tau_plus, temperature):
    def of_row(positive, negatives, drawn):
        if not len(negatives):
            return 0.0 * positive
        mean = (negatives.exp().sum() / drawn - tau_plus * positive.exp()) / (1 - tau_plus)
        return torch.log(1 + drawn * mean.clamp(min=math.exp(-1 / temperature)) / positive.exp())

    return of_row


# A large share is clamped where the positive is near, a small one nowhere.
@pytest.mark.parametrize(("tau_plus", "temperature"), [(0.01, 0.5), (0.1, 0.5), (0.5, 0.2), (0.0, 0.1)])
def test_equals_its_formula(tau_plus, temperature):
    twin.check(DebiasedInfoNCE, formula(tau_plus, temperature), temperature=temperature, tau_plus=tau_plus)


@pytest.mark.distributed
def test_ranks_equal_one_process():
    twin.check_ranks(DebiasedInfoNCE, temperature=0.5, tau_plus=0.3)


def test_clamped_rows_push_no_negative():
    anchors, negatives = torch.eye(4, 6)[:2].requires_grad_(), (-torch.eye(4, 6)[2:]).requires_grad_()
    loss = DebiasedInfoNCE(tau_plus=0.5)
    value = loss(anchors, torch.cat([anchors.detach(), negatives]))
    value.backward()
    assert value.item() == pytest.approx(math.log(1 + 3 * math.exp(-2 / 0.5)), rel=1e-6)
    assert negatives.grad.abs().max() == 0
    assert math.isfinite(loss.last_stats["log_denominator"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stays_finite_in_float32_at_low_temperatures(sign):
    anchors = torch.eye(4).requires_grad_()
    value = DebiasedInfoNCE(temperature=0.005)(anchors, sign * torch.eye(4).roll(1, 0))
    value.backward()
    assert value.isfinite()
    assert anchors.grad.isfinite().all()


def test_no_share_is_infonce():
    sides = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(DebiasedInfoNCE(tau_plus=0.0, temperature=0.1)(*sides), InfoNCE(temperature=0.1)(*sides))


def test_by_name():
    loss = build_loss(LossConfig(name="debiased", tau_plus=0.05), num_rows=9)
    assert isinstance(loss, DebiasedInfoNCE)
    assert loss.denominator.tau_plus == 0.05
    with pytest.raises(AnybatchError, match=r"loss\.tau_plus is 1\.0"):
        LossConfig(name="debiased", tau_plus=1.0)
    with pytest.raises(AnybatchError, match="inclusion"):
        LossConfig(name="debiased", weights="inclusion")


def test_nan_is_not_taken_for_a_clamped_estimate():
    anchors, candidates = torch.eye(4), torch.cat([torch.eye(4), torch.full((1, 4), torch.nan)])
    assert DebiasedInfoNCE(tau_plus=0.1)(anchors, candidates).isnan()
