"""What losses, plans, the cached step and a short run gave before the code was rearranged; see `tests/golden.py`."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from tests import golden


@pytest.fixture(scope="module")
def comparisons():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mining, that so little data gains little
        tensors = golden.computed()
    return golden.compare(golden.FILE, tensors)


@pytest.mark.parametrize("kind", ["loss", "plan", "cached step", "short run"])
def test_golden_values(comparisons, kind):
    """Float64 to 1e-12, plans exactly, float32 as far as another processor's sums agree."""
    chosen = [one for one in comparisons if one.name.startswith(kind)]
    assert len(chosen) >= {"loss": 2500, "plan": 140, "cached step": 16, "short run": 30}[kind]
    bad = [f"{one.difference:.1e} (allowed {one.allowed:.0e}) {one.name}" for one in chosen if not one.good]
    assert not bad, f"{len(bad)} of {len(chosen)} differ:\n" + "\n".join(bad[:40])


def test_every_loss_of_the_registry_is_there():
    """But for those that were added later."""
    # Methods that came after the values have none: their formula is their test (tests/twin.py).
    assert {name for name, _, _ in golden.LOSSES.values()} <= {*golden.registered()}


@pytest.mark.parametrize(("num_rows", "seed"), [(golden.MINING_ROWS, 0), (97, 1)])
def test_plans_depend_on_no_rounding(num_rows, seed):
    """Scores are exact in float32, and among those that mining looks at no two of a row are equal."""
    anchors, positives = golden.teacher_embeddings(num_rows, seed)
    scores = anchors.astype(np.float64) @ positives.astype(np.float64).T
    assert np.array_equal((anchors @ positives.T).astype(np.float64), scores)
    assert np.all(np.diff(np.sort(scores, axis=1)[:, -40:], axis=1) > 0)


def test_comparing_sees_a_small_change(tmp_path):
    """A relative change of 1e-9 in one number of float64, one whole number of a plan, or one tensor more or less."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "loss: made up | losses": torch.randn(5, generator=generator, dtype=torch.float64),
        "loss: made up | gradient": torch.randn(7, 6, generator=generator, dtype=torch.float64),
        "plan: made up | cluster": torch.randint(9, (240,), generator=generator),
    }
    golden.write(tmp_path / "kept", tensors)
    assert all(one.same and one.good for one in golden.compare(tmp_path / "kept", tensors))
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[3] = changed.view(-1)[3] * (1 + 1e-9) if changed.is_floating_point() else 9
        found = golden.compare(tmp_path / "kept", {**tensors, name: changed})
        assert [one.name for one in found if not one.good] == [name]
        rounded = tensor * (1 + 1e-15) if tensor.is_floating_point() else tensor
        (one,) = (one for one in golden.compare(tmp_path / "kept", {**tensors, name: rounded}) if one.name == name)
        assert one.good
        assert one.same == (not tensor.is_floating_point())
        fewer = {key: value for key, value in tensors.items() if key != name}
        assert [one.difference for one in golden.compare(tmp_path / "kept", fewer) if not one.good] == [np.inf]
