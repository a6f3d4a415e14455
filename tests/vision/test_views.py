"""Random views: what they are a function of, how often each change comes, and what it does."""

from __future__ import annotations

import sys

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.vision.views import random_numbers, random_views, view_keys, views_of

ROWS = torch.arange(4000)


@pytest.fixture
def pixels():
    return torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_numbers_are_the_same_everywhere_and_uniform():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # SplitMix64 from seed 0
    numbers = random_numbers(torch.tensor([0]), 3)
    assert (numbers[0] * 2**24).int().tolist() == [number >> 40 for number in published]
    many = random_numbers(view_keys(ROWS, seed=0, step=0, view=0), 5)
    assert ((many >= 0) & (many < 1)).all()
    torch.testing.assert_close(many.mean(dim=0), torch.full((5,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.corrcoef(many.T), torch.eye(5), atol=0.06, rtol=0)


def test_every_row_step_view_and_seed_has_its_own_key():
    keys = [
        view_keys(ROWS[:50], seed=seed, step=step, view=view)
        for seed in range(3)
        for step in range(20)
        for view in range(2)
    ]
    assert len(torch.cat(keys).unique()) == 3 * 20 * 2 * 50


def test_a_view_depends_on_its_pixels_and_key_alone(pixels):
    keys = view_keys(torch.arange(6), seed=1, step=2, view=0)
    views = random_views(pixels, keys)
    assert torch.equal(views, random_views(pixels, keys))
    for rows in ([3], [5, 0], [1, 2, 3, 4]):
        assert torch.equal(random_views(pixels[rows], keys[rows]), views[rows])
    before = torch.get_rng_state()
    other = random_views(pixels, view_keys(torch.arange(6), seed=1, step=3, view=0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (other != views).flatten(1).any(dim=1).all()


def test_changes_come_as_often_as_published():
    """On one colour a crop and a flip change nothing, so that what is left is jitter (.8) and grey (.2)."""
    colour = torch.tensor([0.6, 0.4, 0.3]).view(1, 3, 1, 1).expand(len(ROWS), 3, 4, 4)
    views = random_views(colour, view_keys(ROWS, seed=0, step=0, view=0))
    assert ((views >= 0) & (views <= 1)).all()
    torch.testing.assert_close(views, views[:, :, :1, :1].expand_as(views), atol=1e-5, rtol=0)
    first = views[:, :, 0, 0]
    grey = ((first - first.mean(dim=1, keepdim=True)).abs() < 1e-4).all(dim=1)
    same = ((first - colour[:, :, 0, 0]).abs() < 1e-5).all(dim=1)
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert same.float().mean().item() == pytest.approx(0.2 * 0.8, abs=0.02)


def test_crops_are_parts_of_the_image():
    """Of a picture whose colours are its coordinates: the area and the ratio of what a view shows, and its flips."""
    place = torch.linspace(0, 1, 64)
    coordinates = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64), torch.zeros(64, 64)])
    rows = ROWS[:1000]
    keys = view_keys(rows, seed=0, step=0, view=0)
    plain = random_numbers(keys, 13)[:, 5] >= 0.8  # without jitter
    plain &= random_numbers(keys, 13)[:, 10] >= 0.2  # nor grey
    views = random_views(coordinates.expand(len(rows), -1, -1, -1)[plain], keys[plain])
    width = views[:, 0, 32, -3] - views[:, 0, 32, 2]
    height = views[:, 1, -3, 32] - views[:, 1, 2, 32]
    assert (width < 0).float().mean().item() == pytest.approx(0.5, abs=0.1)  # flipped
    area = width.abs() * height * (63 / 59) ** 2  # of the whole, measured between two pixels
    ratio = width.abs() / height
    assert area.min() > 0.05
    assert area.max() <= 1.03
    assert area.mean().item() == pytest.approx(0.54, abs=0.05)
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4


def test_large_images_are_blurred():
    noise = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(400, 3, 64, 64)
    keys = view_keys(torch.arange(400), seed=0, step=0, view=0)
    sharpness = (random_views(noise, keys).diff(dim=3) ** 2).mean(dim=(1, 2, 3))
    numbers = random_numbers(keys, 13)
    blurred = (numbers[:, 11] < 0.5) & (numbers[:, 12] > 0.3)
    assert sharpness[blurred].mean() < 0.5 * sharpness[numbers[:, 11] >= 0.5].mean()


def test_normalised_pixels_stay_normalised(pixels):
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    keys = torch.stack([view_keys(torch.arange(6), seed=0, step=0, view=view) for view in (0, 1)], dim=1)
    scaled = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = views_of(scaled, keys, mean, std)
    for view, column in zip(views, keys.unbind(dim=1), strict=True):
        expected = (random_views(pixels, column) - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(view, expected, atol=1e-4, rtol=0)


def test_messages(pixels, monkeypatch):
    with pytest.raises(AnybatchError, match=r"shape \(6, 1, 20, 20\); expected images \(B, 3, H, W\)"):
        random_views(pixels[:, :1], torch.arange(6))
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(AnybatchError, match=r"made by kornia. Install it with: pip install 'anybatch\[vision\]'"):
        random_views(pixels, torch.arange(6))
